//! Who the agent is: uid, gid, groups and home, from the image's own files.
//!
//! A static program has no NSS, and must not have one: `/etc/passwd` and `/etc/group` of the
//! image are read as passwd(5) and group(5) say. The supervisor's own groups never count: as uid
//! 0 it has root's.

use anyhow::{Context, Result, bail};

use super::image_file;
use crate::fence::credentials::Identity;

/// Stands for "nobody in particular" where the agent would have been root.
pub const NOBODY: u32 = 65_534;
/// The proxy's own uid and gid; the agent must not share it, or it could signal and read it.
pub const PROXY: u32 = 65_530;

/// The agent's user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// What the kernel will know it by.
    pub identity: Identity,
    /// Its name, where the image has one for the uid.
    pub name: Option<String>,
    /// Its home directory; `/` where the image has none, as container runtimes do.
    pub home: String,
    /// What was not as asked, for an event.
    pub notes: Vec<String>,
}

/// The image's user database.
#[derive(Debug, Default)]
pub struct Database {
    passwd: Vec<PasswdEntry>,
    group: Vec<GroupEntry>,
}

#[derive(Debug)]
struct PasswdEntry {
    name: String,
    uid: u32,
    gid: u32,
    home: String,
}

#[derive(Debug)]
struct GroupEntry {
    name: String,
    gid: u32,
    members: Vec<String>,
}

impl Database {
    /// Reads `/etc/passwd` and `/etc/group`; a missing file is an empty one.
    pub fn read() -> Result<Self> {
        let text = |path: &str| match image_file::read(path) {
            Ok(bytes) => Ok(String::from_utf8_lossy(&bytes).into_owned()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(String::new()),
            Err(error) => Err(error).with_context(|| format!("cannot read {path}")),
        };
        Ok(Self::parse(&text("/etc/passwd")?, &text("/etc/group")?))
    }

    /// Lines that are not whole entries, or whose numbers do not fit 32 bits, are passed over: a
    /// number that is cut to fit could become 0 (CVE-2024-40635).
    #[must_use]
    pub fn parse(passwd: &str, group: &str) -> Self {
        let passwd = passwd.lines().filter_map(|line| {
            let fields: Vec<_> = line.split(':').collect();
            let [name, _, uid, gid, _, home, ..] = fields[..] else {
                return None;
            };
            Some(PasswdEntry {
                name: name.to_owned(),
                uid: uid.parse().ok()?,
                gid: gid.parse().ok()?,
                home: home.to_owned(),
            })
        });
        let group = group.lines().filter_map(|line| {
            let fields: Vec<_> = line.split(':').collect();
            let [name, _, gid, members, ..] = fields[..] else {
                return None;
            };
            let members = members.split(',').filter(|member| !member.is_empty());
            Some(GroupEntry {
                name: name.to_owned(),
                gid: gid.parse().ok()?,
                members: members.map(str::to_owned).collect(),
            })
        });
        Self { passwd: passwd.collect(), group: group.collect() }
    }

    /// Resolves `user[:group]` with more groups by number.
    ///
    /// Without an entry for a number the group is 0, as container runtimes have it, and the home
    /// `/`. The user `sandbox` (what OpenShell's images have) may be missing, any other name may
    /// not. Root becomes [`NOBODY`].
    pub fn resolve(&self, spec: &str, more_groups: &[u32]) -> Result<User> {
        let (user, group) = match spec.split_once(':') {
            Some((user, group)) => (user, Some(group)),
            None => (spec, None),
        };
        let mut notes = Vec::new();
        let entry = match user.parse::<u32>() {
            Ok(uid) => self.passwd.iter().find(|entry| entry.uid == uid),
            Err(_) => self.passwd.iter().find(|entry| entry.name == user),
        };
        let (mut uid, mut gid) = match (entry, user.parse::<u32>()) {
            (Some(entry), _) => (entry.uid, entry.gid),
            (None, Ok(uid)) => (uid, 0),
            (None, Err(_)) if user == "sandbox" => {
                notes.push(format!("the image has no user 'sandbox'; the agent runs as {NOBODY}"));
                (NOBODY, NOBODY)
            }
            (None, Err(_)) => bail!(
                "the image's /etc/passwd has no user '{}': name one that it has, or a number",
                user.escape_debug()
            ),
        };
        if let Some(group) = group {
            gid = match group.parse::<u32>() {
                Ok(gid) => gid,
                Err(_) => match self.group.iter().find(|entry| entry.name == group) {
                    Some(entry) => entry.gid,
                    None if uid == NOBODY && group == "sandbox" => NOBODY,
                    None => bail!(
                        "the image's /etc/group has no group '{}': name one that it has, or a number",
                        group.escape_debug()
                    ),
                },
            };
        }
        let mut entry = entry;
        if uid == 0 {
            notes.push(format!("the agent would have been root; it runs as {NOBODY}"));
            uid = NOBODY;
            entry = self.passwd.iter().find(|entry| entry.uid == uid);
            if gid == 0 {
                gid = NOBODY;
            }
        }
        if uid == PROXY || gid == PROXY {
            bail!("uid and gid {PROXY} are the proxy's own: run the agent as another user");
        }
        if [uid, gid].iter().chain(more_groups).any(|id| *id == u32::MAX) {
            bail!("{} is no user or group: to the kernel it means none", u32::MAX);
        }
        let name = entry.map(|entry| entry.name.clone());
        let mut groups: Vec<u32> = self
            .group
            .iter()
            .filter(|group| name.as_ref().is_some_and(|name| group.members.contains(name)))
            .map(|group| group.gid)
            .chain(more_groups.iter().copied())
            .filter(|gid| *gid != PROXY)
            .collect();
        groups.sort_unstable();
        groups.dedup();
        let home = entry.map(|entry| entry.home.clone()).filter(|home| home.starts_with('/'));
        Ok(User {
            identity: Identity { uid, gid, groups },
            name,
            home: home.unwrap_or_else(|| "/".to_owned()),
            notes,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn database() -> Database {
        Database::parse(
            "root:x:0:0:root:/root:/bin/sh\n\
             agent:x:1000:1000::/home/agent:/bin/sh\n\
             broken:x:4294967296:0::/:\n\
             short:x:7\n\
             nobody:x:65534:65534::/nonexistent:\n",
            "root:x:0:root\nagent:x:1000:\ndocker:x:998:agent,other\nadm:x:4:root,agent\n",
        )
    }

    #[test]
    fn a_name_brings_its_own_groups_and_home() {
        let user = database().resolve("agent", &[2000]).unwrap();
        assert_eq!(user.identity, Identity { uid: 1000, gid: 1000, groups: vec![4, 998, 2000] });
        assert_eq!(user.home, "/home/agent");
    }

    #[test]
    fn a_number_is_the_same_user_as_its_name() {
        let (number, name) =
            (database().resolve("1000", &[]).unwrap(), database().resolve("agent", &[]).unwrap());
        assert_eq!(number, name);
    }

    #[test]
    fn a_number_without_an_entry_has_the_runtimes_group() {
        let user = database().resolve("1234", &[]).unwrap();
        assert_eq!((user.identity.uid, user.identity.gid), (1234, 0));
        assert_eq!(database().resolve("1234:55", &[]).unwrap().identity.gid, 55);
        assert_eq!(user.home, "/");
    }

    #[test]
    fn root_becomes_nobody_and_says_so() {
        for spec in ["0", "root", "0:0"] {
            let user = database().resolve(spec, &[]).unwrap();
            assert_eq!((user.identity.uid, user.identity.gid), (NOBODY, NOBODY), "{spec}");
            assert!(user.identity.groups.is_empty(), "{spec}");
            assert_eq!(user.notes.len(), 1);
        }
    }

    #[test]
    fn a_missing_name_is_an_error_except_sandbox() {
        assert!(database().resolve("ghost", &[]).is_err());
        assert!(database().resolve("agent:ghost", &[]).is_err());
        let user = database().resolve("sandbox:sandbox", &[]).unwrap();
        assert_eq!((user.identity.uid, user.identity.gid), (NOBODY, NOBODY));
    }

    #[test]
    fn numbers_that_do_not_fit_never_become_zero() {
        assert!(database().resolve("4294967296", &[]).is_err());
        assert!(database().resolve("-1", &[]).is_err());
        assert!(database().resolve("broken", &[]).is_err());
    }

    #[test]
    fn a_group_by_name_or_number_goes_with_any_user() {
        let gid = |spec: &str| database().resolve(spec, &[]).unwrap().identity.gid;
        assert_eq!(gid("agent:docker"), 998);
        assert_eq!(gid("1234:docker"), 998);
        assert_eq!(gid("sandbox:1000"), 1000);
        // The pod's own groups stay beside the image's: what a volume with fsGroup is opened by.
        let user = database().resolve("1000:0", &[3000, 2000, 998]).unwrap();
        assert_eq!(user.identity, Identity { uid: 1000, gid: 0, groups: vec![4, 998, 2000, 3000] });
        // OpenShift gives a number that no image has, and group 0.
        let user = database().resolve("1000680000", &[1_000_680_000]).unwrap();
        assert_eq!((user.identity.gid, user.identity.groups), (0, vec![1_000_680_000]));
    }

    #[test]
    fn the_number_that_means_none_is_no_user() {
        for (spec, groups) in
            [("4294967295", &[][..]), ("1000:4294967295", &[]), ("1000", &[u32::MAX])]
        {
            assert!(database().resolve(spec, groups).is_err(), "{spec} {groups:?}");
        }
    }

    #[test]
    fn the_proxys_uid_is_refused() {
        assert!(database().resolve("65530", &[]).is_err());
        assert!(database().resolve("1000:65530", &[]).is_err());
        assert_eq!(database().resolve("agent", &[65530]).unwrap().identity.groups, [4, 998]);
    }
}

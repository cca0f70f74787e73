//! Whether a process runs other code than its executable's and the image's (`tainted` in a
//! policy's `binaries`).
//!
//! A path and a digest tell which file was executed, not what runs in it: `LD_PRELOAD`, an option
//! of a runtime or a library of the agent's puts foreign code under a trusted name. Looked at, while
//! the caller is stopped at connect(2), are the variables that it was executed with and the files
//! that it maps executable.
//!
//! Both are the process's own memory and say what it wants to a degree: one that runs foreign code
//! already can wipe its variables, but not its mappings, and one that copies its code into
//! anonymous memory has no mapping left to see. Runtimes make such memory all the time, so it is
//! not judged. This is a guard for tools; an interpreter that is listed runs any script anyway.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, openat2, statat};
use rustix::process::Pid;

use super::steering;
use crate::policy::Policy;

/// The most that is read of a process's environment or of its mappings, in bytes; a process with
/// more counts as tainted.
const MAX_READ: u64 = 4 << 20;
/// The longest reason, in characters.
const MAX_REASON: usize = 300;
/// Times to look again at mappings that change.
const LOOKS: usize = 5;
const OTHERS_WRITE: u32 = 0o022;

/// Which executables are looked at, and what the container itself gave them.
#[derive(Debug)]
pub struct Watched {
    /// One of them asks.
    policies: Vec<Arc<Policy>>,
    /// The container's own steering variables: with the author's value one taints nobody.
    authors: Arc<Authors>,
}

/// The steering variables that the container itself has.
#[derive(Debug)]
pub struct Authors(HashMap<OsString, OsString>);

impl Authors {
    /// Of all its variables.
    pub fn of(container: impl IntoIterator<Item = (OsString, OsString)>) -> Arc<Self> {
        let steering = container.into_iter().filter(|(name, _)| steering::steers(name));
        Arc::new(Self(steering.collect()))
    }
}

impl Watched {
    /// `None` where no policy asks for a look, which then costs nothing.
    #[must_use]
    pub fn new(policies: &[&Arc<Policy>], authors: &Arc<Authors>) -> Option<Self> {
        let policies: Vec<_> =
            policies.iter().filter(|policy| policy.watches_any()).copied().cloned().collect();
        (!policies.is_empty()).then(|| Self { policies, authors: Arc::clone(authors) })
    }

    /// Whether this executable is looked at.
    #[must_use]
    pub fn watches(&self, exe: &str) -> bool {
        self.policies.iter().any(|policy| policy.watches(exe))
    }

    /// Why the process is tainted; `None` also where its executable is not looked at. What cannot
    /// be read taints.
    #[must_use]
    pub fn look(&self, pid: Pid, exe: &str) -> Option<String> {
        if !self.watches(exe) {
            return None;
        }
        let number = pid.as_raw_nonzero().get();
        let why =
            read(number, "environ").and_then(|environment| match self.variable(&environment) {
                Some(why) => Ok(Some(why)),
                None => foreign_code(number),
            });
        let mut why =
            why.unwrap_or_else(|error| Some(format!("it cannot be looked at: {error}")))?;
        if let Some((end, _)) = why.char_indices().nth(MAX_REASON) {
            why.truncate(end);
        }
        Some(why)
    }

    fn variable(&self, environment: &[u8]) -> Option<String> {
        environment.split(|byte| *byte == 0).find_map(|variable| {
            let at = variable.iter().position(|byte| *byte == b'=')?;
            let (name, value) = (OsStr::from_bytes(&variable[..at]), &variable[at + 1..]);
            let authors = self.authors.0.get(name).is_some_and(|own| own.as_bytes() == value);
            (steering::steers(name) && !authors)
                .then(|| format!("{} is set", name.to_string_lossy()))
        })
    }
}

fn read(pid: i32, what: &str) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(format!("/proc/{pid}/{what}"))?.take(MAX_READ).read_to_end(&mut bytes)?;
    if bytes.len() as u64 == MAX_READ {
        return Err(io::Error::other(format!("its {what} is longer than {MAX_READ} bytes")));
    }
    Ok(bytes)
}

/// One line of `/proc/PID/maps` that is executable and of a file.
#[derive(Debug, PartialEq, Eq)]
struct Mapping {
    /// As the name in `/proc/PID/map_files`.
    range: String,
    /// Major and minor number, of the file system that holds the inode.
    device: (u32, u32),
    inode: u64,
    path: PathBuf,
}

/// proc(5): range, permissions, offset, device, inode, path.
fn mapping(line: &[u8]) -> Option<Mapping> {
    let mut fields = line.splitn(6, |byte| *byte == b' ');
    let (range, permissions) = (fields.next()?, fields.next()?);
    if permissions.get(2) != Some(&b'x') {
        return None;
    }
    let (major, minor) = std::str::from_utf8(fields.nth(1)?).ok()?.split_once(':')?;
    let part = |digits: &str| u32::from_str_radix(digits, 16).ok();
    let device = (part(major)?, part(minor)?);
    let inode = std::str::from_utf8(fields.next()?).ok()?.parse().ok()?;
    if inode == 0 {
        return None;
    }
    // maps pads its numbers to eight digits, map_files does not.
    let (start, end) = std::str::from_utf8(range).ok()?.split_once('-')?;
    let number = |digits: &str| u64::from_str_radix(digits, 16).ok();
    let range = format!("{:x}-{:x}", number(start)?, number(end)?);
    let path = fields.next().unwrap_or_default().trim_ascii_start().to_vec();
    Some(Mapping { range, device, inode, path: OsString::from_vec(path).into() })
}

/// The process is stopped by one thread; others may map meanwhile, and may do so on purpose.
fn foreign_code(pid: i32) -> io::Result<Option<String>> {
    for _ in 0..LOOKS {
        match foreign_mapping(pid, &read(pid, "maps")?) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            looked => return looked,
        }
    }
    Ok(Some("its mappings change as they are looked at".to_owned()))
}

/// `NotFound` where a mapping is not there any more.
fn foreign_mapping(pid: i32, maps: &[u8]) -> io::Result<Option<String>> {
    let mut any = false;
    let root = File::open(format!("/proc/{pid}/root"))?;
    for mapping in maps.split(|byte| *byte == b'\n').filter_map(mapping) {
        any = true;
        let meta = match by_path(&root, &mapping) {
            Some(meta) => meta,
            // Deleted, replaced, or a file system that shows other numbers.
            None => match fs::metadata(format!("/proc/{pid}/map_files/{}", mapping.range)) {
                Ok(meta) => meta,
                // A user namespace of the pod's has no right to these links.
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                    return Ok(Some(unknown(&mapping)));
                }
                Err(error) => return Err(error),
            },
        };
        if meta.uid() != 0 || meta.mode() & OTHERS_WRITE != 0 {
            return Ok(Some(format!(
                "it runs code of {}, which others than root own or may write",
                mapping.path.display()
            )));
        }
    }
    // One that ends shows none, without an error.
    Ok((!any).then(|| "it shows no code at all".to_owned()))
}

/// The file that has the mapping's path now, if it is still the same. Less than half as dear as the
/// kernel's own link to it.
///
/// An inode's number tells files apart on one file system only, where it is not given away as long
/// as the mapping holds the file. So the device must be the same; where the file system shows
/// another one in each place (overlayfs and btrfs may), nobody but root may have been able to put
/// something else there. No link is followed either: the agent could lead a path of its own to a
/// file of root's.
fn by_path(root: &File, mapping: &Mapping) -> Option<Metadata> {
    let path = mapping.path.strip_prefix("/").ok()?;
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let file = openat2(root, path, flags, Mode::empty(), ResolveFlags::NO_SYMLINKS).ok()?;
    let meta = File::from(file).metadata().ok()?;
    let device = (rustix::fs::major(meta.dev()), rustix::fs::minor(meta.dev()));
    let same = device == mapping.device || only_root_places(root, path);
    (meta.ino() == mapping.inode && same).then_some(meta)
}

/// Whether each directory on the way is root's own, and writable by no other. What holds from the
/// root on cannot change meanwhile.
fn only_root_places(root: &File, path: &Path) -> bool {
    let mut above: Vec<_> = path.ancestors().skip(1).collect();
    above.reverse();
    above.iter().all(|at| {
        statat(root, *at, AtFlags::SYMLINK_NOFOLLOW | AtFlags::EMPTY_PATH).is_ok_and(|stat| {
            FileType::from_raw_mode(stat.st_mode).is_dir()
                && stat.st_uid == 0
                && stat.st_mode & OTHERS_WRITE == 0
        })
    })
}

fn unknown(mapping: &Mapping) -> String {
    format!("it runs code of {}, which has no path any more", mapping.path.display())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::{Source, load};

    fn watch(container: &[(&str, &str)]) -> Watched {
        let yaml = "
network_policies:
  p:
    endpoints: [{ host: a.example.com, port: 443 }]
    binaries: [{ path: \"/**\", tainted: refuse }]
";
        let policy = load(&Source { name: "p", bytes: yaml.as_bytes() }, None).unwrap().policy;
        let container = container.iter().map(|(name, value)| (name.into(), value.into()));
        Watched::new(&[&Arc::new(policy)], &Authors::of(container)).unwrap()
    }

    #[test]
    fn the_authors_own_value_does_not_taint() {
        let watch = watch(&[("NODE_OPTIONS", "--max-old-space-size=512"), ("PATH", "/bin")]);
        let why = |environment: &[u8]| watch.variable(environment);
        assert_eq!(why(b"PATH=/tmp\0HOME=/\0NODE_OPTIONS=--max-old-space-size=512\0"), None);
        assert_eq!(why(b"A=1\0NODE_OPTIONS=--require=/tmp/x\0").unwrap(), "NODE_OPTIONS is set");
        assert_eq!(why(b"LD_PRELOAD=\0").unwrap(), "LD_PRELOAD is set");
        // The author's, and once more.
        let twice = b"NODE_OPTIONS=--max-old-space-size=512\0NODE_OPTIONS=-r x\0";
        assert!(why(twice).is_some());
        assert_eq!(why(b""), None);
        assert_eq!(why(b"LD_PRELOAD\0=x\0"), None);
    }

    #[test]
    fn mappings_as_the_kernel_writes_them() {
        let code = b"00400000-00452000 r-xp 00000000 08:02 173521      /usr/bin/dbus daemon";
        let want = Mapping {
            range: "400000-452000".into(),
            device: (8, 2),
            inode: 173_521,
            path: "/usr/bin/dbus daemon".into(),
        };
        assert_eq!(mapping(code), Some(want));
        for line in [
            &b"7f0000000000-7f0000001000 rw-p 00000000 08:02 5 /lib/x.so"[..],
            b"7f0000000000-7f0000001000 r-xp 00000000 00:00 0",
            b"7ffd0000000-7ffd0001000 r-xp 00000000 00:00 0                  [vdso]",
            b"",
            b"r-xp",
        ] {
            assert_eq!(mapping(line), None);
        }
    }

    #[test]
    fn a_process_that_shows_nothing_is_tainted() {
        let own = i32::try_from(std::process::id()).unwrap();
        for maps in [&b""[..], b"7f0000000000-7f0000001000 r-xp 00000000 00:00 0\n"] {
            assert!(foreign_mapping(own, maps).unwrap().unwrap().contains("no code"));
        }
        // A mapping that is not there is looked for again, not passed over.
        let gone = b"1000-2000 r-xp 00000000 08:02 5 /lib/x.so\n";
        let looked = foreign_mapping(own, gone);
        assert!(
            looked
                .map_or_else(|error| error.kind() == io::ErrorKind::NotFound, |why| why.is_some())
        );
    }

    #[test]
    fn an_unwatched_policy_costs_nothing() {
        let bytes = b"network_policies: { p: { binaries: [{ path: /x }] } }";
        let policy = load(&Source { name: "p", bytes }, None).unwrap().policy;
        assert!(Watched::new(&[&Arc::new(policy)], &Authors::of([])).is_none());
    }

    #[test]
    fn a_path_counts_only_while_it_leads_to_the_mapped_file() {
        let own = i32::try_from(std::process::id()).unwrap();
        let root = File::open("/").unwrap();
        let maps = read(own, "maps").unwrap();
        let mapped = maps.split(|byte| *byte == b'\n').find_map(mapping).unwrap();
        let found = by_path(&root, &mapped).unwrap();
        assert_eq!(found.ino(), fs::metadata(&mapped.path).unwrap().ino());
        let like = |path: PathBuf, inode| Mapping {
            range: mapped.range.clone(),
            device: mapped.device,
            inode,
            path,
        };
        assert!(by_path(&root, &like(mapped.path.clone(), mapped.inode + 1)).is_none());
        let gone = like("/no/such (deleted)".into(), mapped.inode);
        assert!(by_path(&root, &gone).is_none() && unknown(&gone).contains("/no/such"));
        // The agent's own name for it is not the file's.
        let dir = tempfile::tempdir().unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(mapped.path.parent().unwrap(), &link).unwrap();
        let led = link.join(mapped.path.file_name().unwrap());
        assert_eq!(fs::metadata(&led).unwrap().ino(), mapped.inode);
        assert!(by_path(&root, &like(led, mapped.inode)).is_none());
    }

    #[test]
    fn an_inode_of_another_device_counts_only_where_root_alone_could_place_it() {
        if !rustix::process::geteuid().is_root() {
            println!("SKIPPED: needs root");
            return;
        }
        let root = File::open("/").unwrap();
        // Root's own file below /tmp, where everybody may write; and one where nobody may.
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        let shell = fs::canonicalize("/bin/sh").unwrap();
        let mapping = |path: &Path, other: u32| {
            let meta = fs::metadata(path).unwrap();
            let (major, minor) = (rustix::fs::major(meta.dev()), rustix::fs::minor(meta.dev()));
            let device = (major, minor + other);
            Mapping { range: "1-2".into(), device, inode: meta.ino(), path: path.to_owned() }
        };
        assert!(by_path(&root, &mapping(&file, 0)).is_some());
        assert!(by_path(&root, &mapping(&file, 1)).is_none());
        assert!(by_path(&root, &mapping(&shell, 0)).is_some());
        assert!(by_path(&root, &mapping(&shell, 1)).is_some());
    }

    #[test]
    fn real_processes() {
        if !rustix::process::geteuid().is_root() {
            println!("SKIPPED: needs root");
            return;
        }
        let watch = watch(&[]);
        let look = |command: &mut std::process::Command| {
            let mut child = command.arg("100").spawn().unwrap();
            let pid = Pid::from_child(&child);
            // Between fork and exec it is this program.
            let exe = loop {
                let exe = fs::read_link(format!("/proc/{}/exe", child.id())).unwrap();
                let mapped = fs::read_to_string(format!("/proc/{}/maps", child.id())).unwrap();
                let started = mapped.contains("libc");
                if started && (exe.ends_with("sleep") || exe.ends_with("tool")) {
                    break exe;
                }
                std::thread::yield_now();
            };
            let why = watch.look(pid, exe.to_str().unwrap());
            child.kill().unwrap();
            child.wait().unwrap();
            why
        };
        let sleep = || {
            let mut command = std::process::Command::new("/bin/sleep");
            command.env_clear();
            command
        };
        assert_eq!(look(&mut sleep()), None);
        assert_eq!(look(sleep().env("LD_AUDIT", "/x")).unwrap(), "LD_AUDIT is set");
        // A copy that another user owns is foreign code, whatever it holds.
        let dir = tempfile::tempdir().unwrap();
        let copy = dir.path().join("tool");
        fs::copy("/bin/sleep", &copy).unwrap();
        let run = || {
            let mut command = std::process::Command::new(&copy);
            command.env_clear();
            command
        };
        assert_eq!(look(&mut run()), None);
        std::os::unix::fs::chown(&copy, Some(1000), None).unwrap();
        assert!(look(&mut run()).unwrap().contains("tool"));
        std::os::unix::fs::chown(&copy, Some(0), None).unwrap();
        fs::set_permissions(&copy, std::os::unix::fs::PermissionsExt::from_mode(0o775)).unwrap();
        assert!(look(&mut run()).unwrap().contains("tool"));
    }
}

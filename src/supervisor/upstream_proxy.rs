//! The operator's proxy for the way out, by the supervisor's own flags: an image's ENV names none.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use super::args::RunArgs;
use crate::fence::credentials::Identity;
use crate::fence::landlock::PathRule;
use crate::proxy::UpstreamProxy;

/// The longest file of credentials, in bytes.
const CREDENTIALS_MAX: u64 = 4096;

/// Read, others and group.
const OTHERS_READ: u32 = 0o004;
const GROUP_READ: u32 = 0o040;

/// As the proxy's process gets it.
#[derive(Clone, Serialize, Deserialize)]
pub struct Settings {
    url: String,
    credentials: Option<String>,
    direct: String,
}

/// Without the credentials.
impl fmt::Debug for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Settings")
            .field("url", &self.url)
            .field("credentials", &self.credentials.as_ref().map(|_| ".."))
            .field("direct", &self.direct)
            .finish()
    }
}

impl Settings {
    /// From the command line; checked, so that a mistake is told before anything starts.
    pub fn read(args: &RunArgs) -> Result<Option<Self>> {
        let Some(url) = args.upstream_proxy.clone() else { return Ok(None) };
        let credentials = args.upstream_proxy_auth_file.as_deref().map(credentials).transpose()?;
        let settings = Self { url, credentials, direct: args.no_upstream_proxy.clone() };
        settings.proxy().context("--upstream-proxy, --no-upstream-proxy")?;
        Ok(Some(settings))
    }

    /// What the proxy works with.
    pub fn proxy(&self) -> Result<UpstreamProxy> {
        Ok(UpstreamProxy::new(&self.url, self.credentials.as_deref(), &self.direct)?)
    }
}

/// Refuses to go on where the agent itself may read the file: kubelet gives a Secret's files to the
/// pod's `fsGroup`, which is one of the agent's groups. `granted` is what Landlock leaves it, if it
/// surely holds.
pub fn keep_from(agent: &Identity, args: &RunArgs, granted: Option<&[PathRule]>) -> Result<()> {
    let Some(path) = &args.upstream_proxy_auth_file else { return Ok(()) };
    let name = path.display();
    let file = path.canonicalize().with_context(|| format!("cannot find {name}"))?;
    let meta = file.metadata().with_context(|| format!("cannot look at {name}"))?;
    let of_group = meta.gid() == agent.gid || agent.groups.contains(&meta.gid());
    let readable = meta.uid() == agent.uid
        || of_group && meta.mode() & GROUP_READ != 0
        || meta.mode() & OTHERS_READ != 0;
    let within =
        |rule: &PathRule| rule.path.canonicalize().is_ok_and(|granted| file.starts_with(granted));
    let reachable = granted.is_none_or(|granted| granted.iter().any(within));
    ensure!(
        !readable || !reachable,
        "{name} holds credentials and the agent may read it, as its owner or by one of its groups \
         (an fsGroup is one): mount it where filesystem_policy leads to no directory above it"
    );
    Ok(())
}

/// Reads the file, which the agent must not be able to: Landlock may leave it the directory.
fn credentials(path: &Path) -> Result<String> {
    let name = path.display();
    let file = File::open(path).with_context(|| format!("cannot open {name}"))?;
    let mode = file.metadata().with_context(|| format!("cannot look at {name}"))?.mode();
    ensure!(
        mode & OTHERS_READ == 0,
        "{name} holds credentials and everybody may read it: give it the mode 0400 (for a Secret: \
         defaultMode: 0400)"
    );
    let mut text = String::new();
    file.take(CREDENTIALS_MAX)
        .read_to_string(&mut text)
        .with_context(|| format!("cannot read {name}"))?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fence::landlock::Access;
    use clap::Parser;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn credentials_are_read_from_a_file_of_roots_and_shown_nowhere() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "me:s3cret\n").unwrap();
        let path = file.path().to_str().unwrap();
        let words = ["x", "--upstream-proxy", "http://p:1", "--upstream-proxy-auth-file", path];
        let args = RunArgs::try_parse_from(words).unwrap();
        let mode = |mode| {
            let mode = std::fs::Permissions::from_mode(mode);
            std::fs::set_permissions(file.path(), mode).unwrap();
        };
        mode(0o644);
        let error = Settings::read(&args).unwrap_err().to_string();
        assert!(error.contains("defaultMode: 0400"), "{error}");
        mode(0o400);
        let settings = Settings::read(&args).unwrap().unwrap();
        assert_eq!(settings.credentials.as_deref(), Some("me:s3cret\n"));
        let shown = format!("{settings:?} {:?}", settings.proxy().unwrap());
        assert!(!shown.contains("s3cret") && !shown.contains("Basic"), "{shown}");
        mode(0o600);
        std::fs::write(file.path(), "no colon").unwrap();
        let error = format!("{:#}", Settings::read(&args).unwrap_err());
        assert!(error.contains("user:password") && !error.contains("no colon"), "{error}");
    }

    /// As kubelet makes a Secret's files where the pod has an `fsGroup`.
    #[test]
    fn a_file_that_the_agent_may_read_by_a_group_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("auth");
        std::fs::write(&file, "me:it").unwrap();
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o440)).unwrap();
        let gid = std::fs::metadata(&file).unwrap().gid();
        let words = [
            "x",
            "--upstream-proxy",
            "http://p:1",
            "--upstream-proxy-auth-file",
            file.to_str().unwrap(),
        ];
        let args = RunArgs::try_parse_from(words).unwrap();
        let agent = |groups: &[u32]| Identity { uid: 61_000, gid: 61_000, groups: groups.to_vec() };
        let rule = |path: &Path| PathRule { path: path.to_owned(), access: Access::ReadOnly };
        let (here, elsewhere) = ([rule(dir.path())], [rule(Path::new("/usr"))]);
        assert!(keep_from(&agent(&[gid]), &args, None).is_err(), "Landlock may not hold");
        assert!(keep_from(&agent(&[gid]), &args, Some(&here)).is_err());
        assert!(keep_from(&agent(&[gid]), &args, Some(&elsewhere)).is_ok());
        assert!(keep_from(&agent(&[gid + 1]), &args, Some(&here)).is_ok());
    }

    #[test]
    fn without_the_flag_there_is_none() {
        let args = RunArgs::try_parse_from(["x"]).unwrap();
        assert!(Settings::read(&args).unwrap().is_none());
        let args = RunArgs::try_parse_from(["x", "--upstream-proxy", "p:1"]).unwrap();
        assert!(Settings::read(&args).is_err());
    }
}

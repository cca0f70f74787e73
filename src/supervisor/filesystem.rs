//! What of the file system the agent sees: the policy's lists, a base without which no program
//! starts, and the directories that the policy promises and the image lacks.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::{CWD, Gid, Mode, OFlags, ResolveFlags, Uid, fchown, openat2};

use super::identity::User;
use crate::event::{self, Class, Event, Severity};
use crate::fence::landlock::{Access, PathRule};
use crate::policy::Filesystem;

/// Readable in every fence: OpenShell's baseline for proxy mode (format reference, 6), and the
/// places of the dynamic loader in images whose /bin, /sbin and /lib64 are not links into /usr.
const READ: [&str; 10] = [
    "/usr",
    "/lib",
    "/lib64",
    "/bin",
    "/sbin",
    "/etc",
    "/app",
    "/var/log",
    "/proc",
    "/dev/urandom",
];
/// Writable in every fence. /dev/null as well: a shell without it does nothing useful.
const WRITE: [&str; 3] = ["/sandbox", "/tmp", "/dev/null"];

/// Refuses a policy that opens the run directory, or a part of it: an agent that may open it, if
/// only for reading, can take the locks that supervisors begin and are found by (flock(2)). What
/// the agent reads in it is added by [`rules`].
///
/// Returns the working directory that joins the rules. One that holds the run directory (`/`, in
/// an image that names no other) is not the policy's word: it is left out, and an event says so.
///
/// `run_dir` must exist: a path that leads to it by a link could not be known else.
pub fn guard<'a>(
    policy: &Filesystem,
    workdir: Option<&'a Path>,
    run_dir: &Path,
) -> Result<Option<&'a Path>> {
    let shown = run_dir.display();
    let run_dir = real(run_dir);
    let meets = |path: &Path| lie_together(&real(path), &run_dir);
    for base in READ.iter().chain(&WRITE) {
        ensure!(
            !meets(Path::new(base)),
            "the run directory {shown} and {base}, which every fence opens, lie one in the other: \
             name another --run-dir"
        );
    }
    for (list, paths) in [("read_only", &policy.read_only), ("read_write", &policy.read_write)] {
        for path in paths {
            ensure!(
                !meets(Path::new(path)),
                "filesystem_policy.{list}: {path} opens the supervisor's run directory {shown}, \
                 whose locks the agent could then hold: leave it out, and name what the agent \
                 needs beside the run directory path by path"
            );
        }
    }
    let (left_out, included): (Option<_>, Option<_>) =
        match workdir.filter(|_| policy.include_workdir) {
            Some(dir) if meets(dir) => (Some(dir), None),
            dir => (None, dir),
        };
    if let Some(dir) = left_out {
        event::emit(&Event::new(Class::Config, "DEGRADED", Severity::Medium).subject(format!(
            "the working directory {} is not opened to the agent: the run directory {shown} lies \
             there; name what the agent writes to in filesystem_policy.read_write",
            dir.display()
        )));
    }
    Ok(included)
}

/// Whether one path is the other, lies in it or holds it, links followed.
#[must_use]
pub fn meets(path: &Path, run_dir: &Path) -> bool {
    lie_together(&real(path), &real(run_dir))
}

fn lie_together(one: &Path, other: &Path) -> bool {
    one.starts_with(other) || other.starts_with(one)
}

/// A path with its links followed as far as it exists.
fn real(path: &Path) -> PathBuf {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let known = path.ancestors().find_map(|at| {
        let rest = path.strip_prefix(at).ok()?;
        Some(std::fs::canonicalize(at).ok()?.join(rest))
    });
    known.unwrap_or(path)
}

/// Rules for what the policy asks, in the order of their paths; the wider access wins where a
/// path is named twice.
///
/// `named` rules must exist under `hard_requirement`; the base is left out where the image has
/// nothing at the path.
///
/// `workdir` is what [`guard`] returned, `volumes` what joins beyond the policy's lists.
#[must_use]
pub fn rules(
    policy: &Filesystem,
    workdir: Option<&Path>,
    tls: &Path,
    volumes: &[PathRule],
) -> Vec<PathRule> {
    let base = |path: &&str| Path::new(*path).exists();
    let read = READ.iter().copied().filter(base).map(PathBuf::from);
    let write = WRITE.iter().copied().filter(base).map(PathBuf::from);
    let workdir = workdir.map(Path::to_owned);
    let read = read.chain(policy.read_only.iter().map(PathBuf::from)).chain([tls.to_owned()]);
    let write = write.chain(policy.read_write.iter().map(PathBuf::from)).chain(workdir);
    let volumes = |wanted| {
        let volumes = volumes.iter().filter(move |rule| rule.access == wanted);
        volumes.map(|rule| rule.path.clone())
    };
    let read = read.chain(volumes(Access::ReadOnly));
    let write = write.chain(volumes(Access::ReadWrite));
    let mut rules = BTreeMap::new();
    for (path, access) in
        read.map(|path| (path, Access::ReadOnly)).chain(write.map(|path| (path, Access::ReadWrite)))
    {
        rules.insert(path, access);
    }
    rules.into_iter().map(|(path, access)| PathRule { path, access }).collect()
}

/// Makes the `read_write` directories that are missing and gives to the agent what was made.
///
/// What exists is left as it is. A symlink on the way is refused: root would follow it to a place
/// that the policy does not name.
pub fn make_missing(policy: &Filesystem, user: &User) -> Result<Vec<PathBuf>> {
    let mut made = Vec::new();
    for path in policy.read_write.iter().map(Path::new) {
        if std::fs::symlink_metadata(path).is_ok() {
            continue;
        }
        make(path, user, &mut made).with_context(|| {
            format!("filesystem_policy.read_write: cannot make {}", path.display())
        })?;
    }
    Ok(made)
}

fn make(path: &Path, user: &User, made: &mut Vec<PathBuf>) -> Result<()> {
    let mut at = PathBuf::new();
    for component in path.components() {
        match component {
            Component::RootDir => {}
            Component::Normal(_) if at.is_absolute() => {}
            _ => bail!("the path is not absolute or not plain"),
        }
        at.push(component);
        match std::fs::symlink_metadata(&at) {
            Ok(meta) if meta.is_dir() => continue,
            Ok(meta) if meta.is_symlink() => bail!("{} is a symbolic link", at.display()),
            Ok(_) => bail!("{} is not a directory", at.display()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error).with_context(|| format!("{}", at.display())),
        }
        // The mode comes with the making: without CAP_FOWNER it could not be changed after the
        // directory has gone to the agent.
        std::fs::DirBuilder::new().mode(0o755).create(&at)?;
        // What is given away is what was made: opened without following any link, and still
        // root's. Another process of the container may have moved things meanwhile.
        let dir = openat2(
            CWD,
            &at,
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
            ResolveFlags::NO_SYMLINKS,
        )
        .with_context(|| format!("cannot open {} after making it", at.display()))?;
        let (uid, gid) = (user.identity.uid, user.identity.gid);
        fchown(&dir, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))
            .with_context(|| format!("cannot give {} to uid {uid}", at.display()))?;
        made.push(at.clone());
    }
    Ok(())
}

/// Where execvp(3) would find `program` on `path`, seen from `workdir`.
///
/// Resolved before the fork, since nothing may allocate after it; the agent's own rights are
/// checked by the kernel at execve(2).
pub fn find_program(
    program: &str,
    path: Option<&str>,
    workdir: &Path,
) -> Result<CString, NotFound> {
    let not_found = || NotFound { program: program.to_owned(), executable: false };
    let c_string = |path: PathBuf| {
        use std::os::unix::ffi::OsStringExt;
        CString::new(path.into_os_string().into_vec()).map_err(|_| not_found())
    };
    if program.is_empty() {
        return Err(not_found());
    }
    if program.contains('/') {
        let path = workdir.join(program);
        return if path.exists() { c_string(path) } else { Err(not_found()) };
    }
    let mut error = not_found();
    for dir in path.unwrap_or("/usr/local/bin:/usr/bin:/bin").split(':') {
        let candidate = workdir.join(dir).join(program);
        let Ok(meta) = candidate.metadata() else {
            continue;
        };
        if meta.is_file() {
            use std::os::unix::fs::PermissionsExt;
            if meta.permissions().mode() & 0o111 != 0 {
                return c_string(candidate);
            }
            error.executable = true;
        }
    }
    Err(error)
}

/// No such program on the agent's PATH.
#[derive(Debug, thiserror::Error)]
#[error("{}: {}", program.escape_debug(), if *executable { "not executable" } else { "not found" })]
pub struct NotFound {
    program: String,
    /// A file was there that nobody may execute (exit code 126 instead of 127).
    pub executable: bool,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fence::credentials::Identity;

    fn policy(read_only: &[&str], read_write: &[&str]) -> Filesystem {
        Filesystem {
            read_only: read_only.iter().map(ToString::to_string).collect(),
            read_write: read_write.iter().map(ToString::to_string).collect(),
            include_workdir: true,
        }
    }

    fn user() -> User {
        let identity = Identity { uid: 12, gid: 34, groups: vec![] };
        User { identity, name: None, home: "/".into(), notes: vec![] }
    }

    #[test]
    fn the_wider_access_wins() {
        let volume = |path: &str, access| PathRule { path: path.into(), access };
        let volumes = [
            volume("/data", Access::ReadWrite),
            volume("/config", Access::ReadOnly),
            volume("/opt", Access::ReadWrite),
            volume("/var/lib", Access::ReadOnly),
        ];
        let policy = policy(&["/tmp", "/srv", "/opt"], &["/srv", "/var/lib"]);
        let rules = rules(&policy, None, Path::new("/r/tls"), &volumes);
        let access = |path: &str| {
            let rule = rules.iter().find(|rule| rule.path == Path::new(path)).unwrap();
            matches!(rule.access, Access::ReadWrite)
        };
        assert!(access("/srv") && access("/tmp") && access("/data"));
        assert!(access("/opt") && access("/var/lib") && !access("/config"));
        assert!(!access("/usr") && !access("/r/tls"));
    }

    #[test]
    fn the_workdir_joins_only_when_the_policy_includes_it() {
        let has = |include_workdir, workdir: &str| {
            let policy = Filesystem { include_workdir, ..policy(&[], &[]) };
            let workdir = Path::new(workdir);
            let joins = guard(&policy, Some(workdir), Path::new("/run/rf")).unwrap();
            rules(&policy, joins, Path::new("/r"), &[]).iter().any(|rule| rule.path == workdir)
        };
        assert!(has(true, "/work") && !has(false, "/work"));
        // An image without a WORKDIR: the agent must not write everywhere.
        assert!(!has(true, "/") && !has(true, "/run") && !has(true, "/run/rf/x"));
    }

    #[test]
    fn no_policy_opens_the_run_directory() {
        let dir = tempfile::tempdir_in("/var").unwrap();
        let run = dir.path().join("run");
        std::fs::create_dir(&run).unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&run, &link).unwrap();
        let within = run.join("1-0123456789abcdef/tls");
        let beside = dir.path().join("runner");
        let root = Path::new("/");
        for path in [root, dir.path(), &run, &within, &link, &link.join("new")] {
            let path = path.to_str().unwrap();
            for (list, policy) in
                [("read_only", policy(&[path], &[])), ("read_write", policy(&[], &[path]))]
            {
                let error = guard(&policy, None, &run).unwrap_err().to_string();
                assert!(error.contains(&format!("{list}: {path} opens")), "{error}");
            }
        }
        assert!(guard(&policy(&[beside.to_str().unwrap()], &[]), None, &run).is_ok());
        // What every fence opens.
        let error = guard(&policy(&[], &[]), None, Path::new("/tmp/x")).unwrap_err().to_string();
        assert!(error.contains("/tmp") && error.contains("--run-dir"), "{error}");
    }

    #[test]
    fn the_policies_that_we_publish_leave_it_alone() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        for name in ["examples/policy.yaml", "tests/supervisor/policy.yaml"] {
            let bytes = std::fs::read(root.join(name)).unwrap();
            let loaded = crate::policy::load(&crate::policy::Source { name, bytes: &bytes }, None);
            let policy = loaded.unwrap().policy;
            for run_dir in ["/run/ringfence", "/mnt/run"] {
                guard(policy.filesystem(), None, Path::new(run_dir)).unwrap();
            }
        }
    }

    #[test]
    fn a_link_on_the_way_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/tmp", dir.path().join("link")).unwrap();
        let path = dir.path().join("link/deep");
        let error = make_missing(&policy(&[], &[path.to_str().unwrap()]), &user()).unwrap_err();
        assert!(format!("{error:#}").contains("symbolic link"), "{error:#}");
    }

    #[test]
    fn programs_are_found_as_execvp_would() {
        let find = |program: &str, path| find_program(program, path, Path::new("/"));
        assert!(find("sh", Some("/nowhere:/bin")).unwrap().to_str().unwrap().ends_with("/bin/sh"));
        assert!(find("/bin/sh", None).is_ok());
        assert!(find("bin/sh", None).is_ok());
        for missing in ["", "no-such-program", "/no/such"] {
            assert!(!find(missing, None).unwrap_err().executable);
        }
    }
}

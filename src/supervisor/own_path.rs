//! Where this program was started from: in an injected pod every later start (exec probes, hooks,
//! `kubectl exec`) goes through the same path, as root with capabilities, and nobody else may put
//! a file there.
//!
//! The injector mounts the binary deeper than any other mount. An image could still lead that
//! path by a symbolic link into a volume that others write, so each directory on the way has to
//! be root's own, on the container's root file system, and no link.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result, ensure};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags, Statx, StatxFlags, openat2, statx};

/// Where the injector mounts.
const INJECTED: &str = "/ringfence";
/// Write permission of the group and of others.
const OTHERS_WRITE: u16 = 0o022;

/// Checks the path by which this process was started, when it is one of the injector's.
pub fn check() -> Result<()> {
    let started = std::env::args_os().next().map(PathBuf::from).unwrap_or_default();
    if started.starts_with(INJECTED) { check_path(&started) } else { Ok(()) }
}

fn check_path(program: &Path) -> Result<()> {
    let advice = "others could replace the supervisor: use an image without links or volumes there";
    let root = look(Path::new("/"))?;
    let dir = program.parent().context("the supervisor's path has no directory")?;
    let mut at = PathBuf::from("/");
    for component in dir.components() {
        ensure!(
            matches!(component, Component::RootDir | Component::Normal(_)),
            "{} is not a plain path",
            program.display()
        );
        at.push(component);
        // The last one is the mount itself: read-only, and ours.
        if at == dir {
            break;
        }
        let seen = look(&at)?;
        ensure!(seen.stx_mnt_id == root.stx_mnt_id, "{} is a mount: {advice}", at.display());
        ensure!(
            seen.stx_uid == 0 && seen.stx_mode & OTHERS_WRITE == 0,
            "{} can be written by others than root: {advice}",
            at.display()
        );
    }
    let ours = File::open("/proc/self/exe").context("cannot open our own program")?;
    let there = look(program)?;
    let ours = stat(&ours)?;
    ensure!(
        (there.stx_dev_major, there.stx_dev_minor, there.stx_ino)
            == (ours.stx_dev_major, ours.stx_dev_minor, ours.stx_ino),
        "{} is another program than the one that runs: {advice}",
        program.display()
    );
    Ok(())
}

/// What is at a path, no link followed.
fn look(path: &Path) -> Result<Statx> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let fd = openat2(CWD, path, flags, Mode::empty(), ResolveFlags::NO_SYMLINKS)
        .with_context(|| format!("cannot open {} without following a link", path.display()))?;
    stat(&fd)
}

fn stat(fd: impl AsFd) -> Result<Statx> {
    let wanted = StatxFlags::BASIC_STATS | StatxFlags::MNT_ID;
    statx(fd, "", AtFlags::EMPTY_PATH, wanted).context("cannot look at the supervisor's path")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn a_program_behind_a_link_or_under_others_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("a/bin");
        std::fs::create_dir_all(&deep).unwrap();
        let program = deep.join("program");
        std::fs::copy("/proc/self/exe", &program).unwrap();
        // /tmp, above the test's directory, is everybody's.
        let error = format!("{:#}", check_path(&program).unwrap_err());
        assert!(error.contains("by others than root") || error.contains("is a mount"), "{error}");

        symlink(dir.path().join("a"), dir.path().join("link")).unwrap();
        assert!(look(&dir.path().join("link/bin/program")).is_err());
        assert!(look(&program).is_ok());
    }

    #[test]
    fn other_paths_than_the_injectors_are_not_looked_at() {
        check().unwrap();
    }
}

//! Volumes of the container's own that join the files of the fence, beyond the policy's lists.
//!
//! The injector says which (by flag: an argv cannot be forged), by what the pod's manifest says of
//! them. Here the mounts that really came of it are looked at. An image's author could lead a path
//! by a link to another place, and a rule for a directory is one for all that is mounted below it:
//! what is not a mount by itself, or holds one that was not named, does not join.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use super::args::RunArgs;
use super::attestation::VolumeRecord;
use super::{filesystem, sockets};
use crate::event::{self, Class, Event, Severity};
use crate::fence::landlock::{Access, PathRule};
use crate::policy::closed_to_volumes;

/// What becomes of the volumes that were named.
#[derive(Debug, Default)]
pub struct Volumes {
    /// Those that join, in the order of their paths.
    pub rules: Vec<PathRule>,
    /// Those that do not, and why.
    pub left_out: Vec<(PathBuf, String)>,
}

/// Looks at the volumes that the command line names.
///
/// # Errors
/// The mounts cannot be read; or, where `hard`, one does not join.
pub fn join(args: &RunArgs, hard: bool) -> Result<Volumes> {
    let named = |paths: &[PathBuf], access| {
        paths.iter().map(|path| (path.clone(), access)).collect::<Vec<_>>()
    };
    let mut named: BTreeMap<_, _> = named(&args.volume_read_only, Access::ReadOnly)
        .into_iter()
        .chain(named(&args.volume_read_write, Access::ReadWrite))
        .collect();
    if named.is_empty() {
        return Ok(Volumes::default());
    }
    let mounts = std::fs::read("/proc/self/mountinfo").context("cannot see what is mounted")?;
    let mounts =
        Mounts { all: sockets::points(&mounts, false), volumes: sockets::points(&mounts, true) };
    let mut volumes = Volumes::default();
    // One that goes may be what another holds.
    while let Some((path, why)) = named.keys().find_map(|path| {
        let why = mounts.keep_out(path, &args.run_dir, |inner| named.contains_key(inner))?;
        Some((path.clone(), why))
    }) {
        named.remove(&path);
        ensure!(
            !hard,
            "the volume at {} cannot join the files of the fence: {why}: landlock.compatibility is \
             hard_requirement, so mount it elsewhere, or not at all",
            path.display()
        );
        event::emit(&Event::new(Class::Config, "DEGRADED", Severity::Medium).subject(format!(
            "the volume at {} does not join the files of the fence: {why}",
            path.display()
        )));
        volumes.left_out.push((path, why));
    }
    volumes.rules = named.into_iter().map(|(path, access)| PathRule { path, access }).collect();
    Ok(volumes)
}

/// What is mounted in this container.
struct Mounts {
    /// Every mount point but the root.
    all: Vec<PathBuf>,
    /// Without the kernel's own file systems.
    volumes: Vec<PathBuf>,
}

impl Mounts {
    /// Why a volume stays out; `None` where it may join.
    fn keep_out(
        &self,
        path: &Path,
        run_dir: &Path,
        is_named: impl Fn(&Path) -> bool,
    ) -> Option<String> {
        let text = path.to_str();
        let Some(text) = text else { return Some("the path is not text".to_owned()) };
        if let Some(why) = closed_to_volumes(text) {
            return Some(why);
        }
        match std::fs::canonicalize(path) {
            Ok(real) if real == path => {}
            Ok(real) => return Some(format!("a link leads it to {}", real.display())),
            Err(error) => return Some(said(&error)),
        }
        if filesystem::meets(path, run_dir) {
            return Some("it meets the supervisor's run directory".to_owned());
        }
        if !self.volumes.iter().any(|mount| mount == path) {
            return Some("nothing is mounted there".to_owned());
        }
        if self.all.iter().filter(|mount| *mount == path).count() > 1 {
            return Some("another mount lies over it, or under it".to_owned());
        }
        let inner = self
            .all
            .iter()
            .find(|mount| mount.starts_with(path) && *mount != path && !is_named(mount))?;
        Some(format!("{} is mounted in it and does not join", inner.display()))
    }
}

fn said(error: &io::Error) -> String {
    error.to_string()
}

impl From<&Volumes> for VolumeRecord {
    fn from(volumes: &Volumes) -> Self {
        let with = |access| {
            let rules = volumes.rules.iter().filter(|rule| rule.access == access);
            rules.map(|rule| rule.path.clone()).collect()
        };
        Self {
            read_only: with(Access::ReadOnly),
            read_write: with(Access::ReadWrite),
            left_out: volumes.left_out.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_a_mount_by_itself_stays_out() {
        let dir = tempfile::tempdir_in("/var").unwrap();
        let [data, inner, link, none] =
            ["data", "data/inner", "link", "none"].map(|name| dir.path().join(name));
        std::fs::create_dir_all(&inner).unwrap();
        std::os::unix::fs::symlink(&data, &link).unwrap();
        let mounts = |all: &[&PathBuf], volumes: &[&PathBuf]| Mounts {
            all: all.iter().map(|path| (*path).clone()).collect(),
            volumes: volumes.iter().map(|path| (*path).clone()).collect(),
        };
        let run = dir.path().join("run");
        let why = |mounts: &Mounts, path: &Path, named: &[&PathBuf]| {
            mounts.keep_out(path, &run, |inner| named.iter().any(|path| path.as_path() == inner))
        };
        let both = mounts(&[&data, &inner], &[&data, &inner]);
        assert_eq!(why(&both, &inner, &[]), None);
        assert_eq!(why(&both, &data, &[&inner]), None);
        for (found, word) in [
            (why(&both, &data, &[]), "is mounted in it"),
            (why(&both, &link, &[]), "a link leads it to"),
            (why(&both, &none, &[]), "No such file"),
            (why(&mounts(&[], &[]), &data, &[]), "nothing is mounted there"),
            // A file system of the kernel's.
            (why(&mounts(&[&data], &[]), &data, &[]), "nothing is mounted there"),
            (why(&both, Path::new("/proc"), &[]), "stays what the policy makes of it"),
            (why(&both, Path::new("/"), &[]), "not written plainly"),
            (both.keep_out(&data, &inner, |_| true), "run directory"),
            // In another spelling of the same path.
            (why(&mounts(&[&inner, &inner], &[&inner]), &inner, &[]), "another mount lies over it"),
        ] {
            assert!(found.as_ref().is_some_and(|why| why.contains(word)), "{word}: {found:?}");
        }
    }
}

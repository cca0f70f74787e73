//! A policy in a directory that changes while it is read: a mounted `ConfigMap`.
//!
//! The kubelet writes each version into a directory of its own and then moves one link (`..data`)
//! to it; the names beside it are links through that one. So the files are read below what `..data`
//! leads to at one moment, and never one of one version with one of another. A directory without
//! that link is read as it is. (A file that is mounted by `subPath` is no link and never changes:
//! such a mount cannot be followed.)

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::{CWD, FileType, Mode, OFlags, fstat, openat};

use super::policy_files::{DATA, LIMIT, PolicyFiles, RULES, UPSTREAM_CA};
use crate::proxy::control::PolicyText;

/// The link that the kubelet moves.
const VERSION: &str = "..data";

/// How often a version is looked for that is not taken away while it is read.
const ATTEMPTS: usize = 5;

/// What tells one state of the directory from another without reading it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct State([Option<[i64; 6]>; 3]);

impl State {
    /// As the files are now.
    #[must_use]
    pub fn of(dir: &Path) -> Self {
        Self([DATA, RULES, UPSTREAM_CA].map(|name| {
            let meta = fs::metadata(dir.join(name)).ok()?;
            let (device, inode) = (meta.dev().cast_signed(), meta.ino().cast_signed());
            let size = meta.size().cast_signed();
            Some([device, inode, size, meta.mtime(), meta.mtime_nsec(), meta.ctime_nsec()])
        }))
    }
}

/// Reads one version whole.
pub fn read(dir: &Path) -> Result<PolicyFiles> {
    let mut last = None;
    for _ in 0..ATTEMPTS {
        let version = fs::read_link(dir.join(VERSION)).ok();
        let found = version_of(dir).and_then(|version| read_version(&version, dir));
        // Taken away, or replaced, while it was read.
        if fs::read_link(dir.join(VERSION)).ok() == version {
            return found;
        }
        last = Some(found);
    }
    match last {
        Some(Err(error)) => Err(error),
        _ => bail!("the policy in {} changes too fast to be read", dir.display()),
    }
}

fn version_of(dir: &Path) -> Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let open = |path: &Path| openat(CWD, path, flags, Mode::empty());
    match open(&dir.join(VERSION)) {
        Err(rustix::io::Errno::NOENT) => open(dir),
        opened => opened,
    }
    .with_context(|| format!("cannot read the policy in {}", dir.display()))
}

fn read_version(version: &OwnedFd, dir: &Path) -> Result<PolicyFiles> {
    let text = |file: &str| -> Result<Option<PolicyText>> {
        let name = dir.join(file).display().to_string();
        let text =
            read_file(version, file).with_context(|| format!("cannot read the policy {name}"))?;
        Ok(text.map(|text| PolicyText { name, text }))
    };
    let Some(data) = text(DATA)? else {
        bail!("there is no policy: {} has no {DATA}", dir.display());
    };
    Ok(PolicyFiles::new(data, text(RULES)?, text(UPSTREAM_CA)?.map(|ca| ca.text)))
}

/// `None`: there is no such file.
fn read_file(dir: &OwnedFd, name: &str) -> Result<Option<String>> {
    // A pipe would keep whoever opens it waiting.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let file = match openat(dir, name, flags, Mode::empty()) {
        Ok(file) => file,
        Err(rustix::io::Errno::NOENT) => return Ok(None),
        Err(error) => return Err(io::Error::from(error).into()),
    };
    let kind = FileType::from_raw_mode(fstat(&file).map_err(io::Error::from)?.st_mode);
    ensure!(kind.is_file(), "it is not a file");
    let mut bytes = Vec::new();
    File::from(file).take(LIMIT + 1).read_to_end(&mut bytes)?;
    ensure!(bytes.len() as u64 <= LIMIT, "it has more than {LIMIT} bytes, the limit");
    Ok(Some(String::from_utf8(bytes).ok().context("it is not UTF-8")?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;
    use std::sync::atomic::{AtomicBool, Ordering};

    /// As the kubelet writes a version: a directory of its own, then the link is moved to it.
    fn publish(dir: &Path, number: usize, files: &[(&str, &str)]) {
        let version = format!("..version_{number}");
        fs::create_dir(dir.join(&version)).unwrap();
        for (name, text) in files {
            fs::write(dir.join(&version).join(name), text).unwrap();
            let link = dir.join(name);
            if fs::symlink_metadata(&link).is_err() {
                symlink(format!("{VERSION}/{name}"), link).unwrap();
            }
        }
        symlink(&version, dir.join("..data_tmp")).unwrap();
        let before = fs::read_link(dir.join(VERSION));
        fs::rename(dir.join("..data_tmp"), dir.join(VERSION)).unwrap();
        if let Ok(before) = before {
            fs::remove_dir_all(dir.join(before)).unwrap();
        }
    }

    #[test]
    fn a_version_is_read_whole_while_others_replace_it() {
        let dir = tempfile::tempdir().unwrap();
        let version = |number: usize| {
            let text = format!("version: 1\n# {number}\n");
            publish(dir.path(), number, &[(DATA, &text), (RULES, &text), (UPSTREAM_CA, &text)]);
        };
        version(0);
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                (1..500).for_each(version);
                done.store(true, Ordering::Relaxed);
            });
            while !done.load(Ordering::Relaxed) {
                // That it changes too fast may be said; never a mixture.
                let Ok(files) = read(dir.path()) else { continue };
                let files = files.to_proxy(std::collections::BTreeMap::new());
                let rules = files.rules.expect("has rules").text;
                assert_eq!((&files.data.text, &files.upstream_ca), (&rules, &Some(rules.clone())));
            }
        });
    }

    #[test]
    fn each_change_is_another_state() {
        let dir = tempfile::tempdir().unwrap();
        assert!(read(dir.path()).unwrap_err().to_string().contains("has no policy.yaml"));
        publish(dir.path(), 1, &[(DATA, "a")]);
        let first = State::of(dir.path());
        assert_eq!(first, State::of(dir.path()));
        publish(dir.path(), 2, &[(DATA, "a")]);
        let second = State::of(dir.path());
        assert_ne!(first, second);
        publish(dir.path(), 3, &[(DATA, "a"), (RULES, "b")]);
        assert_ne!(second, State::of(dir.path()));
        fs::remove_file(dir.path().join(VERSION)).unwrap();
        assert_eq!(State::of(dir.path()), State([None; 3]));
    }

    #[test]
    fn a_plain_directory_is_read_and_bounded() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(DATA), "version: 1\n").unwrap();
        assert!(read(dir.path()).is_ok());
        let refused = |why: &str| {
            let error = format!("{:#}", read(dir.path()).unwrap_err());
            assert!(error.contains(why) && error.contains("policy"), "{error}");
        };
        let longer = usize::try_from(LIMIT).unwrap() + 1;
        fs::write(dir.path().join(RULES), "x".repeat(longer)).unwrap();
        refused("the limit");
        fs::write(dir.path().join(RULES), [0xff]).unwrap();
        refused("not UTF-8");
        fs::remove_file(dir.path().join(RULES)).unwrap();
        rustix::fs::mkfifoat(CWD, dir.path().join(RULES), Mode::RUSR).unwrap();
        refused("not a file");
    }
}

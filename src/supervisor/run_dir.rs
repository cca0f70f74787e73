//! `/run/ringfence`: where the supervisor keeps what others of the container must find.
//!
//! The directory is a memory volume that everybody of the container can see, and the agent's
//! user could write if it were left as the runtime makes it (0777). So it is made root's own
//! before anything is put there; each supervisor works in a random subdirectory which it holds
//! locked, and removes those that no living supervisor holds (a container's restart keeps the
//! volume). Files are made with `O_EXCL|O_NOFOLLOW` and never written twice.

use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use rustix::fs::{FlockOperation, Mode, OFlags};

/// The default place.
pub const DEFAULT: &str = "/run/ringfence";
/// The socket of `enter`, below [`RunDir::path`].
pub const ENTER_SOCKET: &str = "root/enter.sock";
/// What is enforced, below [`RunDir::path`].
pub const ATTESTATION: &str = "root/attestation.json";
/// What only root may enter, below [`RunDir::path`].
const ROOT: &str = "root";
/// What the agent may read, below [`RunDir::path`].
const TLS: &str = "tls";

/// The subdirectory of one supervisor; removed when dropped.
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
    /// Held for the lock: as long as it is open others leave the directory alone.
    _lock: OwnedFd,
}

impl RunDir {
    /// Takes `base` over for root, removes what dead supervisors left, makes our own place.
    pub fn create(base: &Path) -> Result<Self> {
        let name = base.display();
        if !base.exists() {
            fs::DirBuilder::new().recursive(true).mode(0o755).create(base).with_context(|| {
                format!(
                    "cannot make {name}: mount a writable volume there, or name another --run-dir"
                )
            })?;
        }
        let meta = fs::symlink_metadata(base).with_context(|| format!("cannot look at {name}"))?;
        ensure!(meta.is_dir(), "{name} is not a directory");
        ensure!(
            meta.uid() == rustix::process::geteuid().as_raw(),
            "{name} belongs to uid {}, not to this process: another could replace what is in it",
            meta.uid()
        );
        // Only the mode: the group may be the pod's fsGroup, which changes nothing at 0755.
        fs::set_permissions(base, fs::Permissions::from_mode(0o755))
            .with_context(|| format!("cannot make {name} 0755"))?;
        // Held until our own place is made and locked: another supervisor that sweeps meanwhile
        // would take it for a dead one's.
        let _alone = wait_for_lock(base).with_context(|| format!("cannot lock {name}"))?;
        sweep(base);

        let path = base.join(random_name()?);
        fs::DirBuilder::new()
            .mode(0o755)
            .create(&path)
            .with_context(|| format!("cannot make {}", path.display()))?;
        let lock = wait_for_lock(&path).with_context(|| format!("cannot lock {name}"))?;
        for (sub, mode) in [(ROOT, 0o700), (TLS, 0o755)] {
            let sub = path.join(sub);
            fs::DirBuilder::new()
                .mode(mode)
                .create(&sub)
                .with_context(|| format!("cannot make {}", sub.display()))?;
            // The umask of the image's process may have taken bits away.
            fs::set_permissions(&sub, fs::Permissions::from_mode(mode))?;
        }
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        Ok(Self { path, _lock: lock })
    }

    /// The subdirectory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The directory of certificates, which the agent may read.
    #[must_use]
    pub fn tls(&self) -> PathBuf {
        self.path.join(TLS)
    }

    /// Makes a file below the subdirectory, which must not exist yet.
    pub fn make(&self, path: &Path, mode: u32) -> Result<fs::File> {
        let make = || -> io::Result<fs::File> {
            let file = fs::OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(mode)
                .custom_flags(OFlags::NOFOLLOW.bits().cast_signed())
                .open(path)?;
            file.set_permissions(fs::Permissions::from_mode(mode))?;
            Ok(file)
        };
        make().with_context(|| format!("cannot make {}", path.display()))
    }

    /// Makes a file with this content.
    pub fn write(&self, path: &Path, mode: u32, bytes: &[u8]) -> Result<()> {
        self.make(path, mode)?
            .write_all(bytes)
            .with_context(|| format!("cannot write {}", path.display()))
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        drop(fs::remove_dir_all(&self.path));
    }
}

/// The subdirectories of supervisors that live now; `base` itself where it is one of them.
#[must_use]
pub fn living(base: &Path) -> Vec<PathBuf> {
    // A shared lock: two that look at the same time must not take each other for a supervisor.
    let lives =
        |path: &PathBuf| matches!(lock(path, FlockOperation::NonBlockingLockShared), Ok(None));
    if base.join(ROOT).is_dir() {
        return Some(base.to_owned()).into_iter().filter(lives).collect();
    }
    entries(base).filter(lives).collect()
}

/// Removes the subdirectories that no process holds. A failure is no harm: they are read by
/// nobody, since [`living`] passes them over.
fn sweep(base: &Path) {
    for path in entries(base) {
        if let Ok(Some(_held)) = lock(&path, FlockOperation::NonBlockingLockExclusive) {
            drop(fs::remove_dir_all(&path));
        }
    }
}

fn entries(base: &Path) -> impl Iterator<Item = PathBuf> {
    fs::read_dir(base).into_iter().flatten().flatten().map(|entry| entry.path())
}

/// Waits for the lock of a directory: another supervisor holds the base while it begins, and
/// whoever looks for the living holds each for a moment. The agent cannot: its Landlock domain
/// does not let it open them.
fn wait_for_lock(path: &Path) -> io::Result<OwnedFd> {
    let dir = open(path)?;
    rustix::fs::flock(&dir, FlockOperation::LockExclusive)?;
    Ok(dir)
}

fn open(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::open(path, flags, Mode::empty())?)
}

/// Takes a lock of a subdirectory; `None` while another process holds one against it.
fn lock(path: &Path, how: FlockOperation) -> io::Result<Option<OwnedFd>> {
    let dir = open(path)?;
    match rustix::fs::flock(&dir, how) {
        Ok(()) => Ok(Some(dir)),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// The process's number, by which a person tells several supervisors apart, and what nobody can
/// guess.
fn random_name() -> Result<String> {
    let mut bytes = [0; 8];
    fs::File::open("/dev/urandom")
        .and_then(|mut random| random.read_exact(&mut bytes))
        .context("cannot get random bytes from /dev/urandom")?;
    Ok(format!("{}-{:016x}", std::process::id(), u64::from_ne_bytes(bytes)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_dead_are_swept_and_the_living_stay() {
        let base = tempfile::tempdir().unwrap();
        fs::create_dir(base.path().join("0123456789abcdef")).unwrap();
        let first = RunDir::create(base.path()).unwrap();
        let second = RunDir::create(base.path()).unwrap();
        let mut living = super::living(base.path());
        living.sort();
        let mut expected = [first.path().to_owned(), second.path().to_owned()];
        expected.sort();
        assert_eq!(living, expected);
        let own = super::living(first.path());
        assert_eq!(own, [first.path()]);
        let gone = first.path().to_owned();
        drop(first);
        assert!(!gone.exists());
        assert!(super::living(&gone).is_empty());
    }

    #[test]
    fn who_looks_for_the_living_stops_nobody_and_is_taken_for_nobody() {
        let base = tempfile::tempdir().unwrap();
        let dead = base.path().join("1-0");
        fs::create_dir(&dead).unwrap();
        let looker = lock(&dead, FlockOperation::NonBlockingLockShared).unwrap();
        assert!(looker.is_some() && living(base.path()).is_empty());

        let stop = std::sync::atomic::AtomicBool::new(false);
        // Alone in the base, so that each is looked at as soon as it is there.
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                        let _ = living(base.path());
                    }
                });
            }
            let made = (0..1_000).map(|_| RunDir::create(base.path()).map(drop));
            let outcome = made.collect::<Result<Vec<_>>>();
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
            outcome.unwrap();
        });
    }

    #[test]
    fn a_world_writable_base_is_closed_first() {
        let base = tempfile::tempdir().unwrap();
        fs::set_permissions(base.path(), fs::Permissions::from_mode(0o1777)).unwrap();
        let _dir = RunDir::create(base.path()).unwrap();
        assert_eq!(fs::metadata(base.path()).unwrap().mode() & 0o7777, 0o755);
    }

    #[test]
    fn nothing_is_written_through_a_link_or_twice() {
        let base = tempfile::tempdir().unwrap();
        let dir = RunDir::create(base.path()).unwrap();
        std::os::unix::fs::symlink("/tmp/elsewhere", dir.path().join("tls/ca.pem")).unwrap();
        assert!(dir.write(&dir.path().join("tls/ca.pem"), 0o644, b"x").is_err());
        let other = dir.path().join("tls/other.pem");
        dir.write(&other, 0o644, b"x").unwrap();
        assert!(dir.write(&other, 0o644, b"y").is_err());
    }
}

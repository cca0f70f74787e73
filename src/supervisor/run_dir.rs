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
        let _alone = alone(base).with_context(|| format!("cannot lock {name}"))?;
        sweep(base);

        let path = base.join(random_name()?);
        fs::DirBuilder::new()
            .mode(0o755)
            .create(&path)
            .with_context(|| format!("cannot make {}", path.display()))?;
        let lock = lock(&path)
            .and_then(|lock| lock.ok_or_else(|| io::Error::other("held by another process")))
            .with_context(|| format!("cannot lock {}", path.display()))?;
        for (sub, mode) in [("root", 0o700), (TLS, 0o755)] {
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

/// The subdirectories of supervisors that live now.
#[must_use]
pub fn living(base: &Path) -> Vec<PathBuf> {
    entries(base).filter(|path| matches!(lock(path), Ok(None))).collect()
}

/// Removes the subdirectories that no process holds. A failure is no harm: they are read by
/// nobody, since [`living`] passes them over.
fn sweep(base: &Path) {
    for path in entries(base) {
        if let Ok(Some(_held)) = lock(&path) {
            drop(fs::remove_dir_all(&path));
        }
    }
}

fn entries(base: &Path) -> impl Iterator<Item = PathBuf> {
    fs::read_dir(base).into_iter().flatten().flatten().map(|entry| entry.path())
}

/// Waits for the lock of the base directory. The agent cannot hold it: its Landlock domain does
/// not let it open the directory.
fn alone(base: &Path) -> io::Result<OwnedFd> {
    let dir = open(base)?;
    rustix::fs::flock(&dir, FlockOperation::LockExclusive)?;
    Ok(dir)
}

fn open(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::open(path, flags, Mode::empty())?)
}

/// Takes the lock of a subdirectory; `None` while another process holds it.
fn lock(path: &Path) -> io::Result<Option<OwnedFd>> {
    let dir = open(path)?;
    match rustix::fs::flock(&dir, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(dir)),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn random_name() -> Result<String> {
    let mut bytes = [0; 8];
    fs::File::open("/dev/urandom")
        .and_then(|mut random| random.read_exact(&mut bytes))
        .context("cannot get random bytes from /dev/urandom")?;
    Ok(format!("{:016x}", u64::from_ne_bytes(bytes)))
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
        let mut living = living(base.path());
        living.sort();
        let mut expected = [first.path().to_owned(), second.path().to_owned()];
        expected.sort();
        assert_eq!(living, expected);
        let gone = first.path().to_owned();
        drop(first);
        assert!(!gone.exists());
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

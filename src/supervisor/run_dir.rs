//! `/run/ringfence`: where the supervisor keeps what others of the container must find.
//!
//! The directory is a memory volume that everybody of the container can see, and the agent's
//! user could write if it were left as the runtime makes it (0777). So it is made root's own
//! before anything is put there; each supervisor works in a random subdirectory which it holds
//! locked, and removes those that no living supervisor holds (a container's restart keeps the
//! volume). Files are made with `O_EXCL|O_NOFOLLOW` and never written twice; one that changes is
//! replaced.

use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

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
/// How long a supervisor waits for the lock of another that begins, which takes well under a
/// millisecond.
const PATIENCE: Duration = Duration::from_secs(10);

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
        let _alone = wait_for_lock(base, PATIENCE)?;
        sweep(base);

        let path = base.join(random_name()?);
        fs::DirBuilder::new()
            .mode(0o755)
            .create(&path)
            .with_context(|| format!("cannot make {}", path.display()))?;
        let lock = wait_for_lock(&path, PATIENCE)?;
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
                .read(true)
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

/// Puts another file with this content in the place of one that [`RunDir::write`] made: whoever
/// reads it reads one of the two whole.
pub fn replace(path: &Path, mode: u32, bytes: &[u8]) -> Result<()> {
    let new = path.with_extension("new");
    let write = || -> io::Result<()> {
        // What an attempt before left.
        drop(fs::remove_file(&new));
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(mode)
            .custom_flags(OFlags::NOFOLLOW.bits().cast_signed())
            .open(&new)?;
        file.write_all(bytes)?;
        fs::rename(&new, path)
    };
    write().with_context(|| format!("cannot replace {}", path.display()))
}

/// The subdirectories of supervisors that live now; `base` itself where it is one of them.
#[must_use]
pub fn living(base: &Path) -> Vec<PathBuf> {
    // A shared lock: two that look at the same time must not take each other for a supervisor.
    let lives = |path: &PathBuf| {
        // Made before the lock is, and gone with it.
        is_roots(&path.join(ROOT))
            && matches!(lock(path, FlockOperation::NonBlockingLockShared), Ok(None))
    };
    if is_ours(base) && base.join(ROOT).is_dir() {
        return Some(base.to_owned()).into_iter().filter(lives).collect();
    }
    entries(base).filter(lives).collect()
}

/// Removes the subdirectories that no process holds, also one whose supervisor was killed before
/// it was whole. A failure is no harm: they are read by nobody, since [`living`] passes them over.
fn sweep(base: &Path) {
    for path in entries(base) {
        if let Ok(Some(_held)) = lock(&path, FlockOperation::NonBlockingLockExclusive) {
            drop(fs::remove_dir_all(&path));
        }
    }
}

/// What a supervisor has made, or root in its place. Whatever else lies there is none of ours.
fn entries(base: &Path) -> impl Iterator<Item = PathBuf> {
    let entries = fs::read_dir(base).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).filter(|path| is_ours(path))
}

fn is_ours(path: &Path) -> bool {
    path.file_name().and_then(|name| name.to_str()).is_some_and(is_name) && is_roots(path)
}

/// A directory, no link to one, of root's; or of this process's user, who may not be root.
fn is_roots(path: &Path) -> bool {
    let own = rustix::process::geteuid().as_raw();
    fs::symlink_metadata(path)
        .is_ok_and(|meta| meta.is_dir() && (meta.uid() == 0 || meta.uid() == own))
}

/// Waits for the lock of a directory: another supervisor holds the base while it begins, and
/// whoever looks for the living holds each for a moment. An agent that could open it could hold it
/// for good, so its policy may not (`filesystem::guard`), and the wait ends all the same.
fn wait_for_lock(path: &Path, patience: Duration) -> Result<OwnedFd> {
    let name = path.display();
    let until = Instant::now() + patience;
    let mut pause = Duration::from_micros(200);
    loop {
        let held = lock(path, FlockOperation::NonBlockingLockExclusive)
            .with_context(|| format!("cannot lock {name}"))?;
        if let Some(held) = held {
            return Ok(held);
        }
        ensure!(
            Instant::now() < until,
            "cannot lock {name}: another process has held it for {} s: a supervisor that hangs as \
             it begins, or a process outside of any fence that has the directory open: end it \
             (/proc/locks names it), or name another --run-dir",
            patience.as_secs()
        );
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(20));
    }
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

/// Whether [`random_name`] makes such names: digits, a dash, sixteen hexadecimal digits.
fn is_name(name: &str) -> bool {
    let hex = |c: u8| c.is_ascii_digit() || (b'a'..=b'f').contains(&c);
    name.split_once('-').is_some_and(|(pid, random)| {
        (1..=10).contains(&pid.len())
            && pid.bytes().all(|c| c.is_ascii_digit())
            && random.len() == 16
            && random.bytes().all(hex)
    })
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
        // Killed before it was whole; and what is none of ours.
        let [dead, foreign] =
            ["12-0123456789abcdef", "0123456789abcdef"].map(|name| base.path().join(name));
        fs::create_dir(&dead).unwrap();
        fs::create_dir(&foreign).unwrap();
        let first = RunDir::create(base.path()).unwrap();
        let second = RunDir::create(base.path()).unwrap();
        let mut living = super::living(base.path());
        living.sort();
        let mut expected = [first.path().to_owned(), second.path().to_owned()];
        expected.sort();
        assert_eq!(living, expected);
        assert!(!dead.exists() && foreign.exists());
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
        let dead = base.path().join("1-0123456789abcdef");
        fs::create_dir_all(dead.join(ROOT)).unwrap();
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
    fn a_lock_alone_makes_no_supervisor() {
        let base = tempfile::tempdir().unwrap();
        let mut held = Vec::new();
        let mut hold = |name: &str| {
            let path = base.path().join(name);
            fs::create_dir_all(path.join(ROOT)).unwrap();
            let lock = lock(&path, FlockOperation::NonBlockingLockExclusive).unwrap().unwrap();
            held.push(lock);
            path
        };
        for name in
            ["doctor-7", "1-0123", "x-0123456789abcdef", "1-0123456789ABCDEF", "-0123456789abcdef"]
        {
            hold(name);
        }
        assert!(living(base.path()).is_empty());
        let whole = hold("1-0123456789abcdef");
        assert_eq!(living(base.path()), [whole.as_path()]);
        fs::remove_dir(whole.join(ROOT)).unwrap();
        assert!(living(base.path()).is_empty());
        // A link is nobody's directory.
        std::os::unix::fs::symlink("/tmp", whole.join(ROOT)).unwrap();
        assert!(living(base.path()).is_empty());
        fs::remove_file(whole.join(ROOT)).unwrap();
        fs::create_dir(whole.join(ROOT)).unwrap();
        assert_eq!(living(base.path()).len(), 1);
        if rustix::process::geteuid().is_root() {
            std::os::unix::fs::chown(&whole, Some(1000), None).unwrap();
            assert!(living(base.path()).is_empty());
        } else {
            println!("SKIPPED: needs root");
        }
    }

    #[test]
    fn a_lock_that_somebody_keeps_is_not_waited_for_for_ever() {
        let base = tempfile::tempdir().unwrap();
        let held = lock(base.path(), FlockOperation::NonBlockingLockShared).unwrap();
        let error = wait_for_lock(base.path(), Duration::from_millis(5)).unwrap_err();
        let error = format!("{error:#}");
        assert!(error.contains(base.path().to_str().unwrap()), "{error}");
        assert!(error.contains("--run-dir"), "{error}");
        drop(held);
        assert!(wait_for_lock(base.path(), Duration::ZERO).is_ok());
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

//! Who is behind a connection, and whether its executable is still the one seen first.
//!
//! The supervisor names the process (it recorded the connect); the proxy hashes the executable
//! from the descriptor that comes with the name. Trust is on first use: a path whose content
//! changes while the fence lives is refused from then on.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::net::{SocketAddr, SocketAddrV4};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;
use std::sync::{Arc, Mutex, PoisonError};

use sha2::{Digest as _, Sha256};
use tokio::sync::{OnceCell, Semaphore};

use super::control_client::{Control, ControlError};
use crate::policy::Caller;

/// The most executables that are remembered. Only those that a policy lets connect are.
const REMEMBERED: usize = 1024;

/// How many executables are hashed at a time.
const HASHING: usize = 2;

/// SHA-256 of an executable.
type Digest = [u8; 32];

/// The process behind a connection.
#[derive(Debug)]
pub(crate) struct Identity {
    pub(crate) pid: u32,
    /// What a policy judges.
    pub(crate) caller: Caller,
    exe: Mutex<Exe>,
}

/// How far the executable's check has come.
#[derive(Debug)]
enum Exe {
    /// To be hashed once a policy lets the caller pass, and closed then: every connection would
    /// hold one.
    Unchecked(OwnedFd),
    Trusted,
    /// Also while it is checked.
    Refused,
}

/// Why a caller is not trusted.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CallerError {
    #[error("the connection comes from no process that was seen to make it")]
    Unknown,
    #[error("the connection is not IPv4")]
    NotIpv4,
    #[error("the process behind the connection could not be found: {0}")]
    Control(#[from] ControlError),
    #[error("the executable could not be read: {0}")]
    Unreadable(io::Error),
    #[error("the executable changed while it was read")]
    Moving,
    #[error("the executable's content has changed since its first connection")]
    Changed,
    #[error("more than {REMEMBERED} executables have connected")]
    TooMany,
}

/// Asks the supervisor whose connection this is.
pub(crate) async fn identify(
    control: &Control,
    client: SocketAddr,
    server: SocketAddr,
) -> Result<Identity, CallerError> {
    let (client, server) = (v4(client)?, v4(server)?);
    let (record, exe) = control.identify(client, server).await?.ok_or(CallerError::Unknown)?;
    let caller = Caller { exe: record.exe, ancestors: record.ancestors };
    Ok(Identity { pid: record.pid, caller, exe: Mutex::new(Exe::Unchecked(exe)) })
}

fn v4(address: SocketAddr) -> Result<SocketAddrV4, CallerError> {
    match address {
        SocketAddr::V4(address) => Ok(address),
        SocketAddr::V6(_) => Err(CallerError::NotIpv4),
    }
}

/// What tells one state of a file from another without reading it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Fingerprint {
    device: u64,
    inode: u64,
    size: i64,
    /// Seconds and nanoseconds of the last change of content and of inode.
    times: [i64; 4],
}

impl Fingerprint {
    #[allow(clippy::useless_conversion, reason = "the field types differ between architectures")]
    fn of(file: &File) -> io::Result<Self> {
        let stat = rustix::fs::fstat(file)?;
        let wide = |nanoseconds| i64::try_from(nanoseconds).unwrap_or(i64::MAX);
        Ok(Self {
            device: stat.st_dev,
            inode: stat.st_ino,
            size: stat.st_size,
            times: [
                stat.st_mtime,
                wide(stat.st_mtime_nsec),
                stat.st_ctime,
                wide(stat.st_ctime_nsec),
            ],
        })
    }
}

/// The executables that were seen.
pub(crate) struct Executables {
    /// Hashed once for each state of a file, however many connections come at the same time.
    hashed: Mutex<HashMap<Fingerprint, Arc<OnceCell<Digest>>>>,
    /// The content each path had when it was first let through.
    trusted: Mutex<HashMap<String, Digest>>,
    hashing: Arc<Semaphore>,
}

impl Executables {
    pub(crate) fn new() -> Self {
        Self {
            hashed: Mutex::default(),
            trusted: Mutex::default(),
            hashing: Arc::new(Semaphore::new(HASHING)),
        }
    }

    /// Checks that the executable is what it was when its path was first seen.
    pub(crate) async fn verify(&self, identity: &Identity) -> Result<(), CallerError> {
        let set = |state| {
            let mut exe = identity.exe.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::replace(&mut *exe, state)
        };
        match set(Exe::Refused) {
            Exe::Unchecked(exe) => self.check(&identity.caller.exe, exe).await?,
            Exe::Trusted => {}
            Exe::Refused => return Err(CallerError::Changed),
        }
        set(Exe::Trusted);
        Ok(())
    }

    async fn check(&self, path: &str, exe: OwnedFd) -> Result<(), CallerError> {
        // The supervisor may read by this descriptor too: its offset is never used.
        let file = File::from(exe);
        let fingerprint = Fingerprint::of(&file).map_err(CallerError::Unreadable)?;
        let cell = {
            let mut hashed = self.hashed.lock().unwrap_or_else(PoisonError::into_inner);
            if hashed.len() >= REMEMBERED && !hashed.contains_key(&fingerprint) {
                // Costs a second reading, nothing else.
                hashed.clear();
            }
            Arc::clone(hashed.entry(fingerprint).or_default())
        };
        let digest = *cell
            .get_or_try_init(|| async {
                let permit = Arc::clone(&self.hashing).acquire_owned().await;
                tokio::task::spawn_blocking(move || {
                    let _permit = permit;
                    let digest = hash(&file).map_err(CallerError::Unreadable)?;
                    match Fingerprint::of(&file) {
                        Ok(now) if now == fingerprint => Ok(digest),
                        _ => Err(CallerError::Moving),
                    }
                })
                .await
                .map_err(|error| CallerError::Unreadable(io::Error::other(error)))?
            })
            .await?;
        let mut trusted = self.trusted.lock().unwrap_or_else(PoisonError::into_inner);
        match trusted.get(path) {
            Some(first) if *first == digest => Ok(()),
            Some(_) => Err(CallerError::Changed),
            None if trusted.len() >= REMEMBERED => Err(CallerError::TooMany),
            None => {
                trusted.insert(path.to_owned(), digest);
                Ok(())
            }
        }
    }
}

fn hash(file: &File) -> io::Result<Digest> {
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 256 * 1024];
    let mut offset = 0;
    loop {
        match file.read_at(&mut buffer, offset) {
            Ok(0) => return Ok(hasher.finalize().into()),
            Ok(read) => {
                hasher.update(&buffer[..read]);
                offset += read as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(exe: &str, file: &std::path::Path) -> Identity {
        Identity {
            pid: 1,
            caller: Caller { exe: exe.to_owned(), ancestors: Vec::new() },
            exe: Mutex::new(Exe::Unchecked(File::open(file).expect("open").into())),
        }
    }

    #[tokio::test]
    async fn changed_content_is_refused_and_the_same_content_elsewhere_is_not() {
        let dir = tempfile::tempdir().expect("tempdir");
        let file = dir.path().join("tool");
        std::fs::write(&file, "one").expect("write");
        let executables = Executables::new();
        for _ in 0..2 {
            executables.verify(&identity("/bin/tool", &file)).await.expect("first content");
        }
        // The same bytes in another inode: a reinstall.
        std::fs::remove_file(&file).expect("remove");
        std::fs::write(&file, "one").expect("write");
        executables.verify(&identity("/bin/tool", &file)).await.expect("same content");
        std::fs::write(&file, "two").expect("write");
        let changed = identity("/bin/tool", &file);
        for _ in 0..2 {
            let error = executables.verify(&changed).await.expect_err("changed");
            assert!(matches!(error, CallerError::Changed), "{error}");
        }
        let other = identity("/bin/other", &file);
        for _ in 0..2 {
            executables.verify(&other).await.expect("another path");
        }
    }
}

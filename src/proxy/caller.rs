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
use tokio::net::TcpStream;
use tokio::sync::{OnceCell, Semaphore};

use super::Shared;
use super::control::CallerRecord;
use super::control_client::{Control, ControlError};
use super::stream::lives;
use crate::policy::{Caller, Policy};

/// The most executables that are remembered. Only those that a policy lets connect are.
const REMEMBERED: usize = 1024;

/// How many executables are hashed at a time.
const HASHING: usize = 2;

/// The largest executable that is hashed, in bytes: reading a larger one would keep a thread busy
/// for too long.
const LARGEST: u64 = 2 << 30;

/// Write permission of the group and of others.
const OTHERS_WRITE: u32 = 0o022;

/// SHA-256 of an executable.
type Digest = crate::policy::digest::Sha256;

/// The process behind a connection.
#[derive(Debug)]
pub(crate) struct Identity {
    pub(crate) pid: u32,
    /// What a policy judges.
    pub(crate) caller: Caller,
    /// Whether the code that it runs was looked at when it connected.
    looked_at: bool,
    exe: Mutex<Exe>,
}

/// How far the executable's check has come.
#[derive(Debug)]
enum Exe {
    /// To be hashed once a policy lets the caller pass, and closed then: every connection would
    /// hold one.
    Unchecked(OwnedFd),
    /// Hashed already, because the policy pins it.
    Hashed(Digest),
    Trusted(Digest),
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
    #[error("the connection ended before its owner was known")]
    Gone,
    #[error("the executable is larger than 2 GiB")]
    TooLarge,
    #[error("the executable could not be read: {0}")]
    Unreadable(io::Error),
    #[error("the executable changed while it was read")]
    Moving,
    #[error("the executable's content has changed since its first connection")]
    Changed,
    #[error("more than {REMEMBERED} executables have connected")]
    TooMany,
}

/// What is said of a caller that a policy wants looked at, and that nobody looked at: it connected
/// under another policy.
const NOT_LOOKED_AT: &str = "it connected before the policy asked what code it runs";

/// Asks the supervisor whose connection this is, and reads the executable where the policy pins
/// it: such a policy judges by what is in the file.
pub(crate) async fn identify(
    shared: &Shared,
    policy: &Policy,
    tcp: &TcpStream,
    peer: SocketAddr,
) -> Result<Identity, CallerError> {
    let (record, exe) = look_up(&shared.control, tcp, peer).await?;
    let CallerRecord { pid, exe: path, ancestors, tainted, looked_at } = record;
    let (exe, sha256) = if policy.pins(&path) {
        let digest = shared.executables.digest(exe).await?;
        (Exe::Hashed(digest), Some(digest))
    } else {
        (Exe::Unchecked(exe), None)
    };
    let tainted = tainted_for(policy, &path, looked_at, tainted);
    let caller = Caller { exe: path, ancestors, sha256, tainted };
    Ok(Identity { pid, caller, looked_at, exe: Mutex::new(exe) })
}

fn tainted_for(
    policy: &Policy,
    exe: &str,
    looked_at: bool,
    tainted: Option<String>,
) -> Option<String> {
    match tainted {
        None if !looked_at && policy.watches(exe) => Some(NOT_LOOKED_AT.to_owned()),
        tainted => tainted,
    }
}

impl Identity {
    /// The same process with what another policy asks of it: a digest, or what code it runs.
    pub(crate) async fn seen_by(
        self: &Arc<Self>,
        policy: &Policy,
        executables: &Executables,
    ) -> Result<Arc<Self>, CallerError> {
        let Caller { exe: path, sha256, tainted, ancestors } = &self.caller;
        let told = tainted.clone().filter(|_| self.looked_at);
        let tainted_now = tainted_for(policy, path, self.looked_at, told);
        let asks_digest = sha256.is_none() && policy.pins(path);
        if !asks_digest && *tainted == tainted_now {
            return Ok(Arc::clone(self));
        }
        let state = {
            let mut exe = self.exe.lock().unwrap_or_else(PoisonError::into_inner);
            match &mut *exe {
                Exe::Hashed(digest) => Exe::Hashed(*digest),
                Exe::Trusted(digest) => Exe::Trusted(*digest),
                exe => std::mem::replace(exe, Exe::Refused),
            }
        };
        let (exe, sha256) = match state {
            Exe::Unchecked(exe) if asks_digest => {
                let digest = executables.digest(exe).await?;
                (Exe::Hashed(digest), Some(digest))
            }
            Exe::Hashed(digest) if asks_digest => (Exe::Hashed(digest), Some(digest)),
            Exe::Trusted(digest) if asks_digest => (Exe::Trusted(digest), Some(digest)),
            state => (state, *sha256),
        };
        let ancestors = ancestors.clone();
        let caller = Caller { exe: path.clone(), ancestors, sha256, tainted: tainted_now };
        let (pid, looked_at) = (self.pid, self.looked_at);
        Ok(Arc::new(Self { pid, caller, looked_at, exe: Mutex::new(exe) }))
    }
}

/// Asks the supervisor whose connection this is. `peer` is what accept(2) said.
///
/// The question names a pair of addresses, and those of a connection that was aborted (a reset
/// frees them at once, while its bytes can still be read here) may be another program's by the
/// time the supervisor looks. Two connections that live cannot share them: only of a connection
/// that still lives after the answer is the answer true.
pub(crate) async fn look_up(
    control: &Control,
    tcp: &TcpStream,
    peer: SocketAddr,
) -> Result<(CallerRecord, OwnedFd), CallerError> {
    let server = tcp.local_addr().map_err(|_| CallerError::Gone)?;
    let answer = control.identify(v4(peer)?, v4(server)?).await;
    if !lives(tcp) {
        return Err(CallerError::Gone);
    }
    answer?.ok_or(CallerError::Unknown)
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
    /// Only root can change it. The times of other files do not tell all changes: on tmpfs a store
    /// through a shared mapping moves none of them, elsewhere two changes may fall into one tick.
    /// Those are read at each connection.
    settled: bool,
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
            settled: stat.st_uid == 0 && stat.st_mode & OTHERS_WRITE == 0,
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
        let lock = || identity.exe.lock().unwrap_or_else(PoisonError::into_inner);
        let state = match &mut *lock() {
            // Streams of one connection may ask at the same time.
            Exe::Trusted(_) => return Ok(()),
            exe => std::mem::replace(exe, Exe::Refused),
        };
        let digest = match state {
            Exe::Unchecked(exe) => {
                let digest = self.digest(exe).await?;
                self.trust(&identity.caller.exe, digest)?;
                digest
            }
            Exe::Hashed(digest) => {
                self.trust(&identity.caller.exe, digest)?;
                digest
            }
            Exe::Trusted(_) | Exe::Refused => return Err(CallerError::Changed),
        };
        *lock() = Exe::Trusted(digest);
        Ok(())
    }

    /// What the executable hashes to; read once for each state of a file.
    async fn digest(&self, exe: OwnedFd) -> Result<Digest, CallerError> {
        // The supervisor may read by this descriptor too: its offset is never used.
        let file = File::from(exe);
        let fingerprint = Fingerprint::of(&file).map_err(CallerError::Unreadable)?;
        if u64::try_from(fingerprint.size).map_or(true, |size| size > LARGEST) {
            return Err(CallerError::TooLarge);
        }
        let read = async {
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
        };
        if !fingerprint.settled {
            return read.await;
        }
        let cell = {
            let mut hashed = self.hashed.lock().unwrap_or_else(PoisonError::into_inner);
            if hashed.len() >= REMEMBERED && !hashed.contains_key(&fingerprint) {
                // Costs a second reading, nothing else.
                hashed.clear();
            }
            Arc::clone(hashed.entry(fingerprint).or_default())
        };
        Ok(*cell.get_or_try_init(|| read).await?)
    }

    /// Checks against the content that this path had when it was first let through.
    fn trust(&self, path: &str, digest: Digest) -> Result<(), CallerError> {
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
            // It grows as it is read.
            Ok(_) if offset > LARGEST => return Err(io::ErrorKind::FileTooLarge.into()),
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
            caller: Caller { exe: exe.to_owned(), ..Caller::default() },
            looked_at: false,
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

    #[tokio::test]
    async fn a_pinned_executable_is_read_once_and_trusted_like_the_others() {
        let dir = tempfile::tempdir().expect("tempdir");
        let file = dir.path().join("tool");
        std::fs::write(&file, "abc").expect("write");
        let open = || File::open(&file).expect("open").into();
        let executables = Executables::new();
        let digest = executables.digest(open()).await.expect("digest");
        // FIPS 180-2, B.1.
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(crate::policy::digest::to_hex(&digest), abc);
        for _ in 0..3 {
            executables.digest(open()).await.expect("digest");
        }
        assert_eq!(executables.hashed.lock().expect("lock").len(), 1);
        // One that others may write is read each time: its times do not tell all changes.
        let everybodys = std::os::unix::fs::PermissionsExt::from_mode(0o666);
        std::fs::set_permissions(&file, everybodys).expect("mode");
        executables.digest(open()).await.expect("digest");
        assert_eq!(executables.hashed.lock().expect("lock").len(), 1);
        let hashed = |digest| Identity {
            pid: 1,
            caller: Caller { exe: "/bin/tool".to_owned(), ..Caller::default() },
            looked_at: false,
            exe: Mutex::new(Exe::Hashed(digest)),
        };
        executables.verify(&hashed(digest)).await.expect("first content");
        let other = hashed([7; 32]);
        let error = executables.verify(&other).await.expect_err("other content");
        assert!(matches!(error, CallerError::Changed), "{error}");
    }

    #[tokio::test]
    async fn a_huge_executable_is_not_read() {
        let file = tempfile::NamedTempFile::new().expect("file");
        file.as_file().set_len(LARGEST + 1).expect("sparse file");
        let executables = Executables::new();
        let error =
            executables.verify(&identity("/bin/huge", file.path())).await.expect_err("huge");
        assert!(matches!(error, CallerError::TooLarge), "{error}");
        assert!(executables.hashed.lock().expect("lock").is_empty());
    }

    #[tokio::test]
    async fn a_connection_that_was_aborted_does_not_live() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("listener");
        let client = TcpStream::connect(listener.local_addr().expect("address")).await;
        let client = client.expect("client");
        let (tcp, _) = listener.accept().await.expect("accept");
        assert!(lives(&tcp));
        client.try_write(b"GET").expect("send");
        socket2::SockRef::from(&client)
            .set_linger(Some(std::time::Duration::ZERO))
            .expect("linger");
        drop(client);
        assert!(!lives(&tcp));
        // A client that ended its half properly waits for its answer.
        let mut client = TcpStream::connect(listener.local_addr().expect("address")).await;
        let client = client.as_mut().expect("client");
        let (tcp, _) = listener.accept().await.expect("accept");
        tokio::io::AsyncWriteExt::shutdown(client).await.expect("shutdown");
        assert!(lives(&tcp));
    }
}

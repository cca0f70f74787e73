//! Who makes a connection, bound at connect(2) (DESIGN section 2, "Binary identity").
//!
//! Each fenced process runs under a filter that stops it at connect and reports it here. While it
//! stands still its executable, its ancestors and the socket's cookie are recorded; then the call
//! goes on. Nothing is decided here and nothing of the process's memory is read: when the proxy
//! asks later who owns a connection, the socket's cookie, which the kernel never gives twice,
//! leads to the record. A connection without a record has no owner, and no access.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fs::{self, File};
use std::io;
use std::net::SocketAddrV4;
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::Pid;

use crate::fence::notify::{self, Listener, Notification, Target};
use crate::fence::sockdiag::SockDiag;
use crate::fence::status::Status;
use crate::proxy::control::CallerRecord;

/// The most connects that are remembered until the proxy asks; the oldest is forgotten first, and
/// its connection then has no access.
const MAX_RECORDS: usize = 8_192;
/// The most executables that are held open.
const MAX_EXECUTABLES: usize = 256;
/// The longest chain of ancestors that is followed.
const MAX_ANCESTORS: usize = 64;

/// The records of all connects in the fence.
#[derive(Debug)]
pub struct Callers {
    /// Ancestors are followed up to this process: the keeper.
    root: Pid,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    records: HashMap<u64, Record>,
    order: VecDeque<u64>,
    executables: BTreeMap<ExecutableKey, Arc<File>>,
}

#[derive(Debug, Clone)]
struct Record {
    caller: CallerRecord,
    executable: Arc<File>,
}

/// What tells one state of a file from another without reading it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct ExecutableKey {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Callers {
    /// `root` is the keeper, from which everything in the fence descends.
    #[must_use]
    pub fn new(root: Pid) -> Self {
        Self { root, state: Mutex::default() }
    }

    /// Serves one process's connects on a thread of its own, until the last process under its
    /// filter has ended.
    pub fn serve(self: &Arc<Self>, listener: Listener) {
        let callers = Arc::clone(self);
        let run = move || {
            loop {
                let mut ready = [PollFd::new(&listener, PollFlags::IN)];
                match poll(&mut ready, None) {
                    Ok(_) => {}
                    Err(rustix::io::Errno::INTR) => continue,
                    Err(_) => return,
                }
                if ready[0].revents().intersects(PollFlags::HUP | PollFlags::ERR) {
                    return;
                }
                let Ok(notification) = listener.recv() else {
                    continue;
                };
                callers.record(&listener, &notification);
                // Fails when the caller has died meanwhile; then there is nobody to tell.
                drop(listener.allow(notification.id));
            }
        };
        // Without a thread nobody answers, and each connect of the process waits for ever: it has
        // no network, which is the safe side.
        drop(thread::Builder::new().name("connects".into()).stack_size(128 * 1024).spawn(run));
    }

    /// Records one connect. A failure leaves no record: the connection will have no owner.
    fn record(&self, listener: &Listener, notification: &Notification) {
        let fd = i32::from_ne_bytes(low_half(notification.args[0]));
        let Ok(Target::Inet { cookie, .. }) = notify::target(notification.tid, fd) else {
            return;
        };
        let Ok(record) = self.look(notification.tid) else {
            return;
        };
        // Only while the call is still stopped is the pid certainly the caller's.
        if !listener.is_valid(notification.id) {
            return;
        }
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.records.insert(cookie, record).is_none() {
            state.order.push_back(cookie);
        }
        while state.order.len() > MAX_RECORDS {
            if let Some(oldest) = state.order.pop_front() {
                state.records.remove(&oldest);
            }
        }
    }

    fn look(&self, tid: Pid) -> io::Result<Record> {
        let status = Status::read(tid, None)?;
        let pid = Pid::from_raw(status.tgid).ok_or(io::ErrorKind::NotFound)?;
        let executable = self.executable(pid)?;
        let mut ancestors = Vec::new();
        let mut parent = status.ppid;
        while ancestors.len() < MAX_ANCESTORS {
            let Some(pid) = Pid::from_raw(parent).filter(|pid| *pid != self.root && !pid.is_init())
            else {
                break;
            };
            // A parent that ends meanwhile has handed its children to init: the chain ends there.
            let Ok(exe) = exe_path(pid) else { break };
            ancestors.push(exe);
            let Ok(status) = Status::read(pid, None) else {
                break;
            };
            parent = status.ppid;
        }
        let caller = CallerRecord {
            pid: pid.as_raw_nonzero().get().unsigned_abs(),
            exe: exe_path(pid)?,
            ancestors,
        };
        Ok(Record { caller, executable })
    }

    /// The executable, open for reading; the same file is opened once.
    fn executable(&self, pid: Pid) -> io::Result<Arc<File>> {
        let path = format!("/proc/{}/exe", pid.as_raw_nonzero());
        let key = ExecutableKey::of(&fs::metadata(&path)?);
        let known = |state: &State| state.executables.get(&key).cloned();
        if let Some(file) = known(&self.state.lock().unwrap_or_else(PoisonError::into_inner)) {
            return Ok(file);
        }
        let file = Arc::new(File::open(&path)?);
        // What was opened counts, not what was looked at before.
        let key = ExecutableKey::of(&file.metadata()?);
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.executables.len() >= MAX_EXECUTABLES {
            state.executables.clear();
        }
        state.executables.insert(key, Arc::clone(&file));
        Ok(file)
    }

    /// Who owns the connection from `client` to `server`, with the executable.
    ///
    /// The record stays: a captured connection is asked for by two parts of the proxy.
    pub fn find(
        &self,
        diag: &mut SockDiag,
        client: SocketAddrV4,
        server: SocketAddrV4,
    ) -> io::Result<Option<(CallerRecord, Arc<File>)>> {
        let Some(cookie) = diag.cookie(client, server).map_err(io::Error::other)? else {
            return Ok(None);
        };
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let record = state.records.get(&cookie).cloned();
        Ok(record.map(|record| (record.caller, record.executable)))
    }
}

impl ExecutableKey {
    fn of(meta: &fs::Metadata) -> Self {
        Self {
            device: meta.dev(),
            inode: meta.ino(),
            size: meta.size(),
            modified: (meta.mtime(), meta.mtime_nsec()),
            changed: (meta.ctime(), meta.ctime_nsec()),
        }
    }
}

/// The real path of a process's executable. One that was deleted keeps the kernel's mark
/// (` (deleted)`), so that no policy path matches what is no longer there.
fn exe_path(pid: Pid) -> io::Result<String> {
    let path = fs::read_link(format!("/proc/{}/exe", pid.as_raw_nonzero()))?;
    path.into_os_string().into_string().map_err(|_| io::ErrorKind::InvalidData.into())
}

/// The kernel takes an int from the low half of the register, whatever the high half holds.
fn low_half(argument: u64) -> [u8; 4] {
    let [a, b, c, d, ..] = argument.to_le_bytes();
    u32::from_le_bytes([a, b, c, d]).to_ne_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_low_half_of_an_argument_is_the_descriptor() {
        assert_eq!(i32::from_ne_bytes(low_half(0xdead_beef_0000_0007)), 7);
        assert_eq!(i32::from_ne_bytes(low_half(u64::MAX)), -1);
    }

    #[test]
    fn an_executable_is_opened_once() {
        let callers = Callers::new(Pid::INIT);
        let this = rustix::process::getpid();
        let (a, b) = (callers.executable(this).unwrap(), callers.executable(this).unwrap());
        assert!(Arc::ptr_eq(&a, &b));
    }
}

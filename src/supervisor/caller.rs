//! Who makes a connection, bound at connect(2) (DESIGN section 2, "Binary identity").
//!
//! Each fenced process runs under a filter that stops it at connect and reports it here. While it
//! stands still its executable, its ancestors and the socket's cookie are recorded; then the call
//! goes on. Nothing is decided here, and nothing of the process's memory is read but where the
//! policy asks what code it runs ([`super::taint`]): when the proxy asks later who owns a
//! connection, the socket's cookie, which the kernel never gives twice, leads to the record. A
//! connection without a record has no owner, and no access.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fs::{self, File};
use std::io;
use std::net::SocketAddrV4;
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::thread;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::Pid;

use super::taint::Watched;
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
/// The most bytes of paths in one record; escaped sixfold they still fit into one message.
const MAX_PATHS: usize = 8 * 1024;

/// The records of all connects in the fence.
#[derive(Debug)]
pub struct Callers {
    /// Ancestors are followed up to this process: the keeper.
    root: Pid,
    watch: RwLock<Option<Arc<Watched>>>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    records: HashMap<u64, Record>,
    order: VecDeque<u64>,
    executables: BTreeMap<ExecutableKey, Arc<File>>,
    /// Their keys, the oldest first.
    opened: VecDeque<ExecutableKey>,
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
    /// `root` is the keeper, from which everything in the fence descends; `watch` looks at what
    /// code a caller runs.
    #[must_use]
    pub fn new(root: Pid, watch: Option<Watched>) -> Self {
        Self { root, watch: RwLock::new(watch.map(Arc::new)), state: Mutex::default() }
    }

    /// Looks at others from now on.
    pub fn watch(&self, watch: Option<Watched>) {
        let mut now = self.watch.write().unwrap_or_else(PoisonError::into_inner);
        *now = watch.map(Arc::new);
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

    /// Records one connect. A failure leaves no record, nor an earlier one of the same socket: the
    /// connection will have no owner.
    fn record(&self, listener: &Listener, notification: &Notification) {
        let fd = notification.descriptor();
        let Ok(Target::Inet { cookie, stream: true }) = notify::target(notification.tid, fd) else {
            return;
        };
        let record = self.look(notification.tid);
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.records.remove(&cookie);
        // Only while the call is still stopped is the pid certainly the caller's.
        if let (Ok(record), true) = (record, listener.is_valid(notification.id)) {
            state.remember(cookie, record);
        }
    }

    fn look(&self, tid: Pid) -> io::Result<Record> {
        let status = Status::read(tid, None)?;
        let pid = Pid::from_raw(status.tgid).ok_or(io::ErrorKind::NotFound)?;
        let executable = self.executable(pid)?;
        let exe = exe_path(pid)?;
        let ancestors = self.ancestors(status.ppid, MAX_PATHS.saturating_sub(exe.len()));
        let watch = self.watch.read().unwrap_or_else(PoisonError::into_inner).clone();
        let watch = watch.filter(|watch| watch.watches(&exe));
        let looked_at = watch.is_some();
        let tainted = watch.and_then(|watch| watch.look(pid, &exe));
        let pid = pid.as_raw_nonzero().get().unsigned_abs();
        Ok(Record { caller: CallerRecord { pid, exe, ancestors, tainted, looked_at }, executable })
    }

    /// Executables from `parent` up to the keeper, as far as `room` bytes of paths reach.
    fn ancestors(&self, mut parent: i32, mut room: usize) -> Vec<String> {
        let mut ancestors = Vec::new();
        while ancestors.len() < MAX_ANCESTORS {
            let pid = Pid::from_raw(parent).filter(|pid| *pid != self.root && !pid.is_init());
            // A parent that ends meanwhile has handed its children to init: the chain ends there.
            let Some((exe, status)) =
                pid.and_then(|pid| Some((exe_path(pid).ok()?, Status::read(pid, None).ok()?)))
            else {
                break;
            };
            let Some(left) = room.checked_sub(exe.len()) else { break };
            room = left;
            ancestors.push(exe);
            parent = status.ppid;
        }
        ancestors
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
        state.hold(key, &file);
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

impl State {
    /// Keeps one more executable open. The oldest goes, and with it the records that hold it: an agent
    /// that runs a file which is always another one must not use up the descriptors.
    fn hold(&mut self, key: ExecutableKey, file: &Arc<File>) {
        // Another thread may have opened it meanwhile.
        if self.executables.insert(key, Arc::clone(file)).is_none() {
            self.opened.push_back(key);
        }
        while self.opened.len() > MAX_EXECUTABLES {
            let Some(gone) = self.opened.pop_front().and_then(|key| self.executables.remove(&key))
            else {
                continue;
            };
            self.records.retain(|_, record| !Arc::ptr_eq(&record.executable, &gone));
        }
    }

    fn remember(&mut self, cookie: u64, record: Record) {
        self.records.insert(cookie, record);
        self.order.push_back(cookie);
        while self.order.len() > MAX_RECORDS {
            if let Some(oldest) = self.order.pop_front() {
                self.records.remove(&oldest);
            }
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_remembered_is_bounded() {
        let callers = Callers::new(Pid::INIT, None);
        let this = rustix::process::getpid();
        let caller = CallerRecord { pid: 1, exe: "/bin/a".into(), ..CallerRecord::default() };
        let record = Record { caller, executable: callers.executable(this).unwrap() };
        let mut state = State::default();
        for cookie in 0..MAX_RECORDS as u64 + 10 {
            state.remember(cookie, record.clone());
        }
        assert_eq!(state.records.len(), MAX_RECORDS);
        assert!(!state.records.contains_key(&9) && state.records.contains_key(&10));
    }

    /// A file that is always another one takes no more descriptors than a bound.
    #[test]
    fn executables_that_are_held_open_are_bounded_with_their_records() {
        let mut state = State::default();
        let mut held = Vec::new();
        for number in 0..MAX_EXECUTABLES as u64 + 2 {
            let file = Arc::new(File::open("/proc/self/exe").unwrap());
            let meta = file.metadata().unwrap();
            let key = ExecutableKey { inode: number, ..ExecutableKey::of(&meta) };
            state.hold(key, &file);
            let caller = CallerRecord { pid: 1, exe: "/x".into(), ..CallerRecord::default() };
            state.remember(number, Record { caller, executable: Arc::clone(&file) });
            held.push(Arc::downgrade(&file));
        }
        let open = held.iter().filter(|file| file.strong_count() > 0).count();
        assert_eq!(open, MAX_EXECUTABLES);
        assert!(!state.records.contains_key(&1) && state.records.contains_key(&2));
    }

    #[test]
    fn ancestors_end_where_the_room_does() {
        let callers = Callers::new(Pid::INIT, None);
        let parent = rustix::process::getppid().unwrap().as_raw_nonzero().get();
        assert!(callers.ancestors(parent, 0).is_empty());
        assert!(!callers.ancestors(parent, MAX_PATHS).is_empty());
    }

    #[test]
    fn an_executable_is_opened_once() {
        let callers = Callers::new(Pid::INIT, None);
        let this = rustix::process::getpid();
        let (a, b) = (callers.executable(this).unwrap(), callers.executable(this).unwrap());
        assert!(Arc::ptr_eq(&a, &b));
    }
}

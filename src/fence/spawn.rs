//! Starting processes: fork, exec, and the small things around them.
//!
//! What a fenced child does between the two is in [`template`], what it tells its parent in
//! [`message`]. Functions marked async-signal-safe neither allocate nor lock.

mod message;
mod step;
mod template;

use std::ffi::{CStr, CString};
use std::fmt;
use std::os::fd::RawFd;

use rustix::io::Errno;
use rustix::process::Pid;

pub use message::{ChildMessage, receive, release};
pub use step::ChildStep;
pub use template::{Stdio, Template};

/// Which side of the fork this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Forked {
    /// The new process.
    Child,
    /// The old one, with the child's pid.
    Parent(Pid),
}

/// Forks. EBUSY while the process has more than one thread: the child would have a copy of the
/// locks that the other threads hold, and nobody to release them. That check is what makes this
/// safe to call. Nothing buffered is written out.
pub fn fork() -> rustix::io::Result<Forked> {
    if !single_threaded()? {
        return Err(Errno::BUSY);
    }
    // SAFETY: there is one thread, so the child is a whole process and may do whatever this one
    // may; the C library's fork handlers put its own state in order.
    let pid = check(unsafe { libc::fork() }.into())?;
    match i32::try_from(pid).ok().and_then(Pid::from_raw) {
        None => Ok(Forked::Child),
        Some(pid) => Ok(Forked::Parent(pid)),
    }
}

/// Times to look again for a thread that was joined but that the kernel has not put away yet.
const LOOKS: u32 = 100;

/// Asks the kernel itself: unsharing the thread group is refused in a process with threads and
/// changes nothing in one without. /proc would not do, the keeper's Landlock domain may hide it.
fn single_threaded() -> rustix::io::Result<bool> {
    for _ in 0..LOOKS {
        // SAFETY: with this flag alone the call only checks.
        match check(unsafe { libc::unshare(libc::CLONE_THREAD) }.into()) {
            Ok(_) => return Ok(true),
            Err(Errno::INVAL) => std::thread::sleep(std::time::Duration::from_micros(100)),
            // A container's filter may refuse unshare whatever it is for.
            Err(Errno::PERM | Errno::NOSYS) => return single_entry_in_proc(),
            Err(errno) => return Err(errno),
        }
    }
    Ok(false)
}

fn single_entry_in_proc() -> rustix::io::Result<bool> {
    let threads = super::status::threads(rustix::process::getpid())
        .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
    Ok(threads.len() == 1)
}

/// What is executed, in the form that execve takes.
pub struct ExecImage {
    path: CString,
    argv: Vec<CString>,
    envp: Vec<CString>,
    /// Point into the strings above, which never change; the last is null.
    argv_pointers: Vec<*const libc::c_char>,
    envp_pointers: Vec<*const libc::c_char>,
}

// SAFETY: the pointers lead to heap memory that this value owns and never changes, so neither
// moving it to another thread nor reading it from several can invalidate them.
unsafe impl Send for ExecImage {}
// SAFETY: as above; nothing here has interior mutability.
unsafe impl Sync for ExecImage {}

/// Arguments and environment may hold secrets: only their number is shown.
impl fmt::Debug for ExecImage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ExecImage")
            .field("path", &self.path)
            .field("arguments", &self.argv.len())
            .field("variables", &self.envp.len())
            .finish_non_exhaustive()
    }
}

impl ExecImage {
    /// Takes the file's path (not searched in PATH), all arguments from the zeroth on and the
    /// whole environment (`NAME=value`).
    #[must_use]
    pub fn new(path: CString, argv: Vec<CString>, envp: Vec<CString>) -> Self {
        let pointers = |strings: &[CString]| {
            strings.iter().map(|s| s.as_ptr()).chain([std::ptr::null()]).collect::<Vec<_>>()
        };
        let (argv_pointers, envp_pointers) = (pointers(&argv), pointers(&envp));
        Self { path, argv, envp, argv_pointers, envp_pointers }
    }

    /// The file's path.
    #[must_use]
    pub fn path(&self) -> &CStr {
        &self.path
    }

    /// Becomes the program; returns only on error. Async-signal-safe.
    #[must_use]
    pub fn exec(&self) -> Errno {
        // SAFETY: path, arguments and environment are C strings that live as long as `self`, and
        // both arrays end with null.
        let result = unsafe {
            libc::execve(
                self.path.as_ptr(),
                self.argv_pointers.as_ptr(),
                self.envp_pointers.as_ptr(),
            )
        };
        check(result.into()).err().unwrap_or(Errno::INVAL)
    }
}

/// Exit code for a program that could not be executed: 127 not found, otherwise 126.
#[must_use]
pub fn exit_code_of_exec(errno: Errno) -> i32 {
    if errno == Errno::NOENT { 127 } else { 126 }
}

/// Every signal back to its default, none blocked. What is ignored or blocked would pass through
/// exec: Rust ignores SIGPIPE, the supervisor blocks what it waits for, and whoever started us may
/// ignore more. Async-signal-safe.
pub fn reset_signals() {
    // All zero is the default action, no flag, an empty mask; on both architectures the struct is
    // four words. The C library's function would refuse the two signals that it uses itself.
    let default_action = [0_u64; 4];
    let size_of_mask: libc::size_t = 8;
    for signal in 1..=64_i32 {
        // SAFETY: the kernel reads one struct of 32 bytes and writes none. The default action runs
        // no code of ours. SIGKILL and SIGSTOP are refused, they always have theirs.
        unsafe {
            libc::syscall(
                libc::SYS_rt_sigaction,
                signal,
                default_action.as_ptr(),
                std::ptr::null_mut::<libc::c_void>(),
                size_of_mask,
            )
        };
    }
    let none = 0_u64;
    // SAFETY: the kernel reads a mask of 8 bytes and writes none.
    unsafe {
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            libc::SIG_SETMASK,
            &raw const none,
            std::ptr::null_mut::<libc::c_void>(),
            size_of_mask,
        )
    };
}

/// Puts `fd` at the number `target`, which is closed first and stays open over exec.
/// Async-signal-safe.
pub fn place(fd: RawFd, target: RawFd) -> rustix::io::Result<()> {
    if fd == target {
        // dup2 would leave close-on-exec as it is.
        // SAFETY: the call takes numbers.
        return check(unsafe { libc::fcntl(fd, libc::F_SETFD, 0) }.into()).map(drop);
    }
    // SAFETY: the call takes numbers; whoever owned `target` is gone when exec is near.
    check(unsafe { libc::dup2(fd, target) }.into()).map(drop)
}

/// Duplicates `fd` to a number of at least `least`, close-on-exec. Async-signal-safe.
pub(crate) fn duplicate_above(fd: RawFd, least: RawFd) -> rustix::io::Result<RawFd> {
    // SAFETY: the call takes numbers.
    let result = check(unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, least) }.into())?;
    RawFd::try_from(result).map_err(|_| Errno::BADF)
}

/// Marks every descriptor from `first` on close-on-exec. Async-signal-safe.
pub fn close_on_exec_from(first: u32) -> rustix::io::Result<()> {
    close_range(first, u32::MAX, libc::CLOSE_RANGE_CLOEXEC)
}

/// Closes (`flags` 0) or marks the descriptors from `first` to `last`. Only for a child that will
/// exec or exit: owners of those descriptors do not know.
pub(crate) fn close_range(first: u32, last: u32, flags: u32) -> rustix::io::Result<()> {
    // SAFETY: the call takes numbers, and the callers hold no owner that is dropped later.
    check(unsafe { libc::syscall(libc::SYS_close_range, first, last, flags) }).map(drop)
}

/// Sends a signal by its number: any that the kernel knows, real-time ones too, for which the safe
/// wrappers have no name. EINVAL for others. Async-signal-safe.
pub fn kill(pid: Pid, signal: i32) -> rustix::io::Result<()> {
    // SAFETY: the call takes numbers.
    check(unsafe { libc::kill(pid.as_raw_nonzero().get(), signal) }.into()).map(drop)
}

/// Ends the process at once: no destructor, no exit handler, no buffer written.
/// Async-signal-safe.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: _exit takes a number and does not return.
    unsafe { libc::_exit(code) }
}

/// A C function's result, or the errno that it left. Async-signal-safe.
pub(crate) fn check(result: libc::c_long) -> rustix::io::Result<libc::c_long> {
    if result == -1 {
        let error = std::io::Error::last_os_error();
        return Err(Errno::from_io_error(&error).unwrap_or(Errno::INVAL));
    }
    Ok(result)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_with_threads_does_not_fork() {
        // The test harness has a thread of its own beside this one.
        let (stop, wait) = std::sync::mpsc::channel::<()>();
        let other = std::thread::spawn(move || wait.recv());
        assert_eq!(fork(), Err(Errno::BUSY));
        drop(stop);
        let _ = other.join();
    }

    #[test]
    fn signals_go_by_number() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).unwrap();
        assert_eq!(kill(pid, 65), Err(Errno::INVAL));
        kill(pid, libc::SIGRTMIN() + 3).unwrap();
        let status = child.wait().unwrap();
        let signal = std::os::unix::process::ExitStatusExt::signal(&status);
        assert_eq!(signal, Some(libc::SIGRTMIN() + 3));
        assert_eq!(kill(pid, 15), Err(Errno::SRCH));
    }

    #[test]
    fn an_image_shows_no_secret() {
        let image = ExecImage::new(
            c"/bin/true".into(),
            vec![c"true".into(), c"--token=hush".into()],
            vec![c"KEY=hush".into()],
        );
        let shown = format!("{image:?}");
        assert!(shown.contains("/bin/true") && !shown.contains("hush"), "{shown}");
        assert_eq!(image.path(), c"/bin/true");
    }

    #[test]
    fn exec_reports_why_it_failed() {
        let missing = ExecImage::new(c"/no/such/program".into(), Vec::new(), Vec::new());
        assert_eq!(missing.exec(), Errno::NOENT);
        assert_eq!(exit_code_of_exec(Errno::NOENT), 127);
        assert_eq!(exit_code_of_exec(Errno::ACCESS), 126);
    }
}

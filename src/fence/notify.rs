//! The supervisor's end of the connect listener.
//!
//! A stopped connect(2) tells who calls before anything is sent. The supervisor records the
//! caller under the socket's cookie and lets the call go on. It decides nothing here, and nothing
//! it reads is memory that the caller could change meanwhile: the descriptor's number is a
//! register, the cookie the kernel's. Another thread may still put a second socket under that
//! number; then the record names a socket of the same process, and the one that connects has none.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketType, sockopt};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use super::spawn::check;

/// A seccomp listener. It can be polled: readable when a call waits, hung up when no process with
/// the filter is left. [`Listener::recv`] alone would wait for ever then (before Linux 6.11), so
/// poll first.
#[derive(Debug)]
pub struct Listener(OwnedFd);

/// One stopped system call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Notification {
    /// Names the stopped call in answers.
    pub id: u64,
    /// The stopped **thread**, in the reader's PID namespace.
    pub tid: Pid,
    /// The system call's number.
    pub nr: i32,
    /// Its arguments; for connect(2) the low half of the first is the descriptor.
    pub args: [u64; 6],
}

impl Notification {
    /// The descriptor that connect(2) was called with.
    #[must_use]
    pub fn descriptor(&self) -> i32 {
        // The kernel reads an `int` from the low half; the rest is whatever the register held.
        #[allow(clippy::cast_possible_truncation)]
        let low = self.args[0] as i32;
        low
    }
}

/// What a descriptor of the stopped thread is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// An IPv4 or IPv6 socket.
    Inet {
        /// `SO_COOKIE`: names the socket for as long as the kernel runs.
        cookie: u64,
        /// A stream socket; otherwise datagrams.
        stream: bool,
    },
    /// A socket of another family, or no socket: nothing to record.
    Other,
}

impl Listener {
    /// Takes over a listener that a child sent.
    #[must_use]
    pub fn new(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// Waits for the next stopped call.
    ///
    /// Calls whose thread died before they were received are passed over. ENOENT from Linux 6.11:
    /// no process with the filter is left.
    pub fn recv(&self) -> io::Result<Notification> {
        loop {
            // SAFETY: the struct is plain numbers, all zero is a value of it, and the kernel wants
            // it zeroed.
            let mut received: libc::seccomp_notif = unsafe { std::mem::zeroed() };
            // SAFETY: the request says how large the struct is; the kernel fills that much of ours.
            let result = unsafe {
                libc::ioctl(self.0.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_RECV, &raw mut received)
            };
            match check(result.into()) {
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
                Ok(_) => {
                    // 0: the thread is not in this PID namespace, so nothing can be said about it.
                    let Some(tid) = i32::try_from(received.pid).ok().and_then(Pid::from_raw) else {
                        self.refuse(received.id, Errno::PERM)?;
                        continue;
                    };
                    return Ok(Notification {
                        id: received.id,
                        tid,
                        nr: received.data.nr,
                        args: received.data.args,
                    });
                }
            }
        }
    }

    /// Whether the call is still stopped. Ask after reading about the thread: a dead thread's
    /// number may by then be another's.
    #[must_use]
    pub fn is_valid(&self, id: u64) -> bool {
        // SAFETY: the request reads one 64-bit number.
        let result = unsafe {
            libc::ioctl(
                self.0.as_raw_fd(),
                libc::SECCOMP_IOCTL_NOTIF_ID_VALID,
                std::ptr::from_ref(&id),
            )
        };
        result == 0
    }

    /// Lets the call go on. Not an error when its thread is gone.
    pub fn allow(&self, id: u64) -> io::Result<()> {
        self.answer(id, 0, CONTINUE)
    }

    /// Fails the call with `errno`. Not an error when its thread is gone.
    pub fn refuse(&self, id: u64, errno: Errno) -> io::Result<()> {
        self.answer(id, -errno.raw_os_error(), 0)
    }

    fn answer(&self, id: u64, error: i32, flags: u32) -> io::Result<()> {
        let response = libc::seccomp_notif_resp { id, val: 0, error, flags };
        // SAFETY: the request says how large the struct is; the kernel reads that much of ours.
        let result = unsafe {
            libc::ioctl(
                self.0.as_raw_fd(),
                libc::SECCOMP_IOCTL_NOTIF_SEND,
                std::ptr::from_ref(&response),
            )
        };
        match check(result.into()) {
            Ok(_) | Err(Errno::NOENT) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// `SECCOMP_USER_NOTIF_FLAG_CONTINUE`.
const CONTINUE: u32 = 1;

/// `PIDFD_THREAD`, Linux 6.9.
const PIDFD_THREAD: PidfdFlags = PidfdFlags::from_bits_retain(0x80);

/// What descriptor `fd` of the stopped thread is. Needs ptrace access to it.
///
/// A thread can have a table of descriptors of its own, so the thread itself is asked where the
/// kernel can; before Linux 6.9 its process is, and a thread that plays that game gets a record
/// that fits no connection of its own.
pub fn target(tid: Pid, fd: i32) -> io::Result<Target> {
    let pidfd = match pidfd_open(tid, PIDFD_THREAD) {
        Err(Errno::INVAL) => pidfd_open(thread_group(tid)?, PidfdFlags::empty())?,
        other => other?,
    };
    let socket = pidfd_getfd(&pidfd, fd, PidfdGetfdFlags::empty())?;
    match sockopt::socket_domain(&socket) {
        Ok(AddressFamily::INET | AddressFamily::INET6) => Ok(Target::Inet {
            cookie: sockopt::socket_cookie(&socket)?,
            stream: sockopt::socket_type(&socket)? == SocketType::STREAM,
        }),
        Ok(_) | Err(Errno::NOTSOCK) => Ok(Target::Other),
        Err(errno) => Err(errno.into()),
    }
}

/// The process that a thread belongs to.
pub fn thread_group(tid: Pid) -> io::Result<Pid> {
    let text = fs::read_to_string(format!("/proc/{}/status", tid.as_raw_nonzero()))?;
    text.lines()
        .find_map(|line| line.strip_prefix("Tgid:"))
        .and_then(|value| Pid::from_raw(value.trim().parse().ok().filter(|pid| *pid > 0)?))
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "status without Tgid"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_descriptor_is_the_low_half() {
        let notification = Notification {
            id: 1,
            tid: rustix::process::getpid(),
            nr: 42,
            args: [0xDEAD_BEEF_0000_0007, 0, 0, 0, 0, 0],
        };
        assert_eq!(notification.descriptor(), 7);
    }

    #[test]
    fn tells_descriptors_apart() {
        let own = rustix::thread::gettid();
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let cookie = sockopt::socket_cookie(&tcp).unwrap();
        assert_eq!(target(own, tcp.as_raw_fd()).unwrap(), Target::Inet { cookie, stream: true });
        let udp = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        assert!(matches!(
            target(own, udp.as_raw_fd()).unwrap(),
            Target::Inet { stream: false, .. }
        ));
        let (unix, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        assert_eq!(target(own, unix.as_raw_fd()).unwrap(), Target::Other);
        let file = std::fs::File::open("/proc/self/status").unwrap();
        assert_eq!(target(own, file.as_raw_fd()).unwrap(), Target::Other);
        let error = target(own, 9_999).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EBADF));
        assert_eq!(thread_group(own).unwrap(), rustix::process::getpid());
    }
}

//! What a fenced child tells its parent before exec: one packet each on a seqpacket socket.
//!
//! `L` with the connect listener; `W`, step, errno: refused but not required; `R`: all is applied
//! and the child waits; `E`, step, errno: failed, the child ends. The parent answers `R` with `G`.
//! The socket is close-on-exec, so its end tells of exec.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

use super::ChildStep;

const LISTENER: u8 = b'L';
const WARNING: u8 = b'W';
const READY: u8 = b'R';
const FAILED: u8 = b'E';
const GO: u8 = b'G';

/// What the child says.
#[derive(Debug)]
pub enum ChildMessage {
    /// The connect listener.
    Listener(OwnedFd),
    /// This step was refused; it is not required.
    Warning(ChildStep, Errno),
    /// Everything is applied; the child waits for [`release`].
    Ready,
    /// This step failed; the child ends with 125, at [`ChildStep::Exec`] with 126 or 127.
    Failed(ChildStep, Errno),
    /// The child's end is closed: exec succeeded, or the child died.
    Closed,
}

/// Waits for the child's next message.
pub fn receive(control: impl AsFd) -> io::Result<ChildMessage> {
    let mut bytes = [0_u8; 8];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let (length, listener) = loop {
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let received = recvmsg(
            &control,
            &mut [IoSliceMut::new(&mut bytes)],
            &mut ancillary,
            RecvFlags::CMSG_CLOEXEC,
        );
        match received {
            Err(Errno::INTR) => {}
            Err(Errno::CONNRESET) => return Ok(ChildMessage::Closed),
            Err(errno) => return Err(errno.into()),
            Ok(message) => {
                let mut listener = None;
                for entry in ancillary.drain() {
                    if let RecvAncillaryMessage::ScmRights(descriptors) = entry {
                        listener = descriptors.into_iter().last();
                    }
                }
                break (message.bytes, listener);
            }
        }
    };
    let step = || match bytes {
        [_, step, a, b, c, d, ..] => {
            let errno = i32::from_le_bytes([a, b, c, d]);
            // Out of the kernel's range there is no such number, and the type panics.
            let errno = (1..4096).contains(&errno).then(|| Errno::from_raw_os_error(errno))?;
            Some((ChildStep::from_number(step)?, errno))
        }
    };
    let message = match (bytes[0], length, listener) {
        (_, 0, None) => Some(ChildMessage::Closed),
        (LISTENER, 1, Some(listener)) => Some(ChildMessage::Listener(listener)),
        (READY, 1, None) => Some(ChildMessage::Ready),
        (WARNING, 6, None) => step().map(|(step, errno)| ChildMessage::Warning(step, errno)),
        (FAILED, 6, None) => step().map(|(step, errno)| ChildMessage::Failed(step, errno)),
        _ => None,
    };
    message.ok_or_else(|| {
        io::Error::new(io::ErrorKind::InvalidData, "the child sent a message of no known form")
    })
}

/// Lets a ready child exec.
pub fn release(control: impl AsFd) -> io::Result<()> {
    send(control.as_fd(), &[GO], &[]).map_err(io::Error::from)
}

/// The child's side of the same. Async-signal-safe, all of it on the stack.
pub(super) struct Reporter<'a>(pub BorrowedFd<'a>);

impl Reporter<'_> {
    pub(super) fn listener(&self, listener: BorrowedFd<'_>) -> rustix::io::Result<()> {
        send(self.0, &[LISTENER], &[listener])
    }

    pub(super) fn warning(&self, step: ChildStep, errno: Errno) -> rustix::io::Result<()> {
        self.step(WARNING, step, errno)
    }

    pub(super) fn failed(&self, step: ChildStep, errno: Errno) -> rustix::io::Result<()> {
        self.step(FAILED, step, errno)
    }

    pub(super) fn ready(&self) -> rustix::io::Result<()> {
        send(self.0, &[READY], &[])
    }

    /// Waits for the parent's word; anything else, and the end of the socket, is an error.
    pub(super) fn wait(&self) -> rustix::io::Result<()> {
        let mut byte = [0_u8; 1];
        loop {
            match rustix::io::read(self.0, &mut byte) {
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno),
                Ok(1) if byte == [GO] => return Ok(()),
                Ok(_) => return Err(Errno::CANCELED),
            }
        }
    }

    fn step(&self, kind: u8, step: ChildStep, errno: Errno) -> rustix::io::Result<()> {
        let [a, b, c, d] = errno.raw_os_error().to_le_bytes();
        send(self.0, &[kind, step.number(), a, b, c, d], &[])
    }
}

fn send(
    socket: BorrowedFd<'_>,
    bytes: &[u8],
    descriptors: &[BorrowedFd<'_>],
) -> rustix::io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(Errno::MSGSIZE);
    }
    loop {
        match sendmsg(socket, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL) {
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
            Ok(_) => return Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    use super::*;

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap()
    }

    #[test]
    fn messages_arrive_as_they_were_sent() {
        let (parent, child) = pair();
        let reporter = Reporter(child.as_fd());
        let (listener, _other) = pair();
        reporter.listener(listener.as_fd()).unwrap();
        reporter.warning(ChildStep::Keyring, Errno::PERM).unwrap();
        reporter.ready().unwrap();
        reporter.failed(ChildStep::Exec, Errno::NOENT).unwrap();
        assert!(matches!(receive(&parent).unwrap(), ChildMessage::Listener(_)));
        assert!(matches!(
            receive(&parent).unwrap(),
            ChildMessage::Warning(ChildStep::Keyring, Errno::PERM)
        ));
        assert!(matches!(receive(&parent).unwrap(), ChildMessage::Ready));
        assert!(matches!(
            receive(&parent).unwrap(),
            ChildMessage::Failed(ChildStep::Exec, Errno::NOENT)
        ));
        release(&parent).unwrap();
        reporter.wait().unwrap();
        drop(parent);
        assert_eq!(reporter.wait(), Err(Errno::CANCELED));
    }

    #[test]
    fn other_forms_are_refused() {
        for bytes in [
            &b"X"[..],
            b"L",
            b"E\x01",
            b"E\xFF\x01\0\0\0",
            b"E\x01\0\0\0\0",
            b"E\x01\0\x10\0\0",
            b"W\x01\0\0\0\x80",
            b"RR",
            b"W\x01\x01\0\0\0\0",
        ] {
            let (parent, child) = pair();
            send(child.as_fd(), bytes, &[]).unwrap();
            assert!(receive(&parent).is_err(), "{bytes:?}");
        }
        let (parent, child) = pair();
        send(child.as_fd(), b"R", &[child.as_fd()]).unwrap();
        assert!(receive(&parent).is_err(), "a descriptor that nobody expects");
        drop(child);
        assert!(matches!(receive(&parent).unwrap(), ChildMessage::Closed));
    }

    #[test]
    fn another_word_than_go_is_not_a_release() {
        let (parent, child) = pair();
        send(parent.as_fd(), b"R", &[]).unwrap();
        assert_eq!(Reporter(child.as_fd()).wait(), Err(Errno::CANCELED));
    }
}

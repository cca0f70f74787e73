//! Packets between our processes: one JSON message each, with descriptors beside it.
//!
//! `SOCK_SEQPACKET` keeps the borders of messages, so nothing has to be framed; descriptors
//! travel as `SCM_RIGHTS` (unix(7)) and arrive close-on-exec.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg,
    sendmsg, socketpair,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// The longest message in bytes: an argv with its environment fits, a kernel's socket buffer too.
pub const MAX_MESSAGE: usize = 192 * 1024;
/// The most descriptors that are taken with one message.
pub const MAX_DESCRIPTORS: usize = 8;
/// The most that are sent: to the proxy, with a listener for each sidecar's port. The kernel's own
/// limit is 253.
const MAX_SENT: usize = crate::proxy::control::MAX_DESCRIPTORS;

/// What came in one packet.
#[derive(Debug)]
pub struct Packet {
    /// The message's bytes.
    pub bytes: Vec<u8>,
    /// The descriptors beside it.
    pub descriptors: Vec<OwnedFd>,
}

/// Makes a connected pair of packet sockets, both close-on-exec.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
}

/// Sends one message with its descriptors.
pub fn send(
    socket: impl AsFd,
    message: &impl Serialize,
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let bytes = serde_json::to_vec(message)?;
    if bytes.len() > MAX_MESSAGE {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("a message of {} bytes is over the limit of {MAX_MESSAGE}", bytes.len()),
        ));
    }
    send_bytes(socket, &bytes, descriptors)
}

/// Sends raw bytes as one packet, with descriptors.
pub fn send_bytes(
    socket: impl AsFd,
    bytes: &[u8],
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_SENT))];
    let mut beside = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !beside.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("more than {MAX_SENT} descriptors for one message"),
        ));
    }
    retry(|| sendmsg(&socket, &[IoSlice::new(bytes)], &mut beside, SendFlags::NOSIGNAL))?;
    Ok(())
}

/// Receives one packet; `None` when the other end is closed.
pub fn receive(socket: impl AsFd) -> io::Result<Option<Packet>> {
    let mut bytes = vec![0; next_length(&socket)?];
    let mut space =
        [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS), ScmCredentials(1))];
    let mut beside = RecvAncillaryBuffer::new(&mut space);
    let got = retry(|| {
        recvmsg(&socket, &mut [IoSliceMut::new(&mut bytes)], &mut beside, RecvFlags::CMSG_CLOEXEC)
    })?;
    let mut descriptors = Vec::new();
    for message in beside.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    if got.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a message was cut off"));
    }
    if got.bytes == 0 && descriptors.is_empty() {
        return Ok(None);
    }
    bytes.truncate(got.bytes);
    Ok(Some(Packet { bytes, descriptors }))
}

impl Packet {
    /// Reads the message as JSON.
    pub fn json<T: DeserializeOwned>(&self) -> io::Result<T> {
        Ok(serde_json::from_slice(&self.bytes)?)
    }

    /// The descriptors, when there are exactly `N`.
    pub fn exactly<const N: usize>(self) -> io::Result<[OwnedFd; N]> {
        let have = self.descriptors.len();
        self.descriptors.try_into().map_err(|_| {
            io::Error::new(
                io::ErrorKind::InvalidData,
                format!("{have} descriptors came where {N} were due"),
            )
        })
    }
}

/// Waits for the next packet and returns its length, at most that of a message: a buffer for the
/// longest message would cost more than most messages do.
fn next_length(socket: &impl AsFd) -> io::Result<usize> {
    let mut none = RecvAncillaryBuffer::default();
    let flags = RecvFlags::PEEK | RecvFlags::TRUNC;
    let got = retry(|| recvmsg(socket, &mut [IoSliceMut::new(&mut [])], &mut none, flags))?;
    Ok(got.bytes.min(MAX_MESSAGE))
}

/// Runs a system call again while a signal interrupts it.
fn retry<T>(mut call: impl FnMut() -> rustix::io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(rustix::io::Errno::INTR) => {}
            other => return Ok(other?),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_and_its_descriptors_arrive_together() {
        let (here, there) = pair().unwrap();
        let (a, _b) = pair().unwrap();
        send(&here, &"hello", &[a.as_fd()]).unwrap();
        let packet = receive(&there).unwrap().unwrap();
        assert_eq!(packet.json::<String>().unwrap(), "hello");
        assert!(packet.exactly::<1>().is_ok());
    }

    #[test]
    fn a_closed_end_reads_as_none() {
        let (here, there) = pair().unwrap();
        drop(here);
        assert!(receive(&there).unwrap().is_none());
    }

    #[test]
    fn an_oversized_message_is_refused_by_the_sender() {
        let (here, _there) = pair().unwrap();
        let long = "x".repeat(MAX_MESSAGE);
        let error = send(&here, &long, &[]).unwrap_err();
        assert!(error.to_string().contains("over the limit"));
    }

    #[test]
    fn the_wrong_number_of_descriptors_is_an_error() {
        let (here, there) = pair().unwrap();
        send(&here, &1, &[]).unwrap();
        let packet = receive(&there).unwrap().unwrap();
        assert!(packet.exactly::<2>().unwrap_err().to_string().contains("0 descriptors"));
    }
}

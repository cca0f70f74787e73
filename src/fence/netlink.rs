//! The blocking netlink socket that routes, packet rules and `sock_diag` share: framing, several
//! messages in one send, and the answers with the message they belong to.
//!
//! The kernel handles a request inside `send`, so every answer is queued when `send` returns. All
//! reads are therefore non-blocking: an answer that is missing is an error and never a hang. The
//! socket is connected to the kernel (port 0), so nothing else can put a message into it.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkDeserializable, NetlinkHeader, NetlinkSerializable,
};
use rustix::buffer::spare_capacity;
use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, Protocol, RecvFlags, SendFlags, SocketFlags, SocketType};

use super::error::{NetworkError, Result};

/// Length of `struct nlmsghdr`.
const HEADER: usize = 16;
/// An acknowledgement, or an error, `NLMSG_ERROR`.
const ERROR: u16 = 2;
/// The end of a dump, `NLMSG_DONE`.
const DONE: u16 = 3;
/// The kernel fills at most 32 KiB of a datagram, whatever the reader's buffer.
const DATAGRAM: usize = 32 * 1024;

/// One for all sockets: an answer that an earlier, failed exchange left behind never matches.
static SEQUENCE: AtomicU32 = AtomicU32::new(1);

/// A route socket. It belongs to the namespace of the thread that opened it, for good, whichever
/// thread uses it later.
#[derive(Debug)]
pub struct Route(OwnedFd);

impl Route {
    /// Opens one in the namespace of the calling thread.
    pub fn open() -> Result<Self> {
        // NETLINK_ROUTE is 0, which the library writes as none.
        open(None).map(Self)
    }

    /// Takes one that another thread opened.
    #[must_use]
    pub fn from_fd(fd: OwnedFd) -> Self {
        Self(fd)
    }
}

impl AsFd for Route {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Opens a netlink socket in the namespace of the calling thread; close-on-exec.
pub(super) fn open(protocol: Option<Protocol>) -> Result<OwnedFd> {
    let failed = |e: Errno| NetworkError::new("open", "a netlink socket", e);
    let fd = rustix::net::socket_with(
        AddressFamily::NETLINK,
        SocketType::RAW,
        SocketFlags::CLOEXEC,
        protocol,
    )
    .map_err(failed)?;
    rustix::net::connect(&fd, &SocketAddrNetlink::new(0, 0)).map_err(failed)?;
    Ok(fd)
}

/// What one message of a batch is about, to name it when it fails.
struct Subject {
    step: &'static str,
    object: String,
    /// A kernel that was built without what this message configures may refuse it.
    optional: bool,
}

/// Messages that go out in one send. The kernel takes them in order and answers each.
pub(super) struct Batch {
    bytes: Vec<u8>,
    /// Sequence number of the first message; the others follow it.
    first: u32,
    subjects: Vec<Subject>,
}

impl Batch {
    pub(super) fn new() -> Self {
        Self { bytes: Vec::with_capacity(2048), first: 0, subjects: Vec::with_capacity(16) }
    }

    /// Appends a message: `step` in the infinitive and `object` name it in errors.
    pub(super) fn push(
        &mut self,
        step: &'static str,
        object: impl fmt::Display,
        kind: u16,
        flags: u16,
        payload: &[u8],
    ) -> &mut Self {
        let length = u32::try_from(HEADER + payload.len()).expect("a message is short");
        self.bytes.extend_from_slice(&length.to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(&(flags | NLM_F_REQUEST).to_ne_bytes());
        // Sequence and port: the sequence is known when the batch is sent; the port is ours.
        self.bytes.extend_from_slice(&[0; 8]);
        self.bytes.extend_from_slice(payload);
        pad(&mut self.bytes);
        self.subjects.push(Subject { step, object: object.to_string(), optional: false });
        self
    }

    /// Appends a message of a typed protocol.
    pub(super) fn typed(
        &mut self,
        step: &'static str,
        object: impl fmt::Display,
        flags: u16,
        message: &impl NetlinkSerializable,
    ) -> &mut Self {
        let mut payload = vec![0; message.buffer_len()];
        message.serialize(&mut payload);
        self.push(step, object, message.message_type(), flags, &payload)
    }

    /// The last message may be refused by a kernel that was built without the address family.
    pub(super) fn optional(&mut self) {
        if let Some(subject) = self.subjects.last_mut() {
            subject.optional = true;
        }
    }

    /// Calls `change` with each message's bytes from its header on.
    fn each(&mut self, mut change: impl FnMut(usize, &mut [u8])) {
        let mut rest = self.bytes.as_mut_slice();
        let mut index = 0;
        while let Some(length) = u32_at(rest, 0) {
            let (message, after) = rest.split_at_mut(align(length as usize));
            change(index, message);
            rest = after;
            index += 1;
        }
    }

    /// Sends the batch and reads the answers up to that of the message at `last`, which is made
    /// to ask for one. Errors of all messages are looked at; the first decides.
    fn exchange_until(mut self, fd: &OwnedFd, last: usize) -> Result<Replies> {
        let count = u32::try_from(self.subjects.len()).expect("a batch is short");
        self.first = SEQUENCE.fetch_add(count, Ordering::Relaxed);
        let first = self.first;
        self.each(|index, message| {
            let sequence = first.wrapping_add(u32::try_from(index).unwrap_or(u32::MAX));
            message[8..12].copy_from_slice(&sequence.to_ne_bytes());
            if index == last {
                // NLM_F_ACK is in the low byte on one byte order and the high one on the other.
                let flags = u16::from_ne_bytes([message[6], message[7]]) | NLM_F_ACK;
                message[6..8].copy_from_slice(&flags.to_ne_bytes());
            }
        });
        let subject = &self.subjects[last];
        let sent = rustix::net::send(fd, &self.bytes, SendFlags::empty())
            .map_err(|e| NetworkError::new(subject.step, &subject.object, e))?;
        if sent != self.bytes.len() {
            let short = io::Error::from(io::ErrorKind::WriteZero);
            return Err(NetworkError::new(subject.step, &subject.object, short));
        }
        self.receive(fd, last)
    }

    fn receive(&self, fd: &OwnedFd, last: usize) -> Result<Replies> {
        let mut replies = Replies { messages: Vec::new(), skipped: Vec::new() };
        let mut failed: Option<(usize, Errno)> = None;
        // Never filled with zeros: most answers are short, and the fence's start has some twenty.
        let mut buffer = Vec::with_capacity(DATAGRAM);
        'datagrams: loop {
            buffer.clear();
            match rustix::net::recv(fd, spare_capacity(&mut buffer), RecvFlags::DONTWAIT) {
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                // Some errors end a batch without a word about its last message.
                Err(Errno::AGAIN) if failed.is_some() => break,
                Err(e) => {
                    let subject = &self.subjects[last];
                    return Err(NetworkError::new(subject.step, &subject.object, e));
                }
            }
            for message in messages(&buffer) {
                let index = message.sequence.wrapping_sub(self.first) as usize;
                let Some(subject) = self.subjects.get(index) else {
                    continue;
                };
                if !matches!(message.kind, ERROR | DONE) {
                    let payload = message.payload.to_vec();
                    replies.messages.push(Reply { kind: message.kind, payload });
                    continue;
                }
                // Both begin with zero or a negative errno.
                let code = u32_at(message.payload, 0).map_or(0, u32::cast_signed);
                if code != 0 {
                    let errno = errno(code.wrapping_neg());
                    if subject.optional && is_unsupported(errno) {
                        replies.skipped.push(index);
                    } else {
                        failed = failed.or(Some((index, errno)));
                    }
                }
                if index == last {
                    break 'datagrams;
                }
            }
        }
        match failed {
            Some((index, errno)) => {
                let subject = &self.subjects[index];
                Err(NetworkError::new(subject.step, &subject.object, errno))
            }
            None => Ok(replies),
        }
    }

    /// Sends the batch and reads all answers.
    pub(super) fn exchange(self, fd: &OwnedFd) -> Result<Replies> {
        let last = self.subjects.len() - 1;
        self.exchange_until(fd, last)
    }

    /// Sends a batch of packet rules, whose last message only closes it and is not answered by
    /// kernels before 6.10.
    pub(super) fn exchange_closed(self, fd: &OwnedFd) -> Result<Replies> {
        let last = self.subjects.len() - 2;
        self.exchange_until(fd, last)
    }
}

impl Route {
    pub(super) fn exchange(&self, batch: Batch) -> Result<Replies> {
        batch.exchange(&self.0)
    }

    /// All objects of the kind that `request` asks for.
    pub(super) fn dump<T>(
        &self,
        object: &'static str,
        request: &impl NetlinkSerializable,
    ) -> Result<Vec<T>>
    where
        T: NetlinkDeserializable,
    {
        let mut batch = Batch::new();
        batch.typed("list", object, NLM_F_DUMP, request);
        let replies = batch.exchange(&self.0)?;
        replies.messages.iter().map(|reply| reply.parse("list", object)).collect()
    }
}

/// The answers to a batch.
pub(super) struct Replies {
    /// Everything but acknowledgements, in the order it came.
    pub(super) messages: Vec<Reply>,
    /// Optional messages that the kernel could not take, by their place in the batch.
    pub(super) skipped: Vec<usize>,
}

/// One message of an answer.
pub(super) struct Reply {
    pub(super) kind: u16,
    pub(super) payload: Vec<u8>,
}

impl Reply {
    /// Reads the message as one of a typed protocol.
    pub(super) fn parse<T: NetlinkDeserializable>(
        &self,
        step: &'static str,
        object: &str,
    ) -> Result<T> {
        let mut header = NetlinkHeader::default();
        header.message_type = self.kind;
        T::deserialize(&header, &self.payload)
            .map_err(|e| NetworkError::differs(step, object, e.to_string()))
    }
}

/// What is no error number is a broken protocol: the library takes none but those of the kernel, and
/// panics.
fn errno(code: i32) -> Errno {
    if (1..4096).contains(&code) { Errno::from_raw_os_error(code) } else { Errno::PROTO }
}

/// A kernel without IPv6 says one of these to a request about it.
fn is_unsupported(errno: Errno) -> bool {
    errno == Errno::AFNOSUPPORT || errno == Errno::OPNOTSUPP
}

struct Received<'a> {
    kind: u16,
    sequence: u32,
    payload: &'a [u8],
}

/// The messages of a datagram. One that is cut off ends it.
fn messages(mut datagram: &[u8]) -> impl Iterator<Item = Received<'_>> {
    std::iter::from_fn(move || {
        let length = u32_at(datagram, 0)? as usize;
        let payload = datagram.get(HEADER..length)?;
        let kind = u16::from_ne_bytes([datagram[4], datagram[5]]);
        let sequence = u32_at(datagram, 8)?;
        datagram = datagram.get(align(length)..).unwrap_or_default();
        Some(Received { kind, sequence, payload })
    })
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4).map(|b| u32::from_ne_bytes([b[0], b[1], b[2], b[3]]))
}

fn align(length: usize) -> usize {
    length.next_multiple_of(4)
}

fn pad(bytes: &mut Vec<u8>) {
    bytes.resize(align(bytes.len()), 0);
}

/// Appends an attribute with a plain value.
pub(super) fn attribute(out: &mut Vec<u8>, kind: u16, value: &[u8]) {
    nested(out, kind, |out| out.extend_from_slice(value));
}

/// Appends an attribute whose value `write` appends.
pub(super) fn nested(out: &mut Vec<u8>, kind: u16, write: impl FnOnce(&mut Vec<u8>)) {
    let start = out.len();
    out.extend_from_slice(&[0; 4]);
    write(out);
    let length = u16::try_from(out.len() - start).expect("an attribute is short");
    out[start..start + 2].copy_from_slice(&length.to_ne_bytes());
    out[start + 2..start + 4].copy_from_slice(&kind.to_ne_bytes());
    pad(out);
}

#[cfg(test)]
mod fuzz;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_padded_and_counted() {
        let mut out = Vec::new();
        nested(&mut out, 3, |out| attribute(out, 1, b"abc"));
        let mut expected = Vec::new();
        for half in [12_u16, 3, 7, 1] {
            expected.extend_from_slice(&half.to_ne_bytes());
        }
        expected.extend_from_slice(b"abc\0");
        assert_eq!(out, expected);
    }

    #[test]
    fn what_is_no_error_number_is_a_broken_protocol() {
        assert_eq!(errno(2), Errno::NOENT);
        for code in [0, -1, 4096, i32::MIN, i32::MAX] {
            assert_eq!(errno(code), Errno::PROTO, "{code}");
        }
    }

    #[test]
    fn a_datagram_that_is_cut_off_ends() {
        let mut batch = Batch::new();
        batch.push("try", "one", 16, 0, b"x").push("try", "two", 17, 0, b"yy");
        let all = batch.bytes;
        assert_eq!(messages(&all).map(|m| m.kind).collect::<Vec<_>>(), [16, 17]);
        for cut in 0..all.len() {
            let kinds: Vec<_> = messages(&all[..cut]).map(|m| m.kind).collect();
            assert!([16, 17].starts_with(&kinds), "{cut}: {kinds:?}");
        }
    }

    #[test]
    fn an_error_names_the_message() {
        let route = Route::open().unwrap();
        let mut batch = Batch::new();
        batch.push("ask", "for an unknown thing", 9999, 0, &[0; 4]);
        let error = route.exchange(batch).err().map(|e| e.to_string());
        let text = error.unwrap_or_default();
        assert!(text.starts_with("ask for an unknown thing: "), "{text}");
    }
}

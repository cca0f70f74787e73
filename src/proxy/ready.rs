//! The first message to the supervisor: the sandbox CA's certificate and the bundle.

use std::fs::File;
use std::io::{self, IoSlice, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use anyhow::Context as _;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use super::control::{MAX_MESSAGE, ToSupervisor};

/// Sends [`ToSupervisor::Ready`] on the socket, which still blocks.
///
/// A bundle that does not fit into a message (that of most images does not) is left empty in it;
/// beside the message comes the reading end of a pipe with the bundle, to be read to its end.
pub(crate) fn send(control: &OwnedFd, ca_pem: String, bundle_pem: String) -> anyhow::Result<()> {
    let whole = serde_json::to_vec(&ToSupervisor::Ready {
        ca_pem: ca_pem.clone(),
        bundle_pem: bundle_pem.clone(),
    })?;
    if whole.len() <= MAX_MESSAGE {
        return packet(control, &whole, &[]).context("cannot tell the supervisor");
    }
    let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
        .context("cannot make a pipe for the bundle")?;
    // With room for all of it the thread is done before the supervisor reads; without, it waits.
    let _ = rustix::pipe::fcntl_setpipe_size(&writer, bundle_pem.len());
    std::thread::Builder::new()
        .name("bundle".to_owned())
        .spawn(move || {
            // A supervisor that does not read it has its reasons.
            let _ = File::from(writer).write_all(bundle_pem.as_bytes());
        })
        .context("cannot start the thread that writes the bundle")?;
    let short = serde_json::to_vec(&ToSupervisor::Ready { ca_pem, bundle_pem: String::new() })?;
    packet(control, &short, &[reader.as_fd()]).context("cannot tell the supervisor")
}

fn packet(control: &OwnedFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut beside = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !beside.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::Error::other("no room for the descriptor"));
    }
    sendmsg(control, &[IoSlice::new(bytes)], &mut beside, SendFlags::NOSIGNAL)?;
    Ok(())
}

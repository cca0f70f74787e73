//! The proxy's end of the control socket: sends questions, hands answers to whoever waits, and
//! passes on what the supervisor says by itself.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::SocketAddrV4;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::bail;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendFlags, recvmsg, sendmsg,
};
use tokio::io::Interest;
use tokio::net::UnixDatagram;
use tokio::sync::oneshot;

use super::control::{CallerRecord, MAX_DESCRIPTORS, MAX_MESSAGE, ToProxy, ToSupervisor};

/// How long the supervisor may take to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// Why the supervisor gave no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ControlError {
    #[error("control socket: {0}")]
    Io(#[from] io::Error),
    #[error("control message: {0}")]
    Message(#[from] serde_json::Error),
    #[error("control message of more than {MAX_MESSAGE} bytes")]
    TooLong,
    #[error("the supervisor did not answer in time")]
    Timeout,
    #[error("the supervisor is gone")]
    Closed,
    #[error("the supervisor could not answer: {0}")]
    Failed(String),
    #[error("the supervisor's answer is of another kind than the question")]
    Mismatch,
    #[error("the supervisor's answer came without its descriptor: out of descriptors")]
    NoDescriptor,
}

/// All that is read of an answer that is otherwise not understood: which question it is for.
#[derive(serde::Deserialize)]
struct Numbered {
    id: u64,
}

type Answer = (ToProxy, Vec<OwnedFd>);

/// The control socket and the questions that are open.
pub(crate) struct Control {
    /// A packet socket of another type than this names, used by `sendmsg` and `recvmsg` only:
    /// what counts is that the runtime watches it.
    socket: UnixDatagram,
    last_id: AtomicU64,
    open: Mutex<HashMap<u64, oneshot::Sender<Answer>>>,
}

/// Takes a question off the list when nobody waits for its answer any more.
struct Waiting<'a>(&'a Control, u64);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.open.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.1);
    }
}

impl Control {
    /// Takes the socket over. Must be called within a tokio runtime.
    pub(crate) fn new(socket: OwnedFd) -> io::Result<Self> {
        let socket = std::os::unix::net::UnixDatagram::from(socket);
        socket.set_nonblocking(true)?;
        Ok(Self {
            socket: UnixDatagram::from_std(socket)?,
            last_id: AtomicU64::new(0),
            open: Mutex::default(),
        })
    }

    /// Sends one message.
    pub(crate) async fn send(&self, message: &ToSupervisor) -> Result<(), ControlError> {
        let bytes = serde_json::to_vec(message)?;
        if bytes.len() > MAX_MESSAGE {
            return Err(ControlError::TooLong);
        }
        let send = || send_packet(&self.socket, &bytes);
        Ok(self.socket.async_io(Interest::WRITABLE, send).await?)
    }

    /// Whose connection is this? `None`: nobody's that was recorded. The descriptor is the
    /// executable.
    pub(crate) async fn identify(
        &self,
        client: SocketAddrV4,
        server: SocketAddrV4,
    ) -> Result<Option<(CallerRecord, OwnedFd)>, ControlError> {
        let (answer, fds) = self.ask(|id| ToSupervisor::Identify { id, client, server }).await?;
        match (answer, fds.into_iter().next()) {
            (ToProxy::Caller { caller: None, .. }, _) => Ok(None),
            (ToProxy::Caller { caller: Some(caller), .. }, Some(exe)) => Ok(Some((caller, exe))),
            (ToProxy::Caller { .. }, None) => Err(ControlError::NoDescriptor),
            _ => Err(ControlError::Mismatch),
        }
    }

    /// A fresh TCP socket of the gateway's namespace.
    pub(crate) async fn gateway_socket(&self) -> Result<OwnedFd, ControlError> {
        let (answer, fds) = self.ask(|id| ToSupervisor::GatewaySocket { id }).await?;
        match (answer, fds.into_iter().next()) {
            (ToProxy::GatewaySocket { .. }, Some(socket)) => Ok(socket),
            (ToProxy::GatewaySocket { .. }, None) => Err(ControlError::NoDescriptor),
            _ => Err(ControlError::Mismatch),
        }
    }

    async fn ask(
        &self,
        question: impl FnOnce(u64) -> ToSupervisor,
    ) -> Result<Answer, ControlError> {
        let id = self.last_id.fetch_add(1, Ordering::Relaxed) + 1;
        let (sender, receiver) = oneshot::channel();
        self.open.lock().unwrap_or_else(PoisonError::into_inner).insert(id, sender);
        let _waiting = Waiting(self, id);
        let answer = async {
            self.send(&question(id)).await?;
            receiver.await.map_err(|_| ControlError::Closed)
        };
        let answer = tokio::time::timeout(ANSWER_TIMEOUT, answer)
            .await
            .map_err(|_| ControlError::Timeout)??;
        match answer.0 {
            ToProxy::Failed { reason, .. } => Err(ControlError::Failed(reason)),
            _ => Ok(answer),
        }
    }

    /// The next message that answers no question; answers on the way go to those who wait.
    /// `None`: the socket was closed. Only one task may call this.
    pub(crate) async fn next(&self) -> Result<Option<Answer>, ControlError> {
        let mut buffer = Vec::new();
        loop {
            let receive = || receive_whole(&self.socket, &mut buffer);
            let received = self.socket.async_io(Interest::READABLE, receive).await?;
            let Some((length, fds)) = received else {
                return Ok(None);
            };
            if length > MAX_MESSAGE {
                return Err(ControlError::TooLong);
            }
            match read(&buffer[..length])? {
                message @ (ToProxy::Caller { id, .. }
                | ToProxy::GatewaySocket { id }
                | ToProxy::Failed { id, .. }) => {
                    let waiting =
                        self.open.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
                    // An answer that comes too late is dropped, its descriptor closed.
                    if let Some(waiting) = waiting {
                        let _ = waiting.send((message, fds));
                    }
                }
                message => return Ok(Some((message, fds))),
            }
        }
    }
}

/// One message. An answer that is not understood fails its question; only what says nothing of a
/// question is an error.
fn read(bytes: &[u8]) -> Result<ToProxy, ControlError> {
    serde_json::from_slice(bytes).or_else(|error| match serde_json::from_slice(bytes) {
        Ok(Numbered { id }) => {
            Ok(ToProxy::Failed { id, reason: format!("answer not understood: {error}") })
        }
        Err(_) => Err(error.into()),
    })
}

/// The first message: the proxy is locked and has its CA. Sent while the socket still blocks.
pub(crate) fn ready(control: &OwnedFd, ca_pem: &str) -> Result<(), ControlError> {
    let ready = ToSupervisor::Ready { ca_pem: ca_pem.to_owned() };
    Ok(send_packet(control, &serde_json::to_vec(&ready)?)?)
}

/// What comes with [`ToProxy::Begin`].
pub(crate) struct Begin {
    pub(crate) digest: String,
    pub(crate) policy: File,
    pub(crate) bundle: File,
    pub(crate) java: File,
}

/// The first message from the supervisor; `None` at its end. Waited for while the socket still blocks.
pub(crate) fn begin(control: &OwnedFd) -> anyhow::Result<Option<Begin>> {
    let mut buffer = Vec::new();
    let Some((length, fds)) = receive_whole(control, &mut buffer)? else { return Ok(None) };
    let digest = match serde_json::from_slice(&buffer[..length])? {
        ToProxy::Begin { digest } => digest,
        other => bail!("the supervisor began with {other:?}"),
    };
    let count = fds.len();
    let Ok([policy, bundle, java]) = <[OwnedFd; 3]>::try_from(fds) else {
        bail!("{count} files came, not 3: out of descriptors?");
    };
    let [policy, bundle, java] = [policy, bundle, java].map(File::from);
    Ok(Some(Begin { digest, policy, bundle, java }))
}

/// The second message: what the agent's start waits for is done. Sent while the socket still blocks.
pub(crate) fn prepared(control: &OwnedFd) -> Result<(), ControlError> {
    Ok(send_packet(control, &serde_json::to_vec(&ToSupervisor::Prepared)?)?)
}

fn send_packet(socket: impl AsFd, bytes: &[u8]) -> io::Result<()> {
    let mut no_fds = SendAncillaryBuffer::default();
    sendmsg(socket, &[IoSlice::new(bytes)], &mut no_fds, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// The same with a buffer that grows to what comes: most messages are short, the longest few.
fn receive_whole(
    socket: impl AsFd,
    buffer: &mut Vec<u8>,
) -> io::Result<Option<(usize, Vec<OwnedFd>)>> {
    let mut none = RecvAncillaryBuffer::default();
    let flags = RecvFlags::PEEK | RecvFlags::TRUNC;
    let next = recvmsg(&socket, &mut [IoSliceMut::new(&mut [])], &mut none, flags)?;
    if next.bytes > buffer.len() {
        buffer.resize(next.bytes.min(MAX_MESSAGE + 1), 0);
    }
    receive(socket, buffer)
}

/// One packet and its descriptors; `None` at the end. Descriptors that were cut short (we have too
/// many open) are none: the message tells what they were for, and only that fails.
fn receive(socket: impl AsFd, buffer: &mut [u8]) -> io::Result<Option<(usize, Vec<OwnedFd>)>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received =
        recvmsg(socket, &mut [IoSliceMut::new(buffer)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let mut fds = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    if received.flags.contains(ReturnFlags::CTRUNC) {
        fds.clear();
    }
    if received.flags.contains(ReturnFlags::TRUNC) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "message was cut short"));
    }
    Ok((received.bytes > 0).then_some((received.bytes, fds)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .expect("socketpair")
    }

    #[tokio::test]
    async fn answers_find_their_questions_in_any_order() {
        let (ours, theirs) = pair();
        let control = std::sync::Arc::new(Control::new(ours).expect("control"));
        let supervisor = std::thread::spawn(move || {
            let mut ids = Vec::new();
            let mut buffer = vec![0; MAX_MESSAGE];
            for _ in 0..2 {
                let (length, _) = receive(&theirs, &mut buffer).expect("recv").expect("packet");
                match serde_json::from_slice(&buffer[..length]).expect("message") {
                    ToSupervisor::Identify { id, client, .. } => ids.push((id, client.port())),
                    other => panic!("{other:?}"),
                }
            }
            for (id, port) in ids.into_iter().rev() {
                let reason = format!("port {port}");
                let answer = serde_json::to_vec(&ToProxy::Failed { id, reason }).expect("json");
                send_packet(&theirs, &answer).expect("send");
            }
        });
        let reader = tokio::spawn({
            let control = std::sync::Arc::clone(&control);
            async move { control.next().await.expect("next").is_none() }
        });
        let ask = |port| {
            let control = std::sync::Arc::clone(&control);
            async move {
                let client = SocketAddrV4::new([10, 200, 0, 2].into(), port);
                let server = SocketAddrV4::new([10, 200, 0, 1].into(), 3128);
                control.identify(client, server).await.expect_err("failed").to_string()
            }
        };
        let (one, two) = tokio::join!(ask(1), ask(2));
        assert!(one.ends_with("port 1") && two.ends_with("port 2"), "{one} {two}");
        supervisor.join().expect("supervisor");
        assert!(reader.await.expect("reader"), "the end of the socket is seen");
        assert!(control.open.lock().expect("lock").is_empty());
    }

    #[tokio::test]
    async fn a_bad_answer_fails_its_question_only() {
        let (ours, theirs) = pair();
        let control = std::sync::Arc::new(Control::new(ours).expect("control"));
        let supervisor = std::thread::spawn(move || {
            let mut buffer = vec![0; MAX_MESSAGE];
            let mut answer = |text: &dyn Fn(u64) -> String, fds: &[std::os::fd::BorrowedFd<'_>]| {
                let (length, _) = receive(&theirs, &mut buffer).expect("recv").expect("packet");
                let question = serde_json::from_slice(&buffer[..length]).expect("message");
                let ToSupervisor::GatewaySocket { id } = question else { panic!("{question:?}") };
                let mut space =
                    [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2 * MAX_DESCRIPTORS))];
                let mut beside = SendAncillaryBuffer::new(&mut space);
                if !fds.is_empty() {
                    assert!(beside.push(rustix::net::SendAncillaryMessage::ScmRights(fds)));
                }
                let text = text(id);
                let bytes = [IoSlice::new(text.as_bytes())];
                sendmsg(&theirs, &bytes, &mut beside, SendFlags::NOSIGNAL).expect("send");
            };
            let good = |id| serde_json::to_string(&ToProxy::GatewaySocket { id }).expect("json");
            let fd = std::fs::File::open("/dev/null").expect("open");
            answer(&|id| format!("{{\"type\":\"caller\",\"id\":{id},\"caller\":7}}"), &[]);
            answer(&|id| format!("{{\"type\":\"news\",\"id\":{id}}}"), &[]);
            answer(&good, &[]);
            // More than there is room for: cut short by the kernel, as when descriptors run out.
            answer(&good, &[fd.as_fd(); 2 * MAX_DESCRIPTORS]);
            answer(&good, &[fd.as_fd()]);
            send_packet(&theirs, b"{\"type\":\"news\"}").expect("send");
        });
        let reader = tokio::spawn({
            let control = std::sync::Arc::clone(&control);
            async move { control.next().await }
        });
        for expected in ["not understood", "not understood", "out of desc", "out of desc"] {
            let error = control.gateway_socket().await.expect_err(expected).to_string();
            assert!(error.contains(expected), "{error}");
        }
        control.gateway_socket().await.expect("the next answer is good");
        let end = reader.await.expect("reader");
        assert!(matches!(end, Err(ControlError::Message(_))), "{end:?}");
        supervisor.join().expect("supervisor");
    }
}

//! Byte streams: one type for plain and TLS connections, a buffered reader over it, and the copy
//! of both directions at once.

use std::io;
use std::net::IpAddr;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::{client, server};

use super::metrics::{self, Counter};
use super::wire::Wire;

/// What a reader starts with, in bytes: one TLS record, or a request head.
const BUFFER: usize = 16 * 1024;

/// What a reader grows to while large bodies pass, in bytes.
const BUFFER_LARGE: usize = 64 * 1024;

/// A connection to the agent or to an upstream.
pub(crate) enum Stream {
    /// Bare TCP.
    Tcp(TcpStream),
    /// TLS that we terminate, the agent's side.
    Agent(Box<server::TlsStream<TcpStream>>),
    /// TLS that we started, the upstream's side.
    Upstream(Box<client::TlsStream<Wire>>),
}

macro_rules! each {
    ($stream:expr, $io:ident => $call:expr) => {
        match $stream.get_mut() {
            Stream::Tcp($io) => $call,
            Stream::Agent($io) => $call,
            Stream::Upstream($io) => $call,
        }
    };
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let result = each!(self, io => Pin::new(io).poll_read(cx, buf));
        match result {
            // TLS peers that leave without close_notify are many. Where the end matters (bodies
            // with a length) the framing tells that something is missing.
            Poll::Ready(Err(error)) if error.kind() == io::ErrorKind::UnexpectedEof => {
                Poll::Ready(Ok(()))
            }
            result => result,
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        each!(self, io => Pin::new(io).poll_write(cx, buf))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self, io => Pin::new(io).poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self, io => Pin::new(io).poll_shutdown(cx))
    }
}

impl Stream {
    /// What carries it.
    fn tcp(&self) -> &TcpStream {
        match self {
            Self::Tcp(tcp) => tcp,
            Self::Agent(tls) => tls.get_ref().0,
            Self::Upstream(tls) => tls.get_ref().0.tcp(),
        }
    }
}

/// One of two users of a stream. One task works on both halves, so nobody waits for the lock.
struct Half(Arc<Mutex<Stream>>);

impl Half {
    fn stream(&self) -> MutexGuard<'_, Stream> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AsyncRead for Half {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.stream()).poll_read(cx, buf)
    }
}

/// The writing half.
pub(crate) struct Writer(Half);

impl AsyncWrite for Writer {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut *self.0.stream()).poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.0.stream()).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.0.stream()).poll_shutdown(cx)
    }
}

/// How often it is looked whether a peer that ended its half is there at all, and after how long
/// a rest its kernel is asked.
const LOOK: Duration = Duration::from_secs(2);
const ASK: Duration = Duration::from_secs(10);

/// Tells who a peer is, and when it is gone that has ended its half, or whose bytes nobody reads now. Made and
/// dropped while its connection is borrowed.
///
/// An end of stream is no sign of that: a client may end its half behind its request and wait for
/// the answer. One that is gone answers what it gets with a reset: a program that was killed once
/// its kernel has forgotten the socket (`tcp_fin_timeout`, 60 s) and is asked (keep-alive).
pub(crate) struct Line(Half);

impl Line {
    /// The address of the other end.
    pub(crate) fn peer(&self) -> Option<IpAddr> {
        self.0.stream().tcp().peer_addr().ok().map(|address| address.ip())
    }

    /// Ends when the connection has been reset or has timed out.
    pub(crate) async fn gone(&self) {
        let asked = socket2::TcpKeepalive::new().with_time(ASK).with_interval(ASK);
        let _ = socket2::SockRef::from(self.0.stream().tcp()).set_tcp_keepalive(&asked);
        while lives(self.0.stream().tcp()) {
            tokio::time::sleep(LOOK).await;
        }
    }
}

/// Whether the kernel still has the connection: a reset one has no peer.
pub(crate) fn lives(tcp: &TcpStream) -> bool {
    tcp.peer_addr().is_ok() && matches!(tcp.take_error(), Ok(None))
}

/// A connection in two halves that can be worked on at the same time.
pub(crate) struct Conn {
    pub(crate) rd: Reader,
    pub(crate) wr: Writer,
}

impl Conn {
    pub(crate) fn new(stream: Stream) -> Self {
        let counter = match &stream {
            Stream::Tcp(_) => None,
            Stream::Agent(_) => Some(&metrics::UP),
            Stream::Upstream(_) => Some(&metrics::DOWN),
        };
        let stream = Arc::new(Mutex::new(stream));
        let wr = Writer(Half(Arc::clone(&stream)));
        let io = Half(stream);
        Self { rd: Reader { io, buf: Vec::new(), start: 0, end: 0, counter, failed: None }, wr }
    }

    /// Has what is read counted. TLS says by itself which end it is, bare TCP does not.
    pub(crate) fn counted(mut self, counter: &'static Counter) -> Self {
        self.rd.counter = Some(counter);
        self
    }

    /// The stream again. Bytes that were read and not consumed are lost: whoever calls has used
    /// them.
    pub(crate) fn into_stream(self) -> Stream {
        drop(self.wr);
        // Whoever watched it by a `Line` had borrowed it and is done.
        let stream = Arc::into_inner(self.rd.io.0).expect("both halves are here");
        stream.into_inner().unwrap_or_else(PoisonError::into_inner)
    }

    /// The stream again, what was read ahead, and what counts its bytes.
    pub(crate) fn into_parts(self) -> (Stream, Vec<u8>, Option<&'static Counter>) {
        let (ahead, counter) = (self.rd.data().to_vec(), self.rd.counter);
        (self.into_stream(), ahead, counter)
    }

    /// Writes all of `bytes` and sends it on its way.
    pub(crate) async fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.wr.write_all(bytes).await?;
        self.wr.flush().await
    }

    /// Says goodbye so that the peer gets what was written: an end of stream, then whatever the
    /// peer still sends is read and dropped for a moment. (Closing a socket with unread bytes
    /// resets it, and the reset may overtake our answer.)
    pub(crate) async fn close(mut self) {
        const LINGER: Duration = Duration::from_secs(1);
        const DRAIN: usize = 256 * 1024;
        let _ = tokio::time::timeout(LINGER, async {
            self.wr.shutdown().await?;
            let mut drained = 0;
            while drained < DRAIN {
                self.rd.start = self.rd.end;
                match self.rd.fill().await? {
                    0 => break,
                    read => drained += read,
                }
            }
            io::Result::Ok(())
        })
        .await;
    }
}

/// The reading half with what was read ahead.
pub(crate) struct Reader {
    io: Half,
    buf: Vec<u8>,
    start: usize,
    end: usize,
    counter: Option<&'static Counter>,
    /// Behind what was read.
    failed: Option<io::Error>,
}

impl Reader {
    /// What was read and not consumed yet.
    pub(crate) fn data(&self) -> &[u8] {
        &self.buf[self.start..self.end]
    }

    /// Marks the first `count` bytes of [`Reader::data`] as used.
    pub(crate) fn consume(&mut self, count: usize) {
        self.start = (self.start + count).min(self.end);
    }

    /// Reads more behind what is there; 0 is the end of the stream. Cancel-safe.
    pub(crate) async fn fill(&mut self) -> io::Result<usize> {
        if let Some(error) = self.failed.take() {
            return Err(error);
        }
        self.make_room();
        let read = self.io.read(&mut self.buf[self.end..]).await?;
        self.end += read;
        self.count(read);
        Ok(read)
    }

    /// The same, and then what else is there without waiting, up to what is worth one write.
    pub(crate) async fn fill_much(&mut self) -> io::Result<usize> {
        let mut read = self.fill().await?;
        if read > 0 {
            // Records of TLS come one by one, 16 KiB at most.
            while self.end - self.start < BUFFER_LARGE && self.end < self.buf.len() {
                match self.read_now().await {
                    Some(Ok(more)) if more > 0 => read += more,
                    // Told by the next call: an error comes but once.
                    Some(Err(error)) => {
                        self.failed = Some(error);
                        break;
                    }
                    // An end comes again.
                    _ => break,
                }
            }
        }
        Ok(read)
    }

    /// Takes what the socket has without waiting: `None` when there is nothing, `Some(0)` at the
    /// end of the stream or on an error.
    pub(crate) async fn fill_now(&mut self) -> Option<usize> {
        if self.failed.is_some() {
            return Some(0);
        }
        self.read_now().await.map(|read| read.unwrap_or(0))
    }

    async fn read_now(&mut self) -> Option<io::Result<usize>> {
        self.make_room();
        std::future::poll_fn(|cx| {
            let mut buf = ReadBuf::new(&mut self.buf[self.end..]);
            Poll::Ready(match Pin::new(&mut self.io).poll_read(cx, &mut buf) {
                Poll::Pending => None,
                Poll::Ready(Err(error)) => Some(Err(error)),
                Poll::Ready(Ok(())) => {
                    let read = buf.filled().len();
                    self.end += read;
                    self.count(read);
                    Some(Ok(read))
                }
            })
        })
        .await
    }

    fn count(&self, read: usize) {
        if let Some(counter) = self.counter {
            counter.add(read as u64);
        }
    }

    /// Tells when the peer is gone.
    pub(crate) fn line(&self) -> Line {
        Line(Half(Arc::clone(&self.io.0)))
    }

    /// Gives back what an idle connection does not need.
    pub(crate) fn shrink(&mut self) {
        if self.start == self.end && self.buf.len() > BUFFER {
            self.buf = Vec::new();
            (self.start, self.end) = (0, 0);
        }
    }

    /// Room to read into: the buffer is made on first use, moved together when its end is near,
    /// and grown once a read has filled it.
    fn make_room(&mut self) {
        if self.start == self.end {
            // A full buffer, all used: large bodies pass here.
            let full = self.end == self.buf.len() && self.end != 0;
            (self.start, self.end) = (0, 0);
            if self.buf.is_empty() {
                self.buf = vec![0; BUFFER];
            } else if full && self.buf.len() < BUFFER_LARGE {
                self.buf = vec![0; BUFFER_LARGE];
            }
        } else if self.end == self.buf.len() {
            if self.start > 0 {
                self.buf.copy_within(self.start..self.end, 0);
                self.end -= self.start;
                self.start = 0;
            } else {
                let grown = self.buf.len().saturating_mul(2).clamp(BUFFER, BUFFER_LARGE * 2);
                self.buf.resize(grown, 0);
            }
        }
    }
}

/// How many bytes a tunnel carried.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Carried {
    /// From the agent to the upstream.
    pub(crate) up: u64,
    /// From the upstream to the agent.
    pub(crate) down: u64,
}

/// Copies both ways until both ends are done. An end of stream is passed on by itself, so
/// half-closed connections work; an error ends both, and so does an end that is gone. What was
/// carried is counted also when this is given up.
pub(crate) async fn duplex(agent: &mut Conn, upstream: &mut Conn, carried: &mut Carried) {
    let (agent_line, upstream_line) = (agent.rd.line(), upstream.rd.line());
    let up = one_way(&mut agent.rd, &mut upstream.wr, &mut carried.up);
    let down = one_way(&mut upstream.rd, &mut agent.wr, &mut carried.down);
    {
        let (mut up, mut down) = (pin!(up), pin!(down));
        tokio::select! {
            ended = &mut up => if ended.is_ok() {
                tokio::select! { _ = down => {}, () = agent_line.gone() => {} }
            },
            ended = &mut down => if ended.is_ok() {
                tokio::select! { _ = up => {}, () = upstream_line.gone() => {} }
            },
        }
    }
}

async fn one_way(from: &mut Reader, to: &mut Writer, count: &mut u64) -> io::Result<()> {
    loop {
        let data = from.data();
        if !data.is_empty() {
            to.write_all(data).await?;
            to.flush().await?;
            let moved = data.len();
            *count += moved as u64;
            from.start = from.end;
        }
        if from.fill_much().await? == 0 {
            return to.shutdown().await;
        }
    }
}

/// TCP with no delay for small writes and with keep-alive probes, so that a peer that vanished
/// does not hold a slot for ever.
pub(crate) fn tune(tcp: &TcpStream) {
    let _ = tcp.set_nodelay(true);
    let keepalive = socket2::TcpKeepalive::new()
        .with_time(Duration::from_secs(60))
        .with_interval(Duration::from_secs(15))
        .with_retries(4);
    let _ = socket2::SockRef::from(tcp).set_tcp_keepalive(&keepalive);
}

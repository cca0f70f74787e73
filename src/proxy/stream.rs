//! Byte streams: one type for plain and TLS connections, a buffered reader over it, and the copy
//! of both directions at once.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::io::{ReadHalf, WriteHalf};
use tokio::net::TcpStream;
use tokio_rustls::{client, server};

use super::metrics::{self, Counter};

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
    Upstream(Box<client::TlsStream<TcpStream>>),
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

/// A connection in two halves that can be worked on at the same time.
pub(crate) struct Conn {
    pub(crate) rd: Reader,
    pub(crate) wr: WriteHalf<Stream>,
}

impl Conn {
    pub(crate) fn new(stream: Stream) -> Self {
        let counter = match &stream {
            Stream::Tcp(_) => None,
            Stream::Agent(_) => Some(&metrics::UP),
            Stream::Upstream(_) => Some(&metrics::DOWN),
        };
        let (rd, wr) = tokio::io::split(stream);
        Self { rd: Reader { io: rd, buf: Vec::new(), start: 0, end: 0, counter }, wr }
    }

    /// Has what is read counted. TLS says by itself which end it is, bare TCP does not.
    pub(crate) fn counted(mut self, counter: &'static Counter) -> Self {
        self.rd.counter = Some(counter);
        self
    }

    /// The stream again. Bytes that were read and not consumed are lost: whoever calls has used
    /// them.
    pub(crate) fn into_stream(self) -> Stream {
        self.rd.io.unsplit(self.wr)
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
    io: ReadHalf<Stream>,
    buf: Vec<u8>,
    start: usize,
    end: usize,
    counter: Option<&'static Counter>,
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
        self.make_room();
        let read = self.io.read(&mut self.buf[self.end..]).await?;
        self.end += read;
        self.count(read);
        Ok(read)
    }

    /// Takes what the socket has without waiting: `None` when there is nothing, `Some(0)` at the
    /// end of the stream or on an error.
    pub(crate) async fn fill_now(&mut self) -> Option<usize> {
        self.make_room();
        std::future::poll_fn(|cx| {
            let mut buf = ReadBuf::new(&mut self.buf[self.end..]);
            Poll::Ready(match Pin::new(&mut self.io).poll_read(cx, &mut buf) {
                Poll::Pending => None,
                Poll::Ready(Err(_)) => Some(0),
                Poll::Ready(Ok(())) => {
                    let read = buf.filled().len();
                    self.end += read;
                    self.count(read);
                    Some(read)
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

    /// Gives back what an idle connection does not need.
    pub(crate) fn shrink(&mut self) {
        if self.start == self.end && self.buf.len() > BUFFER {
            self.buf = Vec::new();
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
/// half-closed connections work; an error ends both.
pub(crate) async fn duplex(agent: &mut Conn, upstream: &mut Conn) -> Carried {
    let mut carried = Carried::default();
    let up = one_way(&mut agent.rd, &mut upstream.wr, &mut carried.up);
    let down = one_way(&mut upstream.rd, &mut agent.wr, &mut carried.down);
    let _ = tokio::try_join!(up, down);
    carried
}

async fn one_way(from: &mut Reader, to: &mut WriteHalf<Stream>, count: &mut u64) -> io::Result<()> {
    loop {
        let data = from.data();
        if !data.is_empty() {
            to.write_all(data).await?;
            to.flush().await?;
            let moved = data.len();
            *count += moved as u64;
            from.start = from.end;
        }
        if from.fill().await? == 0 {
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

//! A connection as the `h2` crate takes it: what was read ahead comes first, bytes are counted and
//! frames metered, and the goodbye to an agent waits until it was heard.

use std::future::Future as _;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Sleep;

use super::meter::{Meter, Side};
use crate::proxy::metrics::Counter;
use crate::proxy::stream::{Conn, Stream};

/// How long an agent may take to hear a goodbye, and how much of what it still sends is dropped.
/// (Closing a socket with unread bytes resets it, and the reset may overtake what was written.)
const LINGER: Duration = Duration::from_secs(1);
const DRAIN: usize = 256 * 1024;

/// Says that the peer of a connection sent too many frames that cost something.
#[derive(Debug, Clone, Default)]
pub(super) struct Exceeded(Arc<AtomicBool>);

impl Exceeded {
    pub(super) fn is_so(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// Says that the peer does not take what is written.
#[derive(Debug, Clone, Default)]
pub(super) struct Clogged(Arc<AtomicBool>);

impl Clogged {
    pub(super) fn is_so(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// The connection's bytes.
pub(super) struct Io {
    stream: Stream,
    /// What was read before, and how much of it is used.
    ahead: (Vec<u8>, usize),
    counter: Option<&'static Counter>,
    side: Side,
    meter: Meter,
    exceeded: Exceeded,
    clogged: Clogged,
    goodbye: Option<(Pin<Box<Sleep>>, usize)>,
}

impl Io {
    pub(super) fn new(conn: Conn, side: Side) -> (Self, Exceeded) {
        let (stream, ahead, counter) = conn.into_parts();
        let exceeded = Exceeded::default();
        let io = Self {
            stream,
            ahead: (ahead, 0),
            counter,
            side,
            meter: Meter::new(side),
            exceeded: exceeded.clone(),
            clogged: Clogged::default(),
            goodbye: None,
        };
        (io, exceeded)
    }

    /// Whether what was written waits for the peer.
    pub(super) fn clogged(&self) -> Clogged {
        self.clogged.clone()
    }

    fn poll_read_some(
        &mut self,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let (ahead, used) = &mut self.ahead;
        if *used < ahead.len() {
            let taken = (ahead.len() - *used).min(buf.remaining());
            buf.put_slice(&ahead[*used..*used + taken]);
            *used += taken;
            if *used == ahead.len() {
                self.ahead = (Vec::new(), 0);
            }
            return Poll::Ready(Ok(()));
        }
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(cx, buf))?;
        if let Some(counter) = self.counter {
            counter.add((buf.filled().len() - before) as u64);
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncRead for Io {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.meter.exceeded() {
            this.exceeded.0.store(true, Ordering::Relaxed);
            return match this.side {
                // Whoever polls the connection looks whether it is so, and says goodbye.
                Side::Server => Poll::Pending,
                Side::Client => Poll::Ready(Err(io::Error::other("too many control frames"))),
            };
        }
        let before = buf.filled().len();
        ready!(this.poll_read_some(cx, buf))?;
        this.meter.read(&buf.filled()[before..]);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Io {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        let written = Pin::new(&mut this.stream).poll_write(cx, buf);
        this.clogged.0.store(written.is_pending(), Ordering::Relaxed);
        let written = ready!(written)?;
        this.meter.written(&buf[..written]);
        Poll::Ready(Ok(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.goodbye.is_none() {
            ready!(Pin::new(&mut this.stream).poll_shutdown(cx))?;
            if this.side == Side::Client {
                return Poll::Ready(Ok(()));
            }
        }
        let (end, drained) =
            this.goodbye.get_or_insert_with(|| (Box::pin(tokio::time::sleep(LINGER)), 0));
        let mut dropped = [0; 4096];
        while end.as_mut().poll(cx).is_pending() && *drained < DRAIN {
            let mut buf = ReadBuf::new(&mut dropped);
            match ready!(Pin::new(&mut this.stream).poll_read(cx, &mut buf)) {
                Ok(()) if !buf.filled().is_empty() => *drained += buf.filled().len(),
                _ => break,
            }
        }
        Poll::Ready(Ok(()))
    }
}

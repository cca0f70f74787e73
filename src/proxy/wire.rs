//! TCP under TLS that is read in large pieces while much comes: rustls asks for 4 KiB at a time, which
//! makes five system calls of each full record.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

/// How much is read at a time, in bytes: some records.
const AHEAD: usize = 64 * 1024;

/// What a rest leaves of that: after a read of less there is no buffer.
const LITTLE: usize = 4096;

/// A TCP stream with what was read ahead, where much comes.
#[derive(Debug)]
pub(crate) struct Wire {
    tcp: TcpStream,
    ahead: Vec<u8>,
    start: usize,
    end: usize,
    /// The last read gave all that was asked for.
    much: bool,
}

impl Wire {
    pub(crate) fn new(tcp: TcpStream) -> Self {
        Self { tcp, ahead: Vec::new(), start: 0, end: 0, much: false }
    }

    /// What carries it.
    pub(crate) fn tcp(&self) -> &TcpStream {
        &self.tcp
    }

    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.ahead.is_empty() {
            self.ahead = vec![0; AHEAD];
        }
        let mut buf = ReadBuf::new(&mut self.ahead);
        ready!(Pin::new(&mut self.tcp).poll_read(cx, &mut buf))?;
        (self.start, self.end) = (0, buf.filled().len());
        self.much = self.end > LITTLE;
        Poll::Ready(Ok(()))
    }
}

impl AsyncRead for Wire {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let wire = self.get_mut();
        if wire.start == wire.end {
            if !wire.much {
                wire.ahead = Vec::new();
                let before = buf.filled().len();
                ready!(Pin::new(&mut wire.tcp).poll_read(cx, buf))?;
                wire.much = buf.remaining() == 0 && buf.filled().len() - before >= LITTLE;
                return Poll::Ready(Ok(()));
            }
            ready!(wire.poll_fill(cx))?;
        }
        let count = buf.remaining().min(wire.end - wire.start);
        buf.put_slice(&wire.ahead[wire.start..wire.start + count]);
        wire.start += count;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Wire {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tcp).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tcp).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.tcp.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;

    #[tokio::test]
    async fn what_comes_is_what_was_sent_and_a_rest_holds_nothing() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("listener");
        let address = listener.local_addr().expect("address");
        let mut peer = TcpStream::connect(address).await.expect("peer");
        let (tcp, _) = listener.accept().await.expect("accept");
        let mut wire = Wire::new(tcp);
        let content: Vec<u8> = (0..500_000u32).map(|n| (n % 251) as u8).collect();
        let sent = content.clone();
        let send = async {
            peer.write_all(&sent).await.expect("send");
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
            peer.write_all(b"end").await.expect("send");
        };
        let read = async {
            let (mut got, mut piece, mut buffered) = (Vec::new(), vec![0; 4096], false);
            while got.len() < content.len() {
                let count = wire.read(&mut piece).await.expect("read");
                assert!(count > 0);
                got.extend_from_slice(&piece[..count]);
                buffered |= !wire.ahead.is_empty();
            }
            assert!(buffered, "much came");
            assert!(got == content);
            let mut last = [0; 4096];
            assert_eq!(wire.read(&mut last).await.expect("read"), 3);
            assert_eq!(&last[..3], b"end");
        };
        tokio::join!(read, send);
        drop(peer);
        assert_eq!(wire.read(&mut [0; 16]).await.expect("end"), 0);
        assert!(wire.ahead.is_empty(), "nothing is held for a connection that rests");
    }
}

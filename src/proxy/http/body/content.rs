//! A body piece by piece, without its framing: for those who do not send it on as HTTP/1.1.

use bytes::Bytes;

use super::{BodyError, Decoder, Step};
use crate::proxy::http::head::Framing;
use crate::proxy::stream::Reader;

/// The largest piece in bytes.
const PIECE: usize = 16 * 1024;

/// Where one body has been read to.
#[derive(Debug)]
pub(crate) enum Content {
    /// So many bytes are to come.
    Left(u64),
    ToTheEnd,
    Chunked(Decoder),
    Done,
}

impl Content {
    pub(crate) fn new(framing: Framing) -> Self {
        match framing {
            Framing::Empty | Framing::Length(0) => Self::Done,
            Framing::Length(length) => Self::Left(length),
            Framing::Close => Self::ToTheEnd,
            Framing::Chunked => Self::Chunked(Decoder::default()),
        }
    }

    /// Nothing is to come.
    pub(crate) fn is_done(&self) -> bool {
        matches!(self, Self::Done)
    }

    /// The next piece, never empty; none at the end. Trailers and chunk extensions are dropped.
    /// Cancel-safe.
    pub(crate) async fn next(&mut self, from: &mut Reader) -> Result<Option<Bytes>, BodyError> {
        loop {
            if let Some(piece) = self.take(from)? {
                return Ok(Some(piece));
            }
            if self.is_done() {
                return Ok(None);
            }
            if from.fill().await.map_err(BodyError::Read)? == 0 {
                if !matches!(self, Self::ToTheEnd) {
                    return Err(BodyError::Truncated);
                }
                *self = Self::Done;
            }
        }
    }

    /// A piece of what has been read already.
    fn take(&mut self, from: &mut Reader) -> Result<Option<Bytes>, BodyError> {
        loop {
            let data = from.data();
            let count = match self {
                Self::Done => return Ok(None),
                _ if data.is_empty() => return Ok(None),
                Self::ToTheEnd => data.len().min(PIECE),
                Self::Left(left) => {
                    let count = data.len().min(PIECE);
                    let count = count.min(usize::try_from(*left).unwrap_or(usize::MAX));
                    *left -= count as u64;
                    if *left == 0 {
                        *self = Self::Done;
                    }
                    count
                }
                Self::Chunked(decoder) => match decoder.step(&data[..data.len().min(PIECE)])? {
                    Step::More => return Ok(None),
                    Step::Skip(count) => {
                        from.consume(count);
                        continue;
                    }
                    Step::Data(count) => count,
                    Step::End(count) => {
                        from.consume(count);
                        *self = Self::Done;
                        return Ok(None);
                    }
                },
            };
            let piece = Bytes::copy_from_slice(&from.data()[..count]);
            from.consume(count);
            return Ok(Some(piece));
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt as _;
    use tokio::net::{TcpListener, TcpStream};

    use super::*;
    use crate::proxy::stream::{Conn, Stream};

    /// The content of `bytes`, written in pieces of `piece`, and what is left behind it.
    async fn read(
        bytes: &[u8],
        framing: Framing,
        piece: usize,
    ) -> Result<(Vec<u8>, Vec<u8>), BodyError> {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("listener");
        let mut peer =
            TcpStream::connect(listener.local_addr().expect("address")).await.expect("peer");
        peer.set_nodelay(true).expect("nodelay");
        let mut reader = Conn::new(Stream::Tcp(listener.accept().await.expect("accept").0)).rd;
        let bytes = bytes.to_vec();
        let sending = tokio::spawn(async move {
            for part in bytes.chunks(piece) {
                peer.write_all(part).await.expect("send");
                tokio::task::yield_now().await;
            }
        });
        let mut content = Content::new(framing);
        let mut whole = Vec::new();
        while let Some(piece) = content.next(&mut reader).await? {
            assert!(!piece.is_empty());
            whole.extend_from_slice(&piece);
        }
        sending.await.expect("sent");
        while reader.fill().await.expect("read") > 0 {}
        Ok((whole, reader.data().to_vec()))
    }

    #[tokio::test]
    async fn content_is_the_same_however_it_comes() {
        let chunked = b"5\r\nhello\r\n00A;x=\"y\"\r\n, 23456789\r\n0\r\nTrailer: 1\r\n\r\nNEXT";
        for piece in [1, 3, 7, chunked.len()] {
            let (content, left) = read(chunked, Framing::Chunked, piece).await.expect("whole");
            assert_eq!((&content[..], &left[..]), (&b"hello, 23456789"[..], &b"NEXT"[..]));
            let (content, left) =
                read(b"helloNEXT", Framing::Length(5), piece).await.expect("whole");
            assert_eq!((&content[..], &left[..]), (&b"hello"[..], &b"NEXT"[..]));
            let (content, _) = read(b"hello", Framing::Close, piece).await.expect("whole");
            assert_eq!(content, b"hello");
        }
        let large = vec![b'x'; 100_000];
        let (content, _) = read(&large, Framing::Length(100_000), 100_000).await.expect("whole");
        assert_eq!(content, large);
        let (content, left) = read(b"NEXT", Framing::Empty, 4).await.expect("whole");
        assert_eq!((&content[..], &left[..]), (&b""[..], &b"NEXT"[..]));
    }

    #[tokio::test]
    async fn half_a_body_is_not_a_whole_one() {
        for (bytes, framing) in [
            (&b"hell"[..], Framing::Length(5)),
            (b"5\r\nhello\r\n", Framing::Chunked),
            (b"", Framing::Chunked),
        ] {
            assert!(matches!(read(bytes, framing, 64).await, Err(BodyError::Truncated)));
        }
        assert!(matches!(read(b"+5\r\n", Framing::Chunked, 64).await, Err(BodyError::Chunk)));
    }
}

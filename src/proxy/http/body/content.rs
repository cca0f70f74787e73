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

//! Bodies that are read whole before they are judged, and then sent on as they were read.
//!
//! All of them together have a fixed room, and each has a time to arrive: an agent that opens many
//! requests and sends no body waits for itself.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use h2::RecvStream;
use http::header::CONTENT_LENGTH;
use http::request::Parts;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout_at};

use crate::proxy::http::body::{BodyError, Content};
use crate::proxy::http::head::{Framing, RequestHead};
use crate::proxy::refusal::Refusal;
use crate::proxy::stream::Conn;

/// The room of all bodies together, in KiB. The longest that a policy lets be read is half of it.
const ROOM: u32 = 16 * 1024;

/// How long a body may take, and how long it may wait for room.
const TIME: Duration = Duration::from_secs(30);

/// What an HTTP/1.1 client waits for that wants to be asked for its body.
const CONTINUE: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";

/// The room that is left.
#[derive(Debug)]
pub(crate) struct Room(Arc<Semaphore>);

/// A whole body. Its room is free again when it is dropped, which whoever sends it does as soon as
/// it is sent: an answer may take for ever.
#[derive(Debug)]
pub(crate) struct Held {
    pub(crate) bytes: Bytes,
    _room: Option<OwnedSemaphorePermit>,
}

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

/// Why a body was not read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Unread {
    #[error("the body is longer than the {0} bytes that the policy lets be read")]
    TooLong(usize),
    #[error("the body did not arrive within {} s", TIME.as_secs())]
    Slow,
    #[error("too many bodies are being read")]
    NoRoom,
    #[error("the body is malformed")]
    Malformed,
    #[error("the client ended the request within its body")]
    Ended,
}

impl From<&Unread> for Refusal {
    fn from(why: &Unread) -> Self {
        let (status, code) = match why {
            Unread::TooLong(_) => (413, "content_too_large"),
            Unread::Slow => (408, "body_timeout"),
            Unread::NoRoom => (503, "too_many_bodies"),
            Unread::Malformed | Unread::Ended => (400, "invalid_request"),
        };
        Self::new(status, code, &why.to_string())
    }
}

impl Room {
    pub(crate) fn new() -> Self {
        Self(Arc::new(Semaphore::new(ROOM as usize)))
    }

    /// Reads the body of an HTTP/1.1 request. A client that waits to be asked is.
    pub(crate) async fn http1(
        &self,
        client: &mut Conn,
        head: &RequestHead,
        max: usize,
    ) -> Result<Held, Unread> {
        let deadline = Instant::now() + TIME;
        let declared = match head.framing {
            Framing::Length(length) => Some(length),
            Framing::Empty => Some(0),
            Framing::Chunked | Framing::Close => None,
        };
        let mut gather = self.gather(declared, max, deadline).await?;
        if declared != Some(0)
            && head.minor > 0
            && head.fields.members("expect").any(|one| one.eq_ignore_ascii_case(b"100-continue"))
            && client.send(CONTINUE).await.is_err()
        {
            return Err(Unread::Ended);
        }
        let mut content = Content::new(head.framing);
        loop {
            match timeout_at(deadline, content.next(&mut client.rd)).await {
                Err(_) => return Err(Unread::Slow),
                Ok(Ok(Some(piece))) => gather.add(&piece)?,
                Ok(Ok(None)) => return Ok(gather.held()),
                Ok(Err(BodyError::Chunk)) => return Err(Unread::Malformed),
                Ok(Err(_)) => return Err(Unread::Ended),
            }
        }
    }

    /// Reads the body of a stream of HTTP/2. Trailers are dropped.
    pub(crate) async fn http2(
        &self,
        body: &mut RecvStream,
        head: &Parts,
        max: usize,
    ) -> Result<Held, Unread> {
        let deadline = Instant::now() + TIME;
        let length = head.headers.get(CONTENT_LENGTH).and_then(|length| length.to_str().ok());
        let declared = match length.and_then(|length| length.parse().ok()) {
            None if body.is_end_stream() => Some(0),
            declared => declared,
        };
        let mut gather = self.gather(declared, max, deadline).await?;
        let whole = async {
            while let Some(piece) = body.data().await {
                let piece = piece.map_err(|_| Unread::Ended)?;
                gather.add(&piece)?;
                // Only an error of ours could be told here.
                let _ = body.flow_control().release_capacity(piece.len());
            }
            body.trailers().await.map_err(|_| Unread::Ended)
        };
        timeout_at(deadline, whole).await.map_err(|_| Unread::Slow)??;
        Ok(gather.held())
    }

    /// Room for a body, before any of it is read.
    async fn gather(
        &self,
        declared: Option<u64>,
        max: usize,
        deadline: Instant,
    ) -> Result<Gather, Unread> {
        let most = match declared.map(usize::try_from) {
            None => max,
            Some(Ok(length)) if length <= max => length,
            Some(_) => return Err(Unread::TooLong(max)),
        };
        let room = u32::try_from(most.div_ceil(1024)).unwrap_or(u32::MAX).min(ROOM);
        let room = match room {
            0 => None,
            room => {
                let wait = Arc::clone(&self.0).acquire_many_owned(room);
                Some(
                    timeout_at(deadline, wait)
                        .await
                        .ok()
                        .and_then(Result::ok)
                        .ok_or(Unread::NoRoom)?,
                )
            }
        };
        Ok(Gather { bytes: Vec::new(), max, room })
    }
}

struct Gather {
    bytes: Vec<u8>,
    max: usize,
    room: Option<OwnedSemaphorePermit>,
}

impl Gather {
    fn add(&mut self, piece: &[u8]) -> Result<(), Unread> {
        if self.bytes.len() + piece.len() > self.max {
            return Err(Unread::TooLong(self.max));
        }
        self.bytes.extend_from_slice(piece);
        Ok(())
    }

    fn held(self) -> Held {
        Held { bytes: self.bytes.into(), _room: self.room }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_declared_too_long_is_not_waited_for() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
        runtime.expect("runtime").block_on(async {
            let room = Room::new();
            let soon = Instant::now() + TIME;
            for length in [101, u64::MAX] {
                let why = room.gather(Some(length), 100, soon).await.err();
                assert_eq!(why, Some(Unread::TooLong(100)));
            }
            let mut gather = room.gather(None, 100, soon).await.expect("room");
            assert!(gather.add(&[0; 100]).is_ok());
            assert_eq!(gather.add(&[0]), Err(Unread::TooLong(100)));
        });
    }

    #[test]
    fn room_is_bounded_and_given_back() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
        runtime.expect("runtime").block_on(async {
            let room = Room::new();
            let soon = Instant::now() + TIME;
            let half = 8 * 1024 * 1024;
            let one = room.gather(Some(half), 8 << 20, soon).await.expect("half").held();
            let _two = room.gather(None, 8 << 20, soon).await.expect("the other half");
            let past = Instant::now();
            let why = room.gather(Some(1), 8 << 20, past).await.err();
            assert_eq!(why, Some(Unread::NoRoom));
            assert!(room.gather(Some(0), 8 << 20, past).await.is_ok(), "nothing takes no room");
            drop(one);
            assert!(room.gather(None, 8 << 20, soon).await.is_ok());
        });
    }
}

//! Moving one body of HTTP/2: as much as the receiver's window takes, and no more of the sender's
//! window is opened than that.

use std::future::poll_fn;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use h2::{Reason, RecvStream, SendStream};

use super::fields;
use crate::proxy::http::body::{BodyError, patience};
use crate::proxy::l7::held::Held;

/// Why a body was not moved to its end.
#[derive(Debug)]
pub(super) enum Broken {
    /// The sender ended the stream, or is gone.
    From(h2::Error),
    /// The receiver did, for this reason if it told one.
    To(Option<Reason>),
    /// The receiver did not take in time what was held.
    Unread(String),
}

/// How much of a held body is given to the library at a time, in bytes.
const PIECE: usize = 16 * 1024;

/// Sends a body that was read before, and gives it up: what waits in the library is a copy, as short
/// as what waits of any body. A receiver that does not take it in time is given up too.
pub(super) async fn send_held(to: &mut SendStream<Bytes>, held: Held) -> Result<(), Broken> {
    let patience = patience(held.bytes.len());
    let whole = async {
        if held.bytes.is_empty() {
            return send(to, Bytes::new(), true).await;
        }
        let mut pieces = held.bytes.chunks(PIECE).peekable();
        while let Some(piece) = pieces.next() {
            send(to, Bytes::copy_from_slice(piece), pieces.peek().is_none()).await?;
        }
        Ok(())
    };
    let sent = tokio::time::timeout(patience, whole).await;
    sent.map_err(|_| Broken::Unread(BodyError::Unread(patience).to_string()))?
}

/// Moves a body with its trailers.
pub(super) async fn pump(from: &mut RecvStream, to: &mut SendStream<Bytes>) -> Result<(), Broken> {
    while let Some(data) = next(from, to).await? {
        let (length, last) = (data.len(), from.is_end_stream());
        send(to, data, last).await?;
        // Only an error of ours could be told here.
        let _ = from.flow_control().release_capacity(length);
        if last {
            return Ok(());
        }
    }
    let sent = match from.trailers().await.map_err(Broken::From)? {
        Some(trailers) => to.send_trailers(fields::of_trailers(trailers)),
        None => to.send_data(Bytes::new(), true),
    };
    sent.map_err(|error| Broken::To(error.reason()))
}

/// The sender's next piece, unless the receiver ends the stream before.
async fn next(from: &mut RecvStream, to: &mut SendStream<Bytes>) -> Result<Option<Bytes>, Broken> {
    poll_fn(|cx| match to.poll_reset(cx) {
        Poll::Ready(reset) => Poll::Ready(Err(Broken::To(reset.ok()))),
        Poll::Pending => from.poll_data(cx).map(|data| data.transpose().map_err(Broken::From)),
    })
    .await
}

/// Sends one piece, in as many parts as the window takes.
pub(super) async fn send(
    to: &mut SendStream<Bytes>,
    mut data: Bytes,
    last: bool,
) -> Result<(), Broken> {
    loop {
        let part = if data.is_empty() {
            Bytes::new()
        } else {
            let room = poll_fn(|cx| poll_room(to, cx, data.len())).await?;
            data.split_to(room)
        };
        let end = last && data.is_empty();
        if !part.is_empty() || end {
            to.send_data(part, end).map_err(|error| Broken::To(error.reason()))?;
        }
        if data.is_empty() {
            return Ok(());
        }
    }
}

/// How much of `want` bytes the receiver takes now, at least one.
fn poll_room(
    to: &mut SendStream<Bytes>,
    cx: &mut Context<'_>,
    want: usize,
) -> Poll<Result<usize, Broken>> {
    to.reserve_capacity(want);
    loop {
        let room = to.capacity().min(want);
        if room > 0 {
            return Poll::Ready(Ok(room));
        }
        match ready!(to.poll_capacity(cx)) {
            Some(Ok(_)) => {}
            Some(Err(error)) => return Poll::Ready(Err(Broken::To(error.reason()))),
            None => return Poll::Ready(Err(Broken::To(None))),
        }
    }
}

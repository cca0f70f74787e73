//! One exchange: a judged request to the upstream, its response to the client, both bodies at the
//! same time.

use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::io::AsyncWrite;

use super::body::{self, BodyError, Encoding};
use super::head::{self, Framing, HeadError, RequestHead, ResponseHead};
use super::write::{self, Rewrite};
use crate::proxy::stream::{Conn, Reader};

/// The most interim (1xx) responses before a final one.
const INTERIM_MAX: usize = 32;

/// How an exchange ended.
#[derive(Debug)]
pub(crate) struct Exchanged {
    /// The client may send its next request.
    pub(crate) client_reusable: bool,
    /// The upstream may get the next request.
    pub(crate) upstream_reusable: bool,
    /// The upstream leaves HTTP, as it was asked to: its answer, which the client has not got yet.
    pub(crate) upgraded: Option<Box<ResponseHead>>,
}

/// Why an exchange failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RelayError {
    /// The client has got nothing yet and can be told.
    #[error("upstream: {what}")]
    Upstream {
        what: String,
        /// Not one byte came back: on a connection that had been idle, this means that the
        /// upstream had closed it.
        unanswered: bool,
    },
    /// The client's body is malformed or incomplete, and the client has got nothing yet.
    #[error("request: {0}")]
    Request(BodyError),
    /// The client is gone, or has got part of a response: all there is left is to close.
    #[error("connection lost: {0}")]
    Lost(String),
}

/// What both directions tell each other.
#[derive(Default)]
struct Progress {
    /// The request's body is with the upstream.
    uploaded: AtomicBool,
    /// The client has got part of a response.
    begun: AtomicBool,
}

/// Runs one exchange. `rewrite` says where the request goes and that it may; `held` is its whole
/// body, where that has been read.
pub(crate) async fn exchange<H: AsRef<[u8]>>(
    client: &mut Conn,
    upstream: &mut Conn,
    head: &RequestHead,
    rewrite: &Rewrite<'_>,
    held: Option<H>,
) -> Result<Exchanged, RelayError> {
    let Conn { rd: client_rd, wr: client_wr } = client;
    let Conn { rd: upstream_rd, wr: upstream_wr } = upstream;
    let progress = Progress::default();
    let request = write::request(head, rewrite);
    let mut respond = pin!(respond(upstream_rd, client_wr, head, rewrite.upgrade, &progress));
    if head.framing == Framing::Empty {
        body::send(request, client_rd, Framing::Empty, upstream_wr, Encoding::Plain)
            .await
            .map_err(|error| RelayError::Upstream { what: error.to_string(), unanswered: true })?;
        progress.uploaded.store(true, Ordering::Relaxed);
    } else {
        let encoding = match head.framing {
            Framing::Chunked => Encoding::Chunked,
            _ => Encoding::Plain,
        };
        let mut upload = pin!(async {
            match held {
                Some(held) => {
                    let patience = body::patience(held.as_ref().len());
                    body::send_held(request, held, upstream_wr, patience).await
                }
                None => body::send(request, client_rd, head.framing, upstream_wr, encoding).await,
            }
        });
        tokio::select! {
            sent = &mut upload => match sent {
                Ok(_) => progress.uploaded.store(true, Ordering::Relaxed),
                // An upstream that has heard enough closes its ear; its answer may be there.
                Err(BodyError::Write(_)) => {}
                Err(error @ BodyError::Unread(_)) => {
                    let what = error.to_string();
                    return Err(RelayError::Upstream { what, unanswered: false });
                }
                Err(error) if progress.begun.load(Ordering::Relaxed) => {
                    return Err(RelayError::Lost(error.to_string()));
                }
                Err(error) => return Err(RelayError::Request(error)),
            },
            // Answered before the body was complete: the rest is not read.
            result = &mut respond => return result,
        }
    }
    tokio::select! {
        biased;
        result = &mut respond => result,
        () = gone(client_rd) => Err(RelayError::Lost("the client closed".to_owned())),
    }
}

async fn respond<W: AsyncWrite + Unpin>(
    upstream: &mut Reader,
    client: &mut W,
    request: &RequestHead,
    upgrade: bool,
    progress: &Progress,
) -> Result<Exchanged, RelayError> {
    let broken = |what: String| RelayError::Upstream { what, unanswered: false };
    for answers in 0..=INTERIM_MAX {
        let head = match head::read_response(upstream, request.method()).await {
            Ok(Some(head)) => head,
            Ok(None) => {
                return Err(RelayError::Upstream {
                    what: "closed without an answer".to_owned(),
                    unanswered: answers == 0,
                });
            }
            Err(error @ (HeadError::Io | HeadError::Truncated)) => {
                return Err(broken(error.to_string()));
            }
            Err(error) => return Err(broken(format!("response refused: {error}"))),
        };
        if head.status == 101 {
            if !upgrade || request.upgrade().is_none() {
                return Err(broken("changed protocols without being asked".to_owned()));
            }
            return Ok(Exchanged {
                client_reusable: false,
                upstream_reusable: false,
                upgraded: Some(Box::new(head)),
            });
        }
        if head.status < 200 {
            if request.minor > 0 {
                progress.begun.store(true, Ordering::Relaxed);
                deliver(&head, upstream, client, (false, true), request.minor).await?;
            }
            continue;
        }
        let uploaded = progress.uploaded.load(Ordering::Relaxed);
        let chunked = head.framing == Framing::Chunked && request.minor > 0;
        let delimited = chunked || matches!(head.framing, Framing::Empty | Framing::Length(_));
        let keep = uploaded && delimited && request.keep_alive();
        progress.begun.store(true, Ordering::Relaxed);
        deliver(&head, upstream, client, (chunked, keep), request.minor).await?;
        return Ok(Exchanged {
            client_reusable: keep,
            upstream_reusable: uploaded && head.keep_alive,
            upgraded: None,
        });
    }
    Err(broken("too many interim responses".to_owned()))
}

/// Sends a response to the client. What goes wrong here cannot be told any more.
async fn deliver<W: AsyncWrite + Unpin>(
    head: &ResponseHead,
    upstream: &mut Reader,
    client: &mut W,
    (chunked, keep): (bool, bool),
    minor: u8,
) -> Result<(), RelayError> {
    let bytes = write::response(head, chunked, keep, minor);
    let encoding = if chunked { Encoding::Chunked } else { Encoding::Plain };
    match body::send(bytes, upstream, head.framing, client, encoding).await {
        Ok(_) => Ok(()),
        Err(error) => Err(RelayError::Lost(error.to_string())),
    }
}

/// Ends when the client is gone. One that only ended its half waits for the answer; requests sent
/// ahead stay in the reader.
async fn gone(client: &mut Reader) {
    if client.data().is_empty() && client.fill().await.is_err() {
        return;
    }
    client.line().gone().await;
}

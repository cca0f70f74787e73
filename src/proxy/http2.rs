//! HTTP/2 with the agent: each stream is judged by itself, as a request of HTTP/1.1 is, and a
//! refusal is answered on its stream while the others live on.
//!
//! Frames, HPACK and flow control are the `h2` crate's; what is ours is what may pass, and what a
//! connection may cost:
//!
//! - [`meter`]: frames that are cheap to send and not to take, over the connection's life;
//! - [`Limits`]: connections and streams of all programs together, so that their windows and
//!   buffers are bounded;
//! - the constants below: what one connection, and one stream, may have in flight.

mod body;
mod bridge;
mod exchange;
mod fields;
mod io;
mod meter;
mod stream;
mod upstream;

use std::future::poll_fn;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use h2::server::{Builder, Connection, SendResponse};
use h2::{Reason, RecvStream};
use http::Request;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout};

use super::destination::Origin;
use super::http::head::HEAD_TIMEOUT;
use super::l7::rest::IDLE;
use super::report;
use super::session::Session;
use super::standing::Admitted;
use super::stream::Conn;
use io::{Clogged, Exceeded, Io};
use meter::Side;
use stream::Served;
pub(crate) use upstream::{Upstream, Version, version_of};

/// The most connections of HTTP/2 at a time, of those that all programs have; clients that can
/// speak HTTP/1.1 do so beyond.
const CONNECTIONS: usize = 128;

/// The most streams at a time, on all of them and on one.
const STREAMS: usize = 1_024;
const STREAMS_OF_ONE: u32 = 100;

/// How many upstreams may send far ahead of the agent at a time.
const WIDE: usize = 16;

/// What an agent may send before its upstream has taken it, in bytes: on a stream, and on a
/// connection. It is a wire of no length away.
const WINDOW: u32 = 128 << 10;
const WINDOW_OF_ALL: u32 = 256 << 10;

/// What waits to be written of one stream, in bytes.
const SEND_BUFFER: usize = 64 << 10;

/// What small frames of data may cost beyond their bytes while they wait, in bytes: 256 a frame.
const SMALL_FRAMES: usize = 1 << 20;

/// How many streams a client may reset before they were looked at, how many of its errors are
/// forgiven, and how many closed streams are remembered.
const RESET_UNSEEN: usize = 20;
const ERRORS: usize = 512;
const REMEMBERED: usize = 50;

/// How long a client may take to close a connection that it was asked to.
const GOODBYE: Duration = Duration::from_secs(5);

/// What all connections of HTTP/2 together may have.
pub(crate) struct Limits {
    connections: Arc<Semaphore>,
    streams: Arc<Semaphore>,
    wide: Arc<Semaphore>,
}

/// The right to one connection.
pub(crate) struct Place(
    #[expect(dead_code, reason = "free again when it is dropped")] OwnedSemaphorePermit,
);

impl Limits {
    pub(crate) fn new() -> Self {
        let semaphore = |count| Arc::new(Semaphore::new(count));
        Self {
            connections: semaphore(CONNECTIONS),
            streams: semaphore(STREAMS),
            wide: semaphore(WIDE),
        }
    }

    /// For a new connection; none when there are too many.
    pub(crate) fn place(&self) -> Option<Place> {
        Arc::clone(&self.connections).try_acquire_owned().ok().map(Place)
    }

    fn stream(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.streams).try_acquire_owned().ok()
    }

    fn wide(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.wide).try_acquire_owned().ok()
    }
}

/// Serves one connection, from its preface on, to its end.
pub(crate) async fn serve(admitted: Admitted, place: Place, client: Conn, upstream: Upstream) {
    let _place = place;
    let (io, exceeded) = Io::new(client, Side::Server);
    let clogged = io.clogged();
    let served = Served { admitted, upstream };
    let Admitted { session, origin } = &served.admitted.clone();
    let mut connection = match timeout(HEAD_TIMEOUT, builder().handshake(io)).await {
        Ok(Ok(connection)) => connection,
        Ok(Err(error)) => return ended_by(session, origin, &error),
        Err(_) => return report::tunnel_refused(session, origin, "incomplete HTTP/2 preface"),
    };
    if let Err(error) = streams(&mut connection, &exceeded, &clogged, Arc::new(served)).await {
        if exceeded.is_so() {
            report::tunnel_refused(session, origin, "HTTP/2: too many control frames");
        } else {
            ended_by(session, origin, &error);
        }
    }
}

/// A client that leaves is how connections end; one that breaks the rules is told of.
fn ended_by(session: &Session, origin: &Origin, error: &h2::Error) {
    if error.is_library() || error.reason().is_some() && !error.is_remote() {
        report::tunnel_refused(session, origin, &exchange::told(error));
    }
}

/// Takes streams until the connection has ended, then ends them.
async fn streams(
    connection: &mut Connection<Io, Bytes>,
    exceeded: &Exceeded,
    clogged: &Clogged,
    served: Arc<Served>,
) -> Result<(), h2::Error> {
    let mut served = served;
    let shared = Arc::clone(&served.admitted.session.shared);
    let limits = &shared.http2;
    let mut stopping = shared.stopping.subscribe();
    let mut running = JoinSet::new();
    // Of streams that have ended, while the library may still keep what they wrote: heads wait
    // for no window.
    let mut unread = Vec::new();
    // When a connection without a stream has rested long enough.
    let mut end = Instant::now() + IDLE;
    let (mut leaving, mut told, mut full) = (false, false, false);
    loop {
        tokio::select! {
            accepted = accept(connection, exceeded, &mut told, || if !clogged.is_so() { unread.clear() }) => {
                let Some(accepted) = accepted else { return Ok(()) };
                let (request, mut respond) = accepted?;
                let Some(permit) = limits.stream() else {
                    // One line a connection: a client may try as often as it likes.
                    let first = !std::mem::replace(&mut full, true);
                    let Admitted { session, origin } = &served.admitted;
                    report::too_many_streams(session, origin, first);
                    // Not looked at: the client may send it again.
                    respond.send_reset(Reason::REFUSED_STREAM);
                    continue;
                };
                let admitted = served.in_force(request.method().as_str()).await;
                if let Ok(Some(renewed)) = admitted {
                    served = Arc::new(renewed);
                } else if let Err(refusal) = admitted {
                    running.spawn(async move {
                        stream::refused(request, respond, &refusal).await;
                        permit
                    });
                    continue;
                }
                let served = Arc::clone(&served);
                running.spawn(async move {
                    stream::run(&served, request, respond).await;
                    permit
                });
            }
            Some(ended) = running.join_next() => {
                unread.extend(ended);
                if running.is_empty() {
                    end = Instant::now() + if leaving { GOODBYE } else { IDLE };
                }
            }
            () = sleep_until(end), if running.is_empty() => {
                if leaving {
                    return Ok(());
                }
                leaving = true;
                end = Instant::now() + GOODBYE;
                connection.graceful_shutdown();
            }
            () = told_to_stop(&mut stopping), if !leaving => {
                // What runs may end; nothing new begins.
                leaving = true;
                end = Instant::now() + GOODBYE;
                connection.graceful_shutdown();
            }
        }
    }
}

async fn told_to_stop(stopping: &mut watch::Receiver<bool>) {
    // Its sender is gone when all is over.
    let _ = stopping.wait_for(|stopping| *stopping).await;
}

type Accepted = Result<(Request<RecvStream>, SendResponse<Bytes>), h2::Error>;

/// The next stream. A client that has sent too many frames for nothing is told to go. `flushed` is
/// called when the library has written what the connection took.
async fn accept(
    connection: &mut Connection<Io, Bytes>,
    exceeded: &Exceeded,
    told: &mut bool,
    mut flushed: impl FnMut(),
) -> Option<Accepted> {
    poll_fn(|cx| {
        let polled = connection.poll_accept(cx);
        if polled.is_pending() {
            flushed();
        }
        if polled.is_ready() || !exceeded.is_so() || *told {
            return polled;
        }
        *told = true;
        connection.abrupt_shutdown(Reason::ENHANCE_YOUR_CALM);
        connection.poll_accept(cx)
    })
    .await
}

fn builder() -> Builder {
    let mut builder = Builder::new();
    builder
        .max_concurrent_streams(STREAMS_OF_ONE)
        .initial_window_size(WINDOW)
        .initial_connection_window_size(WINDOW_OF_ALL)
        .max_header_list_size(u32::try_from(fields::LIST_MAX).unwrap_or(u32::MAX))
        .max_send_buffer_size(SEND_BUFFER)
        .data_frame_budget(SMALL_FRAMES)
        .max_pending_accept_reset_streams(RESET_UNSEEN)
        .max_local_error_reset_streams(Some(ERRORS))
        .max_concurrent_reset_streams(REMEMBERED);
    builder
}

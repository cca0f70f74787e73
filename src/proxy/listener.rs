//! The proxy's listener: bounded, patient with a full descriptor table, one task a connection.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::OwnedSemaphorePermit;

use super::caller::{self, CallerError};
use super::http::head::{self, HeadError, RequestHead};
use super::metrics::{self, Kind, Refused};
use super::quiet::{Quiet, period};
use super::refusal::Refusal;
use super::session::Session;
use super::slots::{Slot, Slots};
use super::stream::{Conn, Stream, tune};
use super::{Shared, connect, forward, report};

/// How long a connection may stay silent before its first request.
const FIRST_REQUEST: Duration = Duration::from_secs(30);

const PAUSE_FIRST: Duration = Duration::from_millis(10);
const PAUSE_LAST: Duration = Duration::from_secs(1);

/// The next connection. Never gives up: what makes accept(2) fail (no descriptors, no memory)
/// passes, and a listener that ended would take all access with it.
pub(crate) async fn accept(listener: &TcpListener) -> (TcpStream, SocketAddr) {
    let mut pause = PAUSE_FIRST;
    loop {
        match listener.accept().await {
            Ok(accepted) => return accepted,
            Err(error) if is_of_one_connection(&error) => {}
            Err(error) => {
                if pause == PAUSE_FIRST {
                    report::accept_failed(&error);
                }
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(PAUSE_LAST);
            }
        }
    }
}

/// Errors that tell of the connection that was about to be accepted (accept(2)).
fn is_of_one_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::Interrupted
    )
}

/// Accepts and serves until it is aborted.
pub(crate) async fn serve(listener: TcpListener, shared: Arc<Shared>, slots: Slots) {
    let mut quiet = Quiet::new();
    let mut period = period();
    loop {
        let identifying = slots.identifying().await;
        let (tcp, peer) = tokio::select! {
            accepted = accept(&listener) => accepted,
            _ = period.tick() => {
                report::more_refused(quiet.take_muted(), Refused::Limit);
                continue;
            }
        };
        let Some(slot) = slots.take() else {
            if quiet.tell((), Instant::now()) {
                report::too_many_connections(None);
            }
            let detail = "too many connections through the proxy at a time";
            turn_away(&tcp, detail);
            continue;
        };
        begin(tcp, peer, Arc::clone(&shared), (slot, identifying));
    }
}

/// Gives a connection a task. Not inlined: that task is large, and is put together on the stack of
/// whoever starts it, which the listener's would keep for ever.
#[inline(never)]
fn begin(
    tcp: TcpStream,
    peer: SocketAddr,
    shared: Arc<Shared>,
    permits: (Slot, Option<OwnedSemaphorePermit>),
) {
    tokio::spawn(async move {
        let _open = metrics::connection(Kind::Agent);
        connection(tcp, peer, shared, permits).await;
    });
}

/// Closes a connection for which there is no place. Nothing is waited for: a client that goes on
/// opening connections would fill the places with its refusals.
fn turn_away(tcp: &TcpStream, detail: &str) {
    let refusal = Refusal::new(503, "too_many_connections", detail);
    // Closed with something unread, a socket is reset and what was written lost.
    let _ = tcp.try_read(&mut [0; 4096]);
    // Fits the socket's empty buffer; a client that gets less is closed all the same.
    let _ = tcp.try_write(&refusal.to_bytes());
}

async fn connection(
    tcp: TcpStream,
    peer: SocketAddr,
    shared: Arc<Shared>,
    (mut slot, identifying): (Slot, Option<OwnedSemaphorePermit>),
) {
    tune(&tcp);
    // The supervisor looks for the caller while the request is on its way.
    let rules = shared.rules.load();
    let identity = caller::identify(&shared, &rules.policy, &tcp, peer).await;
    drop(identifying);
    // Those that nobody is known to have made share what one process gets.
    let who = identity.as_ref().ok().map(|identity| (identity.caller.exe.as_str(), identity.pid));
    if !slot.belongs_to(who.map_or(0, |(_, pid)| pid)) {
        report::too_many_connections(who);
        return turn_away(&tcp, "too many connections of this process at a time");
    }
    let mut client = Conn::new(Stream::Tcp(tcp)).counted(&metrics::UP);
    let head = match head::read_request(&mut client.rd, FIRST_REQUEST).await {
        Ok(Some(head)) => Ok(head),
        Ok(None) => return,
        Err(error) => Err(error),
    };
    match (identity.map(|identity| Session::new(shared, rules, identity)), head) {
        (Ok(session), Ok(head)) => serve_client(session, client, head).await,
        (Ok(session), Err(error)) => {
            report::request_refused(&session, "-", &"the proxy", &error.to_string());
            refuse(client, &refusal_for(error)).await;
        }
        (Err(error), Ok(head)) => {
            report::unknown_caller(peer, Some(&head), &error.to_string());
            refuse(client, &unknown(&head, &error)).await;
        }
        (Err(caller), Err(error)) => {
            report::unknown_caller(peer, None, &format!("{caller}; {error}"));
            refuse(client, &refusal_for(error)).await;
        }
    }
}

/// Hands the first request to who it is for.
async fn serve_client(session: Session, client: Conn, head: RequestHead) {
    if head.method() == "CONNECT" {
        connect::serve(session, client, &head).await;
    } else {
        forward::serve(session, client, head).await;
    }
}

/// The answer to a head that was not accepted.
pub(crate) fn refusal_for(error: HeadError) -> Refusal {
    let (status, code) = match error {
        HeadError::TooLong | HeadError::TooManyFields => (431, "head_too_large"),
        HeadError::Timeout => (408, "head_timeout"),
        _ => (400, "invalid_request"),
    };
    Refusal::new(status, code, &error.to_string())
}

fn unknown(head: &RequestHead, error: &CallerError) -> Refusal {
    let target = if head.method() == "CONNECT" { head.target() } else { "request" };
    let detail = format!("{} {target} not permitted by policy", head.method());
    Refusal::new(403, "policy_denied", &detail).because(&error.to_string())
}

/// Sends a refusal and closes so that it arrives.
pub(crate) async fn refuse(mut client: Conn, refusal: &Refusal) {
    if client.send(&refusal.to_bytes()).await.is_ok() {
        client.close().await;
    }
}

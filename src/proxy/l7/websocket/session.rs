//! One WebSocket from its handshake to its end: the client's messages are judged one by one, the
//! server's frames are followed.
//!
//! The two directions run side by side. When the client must be told something (a message was
//! refused), the direction to it is brought to the end of a frame first: a frame of ours in the
//! middle of one of the server's would be content.

use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::io::AsyncWriteExt as _;
use tokio::sync::Notify;
use tokio::time::{timeout, timeout_at};

use super::Agreed;
use super::frame::{self, Opcode, Violation};
use super::message::{Follower, Item, Messages};
use crate::pki::provider;
use crate::policy::{Request, Verdict, WEBSOCKET_BINARY, WEBSOCKET_TEXT};
use crate::proxy::l7::graphql_ws;
use crate::proxy::report::{self, RequestLine};
use crate::proxy::standing::{Admitted, Doing};
use crate::proxy::stream::{Carried, Conn, Line, Reader, Writer};

/// How long a frame or a message that has begun may pause, and how long it may take.
const PAUSE: Duration = Duration::from_secs(30);
const ASSEMBLY: Duration = Duration::from_secs(120);

/// How long the other direction may go on when one has ended.
const CLOSING: Duration = Duration::from_secs(30);

/// How long a peer may take to hear that it is over.
const FAREWELL: Duration = Duration::from_secs(2);

/// How much of what a refused client still sends is read and dropped, in bytes.
const DRAIN: usize = 16 * 1024 * 1024;

/// How many bytes of short messages are gathered before they are written.
const GATHER: usize = 16 * 1024;

/// What was judged when the connection began, and what was agreed on.
#[derive(Debug)]
pub(crate) struct Socket {
    pub(crate) agreed: Agreed,
    /// `ws` or `wss`.
    pub(crate) scheme: &'static str,
    pub(crate) authority: String,
    /// The handshake's canonical path and its query: each message is judged with them.
    pub(crate) path: String,
    pub(crate) query: Vec<(String, String)>,
}

/// How the client's direction ended.
enum Up {
    /// The client said goodbye or left, and the server knows.
    Left,
    /// The connection to one of the two broke.
    Lost,
    /// The client must be told that it is over.
    Refused { code: u16, reason: String },
}

/// How the server's direction ended.
enum Down {
    /// The server left, and the client knows.
    Left,
    Lost,
    /// Asked to stop, between two frames.
    Stopped,
    Broken(Violation),
}

/// Asks the direction to the client to stop.
#[derive(Default)]
struct Stop {
    asked: AtomicBool,
    notify: Notify,
}

impl Stop {
    fn ask(&self) {
        self.asked.store(true, Ordering::Relaxed);
        self.notify.notify_one();
    }
}

/// Serves a WebSocket, whose 101 the client has got, to its end.
pub(crate) async fn run(admitted: Admitted, client: Conn, upstream: Conn, socket: &Socket) {
    let start = Instant::now();
    let takeover = socket.agreed.takeover;
    let Conn { rd: mut client_rd, wr: mut client_wr } = client;
    let Conn { rd: mut upstream_rd, wr: mut upstream_wr } = upstream;
    let mut carried = Carried::default();
    let mut follower = Follower::new(takeover.is_some());
    let stop = Stop::default();
    let line = upstream_rd.line();
    let judge = Judge { admitted: Mutex::new(Arc::new(admitted)), socket, line };
    // Nothing more is written to a server whose message may have broken off.
    let mut revoked = false;
    let (up, down) = {
        let mut up = pin!(up(&judge, &mut client_rd, &mut upstream_wr, &mut carried.up));
        let mut down =
            pin!(down(&mut upstream_rd, &mut client_wr, &stop, &mut follower, &mut carried.down));
        tokio::select! {
            biased;
            ended = judge.revoked() => {
                revoked = true;
                stop.ask();
                let down = timeout(FAREWELL, &mut down).await.ok();
                (Some(ended), down)
            }
            ended = &mut up => {
                let wait = match ended {
                    Up::Left => CLOSING,
                    Up::Lost => FAREWELL,
                    Up::Refused { .. } => {
                        stop.ask();
                        FAREWELL
                    }
                };
                let down = timeout(wait, &mut down).await.ok();
                (Some(ended), down)
            }
            ended = &mut down => {
                // The client's answer to a close frame may still be on its way.
                let up = match ended {
                    Down::Left => timeout(FAREWELL, &mut up).await.ok(),
                    _ => None,
                };
                (up, Some(ended))
            }
        }
    };
    let admitted = judge.now();
    let Admitted { session, origin } = &*admitted;
    let told = match (&up, &down) {
        (Some(Up::Refused { code, reason }), _) => Some((*code, reason.clone())),
        (_, Some(Down::Broken(violation))) => {
            let to = format!("{}:{}", origin.host, origin.port);
            let reason = format!("the server's frames: {violation}");
            report::request_refused(session, "WEBSOCKET", &to, &reason);
            Some((1002, "the server broke the protocol".to_owned()))
        }
        _ => None,
    };
    if let Some((code, reason)) = &told {
        let between = matches!(down, Some(Down::Stopped | Down::Broken(_)));
        if between && follower.between_frames() && !follower.closed() {
            let bye = frame::control(Opcode::Close, &frame::close(*code, reason), None);
            let _ = timeout(FAREWELL, write(&mut client_wr, &bye)).await;
        }
        // Not why: that is between the client and its fence.
        if !revoked {
            let bye = frame::control(Opcode::Close, &frame::close(1001, ""), Some(key()));
            let _ = timeout(FAREWELL, write(&mut upstream_wr, &bye)).await;
        }
    }
    report::tunnel_ended(session, origin, carried, start.elapsed());
    let upstream = Conn { rd: upstream_rd, wr: upstream_wr };
    if told.is_some() {
        let drained = timeout(FAREWELL, drain(&mut client_rd, &mut client_wr));
        let _ = tokio::join!(drained, upstream.close());
    } else {
        let client = Conn { rd: client_rd, wr: client_wr };
        tokio::join!(client.close(), upstream.close());
    }
}

/// Asks the policy in force about the connection and the client's messages.
struct Judge<'a> {
    admitted: Mutex<Arc<Admitted>>,
    socket: &'a Socket,
    line: Line,
}

impl Judge<'_> {
    fn now(&self) -> Arc<Admitted> {
        Arc::clone(&self.admitted.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Under the rules in force; or why it must end.
    async fn standing(&self) -> Result<Arc<Admitted>, Up> {
        let now = self.now();
        if now.session.is_current() {
            return Ok(now);
        }
        let mut next = Admitted::clone(&now);
        let Socket { path, query, .. } = self.socket;
        match next.stays(Doing::WebSocket { path, query }, self.line.peer()).await {
            Ok(()) => {
                let next = Arc::new(next);
                *self.admitted.lock().unwrap_or_else(PoisonError::into_inner) = Arc::clone(&next);
                Ok(next)
            }
            Err(why) => Err(Up::Refused { code: 1008, reason: format!("policy_denied: {why}") }),
        }
    }

    /// Ends when the policy does not allow the connection any more.
    async fn revoked(&self) -> Up {
        loop {
            self.now().session.outdated().await;
            if let Err(ended) = self.standing().await {
                return ended;
            }
        }
    }

    async fn message(&self, method: &str, said: &[u8]) -> Result<(), Up> {
        let admitted = self.standing().await?;
        let Admitted { session, origin } = &*admitted;
        let Socket { scheme, authority, path, query, .. } = self.socket;
        let policy = session.policy();
        let longest = policy.messages(session.caller(), &origin.host, origin.port, path);
        let payload = longest.map(|longest| graphql_ws::read(method, said, longest));
        let payload = payload.as_ref();
        let line = RequestLine { method, scheme, authority, path, payload };
        let asked = Request { method, path, query, payload, overrides: &[] };
        match policy.websocket(session.caller(), &origin.host, origin.port, &asked) {
            Verdict::Allow { policy } => report::request_allowed(&line, &policy, "l7"),
            Verdict::Audit { policy, reason } => report::request_audited(&line, &policy, &reason),
            Verdict::Deny(denial) => {
                report::request_denied(&line, &denial);
                let reason = format!("policy_denied: {}", denial.reason);
                return Err(Up::Refused { code: 1008, reason });
            }
        }
        Ok(())
    }

    fn violation(&self, violation: Violation) -> Up {
        let admitted = self.now();
        let Admitted { session, origin } = &*admitted;
        let to = format!("{}:{}", origin.host, origin.port);
        let reason = violation.to_string();
        report::request_refused(session, "WEBSOCKET", &to, &reason);
        Up::Refused { code: violation.code(), reason }
    }
}

/// From the client to the server.
async fn up(judge: &Judge<'_>, from: &mut Reader, to: &mut Writer, count: &mut u64) -> Up {
    let mut messages = Messages::new(judge.socket.agreed.takeover);
    let mut out = Vec::new();
    let mut begun: Option<tokio::time::Instant> = None;
    loop {
        let (used, item) = match messages.feed(from.data()) {
            Ok(fed) => fed,
            Err(violation) => {
                // What was allowed before it has its way.
                let _ = timeout(FAREWELL, write(to, &out)).await;
                let refused = judge.violation(violation);
                // Both have been told already.
                return if violation == Violation::AfterClose { Up::Lost } else { refused };
            }
        };
        from.consume(used);
        *count += used as u64;
        let sent = match item {
            Some(Item::Text) => message(judge, WEBSOCKET_TEXT, &mut messages, &mut out, to).await,
            Some(Item::Binary) => {
                message(judge, WEBSOCKET_BINARY, &mut messages, &mut out, to).await
            }
            Some(item @ (Item::Ping | Item::Pong | Item::Close)) => {
                let opcode = match item {
                    Item::Ping => Opcode::Ping,
                    Item::Pong => Opcode::Pong,
                    _ => Opcode::Close,
                };
                out.extend_from_slice(&frame::control(opcode, messages.control(), Some(key())));
                gathered(&mut out, to, GATHER).await
            }
            None => Ok(()),
        };
        if let Err(end) = sent {
            return end;
        }
        if item.is_some() && !messages.begun() {
            begun = None;
        }
        if used > 0 {
            continue;
        }
        // Nothing more to do with what is there.
        if let Err(end) = gathered(&mut out, to, 1).await {
            return end;
        }
        from.shrink();
        let read = if messages.begun() || !from.data().is_empty() {
            let now = tokio::time::Instant::now();
            let latest = *begun.get_or_insert(now + ASSEMBLY);
            match timeout_at(latest.min(now + PAUSE), from.fill()).await {
                Ok(read) => read,
                Err(_) => return judge.violation(Violation::Timeout),
            }
        } else {
            from.fill().await
        };
        match read {
            Ok(0) => {
                return if to.shutdown().await.is_ok() { Up::Left } else { Up::Lost };
            }
            Ok(_) => {}
            Err(_) => return Up::Lost,
        }
    }
}

/// Judges the message that was completed, and has it sent.
async fn message(
    judge: &Judge<'_>,
    method: &str,
    messages: &mut Messages,
    out: &mut Vec<u8>,
    to: &mut Writer,
) -> Result<(), Up> {
    if let Err(refused) = judge.message(method, messages.message()).await {
        let _ = timeout(FAREWELL, write(to, out)).await;
        return Err(refused);
    }
    let opcode = if method == WEBSOCKET_TEXT { Opcode::Text } else { Opcode::Binary };
    let wire = messages.wire(opcode, key());
    if wire.len() < GATHER {
        out.extend_from_slice(wire);
        gathered(out, to, GATHER).await?;
    } else {
        gathered(out, to, 1).await?;
        write(to, wire).await.map_err(|_| Up::Lost)?;
    }
    messages.sent().map_err(|violation| judge.violation(violation))
}

/// Writes what was gathered if it is this much.
async fn gathered(out: &mut Vec<u8>, to: &mut Writer, enough: usize) -> Result<(), Up> {
    if out.len() >= enough {
        write(to, out).await.map_err(|_| Up::Lost)?;
        out.clear();
    }
    Ok(())
}

/// From the server to the client.
async fn down(
    from: &mut Reader,
    to: &mut Writer,
    stop: &Stop,
    follower: &mut Follower,
    count: &mut u64,
) -> Down {
    loop {
        let passed = if stop.asked.load(Ordering::Relaxed) {
            if follower.between_frames() {
                return Down::Stopped;
            }
            follower.rest(from.data())
        } else {
            match follower.pass(from.data()) {
                Ok(passed) => passed,
                Err(violation) => return Down::Broken(violation),
            }
        };
        if passed > 0 {
            if write(to, &from.data()[..passed]).await.is_err() {
                return Down::Lost;
            }
            from.consume(passed);
            *count += passed as u64;
            continue;
        }
        from.shrink();
        tokio::select! {
            biased;
            () = stop.notify.notified() => {}
            read = from.fill() => match read {
                Ok(0) => {
                    return if to.shutdown().await.is_ok() { Down::Left } else { Down::Lost };
                }
                Ok(_) => {}
                Err(_) => return Down::Lost,
            },
        }
    }
}

/// Reads what a client sent before it heard that it is over: a connection that is closed with
/// unread bytes is reset, and the reset may overtake our close frame.
async fn drain(from: &mut Reader, to: &mut Writer) -> std::io::Result<()> {
    to.shutdown().await?;
    let mut drained = 0;
    while drained < DRAIN {
        from.consume(from.data().len());
        match from.fill().await? {
            0 => break,
            read => drained += read,
        }
    }
    Ok(())
}

async fn write(to: &mut Writer, bytes: &[u8]) -> std::io::Result<()> {
    to.write_all(bytes).await?;
    to.flush().await
}

/// A key for one frame: the agent does not choose what the bytes on the wire look like.
fn key() -> [u8; 4] {
    let mut key = [0; 4];
    // It fails only where the kernel has no randomness, and then no TLS handshake went before.
    let _ = provider().secure_random.fill(&mut key);
    key
}

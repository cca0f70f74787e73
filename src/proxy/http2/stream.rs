//! One stream of the agent's: what it asks, whether it may, and where it goes.

use std::future::poll_fn;
use std::time::Duration;

use bytes::Bytes;
use h2::client::SendRequest;
use h2::server::SendResponse;
use h2::{Reason, RecvStream};
use http::header::{EXPECT, HOST};
use http::request::Parts;
use http::uri::{Authority, PathAndQuery};
use http::{HeaderValue, Method, Request, Response, StatusCode, Uri};

use super::exchange::{self, Agent, Unanswered};
use super::upstream::{Open, Upstream};
use super::{bridge, fields};
use crate::policy::{Inspection, Instead, Payload};
use crate::proxy::destination::DialError;
use crate::proxy::l7::content;
use crate::proxy::l7::held::Held;
use crate::proxy::l7::judge::{Facts, Judged, prepare};
use crate::proxy::refusal::Refusal;
use crate::proxy::report;
use crate::proxy::standing::{Admitted, Asked, Doing};

/// How much of a refused body is read, and for how long.
const DRAIN: usize = 256 * 1024;
const LINGER: Duration = Duration::from_secs(1);

/// What all streams of one connection have.
pub(super) struct Served {
    pub(super) admitted: Admitted,
    pub(super) upstream: Upstream,
}

impl Served {
    /// What new streams have under the rules in force, where these are others: the streams that run
    /// keep their upstream. `method` is for the refusal.
    pub(super) async fn in_force(&self, method: &str) -> Result<Option<Self>, Refusal> {
        let Admitted { session, origin } = &self.admitted;
        if session.is_current() {
            return Ok(None);
        }
        let admitted = session.admit(method, origin.host.clone(), origin.port).await?;
        Ok(Some(Self { admitted, upstream: self.upstream.anew().await }))
    }
}

/// Takes one request through all its steps.
pub(super) async fn run(
    served: &Served,
    request: Request<RecvStream>,
    mut respond: SendResponse<Bytes>,
) {
    let (head, mut body) = request.into_parts();
    let refusal = match judged(served, &head, &mut body, &mut respond).await {
        Ok(passed) => {
            let Passed { judged, payload, mut held } = passed;
            let agent = Agent { body: &mut body, held: &mut held, respond: &mut respond };
            let doing = Doing::Request(Asked {
                method: head.method.as_str(),
                canonical: judged.canonical.as_ref(),
                payload: payload.as_ref().map(|(payload, read)| (payload, read)),
                overrides: &judged.overrides,
                websocket: false,
            });
            tokio::select! {
                biased;
                _ = served.admitted.revoked_for_one(doing, || served.upstream.peer()) => {
                    respond.send_reset(Reason::CANCEL);
                    return;
                }
                forwarded = forward(served, agent, &head, &judged, doing) => forwarded.err(),
            }
        }
        Err(refusal) => Some(refusal),
    };
    if let Some(refusal) = refusal {
        refuse(&mut respond, &refusal, head.method == Method::HEAD);
        drain(&mut body).await;
    }
}

/// Answers a stream that the rules in force do not admit at all.
pub(super) async fn refused(
    request: Request<RecvStream>,
    mut respond: SendResponse<Bytes>,
    refusal: &Refusal,
) {
    let (head, mut body) = request.into_parts();
    refuse(&mut respond, refusal, head.method == Method::HEAD);
    drain(&mut body).await;
}

fn target(head: &Parts) -> &str {
    head.uri.path_and_query().map_or("", PathAndQuery::as_str)
}

/// Reads and drops what a client still sends after its refusal, for a moment: some (curl 7.88) take
/// the answer for lost when their upload is reset. What is longer is reset all the same.
async fn drain(body: &mut RecvStream) {
    let whole = async {
        let mut drained = 0;
        while drained < DRAIN
            && let Some(Ok(data)) = body.data().await
        {
            drained += data.len();
            // Only an error of ours could be told here.
            let _ = body.flow_control().release_capacity(data.len());
        }
    };
    let _ = tokio::time::timeout(LINGER, whole).await;
}

/// Answers one stream with a refusal; the others live on.
fn refuse(respond: &mut SendResponse<Bytes>, refusal: &Refusal, only_head: bool) {
    let (response, body) = refusal.to_http2();
    // A stream that is gone needs no answer.
    if let Ok(mut stream) = respond.send_response(response, only_head)
        && !only_head
    {
        let _ = stream.send_data(body, true);
    }
}

/// What may be sent on.
struct Passed {
    judged: Judged,
    /// What its content says, where that was judged.
    payload: Option<(Payload, Inspection)>,
    /// The body, where it was read.
    held: Option<Held>,
}

/// What may be sent on. The library has seen to pseudo-header fields that are missing, repeated,
/// unknown or late, to names in upper case and to fields of one connection (RFC 9113, 8.2 and 8.3):
/// such streams are reset before they come here.
async fn judged(
    served: &Served,
    head: &Parts,
    body: &mut RecvStream,
    respond: &mut SendResponse<Bytes>,
) -> Result<Passed, Refusal> {
    let Served { admitted: Admitted { session, origin }, upstream } = served;
    let method = head.method.as_str();
    let refused = |refusal: Refusal, reason: &str| {
        let to = format!("{}:{}", origin.host, origin.port);
        report::request_refused(session, method, &to, reason);
        refusal
    };
    let invalid = |reason: &str| refused(Refusal::new(400, "invalid_request", reason), reason);
    fields::check(&head.headers)
        .map_err(|(status, code, reason)| refused(Refusal::new(status, code, reason), reason))?;
    let scheme = upstream.scheme();
    if head.uri.scheme_str().is_some_and(|written| written != scheme.name()) {
        return Err(invalid(":scheme is not what the connection is"));
    }
    let authority = head.uri.authority().map(|authority| authority.as_str().as_bytes());
    let hosts = head.headers.get_all(HOST).iter().map(HeaderValue::as_bytes);
    let authorities: Vec<&[u8]> = authority.into_iter().chain(hosts).collect();
    if authorities.is_empty() {
        return Err(invalid("neither :authority nor Host"));
    }
    let target = target(head);
    if !target.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(invalid(":path holds a character that must be percent-encoded"));
    }
    let (authorities, upgrade, websocket) = (&authorities[..], None, None);
    let fields = || {
        let fields = head.headers.iter();
        fields.map(|(name, value)| (name.as_str().as_bytes(), value.as_bytes()))
    };
    let instead = &Instead::read(fields());
    let facts = Facts { method, target, scheme, authorities, upgrade, websocket, instead };
    let prepared = prepare(session, origin, &facts)?;
    let Some((inspection, target)) = prepared.inspection() else {
        let judged = prepared.judge(session, origin, None)?;
        return Ok(Passed { judged, payload: None, held: None });
    };
    let facts = content::Facts::new(method, target, fields());
    let (payload, held) = if let Some(payload) = facts.settled(inspection) {
        (payload, None)
    } else {
        ask(head, body, respond);
        let read = session.shared.room.http2(body, head, inspection.max_bytes).await;
        let held = read.map_err(|why| prepared.unread(session, origin, &why))?;
        (content::read(inspection, &facts, &held.bytes), Some(held))
    };
    let read_for = inspection.clone();
    let judged = prepared.judge(session, origin, Some(&payload))?;
    Ok(Passed { judged, payload: Some((payload, read_for)), held })
}

/// Asks a client for its body that waits to be asked.
fn ask(head: &Parts, body: &RecvStream, respond: &mut SendResponse<Bytes>) {
    let waits = |value: &HeaderValue| value.as_bytes().eq_ignore_ascii_case(b"100-continue");
    if !body.is_end_stream() && head.headers.get(EXPECT).is_some_and(waits) {
        let mut response = Response::new(());
        *response.status_mut() = StatusCode::CONTINUE;
        // A stream that is gone is seen when its body is read.
        let _ = respond.send_informational(response);
    }
}

/// Sends a judged request on, and its response back. The error is what the client is to be told.
async fn forward(
    served: &Served,
    agent: Agent<'_>,
    head: &Parts,
    judged: &Judged,
    doing: Doing<'_>,
) -> Result<(), Refusal> {
    let Admitted { session, origin } = &served.admitted;
    let Agent { body, held, respond } = agent;
    let bodiless = held.as_ref().map_or_else(|| body.is_end_stream(), |held| held.bytes.is_empty());
    let repeatable = bodiless
        && matches!(head.method.as_str(), "GET" | "HEAD" | "OPTIONS" | "PUT" | "DELETE" | "TRACE");
    let mut again = false;
    loop {
        let opened = tokio::select! {
            biased;
            opened = served.upstream.connection(session, origin, again) => opened,
            // The client has given up while its turn had not come.
            _ = poll_fn(|cx| respond.poll_reset(cx)) => return Ok(()),
        };
        let opened = opened.map_err(|error| unreachable(served, head, &error))?;
        // What changed while it was judged and dialled.
        if !session.is_current() {
            let stays = served.admitted.clone().stays(doing, served.upstream.peer()).await;
            stays.map_err(|why| Refusal::new(403, "policy_denied", &why))?;
        }
        let (ended, used) = match opened {
            Open::Http2 { send, used } => {
                let held = &mut *held;
                let agent = Agent { body: &mut *body, held, respond: &mut *respond };
                (over_http2(served, agent, send, head, judged).await?, used)
            }
            Open::Http1 { mut conn, used, _place } => {
                let held = &mut *held;
                let agent = Agent { body: &mut *body, held, respond: &mut *respond };
                let ended = bridge::run(agent, &mut conn, head, judged).await;
                if matches!(ended, Ok(true)) {
                    served.upstream.rest(conn).await;
                }
                (ended.map(drop), used)
            }
        };
        let what = match ended {
            Ok(()) | Err(Unanswered::Agent) => return Ok(()),
            Err(Unanswered::NotBegun(_)) if !again => {
                again = true;
                continue;
            }
            Err(Unanswered::Untouched) if bodiless && !again => {
                again = true;
                continue;
            }
            // An idle connection that the upstream had given up: once more, on a new one.
            Err(Unanswered::Lost { broke: true, .. }) if used && repeatable && !again => {
                again = true;
                continue;
            }
            // Its body has been read: the client can send it once more.
            Err(Unanswered::Untouched) => {
                respond.send_reset(Reason::REFUSED_STREAM);
                return Ok(());
            }
            Err(Unanswered::Reset(reason)) => {
                respond.send_reset(reason);
                return Ok(());
            }
            Err(Unanswered::NotBegun(what) | Unanswered::Lost { what, .. }) => what,
        };
        return Err(unreachable(served, head, &DialError::Connect(what)));
    }
}

fn unreachable(served: &Served, head: &Parts, error: &DialError) -> Refusal {
    let Admitted { session, origin } = &served.admitted;
    session.unreachable(head.method.as_str(), origin, error)
}

/// The request is made anew from what was judged.
async fn over_http2(
    served: &Served,
    agent: Agent<'_>,
    send: SendRequest<Bytes>,
    head: &Parts,
    judged: &Judged,
) -> Result<Result<(), Unanswered>, Refusal> {
    let mut request = Request::new(());
    *request.method_mut() = head.method.clone();
    *request.uri_mut() = uri(served, judged).ok_or_else(|| {
        Refusal::new(400, "invalid_request_target", "the target cannot be sent in HTTP/2")
    })?;
    *request.version_mut() = http::Version::HTTP_2;
    *request.headers_mut() = fields::of_request(head.headers.clone());
    if agent.held.is_some() {
        // Its body is here: nobody waits any more.
        request.headers_mut().remove(EXPECT);
    }
    Ok(exchange::run(agent, send, request).await)
}

/// None where it would not be, byte for byte, what was judged.
fn uri(served: &Served, judged: &Judged) -> Option<Uri> {
    let target = PathAndQuery::try_from(judged.target.as_str()).ok()?;
    let authority = Authority::try_from(judged.authority.as_str()).ok()?;
    if target.as_str() != judged.target || authority.as_str() != judged.authority {
        return None;
    }
    Uri::builder()
        .scheme(served.upstream.scheme().name())
        .authority(authority)
        .path_and_query(target)
        .build()
        .ok()
}

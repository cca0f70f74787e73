//! HTTP/1.1 inside a tunnel, and the way of each of its requests wherever it came in: judged, sent
//! on, answered.

use std::time::Duration;

use super::content;
use super::held::Held;
use super::judge::{Facts, Judged, Prepared, Scheme, prepare};
use super::websocket::{self, Offer, Socket};
use crate::policy::{Host, Instead, Payload};
use crate::proxy::destination::{DialError, Origin, dial};
use crate::proxy::http::head::{self, RequestHead, ResponseHead};
use crate::proxy::http::relay::{self, RelayError};
use crate::proxy::http::write::{self, Rewrite};
use crate::proxy::listener::{refusal_for, refuse};
use crate::proxy::metrics;
use crate::proxy::refusal::Refusal;
use crate::proxy::report;
use crate::proxy::session::Session;
use crate::proxy::standing::{Admitted, Asked, Doing};
use crate::proxy::stream::{Carried, Conn, Stream, duplex};
use crate::proxy::tls::HTTP11;

/// How long a connection may rest between two requests.
pub(crate) const IDLE: Duration = Duration::from_secs(120);

/// The connection to the upstream that goes with a client's connection.
pub(crate) struct Link {
    /// Where it leads.
    to: (Host, u16),
    scheme: Scheme,
    conn: Option<Conn>,
    /// The generation of the rules under which it was made.
    generation: Option<u64>,
    /// It has carried a request: the upstream may have closed it since.
    used: bool,
    /// Why the first attempt failed; told once, then tried again.
    failed: Option<DialError>,
}

impl Link {
    /// `conn` was made under the rules of `generation`.
    pub(crate) fn open(admitted: &Admitted, scheme: Scheme, conn: Conn, generation: u64) -> Self {
        let generation = Some(generation);
        Self { conn: Some(conn), generation, ..Self::none(&admitted.origin, scheme) }
    }

    pub(crate) fn failed(origin: &Origin, scheme: Scheme, error: DialError) -> Self {
        Self { failed: Some(error), ..Self::none(origin, scheme) }
    }

    /// Dialled when the first request may pass.
    pub(crate) fn none(origin: &Origin, scheme: Scheme) -> Self {
        Self {
            to: (origin.host.clone(), origin.port),
            scheme,
            conn: None,
            generation: None,
            used: false,
            failed: None,
        }
    }

    pub(crate) fn leads_to(&self, origin: &Origin) -> bool {
        self.to.0 == origin.host && self.to.1 == origin.port
    }

    /// A connection that is open, as far as one can see, and whether it was used before.
    async fn take(
        &mut self,
        session: &Session,
        origin: &Origin,
    ) -> Result<(Conn, bool), DialError> {
        if let Some(error) = self.failed.take() {
            return Err(error);
        }
        // The address that it leads to was checked by other rules.
        let made = self.generation.replace(session.generation());
        if let Some(mut conn) = self.conn.take().filter(|_| made == self.generation) {
            // Bytes that answer nothing, or an end: either way it is of no more use.
            if conn.rd.data().is_empty() && conn.rd.fill_now().await.is_none() {
                return Ok((conn, self.used));
            }
        }
        self.used = false;
        let tcp = dial(session, origin).await?;
        let stream = match self.scheme {
            Scheme::Http => Stream::Tcp(tcp),
            Scheme::Https => {
                let alpn = [HTTP11.to_vec()];
                session.upstream_tls().connect(tcp, &origin.host, &alpn).await?.0
            }
        };
        Ok((Conn::new(stream).counted(&metrics::DOWN), false))
    }

    fn put_back(&mut self, conn: Conn) {
        self.conn = Some(conn);
        self.used = true;
    }
}

/// What comes after a request.
pub(crate) enum Next {
    /// The next request.
    Request,
    /// Nothing: close.
    Close,
    /// Nothing, and what was sent is not whole: drop the connection.
    Cut,
    /// The answer says no: send it and close.
    Refuse(Refusal),
    /// Not HTTP any more: copy.
    Copy(Box<Conn>),
    /// Frames: each message is judged.
    WebSocket(Box<(Conn, Socket)>),
}

/// Serves the requests of one tunnel to its end.
pub(crate) async fn serve(mut admitted: Admitted, mut client: Conn, mut link: Link) {
    loop {
        let Admitted { session, origin } = &admitted;
        let head = match head::read_request(&mut client.rd, IDLE).await {
            Ok(Some(head)) => head,
            Ok(None) => return client.close().await,
            Err(error) => {
                let to = format!("{}:{}", origin.host, origin.port);
                report::request_refused(session, "-", &to, &error.to_string());
                return refuse(client, &refusal_for(error)).await;
            }
        };
        if !session.is_current() {
            admitted = match session.admit(head.method(), origin.host.clone(), origin.port).await {
                Ok(admitted) => admitted,
                Err(refusal) => return refuse(client, &refusal).await,
            };
        }
        let target = head.target();
        let next = request(&mut admitted, &mut client, &mut link, &head, target).await;
        let Some(again) = finish(admitted, client, next).await else { return };
        (client, admitted) = again;
    }
}

/// Acts on what comes next; gives the client back when it is another request.
pub(crate) async fn finish(
    mut admitted: Admitted,
    mut client: Conn,
    next: Next,
) -> Option<(Conn, Admitted)> {
    match next {
        Next::Request => return Some((client, admitted)),
        Next::Close => client.close().await,
        Next::Cut => {}
        Next::Refuse(refusal) => refuse(client, &refusal).await,
        Next::Copy(mut upstream) => {
            copy(&mut admitted, &mut client, &mut upstream, false).await;
        }
        Next::WebSocket(both) => {
            let (upstream, socket) = *both;
            websocket::run(admitted, client, upstream, &socket).await;
        }
    }
    None
}

/// Copies both ways until both ends are done, or the policy does not allow it any more. `skipped`:
/// TLS that the policy passes through.
pub(crate) async fn copy(
    admitted: &mut Admitted,
    client: &mut Conn,
    upstream: &mut Conn,
    skipped: bool,
) {
    let start = std::time::Instant::now();
    let mut carried = Carried::default();
    let line = upstream.rd.line();
    tokio::select! {
        biased;
        _ = admitted.revoked(Doing::Copying { skipped }, || line.peer()) => {}
        () = duplex(client, upstream, &mut carried) => {}
    }
    report::tunnel_ended(&admitted.session, &admitted.origin, carried, start.elapsed());
}

/// Takes one request through all its steps. `target` is origin-form, as sent.
pub(crate) async fn request(
    admitted: &mut Admitted,
    client: &mut Conn,
    link: &mut Link,
    head: &RequestHead,
    target: &str,
) -> Next {
    let Admitted { session, origin } = &*admitted;
    let wished = Offer::is_asked(head).then(|| Offer::read(head));
    let instead = Instead::read(head.fields.not_nominated());
    let facts = Facts {
        method: head.method(),
        target,
        scheme: link.scheme,
        authorities: &head.fields.all("host").collect::<Vec<_>>(),
        upgrade: head.upgrade(),
        websocket: wished.as_ref(),
        instead: &instead,
    };
    let prepared = match prepare(session, origin, &facts) {
        Ok(prepared) => prepared,
        Err(refusal) => return Next::Refuse(refusal),
    };
    let (payload, held) = match read_content(session, client, origin, head, &prepared).await {
        Ok(Some((payload, held))) => (Some(payload), held),
        Ok(None) => (None, None),
        Err(refusal) => return Next::Refuse(refusal),
    };
    let read_for = prepared.inspection().map(|(inspection, _)| inspection.clone());
    let judged = match prepared.judge(session, origin, payload.as_ref()) {
        Ok(judged) => judged,
        Err(refusal) => return Next::Refuse(refusal),
    };
    let asked = Asked {
        method: head.method(),
        canonical: judged.canonical.as_ref(),
        payload: payload.as_ref().zip(read_for.as_ref()),
        overrides: &judged.overrides,
        websocket: judged.websocket,
    };
    let upgrade = judged.upgrade && head.fields.connection("upgrade");
    let content = held.as_ref().map(|held| held.bytes.len());
    // On an endpoint that is allowed whole there is nothing to read: what was offered stays.
    let offer = wished.and_then(Result::ok).filter(|_| judged.websocket);
    let extensions = offer.as_ref().map(Offer::extensions);
    let rewrite = Rewrite {
        target: &judged.target,
        host: &judged.authority,
        upgrade,
        content,
        extensions: extensions.as_deref(),
    };
    match forward(admitted, client, link, head, (&rewrite, held), asked).await {
        Forwarded::Next(next) => next,
        Forwarded::Upgraded(upstream, answer) => {
            let socket = match socket(&answer, offer, judged, link.scheme) {
                Ok(socket) => socket,
                Err(error) => {
                    let Admitted { session, origin } = &*admitted;
                    return Next::Refuse(session.unreachable(head.method(), origin, &error));
                }
            };
            if client.send(&write::response(&answer, false, true, 1)).await.is_err() {
                return Next::Cut;
            }
            match socket {
                None => Next::Copy(Box::new(upstream)),
                Some(socket) => Next::WebSocket(Box::new((upstream, socket))),
            }
        }
    }
}

/// What both sides have agreed on, if it is a WebSocket: checked before the client hears of it.
fn socket(
    answer: &ResponseHead,
    offer: Option<Offer>,
    judged: Judged,
    scheme: Scheme,
) -> Result<Option<Socket>, DialError> {
    let (Some(offer), Some(canonical)) = (offer, judged.canonical) else {
        return Ok(None);
    };
    let (path, query) = (canonical.path, canonical.pairs);
    let agreed = offer
        .agree(answer)
        .map_err(|error| DialError::Connect(format!("WebSocket handshake: {error}")))?;
    let scheme = match scheme {
        Scheme::Http => "ws",
        Scheme::Https => "wss",
    };
    Ok(Some(Socket { agreed, scheme, authority: judged.authority, path, query }))
}

/// What came of a request that was sent on.
enum Forwarded {
    Next(Next),
    /// The upstream's 101, which the client has not got yet.
    Upgraded(Conn, Box<ResponseHead>),
}

impl From<Next> for Forwarded {
    fn from(next: Next) -> Self {
        Self::Next(next)
    }
}

/// What the content of a request says, where the policy asks for it, and the content itself if it
/// had to be read: one that is refused for its head is not waited for.
async fn read_content(
    session: &Session,
    client: &mut Conn,
    origin: &Origin,
    head: &RequestHead,
    prepared: &Prepared<'_>,
) -> Result<Option<(Payload, Option<Held>)>, Refusal> {
    let Some((inspection, target)) = prepared.inspection() else {
        return Ok(None);
    };
    let facts = content::Facts::new(head.method(), target, head.fields.not_nominated());
    if let Some(payload) = facts.settled(inspection) {
        return Ok(Some((payload, None)));
    }
    let room = &session.shared.room;
    let held = room.http1(client, head, inspection.max_bytes).await;
    let held = held.map_err(|why| prepared.unread(session, origin, &why))?;
    Ok(Some((content::read(inspection, &facts, &held.bytes), Some(held))))
}

/// Sends a judged request on, and its response back. `held` is its body, where it has been read.
async fn forward(
    admitted: &mut Admitted,
    client: &mut Conn,
    link: &mut Link,
    head: &RequestHead,
    (rewrite, mut held): (&Rewrite<'_>, Option<Held>),
    asked: Asked<'_>,
) -> Forwarded {
    let doing = Doing::Request(asked);
    let repeatable = head.framing == head::Framing::Empty
        && matches!(head.method(), "GET" | "HEAD" | "OPTIONS" | "PUT" | "DELETE" | "TRACE");
    loop {
        let Admitted { session, origin } = &*admitted;
        let (mut upstream, used) = match link.take(session, origin).await {
            Ok(taken) => taken,
            Err(error) => {
                return Next::Refuse(session.unreachable(head.method(), origin, &error)).into();
            }
        };
        let line = upstream.rd.line();
        // Also what changed since it was judged: reading a body and dialling take their time.
        if let Err(why) = admitted.stays(doing, line.peer()).await {
            return Next::Refuse(Refusal::new(403, "policy_denied", &why)).into();
        }
        // Only what has no body is sent a second time.
        let held = held.take();
        let exchanged = tokio::select! {
            biased;
            _ = admitted.revoked(doing, || line.peer()) => return Next::Cut.into(),
            exchanged = relay::exchange(client, &mut upstream, head, rewrite, held) => exchanged,
        };
        drop(line);
        let Admitted { session, origin } = &*admitted;
        match exchanged {
            Ok(relay::Exchanged { upgraded: Some(answer), .. }) => {
                return Forwarded::Upgraded(upstream, answer);
            }
            Ok(done) => {
                if done.upstream_reusable {
                    link.put_back(upstream);
                }
                return if done.client_reusable { Next::Request } else { Next::Close }.into();
            }
            // An idle connection that the upstream had given up: once more, on a new one.
            Err(RelayError::Upstream { unanswered: true, .. }) if used && repeatable => {}
            Err(RelayError::Upstream { what, .. }) => {
                let error = DialError::Connect(what);
                return Next::Refuse(session.unreachable(head.method(), origin, &error)).into();
            }
            Err(RelayError::Request(error)) => {
                let to = format!("{}:{}", origin.host, origin.port);
                report::request_refused(session, head.method(), &to, &error.to_string());
                let refusal = Refusal::new(400, "invalid_request", &error.to_string());
                return Next::Refuse(refusal).into();
            }
            // Cut, not closed: a client must not take half a response for a whole one.
            Err(RelayError::Lost(_)) => return Next::Cut.into(),
        }
    }
}

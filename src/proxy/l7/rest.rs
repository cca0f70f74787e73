//! HTTP/1.1 inside a tunnel, and the steps that each request takes wherever it came in: bound to
//! its authority, made canonical, judged, sent on.

use std::fmt::Write as _;
use std::time::Duration;

use crate::policy::{self, Host, Inspect, Verdict, canonical_path};
use crate::proxy::connect::authority;
use crate::proxy::destination::{DialError, Origin, dial};
use crate::proxy::http::head::{self, RequestHead};
use crate::proxy::http::relay::{self, RelayError};
use crate::proxy::http::write::Rewrite;
use crate::proxy::listener::{refusal_for, refuse};
use crate::proxy::metrics;
use crate::proxy::refusal::{DeniedRequest, Refusal};
use crate::proxy::report::{self, RequestLine};
use crate::proxy::session::Session;
use crate::proxy::stream::{Conn, Stream, duplex};
use crate::proxy::tls::HTTP11;

/// How long a connection may rest between two requests.
pub(crate) const IDLE: Duration = Duration::from_secs(120);

/// What the client speaks to the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scheme {
    Http,
    Https,
}

impl Scheme {
    fn name(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Https => "https",
        }
    }

    pub(crate) fn default_port(self) -> u16 {
        match self {
            Self::Http => 80,
            Self::Https => 443,
        }
    }
}

/// The connection to the upstream that goes with a client's connection.
pub(crate) struct Link {
    /// Where it leads.
    to: (Host, u16),
    scheme: Scheme,
    conn: Option<Conn>,
    /// It has carried a request: the upstream may have closed it since.
    used: bool,
    /// Why the first attempt failed; told once, then tried again.
    failed: Option<DialError>,
}

impl Link {
    pub(crate) fn open(origin: &Origin, scheme: Scheme, conn: Conn) -> Self {
        Self { conn: Some(conn), ..Self::none(origin, scheme) }
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
        if let Some(mut conn) = self.conn.take() {
            // Bytes that answer nothing, or an end: either way it is of no more use.
            if conn.rd.data().is_empty() && conn.rd.fill_now().await.is_none() {
                return Ok((conn, self.used));
            }
        }
        self.used = false;
        let tcp = dial(&session.shared, origin).await?;
        let stream = match self.scheme {
            Scheme::Http => Stream::Tcp(tcp),
            Scheme::Https => {
                let alpn = [HTTP11.to_vec()];
                session.shared.upstream_tls.connect(tcp, &origin.host, &alpn).await?.0
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
}

/// Serves the requests of one tunnel to its end.
pub(crate) async fn serve(session: &Session, mut client: Conn, mut link: Link, origin: &Origin) {
    loop {
        let head = match head::read_request(&mut client.rd, IDLE).await {
            Ok(Some(head)) => head,
            Ok(None) => return client.close().await,
            Err(error) => {
                let to = format!("{}:{}", origin.host, origin.port);
                report::request_refused(session, "-", &to, &error.to_string());
                return refuse(client, &refusal_for(error)).await;
            }
        };
        let next = if head.method() == "CONNECT" || !in_origin_form(&head) {
            let detail = "inside a tunnel the target is a path";
            let to = format!("{}:{}", origin.host, origin.port);
            report::request_refused(session, head.method(), &to, detail);
            Next::Refuse(Refusal::new(400, "invalid_request_target", detail))
        } else {
            request(session, &mut client, &mut link, origin, &head, head.target()).await
        };
        if let Some(end) = finish(session, client, origin, next).await {
            client = end;
        } else {
            return;
        }
    }
}

/// Acts on what comes next; gives the client back when it is another request.
pub(crate) async fn finish(
    session: &Session,
    mut client: Conn,
    origin: &Origin,
    next: Next,
) -> Option<Conn> {
    match next {
        Next::Request => return Some(client),
        Next::Close => client.close().await,
        Next::Cut => {}
        Next::Refuse(refusal) => refuse(client, &refusal).await,
        Next::Copy(mut upstream) => {
            let start = std::time::Instant::now();
            let carried = duplex(&mut client, &mut upstream).await;
            report::tunnel_ended(session, origin, carried, start.elapsed());
        }
    }
    None
}

fn in_origin_form(head: &RequestHead) -> bool {
    head.target().starts_with('/') || (head.target() == "*" && head.method() == "OPTIONS")
}

/// What was judged: what is sent on.
struct Judged {
    target: String,
    upgrade: bool,
}

/// Takes one request through all its steps. `target` is origin-form, as sent.
pub(crate) async fn request(
    session: &Session,
    client: &mut Conn,
    link: &mut Link,
    origin: &Origin,
    head: &RequestHead,
    target: &str,
) -> Next {
    let host = match bind(head, origin, link.scheme) {
        Ok(host) => host,
        Err(refusal) => {
            let to = format!("{}:{}", origin.host, origin.port);
            let reason = "Host is not the authority that was judged";
            report::request_refused(session, head.method(), &to, reason);
            return Next::Refuse(refusal);
        }
    };
    let judged = match judge(session, origin, head, target, link.scheme, &host) {
        Ok(judged) => judged,
        Err(refusal) => return Next::Refuse(refusal),
    };
    let rewrite = Rewrite { target: &judged.target, host: &host, upgrade: judged.upgrade };
    forward(session, client, link, origin, head, &rewrite).await
}

/// The authority to send on: the judged host, with a port where the client wrote one (a client may
/// have signed it). Anything but the judged host and port in `Host` is domain fronting.
fn bind(head: &RequestHead, origin: &Origin, scheme: Scheme) -> Result<String, Refusal> {
    // Stands for a port that was left out; no client can write it.
    const NO_PORT: u16 = 0;
    let mut text = origin.host.to_string();
    let mismatch = |detail: &str| Refusal::new(403, "request_authority_mismatch", detail);
    if !head.fields.has("host") {
        // HTTP/1.0.
        if origin.port != scheme.default_port() {
            write_port(&mut text, origin.port);
        }
        return Ok(text);
    }
    let written = head.host().ok_or_else(|| mismatch("Host is not text"))?;
    let (host, port) =
        authority(written, Some(NO_PORT)).map_err(|error| mismatch(&format!("Host: {error}")))?;
    if host != origin.host {
        return Err(mismatch("Host is not the host of the connection"));
    }
    match port {
        // Clients leave the default out, and some leave every port out.
        NO_PORT => {}
        port if port == origin.port => write_port(&mut text, port),
        _ => return Err(mismatch("Host has not the port of the connection")),
    }
    Ok(text)
}

fn write_port(text: &mut String, port: u16) {
    // Writing to a String cannot fail.
    let _ = write!(text, ":{port}");
}

/// Asks the policy about one request, and reports the answer.
fn judge(
    session: &Session,
    origin: &Origin,
    head: &RequestHead,
    target: &str,
    scheme: Scheme,
    host: &str,
) -> Result<Judged, Refusal> {
    let method = head.method();
    if origin.grant.inspect == Inspect::None {
        let path = target.split('?').next().unwrap_or_default();
        let line = RequestLine { method, scheme: scheme.name(), authority: host, path };
        report::request_allowed(&line, &origin.grant.policy, "l4");
        let upgrade = head.fields.connection("upgrade");
        return Ok(Judged { target: target.to_owned(), upgrade });
    }
    let to = format!("{}:{}", origin.host, origin.port);
    if let Some(protocol) = head.upgrade()
        // Offered by some clients in passing; left out, it has not happened (RFC 9110, 7.8).
        && !protocol.eq_ignore_ascii_case(b"h2c")
    {
        let reason = "this endpoint is inspected: a change of protocols is not allowed";
        report::request_refused(session, method, &to, reason);
        return Err(Refusal::new(403, "upgrade_not_permitted", reason));
    }
    let canonical = canonical_path(target, origin.grant.allow_encoded_slash)
        .map_err(|error| error.to_string())
        .and_then(|canonical| match canonical.authority {
            None => Ok(canonical),
            Some(_) => Err("the target is not a path".to_owned()),
        })
        .map_err(|reason| {
            report::request_refused(session, method, &to, &reason);
            Refusal::new(400, "invalid_request_target", &reason)
        })?;
    let path = canonical.path.as_str();
    let asked = policy::Request { method, path, query: &canonical.pairs, payload: None };
    let line = RequestLine { method, scheme: scheme.name(), authority: host, path };
    let policy = &session.shared.policy;
    match policy.request(session.caller(), &origin.host, origin.port, &asked) {
        Verdict::Allow { policy } => report::request_allowed(&line, &policy, "l7"),
        Verdict::Audit { policy, reason } => report::request_audited(&line, &policy, &reason),
        Verdict::Deny(denial) => {
            report::request_denied(&line, &denial);
            let denied = DeniedRequest {
                method,
                path,
                host: &origin.host,
                port: origin.port,
                binary: &session.caller().exe,
            };
            return Err(Refusal::request(&denied, &denial));
        }
    }
    Ok(Judged { target: canonical.origin_form(), upgrade: false })
}

/// Sends a judged request on, and its response back.
async fn forward(
    session: &Session,
    client: &mut Conn,
    link: &mut Link,
    origin: &Origin,
    head: &RequestHead,
    rewrite: &Rewrite<'_>,
) -> Next {
    let repeatable = head.framing == head::Framing::Empty
        && matches!(head.method(), "GET" | "HEAD" | "OPTIONS" | "PUT" | "DELETE" | "TRACE");
    loop {
        let (mut upstream, used) = match link.take(session, origin).await {
            Ok(taken) => taken,
            Err(error) => {
                return Next::Refuse(session.unreachable(head.method(), origin, &error));
            }
        };
        match relay::exchange(client, &mut upstream, head, rewrite).await {
            Ok(done) if done.upgraded => return Next::Copy(Box::new(upstream)),
            Ok(done) => {
                if done.upstream_reusable {
                    link.put_back(upstream);
                }
                return if done.client_reusable { Next::Request } else { Next::Close };
            }
            // An idle connection that the upstream had given up: once more, on a new one.
            Err(RelayError::Upstream { unanswered: true, .. }) if used && repeatable => {}
            Err(RelayError::Upstream { what, .. }) => {
                let error = DialError::Connect(what);
                return Next::Refuse(session.unreachable(head.method(), origin, &error));
            }
            Err(RelayError::Request(error)) => {
                let to = format!("{}:{}", origin.host, origin.port);
                report::request_refused(session, head.method(), &to, &error.to_string());
                return Next::Refuse(Refusal::new(400, "invalid_request", &error.to_string()));
            }
            // Cut, not closed: a client must not take half a response for a whole one.
            Err(RelayError::Lost(_)) => return Next::Cut,
        }
    }
}

//! What the proxy reports, in one place: each kind of event with its severity, its words and its
//! counter.

use std::fmt::Display;
use std::net::SocketAddr;
use std::time::Duration;

use super::caller::CallerError;
use super::destination::{DialError, Origin};
use super::http::head::RequestHead;
use super::metrics::{self, Layer, Refused, Side, Verdict};
use super::quiet::QUIET;
use super::session::Session;
use super::stream::Carried;
use crate::event::{Class, Event, Severity, emit};
use crate::policy::{Denial, Host, Payload};

/// `/usr/bin/curl(123) -> host:port`.
fn flow(session: &Session, host: &Host, port: u16) -> String {
    format!("{}({}) -> {host}:{port}", session.caller().exe, session.pid())
}

fn open(severity: Severity, session: &Session, origin: &Origin) -> Event {
    Event::new(Class::Net, "OPEN", severity)
        .subject(flow(session, &origin.host, origin.port))
        .field("policy", &origin.grant.policy)
        .field("engine", "l4")
}

fn with_advice(event: Event, denial: &Denial) -> Event {
    let event = event.reason(denial.reason.as_str());
    if denial.suggestion.is_empty() { event } else { event.advice(denial.suggestion.as_str()) }
}

pub(crate) fn connect_allowed(session: &Session, origin: &Origin) {
    emit(&open(Severity::Info, session, origin).allowed());
}

pub(crate) fn connect_denied(session: &Session, host: &Host, port: u16, denial: &Denial) {
    metrics::decided(Layer::L4, Verdict::Denied, &denial.policy);
    let event = Event::new(Class::Net, "OPEN", Severity::Medium)
        .denied()
        .subject(flow(session, host, port))
        .field("policy", &denial.policy)
        .field("engine", "l4");
    emit(&with_advice(event, denial));
}

/// `head` is what was asked for, if it could be read.
pub(crate) fn unknown_caller(peer: SocketAddr, head: Option<&RequestHead>, reason: &str) {
    metrics::refused(Refused::Caller, 1);
    // The path may hold what should not be logged.
    let asked = match head {
        Some(head) if head.method() == "CONNECT" => format!("CONNECT {}", head.target()),
        Some(head) => head.method().to_owned(),
        None => "the proxy".to_owned(),
    };
    let event = Event::new(Class::Net, "OPEN", Severity::High)
        .denied()
        .subject(format!("{peer} -> {asked}"))
        .reason(reason);
    emit(&event);
}

pub(crate) fn caller_not_trusted(session: &Session, host: &Host, port: u16, error: &CallerError) {
    metrics::refused(Refused::Executable, 1);
    let event = Event::new(Class::Finding, "BLOCKED", Severity::High)
        .denied()
        .subject(flow(session, host, port))
        .field("finding", "binary-identity")
        .reason(error.to_string());
    emit(&event);
}

/// Let through, by an entry that does not refuse it.
pub(crate) fn caller_tainted(session: &Session, host: &Host, port: u16, why: &str) {
    let event = Event::new(Class::Finding, "OPEN", Severity::Medium)
        .allowed()
        .subject(flow(session, host, port))
        .field("finding", "tainted-binary")
        .reason(why);
    emit(&event);
}

/// No connection although the policy allows one: forbidden is a denial, the rest is weather.
pub(crate) fn dial_failed(session: &Session, origin: &Origin, error: &DialError) {
    metrics::dial_failed(error);
    let event = match error {
        DialError::Forbidden { .. } => open(Severity::Medium, session, origin).denied(),
        _ => Event::new(Class::Net, "FAIL", Severity::Low)
            .subject(flow(session, &origin.host, origin.port))
            .field("policy", &origin.grant.policy),
    };
    emit(&event.reason(error.to_string()));
}

/// A tunnel that was opened and then found to carry what it must not.
pub(crate) fn tunnel_refused(session: &Session, origin: &Origin, reason: &str) {
    metrics::refused(Refused::Protocol, 1);
    emit(&open(Severity::Medium, session, origin).denied().reason(reason));
}

/// Most often an agent's program that does not know the sandbox CA.
pub(crate) fn handshake_failed(session: &Session, origin: &Origin, reason: &str) {
    metrics::handshake(Side::Agent, false);
    let event = Event::new(Class::Net, "FAIL", Severity::Low)
        .subject(flow(session, &origin.host, origin.port))
        .reason(format!("TLS handshake with the agent: {reason}"));
    emit(&event);
}

pub(crate) fn tunnel_ended(
    session: &Session,
    origin: &Origin,
    carried: Carried,
    duration: Duration,
) {
    let event = Event::new(Class::Net, "CLOSE", Severity::Info)
        .allowed()
        .subject(flow(session, &origin.host, origin.port))
        .field("policy", &origin.grant.policy)
        .field("up", carried.up)
        .field("down", carried.down)
        .field("ms", duration.as_millis());
    emit(&event);
}

/// A request, as its event names it: never with its query.
pub(crate) struct RequestLine<'a> {
    pub(crate) method: &'a str,
    pub(crate) scheme: &'a str,
    pub(crate) authority: &'a str,
    pub(crate) path: &'a str,
    /// What its content says, where that was judged.
    pub(crate) payload: Option<&'a Payload>,
}

fn http(severity: Severity, line: &RequestLine<'_>) -> Event {
    let RequestLine { method, scheme, authority, path, payload } = line;
    let event = Event::new(Class::Http, (*method).to_owned(), severity)
        .subject(format!("{method} {scheme}://{authority}{path}"));
    match payload {
        Some(payload) => event.field(payload.protocol(), payload.summary()),
        None => event,
    }
}

/// `engine` is what judged it: `l7` each request, `l4` only the connection, which was counted then.
pub(crate) fn request_allowed(line: &RequestLine<'_>, policy: &str, engine: &str) {
    if engine == "l7" {
        metrics::decided(Layer::L7, Verdict::Allowed, policy);
    }
    emit(&http(Severity::Info, line).allowed().field("policy", policy).field("engine", engine));
}

/// Let pass by `enforcement: audit`.
pub(crate) fn request_audited(line: &RequestLine<'_>, policy: &str, reason: &str) {
    metrics::decided(Layer::L7, Verdict::Audited, policy);
    let event = http(Severity::Medium, line)
        .allowed()
        .field("policy", policy)
        .field("engine", "l7")
        .reason(format!("audit: {reason}"));
    emit(&event);
}

pub(crate) fn request_denied(line: &RequestLine<'_>, denial: &Denial) {
    metrics::decided(Layer::L7, Verdict::Denied, &denial.policy);
    let event =
        http(Severity::Medium, line).denied().field("policy", &denial.policy).field("engine", "l7");
    emit(&with_advice(event, denial));
}

/// A request that is refused for what it is, before any rule is asked.
pub(crate) fn request_refused(session: &Session, method: &str, to: &dyn Display, reason: &str) {
    metrics::refused(Refused::Protocol, 1);
    let event = Event::new(Class::Http, method.to_owned(), Severity::Medium)
        .denied()
        .subject(format!("{}({}) -> {to}", session.caller().exe, session.pid()))
        .field("engine", "http")
        .reason(reason);
    emit(&event);
}

/// A direct connection that the gateway caught and that nothing can allow. `who` when it could be
/// found quickly.
pub(crate) fn captured(who: Option<(&str, u32)>, destination: &dyn Display, reason: &str) {
    metrics::refused(Refused::Direct, 1);
    let who = who.map_or_else(|| "agent".to_owned(), |(exe, pid)| format!("{exe}({pid})"));
    let event = Event::new(Class::Net, "REFUSE", Severity::Medium)
        .denied()
        .subject(format!("{who} -> {destination}"))
        .reason(reason);
    emit(&event);
}

pub(crate) fn name_refused(name: &str, kind: &dyn Display, reason: &str) {
    metrics::refused(Refused::Name, 1);
    let event = Event::new(Class::Net, "REFUSE", Severity::Medium)
        .denied()
        .subject(format!("DNS {kind} {name}"))
        .reason(reason);
    emit(&event);
}

/// What was refused within one period without a line of its own; nothing, if nothing was.
pub(crate) fn more_refused(count: u64, kind: Refused) {
    if count == 0 {
        return;
    }
    metrics::refused(kind, count);
    let what = match kind {
        Refused::Direct => "direct connections",
        Refused::Name => "DNS questions",
        Refused::Limit => "connections: too many at a time",
        Refused::Caller | Refused::Executable | Refused::Address | Refused::Protocol => "refusals",
    };
    let event = Event::new(Class::Net, "REFUSE", Severity::Medium)
        .denied()
        .subject(format!("{count} more {what}"))
        .field("seconds", QUIET.as_secs());
    emit(&event);
}

pub(crate) fn inbound_failed(port: u16, error: &std::io::Error) {
    let event = Event::new(Class::Config, "DEGRADED", Severity::Medium)
        .subject(format!("inbound port {port} cannot be opened in the pod"))
        .reason(error.to_string());
    emit(&event);
}

pub(crate) fn admin_failed(port: u16, error: &std::io::Error) {
    let event = Event::new(Class::Config, "DEGRADED", Severity::Medium)
        .subject(format!("the admin endpoint 127.0.0.1:{port} cannot be opened in the pod"))
        .reason(error.to_string());
    emit(&event);
}

pub(crate) fn unread_roots(count: usize) {
    let event = Event::new(Class::Config, "DEGRADED", Severity::Medium)
        .subject(format!("{count} of the configured upstream authorities cannot be read"));
    emit(&event);
}

pub(crate) fn accept_failed(error: &std::io::Error) {
    let event = Event::new(Class::Config, "DEGRADED", Severity::Medium)
        .subject("a listener cannot accept; it tries again")
        .reason(error.to_string());
    emit(&event);
}

pub(crate) fn too_many_streams(session: &Session, origin: &Origin) {
    metrics::refused(Refused::Limit, 1);
    let event = open(Severity::Low, session, origin).denied();
    emit(&event.reason("HTTP/2: too many streams through the proxy at a time"));
}

pub(crate) fn too_many_connections() {
    metrics::refused(Refused::Limit, 1);
    let event = Event::new(Class::Net, "OPEN", Severity::Low)
        .denied()
        .subject("too many connections through the proxy at a time");
    emit(&event);
}

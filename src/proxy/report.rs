//! What the proxy reports, in one place: each kind of event with its severity, its words and its
//! counter.

use std::fmt::Display;
use std::hash::{BuildHasher as _, Hash, RandomState};
use std::net::SocketAddr;
use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::caller::CallerError;
use super::destination::{DialError, Origin};
use super::http::head::RequestHead;
use super::metrics::{self, Layer, Refused, Side, Verdict};
use super::quiet::{Flood, QUIET, period};
use super::session::Session;
use super::stream::Carried;
use crate::event::{Class, Event, Severity, emit, inform};
use crate::policy::{Denial, Host, Payload};

/// Kinds of refusals, each limited by itself: a flood of one hides nothing of another.
#[derive(Debug, Clone, Copy)]
enum Flooding {
    Connect,
    Request,
    Malformed,
    Caller,
    Executable,
    Address,
    Unreached,
    Tunnel,
    Handshake,
    Limit,
    Audited,
    Tainted,
}

const FLOODING: [&str; 12] = [
    "connections that no policy allows",
    "requests that no rule allows",
    "malformed requests",
    "connections without a known caller",
    "connections of changed executables",
    "connections to addresses that are not dialled",
    "upstreams that were not reached",
    "tunnels with what they must not carry",
    "TLS handshakes of the agent that failed",
    "connections: too many at a time",
    "requests and connections that audit lets pass",
    "connections of binaries that run other code",
];

static FLOODS: LazyLock<Mutex<[Flood; FLOODING.len()]>> =
    LazyLock::new(|| Mutex::new(std::array::from_fn(|_| Flood::new())));

/// This process's own: who chooses what is hashed must not be able to make two the same.
static HASH: LazyLock<RandomState> = LazyLock::new(RandomState::new);

/// Writes a refusal, or counts it where too many of its kind come. `what` tells it from others:
/// the first of each is always written.
fn limited(kind: Flooding, what: impl Hash, event: impl FnOnce() -> Event) {
    let what = HASH.hash_one(what);
    let tell = {
        let mut floods = FLOODS.lock().unwrap_or_else(PoisonError::into_inner);
        floods[kind as usize].tell(what, Instant::now())
    };
    if tell {
        emit(&event());
    }
}

/// Tells from time to time how many refusals were only counted, for ever.
pub(crate) async fn tell_of_floods() {
    let mut period = period();
    loop {
        period.tick().await;
        let muted: Vec<u64> = {
            let mut floods = FLOODS.lock().unwrap_or_else(PoisonError::into_inner);
            floods.iter_mut().map(Flood::take_muted).collect()
        };
        let muted = FLOODING.into_iter().zip(muted).enumerate();
        for (kind, (what, count)) in muted.filter(|(_, (_, count))| *count > 0) {
            let passed = [Flooding::Audited, Flooding::Tainted].map(|kind| kind as usize);
            emit(&more(count, what, !passed.contains(&kind)));
        }
    }
}

/// What was let pass is no refusal.
fn more(count: u64, what: &str, denied: bool) -> Event {
    let event = Event::new(Class::Net, if denied { "REFUSE" } else { "OPEN" }, Severity::Medium);
    let event = if denied { event.denied() } else { event.allowed() };
    event.subject(format!("{count} more {what}")).field("seconds", QUIET.as_secs())
}

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
    if !origin.grant.unread {
        return inform(|| open(Severity::Info, session, origin).allowed());
    }
    let what = (&session.caller().exe, origin.host.as_str(), origin.port);
    limited(Flooding::Audited, what, || {
        open(Severity::Medium, session, origin)
            .allowed()
            .reason("audit: SQL is not parsed, every statement passes")
    });
}

pub(crate) fn connect_denied(session: &Session, host: &Host, port: u16, denial: &Denial) {
    metrics::decided(Layer::L4, Verdict::Denied, &denial.policy);
    limited(Flooding::Connect, (&session.caller().exe, host.as_str(), port), || {
        let event = Event::new(Class::Net, "OPEN", Severity::Medium)
            .denied()
            .subject(flow(session, host, port))
            .field("policy", &denial.policy)
            .field("engine", "l4");
        with_advice(event, denial)
    });
}

/// `head` is what was asked for, if it could be read.
pub(crate) fn unknown_caller(peer: SocketAddr, head: Option<&RequestHead>, reason: &str) {
    metrics::refused(Refused::Caller, 1);
    limited(Flooding::Caller, reason, || {
        // The path may hold what should not be logged.
        let asked = match head {
            Some(head) if head.method() == "CONNECT" => format!("CONNECT {}", head.target()),
            Some(head) => head.method().to_owned(),
            None => "the proxy".to_owned(),
        };
        Event::new(Class::Net, "OPEN", Severity::High)
            .denied()
            .subject(format!("{peer} -> {asked}"))
            .reason(reason)
    });
}

pub(crate) fn caller_not_trusted(session: &Session, host: &Host, port: u16, error: &CallerError) {
    metrics::refused(Refused::Executable, 1);
    limited(Flooding::Executable, (&session.caller().exe, host.as_str(), port), || {
        Event::new(Class::Finding, "BLOCKED", Severity::High)
            .denied()
            .subject(flow(session, host, port))
            .field("finding", "binary-identity")
            .reason(error.to_string())
    });
}

/// Let through, by an entry that does not refuse it.
pub(crate) fn caller_tainted(session: &Session, host: &Host, port: u16, why: &str) {
    limited(Flooding::Tainted, (&session.caller().exe, host.as_str(), port, why), || {
        Event::new(Class::Finding, "OPEN", Severity::Medium)
            .allowed()
            .subject(flow(session, host, port))
            .field("finding", "tainted-binary")
            .reason(why)
    });
}

/// No connection although the policy allows one: forbidden is a denial, the rest is weather.
pub(crate) fn dial_failed(session: &Session, origin: &Origin, error: &DialError) {
    metrics::dial_failed(error);
    let what = (&session.caller().exe, origin.host.as_str(), origin.port);
    let denied = matches!(error, DialError::Forbidden { .. } | DialError::NotByProxy(_));
    limited(if denied { Flooding::Address } else { Flooding::Unreached }, what, || {
        let event = if denied {
            open(Severity::Medium, session, origin).denied()
        } else {
            Event::new(Class::Net, "FAIL", Severity::Low)
                .subject(flow(session, &origin.host, origin.port))
                .field("policy", &origin.grant.policy)
        };
        event.reason(error.to_string())
    });
}

/// A tunnel that was opened and then found to carry what it must not.
pub(crate) fn tunnel_refused(session: &Session, origin: &Origin, reason: &str) {
    metrics::refused(Refused::Protocol, 1);
    let what = (&session.caller().exe, origin.host.as_str(), origin.port, reason);
    limited(Flooding::Tunnel, what, || {
        open(Severity::Medium, session, origin).denied().reason(reason)
    });
}

/// Something that was allowed, and that the policy of now does not allow.
pub(crate) fn revoked(session: &Session, origin: &Origin, why: &str) {
    metrics::refused(Refused::Revoked, 1);
    let event = Event::new(Class::Net, "CLOSE", Severity::Medium)
        .denied()
        .subject(flow(session, &origin.host, origin.port))
        .field("policy", &origin.grant.policy)
        .reason(format!("the policy has changed: {why}"));
    emit(&event);
}

/// Another policy is in force.
pub(crate) fn policy_followed(generation: u64, digest: &str, bounded: bool, kept: &[String]) {
    let severity = match (bounded, kept.is_empty()) {
        (true, _) => Severity::High,
        (false, false) => Severity::Medium,
        (false, true) => Severity::Low,
    };
    let mut event = Event::new(Class::Config, "POLICY", severity)
        .subject("the policy has changed and is in force")
        .field("digest", digest)
        .field("generation", generation);
    if bounded {
        event = event.field("bounded", "what it adds is held back until the pod is started anew");
    }
    if !kept.is_empty() {
        event = event.reason(format!("until the pod is started anew: {}", kept.join("; ")));
    }
    emit(&event);
}

/// The policy has changed, and the last one stays in force.
pub(crate) fn policy_kept(reason: &str) {
    metrics::policy_kept();
    let event = Event::new(Class::Config, "POLICY", Severity::High)
        .subject("a change of the policy is not followed: the last one stays in force")
        .reason(reason);
    emit(&event);
}

/// Most often an agent's program that does not know the sandbox CA.
pub(crate) fn handshake_failed(session: &Session, origin: &Origin, reason: &str) {
    metrics::handshake(Side::Agent, false);
    let what = (&session.caller().exe, origin.host.as_str(), origin.port, reason);
    limited(Flooding::Handshake, what, || {
        Event::new(Class::Net, "FAIL", Severity::Low)
            .subject(flow(session, &origin.host, origin.port))
            .reason(format!("TLS handshake with the agent: {reason}"))
    });
}

pub(crate) fn tunnel_ended(
    session: &Session,
    origin: &Origin,
    carried: Carried,
    duration: Duration,
) {
    inform(|| {
        Event::new(Class::Net, "CLOSE", Severity::Info)
            .allowed()
            .subject(flow(session, &origin.host, origin.port))
            .field("policy", &origin.grant.policy)
            .field("up", carried.up)
            .field("down", carried.down)
            .field("ms", duration.as_millis())
    });
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
    match payload.map(|payload| (payload.protocol(), payload.summary())) {
        Some((protocol, said)) if !said.is_empty() => event.field(protocol, said),
        _ => event,
    }
}

/// `engine` is what judged it: `l7` each request, `l4` only the connection, which was counted then.
pub(crate) fn request_allowed(line: &RequestLine<'_>, policy: &str, engine: &str) {
    if engine == "l7" {
        metrics::decided(Layer::L7, Verdict::Allowed, policy);
    }
    inform(|| http(Severity::Info, line).allowed().field("policy", policy).field("engine", engine));
}

/// Let pass by `enforcement: audit`.
pub(crate) fn request_audited(line: &RequestLine<'_>, policy: &str, reason: &str) {
    metrics::decided(Layer::L7, Verdict::Audited, policy);
    let said = line.payload.map(Payload::summary);
    limited(Flooding::Audited, (line.method, line.authority, line.path, said), || {
        http(Severity::Medium, line)
            .allowed()
            .field("policy", policy)
            .field("engine", "l7")
            .reason(format!("audit: {reason}"))
    });
}

pub(crate) fn request_denied(line: &RequestLine<'_>, denial: &Denial) {
    metrics::decided(Layer::L7, Verdict::Denied, &denial.policy);
    // One path has many operations, and the first denial of each is told.
    let said = line.payload.map(Payload::summary);
    limited(Flooding::Request, (line.method, line.authority, line.path, said), || {
        let event = http(Severity::Medium, line)
            .denied()
            .field("policy", &denial.policy)
            .field("engine", "l7");
        with_advice(event, denial)
    });
}

/// A request that is refused for what it is, before any rule is asked.
pub(crate) fn request_refused(session: &Session, method: &str, to: &dyn Display, reason: &str) {
    metrics::refused(Refused::Protocol, 1);
    let to = to.to_string();
    limited(Flooding::Malformed, (&session.caller().exe, &to, reason), || {
        Event::new(Class::Http, method.to_owned(), Severity::Medium)
            .denied()
            .subject(format!("{}({}) -> {to}", session.caller().exe, session.pid()))
            .field("engine", "http")
            .reason(reason)
    });
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
        Refused::Caller
        | Refused::Executable
        | Refused::Address
        | Refused::Protocol
        | Refused::Revoked => "refusals",
    };
    emit(&more(count, what, true));
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

/// A stream beyond the most; told in the log only the `first` time.
pub(crate) fn too_many_streams(session: &Session, origin: &Origin, first: bool) {
    metrics::refused(Refused::Limit, 1);
    if first {
        let event = open(Severity::Low, session, origin).denied();
        emit(&event.reason("HTTP/2: too many streams through the proxy at a time"));
    }
}

/// `who` where it is one process that has its share already.
pub(crate) fn too_many_connections(who: Option<(&str, u32)>) {
    metrics::refused(Refused::Limit, 1);
    limited(Flooding::Limit, who, || {
        let event = Event::new(Class::Net, "OPEN", Severity::Low).denied();
        match who {
            Some((exe, pid)) => event
                .subject(format!("{exe}({pid}): too many connections of this process at a time")),
            None => event.subject("too many connections through the proxy at a time"),
        }
    });
}

pub(crate) fn no_java_store(error: &std::io::Error) {
    let event = Event::new(Class::Config, "DEGRADED", Severity::Low)
        .subject("Java finds no certificates")
        .reason(error.to_string());
    emit(&event);
}

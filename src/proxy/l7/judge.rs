//! The steps that each request takes before it may be sent on, whatever version of HTTP it came
//! in: bound to its authority, made canonical, judged, reported.
//!
//! The version's own code says what was asked ([`Facts`]) and gets either what to send on
//! ([`Judged`]) or what to answer. Where the policy asks for what the body says
//! ([`Prepared::inspection`]), it reads the body in between (`held`, `content`).

use std::fmt::Write as _;

use crate::policy::{
    self, CanonicalTarget, Inspect, Inspection, Instead, Payload, Verdict, canonical_path,
};
use crate::proxy::connect::authority;
use crate::proxy::destination::Origin;
use crate::proxy::l7::held::Unread;
use crate::proxy::l7::websocket::{HandshakeError, Offer};
use crate::proxy::refusal::{DeniedRequest, Refusal};
use crate::proxy::report::{self, RequestLine};
use crate::proxy::session::Session;

/// What the client speaks to the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scheme {
    Http,
    Https,
}

impl Scheme {
    pub(crate) fn name(self) -> &'static str {
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

/// One request, as it was asked.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Facts<'a> {
    /// A token, as sent.
    pub(crate) method: &'a str,
    /// As sent, printable ASCII: a path with its query, or `*`.
    pub(crate) target: &'a str,
    /// What the connection is.
    pub(crate) scheme: Scheme,
    /// All that names the host: `:authority` and `Host`, in this order. None in HTTP/1.0.
    pub(crate) authorities: &'a [&'a [u8]],
    /// The protocol that it asks to change to, as sent (HTTP/1.1).
    pub(crate) upgrade: Option<&'a [u8]>,
    /// What it asks for, where that protocol is WebSocket.
    pub(crate) websocket: Option<&'a Result<Offer, HandshakeError>>,
    /// What its header fields ask a server to take instead of this.
    pub(crate) instead: &'a Instead,
}

/// What was judged: what is sent on.
#[derive(Debug)]
pub(crate) struct Judged {
    /// Canonical where the endpoint is inspected.
    pub(crate) target: String,
    /// The judged host, with its port where the client wrote one.
    pub(crate) authority: String,
    /// It may ask for the protocol that it named.
    pub(crate) upgrade: bool,
    /// That is a WebSocket, whose messages are to be judged with the path and the query.
    pub(crate) websocket: bool,
    /// None where the endpoint is not inspected.
    pub(crate) canonical: Option<CanonicalTarget>,
    /// Methods that a server may take instead: what was judged besides.
    pub(crate) overrides: Vec<String>,
}

/// A request up to where its content matters.
#[derive(Debug)]
pub(crate) struct Prepared<'a> {
    facts: Facts<'a>,
    authority: String,
    /// None where the endpoint is not inspected.
    canonical: Option<CanonicalTarget>,
    inspection: Option<Inspection>,
}

/// Takes one request through the steps before it is judged, and reports how they ended.
pub(crate) fn prepare<'a>(
    session: &Session,
    origin: &Origin,
    facts: &Facts<'a>,
) -> Result<Prepared<'a>, Refusal> {
    let refused = |reason: &str| {
        let to = format!("{}:{}", origin.host, origin.port);
        report::request_refused(session, facts.method, &to, reason);
    };
    let Facts { method, target, .. } = *facts;
    if method == "CONNECT" || !in_origin_form(method, target) {
        let detail = "inside a tunnel the target is a path";
        refused(detail);
        return Err(Refusal::new(400, "invalid_request_target", detail));
    }
    let authority = bind(facts, origin)
        .inspect_err(|_| refused("Host is not the authority that was judged"))?;
    if origin.grant.inspect == Inspect::None {
        return Ok(Prepared { facts: *facts, authority, canonical: None, inspection: None });
    }
    if let Some(Err(error)) = facts.websocket {
        let reason = error.to_string();
        refused(&reason);
        return Err(Refusal::new(400, "invalid_websocket_handshake", &reason));
    }
    if facts.instead.target {
        let reason = "a header field names another target (X-Original-URL, X-Rewrite-URL)";
        refused(reason);
        return Err(Refusal::new(400, "invalid_request_target", reason));
    }
    let websocket = facts.websocket.is_some();
    if let Some(protocol) = facts.upgrade.filter(|_| !websocket)
        // Offered by some clients in passing; left out, it has not happened (RFC 9110, 7.8).
        && !protocol.eq_ignore_ascii_case(b"h2c")
    {
        let reason = "this endpoint is inspected: a change of protocols is not allowed";
        refused(reason);
        return Err(Refusal::new(403, "upgrade_not_permitted", reason));
    }
    let canonical = canonical_path(target, origin.grant.allow_encoded_slash)
        .map_err(|error| error.to_string())
        .and_then(|canonical| match canonical.authority {
            None => Ok(canonical),
            Some(_) => Err("the target is not a path".to_owned()),
        })
        .map_err(|reason| {
            refused(&reason);
            Refusal::new(400, "invalid_request_target", &reason)
        })?;
    let policy = session.policy();
    // A handshake has no content; where one must be read, there is no WebSocket.
    let inspection = if websocket {
        None
    } else {
        policy.inspection(session.caller(), &origin.host, origin.port, &canonical.path)
    };
    Ok(Prepared { facts: *facts, authority, canonical: Some(canonical), inspection })
}

impl Prepared<'_> {
    /// How the content must be read before [`Self::judge`], where it must, and the target that goes
    /// with it.
    pub(crate) fn inspection(&self) -> Option<(&Inspection, &CanonicalTarget)> {
        self.inspection.as_ref().zip(self.canonical.as_ref())
    }

    /// A request whose content could not be read.
    pub(crate) fn unread(&self, session: &Session, origin: &Origin, why: &Unread) -> Refusal {
        let path = self.canonical.as_ref().map_or("", |canonical| &canonical.path);
        let to = format!("{}:{}{path}", origin.host, origin.port);
        report::request_refused(session, self.facts.method, &to, &why.to_string());
        why.into()
    }

    /// Asks the policy, and reports the answer. `payload` is what the content says, where that was
    /// asked for.
    pub(crate) fn judge(
        self,
        session: &Session,
        origin: &Origin,
        payload: Option<&Payload>,
    ) -> Result<Judged, Refusal> {
        let Self { facts, authority, canonical, .. } = self;
        let Facts { method, target, scheme, .. } = facts;
        let line = |path| {
            let authority = &authority;
            RequestLine { method, scheme: scheme.name(), authority, path, payload }
        };
        let Some(read) = &canonical else {
            let path = target.split('?').next().unwrap_or_default();
            report::request_allowed(&line(path), &origin.grant.policy, "l4");
            let upgrade = facts.upgrade.is_some_and(|protocols| !names_http(protocols));
            let target = target.to_owned();
            return Ok(Judged {
                target,
                authority,
                upgrade,
                websocket: false,
                canonical,
                overrides: Vec::new(),
            });
        };
        let path = read.path.as_str();
        let overrides = &facts.instead.methods;
        let asked = policy::Request { method, path, query: &read.pairs, payload, overrides };
        let policy = session.policy();
        let websocket = facts.websocket.is_some();
        let verdict = if websocket {
            policy.websocket(session.caller(), &origin.host, origin.port, &asked)
        } else {
            policy.request(session.caller(), &origin.host, origin.port, &asked)
        };
        match verdict {
            Verdict::Allow { policy } => report::request_allowed(&line(path), &policy, "l7"),
            Verdict::Audit { policy, reason } => {
                report::request_audited(&line(path), &policy, &reason);
            }
            Verdict::Deny(denial) => {
                report::request_denied(&line(path), &denial);
                let denied = DeniedRequest {
                    method,
                    path,
                    host: &origin.host,
                    port: origin.port,
                    binary: &session.caller().exe,
                    payload,
                };
                return Err(Refusal::request(&denied, &denial));
            }
        }
        let target = read.origin_form();
        let overrides = overrides.clone();
        Ok(Judged { target, authority, upgrade: websocket, websocket, canonical, overrides })
    }
}

fn in_origin_form(method: &str, target: &str) -> bool {
    target.starts_with('/') || (target == "*" && method == "OPTIONS")
}

/// Whether any of the protocols in an `Upgrade` is another version of HTTP. Behind such a change
/// nothing compares the authority any more.
fn names_http(protocols: &[u8]) -> bool {
    protocols.split(|byte| *byte == b',').any(|protocol| {
        let name = protocol.split(|byte| *byte == b'/').next().unwrap_or_default().trim_ascii();
        [&b"h2c"[..], b"h2", b"http"].iter().any(|http| name.eq_ignore_ascii_case(http))
    })
}

/// The authority to send on: the judged host, with a port where the client wrote one (a client may
/// have signed it). Anything but the judged host and port is domain fronting.
fn bind(facts: &Facts<'_>, origin: &Origin) -> Result<String, Refusal> {
    let Some((first, more)) = facts.authorities.split_first() else {
        // HTTP/1.0.
        let mut text = origin.host.to_string();
        if origin.port != facts.scheme.default_port() {
            write_port(&mut text, origin.port);
        }
        return Ok(text);
    };
    more.iter().try_for_each(|more| bind_one(more, origin).map(drop))?;
    bind_one(first, origin)
}

fn bind_one(written: &[u8], origin: &Origin) -> Result<String, Refusal> {
    // Stands for a port that was left out; no client can write it.
    const NO_PORT: u16 = 0;
    let mismatch = |detail: &str| Refusal::new(403, "request_authority_mismatch", detail);
    let written = std::str::from_utf8(written).map_err(|_| mismatch("Host is not text"))?;
    let (host, port) =
        authority(written, Some(NO_PORT)).map_err(|error| mismatch(&format!("Host: {error}")))?;
    if host != origin.host {
        return Err(mismatch("Host is not the host of the connection"));
    }
    let mut text = origin.host.to_string();
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::{Grant, Host, TlsMode};

    fn origin(port: u16) -> Origin {
        let grant = Grant {
            policy: "p".to_owned(),
            inspect: Inspect::None,
            tls: TlsMode::Auto,
            allowed_ips: Vec::new(),
            restricted: false,
            exact_host: true,
            allow_encoded_slash: false,
            unread: false,
            also: None,
        };
        Origin { host: Host::parse("api.test").expect("host"), port, grant }
    }

    fn bound(authorities: &[&[u8]], port: u16) -> Option<String> {
        let (scheme, upgrade, websocket) = (Scheme::Https, None, None);
        let instead = &Instead::default();
        let (method, target) = ("GET", "/");
        let facts = Facts { method, target, scheme, authorities, upgrade, websocket, instead };
        bind(&facts, &origin(port)).ok()
    }

    #[test]
    fn every_authority_is_the_judged_one() {
        assert_eq!(bound(&[], 443).as_deref(), Some("api.test"));
        assert_eq!(bound(&[], 8443).as_deref(), Some("api.test:8443"));
        assert_eq!(bound(&[b"API.test."], 443).as_deref(), Some("api.test"));
        assert_eq!(bound(&[b"api.test:443"], 443).as_deref(), Some("api.test:443"));
        assert_eq!(bound(&[b"api.test", b"api.test:443"], 443).as_deref(), Some("api.test"));
        for bad in [
            &[&b"other.test"[..]][..],
            &[b"api.test:80"],
            &[b"api.test", b"other.test"],
            &[b"other.test", b"api.test"],
            &[b"api.test", b"api.test", b"other.test"],
            &[b"u@api.test"],
            &[b"\xff"],
            &[b""],
        ] {
            assert_eq!(bound(bad, 443), None, "{bad:?}");
        }
    }

    #[test]
    fn protocols_that_are_http_again() {
        for http in [&b"h2c"[..], b"H2C", b"websocket, h2c", b"h2", b"HTTP/2.0", b"a,h2c/1"] {
            assert!(names_http(http), "{http:?}");
        }
        for other in [&b"websocket"[..], b"TLS/1.0", b"h2cx", b"", b","] {
            assert!(!names_http(other), "{other:?}");
        }
    }
}

//! What goes on when the policy changes: judged again, and ended where it is not allowed any more.
//!
//! A tunnel, a WebSocket, a request whose body or answer is under way: each was allowed once, and
//! lasts only as long as the rules in force allow it. Asked are the same questions as at its
//! beginning, with what is known of it; what cannot be judged any more (bytes that were copied
//! unread, where requests are to be judged now) is not allowed.

use std::net::IpAddr;

use super::destination::{self, Origin};
use super::report;
use super::session::{NotAdmitted, Session};
use crate::policy::{CanonicalTarget, Inspect, Inspection, Payload, Request, TlsMode, Verdict};

/// A connection that its caller may have, with the rules that say so.
#[derive(Clone)]
pub(crate) struct Admitted {
    pub(crate) session: Session,
    pub(crate) origin: Origin,
}

/// What goes on over it.
#[derive(Clone, Copy)]
pub(crate) enum Doing<'a> {
    /// Nothing has passed yet.
    Nothing,
    /// Bytes are copied unread. `skipped`: because the endpoint says `tls: skip`.
    Copying { skipped: bool },
    /// A request is under way.
    Request(Asked<'a>),
    /// Messages pass.
    WebSocket { path: &'a str, query: &'a [(String, String)] },
}

/// A request as it was judged.
#[derive(Clone, Copy)]
pub(crate) struct Asked<'a> {
    pub(crate) method: &'a str,
    /// None where the endpoint was not inspected.
    pub(crate) canonical: Option<&'a CanonicalTarget>,
    /// What its content says, where that was read, and what it was read for.
    pub(crate) payload: Option<(&'a Payload, &'a Inspection)>,
    /// Methods that a server may take instead.
    pub(crate) overrides: &'a [String],
    /// It is the handshake of a WebSocket.
    pub(crate) websocket: bool,
}

const NOT_JUDGED: &str = "requests to this endpoint are judged now";

impl Admitted {
    /// Asks the rules in force whether this may go on; they are the session's then. `upstream` is
    /// the address that is connected to. Otherwise why it may not, which is reported.
    pub(crate) async fn stays(
        &mut self,
        doing: Doing<'_>,
        upstream: Option<IpAddr>,
    ) -> Result<(), String> {
        while !self.session.is_current() {
            match self.renewed(doing, upstream).await {
                Ok(renewed) => *self = renewed,
                Err(why) => {
                    report::revoked(&self.session, &self.origin, &why);
                    return Err(why);
                }
            }
        }
        Ok(())
    }

    /// Ends when this may not go on: why, which is reported.
    pub(crate) async fn revoked(
        &mut self,
        doing: Doing<'_>,
        upstream: impl Fn() -> Option<IpAddr>,
    ) -> String {
        loop {
            self.session.outdated().await;
            if let Err(why) = self.stays(doing, upstream()).await {
                return why;
            }
        }
    }

    /// The same for one of several streams that share it.
    pub(crate) async fn revoked_for_one(
        &self,
        doing: Doing<'_>,
        upstream: impl Fn() -> Option<IpAddr>,
    ) -> String {
        self.session.outdated().await;
        self.clone().revoked(doing, upstream).await
    }

    async fn renewed(&self, doing: Doing<'_>, upstream: Option<IpAddr>) -> Result<Self, String> {
        let session = self.session.renewed().await.map_err(|error| error.to_string())?;
        let Origin { host, port, .. } = &self.origin;
        let grant = session.judge(host, *port).await.map_err(|why| match why {
            NotAdmitted::Policy(denial) => denial.reason,
            NotAdmitted::Caller(error) => error.to_string(),
        })?;
        let origin = Origin { host: host.clone(), port: *port, grant };
        if let Some(ip) = upstream {
            destination::may_stay(&session, &origin, ip).map_err(|error| error.to_string())?;
        }
        let renewed = Self { session, origin };
        renewed.allows(doing)?;
        Ok(renewed)
    }

    fn allows(&self, doing: Doing<'_>) -> Result<(), String> {
        let grant = &self.origin.grant;
        let inspected = grant.inspect == Inspect::Rest;
        let asked = match doing {
            Doing::Copying { .. } if inspected => return Err(NOT_JUDGED.to_owned()),
            Doing::Copying { skipped: true } if grant.tls != TlsMode::Skip => {
                return Err("TLS to this endpoint is not passed through any more".to_owned());
            }
            Doing::Nothing | Doing::Copying { .. } => return Ok(()),
            _ if !inspected => return Ok(()),
            Doing::Request(asked) => asked,
            Doing::WebSocket { path, query } => {
                let (method, payload, overrides) = ("GET", None, &[][..]);
                return self.verdict(&Request { method, path, query, payload, overrides }, true);
            }
        };
        let Asked { method, canonical, payload, overrides, websocket } = asked;
        // Nobody has looked at what else it asks for (another protocol, another target).
        let Some(canonical) = canonical else { return Err(NOT_JUDGED.to_owned()) };
        let (path, query) = (canonical.path.as_str(), &canonical.pairs[..]);
        // Nor at what the content says beside what was asked for then.
        let (session, origin) = (&self.session, &self.origin);
        let (caller, host) = (session.caller(), &origin.host);
        let wanted = session.policy().inspection(caller, host, origin.port, path);
        let wanted = wanted.filter(|_| !websocket);
        if wanted.is_some_and(|wanted| !payload.is_some_and(|(_, read)| read.covers(&wanted))) {
            return Err(NOT_JUDGED.to_owned());
        }
        let payload = payload.map(|(payload, _)| payload);
        let request = Request { method, path, query, payload, overrides };
        self.verdict(&request, websocket)
    }

    fn verdict(&self, request: &Request<'_>, websocket: bool) -> Result<(), String> {
        let Self { session, origin } = self;
        let (policy, caller) = (session.policy(), session.caller());
        let verdict = if websocket {
            policy.websocket(caller, &origin.host, origin.port, request)
        } else {
            policy.request(caller, &origin.host, origin.port, request)
        };
        match verdict {
            Verdict::Allow { .. } | Verdict::Audit { .. } => Ok(()),
            Verdict::Deny(denial) => Err(denial.reason),
        }
    }
}

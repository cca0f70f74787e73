//! One connection of the agent: who it comes from, and the first of the two judgements.

use std::sync::Arc;

use super::caller::{CallerError, Identity};
use super::destination::{DialError, Origin};
use super::metrics::{self, Layer, Verdict};
use super::refusal::Refusal;
use super::{Shared, report};
use crate::policy::{Caller, Connect, Denial, Grant, Host};

/// A connection whose caller is known; each of its streams may have it.
#[derive(Clone)]
pub(crate) struct Session {
    pub(crate) shared: Arc<Shared>,
    identity: Arc<Identity>,
}

/// Why a connection may not be made.
pub(crate) enum NotAdmitted {
    /// No policy allows it.
    Policy(Denial),
    /// One does, but the executable is not to be trusted.
    Caller(CallerError),
}

impl Session {
    pub(crate) fn new(shared: Arc<Shared>, identity: Identity) -> Self {
        Self { shared, identity: Arc::new(identity) }
    }

    pub(crate) fn caller(&self) -> &Caller {
        &self.identity.caller
    }

    pub(crate) fn pid(&self) -> u32 {
        self.identity.pid
    }

    /// May the caller connect there? Nothing is resolved or dialled before this says yes. `what`
    /// is the method, for the refusal.
    pub(crate) async fn admit(&self, what: &str, host: Host, port: u16) -> Result<Origin, Refusal> {
        match self.judge(&host, port).await {
            Ok(grant) => Ok(Origin { host, port, grant }),
            Err(NotAdmitted::Policy(denial)) => {
                report::connect_denied(self, &host, port, &denial);
                Err(Refusal::connection(what, &host, port, &denial))
            }
            Err(NotAdmitted::Caller(error)) => {
                report::caller_not_trusted(self, &host, port, &error);
                let detail = format!("{what} {host}:{port} not permitted by policy");
                Err(Refusal::new(403, "policy_denied", &detail).because(&error.to_string()))
            }
        }
    }

    /// The same question, with nothing said about a no.
    pub(crate) async fn judge(&self, host: &Host, port: u16) -> Result<Grant, NotAdmitted> {
        match self.shared.policy.connect(self.caller(), host, port) {
            Connect::Deny(denial) => Err(NotAdmitted::Policy(denial)),
            // Only what would pass is worth reading an executable for.
            Connect::Allow(grant) => match self.shared.executables.verify(&self.identity).await {
                Ok(()) => {
                    if let Some(why) = &self.caller().tainted {
                        report::caller_tainted(self, host, port, why);
                    }
                    let verdict = if grant.unread { Verdict::Audited } else { Verdict::Allowed };
                    metrics::decided(Layer::L4, verdict, &grant.policy);
                    Ok(grant)
                }
                Err(error) => Err(NotAdmitted::Caller(error)),
            },
        }
    }

    /// What a client is told when the destination could not be reached.
    pub(crate) fn unreachable(&self, what: &str, origin: &Origin, error: &DialError) -> Refusal {
        report::dial_failed(self, origin, error);
        let Origin { host, port, .. } = origin;
        let (status, code) = match error {
            DialError::Forbidden { check, reason, .. } => {
                let detail = format!("{what} {host}:{port} blocked: {check}");
                return Refusal::new(403, "ssrf_denied", &detail).because(reason);
            }
            DialError::NotByProxy(reason) => {
                let detail = format!("{what} {host}:{port} blocked: internal address");
                return Refusal::new(403, "ssrf_denied", &detail).because(reason);
            }
            DialError::Proxy(_) => (502, "upstream_proxy_failed"),
            DialError::Timeout(_) => (504, "upstream_timeout"),
            DialError::Tls(_) => (502, "upstream_tls_failed"),
            DialError::Resolve(_) | DialError::Connect(_) => (502, "upstream_unreachable"),
        };
        let detail = format!("{what} {host}:{port} failed");
        Refusal::new(status, code, &detail).because(&error.to_string())
    }
}

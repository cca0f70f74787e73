//! One connection of the agent: who it comes from, and the first of the two judgements.

use std::sync::Arc;

use super::caller::{CallerError, Identity};
use super::destination::{DialError, Origin};
use super::metrics::{self, Layer, Verdict};
use super::refusal::Refusal;
use super::rules::{Alarm, Rules};
use super::standing::Admitted;
use super::upstream::UpstreamTls;
use super::{Shared, report};
use crate::policy::{Caller, Connect, Denial, Grant, Host, Policy};

/// A connection whose caller is known, under one generation of rules; each of its streams may have
/// it.
#[derive(Clone)]
pub(crate) struct Session {
    pub(crate) shared: Arc<Shared>,
    rules: Arc<Rules>,
    alarm: Arc<Alarm>,
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
    /// `rules` are those that the caller was identified for.
    pub(crate) fn new(shared: Arc<Shared>, rules: Arc<Rules>, identity: Identity) -> Self {
        let alarm = Arc::new(shared.rules.alarm());
        Self { shared, rules, alarm, identity: Arc::new(identity) }
    }

    pub(crate) fn policy(&self) -> &Policy {
        &self.rules.policy
    }

    pub(crate) fn upstream_tls(&self) -> &UpstreamTls {
        &self.rules.upstream_tls
    }

    /// The generation of its rules.
    pub(crate) fn generation(&self) -> u64 {
        self.rules.number
    }

    /// Whether its rules are in force.
    pub(crate) fn is_current(&self) -> bool {
        self.shared.rules.is(&self.rules)
    }

    /// Ends when its rules are not in force any more.
    pub(crate) async fn outdated(&self) {
        self.alarm.outdated(&self.rules).await;
    }

    /// The same connection under the rules in force, which may ask more about its caller.
    pub(crate) async fn renewed(&self) -> Result<Self, CallerError> {
        if self.is_current() {
            return Ok(self.clone());
        }
        let rules = self.shared.rules.load();
        let identity = self.identity.seen_by(&rules.policy, &self.shared.executables).await?;
        let (shared, alarm) = (Arc::clone(&self.shared), Arc::clone(&self.alarm));
        Ok(Self { shared, rules, alarm, identity })
    }

    pub(crate) fn caller(&self) -> &Caller {
        &self.identity.caller
    }

    pub(crate) fn pid(&self) -> u32 {
        self.identity.pid
    }

    /// May the caller connect there? Nothing is resolved or dialled before this says yes. `what`
    /// is the method, for the refusal. Asked are the rules in force.
    pub(crate) async fn admit(
        &self,
        what: &str,
        host: Host,
        port: u16,
    ) -> Result<Admitted, Refusal> {
        let (session, judged) = match self.renewed().await {
            Ok(session) => {
                let judged = session.judge(&host, port).await;
                (session, judged)
            }
            Err(error) => (self.clone(), Err(NotAdmitted::Caller(error))),
        };
        match judged {
            Ok(grant) => Ok(Admitted { session, origin: Origin { host, port, grant } }),
            Err(NotAdmitted::Policy(denial)) => {
                report::connect_denied(&session, &host, port, &denial);
                Err(Refusal::connection(what, &host, port, &denial))
            }
            Err(NotAdmitted::Caller(error)) => {
                report::caller_not_trusted(&session, &host, port, &error);
                let detail = format!("{what} {host}:{port} not permitted by policy");
                Err(Refusal::new(403, "policy_denied", &detail).because(&error.to_string()))
            }
        }
    }

    /// The same question, with nothing said about a no.
    pub(crate) async fn judge(&self, host: &Host, port: u16) -> Result<Grant, NotAdmitted> {
        match self.policy().connect(self.caller(), host, port) {
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

//! A policy whose verdicts a Rego text gives.
//!
//! The text decides what may pass; what is safe to do with its answer is decided here: which
//! addresses, what is read, which of the policy's own demands it cannot lift.
#![forbid(unsafe_code)]

use std::sync::Arc;

use serde_json::Value as Json;

use super::config::Egress;
use super::contract::{Action, Answer, Contract, input};
use super::data;
use super::memory::{Memory, Question};
use super::runner::{Fault, Runner};
use crate::policy::decision::{Caller, Connect, Denial, Grant, Inspect, Request, TlsMode, Verdict};
use crate::policy::engine::{
    DENY_RULE, ENCODED_SLASH, NEAR, NO_LINE, NO_NEAR, Policy, UNREADABLE, rule_line,
};
use crate::policy::host::Host;
use crate::policy::payload::{Graphql, Inspection};
use crate::policy::suggestion::printable;

/// A text, its data, and what it answered before.
#[derive(Debug, Clone)]
pub(in crate::policy) struct Judge {
    runner: Runner,
    data: Json,
    contract: Contract,
    /// Why the text cannot be asked.
    broken: Option<Fault>,
    connections: Memory<Arc<Egress>>,
    requests: Memory<Answer>,
}

const REFUSED: &str = "policy.rego does not allow this";
const UNINSPECTED: &str = "policy.yaml inspects this endpoint, and policy.rego gives no \
                           configuration with `protocol` for it: requests would pass unjudged";
const NO_NAME: &str = "policy.rego";
const BROKEN: &str = "# policy.rego could not be evaluated: mend it, no line of policy.yaml helps";
const ONLY_REGO: &str = "# policy.yaml allows this; policy.rego refuses it: change the rule there";
const LINES: &str = "# policy.rego decides; if it goes by policy.yaml, these lines are missing:\n";

impl Judge {
    pub(super) fn new(runner: Runner, data: Json, contract: Contract) -> Self {
        Self {
            runner,
            data,
            contract,
            broken: None,
            connections: Memory::default(),
            requests: Memory::default(),
        }
    }

    /// See [`Policy::resolve_binaries`].
    pub fn resolve_binaries(&mut self, resolve: &impl Fn(&str) -> Option<String>) {
        data::resolve_binaries(&mut self.data, resolve);
        self.broken = self.runner.set_data(&self.data).err();
        self.connections = Memory::default();
        self.requests = Memory::default();
    }

    pub fn connect(&self, native: &Policy, caller: &Caller, host: &Host, port: u16) -> Connect {
        let egress = match self.admitted(native, caller, host, port, None) {
            Ok(egress) => egress,
            Err(denial) => return Connect::Deny(denial),
        };
        let inspect = egress.configs.iter().any(|config| config.inspected);
        let skip = egress.configs.iter().any(|config| config.tls_skip);
        let listed = |config: &super::config::Config| !config.allowed_ips.is_empty();
        let allowed_ips: Vec<_> =
            egress.configs.iter().flat_map(|config| config.allowed_ips.iter().copied()).collect();
        Connect::Allow(Grant {
            policy: name(egress.policy.as_deref()),
            inspect: if inspect { Inspect::Rest } else { Inspect::None },
            tls: if skip && !inspect { TlsMode::Skip } else { TlsMode::Auto },
            restricted: egress.configs.iter().any(|config| config.named && listed(config))
                || (!egress.named && !allowed_ips.is_empty()),
            allowed_ips,
            exact_host: egress.exact_host,
            unread: !egress.configs.is_empty() && egress.configs.iter().all(|config| config.unread),
            allow_encoded_slash: egress
                .configs
                .iter()
                .any(|config| config.inspected && config.allow_encoded_slash),
            also: None,
        })
    }

    /// See [`Policy::inspection`].
    pub fn inspection(
        &self,
        native: &Policy,
        caller: &Caller,
        host: &Host,
        port: u16,
        path: &str,
    ) -> Option<Inspection> {
        // Where the connection is refused, so is the request: nothing need be read.
        let egress = self.admitted(native, caller, host, port, None).ok()?;
        let max_bytes = egress.configs.iter().filter_map(|config| config.reads(path)).min()?;
        Some(Inspection { max_bytes, graphql: true, rpc: None })
    }

    pub fn request(
        &self,
        native: &Policy,
        caller: &Caller,
        host: &Host,
        port: u16,
        request: &Request<'_>,
    ) -> Verdict {
        let egress = match self.admitted(native, caller, host, port, Some(request)) {
            Ok(egress) => egress,
            Err(denial) => return Verdict::Deny(denial),
        };
        if !egress.configs.iter().any(|config| config.inspected) {
            return Verdict::Allow { policy: name(egress.policy.as_deref()) };
        }
        let deny = |policy, reason, suggestion| {
            Verdict::Deny(Denial { policy, reason, rule: rule_line(request), suggestion })
        };
        let suggest = || suggestion(native, caller, host, port, Some(request));
        let graphql = request.payload.and_then(|payload| payload.graphql.as_ref());
        if egress.configs.iter().any(|config| config.reads(request.path).is_some())
            && let Some(why) = unreadable(graphql)
        {
            // In audit too: nobody knows what would pass.
            return deny(name(egress.policy.as_deref()), why, UNREADABLE.into());
        }
        let mut question = question(caller, host, port);
        question.part(format!("{graphql:?}").as_bytes());
        question.part(request.method.as_bytes());
        question.part(request.path.as_bytes());
        for (key, value) in request.query {
            question.part(key.as_bytes());
            question.part(value.as_bytes());
        }
        let answered = self.requests.get(question, || {
            let mut asking = self.runner.ask(&input(caller, host, port, Some(request)));
            self.contract.request(&mut asking, &egress, request.path)
        });
        let answer = match answered {
            Ok(answer) => answer,
            Err(fault) => return Verdict::Deny(broken(&fault, Some(request))),
        };
        let policy = name(answer.policy.as_deref().or(egress.policy.as_deref()));
        let reason = answer.reason.unwrap_or_else(|| REFUSED.into());
        // What the endpoints say of `%2F` holds whatever the text says.
        let takes_slash = !request.path.contains("%2F")
            || egress
                .configs
                .iter()
                .any(|config| config.allow_encoded_slash && config.covers(request.path));
        // So do its deny rules: a text compares paths as they are written, a server may not.
        let [audited, enforced] = native.denied(caller, host, port, request);
        if let Some(by) = enforced {
            return deny(by.to_owned(), DENY_RULE.into(), NO_LINE.into());
        }
        if answer.action != Action::Deny
            && let Some(near) = native.near(caller, host, port, request.path)
        {
            return deny(near.to_owned(), NEAR.into(), NO_NEAR.into());
        }
        match answer.action {
            Action::Allow | Action::Audit if !takes_slash => {
                deny(policy, ENCODED_SLASH.into(), suggest())
            }
            Action::Allow => match audited {
                Some(by) => Verdict::Audit { policy: by.to_owned(), reason: DENY_RULE.into() },
                None => Verdict::Allow { policy },
            },
            Action::Audit => Verdict::Audit { policy, reason },
            Action::Deny => deny(policy, reason, suggest()),
        }
    }

    /// The text's answer about the connection, if it is a yes.
    fn admitted(
        &self,
        native: &Policy,
        caller: &Caller,
        host: &Host,
        port: u16,
        request: Option<&Request<'_>>,
    ) -> Result<Arc<Egress>, Denial> {
        let asked = self.connections.get(question(caller, host, port), || {
            self.ask(native, caller, host, port).map(Arc::new)
        });
        let egress = asked.map_err(|fault| broken(&fault, request))?;
        if egress.allowed {
            return Ok(egress);
        }
        Err(Denial {
            policy: "-".into(),
            reason: egress.reason.clone().unwrap_or_else(|| REFUSED.into()),
            rule: request.map(rule_line).unwrap_or_default(),
            suggestion: suggestion(native, caller, host, port, None),
        })
    }

    fn ask(
        &self,
        native: &Policy,
        caller: &Caller,
        host: &Host,
        port: u16,
    ) -> Result<Egress, Fault> {
        if let Some(fault) = &self.broken {
            return Err(fault.clone());
        }
        let mut asking = self.runner.ask(&input(caller, host, port, None));
        let mut egress = self.contract.egress(&mut asking)?;
        if egress.allowed {
            // What the policy's entries ask beside a path is not the text's to forget, nor is the
            // inspection that the policy asks for.
            let refusal = native.guarded_refusal(caller, host, port).or_else(|| {
                let inspected = egress.configs.iter().any(|config| config.inspected);
                (!inspected && native.inspects(caller, host, port)).then(|| UNINSPECTED.into())
            });
            if refusal.is_some() {
                egress.allowed = false;
                egress.reason = refusal;
            }
        }
        Ok(egress)
    }
}

/// Why a request to a `GraphQL` endpoint cannot be judged.
fn unreadable(graphql: Option<&Graphql>) -> Option<String> {
    match graphql {
        None => Some("the content of the request was not read".into()),
        Some(Graphql { error: Some(error), .. }) => {
            Some(format!("GraphQL that cannot be judged: {}", printable(error)))
        }
        Some(graphql) if graphql.operations.is_empty() => {
            Some("GraphQL that cannot be judged: no operation".into())
        }
        Some(_) => None,
    }
}

fn question(caller: &Caller, host: &Host, port: u16) -> Question {
    let mut question = Question::default();
    question.part(caller.exe.as_bytes());
    question.part(&caller.ancestors.len().to_le_bytes());
    for ancestor in &caller.ancestors {
        question.part(ancestor.as_bytes());
    }
    question.part(caller.sha256.as_ref().map_or(&[], |sha256| sha256));
    question.part(&[u8::from(caller.tainted.is_some())]);
    question.part(caller.tainted.as_deref().unwrap_or_default().as_bytes());
    question.part(host.as_str().as_bytes());
    question.part(&port.to_le_bytes());
    question
}

fn name(policy: Option<&str>) -> String {
    policy.unwrap_or(NO_NAME).to_owned()
}

fn broken(fault: &Fault, request: Option<&Request<'_>>) -> Denial {
    Denial {
        policy: "-".into(),
        reason: format!("policy.rego failed: {fault}"),
        rule: request.map(rule_line).unwrap_or_default(),
        suggestion: BROKEN.into(),
    }
}

/// The lines that policy.yaml lacks, if it is what refuses.
fn suggestion(
    native: &Policy,
    caller: &Caller,
    host: &Host,
    port: u16,
    request: Option<&Request<'_>>,
) -> String {
    let lines = match request {
        Some(request) => match native.request_natively(caller, host, port, request) {
            Verdict::Deny(denial) => Some(denial.suggestion),
            Verdict::Allow { .. } | Verdict::Audit { .. } => None,
        },
        None => match native.connect_natively(caller, host, port) {
            Connect::Deny(denial) => Some(denial.suggestion),
            Connect::Allow(_) => None,
        },
    };
    match lines {
        Some(lines) if lines.starts_with('#') => lines,
        Some(lines) => format!("{LINES}{lines}"),
        None => ONLY_REGO.into(),
    }
}

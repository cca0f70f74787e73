//! The rules that a text must have, and what is asked of them.
//!
//! There are two contracts. Up to `OpenShell` 0.0.110 five rules describe a connection
//! (`network_action` and what goes with it), from 0.0.111 on one does (`egress_authorization`).
//! Requests are judged by `allow_request` and `request_deny_reason` in both. A text that has rules of
//! both contracts is asked by the later one.
#![forbid(unsafe_code)]

use serde_json::{Value as Json, json};

use super::config::{self, Config, Egress, shape, unknown};
use super::runner::{Asking, Fault, Runner};
use crate::policy::decision::{Caller, Request};
use crate::policy::digest::to_hex;
use crate::policy::host::Host;
use crate::policy::payload::{Operation, OperationKind, Persisted};

/// The rules of the configuration, each with the key of `policy.yaml` that it stands for.
pub(super) const SECTIONS: [(&str, &str); 3] = [
    ("filesystem_policy", "filesystem_policy"),
    ("landlock_policy", "landlock"),
    ("process_policy", "process"),
];
const CONNECTION: [&str; 5] = [
    "network_action",
    "matched_network_policy",
    "deny_reason",
    "_matching_endpoint_configs",
    "exact_declared_endpoint_host",
];
const EGRESS: &str = "egress_authorization";
const REQUEST: [&str; 2] = ["allow_request", "request_deny_reason"];
/// Ours, and optional: one rule for a request, that says `audit` too.
const AUTHORIZATION: &str = "request_authorization";
/// Later versions of `OpenShell` send requests through services that this rule names.
const MIDDLEWARES: &str = "network_middlewares";

/// Which rules the text has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Contract {
    egress: bool,
    authorization: bool,
    middlewares: bool,
}

/// What the text says about a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Answer {
    pub action: Action,
    /// The policy that it names, and its words for a refusal. Printable ASCII, bounded.
    pub policy: Option<String>,
    pub reason: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Action {
    Allow,
    Audit,
    Deny,
}

impl Contract {
    /// Looks which contract the text keeps; else the rules that it lacks.
    pub fn detect(runner: &Runner) -> Result<Self, Vec<&'static str>> {
        let egress = runner.declares(EGRESS);
        let connection: &[&str] = if egress { &[EGRESS] } else { &CONNECTION };
        let sections = SECTIONS.iter().map(|(rule, _)| rule);
        let needed = connection.iter().chain(&REQUEST).chain(sections).copied();
        let missing: Vec<_> = needed.filter(|rule| !runner.declares(rule)).collect();
        if !missing.is_empty() {
            return Err(missing);
        }
        Ok(Self {
            egress,
            authorization: runner.declares(AUTHORIZATION),
            middlewares: runner.declares(MIDDLEWARES),
        })
    }

    /// The rules that are asked about a connection, or about a request: the telling ones first.
    pub fn rules(self, request: bool) -> &'static [&'static str] {
        match (request, self.egress, self.authorization) {
            (true, _, true) => &[AUTHORIZATION],
            (true, _, false) => &REQUEST,
            (false, true, _) => &[EGRESS],
            (false, false, _) => &[
                "_matching_endpoint_configs",
                "network_action",
                "matched_network_policy",
                "deny_reason",
                "exact_declared_endpoint_host",
            ],
        }
    }

    /// May the caller connect?
    pub fn egress(self, asking: &mut Asking) -> Result<Egress, Fault> {
        let egress = if self.egress { one_rule(asking) } else { five_rules(asking) }?;
        if egress.allowed
            && self.middlewares
            && asking
                .rule(MIDDLEWARES)?
                .is_some_and(|found| found != json!({}) && found != json!([]))
        {
            return Err(Fault::new(
                "network_middlewares are not supported: traffic would pass them by",
            ));
        }
        Ok(egress)
    }

    /// May the request pass? `egress` is the connection's answer.
    pub fn request(
        self,
        asking: &mut Asking,
        egress: &Egress,
        path: &str,
    ) -> Result<Answer, Fault> {
        if self.authorization {
            return authorization(asking);
        }
        let [allow, reason] = REQUEST;
        if config::yes(allow, asking.rule(allow)?.as_ref())? {
            return Ok(Answer { action: Action::Allow, policy: None, reason: None });
        }
        let reason = config::words(reason, asking.rule(reason)?.as_ref())?;
        // The contract does not say which endpoint refused: one that enforces, or that takes no
        // encoded slash where there is one, is enough.
        let slash = path.contains("%2F");
        let audits = |config: &Config| !config.enforce && (!slash || config.allow_encoded_slash);
        let mut covering = egress.configs.iter().filter(|config| config.covers(path)).peekable();
        let audit = covering.peek().is_some() && covering.all(audits);
        let action = if audit { Action::Audit } else { Action::Deny };
        Ok(Answer { action, policy: None, reason })
    }
}

fn action(rule: &str, value: Option<&Json>) -> Result<bool, Fault> {
    match value {
        None => Ok(false),
        Some(Json::String(word)) if word == "allow" => Ok(true),
        Some(Json::String(word)) if word == "deny" => Ok(false),
        Some(Json::String(word)) => Err(unknown(rule, word)),
        Some(other) => Err(shape(rule, "\"allow\" or \"deny\"", other)),
    }
}

fn five_rules(asking: &mut Asking) -> Result<Egress, Fault> {
    let [network_action, matched, reason, configs, exact] = CONNECTION;
    if !action(network_action, asking.rule(network_action)?.as_ref())? {
        return Ok(refused(config::words(reason, asking.rule(reason)?.as_ref())?));
    }
    let found = asking.rule(configs)?;
    let configs = config::configs(Some(found.as_ref().ok_or_else(|| no_value(configs))?))?;
    let exact_host = config::yes(exact, asking.rule(exact)?.as_ref())?;
    Ok(Egress {
        allowed: true,
        policy: config::words(matched, asking.rule(matched)?.as_ref())?,
        reason: None,
        named: exact_host || configs.iter().any(|config| config.named),
        configs,
        exact_host,
    })
}

fn one_rule(asking: &mut Asking) -> Result<Egress, Fault> {
    let value = asking.rule(EGRESS)?.ok_or_else(|| no_value(EGRESS))?;
    let Json::Object(fields) = &value else {
        return Err(shape(EGRESS, "an object", &value));
    };
    if !action("egress_authorization.action", fields.get("action"))? {
        return Ok(refused(config::words("deny_reason", fields.get("deny_reason"))?));
    }
    let found = fields.get("endpoint_configs");
    let found = found.ok_or_else(|| no_value("egress_authorization.endpoint_configs"))?;
    let configs = config::configs(Some(found))?;
    let exact = "exact_declared_endpoint_host";
    let exact_host = config::yes(exact, fields.get(exact))?;
    let named = config::names_host(fields.get("matched_endpoints"))?;
    Ok(Egress {
        allowed: true,
        policy: config::words("matched_policy", fields.get("matched_policy"))?,
        reason: None,
        named: named || exact_host || configs.iter().any(|config| config.named),
        configs,
        exact_host,
    })
}

fn refused(reason: Option<String>) -> Egress {
    Egress {
        allowed: false,
        policy: None,
        reason,
        configs: Vec::new(),
        exact_host: false,
        named: false,
    }
}

fn authorization(asking: &mut Asking) -> Result<Answer, Fault> {
    let value = asking.rule(AUTHORIZATION)?.ok_or_else(|| no_value(AUTHORIZATION))?;
    let Json::Object(fields) = &value else {
        return Err(shape(AUTHORIZATION, "an object", &value));
    };
    let action = match fields.get("action").and_then(Json::as_str) {
        Some("allow") => Action::Allow,
        Some("audit") => Action::Audit,
        Some("deny") => Action::Deny,
        _ => {
            let what = "request_authorization.action must be \"allow\", \"audit\" or \"deny\"";
            return Err(Fault::new(what));
        }
    };
    Ok(Answer {
        action,
        policy: config::words("matched_policy", fields.get("matched_policy"))?,
        reason: config::words("deny_reason", fields.get("deny_reason"))?,
    })
}

/// An absent value must not pass for "nothing to inspect".
fn no_value(rule: &str) -> Fault {
    Fault::new(format!("{rule} has no value: requests would pass unjudged"))
}

/// The input of a question.
pub(super) fn input(
    caller: &Caller,
    host: &Host,
    port: u16,
    request: Option<&Request<'_>>,
) -> Json {
    let mut input = json!({
        "exec": { "path": caller.exe, "ancestors": caller.ancestors, "cmdline_paths": [] },
        "network": { "host": host.as_str(), "port": port },
    });
    // Ours; absent where they are not known.
    if let Some(sha256) = &caller.sha256 {
        input["exec"]["sha256"] = to_hex(sha256).into();
    }
    if let Some(tainted) = &caller.tainted {
        input["exec"]["tainted"] = tainted.clone().into();
    }
    if let Some(request) = request {
        let mut query = serde_json::Map::new();
        for (key, value) in request.query {
            let values = query.entry(key.as_str()).or_insert_with(|| json!([]));
            if let Json::Array(values) = values {
                values.push(value.clone().into());
            }
        }
        input["request"] =
            json!({ "method": request.method, "path": request.path, "query_params": query });
        if let Some(graphql) = request.payload.and_then(|payload| payload.graphql.as_ref()) {
            let operations: Json = graphql.operations.iter().map(operation).collect();
            input["request"]["graphql"] =
                json!({ "operations": operations, "error": graphql.error });
        }
    }
    input
}

/// An operation as `OpenShell` describes it: what is not known is empty.
fn operation(operation: &Operation) -> Json {
    let mut described = json!({
        "operation_type": operation.kind.map_or("", OperationKind::word),
        "operation_name": operation.name.as_deref().unwrap_or_default(),
        "fields": operation.fields,
        "persisted_query": operation.persisted.is_some(),
    });
    match &operation.persisted {
        Some(Persisted::Hash(hash)) => described["persisted_query_hash"] = hash.clone().into(),
        Some(Persisted::Id(id)) => described["persisted_query_id"] = id.clone().into(),
        None => {}
    }
    described
}

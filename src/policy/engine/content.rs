//! Rules for what requests say in their content: operations of `GraphQL`, calls of JSON-RPC.
#![forbid(unsafe_code)]

use std::collections::HashMap;

use crate::policy::glob::{Scope, ValueGlob};
use crate::policy::payload::short;
use crate::policy::payload::{
    Call, Exchange, Graphql, Inspection, Message, Operation, OperationKind, Payload, Rpc,
    RpcInspection,
};
use crate::policy::suggestion::printable;

/// The method that calls a tool, in MCP.
pub(super) const TOOLS_CALL: &str = "tools/call";

/// What an MCP client sends to a server (revision 2025-11-25 and those before it).
const KNOWN_METHODS: &[&str] = &[
    "completion/complete",
    "initialize",
    "logging/setLevel",
    "notifications/cancelled",
    "notifications/initialized",
    "notifications/progress",
    "notifications/roots/list_changed",
    "notifications/tasks/status",
    "ping",
    "prompts/get",
    "prompts/list",
    "resources/list",
    "resources/read",
    "resources/subscribe",
    "resources/templates/list",
    "resources/unsubscribe",
    "tasks/cancel",
    "tasks/get",
    "tasks/list",
    "tasks/result",
    TOOLS_CALL,
    "tools/list",
];

/// The rules of an endpoint whose content is read.
#[derive(Debug, Clone)]
pub(super) struct ContentRules {
    /// In bytes.
    pub max: usize,
    /// The endpoint's path in lower case, if it has one.
    pub near: Option<Scope>,
    pub kind: Kind,
}

#[derive(Debug, Clone)]
pub(super) enum Kind {
    Graphql(GraphqlRules),
    Rpc(RpcRules),
}

#[derive(Debug, Clone, Default)]
pub(super) struct GraphqlRules {
    pub allow: Vec<OperationRule>,
    pub deny: Vec<OperationRule>,
    /// By hash or id; empty where none is allowed.
    pub registry: HashMap<String, Registered>,
}

#[derive(Debug, Clone)]
pub(super) struct OperationRule {
    /// `None`: any.
    pub kind: Option<OperationKind>,
    pub name: Option<ValueGlob>,
    /// Empty: any.
    pub fields: Vec<ValueGlob>,
}

/// What a persisted query does, in the words of the policy.
#[derive(Debug, Clone)]
pub(super) struct Registered {
    /// `None`: anything.
    pub kind: Option<OperationKind>,
    pub name: Option<String>,
    /// `None`: unknown.
    pub fields: Option<Vec<String>>,
}

#[derive(Debug, Clone, Default)]
pub(super) struct RpcRules {
    pub mcp: bool,
    /// Names of tools have letters, digits, `_`, `.` and `-` only.
    pub strict_tool_names: bool,
    /// The endpoint names paths: GET and DELETE reach only those.
    pub scoped: bool,
    pub allow: Vec<CallRule>,
    pub deny: Vec<CallRule>,
}

#[derive(Debug, Clone)]
pub(super) struct CallRule {
    pub method: CallMethod,
    /// Empty: any tool.
    pub tool: Vec<ValueGlob>,
    pub params: Vec<(String, Vec<ValueGlob>)>,
}

#[derive(Debug, Clone)]
pub(super) enum CallMethod {
    Any,
    /// Those that the protocol has.
    Known,
    Glob(ValueGlob),
}

impl ContentRules {
    /// Whether deny rules ask for the content.
    pub fn has_denials(&self) -> bool {
        match &self.kind {
            Kind::Graphql(rules) => !rules.deny.is_empty(),
            Kind::Rpc(rules) => !rules.deny.is_empty(),
        }
    }

    /// Whether many servers would take this path, which the endpoint does not cover, for one that it
    /// does: they know no case, no slash at the end, or no difference between a slash, one that is
    /// encoded and a backslash.
    pub fn is_near(&self, path: &str) -> bool {
        self.near.as_ref().is_some_and(|near| {
            let path = path.to_lowercase().replace("%2f", "/").replace("%5c", "/");
            near.allows(&path) || near.allows(path.trim_end_matches('/'))
        })
    }

    /// Adds what this endpoint asks for.
    pub fn ask(&self, inspection: &mut Inspection) {
        inspection.max_bytes = inspection.max_bytes.min(self.max);
        match &self.kind {
            Kind::Graphql(_) => inspection.graphql = true,
            Kind::Rpc(rules) => {
                let asked = inspection.rpc.get_or_insert_with(RpcInspection::default);
                asked.mcp |= rules.mcp;
                for (key, _) in rules.allow.iter().chain(&rules.deny).flat_map(|r| &r.params) {
                    if !asked.params.contains(key) {
                        asked.params.push(key.clone());
                    }
                }
            }
        }
    }

    /// Why the request cannot be judged by this endpoint, if it cannot.
    pub fn unreadable(&self, payload: Option<&Payload>) -> Option<String> {
        match &self.kind {
            Kind::Graphql(_) => match payload.and_then(|payload| payload.graphql.as_ref()) {
                None => Some(NOT_READ.into()),
                Some(Graphql { error: Some(error), .. }) => {
                    Some(format!("GraphQL that cannot be judged: {}", printable(error)))
                }
                Some(graphql) if graphql.operations.is_empty() => Some(NOT_READ.into()),
                Some(_) => None,
            },
            Kind::Rpc(rules) => match payload.and_then(|payload| payload.rpc.as_ref()) {
                None => Some(NOT_READ.into()),
                Some(Rpc { error: Some(error), mcp, .. }) => {
                    let what = if *mcp { "MCP" } else { "JSON-RPC" };
                    Some(format!("{what} that cannot be judged: {}", printable(error)))
                }
                Some(rpc) => rules.unreadable(rpc).map(Into::into),
            },
        }
    }

    /// As [`Self::unreadable`], of a message on a WebSocket, which need not start an operation.
    pub fn unreadable_message(&self, payload: Option<&Payload>) -> Option<String> {
        match payload.and_then(|payload| payload.graphql.as_ref()) {
            Some(Graphql { error: None, .. }) => None,
            _ => self.unreadable(payload),
        }
    }

    /// As [`Self::allows`], of a message on a WebSocket: one that starts nothing is part of what
    /// others need.
    pub fn allows_message(&self, payload: Option<&Payload>) -> Result<(), String> {
        match payload.and_then(|payload| payload.graphql.as_ref()) {
            Some(Graphql { error: None, operations }) if operations.is_empty() => Ok(()),
            _ => self.allows(payload),
        }
    }

    /// Whether everything in a readable request is allowed; otherwise the first that is not.
    pub fn allows(&self, payload: Option<&Payload>) -> Result<(), String> {
        match &self.kind {
            Kind::Graphql(rules) => {
                let graphql = payload.and_then(|payload| payload.graphql.as_ref());
                let operations = &graphql.ok_or(NOT_READ)?.operations;
                if operations.is_empty() {
                    return Err(NOT_READ.into());
                }
                operations.iter().try_for_each(|operation| rules.allows(operation))
            }
            Kind::Rpc(rules) => {
                rules.allows(payload.and_then(|payload| payload.rpc.as_ref()).ok_or(NOT_READ)?)
            }
        }
    }

    /// Whether a deny rule matches anything in a readable request.
    pub fn denies(&self, payload: Option<&Payload>) -> bool {
        match &self.kind {
            Kind::Graphql(rules) => {
                let graphql = payload.and_then(|payload| payload.graphql.as_ref());
                graphql.is_some_and(|graphql| graphql.operations.iter().any(|o| rules.denies(o)))
            }
            Kind::Rpc(rules) => match payload.and_then(|payload| payload.rpc.as_ref()) {
                Some(Rpc { exchange: Exchange::Messages(messages), .. }) => {
                    messages.iter().any(|message| match message {
                        Message::Call(call) => rules.deny.iter().any(|rule| rule.denies(call)),
                        Message::Response => false,
                    })
                }
                _ => false,
            },
        }
    }
}

const NOT_READ: &str = "the content of the request was not read";

impl GraphqlRules {
    fn allows(&self, operation: &Operation) -> Result<(), String> {
        let asked = match operation.kind {
            Some(kind) => Asked::Known(kind, operation),
            None => Asked::Registered(self.registered(operation).ok_or_else(|| {
                let key = operation.persisted.as_ref().map_or("", |persisted| persisted.key());
                format!("the persisted query {} is not registered", short(key))
            })?),
        };
        if self.allow.iter().any(|rule| rule.allows(&asked)) {
            return Ok(());
        }
        Err(format!("no rule allows the {operation}"))
    }

    fn denies(&self, operation: &Operation) -> bool {
        let asked = match operation.kind {
            Some(kind) => Asked::Known(kind, operation),
            None => match self.registered(operation) {
                Some(registered) => Asked::Registered(registered),
                // Not allowed by this endpoint, and another may know it.
                None => return false,
            },
        };
        self.deny.iter().any(|rule| rule.denies(&asked))
    }

    fn registered(&self, operation: &Operation) -> Option<&Registered> {
        self.registry.get(operation.persisted.as_ref()?.key())
    }
}

/// An operation as a rule looks at it.
enum Asked<'a> {
    Known(OperationKind, &'a Operation),
    Registered(&'a Registered),
}

impl OperationRule {
    /// Every root field must match.
    fn allows(&self, asked: &Asked<'_>) -> bool {
        let (kind, name, fields) = match asked {
            Asked::Known(kind, operation) => {
                (Some(*kind), operation.name.as_deref(), Some(&operation.fields))
            }
            Asked::Registered(registered) => {
                (registered.kind, registered.name.as_deref(), registered.fields.as_ref())
            }
        };
        let kind = self.kind.is_none() || self.kind == kind;
        let name = self.name.as_ref().is_none_or(|glob| glob.matches(name.unwrap_or_default()));
        let listed = |field: &String| self.fields.iter().any(|glob| glob.matches(field));
        let fields = self.fields.is_empty()
            || fields.is_some_and(|fields| !fields.is_empty() && fields.iter().all(listed));
        kind && name && fields
    }

    /// One root field is enough; and where the policy does not say what a registered query selects,
    /// it may be what is denied.
    fn denies(&self, asked: &Asked<'_>) -> bool {
        let any = |fields: &[String]| {
            let listed = |field: &String| self.fields.iter().any(|glob| glob.matches(field));
            self.fields.is_empty() || fields.iter().any(listed)
        };
        match asked {
            Asked::Known(kind, operation) => {
                let name = operation.name.as_deref().unwrap_or_default();
                self.kind.is_none_or(|denied| denied == *kind)
                    && self.name.as_ref().is_none_or(|glob| glob.matches(name))
                    && any(&operation.fields)
            }
            Asked::Registered(registered) => {
                let name = registered.name.as_deref().unwrap_or_default();
                self.kind.zip(registered.kind).is_none_or(|(denied, kind)| denied == kind)
                    && self.name.as_ref().is_none_or(|glob| glob.matches(name))
                    && registered.fields.as_deref().is_none_or(any)
            }
        }
    }
}

impl RpcRules {
    fn unreadable(&self, rpc: &Rpc) -> Option<&'static str> {
        let Exchange::Messages(messages) = &rpc.exchange else {
            return None;
        };
        if messages.is_empty() {
            return Some(NOT_READ);
        }
        let calls = || messages.iter().filter_map(Message::call);
        if self.mcp && calls().any(|call| call.method == TOOLS_CALL && call.tool.is_none()) {
            return Some("tools/call without the name of a tool");
        }
        let odd = |call: &Call| call.tool.as_deref().is_some_and(|tool| !is_tool_name(tool));
        (self.mcp && self.strict_tool_names && calls().any(odd)).then_some(
            "the name of a tool has other characters than letters, digits, _ . -, or more than 128",
        )
    }

    fn allows(&self, rpc: &Rpc) -> Result<(), String> {
        let messages = match &rpc.exchange {
            Exchange::Messages(messages) if messages.is_empty() => return Err(NOT_READ.into()),
            Exchange::Messages(messages) => messages,
            Exchange::Stream | Exchange::EndOfSession if self.mcp && self.scoped => return Ok(()),
            Exchange::Stream | Exchange::EndOfSession => return Err(NO_PATH.into()),
        };
        for message in messages {
            match message {
                // It answers what the server asked, and calls nothing.
                Message::Response if self.mcp => {}
                Message::Response => {
                    return Err("a response from the client is no JSON-RPC call".into());
                }
                Message::Call(call) => {
                    if !self.allow.iter().any(|rule| rule.allows(call)) {
                        return Err(match &call.tool {
                            Some(tool) => format!("no rule allows the tool {}", short(tool)),
                            None => format!("no rule allows the method {}", short(&call.method)),
                        });
                    }
                }
            }
        }
        Ok(())
    }
}

const NO_PATH: &str = "GET and DELETE need an endpoint with a `path`: they would reach every path";

impl Message {
    fn call(&self) -> Option<&Call> {
        match self {
            Self::Call(call) => Some(call),
            Self::Response => None,
        }
    }
}

impl CallRule {
    fn matches(&self, call: &Call) -> bool {
        let method = match &self.method {
            CallMethod::Any => true,
            CallMethod::Known => KNOWN_METHODS.contains(&call.method.as_str()),
            CallMethod::Glob(glob) => glob.matches(&call.method),
        };
        let tool = |tool: &String| self.tool.iter().any(|glob| glob.matches(tool));
        method && (self.tool.is_empty() || call.tool.as_ref().is_some_and(tool))
    }

    /// Each value of `params` that is asked for is there, and all of them match.
    fn allows(&self, call: &Call) -> bool {
        self.matches(call)
            && self.params.iter().all(|(key, globs)| {
                let mut values = call.params.iter().filter(|(k, _)| k == key).peekable();
                values.peek().is_some()
                    && values.all(|(_, value)| globs.iter().any(|glob| glob.matches(value)))
            })
    }

    /// One of the values of each is enough; where they have no names, it may be there.
    fn denies(&self, call: &Call) -> bool {
        let matches = |(key, globs): &(String, Vec<ValueGlob>)| {
            let mut values = call.params.iter().filter(|(k, _)| k == key);
            values.any(|(_, value)| globs.iter().any(|glob| glob.matches(value)))
        };
        self.matches(call) && (call.by_position || self.params.iter().all(matches))
    }
}

/// As the protocol recommends, and upstream's `strict_tool_names` asks.
fn is_tool_name(name: &str) -> bool {
    (1..=128).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b))
}

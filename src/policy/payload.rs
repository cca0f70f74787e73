//! What a request says besides its method and path: read by the proxy where
//! [`super::Policy::inspection`] asks for it, judged by the rules of `protocol: graphql`, `json-rpc`
//! and `mcp`.
#![forbid(unsafe_code)]

use std::fmt::{self, Write as _};

use super::suggestion::printable;

/// How the content of a request must be read before it is judged.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Inspection {
    /// Content longer than this is not read: the request is refused (413).
    pub max_bytes: usize,
    /// An endpoint with `protocol: graphql` speaks for the path.
    pub graphql: bool,
    /// One with `protocol: json-rpc` or `mcp` does.
    pub rpc: Option<RpcInspection>,
}

impl Inspection {
    /// What was read for this tells all that `other` asks for.
    #[must_use]
    pub fn covers(&self, other: &Self) -> bool {
        let rpc = match (&self.rpc, &other.rpc) {
            (_, None) => true,
            (None, Some(_)) => false,
            // MCP's framing is held to more than that of JSON-RPC alone.
            (Some(own), Some(other)) => {
                own.mcp == other.mcp && other.params.iter().all(|path| own.params.contains(path))
            }
        };
        rpc && (self.graphql || !other.graphql) && self.max_bytes <= other.max_bytes
    }
}

/// What must be read of JSON-RPC messages.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RpcInspection {
    /// MCP's framing: event streams, sessions, the names of tools.
    pub mcp: bool,
    /// Which values of `params` are asked for: paths of keys with dots between them, as in the
    /// policy. All others are left out.
    pub params: Vec<String>,
}

/// What was read. Of what was asked for, everything must be there: what is missing is refused.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Payload {
    /// Asked for by [`Inspection::graphql`].
    pub graphql: Option<Graphql>,
    /// Asked for by [`Inspection::rpc`].
    pub rpc: Option<Rpc>,
}

/// A `GraphQL` request: every operation that the server could run for it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Graphql {
    /// All must be allowed. Empty only with an error.
    pub operations: Vec<Operation>,
    /// Why it cannot be judged; then it is refused, in audit too. Printable ASCII.
    pub error: Option<String>,
}

/// One `GraphQL` operation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Operation {
    /// What it does; `None` where only the server knows the text ([`Operation::persisted`]).
    pub kind: Option<OperationKind>,
    /// Its name in the document.
    pub name: Option<String>,
    /// The names (not the aliases) of the root fields, those of fragments too; sorted, each once.
    pub fields: Vec<String>,
    /// The hash or id of the text that the server keeps.
    pub persisted: Option<Persisted>,
}

/// What a persisted query is known by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Persisted {
    /// `extensions.persistedQuery.sha256Hash`.
    Hash(String),
    /// `id`, `documentId` or `queryId`.
    Id(String),
}

impl Persisted {
    /// The key of `graphql_persisted_queries`.
    #[must_use]
    pub fn key(&self) -> &str {
        match self {
            Self::Hash(key) | Self::Id(key) => key,
        }
    }
}

/// What an operation does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OperationKind {
    /// Reads.
    Query,
    /// Writes.
    Mutation,
    /// Listens.
    Subscription,
}

impl OperationKind {
    /// `GraphQL`'s own word for it.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Query => "query",
            Self::Mutation => "mutation",
            Self::Subscription => "subscription",
        }
    }
}

/// What a request says in JSON-RPC.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rpc {
    /// Whether it was read as MCP.
    pub mcp: bool,
    /// What it is.
    pub exchange: Exchange,
    /// Why it cannot be judged; then it is refused, in audit too. Printable ASCII.
    pub error: Option<String>,
}

/// The three things that an HTTP request is in MCP; in plain JSON-RPC only the first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Exchange {
    /// Messages in the body. All must be allowed. Empty only with an error.
    Messages(Vec<Message>),
    /// A stream of events is opened (GET).
    Stream,
    /// A session is ended (DELETE).
    EndOfSession,
}

/// A message from the client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// A request or a notification.
    Call(Call),
    /// The answer to something that the server asked.
    Response,
}

/// A call of a method.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Call {
    /// As sent.
    pub method: String,
    /// The tool that `tools/call` names, in MCP.
    pub tool: Option<String>,
    /// The scalars at the paths that were asked for ([`RpcInspection::params`]), each with its path
    /// as in the policy; several at one path where lists hold them.
    pub params: Vec<(String, String)>,
    /// Its `params` are a list: which of them a name stands for, the server alone knows.
    pub by_position: bool,
}

/// A summary is cut here, in bytes.
const MAX_SUMMARY: usize = 200;

impl Payload {
    /// Upstream's word for the protocol that was read.
    #[must_use]
    pub fn protocol(&self) -> &'static str {
        match self {
            Self { graphql: Some(_), .. } => "graphql",
            Self { rpc: Some(Rpc { mcp: true, .. }), .. } => "mcp",
            Self { rpc: Some(_), .. } => "json-rpc",
            _ => "rest",
        }
    }

    /// What the request does, for a log line: `mutation createIssue`, `tools/call search`. Printable
    /// ASCII, at most about 200 bytes.
    #[must_use]
    pub fn summary(&self) -> String {
        let mut out = String::new();
        let operations = self.graphql.iter().flat_map(|graphql| &graphql.operations);
        let messages = match &self.rpc {
            Some(Rpc { exchange: Exchange::Messages(messages), .. }) => messages.as_slice(),
            Some(Rpc { exchange: Exchange::Stream, .. }) => return "event stream".into(),
            Some(Rpc { exchange: Exchange::EndOfSession, .. }) => return "end of session".into(),
            None => &[],
        };
        let parts = operations.map(|operation| operation as &dyn fmt::Display);
        for part in parts.chain(messages.iter().map(|message| message as &dyn fmt::Display)) {
            if !out.is_empty() {
                out.push_str("; ");
            }
            // Writing to a String cannot fail.
            let _ = write!(out, "{part}");
            if out.len() > MAX_SUMMARY {
                out.truncate(MAX_SUMMARY);
                out.push_str("...");
                break;
            }
        }
        out
    }
}

/// `mutation createIssue,addLabel`, printable.
impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(kind) = self.kind else {
            let key = self.persisted.as_ref().map_or("", Persisted::key);
            return write!(f, "persisted query {}", short(key));
        };
        f.write_str(kind.word())?;
        let mut length = 0;
        for (index, field) in self.fields.iter().enumerate() {
            let field = short(field);
            write!(f, "{}{field}", if index == 0 { ' ' } else { ',' })?;
            length += field.len();
            if length > MAX_SUMMARY {
                return f.write_str("...");
            }
        }
        Ok(())
    }
}

/// `tools/call search`, printable.
impl fmt::Display for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Response => f.write_str("response"),
            Self::Call(Call { method, tool: None, .. }) => f.write_str(&short(method)),
            Self::Call(Call { method, tool: Some(tool), .. }) => {
                write!(f, "{} {}", short(method), short(tool))
            }
        }
    }
}

/// What the agent chose, for a message.
pub(super) fn short(text: &str) -> String {
    const MAX: usize = 80;
    let mut shown = printable(text);
    if shown.len() > MAX {
        shown.truncate(MAX);
        shown.push_str("...");
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_read_for_less_does_not_tell_more() {
        let read = |graphql, mcp: Option<bool>, params: &[&str]| Inspection {
            max_bytes: 10,
            graphql,
            rpc: mcp.map(|mcp| RpcInspection {
                mcp,
                params: params.iter().map(|path| (*path).to_owned()).collect(),
            }),
        };
        let plain = read(false, None, &[]);
        let rpc = read(false, Some(false), &["a"]);
        assert!(rpc.covers(&rpc) && rpc.covers(&plain) && plain.covers(&plain));
        assert!(!plain.covers(&rpc) && !plain.covers(&read(true, None, &[])));
        assert!(!rpc.covers(&read(false, Some(false), &["a", "b"])));
        assert!(!rpc.covers(&read(false, Some(true), &["a"])));
        assert!(read(true, Some(false), &["b", "a"]).covers(&rpc));
        assert!(!rpc.covers(&Inspection { max_bytes: 9, ..rpc.clone() }), "longer than may be");
    }
}

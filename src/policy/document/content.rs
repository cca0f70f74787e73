//! The keys of an endpoint that say how the content of requests is read.
#![forbid(unsafe_code)]

use super::rules::{OperationRule, operation_rule};
use crate::policy::fields::Fields;
use crate::policy::problem::{Place, Problems};
use crate::policy::yaml::{Key, Node, Value};

/// What upstream reads of a request at most, in bytes.
pub(in crate::policy) const DEFAULT_MAX: usize = 64 * 1024;

/// What we read at most, in bytes: all of it is held while it is judged.
pub(in crate::policy) const MAX: usize = 8 * 1024 * 1024;

/// The options, each with its place. Which of them mean something is for `check` to say.
#[derive(Debug, Default)]
pub(in crate::policy) struct Content {
    /// `persisted_queries`: whether registered ones are allowed.
    pub persisted_queries: Option<(Place, bool)>,
    /// `graphql_persisted_queries`: by hash or id, in the order of the file.
    pub registry: Option<(Place, Vec<(String, OperationRule)>)>,
    pub graphql_max: Option<(Place, usize)>,
    pub json_rpc: Option<(Place, Option<usize>)>,
    pub mcp: Option<(Place, Mcp)>,
}

/// `mcp`.
#[derive(Debug, Default)]
pub(in crate::policy) struct Mcp {
    pub max: Option<usize>,
    /// Unless the file says otherwise, true.
    pub strict_tool_names: Option<bool>,
    /// Unless the file says otherwise, false.
    pub allow_all_known_methods: Option<bool>,
}

impl Content {
    pub fn strict_tool_names(&self) -> bool {
        self.mcp.as_ref().and_then(|(_, mcp)| mcp.strict_tool_names).unwrap_or(true)
    }

    pub fn allow_all_known_methods(&self) -> bool {
        self.mcp.as_ref().and_then(|(_, mcp)| mcp.allow_all_known_methods).unwrap_or(false)
    }
}

pub(super) fn read(fields: &mut Fields<'_>, problems: &mut Problems) -> Content {
    let mut content = Content::default();
    if let Some(node) = fields.take("persisted_queries") {
        content.persisted_queries = mode(node, &fields.name("persisted_queries"), problems);
    }
    if let Some(node) = fields.take("graphql_persisted_queries") {
        let what = fields.name("graphql_persisted_queries");
        let entries = node.map(&what, problems).unwrap_or_default();
        let entries =
            entries.iter().filter_map(|(key, node)| registered(&what, key, node, problems));
        content.registry = Some((node.at, entries.collect()));
    }
    if let Some(node) = fields.take("graphql_max_body_bytes") {
        let max = bytes(node, &fields.name("graphql_max_body_bytes"), problems);
        content.graphql_max = max.map(|max| (node.at, max));
    }
    if let Some(node) = fields.take("json_rpc")
        && let Some(mut json_rpc) = Fields::of(node, fields.name("json_rpc"), problems)
    {
        let max = json_rpc.take("max_body_bytes");
        let max = max.and_then(|max| bytes(max, &json_rpc.name("max_body_bytes"), problems));
        content.json_rpc = Some((node.at, max));
        json_rpc.finish(None, problems);
    }
    if let Some(node) = fields.take("mcp")
        && let Some(mut mcp) = Fields::of(node, fields.name("mcp"), problems)
    {
        let max = mcp.take("max_body_bytes");
        let max = max.and_then(|max| bytes(max, &mcp.name("max_body_bytes"), problems));
        let mut flag = |key, problems: &mut Problems| {
            let node = mcp.take(key)?;
            node.boolean(&mcp.name(key), problems)
        };
        let strict_tool_names = flag("strict_tool_names", problems);
        let allow_all_known_methods = flag("allow_all_known_mcp_methods", problems);
        content.mcp = Some((node.at, Mcp { max, strict_tool_names, allow_all_known_methods }));
        mcp.finish(None, problems);
    }
    content
}

fn mode(node: &Node, what: &str, problems: &mut Problems) -> Option<(Place, bool)> {
    let word = node.text(what, problems)?;
    match word.text.as_str() {
        "" | "deny" => Some((word.at, false)),
        "allow_registered" => Some((word.at, true)),
        other => {
            problems.error(
                word.at,
                format!("{what} must be 'deny' or 'allow_registered', not {other:?}"),
                "write allow_registered, and the queries in graphql_persisted_queries",
            );
            None
        }
    }
}

/// One entry of `graphql_persisted_queries`.
fn registered(
    what: &str,
    Key { name: key, at }: &Key,
    node: &Node,
    problems: &mut Problems,
) -> Option<(String, OperationRule)> {
    let what = format!("{what}[{key:?}]");
    if key.is_empty() || key.len() > 256 || !key.bytes().all(|b| b.is_ascii_graphic()) {
        let fix = "write the query's SHA-256 or its id";
        problems.error(*at, format!("{what} is keyed by neither a hash nor an id"), fix);
        return None;
    }
    let mut fields = Fields::of(node, what, problems)?;
    let rule = operation_rule(&mut fields, problems);
    fields.finish(Some("remove it: it would be ignored"), problems);
    Some((key.to_owned(), rule))
}

fn bytes(node: &Node, what: &str, problems: &mut Problems) -> Option<usize> {
    let Value::Int(bytes @ 1..) = node.value else {
        problems.error(
            node.at,
            format!("{what} must be a positive integer"),
            "write a number of bytes, without quotes",
        );
        return None;
    };
    let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
    if bytes > MAX {
        problems.warn(
            node.at,
            format!("{what}: requests longer than {MAX} bytes are refused in any case"),
            format!("write {MAX}, or less"),
        );
    }
    Some(bytes.min(MAX))
}

//! Whether the keys make sense that say how the content of requests is read and judged.
#![forbid(unsafe_code)]

use super::endpoint::stops_at_dots;
use crate::policy::document::{Access, Endpoint, Enforcement, OperationRule, Protocol, Rule};
use crate::policy::fields::Located;
use crate::policy::problem::{Place, Problems};

/// The one MCP method that has a tool.
const TOOLS_CALL: &str = "tools/call";

/// Options that belong to another protocol, or that do nothing together.
pub(super) fn options(endpoint: &Endpoint, problems: &mut Problems) {
    let content = &endpoint.content;
    let name = &endpoint.name;
    let protocol = endpoint.protocol();
    let mut idle = |at: Option<Place>, key: &str| {
        if let Some(at) = at {
            let what = format!("{name}.{key} has no effect on this protocol");
            problems.warn(at, what, "remove it");
        }
    };
    // On a WebSocket too, where its rules are for operations.
    let graphql = protocol == Some(Protocol::Graphql)
        || (protocol == Some(Protocol::WebSocket) && endpoint.has_operations());
    if !graphql {
        idle(content.persisted_queries.map(|(at, _)| at), "persisted_queries");
        idle(content.registry.as_ref().map(|(at, _)| *at), "graphql_persisted_queries");
        idle(content.graphql_max.map(|(at, _)| at), "graphql_max_body_bytes");
    }
    if !matches!(protocol, Some(Protocol::JsonRpc | Protocol::Mcp)) {
        idle(content.json_rpc.map(|(at, _)| at), "json_rpc");
    }
    if let Some((at, mcp)) = &content.mcp
        && protocol != Some(Protocol::Mcp)
    {
        idle(mcp.max.map(|_| *at), "mcp.max_body_bytes");
        let flag = mcp.strict_tool_names.map(|_| "strict_tool_names");
        let flag = flag.or(mcp.allow_all_known_methods.map(|_| "allow_all_known_mcp_methods"));
        if let Some(flag) = flag {
            problems.error(
                *at,
                format!("{name}: mcp.{flag} is only valid with `protocol: mcp`"),
                "write `protocol: mcp`, or remove it",
            );
        }
    }
    if let Some((_, registry)) = &content.registry {
        for (key, rule) in registry {
            operation(&format!("{name}.graphql_persisted_queries[{key:?}]"), rule, problems);
        }
    }
    if graphql {
        let allowed = content.persisted_queries.is_some_and(|(_, allowed)| allowed);
        let registered = content.registry.as_ref().is_some_and(|(_, list)| !list.is_empty());
        if let (Some((at, _)), false) = (&content.registry, allowed) {
            problems.warn(
                *at,
                format!("{name}.graphql_persisted_queries has no effect"),
                "write `persisted_queries: allow_registered`",
            );
        }
        if let (Some((at, true)), false) = (content.persisted_queries, registered) {
            problems.warn(
                at,
                format!("{name}.persisted_queries: none is registered, so none is allowed"),
                "list them in graphql_persisted_queries",
            );
        }
    }
}

/// What an endpoint as a whole needs.
pub(super) fn endpoint(
    endpoint: &Endpoint,
    at: Place,
    protocol: Protocol,
    problems: &mut Problems,
) {
    let name = &endpoint.name;
    if protocol != Protocol::Mcp {
        return;
    }
    if endpoint.host.is_none() {
        problems.error(
            endpoint.at,
            format!("{name}: protocol mcp requires a host"),
            "add `host: …`",
        );
    }
    if endpoint.path.as_ref().is_none_or(|path| matches!(path.text.as_str(), "**" | "/**")) {
        problems.warn(
            at,
            format!(
                "{name} has no `path`: GET (event streams) and DELETE (end of a session) are \
                 refused, since they would reach every path of the host"
            ),
            "add the path of the MCP server, as `path: /mcp`",
        );
    }
    let rules = endpoint.rules.iter().flat_map(|(_, rules)| rules);
    let selects = rules.clone().any(|rule| rule.tool().is_some());
    let all_known = endpoint.content.allow_all_known_methods();
    let conflict = |rule: &Rule, by_default: bool| {
        let method = rule.method.as_ref().map(|method| method.text.as_str()).unwrap_or_default();
        let calls = matches_tools_call(method) || (method.is_empty() && by_default);
        selects && rule.tool().is_none() && calls
    };
    for rule in rules.filter(|rule| conflict(rule, all_known)) {
        problems.error(
            rule.at,
            format!("{name}: this rule allows every tool, and others list tools"),
            "add `tool` to it, or remove it",
        );
    }
    let deny = endpoint.deny_rules.iter().flat_map(|(_, rules)| rules);
    for rule in deny.filter(|rule| conflict(rule, false)) {
        problems.error(
            rule.at,
            format!("{name}: this rule denies every tool, and rules allow some"),
            "add `tool` to it, or remove it",
        );
    }
}

/// A rule of an endpoint whose content is read.
pub(super) fn rule(
    endpoint: &Endpoint,
    protocol: Protocol,
    rule: &Rule,
    deny: bool,
    problems: &mut Problems,
) {
    let name = &endpoint.name;
    foreign(name, protocol, rule, problems);
    match protocol {
        Protocol::Graphql => {
            operation(name, &rule.operation, problems);
            transport(name, rule, deny, problems);
        }
        Protocol::Mcp => {
            mcp_rule(endpoint, rule, problems);
            not_by_path(name, rule, problems);
        }
        _ => {
            if rule.method.as_ref().is_none_or(|method| method.text.is_empty()) {
                let what = format!("{name}: a rule of protocol json-rpc requires a method");
                problems.error(rule.at, what, "write the method's name, or \"*\" for all");
            }
            not_by_path(name, rule, problems);
        }
    }
    if deny {
        for matcher in rule.tool.iter().map(|(_, tool)| tool) {
            stops_at_dots(name, matcher, problems);
        }
        for (_, matcher) in &rule.params {
            stops_at_dots(name, matcher, problems);
        }
    }
}

/// Keys of a rule that another protocol has.
pub(super) fn foreign(name: &str, protocol: Protocol, rule: &Rule, problems: &mut Problems) {
    let operations = matches!(protocol, Protocol::Graphql | Protocol::WebSocket);
    if let (Some((key, at)), false) = (rule.operation.written(), operations) {
        let kind = if protocol == Protocol::Rest { "REST" } else { protocol.word() };
        let what = format!("{name}: {key} has no effect on a {kind} rule");
        problems.warn(at, what, "remove it");
    }
    if let Some(command) = &rule.command {
        let kind = if protocol == Protocol::Rest { "REST" } else { protocol.word() };
        let what = format!("{name}: command has no effect on a {kind} rule");
        problems.warn(command.at, what, "remove it");
    }
    let fix = "remove it: ignored, the rule would match other requests than it says";
    if let (Some((at, _)), false) = (&rule.tool, protocol == Protocol::Mcp) {
        problems.error(*at, format!("{name}: tool is only valid with `protocol: mcp`"), fix);
    }
    let rpc = matches!(protocol, Protocol::JsonRpc | Protocol::Mcp);
    if let (Some(at), false) = (rule.params_at, rpc) {
        let what = format!("{name}: params is only valid with `protocol: mcp` or json-rpc");
        problems.error(at, what, fix);
    }
}

/// `operation_type`, `operation_name` and `fields`.
pub(super) fn operation(name: &str, rule: &OperationRule, problems: &mut Problems) {
    let kinds = "write query, mutation, subscription or \"*\"";
    match rule.operation_type.as_ref().filter(|word| !word.text.is_empty()) {
        None => {
            let what = format!("{name}: operation_type is required");
            problems.error(rule.at, what, kinds);
        }
        Some(word) => {
            let lower = word.text.to_ascii_lowercase();
            if !["query", "mutation", "subscription", "*"].contains(&lower.as_str()) {
                let what = format!("{name}: {:?} is no operation_type", word.text);
                problems.error(word.at, what, kinds);
            }
        }
    }
    if let Some((at, fields)) = &rule.fields {
        if fields.is_empty() {
            let fix = "list root fields, or remove it to match all";
            problems.error(*at, format!("{name}: fields must not be empty"), fix);
        }
        for field in fields.iter().filter(|field| field.text.is_empty()) {
            let what = format!("{name}: an entry of fields is empty");
            problems.error(field.at, what, "write the name of a root field");
        }
    }
}

/// Method, path and query of a `GraphQL` rule: upstream reads them, and judges by the operation.
fn transport(name: &str, rule: &Rule, deny: bool, problems: &mut Problems) {
    let fix = "remove it, and write the `path` of the endpoint";
    let path = rule.path.as_ref().filter(|path| !deny && !matches!(path.text.as_str(), "" | "**"));
    let query = rule.query_at.filter(|_| !deny && !rule.query.is_empty());
    if let Some(at) = path.map(|path| path.at).or(query) {
        problems.error(
            at,
            format!(
                "{name}: a GraphQL rule is not bound to a path: it would allow more than it says"
            ),
            fix,
        );
    } else if let Some(at) = rule.path.as_ref().map(|path| path.at).or(rule.query_at) {
        let what = format!("{name}: path and query have no effect on a GraphQL rule");
        problems.warn(at, what, fix);
    }
    if let Some(method) = &rule.method {
        let what = format!("{name}: method has no effect on a GraphQL rule");
        problems.warn(method.at, what, "remove it");
    }
}

fn not_by_path(name: &str, rule: &Rule, problems: &mut Problems) {
    let path = rule.path.as_ref().filter(|path| !path.text.is_empty()).map(|path| path.at);
    let query = rule.query_at.filter(|_| !rule.query.is_empty());
    if let Some(at) = path.or(query) {
        problems.error(
            at,
            format!("{name}: a rule here is judged by its method, not by path or query"),
            "remove it, and write the `path` of the endpoint",
        );
    }
}

fn mcp_rule(endpoint: &Endpoint, rule: &Rule, problems: &mut Problems) {
    let name = &endpoint.name;
    let method = rule.method.as_ref().filter(|method| !method.text.is_empty());
    match method {
        None if !endpoint.content.allow_all_known_methods() => problems.error(
            rule.at,
            format!("{name}: method is required unless mcp.allow_all_known_mcp_methods is true"),
            "write the method, as `method: tools/call`",
        ),
        Some(method) if rule.tool().is_some() && method.text != TOOLS_CALL => problems.error(
            method.at,
            format!("{name}: only the method {TOOLS_CALL} has a tool, {:?} has none", method.text),
            "write `method: tools/call`",
        ),
        Some(method) if wildcard(&method.text) && !method.text.starts_with("tools/") => {
            problems.error(
                method.at,
                format!("{name}: in MCP only methods that begin with tools/ may be patterns"),
                "list the methods, or write mcp.allow_all_known_mcp_methods and no method",
            );
        }
        _ => {}
    }
    if let (Some((at, _)), true) = (&rule.tool, rule.params.iter().any(|(key, _)| key == "name")) {
        problems.error(*at, format!("{name}: tool and params.name are the same"), "remove one");
    }
    let globs = rule.tool().map(|tool| tool.0.as_slice()).unwrap_or_default();
    if !endpoint.content.strict_tool_names()
        && let Some(glob) = globs.iter().find(|glob| wildcard(&glob.text))
    {
        problems.error(
            glob.at,
            format!("{name}: patterns of tools need mcp.strict_tool_names"),
            "write the names of tools, or remove strict_tool_names",
        );
    }
}

fn wildcard(text: &str) -> bool {
    text.contains(['*', '?', '[', ']', '{', '}'])
}

/// Whether a method of a rule is, or could match, `tools/call`.
fn matches_tools_call(method: &str) -> bool {
    method == "*"
        || crate::policy::glob::ValueGlob::new(method).is_ok_and(|glob| glob.matches(TOOLS_CALL))
}

/// An endpoint whose SQL nobody reads. Upstream neither: it loads only where nothing is to be
/// refused, and what it says is then an endpoint of host and port.
pub(super) fn sql(endpoint: &Endpoint, at: Place, problems: &mut Problems) {
    let name = &endpoint.name;
    if let Some((at, Enforcement::Enforce)) = endpoint.enforcement {
        problems.error(
            at,
            format!("{name}: SQL is not parsed, so nothing can be enforced"),
            "write `enforcement: audit` to let every statement pass, or remove the endpoint",
        );
        return;
    }
    match (&endpoint.rules, endpoint.access) {
        (None, None) => problems.error(
            at,
            format!("{name}: protocol requires rules or access to define allowed traffic"),
            "add `access: full`",
        ),
        (Some((at, rules)), None) if rules.is_empty() => problems.error(
            *at,
            format!("{name}: the rules list cannot be empty (it would deny all traffic)"),
            "use `access: full`, or remove rules",
        ),
        (Some((at, rules)), Some(_)) if !rules.is_empty() => problems.error(
            *at,
            format!("{name}: rules and access are mutually exclusive"),
            "remove one of them",
        ),
        _ => {}
    }
    if let Some((at, rules)) = &endpoint.deny_rules
        && rules.is_empty()
    {
        problems.error(
            *at,
            format!("{name}: the deny_rules list cannot be empty (it would have no effect)"),
            "add rules, or remove it",
        );
    }
    if let Some(Located { at, .. }) = &endpoint.path {
        let what = format!("{name}.path: SQL has no path");
        problems.error(*at, what, "remove it");
    }
    let says_less = !matches!(endpoint.access, Some((_, Some(Access::Full))))
        || endpoint.deny_rules.is_some()
        || endpoint.rules.is_some();
    let why = if says_less {
        "SQL is not parsed: its rules and its access refuse nothing, every statement passes"
    } else {
        "SQL is not parsed: every statement passes"
    };
    problems.warn(
        at,
        format!("{name}: {why}"),
        "let the database refuse: give the agent an account with the rights that it needs",
    );
}

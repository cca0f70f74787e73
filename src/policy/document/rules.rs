//! Rules and query matchers of an endpoint.
#![forbid(unsafe_code)]

use crate::policy::fields::{Fields, Located};
use crate::policy::problem::{Place, Problems};
use crate::policy::yaml::{Node, Value};

/// What one rule matches. A rule without method or path matches nothing.
#[derive(Debug)]
pub(in crate::policy) struct Rule {
    pub at: Place,
    pub method: Option<Located>,
    pub path: Option<Located>,
    pub query: Vec<(String, Matcher)>,
    /// Where a key stands that only GraphQL's operations have, and its name.
    pub operation: Option<(Place, &'static str)>,
}

/// Globs, of which one must match.
#[derive(Debug)]
pub(in crate::policy) struct Matcher(pub Vec<Located>);

pub(super) fn allow_rules(name: &str, node: &Node, problems: &mut Problems) -> Vec<Rule> {
    let mut rules = Vec::new();
    let items = node.list(&format!("{name}.rules"), problems).unwrap_or_default();
    for (index, item) in items.iter().enumerate() {
        let what = format!("{name}.rules[{index}]");
        let Some(mut fields) = Fields::of(item, what.clone(), problems) else {
            continue;
        };
        match fields.take("allow") {
            Some(node) => rules.extend(rule(format!("{what}.allow"), node, problems)),
            None => problems.error(
                item.at,
                format!("{what} has no `allow`"),
                "write `- allow: { method: GET, path: /x }`; denials belong in deny_rules",
            ),
        }
        fields.finish(Some("rules hold only `allow`; denials belong in deny_rules"), problems);
    }
    rules
}

pub(super) fn deny_rules(name: &str, node: &Node, problems: &mut Problems) -> Vec<Rule> {
    let items = node.list(&format!("{name}.deny_rules"), problems).unwrap_or_default();
    let rule = |(index, item)| rule(format!("{name}.deny_rules[{index}]"), item, problems);
    items.iter().enumerate().filter_map(rule).collect()
}

fn rule(what: String, node: &Node, problems: &mut Problems) -> Option<Rule> {
    let mut fields = Fields::of(node, what, problems)?;
    let text = |fields: &mut Fields<'_>, key: &'static str, problems: &mut Problems| {
        let node = fields.take(key)?;
        node.text(&fields.name(key), problems)
    };
    let method = text(&mut fields, "method", problems);
    let path = text(&mut fields, "path", problems);
    let mut query = Vec::new();
    if let Some(node) = fields.take("query") {
        for (key, value) in node.map(&fields.name("query"), problems).unwrap_or_default() {
            let what = format!("{}[{:?}]", fields.name("query"), key.name);
            query.extend(matcher(&what, value, problems).map(|m| (key.name.clone(), m)));
        }
    }
    if let Some(node) = fields.take("command") {
        problems.warn(node.at, format!("{} has no effect", fields.name("command")), "remove it");
    }
    let mut operation = None;
    for key in ["operation_type", "operation_name", "fields"] {
        operation = operation.or(fields.take(key).map(|node| (node.at, key)));
    }
    fields.finish(
        Some("remove it: ignored, the rule would match other requests than it says"),
        problems,
    );
    Some(Rule { at: node.at, method, path, query, operation })
}

/// `"glob"`, `{glob: "glob"}` or `{any: ["glob", …]}`.
fn matcher(what: &str, node: &Node, problems: &mut Problems) -> Option<Matcher> {
    if !matches!(node.value, Value::Map(_)) {
        return node.text(what, problems).map(|glob| Matcher(vec![glob]));
    }
    let mut fields = Fields::of(node, what, problems)?;
    let glob = fields.take("glob");
    let any = fields.take("any");
    fields.finish(Some("only `glob` or `any` are matchers"), problems);
    match (glob, any) {
        (Some(glob), None) => glob.text(what, problems).map(|glob| Matcher(vec![glob])),
        (None, Some(any)) => {
            let items = any.list(what, problems)?;
            if items.is_empty() {
                problems.error(any.at, format!("{what}.any must not be empty"), "list globs");
            }
            let globs: Option<Vec<_>> = items.iter().map(|i| i.text(what, problems)).collect();
            globs.map(Matcher)
        }
        _ => {
            problems.error(
                node.at,
                format!("{what} must have exactly one of `glob` and `any`"),
                "write `key: \"glob\"`",
            );
            None
        }
    }
}

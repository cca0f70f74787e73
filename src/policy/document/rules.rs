//! Rules and query matchers of an endpoint.
#![forbid(unsafe_code)]

use crate::policy::fields::{Fields, Located};
use crate::policy::problem::{Place, Problems};
use crate::policy::yaml::{Node, Value};

/// What one rule matches. Which keys mean something depends on the protocol: `check` says so.
#[derive(Debug)]
pub(in crate::policy) struct Rule {
    pub at: Place,
    /// Of HTTP, or of JSON-RPC.
    pub method: Option<Located>,
    pub path: Option<Located>,
    pub query_at: Option<Place>,
    pub query: Vec<(String, Matcher)>,
    pub operation: OperationRule,
    pub tool: Option<(Place, Matcher)>,
    pub params_at: Option<Place>,
    pub params: Vec<(String, Matcher)>,
    pub command: Option<Located>,
}

impl Rule {
    /// The matcher of the tool's name: `tool`, or `params.name`, which is the same.
    pub fn tool(&self) -> Option<&Matcher> {
        let name = || self.params.iter().find(|(key, _)| key == "name").map(|(_, name)| name);
        self.tool.as_ref().map(|(_, tool)| tool).or_else(name)
    }
}

/// What a `GraphQL` rule matches, or what a registered query does.
#[derive(Debug, Default)]
pub(in crate::policy) struct OperationRule {
    pub at: Place,
    pub operation_type: Option<Located>,
    pub operation_name: Option<Located>,
    pub fields: Option<(Place, Vec<Located>)>,
}

impl OperationRule {
    /// The first of its keys that is written, and where.
    pub fn written(&self) -> Option<(&'static str, Place)> {
        let word = |key, word: &Option<Located>| word.as_ref().map(|word| (key, word.at));
        word("operation_type", &self.operation_type)
            .or_else(|| word("operation_name", &self.operation_name))
            .or_else(|| self.fields.as_ref().map(|(at, _)| ("fields", *at)))
    }
}

/// Globs, of which one must match.
#[derive(Debug, Clone)]
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
    let method = text(&mut fields, "method", problems);
    let path = text(&mut fields, "path", problems);
    let (query_at, query) = matchers(&mut fields, "query", problems);
    let operation = operation_rule(&mut fields, problems);
    let tool = fields.take("tool").and_then(|node| {
        let tool = matcher(&fields.name("tool"), node, problems)?;
        Some((node.at, tool))
    });
    let (params_at, params) = matchers(&mut fields, "params", problems);
    let command = text(&mut fields, "command", problems);
    fields.finish(
        Some("remove it: ignored, the rule would match other requests than it says"),
        problems,
    );
    Some(Rule {
        at: node.at,
        method,
        path,
        query_at,
        query,
        operation,
        tool,
        params_at,
        params,
        command,
    })
}

/// `operation_type`, `operation_name` and `fields`.
pub(super) fn operation_rule(fields: &mut Fields<'_>, problems: &mut Problems) -> OperationRule {
    let operation_type = text(fields, "operation_type", problems);
    let operation_name = text(fields, "operation_name", problems);
    let list = fields.take("fields").map(|node| {
        let what = fields.name("fields");
        let items = node.list(&what, problems).unwrap_or_default();
        let what = format!("an entry of {what}");
        (node.at, items.iter().filter_map(|item| item.text(&what, problems)).collect())
    });
    OperationRule { at: fields.at(), operation_type, operation_name, fields: list }
}

fn text(fields: &mut Fields<'_>, key: &'static str, problems: &mut Problems) -> Option<Located> {
    let node = fields.take(key)?;
    node.text(&fields.name(key), problems)
}

type Matchers = (Option<Place>, Vec<(String, Matcher)>);

/// A map of matchers.
fn matchers(fields: &mut Fields<'_>, name: &'static str, problems: &mut Problems) -> Matchers {
    let Some(node) = fields.take(name) else {
        return (None, Vec::new());
    };
    let mut matchers = Vec::new();
    for (key, value) in node.map(&fields.name(name), problems).unwrap_or_default() {
        let what = format!("{}[{:?}]", fields.name(name), key.name);
        matchers.extend(matcher(&what, value, problems).map(|m| (key.name.clone(), m)));
    }
    (Some(node.at), matchers)
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

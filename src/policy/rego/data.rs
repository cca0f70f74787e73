//! `policy.yaml` as the data document of a Rego text, and Rego's values as a YAML tree.
//!
//! The shape is `OpenShell`'s: `port` has become `ports`, and an access level has become the rules that
//! it stands for. Hosts, protocols and path patterns have the one spelling in which hosts and paths
//! are asked about.
#![forbid(unsafe_code)]

use serde_json::{Map, Value as Json, json};

use crate::policy::glob::canonical_pattern;
use crate::policy::host::Host;
use crate::policy::problem::Place;
use crate::policy::yaml::{Key, Node, Value};

/// The data document of a policy that was checked.
pub(super) fn document(root: &Node) -> Json {
    let mut data = to_json(root);
    let Some(top) = data.as_object_mut() else {
        return json!({});
    };
    // An entry without a value is an absent one.
    top.retain(|_, value| !value.is_null());
    for policy in members(top.get_mut("network_policies")) {
        let endpoints = policy.get_mut("endpoints").and_then(Json::as_array_mut);
        for endpoint in endpoints.into_iter().flatten().filter_map(Json::as_object_mut) {
            normalise(endpoint);
        }
    }
    // Read by the texts of later versions of OpenShell.
    top.insert("runtime".into(), json!({ "require_binary_identity": true }));
    data
}

/// Adds to the binaries what their symlinks point to, each with all that its entry asks.
pub(super) fn resolve_binaries(data: &mut Json, resolve: &impl Fn(&str) -> Option<String>) {
    for policy in members(data.get_mut("network_policies")) {
        let Some(binaries) = policy.get_mut("binaries").and_then(Json::as_array_mut) else {
            continue;
        };
        let target = |binary: &Json| {
            let path = binary.get("path")?.as_str().filter(|path| !path.contains('*'))?;
            let target =
                resolve(path).filter(|target| target.starts_with('/') && target != path)?;
            let mut entry = binary.clone();
            entry.as_object_mut()?.insert("path".into(), target.into());
            Some(entry)
        };
        let targets: Vec<_> = binaries.iter().filter_map(target).collect();
        binaries.extend(targets);
    }
}

fn members(map: Option<&mut Json>) -> impl Iterator<Item = &mut Map<String, Json>> {
    let map = map.and_then(Json::as_object_mut);
    map.into_iter().flat_map(Map::values_mut).filter_map(Json::as_object_mut)
}

fn normalise(endpoint: &mut Map<String, Json>) {
    let port = endpoint.remove("port");
    let filled = |list: Option<&Json>| list.and_then(Json::as_array).is_some_and(|l| !l.is_empty());
    if !filled(endpoint.get("ports")) {
        endpoint.insert("ports".into(), Json::from_iter(port));
    }
    if let Some(host) = endpoint.get_mut("host") {
        rewrite(host, |host| match Host::parse(host) {
            Ok(host) => host.as_str().to_owned(),
            Err(_) => host.strip_suffix('.').unwrap_or(host).to_ascii_lowercase(),
        });
    }
    if let Some(protocol) = endpoint.get_mut("protocol") {
        rewrite(protocol, str::to_ascii_lowercase);
    }
    let protocol = endpoint.get("protocol").and_then(Json::as_str).unwrap_or_default().to_owned();
    if !filled(endpoint.get("rules"))
        && let Some(access) = endpoint.get("access").and_then(Json::as_str)
    {
        let rules = preset(&protocol, access);
        endpoint.insert("rules".into(), rules);
    }
    let mut paths: Vec<&mut Json> = Vec::new();
    for (key, value) in endpoint.iter_mut() {
        match (key.as_str(), value) {
            ("path", path) => paths.push(path),
            ("rules", Json::Array(rules)) => paths
                .extend(rules.iter_mut().filter_map(|rule| rule.get_mut("allow")?.get_mut("path"))),
            ("deny_rules", Json::Array(rules)) => {
                paths.extend(rules.iter_mut().filter_map(|rule| rule.get_mut("path")));
            }
            _ => {}
        }
    }
    for path in paths {
        rewrite(path, canonical_pattern);
    }
}

fn rewrite(value: &mut Json, change: impl Fn(&str) -> String) {
    if let Json::String(text) = value {
        *text = change(text);
    }
}

/// What an access level stands for, by protocol.
fn preset(protocol: &str, access: &str) -> Json {
    let rows: &[&str] = match (protocol, access) {
        ("graphql", "read-only") => &["query"],
        ("graphql", "read-write") => &["query", "mutation"],
        ("websocket", "read-only") => &["GET"],
        ("websocket", "read-write") => &["GET", "WEBSOCKET_TEXT"],
        (_, "read-only") => &["GET", "HEAD", "OPTIONS"],
        (_, "read-write") => &["GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH"],
        (_, "full") => &["*"],
        _ => &[],
    };
    let rule = |word: &&str| match protocol {
        "graphql" => json!({ "allow": { "operation_type": word } }),
        _ => json!({ "allow": { "method": word, "path": "**" } }),
    };
    rows.iter().map(rule).collect()
}

fn to_json(node: &Node) -> Json {
    match &node.value {
        Value::Null => Json::Null,
        Value::Bool(value) => (*value).into(),
        Value::Int(value) => (*value).into(),
        Value::Float(value) => Json::from(*value),
        Value::Text(text) => text.clone().into(),
        Value::List(items) => items.iter().map(to_json).collect(),
        Value::Map(entries) => {
            entries.iter().map(|(key, value)| (key.name.clone(), to_json(value))).collect()
        }
    }
}

/// A value of Rego's as if it stood in a file at this place.
pub(super) fn to_node(value: &Json, at: Place) -> Node {
    let value = match value {
        Json::Null => Value::Null,
        Json::Bool(value) => Value::Bool(*value),
        Json::Number(number) => match number.as_i64() {
            Some(number) => Value::Int(number),
            None => Value::Float(number.as_f64().unwrap_or(f64::NAN)),
        },
        Json::String(text) => Value::Text(text.clone()),
        Json::Array(items) => Value::List(items.iter().map(|item| to_node(item, at)).collect()),
        Json::Object(entries) => {
            let entry = |(name, value): (&String, &Json)| {
                (Key { at, name: name.clone() }, to_node(value, at))
            };
            Value::Map(entries.iter().map(entry).collect())
        }
    };
    Node { at, value }
}

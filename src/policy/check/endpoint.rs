//! Whether an endpoint makes sense.
#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::net::IpAddr;

use ipnet::IpNet;

use super::content;
use crate::policy::destination::{CONTROL_PLANE_PORTS, forbidden};
use crate::policy::document::{Access, Endpoint, Matcher, NetworkPolicy, Protocol, Rule};
use crate::policy::fields::Located;
use crate::policy::glob::never_matches;
use crate::policy::problem::{Place, Problems};

/// All endpoints of a policy.
pub(in crate::policy) fn endpoints(policy: &NetworkPolicy, problems: &mut Problems) {
    for endpoint in &policy.endpoints {
        destination(endpoint, problems);
        match endpoint.protocol {
            Some((at, Some(Protocol::Sql))) => content::sql(endpoint, at, problems),
            None | Some((_, Some(Protocol::Tcp))) => uninspected(endpoint, problems),
            Some((at, Some(protocol))) => inspected(endpoint, at, protocol, problems),
            // Refused already.
            Some((_, None)) => {}
        }
        content::options(endpoint, problems);
    }
    overshadowed(policy, problems);
}

fn destination(endpoint: &Endpoint, problems: &mut Problems) {
    let name = &endpoint.name;
    let listed = endpoint.allowed_ips.as_ref();
    if endpoint.host.is_none() && listed.is_none_or(|(_, ips)| ips.is_empty()) {
        problems.error(
            endpoint.at,
            format!("{name} has neither host nor allowed_ips: it would match nothing"),
            "add `host: …`",
        );
    }
    if endpoint.host.is_some()
        && let Some((at, ips)) = listed
        && ips.is_empty()
    {
        problems.warn(*at, format!("{name}.allowed_ips is empty: no effect"), "remove it");
    }
    for port in endpoint.ports.iter().filter(|port| CONTROL_PLANE_PORTS.contains(port)) {
        problems.warn(
            endpoint.ports_at,
            format!("{name}: port {port} belongs to the control plane and is never dialled"),
            "remove it",
        );
    }
}

/// An endpoint of host and port only.
fn uninspected(endpoint: &Endpoint, problems: &mut Problems) {
    let name = &endpoint.name;
    let fix = "add `protocol: rest`, or remove it";
    if let Some((at, _)) = endpoint.deny_rules {
        let what = "deny_rules require protocol (requests must be inspected)";
        problems.error(at, format!("{name}: {what}"), fix);
    }
    let unjudged = "without `protocol` requests are not inspected: everything would pass";
    if let Some((at, _)) = endpoint.rules {
        problems.error(at, format!("{name}.rules: {unjudged}"), fix);
    }
    if let Some(path) = &endpoint.path {
        problems.error(path.at, format!("{name}.path: {unjudged}"), fix);
    }
    match endpoint.access {
        Some((at, Some(Access::Full))) => {
            problems.warn(at, format!("{name}.access has no effect without `protocol`"), fix);
        }
        Some((at, Some(_))) => problems.error(at, format!("{name}.access: {unjudged}"), fix),
        Some((_, None)) | None => {}
    }
    if let Some((at, _)) = endpoint.enforcement {
        problems.warn(at, format!("{name}.enforcement has no effect without `protocol`"), fix);
    }
}

/// An endpoint whose requests are judged.
fn inspected(endpoint: &Endpoint, at: Place, protocol: Protocol, problems: &mut Problems) {
    let name = &endpoint.name;
    let rules = endpoint.rules.as_ref();
    let rpc = matches!(protocol, Protocol::JsonRpc | Protocol::Mcp);
    match (rules, endpoint.access) {
        (_, Some((at, _))) if rpc => problems.error(
            at,
            format!("{name}: `access` says nothing about protocol {}", protocol.word()),
            "remove it, and list the methods in rules",
        ),
        (None, None) if rpc && endpoint.content.allow_all_known_methods() => {}
        (None, None) if rpc => problems.error(
            at,
            format!("{name}: protocol {} requires rules", protocol.word()),
            "add `rules: [{ allow: { method: … } }]`",
        ),
        (None, None) => problems.error(
            at,
            format!("{name}: protocol requires rules or access to define allowed traffic"),
            "add `access: read-only`, or rules",
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
    if let Some(path) = &endpoint.path {
        scope(name, path, problems);
    }
    if endpoint.enforcement.is_none() {
        problems.warn(
            at,
            format!(
                "{name} has no enforcement: requests that are not allowed pass, and are logged"
            ),
            "write `enforcement: enforce` to refuse them, `audit` to confirm",
        );
    }
    if let Some(at) = endpoint.tls_skip {
        problems.warn(
            at,
            format!("{name}: `tls: skip` has no effect with `protocol`: requests must be readable"),
            "remove it",
        );
    }
    for allow in rules.iter().flat_map(|(_, rules)| rules) {
        match protocol {
            protocol if protocol.reads_content() => {
                content::rule(endpoint, protocol, allow, false, problems);
            }
            _ => rule(name, protocol, allow, false, problems),
        }
    }
    for deny in endpoint.deny_rules.iter().flat_map(|(_, rules)| rules) {
        match protocol {
            protocol if protocol.reads_content() => {
                content::rule(endpoint, protocol, deny, true, problems);
            }
            _ => rule(name, protocol, deny, true, problems),
        }
    }
    if let (Protocol::WebSocket, Some((at, rules))) = (protocol, rules) {
        handshake(name, *at, rules, problems);
    }
    if protocol.reads_content() {
        content::endpoint(endpoint, at, protocol, problems);
    }
}

fn scope(name: &str, path: &Located, problems: &mut Problems) {
    let text = path.text.as_str();
    if !text.starts_with('/') && text != "**" {
        problems.error(
            path.at,
            format!("{name}: the endpoint's path must start with '/' or be '**'"),
            "write `path: /v1/**`",
        );
    } else if text != "**"
        && let Some(why) = never_matches(text)
    {
        problems.error(
            path.at,
            format!("{name}: the endpoint's path {why}: no request would match"),
            "write the path as it is after normalisation",
        );
    }
}

/// Rules of a WebSocket that allow messages and nothing to send them on.
fn handshake(name: &str, at: Place, rules: &[Rule], problems: &mut Problems) {
    let opens = |rule: &Rule| {
        let method = rule.method.as_ref().map(|method| method.text.as_str());
        method.is_some_and(|method| method == "*" || method.eq_ignore_ascii_case("GET"))
    };
    if !rules.is_empty() && !rules.iter().any(opens) {
        problems.warn(
            at,
            format!("{name} allows no handshake: messages need a connection first"),
            "add `- allow: { method: GET, path: … }`",
        );
    }
}

/// A rule of a WebSocket that says what a `GraphQL` operation must be.
fn operation(name: &str, rule: &Rule, (key, at): (&str, Place), problems: &mut Problems) {
    if rule.method.is_some() || rule.path.is_some() || !rule.query.is_empty() {
        problems.error(
            at,
            format!("{name}: {key} cannot stand beside method, path or query in one rule"),
            "write two rules",
        );
    } else {
        content::operation(name, &rule.operation, problems);
        content::foreign(name, Protocol::WebSocket, rule, problems);
    }
}

/// A rule that never matches is lost: of an allow rule that is a warning, of a deny rule an error.
fn rule(name: &str, protocol: Protocol, rule: &Rule, deny: bool, problems: &mut Problems) {
    if let (Protocol::WebSocket, Some(found)) = (protocol, rule.operation.written()) {
        return operation(name, rule, found, problems);
    }
    let mut lost = |at: Place, what: String, fix: &str| {
        let what = format!("{name}: {what}: the rule can never match");
        if deny {
            problems.error(at, what, fix);
        } else {
            problems.warn(at, what, fix);
        }
    };
    match &rule.path {
        None => lost(rule.at, "a rule without path".into(), "add `path: \"**\"`"),
        Some(path) if path.text != "**" => {
            if let Some(why) = never_matches(&path.text) {
                let what = format!("path {:?} {why}", path.text);
                lost(path.at, what, "write the path as it is after normalisation");
            }
        }
        Some(_) => {}
    }
    match &rule.method {
        None => lost(rule.at, "a rule without method".into(), "add `method: \"*\"`"),
        Some(method) if method.text.is_empty() => {
            lost(method.at, "an empty method".into(), "write `method: \"*\"`");
        }
        Some(method) => {
            const KNOWN: &[&str] = &[
                "*", "GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE", "TRACE", "CONNECT",
            ];
            const SOCKET: &[&str] = &["*", "GET", "WEBSOCKET_TEXT", "WEBSOCKET_BINARY"];
            let upper = method.text.to_ascii_uppercase();
            if protocol == Protocol::WebSocket {
                if !SOCKET.contains(&upper.as_str()) {
                    let what = format!("{:?} is not a method of a WebSocket", method.text);
                    let fix =
                        "write GET (the handshake), WEBSOCKET_TEXT, WEBSOCKET_BINARY or \"*\"";
                    lost(method.at, what, fix);
                }
            } else if !KNOWN.contains(&upper.as_str()) {
                let what = format!("{name}: {:?} is not a method of HTTP", method.text);
                problems.warn(method.at, what, "check its spelling");
            }
        }
    }
    content::foreign(name, protocol, rule, problems);
    if deny {
        for (_, matcher) in &rule.query {
            stops_at_dots(name, matcher, problems);
        }
    }
}

/// A denial's pattern that misses values with dots.
pub(super) fn stops_at_dots(name: &str, matcher: &Matcher, problems: &mut Problems) {
    for glob in &matcher.0 {
        if glob.text.replace("**", "").contains('*') {
            problems.warn(
                glob.at,
                format!("{name}: `*` stops at `.`: {:?} does not match 1.2", glob.text),
                "add a second pattern with the dots written out",
            );
        }
    }
}

/// Endpoints that do not do what they say because of others for the same host and port: those that
/// inspect requests leave nothing to those that do not, and those that read content leave nothing
/// to those that read it in another way, or not at all.
fn overshadowed(policy: &NetworkPolicy, problems: &mut Problems) {
    let mut inspected = HashMap::new();
    let mut reading = HashMap::new();
    let hosts = |endpoint: &Endpoint| {
        let host = endpoint.host.as_ref().map(|host| host.text.to_ascii_lowercase());
        endpoint.ports.iter().map(move |port| (host.clone(), *port)).collect::<Vec<_>>()
    };
    let path = |endpoint: &Endpoint| endpoint.path.as_ref().map(|path| path.text.clone());
    for endpoint in policy.endpoints.iter().filter(|e| e.inspects()) {
        for key in hosts(endpoint) {
            if endpoint.protocol().is_some_and(Protocol::reads_content) {
                reading.entry((key.clone(), path(endpoint))).or_insert(endpoint);
            }
            inspected.entry(key).or_insert(&endpoint.name);
        }
    }
    for endpoint in &policy.endpoints {
        let name = &endpoint.name;
        if !endpoint.inspects() {
            if let Some(other) = hosts(endpoint).iter().find_map(|key| inspected.get(key)) {
                problems.warn(
                    endpoint.at,
                    format!("{name} allows no request: {other} inspects the same host"),
                    "remove it, or add rules to the inspected one",
                );
            }
            continue;
        }
        // On a WebSocket it is read by rules of its own.
        if endpoint.protocol() == Some(Protocol::WebSocket) && endpoint.has_operations() {
            continue;
        }
        let other = hosts(endpoint).into_iter().find_map(|key| {
            let same = reading.get(&(key.clone(), path(endpoint)));
            same.or_else(|| reading.get(&(key, None))).copied()
        });
        let family = |endpoint: &Endpoint| match endpoint.protocol() {
            Some(Protocol::Graphql) => 1,
            Some(Protocol::JsonRpc | Protocol::Mcp) => 2,
            _ => 0,
        };
        if let Some(other) = other.filter(|other| family(other) != family(endpoint)) {
            problems.warn(
                endpoint.at,
                format!(
                    "{name}: {} reads the same requests as {}",
                    other.name,
                    other.protocol().map_or("", Protocol::word)
                ),
                "give it a `path` of its own: where it speaks, other endpoints allow nothing",
            );
        }
    }
}

/// The networks of `allowed_ips`; what is not one is an error.
pub(in crate::policy) fn addresses(endpoint: &Endpoint, problems: &mut Problems) -> Vec<IpNet> {
    let listed = endpoint.allowed_ips.iter().flat_map(|(_, ips)| ips);
    listed.filter_map(|text| network(&endpoint.name, text, problems)).collect()
}

/// An address or a network, as written; IPv4 in IPv6 form is none.
pub(in crate::policy) fn parse_network(text: &str) -> Option<IpNet> {
    let parsed = match text.parse::<IpAddr>() {
        Ok(ip) => Some(IpNet::from(ip)),
        Err(_) => text.parse::<IpNet>().ok(),
    };
    let mapped =
        |net: &IpNet| matches!(net.addr(), IpAddr::V6(ip) if ip.to_ipv4_mapped().is_some());
    parsed.filter(|net| !mapped(net))
}

fn network(name: &str, located: &Located, problems: &mut Problems) -> Option<IpNet> {
    let text = located.text.as_str();
    let Some(net) = parse_network(text) else {
        problems.error(
            located.at,
            format!("{name}.allowed_ips: {text:?} is neither an address nor a network"),
            "write 10.0.0.0/8, 10.1.2.3 or an IPv6 network; IPv4 in IPv4 form",
        );
        return None;
    };
    let net = match net.trunc() {
        truncated if truncated == net => net,
        truncated => {
            problems.warn(
                located.at,
                format!("{name}.allowed_ips: {text:?} is read as {truncated}"),
                "write the network's own address",
            );
            truncated
        }
    };
    let dead = (forbidden(net.network()), forbidden(net.broadcast()));
    if let (Some(what), Some(also)) = dead
        && what == also
        && net.prefix_len() >= 4
    {
        problems.warn(
            located.at,
            format!("{name}.allowed_ips: {text:?} is never dialled ({what})"),
            "remove it",
        );
    }
    let wide = match net {
        IpNet::V4(net) => net.prefix_len() < 8,
        IpNet::V6(net) => net.prefix_len() < 16,
    };
    if wide {
        problems.warn(
            located.at,
            format!("{name}.allowed_ips: {text:?} is a very large network"),
            "name the networks that are meant",
        );
    }
    Some(net)
}

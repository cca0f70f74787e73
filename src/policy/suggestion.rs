//! The lines of policy that would have allowed what was refused.
//!
//! What the agent sent ends up in a file that a person edits: every string is quoted, everything but
//! printable ASCII is escaped, and the whole is bounded.
#![forbid(unsafe_code)]

use std::fmt::Write as _;

use super::decision::Request;
use super::host::Host;
use super::payload::{Call, Exchange, Message, Operation, Payload, Rpc};

/// Longer strings than this are not repeated.
const MAX_PART: usize = 512;

/// More rules than these are not suggested at once.
const MAX_RULES: usize = 8;

/// A policy of its own that allows this request only: what was read of its content, if that was
/// what was judged, else its method and path.
pub(super) fn request(exe: &str, host: &Host, port: u16, request: &Request<'_>) -> String {
    let Some((protocol, rules)) = request.payload.map(rules) else {
        return allow(exe, host, port, Some((request.method, request.path)));
    };
    match rules {
        Err(comment) => comment.into(),
        Ok(rules) if rules.len() > MAX_RULES || rules.iter().any(|rule| rule.len() > MAX_PART) => {
            "# too long to suggest".into()
        }
        Ok(rules) => whole(exe, host, port, Some((protocol, request.path, &rules))),
    }
}

/// The same for a handshake, or a message on a WebSocket.
pub(super) fn websocket(exe: &str, host: &Host, port: u16, request: &Request<'_>) -> String {
    let Request { method, path, payload, .. } = request;
    if method.len() > MAX_PART {
        return "# too long to suggest".into();
    }
    // What was read of a message was judged.
    if let Some(Payload { graphql: Some(graphql), .. }) = payload
        && !graphql.operations.is_empty()
    {
        return match distinct(graphql.operations.iter().map(operation)) {
            Err(comment) => comment.into(),
            Ok(rules) if rules.iter().any(|rule| rule.len() > MAX_PART) => {
                "# too long to suggest".into()
            }
            Ok(rules) => whole(exe, host, port, Some(("websocket", path, &rules))),
        };
    }
    let rule = format!("method: {}, path: {}", quote(method), quote(&escape_glob(path)));
    whole(exe, host, port, Some(("websocket", path, &[rule])))
}

/// The protocol and its allow rules, or a comment why there are none.
fn rules(payload: &Payload) -> (&'static str, Result<Vec<String>, &'static str>) {
    if let Some(graphql) = &payload.graphql {
        return ("graphql", distinct(graphql.operations.iter().map(operation)));
    }
    match &payload.rpc {
        Some(Rpc { mcp, exchange: Exchange::Messages(messages), .. }) => {
            let calls = messages.iter().filter_map(|message| match message {
                Message::Call(call) => Some(if *mcp { mcp_call(call) } else { Ok(rpc_call(call)) }),
                Message::Response if *mcp => None,
                Message::Response => Some(Err("# only `protocol: mcp` has responses of clients")),
            });
            (if *mcp { "mcp" } else { "json-rpc" }, distinct(calls))
        }
        Some(Rpc { exchange: Exchange::Stream | Exchange::EndOfSession, .. }) => {
            ("mcp", Err("# give the endpoint with `protocol: mcp` the `path` of the server"))
        }
        None => ("rest", Err("# what it says was not read")),
    }
}

fn distinct(
    rules: impl Iterator<Item = Result<String, &'static str>>,
) -> Result<Vec<String>, &'static str> {
    let mut distinct = Vec::new();
    for rule in rules {
        let rule = rule?;
        if !distinct.contains(&rule) {
            distinct.push(rule);
        }
        if distinct.len() > MAX_RULES {
            break;
        }
    }
    Ok(distinct)
}

fn operation(operation: &Operation) -> Result<String, &'static str> {
    let Some(kind) = operation.kind else {
        return Err(
            "# a persisted query: register it in graphql_persisted_queries by its hash or \
                    id, with what it does, and write `persisted_queries: allow_registered`",
        );
    };
    let fields: Vec<_> = operation.fields.iter().map(|field| quote(field)).collect();
    Ok(format!("operation_type: {}, fields: [{}]", kind.word(), fields.join(", ")))
}

fn rpc_call(call: &Call) -> String {
    let name = if call.method == "*" { "\\*".into() } else { escape_glob(&call.method) };
    format!("method: {}", quote(&name))
}

fn mcp_call(call: &Call) -> Result<String, &'static str> {
    let plain = |text: &str| !text.is_empty() && escape_glob(text) == text;
    match &call.tool {
        _ if !plain(&call.method) => Err("# no rule can name this method"),
        None => Ok(format!("method: {}", quote(&call.method))),
        Some(tool) if plain(tool) => {
            Ok(format!("method: {}, tool: {}", quote(&call.method), quote(tool)))
        }
        Some(_) => Err("# no rule can name this tool"),
    }
}

/// A policy of its own that allows this connection; with a method and a path, this request only.
pub(super) fn allow(exe: &str, host: &Host, port: u16, request: Option<(&str, &str)>) -> String {
    let Some((method, path)) = request else {
        return whole(exe, host, port, None);
    };
    if method.len() > MAX_PART {
        return "# too long to suggest".into();
    }
    let rule = format!("method: {}, path: {}", quote(method), quote(&escape_glob(path)));
    whole(exe, host, port, Some(("rest", path, &[rule])))
}

/// With a protocol, a path and rules: what `allow` holds of each.
fn whole(exe: &str, host: &Host, port: u16, request: Option<(&str, &str, &[String])>) -> String {
    if exe.len() > MAX_PART || request.is_some_and(|(_, path, _)| path.len() > MAX_PART) {
        return "# too long to suggest".into();
    }
    if exe.is_empty() {
        return "# the binary is not known: no line can allow it".into();
    }
    let mut out = String::from("network_policies:\n");
    let _ = writeln!(out, "  allow-{}-{port}:", key(host));
    let _ = writeln!(out, "    endpoints:");
    let host = quote(host.as_str());
    match request {
        None => {
            let _ = writeln!(out, "      - {{ host: {host}, port: {port} }}");
        }
        Some((protocol, path, rules)) => {
            let _ = writeln!(out, "      - host: {host}");
            let _ = writeln!(out, "        port: {port}");
            if !matches!(protocol, "rest" | "websocket") {
                let _ = writeln!(out, "        path: {}", quote(&escape_glob(path)));
            }
            let _ = writeln!(out, "        protocol: {protocol}");
            let _ = writeln!(out, "        enforcement: enforce");
            if path.contains("%2F") {
                let _ = writeln!(out, "        allow_encoded_slash: true");
            }
            let _ = writeln!(out, "        rules:");
            for rule in rules {
                let _ = writeln!(out, "          - allow: {{ {rule} }}");
            }
        }
    }
    let exe = if exe.contains('*') { escape_glob(exe) } else { exe.to_owned() };
    let _ = writeln!(out, "    binaries:");
    let _ = writeln!(out, "      - {{ path: {} }}", quote(&exe));
    out
}

/// A map key made of the host.
fn key(host: &Host) -> String {
    let mut key = host.as_str().replace(|c: char| !c.is_ascii_alphanumeric(), "-");
    key.truncate(64);
    key
}

/// A pattern that matches this string only.
fn escape_glob(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if matches!(c, '*' | '?' | '[' | ']' | '{' | '}' | '\\' | '!') {
            out.push('\\');
        }
        out.push(c);
    }
    out
}

/// A double-quoted YAML scalar in printable ASCII.
pub(super) fn quote(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    out.push('"');
    for c in text.chars() {
        match c {
            '"' | '\\' => {
                out.push('\\');
                out.push(c);
            }
            ' '..='~' => out.push(c),
            _ => {
                let _ = write!(out, "\\U{:08X}", u32::from(c));
            }
        }
    }
    out.push('"');
    out
}

/// A string for a message: printable ASCII, bounded.
pub(super) fn printable(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars() {
        if out.len() >= MAX_PART {
            out.push_str("...");
            break;
        }
        match c {
            ' '..='~' => out.push(c),
            _ => {
                let _ = write!(out, "\\u{{{:x}}}", u32::from(c));
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::{Caller, Connect, Graphql, OperationKind, Request, Source, Verdict, load};

    /// What is suggested is loaded, and allows what was refused.
    fn round_trip(exe: &str, host: &str, request: Option<(&str, &str)>) {
        let host = Host::parse(host).expect("host");
        let yaml = allow(exe, &host, 8443, request);
        assert!(yaml.bytes().all(|b| b == b'\n' || (b' '..=b'~').contains(&b)), "{yaml}");
        let source = Source { name: "suggested.yaml", bytes: yaml.as_bytes() };
        let loaded = load(&source, None).unwrap_or_else(|e| panic!("{e}\n{yaml}"));
        let caller = Caller { exe: exe.into(), ..Caller::default() };
        let connect = loaded.policy.connect(&caller, &host, 8443);
        assert!(matches!(connect, Connect::Allow(_)), "{yaml}\n{connect:?}");
        let other = Caller { exe: "/usr/bin/other".into(), ..Caller::default() };
        assert!(matches!(loaded.policy.connect(&other, &host, 8443), Connect::Deny(_)), "{yaml}");
        if let Some((method, path)) = request {
            let request = Request { method, path, query: &[], payload: None, overrides: &[] };
            let verdict = loaded.policy.request(&caller, &host, 8443, &request);
            assert!(matches!(verdict, Verdict::Allow { .. }), "{yaml}\n{verdict:?}");
            let request =
                Request { method, path: "/other", query: &[], payload: None, overrides: &[] };
            let verdict = loaded.policy.request(&caller, &host, 8443, &request);
            assert!(matches!(verdict, Verdict::Deny(_)), "{yaml}\n{verdict:?}");
        }
    }

    #[test]
    fn suggestions_do_what_they_say() {
        round_trip("/usr/bin/curl", "example.com", None);
        round_trip("/usr/bin/curl", "10.0.0.1", None);
        round_trip("/usr/bin/curl", "[2001:db8::1]", Some(("GET", "/")));
        round_trip("/usr/bin/curl", "example.com", Some(("POST", "/a*b,c!d(e)")));
        round_trip("/usr/bin/curl", "example.com", Some(("GET", "/%7Ba%7D/100%25/%2F%5B")));
        round_trip("/tmp/\u{202e}a\"b\\c*[x] y: #\u{e4}", "example.com", None);
        round_trip("/tmp/no*", "example.com", Some(("GET", "/x")));
    }

    /// The same for what is read of a content.
    fn content_round_trip(payload: &Payload) {
        let host = Host::parse("example.com").expect("host");
        let asked = Request {
            method: "POST",
            path: "/a*b",
            query: &[],
            payload: Some(payload),
            overrides: &[],
        };
        let yaml = request("/usr/bin/curl", &host, 8443, &asked);
        assert!(yaml.bytes().all(|b| b == b'\n' || (b' '..=b'~').contains(&b)), "{yaml}");
        let source = Source { name: "suggested.yaml", bytes: yaml.as_bytes() };
        let loaded = load(&source, None).unwrap_or_else(|e| panic!("{e}\n{yaml}"));
        assert_eq!(loaded.warnings, [], "{yaml}");
        let caller = Caller { exe: "/usr/bin/curl".into(), ..Caller::default() };
        let judge = |request: &Request<'_>| loaded.policy.request(&caller, &host, 8443, request);
        assert!(matches!(judge(&asked), Verdict::Allow { .. }), "{yaml}\n{:?}", judge(&asked));
        let elsewhere = Request { path: "/axb", ..asked };
        assert!(matches!(judge(&elsewhere), Verdict::Deny(_)), "{yaml}");
        let unread = Request { payload: None, ..asked };
        assert!(matches!(judge(&unread), Verdict::Deny(_)), "{yaml}");
    }

    fn graphql(kind: OperationKind, fields: &[&str]) -> Operation {
        let fields = fields.iter().map(|field| (*field).to_owned()).collect();
        Operation { kind: Some(kind), name: Some("N".into()), fields, persisted: None }
    }

    fn rpc(mcp: bool, calls: &[(&str, Option<&str>)]) -> Payload {
        let call = |(method, tool): &(&str, Option<&str>)| {
            let tool = tool.map(str::to_owned);
            Message::Call(Call { method: (*method).to_owned(), tool, ..Call::default() })
        };
        let exchange = Exchange::Messages(calls.iter().map(call).collect());
        Payload { rpc: Some(Rpc { mcp, exchange, error: None }), graphql: None }
    }

    #[test]
    fn suggestions_for_contents_do_what_they_say() {
        let operations = vec![
            graphql(OperationKind::Query, &["viewer", "repo"]),
            graphql(OperationKind::Mutation, &["createIssue"]),
        ];
        let graphql = Some(Graphql { operations, error: None });
        content_round_trip(&Payload { graphql, rpc: None });
        content_round_trip(&rpc(false, &[("reports.list", None), ("a[b]*", None), ("*", None)]));
        let calls = [("initialize", None), ("tools/call", Some("a.b-c_d"))];
        content_round_trip(&rpc(true, &calls));
    }

    #[test]
    fn what_no_rule_can_name_is_not_suggested() {
        let host = Host::parse("example.com").expect("host");
        let suggest = |payload: &Payload| {
            let payload = Some(payload);
            request(
                "/x",
                &host,
                1,
                &Request { method: "POST", path: "/", query: &[], payload, overrides: &[] },
            )
        };
        let many = vec![("a", None); 2];
        assert!(!suggest(&rpc(true, &many)).starts_with('#'), "the same rule once");
        let names: Vec<String> = (0..99).map(|n| format!("m{n}")).collect();
        let many: Vec<_> = names.iter().map(|name| (name.as_str(), None)).collect();
        assert!(suggest(&rpc(false, &many)).starts_with('#'));
        assert!(suggest(&rpc(true, &[("tools/*", None)])).starts_with('#'));
        assert!(suggest(&rpc(true, &[("tools/call", Some("a*"))])).starts_with('#'));
        assert!(suggest(&rpc(false, &[(&"m".repeat(9999), None)])).starts_with('#'));
        let exchange = Exchange::EndOfSession;
        let rpc = Some(Rpc { mcp: true, exchange, error: None });
        assert!(suggest(&Payload { rpc, graphql: None }).starts_with('#'));
    }

    #[test]
    fn what_is_suggested_for_a_message_allows_it() {
        let host = Host::parse("example.com").expect("host");
        for method in ["GET", "WEBSOCKET_TEXT", "WEBSOCKET_BINARY"] {
            let request =
                Request { method, path: "/a*b", query: &[], payload: None, overrides: &[] };
            let yaml = websocket("/x", &host, 443, &request);
            let source = Source { name: "suggested.yaml", bytes: yaml.as_bytes() };
            let policy = load(&source, None).unwrap_or_else(|e| panic!("{e}\n{yaml}")).policy;
            let caller = Caller { exe: "/x".into(), ..Caller::default() };
            let verdict = policy.websocket(&caller, &host, 443, &request);
            assert!(matches!(verdict, Verdict::Allow { .. }), "{yaml}\n{verdict:?}");
            let verdict = policy.request(&caller, &host, 443, &request);
            assert!(matches!(verdict, Verdict::Deny(_)), "{yaml}\n{verdict:?}");
        }
    }

    #[test]
    fn too_long_is_not_repeated() {
        let host = Host::parse("example.com").expect("host");
        assert!(allow(&"x".repeat(MAX_PART + 1), &host, 1, None).starts_with('#'));
        assert!(allow("/x", &host, 1, Some(("GET", &"x".repeat(9999)))).starts_with('#'));
        assert!(allow("", &host, 1, None).starts_with('#'));
        assert!(printable(&"\u{7}".repeat(9999)).len() < MAX_PART + 16);
    }
}

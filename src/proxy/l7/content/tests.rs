//! What is read of contents, beside the corpus (`tests/corpus/policy`), which has the bulk.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use proptest::prelude::*;

use super::*;
use crate::policy::{
    Caller, Host, Operation, OperationKind, Policy, Request, Source, Verdict, load,
};

const JSON: (&[u8], &[u8]) = (b"Content-Type", b"application/json");

pub(super) fn target() -> CanonicalTarget {
    crate::policy::canonical_path("/x", false).expect("target")
}

fn graphql() -> Inspection {
    Inspection { max_bytes: 65536, graphql: true, rpc: None }
}

fn post<'a>(body: &str, fields: &[(&'a [u8], &'a [u8])]) -> Payload {
    read(&graphql(), &Facts::new("POST", &target(), fields.iter().copied()), body.as_bytes())
}

fn document(text: &str) -> Result<Operation, String> {
    let body = serde_json::json!({ "query": text }).to_string();
    let Graphql { mut operations, error } = post(&body, &[JSON]).graphql.expect("asked for");
    if let Some(error) = error {
        return Err(error);
    }
    assert_eq!(operations.len(), 1);
    Ok(operations.remove(0))
}

/// A selection, and what it adds to the root fields.
#[derive(Debug, Clone)]
enum Node {
    Field { alias: Option<String>, name: String },
    Inline { on: Option<String>, inner: Vec<Node> },
    Spread { inner: Vec<Node> },
}

fn nodes() -> impl Strategy<Value = Vec<Node>> {
    let name = "[a-zA-Z_][a-zA-Z0-9_]{0,8}";
    let field =
        (proptest::option::of(name), name).prop_map(|(alias, name)| Node::Field { alias, name });
    let node = field.prop_recursive(4, 24, 4, move |inner| {
        let inner = proptest::collection::vec(inner, 1..4);
        prop_oneof![
            (proptest::option::of("[A-Z][a-z]{0,5}"), inner.clone())
                .prop_map(|(on, inner)| Node::Inline { on, inner }),
            inner.prop_map(|inner| Node::Spread { inner }),
        ]
    });
    proptest::collection::vec(node, 1..6)
}

/// Writes a selection set; `blank` goes between tokens, `fragments` gets what is spread.
fn spell(
    nodes: &[Node],
    blank: &str,
    fragments: &mut Vec<String>,
    roots: &mut BTreeSet<String>,
) -> String {
    let mut out = format!("{{{blank}");
    for node in nodes {
        match node {
            Node::Field { alias, name } => {
                roots.insert(name.clone());
                if let Some(alias) = alias {
                    // The library takes no comma here, and refuses the document.
                    let gap = if blank.contains(',') { "" } else { blank };
                    let _ = write!(out, "{alias}{gap}:{blank}");
                }
                let _ =
                    write!(out, "{name}(a:{blank}\"}} {{ # {name}\"){blank}{{ hidden }}{blank}");
            }
            Node::Inline { on, inner } => {
                let inner = spell(inner, blank, fragments, roots);
                let on = on.as_ref().map_or(String::new(), |on| format!("on {on}"));
                let _ = write!(out, "... {on} @include(if: false) {inner}{blank}");
            }
            Node::Spread { inner } => {
                let inner = spell(inner, blank, fragments, roots);
                let name = format!("F{}", fragments.len());
                fragments.push(format!("fragment {name} on T {inner}"));
                let _ = write!(out, "...{name}{blank}");
            }
        }
    }
    out + "}"
}

proptest! {
    /// Aliases, fragments, conditions, strings and comments change nothing.
    #[test]
    fn root_fields_are_found_however_they_are_written(
        nodes in nodes(),
        blank in prop_oneof![Just(" "), Just(", "), Just("\n"), Just("\r\n\t"), Just(" # }\n ")],
        first in any::<bool>(),
    ) {
        let mut fragments = Vec::new();
        let mut roots = BTreeSet::new();
        let set = spell(&nodes, blank, &mut fragments, &mut roots);
        let operation = format!("mutation M($a: [Int!]! = [1]) {set}");
        let fragments = fragments.join(blank);
        let text = if first { operation + blank + &fragments } else { fragments + blank + &operation };
        let read = document(&text).map_err(|error| TestCaseError::fail(format!("{error}: {text}")))?;
        prop_assert_eq!(read.kind, Some(OperationKind::Mutation));
        prop_assert_eq!(read.name.as_deref(), Some("M"));
        prop_assert_eq!(read.fields, roots.into_iter().collect::<Vec<_>>());
    }

    /// A batch is allowed if each of its requests is.
    #[test]
    fn batches_are_all_or_nothing(
        fields in proptest::collection::vec(prop_oneof![Just("a"), Just("b"), Just("deny"), Just("x")], 1..6),
    ) {
        let policy = policy(
            "protocol: graphql, enforcement: enforce, \
             rules: [{ allow: { operation_type: query, fields: [a, b, deny] } }], \
             deny_rules: [{ operation_type: query, fields: [deny] }]",
        );
        let one = |field: &&str| format!("{{\"query\":\"{{ {field} }}\"}}");
        let alone = |field: &&str| allowed(&policy, &one(field));
        let batch = format!("[{}]", fields.iter().map(one).collect::<Vec<_>>().join(","));
        prop_assert_eq!(allowed(&policy, &batch), fields.iter().all(alone));
        let whole = format!("{{\"query\":\"{{ {} }}\"}}", fields.join(" "));
        prop_assert_eq!(allowed(&policy, &whole), fields.iter().all(alone));
    }

    /// Whatever the body is, nothing that was not asked for is kept, and nothing panics.
    #[test]
    fn any_bytes_are_read_or_refused(body in proptest::collection::vec(any::<u8>(), 0..256)) {
        let rpc = RpcInspection { mcp: true, params: vec!["a".into()] };
        let inspection = Inspection { max_bytes: 1, graphql: true, rpc: Some(rpc) };
        let payload = read(&inspection, &Facts::new("POST", &target(), [JSON].into_iter()), &body);
        let graphql = payload.graphql.expect("asked for");
        prop_assert_eq!(graphql.operations.is_empty(), graphql.error.is_some());
        let rpc = payload.rpc.expect("asked for");
        let empty = matches!(&rpc.exchange, Exchange::Messages(list) if list.is_empty());
        prop_assert_eq!(empty, rpc.error.is_some());
    }
}

fn policy(endpoint: &str) -> Policy {
    let yaml = format!(
        "network_policies: {{ p: {{ endpoints: [{{ host: h.test, port: 1, {endpoint} }}], \
         binaries: [{{ path: /x }}] }} }}"
    );
    let source = Source { name: "policy.yaml", bytes: yaml.as_bytes() };
    load(&source, None).unwrap_or_else(|error| panic!("{error}")).policy
}

fn allowed(policy: &Policy, body: &str) -> bool {
    let caller = Caller { exe: "/x".into(), ..Caller::default() };
    let host = Host::parse("h.test").expect("host");
    let inspection = policy.inspection(&caller, &host, 1, "/").expect("content is judged");
    let target = target();
    let facts = Facts::new("POST", &target, [JSON].into_iter());
    let payload = read(&inspection, &facts, body.as_bytes());
    let payload = Some(&payload);
    let request = Request { method: "POST", path: "/", query: &[], payload, overrides: &[] };
    matches!(policy.request(&caller, &host, 1, &request), Verdict::Allow { .. })
}

#[test]
fn what_the_policy_did_not_get_is_refused() {
    let policy = policy("protocol: graphql, enforcement: audit, access: full");
    let caller = Caller { exe: "/x".into(), ..Caller::default() };
    let host = Host::parse("h.test").expect("host");
    let judge = |payload: Option<&Payload>| {
        let request = Request { method: "POST", path: "/", query: &[], payload, overrides: &[] };
        policy.request(&caller, &host, 1, &request)
    };
    let empty = Graphql::default();
    for payload in
        [None, Some(Payload::default()), Some(Payload { graphql: Some(empty), rpc: None })]
    {
        assert!(matches!(judge(payload.as_ref()), Verdict::Deny(_)), "{payload:?}");
    }
    assert!(policy.inspection(&caller, &host, 2, "/").is_none());
    let other = Caller { exe: "/y".into(), ..Caller::default() };
    assert!(policy.inspection(&other, &host, 1, "/").is_none());
}

#[test]
fn deep_and_long_documents_are_refused_in_no_time() {
    let deep = |open: &str, middle: &str, close: &str, n: usize| {
        document(&format!("{{ a{} {middle} {} }}", open.repeat(n), close.repeat(n)))
    };
    assert!(deep("{ a", "", "}", 100).is_ok());
    for n in [200, 5_000] {
        assert!(deep("{ a", "", "}", n).is_err());
        assert!(deep("...{ a", "", "}", n).is_err());
        assert!(deep("(b: [", "1", "])", 1).is_ok());
        assert!(document(&format!("{{ a(b: {}{}) }}", "[".repeat(n), "]".repeat(n))).is_err());
        assert!(document(&format!("{{ a(b: {}{}) }}", "{c:".repeat(n), "}".repeat(n))).is_err());
        assert!(
            document(&format!("query($a: {}Int{}) {{ a }}", "[".repeat(n), "]".repeat(n))).is_err()
        );
    }
    assert!(document(&format!("{{ {} }}", "a ".repeat(9_000))).is_ok());
    assert!(document(&format!("{{ {} }}", "a ".repeat(20_000))).is_err());
    // Fragments that spread each other are walked once each.
    let mut fragments = String::new();
    for n in 0..900 {
        let _ = writeln!(fragments, "fragment F{n} on T {{ ...F{} ...F{} a{n} }}", n + 1, n + 1);
    }
    let text = format!("{{ ...F0 }} {fragments} fragment F900 on T {{ last }}");
    assert_eq!(document(&text).map(|operation| operation.fields.len()), Ok(901));
}

#[test]
fn values_for_rules_are_bounded() {
    let rpc = Some(RpcInspection { mcp: false, params: vec!["a.b".into()] });
    let inspection = Inspection { max_bytes: 1, graphql: false, rpc };
    let read = |params: &str| {
        let body = format!("{{\"jsonrpc\":\"2.0\",\"method\":\"m\",\"params\":{params}}}");
        let target = target();
        let facts = Facts::new("POST", &target, [JSON].into_iter());
        let rpc = super::read(&inspection, &facts, body.as_bytes()).rpc.expect("asked for");
        match (rpc.error, rpc.exchange) {
            (None, Exchange::Messages(mut messages)) => match messages.remove(0) {
                Message::Call(call) => Ok(call.params),
                Message::Response => panic!("a response"),
            },
            (error, _) => Err(error.expect("an error")),
        }
    };
    let values = |params| {
        let values = read(params).expect(params);
        values.into_iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>()
    };
    assert_eq!(values("{\"a\":{\"b\":\"x\",\"c\":1}}"), ["a.b=x"]);
    assert_eq!(values("{\"a.b\":true,\"A\":{\"B\":null}}"), ["a.b=true", "a.b=null"]);
    assert_eq!(
        values("{\"a\":[{\"b\":[1,[2.5,-3]]},{\"b\":{\"x\":4}}]}"),
        ["a.b=1", "a.b=2.5", "a.b=-3"]
    );
    assert!(values("[1,{\"a\":{\"b\":1}}]").is_empty());
    assert!(values("null").is_empty());
    let many = |n: usize| format!("{{\"a\":{{\"b\":[{}1]}}}}", "1,".repeat(n));
    assert_eq!(read(&many(1023)).map(|values| values.len()), Ok(1024));
    assert!(read(&many(1024)).expect_err("too many").contains("1024"));
    assert!(read(&many(1_000_000)).is_err());
}

#[test]
fn heads_that_settle_it_need_no_body() {
    let worth = |method: &str, fields: &[(&[u8], &[u8])]| {
        Facts::new(method, &target(), fields.iter().copied()).settled(&graphql()).is_none()
    };
    assert!(worth("POST", &[JSON]));
    assert!(worth("GET", &[]));
    assert!(!worth("PUT", &[JSON]));
    assert!(!worth("POST", &[]));
    assert!(!worth("POST", &[JSON, (b"content-encoding", b"gzip")]));
    assert!(worth("POST", &[JSON, (b"content-encoding", b"identity")]));
    assert!(!worth("POST", &[(b"content-type", b"multipart/form-data; boundary=x")]));
    // What was settled without the body never says that the request may pass.
    let rpc = Some(RpcInspection { mcp: true, params: Vec::new() });
    let both = Inspection { max_bytes: 1, graphql: true, rpc };
    let target = target();
    let facts = Facts::new("DELETE", &target, [(&b"Mcp-Session-Id"[..], &b"s"[..])].into_iter());
    let settled = facts.settled(&both).expect("GraphQL has no DELETE");
    assert!(settled.graphql.is_some_and(|graphql| graphql.error.is_some()));
    assert!(settled.rpc.is_some_and(|rpc| rpc.error.is_some()));
}

/// PHP drops blanks before a name and what comes behind a NUL, Rack 2 and Node's qs the brackets
/// around it.
#[test]
fn names_that_some_reader_takes_for_another_are_refused() {
    let rpc = |mcp| {
        let rpc = Some(RpcInspection { mcp, params: Vec::new() });
        Inspection { max_bytes: 65536, graphql: false, rpc }
    };
    for name in [
        "%20query",
        "query%00",
        "query%00x",
        "%09+query[a]",
        "[query]",
        "[]query",
        "%5Bquery",
        "operationName%0a",
    ] {
        let target = format!("/x?query=%7Ba%7D&{name}=%7Bb%7D");
        let target = crate::policy::canonical_path(&target, false).expect("target");
        for (method, body) in [("GET", ""), ("POST", "{\"query\":\"{a}\"}")] {
            let facts = Facts::new(method, &target, [JSON].into_iter());
            let read = read(&graphql(), &facts, body.as_bytes()).graphql.expect("asked for");
            assert!(read.error.is_some(), "{method} {name}: {read:?}");
        }
    }
    for name in ["%20method", "[method]", "method%00", "params[x]"] {
        let target = format!("/x?{name}=y");
        let target = crate::policy::canonical_path(&target, false).expect("target");
        let facts = Facts::new("POST", &target, [JSON].into_iter());
        assert!(facts.settled(&rpc(false)).is_some(), "{name}");
    }
}

#[test]
fn a_denial_of_a_parameter_holds_for_calls_that_do_not_name_theirs() {
    let policy = policy(
        "protocol: json-rpc, enforcement: enforce, rules: [{ allow: { method: \"*\" } }], \
         deny_rules: [{ method: read, params: { path: \"/etc/**\" } }]",
    );
    let call = |method: &str, params: &str| {
        let body = format!("{{\"jsonrpc\":\"2.0\",\"method\":\"{method}\",\"params\":{params}}}");
        allowed(&policy, &body)
    };
    assert!(call("read", "{\"path\":\"/srv/x\"}"));
    assert!(!call("read", "{\"path\":\"/etc/x\"}"));
    assert!(!call("read", "[\"/etc/x\"]"));
    assert!(call("list", "[\"/etc/x\"]"), "of another method");
}

#[test]
fn a_denial_of_what_mcp_names_a_resource_by_holds() {
    let policy = policy(
        "protocol: mcp, enforcement: enforce, mcp: { allow_all_known_mcp_methods: true }, \
         deny_rules: [{ method: resources/read, params: { uri: \"file:///etc/**\" } }]",
    );
    let read = |key: &str, uri: &str| {
        let params = format!("{{\"{key}\":\"{uri}\"}}");
        let call = "\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"resources/read\"";
        allowed(&policy, &format!("{{{call},\"params\":{params}}}"))
    };
    assert!(read("uri", "file:///srv/x"));
    assert!(!read("uri", "file:///etc/passwd"));
    assert!(!read("URI", "file:///etc/passwd"));
}

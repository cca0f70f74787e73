//! Contents at random: what is valid, bent. `RINGFENCE_FUZZ_CASES` says how many a test tries,
//! `RINGFENCE_FUZZ_SEED` which; a failure names both and the case (`RINGFENCE_FUZZ_CASE`).
//!
//! What is accepted is compared with what a reader of the most usual kind takes from the same bytes.

use serde_json::Value;

use super::tests::target;
use super::*;
use crate::fuzz::Random;

fn fuzz(name: &'static str, case: impl FnMut(&mut Random)) {
    crate::fuzz::fuzz(name, 2_000, case);
}

const JSON: [(&[u8], &[u8]); 1] = [(b"Content-Type", b"application/json")];

const DOCUMENTS: [&str; 5] = [
    "{ viewer { login } }",
    "query Q($a: [Int!]! = [1, 2], $b: In = {c: \"x\"}) @d(e: $a) { v: viewer(first: 3) @skip(if: true) \
     { id } ...F ... on Q { b } ... { c } } fragment F on Q { d ...G } fragment G on Q { e }",
    "mutation M { a(x: \"\"\"block \\\"\"\" } string\"\"\", y: -1.5e3, z: [null, true, ENUM]) { id } }",
    "subscription { s } # comment } { x\n",
    "query A { a } query B { b } mutation C { c }",
];
const WORDS: [&str; 24] = [
    "{",
    "}",
    "(",
    "[",
    "...",
    "... on X",
    "\"",
    "\"\"\"",
    "\\",
    "#",
    "\r",
    "\u{2028}",
    "$a",
    "@",
    ":",
    "fragment F on X {",
    "query",
    "mutation {",
    "\u{feff}",
    "1e",
    "-",
    "a ",
    "...F",
    "\0",
];

#[test]
fn documents() {
    let inspection = Inspection { max_bytes: usize::MAX, graphql: true, rpc: None };
    let fields = [(&b"Content-Type"[..], &b"application/graphql"[..])];
    let target = target();
    let facts = Facts::new("POST", &target, fields.into_iter());
    fuzz("documents", |random| {
        let valid = DOCUMENTS[random.below(DOCUMENTS.len())];
        let body = random.bend(valid.as_bytes(), &WORDS);
        let graphql = read(&inspection, &facts, &body).graphql.expect("asked for");
        assert_eq!(graphql.error.is_some(), graphql.operations.is_empty());
        let text = String::from_utf8_lossy(&body);
        for operation in &graphql.operations {
            assert!(!operation.fields.is_empty(), "{text:?}");
            let word = operation.kind.expect("known").word();
            let shorthand = word == "query" && text.contains('{');
            assert!(text.contains(word) || shorthand, "{text:?}");
            for name in operation.fields.iter().chain(&operation.name) {
                assert!(text.contains(name.as_str()), "{name:?} in {text:?}");
            }
        }
    });
}

const ENVELOPES: [&str; 4] = [
    "{\"query\":\"{ a b }\",\"variables\":{\"x\":[1,{\"y\":null}]},\"operationName\":null}",
    "[{\"query\":\"mutation M { a }\",\"operationName\":\"M\"},{\"id\":\"known\"}]",
    "{\"extensions\":{\"persistedQuery\":{\"version\":1,\"sha256Hash\":\"abc\"},\"t\":{}}}",
    "{\"query\":\"query A { a } query B { b }\",\"operationName\":\"B\",\"documentId\":\"d\"}",
];
const MEMBERS: [&str; 22] = [
    "\"query\":",
    "\"Query\":",
    "\"id\":",
    "\"operationName\":",
    "null",
    "{",
    "[",
    "]",
    "}",
    ",",
    "\"",
    "\\u0000",
    "\\ud800",
    "1e999",
    "-0",
    "\"a\":1,",
    "\"method\":\"x\",",
    "\"name\":\"y\",",
    "\"params\":{",
    "\"jsonrpc\":\"2.0\"",
    "\u{feff}",
    "[{\"a\":",
];

#[test]
fn envelopes() {
    let inspection = Inspection { max_bytes: usize::MAX, graphql: true, rpc: None };
    fuzz("envelopes", |random| {
        let valid = ENVELOPES[random.below(ENVELOPES.len())];
        let body = random.bend(valid.as_bytes(), &MEMBERS);
        let target = target();
        let facts = Facts::new("POST", &target, JSON.into_iter());
        let graphql = read(&inspection, &facts, &body).graphql.expect("asked for");
        if graphql.error.is_some() {
            return;
        }
        let value: Value = serde_json::from_slice(&body).expect("JSON");
        let requests = value.as_array().cloned().unwrap_or_else(|| vec![value]);
        // Each request object is at least one operation, and each key of one is one too.
        assert!(graphql.operations.len() >= requests.len());
        for request in &requests {
            for key in ["id", "documentId", "queryId"] {
                let Some(id) = request.get(key).and_then(Value::as_str) else { continue };
                let named = |o: &crate::policy::Operation| {
                    o.persisted.as_ref().is_some_and(|persisted| persisted.key() == id)
                };
                assert!(graphql.operations.iter().any(named), "{request}");
            }
        }
    });
}

const MESSAGES: [&str; 5] = [
    "{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"tools/call\",\"params\":{\"name\":\"search\",\"arguments\":{\"a\":[1,2]}}}",
    "[{\"jsonrpc\":\"2.0\",\"method\":\"notifications/initialized\"},{\"jsonrpc\":\"2.0\",\"id\":\"x\",\"result\":{}}]",
    "{\"jsonrpc\":\"2.0\",\"id\":null,\"method\":\"m\",\"params\":[{\"a\":{\"b\":\"c\"}}]}",
    "{\"params\":{\"arguments\":{\"a\":\"v\"},\"name\":\"t\"},\"method\":\"tools/call\",\"id\":2,\"jsonrpc\":\"2.0\"}",
    "{\"jsonrpc\":\"2.0\",\"id\":9,\"error\":{\"code\":-1,\"message\":\"\"}}",
];

#[test]
fn messages() {
    let rpc = RpcInspection { mcp: true, params: vec!["arguments.a".into(), "x".into()] };
    let inspection = Inspection { max_bytes: usize::MAX, graphql: false, rpc: Some(rpc) };
    fuzz("messages", |random| {
        let valid = MESSAGES[random.below(MESSAGES.len())];
        let body = random.bend(valid.as_bytes(), &MEMBERS);
        let target = target();
        let facts = Facts::new("POST", &target, JSON.into_iter());
        let rpc = read(&inspection, &facts, &body).rpc.expect("asked for");
        let Exchange::Messages(messages) = rpc.exchange else { panic!("POST is messages") };
        if rpc.error.is_some() {
            assert!(messages.is_empty());
            return;
        }
        let value: Value = serde_json::from_slice(&body).expect("JSON");
        let values = value.as_array().cloned().unwrap_or_else(|| vec![value]);
        assert_eq!(messages.len(), values.len());
        for (message, value) in messages.iter().zip(&values) {
            match message {
                Message::Response => assert!(value.get("method").is_none(), "{value}"),
                Message::Call(call) => {
                    assert_eq!(value["method"], call.method, "{value}");
                    if call.method == "tools/call" {
                        let name = value["params"]["name"].as_str();
                        assert_eq!(name, call.tool.as_deref(), "{value}");
                    }
                    let argument = value["params"]["arguments"]["a"].as_str();
                    let kept = |text| call.params.iter().any(|(_, value)| value == text);
                    assert!(argument.is_none_or(kept), "{value}");
                }
            }
        }
    });
}

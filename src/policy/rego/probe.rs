//! Asks a text, at load, what it will be asked later: a rule that fails is found before the agent
//! runs. The questions are made of the policy itself: each endpoint by one of its binaries, each rule
//! by a request that fits it, and one that fits nothing.
#![forbid(unsafe_code)]

use serde_json::Value as Json;

use super::contract::{Contract, input};
use super::runner::{Fault, Runner};
use crate::policy::decision::{Caller, Request};
use crate::policy::digest::from_hex;
use crate::policy::host::Host;

/// The most questions; a start waits for them.
const QUESTIONS: usize = 128;

/// What failed.
pub(super) struct Failed {
    pub fault: Fault,
    /// A request was asked about, not a connection.
    pub request: bool,
}

pub(super) fn probe(runner: &Runner, contract: Contract, data: &Json) -> Result<(), Failed> {
    let mut questions = QUESTIONS;
    let stranger = Caller { exe: "/ringfence/probe".into(), ..Caller::default() };
    let nowhere = [("probe.invalid", 443), ("203.0.113.1", 1)];
    for (host, port) in nowhere {
        ask(runner, contract, &stranger, host, port, &Json::Null, &mut questions)?;
    }
    let policies = data.get("network_policies").and_then(Json::as_object);
    for policy in policies.into_iter().flat_map(|policies| policies.values()) {
        let caller = caller(policy);
        for endpoint in list(policy, "endpoints") {
            let host = endpoint.get("host").and_then(Json::as_str).unwrap_or("probe.invalid");
            let port = list(endpoint, "ports").next().and_then(Json::as_u64);
            let port = port.and_then(|port| u16::try_from(port).ok()).unwrap_or(443);
            ask(runner, contract, &caller, &sample(host), port, endpoint, &mut questions)?;
        }
    }
    Ok(())
}

fn ask(
    runner: &Runner,
    contract: Contract,
    caller: &Caller,
    host: &str,
    port: u16,
    endpoint: &Json,
    questions: &mut usize,
) -> Result<(), Failed> {
    let Ok(host) = Host::parse(host) else {
        return Ok(());
    };
    if *questions == 0 {
        return Ok(());
    }
    *questions -= 1;
    let failed = |request| move |fault| Failed { fault, request };
    let mut asking = runner.ask(&input(caller, &host, port, None));
    let egress = contract.egress(&mut asking).map_err(failed(false))?;
    let mut judge = |method: &str, path: &str, query: &[(String, String)]| {
        if *questions == 0 {
            return Ok(());
        }
        *questions -= 1;
        let request = Request { method, path, query, payload: None, overrides: &[] };
        let mut asking = runner.ask(&input(caller, &host, port, Some(&request)));
        contract.request(&mut asking, &egress, path).map(drop).map_err(failed(true))
    };
    judge("GET", "/", &[])?;
    let allow = list(endpoint, "rules").filter_map(|rule| rule.get("allow"));
    for rule in allow.chain(list(endpoint, "deny_rules")) {
        let text = |key| rule.get(key).and_then(Json::as_str);
        let method = text("method").filter(|method| *method != "*").unwrap_or("GET");
        let query: Vec<_> = rule
            .get("query")
            .and_then(Json::as_object)
            .into_iter()
            .flatten()
            .map(|(key, matcher)| (key.clone(), sample(glob(matcher))))
            .collect();
        judge(method, &sample(text("path").unwrap_or("/")), &query)?;
    }
    Ok(())
}

/// The policy's first binary, as its entry asks for it.
fn caller(policy: &Json) -> Caller {
    let binary = list(policy, "binaries").next();
    let text = |key: &str| binary.and_then(|binary| binary.get(key)).and_then(Json::as_str);
    let digits = |digest: &str| from_hex(digest.strip_prefix("sha256:").unwrap_or(digest));
    Caller {
        exe: text("path").map_or("/ringfence/probe".into(), sample),
        sha256: text("sha256").and_then(digits),
        ..Caller::default()
    }
}

fn list<'j>(object: &'j Json, key: &str) -> impl Iterator<Item = &'j Json> {
    object.get(key).and_then(Json::as_array).into_iter().flatten()
}

/// A matcher's first glob.
fn glob(matcher: &Json) -> &str {
    let any = || matcher.get("any")?.get(0);
    matcher.as_str().or_else(|| matcher.get("glob").or_else(any)?.as_str()).unwrap_or("a")
}

/// A string that the pattern matches, for the usual patterns.
fn sample(pattern: &str) -> String {
    let mut out = String::new();
    let mut chars = pattern.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '*' | '?' => {
                while chars.next_if_eq(&'*').is_some() {}
                out.push('a');
            }
            '[' => {
                chars.by_ref().find(|c| *c == ']');
                out.push('a');
            }
            '{' => {
                out.extend(chars.by_ref().take_while(|c| !matches!(c, ',' | '}')));
                // What is left of the alternatives.
                if chars.clone().any(|c| c == '}') {
                    chars.by_ref().find(|c| *c == '}');
                }
            }
            '\\' => out.extend(chars.next()),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::sample;

    #[test]
    fn samples() {
        for (pattern, text) in [
            ("**.example.com", "a.example.com"),
            ("*-api.example.com", "a-api.example.com"),
            ("/v1/{a,b}/*", "/v1/a/a"),
            ("/[!x]/\\*", "/a/*"),
            ("/plain", "/plain"),
        ] {
            assert_eq!(sample(pattern), text);
        }
    }
}

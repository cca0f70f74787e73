//! Policies, their patterns, and what is judged by them, bent. See [`crate::fuzz`].

use super::glob::{PathGlob, Scope, ValueGlob, canonical_pattern, never_matches};
use super::host_pattern::HostPattern;
use super::*;
use crate::fuzz::{Random, alone, fuzz};

const TEXTS: [&str; 4] = [
    include_str!("../../examples/policy.yaml"),
    include_str!("../../tests/supervisor/policy.yaml"),
    "version: 1\nnetwork_policies:\n  a:\n    endpoints:\n      - {host: '*.x.test', ports: [80, 443], \
     protocol: rest, rules: [{allow: {method: GET, path: '/v1/**', query: {a: 'b*'}}}], deny_rules: \
     [{method: '*', path: /secret}], allowed_ips: [10.0.0.0/8], tls: skip}\n      - {host: x.test, port: \
     443, protocol: websocket, access: read-write}\n    binaries: [{path: '/usr/bin/*'}]\n",
    "network_policies:\n  a:\n    endpoints:\n      - {host: x.test, port: 443, path: /g, protocol: graphql, \
     rules: [{allow: {operation_type: '*', operation_name: 'A*', fields: ['b*']}}]}\n      - {host: \
     x.test, port: 443, path: /m, protocol: mcp, mcp: {allow_all_known_mcp_methods: true, \
     max_body_bytes: 9}, deny_rules: [{method: tools/call, tool: {any: [x, 'y*']}}]}\n    binaries: [{path: '**'}]\n",
];
const YAML: [&str; 40] = [
    "\n",
    "\n  ",
    "- ",
    ": ",
    "{",
    "}",
    "[",
    "]",
    "&a [*a, *a]",
    "*a",
    "<<: *a",
    "!!binary x",
    "!!int",
    "? ",
    ">-\n",
    "|2\n",
    "---\n",
    "...\n",
    "%YAML 1.1\n",
    "\"\\u0000\"",
    "'",
    "#",
    "null",
    "~",
    "yes",
    "1e999",
    "0x7fffffffffffffffff",
    "-1",
    "99999999999999999999",
    "**",
    "*.*.",
    "{a,b}[!x",
    "\u{feff}",
    "\u{202e}",
    "\u{2028}",
    "\t",
    "host: ",
    "port: 0",
    "access: full",
    "network_policies:\n",
];
const REGO: [&str; 20] = [
    "\n",
    "{",
    "}",
    "[",
    "]",
    "(",
    ")",
    ":=",
    "some x in ",
    "every x in ",
    "not ",
    "default allow := ",
    "import rego.v1\n",
    "package a\n",
    "`",
    "\"",
    "#",
    "input.",
    "1e999",
    "data.x[_]",
];

/// Judges something by a policy: whatever it says, it says it.
fn ask(policy: &Policy, random: &mut Random) {
    let host = random.pick(&["x.test", "a.x.test", "api.example.com", "10.0.0.1", "::1"]);
    let host = Host::parse(host).expect("host");
    let port = [80, 443, 8080, 6443][random.below(4)];
    let exe = random.pick(&["/usr/bin/curl", "/", "", "/usr/bin/../x", "\u{202e}"]).to_owned();
    let caller = Caller { exe, ancestors: vec!["/bin/sh".into()], sha256: None, tainted: None };
    if let Connect::Allow(grant) = policy.connect(&caller, &host, port) {
        let ip = if random.once_in(2) { "10.1.2.3" } else { "169.254.169.254" };
        let ip = ip.parse().expect("address");
        let passes = policy.destination(&grant, &host, port, ip).is_ok();
        assert!(!passes || forbidden(ip).is_none(), "{ip} is for nobody");
    }
    let target = random.pick(&["/v1/x?a=b", "/secret", "/g", "/m", "/"]);
    let target = canonical_path(target, false).expect("a target");
    let _ = policy.inspection(&caller, &host, port, &target.path);
    let method = random.pick(&["GET", "POST", "M-SEARCH"]);
    let (path, query) = (target.path.as_str(), target.pairs.as_slice());
    let request = Request { method, path, query, payload: None, overrides: &[] };
    if let Verdict::Deny(denial) = policy.request(&caller, &host, port, &request) {
        assert!(!denial.reason.is_empty());
    }
    let _ = policy.websocket(&caller, &host, port, &request);
}

fn judge(loaded: Result<Loaded, LoadError>, random: &mut Random) -> bool {
    match loaded {
        Ok(loaded) => {
            assert!(loaded.warnings.iter().all(|warning| !warning.to_string().is_empty()));
            ask(&loaded.policy, random);
            true
        }
        Err(error) => {
            let text = error.to_string();
            assert!(!text.is_empty());
            assert!(!text.contains(['\0', '\u{1b}', '\u{202e}']), "unescaped: {text:?}");
            false
        }
    }
}

#[test]
fn policy_texts() {
    let mut good = 0_u64;
    fuzz("policy_texts", 150, |random| {
        let text = random.bent(&TEXTS, &YAML);
        let source = Source { name: "policy.yaml", bytes: &text };
        good += u64::from(judge(load(&source, None), random));
    });
    assert!(alone() || good > 0, "nothing was accepted");
}

#[test]
fn policy_texts_with_rego() {
    let mut good = 0_u64;
    fuzz("policy_texts_with_rego", 20, |random| {
        let yaml = Source { name: "policy.yaml", bytes: TEXTS[random.below(2)].as_bytes() };
        let rules = random.bend(include_bytes!("../../examples/policy.rego"), &REGO);
        let rego = Source { name: "policy.rego", bytes: &rules };
        good += u64::from(judge(load(&yaml, Some(&rego)), random));
    });
    assert!(alone() || good > 0, "nothing was accepted");
}

const TARGETS: [&str; 8] = [
    "/",
    "/v1/models/a%20b?x=1&y=%2F",
    "/a/./b/../c;p=1/d",
    "http://h.test:80/a//b?q",
    "/%41%2f%2E%2e/x",
    "/a\\..\\b",
    "/caf%C3%A9/~user",
    "*",
];
const PATHS: [&str; 30] = [
    "/", "//", ".", "..", "/../", "/./", "%2F", "%2f", "%2E", "%2e%2e", "%5C", "\\", ";", "%3B",
    "%25", "%252F", "%", "%G0", "%00", "?", "&", "=", "+", "#", "@", "http://", ":", "é", "\0",
    "*",
];

#[test]
fn targets() {
    let mut good = 0_u64;
    fuzz("targets", 2_000, |random| {
        let target = random.bent_text(&TARGETS, &PATHS);
        let slash = random.once_in(2);
        let Ok(read) = canonical_path(&target, slash) else { return };
        good += 1;
        assert!(read.path.starts_with('/') && read.path.bytes().all(|b| b.is_ascii_graphic()));
        assert!(!read.path.contains("//") && !read.path.contains('?'), "{target:?}");
        let dots = |segment: &str| matches!(segment, "." | "..");
        assert!(!read.path.split('/').any(dots), "{target:?}");
        let again = canonical_path(&read.origin_form(), slash);
        let same = CanonicalTarget { authority: None, ..read.clone() };
        assert_eq!(again, Ok(same), "{target:?}");
        if !slash {
            assert_eq!(canonical_path(&target, true), Ok(read), "{target:?}");
        }
    });
    assert!(alone() || good > 0, "nothing was accepted");
}

const HOSTS: [&str; 8] = [
    "api.example.com",
    "*.example.com",
    "**.svc.cluster.local",
    "a*b.example.com.",
    "10.0.0.1",
    "[2001:db8::1]",
    "_srv._tcp.x.test",
    "xn--bcher-kva.example",
];
const LABELS: [&str; 22] = [
    ".",
    "..",
    "*",
    "**",
    "-",
    "_",
    ":",
    "::",
    "[",
    "]",
    "%eth0",
    "0x7f",
    "127.1",
    "0",
    "255",
    "::ffff:1.2.3.4",
    "é",
    "\u{212a}",
    "\0",
    "/",
    "@",
    "{a,b}",
];

#[test]
fn hosts() {
    let mut good = 0_u64;
    fuzz("hosts", 2_000, |random| {
        let text = random.bent_text(&HOSTS, &LABELS);
        let host = Host::parse(&text);
        if let Ok(host) = &host {
            good += 1;
            assert_eq!(Host::parse(host.as_str()).as_ref(), Ok(host), "{text:?}");
            assert_eq!(Host::parse(&host.to_string()).as_ref(), Ok(host), "{text:?}");
            assert_eq!(host.as_str(), host.as_str().to_ascii_lowercase());
        }
        match HostPattern::parse(&text) {
            Ok(HostPattern::Exact(exact)) => assert_eq!(Ok(exact), host, "{text:?}"),
            Ok(HostPattern::Wild(wild)) => {
                let front = random.bend_text("a", &["b", "-", "x.y", "."]);
                let rest = text.split_once('.').map_or("", |(_, rest)| rest);
                let Ok(host) = Host::parse(&format!("{front}.{rest}")) else { return };
                if wild.matches(&host) {
                    let rest = rest.to_ascii_lowercase();
                    let rest = rest.strip_suffix('.').unwrap_or(&rest);
                    assert!(host.as_str().ends_with(&format!(".{rest}")), "{text:?} {host}");
                    assert!(!host.is_ip(), "{text:?} {host}");
                }
            }
            Err(bad) => assert!(!bad.what.is_empty() && !bad.fix.is_empty()),
        }
    });
    assert!(alone() || good > 0, "nothing was accepted");
}

const PATTERNS: [&str; 8] = [
    "**",
    "/v1/**",
    "/repos/*/issues/[0-9]*",
    "/{a,b}/[!x]/?",
    "/a\\*b/%2a",
    "/caf\u{e9}/**/z",
    "/plain/path",
    "v1.*",
];
const GLOBS: [&str; 22] = [
    "*",
    "**",
    "***",
    "?",
    "[",
    "]",
    "[!",
    "[^",
    "[a-",
    "[]",
    "{",
    "}",
    "{a,{b,c}}",
    ",",
    "\\",
    "%2F",
    "%",
    "/",
    "//",
    ".",
    "é",
    "\0",
];

#[test]
fn patterns() {
    let mut good = 0_u64;
    fuzz("patterns", 500, |random| {
        let pattern = random.bent_text(&PATTERNS, &GLOBS);
        let path = random.bent_text(&TARGETS, &PATHS);
        let path = canonical_path(&path, true).map_or_else(|_| "/v1/x".into(), |read| read.path);
        let _ = never_matches(&canonical_pattern(&pattern));
        if let Ok(glob) = PathGlob::of_path(&pattern) {
            good += 1;
            let _ = glob.matches(&path);
        }
        if let Ok(glob) = PathGlob::of_binary(&pattern) {
            let _ = glob.matches(&path);
        }
        if let Ok(glob) = ValueGlob::new(&pattern) {
            let _ = glob.matches(&path);
        }
        if let Ok(scope) = Scope::new(&pattern) {
            // What is denied is never less than what is allowed.
            assert!(!scope.allows(&path) || scope.denies(&path), "{pattern:?} {path:?}");
        }
        // A path is a pattern for itself, once what means something in patterns is left out.
        if !path.contains(['*', '?', '[', ']', '{', '}', '\\', ',', '!']) {
            let own = PathGlob::of_path(&path).expect("a path");
            assert!(own.matches(&path), "{path:?}");
        }
    });
    assert!(alone() || good > 0, "nothing was accepted");
}

//! What a decision costs: the native engine, and examples/policy.rego run by regorus (a comment is
//! added, so that it is not recognised).
//!
//! Each row is the median of batches. A benchmark reports; it asserts only that the verdict is the one
//! that was meant.

use std::fmt::Write as _;
use std::hint::black_box;
use std::time::{Duration, Instant};

use ringfence::policy::{self, Caller, Connect, Host, Policy, Request, Source, Verdict};

const RULES: &str = include_str!("../examples/policy.rego");
const BATCHES: usize = 31;

/// A policy as people write them: twenty policies with two endpoints each, four binaries each.
fn yaml() -> String {
    let mut yaml = String::from("network_policies:\n");
    for n in 0..20 {
        write!(
            yaml,
            "  policy-{n:02}:
    endpoints:
      - {{ host: plain-{n}.example.com, port: 443 }}
      - host: \"*.api-{n}.example.com\"
        port: 443
        protocol: rest
        enforcement: enforce
        rules:
          - allow: {{ method: GET, path: \"/v1/items/**\" }}
          - allow: {{ method: POST, path: \"/v1/*/comments\", query: {{ kind: \"a*\" }} }}
        deny_rules:
          - {{ method: \"*\", path: \"/v1/items/*/secrets\" }}
    binaries:
      - {{ path: /usr/bin/curl }}
      - {{ path: \"/usr/lib/git-core/*\" }}
      - {{ path: /usr/bin/python3.12 }}
      - {{ path: /usr/bin/node }}
"
        )
        .expect("a string takes all");
    }
    yaml
}

fn load(yaml: &str, rules: Option<&str>) -> Policy {
    let rules = rules.map(|text| Source { name: "policy.rego", bytes: text.as_bytes() });
    let yaml = Source { name: "policy.yaml", bytes: yaml.as_bytes() };
    policy::load(&yaml, rules.as_ref()).expect("the policy loads").policy
}

/// The median time of one run, over batches of `count`.
fn row(name: &str, count: u32, mut run: impl FnMut(u32)) {
    let mut times: Vec<Duration> = (0..BATCHES)
        .map(|batch| {
            let start = Instant::now();
            for n in 0..count {
                run(u32::try_from(batch).expect("small") * count + n);
            }
            start.elapsed() / count
        })
        .collect();
    times.sort_unstable();
    let (median, best) = (times[BATCHES / 2], times[0]);
    println!("{name:48} {:>12} (best {best:?})", format!("{median:?}"));
}

fn main() {
    let yaml = yaml();
    let rules = format!("{RULES}# not recognised\n");
    let native = load(&yaml, None);
    let rego = load(&yaml, Some(&rules));
    let host = Host::parse("a.api-10.example.com").expect("a host");
    let query = vec![("kind".to_owned(), "article".to_owned())];
    let caller = |n: u32| Caller {
        exe: "/usr/bin/curl".into(),
        ancestors: vec![format!("/bin/sh-{n}"), "/usr/bin/agent".into()],
        ..Caller::default()
    };
    let one = caller(0);
    let connect = |policy: &Policy, caller: &Caller| {
        let answer = black_box(policy.connect(caller, &host, 443));
        assert!(matches!(answer, Connect::Allow(_)), "{answer:?}");
    };
    let request = |policy: &Policy, path: &str| {
        let request =
            Request { method: "POST", path, query: &query, payload: None, overrides: &[] };
        let answer = black_box(policy.request(&one, &host, 443, &request));
        assert!(matches!(answer, Verdict::Allow { .. }), "{answer:?}");
    };
    row("native: load", 5, |_| drop(load(&yaml, None)));
    row("native: connection", 2000, |_| connect(&native, &one));
    row("native: request", 2000, |_| request(&native, "/v1/x/comments"));
    row("rego: load, with its questions", 1, |_| drop(load(&yaml, Some(&rules))));
    row("rego: connection, evaluated", 20, |n| connect(&rego, &caller(n + 1)));
    row("rego: connection, remembered", 2000, |_| connect(&rego, &one));
    row("rego: request, evaluated", 20, |n| request(&rego, &format!("/v1/{n}/comments")));
    row("rego: request, remembered", 2000, |_| request(&rego, "/v1/x/comments"));
}

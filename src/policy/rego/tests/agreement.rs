//! The property: of any policy and anything that is asked, the native engine and the text say the same.

use proptest::prelude::*;
use serde_json::{Value as Json, json};

use super::*;

fn glob_path() -> impl Strategy<Value = &'static str> {
    prop::sample::select(vec![
        "**",
        "/**",
        "/a",
        "/a/*",
        "/a/**",
        "/a/**/c",
        "/*",
        "/{a,b}",
        "/{a,b}/**",
        "/a?",
        "/[ab]/c",
        "/[!a]",
        "/a*/**/c",
        "/%61",
        "/b%2Fc",
        "/a/b/*",
        "/a/*/c",
        "/*/c",
        "/a/b*",
        "/",
        "/a/",
    ])
}

fn query() -> impl Strategy<Value = Json> {
    let pattern = prop::sample::select(vec!["1", "*", "**", "v1*", "*.*", "a/*", "{1,2}", "?", ""]);
    let matcher = prop_oneof![
        pattern.clone().prop_map(|p| json!(p)),
        pattern.clone().prop_map(|p| json!({ "glob": p })),
        prop::collection::vec(pattern, 1..3).prop_map(|p| json!({ "any": p })),
    ];
    prop_oneof![
        3 => Just(json!({})),
        2 => prop::collection::btree_map("[qr]", matcher, 1..3).prop_map(|m| json!(m)),
    ]
}

fn rule() -> impl Strategy<Value = Json> {
    let method = prop::sample::select(vec!["GET", "get", "POST", "HEAD", "*", "DELETE"]);
    (method, glob_path(), query())
        .prop_map(|(method, path, query)| json!({ "method": method, "path": path, "query": query }))
}

fn endpoint() -> impl Strategy<Value = Json> {
    let host = prop::sample::select(vec![
        "h.example.com",
        "H.Example.com.",
        "*.example.com",
        "**.example.com",
        "h*.example.com",
        "i.example.com",
        "{h,i}*.example.com",
        "10.0.0.1",
        "",
    ]);
    let ports = prop::collection::vec(prop::sample::select(vec![80u16, 443]), 1..3);
    let scope = prop_oneof![3 => Just(None), 2 => glob_path().prop_map(Some)];
    let rules = prop_oneof![
        prop::sample::select(vec!["read-only", "read-write", "full"]).prop_map(|a| json!(a)),
        prop::collection::vec(rule(), 1..4).prop_map(|r| json!(r)),
    ];
    let deny = prop_oneof![Just(None), prop::collection::vec(rule(), 1..3).prop_map(Some)];
    let flags = any::<[bool; 6]>();
    (host, ports, scope, rules, deny, flags).prop_map(|(host, ports, scope, rules, deny, flags)| {
        let [inspected, enforce, audit, listed, skip, slash] = flags;
        let mut endpoint = json!({ "ports": ports });
        if !host.is_empty() {
            endpoint["host"] = json!(host);
        }
        if listed || host.is_empty() {
            endpoint["allowed_ips"] = json!(["10.0.0.0/8", "192.0.2.1"]);
        }
        if skip {
            endpoint["tls"] = json!("skip");
        }
        if !inspected {
            return endpoint;
        }
        endpoint["protocol"] = json!("REST");
        if enforce {
            endpoint["enforcement"] = json!("enforce");
        } else if audit {
            endpoint["enforcement"] = json!("audit");
        }
        if slash {
            endpoint["allow_encoded_slash"] = json!(true);
        }
        if let Some(scope) = scope {
            endpoint["path"] = json!(scope);
        }
        match rules {
            Json::Array(rules) => {
                endpoint["rules"] = rules.into_iter().map(|r| json!({ "allow": r })).collect();
            }
            access => endpoint["access"] = access,
        }
        if let Some(deny) = deny {
            endpoint["deny_rules"] = json!(deny);
        }
        endpoint
    })
}

fn binary() -> impl Strategy<Value = Json> {
    let path = prop::sample::select(vec![
        "/usr/bin/curl",
        "/usr/bin/*",
        "/usr/**",
        "/**",
        "/opt/*/x",
        "/usr/bin/c*l",
    ]);
    (path, 0..6).prop_map(|(path, kind)| match kind {
        0 => json!({ "path": path, "ancestors": true }),
        1 => json!({ "path": path, "sha256": format!("sha256:{}", "AB".repeat(32)) }),
        2 => json!({ "path": path, "tainted": "refuse" }),
        3 => json!({ "path": path, "tainted": "report" }),
        _ => json!({ "path": path }),
    })
}

fn policies() -> impl Strategy<Value = Json> {
    let policy = (prop::collection::vec(endpoint(), 1..4), prop::collection::vec(binary(), 0..3))
        .prop_map(|(endpoints, binaries)| json!({ "endpoints": endpoints, "binaries": binaries }));
    prop::collection::btree_map("[ab]|B|z-1", policy, 1..4)
        .prop_map(|policies| json!({ "network_policies": policies }))
}

fn callers() -> impl Strategy<Value = Caller> {
    let path =
        || prop::sample::select(vec!["/usr/bin/curl", "/usr/bin/git", "/opt/a/x", "/tmp/x", ""]);
    (path(), prop::collection::vec(path(), 0..2), any::<[bool; 3]>()).prop_map(
        |(exe, ancestors, [known, same, tainted])| Caller {
            exe: exe.into(),
            ancestors: ancestors.into_iter().map(Into::into).collect(),
            sha256: known.then_some([if same { 0xAB } else { 1 }; 32]),
            tainted: tainted.then(|| "LD_PRELOAD is set".into()),
        },
    )
}

fn targets() -> impl Strategy<Value = (String, String)> {
    let method = prop::sample::select(vec!["GET", "HEAD", "POST", "DELETE", "post", "BREW"]);
    let path =
        prop_oneof!["(/[abc]{1,2}){0,3}/?", Just("/a%2Fb".to_owned()), Just("/b/%2Fc".to_owned())];
    let query = prop_oneof![
        Just(String::new()),
        "\\?[qr]=(1|2|v1|v12|v1\\.2|a/b|a\\.b|\\.|)(&[qr]=(1|x|v1)){0,2}"
    ];
    (method, path, query).prop_map(|(method, path, query)| {
        let path = if path.starts_with('/') { path } else { "/".to_owned() };
        (method.to_owned(), path + &query)
    })
}

fn comparable(mut grant: Grant) -> Grant {
    grant.allowed_ips.sort();
    grant.allowed_ips.dedup();
    grant
}

type Asked = (Caller, &'static str, u16, (String, String));

fn asked() -> impl Strategy<Value = Vec<Asked>> {
    let host = prop::sample::select(vec![
        "h.example.com",
        "i.example.com",
        "a.h.example.com",
        "example.com",
        "10.0.0.1",
        "other.example.net",
    ]);
    let port = prop::sample::select(vec![80u16, 443, 8080]);
    prop::collection::vec((callers(), host, port, targets()), 6)
}

/// How the answers of one text compare with the native engine's.
#[derive(Clone, Copy, PartialEq)]
enum Alike {
    /// Verdicts, grants, names.
    Whole,
    /// The older contract knows less: it may refuse where the native engine lets pass in audit, and
    /// may dial fewer addresses.
    NoMilder,
}

fn compare(yaml: &str, text: &str, asked: &[Asked], alike: Alike) -> Result<(), TestCaseError> {
    let native = loaded(yaml, None);
    let policy = loaded(yaml, Some(text));
    for (caller, name, port, (method, target)) in asked {
        let name = host(name);
        let grant =
            match (native.connect(caller, &name, *port), policy.connect(caller, &name, *port)) {
                (Connect::Deny(_), Connect::Deny(_)) => continue,
                (Connect::Allow(native), Connect::Allow(rego)) => {
                    let (native, rego) = (comparable(native), comparable(rego));
                    if alike == Alike::Whole || rego.restricted == native.restricted {
                        prop_assert_eq!(&native, &rego, "{}", yaml);
                    } else {
                        prop_assert!(rego.restricted, "{}", yaml);
                        prop_assert_eq!(&native, &Grant { restricted: false, ..rego }, "{}", yaml);
                    }
                    native
                }
                (native, rego) => {
                    return Err(TestCaseError::fail(format!(
                        "{native:?}\n{rego:?}\n{caller:?} {name}:{port}\n{yaml}"
                    )));
                }
            };
        let Ok(target) = canonical_path(target, grant.allow_encoded_slash) else {
            continue;
        };
        let request = Request {
            method,
            path: &target.path,
            query: &target.pairs,
            payload: None,
            overrides: &[],
        };
        let natives = native.request(caller, &name, *port, &request);
        let regos = policy.request(caller, &name, *port, &request);
        let again = policy.request(caller, &name, *port, &request);
        prop_assert_eq!(&again, &regos);
        if alike == Alike::Whole {
            let named = |verdict: &Verdict| match verdict {
                Verdict::Allow { policy } => (2, policy.clone(), String::new()),
                Verdict::Audit { policy, reason } => (1, policy.clone(), reason.clone()),
                Verdict::Deny(denial) => (0, denial.policy.clone(), denial.reason.clone()),
            };
            prop_assert_eq!(
                named(&natives),
                named(&regos),
                "{:?} {}:{} {:?}\n{}",
                caller,
                name,
                port,
                request,
                yaml
            );
        } else {
            prop_assert!(
                lets(&regos) <= lets(&natives),
                "{:?}\n{:?}\n{:?}\n{}",
                natives,
                regos,
                request,
                yaml
            );
            prop_assert!(
                lets(&natives) != 2 || lets(&regos) != 0,
                "{:?}\n{:?}\n{:?}\n{}",
                natives,
                regos,
                request,
                yaml
            );
        }
    }
    Ok(())
}

/// `RINGFENCE_REGO_CASES` makes it as many random policies as that.
fn cases() -> ProptestConfig {
    let cases = std::env::var("RINGFENCE_REGO_CASES").ok().and_then(|n| n.parse().ok());
    ProptestConfig {
        cases: cases.unwrap_or(16),
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

fn valid(policies: &Json) -> Option<String> {
    let yaml = policies.to_string();
    try_load(&yaml, None).ok().map(|_| yaml)
}

proptest! {
    #![proptest_config(cases())]

    #[test]
    fn native_and_rego_agree(policies in policies(), asked in asked()) {
        if let Some(yaml) = valid(&policies) {
            compare(&yaml, &by_rego(), &asked, Alike::Whole)?;
        }
    }

    #[test]
    fn the_older_contract_is_no_milder(policies in policies(), asked in asked()) {
        let text = without("egress_authorization").replace("request_authorization", "judged");
        if let Some(yaml) = valid(&policies) {
            compare(&yaml, &text, &asked, Alike::NoMilder)?;
        }
    }

    #[test]
    fn the_later_contract_alone_is_no_milder(policies in policies(), asked in asked()) {
        let text = by_rego().replace("request_authorization", "judged");
        if let Some(yaml) = valid(&policies) {
            compare(&yaml, &text, &asked, Alike::NoMilder)?;
        }
    }
}

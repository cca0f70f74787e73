//! What the engine answers. The bulk of the cases is data: `tests/corpus/policy`.

use std::sync::LazyLock;

use proptest::prelude::*;

use super::*;
use crate::policy::Verdict;
use crate::policy::{Source, load};

fn policy(yaml: &str) -> Policy {
    let source = Source { name: "policy.yaml", bytes: yaml.as_bytes() };
    load(&source, None).unwrap_or_else(|error| panic!("{error}")).policy
}

fn caller(exe: &str) -> Caller {
    let ancestors = vec!["/bin/sh".into(), "/usr/bin/agent".into()];
    Caller { exe: exe.into(), ancestors, ..Caller::default() }
}

fn host(text: &str) -> Host {
    Host::parse(text).expect("host")
}

fn allowed(policy: &Policy, exe: &str, name: &str, port: u16) -> bool {
    matches!(policy.connect(&caller(exe), &host(name), port), Connect::Allow(_))
}

const EXAMPLE: &str = "
network_policies:
  b:
    endpoints:
      - { host: api.example.com, port: 443 }
      - { host: \"*.wild.example.com\", ports: [443, 8443] }
    binaries: [{ path: /usr/bin/python3 }]
  a:
    endpoints:
      - { host: api.example.com, port: 443, protocol: rest, enforcement: enforce, access: read-only }
    binaries: [{ path: \"/opt/*/bin/**\" }]
  anyone:
    endpoints: [{ host: open.example.com, port: 80 }]
    binaries: [{ path: \"/**\" }]
";

#[test]
fn symlinks_are_added_once_resolved() {
    let mut policy = policy(EXAMPLE);
    assert!(!allowed(&policy, "/usr/bin/python3.12", "api.example.com", 443));
    policy.resolve_binaries(|path| {
        assert_eq!(path, "/usr/bin/python3", "patterns are not resolved");
        Some("/usr/bin/python3.12".into())
    });
    assert!(allowed(&policy, "/usr/bin/python3.12", "api.example.com", 443));
    assert!(allowed(&policy, "/usr/bin/python3", "api.example.com", 443));
    policy.resolve_binaries(|_| None);
    policy.resolve_binaries(|_| Some("relative".into()));
    assert!(!allowed(&policy, "relative", "api.example.com", 443));
}

/// Links of entries with `ancestors: true` are followed for ancestors, those of others are not.
#[test]
fn symlinks_of_ancestors_are_resolved_where_they_count() {
    let yaml = |key: &str| {
        format!(
            "
network_policies:
  a:
    endpoints: [{{ host: api.example.com, port: 443 }}]
    binaries: [{{ path: /usr/bin/link{key} }}]
"
        )
    };
    for (key, allows) in [("", false), (", ancestors: false", false), (", ancestors: true", true)] {
        let mut policy = policy(&yaml(key));
        policy.resolve_binaries(|_| Some("/usr/bin/agent".into()));
        assert!(policy.names_binaries());
        assert!(allowed(&policy, "/usr/bin/agent", "api.example.com", 443));
        assert_eq!(allowed(&policy, "/tmp/x", "api.example.com", 443), allows, "{key:?}");
    }
}

/// Links of pinned and watched entries are followed like the others'.
#[test]
fn symlinks_of_guarded_entries_are_resolved_with_what_they_ask() {
    let digits = "ab".repeat(32);
    let mut policy = policy(&format!(
        "
network_policies:
  a:
    endpoints: [{{ host: api.example.com, port: 443 }}]
    binaries:
      - {{ path: /usr/bin/link, sha256: {digits} }}
      - {{ path: /usr/bin/watched, tainted: report }}
"
    ));
    assert!(policy.names_binaries() && policy.watches_any());
    assert!(policy.pins("/usr/bin/link") && !policy.pins("/usr/bin/real"));
    policy.resolve_binaries(|path| Some(format!("{path}-real")));
    let judge = |exe: &str, sha256| {
        let caller = Caller { exe: exe.into(), sha256, ..Caller::default() };
        matches!(policy.connect(&caller, &host("api.example.com"), 443), Connect::Allow(_))
    };
    for exe in ["/usr/bin/link", "/usr/bin/link-real"] {
        assert!(policy.pins(exe) && !policy.watches(exe));
        assert!(judge(exe, Some([0xAB; 32])));
        assert!(!judge(exe, Some([0xAC; 32])) && !judge(exe, None));
    }
    for exe in ["/usr/bin/watched", "/usr/bin/watched-real"] {
        assert!(policy.watches(exe) && !policy.pins(exe) && judge(exe, None));
    }
}

/// A denied child gets the lines for itself, not for its ancestor.
#[test]
fn a_child_of_a_listed_binary_is_told_to_list_itself() {
    let policy = policy(EXAMPLE);
    let caller = Caller {
        exe: "/usr/lib/git-core/git-remote-http".into(),
        ancestors: vec!["/bin/sh".into(), "/usr/bin/python3".into()],
        ..Caller::default()
    };
    let Connect::Deny(denial) = policy.connect(&caller, &host("api.example.com"), 443) else {
        panic!("allowed");
    };
    assert!(denial.reason.contains("its ancestor /usr/bin/python3 is listed"), "{denial:?}");
    assert!(denial.suggestion.contains("{ path: \"/usr/lib/git-core/git-remote-http\" }"));
    assert!(!denial.suggestion.contains("python3"), "{denial:?}");
    // Where nothing is listed for the host there is nothing to hint at.
    let Connect::Deny(denial) = policy.connect(&caller, &host("other.example.com"), 443) else {
        panic!("allowed");
    };
    assert_eq!(denial.reason, NO_HOST);
}

#[test]
fn policies_for_everyone_need_no_identity() {
    let policy = policy(EXAMPLE);
    assert!(policy.names_binaries());
    assert!(allowed(&policy, "", "open.example.com", 80));
    let open = "
network_policies:
  a:
    endpoints: [{ host: open.example.com, port: 80 }]
    binaries: [{ path: \"**\" }]
";
    let (open, closed) = (self::policy(open), self::policy("version: 1\n"));
    assert!(!open.names_binaries() && !closed.names_binaries());
    // But an owner.
    assert!(open.lets_out() && !closed.lets_out());
}

#[test]
fn debug_shows_no_rules() {
    let shown = format!("{:?}", policy(EXAMPLE));
    assert!(shown.contains("endpoints: 4") && !shown.contains("example"), "{shown}");
}

#[test]
fn grants_carry_the_conditions() {
    let yaml = "
network_policies:
  listed:
    endpoints:
      - { host: db.example.com, port: 5432, allowed_ips: [10.0.0.0/8], tls: skip }
      - { allowed_ips: [172.16.0.0/12], port: 80 }
      - { host: web.example.com, port: 80 }
    binaries: [{ path: \"/**\" }]
";
    let policy = policy(yaml);
    let grant = |name: &str, port| match policy.connect(&caller("/x"), &host(name), port) {
        Connect::Allow(grant) => grant,
        Connect::Deny(denial) => panic!("{denial:?}"),
    };
    let db = grant("db.example.com", 5432);
    assert_eq!((db.tls, db.inspect), (TlsMode::Skip, Inspect::None));
    assert!(db.restricted && db.exact_host);
    let other = grant("other.example.com", 80);
    assert!(other.restricted && !other.exact_host);
    // An endpoint without a host adds addresses and takes nothing from the one that names it.
    let web = grant("web.example.com", 80);
    assert!(!web.restricted && web.exact_host && web.allowed_ips.len() == 1);
    assert_eq!(policy.destination(&web, &host("web.example.com"), 80, [8, 8, 8, 8].into()), Ok(()));
}

#[test]
fn denials_name_the_binary_and_nothing_else() {
    let policy = policy(EXAMPLE);
    let Connect::Deny(denial) =
        policy.connect(&caller("/usr/bin/curl"), &host("api.example.com"), 443)
    else {
        panic!("allowed");
    };
    assert_eq!(denial.policy, "-");
    assert!(denial.reason.contains("binary"));
    assert!(denial.suggestion.contains("/usr/bin/curl"));
    assert!(!denial.suggestion.contains("python3"));
    let request =
        Request { method: "GE\nT", path: "/\u{1b}x", query: &[], payload: None, overrides: &[] };
    let Verdict::Deny(denial) =
        policy.request(&caller("/opt/x/bin/y"), &host("api.example.com"), 443, &request)
    else {
        panic!("allowed");
    };
    assert_eq!(denial.rule, "GE\\u{a}T /\\u{1b}x");
    assert_eq!(denial.policy, "a");
}

static PARSED: LazyLock<Policy> = LazyLock::new(|| policy(EXAMPLE));
static DENYING: LazyLock<Policy> = LazyLock::new(|| {
    policy(
        "
network_policies:
  a:
    endpoints:
      - { host: h.example.com, port: 443, protocol: rest, enforcement: enforce, access: full }
    binaries: [{ path: \"/**\" }]
  b:
    endpoints:
      - host: \"*.example.com\"
        port: 443
        protocol: rest
        enforcement: enforce
        access: read-only
        deny_rules: [{ method: \"*\", path: \"/a*/**\" }, { method: GET, path: \"/b\" }]
    binaries: [{ path: \"/**\" }]
",
    )
});

proptest! {
    /// Whatever runs above it, a program is allowed what it is allowed alone.
    #[test]
    fn ancestors_change_no_verdict(
        exe in "/usr/bin/(python3|x)|/opt/a/bin/x|/tmp/x",
        ancestors in prop::collection::vec("/usr/bin/(python3|x)|/opt/a/bin/x|/bin/sh", 0..4),
    ) {
        let policy = &*PARSED;
        let request = Request { method: "GET", path: "/", query: &[], payload: None, overrides: &[] };
        let alone = Caller { exe: exe.clone(), ..Caller::default() };
        let below = Caller { exe, ancestors, ..Caller::default() };
        for name in ["api.example.com", "a.wild.example.com", "open.example.com"] {
            for port in [80, 443] {
                let name = host(name);
                let allows = |caller| match policy.connect(caller, &name, port) {
                    Connect::Allow(grant) => Some(grant),
                    Connect::Deny(_) => None,
                };
                prop_assert_eq!(allows(&alone), allows(&below));
                let passes = |caller| match policy.request(caller, &name, port, &request) {
                    Verdict::Deny(_) => None,
                    passes => Some(passes),
                };
                prop_assert_eq!(passes(&alone), passes(&below));
            }
        }
    }

    /// However a name is spelt, the verdict is the same, and it is the one of the canonical name.
    #[test]
    fn spelling_changes_no_verdict(
        name in "(api|a\\.wild|wild|open|x)\\.example\\.com",
        upper in any::<u64>(),
        dot in any::<bool>(),
    ) {
        let policy = &*PARSED;
        let spelt: String = name
            .chars()
            .enumerate()
            .map(|(n, c)| if upper >> (n % 64) & 1 == 1 { c.to_ascii_uppercase() } else { c })
            .chain(dot.then_some('.'))
            .collect();
        prop_assert_eq!(host(&spelt), host(&name));
        for port in [80, 443] {
            prop_assert_eq!(
                allowed(policy, "/usr/bin/python3", &spelt, port),
                allowed(policy, "/usr/bin/python3", &name, port)
            );
        }
    }

    /// A deny rule wins, whatever else allows the request.
    #[test]
    fn deny_beats_allow(path in "/[a-d]{1,3}(/[a-d]{1,3}){0,3}", method in "GET|HEAD|POST|DELETE") {
        let request = Request { method: &method, path: &path, query: &[], payload: None, overrides: &[] };
        let verdict = DENYING.request(&caller("/x"), &host("h.example.com"), 443, &request);
        let under_a = path.starts_with("/a") && path[1..].contains('/');
        let b = path == "/b" && matches!(method.as_str(), "GET" | "HEAD");
        prop_assert_eq!(matches!(verdict, Verdict::Deny(_)), under_a || b, "{:?}", verdict);
    }
}

//! The text of examples/policy.rego and the native engine decide alike, and what breaks the contract
//! does not load.

mod agreement;

use std::sync::LazyLock;

use crate::policy::{
    Caller, Compatibility, Connect, Denial, Grant, Host, LoadError, Policy, Request, Source,
    Verdict, canonical_path, load,
};

static OURS: LazyLock<String> = LazyLock::new(|| {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/policy.rego");
    std::fs::read_to_string(file).expect("examples/policy.rego")
});

/// Ours, made unknown: regorus runs it.
fn by_rego() -> String {
    format!("{}# changed\n", *OURS)
}

/// As ours without the rules of a name.
fn without(rule: &str) -> String {
    by_rego().replace(rule, &format!("other_{rule}"))
}

fn try_load(yaml: &str, rego: Option<&str>) -> Result<Policy, LoadError> {
    let rego = rego.map(|text| Source { name: "policy.rego", bytes: text.as_bytes() });
    let yaml = Source { name: "policy.yaml", bytes: yaml.as_bytes() };
    load(&yaml, rego.as_ref()).map(|loaded| loaded.policy)
}

fn loaded(yaml: &str, rego: Option<&str>) -> Policy {
    try_load(yaml, rego).unwrap_or_else(|error| panic!("{error}\n{yaml}"))
}

fn caller(exe: &str) -> Caller {
    Caller { exe: exe.into(), ..Caller::default() }
}

fn host(text: &str) -> Host {
    Host::parse(text).expect("host")
}

const PLAIN: &str = "
filesystem_policy: { read_only: [/usr], read_write: [/tmp/] }
landlock: { compatibility: hard_requirement }
process: { run_as_user: agent, memfd: allow }
network_policies:
  p:
    endpoints:
      - { host: API.example.com., port: 443, protocol: rest, enforcement: enforce, access: read-only }
      - { host: plain.example.com, port: 80 }
    binaries: [{ path: /usr/bin/curl }]
";

#[test]
fn the_recognised_text_needs_no_interpreter() {
    let policy = loaded(PLAIN, Some(&OURS));
    assert!(format!("{policy:?}").contains("native"), "{policy:?}");
    assert!(format!("{:?}", loaded(PLAIN, Some(&by_rego()))).contains("rego"));
}

#[test]
fn files_and_processes_are_what_the_text_says() {
    let policy = loaded(PLAIN, Some(&by_rego()));
    let native = loaded(PLAIN, None);
    assert_eq!(policy.filesystem(), native.filesystem());
    assert_eq!(policy.process(), native.process());
    assert_eq!(policy.landlock(), Compatibility::HardRequirement);
    let text = by_rego()
        .replace(
            "filesystem_policy := data.filesystem_policy",
            "filesystem_policy := {\"read_only\": [\"/opt//x/.\"], \"include_workdir\": false}",
        )
        .replace("process_policy := data.process", "process_policy := {\"run_as_user\": 1000}");
    let policy = loaded(PLAIN, Some(&text));
    assert_eq!(policy.filesystem().read_only, ["/opt/x"]);
    assert!(policy.filesystem().read_write.is_empty() && !policy.filesystem().include_workdir);
    assert_eq!(policy.process().run_as_user.as_deref(), Some("1000"));
    assert_eq!(policy.process().memfd, native.process().memfd, "our keys are the file's");
}

#[test]
fn a_web_socket_needs_the_file_and_the_text() {
    let yaml = "
network_policies:
  p:
    endpoints:
      - { host: whole.test, port: 443, protocol: rest, enforcement: enforce, access: full }
      - { host: read.test, port: 443, protocol: rest, enforcement: enforce, access: read-only }
    binaries: [{ path: /usr/bin/curl }]
";
    let passes = |text: &str, name: &str, method: &str| {
        let request =
            Request { method, path: "/socket", query: &[], payload: None, overrides: &[] };
        let verdict = loaded(yaml, Some(text)).websocket(
            &caller("/usr/bin/curl"),
            &host(name),
            443,
            &request,
        );
        !matches!(verdict, Verdict::Deny(_))
    };
    let no_text = by_rego().replace(
        "request_authorization := says(\"deny\", enforced(denying), denied) if {",
        "request_authorization := {\"action\": \"deny\", \"deny_reason\": \"no text\"} if {
\tinput.request.method == \"WEBSOCKET_TEXT\"
} else := says(\"deny\", enforced(denying), denied) if {",
    );
    for method in ["GET", "WEBSOCKET_TEXT", "WEBSOCKET_BINARY"] {
        assert!(passes(&by_rego(), "whole.test", method), "{method}");
        assert!(!passes(&by_rego(), "read.test", method), "{method}");
    }
    assert!(passes(&no_text, "whole.test", "GET"));
    assert!(!passes(&no_text, "whole.test", "WEBSOCKET_TEXT"));
}

/// Broken texts, the words of the error, and its line.
#[test]
#[allow(clippy::too_many_lines, reason = "one table")]
fn broken_texts_do_not_load() {
    let ours = by_rego();
    let line =
        |words: &str| ours.lines().position(|l| l.starts_with(words)).expect(words) as u64 + 1;
    let swap = |from: &str, to: &str| {
        assert!(ours.contains(from), "{from}");
        ours.replacen(from, to, 1)
    };
    let cases: &[(String, &str, Option<u64>)] = &[
        ("package p\n".into(), "the package is p", None),
        ("allow {".into(), "", Some(1)),
        (swap("import rego.v1", "import rego.v1\n\nx if { y( }"), "", Some(11)),
        ("package openshell.sandbox\n".into(), "there is no rule network_action", None),
        (without("allow_request"), "there is no rule allow_request", None),
        (without("landlock_policy"), "add `landlock_policy := data.landlock`", None),
        (
            without("egress_authorization").replace("_matching_endpoint_configs", "configs"),
            "there is no rule _matching_endpoint_configs",
            None,
        ),
        (
            swap("contains(pattern, \"*\")\n\tglob", "regex.match(pattern, \"*\")\n\tglob"),
            "no function \"regex.match\"",
            None,
        ),
        (
            swap(
                "if pattern == input.network.host",
                "if glob.match(\"[\", [\".\"], input.network.host)",
            ),
            "invalid glob",
            None,
        ),
        (
            swap("filesystem_policy := data.filesystem_policy", "filesystem_policy := [1]"),
            "filesystem_policy must be a map",
            Some(line("filesystem_policy")),
        ),
        (
            swap(
                "filesystem_policy := data.filesystem_policy",
                "filesystem_policy := {\"read_only\": [\"x\"]}",
            ),
            "is not absolute",
            Some(line("filesystem_policy")),
        ),
        (
            swap(
                "filesystem_policy := data.filesystem_policy",
                "filesystem_policy := data.nothing",
            ),
            "has no value, but policy.yaml has filesystem_policy",
            Some(line("filesystem_policy")),
        ),
        (
            swap("\"action\": network_action", "\"action\": 1"),
            "egress_authorization.action must be",
            Some(line("egress_authorization")),
        ),
        (
            swap("\"endpoint_configs\": _matching_endpoint_configs", "\"endpoint_configs\": 1"),
            "must be a list",
            Some(line("egress_authorization")),
        ),
        (
            swap("\"endpoint_configs\": _matching_endpoint_configs,", ""),
            "requests would pass unjudged",
            Some(line("egress_authorization")),
        ),
        (
            swap("[match.endpoint | some match in inspected]", "[1]"),
            "configuration must be an object",
            Some(line("egress_authorization")),
        ),
        (
            swap("[match.endpoint | some match in inspected]", "[{\"protocol\": \"soap\"}]"),
            "protocol: \"soap\" is not supported",
            None,
        ),
        (
            swap("denied := \"a deny rule refuses this request\"", "denied := 1 / 0"),
            "divide by zero",
            Some(line("denied")),
        ),
        (
            without("request_authorization").replace(
                "allow_request if other_request_authorization.action == \"allow\"",
                "allow_request := \"yes\" if true",
            ),
            "allow_request must be true or false",
            Some(line("default allow_request")),
        ),
        (
            format!("{ours}network_middlewares := {{\"scan\": {{}}}}\n"),
            "network_middlewares are not supported",
            None,
        ),
        (
            swap(
                "network_action := \"allow\" if count(matches) > 0",
                "network_action := \"allow\" if { some i in numbers.range(1, 9000); some j in numbers.range(1, 9000); i * j < 0 }",
            ),
            "time limit",
            None,
        ),
    ];
    let yaml = PLAIN
        .replace("access: read-only }", "access: full, deny_rules: [{ method: GET, path: / }] }");
    for (text, words, line) in cases {
        let error = try_load(&yaml, Some(text)).expect_err(words);
        let problem = error.0.iter().find(|problem| problem.to_string().contains(words));
        let problem = problem.unwrap_or_else(|| panic!("{words:?} is not in {error}"));
        assert!(problem.to_string().starts_with("policy.rego"), "{problem}");
        assert!(problem.fix.is_some(), "{problem}");
        if line.is_some() {
            assert_eq!(problem.line, *line, "{problem}");
        }
        assert!(!problem.to_string().contains('\n'), "{problem}");
    }
}

#[test]
fn a_broken_yaml_and_a_broken_text_are_told_together() {
    let error = try_load("version: 2\n", Some(&"x".repeat(2 << 20))).expect_err("both");
    assert_eq!(error.0.len(), 2, "{error}");
}

/// What fails at run time only is a refusal with its reason.
#[test]
fn failures_at_run_time_are_refusals() {
    let text = by_rego().replacen(
        "network_action := \"allow\" if count(matches) > 0",
        "network_action := \"allow\" if { count(matches) > 0; input.network.port / (input.network.port - 4444) != 0 }",
        1,
    );
    let yaml = PLAIN.replace("port: 80 }", "ports: [80, 4444] }");
    let policy = loaded(&yaml.replace("4444", "4445"), Some(&text));
    let asked = |port| policy.connect(&caller("/usr/bin/curl"), &host("plain.example.com"), port);
    assert!(matches!(asked(80), Connect::Allow(_)));
    let text = text.replacen("count(matches) > 0;", "", 1);
    let policy = loaded(&yaml.replace("4444", "4445"), Some(&text));
    let asked = |port| policy.connect(&caller("/usr/bin/curl"), &host("plain.example.com"), port);
    let Connect::Deny(Denial { reason, suggestion, .. }) = asked(4444) else { panic!("allowed") };
    assert!(reason.starts_with("policy.rego failed: line "), "{reason}");
    assert!(reason.contains("divide by zero") && suggestion.starts_with('#'), "{reason}");
}

#[test]
fn a_panic_of_the_interpreter_is_a_refusal() {
    let text = by_rego().replacen(
        "network_action := \"allow\" if count(matches) > 0",
        "network_action := \"allow\" if count(numbers.range(0, 9000000000000000000)) < 0",
        1,
    );
    let error = try_load(PLAIN, Some(&text)).expect_err("panics");
    assert!(error.to_string().contains("the interpreter gave up"), "{error}");
}

/// The text cannot lift what the file asks of a binary, nor the inspection of an endpoint.
#[test]
fn a_text_lifts_no_pin_and_no_inspection() {
    let yaml = PLAIN.replace(
        "path: /usr/bin/curl }",
        "path: /usr/bin/curl, tainted: refuse }, { path: /usr/bin/wget }",
    );
    let lax = by_rego()
        .replacen("default network_action := \"deny\"", "default network_action := \"allow\"", 1)
        .replacen("network_action := \"allow\" if count(matches) > 0", "", 1);
    let policy = loaded(&yaml, Some(&lax));
    let tainted = Caller { tainted: Some("LD_PRELOAD is set".into()), ..caller("/usr/bin/curl") };
    let plain = host("plain.example.com");
    assert!(matches!(policy.connect(&caller("/usr/bin/curl"), &plain, 80), Connect::Allow(_)));
    let Connect::Deny(denial) = policy.connect(&tainted, &plain, 80) else { panic!("allowed") };
    assert!(denial.reason.contains("LD_PRELOAD"), "{denial:?}");
    // Other hosts are the text's.
    assert!(matches!(policy.connect(&tainted, &host("other.example.com"), 80), Connect::Allow(_)));
    let blind = by_rego().replacen(
        "some match in matches; match.endpoint.protocol",
        "some match in matches; match.endpoint.no",
        1,
    );
    let policy = loaded(PLAIN, Some(&blind));
    let Connect::Deny(denial) =
        policy.connect(&caller("/usr/bin/curl"), &host("api.example.com"), 443)
    else {
        panic!("allowed")
    };
    assert!(denial.reason.contains("unjudged"), "{denial:?}");
}

/// A text that compares paths as they are written, or has never heard of deny rules, lifts none.
#[test]
fn a_text_lifts_no_deny_rule() {
    const RULE: &str = "allow_encoded_slash: true, deny_rules: [{ method: GET, path: \"/a/*\" }] }";
    let asked = |policy: &Policy, path: &str| {
        let name = host("api.example.com");
        let request = Request { method: "GET", path, query: &[], payload: None, overrides: &[] };
        lets(&policy.request(&caller("/usr/bin/curl"), &name, 443, &request))
    };
    let enforces = PLAIN.replace("access: read-only }", &format!("access: read-only, {RULE}"));
    let audits = enforces.replace("enforcement: enforce", "enforcement: audit");
    assert!(enforces != PLAIN && audits != enforces);
    let deaf = by_rego().replace("deny_rules", "other_rules");
    for text in [by_rego(), deaf] {
        for (yaml, denied) in [(&audits, 1), (&enforces, 0)] {
            let policy = loaded(yaml, Some(&text));
            for path in ["/a/b", "/a%2Fb", "/A/B", "/a/b.json"] {
                assert_eq!(asked(&policy, path), denied, "{path} {yaml}");
            }
            assert_eq!(asked(&policy, "/b"), 2);
        }
    }
}

/// What the agent chose is in no word that is shown, unless it is printable.
#[test]
fn words_are_printable() {
    let text = by_rego().replacen(
        "deny_reason := \"no policy allows this host and port for this binary\" if",
        "deny_reason := sprintf(\"not for %s\", [input.exec.path]) if",
        1,
    );
    let policy = loaded(PLAIN, Some(&text));
    let Connect::Deny(denial) =
        policy.connect(&caller("/x\n\u{1b}[1m"), &host("api.example.com"), 443)
    else {
        panic!("allowed")
    };
    assert_eq!(denial.reason, "not for /x\\u{a}\\u{1b}[1m");
    assert!(denial.suggestion.starts_with("# policy.rego decides"), "{denial:?}");
    let narrow = by_rego().replacen(
        "network_action := \"allow\" if count(matches) > 0",
        "network_action := \"allow\" if { count(matches) > 0; input.network.port != 80 }",
        1,
    );
    let policy = loaded(PLAIN, Some(&narrow));
    let Connect::Deny(denial) =
        policy.connect(&caller("/usr/bin/curl"), &host("plain.example.com"), 80)
    else {
        panic!("allowed")
    };
    assert!(denial.suggestion.contains("policy.yaml allows this"), "{denial:?}");
}

#[test]
fn symlinks_are_resolved_for_the_text_too() {
    let mut policy = loaded(PLAIN, Some(&by_rego()));
    let real = |policy: &Policy| {
        matches!(
            policy.connect(&caller("/usr/bin/curl-8"), &host("plain.example.com"), 80),
            Connect::Allow(_)
        )
    };
    assert!(!real(&policy));
    policy.resolve_binaries(|path| Some(format!("{path}-8")));
    assert!(real(&policy));
}

/// How much a verdict lets pass: more is more.
fn lets(verdict: &Verdict) -> u8 {
    match verdict {
        Verdict::Deny(_) => 0,
        Verdict::Audit { .. } => 1,
        Verdict::Allow { .. } => 2,
    }
}

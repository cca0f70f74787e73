//! A `policy.rego` of somebody's own decides, from the start of the supervisor to a real request.

use std::fs;

use crate::basics::curl_words;
use crate::rig::{Rig, text};

/// Written for one page, in `OpenShell`'s older contract.
const ONE_PAGE: &str = r#"package openshell.sandbox

import rego.v1

filesystem_policy := data.filesystem_policy
landlock_policy := data.landlock
process_policy := data.process

default network_action := "deny"

network_action := "allow" if {
	input.exec.path == "/usr/bin/curl"
	endpoint
}

endpoint := found if {
	some found in data.network_policies.upstream.endpoints
	found.host == input.network.host
	input.network.port in found.ports
}

matched_network_policy := "one-page"
deny_reason := sprintf("nobody but curl, and not %s", [input.network.host])
_matching_endpoint_configs := [endpoint]
exact_declared_endpoint_host := true

default allow_request := false

allow_request if {
	input.request.method == "GET"
	input.request.path == "/hello"
}

request_deny_reason := sprintf("%s is not my page", [input.request.path])
"#;

fn fenced(rig: &Rig, rego: &str, script: &str) -> std::process::Output {
    let rules = rig.path("own.rego");
    fs::write(&rules, rego).unwrap();
    let mut command = rig.with_policy();
    command.arg("--policy-rules").arg(rules);
    command.args(["--", "sh", "-c", script]).output().unwrap()
}

pub fn decides(rig: &Rig) {
    let output = fenced(rig, ONE_PAGE, &curl_words("https://upstream.test/hello"));
    assert_eq!(text(&output.stdout), "saw GET /hello HTTP/1.1\n", "{}", text(&output.stderr));
    // policy.yaml alone would allow the first.
    for (words, reason) in [
        ("-f https://upstream.test/other", "/other is not my page"),
        ("-f -X POST -d x https://upstream.test/hello", "/hello is not my page"),
        ("-f https://other.test/", "nobody but curl, and not other.test"),
    ] {
        let output = fenced(rig, ONE_PAGE, &curl_words(words));
        let log = text(&output.stderr);
        assert!(!output.status.success(), "{words} passed: {}", text(&output.stdout));
        assert!(log.contains("DENIED") && log.contains(reason), "{words}: {log}");
    }
    let native = rig.shell(&curl_words("https://upstream.test/other"));
    assert_eq!(text(&native.stdout), "saw GET /other HTTP/1.1\n", "{}", text(&native.stderr));
}

pub fn broken(rig: &Rig) {
    let line = |words: &str| {
        let found = ONE_PAGE.lines().position(|line| line.starts_with(words));
        format!("own.rego:{}", found.unwrap() + 1)
    };
    for (from, to, words) in [
        ("allow_request if", "allow_request {", "`if` keyword".to_owned()),
        ("package openshell.sandbox", "package sandbox", "the package is sandbox".to_owned()),
        (
            "_matching_endpoint_configs",
            "configs",
            "there is no rule _matching_endpoint_configs".to_owned(),
        ),
        (
            "network_action := \"allow\"",
            "network_action := \"maybe\"",
            line("default network_action"),
        ),
        ("[endpoint]", "endpoint.host", line("_matching")),
        (":= data.process", ":= [1]", line("process_policy")),
    ] {
        let output = fenced(rig, &ONE_PAGE.replace(from, to), "touch /tmp/ran-unfenced");
        let log = text(&output.stderr);
        assert_eq!(output.status.code(), Some(125), "{to}: {log}");
        assert!(log.contains(&words) && log.contains("own.rego"), "{words}: {log}");
        assert!(!fs::exists("/tmp/ran-unfenced").unwrap());
    }
}

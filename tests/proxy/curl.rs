//! Debian's curl as the agent's client.

use std::process::{Command, Output};

use crate::rig::{Rig, in_namespace};

pub fn curl(rig: &Rig, args: &[&str]) -> Output {
    let output = Command::new("/usr/bin/curl")
        .args(["-sS", "--max-time", "20", "--proxy", "http://10.200.0.1:3128", "--cacert"])
        .arg(rig.bundle())
        .args(args)
        .env_clear()
        .output()
        .expect("curl");
    println!("{}", String::from_utf8_lossy(&output.stderr));
    output
}

pub fn stdout(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn https_with_each_request_judged() {
    in_namespace(|rig| {
        let body = stdout(&curl(&rig, &["https://api.test/ok/a?b=c"]));
        assert!(body.starts_with("GET /ok/a?b=c HTTP/1.1\r\nHost: api.test\r\n"), "{body}");
        assert!(body.contains("User-Agent: curl/"), "{body}");
        // h2 is offered and not chosen.
        assert!(rig.upstream.seen().contains(&"TLS api.test http/1.1".to_owned()));

        let denied = curl(&rig, &["-w", "%{http_code}", "https://api.test/secret/a"]);
        let text = stdout(&denied);
        assert!(text.ends_with("403"), "{text}");
        let body: serde_json::Value =
            serde_json::from_str(text.trim_end_matches("403")).expect("json");
        assert_eq!(body["error"], "policy_denied");
        assert_eq!(body["rule"], "GET /secret/a");
        assert_eq!(body["layer"], "l7");
        assert_eq!(body["host"], "api.test");
        assert_eq!(body["binary"], "/usr/bin/curl");
        assert_eq!(body["rule_missing"]["type"], "rest_allow");
        assert_eq!(body["next_steps"], serde_json::json!([]));
        assert!(body["suggestion"].as_str().is_some_and(|s| s.contains("/secret/a")), "{body}");
        assert_eq!(rig.upstream.requests().len(), 1, "the denied one was not sent on");

        let query = curl(
            &rig,
            &["-o", "/dev/null", "-w", "%{http_code}", "https://api.test/search?q=dogs"],
        );
        assert_eq!(stdout(&query), "403");
        let query = curl(
            &rig,
            &["-o", "/dev/null", "-w", "%{http_code}", "https://api.test/search?q=cats"],
        );
        assert_eq!(stdout(&query), "200");
    });
}

#[test]
fn one_connection_for_many_requests() {
    in_namespace(|rig| {
        let urls = ["https://api.test/ok/1", "https://api.test/ok/2", "https://api.test/ok/3"];
        let output = curl(&rig, &[&["-w", "[%{num_connects}]"], &urls[..]].concat());
        let text = stdout(&output);
        assert_eq!(text.matches("[0]").count(), 2, "{text}");
        let tls = rig.upstream.seen().iter().filter(|one| one.starts_with("TLS")).count();
        assert_eq!(tls, 1, "the upstream's connection is kept as well");
    });
}

#[test]
fn bodies_of_every_kind() {
    in_namespace(|rig| {
        let post =
            |args: &[&str]| stdout(&curl(&rig, &[args, &["https://api.test/post"]].concat()));
        let body = post(&["-d", "hello"]);
        assert!(body.contains("Content-Length: 5\r\n") && body.ends_with("hello"), "{body}");
        let chunked = post(&["-H", "Transfer-Encoding: chunked", "-d", "hello"]);
        assert!(chunked.contains("Transfer-Encoding: chunked\r\n"), "{chunked}");
        assert!(chunked.ends_with("hello"), "{chunked}");
        let expect = post(&["-H", "Expect: 100-continue", "-d", "waited"]);
        assert!(expect.ends_with("waited"), "{expect}");
        let large = rig.dir.path().join("large");
        std::fs::write(&large, vec![b'y'; 3 * 1024 * 1024]).expect("write");
        let large = format!("@{}", large.display());
        assert!(post(&["--data-binary", &large]).len() > 3 * 1024 * 1024);

        let get = |path: &str| stdout(&curl(&rig, &[&format!("https://api.test/ok/{path}")]));
        assert_eq!(get("sse"), "data: 0\n\ndata: 1\n\ndata: 2\n\n");
        assert_eq!(get("close"), "until the end");
        assert_eq!(get("nothing"), "");
        assert_eq!(get("big").len(), 8 * 1024 * 1024);
        let old = stdout(&curl(&rig, &["--http1.0", "https://api.test/ok/sse"]));
        assert_eq!(old, "data: 0\n\ndata: 1\n\ndata: 2\n\n", "no chunks for HTTP/1.0");
        let head = stdout(&curl(&rig, &["-I", "https://api.test/ok/x"]));
        assert!(head.contains("Content-Length: "), "{head}");

        let cut = curl(&rig, &["https://api.test/ok/cut"]);
        assert!(!cut.status.success(), "half a body must not look like a whole one");
        let both =
            curl(&rig, &["-o", "/dev/null", "-w", "%{http_code}", "https://api.test/ok/both"]);
        assert_eq!(stdout(&both), "502", "a response with two lengths is refused");
    });
}

#[test]
fn an_upstream_that_closes_between_requests_is_dialled_again() {
    in_namespace(|rig| {
        let urls = ["https://api.test/ok/once", "https://api.test/ok/again"];
        let text = stdout(&curl(&rig, &[&["-w", "[%{num_connects}]"], &urls[..]].concat()));
        assert!(text.starts_with("once[") && text.ends_with("[0]"), "{text}");
        assert_eq!(rig.upstream.requests().len(), 2);
    });
}

#[test]
fn plain_http_through_the_proxy() {
    in_namespace(|rig| {
        let body = stdout(&curl(&rig, &["http://raw.test/x?y"]));
        assert!(body.starts_with("GET /x?y HTTP/1.1\r\nHost: raw.test\r\n"), "{body}");
        assert!(!body.to_ascii_lowercase().contains("proxy-"), "{body}");
        let inspected = stdout(&curl(&rig, &["http://api.test/any"]));
        assert!(inspected.starts_with("GET /any "), "{inspected}");
        let denied = curl(&rig, &["-X", "DELETE", "-w", "%{http_code}", "http://api.test/any"]);
        assert!(stdout(&denied).ends_with("403"));
        let tunnelled = stdout(&curl(&rig, &["-p", "http://api.test/any"]));
        assert!(tunnelled.starts_with("GET /any "), "{tunnelled}");
        let upgrade = stdout(&curl(&rig, &["--http2", "http://api.test/any"]));
        assert!(!upgrade.contains("h2c"), "offered in passing, not passed on: {upgrade}");
    });
}

#[test]
fn refused_connections_say_why() {
    in_namespace(|rig| {
        let code = |args: &[&str]| {
            let output =
                curl(&rig, &[&["-o", "/dev/null", "-w", "%{http_connect}"], args].concat());
            String::from_utf8_lossy(&output.stdout).into_owned()
        };
        assert_eq!(code(&["https://forbidden.test/"]), "403");
        assert_eq!(code(&["https://api.test:8443/"]), "403");
        assert_eq!(code(&["https://nowhere.test/"]), "502");
        let audited = curl(&rig, &["-X", "DELETE", "https://audited.test/x"]);
        assert!(stdout(&audited).starts_with("DELETE /x "), "audit lets it pass");
        let bad = curl(&rig, &["-w", "%{http_code}", "https://expired.test:4434/"]);
        assert!(stdout(&bad).ends_with("502"), "an upstream of another name");
    });
}

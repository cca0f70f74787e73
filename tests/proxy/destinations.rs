//! Who may connect, and which addresses are dialled.

use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::time::Duration;

use crate::rig::{Who, in_namespace, log_of};
use ringfence::proxy::control::ToProxy;

fn connect(authority: &str) -> Vec<u8> {
    format!("CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n\r\n").into_bytes()
}

#[test]
fn special_and_own_addresses_are_not_dialled() {
    in_namespace(|rig| {
        let rows = [
            ("meta.test:80", "ssrf_denied"),
            ("mixed.test:80", "ssrf_denied"),
            ("one.wild.test:443", "ssrf_denied"),
            ("127.0.0.1:8090", "ssrf_denied"),
            ("own.test:80", "ssrf_denied"),
            ("closed.test:9", "upstream_unreachable"),
            ("nowhere.test:443", "upstream_unreachable"),
            ("localhost:8090", "policy_denied"),
            ("[::1]:443", "policy_denied"),
        ];
        for (authority, code) in rows {
            let answer = rig.exchange(&connect(authority));
            assert!(answer.contains(&format!("\"error\":\"{code}\"")), "{authority}: {answer}");
            let status = if code == "upstream_unreachable" { "502" } else { "403" };
            assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{authority}: {answer}");
        }
        let answer = rig.exchange(&connect("meta.test:80"));
        assert!(answer.contains("CONNECT meta.test:80 blocked: "), "{answer}");
        for bad in ["api.test", "api.test:0", "127.1:80", "a b:80", "u@api.test:443", ":443"] {
            let answer = rig.exchange(&connect(bad));
            assert!(answer.starts_with("HTTP/1.1 400 "), "{bad}: {answer}");
        }
        drop(rig.tunnel("10.77.0.1:80"));
        assert_eq!(rig.upstream.requests(), Vec::<String>::new());
    });
}

#[test]
fn the_pods_own_name_leads_to_the_pod_but_not_back_into_the_fence() {
    in_namespace(|rig| {
        let pod = std::net::TcpListener::bind("10.88.0.1:80").expect("neighbour");
        let neighbour = std::thread::spawn(move || pod.accept().map(|(_, from)| from));
        drop(rig.tunnel("pod.ringfence.internal:80"));
        neighbour.join().expect("thread").expect("the neighbour was reached");
        let fence = rig.listen_in_fence(7001);
        rig.tell(&ToProxy::Inbound { ports: vec![7001] });
        // The order of messages is kept, so a refused port is one that is open.
        crate::gateway::wait_for("10.88.0.1:7001");
        let answer = rig.exchange(&connect("pod.ringfence.internal:7001"));
        assert!(answer.contains("leads back into the fence"), "{answer}");
        drop(fence);
    });
}

#[test]
fn the_kubernetes_api_is_not_reached_by_another_name() {
    in_namespace(|rig| {
        // A zone that leads an allowed name to the API's address in the cluster.
        let path = rig.dir.path().join("hosts");
        let text = "10.96.0.1 raw.test one.wild.test cluster.test meant.test \
                    kubernetes.default.evil.test\n";
        std::fs::write(&path, text).expect("hosts");
        // Nor by a network that was written for a cluster, but by one that was for it.
        let answer = rig.exchange(&connect("meant.test:443"));
        assert!(answer.contains("upstream_unreachable"), "{answer}");
        for host in [
            "raw.test:443",
            "one.wild.test:443",
            "cluster.test:443",
            "kubernetes.default.evil.test:443",
        ] {
            let answer = rig.exchange(&connect(host));
            assert!(answer.contains("\"error\":\"ssrf_denied\""), "{answer}");
        }
        let answer = rig.exchange(&connect("raw.test:443"));
        assert!(answer.contains("the Kubernetes API: name kubernetes.default.svc"), "{answer}");
        // By its own name it is dialled: nothing listens there.
        std::fs::write(&path, "10.96.0.1 kubernetes.default.svc\n# another length\n")
            .expect("hosts");
        let later = std::time::SystemTime::now() + Duration::from_secs(5);
        std::fs::File::options()
            .write(true)
            .open(&path)
            .expect("open")
            .set_modified(later)
            .expect("touch");
        let answer = rig.exchange(&connect("kubernetes.default.svc:443"));
        assert!(answer.contains("upstream_unreachable"), "{answer}");
    });
}

#[test]
fn the_pods_own_name_needs_an_endpoint_that_names_it() {
    in_namespace(|rig| {
        for port in 81..=85 {
            let pod = std::net::TcpListener::bind(("10.88.0.1", port)).expect("neighbour");
            let answer = if port == 83 || port == 85 {
                drop(rig.tunnel(&format!("pod.ringfence.internal:{port}")));
                continue;
            } else {
                rig.exchange(&connect(&format!("pod.ringfence.internal:{port}")))
            };
            assert!(answer.contains("\"error\":\"ssrf_denied\""), "{port}: {answer}");
            pod.set_nonblocking(true).expect("nonblocking");
            assert!(pod.accept().is_err(), "{port}");
        }
    });
}

#[test]
fn a_connection_that_was_aborted_has_no_owner() {
    in_namespace(|mut rig| {
        // The supervisor's answer waits for this.
        let who = std::sync::Arc::clone(&rig.who);
        let answer = who.lock().expect("lock");
        let mut tcp = rig.connect();
        tcp.write_all(b"GET http://raw.test/stolen HTTP/1.1\r\nHost: raw.test\r\n\r\n")
            .expect("send");
        // A reset: the addresses are free for another program, and what was sent is still there.
        socket2::SockRef::from(&tcp).set_linger(Some(Duration::ZERO)).expect("linger");
        drop(tcp);
        drop(answer);
        let answer = rig.exchange(
            b"GET http://raw.test/own HTTP/1.1\r\nHost: raw.test\r\nConnection: close\r\n\r\n",
        );
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
        // Both connections are over when the proxy is.
        rig.tell(&ToProxy::Stop { grace_ms: 20_000 });
        rig.ended();
        let seen = rig.upstream.requests();
        assert!(seen.len() == 1 && seen[0].starts_with("GET /own "), "{seen:?}");
    });
}

#[test]
fn a_connection_without_an_owner_is_reported() {
    if let Some(log) = log_of("destinations::a_connection_that_was_aborted_has_no_owner") {
        // The request was there to be read, and was not served.
        let line = "-> GET [reason:the connection ended before its owner was known]";
        assert!(log.contains(line), "{log}");
    }
}

#[test]
fn malformed_requests_are_reported() {
    let Some(log) = log_of("destinations::what_a_proxy_is_not_asked_for") else { return };
    for (what, reason) in [
        ("127.1:80", ""),
        // The event escapes the bracket.
        ("::ffff:169.254.169.254]:80", ""),
        ("api.test:443", "CONNECT has no body"),
        ("the proxy", "Use CONNECT for HTTPS URLs"),
        ("-> the proxy", "line break"),
    ] {
        let told =
            |line: &str| line.contains("DENIED") && line.contains(what) && line.contains(reason);
        assert!(log.lines().any(told), "{what} {reason}: {log}");
    }
}

#[test]
fn no_record_no_access() {
    in_namespace(|rig| {
        *rig.who.lock().expect("lock") = None;
        let answer = rig.exchange(&connect("api.test:443"));
        assert!(answer.starts_with("HTTP/1.1 403 "), "{answer}");
        assert!(answer.contains("CONNECT api.test:443 not permitted by policy"), "{answer}");
        let other = Who { exe: "/usr/bin/wget".into(), file: "/usr/bin/curl".into() };
        *rig.who.lock().expect("lock") = Some(other);
        let answer = rig.exchange(&connect("api.test:443"));
        assert!(answer.contains("policy_denied"), "{answer}");
    });
}

#[test]
fn a_binary_that_changes_is_refused() {
    in_namespace(|rig| {
        let file = rig.dir.path().join("curl");
        std::fs::write(&file, "one").expect("write");
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o755)).expect("chmod");
        let who = Who { exe: "/usr/bin/curl".into(), file: file.clone() };
        *rig.who.lock().expect("lock") = Some(who);
        drop(rig.tunnel("raw.test:80"));
        std::fs::write(&file, "two").expect("write");
        let answer = rig.exchange(&connect("raw.test:80"));
        assert!(answer.contains("changed since its first connection"), "{answer}");
    });
}

#[test]
fn what_a_proxy_is_not_asked_for() {
    in_namespace(|rig| {
        for (request, expected) in [
            ("GET / HTTP/1.1\r\nHost: api.test\r\n\r\n", "invalid_request_target"),
            (
                "GET https://api.test/ HTTP/1.1\r\nHost: api.test\r\n\r\n",
                "Use CONNECT for HTTPS URLs",
            ),
            ("OPTIONS * HTTP/1.1\r\nHost: api.test\r\n\r\n", "invalid_request_target"),
            ("GET ftp://api.test/ HTTP/1.1\r\nHost: api.test\r\n\r\n", "invalid_request_target"),
            ("CONNECT api.test:443 HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\nx", "no body"),
            ("CONNECT 127.1:80 HTTP/1.1\r\nHost: a\r\n\r\n", "invalid_request_target"),
            (
                "CONNECT [::ffff:169.254.169.254]:80 HTTP/1.1\r\nHost: a\r\n\r\n",
                "invalid_request_target",
            ),
            ("GET / HTTP/1.1\nHost: a\n\n", "invalid_request"),
            ("\x16\x03\x01", "invalid_request"),
        ] {
            let answer = rig.exchange(request.as_bytes());
            assert!(answer.starts_with("HTTP/1.1 400 ") && answer.contains(expected), "{answer}");
        }
    });
}

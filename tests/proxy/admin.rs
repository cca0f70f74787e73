//! The admin endpoint on the pod's loopback.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

use ringfence::proxy::Inbound;
use ringfence::proxy::control::ToProxy;
use serde_json::Value;

use crate::gateway::wait_for;
use crate::rig::{ADMIN_PORT, in_namespace, in_namespace_after, log_of, read_head, read_to_end};

const ADMIN: &str = "127.0.0.1:15200";

fn send(bytes: &str) -> TcpStream {
    wait_for(ADMIN);
    let mut tcp = TcpStream::connect(ADMIN).expect("admin endpoint");
    tcp.set_read_timeout(Some(Duration::from_secs(20))).expect("timeout");
    tcp.write_all(bytes.as_bytes()).expect("send");
    tcp
}

/// The status, the head and the body.
fn exchange(bytes: &str) -> (u16, String, String) {
    let answer = read_to_end(&mut send(bytes));
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{answer:?}"));
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok());
    (status.unwrap_or_else(|| panic!("{head}")), head.to_ascii_lowercase(), body.to_owned())
}

fn get(path: &str) -> (u16, String, String) {
    exchange(&format!("GET {path} HTTP/1.1\r\nHost: localhost:{ADMIN_PORT}\r\n\r\n"))
}

/// The whole part of a line's value in /metrics; counters are the process's, so of all tests in it.
fn metric(text: &str, name: &str) -> u64 {
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value
        .and_then(|value| value.split('.').next()?.parse().ok())
        .unwrap_or_else(|| panic!("no {name} in {text}"))
}

#[test]
fn health_readiness_and_attestation() {
    in_namespace(|rig| {
        let (status, head, body) = get("/healthz");
        assert_eq!((status, body.as_str()), (200, "ok\n"));
        assert!(head.contains("connection: close"), "{head}");
        assert!(head.contains("cache-control: no-store"), "{head}");
        assert_eq!(get("/readyz").0, 503);
        assert_eq!(get("/attestation").0, 503);
        assert_eq!(metric(&get("/metrics").2, "ringfence_ready"), 0);
        let path = rig.dir.path().join("attestation.json");
        std::fs::write(&path, "{\"version\": 1}").expect("file");
        rig.released(&File::open(path).expect("file"));
        for _ in 0..500 {
            if get("/readyz").0 != 503 {
                break;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        assert_eq!(get("/readyz").0, 200);
        assert_eq!(metric(&get("/metrics").2, "ringfence_ready"), 1);
        for _ in 0..2 {
            let (status, head, body) = get("/attestation");
            assert_eq!((status, body.as_str()), (200, "{\"version\": 1}"));
            assert!(head.contains("content-type: application/json"), "{head}");
        }
    });
}

#[test]
fn what_is_not_served() {
    in_namespace(|_rig| {
        let request =
            |line: &str, fields: &str| exchange(&format!("{line} HTTP/1.1\r\n{fields}\r\n")).0;
        let local = "Host: localhost\r\n";
        for (line, fields, status) in [
            ("GET /healthz", local, 200),
            ("GET /healthz", "Host: 127.0.0.1:9999\r\n", 200),
            ("GET /healthz?x", "Host: [::1]\r\n", 200),
            ("GET /", local, 404),
            ("GET /healthz/", local, 404),
            ("GET /metrics", "Host: rebound.example\r\n", 421),
            ("GET /metrics", "Host: rebound.example:15200\r\n", 421),
            ("GET /metrics", "Host: 10.88.0.1:15200\r\n", 421),
            ("GET /metrics", "", 421),
            ("GET /metrics", "Host: localhost\r\nHost: rebound.example\r\n", 421),
            ("GET http://rebound.example/metrics", local, 421),
            ("GET http://localhost/healthz", local, 200),
            ("CONNECT localhost:80", local, 405),
            ("DELETE /events", local, 405),
            ("POST /metrics", "Host: localhost\r\nContent-Length: 0\r\n", 405),
        ] {
            assert_eq!(request(line, fields), status, "{line} {fields}");
        }
        let (status, head, body) = exchange("HEAD /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n");
        assert_eq!((status, body.as_str()), (200, ""), "{head}");
        let (status, _, body) = exchange("HEAD /events HTTP/1.1\r\nHost: localhost\r\n\r\n");
        assert_eq!((status, body.as_str()), (200, ""));
        // Elsewhere than on the loopback it is not.
        assert!(TcpStream::connect(("10.88.0.1", ADMIN_PORT)).is_err());
    });
}

#[test]
fn what_is_counted() {
    in_namespace(|rig| {
        let before = get("/metrics").2;
        for authority in ["raw.test:80", "nowhere.else.test:443"] {
            rig.exchange(
                format!("CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n\r\nGET / HTTP/1.1\r\nHost: raw.test\r\nConnection: close\r\n\r\n")
                    .as_bytes(),
            );
        }
        for host in ["nowhere.test:443", "meta.test:80"] {
            rig.exchange(format!("CONNECT {host} HTTP/1.1\r\nHost: {host}\r\n\r\n").as_bytes());
        }
        for path in ["/ok/a", "/no"] {
            let mut tls = rig.tls("api.test:443", "api.test", &["http/1.1"]);
            write!(tls, "GET {path} HTTP/1.1\r\nHost: api.test\r\nConnection: close\r\n\r\n")
                .expect("send");
            read_to_end(&mut tls);
        }
        let (_, head, after) = get("/metrics");
        assert!(head.contains("content-type: text/plain; version=0.0.4"), "{head}");
        for (name, at_least) in [
            (r#"ringfence_decisions_total{layer="l4",verdict="allowed",policy="whole"}"#, 3),
            (r#"ringfence_decisions_total{layer="l4",verdict="denied",policy="-"}"#, 1),
            (r#"ringfence_decisions_total{layer="l7",verdict="allowed",policy="api"}"#, 1),
            (r#"ringfence_decisions_total{layer="l7",verdict="denied",policy="api"}"#, 1),
            (r#"ringfence_refusals_total{kind="address"}"#, 1),
            (r#"ringfence_upstream_errors_total{kind="resolve"}"#, 1),
            (r#"ringfence_tls_handshakes_total{side="agent",result="ok"}"#, 2),
            (r#"ringfence_tls_handshakes_total{side="upstream",result="ok"}"#, 2),
            (r#"ringfence_connections_total{kind="agent"}"#, 6),
            (r#"ringfence_bytes_total{direction="up"}"#, 300),
            (r#"ringfence_bytes_total{direction="down"}"#, 100),
        ] {
            let grown = metric(&after, name) - metric(&before, name);
            assert!(grown >= at_least, "{name} grew by {grown}");
        }
        assert!(metric(&after, "process_start_time_seconds") > 1_000_000_000);
        let version = env!("CARGO_PKG_VERSION");
        let build = format!("ringfence_build_info{{version=\"{version}\"}}");
        assert_eq!(metric(&after, &build), 1);
        let _held = rig.tunnel("raw.test:80");
        let open = metric(&get("/metrics").2, r#"ringfence_connections_open{kind="agent"}"#);
        assert!(open >= 1, "{open}");
    });
}

#[test]
fn questions_and_direct_connections_are_counted() {
    in_namespace(|_rig| {
        let before = get("/metrics").2;
        let mut query = b"\x00\x29\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00".to_vec();
        query.extend_from_slice(b"\x05count\x07example\x03com\x00\x00\x01\x00\x01");
        let length = u16::try_from(query.len() - 2).expect("length").to_be_bytes();
        query[..2].copy_from_slice(&length);
        let mut dns = TcpStream::connect(crate::rig::DNS).expect("DNS");
        dns.write_all(&query).expect("send");
        let mut answer = [0; 14];
        std::io::Read::read_exact(&mut dns, &mut answer).expect("answer");
        let after = get("/metrics").2;
        for name in [
            r#"ringfence_dns_answers_total{code="nxdomain"}"#,
            r#"ringfence_refusals_total{kind="name"}"#,
        ] {
            assert!(metric(&after, name) > metric(&before, name), "{name}");
        }
    });
}

/// The lines of a chunked body that begin an event.
fn lines(tcp: TcpStream) -> impl Iterator<Item = String> {
    BufReader::new(tcp).lines().map(|line| line.expect("a line within the time"))
}

fn refused_by_name(rig: &crate::rig::Rig, name: &str) {
    let answer =
        rig.exchange(format!("CONNECT {name}:443 HTTP/1.1\r\nHost: {name}:443\r\n\r\n").as_bytes());
    assert!(answer.starts_with("HTTP/1.1 403 "), "{answer}");
}

#[test]
fn events_as_they_were_and_as_they_come() {
    in_namespace(|rig| {
        refused_by_name(&rig, "before.events.test");
        let mut tcp = send("GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n");
        let head = read_head(&mut tcp).to_ascii_lowercase();
        assert!(head.contains("content-type: application/x-ndjson"), "{head}");
        refused_by_name(&rig, "after.events.test");
        // At the level `warn` what is allowed is written nowhere else.
        let plain = b"CONNECT raw.test:80 HTTP/1.1\r\nHost: raw.test:80\r\n\r\nGET /events-marker HTTP/1.1\r\nHost: raw.test\r\nConnection: close\r\n\r\n";
        rig.exchange(plain);
        let mut wanted = vec!["before.events.test", "after.events.test", "/events-marker"];
        for line in lines(tcp) {
            let Ok(event) = serde_json::from_str::<Value>(&line) else { continue };
            let Some(message) = event["message"].as_str() else { continue };
            let Some(at) = wanted.iter().position(|wanted| message.contains(wanted)) else {
                continue;
            };
            assert_eq!(at, 0, "{message} came before {wanted:?}");
            let denied = wanted.remove(0) != "/events-marker";
            assert_eq!(event["action"], if denied { "Denied" } else { "Allowed" }, "{event}");
            assert_eq!(event["class_uid"], if denied { 4001 } else { 4002 }, "{event}");
            if wanted.is_empty() {
                return;
            }
        }
        panic!("the stream ended before {wanted:?}");
    });
}

#[test]
fn events_as_an_event_stream() {
    in_namespace(|rig| {
        let mut tcp = send(
            "GET /events HTTP/1.1\r\nHost: localhost\r\nAccept: text/html, text/event-stream;q=1\r\n\r\n",
        );
        let head = read_head(&mut tcp).to_ascii_lowercase();
        assert!(head.contains("content-type: text/event-stream"), "{head}");
        refused_by_name(&rig, "stream.events.test");
        let mut lines = lines(tcp);
        let line = lines.find(|line| line.contains("stream.events.test")).expect("the event");
        let json = line.strip_prefix("data: ").expect("a field of the event stream");
        serde_json::from_str::<Value>(json).expect("JSON");
        assert_eq!(lines.next().as_deref(), Some(""), "the event ends");
    });
}

#[test]
fn the_agent_is_not_led_there() {
    in_namespace(|rig| {
        wait_for(ADMIN);
        for authority in ["10.88.0.1:15200", "pod.ringfence.internal:15200"] {
            let answer = rig.exchange(
                format!("CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n\r\n").as_bytes(),
            );
            assert!(answer.starts_with("HTTP/1.1 403 "), "{authority}: {answer}");
            assert!(answer.contains("is the port of the admin endpoint"), "{authority}: {answer}");
        }
        // Nor can it take the port's place on the pod's addresses.
        let _inside = (rig.listen_in_fence(ADMIN_PORT), rig.listen_in_fence(7000));
        rig.tell(&ToProxy::Inbound { ports: vec![7000, ADMIN_PORT] });
        wait_for("10.88.0.1:7000");
        assert!(TcpStream::connect(("10.88.0.1", ADMIN_PORT)).is_err());
        assert_eq!(get("/healthz").0, 200);
    });
}

#[test]
fn a_taken_port_changes_nothing_else() {
    let (hold, held) = std::sync::mpsc::channel();
    let before = move || hold.send(TcpListener::bind(ADMIN).expect("bind")).expect("held");
    in_namespace_after(before, Inbound::Mirror, move |rig| {
        refused_by_name(&rig, "taken.events.test");
        drop(held.recv());
        // Free again, the port is not the agent's: who looks there would believe it to be ours.
        let _inside = (rig.listen_in_fence(ADMIN_PORT), rig.listen_in_fence(7000));
        rig.tell(&ToProxy::Inbound { ports: vec![7000, ADMIN_PORT] });
        wait_for("10.88.0.1:7000");
        assert!(TcpStream::connect(("10.88.0.1", ADMIN_PORT)).is_err());
        assert!(TcpStream::connect(ADMIN).is_err());
    });
}

#[test]
fn a_taken_port_is_reported() {
    if let Some(log) = log_of("admin::a_taken_port_changes_nothing_else") {
        let line = "CONFIG:DEGRADED [MED] the admin endpoint 127.0.0.1:15200 cannot be opened";
        assert!(log.contains(line), "{log}");
    }
}

//! The policy changes while connections are open: what begins is judged by the new one, what goes on
//! is judged again, and what both allow is not disturbed.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use h2::Reason;
use hickory_proto::op::ResponseCode;
use hickory_proto::rr::RecordType;
use ringfence::policy::digest::to_hex;
use sha2::Digest as _;

use crate::h2_streams::{get, open, over_tls, read, request, with_rig};
use crate::policy_dns::{address, ask};
use crate::rig::{
    POLICY, Rig, UPSTREAM, capturing, in_namespace, log_of_alone, read_head, read_response,
    read_to_end,
};
use crate::websocket;

/// The first policy with other words in the place of some.
fn with(changes: &[(&str, &str)]) -> String {
    changes.iter().fold(POLICY.to_owned(), |policy, (from, to)| {
        assert!(policy.contains(from), "{from} is in the policy");
        policy.replace(from, to)
    })
}

/// Without the endpoints of these hosts, and with all others.
fn without(host: &str) -> String {
    POLICY.replace(host, "nobody.test")
}

/// The first one in other words.
fn same() -> String {
    format!("# as before\n{POLICY}")
}

fn follow(rig: &Rig, yaml: &str) {
    rig.follow(yaml).expect("followed");
}

fn asks(stream: &mut (impl Read + Write), line: &str, host: &str) -> String {
    write!(stream, "{line} HTTP/1.1\r\nHost: {host}\r\n\r\n").expect("send");
    read_response(stream).0
}

#[test]
fn the_next_request_of_a_connection_is_judged_by_the_policy_of_then() {
    in_namespace(|rig| {
        let open = || rig.tls("api.test:443", "api.test", &["http/1.1"]);
        let mut tls = open();
        assert!(asks(&mut tls, "GET /ok/1", "api.test").starts_with("HTTP/1.1 200 "));
        let mut other = open();
        assert!(asks(&mut other, "GET /ok/1", "api.test").starts_with("HTTP/1.1 200 "));
        let mut plain = rig.connect();
        assert!(asks(&mut plain, "GET http://api.test/x", "api.test").starts_with("HTTP/1.1 200 "));
        let mut fresh = rig.connect();
        follow(
            &rig,
            &with(&[
                (
                    "\"/ok/**\" }\n          - allow: { method: POST, path: \"/post\"",
                    "\"/fine/**\" }\n          - allow: { method: POST, path: \"/post\"",
                ),
                (
                    "host: api.test, port: 80, protocol: rest",
                    "host: other.test, port: 80, protocol: rest",
                ),
            ]),
        );
        let head = asks(&mut tls, "GET /ok/1", "api.test");
        assert!(head.starts_with("HTTP/1.1 403 "), "{head}");
        // What is allowed now is allowed on a connection of before.
        assert!(asks(&mut other, "GET /fine/1", "api.test").starts_with("HTTP/1.1 200 "));
        assert!(asks(&mut other, "GET /fine/2", "api.test").starts_with("HTTP/1.1 200 "));
        let head = asks(&mut plain, "GET http://api.test/x", "api.test");
        assert!(head.starts_with("HTTP/1.1 403 "), "{head}");
        // One that was accepted before, and asks now.
        let head = asks(&mut fresh, "GET http://api.test/x", "api.test");
        assert!(head.starts_with("HTTP/1.1 403 "), "{head}");
        let requests = rig.upstream.requests();
        assert_eq!(requests.iter().filter(|one| one.starts_with("GET /ok/1")).count(), 2);
        // The address behind a connection was checked by other rules: it is not used any more.
        let names = rig.upstream.seen().iter().filter(|one| one.starts_with("TLS ")).count();
        assert_eq!(names, 3, "{:?}", rig.upstream.seen());
    });
}

#[test]
fn a_tunnel_lasts_as_long_as_it_is_allowed() {
    in_namespace(|rig| {
        let banner = |host: &str| {
            let mut tcp = rig.tunnel(&format!("{host}:2525"));
            let mut banner = [0; 11];
            tcp.read_exact(&mut banner).expect("banner");
            tcp
        };
        let mut stays = banner("10.77.0.1");
        let mut ends = banner("raw.test");
        let mut silent = rig.tunnel("raw.test:80");
        follow(&rig, &same());
        follow(&rig, &without("raw.test"));
        assert_eq!(read_to_end(&mut ends), "");
        assert_eq!(read_to_end(&mut silent), "");
        stays.write_all(b"EHLO agent\r\n").expect("send");
        assert_eq!(read_to_end(&mut stays), "250 ok\r\n");
        // Its own endpoint: requests are to be judged, and nobody can tell what passed.
        follow(&rig, POLICY);
        let mut judged = banner("raw.test");
        follow(
            &rig,
            &with(&[(
                "{ host: raw.test, ports: [80, 443, 2525, 4433, 8081] }",
                "{ host: raw.test, port: 2525, protocol: rest, access: full }",
            )]),
        );
        assert_eq!(read_to_end(&mut judged), "");
        // The address that it leads to.
        follow(&rig, POLICY);
        let mut moved = banner("10.77.0.1");
        follow(
            &rig,
            &with(&[(
                "{ host: 10.77.0.1, port: 2525 }",
                "{ host: 10.77.0.1, port: 2525, allowed_ips: [\"10.99.0.0/16\"] }",
            )]),
        );
        assert_eq!(read_to_end(&mut moved), "");
    });
}

#[test]
fn tls_that_was_passed_through_is_not_any_more() {
    in_namespace(|rig| {
        let begin = || {
            let client = crate::rig::client(rig.bundle_pem.as_bytes(), "skip.test", &["http/1.1"]);
            let mut tls = rustls::StreamOwned::new(client, rig.tunnel("skip.test:443"));
            assert!(asks(&mut tls, "GET /", "skip.test").starts_with("HTTP/1.1 200 "));
            tls
        };
        let mut tls = begin();
        follow(&rig, &same());
        assert!(asks(&mut tls, "GET /", "skip.test").starts_with("HTTP/1.1 200 "));
        follow(&rig, &with(&[(", tls: skip", "")]));
        assert_eq!(read_to_end(&mut tls), "");
    });
}

/// A server that answers one request in parts, each when it is told to.
struct Parts(TcpStream);

impl Parts {
    fn accept(listener: &TcpListener) -> Self {
        let (mut tcp, _) = listener.accept().expect("accept");
        read_head(&mut tcp);
        tcp.write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n").expect("head");
        Self(tcp)
    }

    fn say(&mut self, part: &str) {
        write!(self.0, "{:x}\r\n{part}\r\n", part.len()).expect("part");
    }
}

#[test]
fn an_answer_under_way_is_judged_again() {
    in_namespace(|rig| {
        let listener = TcpListener::bind((UPSTREAM, 8080)).expect("listener");
        let mut tcp = rig.tunnel("star.test:8080");
        tcp.write_all(b"GET /stream HTTP/1.1\r\nHost: star.test:8080\r\n\r\n").expect("send");
        let mut parts = Parts::accept(&listener);
        parts.say("one");
        let head = read_head(&mut tcp);
        let mut first = [0; 8];
        tcp.read_exact(&mut first).expect("part");
        let mut hears = |parts: &mut Parts, part: &str| {
            parts.say(part);
            let expected = format!("{:x}\r\n{part}\r\n", part.len());
            let mut got = vec![0; expected.len()];
            tcp.read_exact(&mut got).expect("part");
            assert_eq!(String::from_utf8_lossy(&got), expected);
        };
        assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
        follow(&rig, &same());
        hears(&mut parts, "two");
        // Other rules that allow it.
        let rules = "host: star.test, port: 8080, protocol: rest, enforcement: enforce, rules: [{ allow: { method: GET, path: /stream } }]";
        let access =
            "host: star.test, port: 8080, protocol: rest, enforcement: enforce, access: full";
        follow(&rig, &with(&[(access, rules)]));
        hears(&mut parts, "three");
        follow(&rig, &with(&[(access, &rules.replace("/stream", "/other"))]));
        assert_eq!(read_to_end(&mut tcp), "");
    });
}

/// What a content says beside what was asked for when it was read, nobody has looked at.
#[test]
fn a_content_is_not_judged_by_rules_that_ask_for_more_of_it() {
    in_namespace(|rig| {
        let access =
            "host: star.test, port: 8080, protocol: rest, enforcement: enforce, access: full";
        let rpc = |rules: &str| {
            let rules = format!(
                "host: star.test, port: 8080, path: /rpc, protocol: json-rpc, enforcement: enforce, {rules}"
            );
            with(&[(access, &rules)])
        };
        let all = "rules: [{ allow: { method: '*' } }]";
        follow(&rig, &rpc(all));
        let listener = TcpListener::bind((UPSTREAM, 8080)).expect("listener");
        let mut tcp = rig.tunnel("star.test:8080");
        let body = r#"{"jsonrpc":"2.0","id":1,"method":"read","params":{"path":"/etc/x"}}"#;
        let length = body.len();
        write!(
            tcp,
            "POST /rpc HTTP/1.1\r\nHost: star.test:8080\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
        )
        .expect("send");
        let mut parts = Parts::accept(&listener);
        parts.say("one");
        assert!(read_head(&mut tcp).starts_with("HTTP/1.1 200 "));
        let mut first = [0; 8];
        tcp.read_exact(&mut first).expect("part");
        follow(&rig, &format!("# as before\n{}", rpc(all)));
        parts.say("two");
        tcp.read_exact(&mut first).expect("part");
        let deny = "deny_rules: [{ method: read, params: { path: '/etc/*' } }]";
        follow(&rig, &rpc(&format!("{all}, {deny}")));
        assert_eq!(read_to_end(&mut tcp), "");
    });
}

#[test]
fn streams_of_one_connection_are_judged_one_by_one() {
    with_rig(|rig| async move {
        let rig = &rig;
        let send = over_tls(rig, "rpc.test:4433").await;
        let uri = |path: &str| request("GET", &format!("https://rpc.test:4433{path}"));
        let (hanging, _) = open(&send, uri("/ok/hang"), true).await;
        let grpc = request("POST", "https://rpc.test:4433/echo.Echo/Stream");
        let (echo, mut up) = open(&send, grpc, false).await;
        up.send_data("one".into(), false).expect("sent");
        let (head, mut body) = echo.await.expect("response").into_parts();
        assert_eq!(head.status, 200);
        follow(rig, &same());
        assert_eq!(get(&send, uri("/ok/a")).await.0.status(), 200);
        let rules = "          - allow: { method: GET, path: \"/ok/**\" }\n      - { host: audited.test, port: 443, protocol";
        let other = rules.replace("/ok/**", "/other/**");
        follow(rig, &with(&[(rules, &other)]));
        let error = hanging.await.expect_err("reset");
        assert_eq!(error.reason(), Some(Reason::CANCEL));
        assert_eq!(get(&send, uri("/ok/a")).await.0.status(), 403);
        assert_eq!(get(&send, uri("/other/a")).await.0.status(), 200);
        // The other stream has gone on.
        up.send_data("two".into(), true).expect("sent");
        let (whole, _) = read(&mut body).await.expect("body");
        assert_eq!(whole, b"onetwo");
        // No stream of this connection is left anything, and it is told so.
        follow(rig, &without("rpc.test"));
        assert_eq!(get(&send, uri("/other/a")).await.0.status(), 403);
        follow(rig, POLICY);
        assert_eq!(get(&send, uri("/ok/a")).await.0.status(), 200);
        let reset = rig.upstream.requests().iter().any(|one| one.starts_with("RESET "));
        assert!(reset, "{:?}", rig.upstream.requests());
    });
}

#[test]
fn a_websocket_lasts_as_long_as_it_is_allowed() {
    in_namespace(|rig| {
        let raw = websocket::Raw::start();
        let (mut client, mut server) = websocket::open(&rig, &raw, "/echo/a", false);
        follow(&rig, &same());
        client.write_all(&websocket::frame(0x81, b"one")).expect("send");
        assert_eq!(websocket::read_frame(&mut server).2, b"one");
        // The handshake is allowed, text is not.
        let text = "          - allow: { method: WEBSOCKET_TEXT, path: \"/echo/**\" }\n";
        let (mut quiet, mut hears) = websocket::open(&rig, &raw, "/echo/b", false);
        follow(&rig, &with(&[(text, "")]));
        server.write_all(&[0x81, 2, b'h', b'i']).expect("send");
        assert_eq!(websocket::read_frame(&mut client).2, b"hi");
        client.write_all(&websocket::frame(0x81, b"two")).expect("send");
        let (code, reason) = websocket::closed(&mut client);
        assert!(code == 1008 && reason.starts_with("policy_denied"), "{code} {reason}");
        // One that says nothing is told all the same.
        follow(&rig, &with(&[("          - allow: { method: GET, path: \"**\" }\n", "")]));
        let (code, reason) = websocket::closed(&mut quiet);
        assert!(code == 1008 && reason.starts_with("policy_denied"), "{code} {reason}");
        assert_eq!(read_to_end(&mut hears), "");
    });
}

#[test]
fn names_and_captured_connections_follow() {
    capturing(443, |rig| {
        let api = address("api.test.");
        let open = || {
            let tcp = rig.direct((api, 443));
            rustls::StreamOwned::new(rig.client("api.test", &["http/1.1"]), tcp)
        };
        let mut tls = open();
        assert!(asks(&mut tls, "GET /ok/1", "api.test").starts_with("HTTP/1.1 200 "));
        let code = |name: &str| ask(name, RecordType::A).metadata.response_code;
        assert_eq!(code("new.test."), ResponseCode::NXDomain);
        follow(&rig, &POLICY.replace("api.test", "new.test"));
        assert_eq!(code("api.test."), ResponseCode::NXDomain, "also one that had an address");
        assert_eq!(code("new.test."), ResponseCode::NoError);
        let head = asks(&mut tls, "GET /ok/1", "api.test");
        assert!(head.starts_with("HTTP/1.1 403 "), "{head}");
        let refused = open().write_all(b"x");
        assert!(refused.is_err(), "{refused:?}");
        follow(&rig, POLICY);
        assert_eq!(address("api.test."), api, "the same as before");
        assert!(asks(&mut open(), "GET /ok/1", "api.test").starts_with("HTTP/1.1 200 "));
    });
}

#[test]
fn what_is_asked_of_a_caller_is_asked_of_those_that_are_connected() {
    in_namespace(|rig| {
        let own =
            to_hex(&sha2::Sha256::digest(std::fs::read("/usr/bin/curl").expect("curl")).into());
        let binaries = "    binaries: [{ path: /usr/bin/curl }]\n  sockets";
        let entry = |more: &str| {
            let to = format!("    binaries: [{{ path: /usr/bin/curl, {more} }}]\n  sockets");
            with(&[(binaries, &to)])
        };
        let mut tls = rig.tls("api.test:443", "api.test", &["http/1.1"]);
        assert!(asks(&mut tls, "GET /ok/1", "api.test").starts_with("HTTP/1.1 200 "));
        let mut fresh = rig.connect();
        follow(&rig, &entry(&format!("sha256: {own}")));
        assert!(asks(&mut tls, "GET /ok/1", "api.test").starts_with("HTTP/1.1 200 "));
        let head = asks(&mut fresh, "GET http://api.test/x", "api.test");
        assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
        // Nobody looked at what code it runs when it connected.
        let mut second = rig.tls("api.test:443", "api.test", &["http/1.1"]);
        assert!(asks(&mut second, "GET /ok/1", "api.test").starts_with("HTTP/1.1 200 "));
        follow(&rig, &entry("tainted: refuse"));
        let head = asks(&mut second, "GET /ok/1", "api.test");
        assert!(head.starts_with("HTTP/1.1 403 "), "{head}");
        follow(&rig, &entry("tainted: report"));
        assert!(asks(&mut tls, "GET /ok/1", "api.test").starts_with("HTTP/1.1 200 "));
        follow(&rig, &entry(&format!("sha256: {}", own.chars().rev().collect::<String>())));
        let head = asks(&mut tls, "GET /ok/1", "api.test");
        assert!(head.starts_with("HTTP/1.1 403 "), "{head}");
    });
}

#[test]
fn a_bounded_policy_only_takes_away() {
    in_namespace(|rig| {
        let status = |host: &str| {
            let head = asks(&mut rig.connect(), &format!("GET http://{host}/x"), host);
            head[9..12].to_owned()
        };
        let added = format!(
            "{POLICY}  more:\n    endpoints: [{{ host: ws.test, port: 80 }}]\n    binaries: [{{ path: /usr/bin/curl }}]\n"
        );
        let added = added.replace(
            "{ host: raw.test, ports: [80, 443, 2525, 4433, 8081] }",
            "{ host: nobody.test, port: 1 }",
        );
        assert_eq!(
            [status("raw.test"), status("ws.test"), status("api.test")],
            ["200", "403", "200"]
        );
        rig.follow_as(&added, true, None).expect("followed");
        assert_eq!(
            [status("raw.test"), status("ws.test"), status("api.test")],
            ["403", "403", "200"]
        );
        // Bounded by the last one that holds whole, not by the last.
        rig.follow_as(POLICY, true, None).expect("followed");
        assert_eq!(status("raw.test"), "200");
        follow(&rig, &added);
        assert_eq!([status("raw.test"), status("ws.test")], ["403", "200"]);
    });
}

#[test]
fn the_authorities_of_upstreams_follow() {
    in_namespace(|rig| {
        let status = || {
            let mut tls = rig.tls("api.test:443", "api.test", &["http/1.1"]);
            asks(&mut tls, "GET /ok/1", "api.test")[9..12].to_owned()
        };
        assert_eq!(status(), "200");
        rig.follow_as(POLICY, false, Some(String::new())).expect("followed");
        assert_eq!(status(), "502");
        follow(&rig, POLICY);
        assert_eq!(status(), "200");
    });
}

#[test]
#[ignore = "counts what one proxy does: run by changes_are_told"]
fn what_cannot_be_followed_changes_nothing() {
    in_namespace(|rig| {
        let mut tls = rig.tls("api.test:443", "api.test", &["http/1.1"]);
        for bad in [
            "network_policies: [",
            "version: 7\n",
            "network_policies: { p: { endpoints: [{ host: '*', port: 0 }] } }",
        ] {
            let why = rig.follow(bad).expect_err("not followed");
            assert!(why.contains("policy.yaml"), "{why}");
            assert!(asks(&mut tls, "GET /ok/1", "api.test").starts_with("HTTP/1.1 200 "));
        }
        let mut tunnel = rig.tunnel("raw.test:2525");
        follow(&rig, &without("raw.test"));
        read_to_end(&mut tunnel);
        let metrics = {
            let mut tcp = TcpStream::connect("127.0.0.1:15200").expect("admin");
            tcp.write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n").expect("send");
            read_to_end(&mut tcp)
        };
        for line in [
            "ringfence_policy_changes_total{result=\"followed\"} 1\n",
            "ringfence_policy_changes_total{result=\"kept\"} 3\n",
            "ringfence_policy_generation 5\n",
            "ringfence_policy_info{digest=\"sha256:5\"} 1\n",
            "ringfence_refusals_total{kind=\"revoked\"} 1\n",
        ] {
            assert!(metrics.contains(line), "{line} in {metrics}");
        }
    });
}

#[test]
fn changes_are_told() {
    let Some(log) = log_of_alone("live::what_cannot_be_followed_changes_nothing") else { return };
    let line = |words: &[&str]| {
        let found = log.lines().any(|line| words.iter().all(|word| line.contains(word)));
        assert!(found, "{words:?} in\n{log}");
    };
    line(&["CONFIG:POLICY [HIGH]", "is not followed: the last one stays in force", "policy.yaml"]);
    line(&["CONFIG:POLICY [LOW]", "is in force", "sha256:5", "generation:5"]);
    line(&["NET:CLOSE [MED] DENIED", "raw.test:2525", "the policy has changed: no policy allows"]);
}

#[test]
fn under_load_no_request_is_lost_that_all_allow() {
    const CLIENTS: usize = 6;
    const CHANGES: usize = 40;
    in_namespace(|rig| {
        let (done, asked) = (AtomicBool::new(false), AtomicUsize::new(0));
        let rig = Arc::new(rig);
        let other = without("ws.test");
        std::thread::scope(|scope| {
            for client in 0..CLIENTS {
                let (rig, done, asked) = (Arc::clone(&rig), &done, &asked);
                scope.spawn(move || {
                    while !done.load(Ordering::Relaxed) {
                        if client % 2 == 0 {
                            let mut tls = rig.tls("api.test:443", "api.test", &["http/1.1"]);
                            for _ in 0..20 {
                                let head = asks(&mut tls, "GET /ok/1", "api.test");
                                assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
                                asked.fetch_add(1, Ordering::Relaxed);
                            }
                        } else {
                            let mut tcp = rig.connect();
                            for _ in 0..20 {
                                let head = asks(&mut tcp, "GET http://api.test/x", "api.test");
                                assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
                                asked.fetch_add(1, Ordering::Relaxed);
                            }
                        }
                    }
                });
            }
            for change in 0..CHANGES {
                follow(&rig, if change % 2 == 0 { &other } else { POLICY });
                // Some requests by each.
                let before = asked.load(Ordering::Relaxed);
                while asked.load(Ordering::Relaxed) < before + CLIENTS {
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
            done.store(true, Ordering::Relaxed);
        });
        assert!(asked.load(Ordering::Relaxed) >= CLIENTS * CHANGES);
    });
}

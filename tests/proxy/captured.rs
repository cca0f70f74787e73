//! Connections that ignore the proxy: judged by the name that stands for them, and by no other.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::Duration;

use rustls::{ClientConnection, StreamOwned};

use crate::policy_dns::address;
use crate::rig::{
    Rig, Who, capturing, log_of, not_transparent, read_head, read_response, read_to_end,
};

/// An address of nobody's (RFC 5737).
const ELSEWHERE: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 9);
const UPSTREAM: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);

fn tls(rig: &Rig, ip: Ipv4Addr, sni: &str) -> StreamOwned<ClientConnection, TcpStream> {
    StreamOwned::new(rig.client(sni, &["http/1.1"]), rig.direct((ip, 443)))
}

/// Sends `bytes` there and expects nothing but a reset.
fn reset(rig: &Rig, to: impl Into<SocketAddr>, bytes: &[u8]) {
    let to = to.into();
    let mut tcp = rig.direct(to);
    let sent = tcp.write_all(bytes);
    let error = sent.and_then(|()| tcp.read(&mut [0]).map(|_| ())).expect_err("reset");
    let shown = String::from_utf8_lossy(bytes).into_owned();
    let kind = error.kind();
    assert!(
        matches!(kind, ErrorKind::ConnectionReset | ErrorKind::BrokenPipe),
        "{to} {shown:?}: {error}"
    );
}

fn hello(rig: &Rig, sni: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    rig.client(sni, &["http/1.1"]).write_tls(&mut bytes).expect("hello");
    bytes
}

#[test]
fn tls_to_a_name_that_dns_gave_out() {
    capturing(443, |rig| {
        let api = address("api.test.");
        let mut tls = tls(&rig, api, "api.test");
        tls.write_all(b"GET /ok/1 HTTP/1.1\r\nHost: api.test\r\n\r\n").expect("send");
        let (head, body) = read_response(&mut tls);
        assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
        assert!(body.contains("\r\nHost: api.test\r\n"), "{body}");
        // Each request is judged.
        tls.write_all(b"DELETE /ok/1 HTTP/1.1\r\nHost: api.test\r\n\r\n").expect("send");
        let answer = read_to_end(&mut tls);
        assert!(answer.starts_with("HTTP/1.1 403 "), "{answer}");
        assert!(answer.contains("\"rule\":\"DELETE /ok/1\""), "{answer}");
        assert_eq!(rig.upstream.requests().len(), 1, "{:?}", rig.upstream.requests());
        // However the ClientHello is split.
        for split in [1, 5, 100] {
            let mut client = rig.client("api.test", &["http/1.1"]);
            let mut hello = Vec::new();
            client.write_tls(&mut hello).expect("hello");
            let mut tcp = rig.direct((api, 443));
            tcp.write_all(&hello[..split]).expect("send");
            std::thread::sleep(Duration::from_millis(50));
            tcp.write_all(&hello[split..]).expect("send");
            let mut tls = StreamOwned::new(client, tcp);
            tls.write_all(b"GET /ok/1 HTTP/1.1\r\nHost: api.test\r\n\r\n").expect("send");
            assert!(read_head(&mut tls).starts_with("HTTP/1.1 200 "));
        }
    });
}

#[test]
fn another_name_within_is_refused() {
    capturing(443, |rig| {
        let api = address("api.test.");
        let mut wrong = tls(&rig, api, "raw.test");
        let error = wrong.write_all(b"x").and_then(|()| wrong.flush()).expect_err("alert");
        assert!(error.to_string().contains("UnrecognisedName"), "{error}");
        for (ip, sni) in [(api, "api.test"), (ELSEWHERE, "api.test")] {
            let mut tls = tls(&rig, ip, sni);
            tls.write_all(b"GET /ok/1 HTTP/1.1\r\nHost: raw.test\r\n\r\n").expect("send");
            let answer = read_to_end(&mut tls);
            assert!(answer.contains("request_authority_mismatch"), "{answer}");
        }
        let seen = rig.upstream.seen();
        assert!(seen.iter().all(|one| one.starts_with("TLS api.test ")), "{seen:?}");
    });
}

#[test]
fn plain_requests_to_a_name_that_dns_gave_out() {
    capturing(80, |rig| {
        let api = address("api.test.");
        let exchange = |request: &str| {
            let mut tcp = rig.direct((api, 80));
            tcp.write_all(request.as_bytes()).expect("send");
            read_to_end(&mut tcp)
        };
        let answer = exchange("GET /x HTTP/1.1\r\nHost: Api.test:80\r\nConnection: close\r\n\r\n");
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
        let answer = exchange("DELETE /x HTTP/1.1\r\nHost: api.test\r\n\r\n");
        assert!(answer.starts_with("HTTP/1.1 403 "), "{answer}");
        for host in ["raw.test", "api.test:443", "198.18.0.1", ""] {
            let answer = exchange(&format!("GET /x HTTP/1.1\r\nHost: {host}\r\n\r\n"));
            assert!(answer.contains("request_authority_mismatch"), "{host}: {answer}");
        }
        // An inspected endpoint is for HTTP only.
        let answer = exchange("\0raw");
        assert!(answer.contains("unsupported_l7_protocol"), "{answer}");
        assert_eq!(rig.upstream.requests().len(), 1, "{:?}", rig.upstream.requests());
    });
}

#[test]
fn tls_to_an_address_is_judged_by_its_name_and_dials_that() {
    capturing(443, |rig| {
        let mut named = tls(&rig, ELSEWHERE, "api.test");
        named.write_all(b"GET /ok/1 HTTP/1.1\r\nHost: api.test\r\n\r\n").expect("send");
        assert!(read_head(&mut named).starts_with("HTTP/1.1 200 "));
        assert_eq!(rig.upstream.seen()[0], "TLS api.test http/1.1");
        let before = rig.upstream.seen().len();
        // A name that is not allowed, none at all, a request without a host, other bytes, silence.
        reset(&rig, (ELSEWHERE, 443), &hello(&rig, "forbidden.test"));
        reset(&rig, (UPSTREAM, 443), &hello(&rig, "10.77.0.1"));
        reset(&rig, (UPSTREAM, 443), b"GET / HTTP/1.0\r\n\r\n");
        reset(&rig, (UPSTREAM, 443), b"SSH-2.0-x\r\n");
        reset(&rig, (UPSTREAM, 443), b"");
        // What is no ClientHello may get an alert before the reset.
        let mut tcp = rig.direct((ELSEWHERE, 443));
        tcp.write_all(b"\x16\x03\x01\x00\x04\x02\x00\x00\x00").expect("send");
        read_to_end(&mut tcp);
        assert_eq!(rig.upstream.seen().len(), before);
    });
}

#[test]
fn refusals_say_what_to_do() {
    let test = "captured::tls_to_an_address_is_judged_by_its_name_and_dials_that";
    if let Some(log) = log_of(test) {
        let denial = |to: &str| {
            let what = format!("DENIED /usr/bin/curl(42) -> {to} ");
            log.lines().find(|line| line.contains(&what)).unwrap_or_else(|| panic!("{to}: {log}"))
        };
        assert!(denial("forbidden.test:443").contains("no policy allows this host and port"));
        assert!(denial("10.77.0.1:443").contains("connect by a name that the policy allows"));
        assert!(denial("203.0.113.9:443").contains("ClientHello"));
        assert!(log.contains("host: \"forbidden.test\""), "the lines that would allow it: {log}");
    }
}

#[test]
fn plain_requests_to_an_address_are_judged_by_their_host() {
    capturing(80, |rig| {
        let exchange = |ip, host: &str| {
            let mut tcp = rig.direct((ip, 80));
            let request = format!("GET /x HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
            // One that leads nowhere may be reset before a byte of it is sent.
            match tcp.write_all(request.as_bytes()) {
                Ok(()) => read_to_end(&mut tcp),
                Err(error)
                    if matches!(
                        error.kind(),
                        ErrorKind::ConnectionReset | ErrorKind::BrokenPipe
                    ) =>
                {
                    String::new()
                }
                Err(error) => panic!("send: {error}"),
            }
        };
        assert!(exchange(ELSEWHERE, "raw.test").starts_with("HTTP/1.1 200 "));
        // An address that the policy has, by itself.
        assert!(exchange(UPSTREAM, "10.77.0.1").starts_with("HTTP/1.1 200 "));
        assert_eq!(exchange(ELSEWHERE, "10.77.0.1"), "");
        assert_eq!(exchange(ELSEWHERE, "forbidden.test"), "");
        assert_eq!(exchange(ELSEWHERE, "a b"), "");
        // Allowed by name, and leading where nothing is ever dialled.
        assert_eq!(exchange(ELSEWHERE, "meta.test"), "");
        assert_eq!(exchange(address("meta.test."), "meta.test"), "");
        assert_eq!(rig.upstream.requests().len(), 2, "{:?}", rig.upstream.requests());
    });
}

#[test]
fn a_server_that_speaks_first_is_heard() {
    capturing(2525, |rig| {
        for to in [address("raw.test."), UPSTREAM] {
            let mut tcp = rig.direct((to, 2525));
            let mut banner = [0; 11];
            tcp.read_exact(&mut banner).expect("banner");
            assert_eq!(&banner, b"220 hello\r\n");
            tcp.write_all(b"EHLO agent\r\n").expect("send");
            assert_eq!(read_to_end(&mut tcp), "250 ok\r\n");
        }
        // A client that speaks first is heard as well.
        let mut tcp = rig.direct((UPSTREAM, 2525));
        tcp.write_all(b"\x01early\r\n").expect("send");
        assert_eq!(read_to_end(&mut tcp), "220 hello\r\n250 ok\r\n");
        reset(&rig, (ELSEWHERE, 2525), b"");
        assert_eq!(rig.upstream.requests().len(), 3, "{:?}", rig.upstream.requests());
    });
}

#[test]
fn an_address_that_only_a_range_allows_is_itself() {
    capturing(84, |rig| {
        // In the range; nothing listens there, so the dial fails. Outside it nothing is dialled.
        reset(&rig, (Ipv4Addr::new(10, 99, 0, 1), 84), b"\0");
        reset(&rig, (ELSEWHERE, 84), b"\0");
    });
}

#[test]
fn ranges_are_asked_about_the_address() {
    if let Some(log) = log_of("captured::an_address_that_only_a_range_allows_is_itself") {
        let about =
            |to: &str| log.lines().filter(move |line| line.contains(to)).collect::<String>();
        let inside = about("10.99.0.1:84");
        assert!(inside.contains("connection failed") && !inside.contains("DENIED"), "{log}");
        assert!(about("203.0.113.9:84").contains("not in allowed_ips"), "{log}");
    }
}

#[test]
fn other_programs_and_callers_that_nobody_knows_are_refused() {
    capturing(443, |rig| {
        let api = address("api.test.");
        let other = Who { exe: "/tmp/other".into(), file: "/usr/bin/curl".into() };
        *rig.who.lock().expect("lock") = Some(other);
        reset(&rig, (api, 443), b"");
        reset(&rig, (ELSEWHERE, 443), &hello(&rig, "api.test"));
        *rig.who.lock().expect("lock") = None;
        reset(&rig, (api, 443), &hello(&rig, "api.test"));
        assert_eq!(rig.upstream.requests(), Vec::<String>::new());
    });
}

#[test]
fn refused_programs_are_named() {
    let test = "captured::other_programs_and_callers_that_nobody_knows_are_refused";
    if let Some(log) = log_of(test) {
        let named = "DENIED /tmp/other(42) -> api.test:443 ";
        let line = log.lines().find(|line| line.contains(named)).expect("a line");
        assert!(line.contains("but not for this binary"), "{line}");
        assert!(log.contains("no process that was seen to make it"), "{log}");
    }
}

#[test]
fn our_own_addresses_lead_nowhere() {
    capturing(443, |rig| {
        for host in [1, 2, 77] {
            reset(&rig, (Ipv4Addr::new(10, 200, 0, host), 443), &hello(&rig, "api.test"));
        }
        assert_eq!(rig.upstream.requests(), Vec::<String>::new());
    });
}

#[test]
fn a_port_that_the_policy_does_not_have_is_refused_unheard() {
    capturing(22, |rig| {
        reset(&rig, (ELSEWHERE, 22), b"");
        reset(&rig, (address("api.test."), 22), b"");
    });
}

#[test]
fn a_refused_port_is_named() {
    let test = "captured::a_port_that_the_policy_does_not_have_is_refused_unheard";
    if let Some(log) = log_of(test) {
        let about = |to: &str| {
            let line = format!("DENIED /usr/bin/curl(42) -> {to} ");
            log.lines().any(|l| l.contains(&line) && l.contains("port that no endpoint"))
        };
        assert!(about("203.0.113.9:22") && about("api.test:22"), "{log}");
    }
}

#[test]
fn who_connects_and_says_nothing_leaves_a_trace() {
    if let Some(log) = log_of("captured::connections_that_are_closed_at_once") {
        assert!(log.contains("/usr/bin/curl(42) -> 203.0.113.9:443 [reason:closed"), "{log}");
    }
}

#[test]
fn connections_that_are_closed_at_once() {
    capturing(443, |rig| {
        let mut tcp = rig.direct((ELSEWHERE, 443));
        tcp.shutdown(std::net::Shutdown::Write).expect("shutdown");
        assert_eq!(read_to_end(&mut tcp), "");
    });
}

#[test]
fn switched_off_nothing_passes() {
    not_transparent(443, |rig| {
        reset(&rig, (ELSEWHERE, 443), &hello(&rig, "api.test"));
        reset(&rig, (Ipv4Addr::new(198, 18, 0, 1), 443), &hello(&rig, "api.test"));
        assert_eq!(rig.upstream.requests(), Vec::<String>::new());
        // By the proxy all is as ever.
        let mut tls = rig.tls("api.test:443", "api.test", &["http/1.1"]);
        tls.write_all(b"GET /ok/1 HTTP/1.1\r\nHost: api.test\r\n\r\n").expect("send");
        assert!(read_head(&mut tls).starts_with("HTTP/1.1 200 "));
    });
}

#[test]
fn a_flood_of_silent_connections_passes() {
    capturing(443, |rig| {
        let api = address("api.test.");
        let open: Vec<_> = (0..1_100).map(|_| rig.direct((api, 443))).collect();
        // Those beyond the limit are reset.
        let is_reset = |mut tcp: &TcpStream| {
            tcp.set_read_timeout(Some(Duration::from_secs(5))).expect("timeout");
            tcp.read(&mut [0]).is_err_and(|error| error.kind() == ErrorKind::ConnectionReset)
        };
        assert!(open.iter().rev().take(4).any(is_reset));
        drop(open);
        for _ in 0..500 {
            let mut tls = tls(&rig, api, "api.test");
            let request = b"GET /ok/1 HTTP/1.1\r\nHost: api.test\r\nConnection: close\r\n\r\n";
            let sent = tls.write_all(request).and_then(|()| tls.flush());
            if sent.is_ok() && read_to_end(&mut tls).starts_with("HTTP/1.1 200 ") {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("the proxy did not recover");
    });
}

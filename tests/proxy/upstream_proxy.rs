//! A proxy of the operator's on the way out.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use ringfence::proxy::UpstreamProxy;

use crate::rig::{Rig, UPSTREAM, behind, log_of, read_response};

const PROXY: &str = "10.77.0.1:8080";

/// An HTTP proxy that wants these credentials, and leads every name to the upstream's address.
/// Returns the heads that it got.
fn corporate(authorization: &'static str) -> Arc<Mutex<Vec<String>>> {
    let listener = TcpListener::bind(PROXY).expect("proxy");
    let heads = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&heads);
    std::thread::spawn(move || {
        for tcp in listener.incoming() {
            let (tcp, seen) = (tcp.expect("accept"), Arc::clone(&seen));
            std::thread::spawn(move || serve(tcp, &seen, authorization));
        }
    });
    heads
}

fn serve(mut tcp: TcpStream, seen: &Mutex<Vec<String>>, authorization: &str) -> Option<()> {
    let mut reader = BufReader::new(tcp.try_clone().ok()?);
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if reader.read_line(&mut head).ok()? == 0 {
            return None;
        }
    }
    seen.lock().expect("lock").push(head.clone());
    let target = head.split(' ').nth(1)?;
    let (host, port) = target.rsplit_once(':')?;
    if !head.contains(&format!("\r\nProxy-Authorization: {authorization}\r\n")) {
        let answer = "HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n";
        return tcp.write_all(answer.as_bytes()).ok();
    }
    match host {
        "expired.test" => return tcp.write_all(b"HTTP/1.1 504 Gateway Timeout\r\n\r\n").ok(),
        "closed.test" => return tcp.write_all(b"220 not HTTP\r\n\r\n").ok(),
        "nowhere.test" => return None,
        _ => {}
    }
    let mut upstream = TcpStream::connect((UPSTREAM, port.parse().ok()?)).ok()?;
    // The head and what the server says first, in one segment.
    let mut first = vec![0; 1024];
    let said = if port == "2525" { upstream.read(&mut first).ok()? } else { 0 };
    let answer = [&b"HTTP/1.1 200 Connection established\r\nX: y\r\n\r\n"[..], &first[..said]];
    tcp.write_all(&answer.concat()).ok()?;
    let (mut from, mut to) = (tcp.try_clone().ok()?, upstream.try_clone().ok()?);
    std::thread::spawn(move || {
        let _ = std::io::copy(&mut from, &mut to);
        let _ = to.shutdown(Shutdown::Write);
    });
    let _ = std::io::copy(&mut upstream, &mut tcp);
    let _ = tcp.shutdown(Shutdown::Write);
    Some(())
}

fn proxy(credentials: Option<&str>, direct: &str) -> UpstreamProxy {
    UpstreamProxy::new(&format!("http://{PROXY}"), credentials, direct).expect("proxy")
}

fn connect(rig: &Rig, to: &str) -> String {
    rig.exchange(format!("CONNECT {to} HTTP/1.1\r\nHost: {to}\r\n\r\n").as_bytes())
}

#[test]
fn what_is_allowed_goes_by_it_and_nothing_else_is_asked() {
    behind(proxy(Some("me:it"), "skip.test"), |rig| {
        let heads = corporate("Basic bWU6aXQ=");
        let mut tls = rig.tls("api.test:443", "api.test", &["http/1.1"]);
        tls.write_all(b"GET /ok/1 HTTP/1.1\r\nHost: api.test\r\n\r\n").expect("send");
        let (head, body) = read_response(&mut tls);
        assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
        assert!(!body.to_ascii_lowercase().contains("proxy-auth"), "{body}");
        let expected = "CONNECT api.test:443 HTTP/1.1\r\nHost: api.test:443\r\n\
                        Proxy-Authorization: Basic bWU6aXQ=\r\n\r\n";
        assert_eq!(*heads.lock().expect("lock"), [expected]);
        // Requests are judged as ever.
        tls.write_all(b"DELETE /ok/1 HTTP/1.1\r\nHost: api.test\r\n\r\n").expect("send");
        assert!(read_response(&mut tls).0.starts_with("HTTP/1.1 403 "));
        // Not a byte of the server's is lost behind the answer's head.
        let mut tcp = rig.tunnel("raw.test:2525");
        let mut banner = [0; 11];
        tcp.read_exact(&mut banner).expect("banner");
        assert_eq!(&banner, b"220 hello\r\n");
        heads.lock().expect("lock").clear();
        // Refused before it is asked: by policy, by what the address is, by what the name is, by
        // what nobody could check, the proxy itself.
        for to in [
            "forbidden.test:443",
            "127.0.0.1:8090",
            "pod.ringfence.internal:82",
            "any.name.test:84",
            "10.77.0.1:2526",
        ] {
            assert!(connect(&rig, to).starts_with("HTTP/1.1 403 "), "{to}");
        }
        // What is excepted goes directly.
        drop(rig.tunnel("skip.test:443"));
        assert_eq!(*heads.lock().expect("lock"), Vec::<String>::new());
    });
}

#[test]
fn its_failures_are_told() {
    behind(proxy(Some("me:it"), ""), |rig| {
        assert!(connect(&rig, "api.test:443").contains("upstream_proxy_failed"), "it is not there");
        let _heads = corporate("Basic bWU6aXQ=");
        for (to, reason) in [
            ("expired.test:4434", "it answered 504"),
            ("closed.test:9", "its answer is not HTTP/1.x"),
            ("nowhere.test:443", "it closed without an answer"),
        ] {
            let answer = connect(&rig, to);
            assert!(answer.starts_with("HTTP/1.1 502 "), "{to}: {answer}");
            assert!(
                answer.contains("upstream_proxy_failed") && answer.contains(reason),
                "{answer}"
            );
        }
    });
    behind(proxy(Some("me:wrong"), ""), |rig| {
        let _heads = corporate("Basic bWU6aXQ=");
        let answer = connect(&rig, "api.test:443");
        assert!(answer.contains("does not accept our credentials (407)"), "{answer}");
    });
    behind(proxy(None, ""), |rig| {
        let _heads = corporate("Basic bWU6aXQ=");
        let answer = connect(&rig, "api.test:443");
        assert!(answer.contains("asks for credentials (407)"), "{answer}");
    });
}

#[test]
fn its_credentials_are_not_told() {
    if let Some(log) = log_of("upstream_proxy::its_failures_are_told") {
        assert!(log.contains("upstream proxy: it does not accept our credentials"), "{log}");
        assert!(!log.contains("bWU6") && !log.contains("me:"), "{log}");
    }
}

//! A client that has ended its half waits for its answer; one that is gone does not.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener};
use std::sync::mpsc::channel;
use std::time::Duration;

use ringfence::proxy::control::ToProxy;

use crate::rig::{Rig, in_namespace, read_head, read_to_end};

/// What `/ok/sse` sends: over some time, so that the end of the client's half comes first.
fn assert_whole(answer: &str) {
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    assert!(answer.contains("data: 2") && answer.ends_with("0\r\n\r\n"), "{answer}");
}

#[test]
fn the_answer_comes_to_a_half_closed_client() {
    in_namespace(|rig| {
        let mut plain = rig.connect();
        plain.write_all(b"GET http://raw.test/ok/sse HTTP/1.1\r\nHost: raw.test\r\n\r\n").unwrap();
        plain.shutdown(Shutdown::Write).expect("shutdown");
        assert_whole(&read_to_end(&mut plain));

        let mut tunnel = rig.tunnel("raw.test:80");
        tunnel.write_all(b"GET /ok/sse HTTP/1.1\r\nHost: raw.test\r\n\r\n").expect("send");
        tunnel.shutdown(Shutdown::Write).expect("shutdown");
        assert_whole(&read_to_end(&mut tunnel));

        // In TLS the half ends with close_notify, with the connection's half behind it or not.
        for bare in [false, true] {
            let mut tls = rig.tls("api.test:443", "api.test", &["http/1.1"]);
            tls.write_all(b"GET /ok/sse HTTP/1.1\r\nHost: api.test\r\n\r\n").expect("send");
            tls.conn.send_close_notify();
            tls.flush().expect("flush");
            while tls.conn.wants_write() {
                tls.conn.write_tls(&mut tls.sock).expect("send");
            }
            if bare {
                tls.sock.shutdown(Shutdown::Write).expect("shutdown");
            }
            assert_whole(&read_to_end(&mut tls));
        }
    });
}

#[test]
fn a_client_with_nothing_to_say_hears_the_server() {
    in_namespace(|rig| {
        let tcp = rig.tunnel("raw.test:2525");
        tcp.shutdown(Shutdown::Write).expect("shutdown");
        assert_eq!(read_to_end(&mut &tcp), "220 hello\r\n250 ok\r\n");
    });
}

/// A request to a server that does not answer; then `end`. The server must see the end of it.
fn freed(rig: &Rig, tunnel: bool, end: impl FnOnce(std::net::TcpStream)) {
    let server = TcpListener::bind("10.77.0.1:9").expect("server");
    let mut tcp = if tunnel { rig.tunnel("closed.test:9") } else { rig.connect() };
    let target = if tunnel { "" } else { "http://closed.test:9" };
    write!(tcp, "GET {target}/ HTTP/1.1\r\nHost: closed.test:9\r\n\r\n").expect("send");
    let (mut upstream, _) = server.accept().expect("accept");
    upstream.set_read_timeout(Some(Duration::from_secs(90))).expect("timeout");
    read_head(&mut upstream);
    end(tcp);
    match upstream.read(&mut [0]) {
        Ok(0) => {}
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {}
        other => panic!("the upstream is still held: {other:?}"),
    }
}

#[test]
fn who_is_gone_frees_what_waits_for_the_answer() {
    in_namespace(|rig| {
        // Reset at once.
        for tunnel in [false, true] {
            freed(&rig, tunnel, |tcp| {
                let _ = socket2::SockRef::from(&tcp).set_linger(Some(Duration::ZERO));
            });
        }
        // Closed like any program that ends: the kernel forgets it after a while, here soon.
        std::fs::write("/proc/sys/net/ipv4/tcp_fin_timeout", "1").expect("sysctl");
        freed(&rig, true, drop);
    });
}

#[test]
fn what_is_copied_is_freed_too() {
    in_namespace(|mut rig| {
        let server = TcpListener::bind("10.77.0.1:9").expect("server");
        let mut tcp = rig.tunnel("closed.test:9");
        tcp.write_all(b"\x00raw").expect("send");
        let (mut upstream, _) = server.accept().expect("accept");
        upstream.set_read_timeout(Some(Duration::from_secs(90))).expect("timeout");
        upstream.read_exact(&mut [0; 4]).expect("bytes");
        // Its half ends, then it is gone; the server goes on holding its own half.
        tcp.shutdown(Shutdown::Write).expect("shutdown");
        assert_eq!(upstream.read(&mut [0]).expect("end"), 0);
        socket2::SockRef::from(&tcp).set_linger(Some(Duration::ZERO)).expect("linger");
        drop(tcp);
        // The server says nothing, so that no write tells of it. A proxy that stops waits for what is
        // open: it ends when nothing is.
        rig.tell(&ToProxy::Stop { grace_ms: 3_600_000 });
        let (done, ended) = channel();
        std::thread::spawn(move || {
            rig.ended();
            done.send(()).expect("the test waits");
        });
        ended.recv_timeout(Duration::from_secs(90)).expect("the tunnel is still held");
        drop(upstream);
    });
}

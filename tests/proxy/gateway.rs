//! The other listeners: captured connections, DNS, inbound ports, and the end.

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::time::Duration;

use crate::rig::{DNS, in_namespace, in_namespace_with, log_of};
use ringfence::proxy::Inbound;
use ringfence::proxy::control::ToProxy;

/// Waits until something listens there.
pub fn wait_for(address: &str) {
    for _ in 0..500 {
        if TcpStream::connect(address).is_ok() {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("nothing listens on {address}");
}

fn wait_until_refused(address: &str) {
    for _ in 0..500 {
        match TcpStream::connect(address) {
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => return,
            _ => std::thread::sleep(Duration::from_millis(10)),
        }
    }
    panic!("{address} is still open");
}

#[test]
fn captured_connections_are_reset() {
    in_namespace(|_rig| {
        for _ in 0..3 {
            let mut tcp = TcpStream::connect("10.200.0.1:15001").expect("captured");
            let error = tcp.read(&mut [0]).expect_err("reset");
            assert_eq!(error.kind(), ErrorKind::ConnectionReset);
        }
    });
}

#[test]
fn captured_connections_are_named_by_address_when_nobody_can_say_whose_they_are() {
    in_namespace(|rig| {
        // The supervisor says nothing.
        let _silent = rig.who.lock().expect("lock");
        let mut tcp = TcpStream::connect("10.200.0.1:15001").expect("captured");
        assert_eq!(tcp.read(&mut [0]).expect_err("reset").kind(), ErrorKind::ConnectionReset);
    });
}

#[test]
fn a_captured_connection_without_a_name_is_reported() {
    let test =
        "gateway::captured_connections_are_named_by_address_when_nobody_can_say_whose_they_are";
    if let Some(log) = log_of(test) {
        assert!(log.contains("agent -> 10.200.0.1:15001"), "{log}");
    }
}

#[test]
fn no_name_exists() {
    in_namespace(|_rig| {
        // A question for exfil.example.com, type A.
        let mut query = b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00".to_vec();
        query.extend_from_slice(b"\x05exfil\x07example\x03com\x00\x00\x01\x00\x01");
        let udp = UdpSocket::bind("10.200.0.2:0").expect("socket");
        udp.set_read_timeout(Some(Duration::from_secs(10))).expect("timeout");
        udp.send_to(b"nonsense", DNS).expect("send");
        udp.send_to(&query, DNS).expect("send");
        let mut answer = [0; 512];
        let (length, _) = udp.recv_from(&mut answer).expect("answer");
        assert_eq!(answer[..2], query[..2]);
        assert_eq!(answer[3] & 0x0f, 3, "NXDOMAIN");
        assert_eq!(answer[12..length], query[12..]);
        let mut tcp = TcpStream::connect(DNS).expect("tcp");
        for _ in 0..2 {
            let length = u16::try_from(query.len()).expect("length");
            tcp.write_all(&[&length.to_be_bytes()[..], &query].concat()).expect("send");
            let mut framed = [0; 2];
            tcp.read_exact(&mut framed).expect("length");
            let mut answer = vec![0; u16::from_be_bytes(framed).into()];
            tcp.read_exact(&mut answer).expect("answer");
            assert_eq!(answer[3] & 0x0f, 3, "NXDOMAIN");
        }
    });
}

#[test]
fn inbound_ports_follow_the_fence() {
    in_namespace(|rig| {
        let inside = rig.listen_in_fence(7000);
        wait_until_refused("10.88.0.1:7000");
        rig.tell(&ToProxy::Inbound { ports: vec![3128, 7000] });
        std::thread::spawn(move || {
            for tcp in inside.incoming() {
                let mut tcp = tcp.expect("accept");
                let mut text = String::new();
                // To the end of the client's half, then the answer.
                if tcp.read_to_string(&mut text).is_ok() {
                    let _ = write!(tcp, "{} bytes", text.len());
                }
            }
        });
        wait_for("10.88.0.1:7000");
        let mut tcp = TcpStream::connect("10.88.0.1:7000").expect("inbound");
        tcp.write_all(&vec![b'a'; 300_000]).expect("send");
        tcp.shutdown(std::net::Shutdown::Write).expect("shutdown");
        let mut answer = String::new();
        tcp.read_to_string(&mut answer).expect("answer");
        assert_eq!(answer, "300000 bytes");
        wait_for("127.0.0.1:7000");
        wait_for("[::1]:7000");
        assert!(TcpStream::connect("10.88.0.1:3128").is_err(), "never the gateway's own");
        rig.tell(&ToProxy::Inbound { ports: vec![] });
        wait_until_refused("10.88.0.1:7000");
    });
}

#[test]
fn a_taken_port_is_tried_again() {
    in_namespace_with(Inbound::Ports(vec![7000, 7002]), |rig| {
        let inside = (rig.listen_in_fence(7000), rig.listen_in_fence(7002));
        let taken = TcpListener::bind("10.88.0.1:7000").expect("neighbour");
        rig.tell(&ToProxy::Inbound { ports: vec![7000, 7001, 7002] });
        // Tried in this order: the first was by the time that the last is open.
        wait_for("10.88.0.1:7002");
        drop(taken);
        wait_until_refused("10.88.0.1:7000");
        rig.tell(&ToProxy::Inbound { ports: vec![7000] });
        wait_for("10.88.0.1:7000");
        assert!(TcpStream::connect("10.88.0.1:7001").is_err(), "not among those declared");
        drop(inside);
    });
}

#[test]
fn stop_lets_open_connections_finish() {
    in_namespace(|mut rig| {
        let mut tcp = rig.tunnel("raw.test:80");
        rig.tell(&ToProxy::Stop { grace_ms: 20_000 });
        for _ in 0..500 {
            if TcpStream::connect("10.200.0.1:3128").is_err() {
                break;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        tcp.write_all(b"GET / HTTP/1.1\r\nHost: raw.test\r\nConnection: close\r\n\r\n")
            .expect("send");
        assert!(crate::rig::read_to_end(&mut tcp).starts_with("HTTP/1.1 200 "));
        drop(tcp);
        rig.ended();
    });
}

#[test]
fn the_listeners_outlive_a_flood() {
    in_namespace(|rig| {
        // More than the limit; those beyond are told so.
        let open: Vec<_> =
            (0..1030).map_while(|_| TcpStream::connect("10.200.0.1:3128").ok()).collect();
        let mut refused = 0;
        for mut tcp in open.iter().rev().take(4) {
            tcp.set_read_timeout(Some(Duration::from_secs(5))).expect("timeout");
            let mut start = [0; 12];
            if tcp.read_exact(&mut start).is_ok() && &start == b"HTTP/1.1 503" {
                refused += 1;
            }
        }
        assert!(refused > 0, "{} open", open.len());
        drop(open);
        for _ in 0..500 {
            if rig.exchange(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").starts_with("HTTP/1.1 400 ") {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("the proxy did not recover");
    });
}

#[test]
fn name_lookups_of_a_real_resolver_fail_at_once() {
    in_namespace(|_rig| {
        let Ok(output) = Command::new("dig")
            .args(["+time=5", "+tries=1", "-p", "15053", "@10.200.0.1", "example.com"])
            .output()
        else {
            println!("SKIPPED: needs dig");
            return;
        };
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(text.contains("status: NXDOMAIN"), "{text}");
    });
}

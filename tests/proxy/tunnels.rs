//! Endpoints that are allowed whole: whatever they speak passes, in the name that was judged.

use std::io::{Read, Write};

use crate::rig::{client, in_namespace, read_head, read_response, read_to_end};

#[test]
fn a_server_that_speaks_first_is_heard() {
    in_namespace(|rig| {
        let mut tcp = rig.tunnel("raw.test:2525");
        let mut banner = [0; 11];
        tcp.read_exact(&mut banner).expect("banner");
        assert_eq!(&banner, b"220 hello\r\n");
        tcp.write_all(b"EHLO agent\r\n").expect("send");
        assert_eq!(read_to_end(&mut tcp), "250 ok\r\n");
        assert_eq!(rig.upstream.requests(), ["SMTP EHLO agent"]);
        // A client that sends at once, in the same segment as CONNECT.
        let answer = rig.exchange(
            b"CONNECT raw.test:2525 HTTP/1.1\r\nHost: raw.test:2525\r\n\r\n\x01EHLO early\r\n",
        );
        assert!(answer.ends_with("220 hello\r\n250 ok\r\n"), "{answer}");
    });
}

#[test]
fn http_inside_tls_is_relayed_and_other_protocols_are_copied() {
    in_namespace(|rig| {
        let mut tls = rig.tls("raw.test:443", "raw.test", &["h2", "http/1.1"]);
        // Not canonical: nothing judges it, nothing changes it.
        tls.write_all(b"DELETE /a/../b;x HTTP/1.1\r\nHost: raw.test\r\n\r\n").expect("send");
        let (head, body) = read_response(&mut tls);
        assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
        assert!(body.starts_with("DELETE /a/../b;x HTTP/1.1\r\n"), "{body}");
        assert_eq!(tls.conn.alpn_protocol(), Some(&b"http/1.1"[..]));

        // The upstream chooses among what the client offers.
        let mut tls = rig.tls("raw.test:443", "raw.test", &["imap", "h2"]);
        let mut banner = [0; 11];
        tls.read_exact(&mut banner).expect("banner");
        assert_eq!(&banner, b"* OK imap\r\n");
    });
}

#[test]
fn websockets_pass_where_the_endpoint_is_allowed_whole() {
    in_namespace(|rig| {
        let mut tls = rig.tls("raw.test:443", "raw.test", &["http/1.1"]);
        tls.write_all(
            b"GET /ws HTTP/1.1\r\nHost: raw.test\r\nConnection: keep-alive, Upgrade\r\n\
              Upgrade: websocket\r\n\r\n",
        )
        .expect("send");
        let head = read_head(&mut tls);
        assert!(head.starts_with("HTTP/1.1 101 ") && head.contains("Upgrade: websocket"), "{head}");
        tls.write_all(b"ping").expect("send");
        let mut echo = [0; 4];
        tls.read_exact(&mut echo).expect("echo");
        assert_eq!(&echo, b"ping");
    });
}

#[test]
fn skipped_tls_is_end_to_end_and_still_named() {
    in_namespace(|rig| {
        let upstream_ca = rig.bundle_pem.clone();
        // The bundle's first certificate is the upstream's own authority.
        let connection = client(upstream_ca.as_bytes(), "skip.test", &["http/1.1"]);
        let mut tls = rustls::StreamOwned::new(connection, rig.tunnel("skip.test:443"));
        tls.write_all(b"GET / HTTP/1.1\r\nHost: skip.test\r\n\r\n").expect("send");
        assert!(read_head(&mut tls).starts_with("HTTP/1.1 200 "), "verified by the upstream's CA");
        let connection = client(upstream_ca.as_bytes(), "raw.test", &[]);
        let mut tls = rustls::StreamOwned::new(connection, rig.tunnel("skip.test:443"));
        let error = tls.write_all(b"x").and_then(|()| tls.flush()).expect_err("alert");
        assert!(error.to_string().contains("UnrecognisedName"), "{error}");
    });
}

#[test]
fn half_closed_connections_carry_the_other_half() {
    in_namespace(|rig| {
        let mut tcp = rig.tunnel("raw.test:2525");
        tcp.write_all(b"\x00bye\r\n").expect("send");
        tcp.shutdown(std::net::Shutdown::Write).expect("shutdown");
        assert_eq!(read_to_end(&mut tcp), "220 hello\r\n250 ok\r\n");
    });
}

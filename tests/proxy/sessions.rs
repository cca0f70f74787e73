//! TLS sessions are resumed on both sides, for the same name only.

use std::io::Write as _;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustls::pki_types::ServerName;
use rustls::{ClientConnection, HandshakeKind, StreamOwned};

use crate::rig::{client_config, in_namespace, read_response};

#[test]
fn a_second_connection_costs_no_second_handshake() {
    in_namespace(|rig| {
        let config = client_config(rig.ca_pem.as_bytes(), &["http/1.1"]);
        let kind = |host: &str| {
            let name = ServerName::try_from(host.to_owned()).expect("name");
            let client = ClientConnection::new(Arc::clone(&config), name).expect("client");
            let mut tls = StreamOwned::new(client, rig.tunnel(&format!("{host}:443")));
            write!(tls, "GET /ok/1 HTTP/1.1\r\nHost: {host}\r\n\r\n").expect("send");
            assert!(read_response(&mut tls).0.starts_with("HTTP/1.1 200 "));
            tls.conn.handshake_kind().expect("done")
        };
        let resumed = || rig.upstream.resumed.load(Ordering::Relaxed);
        assert_ne!(kind("api.test"), HandshakeKind::Resumed);
        assert_eq!(resumed(), 0);
        assert_eq!(kind("api.test"), HandshakeKind::Resumed);
        assert_eq!(resumed(), 1, "towards the upstream, too");
        // Another host has its own, with the same ticket key.
        assert_ne!(kind("raw.test"), HandshakeKind::Resumed);
        assert_eq!(resumed(), 1);
        assert_eq!(kind("raw.test"), HandshakeKind::Resumed);
        assert_eq!(resumed(), 2);
    });
}

#[test]
fn a_ticket_of_one_host_opens_no_other() {
    in_namespace(|rig| {
        // A client that keeps its sessions under the wrong name: what it got for api.test it offers
        // where raw.test is asked for.
        let config = client_config(rig.ca_pem.as_bytes(), &["http/1.1"]);
        let connect = |sni: &str, host: &str| {
            let name = ServerName::try_from(sni.to_owned()).expect("name");
            let client = ClientConnection::new(Arc::clone(&config), name).expect("client");
            StreamOwned::new(client, rig.tunnel(&format!("{host}:443")))
        };
        let mut tls = connect("api.test", "api.test");
        tls.write_all(b"GET /ok/1 HTTP/1.1\r\nHost: api.test\r\n\r\n").expect("send");
        assert!(read_response(&mut tls).0.starts_with("HTTP/1.1 200 "));
        let mut tls = connect("api.test", "raw.test");
        let error = tls.write_all(b"x").and_then(|()| tls.flush()).expect_err("alert");
        assert!(error.to_string().contains("UnrecognisedName"), "{error}");
    });
}

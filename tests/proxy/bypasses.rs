//! Ways past request rules that have worked elsewhere (format reference, 3.2), each tried here.

use std::io::Write;
use std::time::Duration;

use crate::rig::{Rig, in_namespace, read_head, read_response, read_to_end};

/// Sends raw bytes to the inspected HTTPS endpoint and returns all that comes back.
fn over_tls(rig: &Rig, bytes: &[u8]) -> String {
    let mut tls = rig.tls("api.test:443", "api.test", &["http/1.1"]);
    tls.write_all(bytes).expect("send");
    tls.flush().expect("flush");
    read_to_end(&mut tls)
}

#[test]
fn split_first_segments_decide_nothing() {
    in_namespace(|rig| {
        // TLS, one byte, then the rest.
        let mut client = rig.client("api.test", &["http/1.1"]);
        let mut hello = Vec::new();
        client.write_tls(&mut hello).expect("hello");
        for split in [1, 2, 4, 6, 60] {
            let mut client = rig.client("api.test", &["http/1.1"]);
            let mut hello = Vec::new();
            client.write_tls(&mut hello).expect("hello");
            let mut tcp = rig.tunnel("api.test:443");
            tcp.write_all(&hello[..split]).expect("send");
            std::thread::sleep(Duration::from_millis(150));
            tcp.write_all(&hello[split..]).expect("send");
            let mut tls = rustls::StreamOwned::new(client, tcp);
            tls.write_all(b"GET /secret HTTP/1.1\r\nHost: api.test\r\n\r\n").expect("send");
            let answer = read_to_end(&mut tls);
            assert!(answer.starts_with("HTTP/1.1 403 "), "{split}: {answer}");
        }
        // HTTP, within the method.
        let mut tcp = rig.tunnel("api.test:80");
        tcp.write_all(b"DE").expect("send");
        std::thread::sleep(Duration::from_millis(150));
        tcp.write_all(b"LETE / HTTP/1.1\r\nHost: api.test\r\n\r\n").expect("send");
        let answer = read_to_end(&mut tcp);
        assert!(answer.starts_with("HTTP/1.1 403 "), "{answer}");
        assert_eq!(rig.upstream.requests(), Vec::<String>::new());
    });
}

#[test]
fn a_hello_in_many_records_is_read_whole() {
    in_namespace(|rig| {
        let mut client = rig.client("api.test", &["http/1.1"]);
        let mut hello = Vec::new();
        client.write_tls(&mut hello).expect("hello");
        // The same handshake message, 40 bytes a record (RFC 8446, 5.1 allows it).
        let mut records = Vec::new();
        for part in hello[5..].chunks(40) {
            let length = u16::try_from(part.len()).expect("length").to_be_bytes();
            records.extend_from_slice(&[0x16, 3, 1, length[0], length[1]]);
            records.extend_from_slice(part);
        }
        let mut tcp = rig.tunnel("api.test:443");
        tcp.write_all(&records).expect("send");
        let mut tls = rustls::StreamOwned::new(client, tcp);
        tls.write_all(b"GET /ok/1 HTTP/1.1\r\nHost: api.test\r\n\r\n").expect("send");
        assert!(read_head(&mut tls).starts_with("HTTP/1.1 200 "));
    });
}

#[test]
fn what_is_not_http_does_not_pass_an_inspected_endpoint() {
    in_namespace(|rig| {
        let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
        let plain: [&[u8]; 3] = [b"\0\x01\x02", b"SSH-2.0-x\r\n", b"GET /\r\n"];
        for bytes in plain {
            let mut tcp = rig.tunnel("api.test:80");
            tcp.write_all(bytes).expect("send");
            let answer = read_to_end(&mut tcp);
            assert!(answer.contains("unsupported_l7_protocol"), "{bytes:?}: {answer}");
        }
        // A client that offers no version of HTTP.
        let mut tls = rig.tls("api.test:443", "api.test", &["imap"]);
        let error = tls.write_all(b"x").and_then(|()| tls.flush()).expect_err("alert");
        assert!(error.to_string().contains("NoApplicationProtocol"), "{error}");
        // h2c in the middle of a connection.
        let mut tls = rig.tls("api.test:443", "api.test", &[]);
        tls.write_all(b"GET /ok/1 HTTP/1.1\r\nHost: api.test\r\n\r\n").expect("send");
        assert!(read_response(&mut tls).0.starts_with("HTTP/1.1 200 "));
        tls.write_all(preface).expect("send");
        let answer = read_to_end(&mut tls);
        assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
        let upgrade = over_tls(
            &rig,
            b"GET /ok/1 HTTP/1.1\r\nHost: api.test\r\nConnection: Upgrade\r\nUpgrade: foo\r\n\r\n",
        );
        assert!(upgrade.starts_with("HTTP/1.1 403 "), "{upgrade}");
        assert_eq!(rig.upstream.requests().len(), 1);
    });
}

#[test]
fn ambiguous_requests_are_refused() {
    in_namespace(|rig| {
        let rows: [&str; 12] = [
            "POST /post HTTP/1.1\r\nHost: api.test\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            "POST /post HTTP/1.1\r\nHost: api.test\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
            "POST /post HTTP/1.1\r\nHost: api.test\r\nContent-Length: +5\r\n\r\nhello",
            "POST /post HTTP/1.1\r\nHost: api.test\r\nContent-Length : 5\r\n\r\nhello",
            "POST /post HTTP/1.1\r\nHost: api.test\r\nTransfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
            "POST /post HTTP/1.1\r\nHost: api.test\r\nTransfer-Encoding: chunked\r\n\r\n+5\r\nhello\r\n0\r\n\r\n",
            "GET /ok/1 HTTP/1.1\r\nHost: api.test\r\nX: a\r\n b\r\n\r\n",
            "GET /ok/1 HTTP/1.1\nHost: api.test\n\n",
            "GET /ok/1 HTTP/1.1\r\nHost: api.test\r\nHost: api.test\r\n\r\n",
            "GET /ok/1 HTTP/1.1\r\n\r\n",
            "GET https://api.test/ok/1 HTTP/1.1\r\nHost: api.test\r\n\r\n",
            "CONNECT raw.test:443 HTTP/1.1\r\nHost: raw.test\r\n\r\n",
        ];
        for row in rows {
            let answer = over_tls(&rig, row.as_bytes());
            assert!(answer.starts_with("HTTP/1.1 400 "), "{row:?}: {answer}");
        }
        let long =
            format!("GET /ok/1 HTTP/1.1\r\nHost: api.test\r\nX: {}\r\n\r\n", "a".repeat(17_000));
        let answer = over_tls(&rig, long.as_bytes());
        assert!(answer.starts_with("HTTP/1.1 431 "), "{answer}");
        // A body with a bad chunk has begun to be sent on, but is never finished.
        assert!(rig.upstream.requests().is_empty(), "{:?}", rig.upstream.requests());
    });
}

#[test]
fn paths_are_judged_and_sent_on_in_one_spelling() {
    in_namespace(|rig| {
        let answer = |target: &str| {
            let request =
                format!("GET {target} HTTP/1.1\r\nHost: api.test\r\nConnection: close\r\n\r\n");
            over_tls(&rig, request.as_bytes())
        };
        for target in ["/ok/../secret", "/ok/%2e%2e/secret", "/ok/x/..;a=b/../secret"] {
            let answer = answer(target);
            assert!(!answer.starts_with("HTTP/1.1 200 "), "{target}: {answer}");
        }
        for target in ["/ok/..;/secret", "/ok/%2fsecret", "/ok/..%2fsecret", "/../ok/a", "/ok/a#b"]
        {
            let answer = answer(target);
            let refused =
                answer.starts_with("HTTP/1.1 400 ") || answer.starts_with("HTTP/1.1 403 ");
            assert!(refused, "{target}: {answer}");
        }
        assert_eq!(rig.upstream.requests(), Vec::<String>::new());
        let sent = answer("/x/../ok//%61?q=%2F..");
        assert!(sent.contains("GET /ok/a?q=%2F.. HTTP/1.1\r\n"), "{sent}");
    });
}

#[test]
fn names_must_agree() {
    in_namespace(|rig| {
        // SNI.
        let mut tls = rig.tls("api.test:443", "raw.test", &[]);
        let error = tls.write_all(b"x").and_then(|()| tls.flush()).expect_err("alert");
        assert!(error.to_string().contains("UnrecognisedName"), "{error}");
        // Host, inside TLS, on an inspected and on a whole endpoint; another port.
        for (authority, sni) in [("api.test:443", "api.test"), ("raw.test:443", "raw.test")] {
            for host in ["other.test", "api.test:80", "raw.test:8443", "api.test@x", ""] {
                let mut tls = rig.tls(authority, sni, &["http/1.1"]);
                write!(tls, "GET /ok/1 HTTP/1.1\r\nHost: {host}\r\n\r\n").expect("send");
                let answer = read_to_end(&mut tls);
                assert!(answer.contains("request_authority_mismatch"), "{sni} {host:?}: {answer}");
            }
        }
        // Host in a plain tunnel of a whole endpoint, and in a plain request.
        let mut tcp = rig.tunnel("raw.test:80");
        tcp.write_all(b"GET / HTTP/1.1\r\nHost: other.test\r\n\r\n").expect("send");
        assert!(read_to_end(&mut tcp).contains("request_authority_mismatch"));
        // A request that some server takes for one, though it is not well formed.
        for odd in [
            &b"\r\nGET / HTTP/1.1\r\nHost: other.test\r\n\r\n"[..],
            b"GET /\xc3\xa9 HTTP/1.1\r\nHost: other.test\r\n\r\n",
            b"GET  / HTTP/1.1\r\nHost: other.test\r\n\r\n",
            b"GET\t/ HTTP/1.1\r\nHost: other.test\r\n\r\n",
            b"GET\x0b/\x0cHTTP/1.1\r\nHost: other.test\r\n\r\n",
            b"GET\r/\rHTTP/1.1\r\nHost: other.test\r\n\r\n",
            b" GET / HTTP/1.1\r\nHost: other.test\r\n\r\n",
            // Longer than what is read here, and not than what servers read.
            format!("{} / HTTP/1.1\r\nHost: other.test\r\n\r\n", "A".repeat(33)).as_bytes(),
            format!("{} / HTTP/1.1\r\nHost: other.test\r\n\r\n", "A".repeat(17_000)).as_bytes(),
            format!("{}GET / HTTP/1.1\r\nHost: other.test\r\n\r\n", "\r\n".repeat(9_000))
                .as_bytes(),
            format!("GET /{} HTTP/1.1\r\nHost: other.test\r\n\r\n", "a".repeat(17_000)).as_bytes(),
        ] {
            let mut tcp = rig.tunnel("raw.test:80");
            tcp.write_all(odd).expect("send");
            let answer = read_to_end(&mut tcp);
            assert!(
                answer.starts_with("HTTP/1.1 4") || answer.starts_with("HTTP/1.1 5"),
                "{answer}"
            );
        }
        let answer = rig.exchange(b"GET http://raw.test/ HTTP/1.1\r\nHost: other.test\r\n\r\n");
        assert!(answer.contains("request_authority_mismatch"), "{answer}");
        assert_eq!(rig.upstream.requests(), Vec::<String>::new());
        // The same name, written otherwise.
        let mut tls = rig.tls("API.test.:443", "api.TEST", &["http/1.1"]);
        tls.write_all(b"GET /ok/1 HTTP/1.1\r\nHost: Api.Test:443\r\n\r\n").expect("send");
        let (head, body) = read_response(&mut tls);
        assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
        assert!(body.contains("\r\nHost: api.test:443\r\n"), "{body}");
    });
}

#[test]
fn requests_sent_ahead_are_judged_one_by_one() {
    in_namespace(|rig| {
        let answer = rig.exchange(
            b"GET http://api.test/1 HTTP/1.1\r\nHost: api.test\r\n\r\n\
              DELETE http://api.test/2 HTTP/1.1\r\nHost: api.test\r\n\r\n\
              GET http://api.test/3 HTTP/1.1\r\nHost: api.test\r\n\r\n",
        );
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
        assert!(answer.contains("HTTP/1.1 403 "), "{answer}");
        let seen = rig.upstream.requests();
        assert_eq!(seen.len(), 1, "{seen:?}");
        assert!(seen[0].starts_with("GET /1 "), "{seen:?}");
        // Each may go to another host.
        let answer = rig.exchange(
            b"GET http://api.test/1 HTTP/1.1\r\nHost: api.test\r\n\r\n\
              GET http://raw.test/2 HTTP/1.1\r\nHost: raw.test\r\n\r\n\
              GET http://forbidden.test/3 HTTP/1.1\r\nHost: forbidden.test\r\n\r\n",
        );
        assert_eq!(answer.matches("HTTP/1.1 200 ").count(), 2, "{answer}");
        assert!(answer.contains("GET forbidden.test:80 not permitted by policy"), "{answer}");
        // A body is a body, whatever it looks like.
        let inner = "DELETE /x HTTP/1.1\r\nHost: api.test\r\n\r\n";
        let mut tls = rig.tls("api.test:443", "api.test", &[]);
        write!(
            tls,
            "POST /post HTTP/1.1\r\nHost: api.test\r\nContent-Length: {}\r\n\r\n{inner}",
            inner.len()
        )
        .expect("send");
        assert!(read_response(&mut tls).0.starts_with("HTTP/1.1 200 "));
        assert!(rig.upstream.requests().iter().all(|one| !one.starts_with("DELETE")));
    });
}

#[test]
fn hop_by_hop_fields_stay_on_their_hop() {
    in_namespace(|rig| {
        let answer = rig.exchange(
            b"GET http://raw.test/ HTTP/1.1\r\nHost: raw.test\r\nProxy-Authorization: Basic x\r\n\
              Proxy-Connection: close\r\nConnection: X-Secret, content-length\r\nX-Secret: 1\r\n\
              Keep-Alive: 5\r\nTE: trailers\r\nX-Kept: 2\r\n\r\n",
        );
        let sent = answer.split("\r\n\r\n").nth(1).expect("body").to_ascii_lowercase();
        for gone in ["proxy-", "x-secret", "keep-alive", "te:", "connection"] {
            assert!(!sent.contains(gone), "{gone}: {sent}");
        }
        assert!(sent.contains("x-kept: 2"), "{sent}");
    });
}

#[test]
fn a_method_that_a_header_changes_is_judged_too() {
    in_namespace(|rig| {
        let get = |more: &str| {
            let head =
                format!("GET /ok/1 HTTP/1.1\r\nHost: api.test\r\n{more}Connection: close\r\n");
            over_tls(&rig, format!("{head}\r\n").as_bytes())
        };
        for field in [
            "X-HTTP-Method-Override: DELETE\r\n",
            "x-http-method: delete\r\n",
            "X-Method-Override: GET\r\nX-Method-Override: DELETE\r\n",
        ] {
            let answer = get(field);
            assert!(answer.starts_with("HTTP/1.1 403 "), "{field}: {answer}");
            assert!(answer.contains("with the method DELETE that a header field"), "{answer}");
        }
        for field in ["X-Original-URL: /secret\r\n", "X-Rewrite-Url: /secret\r\n"] {
            let answer = get(field);
            assert!(answer.starts_with("HTTP/1.1 400 "), "{field}: {answer}");
            assert!(answer.contains("a header field names another target"), "{answer}");
        }
        assert_eq!(rig.upstream.requests(), Vec::<String>::new());
        assert!(get("X-HTTP-Method-Override: GET\r\n").starts_with("HTTP/1.1 200 "));
        // One that ends here says nothing to the upstream.
        let answer = over_tls(
            &rig,
            b"GET /ok/1 HTTP/1.1\r\nHost: api.test\r\nX-HTTP-Method-Override: DELETE\r\n\
              Connection: x-http-method-override, close\r\n\r\n",
        );
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
        assert!(!answer.contains("DELETE"), "{answer}");
        // Where nothing is inspected, nothing is judged.
        let answer = rig.exchange(
            b"GET http://raw.test/ HTTP/1.1\r\nHost: raw.test\r\nX-Original-URL: /y\r\n\
              X-HTTP-Method-Override: DELETE\r\nConnection: close\r\n\r\n",
        );
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    });
}

#[test]
fn an_upstream_of_http2_alone_is_told_apart() {
    in_namespace(|rig| {
        let mut tls = rig.tls("rpc.test:4433", "rpc.test", &["http/1.1"]);
        tls.write_all(b"GET /ok/1 HTTP/1.1\r\nHost: rpc.test:4433\r\n\r\n").expect("send");
        let answer = read_to_end(&mut tls);
        assert!(answer.starts_with("HTTP/1.1 502 "), "{answer}");
        assert!(
            answer.contains("the upstream does not speak HTTP/1.1, and this client"),
            "{answer}"
        );
    });
}

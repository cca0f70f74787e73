//! Bodies that are judged: GraphQL, JSON-RPC and MCP by curl, through the proxy, to an upstream.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

use bytes::Bytes;

use crate::curl::{curl, stdout};
use crate::h2_streams::{open, over_tls, read, request, with_rig};
use crate::rig::{Rig, in_namespace, log_of, read_head, read_response, read_to_end};

const JSON: &str = "Content-Type: application/json";

/// Status and body of a POST.
fn post(rig: &Rig, url: &str, args: &[&str]) -> (String, String) {
    let output = curl(rig, &[&["-w", "\n%{http_code}", "-H", JSON], args, &[url]].concat());
    let text = stdout(&output);
    let (body, status) = text.rsplit_once('\n').expect("status");
    (status.to_owned(), body.to_owned())
}

#[test]
fn graphql_operations_are_judged() {
    in_namespace(|rig| {
        let url = "https://api.test/graphql";
        let body = r#"{"query":"query Q { viewer { login } }"}"#;
        let (status, seen) = post(&rig, url, &["-d", body]);
        assert_eq!(status, "200", "{seen}");
        assert!(seen.starts_with("POST /graphql HTTP/1.1\r\n"), "{seen}");
        assert!(seen.contains(&format!("Content-Length: {}\r\n", body.len())), "{seen}");
        assert!(seen.ends_with(&format!("\r\n\r\n{body}")), "byte for byte: {seen}");

        let (status, refused) = post(&rig, url, &["-d", r#"{"query":"mutation { deleteAll }"}"#]);
        assert_eq!(status, "403", "{refused}");
        let refused: serde_json::Value = serde_json::from_str(&refused).expect("json");
        assert_eq!(refused["error"], "policy_denied");
        assert_eq!(refused["protocol"], "graphql");
        assert_eq!(refused["rule"], "POST /graphql");
        assert_eq!(refused["detail"], "no rule allows the mutation deleteAll");
        assert_eq!(refused["rule_missing"]["type"], "graphql_allow");
        assert_eq!(refused["rule_missing"]["operation"], "mutation deleteAll");
        let lines = refused["suggestion"].as_str().expect("lines");
        assert!(lines.contains("operation_type: mutation, fields: [\"deleteAll\"]"), "{lines}");

        let get = |query: &str| {
            let url = format!("{url}?query={query}");
            stdout(&curl(&rig, &["-o", "/dev/null", "-w", "%{http_code}", &url]))
        };
        assert_eq!(get("%7Bviewer%7Bid%7D%7D"), "200");
        assert_eq!(get("mutation%7BdeleteAll%7D"), "403");
        let (status, _) =
            post(&rig, &format!("{url}?query=mutation%7BdeleteAll%7D"), &["-d", body]);
        assert_eq!(status, "403", "the query string of a POST counts too");
        assert_eq!(rig.upstream.requests().len(), 2, "{:?}", rig.upstream.requests());
        let (status, _) = post(&rig, "https://api.test/post", &["-d", "mutation { x }"]);
        assert_eq!(status, "200", "other paths are not read");
    });
}

#[test]
fn bodies_reach_the_upstream_as_they_were_judged() {
    in_namespace(|rig| {
        let url = "https://api.test/graphql";
        let body = "{ \"query\" : \"{ viewer\\n{ id } }\" }\n";
        let chunked = ["-H", "Transfer-Encoding: chunked", "--data-binary", body];
        let (status, seen) = post(&rig, url, &chunked);
        assert_eq!(status, "200", "{seen}");
        assert!(!seen.contains("Transfer-Encoding"), "{seen}");
        assert!(seen.contains(&format!("Content-Length: {}\r\n", body.len())), "{seen}");
        assert!(seen.ends_with(body), "{seen}");

        let expect = ["-H", "Expect: 100-continue", "--expect100-timeout", "15", "-d", body];
        let started = std::time::Instant::now();
        let (status, seen) = post(&rig, url, &expect);
        assert_eq!(status, "200", "{seen}");
        assert!(started.elapsed().as_secs() < 15, "the client was asked for its body");
        assert!(!seen.contains("Expect"), "{seen}");
        assert!(seen.ends_with(body.trim_end()) || seen.ends_with(body), "{seen}");

        let padded = format!("{{\"query\":\"{{ viewer }} # {}\"}}", "x".repeat(50_000));
        let (status, seen) = post(&rig, url, &["-d", &padded]);
        assert_eq!(status, "200");
        assert!(seen.ends_with(&padded), "{} bytes", seen.len());
    });
}

#[test]
fn one_connection_goes_on_after_a_body_was_read() {
    in_namespace(|rig| {
        let mut tcp = rig.tunnel("api.test:80");
        let body = r#"{"query":"{ viewer }"}"#;
        for n in 0..3 {
            write!(
                tcp,
                "POST /graphql?n={n} HTTP/1.1\r\nHost: api.test\r\n{JSON}\r\nContent-Length: {}\r\n\r\n{body}",
                body.len()
            )
            .expect("send");
            let (head, echo) = read_response(&mut tcp);
            assert!(head.starts_with("HTTP/1.1 200 ") && echo.ends_with(body), "{head}{echo}");
        }
        // What comes behind a body is the next request, and judged as one.
        let next = r#"{"query":"mutation { deleteAll }"}"#;
        write!(
            tcp,
            "POST /graphql HTTP/1.1\r\nHost: api.test\r\n{JSON}\r\nContent-Length: {}\r\n\r\n{body}\
             POST /graphql HTTP/1.1\r\nHost: api.test\r\n{JSON}\r\nTransfer-Encoding: chunked\r\n\r\n\
             {:x}\r\n{next}\r\n0\r\n\r\n",
            body.len(),
            next.len()
        )
        .expect("send");
        let (head, _) = read_response(&mut tcp);
        assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
        let (head, refusal) = read_response(&mut tcp);
        assert!(head.starts_with("HTTP/1.1 403 "), "{head}");
        assert!(refusal.contains("deleteAll"), "{refusal}");
        assert_eq!(rig.upstream.requests().len(), 4);
    });
}

#[test]
fn what_cannot_be_read_is_refused() {
    in_namespace(|rig| {
        let url = "https://api.test/graphql";
        let long = format!("{{\"query\":\"{{ viewer }} # {}\"}}", "x".repeat(70_000));
        let (status, refused) = post(&rig, url, &["-d", &long]);
        assert_eq!(status, "413", "{refused}");
        assert!(refused.contains("content_too_large") && refused.contains("65536"), "{refused}");
        let chunked = ["-H", "Transfer-Encoding: chunked", "-d", &long];
        assert_eq!(post(&rig, url, &chunked).0, "413");
        let viewer = r#"{"query":"{ viewer }"}"#;
        let (status, refused) = post(&rig, url, &["-H", "Content-Encoding: gzip", "-d", viewer]);
        assert_eq!(status, "403");
        assert!(refused.contains("Content-Encoding"), "{refused}");
        let form = curl(&rig, &["-w", "%{http_code}", "-F", "operations={}", url]);
        assert!(stdout(&form).ends_with("403"), "several parts");
        let audited = "https://audited.test/graphql";
        assert_eq!(post(&rig, audited, &["-d", r#"{"query":"mutation { a }"}"#]).0, "200", "audit");
        assert_eq!(post(&rig, audited, &["-d", r#"{"query":"mutation { a"}"#]).0, "403");
        assert_eq!(post(&rig, audited, &["-d", &long]).0, "413", "audit lets nothing pass unread");
        assert_eq!(rig.upstream.requests().len(), 1);

        // A body that never comes whole reaches nobody.
        let mut tcp = rig.tunnel("api.test:80");
        write!(
            tcp,
            "POST /graphql HTTP/1.1\r\nHost: api.test\r\n{JSON}\r\nContent-Length: 99\r\n\r\n{viewer}"
        )
        .expect("send");
        tcp.shutdown(std::net::Shutdown::Write).expect("end");
        let head = read_head(&mut tcp);
        assert!(head.starts_with("HTTP/1.1 400 "), "{head}");
        assert_eq!(rig.upstream.requests().len(), 1);
    });
}

#[test]
fn json_rpc_and_mcp_calls_are_judged() {
    in_namespace(|rig| {
        let url = "https://api.test/mcp";
        let call = |tool: &str| {
            format!(
                r#"{{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{{"name":"{tool}","arguments":{{}}}}}}"#
            )
        };
        let (status, seen) = post(&rig, url, &["-d", &call("search")]);
        assert_eq!(status, "200", "{seen}");
        assert!(seen.ends_with(&call("search")), "{seen}");
        let (status, refused) = post(&rig, url, &["-d", &call("send_email")]);
        assert_eq!(status, "403");
        let refused: serde_json::Value = serde_json::from_str(&refused).expect("json");
        assert_eq!(refused["protocol"], "mcp");
        assert_eq!(refused["rule_missing"]["type"], "mcp_allow");
        assert_eq!(refused["rule_missing"]["operation"], "tools/call send_email");
        let lines = refused["suggestion"].as_str().expect("lines");
        assert!(lines.contains("tool: \"send_email\""), "{lines}");
        let batch = format!("[{},{}]", call("search"), call("send_email"));
        assert_eq!(post(&rig, url, &["-d", &batch]).0, "403", "all or nothing");
        let answer = r#"{"jsonrpc":"2.0","id":"s","result":{}}"#;
        assert_eq!(post(&rig, url, &["-d", answer]).0, "200", "an answer to the server");

        let code = |args: &[&str]| {
            stdout(&curl(
                &rig,
                &[&["-o", "/dev/null", "-w", "%{http_code}"], args, &[url]].concat(),
            ))
        };
        assert_eq!(code(&["-H", "Accept: text/event-stream"]), "200", "the stream of events");
        assert_eq!(code(&["-H", "Accept: text/html"]), "403");
        for kind in ["Content-Type: text/plain", "Content-Type:", JSON] {
            let args =
                ["-X", "GET", "-H", "Accept: text/event-stream", "-H", kind, "-d", &call("x")];
            assert_eq!(code(&args), "403", "a body behind a GET is not passed on: {kind}");
        }
        assert_eq!(code(&["-X", "DELETE", "-H", "Mcp-Session-Id: s"]), "200", "end of a session");
        assert_eq!(code(&["-X", "DELETE"]), "403");

        let rpc = |method: &str| format!(r#"{{"jsonrpc":"2.0","id":1,"method":"{method}"}}"#);
        let plain = "http://api.test/rpc";
        assert_eq!(post(&rig, plain, &["-d", &rpc("reports.list")]).0, "200", "without TLS too");
        let (status, refused) = post(&rig, plain, &["-d", &rpc("reports.delete")]);
        assert_eq!(status, "403");
        assert!(refused.contains("\"protocol\":\"json-rpc\""), "{refused}");
        assert_eq!(rig.upstream.requests().len(), 5);
    });
}

#[test]
fn streams_of_http2_are_judged_each_by_itself() {
    in_namespace(|rig| {
        let url = "https://rpc.test:4433/graphql";
        let viewer = r#"{"query":"{ viewer }"}"#;
        let (status, seen) = post(&rig, url, &["-d", viewer]);
        assert_eq!(status, "200", "{seen}");
        assert!(seen.starts_with("POST https://rpc.test:4433/graphql\n"), "{seen}");
        assert!(seen.ends_with(viewer), "byte for byte: {seen}");
        let long = format!("{{\"query\":\"{{ viewer }} # {}\"}}", "x".repeat(60_000));
        let (status, seen) = post(&rig, url, &["-H", "Expect: 100-continue", "-d", &long]);
        assert_eq!(status, "200");
        assert!(seen.ends_with(&long) && !seen.contains("expect"), "{} bytes", seen.len());
        let (status, refused) = post(&rig, url, &["-d", r#"{"query":"mutation { deleteAll }"}"#]);
        assert_eq!(status, "403");
        assert!(refused.contains("\"protocol\":\"graphql\""), "{refused}");
        let (status, _) = post(&rig, url, &["-d", &format!("{long}{long}")]);
        assert_eq!(status, "413");
        let asked = rig.upstream.requests();
        assert_eq!(asked.iter().filter(|one| one.contains("/graphql")).count(), 2, "{asked:?}");
    });
}

#[test]
fn streams_over_an_upstream_of_http1_are_judged_too() {
    with_rig(async |rig| {
        let send = over_tls(&rig, "api.test:443").await;
        let post = async |body: &'static str| {
            let mut head = request("POST", "https://api.test/graphql");
            let json = "application/json".parse().expect("value");
            head.headers_mut().insert("content-type", json);
            head.headers_mut().insert("expect", "100-continue".parse().expect("value"));
            let (answer, mut up) = open(&send, head, false).await;
            // In two parts, of no length that was told.
            let (one, other) = body.split_at(9);
            up.send_data(Bytes::from_static(one.as_bytes()), false).expect("sent");
            up.send_data(Bytes::from_static(other.as_bytes()), true).expect("sent");
            let (head, mut body) = answer.await.expect("response").into_parts();
            let (body, _) = read(&mut body).await.expect("body");
            (head.status.as_u16(), String::from_utf8(body).expect("utf-8"))
        };
        let viewer = r#"{"query":"{ viewer }"}"#;
        let (status, seen) = post(viewer).await;
        assert_eq!(status, 200, "{seen}");
        assert!(seen.contains("\r\nContent-Length: 22\r\n") && seen.ends_with(viewer), "{seen}");
        assert!(!seen.contains("expect") && !seen.contains("Transfer-Encoding"), "{seen}");
        let (status, refused) = post(r#"{"query":"mutation { deleteAll }"}"#).await;
        assert_eq!(status, 403, "{refused}");
        let (status, _) = post(r#"{"query":"{ viewer"}"#).await;
        assert_eq!(status, 403, "what cannot be read");
        let (status, _) = post(viewer).await;
        assert_eq!(status, 200, "the connection lives on");
        assert_eq!(rig.upstream.requests().len(), 2);
    });
}

#[test]
fn log_lines() {
    let Some(log) = log_of("content::graphql_operations_are_judged") else { return };
    let line = |words: &str| {
        log.lines()
            .find(|line| line.contains(words))
            .unwrap_or_else(|| panic!("{words:?} in {log}"))
    };
    let denied = line("DENIED POST https://api.test/graphql");
    assert!(denied.contains("HTTP:POST [MED]"), "{denied}");
    assert!(denied.contains("[graphql:\"mutation deleteAll\" policy:api engine:l7]"), "{denied}");
    assert!(denied.contains("no rule allows the mutation deleteAll"), "{denied}");
    assert!(log.contains("operation_type: mutation"), "the lines that would allow it: {log}");
}

/// A field that `Connection` names ends here: what it said is not what the upstream reads. Rack takes
/// a POST without a Content-Type for a form.
#[test]
fn fields_that_are_not_sent_on_count_for_nothing() {
    in_namespace(|rig| {
        let body = r#"{"query":"{ a }","variables":{"x":"&query=mutation{deleteAll}&"}}"#;
        let mut tls = rig.tls("api.test:443", "api.test", &["http/1.1"]);
        write!(
            tls,
            "POST /graphql HTTP/1.1\r\nHost: api.test\r\nContent-Type: application/json\r\n\
             Connection: content-TYPE\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )
        .expect("send");
        let (head, body) = read_response(&mut tls);
        assert!(head.starts_with("HTTP/1.1 403 "), "{head}{body}");
        assert!(body.contains("no Content-Type"), "{body}");
        assert_eq!(rig.upstream.requests(), Vec::<String>::new());
    });
}

/// The next connection, which must come although others were not answered.
fn accepted(server: &TcpListener, number: usize) -> TcpStream {
    server.set_nonblocking(true).expect("nonblocking");
    for _ in 0..1200 {
        if let Ok((tcp, _)) = server.accept() {
            tcp.set_nonblocking(false).expect("blocking");
            return tcp;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    panic!("request {number} waits for room that is not needed any more");
}

/// What is held is held until it is sent, not until it is answered.
#[test]
fn an_answer_that_does_not_come_keeps_no_room() {
    in_namespace(|rig| {
        let server = TcpListener::bind("10.77.0.1:9090").expect("server");
        let text = format!("{{\"query\":\"{{ a }} # {}\"}}", "x".repeat((8 << 20) - 100));
        let mut open = Vec::new();
        // Each takes half of all the room.
        for number in 0..4 {
            let mut tcp = rig.connect();
            write!(
                tcp,
                "POST http://slow.test:9090/graphql HTTP/1.1\r\nHost: slow.test:9090\r\n\
                 Content-Type: application/json\r\nContent-Length: {}\r\n\r\n",
                text.len()
            )
            .expect("send");
            let body = text.clone();
            let mut half = tcp.try_clone().expect("half");
            let sending = std::thread::spawn(move || half.write_all(body.as_bytes()));
            let mut upstream = accepted(&server, number);
            read_head(&mut upstream);
            std::io::copy(&mut (&upstream).take(text.len() as u64), &mut std::io::sink())
                .expect("body");
            sending.join().expect("thread").expect("sent");
            open.push((tcp, upstream));
        }
    });
}

/// Of an upstream that does not take it, only as long as others can wait.
#[test]
fn a_body_that_is_not_taken_is_given_up() {
    in_namespace(|rig| {
        let server = TcpListener::bind("10.77.0.1:9090").expect("server");
        socket2::SockRef::from(&server).set_recv_buffer_size(4096).expect("buffer");
        let text = format!("{{\"query\":\"{{ a }} # {}\"}}", "x".repeat((8 << 20) - 100));
        let mut tcp = rig.connect();
        tcp.set_read_timeout(Some(Duration::from_secs(120))).expect("timeout");
        write!(
            tcp,
            "POST http://slow.test:9090/graphql HTTP/1.1\r\nHost: slow.test:9090\r\n\
             Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{text}",
            text.len()
        )
        .expect("send");
        let upstream = server.accept().expect("accept");
        let answer = read_to_end(&mut tcp);
        assert!(answer.starts_with("HTTP/1.1 502 "), "{answer}");
        assert!(answer.contains("the upstream did not take the body within"), "{answer}");
        drop(upstream);
    });
}

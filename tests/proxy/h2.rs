//! HTTP/2 through the proxy: curl, and a client of the `h2` crate that says exactly what it wants.

use std::future::poll_fn;
use std::io::{Read as _, Write};
use std::net::TcpStream;
use std::process::{Command, Output};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use h2::client::{ResponseFuture, SendRequest};
use h2::{Reason, RecvStream, SendStream};
use http::{HeaderMap, Request, Response};
use ringfence::pki::provider;
use ringfence::proxy::control::ToProxy;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsConnector;

use crate::curl::{curl, stdout};
use crate::policy_dns::address;
use crate::rig::{Rig, capturing, in_namespace, log_of, read_head, read_response};

/// Runs `test` beside a rig.
pub fn with_rig<F: Future<Output = ()>>(test: impl FnOnce(Rig) -> F + Send + 'static) {
    in_namespace(|rig| run(test(rig)));
}

fn run(test: impl Future<Output = ()>) {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
    runtime.block_on(async {
        tokio::time::timeout(Duration::from_secs(120), test).await.expect("in time");
    });
}

async fn begin(io: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) -> SendRequest<Bytes> {
    let mut builder = h2::client::Builder::new();
    builder.initial_connection_window_size(8 << 20);
    let (send, connection) = builder.handshake(io).await.expect("handshake");
    tokio::spawn(async move {
        let _ = connection.await;
    });
    send
}

/// HTTP/2 in TLS in a tunnel; the client offers nothing else.
pub async fn over_tls(rig: &Rig, authority: &str) -> SendRequest<Bytes> {
    let tcp = rig.tunnel(authority);
    tcp.set_nonblocking(true).expect("nonblocking");
    let tcp = tokio::net::TcpStream::from_std(tcp).expect("tokio");
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(rig.ca_pem.as_bytes()).expect("pem")).expect("root");
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let name = authority.rsplit_once(':').expect("port").0.to_owned();
    let name = ServerName::try_from(name).expect("name");
    let tls = TlsConnector::from(Arc::new(config)).connect(name, tcp).await.expect("TLS");
    assert_eq!(tls.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
    begin(tls).await
}

/// HTTP/2 with prior knowledge in a tunnel.
async fn in_the_clear(rig: &Rig, authority: &str) -> SendRequest<Bytes> {
    with_prior_knowledge(rig.tunnel(authority)).await
}

async fn with_prior_knowledge(tcp: TcpStream) -> SendRequest<Bytes> {
    tcp.set_nonblocking(true).expect("nonblocking");
    begin(tokio::net::TcpStream::from_std(tcp).expect("tokio")).await
}

pub fn request(method: &str, uri: &str) -> Request<()> {
    Request::builder().method(method).uri(uri).body(()).expect("request")
}

pub async fn open(
    send: &SendRequest<Bytes>,
    request: Request<()>,
    end: bool,
) -> (ResponseFuture, SendStream<Bytes>) {
    let mut send = send.clone().ready().await.expect("ready");
    send.send_request(request, end).expect("request")
}

/// Reads to the end of a body.
pub async fn read(body: &mut RecvStream) -> Result<(Vec<u8>, Option<HeaderMap>), h2::Error> {
    let mut whole = Vec::new();
    while let Some(data) = body.data().await {
        let data = data?;
        body.flow_control().release_capacity(data.len()).expect("ours");
        whole.extend_from_slice(&data);
    }
    Ok((whole, body.trailers().await?))
}

/// One request without a body: the response, and its body as text.
pub async fn get(send: &SendRequest<Bytes>, request: Request<()>) -> (Response<()>, String) {
    let (answer, _) = open(send, request, true).await;
    let (head, mut body) = answer.await.expect("response").into_parts();
    let (body, _) = read(&mut body).await.expect("body");
    (Response::from_parts(head, ()), String::from_utf8(body).expect("utf-8"))
}

/// Why a response breaks off. The reset may overtake the part that was sent.
async fn broken(send: &SendRequest<Bytes>, request: Request<()>) -> Option<Reason> {
    let (answer, _) = open(send, request, true).await;
    match answer.await {
        Ok(response) => read(&mut response.into_body()).await.expect_err("broken").reason(),
        Err(error) => error.reason(),
    }
}

fn status(output: &Output) -> String {
    let text = stdout(output);
    text.rsplit('\n').next().unwrap_or_default().to_owned()
}

#[test]
fn curl_speaks_http2_where_the_upstream_does() {
    in_namespace(|rig| {
        let shown = ["-w", "\n%{http_version} %{http_code}"];
        let ask = |args: &[&str]| curl(&rig, &[&shown[..], args].concat());
        let allowed = ask(&["https://rpc.test:4433/ok/a?b=c"]);
        assert_eq!(status(&allowed), "2 200");
        assert!(stdout(&allowed).starts_with("GET https://rpc.test:4433/ok/a?b=c\n"));
        let upstream = rig.upstream.seen();
        assert_eq!(upstream[0], "H2 over TLS");

        let denied = ask(&["-i", "https://rpc.test:4433/secret"]);
        assert_eq!(status(&denied), "2 403");
        let text = stdout(&denied);
        let (_connected, text) = text.split_once("\r\n\r\n").expect("CONNECT");
        let (head, body) = text.split_once("\r\n\r\n").expect("two parts");
        assert!(head.contains("content-type: application/json"), "{head}");
        assert!(head.contains("x-openshell-policy: api"), "{head}");
        let body = body.rsplit_once('\n').expect("status").0;
        let body: serde_json::Value = serde_json::from_str(body).expect("json");
        assert_eq!(body["error"], "policy_denied");
        assert_eq!(body["rule"], "GET /secret");
        assert_eq!(body["layer"], "l7");
        assert!(body["suggestion"].as_str().is_some_and(|s| s.contains("/secret")), "{body}");
        assert!(!rig.upstream.seen().iter().any(|one| one.contains("secret")));

        // One way or the other around the names of paths.
        for (path, code) in
            [("/ok/../secret", "2 403"), ("/x/../ok//a", "2 200"), ("/ok/%zz", "2 400")]
        {
            let output = ask(&["--path-as-is", &format!("https://rpc.test:4433{path}")]);
            assert_eq!(status(&output), code, "{path}");
        }
        let post = ask(&["-d", "hello", "https://rpc.test:4433/echo.Echo/Unary"]);
        assert_eq!(status(&post), "2 200");
        assert!(stdout(&post).contains("content-length: 5\n") && stdout(&post).contains("hello"));
        let whole = ask(&["-X", "DELETE", "https://raw.test:4433/any/../thing"]);
        assert_eq!(status(&whole), "2 200");
        // An upstream that speaks only HTTP/1.1 is heard in HTTP/1.1.
        assert_eq!(status(&ask(&["https://api.test/ok/1"])), "1.1 200");
        assert_eq!(status(&ask(&["--http1.1", "https://api.test/ok/1"])), "1.1 200");
        // One that speaks only HTTP/2 has nothing to say to a client that does not.
        let unheard = ask(&["--http1.1", "https://rpc.test:4433/ok/1"]);
        assert_eq!(status(&unheard), "1.1 502");
        assert!(stdout(&unheard).contains("upstream_tls_failed"));
    });
}

#[test]
fn curl_with_prior_knowledge_in_the_clear() {
    in_namespace(|rig| {
        let tunnelled = ["-p", "--http2-prior-knowledge", "-w", "\n%{http_version} %{http_code}"];
        let ask = |args: &[&str]| status(&curl(&rig, &[&tunnelled[..], args].concat()));
        assert_eq!(ask(&["http://rpc.test:8081/ok/a"]), "2 200");
        assert_eq!(ask(&["http://rpc.test:8081/secret"]), "2 403");
        assert_eq!(ask(&["-H", "Host: other.test", "http://rpc.test:8081/ok/a"]), "2 403");
        assert_eq!(ask(&["http://raw.test:8081/any"]), "2 200");
        assert_eq!(ask(&["-H", "Host: other.test", "http://raw.test:8081/any"]), "2 403");
        // Nothing speaks HTTP/2 there.
        assert_eq!(ask(&["http://raw.test/any"]), "2 502");
        let seen = rig.upstream.requests();
        assert_eq!(seen.iter().filter(|one| one.contains("GET http://r")).count(), 2, "{seen:?}");
    });
}

#[test]
fn grpc_with_trailers_and_streams_both_ways() {
    with_rig(async |rig| {
        let send = over_tls(&rig, "rpc.test:4433").await;
        let call = |name: &str| {
            let mut call = request("POST", &format!("https://rpc.test:4433/echo.Echo/{name}"));
            for (name, value) in
                [("te", "trailers"), ("content-type", "application/grpc"), ("x-meta", "1")]
            {
                call.headers_mut().insert(name, value.parse().expect("value"));
            }
            call
        };
        // Unary.
        let (answer, mut up) = open(&send, call("Unary"), false).await;
        up.send_data(Bytes::from_static(b"\0\0\0\0\x05hello"), false).expect("data");
        let mut trailers = HeaderMap::new();
        trailers.insert("x-checksum", "1".parse().expect("value"));
        trailers.insert("host", "other.test".parse().expect("value"));
        up.send_trailers(trailers).expect("trailers");
        let (_, mut body) = answer.await.expect("response").into_parts();
        let (body, trailers) = read(&mut body).await.expect("body");
        let body = String::from_utf8_lossy(&body);
        assert!(body.contains("te: trailers\n") && body.contains("x-meta: 1\n"), "{body}");
        assert!(body.ends_with("\0\0\0\0\x05hello"), "{body:?}");
        let trailers = trailers.expect("trailers");
        assert_eq!(trailers["grpc-status"], "0");
        assert_eq!(trailers["x-request-trailers"], "x-checksum", "no routing by trailers");

        // Both ways at the same time, while others come and go.
        let (answer, mut up) = open(&send, call("Stream"), false).await;
        let (_, mut body) = answer.await.expect("before anything was sent").into_parts();
        for n in 0..50 {
            let message = format!("message {n}");
            up.send_data(message.clone().into(), false).expect("data");
            let echo = body.data().await.expect("echo").expect("data");
            body.flow_control().release_capacity(echo.len()).expect("ours");
            assert_eq!(echo, message);
            if n % 10 == 0 {
                let (denied, text) = get(&send, request("GET", "https://rpc.test:4433/no")).await;
                assert_eq!(denied.status(), 403);
                assert!(text.contains("policy_denied"), "{text}");
            }
        }
        up.send_data(Bytes::new(), true).expect("end");
        assert!(body.data().await.is_none());
        let trailers = body.trailers().await.expect("trailers").expect("some");
        assert_eq!(trailers["grpc-status"], "0");

        // Answered before the request was whole: only trailers, as gRPC calls it.
        let (answer, up) = open(&send, call("Early"), false).await;
        let response = answer.await.expect("response");
        assert_eq!(response.headers()["grpc-status"], "7");
        assert!(response.body().is_end_stream());
        drop(up);
        assert_eq!(rig.upstream.seen().iter().filter(|one| *one == "H2 over TLS").count(), 1);
    });
}

#[test]
fn every_stream_is_for_the_judged_authority() {
    with_rig(async |rig| {
        for (send, own, template) in [
            (over_tls(&rig, "rpc.test:4433").await, "rpc.test", "https://{}:4433/ok/a"),
            (in_the_clear(&rig, "rpc.test:8081").await, "rpc.test", "http://{}:8081/ok/a"),
            (over_tls(&rig, "raw.test:4433").await, "raw.test", "https://{}:4433/ok/a"),
            (in_the_clear(&rig, "raw.test:8081").await, "raw.test", "http://{}:8081/ok/a"),
        ] {
            for host in ["rpc.test", "raw.test", "other.test", "10.77.0.1", "rpc.test.evil.test"] {
                let asked = request("GET", &template.replace("{}", host));
                let (response, text) = get(&send, asked).await;
                assert_eq!(response.status() == 200, host == own, "{host} at {own}: {text}");
                assert_eq!(text.contains("request_authority_mismatch"), host != own, "{text}");
            }
        }
        let send = over_tls(&rig, "rpc.test:4433").await;
        let status = async |request| get(&send, request).await.0.status().as_u16();
        assert_eq!(status(request("GET", "https://rpc.test/ok/a")).await, 200, "no port");
        assert_eq!(status(request("GET", "https://rpc.test:443/ok/a")).await, 403);
        assert_eq!(status(request("GET", "https://u@rpc.test:4433/ok/a")).await, 403);
        assert_eq!(status(request("GET", "http://rpc.test:4433/ok/a")).await, 400, "scheme");
        for (host, expected) in
            [("rpc.test:4433", 200), ("RPC.test", 200), ("raw.test", 403), ("", 403)]
        {
            let mut beside = request("GET", "https://rpc.test:4433/ok/b");
            beside.headers_mut().insert("host", host.parse().expect("value"));
            assert_eq!(status(beside).await, expected, "{host}");
        }
        let seen = rig.upstream.requests().join("");
        assert!(!seen.contains("host:") && !seen.contains("other") && !seen.contains("evil"));
    });
}

#[test]
fn connections_that_ignore_the_proxy() {
    capturing(8081, |rig| {
        run(async move {
            // The address that DNS gave out for the name.
            let send = with_prior_knowledge(rig.direct((address("rpc.test."), 8081))).await;
            let (allowed, _) = get(&send, request("GET", "http://rpc.test:8081/ok/a")).await;
            assert_eq!(allowed.status(), 200);
            let (denied, _) = get(&send, request("GET", "http://rpc.test:8081/no")).await;
            assert_eq!(denied.status(), 403);
            let (fronted, text) = get(&send, request("GET", "http://raw.test:8081/ok/a")).await;
            assert_eq!(fronted.status(), 403);
            assert!(text.contains("request_authority_mismatch"), "{text}");
            // Any other address stands for itself, whatever the streams would name.
            let mut tcp = rig.direct(([203, 0, 113, 9], 8081));
            let sent = tcp.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
            let ended = sent.and_then(|()| tcp.read(&mut [0]).map(drop));
            assert!(ended.is_err(), "reset");
        });
    });
}

#[test]
fn a_client_of_http2_only_reaches_an_upstream_of_http1_only() {
    with_rig(async |rig| {
        let send = over_tls(&rig, "api.test:443").await;
        let mut asked = request("GET", "https://api.test/ok/./a?b");
        for (name, value) in [("cookie", "a=1"), ("x", "y"), ("cookie", "b=2")] {
            asked.headers_mut().append(name, value.parse().expect("value"));
        }
        let (response, text) = get(&send, asked).await;
        assert_eq!(response.status(), 200);
        assert_eq!(
            text,
            "GET /ok/a?b HTTP/1.1\r\nHost: api.test\r\nx: y\r\ncookie: a=1; b=2\r\n\r\n"
        );
        assert_eq!(get(&send, request("GET", "https://api.test/secret")).await.0.status(), 403);

        // Bodies: with a length, and without.
        for length in [Some("5"), None] {
            let mut post = request("POST", "https://api.test/post");
            if let Some(length) = length {
                post.headers_mut().insert("content-length", length.parse().expect("value"));
            }
            let (answer, mut up) = open(&send, post, false).await;
            up.send_data(Bytes::from_static(b"he"), false).expect("data");
            up.send_data(Bytes::from_static(b"llo"), true).expect("data");
            let (_, mut body) = answer.await.expect("response").into_parts();
            let body = read(&mut body).await.expect("body").0;
            let body = String::from_utf8_lossy(&body);
            assert!(body.ends_with("\r\n\r\nhello"), "{body}");
            assert_eq!(body.contains("Transfer-Encoding: chunked\r\n"), length.is_none());
        }
        let (empty, text) = get(&send, request("POST", "https://api.test/post")).await;
        assert!(empty.status() == 200 && text.contains("Content-Length: 0\r\n"), "{text}");

        let text = async |path: &str| {
            get(&send, request("GET", &format!("https://api.test/ok/{path}"))).await.1
        };
        assert_eq!(text("sse").await, "data: 0\n\ndata: 1\n\ndata: 2\n\n");
        assert_eq!(text("close").await, "until the end");
        assert_eq!(text("nothing").await, "");
        assert_eq!(text("big").await.len(), 8 * 1024 * 1024);
        let (head, body) = get(&send, request("HEAD", "https://api.test/ok/x")).await;
        assert!(head.headers().contains_key("content-length") && body.is_empty());
        assert_eq!(get(&send, request("GET", "https://api.test/ok/both")).await.0.status(), 502);
        let cut = broken(&send, request("GET", "https://api.test/ok/cut")).await;
        assert_eq!(cut, Some(Reason::INTERNAL_ERROR), "half a body");
        let audited = over_tls(&rig, "audited.test:443").await;
        let (passed, text) = get(&audited, request("DELETE", "https://audited.test/x")).await;
        assert!(passed.status() == 200 && text.starts_with("DELETE /x HTTP/1.1"), "{text}");
        // Several at a time, on connections of their own.
        let mut all = tokio::task::JoinSet::new();
        for _ in 0..20 {
            let send = send.clone();
            all.spawn(async move { get(&send, request("GET", "https://api.test/ok/sse")).await.1 });
        }
        while let Some(text) = all.join_next().await {
            assert_eq!(text.expect("task"), "data: 0\n\ndata: 1\n\ndata: 2\n\n");
        }
    });
}

#[test]
fn events_are_those_of_http1() {
    let Some(log) = log_of("h2_streams::every_stream_is_for_the_judged_authority") else { return };
    let fronted = "HTTP:GET [MED] DENIED /usr/bin/curl(42) -> rpc.test:4433 [engine:http] \
                   [reason:Host is not the authority that was judged]";
    assert!(log.contains(fronted), "{log}");
    let Some(log) = log_of("h2_streams::curl_with_prior_knowledge_in_the_clear") else { return };
    let denied = "HTTP:GET [MED] DENIED GET http://rpc.test:8081/secret [policy:api engine:l7] \
                  [reason:no rule allows this request] [to allow: ";
    assert!(log.contains(denied), "{log}");
    let name = "h2_streams::a_client_of_http2_only_reaches_an_upstream_of_http1_only";
    let Some(log) = log_of(name) else { return };
    let audited = "HTTP:DELETE [MED] ALLOWED DELETE https://audited.test/x [policy:api engine:l7] \
                   [reason:audit: ";
    assert!(log.contains(audited), "{log}");
}

/// An upstream that cannot be reached: streams that waited for one attempt are told together.
#[test]
fn one_attempt_to_dial_is_for_all_that_waited() {
    with_rig(async |rig| {
        // The certificate is another's: TLS fails, each time.
        let send = over_tls(&rig, "expired.test:4434").await;
        let mut all = tokio::task::JoinSet::new();
        for _ in 0..50 {
            let send = send.clone();
            all.spawn(
                async move { get(&send, request("GET", "https://expired.test:4434/")).await },
            );
        }
        while let Some(answer) = all.join_next().await {
            let (response, text) = answer.expect("task");
            assert_eq!(response.status(), 502);
            assert!(text.contains("upstream_tls_failed"), "{text}");
        }
    });
}

#[test]
fn resets_and_interim_responses_pass() {
    with_rig(async |rig| {
        let send = over_tls(&rig, "rpc.test:4433").await;
        let post = |name: &str| request("POST", &format!("https://rpc.test:4433/echo.Echo/{name}"));
        let (answer, _) = open(&send, post("Reset"), true).await;
        let error = answer.await.expect_err("reset");
        assert_eq!(error.reason(), Some(Reason::INADEQUATE_SECURITY));
        assert_eq!(broken(&send, post("Half")).await, Some(Reason::HTTP_1_1_REQUIRED));

        let (answer, mut up) =
            open(&send, request("GET", "https://rpc.test:4433/ok/hang"), true).await;
        wait_for(&rig, "GET https://rpc.test:4433/ok/hang\n").await;
        up.send_reset(Reason::ENHANCE_YOUR_CALM);
        drop(answer);
        wait_for(&rig, "RESET ENHANCE_YOUR_CALM").await;

        let (mut answer, _) =
            open(&send, request("GET", "https://rpc.test:4433/ok/interim"), true).await;
        let interim = poll_fn(|cx| answer.poll_informational(cx)).await;
        let interim = interim.expect("one").expect("response");
        assert_eq!(interim.status(), 103);
        assert_eq!(interim.headers()["link"], "</x>");
        let mut body = answer.await.expect("final").into_body();
        assert_eq!(read(&mut body).await.expect("body").0, b"final");
        let (_, text) = get(&send, request("GET", "https://rpc.test:4433/ok/events")).await;
        assert_eq!(text, "data: 0\n\ndata: 1\n\ndata: 2\n\n");
    });
}

/// Until the upstreams have seen this.
async fn wait_for(rig: &Rig, what: &str) {
    while !rig.upstream.seen().iter().any(|one| one.starts_with(what)) {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[test]
fn an_upstream_that_leaves_is_dialled_again() {
    with_rig(async |rig| {
        let send = over_tls(&rig, "rpc.test:4433").await;
        for _ in 0..3 {
            let (left, _) = get(&send, request("GET", "https://rpc.test:4433/ok/leave")).await;
            assert_eq!(left.status(), 200);
            let (answer, mut up) =
                open(&send, request("POST", "https://rpc.test:4433/echo.Echo/Unary"), false).await;
            up.send_data(Bytes::from_static(b"body"), true).expect("data");
            match answer.await {
                Ok(response) => assert_eq!(response.status(), 200),
                // It left while the request was on its way: told so that it can be sent again.
                Err(error) => assert_eq!(error.reason(), Some(Reason::REFUSED_STREAM)),
            }
            let (again, _) = get(&send, request("GET", "https://rpc.test:4433/ok/a")).await;
            assert_eq!(again.status(), 200);
        }
        let dialled = rig.upstream.seen().iter().filter(|one| *one == "H2 over TLS").count();
        assert!(dialled > 1, "{dialled}");
    });
}

#[test]
fn windows_bound_what_waits() {
    with_rig(async |rig| {
        let send = over_tls(&rig, "rpc.test:4433").await;
        let (answer, _) = open(&send, request("GET", "https://rpc.test:4433/ok/big"), true).await;
        let mut body = answer.await.expect("response").into_body();
        wait_for(&rig, "SENT 1").await;
        tokio::time::sleep(Duration::from_millis(300)).await;
        let sent = rig.upstream.seen().iter().filter(|one| one.starts_with("SENT")).count();
        assert!(sent < 8, "{sent} MiB of a response that nobody reads were taken");
        // Others are not held up.
        let (other, _) = get(&send, request("GET", "https://rpc.test:4433/ok/a")).await;
        assert_eq!(other.status(), 200);
        assert_eq!(read(&mut body).await.expect("body").0.len(), 16 << 20);

        // The other way: the upstream answers only when it has read all.
        let (answer, mut up) =
            open(&send, request("POST", "https://rpc.test:4433/echo.Echo/Unary"), false).await;
        for _ in 0..64 {
            let mut data = Bytes::from(vec![b'y'; 64 << 10]);
            while !data.is_empty() {
                up.reserve_capacity(data.len());
                if up.capacity() == 0 {
                    poll_fn(|cx| up.poll_capacity(cx)).await.expect("open").expect("room");
                }
                let room = up.capacity().min(data.len());
                up.send_data(data.split_to(room), false).expect("data");
            }
        }
        up.send_data(Bytes::new(), true).expect("end");
        let mut body = answer.await.expect("response").into_body();
        assert!(read(&mut body).await.expect("body").0.len() > 4 << 20);
    });
}

#[test]
fn a_proxy_that_stops_lets_streams_end() {
    with_rig(async |mut rig| {
        let send = over_tls(&rig, "rpc.test:4433").await;
        let (answer, mut up) =
            open(&send, request("POST", "https://rpc.test:4433/echo.Echo/Stream"), false).await;
        let mut body = answer.await.expect("response").into_body();
        rig.tell(&ToProxy::Stop { grace_ms: 20_000 });
        // GOAWAY: nothing new begins.
        while send.clone().ready().await.is_ok() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        up.send_data(Bytes::from_static(b"last words"), true).expect("data");
        assert_eq!(read(&mut body).await.expect("body").0, b"last words");
        drop((send, up, body));
        tokio::task::spawn_blocking(move || rig.ended()).await.expect("ended");
    });
}

#[test]
fn a_change_to_h2c_is_left_out_everywhere() {
    in_namespace(|rig| {
        for (authority, path) in [("api.test:80", "/any"), ("raw.test:80", "/any")] {
            for upgrade in ["h2c", "H2C", "websocket, h2c"] {
                let host = authority.split(':').next().expect("host");
                let mut tcp = rig.tunnel(authority);
                write!(
                    tcp,
                    "GET {path} HTTP/1.1\r\nHost: {host}\r\n\
                     Connection: Upgrade, HTTP2-Settings\r\nUpgrade: {upgrade}\r\n\
                     HTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n"
                )
                .expect("send");
                if host == "api.test" && upgrade.contains(',') {
                    assert!(read_head(&mut tcp).starts_with("HTTP/1.1 403 "), "{upgrade}");
                    continue;
                }
                let (_, body) = read_response(&mut tcp);
                assert!(body.starts_with("GET /any HTTP/1.1"), "{body}");
                let body = body.to_lowercase();
                assert!(!body.contains("upgrade") && !body.contains("settings"), "{body}");
            }
        }
    });
}

/// A client of gRPC's own library: `argv[1]` holds the authorities it trusts.
const GRPC: &str = r#"
import grpc, sys

roots = open(sys.argv[1], "rb").read()
secure = grpc.secure_channel("rpc.test:4433", grpc.ssl_channel_credentials(roots))
plain = grpc.insecure_channel("rpc.test:8081")
for channel in secure, plain:
    unary = channel.unary_unary("/echo.Echo/Stream")
    stream = channel.stream_stream("/echo.Echo/Stream")
    assert unary(b"hello", timeout=20, metadata=[("x-meta", "1")]) == b"hello"
    large = b"x" * (3 << 20)
    assert unary(large, timeout=20) == large
    messages = [b"%d" % n for n in range(500)]
    assert list(stream(iter(messages), timeout=20)) == messages
    call = stream(iter(messages), timeout=20)
    assert next(call) == b"0"
    call.cancel()
    futures = [unary.future(b"%d" % n, timeout=20) for n in range(300)]
    assert [f.result() for f in futures] == [b"%d" % n for n in range(300)]
    for path, code in [
        ("/other.Service/Method", grpc.StatusCode.PERMISSION_DENIED),
        ("/echo.Echo/Early", grpc.StatusCode.PERMISSION_DENIED),
        ("/echo.Echo/Reset", grpc.StatusCode.PERMISSION_DENIED),
    ]:
        try:
            channel.unary_unary(path)(b"x", timeout=20)
            raise SystemExit("passed: " + path)
        except grpc.RpcError as error:
            assert error.code() == code, (path, error)
    assert unary(b"after", timeout=20) == b"after"
print("done")
"#;

#[test]
fn the_client_of_grpcs_own_library() {
    let python = std::env::var("RINGFENCE_GRPC_PYTHON").unwrap_or("python3".to_owned());
    let has = Command::new(&python).args(["-c", "import grpc"]).output();
    if !has.is_ok_and(|output| output.status.success()) {
        println!("SKIPPED: {python} has no grpcio (RINGFENCE_GRPC_PYTHON names one that has)");
        return;
    }
    in_namespace(move |rig| {
        let output = Command::new(&python)
            .args(["-c", GRPC, &rig.bundle()])
            .env_clear()
            .env("http_proxy", "http://10.200.0.1:3128")
            .output()
            .expect("python");
        println!("{}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(stdout(&output), "done\n");
        let seen = rig.upstream.requests();
        assert!(seen.iter().all(|one| !one.contains("/other.Service/")), "{seen:?}");
    });
}

#[test]
fn a_method_that_a_header_changes_is_judged_too() {
    with_rig(async |rig| {
        let send = over_tls(&rig, "rpc.test:4433").await;
        for (name, value, status) in [
            ("x-http-method-override", "DELETE", 403),
            ("x-original-url", "/secret", 400),
            ("x-http-method-override", "get", 200),
        ] {
            let mut head = request("GET", "https://rpc.test:4433/ok/1");
            head.headers_mut().insert(name, value.parse().expect("value"));
            let (answer, _) = open(&send, head, true).await;
            let response = answer.await.expect("response");
            assert_eq!(response.status().as_u16(), status, "{name}: {value}");
        }
    });
}

//! The server over real TLS on loopback, with a stand-in for the handler.

use axum::body::Bytes;
use axum::http::StatusCode;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio_rustls::TlsConnector;

use super::*;
use crate::pki::Authority;
use crate::pki::rotation::{CA_LIFE, LEAF_LIFE, Serving};

/// Says how long the body was; for the body `wait` it waits for `release`, and `another` is a question
/// for another replica.
struct Echo {
    release: Arc<Semaphore>,
}

impl Admit for Echo {
    async fn admit(&self, hook: Hook, body: Bytes, _: Deadline) -> Answer {
        if body.as_ref() == b"wait" {
            let _permit = self.release.acquire().await;
        }
        let mut text = body.len().to_string();
        if hook == Hook::Validate {
            text.push_str(" validated");
        }
        let ask_another = body.as_ref() == b"another";
        Answer { status: StatusCode::OK, body: text.into_bytes(), ask_another }
    }
}

struct Rig {
    address: SocketAddr,
    connector: TlsConnector,
    shutdown: Shutdown,
    release: Arc<Semaphore>,
    task: tokio::task::JoinHandle<std::io::Result<()>>,
    metrics: Arc<Metrics>,
}

async fn rig(limits: Limits) -> Rig {
    let authority = Authority::ephemeral("test CA", CA_LIFE).expect("an authority");
    let mut roots = rustls::RootCertStore::empty();
    roots.add(authority.certificate_der().clone()).expect("a root");
    let serving = Serving::new(authority, "hook", "release", LEAF_LIFE).expect("a leaf");
    let client = rustls::ClientConfig::builder_with_provider(crate::pki::provider())
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(roots)
        .with_no_client_auth();
    let shutdown = Shutdown::default();
    let (metrics, release) = (Arc::new(Metrics::default()), Arc::new(Semaphore::new(0)));
    let ready = ready_unless_ending(shutdown.clone(), || Ok(()));
    let echo = Echo { release: Arc::clone(&release) };
    let app = router(echo, limits.clone(), Arc::clone(&metrics), ready);
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    let tls = Arc::new(tls_config(Arc::new(serving), None).expect("a configuration"));
    let task = tokio::spawn(serve(listener, Some(tls), app, limits, shutdown.clone()));
    Rig {
        address,
        connector: TlsConnector::from(Arc::new(client)),
        shutdown,
        release,
        task,
        metrics,
    }
}

type Stream = tokio_rustls::client::TlsStream<TcpStream>;

impl Rig {
    async fn connect(&self) -> Stream {
        let stream = TcpStream::connect(self.address).await.expect("connects");
        let name = ServerName::try_from("hook.release.svc").expect("a name");
        self.connector.connect(name, stream).await.expect("a handshake")
    }

    async fn post(&self, content_type: &str, body: &[u8]) -> (u16, String) {
        let mut stream = self.connect().await;
        send(&mut stream, "/mutate", content_type, body).await;
        receive(&mut stream).await
    }
}

async fn send(stream: &mut Stream, path: &str, content_type: &str, body: &[u8]) {
    let head = format!(
        "POST {path}?timeout=5s HTTP/1.1\r\nhost: h\r\ncontent-type: {content_type}\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await.expect("writes");
    // The server may answer and close before it has read all of a body that is too large.
    let _ = stream.write_all(body).await;
}

/// Status and everything after it, of one answer.
async fn receive(stream: &mut Stream) -> (u16, String) {
    let mut text = Vec::new();
    loop {
        let mut chunk = [0; 4096];
        let n = stream.read(&mut chunk).await.unwrap_or(0);
        text.extend_from_slice(&chunk[..n]);
        let so_far = String::from_utf8_lossy(&text).into_owned();
        let whole = so_far.split_once("\r\n\r\n").is_some_and(|(head, body)| {
            let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
            length.is_some_and(|length| length.parse() == Ok(body.len()))
        });
        if n == 0 || whole {
            let status = so_far.get(9..12).and_then(|s| s.parse().ok()).unwrap_or(0);
            return (status, so_far);
        }
    }
}

#[tokio::test]
async fn a_review_is_answered_and_the_connection_kept() {
    let rig = rig(Limits::default()).await;
    let mut stream = rig.connect().await;
    for _ in 0..3 {
        send(&mut stream, "/mutate", "application/json", b"{}").await;
        let (status, text) = receive(&mut stream).await;
        assert_eq!(status, 200, "{text}");
        assert!(text.ends_with("\r\n\r\n2") && !text.contains("connection: close"), "{text}");
    }
    // What another replica may answer differently ends the connection, so that it can be asked.
    let mut other = rig.connect().await;
    send(&mut other, "/validate", "application/json", b"another").await;
    let (status, text) = receive(&mut other).await;
    assert!(status == 200 && text.contains("connection: close"), "{text}");
    // The path says which question it is; nothing in a review does.
    send(&mut stream, "/validate", "application/json", b"{}").await;
    let (status, text) = receive(&mut stream).await;
    assert!(status == 200 && text.ends_with("\r\n\r\n2 validated"), "{text}");
}

#[tokio::test]
async fn what_is_not_json_or_too_large_is_refused_and_counted() {
    let rig = rig(Limits { body: 1000, ..Limits::default() }).await;
    assert_eq!(rig.post("text/plain", b"{}").await.0, 415);
    assert_eq!(rig.post("application/json", &[b' '; 1001]).await.0, 413);
    assert_eq!(rig.post("application/json", &[b' '; 1000]).await.0, 200);
    let text = rig.metrics.render(true);
    assert!(text.contains("rejected_total{reason=\"too-large\"} 1"), "{text}");
    assert!(text.contains("rejected_total{reason=\"content-type\"} 1"), "{text}");
}

#[tokio::test]
async fn a_chunked_body_is_held_to_the_same_limit() {
    let rig = rig(Limits { body: 1000, ..Limits::default() }).await;
    let mut stream = rig.connect().await;
    let mut request = b"POST /mutate HTTP/1.1\r\nhost: h\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n".to_vec();
    for _ in 0..2 {
        request.extend_from_slice(format!("{:x}\r\n{}\r\n", 900, " ".repeat(900)).as_bytes());
    }
    stream.write_all(&request).await.expect("writes");
    assert_eq!(receive(&mut stream).await.0, 413);
}

#[tokio::test]
async fn other_paths_and_methods_are_not_found_or_allowed() {
    let rig = rig(Limits::default()).await;
    for (line, expected) in [
        ("GET /healthz", 200),
        ("GET /readyz", 200),
        ("GET /mutate", 405),
        ("GET /validate", 405),
        ("POST /verify", 404),
        ("GET /metrics", 404),
    ] {
        let mut stream = rig.connect().await;
        let request = format!("{line} HTTP/1.1\r\nhost: h\r\n\r\n");
        stream.write_all(request.as_bytes()).await.expect("writes");
        assert_eq!(receive(&mut stream).await.0, expected, "{line}");
    }
}

#[tokio::test]
async fn more_reviews_than_the_limit_are_told_to_come_back() {
    let rig = rig(Limits { in_flight: 1, ..Limits::default() }).await;
    let mut first = rig.connect().await;
    send(&mut first, "/mutate", "application/json", b"wait").await;
    // The second is refused as soon as the first is being answered.
    let (status, text) = loop {
        let answer = rig.post("application/json", b"{}").await;
        if answer.0 != 200 {
            break answer;
        }
    };
    assert!(status == 503 && text.contains("retry-after: 1"), "{text}");
    rig.release.add_permits(1);
    assert_eq!(receive(&mut first).await.0, 200);
}

#[tokio::test]
async fn bodies_together_are_bounded() {
    let rig = rig(Limits { all_bodies: 2 << 10, ..Limits::default() }).await;
    assert_eq!(rig.post("application/json", &vec![b' '; 3 << 10]).await.0, 503);
    assert_eq!(rig.post("application/json", &vec![b' '; 2 << 10]).await.0, 200);
}

#[tokio::test]
async fn the_end_closes_connections_with_an_answer_and_waits_for_what_is_in_flight() {
    let rig = rig(Limits::default()).await;
    let mut idle = rig.connect().await;
    send(&mut idle, "/mutate", "application/json", b"{}").await;
    assert_eq!(receive(&mut idle).await.0, 200);
    let mut slow = rig.connect().await;
    send(&mut slow, "/mutate", "application/json", b"wait").await;

    rig.shutdown.0.send_replace(Phase::Lingering);
    // Known and new connections are still answered, and told to go elsewhere next time.
    send(&mut idle, "/mutate", "application/json", b"{}").await;
    let (status, text) = receive(&mut idle).await;
    assert!(status == 200 && text.contains("connection: close"), "{text}");
    let mut fresh = rig.connect().await;
    fresh.write_all(b"GET /readyz HTTP/1.1\r\nhost: h\r\n\r\n").await.expect("writes");
    assert_eq!(receive(&mut fresh).await.0, 503);

    rig.shutdown.0.send_replace(Phase::Draining);
    rig.release.add_permits(1);
    let (status, text) = receive(&mut slow).await;
    assert!(status == 200 && text.contains("connection: close"), "{text}");
    rig.task.await.expect("ends").expect("without an error");
}

#[tokio::test]
async fn a_client_that_asks_nothing_is_let_go() {
    let limits = Limits { first_request: Duration::from_millis(50), ..Limits::default() };
    let rig = rig(limits).await;
    let mut stream = rig.connect().await;
    let mut end = Vec::new();
    // Ends, cleanly or not, without a byte.
    let _ = stream.read_to_end(&mut end).await;
    assert!(end.is_empty());
}

#[tokio::test]
async fn a_client_that_does_not_speak_tls_is_let_go() {
    let limits = Limits { handshake: Duration::from_millis(50), ..Limits::default() };
    let rig = rig(limits).await;
    let mut stream = TcpStream::connect(rig.address).await.expect("connects");
    let mut end = Vec::new();
    let _ = stream.read_to_end(&mut end).await;
    assert!(end.is_empty());
    assert_eq!(rig.post("application/json", b"{}").await.0, 200);
}

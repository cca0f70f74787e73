//! The admin endpoint: what people and their tools read of a running fence, on the loopback of the
//! pod's network namespace. `kubectl port-forward` reaches it, the agent's own namespace does not,
//! and the proxy never dials it ([`super::destination`]).
//!
//! HTTP/1.1, one request a connection, few connections at a time, nothing but GET and HEAD.

mod answer;
mod events;

use std::convert::Infallible;
use std::fs::File;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, Semaphore};

use super::listener::accept;
use super::report;
use super::stream::tune;
use crate::event;

/// How many connections at a time; more are closed at once.
const CONNECTIONS: usize = 16;

/// How long a request's head may take.
const HEAD: Duration = Duration::from_secs(5);

/// How long a connection may last that does not stream events.
const WHOLE: Duration = Duration::from_secs(30);

/// The longest head in bytes.
const HEAD_MAX: usize = 16 * 1024;

/// What the endpoint tells, and where it is.
#[derive(Debug)]
pub(crate) struct Admin {
    /// 0: there is none.
    port: u16,
    released: Mutex<Released>,
}

/// Whether the agent runs.
#[derive(Debug, Clone, Default)]
enum Released {
    #[default]
    NotYet,
    /// With the attestation, if it came.
    With(Option<Arc<File>>),
}

impl Admin {
    pub(crate) fn new(port: u16) -> Arc<Self> {
        Arc::new(Self { port, released: Mutex::default() })
    }

    /// Whether a port of the pod is the endpoint's.
    pub(crate) fn is_at(&self, port: u16) -> bool {
        self.port != 0 && self.port == port
    }

    /// The agent runs; with the attestation's file as it is now.
    pub(crate) fn released(&self, descriptors: Vec<OwnedFd>) {
        let file = descriptors.into_iter().next().map(|file| Arc::new(File::from(file)));
        let mut released = self.released.lock().unwrap_or_else(PoisonError::into_inner);
        // A change that came without its file takes nothing away.
        if file.is_some() || matches!(*released, Released::NotYet) {
            *released = Released::With(file);
        }
    }

    fn attested(&self) -> Released {
        self.released.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Opens the endpoint, unless there is none. That it cannot be opened is told, and changes
    /// nothing for the agent.
    pub(crate) fn listen(&self) -> Option<TcpListener> {
        if self.port == 0 {
            return None;
        }
        let listening =
            std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, self.port)).and_then(|listener| {
                listener.set_nonblocking(true)?;
                TcpListener::from_std(listener)
            });
        match listening {
            Ok(listener) => {
                event::tap(&events::RING);
                Some(listener)
            }
            Err(error) => {
                report::admin_failed(self.port, &error);
                None
            }
        }
    }
}

/// Serves until it is aborted.
pub(crate) async fn serve(listener: TcpListener, admin: Arc<Admin>) {
    let slots = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let (tcp, _) = accept(&listener).await;
        let Ok(slot) = Arc::clone(&slots).try_acquire_owned() else {
            continue;
        };
        let admin = Arc::clone(&admin);
        tokio::spawn(async move {
            let _slot = slot;
            connection(tcp, &admin).await;
        });
    }
}

async fn connection(tcp: TcpStream, admin: &Admin) {
    tune(&tcp);
    let leash = Arc::new(Leash::default());
    let service = service_fn(|request| {
        let response = answer::to(admin, &request, &leash);
        async move { Ok::<_, Infallible>(response) }
    });
    let mut server = http1::Builder::new();
    server.timer(TokioTimer::new()).header_read_timeout(HEAD).max_buf_size(HEAD_MAX);
    server.keep_alive(false);
    let serving = pin!(server.serve_connection(TokioIo::new(tcp), service));
    tokio::select! {
        // A client that went away or wrote nonsense has nothing more to be told.
        _ = serving => {}
        () = leash.cut.notified() => {}
        () = leash.overdue() => {}
    }
}

/// What ends a connection that its client does not end.
#[derive(Debug, Default)]
struct Leash {
    /// The client reads more slowly than events come.
    cut: Notify,
    /// The answer has no end of its own.
    streams: AtomicBool,
}

impl Leash {
    async fn overdue(&self) {
        tokio::time::sleep(WHOLE).await;
        if self.streams.load(Ordering::Relaxed) {
            std::future::pending::<()>().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::Tap as _;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    const HEALTH: &[u8] = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n";

    async fn endpoint() -> std::net::SocketAddr {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("listener");
        let address = listener.local_addr().expect("address");
        tokio::spawn(serve(listener, Admin::new(address.port())));
        address
    }

    /// How many bytes come before the other side ends the connection; it may take as long as a
    /// busy machine needs.
    async fn ends(tcp: &mut TcpStream) -> Option<usize> {
        let mut rest = Vec::new();
        let reading = tokio::time::timeout(Duration::from_secs(20), tcp.read_to_end(&mut rest));
        reading.await.ok().map(|_| rest.len())
    }

    #[tokio::test]
    async fn a_reader_of_events_that_stands_still_is_cut() {
        let mut tcp = TcpStream::connect(endpoint().await).await.expect("connect");
        tcp.write_all(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n").await.expect("send");
        let mut first = [0; 12];
        tcp.read_exact(&mut first).await.expect("answer");
        assert_eq!(&first, b"HTTP/1.1 200");
        assert!(events::RING.wants_all());
        // More than the sockets of a loopback and the lag together hold.
        let mut sent = 0;
        while events::RING.wants_all() {
            assert!(sent < 10_000, "the reader was not cut");
            events::RING.take("x".repeat(100_000), true);
            sent += 1;
            tokio::task::yield_now().await;
        }
        // What was waiting for the reader is not sent any more.
        let got = ends(&mut tcp).await.expect("the connection ends");
        assert!(got < sent * 100_000, "{got} bytes came of {sent} events");
    }

    #[tokio::test]
    async fn connections_are_few_and_do_not_rest() {
        let address = endpoint().await;
        let mut idle = Vec::new();
        for _ in 0..CONNECTIONS {
            idle.push(TcpStream::connect(address).await.expect("connect"));
        }
        idle[0].write_all(b"GET /healthz HTTP/1.1\r\nHost: loc").await.expect("send");
        let mut more = TcpStream::connect(address).await.expect("connect");
        // Closed, perhaps before this is written.
        let _ = more.write_all(HEALTH).await;
        let mut answer = Vec::new();
        let _ = more.read_to_end(&mut answer).await;
        assert!(answer.is_empty(), "served beyond the limit");
        for tcp in &mut idle {
            assert!(ends(tcp).await.is_some(), "a connection without a request stayed open");
        }
        let mut again = TcpStream::connect(address).await.expect("connect");
        again.write_all(HEALTH).await.expect("send");
        let mut answer = String::new();
        again.read_to_string(&mut answer).await.expect("answer");
        assert!(answer.ends_with("\r\n\r\nok\n"), "{answer}");
    }
}

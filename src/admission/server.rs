//! The HTTP side of the webhook: TLS, limits, time-outs, and an end that loses no request.
//!
//! API servers speak HTTP/1.1 to webhooks, over few long-lived connections. Anyone in the cluster
//! can connect too, so everything is bounded: connections, the time for a handshake, a first
//! request and a body, the bytes of a body and of all bodies together, the reviews at once.
//!
//! What cannot be understood or not be taken now is answered with an HTTP error, which the API
//! server treats by the failure policy; a decision is always 200.

mod client;
mod handler;
mod http;
mod metrics;
mod validate;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::body::Body;
use axum::http::Request;
use axum::http::header::{CONNECTION, HeaderValue};
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::time::Instant;
use tokio_rustls::TlsAcceptor;
use tower::ServiceExt as _;

pub use client::{ClientAuth, ClientAuthError};
pub use handler::{ClusterFacts, Handler, HandlerConfig};
pub use http::{
    Admit, Answer, Deadline, Hook, TimeIsUp, health_router, ready_unless_ending, router,
};
pub use metrics::Metrics;

/// Bounds of the server; every duration and size is a limit, none is a target.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Bytes of one body. A review may hold a pod of 3 MiB twice.
    pub body: usize,
    /// Bytes of all bodies being read or answered. Parsed JSON takes several times as much.
    pub all_bodies: usize,
    /// Reviews being answered at once.
    pub in_flight: usize,
    /// Open connections.
    pub connections: usize,
    /// For the TLS handshake.
    pub handshake: Duration,
    /// From the handshake to the end of the first request's header.
    pub first_request: Duration,
    /// Between requests. Longer than the API server keeps an idle connection (90 s), so that it is
    /// never we who close one that it is about to use.
    pub idle: Duration,
    /// For the body after the header.
    pub body_time: Duration,
    /// After this a connection is closed with its next answer, so that load spreads to new
    /// replicas.
    pub connection_life: Duration,
    /// How long to keep accepting after a SIGTERM, while endpoints are updated.
    pub linger: Duration,
    /// How long to wait for what is in flight after that.
    pub drain: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            body: 7 << 20,
            all_bodies: 16 << 20,
            in_flight: 128,
            connections: 1024,
            handshake: Duration::from_secs(5),
            first_request: Duration::from_secs(10),
            idle: Duration::from_secs(120),
            body_time: Duration::from_secs(10),
            connection_life: Duration::from_secs(300),
            linger: Duration::from_secs(5),
            drain: Duration::from_secs(20),
        }
    }
}

/// Where the process is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Serving.
    Running,
    /// Told to end: not ready, still accepting, each answer closes its connection.
    Lingering,
    /// No longer accepting.
    Draining,
}

/// Tells the servers of the process that it ends; see [`Phase`].
#[derive(Debug, Clone)]
pub struct Shutdown(watch::Sender<Phase>);

impl Default for Shutdown {
    fn default() -> Self {
        Self(watch::Sender::new(Phase::Running))
    }
}

impl Shutdown {
    /// Begins the end: lingering, then draining. Returns when draining has begun.
    pub async fn begin(&self, linger: Duration) {
        self.0.send_replace(Phase::Lingering);
        tokio::time::sleep(linger).await;
        self.0.send_replace(Phase::Draining);
    }

    /// The current phase, to be watched.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<Phase> {
        self.0.subscribe()
    }

    /// The current phase.
    #[must_use]
    pub fn phase(&self) -> Phase {
        *self.0.borrow()
    }
}

/// Serves `app` until `shutdown` drains: over TLS where `tls` is given, else in the clear.
///
/// # Errors
/// None once it runs: failing connections are logged at debug level and dropped. The result is for
/// the caller's `select!` over tasks that must not end.
pub async fn serve(
    listener: TcpListener,
    tls: Option<Arc<rustls::ServerConfig>>,
    app: axum::Router,
    limits: Limits,
    shutdown: Shutdown,
) -> std::io::Result<()> {
    let acceptor = tls.map(TlsAcceptor::from);
    let connections = Arc::new(Semaphore::new(limits.connections));
    let graceful = GracefulShutdown::new();
    let phase = shutdown.subscribe();
    let mut told = phase.clone();
    let draining = async move {
        // The sender lives as long as `shutdown`; were it gone, the end would be near too.
        drop(told.wait_for(|phase| *phase == Phase::Draining).await);
    };
    let mut draining = std::pin::pin!(draining);
    loop {
        let (stream, peer) = tokio::select! {
            () = &mut draining => break,
            accepted = listener.accept() => match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    // Out of descriptors, most likely: a busy loop would not help.
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            },
        };
        let Ok(permit) = Arc::clone(&connections).try_acquire_owned() else {
            tracing::warn!(%peer, limit = limits.connections, "too many connections");
            continue;
        };
        let connection = Connection {
            acceptor: acceptor.clone(),
            app: app.clone(),
            limits: limits.clone(),
            phase: phase.clone(),
            watcher: graceful.watcher(),
        };
        tokio::spawn(async move {
            connection.run(stream, peer).await;
            drop(permit);
        });
    }
    drop(listener);
    if tokio::time::timeout(limits.drain, graceful.shutdown()).await.is_err() {
        tracing::warn!("some requests were cut off: they did not end in time");
    }
    Ok(())
}

struct Connection {
    acceptor: Option<TlsAcceptor>,
    app: axum::Router,
    limits: Limits,
    phase: watch::Receiver<Phase>,
    watcher: hyper_util::server::graceful::Watcher,
}

impl Connection {
    async fn run(self, stream: TcpStream, peer: SocketAddr) {
        // Answers are small and single: waiting to fill a packet only delays them.
        let _ = stream.set_nodelay(true);
        let Some(acceptor) = self.acceptor.clone() else {
            return self.serve(stream, peer).await;
        };
        match tokio::time::timeout(self.limits.handshake, acceptor.accept(stream)).await {
            Ok(Ok(stream)) => self.serve(stream, peer).await,
            Ok(Err(error)) => tracing::debug!(%peer, %error, "TLS handshake failed"),
            Err(_) => tracing::debug!(%peer, "TLS handshake did not end in time"),
        }
    }

    async fn serve<S>(self, stream: S, peer: SocketAddr)
    where
        S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
    {
        let asked = Arc::new(AtomicBool::new(false));
        let old_at = Instant::now() + self.limits.connection_life;
        let (app, phase, first) = (self.app, self.phase, Arc::clone(&asked));
        let service = service_fn(move |request: Request<hyper::body::Incoming>| {
            first.store(true, Ordering::Relaxed);
            let (app, phase) = (app.clone(), phase.clone());
            async move {
                let mut response = app.oneshot(request.map(Body::new)).await?;
                // Written out rather than only closing: the client then does not try to use it
                // again.
                if Instant::now() >= old_at || *phase.borrow() != Phase::Running {
                    response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
                }
                Ok::<_, std::convert::Infallible>(response)
            }
        });
        let connection = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(self.limits.idle)
            .max_buf_size(64 << 10)
            .serve_connection(TokioIo::new(stream), service);
        let connection = self.watcher.watch(connection);
        let nothing_asked = async {
            tokio::time::sleep(self.limits.first_request).await;
            if asked.load(Ordering::Relaxed) {
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            result = connection => if let Err(error) = result {
                tracing::debug!(%peer, %error, "connection ended");
            },
            () = nothing_asked => tracing::debug!(%peer, "no request came in time"),
        }
    }
}

/// The TLS configuration: our resolver, HTTP/1.1 only, TLS 1.2 and 1.3. With `clients` nobody is
/// talked to who has no certificate that those verify.
///
/// # Errors
/// When the provider supports neither version, which would be a fault of the build.
pub fn tls_config(
    resolver: Arc<dyn rustls::server::ResolvesServerCert>,
    clients: Option<Arc<ClientAuth>>,
) -> Result<rustls::ServerConfig, rustls::Error> {
    let config = rustls::ServerConfig::builder_with_provider(crate::pki::provider())
        .with_safe_default_protocol_versions()?;
    let verified = clients.is_some();
    let config = match clients {
        Some(clients) => config.with_client_cert_verifier(clients),
        None => config.with_no_client_auth(),
    };
    let mut config = config.with_cert_resolver(resolver);
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    if verified {
        // A session that is taken up again shows no certificate anew.
        config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
    }
    Ok(config)
}

#[cfg(test)]
#[path = "server/tests.rs"]
mod tests;

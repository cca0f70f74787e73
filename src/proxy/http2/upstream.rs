//! The upstream of one connection of HTTP/2: one connection for all streams where it speaks HTTP/2
//! too, a few where it speaks HTTP/1.1. Nothing is shared between two connections of the agent.

use std::net::IpAddr;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use h2::client::{Builder, SendRequest};
use tokio::sync::{Mutex, OwnedSemaphorePermit, Semaphore, SemaphorePermit};
use tokio::task::JoinSet;

use super::Limits;
use super::io::Io;
use super::meter::Side;
use crate::proxy::destination::{DialError, Origin, dial};
use crate::proxy::http::head::{RESPONSE_FIELDS, RESPONSE_MAX};
use crate::proxy::l7::judge::Scheme;
use crate::proxy::metrics;
use crate::proxy::session::Session;
use crate::proxy::stream::{Conn, Stream};
use crate::proxy::tls::{HTTP2, HTTP11};

/// What an upstream may send before the agent has read it, in bytes: on a stream and on a
/// connection, for the first connections and for those beyond.
const WIDE: (u32, u32) = (2 << 20, 4 << 20);
const NARROW: (u32, u32) = (256 << 10, 512 << 10);

/// The most connections of HTTP/1.1 for the streams of one connection; more streams wait.
const BRIDGED: usize = 8;

/// The largest response head, as HTTP/2 counts it.
const LIST_MAX: usize = RESPONSE_MAX + 32 * RESPONSE_FIELDS;

/// What an upstream speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Version {
    Http1,
    Http2,
}

/// The way to the upstream.
pub(crate) struct Upstream {
    scheme: Scheme,
    slot: Mutex<Slot>,
    bridged: Semaphore,
    /// As in the slot, to be read without it.
    failures: AtomicU64,
    /// The address of the last connection.
    peer: std::sync::Mutex<Option<IpAddr>>,
}

struct Slot {
    /// As the last connection had it.
    version: Version,
    /// Made, and not used yet.
    conn: Option<Conn>,
    http2: Option<SendRequest<Bytes>>,
    /// Of HTTP/1.1, between two requests.
    resting: Vec<Conn>,
    /// Why the first attempt failed; told once, then tried again.
    failed: Option<DialError>,
    /// How often an attempt has failed, and why the last one did.
    failures: (u64, Option<DialError>),
    /// What moves the bytes of HTTP/2. Ends with the agent's connection.
    driving: JoinSet<()>,
}

/// A connection that is open, as far as one can see.
pub(super) enum Open<'a> {
    Http2 {
        send: SendRequest<Bytes>,
        /// The upstream may have closed it since.
        used: bool,
    },
    Http1 {
        conn: Conn,
        used: bool,
        _place: SemaphorePermit<'a>,
    },
}

impl Upstream {
    pub(crate) fn open(scheme: Scheme, version: Version, conn: Conn) -> Self {
        Self::new(scheme, version, Some(conn), None)
    }

    /// The first stream is told why.
    pub(crate) fn failed(scheme: Scheme, error: DialError) -> Self {
        Self::new(scheme, Version::Http2, None, Some(error))
    }

    fn new(
        scheme: Scheme,
        version: Version,
        conn: Option<Conn>,
        failed: Option<DialError>,
    ) -> Self {
        let peer = conn.as_ref().and_then(|conn| conn.rd.line().peer());
        let slot = Slot {
            version,
            conn,
            http2: None,
            resting: Vec::new(),
            failed,
            failures: (0, None),
            driving: JoinSet::new(),
        };
        let bridged = Semaphore::new(BRIDGED);
        Self {
            scheme,
            slot: Mutex::new(slot),
            bridged,
            failures: AtomicU64::new(0),
            peer: std::sync::Mutex::new(peer),
        }
    }

    /// The same without a connection, for streams under other rules.
    pub(super) async fn anew(&self) -> Self {
        Self::new(self.scheme, self.version().await, None, None)
    }

    pub(super) fn scheme(&self) -> Scheme {
        self.scheme
    }

    /// The address that is connected to.
    pub(super) fn peer(&self) -> Option<IpAddr> {
        *self.peer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the upstream speaks, as far as is known.
    async fn version(&self) -> Version {
        self.slot.lock().await.version
    }

    /// A connection for one stream: what there is, or a new one. `again`: what there is has just
    /// failed.
    pub(super) async fn connection(
        &self,
        session: &Session,
        origin: &Origin,
        again: bool,
    ) -> Result<Open<'_>, DialError> {
        let failures = self.failures.load(Ordering::Relaxed);
        let mut place = match self.version().await {
            Version::Http1 => self.bridged.acquire().await.ok(),
            Version::Http2 => None,
        };
        let mut slot = self.slot.lock().await;
        if again {
            slot.http2 = None;
            slot.resting.clear();
        }
        if let Some(error) = slot.failed.take() {
            return Err(error);
        }
        // Streams that waited for one attempt share its end: each would wait for all before it.
        if let (count, Some(error)) = &slot.failures
            && *count != failures
        {
            return Err(error.clone());
        }
        if let Some(send) = slot.http2.clone() {
            match send.ready().await {
                Ok(send) => return Ok(Open::Http2 { send, used: true }),
                Err(_) => slot.http2 = None,
            }
        }
        let (conn, used) = match slot.conn.take() {
            Some(conn) => (conn, false),
            None => match slot.rested().await {
                Some(conn) => (conn, true),
                None => (self.dial_or_tell(&mut slot, session, origin).await?, false),
            },
        };
        if slot.version == Version::Http2 {
            let send = slot.begin(conn, &session.shared.http2).await?;
            return Ok(Open::Http2 { send, used: false });
        }
        drop(slot);
        if place.is_none() {
            place = self.bridged.acquire().await.ok();
        }
        let closed = || DialError::Connect("no place for a connection".to_owned());
        Ok(Open::Http1 { conn, used, _place: place.ok_or_else(closed)? })
    }

    /// Keeps a connection of HTTP/1.1 for the next stream.
    pub(super) async fn rest(&self, conn: Conn) {
        let mut slot = self.slot.lock().await;
        if slot.resting.len() < BRIDGED {
            slot.resting.push(conn);
        }
    }

    async fn dial_or_tell(
        &self,
        slot: &mut Slot,
        session: &Session,
        origin: &Origin,
    ) -> Result<Conn, DialError> {
        let dialled = self.dial(slot, session, origin).await;
        slot.failures.1 = dialled.as_ref().err().cloned();
        if dialled.is_err() {
            slot.failures.0 += 1;
            self.failures.store(slot.failures.0, Ordering::Relaxed);
        }
        dialled
    }

    async fn dial(
        &self,
        slot: &mut Slot,
        session: &Session,
        origin: &Origin,
    ) -> Result<Conn, DialError> {
        let tcp = dial(session, origin).await?;
        let peer = tcp.peer_addr().ok().map(|address| address.ip());
        *self.peer.lock().unwrap_or_else(PoisonError::into_inner) = peer;
        let stream = match self.scheme {
            // As the client knew it to be.
            Scheme::Http => Stream::Tcp(tcp),
            Scheme::Https => {
                let offer = [HTTP2.to_vec(), HTTP11.to_vec()];
                let tls = session.upstream_tls();
                let (stream, agreed) = tls.connect(tcp, &origin.host, &offer).await?;
                slot.version = version_of(agreed.as_deref());
                stream
            }
        };
        Ok(Conn::new(stream).counted(&metrics::DOWN))
    }
}

/// What was agreed on in TLS. Nothing is HTTP/1.1.
pub(crate) fn version_of(agreed: Option<&[u8]>) -> Version {
    if agreed == Some(HTTP2) { Version::Http2 } else { Version::Http1 }
}

impl Slot {
    async fn rested(&mut self) -> Option<Conn> {
        while let Some(mut conn) = self.resting.pop() {
            // Bytes that answer nothing, or an end: either way it is of no more use.
            if conn.rd.data().is_empty() && conn.rd.fill_now().await.is_none() {
                return Some(conn);
            }
        }
        None
    }

    async fn begin(
        &mut self,
        conn: Conn,
        limits: &Limits,
    ) -> Result<SendRequest<Bytes>, DialError> {
        let wide = limits.wide();
        let (io, _) = Io::new(conn, Side::Client);
        let handshake = builder(wide.as_ref()).handshake(io).await;
        let (send, connection) =
            handshake.map_err(|error| DialError::Connect(error.to_string()))?;
        while self.driving.try_join_next().is_some() {}
        self.driving.spawn(async move {
            let _wide = wide;
            // What ends it ends its streams, and they say so.
            let _ = connection.await;
        });
        self.http2 = Some(send.clone());
        Ok(send)
    }
}

fn builder(wide: Option<&OwnedSemaphorePermit>) -> Builder {
    let (stream, connection) = if wide.is_some() { WIDE } else { NARROW };
    let mut builder = Builder::new();
    builder
        .enable_push(false)
        .initial_window_size(stream)
        .initial_connection_window_size(connection)
        .max_header_list_size(u32::try_from(LIST_MAX).unwrap_or(u32::MAX))
        .max_send_buffer_size(super::SEND_BUFFER)
        .data_frame_budget(super::SMALL_FRAMES);
    builder
}

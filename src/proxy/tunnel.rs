//! After `200 Connection Established`, or instead of it for a connection that the gateway caught:
//! what is spoken in the tunnel, found from as many bytes as
//! it takes, and handled by what the grant says.
//!
//! Nothing is decided on one look at the first segment: a `ClientHello` is known by its first byte
//! and then read whole, an HTTP head is known once `HTTP/1.` stands where it must, and until then
//! every byte has to be one that such a head can have.

use std::time::{Duration, Instant};

use rustls::server::Acceptor;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::server::StartHandshake;

use super::destination::{DialError, Origin};
use super::http::head::{HEAD_TIMEOUT, REQUEST_MAX};
use super::http2::{self, Place, Upstream, Version, version_of};
use super::l7::judge::Scheme;
use super::l7::rest::{self, Link};
use super::listener::refuse;
use super::metrics::{self, Side};
use super::refusal::Refusal;
use super::report;
use super::session::Session;
use super::stream::{Conn, Stream, duplex};
use super::tls::{HTTP2, HTTP10, HTTP11};
use crate::policy::{Host, Inspect, TlsMode};

/// How long the client of an inspected endpoint may stay silent.
const SILENCE: Duration = Duration::from_secs(30);

/// How long a TLS handshake with the agent may take.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// The longest `ClientHello` in bytes, record headers included.
const HELLO_MAX: usize = 68 * 1024;

const TOO_MANY: &str = "too many connections of HTTP/2 at a time";

/// TLS alerts (RFC 8446, section 6).
const ALERT_UNRECOGNIZED_NAME: u8 = 112;
const ALERT_NO_APPLICATION_PROTOCOL: u8 = 120;
const ALERT_INTERNAL_ERROR: u8 = 80;

/// What a client's first bytes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum First {
    Tls,
    /// HTTP/1.x.
    Http,
    /// The preface of HTTP/2.
    Http2,
    /// Something else.
    Other,
    /// The upstream spoke before the client did.
    UpstreamSpoke,
    /// An inspected endpoint's client said nothing, or only part of a head.
    Silent,
    /// One of the two is gone.
    Closed,
}

/// Serves an established tunnel to its end.
pub(crate) async fn run(session: &Session, mut client: Conn, tcp: TcpStream, origin: &Origin) {
    let mut upstream = Conn::new(Stream::Tcp(tcp)).counted(&metrics::DOWN);
    match first(&mut client, &mut upstream, origin.grant.inspect).await {
        First::Tls => secured(session, client, upstream, origin).await,
        first => inner(session, client, upstream, origin, Scheme::Http, first).await,
    }
}

/// Handles what is not TLS, or what was found inside TLS.
async fn inner(
    session: &Session,
    client: Conn,
    upstream: Conn,
    origin: &Origin,
    scheme: Scheme,
    first: First,
) {
    match (first, origin.grant.inspect) {
        (First::Http, _) => {
            let link = Link::open(origin, scheme, upstream);
            rest::serve(session, client, link, origin).await;
        }
        (First::Http2, _) => {
            let Some(place) = session.shared.http2.place() else {
                report::tunnel_refused(session, origin, TOO_MANY);
                return client.close().await;
            };
            // In the clear the client must have known that the upstream speaks it. In TLS it has
            // not asked.
            let version = match scheme {
                Scheme::Http => Version::Http2,
                Scheme::Https => Version::Http1,
            };
            let upstream = Upstream::open(scheme, version, upstream);
            http2::serve(session, place, client, upstream, origin).await;
        }
        (First::Closed, _) => client.close().await,
        (First::Tls | First::Other | First::UpstreamSpoke, Inspect::None) => {
            raw(session, client, upstream, origin).await;
        }
        (First::Silent, Inspect::None) => {
            report::tunnel_refused(session, origin, "incomplete HTTP request");
        }
        (first, Inspect::Rest) => {
            let reason = match first {
                First::UpstreamSpoke => "the upstream spoke first: not HTTP",
                First::Silent => "the client sent no complete HTTP request",
                _ => "neither TLS nor HTTP",
            };
            report::tunnel_refused(session, origin, reason);
            let detail = "this endpoint is inspected: only HTTP passes, plain or in TLS";
            let refusal = Refusal::new(403, "unsupported_l7_protocol", detail).because(reason);
            refuse(client, &refusal).await;
        }
    }
}

/// Waits until the client's first bytes say what they are.
async fn first(client: &mut Conn, upstream: &mut Conn, inspect: Inspect) -> First {
    let wait = |begun| match (begun, inspect) {
        (true, _) => HEAD_TIMEOUT,
        (false, Inspect::Rest) => SILENCE,
        // A pooled connection of an opaque protocol may rest for as long as both ends like.
        (false, Inspect::None) => Duration::from_secs(86_400 * 365),
    };
    loop {
        let begun = !client.rd.data().is_empty();
        if let Some(first) = recognise(client.rd.data()) {
            return first;
        }
        tokio::select! {
            biased;
            read = timeout(wait(begun), client.rd.fill()) => match read {
                Err(_) => return First::Silent,
                Ok(Ok(0) | Err(_)) => return First::Closed,
                Ok(Ok(_)) => {}
            },
            read = upstream.rd.fill(), if !begun => match read {
                Ok(0) | Err(_) => return First::Closed,
                Ok(_) => return First::UpstreamSpoke,
            },
        }
    }
}

/// What `data` is the start of; `None` when it takes more to tell.
///
/// HTTP is what any server might take for it, not what is well formed: line breaks before the
/// request line, several blanks, a target of any bytes. It is then read strictly, and refused where
/// it is not as it must be. Otherwise one odd byte would take a request past the check of its
/// `Host`.
pub(super) fn recognise(data: &[u8]) -> Option<First> {
    const METHOD_MAX: usize = 32;
    const H2_PREFACE: &[u8] = b"PRI * HTTP/2.0";
    if *data.first()? == 0x16 {
        return Some(First::Tls);
    }
    // HTTP/2 with prior knowledge.
    let preface = &H2_PREFACE[..data.len().min(H2_PREFACE.len())];
    if data.starts_with(preface) {
        return (preface.len() == H2_PREFACE.len()).then_some(First::Http2);
    }
    let too_long = (data.len() > REQUEST_MAX).then_some(First::Other);
    let start = data.iter().position(|byte| !matches!(byte, b'\r' | b'\n'));
    let Some(start) = start else { return too_long };
    let end = data[start..].iter().position(|byte| *byte == b'\n').map(|end| start + end);
    let line = &data[start..end.unwrap_or(data.len())];
    let blank = |byte: &u8| matches!(byte, b' ' | b'\t');
    let method = line.split(blank).next().unwrap_or_default();
    let token = |byte: &u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(byte);
    if method.is_empty() || method.len() > METHOD_MAX || !method.iter().all(token) {
        // A line of one word ends with what is no part of a method.
        return Some(First::Other);
    }
    let version = |word: &[u8]| word.len() >= 5 && word[..5].eq_ignore_ascii_case(b"HTTP/");
    if line.split(blank).skip(1).any(version) {
        return Some(First::Http);
    }
    if end.is_some() { Some(First::Other) } else { too_long }
}

/// Copies both ways until both ends are done.
async fn raw(session: &Session, mut client: Conn, mut upstream: Conn, origin: &Origin) {
    let start = Instant::now();
    let carried = duplex(&mut client, &mut upstream).await;
    report::tunnel_ended(session, origin, carried, start.elapsed());
}

/// Reads the `ClientHello`, checks its name, and terminates TLS or, where the grant says so,
/// passes it through.
async fn secured(session: &Session, mut client: Conn, upstream: Conn, origin: &Origin) {
    let accepted = match client_hello(&mut client).await {
        Ok(Some(accepted)) => accepted,
        Ok(None) => return,
        Err(reason) => {
            report::tunnel_refused(session, origin, &reason);
            return client.close().await;
        }
    };
    let hello = accepted.client_hello();
    if let Err(reason) = name_matches(hello.server_name(), &origin.host) {
        report::tunnel_refused(session, origin, reason);
        return alert(client, ALERT_UNRECOGNIZED_NAME).await;
    }
    if origin.grant.tls == TlsMode::Skip && origin.grant.inspect == Inspect::None {
        // Nothing of the hello was consumed: it goes out as it came.
        return raw(session, client, upstream, origin).await;
    }
    let offered: Vec<Vec<u8>> = hello.alpn().into_iter().flatten().map(<[u8]>::to_vec).collect();
    let offer = Offer::new(offered);
    let (Stream::Tcp(client_tcp), Stream::Tcp(upstream_tcp)) =
        (client.into_stream(), upstream.into_stream())
    else {
        return;
    };
    let start = StartHandshake::from_parts(accepted, client_tcp);
    let place = if offer.http2 { session.shared.http2.place() } else { None };
    let refused = match (offer.http1, &place) {
        (None, None) if offer.http2 => Some(TOO_MANY),
        (None, None) if !offer.all.is_empty() && origin.grant.inspect == Inspect::Rest => {
            Some("the client offers no version of HTTP")
        }
        _ => None,
    };
    if let Some(reason) = refused {
        report::tunnel_refused(session, origin, reason);
        let client = Conn::new(Stream::Tcp(start.io));
        return alert(client, ALERT_NO_APPLICATION_PROTOCOL).await;
    }
    let both = if place.is_none() && (offer.http1.is_some() || offer.all.is_empty()) {
        terminate(session, start, upstream_tcp, origin, offer.http1).await
    } else {
        mirror(session, start, upstream_tcp, origin, &offer).await
    };
    let Some(both) = both else {
        return;
    };
    match place {
        Some(place) if both.agent == Version::Http2 => both.http2(session, place, origin).await,
        // Given back: the two agreed on something else.
        place => {
            drop(place);
            both.other(session, origin).await;
        }
    }
}

/// What the client offers by ALPN.
struct Offer {
    all: Vec<Vec<u8>>,
    http2: bool,
    http1: Option<&'static [u8]>,
}

impl Offer {
    fn new(all: Vec<Vec<u8>>) -> Self {
        let has = |name: &&[u8]| all.iter().any(|one| one == name);
        let (http2, http1) = (has(&HTTP2), [HTTP11, HTTP10].into_iter().find(has));
        Self { all, http2, http1 }
    }

    /// What the upstream is offered in turn. `whole`: whatever the client speaks may pass.
    fn to_upstream(&self, whole: bool) -> Vec<Vec<u8>> {
        let http = |name: &[u8]| [HTTP2, HTTP11, HTTP10].contains(&name);
        let only_http = self.all.iter().all(|one| http(one));
        let mut offer = self.all.clone();
        offer.retain(|one| whole || http(one));
        // Streams can go on as requests of HTTP/1.1.
        if (only_http || !whole) && self.http2 && self.http1 != Some(HTTP11) {
            offer.push(HTTP11.to_vec());
        }
        offer
    }

    /// What to agree on with the client when the upstream has agreed on this.
    fn to_client<'a>(&'a self, agreed: Option<&'a [u8]>) -> Option<&'a [u8]> {
        agreed
            .filter(|agreed| self.all.iter().any(|one| one == agreed))
            .or(self.http1)
            .or(self.http2.then_some(HTTP2))
    }
}

/// TLS with the agent, and with the upstream if that could be had.
struct Both {
    client: Conn,
    /// What the client was told to speak.
    agent: Version,
    upstream: Result<(Conn, Version), DialError>,
}

impl Both {
    async fn http2(self, session: &Session, place: Place, origin: &Origin) {
        let upstream = match self.upstream {
            Ok((conn, version)) => Upstream::open(Scheme::Https, version, conn),
            // Told in the answer to the first request.
            Err(error) => Upstream::failed(Scheme::Https, error),
        };
        http2::serve(session, place, self.client, upstream, origin).await;
    }

    async fn other(mut self, session: &Session, origin: &Origin) {
        match self.upstream {
            Ok((mut upstream, _)) => {
                let first = first(&mut self.client, &mut upstream, origin.grant.inspect).await;
                inner(session, self.client, upstream, origin, Scheme::Https, first).await;
            }
            // Told in the answer to the first request.
            Err(error) => {
                let link = Link::failed(origin, Scheme::Https, error);
                rest::serve(session, self.client, link, origin).await;
            }
        }
    }
}

/// Both handshakes at once, for a client that speaks HTTP/1.1, or does not say what it speaks.
/// `None`: the client's failed.
async fn terminate(
    session: &Session,
    start: StartHandshake<TcpStream>,
    upstream: TcpStream,
    origin: &Origin,
    alpn: Option<&[u8]>,
) -> Option<Both> {
    let config = match session.shared.agent_tls.config(&origin.host, alpn) {
        Ok(config) => config,
        Err(error) => {
            report::tunnel_refused(session, origin, &error.to_string());
            alert(Conn::new(Stream::Tcp(start.io)), ALERT_INTERNAL_ERROR).await;
            return None;
        }
    };
    let offer: Vec<Vec<u8>> = alpn.map(|_| HTTP11.to_vec()).into_iter().collect();
    let (agent, upstream) = tokio::join!(
        timeout(HANDSHAKE, start.into_stream(config)),
        session.shared.upstream_tls.connect(upstream, &origin.host, &offer),
    );
    let client = accepted(session, origin, agent)?;
    let upstream = upstream.map(|(stream, _)| (Conn::new(stream), Version::Http1));
    Some(Both { client, agent: Version::Http1, upstream })
}

/// For a client that speaks HTTP/2, or only other protocols: the upstream chooses first, then the
/// client is told.
async fn mirror(
    session: &Session,
    start: StartHandshake<TcpStream>,
    upstream: TcpStream,
    origin: &Origin,
    offer: &Offer,
) -> Option<Both> {
    let whole = origin.grant.inspect == Inspect::None;
    let tls = &session.shared.upstream_tls;
    let connected = tls.connect(upstream, &origin.host, &offer.to_upstream(whole)).await;
    let agreed = match &connected {
        Ok((_, agreed)) => agreed.as_deref(),
        Err(error) if !offer.http2 => {
            report::dial_failed(session, origin, error);
            alert(Conn::new(Stream::Tcp(start.io)), ALERT_INTERNAL_ERROR).await;
            return None;
        }
        Err(_) => None,
    };
    let alpn = offer.to_client(agreed);
    let config = match session.shared.agent_tls.config(&origin.host, alpn) {
        Ok(config) => config,
        Err(error) => {
            report::tunnel_refused(session, origin, &error.to_string());
            return None;
        }
    };
    let (agent, upstream_version) = (version_of(alpn), version_of(agreed));
    let handshake = timeout(HANDSHAKE, start.into_stream(config)).await;
    let client = accepted(session, origin, handshake)?;
    let upstream = connected.map(|(stream, _)| (Conn::new(stream), upstream_version));
    Some(Both { client, agent, upstream })
}

type Handshake<S> = Result<std::io::Result<S>, tokio::time::error::Elapsed>;

fn accepted(
    session: &Session,
    origin: &Origin,
    handshake: Handshake<tokio_rustls::server::TlsStream<TcpStream>>,
) -> Option<Conn> {
    match handshake {
        Ok(Ok(stream)) => {
            metrics::handshake(Side::Agent, true);
            Some(Conn::new(Stream::Agent(Box::new(stream))))
        }
        Ok(Err(error)) => {
            report::handshake_failed(session, origin, &error.to_string());
            None
        }
        Err(_) => {
            report::handshake_failed(session, origin, "not completed in time");
            None
        }
    }
}

/// Reads the whole `ClientHello`, from however many segments and records, and leaves its bytes in
/// the reader. `None`: the client is gone.
pub(super) async fn client_hello(
    client: &mut Conn,
) -> Result<Option<rustls::server::Accepted>, String> {
    let mut acceptor = Acceptor::default();
    let mut fed = 0;
    let deadline = tokio::time::Instant::now() + HANDSHAKE;
    loop {
        while fed < client.rd.data().len() {
            let mut rest = &client.rd.data()[fed..];
            match acceptor.read_tls(&mut rest) {
                Ok(read) if read > 0 => fed += read,
                _ => return Err("ClientHello not understood".to_owned()),
            }
        }
        match acceptor.accept() {
            Ok(Some(accepted)) => return Ok(Some(accepted)),
            Ok(None) if fed > HELLO_MAX => return Err("ClientHello is too long".to_owned()),
            Ok(None) => {}
            Err((error, mut alert)) => {
                let mut bytes = Vec::new();
                if alert.write_all(&mut bytes).is_ok() {
                    let _ = client.send(&bytes).await;
                }
                return Err(format!("ClientHello refused: {error}"));
            }
        }
        match tokio::time::timeout_at(deadline, client.rd.fill()).await {
            Ok(Ok(0) | Err(_)) => return Ok(None),
            Ok(Ok(_)) => {}
            Err(_) => return Err("ClientHello not completed in time".to_owned()),
        }
    }
}

/// The name in TLS must be the name that was judged; an address has none.
fn name_matches(sni: Option<&str>, host: &Host) -> Result<(), &'static str> {
    match sni {
        Some(sni) if Host::parse(sni).is_ok_and(|sni| sni == *host) => Ok(()),
        Some(_) => Err("the name in TLS (SNI) is not the host that was judged"),
        None if host.is_ip() => Ok(()),
        None => Err("no name in TLS (SNI): it must be the host that was judged"),
    }
}

/// Says why a handshake ends, in the one form that a client understands at this point.
async fn alert(mut client: Conn, description: u8) {
    // Record: alert, TLS 1.2, two bytes: fatal.
    if client.send(&[21, 3, 3, 0, 2, 2, description]).await.is_ok() {
        client.close().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is said of `data` when it arrives one byte after the other.
    fn bytewise(data: &[u8]) -> Option<First> {
        (1..=data.len()).find_map(|end| recognise(&data[..end]))
    }

    #[test]
    fn recognised_alike_however_it_is_split() {
        let cases: &[(&[u8], Option<First>)] = &[
            (b"", None),
            (&[0x16], Some(First::Tls)),
            (&[0x16, 3, 1], Some(First::Tls)),
            (b"GE", None),
            (b"GET", None),
            (b"GET /", None),
            (b"GET / HT", None),
            (b"GET / HTTP", None),
            (b"GET / HTTP/", Some(First::Http)),
            (b"GET / HTTP/1.1\r\nHost: h\r\n\r\n", Some(First::Http)),
            (b"purge /x HTTP/1.0\r\n", Some(First::Http)),
            (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", Some(First::Http2)),
            (b"PRI * HTTP/2", None),
            (b"PRI * HTTP/1.1\r\n", Some(First::Http)),
            (b"GET / HTTP/3", Some(First::Http)),
            (b"GET  / HTTP/1.1\r\n", Some(First::Http)),
            (b"GET\t/\tHTTP/1.1\r\n", Some(First::Http)),
            (b"\r\n\nGET / HTTP/1.1\r\n", Some(First::Http)),
            (b"GET /\xc3\xa9 http/1.1\r\n", Some(First::Http)),
            (b"\r\n", None),
            (b"EHLO client\r\n", Some(First::Other)),
            (b"GET /\r\n", Some(First::Other)),
            (b"SSH-2.0-x\r\n", Some(First::Other)),
            (b"\x00\x00\x00\x08", Some(First::Other)),
            (b"*1\r\n", Some(First::Other)),
            (b" GET / HTTP/1.1", Some(First::Other)),
            (b"\nquit\n", Some(First::Other)),
            (b"ABCDEFGHIJKLMNOPQRSTUVWXYZABCDEFGHIJ", Some(First::Other)),
        ];
        for (data, expected) in cases {
            let shown = String::from_utf8_lossy(data);
            assert_eq!(recognise(data), *expected, "{shown:?}");
            assert_eq!(bytewise(data), *expected, "{shown:?} bytewise");
        }
    }

    #[test]
    fn names_in_tls() {
        let name = Host::parse("api.example.com").expect("host");
        let ip = Host::parse("10.0.0.1").expect("host");
        assert!(name_matches(Some("API.example.com"), &name).is_ok());
        assert!(name_matches(Some("example.com"), &name).is_err());
        assert!(name_matches(None, &name).is_err());
        assert!(name_matches(None, &ip).is_ok());
        assert!(name_matches(Some("api.example.com"), &ip).is_err());
    }
}

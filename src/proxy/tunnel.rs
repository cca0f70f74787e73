//! After `200 Connection Established`, or instead of it for a connection that the gateway caught:
//! what is spoken in the tunnel, found from as many bytes as
//! it takes, and handled by what the grant says.
//!
//! Nothing is decided on one look at the first segment: a `ClientHello` is known by its first byte
//! and then read whole, an HTTP head is known once `HTTP/1.` stands where it must, and until then
//! every byte has to be one that such a head can have.

mod handshake;

use std::time::Duration;

use rustls::server::Acceptor;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::server::StartHandshake;

use handshake::{Both, Offer, mirror, terminate};

use super::http::head::{HEAD_TIMEOUT, REQUEST_MAX};
use super::http2::{self, Place, Upstream, Version};
use super::l7::judge::Scheme;
use super::l7::rest::{self, Link};
use super::listener::refuse;
use super::metrics;
use super::refusal::Refusal;
use super::report;
use super::standing::{Admitted, Doing};
use super::stream::{Conn, Stream};
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
pub(crate) async fn run(mut admitted: Admitted, mut client: Conn, tcp: TcpStream) {
    let mut upstream = Conn::new(Stream::Tcp(tcp)).counted(&metrics::DOWN);
    let dialled = admitted.session.generation();
    match known(&mut admitted, &mut client, &mut upstream).await {
        First::Tls => secured(admitted, client, upstream).await,
        first => {
            let upstream = (upstream, dialled);
            inner(admitted, client, upstream, Scheme::Http, first).await;
        }
    }
}

/// Waits until the client's first bytes say what they are. When the policy changes meanwhile, the
/// tunnel is judged again.
async fn known(admitted: &mut Admitted, client: &mut Conn, upstream: &mut Conn) -> First {
    let line = upstream.rd.line();
    loop {
        let inspect = admitted.origin.grant.inspect;
        let session = admitted.session.clone();
        tokio::select! {
            biased;
            () = session.outdated() => {
                if admitted.stays(Doing::Nothing, line.peer()).await.is_err() {
                    return First::Closed;
                }
            }
            first = first(client, upstream, inspect) => return first,
        }
    }
}

/// Handles what is not TLS, or what was found inside TLS.
/// The number beside `upstream` is that of the rules it was dialled under.
async fn inner(
    admitted: Admitted,
    client: Conn,
    (upstream, dialled): (Conn, u64),
    scheme: Scheme,
    first: First,
) {
    let Admitted { session, origin } = &admitted;
    match (first, origin.grant.inspect) {
        (First::Http, _) => {
            let link = Link::open(&admitted, scheme, upstream, dialled);
            rest::serve(admitted, client, link).await;
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
            http2::serve(admitted, place, client, upstream).await;
        }
        (First::Closed, _) => client.close().await,
        (First::Tls | First::Other | First::UpstreamSpoke, Inspect::None) => {
            raw(admitted, client, upstream, false).await;
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
    let mut greeted = false;
    loop {
        let begun = !client.rd.data().is_empty();
        if let Some(first) = recognise(client.rd.data()) {
            return first;
        }
        tokio::select! {
            biased;
            read = timeout(wait(begun), client.rd.fill()) => match read {
                Err(_) => return First::Silent,
                // It has nothing to say, and may want to hear what a server says first.
                Ok(Ok(0)) if !begun && inspect == Inspect::None => return First::Other,
                Ok(Ok(0) | Err(_)) => return First::Closed,
                Ok(Ok(_)) => {}
            },
            read = upstream.rd.fill(), if !begun && !greeted => match read {
                Ok(0) | Err(_) => return First::Closed,
                Ok(_) => match greets(upstream.rd.data()) {
                    // It waits for the client all the same.
                    Some(true) => greeted = true,
                    Some(false) => return First::UpstreamSpoke,
                    None => {}
                },
            },
        }
    }
}

/// Whether a server begins as those of HTTP/2 may, before the client has said that it speaks it:
/// with a SETTINGS frame on stream 0 that acknowledges nothing (RFC 9113, sections 3.4 and 6.5).
/// `None` when it takes more to tell.
fn greets(data: &[u8]) -> Option<bool> {
    const HEAD: [Option<u8>; 9] =
        [Some(0), Some(0), None, Some(4), Some(0), Some(0), Some(0), Some(0), Some(0)];
    let fits = data.iter().zip(HEAD).all(|(have, want)| want.is_none_or(|want| want == *have));
    if fits && data.len() < HEAD.len() { None } else { Some(fits) }
}

/// What `data` is the start of; `None` when it takes more to tell.
///
/// HTTP is what any server might take for it, not what is well formed: blanks and line breaks before
/// the request line, other blanks in it, a target of any bytes, all of it longer than we read. It is
/// then read strictly, and refused where it is not as it must be. Otherwise one odd byte, or many,
/// would take a request past the check of its `Host`. So would a `ClientHello` that is not looked into:
/// OpenSSL takes one in the form of SSL 2 for TLS 1.2 (RFC 5246, E.2).
///
/// However the bytes are split, what is said first of them is what is said of all.
pub(super) fn recognise(data: &[u8]) -> Option<First> {
    const H2_PREFACE: &[u8] = b"PRI * HTTP/2.0";
    match data {
        [] | [0x80..=0xbf] | [0x80..=0xbf, _] | [0x80..=0xbf, _, 1] => return None,
        [0x16, ..] | [0x80..=0xbf, _, 1, 3, ..] => return Some(First::Tls),
        _ => {}
    }
    let data = &data[..data.len().min(REQUEST_MAX + 1)];
    // HTTP/2 with prior knowledge.
    let preface = &H2_PREFACE[..data.len().min(H2_PREFACE.len())];
    if data.starts_with(preface) {
        return (preface.len() == H2_PREFACE.len()).then_some(First::Http2);
    }
    // What some servers part words by (RFC 9112, section 3).
    let blank = |byte: &u8| matches!(byte, b' ' | b'\t' | 0x0b | 0x0c | b'\r');
    // It could still become a request.
    let too_long = (data.len() > REQUEST_MAX).then_some(First::Http);
    let start = data.iter().position(|byte| !blank(byte) && *byte != b'\n');
    let Some(start) = start else { return too_long };
    let end = data[start..].iter().position(|byte| *byte == b'\n').map(|end| start + end);
    let line = &data[start..end.unwrap_or(data.len())];
    let method = line.split(blank).next().unwrap_or_default();
    let token = |byte: &u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(byte);
    if !method.iter().all(token) {
        return Some(First::Other);
    }
    let version = |word: &[u8]| word.len() >= 5 && word[..5].eq_ignore_ascii_case(b"HTTP/");
    if line.split(blank).skip(1).any(version) {
        return Some(First::Http);
    }
    // A line without a version ends here.
    if end.is_some() { Some(First::Other) } else { too_long }
}

/// Copies both ways until both ends are done.
async fn raw(mut admitted: Admitted, mut client: Conn, mut upstream: Conn, skipped: bool) {
    rest::copy(&mut admitted, &mut client, &mut upstream, skipped).await;
}

/// Reads the `ClientHello`, checks its name, and terminates TLS or, where the grant says so,
/// passes it through.
async fn secured(admitted: Admitted, mut client: Conn, upstream: Conn) {
    let Admitted { session, origin } = &admitted;
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
        return raw(admitted, client, upstream, true).await;
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
        Some(place) if both.agent == Version::Http2 => streams(admitted, place, both).await,
        // Given back: the two agreed on something else.
        place => {
            drop(place);
            inside(admitted, both).await;
        }
    }
}

/// Serves streams.
async fn streams(admitted: Admitted, place: Place, both: Both) {
    let upstream = match both.upstream {
        Ok((conn, version)) => Upstream::open(Scheme::Https, version, conn),
        // Told in the answer to the first request.
        Err(error) => Upstream::failed(Scheme::Https, error),
    };
    http2::serve(admitted, place, both.client, upstream).await;
}

/// Serves whatever else is found inside.
async fn inside(mut admitted: Admitted, both: Both) {
    let mut client = both.client;
    match both.upstream {
        Ok((mut upstream, _)) => {
            let dialled = admitted.session.generation();
            let first = known(&mut admitted, &mut client, &mut upstream).await;
            inner(admitted, client, (upstream, dialled), Scheme::Https, first).await;
        }
        // Told in the answer to the first request.
        Err(error) => {
            let link = Link::failed(&admitted.origin, Scheme::Https, error);
            rest::serve(admitted, client, link).await;
        }
    }
}

/// Reads the whole `ClientHello`, from however many segments and records, and leaves its bytes in
/// the reader. `None`: the client is gone.
pub(super) async fn client_hello(
    client: &mut Conn,
) -> Result<Option<rustls::server::Accepted>, String> {
    let mut hello = Hello::default();
    let deadline = tokio::time::Instant::now() + HANDSHAKE;
    loop {
        match hello.read(client.rd.data()) {
            Ok(Some(accepted)) => return Ok(Some(accepted)),
            Ok(None) => {}
            Err((reason, alert)) => {
                if !alert.is_empty() {
                    let _ = client.send(&alert).await;
                }
                return Err(reason);
            }
        }
        match tokio::time::timeout_at(deadline, client.rd.fill()).await {
            Ok(Ok(0) | Err(_)) => return Ok(None),
            Ok(Ok(_)) => {}
            Err(_) => return Err("ClientHello not completed in time".to_owned()),
        }
    }
}

/// A `ClientHello` as far as it has come.
#[derive(Default)]
struct Hello {
    acceptor: Acceptor,
    /// How many bytes of the connection the acceptor has.
    fed: usize,
}

impl Hello {
    /// Takes what is new in `data`, all that has come so far. `None`: it takes more. Otherwise why
    /// it is refused, and what to tell the client, which may be nothing.
    fn read(&mut self, data: &[u8]) -> Result<Option<rustls::server::Accepted>, (String, Vec<u8>)> {
        while self.fed < data.len() {
            let mut rest = &data[self.fed..];
            match self.acceptor.read_tls(&mut rest) {
                Ok(read) if read > 0 => self.fed += read,
                _ => return Err(("ClientHello not understood".to_owned(), Vec::new())),
            }
        }
        match self.acceptor.accept() {
            Ok(None) if self.fed > HELLO_MAX => {
                Err(("ClientHello is too long".to_owned(), Vec::new()))
            }
            Ok(accepted) => Ok(accepted),
            Err((error, mut alert)) => {
                let mut bytes = Vec::new();
                // Writing to a Vec cannot fail.
                let _ = alert.write_all(&mut bytes);
                Err((format!("ClientHello refused: {error}"), bytes))
            }
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
mod fuzz;

#[cfg(test)]
mod tests {
    use super::*;

    /// What is said of `data` when it arrives one byte after the other.
    fn bytewise(data: &[u8]) -> Option<First> {
        (1..=data.len()).find_map(|end| recognise(&data[..end]))
    }

    #[test]
    fn recognised_alike_however_it_is_split() {
        let breaks = vec![b'\n'; REQUEST_MAX + 1];
        let endless = format!("GET /{}", "a".repeat(REQUEST_MAX)).into_bytes();
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
            (b" GET / HTTP/1.1", Some(First::Http)),
            (b"GET\x0b/\x0cHTTP/1.1", Some(First::Http)),
            (b"GET\r/\rHTTP/1.1", Some(First::Http)),
            (b"\nquit\n", Some(First::Other)),
            (b"ABCDEFGHIJKLMNOPQRSTUVWXYZABCDEFGHIJ", None),
            (b"ABCDEFGHIJKLMNOPQRSTUVWXYZABCDEFGHIJ / HTTP/", Some(First::Http)),
            (b"ABCDEFGHIJKLMNOPQRSTUVWXYZABCDEFGHIJ\n", Some(First::Other)),
            // A ClientHello in the form of SSL 2, for TLS 1.2, and what is none.
            (&[0x80, 0x3a], None),
            (&[0x80, 0x3a, 1, 3, 3], Some(First::Tls)),
            (&[0x83, 0x3a, 1, 0, 2], Some(First::Other)),
            (&[0x80, 0x3a, 4, 3, 3], Some(First::Other)),
            (&[0xff, 0xfd, 1], Some(First::Other)),
            (&breaks[1..], None),
            (&breaks, Some(First::Http)),
            (&endless, Some(First::Http)),
        ];
        for (data, expected) in cases {
            let shown = String::from_utf8_lossy(data);
            assert_eq!(recognise(data), *expected, "{shown:?}");
            assert_eq!(bytewise(data), *expected, "{shown:?} bytewise");
        }
    }

    #[test]
    fn servers_that_greet_in_http2() {
        let settings = [0, 0, 18, 4, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 100];
        assert_eq!(greets(&settings), Some(true));
        for end in 1..9 {
            assert_eq!(greets(&settings[..end]), None);
        }
        for other in [&b"220 hello\r\n"[..], b"SSH-2.0-x\r\n", b"\0\0\0\x05\0", b"\x4a\0\0\0\x0a"] {
            assert_eq!(greets(other), Some(false), "{other:?}");
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

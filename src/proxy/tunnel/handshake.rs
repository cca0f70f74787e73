//! The two handshakes of a tunnel that is terminated, and what the two ends agree to speak.

use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::server::StartHandshake;

use super::{ALERT_INTERNAL_ERROR, HANDSHAKE, alert};
use crate::policy::Inspect;
use crate::proxy::destination::{DialError, Origin};
use crate::proxy::http2::{Version, version_of};
use crate::proxy::metrics::{self, Side};
use crate::proxy::report;
use crate::proxy::session::Session;
use crate::proxy::stream::{Conn, Stream};
use crate::proxy::tls::{HTTP2, HTTP10, HTTP11};

/// What the client offers by ALPN.
pub(super) struct Offer {
    pub(super) all: Vec<Vec<u8>>,
    pub(super) http2: bool,
    pub(super) http1: Option<&'static [u8]>,
}

impl Offer {
    pub(super) fn new(all: Vec<Vec<u8>>) -> Self {
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
pub(super) struct Both {
    pub(super) client: Conn,
    /// What the client was told to speak.
    pub(super) agent: Version,
    pub(super) upstream: Result<(Conn, Version), DialError>,
}

/// Both handshakes at once, for a client that speaks HTTP/1.1, or does not say what it speaks.
/// `None`: the client's failed.
pub(super) async fn terminate(
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
        session.upstream_tls().connect(upstream, &origin.host, &offer),
    );
    let client = accepted(session, origin, agent)?;
    let upstream = upstream.map(|(stream, _)| (Conn::new(stream), Version::Http1));
    Some(Both { client, agent: Version::Http1, upstream })
}

/// For a client that speaks HTTP/2, or only other protocols: the upstream chooses first, then the
/// client is told.
pub(super) async fn mirror(
    session: &Session,
    start: StartHandshake<TcpStream>,
    upstream: TcpStream,
    origin: &Origin,
    offer: &Offer,
) -> Option<Both> {
    let whole = origin.grant.inspect == Inspect::None;
    let tls = session.upstream_tls();
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

#[cfg(test)]
mod tests {
    use super::*;

    fn offer(names: &[&str]) -> Offer {
        Offer::new(names.iter().map(|name| name.as_bytes().to_vec()).collect())
    }

    #[test]
    fn what_the_upstream_is_offered() {
        let rows: [(&[&str], bool, &[&str]); 6] = [
            (&["h2", "http/1.1"], false, &["h2", "http/1.1"]),
            (&["h2"], false, &["h2", "http/1.1"]),
            (&["h2"], true, &["h2", "http/1.1"]),
            (&["imap", "h2"], false, &["h2", "http/1.1"]),
            (&["imap", "h2"], true, &["imap", "h2"]),
            (&["imap"], true, &["imap"]),
        ];
        for (names, whole, expected) in rows {
            let expected: Vec<_> = expected.iter().map(|name| name.as_bytes().to_vec()).collect();
            assert_eq!(offer(names).to_upstream(whole), expected, "{names:?} {whole}");
        }
    }

    #[test]
    fn what_the_client_is_told() {
        let rows: [(&[&str], Option<&str>, Option<&str>); 8] = [
            (&["h2", "http/1.1"], Some("h2"), Some("h2")),
            (&["h2", "http/1.1"], Some("http/1.1"), Some("http/1.1")),
            (&["h2", "http/1.1"], None, Some("http/1.1")),
            (&["h2"], Some("http/1.1"), Some("h2")),
            (&["h2"], None, Some("h2")),
            (&["imap", "h2"], Some("imap"), Some("imap")),
            (&["imap"], Some("imap"), Some("imap")),
            (&["imap"], None, None),
        ];
        for (names, agreed, expected) in rows {
            let offer = offer(names);
            let told = offer.to_client(agreed.map(str::as_bytes));
            assert_eq!(told, expected.map(str::as_bytes), "{names:?} {agreed:?}");
        }
    }
}

//! TLS towards upstreams.

use std::fs::File;
use std::sync::Arc;

use rustls::pki_types::ServerName;
use rustls::{AlertDescription, ClientConfig};
use tokio::net::TcpStream;
use tokio::sync::OnceCell;
use tokio_rustls::TlsConnector;

use super::destination::DialError;
use super::metrics::{self, Side};
use super::stream::Stream;
use super::tls::{HTTP2, HTTP11};
use super::wire::Wire;
use super::{report, roots};
use crate::pki::provider;
use crate::policy::Host;

/// How long a handshake may take.
const HANDSHAKE_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(10);

/// Verifies and speaks to upstreams. The authorities are parsed when the first one is needed.
pub(crate) struct UpstreamTls {
    image_roots: Option<Arc<File>>,
    extra_roots_pem: Vec<u8>,
    configs: OnceCell<Configs>,
}

/// With and without the protocols' names; sessions are shared.
struct Configs {
    http: Arc<ClientConfig>,
    http2: Arc<ClientConfig>,
    bare: Arc<ClientConfig>,
}

impl UpstreamTls {
    pub(crate) fn new(image_roots: Option<Arc<File>>, extra_roots_pem: Vec<u8>) -> Self {
        Self { image_roots, extra_roots_pem, configs: OnceCell::new() }
    }

    /// Whether these are its authorities beside the public ones and the image's.
    pub(crate) fn trusts(&self, extra_roots_pem: &[u8]) -> bool {
        self.extra_roots_pem == extra_roots_pem
    }

    /// Does the handshake for `host`, offering `alpn` (none: without the extension), and says
    /// which protocol was agreed on.
    pub(crate) async fn connect(
        &self,
        tcp: TcpStream,
        host: &Host,
        alpn: &[Vec<u8>],
    ) -> Result<(Stream, Option<Vec<u8>>), DialError> {
        let configs = self.configs().await.map_err(|error| DialError::Tls(error.to_string()))?;
        let config = match alpn {
            [] => Arc::clone(&configs.bare),
            [one] if one == HTTP11 => Arc::clone(&configs.http),
            [one, other] if one == HTTP2 && other == HTTP11 => Arc::clone(&configs.http2),
            several => {
                let mut config = ClientConfig::clone(&configs.bare);
                config.alpn_protocols = several.to_vec();
                Arc::new(config)
            }
        };
        let name = match host.ip() {
            Some(ip) => ServerName::from(ip),
            None => ServerName::try_from(host.as_str().to_owned())
                .map_err(|_| DialError::Tls("the name cannot be in a certificate".to_owned()))?,
        };
        let handshake = TlsConnector::from(config).connect(name, Wire::new(tcp));
        let ended = tokio::time::timeout(HANDSHAKE_TIMEOUT, handshake).await;
        metrics::handshake(Side::Upstream, matches!(ended, Ok(Ok(_))));
        let stream = ended
            .map_err(|_| DialError::Timeout("TLS handshake".to_owned()))?
            .map_err(|error| DialError::Tls(describe(&error, alpn)))?;
        let agreed = stream.get_ref().1.alpn_protocol().map(<[u8]>::to_vec);
        Ok((Stream::Upstream(Box::new(stream)), agreed))
    }

    async fn configs(&self) -> Result<&Configs, rustls::Error> {
        self.configs
            .get_or_try_init(|| async {
                let image = self.image_roots.clone();
                let extra = self.extra_roots_pem.clone();
                // A millisecond or two of parsing: not on a thread that serves.
                let parsed =
                    tokio::task::spawn_blocking(move || roots::store(image.as_deref(), &extra))
                        .await;
                let (store, unread) =
                    parsed.map_err(|error| rustls::Error::General(error.to_string()))?;
                if unread > 0 {
                    report::unread_roots(unread);
                }
                let bare = ClientConfig::builder_with_provider(provider())
                    .with_safe_default_protocol_versions()?
                    .with_root_certificates(store)
                    .with_no_client_auth();
                let speaking = |protocols: &[&[u8]]| {
                    let mut config = bare.clone();
                    config.alpn_protocols = protocols.iter().map(|one| one.to_vec()).collect();
                    Arc::new(config)
                };
                let (http, http2) = (speaking(&[HTTP11]), speaking(&[HTTP2, HTTP11]));
                Ok(Configs { http, http2, bare: Arc::new(bare) })
            })
            .await
    }
}

/// What went wrong, in words that say what to do where the two cannot agree on a protocol.
fn describe(error: &std::io::Error, offered: &[Vec<u8>]) -> String {
    let alert = rustls::Error::AlertReceived(AlertDescription::NoApplicationProtocol);
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    if inner == Some(&alert) && matches!(offered, [one] if one == HTTP11) {
        return "the upstream does not speak HTTP/1.1, and this client speaks nothing else".into();
    }
    error.to_string()
}

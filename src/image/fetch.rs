//! One look-up at one registry, as one identity: index, manifest and configuration.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::path::Path;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use oci_client::client::{Certificate, CertificateEncoding, ClientConfig, ClientProtocol};
use oci_client::errors::OciDistributionError;
use oci_client::manifest::{self, ImageIndexEntry, OciImageManifest, OciManifest};
use oci_client::secrets::RegistryAuth;
use oci_client::{Client, Reference};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use sha2::{Digest as _, Sha256};
use tokio::io::AsyncWrite;

use super::document::{Plain, parse_config};
use super::error::judge;
use super::{Config, ImageError};

/// An image configuration past this many bytes is not one.
const MAX_CONFIG: usize = 4 << 20;
/// Registry clients kept, one an identity; each holds a connection pool and its tokens.
const CACHED_CLIENTS: usize = 32;
/// A client is given up after this, and with it the tokens it holds.
const CLIENT_LIFE: Duration = Duration::from_secs(600);
/// Images of one index that are read for one architecture, at most.
const MAX_ALIKE: usize = 4;
/// Kinds of manifests asked for.
const MANIFESTS: &[&str] = &[
    manifest::IMAGE_MANIFEST_MEDIA_TYPE,
    manifest::IMAGE_MANIFEST_LIST_MEDIA_TYPE,
    manifest::OCI_IMAGE_MEDIA_TYPE,
    manifest::OCI_IMAGE_INDEX_MEDIA_TYPE,
];

/// A failure of one attempt, before it is known whether another will do better.
#[derive(Debug, Clone)]
pub(super) enum Failure {
    Final(ImageError),
    Attempt { text: String, try_next: bool, retryable: bool, limited: bool },
}

impl From<super::cache::FetchDied> for Failure {
    fn from(died: super::cache::FetchDied) -> Self {
        Self::Final(died.into())
    }
}

/// The clients by which registries are asked.
pub(super) struct Fetcher {
    clients: Mutex<HashMap<[u8; 32], (Client, Instant)>>,
    /// Registries spoken to by plain HTTP.
    insecure: Vec<String>,
    extra_roots: Vec<Certificate>,
    /// The longest that a connection or an answer may take.
    limit: Duration,
}

impl Fetcher {
    /// `extra_roots_pem`: CAs beside the system's; an error when they do not parse.
    pub(super) fn new(
        insecure: Vec<String>,
        extra_roots_pem: &[u8],
        limit: Duration,
    ) -> Result<Self, ImageError> {
        let extra_roots = CertificateDer::pem_slice_iter(extra_roots_pem)
            .map(|certificate| match certificate {
                Ok(der) => {
                    Ok(Certificate { encoding: CertificateEncoding::Der, data: der.to_vec() })
                }
                Err(e) => Err(ImageError::NoTrust(format!("the additional CAs are not PEM: {e}"))),
            })
            .collect::<Result<_, _>>()?;
        Ok(Self { clients: Mutex::default(), insecure, extra_roots, limit })
    }

    /// The configuration of `image` for one architecture. Not bounded in time as a whole.
    pub(super) async fn fetch(
        &self,
        image: &Reference,
        architecture: &str,
        auth: &RegistryAuth,
        identity: [u8; 32],
    ) -> Result<Arc<Config>, Failure> {
        let client = self.client(identity)?;
        let (manifest, digest) = read_manifest(&client, image, auth).await?;
        let of_name = |config| Arc::new(Config { digest: Some(digest), ..config });
        let index = match manifest {
            OciManifest::Image(manifest) => {
                return read_config(&client, image, &manifest).await.map(of_name);
            }
            OciManifest::ImageIndex(index) => index,
        };
        let mut found: Option<Config> = None;
        let digests = fitting(&index.manifests, architecture);
        if digests.len() > MAX_ALIKE {
            return Err(broken("its index has too many images for one architecture"));
        }
        for digest in digests {
            let of_platform = image.clone_with_digest(digest);
            let (manifest, _) = read_manifest(&client, &of_platform, auth).await?;
            let OciManifest::Image(manifest) = manifest else {
                return Err(broken("an index within an index"));
            };
            let config = read_config(&client, image, &manifest).await?;
            if found.as_ref().is_some_and(|known| !known.is_fenced_like(&config)) {
                return Err(broken("its index has several images for one architecture"));
            }
            found = Some(config);
        }
        found.map(of_name).ok_or_else(|| {
            Failure::Final(ImageError::Platform {
                image: image.whole(),
                wanted: architecture.to_owned(),
                found: platforms(&index.manifests),
            })
        })
    }

    /// The client of one identity: credentials and tokens never meet those of another tenant.
    fn client(&self, identity: [u8; 32]) -> Result<Client, Failure> {
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        clients.retain(|_, (_, made)| now.duration_since(*made) < CLIENT_LIFE);
        if let Some((client, _)) = clients.get(&identity) {
            return Ok(client.clone());
        }
        if !system_trust_store_exists() {
            return Err(Failure::Final(ImageError::NoTrust(
                "this container has no CA certificates; mount a bundle and name it in SSL_CERT_FILE"
                    .to_owned(),
            )));
        }
        let client = Client::try_from(ClientConfig {
            protocol: ClientProtocol::HttpsExcept(self.insecure.clone()),
            extra_root_certificates: self.extra_roots.clone(),
            platform_resolver: None,
            connect_timeout: Some(self.limit),
            read_timeout: Some(self.limit),
            user_agent: concat!("ringfence/", env!("CARGO_PKG_VERSION")),
            ..ClientConfig::default()
        })
        .map_err(|_| {
            Failure::Final(ImageError::NoTrust("the additional CAs are not usable".to_owned()))
        })?;
        if clients.len() >= CACHED_CLIENTS {
            let oldest = clients.iter().min_by_key(|(_, (_, made))| *made).map(|(k, _)| *k);
            oldest.map(|key| clients.remove(&key));
        }
        clients.insert(identity, (client.clone(), now));
        Ok(client)
    }
}

fn attempt(error: &OciDistributionError) -> Failure {
    let verdict = judge(error);
    Failure::Attempt {
        text: verdict.text,
        try_next: verdict.try_next,
        retryable: verdict.retryable,
        limited: verdict.limited,
    }
}

/// The client library panics where the system has no certificate at all, so look first.
pub(super) fn system_trust_store_exists() -> bool {
    let named = |variable| std::env::var_os(variable).is_some_and(|p| Path::new(&p).exists());
    named("SSL_CERT_FILE")
        || named("SSL_CERT_DIR")
        || [
            "/etc/ssl/certs/ca-certificates.crt",
            "/etc/pki/tls/certs/ca-bundle.crt",
            "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
            "/etc/ssl/ca-bundle.pem",
            "/etc/ssl/cert.pem",
        ]
        .iter()
        .any(|path| Path::new(path).exists())
}

/// A failure that neither another credential nor another try mends.
fn broken(text: &str) -> Failure {
    Failure::Attempt { text: text.to_owned(), try_next: false, retryable: false, limited: false }
}

/// A manifest or index, and the digest of its bytes.
async fn read_manifest(
    client: &Client,
    image: &Reference,
    auth: &RegistryAuth,
) -> Result<(OciManifest, String), Failure> {
    let pulled = client.pull_manifest_raw(image, auth, MANIFESTS).await;
    let (bytes, _) = pulled.map_err(|error| attempt(&error))?;
    serde_json::from_slice::<Plain>(&bytes)
        .map_err(|_| broken("its manifest is not JSON, or has a field in another spelling"))?;
    let digest = Sha256::digest(&bytes).iter().fold("sha256:".to_owned(), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    });
    let asked = image.digest().filter(|asked| asked.starts_with("sha256:"));
    if asked.is_some_and(|asked| asked != digest) {
        return Err(broken("the registry answered with another image than the digest names"));
    }
    let manifest = serde_json::from_slice(&bytes)
        .map_err(|_| broken("the registry did not answer with an image"))?;
    Ok((manifest, digest))
}

async fn read_config(
    client: &Client,
    image: &Reference,
    manifest: &OciImageManifest,
) -> Result<Config, Failure> {
    let mut bytes = Bounded(Vec::new());
    let pulled = client.pull_blob(image, &manifest.config, &mut bytes).await;
    pulled.map_err(|error| attempt(&error))?;
    parse_config(&bytes.0).map_err(broken)
}

/// Digests of every image of an index that a runtime on linux and `architecture` may take: which
/// of several it takes depends on the runtime, none looks at annotations, and some know an
/// architecture by more names than one.
fn fitting(entries: &[ImageIndexEntry], architecture: &str) -> Vec<String> {
    let mut digests = Vec::new();
    for entry in entries {
        let Some(platform) = &entry.platform else { continue };
        let os = platform.os.to_string().to_ascii_lowercase();
        let named = platform.architecture.to_string().to_ascii_lowercase();
        let named = match named.as_str() {
            "x86_64" | "x86-64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        };
        let fits = matches!(os.as_str(), "" | "linux") && named == architecture;
        if fits && !digests.contains(&entry.digest) {
            digests.push(entry.digest.clone());
        }
    }
    digests
}

fn is_attestation(entry: &ImageIndexEntry) -> bool {
    entry
        .annotations
        .as_ref()
        .is_some_and(|annotations| annotations.contains_key("vnd.docker.reference.type"))
}

fn platforms(entries: &[ImageIndexEntry]) -> String {
    let names: Vec<String> = entries
        .iter()
        .filter(|entry| !is_attestation(entry))
        .filter_map(|entry| entry.platform.as_ref())
        .take(8)
        .map(|platform| format!("{}/{}", platform.os, platform.architecture))
        .collect();
    if names.is_empty() { "none".to_owned() } else { names.join(", ") }
}

/// Takes at most [`MAX_CONFIG`] bytes.
struct Bounded(Vec<u8>);

impl AsyncWrite for Bounded {
    fn poll_write(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        if self.0.len() + bytes.len() > MAX_CONFIG {
            return Poll::Ready(Err(std::io::ErrorKind::FileTooLarge.into()));
        }
        self.0.extend_from_slice(bytes);
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

//! The look-up itself: index, manifest and configuration, by each fitting credential in turn.

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

use super::cache::{Cache, Life};
use super::credentials::{Credential, auth_and_identity, matching};
use super::document::{Plain, parse_config};
use super::error::judge;
use super::permits::Permits;
use super::rest::Resting;
use super::{Attempt, Config, Given, ImageError, Mirrors, Providers};

/// An image configuration past this many bytes is not one.
const MAX_CONFIG: usize = 4 << 20;
/// Answers kept.
const CACHED_ANSWERS: usize = 2048;
/// Registry clients kept, one an identity; each holds a connection pool and its tokens.
const CACHED_CLIENTS: usize = 32;
/// A client is given up after this, and with it the tokens it holds.
const CLIENT_LIFE: Duration = Duration::from_secs(600);
/// Look-ups at once: a registry may send a manifest of any size, this bounds how many.
const CONCURRENT: usize = 16;
/// The same for one registry, so that one which hangs does not hold up the others.
const CONCURRENT_PER_REGISTRY: usize = 4;
/// A mirror that did not answer in time is left alone for so long.
const MIRROR_REST: Duration = Duration::from_secs(30);
/// A registry that limits the rate of requests is left alone for so long by whoever asked. Its own
/// `Retry-After` is not given out by the client library.
const LIMITED_REST: Duration = Duration::from_secs(20);
/// Images of one index that are read for one architecture, at most.
const MAX_ALIKE: usize = 4;
/// Kinds of manifests asked for.
const MANIFESTS: &[&str] = &[
    manifest::IMAGE_MANIFEST_MEDIA_TYPE,
    manifest::IMAGE_MANIFEST_LIST_MEDIA_TYPE,
    manifest::OCI_IMAGE_MEDIA_TYPE,
    manifest::OCI_IMAGE_INDEX_MEDIA_TYPE,
];
/// A mirror that has not answered by then, all tries together, is passed over: the registry itself
/// needs its time, too.
const MIRROR_LIMIT: Duration = Duration::from_secs(3);

/// How registries are reached.
#[derive(Debug, Clone)]
pub struct ImagesConfig {
    /// Images of which no registry is asked.
    pub given: Given,
    /// Where images of a registry are looked for first.
    pub mirrors: Mirrors,
    /// Credentials of the nodes, where a pull secret does not do.
    pub providers: Providers,
    /// Registries (`host[:port]`) spoken to by plain HTTP.
    pub insecure: Vec<String>,
    /// Additional CAs, PEM. The system's store is always used too.
    pub extra_roots_pem: Vec<u8>,
    /// How long the answer for a tag is good.
    pub tag_life: Duration,
    /// How long the answer for a digest is good.
    pub digest_life: Duration,
    /// How long a failure is remembered.
    pub failure_life: Duration,
    /// The longest a look-up runs, also when nobody waits for it any more.
    pub limit: Duration,
}

impl Default for ImagesConfig {
    fn default() -> Self {
        Self {
            given: Given::default(),
            mirrors: Mirrors::default(),
            providers: Providers::default(),
            insecure: Vec::new(),
            extra_roots_pem: Vec::new(),
            tag_life: Duration::from_secs(30),
            digest_life: Duration::from_secs(6 * 3600),
            failure_life: Duration::from_secs(3),
            limit: Duration::from_secs(20),
        }
    }
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct Key {
    image: String,
    identity: [u8; 32],
    architecture: String,
}

/// Reads image configurations, cached per tenant. Cheap to clone.
#[derive(Clone)]
pub struct Images {
    shared: Arc<Shared>,
}

struct Shared {
    cache: Cache<Key, Arc<Config>, Failure>,
    clients: Mutex<HashMap<[u8; 32], (Client, Instant)>>,
    config: ImagesConfig,
    extra_roots: Vec<Certificate>,
    running: Permits,
    /// Mirrors that did not answer in time, with the repository.
    resting: Resting<String>,
    /// Registries that want to be asked less, by those who asked.
    limited: Resting<(String, [u8; 32])>,
}

/// A failure of one attempt, before it is known whether another will do better.
#[derive(Debug, Clone)]
enum Failure {
    Final(ImageError),
    Attempt { text: String, try_next: bool, retryable: bool, limited: bool },
}

impl From<super::cache::FetchDied> for Failure {
    fn from(died: super::cache::FetchDied) -> Self {
        Self::Final(died.into())
    }
}

impl Images {
    /// Prepares the look-up; nothing is connected yet.
    ///
    /// # Errors
    /// When `extra_roots_pem` does not parse.
    pub fn new(config: ImagesConfig) -> Result<Self, ImageError> {
        let extra_roots = CertificateDer::pem_slice_iter(&config.extra_roots_pem)
            .map(|certificate| match certificate {
                Ok(der) => {
                    Ok(Certificate { encoding: CertificateEncoding::Der, data: der.to_vec() })
                }
                Err(e) => Err(ImageError::NoTrust(format!("the additional CAs are not PEM: {e}"))),
            })
            .collect::<Result<_, _>>()?;
        let shared = Shared {
            cache: Cache::new(CACHED_ANSWERS),
            clients: Mutex::default(),
            config,
            extra_roots,
            running: Permits::new(CONCURRENT, CONCURRENT_PER_REGISTRY),
            resting: Resting::default(),
            limited: Resting::default(),
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// The configuration of `image` on every one of `architectures` (as `kubernetes.io/arch` spells
    /// them), which must agree. Every fitting credential is tried, then those of the nodes, then
    /// anonymous access; first on the mirrors of its registry, then there.
    ///
    /// The caller bounds the time by dropping the future; what was begun goes on and serves the
    /// next caller.
    ///
    /// # Errors
    /// See [`ImageError`]; each names the image and what the author of the pod can do.
    pub async fn config(
        &self,
        image: &str,
        architectures: &[String],
        credentials: &[Credential],
    ) -> Result<Arc<Config>, ImageError> {
        let reference: Reference = image.parse().map_err(|e: oci_client::ParseError| {
            ImageError::Reference { image: image.to_owned(), reason: e.to_string() }
        })?;
        if let Some(config) = self.shared.config.given.find(image) {
            return Ok(config);
        }
        let mut found: Option<(&String, Arc<Config>)> = None;
        for architecture in architectures {
            let config = self.config_on(&reference, architecture, credentials).await?;
            let Some((first, known)) = &found else {
                found = Some((architecture, config));
                continue;
            };
            if !known.is_fenced_like(&config) {
                return Err(ImageError::Ambiguous {
                    image: image.to_owned(),
                    first: (*first).clone(),
                    second: architecture.clone(),
                });
            }
            if known.digest != config.digest {
                found = Some((first, Arc::new(Config { digest: None, ..(**known).clone() })));
            }
        }
        found.map(|(_, config)| config).ok_or_else(|| ImageError::Platform {
            image: image.to_owned(),
            wanted: "(no architecture)".to_owned(),
            found: "not read".to_owned(),
        })
    }

    async fn config_on(
        &self,
        image: &Reference,
        architecture: &str,
        credentials: &[Credential],
    ) -> Result<Arc<Config>, ImageError> {
        let mut tries = Tries::default();
        for mirror in self.shared.config.mirrors.of(image) {
            let host = mirror.registry();
            // By repository: whoever names an image that the mirror is slow to get holds up their own.
            let place = format!("{host}/{}", mirror.repository());
            if self.shared.resting.has(&place) {
                tries.failed(host.to_owned(), "not asked: it did not answer a moment ago");
                continue;
            }
            let asking = self.config_at(&mirror, true, architecture, credentials, &mut tries);
            // Whatever is wrong with a mirror, its registry may do better.
            match tokio::time::timeout(MIRROR_LIMIT, asking).await {
                Ok(Ok(Some(config))) => return Ok(config),
                Ok(Ok(None) | Err(_)) => {}
                Err(_) => {
                    tracing::warn!(
                        mirror = host,
                        "did not answer in time, and is left alone for a while"
                    );
                    self.shared.resting.begin(place, MIRROR_REST);
                    tries.failed(host.to_owned(), "it did not answer in time");
                }
            }
        }
        let found = self.config_at(image, false, architecture, credentials, &mut tries).await?;
        found.ok_or_else(|| ImageError::Registry {
            image: image.whole(),
            registry: image.registry().to_owned(),
            attempts: tries.attempts,
            retryable: tries.may_succeed_soon,
        })
    }

    /// The image by this name, by each fitting credential in turn; None where all of them failed, and
    /// `tries` tells how.
    async fn config_at(
        &self,
        image: &Reference,
        is_mirror: bool,
        architecture: &str,
        credentials: &[Credential],
        tries: &mut Tries,
    ) -> Result<Option<Arc<Config>>, ImageError> {
        let place = if is_mirror { format!("{}, ", image.registry()) } else { String::new() };
        for credential in matching(credentials, image) {
            let answer = self.attempt(image, architecture, Some(credential)).await;
            if let Some(done) = tries.judge(answer, format!("{place}{}", credential.source)) {
                return done;
            }
        }
        // A plugin takes its time: only where no secret of the pod did.
        for provider in self.shared.config.providers.of(image) {
            let given = match provider.credentials(image).await {
                Ok(given) => given,
                Err(failed) => {
                    tries.failed(format!("{place}{}", provider.source()), failed.0);
                    continue;
                }
            };
            for credential in matching(&given, image) {
                let answer = self.attempt(image, architecture, Some(credential)).await;
                if let Some(done) = tries.judge(answer, format!("{place}{}", credential.source)) {
                    return done;
                }
            }
        }
        let answer = self.attempt(image, architecture, None).await;
        tries.judge(answer, format!("{place}anonymously")).unwrap_or(Ok(None))
    }

    /// One try, from the cache where it is known.
    async fn attempt(
        &self,
        image: &Reference,
        architecture: &str,
        credential: Option<&Credential>,
    ) -> Result<Arc<Config>, Failure> {
        let (auth, identity) = auth_and_identity(credential);
        let key = Key { image: image.whole(), identity, architecture: architecture.to_owned() };
        let (shared, image) = (Arc::clone(&self.shared), image.clone());
        let architecture = architecture.to_owned();
        self.shared
            .cache
            .get(key, || async move {
                let answer = shared.bounded(&image, &architecture, &auth, identity).await;
                let life = match (&answer, image.digest()) {
                    (Err(_), _) => shared.config.failure_life,
                    (Ok(_), Some(_)) => shared.config.digest_life,
                    (Ok(_), None) => shared.config.tag_life,
                };
                (answer, Life(life))
            })
            .await
    }
}

/// What was tried, while it may go on.
#[derive(Default)]
struct Tries {
    attempts: Vec<Attempt>,
    may_succeed_soon: bool,
}

impl Tries {
    /// What comes of one try; None when the next one may do better.
    fn judge(
        &mut self,
        answer: Result<Arc<Config>, Failure>,
        with: String,
    ) -> Option<Result<Option<Arc<Config>>, ImageError>> {
        match answer {
            Ok(config) => Some(Ok(Some(config))),
            Err(Failure::Final(error)) => Some(Err(error)),
            Err(Failure::Attempt { text, try_next, retryable, .. }) => {
                self.attempts.push(Attempt { with, outcome: text });
                self.may_succeed_soon |= retryable;
                (!try_next).then_some(Ok(None))
            }
        }
    }

    /// A credential that could not be had; it may be there soon.
    fn failed(&mut self, with: String, why: &str) {
        self.attempts.push(Attempt { with, outcome: why.to_owned() });
        self.may_succeed_soon = true;
    }
}

impl Shared {
    async fn bounded(
        &self,
        image: &Reference,
        architecture: &str,
        auth: &RegistryAuth,
        identity: [u8; 32],
    ) -> Result<Arc<Config>, Failure> {
        let limit = self.config.limit;
        let late = |text: &str| Failure::Attempt {
            text: text.to_owned(),
            try_next: false,
            retryable: true,
            limited: false,
        };
        let asker = (image.registry().to_ascii_lowercase(), identity);
        if self.limited.has(&asker) {
            return Err(late("not asked: the registry limits the rate of requests"));
        }
        let began = tokio::time::Instant::now();
        // Shorter than the 10 s that the API server waits, so that the author of the pod is told.
        let turn = began + limit * 2 / 5;
        let _turn = tokio::time::timeout_at(turn, self.running.turn(image.registry()))
            .await
            .map_err(|_| late("not asked: the look-ups before this one wait for other answers"))?;
        let fetch = self.fetch(image, architecture, auth, identity);
        let answer = tokio::time::timeout_at(began + limit, fetch)
            .await
            .unwrap_or_else(|_| Err(late("the registry did not answer in time")));
        if matches!(answer, Err(Failure::Attempt { limited: true, .. })) {
            self.limited.begin(asker, LIMITED_REST);
        }
        answer
    }

    async fn fetch(
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
            protocol: ClientProtocol::HttpsExcept(self.config.insecure.clone()),
            extra_root_certificates: self.extra_roots.clone(),
            platform_resolver: None,
            connect_timeout: Some(self.config.limit),
            read_timeout: Some(self.config.limit),
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
fn system_trust_store_exists() -> bool {
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

#[cfg(test)]
#[path = "registry_tests.rs"]
mod tests;

//! A look-up: where an image is looked for and with which credentials, one after the other, and how
//! long one waits for it.

use std::sync::Arc;
use std::time::Duration;

use oci_client::Reference;
use oci_client::secrets::RegistryAuth;

use super::cache::{Cache, Life};
use super::credentials::{Credential, auth_and_identity, matching};
use super::fetch::{Failure, Fetcher};
use super::permits::Permits;
use super::rest::Resting;
use super::{Attempt, Config, Given, ImageError, Mirrors, Providers};

/// Answers kept.
const CACHED_ANSWERS: usize = 2048;
/// Look-ups at once: a registry may send a manifest of any size, this bounds how many.
const CONCURRENT: usize = 16;
/// The same for one registry, so that one which hangs does not hold up the others.
const CONCURRENT_PER_REGISTRY: usize = 4;
/// A mirror that did not answer in time is left alone for so long.
const MIRROR_REST: Duration = Duration::from_secs(30);
/// A registry that limits the rate of requests is left alone for so long by whoever asked. Its own
/// `Retry-After` is not given out by the client library.
const LIMITED_REST: Duration = Duration::from_secs(20);
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
    fetcher: Fetcher,
    config: ImagesConfig,
    running: Permits,
    /// Mirrors that did not answer in time, with the repository.
    resting: Resting<String>,
    /// Registries that want to be asked less, by those who asked.
    limited: Resting<(String, [u8; 32])>,
}

impl Images {
    /// Prepares the look-up; nothing is connected yet.
    ///
    /// # Errors
    /// When `extra_roots_pem` does not parse.
    pub fn new(config: ImagesConfig) -> Result<Self, ImageError> {
        let (insecure, roots) = (config.insecure.clone(), &config.extra_roots_pem);
        let fetcher = Fetcher::new(insecure, roots, config.limit)?;
        let shared = Shared {
            cache: Cache::new(CACHED_ANSWERS),
            fetcher,
            config,
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
        let fetch = self.fetcher.fetch(image, architecture, auth, identity);
        let answer = tokio::time::timeout_at(began + limit, fetch)
            .await
            .unwrap_or_else(|_| Err(late("the registry did not answer in time")));
        if matches!(answer, Err(Failure::Attempt { limited: true, .. })) {
            self.limited.begin(asker, LIMITED_REST);
        }
        answer
    }
}

#[cfg(test)]
mod tests;

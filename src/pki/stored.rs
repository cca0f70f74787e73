//! The Secret that holds the webhook's CAs: read and written through the API.
//!
//! A mounted Secret arrives up to 90 s late, after an update or on a new replica, and the API server
//! would meet a certificate that it does not trust. `tls.crt` and `tls.key` are the CA that signs;
//! `next.crt` and `next.key` the one that will; `previous.crt` those before, without their keys,
//! with a line each in `previous.until`: the second (Unix time) from which none is needed any more.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use crate::api_text::api_text;
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use kube::api::PostParams;
use kube::{Api, Client};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use sha2::{Digest as _, Sha256};

use super::plan::{Certified, Held, Previous};
use super::validity::{Validity, validity};
use super::{Authority, PkiError, authority, certificate_pem};

/// How long a new CA is valid unless told otherwise.
pub const CA_LIFE: Duration = Duration::from_secs(10 * 365 * 86_400);
/// The annotation of the Secret that asks for a rotation; any value but the empty one.
pub const ROTATE: &str = "ringfence.dev/rotate-ca";
/// The annotation that names the CA that signs: so a person sees a rotation without reading keys.
pub const CURRENT: &str = "ringfence.dev/current-ca";

/// Why there is no certificate to serve.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RotationError {
    /// The Secret could not be read or created.
    #[error("cannot {what} secret `{namespace}/{name}` for the webhook's CA: {}", api_text(.source))]
    Secret {
        /// `read`, `create` or `update`.
        what: &'static str,
        /// The release namespace.
        namespace: String,
        /// The Secret's name.
        name: String,
        /// What the API server answered.
        #[source]
        source: Box<kube::Error>,
    },
    /// The Secret holds something else.
    #[error(
        "secret `{namespace}/{name}` holds no CA of ringfence ({reason}); delete it, a new one is made"
    )]
    Unusable {
        /// The release namespace.
        namespace: String,
        /// The Secret's name.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Another replica wrote the Secret first: to be looked at again.
    #[error("secret `{0}` was changed meanwhile")]
    Changed(String),
    /// A key or certificate could not be made.
    #[error(transparent)]
    Pki(#[from] PkiError),
}

/// A CA of the Secret, with its key.
#[derive(Debug, Clone)]
pub struct Ca {
    authority: Arc<Authority>,
    validity: Validity,
}

impl Ca {
    /// A new one.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn make(life: Duration) -> Result<Self, PkiError> {
        Self::of(Authority::ephemeral("ringfence webhook CA", life)?)
    }

    /// One that exists.
    ///
    /// # Errors
    /// When its certificate does not say for how long it is valid.
    pub fn of(authority: Authority) -> Result<Self, PkiError> {
        let validity = validity(authority.certificate_der())
            .ok_or(PkiError::Stored("the certificate's validity cannot be read"))?;
        Ok(Self { authority: Arc::new(authority), validity })
    }

    /// What signs.
    #[must_use]
    pub fn authority(&self) -> &Authority {
        &self.authority
    }

    /// The beginning of its certificate's SHA-256: for people to tell CAs apart.
    #[must_use]
    pub fn mark(&self) -> String {
        let digest = Sha256::digest(self.authority.certificate_der());
        let head = digest.iter().take(8).fold(0u64, |head, byte| head << 8 | u64::from(*byte));
        format!("{head:016x}")
    }
}

impl Certified for Ca {
    fn pem(&self) -> &str {
        self.authority.certificate_pem()
    }

    fn issued(&self) -> SystemTime {
        self.validity.not_before + authority::BACKDATE.unsigned_abs()
    }

    fn expires(&self) -> SystemTime {
        self.validity.not_after
    }
}

/// The Secret as it was read: what it holds, and the version to write it back at.
#[derive(Debug, Clone)]
pub struct Stored {
    /// What it holds.
    pub held: Held<Ca>,
    secret: Secret,
}

impl Stored {
    /// Whether the Secret goes when `owner` does.
    #[must_use]
    pub fn is_owned_by(&self, owner: &OwnerReference) -> bool {
        self.secret.metadata.owner_references.iter().flatten().any(|known| known.uid == owner.uid)
    }

    /// The same, to go when `owner` does and with nobody else.
    #[must_use]
    pub fn owned_by(mut self, owner: OwnerReference) -> Self {
        self.secret.metadata.owner_references = Some(vec![owner]);
        self
    }
}

/// Where the Secret is.
#[derive(Debug, Clone)]
pub struct Store {
    api: Api<Secret>,
    namespace: String,
    name: String,
}

impl Store {
    /// The Secret `name` in `namespace`.
    #[must_use]
    pub fn new(client: &Client, namespace: &str, name: &str) -> Self {
        Self {
            api: Api::namespaced(client.clone(), namespace),
            namespace: namespace.to_owned(),
            name: name.to_owned(),
        }
    }

    /// What it holds; None when it is not there.
    ///
    /// # Errors
    /// When the API server refuses, or it holds something else.
    pub async fn read(&self) -> Result<Option<Stored>, RotationError> {
        let secret = self.api.get_opt(&self.name).await.map_err(self.failed("read"))?;
        secret.map(|secret| self.understand(secret)).transpose()
    }

    /// Makes the Secret with what `held` gives, unless another replica was faster.
    ///
    /// # Errors
    /// [`RotationError::Changed`] then; else when the API server refuses.
    pub async fn create(&self, held: &Held<Ca>) -> Result<(), RotationError> {
        let secret = fill(self.blank(), held);
        match self.api.create(&PostParams::default(), &secret).await {
            Ok(_) => Ok(()),
            Err(kube::Error::Api(status)) if status.is_already_exists() => Err(self.changed()),
            Err(source) => Err(self.failed("create")(source)),
        }
    }

    /// Writes `held` in place of what was read, if that is still what the Secret holds.
    ///
    /// # Errors
    /// [`RotationError::Changed`] when it is not; else when the API server refuses.
    pub async fn replace(&self, read: Stored, held: &Held<Ca>) -> Result<(), RotationError> {
        // With the version that was read in its metadata, which the API server compares.
        let secret = fill(read.secret, held);
        match self.api.replace(&self.name, &PostParams::default(), &secret).await {
            Ok(_) => Ok(()),
            Err(kube::Error::Api(status)) if status.is_conflict() || status.is_not_found() => {
                Err(self.changed())
            }
            Err(source) => Err(self.failed("update")(source)),
        }
    }

    /// Reads the CA, or makes one and stores it. Safe with several replicas at once: whoever creates
    /// the Secret first wins, the others read it.
    ///
    /// # Errors
    /// When the API server refuses, or the Secret holds something else.
    pub async fn load_or_create(&self, life: Duration) -> Result<Held<Ca>, RotationError> {
        if let Some(stored) = self.read().await? {
            return Ok(stored.held);
        }
        let held = Held::first(Ca::make(life)?);
        match self.create(&held).await {
            Ok(()) => Ok(held),
            Err(RotationError::Changed(name)) => {
                let stored = self.read().await?;
                stored.map(|stored| stored.held).ok_or(RotationError::Changed(name))
            }
            Err(error) => Err(error),
        }
    }

    fn blank(&self) -> Secret {
        let label = ("app.kubernetes.io/managed-by".to_owned(), "ringfence".to_owned());
        Secret {
            metadata: ObjectMeta {
                name: Some(self.name.clone()),
                labels: Some(BTreeMap::from([label])),
                ..ObjectMeta::default()
            },
            type_: Some("kubernetes.io/tls".to_owned()),
            ..Secret::default()
        }
    }

    fn understand(&self, secret: Secret) -> Result<Stored, RotationError> {
        let held = held(&secret).map_err(|reason| RotationError::Unusable {
            namespace: self.namespace.clone(),
            name: self.name.clone(),
            reason,
        })?;
        Ok(Stored { held, secret })
    }

    fn changed(&self) -> RotationError {
        RotationError::Changed(format!("{}/{}", self.namespace, self.name))
    }

    /// Names the Secret in an error of the API server.
    fn failed(&self, what: &'static str) -> impl FnOnce(kube::Error) -> RotationError {
        move |source| RotationError::Secret {
            what,
            namespace: self.namespace.clone(),
            name: self.name.clone(),
            source: Box::new(source),
        }
    }
}

/// The Secret with what `held` gives, and all else as it was.
fn fill(mut secret: Secret, held: &Held<Ca>) -> Secret {
    let mut set = |key: &str, text: String| {
        let data = secret.data.get_or_insert_default();
        if text.is_empty() {
            data.remove(key);
        } else {
            data.insert(key.to_owned(), ByteString(text.into_bytes()));
        }
    };
    let key_pem = |ca: &Ca| ca.authority.key_pem();
    set("tls.crt", held.current.pem().to_owned());
    set("tls.key", key_pem(&held.current));
    set("next.crt", held.next.as_ref().map(|next| next.pem().to_owned()).unwrap_or_default());
    set("next.key", held.next.as_ref().map(key_pem).unwrap_or_default());
    set("previous.crt", held.previous.iter().map(|previous| previous.pem.as_str()).collect());
    set("previous.until", held.previous.iter().map(until_line).collect());
    let annotations = secret.metadata.annotations.get_or_insert_default();
    annotations.insert(CURRENT.to_owned(), held.current.mark());
    if !held.requested {
        annotations.remove(ROTATE);
    }
    secret
}

fn until_line(previous: &Previous) -> String {
    let since = previous.until.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    format!("{}\n", since.as_secs())
}

/// What the Secret holds, or why that is not understood. Half of it is nothing: a bundle that lacks
/// one of its CAs refuses pods.
fn held(secret: &Secret) -> Result<Held<Ca>, String> {
    let text = |key: &str| -> Result<Option<&str>, String> {
        let bytes = secret.data.as_ref().and_then(|data| data.get(key));
        let text = |bytes: &'_ ByteString| std::str::from_utf8(&bytes.0).is_ok();
        match bytes {
            Some(bytes) if !text(bytes) => Err(format!("{key} is not text")),
            Some(bytes) => Ok(std::str::from_utf8(&bytes.0).ok()),
            None => Ok(None),
        }
    };
    let ca = |certificate: &str, key: &str| -> Result<Option<Ca>, String> {
        match (text(certificate)?, text(key)?) {
            (None, None) => Ok(None),
            (Some(_), None) => Err(format!("key {key} is missing")),
            (None, Some(_)) => Err(format!("key {certificate} is missing")),
            (Some(pem), Some(key_pem)) => Authority::load(pem, key_pem)
                .and_then(Ca::of)
                .map(Some)
                .map_err(|error| format!("{certificate}: {error}")),
        }
    };
    let current = ca("tls.crt", "tls.key")?.ok_or("key tls.crt is missing")?;
    let next = ca("next.crt", "next.key")?;
    let bad = |what: &str| format!("previous.{what} is not understood");
    let certificates: Vec<CertificateDer<'static>> =
        CertificateDer::pem_slice_iter(text("previous.crt")?.unwrap_or_default().as_bytes())
            .collect::<Result<_, _>>()
            .map_err(|_| bad("crt"))?;
    let mut roots = rustls::RootCertStore::empty();
    let mut previous = Vec::new();
    let mut lines = text("previous.until")?.unwrap_or_default().lines();
    for der in certificates {
        // What no verifier can read would spoil the whole bundle.
        roots.add(der.clone()).map_err(|_| bad("crt"))?;
        let seconds = lines.next().and_then(|line| line.parse().ok()).map(Duration::from_secs);
        let until = seconds.and_then(|seconds| SystemTime::UNIX_EPOCH.checked_add(seconds));
        let until = until.ok_or_else(|| bad("until"))?;
        previous.push(Previous { pem: certificate_pem(&der), until });
    }
    if lines.next().is_some() {
        return Err(bad("until"));
    }
    let annotations = secret.metadata.annotations.as_ref();
    let requested =
        annotations.and_then(|all| all.get(ROTATE)).is_some_and(|value| !value.is_empty());
    Ok(Held { current, next, previous, requested })
}

#[cfg(test)]
#[path = "stored/tests.rs"]
mod tests;

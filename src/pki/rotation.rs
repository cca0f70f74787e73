//! The webhook's own certificates: a CA in a Secret that all replicas share, and a leaf that each
//! keeps in memory and renews.
//!
//! The Secret is read through the API: a mounted one arrives up to 90 s late, after an update or on
//! a new replica, and the API server would meet a certificate that it does not trust. The leaf is
//! never stored. The CA is made once for ten years; replacing it is not automatic yet
//! (`docs/webhook.md` says how).

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use crate::api_text::api_text;
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::PostParams;
use kube::{Api, Client};
use rustls::pki_types::CertificateDer;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;

use super::{Authority, LeafKey, PkiError, SubjectName};

/// How long a new CA is valid.
pub const CA_LIFE: Duration = Duration::from_secs(10 * 365 * 86_400);
/// How long a leaf is valid unless told otherwise.
pub const LEAF_LIFE: Duration = Duration::from_secs(30 * 86_400);

/// Why there is no certificate to serve.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RotationError {
    /// The Secret could not be read or created.
    #[error("cannot {what} secret `{namespace}/{name}` for the webhook's CA: {}", api_text(.source))]
    Secret {
        /// `read` or `create`.
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
    /// A key or certificate could not be made.
    #[error(transparent)]
    Pki(#[from] PkiError),
}

/// Reads the CA from its Secret, or makes one and stores it.
///
/// Safe with several replicas at once: whoever creates the Secret first wins, the others read it.
///
/// # Errors
/// When the API server refuses, or the Secret holds something else.
pub async fn load_or_create(
    client: &Client,
    namespace: &str,
    name: &str,
) -> Result<Authority, RotationError> {
    let api: Api<Secret> = Api::namespaced(client.clone(), namespace);
    let failed = |what| secret_failed(what, namespace, name);
    if let Some(secret) = api.get_opt(name).await.map_err(failed("read"))? {
        return authority_of(&secret, namespace, name);
    }
    let authority = Authority::ephemeral("ringfence webhook CA", CA_LIFE)?;
    match api.create(&PostParams::default(), &secret_for(&authority, name)).await {
        Ok(_) => Ok(authority),
        Err(kube::Error::Api(status)) if status.is_already_exists() => {
            let secret = api.get(name).await.map_err(failed("read"))?;
            authority_of(&secret, namespace, name)
        }
        Err(source) => Err(failed("create")(source)),
    }
}

/// What the Secret held, compared with the CA in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stored {
    /// The same CA.
    Same,
    /// Nothing: it was gone, and holds the same CA again now.
    Restored,
    /// Another CA. What is served here is not to be trusted any more: load it and start again.
    Another,
}

/// Compares the Secret with the CA that `serving` signs with, and makes the Secret again when it is
/// gone.
///
/// To be asked before the CA is published. Replicas that each publish the CA in their memory would
/// undo each other's work for ever once they differ; the Secret is what decides between them.
///
/// # Errors
/// When the API server refuses, or the Secret holds something that is no CA: then no other replica
/// can have loaded another one from it.
pub async fn keep_stored(
    client: &Client,
    namespace: &str,
    name: &str,
    serving: &Serving,
) -> Result<Stored, RotationError> {
    let api: Api<Secret> = Api::namespaced(client.clone(), namespace);
    let failed = |what| secret_failed(what, namespace, name);
    let stored = match api.get_opt(name).await.map_err(failed("read"))? {
        Some(secret) => secret,
        None => {
            match api.create(&PostParams::default(), &secret_for(&serving.authority, name)).await {
                Ok(_) => return Ok(Stored::Restored),
                Err(kube::Error::Api(status)) if status.is_already_exists() => {
                    api.get(name).await.map_err(failed("read"))?
                }
                Err(source) => return Err(failed("create")(source)),
            }
        }
    };
    let authority = authority_of(&stored, namespace, name)?;
    let same = authority.certificate_der() == serving.authority.certificate_der();
    Ok(if same { Stored::Same } else { Stored::Another })
}

/// Names the Secret in an error of the API server.
fn secret_failed(
    what: &'static str,
    namespace: &str,
    name: &str,
) -> impl FnOnce(kube::Error) -> RotationError {
    move |source| RotationError::Secret {
        what,
        namespace: namespace.to_owned(),
        name: name.to_owned(),
        source: Box::new(source),
    }
}

fn secret_for(authority: &Authority, name: &str) -> Secret {
    let text = |text: &str| ByteString(text.as_bytes().to_vec());
    Secret {
        metadata: ObjectMeta {
            name: Some(name.to_owned()),
            labels: Some(BTreeMap::from([(
                "app.kubernetes.io/managed-by".to_owned(),
                "ringfence".to_owned(),
            )])),
            ..ObjectMeta::default()
        },
        type_: Some("kubernetes.io/tls".to_owned()),
        data: Some(BTreeMap::from([
            ("tls.crt".to_owned(), text(authority.certificate_pem())),
            ("tls.key".to_owned(), text(&authority.key_pem())),
        ])),
        ..Secret::default()
    }
}

fn authority_of(secret: &Secret, namespace: &str, name: &str) -> Result<Authority, RotationError> {
    let unusable = |reason: String| RotationError::Unusable {
        namespace: namespace.to_owned(),
        name: name.to_owned(),
        reason,
    };
    let text = |key: &str| {
        let bytes = secret.data.as_ref().and_then(|data| data.get(key));
        let bytes = bytes.ok_or_else(|| unusable(format!("key {key} is missing")))?;
        std::str::from_utf8(&bytes.0).map_err(|_| unusable(format!("{key} is not text")))
    };
    Authority::load(text("tls.crt")?, text("tls.key")?).map_err(|e| unusable(e.to_string()))
}

/// The certificate a replica serves; give it to rustls as its resolver.
pub struct Serving {
    authority: Authority,
    names: Vec<SubjectName>,
    life: Duration,
    current: RwLock<Current>,
}

struct Current {
    key: Arc<CertifiedKey>,
    not_after: SystemTime,
    renew_at: SystemTime,
}

impl std::fmt::Debug for Serving {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Serving").field("names", &self.names).finish_non_exhaustive()
    }
}

impl Serving {
    /// Signs the first leaf for the Service `service` in `namespace`; the API server verifies
    /// `<service>.<namespace>.svc`.
    ///
    /// # Errors
    /// When the leaf cannot be signed.
    pub fn new(
        authority: Authority,
        service: &str,
        namespace: &str,
        life: Duration,
    ) -> Result<Self, PkiError> {
        let names: Vec<SubjectName> = [
            format!("{service}.{namespace}.svc"),
            format!("{service}.{namespace}.svc.cluster.local"),
            format!("{service}.{namespace}"),
            service.to_owned(),
        ]
        .map(SubjectName::Dns)
        .into();
        let current = RwLock::new(sign(&authority, &names, life)?);
        Ok(Self { authority, names, life, current })
    }

    /// The CA that clients have to trust.
    #[must_use]
    pub fn ca_pem(&self) -> &str {
        self.authority.certificate_pem()
    }

    /// What is served now, leaf first.
    #[must_use]
    pub fn chain(&self) -> Vec<CertificateDer<'static>> {
        self.current.read().unwrap_or_else(PoisonError::into_inner).key.cert.clone()
    }

    /// When the served leaf expires.
    #[must_use]
    pub fn not_after(&self) -> SystemTime {
        self.current.read().unwrap_or_else(PoisonError::into_inner).not_after
    }

    /// Signs a new leaf when two thirds of the old one's life are over; true when it did.
    ///
    /// # Errors
    /// When the leaf cannot be signed; the old one stays.
    pub fn renew_if_due(&self, now: SystemTime) -> Result<bool, PkiError> {
        if now < self.current.read().unwrap_or_else(PoisonError::into_inner).renew_at {
            return Ok(false);
        }
        let fresh = sign(&self.authority, &self.names, self.life)?;
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = fresh;
        Ok(true)
    }
}

fn sign(authority: &Authority, names: &[SubjectName], life: Duration) -> Result<Current, PkiError> {
    // The clock is read before signing, so that the certificate outlives what is said of it.
    let now = SystemTime::now();
    let key = Arc::new(authority.leaf(names, life, &LeafKey::generate()?)?);
    Ok(Current { key, not_after: now + life, renew_at: now + life * 2 / 3 })
}

impl ResolvesServerCert for Serving {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner).key))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pki::ca_bundle::verify;

    fn serving(life: Duration) -> Serving {
        let authority = Authority::ephemeral("test CA", CA_LIFE).expect("an authority");
        Serving::new(authority, "hook", "release", life).expect("a leaf")
    }

    /// An API server that knows one Secret, and what was posted to it.
    fn api(stored: Option<Secret>) -> (Client, Arc<RwLock<Option<Secret>>>) {
        let state = Arc::new(RwLock::new(stored));
        let shared = Arc::clone(&state);
        let service = tower::service_fn(move |request: axum::http::Request<kube::client::Body>| {
            let shared = Arc::clone(&shared);
            async move {
                let (head, body) = request.into_parts();
                if head.method == axum::http::Method::POST {
                    let bytes = body.collect_bytes().await?;
                    let secret = serde_json::from_slice(&bytes)?;
                    *shared.write().unwrap_or_else(PoisonError::into_inner) = Some(secret);
                }
                let secret = shared.read().unwrap_or_else(PoisonError::into_inner).clone();
                let (code, answer) = match secret {
                    Some(secret) => (200, serde_json::to_value(secret)?),
                    None => (
                        404,
                        serde_json::json!({ "kind": "Status", "apiVersion": "v1",
                        "status": "Failure", "reason": "NotFound", "code": 404,
                        "message": "secrets \"ca\" not found" }),
                    ),
                };
                let body = kube::client::Body::from(answer.to_string().into_bytes());
                Ok::<_, Box<dyn std::error::Error + Send + Sync>>(
                    axum::http::Response::builder().status(code).body(body)?,
                )
            }
        });
        (Client::new(service, "ns"), state)
    }

    #[tokio::test]
    async fn the_secret_decides_and_is_made_again_when_it_is_gone() {
        let serving = serving(LEAF_LIFE);
        let (client, state) = api(None);
        let ask = || keep_stored(&client, "ns", "ca", &serving);
        assert_eq!(ask().await.expect("made again"), Stored::Restored);
        assert_eq!(ask().await.expect("there"), Stored::Same);
        let restored = state.read().expect("no poison").clone().expect("a secret");
        let restored = authority_of(&restored, "ns", "ca").expect("a CA with its key");
        assert_eq!(restored.certificate_pem(), serving.ca_pem());

        let other = Authority::ephemeral("test CA", CA_LIFE).expect("an authority");
        *state.write().expect("no poison") = Some(secret_for(&other, "ca"));
        assert_eq!(ask().await.expect("a CA"), Stored::Another);
        *state.write().expect("no poison") = Some(Secret::default());
        assert!(matches!(ask().await, Err(RotationError::Unusable { .. })));
    }

    #[test]
    fn the_leaf_verifies_for_the_name_the_api_server_uses() {
        let serving = serving(LEAF_LIFE);
        let ca = serving.ca_pem().as_bytes();
        verify(ca, &serving.chain(), "hook.release.svc").expect("verifies");
        verify(ca, &serving.chain(), "hook.other.svc").expect_err("another name");
    }

    #[test]
    fn the_leaf_is_renewed_at_two_thirds_of_its_life() {
        let life = Duration::from_secs(3000);
        let serving = serving(life);
        let first = serving.chain();
        let now = SystemTime::now();
        assert!(!serving.renew_if_due(now + Duration::from_secs(1900)).expect("not due"));
        assert_eq!(serving.chain(), first);
        assert!(serving.renew_if_due(now + Duration::from_secs(2100)).expect("due"));
        assert_ne!(serving.chain(), first);
        verify(serving.ca_pem().as_bytes(), &serving.chain(), "hook.release.svc")
            .expect("verifies");
    }

    #[test]
    fn a_stored_ca_is_read_back_and_anything_else_is_refused_with_a_remedy() {
        let authority = Authority::ephemeral("test CA", CA_LIFE).expect("an authority");
        let mut secret = secret_for(&authority, "ca");
        let again = authority_of(&secret, "ns", "ca").expect("reads back");
        assert_eq!(again.certificate_pem(), authority.certificate_pem());
        secret.data = Some(BTreeMap::from([("tls.crt".to_owned(), ByteString(b"x".to_vec()))]));
        let error = authority_of(&secret, "ns", "ca").expect_err("not a CA").to_string();
        assert!(error.contains("ns/ca") && error.contains("delete it"), "{error}");
    }
}

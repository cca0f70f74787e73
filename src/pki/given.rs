//! A serving certificate that somebody else made: a Secret of type `kubernetes.io/tls`, as
//! cert-manager or a person writes it.
//!
//! It is read through the API, like the Secret of a CA of our own: a mounted one arrives up to 90 s
//! late, and a new CA would be in `caBundle` long before. What cannot be served is told here, by
//! whoever wrote it: cause, and how to mend it.

use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::SystemTime;

use k8s_openapi::api::core::v1::Secret;
use k8s_openapi::jiff::Timestamp;
use kube::{Api, Client};
use rustls::client::verify_server_name;
use rustls::pki_types::pem::{self, PemObject as _};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::{ClientHello, ParsedCertificate, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{CertificateError, InconsistentKeys};

use super::validity::validity;
use crate::api_text::api_text;

const CERTIFICATE: &str = "tls.crt";
const KEY: &str = "tls.key";

/// Why what the Secret holds cannot be served.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Unfit {
    /// The Secret lacks one of the two.
    #[error(
        "it has no key {0}; make it by `kubectl create secret tls` from a certificate and its key"
    )]
    Missing(&'static str),
    /// `tls.crt` is something else.
    #[error(
        "tls.crt {0}; put PEM certificates there: the server's first, then the intermediate CAs"
    )]
    Certificate(String),
    /// `tls.key` is something else.
    #[error(
        "tls.key {0}; put an unencrypted PEM private key there (RSA of 2048 bits or more, ECDSA, Ed25519)"
    )]
    Key(String),
    /// The two do not belong together.
    #[error(
        "tls.key is not the key of the first certificate in tls.crt; put the two there that were made together, the server's certificate before those of CAs"
    )]
    Mismatch,
    /// Its time is over.
    #[error("the certificate expired at {0}; renew it")]
    Expired(Timestamp),
    /// Its time has not come.
    #[error(
        "the certificate is not valid before {0}; wait, or see that the clocks of its issuer and of this node agree"
    )]
    NotYet(Timestamp),
    /// It is somebody else's.
    #[error(
        "the certificate is for {names}, and API servers ask for {wanted}; issue it with the DNS name {wanted} in subjectAltName"
    )]
    Name {
        /// The name that API servers verify.
        wanted: String,
        /// Those it has.
        names: String,
    },
}

/// Why there is no certificate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GivenError {
    /// The API server refused.
    #[error("cannot read secret `{place}` for the serving certificate: {}", api_text(.source))]
    Read {
        /// Namespace and name.
        place: String,
        /// What the API server answered.
        #[source]
        source: Box<kube::Error>,
    },
    /// There is none.
    #[error(
        "secret `{place}` for the serving certificate does not exist; whoever issues the certificate has to write it there, as type kubernetes.io/tls"
    )]
    Absent {
        /// Namespace and name.
        place: String,
    },
    /// It holds nothing that can be served.
    #[error("the certificate in secret `{place}` cannot be served: {why}")]
    Unfit {
        /// Namespace and name.
        place: String,
        /// What is wrong with it.
        why: Unfit,
    },
}

/// A certificate and its key, fit to be served for one name.
#[derive(Clone)]
pub struct Pair {
    key: Arc<CertifiedKey>,
    not_after: SystemTime,
}

impl fmt::Debug for Pair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pair").field("not_after", &self.not_after).finish_non_exhaustive()
    }
}

impl Pair {
    /// Reads PEM: the certificates with the server's first, and its key. Whether API servers trust
    /// it is not looked at: `caBundle` says that.
    ///
    /// # Errors
    /// It could not be served for `server_name` at `now`.
    pub fn read(
        certificates: &[u8],
        key: &[u8],
        server_name: &str,
        now: SystemTime,
    ) -> Result<Self, Unfit> {
        let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(certificates)
            .collect::<Result<_, _>>()
            // The library's text could quote what it read, and that may be the key, by mistake.
            .map_err(|_| Unfit::Certificate("is not PEM".into()))?;
        let leaf =
            chain.first().ok_or_else(|| Unfit::Certificate("holds no certificate".into()))?;
        let key = PrivateKeyDer::from_pem_slice(key).map_err(|error| {
            Unfit::Key(match error {
                pem::Error::NoItemsFound => "holds no private key that is not encrypted".into(),
                _ => "is not PEM".into(),
            })
        })?;
        let unread = || Unfit::Certificate("does not begin with an X.509 v3 certificate".into());
        let parsed = ParsedCertificate::try_from(leaf).map_err(|_| unread())?;
        let valid = validity(leaf).ok_or_else(unread)?;
        let made = CertifiedKey::from_der(chain.clone(), key, &super::provider());
        let made = made.map_err(|error| match error {
            rustls::Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => Unfit::Mismatch,
            rustls::Error::InvalidCertificate(_) => unread(),
            error => Unfit::Key(format!("cannot be used ({error})")),
        })?;
        let at = |instant: SystemTime| Timestamp::try_from(instant).unwrap_or_default();
        if now > valid.not_after {
            return Err(Unfit::Expired(at(valid.not_after)));
        }
        if now < valid.not_before {
            return Err(Unfit::NotYet(at(valid.not_before)));
        }
        is_for(&parsed, server_name)?;
        Ok(Self { key: Arc::new(made), not_after: valid.not_after })
    }

    /// The certificates, the server's first.
    #[must_use]
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.key.cert
    }

    /// When the server's certificate expires.
    #[must_use]
    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }
}

fn is_for(certificate: &ParsedCertificate<'_>, wanted: &str) -> Result<(), Unfit> {
    let name = ServerName::try_from(wanted.to_owned());
    let checked = name.map(|name| verify_server_name(certificate, &name));
    let names = match checked {
        Ok(Ok(())) => return Ok(()),
        Ok(Err(rustls::Error::InvalidCertificate(CertificateError::NotValidForNameContext {
            presented,
            ..
        }))) => presented,
        _ => Vec::new(),
    };
    // The library writes them as it has them in memory: DnsName("a.b").
    let bare = |name: &String| name.split('"').nth(1).unwrap_or(name).to_owned();
    let names: Vec<String> = names.iter().take(8).map(bare).collect();
    let names = if names.is_empty() { "no name".to_owned() } else { names.join(", ") };
    Err(Unfit::Name { wanted: wanted.to_owned(), names })
}

/// What is served now; give it to rustls as its resolver.
#[derive(Debug)]
pub struct Given(RwLock<Pair>);

impl Given {
    /// Serves `pair` first.
    #[must_use]
    pub fn new(pair: Pair) -> Self {
        Self(RwLock::new(pair))
    }

    /// What is served now.
    #[must_use]
    pub fn now(&self) -> Pair {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Serves `pair` from now on.
    pub fn serve(&self, pair: Pair) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = pair;
    }
}

impl ResolvesServerCert for Given {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.now().key)
    }
}

/// Where the Secret is.
#[derive(Debug, Clone)]
pub struct Source {
    api: Api<Secret>,
    place: String,
    name: String,
    server_name: String,
}

impl Source {
    /// The Secret `name` in `namespace`; API servers verify `server_name`.
    #[must_use]
    pub fn new(client: &Client, namespace: &str, name: &str, server_name: &str) -> Self {
        Self {
            api: Api::namespaced(client.clone(), namespace),
            place: format!("{namespace}/{name}"),
            name: name.to_owned(),
            server_name: server_name.to_owned(),
        }
    }

    /// What it holds now.
    ///
    /// # Errors
    /// It cannot be read, is not there, or holds nothing that can be served.
    pub async fn read(&self) -> Result<Pair, GivenError> {
        let place = || self.place.clone();
        let found = self.api.get_opt(&self.name).await;
        let found = found
            .map_err(|source| GivenError::Read { place: place(), source: Box::new(source) })?
            .ok_or_else(|| GivenError::Absent { place: place() })?;
        let data = found.data.unwrap_or_default();
        let part = |key: &'static str| {
            data.get(key).map(|bytes| bytes.0.as_slice()).ok_or(Unfit::Missing(key))
        };
        let pair = part(CERTIFICATE).and_then(|certificates| {
            Pair::read(certificates, part(KEY)?, &self.server_name, SystemTime::now())
        });
        pair.map_err(|why| GivenError::Unfit { place: place(), why })
    }
}

#[cfg(test)]
#[path = "given/tests.rs"]
mod tests;

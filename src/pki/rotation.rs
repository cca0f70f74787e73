//! The leaf that a replica of the webhook serves: in memory only, renewed at two thirds of its life,
//! and signed anew when another CA is current.

use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use rustls::pki_types::CertificateDer;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;

use super::plan::Certified as _;
use super::stored::Ca;
pub use super::stored::{CA_LIFE, RotationError};
use super::{Authority, LeafKey, PkiError, SubjectName};

/// How long a leaf is valid unless told otherwise.
pub const LEAF_LIFE: Duration = Duration::from_secs(30 * 86_400);

/// The certificate a replica serves; give it to rustls as its resolver.
pub struct Serving {
    names: Vec<SubjectName>,
    life: Duration,
    current: RwLock<Current>,
}

struct Current {
    ca: Ca,
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
    /// `<service>.<namespace>.svc`. No leaf is valid for longer than `life`, nor than its CA.
    ///
    /// # Errors
    /// When the leaf cannot be signed.
    pub fn new(
        authority: Authority,
        service: &str,
        namespace: &str,
        life: Duration,
    ) -> Result<Self, PkiError> {
        Self::by(Ca::of(authority)?, service, namespace, life)
    }

    /// The same by a CA of the Secret.
    ///
    /// # Errors
    /// When the leaf cannot be signed.
    pub fn by(ca: Ca, service: &str, namespace: &str, life: Duration) -> Result<Self, PkiError> {
        let names: Vec<SubjectName> = [
            format!("{service}.{namespace}.svc"),
            format!("{service}.{namespace}.svc.cluster.local"),
            format!("{service}.{namespace}"),
            service.to_owned(),
        ]
        .map(SubjectName::Dns)
        .into();
        let current = RwLock::new(sign(ca, &names, life)?);
        Ok(Self { names, life, current })
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, Current> {
        self.current.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// The CA that signed what is served, PEM.
    #[must_use]
    pub fn ca_pem(&self) -> String {
        self.read().ca.pem().to_owned()
    }

    /// What is served now, leaf first.
    #[must_use]
    pub fn chain(&self) -> Vec<CertificateDer<'static>> {
        self.read().key.cert.clone()
    }

    /// When the served leaf expires.
    #[must_use]
    pub fn not_after(&self) -> SystemTime {
        self.read().not_after
    }

    /// When two thirds of the served leaf's life are over.
    #[must_use]
    pub fn renew_at(&self) -> SystemTime {
        self.read().renew_at
    }

    /// Signs a new leaf when two thirds of the old one's life are over; true when it did.
    ///
    /// # Errors
    /// When the leaf cannot be signed; the old one stays.
    pub fn renew_if_due(&self, now: SystemTime) -> Result<bool, PkiError> {
        let ca = {
            let current = self.read();
            if now < current.renew_at {
                return Ok(false);
            }
            current.ca.clone()
        };
        let fresh = sign(ca.clone(), &self.names, self.life)?;
        let mut current = self.current.write().unwrap_or_else(PoisonError::into_inner);
        // Another CA may have come in between; its leaf is the right one.
        let same = current.ca.pem() == ca.pem();
        if same {
            *current = fresh;
        }
        Ok(same)
    }

    /// Serves a leaf by `ca` from now on. Only for a CA that API servers trust already.
    ///
    /// # Errors
    /// When the leaf cannot be signed; the old one stays.
    pub fn sign_by(&self, ca: &Ca) -> Result<(), PkiError> {
        let fresh = sign(ca.clone(), &self.names, self.life)?;
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = fresh;
        Ok(())
    }
}

fn sign(ca: Ca, names: &[SubjectName], life: Duration) -> Result<Current, PkiError> {
    // The clock is read before signing, so that the certificate outlives what is said of it.
    let now = SystemTime::now();
    // The API server takes no leaf by a CA that has expired; our own check would.
    let life = life.min(ca.expires().duration_since(now).unwrap_or_default());
    let key = Arc::new(ca.authority().leaf(names, life, &LeafKey::generate()?)?);
    Ok(Current { ca, key, not_after: now + life, renew_at: now + life * 2 / 3 })
}

impl ResolvesServerCert for Serving {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.read().key))
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

    #[test]
    fn the_leaf_verifies_for_the_name_the_api_server_uses() {
        let serving = serving(LEAF_LIFE);
        let ca = serving.ca_pem();
        verify(ca.as_bytes(), &serving.chain(), "hook.release.svc").expect("verifies");
        verify(ca.as_bytes(), &serving.chain(), "hook.other.svc").expect_err("another name");
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
    fn another_ca_of_the_same_name_signs_and_both_verify_against_the_bundle_of_both() {
        let serving = serving(LEAF_LIFE);
        let (old_ca, old) = (serving.ca_pem(), serving.chain());
        let new = Ca::of(Authority::ephemeral("test CA", CA_LIFE).expect("made")).expect("a CA");
        serving.sign_by(&new).expect("signed");
        assert_eq!(serving.ca_pem(), new.pem());
        verify(old_ca.as_bytes(), &serving.chain(), "hook.release.svc").expect_err("the old CA");
        for bundle in [format!("{old_ca}{}", new.pem()), format!("{}{old_ca}", new.pem())] {
            for chain in [&old, &serving.chain()] {
                verify(bundle.as_bytes(), chain, "hook.release.svc").expect("verifies");
            }
        }
    }

    #[test]
    fn no_leaf_outlives_its_ca() {
        let ca = |seconds| Ca::make(Duration::from_secs(seconds)).expect("a CA");
        let serving = Serving::by(ca(600), "hook", "release", LEAF_LIFE).expect("a leaf");
        assert!(serving.not_after() <= SystemTime::now() + Duration::from_secs(600));
        serving.sign_by(&ca(0)).expect("an expired leaf is signed, and not taken");
        assert!(serving.not_after() <= SystemTime::now());
    }
}

//! One certificate authority: made in memory or loaded, signs leaves on demand.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use rcgen::string::Ia5String;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PublicKeyData, SanType,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::sign::CertifiedKey;
use time::OffsetDateTime;

/// How far before now a certificate becomes valid: clocks of nodes and of images differ.
pub(super) const BACKDATE: time::Duration = time::Duration::hours(24);

/// The longest common name X.509 allows, in characters (RFC 5280, ub-common-name).
const COMMON_NAME_MAX: usize = 64;

/// Why a certificate or key could not be made or read.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// Key generation, encoding or signing failed.
    #[error("certificate for {name}: {source}")]
    Sign {
        /// Whose certificate.
        name: String,
        /// What rcgen said.
        source: rcgen::Error,
    },
    /// A private key could not be used.
    #[error("private key: {0}")]
    Key(String),
    /// A stored authority could not be read.
    #[error("stored authority: {0}")]
    Stored(&'static str),
    /// A validity that no certificate can express.
    #[error("validity of {0:?} is out of range")]
    Validity(Duration),
}

/// A name a leaf is valid for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SubjectName {
    /// A DNS name in A-label form.
    Dns(String),
    /// An address literal.
    Ip(IpAddr),
}

impl fmt::Display for SubjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Dns(name) => f.write_str(name),
            Self::Ip(ip) => ip.fmt(f),
        }
    }
}

/// The key that leaves carry. One serves many leaves: making a leaf is then one signature.
pub struct LeafKey {
    pair: KeyPair,
    signer: Arc<dyn rustls::sign::SigningKey>,
}

impl fmt::Debug for LeafKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LeafKey(..)")
    }
}

impl LeafKey {
    /// A fresh P-256 key.
    pub fn generate() -> Result<Self, PkiError> {
        Self::from_pair(generate("a leaf")?)
    }

    /// A key stored as PKCS#8 PEM.
    pub fn from_pem(pem: &str) -> Result<Self, PkiError> {
        Self::from_pair(pair_from_pem(pem)?)
    }

    /// The key as PKCS#8 PEM, to be stored in a Secret and nowhere else.
    #[must_use]
    pub fn key_pem(&self) -> String {
        self.pair.serialize_pem()
    }

    fn from_pair(pair: KeyPair) -> Result<Self, PkiError> {
        let der = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(pair.serialized_der()));
        let signer = rustls::crypto::aws_lc_rs::sign::any_ecdsa_type(&der)
            .map_err(|error| PkiError::Key(error.to_string()))?;
        Ok(Self { pair, signer })
    }
}

/// A certificate authority with its key.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    der: CertificateDer<'static>,
    pem: String,
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authority").field("pem", &self.pem).finish_non_exhaustive()
    }
}

impl Authority {
    /// A new authority whose key has never been anywhere but in this process.
    pub fn ephemeral(common_name: &str, valid: Duration) -> Result<Self, PkiError> {
        let pair = generate(common_name)?;
        let mut params = authority_params(common_name);
        (params.not_before, params.not_after) = validity(valid)?;
        let certificate = params
            .self_signed(&pair)
            .map_err(|source| PkiError::Sign { name: common_name.to_owned(), source })?;
        Ok(Self {
            pem: certificate_pem(certificate.der()),
            der: certificate.der().clone(),
            issuer: Issuer::new(params, pair),
        })
    }

    /// An authority stored earlier by [`Authority::certificate_pem`] and [`Authority::key_pem`].
    ///
    /// Only certificates of the shape that [`Authority::ephemeral`] makes are taken (a subject
    /// of one common name): others come from someone else and are refused. The key must be the
    /// certificate's.
    pub fn load(cert_pem: &str, key_pem: &str) -> Result<Self, PkiError> {
        let der = CertificateDer::from_pem_slice(cert_pem.as_bytes())
            .map_err(|_| PkiError::Stored("no certificate in the PEM text"))?;
        let pair = pair_from_pem(key_pem)?;
        // rustls' own parser finds the two fields that matter.
        let mut store = rustls::RootCertStore::empty();
        store
            .add(der.clone())
            .map_err(|_| PkiError::Stored("the certificate cannot be parsed as an authority"))?;
        let anchor = store.roots.first().ok_or(PkiError::Stored("no certificate"))?;
        if !pair.subject_public_key_info().ends_with(&anchor.subject_public_key_info) {
            return Err(PkiError::Stored("the key does not belong to the certificate"));
        }
        let name = common_name(&anchor.subject)
            .ok_or(PkiError::Stored("the subject is not one common name"))?;
        let issuer = Issuer::new(authority_params(name), pair);
        Ok(Self { pem: certificate_pem(&der), der, issuer })
    }

    /// The certificate as PEM, ending in a newline.
    #[must_use]
    pub fn certificate_pem(&self) -> &str {
        &self.pem
    }

    /// The certificate as DER.
    #[must_use]
    pub fn certificate_der(&self) -> &CertificateDer<'static> {
        &self.der
    }

    /// The key as PKCS#8 PEM: for the webhook's Secret. The sandbox CA's is never asked for.
    #[must_use]
    pub fn key_pem(&self) -> String {
        self.issuer.key().serialize_pem()
    }

    /// Signs a server certificate for `names`, valid from a day ago until `valid` from now.
    pub fn leaf(
        &self,
        names: &[SubjectName],
        valid: Duration,
        key: &LeafKey,
    ) -> Result<CertifiedKey, PkiError> {
        let first = names.first().map(ToString::to_string).unwrap_or_default();
        let failed = |source| PkiError::Sign { name: first.clone(), source };
        let mut params = CertificateParams::default();
        (params.not_before, params.not_after) = validity(valid)?;
        params.distinguished_name = DistinguishedName::new();
        if !first.is_empty() && first.len() <= COMMON_NAME_MAX {
            params.distinguished_name.push(DnType::CommonName, first.as_str());
        }
        params.subject_alt_names = names
            .iter()
            .map(|name| {
                Ok(match name {
                    SubjectName::Dns(name) => SanType::DnsName(Ia5String::try_from(name.as_str())?),
                    SubjectName::Ip(ip) => SanType::IpAddress(*ip),
                })
            })
            .collect::<Result<_, rcgen::Error>>()
            .map_err(failed)?;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        // Strict verifiers (Python 3.13's default) want to see who issued it.
        params.use_authority_key_identifier_extension = true;
        let certificate = params.signed_by(&key.pair, &self.issuer).map_err(failed)?;
        Ok(CertifiedKey::new(vec![certificate.der().clone()], Arc::clone(&key.signer)))
    }
}

/// A certificate as PEM, ending in a newline.
#[must_use]
pub fn certificate_pem(der: &CertificateDer<'_>) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut pem = String::with_capacity(der.len() * 3 / 2 + 64);
    pem.push_str("-----BEGIN CERTIFICATE-----\n");
    // 48 bytes make one line of 64 characters.
    for line in der.chunks(48) {
        for group in line.chunks(3) {
            let bits = group.iter().fold(0u32, |bits, byte| bits << 8 | u32::from(*byte))
                << (8 * (3 - group.len()));
            for index in 0..4 {
                let symbol = ALPHABET[(bits >> (18 - 6 * index) & 0x3f) as usize];
                pem.push(if index > group.len() { '=' } else { char::from(symbol) });
            }
        }
        pem.push('\n');
    }
    pem.push_str("-----END CERTIFICATE-----\n");
    pem
}

fn generate(name: &str) -> Result<KeyPair, PkiError> {
    KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)
        .map_err(|source| PkiError::Sign { name: name.to_owned(), source })
}

fn pair_from_pem(pem: &str) -> Result<KeyPair, PkiError> {
    KeyPair::from_pkcs8_pem_and_sign_algo(pem, &PKCS_ECDSA_P256_SHA256)
        .map_err(|error| PkiError::Key(error.to_string()))
}

fn authority_params(common_name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, common_name);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

fn validity(valid: Duration) -> Result<(OffsetDateTime, OffsetDateTime), PkiError> {
    let out_of_range = PkiError::Validity(valid);
    let now = OffsetDateTime::now_utc();
    let Ok(valid) = time::Duration::try_from(valid) else {
        return Err(out_of_range);
    };
    match (now.checked_sub(BACKDATE), now.checked_add(valid)) {
        (Some(from), Some(to)) => Ok((from, to)),
        _ => Err(out_of_range),
    }
}

/// The common name in a subject that consists of nothing else: SET { SEQUENCE { OID, string } },
/// with lengths below 128.
fn common_name(subject: &[u8]) -> Option<&str> {
    const ID: [u8; 5] = [0x06, 0x03, 0x55, 0x04, 0x03];
    fn inside(tag: u8, der: &[u8]) -> Option<&[u8]> {
        let [head, length, content @ ..] = der else {
            return None;
        };
        (*head == tag && *length < 0x80 && usize::from(*length) == content.len()).then_some(content)
    }
    let attribute = inside(0x30, inside(0x31, subject)?)?;
    let value = inside(0x0c, attribute.strip_prefix(&ID)?)?;
    std::str::from_utf8(value).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustls::client::WebPkiServerVerifier;
    use rustls::client::danger::ServerCertVerifier as _;
    use rustls::pki_types::{ServerName, UnixTime};

    const DAY: Duration = Duration::from_secs(86_400);

    fn verify(authority: &Authority, leaf: &CertifiedKey, name: &str) -> Result<(), rustls::Error> {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(authority.certificate_der().clone())?;
        let verifier =
            WebPkiServerVerifier::builder_with_provider(Arc::new(roots), crate::pki::provider())
                .build()
                .map_err(|error| rustls::Error::General(error.to_string()))?;
        let name = ServerName::try_from(name.to_owned()).expect("test name");
        verifier.verify_server_cert(&leaf.cert[0], &[], &name, &[], UnixTime::now()).map(|_| ())
    }

    #[test]
    fn leaf_verifies_for_its_names_only() {
        let authority = Authority::ephemeral("Test CA", DAY).expect("authority");
        let key = LeafKey::generate().expect("key");
        let names = [
            SubjectName::Dns("api.example.com".into()),
            SubjectName::Ip("10.1.2.3".parse().expect("ip")),
        ];
        let leaf = authority.leaf(&names, DAY, &key).expect("leaf");
        verify(&authority, &leaf, "api.example.com").expect("dns name");
        verify(&authority, &leaf, "10.1.2.3").expect("address");
        verify(&authority, &leaf, "example.com").expect_err("another name");
        let other = Authority::ephemeral("Test CA", DAY).expect("authority");
        verify(&other, &leaf, "api.example.com").expect_err("another authority of that name");
    }

    #[test]
    fn a_name_longer_than_a_common_name_is_signed() {
        let authority = Authority::ephemeral("Test CA", DAY).expect("authority");
        let name = format!("{}.{}.example.com", "a".repeat(63), "b".repeat(63));
        let key = LeafKey::generate().expect("key");
        let leaf = authority.leaf(&[SubjectName::Dns(name.clone())], DAY, &key).expect("leaf");
        verify(&authority, &leaf, &name).expect("long name");
    }

    #[test]
    fn stored_authority_signs_what_the_first_one_vouches_for() {
        let first = Authority::ephemeral("Ringfence CA", DAY).expect("authority");
        let again = Authority::load(first.certificate_pem(), &first.key_pem()).expect("load");
        assert_eq!(first.certificate_der(), again.certificate_der());
        let key = LeafKey::from_pem(&LeafKey::generate().expect("key").key_pem()).expect("key");
        let leaf = again.leaf(&[SubjectName::Dns("svc.ns".into())], DAY, &key).expect("leaf");
        verify(&first, &leaf, "svc.ns").expect("verified by the first");
    }

    #[test]
    fn stored_authority_with_another_key_is_refused() {
        let first = Authority::ephemeral("Ringfence CA", DAY).expect("authority");
        let second = Authority::ephemeral("Ringfence CA", DAY).expect("authority");
        let error = Authority::load(first.certificate_pem(), &second.key_pem()).expect_err("key");
        assert!(error.to_string().contains("does not belong"), "{error}");
    }

    #[test]
    fn pem_is_read_back_for_every_padding() {
        for length in 1..=100u8 {
            let der = CertificateDer::from((0..length).collect::<Vec<u8>>());
            let pem = certificate_pem(&der);
            assert_eq!(CertificateDer::from_pem_slice(pem.as_bytes()).expect("pem"), der);
        }
    }

    #[test]
    fn debug_shows_no_key() {
        let authority = Authority::ephemeral("Test CA", DAY).expect("authority");
        let shown = format!("{authority:?} {:?}", LeafKey::generate().expect("key"));
        assert!(!shown.contains("PRIVATE"), "{shown}");
    }
}

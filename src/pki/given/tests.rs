use std::time::Duration;

use super::*;
use crate::pki::ca_bundle::verify;
use crate::pki::{Authority, LeafKey, SubjectName, certificate_pem};

const NAME: &str = "hook.release.svc";
const DAY: Duration = Duration::from_secs(86_400);

/// A certificate for `name` and its key, PEM.
fn issued(by: &Authority, name: &str, life: Duration) -> (String, String) {
    let key = LeafKey::generate().expect("a key");
    let leaf = by.leaf(&[SubjectName::Dns(name.into())], life, &key).expect("a leaf");
    (certificate_pem(&leaf.cert[0]), key.key_pem())
}

fn read(certificates: &str, key: &str) -> Result<Pair, Unfit> {
    Pair::read(certificates.as_bytes(), key.as_bytes(), NAME, SystemTime::now())
}

fn authority() -> Authority {
    Authority::ephemeral("somebody's CA", DAY * 365).expect("an authority")
}

#[test]
fn what_fits_is_served_and_verifies_against_its_own_ca() {
    let ca = authority();
    let (certificate, key) = issued(&ca, NAME, DAY);
    let pair = read(&certificate, &key).expect("fits");
    verify(ca.certificate_pem().as_bytes(), pair.chain(), NAME).expect("trusted");
    let left = pair.not_after().duration_since(SystemTime::now()).expect("in the future");
    assert!(left <= DAY && left + Duration::from_secs(600) > DAY, "{left:?}");
    let given = Given::new(pair);
    let (certificate, key) = issued(&ca, NAME, DAY * 2);
    given.serve(read(&certificate, &key).expect("fits"));
    assert_eq!(certificate_pem(&given.now().chain()[0]), certificate);
}

#[test]
fn what_does_not_fit_says_what_and_how_to_mend_it() {
    let ca = authority();
    let (certificate, key) = issued(&ca, NAME, DAY);
    let (of_another, _) = issued(&ca, "other.release.svc", DAY);
    let (_, other_key) = issued(&ca, NAME, DAY);
    let with_ca_first = format!("{}{certificate}", ca.certificate_pem());
    let encrypted =
        "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n";
    let broken = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
    for (certificate, key, words) in [
        ("", &*key, ["tls.crt holds no certificate", "put PEM certificates there"]),
        ("-----BEGIN CERTIFICATE-----\n", &key, ["tls.crt", "put PEM certificates there"]),
        (broken, &key, ["X.509 v3", "put PEM certificates there"]),
        (&certificate, "", ["tls.key holds no private key", "put an unencrypted PEM"]),
        (&certificate, encrypted, ["tls.key holds no private key", "not encrypted"]),
        (&certificate, &other_key, ["tls.key is not the key", "made together"]),
        (&with_ca_first, &key, ["tls.key is not the key", "before those of CAs"]),
    ] {
        let error = read(certificate, key).expect_err("does not fit").to_string();
        assert!(words.iter().all(|word| error.contains(word)), "{words:?} in {error}");
    }
    let key_of_another = issued(&ca, "other.release.svc", DAY);
    let error = read(&key_of_another.0, &key_of_another.1).expect_err("another name").to_string();
    assert!(error.contains("is for other.release.svc,") && error.contains(NAME), "{error}");
    assert!(!of_another.is_empty());
}

#[test]
fn its_time_is_looked_at() {
    let (certificate, key) = issued(&authority(), NAME, DAY);
    let at = |now| Pair::read(certificate.as_bytes(), key.as_bytes(), NAME, now);
    let now = SystemTime::now();
    at(now).expect("valid");
    // Leaves are dated back by a day.
    assert!(matches!(at(now - 2 * DAY), Err(Unfit::NotYet(_))));
    let error = at(now + 2 * DAY).expect_err("over");
    assert!(error.to_string().starts_with("the certificate expired at 2"), "{error}");
}

#[test]
fn neither_an_error_nor_debug_shows_a_key() {
    let (certificate, key) = issued(&authority(), NAME, DAY);
    let secret = key.lines().nth(1).expect("a line of the key").to_owned();
    let pair = read(&certificate, &key).expect("fits");
    // Swapped by mistake: the key is where everybody may look.
    let errors = [read(&key, &certificate), read(&certificate, &key.replace("PRIVATE", "SECRET"))];
    for error in errors {
        let error = error.expect_err("swapped");
        assert!(!format!("{error} {error:?}").contains(&secret), "{error}");
    }
    assert!(!format!("{pair:?} {:?}", Given::new(pair.clone())).contains(&secret));
}

#[test]
fn an_intermediate_is_sent_along() {
    use rcgen::{
        BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    };
    let ca_params = |name: &str| {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        params
    };
    let (root_key, middle_key) =
        (KeyPair::generate().expect("a key"), KeyPair::generate().expect("a key"));
    let root = ca_params("root").self_signed(&root_key).expect("a root");
    let root_issuer = Issuer::new(ca_params("root"), root_key);
    let middle = ca_params("middle").signed_by(&middle_key, &root_issuer).expect("signed");
    let middle_issuer = Issuer::new(ca_params("middle"), middle_key);
    let key = KeyPair::generate().expect("a key");
    let leaf = CertificateParams::new(vec![NAME.to_owned()]).expect("params");
    let leaf = leaf.signed_by(&key, &middle_issuer).expect("signed").pem();
    let key = key.serialize_pem();
    let alone = read(&leaf, &key).expect("fits");
    let whole = read(&format!("{leaf}{}", middle.pem()), &key).expect("fits");
    let bundle = root.pem();
    verify(bundle.as_bytes(), whole.chain(), NAME).expect("by way of the intermediate");
    let why = verify(bundle.as_bytes(), alone.chain(), NAME).expect_err("a link is missing");
    assert!(why.contains("intermediate CAs belong into tls.crt"), "{why}");
}

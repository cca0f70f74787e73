//! Which authorities upstreams are verified against.

use std::fs::File;

use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;

use super::bundle;

/// The authorities to verify upstreams against: the public ones, the image's and the operator's.
/// Certificates that cannot be read are left out, as TLS libraries do; the second value counts
/// them among the operator's, where one missing is a mistake.
pub(crate) fn store(image_roots: Option<&File>, extra_roots_pem: &[u8]) -> (RootCertStore, usize) {
    let mut store = RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() };
    // What cannot be read is one that is left out.
    let image_roots_pem =
        image_roots.and_then(|file| bundle::read(file, bundle::MAX_STORE).ok()).unwrap_or_default();
    store.add_parsable_certificates(
        CertificateDer::pem_slice_iter(&image_roots_pem).filter_map(Result::ok),
    );
    let mut unread = 0;
    for certificate in CertificateDer::pem_slice_iter(extra_roots_pem) {
        if certificate.map_or(true, |certificate| store.add(certificate).is_err()) {
            unread += 1;
        }
    }
    (store, unread)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    #[test]
    fn unreadable_roots_of_the_operator_are_counted() {
        let bad = "-----BEGIN CERTIFICATE-----\nQUJD\n-----END CERTIFICATE-----\n";
        let mut image = tempfile::tempfile().expect("a file");
        image.write_all(bad.as_bytes()).expect("written");
        let (store, unread) = store(Some(&image), bad.as_bytes());
        assert_eq!((store.len(), unread), (webpki_roots::TLS_SERVER_ROOTS.len(), 1));
    }
}

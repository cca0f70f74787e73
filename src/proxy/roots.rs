//! Which authorities upstreams are verified against, and the same list for the agent's programs.

use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;

const BEGIN: &str = "-----BEGIN CERTIFICATE-----";
const END: &str = "-----END CERTIFICATE-----";

/// The bundle for the agent: the image's own authorities, those the operator added, and the
/// sandbox CA. Comments and anything that is not a certificate are left out, so that nothing but
/// certificates is copied from the image.
#[must_use]
pub fn bundle_pem(image_roots_pem: &[u8], extra_roots_pem: &[u8], ca_pem: &str) -> String {
    let mut bundle =
        String::with_capacity(image_roots_pem.len() + extra_roots_pem.len() + ca_pem.len());
    for source in [image_roots_pem, extra_roots_pem, ca_pem.as_bytes()] {
        append_certificates(&mut bundle, source);
    }
    bundle
}

/// Copies certificate blocks line by line. A block with a line that is not base64 is dropped.
fn append_certificates(bundle: &mut String, source: &[u8]) {
    let mut start = None;
    for line in source.split(|byte| *byte == b'\n') {
        let line = line.trim_ascii();
        if line == BEGIN.as_bytes() {
            bundle.truncate(start.unwrap_or(bundle.len()));
            start = Some(bundle.len());
        } else if start.is_none() {
            continue;
        }
        match std::str::from_utf8(line) {
            Ok(line) if line == BEGIN || line == END || is_base64(line) => {
                bundle.push_str(line);
                bundle.push('\n');
                if line == END {
                    start = None;
                }
            }
            _ => {
                bundle.truncate(start.take().unwrap_or(bundle.len()));
            }
        }
    }
    bundle.truncate(start.unwrap_or(bundle.len()));
}

fn is_base64(line: &str) -> bool {
    !line.is_empty()
        && line
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'/' | b'='))
}

/// The authorities to verify upstreams against: the public ones, the image's and the operator's.
/// Certificates that cannot be read are left out, as TLS libraries do; the second value counts
/// them among the operator's, where one missing is a mistake.
pub(crate) fn store(image_roots_pem: &[u8], extra_roots_pem: &[u8]) -> (RootCertStore, usize) {
    let mut store = RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() };
    store.add_parsable_certificates(
        CertificateDer::pem_slice_iter(image_roots_pem).filter_map(Result::ok),
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

    #[test]
    fn only_whole_certificates_are_copied() {
        let image = format!(
            "# a comment\n{BEGIN}\r\nQUJD\r\n{END}\r\n\
             -----BEGIN PRIVATE KEY-----\nSECRET\n-----END PRIVATE KEY-----\n\
             {BEGIN}\nnot base64!\n{END}\n{BEGIN}\nQUJD\n{BEGIN}\nREVG\n{END}\n{BEGIN}\nQUJD\n"
        );
        let expected =
            format!("{BEGIN}\nQUJD\n{END}\n{BEGIN}\nREVG\n{END}\n{BEGIN}\nR0hJ\n{END}\n");
        let ca = format!("{BEGIN}\nR0hJ\n{END}\n");
        assert_eq!(bundle_pem(image.as_bytes(), b"", &ca), expected);
    }

    #[test]
    fn unreadable_roots_of_the_operator_are_counted() {
        let bad = format!("{BEGIN}\nQUJD\n{END}\n");
        let (store, unread) = store(bad.as_bytes(), bad.as_bytes());
        assert_eq!((store.len(), unread), (webpki_roots::TLS_SERVER_ROOTS.len(), 1));
    }
}

//! The agent's certificates once more, for Java: its programs read no PEM file and none of the
//! variables that name one, but a key store, which `JAVA_TOOL_OPTIONS` can name.
//!
//! The form is JKS, which every Java since 1.2 reads whatever its default type is: PKCS#12 stores
//! without a password are read by newer ones only. Numbers are big-endian:
//!
//! ```text
//! FEEDFEED, version 2, number of entries
//! each: 2 (a trusted certificate), alias, time (ms, 8 bytes), "X.509", length (4 bytes), DER
//! SHA-1 of: the password in UTF-16, "Mighty Aphrodite", all of the above
//! ```
//!
//! Texts have two bytes of length before them. The digest guards nothing here (the file is root's,
//! and the password is the one that everybody uses), but Java compares it where a password is
//! given. `sun.security.provider.JavaKeyStore` is the form's only description.

use std::fs::File;
use std::io::{self, Write as _};

use aws_lc_rs::digest;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;

use super::bundle;

const MAGIC: u32 = 0xFEED_FEED;
const VERSION: u32 = 2;
const TRUSTED_CERTIFICATE: u32 = 2;
const KIND: &str = "X.509";
/// Where the number of entries stands.
const COUNT: std::ops::Range<usize> = 8..12;
/// Java's own default, by convention no secret.
const PASSWORD: &str = "changeit";
const SALT: &[u8] = b"Mighty Aphrodite";

/// Writes the certificates of `bundle`, as [`bundle::write`] wrote it, into `file`, which is empty.
pub(crate) fn write(mut file: &File, bundle: &[u8]) -> io::Result<()> {
    file.write_all(&store(bundle))
}

/// The store. What is not base64 is left out, as those do who read the PEM.
///
/// One buffer from the beginning to the end: a page of memory costs more than what is done to it.
pub(super) fn store(pem: &[u8]) -> Vec<u8> {
    // The binary form and what stands around it are shorter than the text.
    let mut store = Vec::with_capacity(pem.len() + 64);
    store.extend(MAGIC.to_be_bytes());
    store.extend(VERSION.to_be_bytes());
    store.extend([0; COUNT.end - COUNT.start]);
    let (mut count, mut line) = (0u32, Vec::new());
    for body in bundle::bodies(pem) {
        let start = store.len();
        store.extend(TRUSTED_CERTIFICATE.to_be_bytes());
        text(&mut store, &format!("ringfence-{count}"));
        // When it was added: never is as good as any time.
        store.extend([0; 8]);
        text(&mut store, KIND);
        let length = store.len();
        store.extend([0; 4]);
        join(body, &mut line);
        if BASE64_STANDARD.decode_vec(&line, &mut store).is_err() {
            store.truncate(start);
            continue;
        }
        let size = u32::try_from(store.len() - length - 4).unwrap_or(u32::MAX);
        store[length..length + 4].copy_from_slice(&size.to_be_bytes());
        count += 1;
    }
    store[COUNT].copy_from_slice(&count.to_be_bytes());
    let mut sum = digest::Context::new(&digest::SHA1_FOR_LEGACY_USE_ONLY);
    for unit in PASSWORD.encode_utf16() {
        sum.update(&unit.to_be_bytes());
    }
    sum.update(SALT);
    sum.update(&store);
    store.extend(sum.finish().as_ref());
    store
}

/// The lines of a certificate's body as one.
fn join(body: &[u8], line: &mut Vec<u8>) {
    line.clear();
    let mut rest = body;
    while let Some(end) = memchr::memchr(b'\n', rest) {
        line.extend_from_slice(rest[..end].trim_ascii());
        rest = &rest[end + 1..];
    }
    line.extend_from_slice(rest.trim_ascii());
}

/// Short and ASCII, for which Java's form of UTF-8 is UTF-8.
fn text(store: &mut Vec<u8>, text: &str) {
    store.extend(u16::try_from(text.len()).unwrap_or(u16::MAX).to_be_bytes());
    store.extend(text.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pki::Authority;
    use rustls::pki_types::CertificateDer;
    use rustls::pki_types::pem::PemObject as _;
    use std::process::Command;
    use std::time::Duration;

    fn certificate(name: &str) -> String {
        let authority = Authority::ephemeral(name, Duration::from_secs(86_400)).expect("made");
        authority.certificate_pem().to_owned()
    }

    #[test]
    fn the_form_is_what_java_describes() {
        let broken = "-----BEGIN CERTIFICATE-----\nQ\n-----END CERTIFICATE-----\n";
        let pem = [certificate("one"), broken.into(), certificate("two")].concat();
        let store = store(pem.as_bytes());
        assert_eq!(store[..12], [0xFE, 0xED, 0xFE, 0xED, 0, 0, 0, 2, 0, 0, 0, 2]);
        assert_eq!(store[12..16], [0, 0, 0, 2]);
        assert_eq!(store[16..29], *b"\0\x0bringfence-0");
        assert_eq!(store[37..44], *b"\0\x05X.509");
        let one = CertificateDer::from_pem_slice(pem.as_bytes()).expect("a certificate");
        assert_eq!(store[48..48 + one.len()], *one);
    }

    /// With the password, so that the digest is compared.
    #[test]
    fn java_reads_it() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("java.jks");
        let pem = [certificate("one"), certificate("two")].concat();
        std::fs::write(&path, store(pem.as_bytes())).expect("written");
        let listed = Command::new("keytool")
            .args(["-list", "-storepass", PASSWORD, "-keystore"])
            .arg(&path)
            .output();
        let Ok(listed) = listed else {
            println!("SKIPPED: needs keytool");
            return;
        };
        let text = String::from_utf8_lossy(&listed.stdout);
        assert!(listed.status.success(), "{text}");
        assert_eq!(text.matches("trustedCertEntry").count(), 2, "{text}");
    }
}

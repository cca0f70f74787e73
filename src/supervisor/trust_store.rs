//! The certificates of the image: what upstreams are verified against, and what the agent's
//! programs find beside the sandbox CA.

use std::fs;

/// Where images keep their trust store; the first that exists counts (openssl's and Go's lists).
const PLACES: [&str; 5] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/cert.pem",
    "/etc/ssl/ca-bundle.pem",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
];

const BEGIN: &[u8] = b"-----BEGIN CERTIFICATE-----";
const END: &[u8] = b"-----END CERTIFICATE-----";

/// The image's trust store, PEM; empty where it has none.
#[must_use]
pub fn read() -> Vec<u8> {
    PLACES.iter().find_map(|path| fs::read(path).ok()).unwrap_or_default()
}

/// The image's certificates and those that the operator added, PEM.
#[must_use]
pub fn certificates(added: Option<&str>) -> Vec<u8> {
    let image = read();
    let added = added.unwrap_or_default().as_bytes();
    // Room for the sandbox CA too.
    let mut bundle = Vec::with_capacity(image.len() + added.len() + 1024);
    append_certificates(&mut bundle, &image);
    append_certificates(&mut bundle, added);
    bundle
}

/// Adds the certificates of a PEM text and nothing else of it: a trust store that is a link to
/// something secret gives nothing away. A block with a line that is not base64 is left out.
fn append_certificates(bundle: &mut Vec<u8>, pem: &[u8]) {
    let mut start = None;
    for line in pem.split(|byte| *byte == b'\n') {
        let line = line.trim_ascii();
        if line == BEGIN {
            bundle.truncate(start.unwrap_or(bundle.len()));
            start = Some(bundle.len());
        } else if start.is_none() {
            continue;
        } else if line != END && !is_base64(line) {
            bundle.truncate(start.take().unwrap_or(bundle.len()));
            continue;
        }
        bundle.extend_from_slice(line);
        bundle.push(b'\n');
        if line == END {
            start = None;
        }
    }
    bundle.truncate(start.unwrap_or(bundle.len()));
}

/// Which bytes base64 is made of. A table, because a trust store has 200,000 of them.
const BASE64: [bool; 256] = {
    let mut table = [false; 256];
    let alphabet = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/=";
    let mut index = 0;
    while index < alphabet.len() {
        table[alphabet[index] as usize] = true;
        index += 1;
    }
    table
};

fn is_base64(line: &[u8]) -> bool {
    !line.is_empty() && line.iter().all(|byte| BASE64[usize::from(*byte)])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_certificates_are_copied() {
        const B: &str = "-----BEGIN CERTIFICATE-----";
        const E: &str = "-----END CERTIFICATE-----";
        let image = format!(
            "# a comment\n{B}\r\nQUJD\r\n{E}\r\n\
             -----BEGIN PRIVATE KEY-----\nSECRET\n-----END PRIVATE KEY-----\n\
             {B}\nnot base64!\n{E}\n{B}\nQUJD\n{B}\nREVG\n{E}\n{B}\nQUJD\n"
        );
        let mut bundle = b"before\n".to_vec();
        append_certificates(&mut bundle, image.as_bytes());
        let expected = format!("before\n{B}\nQUJD\n{E}\n{B}\nREVG\n{E}\n");
        assert_eq!(String::from_utf8(bundle).unwrap(), expected);
    }
}

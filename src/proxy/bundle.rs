//! The certificates that the agent's programs find: the image's own authorities, those that the
//! operator added, and the sandbox CA.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::unix::fs::FileExt as _;

use memchr::memmem;

const BEGIN: &[u8] = b"-----BEGIN CERTIFICATE-----";
const END: &[u8] = b"-----END CERTIFICATE-----";
/// What both begin with, and nothing between them has.
const DASHES: &[u8] = b"-----";

/// The most that is read of the image's store, in bytes.
const MAX_STORE: u64 = 16 << 20;

/// What a bundle usually has beside the image's store, in bytes: the sandbox CA.
const ADDED: usize = 4096;

/// Reads the image's trust store from its beginning, whoever else reads it.
pub(crate) fn read(image_roots: &File) -> io::Result<Vec<u8>> {
    let length = image_roots.metadata()?.len().min(MAX_STORE) as usize;
    // Room for what is added, which would be a copy of all of it.
    let mut pem = Vec::with_capacity(length + ADDED);
    FromStart { file: image_roots, at: 0 }.take(MAX_STORE).read_to_end(&mut pem)?;
    Ok(pem)
}

/// Reads a file without its offset, which all who hold it share.
struct FromStart<'a> {
    file: &'a File,
    at: u64,
}

impl io::Read for FromStart<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read_at(buffer, self.at)?;
        self.at += read as u64;
        Ok(read)
    }
}

/// The bundle: PEM, nothing but certificates, the sandbox CA's last.
pub(crate) fn make(
    image_roots: Option<&File>,
    extra_roots_pem: &[u8],
    ca_pem: &str,
) -> io::Result<Vec<u8>> {
    let mut bundle = image_roots.map(read).transpose()?.unwrap_or_default();
    keep_certificates(&mut bundle);
    if !extra_roots_pem.is_empty() {
        let mut extra = extra_roots_pem.to_vec();
        keep_certificates(&mut extra);
        bundle.append(&mut extra);
    }
    bundle.extend_from_slice(ca_pem.as_bytes());
    Ok(bundle)
}

/// What stands between the first and the last line of each certificate of a bundle.
pub(super) fn bodies(bundle: &[u8]) -> impl Iterator<Item = &[u8]> {
    memmem::find_iter(bundle, BEGIN).filter_map(|start| {
        let body = &bundle[start + BEGIN.len()..];
        Some(&body[..memmem::find(body, DASHES)?])
    })
}

/// Leaves the certificates of a PEM text and nothing else of it: a trust store that is a link to
/// something secret gives nothing away. A block with anything but base64 in it is left out.
///
/// In place: a trust store has 200,000 bytes, most have nothing else in them, and every fence
/// starts with this.
pub(super) fn keep_certificates(pem: &mut Vec<u8>) {
    let (begin, dashes) = (memmem::Finder::new(BEGIN), memmem::Finder::new(DASHES));
    let (mut kept, mut at) = (0, 0);
    while let Some(start) = begin.find(&pem[at..]).map(|found| at + found) {
        let body = start + BEGIN.len();
        let Some(end) = dashes.find(&pem[body..]).map(|found| body + found) else { break };
        at = end;
        let after = end + END.len();
        let whole = pem[end..].starts_with(END)
            && (start == 0 || pem[start - 1] == b'\n')
            && matches!(pem.get(after), None | Some(b'\n' | b'\r'))
            && is_base64(&pem[body..end]);
        if !whole {
            continue;
        }
        at = after;
        pem.copy_within(start..after, kept);
        kept += after - start;
        // Where the line ended.
        match pem.get_mut(kept) {
            Some(place) => *place = b'\n',
            None => pem.push(b'\n'),
        }
        kept += 1;
    }
    pem.truncate(kept);
}

/// Base64 with its line breaks. Without an early end, so that the compiler takes many bytes at a
/// time.
fn is_base64(body: &[u8]) -> bool {
    let wrong = |byte: u8| !matches!(byte, b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'+' | b'/' | b'=' | b'\n' | b'\r');
    !body.iter().fold(false, |any, byte| any | wrong(*byte))
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    const B: &str = "-----BEGIN CERTIFICATE-----";
    const E: &str = "-----END CERTIFICATE-----";

    fn kept(text: &str) -> String {
        let mut pem = text.as_bytes().to_vec();
        keep_certificates(&mut pem);
        String::from_utf8(pem).unwrap()
    }

    #[test]
    fn only_whole_certificates_are_kept() {
        let image = format!(
            "# a comment\n{B}\nQUJD\n{E}\n\
             -----BEGIN PRIVATE KEY-----\nSECRET\n-----END PRIVATE KEY-----\n\
             {B}\nnot base64!\n{E}\n{B}\nQUJD\n{B}\nREVG\n{E}\n{B}\nQUJD\n"
        );
        assert_eq!(kept(&image), format!("{B}\nQUJD\n{E}\n{B}\nREVG\n{E}\n"));
        for nothing in ["", "SECRET", B, E, &format!("{B}\nQUJD"), &format!("{B}\nQUJD\n{E}x")] {
            assert_eq!(kept(nothing), "", "{nothing}");
        }
        assert_eq!(kept(&format!("x{B}\nSECRET\n{E}\n")), "");
    }

    #[test]
    fn a_clean_store_is_kept_as_it_is() {
        let clean = format!("{B}\nQUJD\nREVG==\n{E}\n").repeat(100);
        assert_eq!(kept(&clean), clean);
        assert_eq!(kept(clean.trim_end()), clean, "the last line's end may be missing");
        let dos = clean.replace('\n', "\r\n");
        assert_eq!(kept(&dos).matches(&format!("{E}\n{B}")).count(), 99);
    }

    #[test]
    fn the_bundle_has_all_three_and_the_sandbox_ca_last() {
        let file = |text: &str| {
            let mut file = tempfile::tempfile().expect("a file");
            file.write_all(text.as_bytes()).expect("written");
            file
        };
        let certificate = |body: &str| format!("{B}\n{body}\n{E}\n");
        let image = file(&format!("# the image's\n{}", certificate("QUJD")));
        let extra = format!("{}SECRET\n", certificate("REVG"));
        let bundle = make(Some(&image), extra.as_bytes(), &certificate("R0hJ")).expect("made");
        let expected = ["QUJD", "REVG", "R0hJ"].map(certificate).concat();
        assert_eq!(String::from_utf8(bundle.clone()).expect("text"), expected);
        let found: Vec<_> = bodies(&bundle).map(<[u8]>::trim_ascii).collect();
        assert_eq!(found, [b"QUJD", b"REVG", b"R0hJ"]);
        // The image's is there to be read again.
        assert!(read(&image).expect("read").starts_with(b"# the image's"));
    }
}

//! The certificates that the agent's programs find: the image's own authorities, those that the
//! operator added, and the sandbox CA.

use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt as _;

use anyhow::{Context as _, Result};
use memchr::memmem;

const BEGIN: &[u8] = b"-----BEGIN CERTIFICATE-----";
const END: &[u8] = b"-----END CERTIFICATE-----";
/// What both begin with, and nothing between them has.
const DASHES: &[u8] = b"-----";

/// The most that is read of the image's store, in bytes.
pub(crate) const MAX_STORE: u64 = 16 << 20;

/// How much of a store is looked at in one piece, in bytes. A page of memory that is touched for the
/// first time costs more than what is done to it, and every fence starts with this.
const PIECE: usize = 32 << 10;

/// What is written together at least, in bytes: a store may have a line between any two certificates.
const TOGETHER: usize = 4 << 10;

/// Reads a file from its beginning, whoever else reads it, at most `limit` bytes of it.
pub(crate) fn read(file: &File, limit: u64) -> io::Result<Vec<u8>> {
    let length = usize::try_from(file.metadata()?.len().min(limit)).unwrap_or(0);
    let mut pem = Vec::with_capacity(length);
    FromStart { file, at: 0 }.take(limit).read_to_end(&mut pem)?;
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

/// Writes the bundle: PEM, nothing but certificates, the sandbox CA's last.
pub(crate) fn write(
    image_roots: Option<&File>,
    extra_roots_pem: &[u8],
    ca_pem: &str,
    bundle: &mut File,
) -> Result<()> {
    let mut bundle = BufWriter::with_capacity(TOGETHER, bundle);
    if let Some(file) = image_roots {
        copy_certificates(FromStart { file, at: 0 }.take(MAX_STORE), &mut bundle, PIECE)
            .context("cannot copy the image's certificates for the agent")?;
    }
    copy_certificates(extra_roots_pem, &mut bundle, PIECE)
        .and_then(|()| bundle.write_all(ca_pem.as_bytes()))
        .and_then(|()| bundle.flush())
        .context("cannot write the agent's certificates")
}

/// What stands between the first and the last line of each certificate of a bundle.
pub(super) fn bodies(bundle: &[u8]) -> impl Iterator<Item = &[u8]> {
    memmem::find_iter(bundle, BEGIN).filter_map(|start| {
        let body = &bundle[start + BEGIN.len()..];
        Some(&body[..memmem::find(body, DASHES)?])
    })
}

/// Copies the certificates of a PEM text and nothing else of it: a trust store that is a link to
/// something secret gives nothing away. A block with anything but base64 in it is left out.
///
/// In pieces of `piece` bytes, or as long as what has no end before that.
pub(super) fn copy_certificates(
    mut from: impl Read,
    to: &mut impl Write,
    piece: usize,
) -> io::Result<()> {
    let mut pem = Vec::with_capacity(piece);
    loop {
        if pem.len() == pem.capacity() {
            pem.reserve(pem.len());
        }
        let room = (pem.capacity() - pem.len()) as u64;
        let end = from.by_ref().take(room).read_to_end(&mut pem)? == 0;
        let whole = if end { pem.len() } else { after_last(&pem) };
        write_certificates(&pem[..whole], to)?;
        if end {
            return Ok(());
        }
        pem.drain(..whole);
    }
}

/// Where a text can be cut: after the line on which its last certificate ends. No block that counts
/// goes across it, as none has dashes in it.
fn after_last(pem: &[u8]) -> usize {
    let last = memmem::rfind(pem, END)
        .and_then(|last| Some(last + memchr::memchr(b'\n', &pem[last..])? + 1));
    last.unwrap_or(0)
}

/// Writes the certificates of a PEM text: those that follow each other at once, as most do.
fn write_certificates(pem: &[u8], to: &mut impl Write) -> io::Result<()> {
    let mut together: Option<Range<usize>> = None;
    let mut write = |range: Range<usize>| match pem.get(range.end) {
        // With the end of its last line, whatever it is.
        Some(b'\n') => to.write_all(&pem[range.start..=range.end]),
        _ => to.write_all(&pem[range]).and_then(|()| to.write_all(b"\n")),
    };
    for one in certificates(pem) {
        match &mut together {
            Some(before) if before.end + 1 == one.start => before.end = one.end,
            other => {
                if let Some(before) = other.replace(one) {
                    write(before)?;
                }
            }
        }
    }
    together.map_or(Ok(()), write)
}

/// Where the certificates of a PEM text lie: each from its first line to its last, without that
/// line's end.
fn certificates(pem: &[u8]) -> impl Iterator<Item = Range<usize>> {
    let (begin, dashes) = (memmem::Finder::new(BEGIN), memmem::Finder::new(DASHES));
    let mut at = 0;
    std::iter::from_fn(move || {
        loop {
            let start = at + begin.find(&pem[at..])?;
            let body = start + BEGIN.len();
            let end = body + dashes.find(&pem[body..])?;
            let after = end + END.len();
            at = end;
            let whole = pem[end..].starts_with(END)
                && (start == 0 || pem[start - 1] == b'\n')
                && matches!(pem.get(after), None | Some(b'\n' | b'\r'))
                && is_base64(&pem[body..end]);
            if whole {
                at = after;
                return Some(start..after);
            }
        }
    })
}

/// Base64 with its line breaks. Without an early end, so that the compiler takes many bytes at a
/// time.
fn is_base64(body: &[u8]) -> bool {
    let wrong = |byte: u8| !matches!(byte, b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'+' | b'/' | b'=' | b'\n' | b'\r');
    !body.iter().fold(false, |any, byte| any | wrong(*byte))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const B: &str = "-----BEGIN CERTIFICATE-----";
    const E: &str = "-----END CERTIFICATE-----";

    fn kept(text: &str) -> String {
        let mut pem = Vec::new();
        copy_certificates(text.as_bytes(), &mut pem, PIECE).unwrap();
        String::from_utf8(pem).unwrap()
    }

    proptest! {
        #[test]
        fn pieces_are_no_other_than_the_whole(
            parts in prop::collection::vec(
                prop::sample::select(&[B, E, "QUJD", "\n", "\r\n", "\r", "x", "-----", "-", "="][..]),
                0..60,
            ),
            piece in 1..200_usize,
        ) {
            let text = parts.concat();
            let (mut whole, mut pieces) = (Vec::new(), Vec::new());
            write_certificates(text.as_bytes(), &mut whole).unwrap();
            copy_certificates(text.as_bytes(), &mut pieces, piece).unwrap();
            prop_assert_eq!(whole, pieces);
        }
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
        let mut bundle = file("");
        write(Some(&image), extra.as_bytes(), &certificate("R0hJ"), &mut bundle).expect("written");
        let bundle = read(&bundle, u64::MAX).expect("read");
        let expected = ["QUJD", "REVG", "R0hJ"].map(certificate).concat();
        assert_eq!(String::from_utf8(bundle.clone()).expect("text"), expected);
        let found: Vec<_> = bodies(&bundle).map(<[u8]>::trim_ascii).collect();
        assert_eq!(found, [b"QUJD", b"REVG", b"R0hJ"]);
        // The image's is there to be read again.
        assert!(read(&image, MAX_STORE).expect("read").starts_with(b"# the image's"));
    }
}

//! Chunked bodies, bent: they are the same however they arrive, and what a reader of the most usual
//! kind takes from the same bytes. See [`crate::fuzz`].

use super::*;
use crate::fuzz::{alone, fuzz};

const BODIES: [&str; 4] = [
    "5\r\nhello\r\n00A;x=\"y\"\r\n, 23456789\r\n0\r\nTrailer: 1\r\n\r\nNEXT",
    "1\r\na\r\n1\r\nb\r\n0\r\n\r\n",
    "f;a;b=c\r\n0123456789abcde\r\n0\r\nA: b\r\nC: d\r\n\r\n",
    "0\r\n\r\nGET / HTTP/1.1\r\n\r\n",
];
const WORDS: [&str; 22] = [
    "\r\n",
    "\n",
    "\r",
    "0\r\n",
    "0\r\n\r\n",
    "\r\n0\r\n\r\n",
    "000000000000000000000",
    "ffffffffffffffff\r\n",
    "fffffffffffffff\r\n",
    "-1\r\n",
    "+5\r\n",
    "0x5\r\n",
    " 5\r\n",
    "5 \r\n",
    "5\t;\r\n",
    ";\r\n",
    ";a=\"\r\n\"\r\n",
    "\0",
    "é",
    "X: y\r\n",
    "Content-Length: 5\r\n",
    "_",
];

/// The content and how many bytes are left behind it; `None`: it goes on.
type Read = Option<(Vec<u8>, usize)>;

fn decode(input: &[u8], cuts: &[usize]) -> Result<Read, String> {
    let mut decoder = Decoder::default();
    let (mut content, mut start) = (Vec::new(), 0);
    for &end in cuts {
        loop {
            match decoder.step(&input[start..end]).map_err(|error| error.to_string())? {
                Step::More => break,
                Step::Skip(count) => start += count,
                Step::Data(count) => {
                    content.extend_from_slice(&input[start..start + count]);
                    start += count;
                }
                Step::End(count) => return Ok(Some((content, input.len() - start - count))),
            }
        }
    }
    Ok(None)
}

/// What a reader without suspicion takes from it.
fn usual(input: &[u8]) -> Read {
    let mut rest = input;
    let mut content = Vec::new();
    let line = |rest: &mut &[u8]| {
        let end = rest.windows(2).position(|pair| pair == b"\r\n")?;
        let line = &rest[..end];
        *rest = &rest[end + 2..];
        Some(String::from_utf8_lossy(line).into_owned())
    };
    loop {
        let size = line(&mut rest)?;
        let digits = size.split(';').next().unwrap_or_default();
        let size = usize::from_str_radix(digits.trim(), 16).ok()?;
        if size == 0 {
            while !line(&mut rest)?.is_empty() {}
            return Some((content, rest.len()));
        }
        content.extend_from_slice(rest.get(..size)?);
        rest = rest.get(size..)?.strip_prefix(b"\r\n")?;
    }
}

#[test]
fn chunked_bodies() {
    let mut good = 0_u64;
    fuzz("chunked_bodies", 1_000, |random| {
        let bytes = random.bent(&BODIES, &WORDS);
        let cuts = random.cuts(bytes.len());
        let whole = decode(&bytes, &[bytes.len()]);
        assert_eq!(decode(&bytes, &cuts), whole, "{bytes:?} {cuts:?}");
        if let Ok(Some(read)) = whole {
            good += 1;
            assert_eq!(Some(read), usual(&bytes), "{bytes:?}");
        }
    });
    assert!(alone() || good > 0, "nothing was accepted");
}

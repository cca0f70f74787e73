//! Throws broken frames and handshakes at what reads them. Nothing may panic, hang, or grow.
//!
//! Inputs are valid ones, bent at random. `RINGFENCE_FUZZ_CASES` says how many are tried,
//! `RINGFENCE_FUZZ_SEED` which; a failure names the seed and the case, and a case that is named by
//! `RINGFENCE_FUZZ_CASE` runs alone.

use super::frame::Violation;
use super::handshake::Offer;
use super::message::tests::{Deflater, client, read};
use super::message::{Follower, MESSAGE_MAX, Messages};
use crate::proxy::http::head::tests as head;

/// xorshift64*: small, and the same everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() >> 33).unwrap_or(0) % limit.max(1)
    }

    fn byte(&mut self) -> u8 {
        self.next().to_be_bytes()[0]
    }

    /// Bytes are flipped, lost, doubled and put in.
    fn bend(&mut self, bytes: &mut Vec<u8>) {
        for _ in 0..self.below(5) {
            let at = self.below(bytes.len() + 1);
            let end = (at + self.below(12)).min(bytes.len());
            match self.below(5) {
                0 => drop(bytes.splice(at..end, [])),
                1 => {
                    let piece = bytes[at..end].to_vec();
                    bytes.splice(at..at, piece);
                }
                2 => {
                    let byte = self.byte();
                    bytes.insert(at, byte);
                }
                3 => {
                    let bit = self.below(8);
                    if let Some(byte) = bytes.get_mut(at) {
                        *byte ^= 1 << bit;
                    }
                }
                _ => bytes.truncate(at),
            }
        }
    }
}

fn fuzz(name: &'static str, mut case: impl FnMut(&mut Random)) {
    crate::fuzz::run(name, 2_000, |seed| {
        let mut random = Random(seed | 1);
        random.next();
        case(&mut random);
    });
}

#[test]
fn client_frames() {
    let mut good = 0_u64;
    fuzz("client_frames", |random| {
        let mut deflater = Deflater::new();
        let mut bytes = Vec::new();
        for _ in 0..=random.below(4) {
            let content: Vec<u8> =
                (0..random.below(200)).map(|_| b'a' + random.byte() % 3).collect();
            let first = [0x81, 0x82, 0x01, 0x80, 0x00, 0x89, 0x8A, 0x88][random.below(8)];
            let compressed = matches!(first, 0x81 | 0x82) && random.below(2) == 0;
            let mut payload = if compressed { deflater.message(&content) } else { content };
            if first & 0x08 != 0 {
                payload.truncate(random.below(126));
            }
            // What is inside, and not only how it is wrapped.
            if random.below(4) == 0 {
                random.bend(&mut payload);
            }
            bytes.extend(client(first | if compressed { 0x40 } else { 0 }, &payload));
        }
        if random.below(2) == 0 {
            random.bend(&mut bytes);
        }
        let takeover = [None, Some(false), Some(true)][random.below(3)];
        let cuts: Vec<_> = (0..random.below(6)).map(|_| random.below(usize::MAX)).collect();
        let whole = read(&mut Messages::new(takeover), &bytes, &[]);
        let pieces = read(&mut Messages::new(takeover), &bytes, &cuts);
        assert_eq!(whole, pieces, "{bytes:x?} {cuts:?}");
        if let Ok(items) = whole {
            good += u64::from(!items.is_empty());
            assert!(items.iter().all(|(_, content)| content.len() <= MESSAGE_MAX));
        }
    });
    // Not all are broken: the reader is tested beyond its first check.
    if !crate::fuzz::alone() {
        assert!(good > 0);
    }
}

#[test]
fn server_frames() {
    fuzz("server_frames", |random| {
        let mut bytes = Vec::new();
        for _ in 0..=random.below(4) {
            let length = [0, 1, 125][random.below(3)];
            bytes.push([0x81, 0xC2, 0x01, 0x80, 0x89, 0x88][random.below(6)]);
            bytes.push(length);
            bytes.extend((0..length).map(|_| random.byte()));
        }
        random.bend(&mut bytes);
        let mut whole = Follower::new(random.below(2) == 0);
        let mut at = 0;
        let result = loop {
            match whole.pass(&bytes[at..]) {
                Ok(0) => break Ok(()),
                Ok(passed) => at += passed,
                Err(violation) => break Err(violation),
            }
            assert!(at <= bytes.len());
        };
        if result == Ok(()) && at < bytes.len() {
            assert!(bytes.len() - at < 14 && whole.between_frames());
        }
    });
}

#[test]
fn handshakes() {
    const REQUEST: &str = "GET / HTTP/1.1\r\nHost: h\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
                           Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
                           Sec-WebSocket-Version: 13\r\nSec-WebSocket-Protocol: a, b\r\n\
                           Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits, \
                           permessage-deflate; server_max_window_bits=\"10\"\r\n\r\n";
    const ANSWER: &str = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\
                          Connection: Upgrade\r\nSec-WebSocket-Protocol: b\r\n\
                          Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\
                          Sec-WebSocket-Extensions: permessage-deflate; \
                          client_max_window_bits=9\r\n\r\n";
    fuzz("handshakes", |random| {
        let mut text = |valid: &str| {
            let mut bytes = valid.as_bytes().to_vec();
            random.bend(&mut bytes);
            String::from_utf8_lossy(&bytes).into_owned()
        };
        let (request, answer) = (text(REQUEST), text(ANSWER));
        let Ok(request) = head::request(&request) else { return };
        let Ok(offer) = Offer::read(&request) else { return };
        assert!(offer.extensions().bytes().all(|byte| matches!(byte, b' '..=b'~')));
        if let Ok(answer) = head::response(&answer, "GET") {
            let _ = offer.agree(&answer);
        }
    });
}

/// Every first byte and length form, with nothing behind it, and with all zeros.
#[test]
fn every_header() {
    for first in 0..=u8::MAX {
        for second in 0..=u8::MAX {
            for behind in 0..16 {
                let mut bytes = vec![first, second];
                bytes.resize(2 + behind, 0);
                let result = read(&mut Messages::new(Some(true)), &bytes, &[]);
                if second & 0x80 == 0 {
                    assert!(result.is_err(), "{bytes:x?}");
                }
                assert_ne!(result, Err(Violation::Busy), "{bytes:x?} took memory");
            }
        }
    }
}

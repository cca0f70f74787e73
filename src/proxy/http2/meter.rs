//! Counts the frames of a connection that cost their reader more than their writer: PING, SETTINGS,
//! `RST_STREAM`, PRIORITY, `WINDOW_UPDATE`, CONTINUATION, unknown ones and empty DATA.
//!
//! The library bounds the memory of each; what is left is the work, which has no end otherwise
//! (CVE-2019-9512 to 9517, CVE-2023-44487). A peer earns such frames by what is sent to it: the more
//! data it gets, the more windows it opens and the more round trips it measures.

use std::time::Instant;

/// Frames that cost something, at once and each second, without anything earned.
const BURST: u32 = 1_000;
const A_SECOND: u32 = 100;

/// What a peer earns by each frame with headers or data that it gets.
const EARNED: u32 = 4;

const PREFACE: usize = 24;
const HEAD: usize = 9;

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const END_STREAM: u8 = 1;

/// The start of a frame (RFC 9113, section 4.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Frame {
    kind: u8,
    flags: u8,
    length: u32,
}

/// Finds the frames in one direction's bytes, however they are split.
#[derive(Debug)]
struct Frames {
    head: [u8; HEAD],
    /// How much of the head is there.
    have: usize,
    /// Bytes that come before the next head.
    skip: usize,
}

impl Frames {
    fn new(skip: usize) -> Self {
        Self { head: [0; HEAD], have: 0, skip }
    }

    /// Calls `found` for each frame whose head ends in `data`.
    fn feed(&mut self, mut data: &[u8], mut found: impl FnMut(Frame)) {
        while !data.is_empty() {
            let skipped = self.skip.min(data.len());
            self.skip -= skipped;
            data = &data[skipped..];
            let taken = (HEAD - self.have).min(data.len());
            self.head[self.have..self.have + taken].copy_from_slice(&data[..taken]);
            self.have += taken;
            data = &data[taken..];
            if self.have == HEAD {
                let [a, b, c, kind, flags, ..] = self.head;
                let length = u32::from_be_bytes([0, a, b, c]);
                self.have = 0;
                self.skip = length as usize;
                found(Frame { kind, flags, length });
            }
        }
    }
}

/// Which end of the connection we are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    Server,
    Client,
}

/// The account of one connection.
#[derive(Debug)]
pub(super) struct Meter {
    read: Frames,
    written: Frames,
    credit: u32,
    filled: Instant,
    exceeded: bool,
}

impl Meter {
    pub(super) fn new(side: Side) -> Self {
        let (read, written) = match side {
            Side::Server => (PREFACE, 0),
            Side::Client => (0, PREFACE),
        };
        Self {
            read: Frames::new(read),
            written: Frames::new(written),
            credit: BURST,
            filled: Instant::now(),
            exceeded: false,
        }
    }

    /// More was read than the peer may send.
    pub(super) fn exceeded(&self) -> bool {
        self.exceeded
    }

    /// Takes what the peer sent.
    pub(super) fn read(&mut self, data: &[u8]) {
        let mut costs = 0u32;
        self.read.feed(data, |frame| costs = costs.saturating_add(u32::from(cost(frame))));
        if costs > 0 {
            self.spend(costs, Instant::now());
        }
    }

    /// Takes what the peer is sent.
    pub(super) fn written(&mut self, data: &[u8]) {
        let credit = &mut self.credit;
        self.written.feed(data, |frame| {
            if matches!(frame.kind, DATA | HEADERS) {
                *credit = (*credit + EARNED).min(BURST);
            }
        });
    }

    fn spend(&mut self, costs: u32, now: Instant) {
        let seconds = u32::try_from(now.duration_since(self.filled).as_secs()).unwrap_or(u32::MAX);
        if seconds > 0 {
            self.filled = now;
            self.credit = self.credit.saturating_add(seconds.saturating_mul(A_SECOND)).min(BURST);
        }
        match self.credit.checked_sub(costs) {
            Some(left) => self.credit = left,
            None => self.exceeded = true,
        }
    }
}

fn cost(frame: Frame) -> bool {
    match frame.kind {
        DATA => frame.length == 0 && frame.flags & END_STREAM == 0,
        HEADERS => false,
        _ => true,
    }
}

#[cfg(test)]
mod fuzz;

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, flags: u8, payload: usize) -> Vec<u8> {
        let length = u32::try_from(payload).expect("length").to_be_bytes();
        let mut bytes = vec![length[1], length[2], length[3], kind, flags, 0, 0, 0, 1];
        bytes.resize(HEAD + payload, 0xff);
        bytes
    }

    #[test]
    fn frames_are_found_however_they_are_split() {
        let mut bytes = vec![0xff; PREFACE];
        for (kind, payload) in [(4, 18), (0, 300), (6, 8), (1, 0), (0x99, 70_000)] {
            bytes.extend(frame(kind, 1, payload));
        }
        for piece in [1, 2, 8, 9, 10, 64, bytes.len()] {
            let mut frames = Frames::new(PREFACE);
            let mut kinds = Vec::new();
            for part in bytes.chunks(piece) {
                frames.feed(part, |frame| kinds.push((frame.kind, frame.length)));
            }
            assert_eq!(kinds, [(4, 18), (0, 300), (6, 8), (1, 0), (0x99, 70_000)], "{piece}");
        }
    }

    #[test]
    fn what_costs_is_earned() {
        let mut meter = Meter::new(Side::Client);
        let ping = frame(6, 0, 8);
        for _ in 0..BURST {
            meter.read(&ping);
        }
        assert!(!meter.exceeded());
        meter.written(&[0; PREFACE]);
        meter.written(&frame(0, 0, 16));
        for _ in 0..EARNED {
            meter.read(&ping);
        }
        assert!(!meter.exceeded(), "a frame of data earns some");
        meter.spend(A_SECOND, meter.filled + std::time::Duration::from_secs(1));
        assert!(!meter.exceeded(), "so does time");
        meter.read(&ping);
        assert!(meter.exceeded());
    }

    #[test]
    fn headers_and_data_are_free_and_empty_data_is_not() {
        let mut meter = Meter::new(Side::Client);
        for _ in 0..2 * BURST {
            meter.read(&frame(HEADERS, 4, 10));
            meter.read(&frame(DATA, 0, 1));
            meter.read(&frame(DATA, END_STREAM, 0));
        }
        assert_eq!(meter.credit, BURST);
        for _ in 0..=BURST {
            meter.read(&frame(DATA, 0, 0));
        }
        assert!(meter.exceeded());
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_however_they_are_split(
            bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..2_000),
            piece in 1usize..64,
        ) {
            let found = |piece| {
                let (mut frames, mut found) = (Frames::new(PREFACE), Vec::new());
                for part in bytes.chunks(piece) {
                    frames.feed(part, |frame| found.push(frame));
                }
                found
            };
            proptest::prop_assert_eq!(found(piece), found(bytes.len().max(1)));
        }
    }
}

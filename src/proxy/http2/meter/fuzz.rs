//! Frames of HTTP/2, bent: they cost the same however they arrive. See [`crate::fuzz`].

use super::*;
use crate::fuzz::{Random, alone, fuzz};

fn frames(random: &mut Random) -> Vec<u8> {
    let mut bytes = Vec::new();
    for _ in 0..random.below(12) {
        let payload = [0, 1, 8, 18, 200][random.below(5)];
        let kind = [0, 1, 2, 3, 4, 6, 7, 8, 9, 0x99][random.below(10)];
        let flags = random.byte() & 5;
        let frame = [0, 0, payload, kind, flags, 0, 0, 0, random.byte()];
        // Some come by the hundred.
        for _ in 0..if random.once_in(8) { random.below(1_500) } else { 1 } {
            bytes.extend(frame);
            bytes.resize(bytes.len() + usize::from(payload), random.byte());
        }
    }
    random.bend(
        &bytes,
        &["\0\0\0\u{6}", "\0\0", "\0\0\u{8}\u{6}\0\0\0\0\0", "\u{7f}", "PRI * HTTP/2.0"],
    )
}

/// Whether more was read than may be, in these pieces.
fn exceeds(sides: (Side, &[u8], &[u8]), cuts: &[usize]) -> bool {
    let (side, written, read) = sides;
    let mut meter = Meter::new(side);
    // Time gives nothing: a busy machine may take a second between two pieces.
    meter.filled += std::time::Duration::from_secs(3600);
    meter.written(written);
    let mut from = 0;
    for &to in cuts {
        meter.read(&read[from..to]);
        from = to;
        assert!(meter.credit <= BURST);
    }
    meter.exceeded()
}

#[test]
fn meter() {
    let mut seen = [0_u64; 2];
    fuzz("meter", 500, |random| {
        let side = if random.once_in(2) { Side::Server } else { Side::Client };
        let (written, mut read) = (frames(random), frames(random));
        if side == Side::Server && !random.once_in(4) {
            read.splice(0..0, [0; PREFACE]);
        }
        let whole = exceeds((side, &written, &read), &[read.len()]);
        let cuts = random.cuts(read.len());
        assert_eq!(exceeds((side, &written, &read), &cuts), whole, "{cuts:?}");
        seen[usize::from(whole)] += 1;
    });
    assert!(alone() || seen.iter().all(|count| *count > 0), "{seen:?}");
}

//! Decompression of the client's messages (RFC 7692): with a window that outlives a message or
//! without, strict about where a message ends, bounded by what the buffer allows.

use miniz_oxide::inflate::TINFLStatus;
use miniz_oxide::inflate::core::inflate_flags::{
    TINFL_FLAG_HAS_MORE_INPUT, TINFL_FLAG_IGNORE_ADLER32, TINFL_FLAG_STOP_ON_BLOCK_BOUNDARY,
    TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF,
};
use miniz_oxide::inflate::core::{DecompressorOxide, decompress};

use super::frame::Violation;
use super::message::Buffer;

/// How far back a compressed message may refer, in bytes: the largest window there is.
pub(super) const WINDOW: usize = 32 * 1024;

/// What ends every compressed message and is not sent.
const TAIL: [u8; 4] = [0, 0, 0xFF, 0xFF];

const FLAGS: u32 = TINFL_FLAG_HAS_MORE_INPUT
    | TINFL_FLAG_IGNORE_ADLER32
    | TINFL_FLAG_STOP_ON_BLOCK_BOUNDARY
    // What refers to before the window's start is an error, not zeros.
    | TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF;

/// The client's compressor, seen from its other end.
pub(super) struct Inflater {
    state: Box<DecompressorOxide>,
    /// What a message may refer to: the end of the messages before it.
    window: Vec<u8>,
    /// Whether it may: context takeover.
    takeover: bool,
    /// The last input ended a block.
    at_boundary: bool,
}

impl Inflater {
    pub(super) fn new(takeover: bool) -> Self {
        Self { state: Box::default(), window: Vec::new(), takeover, at_boundary: true }
    }

    /// A message begins: what it may refer to.
    pub(super) fn begin(&mut self) -> &[u8] {
        // Every message ends where a block does, on a whole byte: nothing is left over.
        self.state.init();
        self.at_boundary = true;
        &self.window
    }

    /// Decompresses a part of a message onto the end of the buffer, which begins with the window.
    pub(super) fn add(&mut self, mut input: &[u8], out: &mut Buffer) -> Result<(), Violation> {
        loop {
            let (space, filled) = out.space()?;
            let (status, read, written) = decompress(&mut self.state, input, space, filled, FLAGS);
            out.filled(written);
            input = &input[read..];
            self.at_boundary = status == TINFLStatus::BlockBoundary;
            match status {
                TINFLStatus::NeedsMoreInput => return Ok(()),
                TINFLStatus::BlockBoundary if input.is_empty() => return Ok(()),
                TINFLStatus::BlockBoundary => {}
                TINFLStatus::HasMoreOutput => out.grow()?,
                // Done: a block that says it is the last. What follows it would be read in one way
                // by some and not at all by others.
                _ => return Err(Violation::Deflate),
            }
        }
    }

    /// The message has ended: checks that it is whole, and keeps its end for the next.
    pub(super) fn end(&mut self, out: &mut Buffer) -> Result<(), Violation> {
        self.add(&TAIL, out)?;
        let whole = self.at_boundary
            && self.state.block_boundary_state().is_some_and(|state| state.num_bits == 0);
        if !whole {
            return Err(Violation::Deflate);
        }
        if self.takeover {
            let all = out.with_window();
            let kept = &all[all.len().saturating_sub(WINDOW)..];
            self.window.clear();
            self.window.extend_from_slice(kept);
        }
        Ok(())
    }
}

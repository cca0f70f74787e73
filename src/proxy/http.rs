//! HTTP/1.1 as the proxy speaks it: one strict reading of heads and framing, and one writer.
//!
//! What two programs could read differently is refused, and what is forwarded is written anew
//! from what was read, so the bytes that were judged are the bytes that are sent.

pub(crate) mod body;
pub(crate) mod head;
pub(crate) mod relay;
pub(crate) mod write;

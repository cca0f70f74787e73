//! WebSocket (RFC 6455) with `permessage-deflate` (RFC 7692): the handshake is judged as a request,
//! and each message that the client sends before a byte of it goes on.
//!
//! What was judged is what is sent on, and nothing else: a message is put together from its
//! fragments, decompressed, judged, and written anew as one uncompressed frame under a key of ours.
//! The server therefore never sees the client's compressor, its fragments or its keys, and cannot
//! read a message in another way than we did. From the server to the client frames are followed,
//! and their content passes unread.

mod deflate;
mod frame;
#[cfg(test)]
mod fuzz;
pub(crate) mod handshake;
mod message;
mod session;

pub(crate) use handshake::{Agreed, HandshakeError, Offer};
pub(crate) use session::{Socket, run};

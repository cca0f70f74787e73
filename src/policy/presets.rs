//! What `access:` stands for.
#![forbid(unsafe_code)]

use super::document::{Access, Protocol};

/// The methods that an access level allows on every path. As upstream, `read-write` has no DELETE,
/// and `read-only` of a WebSocket is the handshake alone.
pub(super) fn methods(protocol: Protocol, access: Access) -> &'static [&'static str] {
    match (protocol, access) {
        (Protocol::Rest, Access::ReadOnly) => &["GET", "HEAD", "OPTIONS"],
        (Protocol::Rest, Access::ReadWrite) => &["GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH"],
        (Protocol::WebSocket, Access::ReadOnly) => &["GET"],
        (Protocol::WebSocket, Access::ReadWrite) => &["GET", "WEBSOCKET_TEXT"],
        (_, Access::Full) => &["*"],
    }
}

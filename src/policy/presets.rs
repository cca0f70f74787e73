//! What `access:` stands for.
#![forbid(unsafe_code)]

use super::document::{Access, Protocol};
use super::payload::OperationKind;

/// The methods that an access level allows on every path of an endpoint whose content is not read.
/// As upstream, `read-write` has no DELETE, and `read-only` of a WebSocket is the handshake alone.
pub(super) fn methods(protocol: Protocol, access: Access) -> &'static [&'static str] {
    match (protocol, access) {
        (_, Access::Full) => &["*"],
        (Protocol::WebSocket, Access::ReadOnly) => &["GET"],
        (Protocol::WebSocket, Access::ReadWrite) => &["GET", "WEBSOCKET_TEXT"],
        (_, Access::ReadOnly) => &["GET", "HEAD", "OPTIONS"],
        (_, Access::ReadWrite) => &["GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH"],
    }
}

/// The operations that an access level allows on a `GraphQL` endpoint; `None` is every kind. As
/// upstream, `read-write` has no subscriptions.
pub(super) fn operations(access: Access) -> &'static [Option<OperationKind>] {
    match access {
        Access::ReadOnly => &[Some(OperationKind::Query)],
        Access::ReadWrite => &[Some(OperationKind::Query), Some(OperationKind::Mutation)],
        Access::Full => &[None],
    }
}

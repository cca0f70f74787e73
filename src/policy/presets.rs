//! What `access:` stands for.
#![forbid(unsafe_code)]

use super::document::Access;
use super::payload::OperationKind;

/// The methods that an access level allows on every path of a REST endpoint. `read-write` has no DELETE, as upstream.
pub(super) fn methods(access: Access) -> &'static [&'static str] {
    match access {
        Access::ReadOnly => &["GET", "HEAD", "OPTIONS"],
        Access::ReadWrite => &["GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH"],
        Access::Full => &["*"],
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

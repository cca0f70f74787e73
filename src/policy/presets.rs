//! What `access:` stands for on a REST endpoint.
#![forbid(unsafe_code)]

use super::document::Access;

/// The methods that an access level allows on every path. `read-write` has no DELETE, as upstream.
pub(super) fn methods(access: Access) -> &'static [&'static str] {
    match access {
        Access::ReadOnly => &["GET", "HEAD", "OPTIONS"],
        Access::ReadWrite => &["GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH"],
        Access::Full => &["*"],
    }
}

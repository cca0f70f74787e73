//! ENTRYPOINT, CMD, USER, WORKDIR and ENV of an image, read from its registry.
//!
//! A container without `command` runs what its image says, and the fence has to start exactly
//! that. The answer depends on the tenant (whose credentials), on the architecture of the node and
//! on time (a tag moves), so all three are part of the look-up; it is bounded in time by the
//! caller and in memory by the cache.
#![forbid(unsafe_code)]

mod cache;
pub mod credentials;
mod error;
mod registry;

pub use error::{Attempt, ImageError};
pub use registry::{Images, ImagesConfig};

/// What an image's configuration says about how it is started. Words are as the image has them:
/// the kubelet expands nothing in them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Config {
    /// ENTRYPOINT, empty where the image has none.
    pub entrypoint: Vec<String>,
    /// CMD, empty where the image has none.
    pub cmd: Vec<String>,
    /// USER as written: `name`, `uid`, `user:group`; empty means root.
    pub user: String,
    /// WORKDIR, empty where the image has none.
    pub working_dir: String,
    /// ENV, `NAME=value` each.
    pub env: Vec<String>,
}

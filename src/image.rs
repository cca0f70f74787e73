//! ENTRYPOINT, CMD, USER, WORKDIR, ENV and VOLUMEs of an image, read from its registry.
//!
//! A container without `command` runs what its image says, and the fence has to start exactly
//! that; and a runtime mounts what an image declares as VOLUME, so where the supervisor's binary has
//! to be mounted depends on every image. The answer depends on the tenant (whose credentials), on the architecture of the node and
//! on time (a tag moves), so all three are part of the look-up; it is bounded in time by the
//! caller and in memory by the cache.
#![forbid(unsafe_code)]

mod cache;
pub mod credentials;
mod document;
mod error;
mod fetch;
#[cfg(test)]
mod fuzz;
mod given;
mod mirrors;
mod permits;
mod provider;
mod registry;
mod rest;

pub use error::{Attempt, ImageError};
pub use given::{Given, GivenError};
pub use mirrors::{Mirror, Mirrors};
pub use provider::{ProviderError, Providers};
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
    /// Paths of the VOLUMEs as written, sorted. The runtime mounts a directory at each of them.
    pub volumes: Vec<String>,
    /// What the image's name led to: the SHA-256 of that manifest or index, `sha256:<hex>`, over the
    /// bytes that were read. None where it moved between the look-ups of two architectures.
    pub digest: Option<String>,
}

impl Config {
    /// Whether a container of either image is fenced in the same way. ENV stays in the image, and
    /// often names the architecture.
    fn is_fenced_like(&self, other: &Self) -> bool {
        (&self.entrypoint, &self.cmd, &self.user) == (&other.entrypoint, &other.cmd, &other.user)
            && (&self.working_dir, &self.volumes) == (&other.working_dir, &other.volumes)
    }
}

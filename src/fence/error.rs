//! One error for the network half of the fence: which step, on what, and what the kernel said.

use std::io;

/// A step of the network set-up that failed.
#[derive(Debug, thiserror::Error)]
#[error("{step} {object}: {source}")]
pub struct NetworkError {
    /// What was being done, in the infinitive: "add the route", "read back the rules".
    pub step: &'static str,
    /// What it was being done to, with the value that mattered.
    pub object: String,
    /// The kernel's errno, or what was found instead of what was asked for.
    #[source]
    pub source: io::Error,
}

/// The result of a step of the network set-up.
pub type Result<T> = std::result::Result<T, NetworkError>;

impl NetworkError {
    /// An error of `step` on `object` with the kernel's answer.
    pub(crate) fn new(
        step: &'static str,
        object: impl Into<String>,
        source: impl Into<io::Error>,
    ) -> Self {
        Self { step, object: object.into(), source: source.into() }
    }

    /// The kernel accepted `step`, but what it shows afterwards differs from what was asked for.
    pub(crate) fn differs(step: &'static str, object: impl Into<String>, found: String) -> Self {
        Self::new(step, object, io::Error::other(found))
    }

    /// The errno, where the kernel gave one.
    #[must_use]
    pub fn errno(&self) -> Option<i32> {
        self.source.raw_os_error()
    }
}

//! Resource limits of the agent.

use rustix::process::{Resource, Rlimit, setrlimit};

/// Limits set between fork and exec.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Open files, soft and hard; `None` leaves what the container runtime set.
    ///
    /// Processes are not limited here: the kernel counts them per uid over the whole node.
    pub open_files: Option<u64>,
}

/// Applies the limits. Core dumps are always off: they would write memory where nobody judged it.
/// Async-signal-safe.
pub fn apply(limits: Limits) -> rustix::io::Result<()> {
    setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })?;
    if let Some(files) = limits.open_files {
        setrlimit(Resource::Nofile, Rlimit { current: Some(files), maximum: Some(files) })?;
    }
    Ok(())
}

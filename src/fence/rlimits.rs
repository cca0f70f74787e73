//! Resource limits of the agent.

use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

pub use crate::policy::ProcessLimits as Limits;

/// Applies the limits, soft and hard alike, and reads them back. Core dumps are always off: they
/// would write memory where nobody judged it. Async-signal-safe.
///
/// EPERM where a limit is above the hard one of this process and `CAP_SYS_RESOURCE` is missing.
pub fn apply(limits: Limits) -> rustix::io::Result<()> {
    set(Resource::Core, 0)?;
    if let Some(files) = limits.open_files {
        set(Resource::Nofile, files)?;
    }
    if let Some(processes) = limits.processes {
        set(Resource::Nproc, processes)?;
    }
    Ok(())
}

fn set(resource: Resource, value: u64) -> rustix::io::Result<()> {
    let limit = Rlimit { current: Some(value), maximum: Some(value) };
    setrlimit(resource, limit)?;
    if getrlimit(resource) == limit { Ok(()) } else { Err(Errno::INVAL) }
}

/// Whether [`apply`] can succeed in a child of this process: what is over the hard limit, as
/// `process.limits.open_files is 4096, the container's hard limit 1024`.
#[must_use]
pub fn too_high(limits: Limits) -> Option<String> {
    [
        ("open_files", limits.open_files, Resource::Nofile),
        ("processes", limits.processes, Resource::Nproc),
    ]
    .into_iter()
    .find_map(|(name, wanted, resource)| {
        let (wanted, hard) = (wanted?, getrlimit(resource).maximum?);
        (wanted > hard).then(|| {
            format!("process.limits.{name} is {wanted}, the container's hard limit {hard}")
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_above_the_hard_one_is_named() {
        let Some(hard) = getrlimit(Resource::Nofile).maximum else {
            println!("SKIPPED: this process has no hard limit of open files");
            return;
        };
        let files = |open_files| Limits { open_files: Some(open_files), processes: None };
        assert_eq!(too_high(files(hard)), None);
        assert_eq!(too_high(Limits::default()), None);
        let told = too_high(files(hard + 1)).unwrap();
        assert!(told.contains("open_files") && told.contains(&hard.to_string()), "{told}");
    }
}

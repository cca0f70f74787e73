//! The container's limit of processes, which is the runtime's to set: what is fenced may fork as
//! it likes, and an rlimit would count the user's processes over the whole node.

use std::fs;

use anyhow::{Result, bail};

use crate::event::{self, Class, Event, Severity};

/// Where a container sees its own limit: cgroup v2, v1.
const PIDS_MAX: [&str; 2] = ["/sys/fs/cgroup/pids.max", "/sys/fs/cgroup/pids/pids.max"];

/// Refuses to start without a limit where one is `required`; else says so at the level of
/// information. No more than that: a kubelet sets `podPidsLimit` on the pod's cgroup, which no
/// container can see.
pub fn check(required: bool) -> Result<()> {
    if !required && !event::informs() {
        return Ok(());
    }
    let text = PIDS_MAX.iter().find_map(|path| fs::read_to_string(path).ok());
    let Some(missing) = missing(text.as_deref()) else { return Ok(()) };
    if required {
        bail!(
            "{missing}: set one in the runtime (the kubelet's podPidsLimit), or do not require it"
        );
    }
    event::emit(&Event::new(Class::Config, "DEGRADED", Severity::Info).subject(missing));
    Ok(())
}

/// What is wrong with the content of `pids.max`; `None`: a limit is set.
fn missing(text: Option<&str>) -> Option<&'static str> {
    match text.map(str::trim) {
        None => Some("the container's limit of processes cannot be read"),
        Some("max") => Some("the container's cgroup sets no limit of processes (pids.max)"),
        Some(number) if number.parse::<u64>().is_ok() => None,
        Some(_) => Some("the container's limit of processes is no number"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_number_is_a_limit() {
        assert!(missing(Some("512\n")).is_none());
        for none in [None, Some("max\n"), Some(""), Some("-1")] {
            assert!(missing(none).is_some(), "{none:?}");
        }
    }
}

//! `process`: who the agent runs as, and, ours, what its processes may use.
#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};

use super::Document;
use crate::policy::fields::{Fields, Located};
use crate::policy::problem::Problems;
use crate::policy::yaml::{Node, Value};

/// Who the agent runs as, and what its processes may use.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Process {
    /// A name or a number; `None` when absent or empty.
    pub run_as_user: Option<String>,
    /// A name or a number; `None` when absent or empty.
    pub run_as_group: Option<String>,
    /// Whether files may be made that have no path.
    pub memfd: Memfd,
    /// Resource limits.
    pub limits: ProcessLimits,
    /// What happens where a volume holds a unix socket that the kernel cannot guard.
    pub unix_sockets: UnixSockets,
}

/// What becomes of `memfd_create(2)`: a file without a path is one that no file rule covers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Memfd {
    /// Refused. The default, as in `OpenShell`.
    #[default]
    Deny,
    /// Only with `MFD_NOEXEC_SEAL` (Linux 6.3): such a file can never be executed.
    Noexec,
    /// Allowed, and `memfd_secret` with it.
    Allow,
}

/// Resource limits of each of the agent's processes; `None` leaves what the runtime set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ProcessLimits {
    /// Open files, from 16 to 1,048,576.
    pub open_files: Option<u64>,
    /// Processes and threads of the agent's uid, from 16 to 4,194,304. The kernel counts them over
    /// the whole node (in a pod with a user namespace: over that), so none is the default.
    pub processes: Option<u64>,
}

/// What happens where the agent reaches a volume that holds a unix socket, on a kernel that cannot
/// refuse connecting to it (before Landlock ABI 9, Linux 7.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum UnixSockets {
    /// The attestation lists it. The default.
    #[default]
    Report,
    /// The fence is not built.
    Refuse,
}

/// The numbers that a limit may have; the upper ends are the kernel's own defaults for the largest
/// table of descriptors and for the number of pids.
const OPEN_FILES: std::ops::RangeInclusive<i64> = 16..=1_048_576;
const PROCESSES: std::ops::RangeInclusive<i64> = 16..=4_194_304;

pub(super) fn read(node: &Node, document: &mut Document, problems: &mut Problems) {
    let Some(mut fields) = Fields::of(node, "process", problems) else {
        return;
    };
    if let Some(node) = fields.take_filled("run_as_user") {
        document.run_as_user = identity(node, &fields.name("run_as_user"), problems);
    }
    if let Some(node) = fields.take_filled("run_as_group") {
        document.run_as_group = identity(node, &fields.name("run_as_group"), problems);
    }
    // Ours: a wrong value is an error, and so is none.
    if let Some(node) = fields.take("memfd") {
        let words = [("deny", Memfd::Deny), ("noexec", Memfd::Noexec), ("allow", Memfd::Allow)];
        document.memfd = one_of(node, &fields.name("memfd"), &words, problems).unwrap_or_default();
    }
    if let Some(node) = fields.take("limits") {
        document.limits = limits(node, problems);
    }
    if let Some(node) = fields.take("unix_sockets") {
        let words = [("report", UnixSockets::Report), ("refuse", UnixSockets::Refuse)];
        document.unix_sockets =
            one_of(node, &fields.name("unix_sockets"), &words, problems).unwrap_or_default();
    }
    fields.finish(None, problems);
}

/// A name, or a number in either spelling.
fn identity(node: &Node, what: &str, problems: &mut Problems) -> Option<Located> {
    if let Value::Int(number) = node.value {
        return Some(Located { at: node.at, text: number.to_string() });
    }
    node.text(what, problems).filter(|name| !name.text.is_empty())
}

fn limits(node: &Node, problems: &mut Problems) -> ProcessLimits {
    let Some(mut fields) = Fields::of(node, "process.limits", problems) else {
        return ProcessLimits::default();
    };
    let mut limit = |key: &'static str, range: std::ops::RangeInclusive<i64>| {
        let node = fields.take(key)?;
        match node.value {
            Value::Int(number) if range.contains(&number) => u64::try_from(number).ok(),
            _ => {
                problems.error(
                    node.at,
                    format!("{} is not a limit", fields.name(key)),
                    format!("write a number from {} to {}", range.start(), range.end()),
                );
                None
            }
        }
    };
    let limits = ProcessLimits {
        open_files: limit("open_files", OPEN_FILES),
        processes: limit("processes", PROCESSES),
    };
    fields.finish(Some("process.limits knows open_files and processes"), problems);
    limits
}

/// One of a few words, or an error that lists them.
pub(super) fn one_of<T: Copy>(
    node: &Node,
    what: &str,
    words: &[(&str, T)],
    problems: &mut Problems,
) -> Option<T> {
    let word = node.text(what, problems)?;
    if let Some((_, value)) = words.iter().find(|(known, _)| *known == word.text) {
        return Some(*value);
    }
    let known: Vec<_> = words.iter().map(|(known, _)| *known).collect();
    problems.error(
        word.at,
        format!("{what} {:?} is unknown", word.text),
        format!("write {}", known.join(" or ")),
    );
    None
}

//! Whether a document makes sense: what could not work, or would work in part only, is an error
//! with a line; what is likely a mistake is a warning.
#![forbid(unsafe_code)]

mod content;
mod endpoint;

pub(super) use endpoint::{addresses, endpoints, parse_network};

use super::document::{Binary, Document, Filesystem, NetworkPolicy, Process, Tainted};
use super::fields::Located;
use super::problem::Problems;

/// Linux's `PATH_MAX`.
const MAX_PATH: usize = 4096;
/// As upstream's strict reader.
const MAX_PATHS: usize = 256;

/// The file rules, cleaned.
pub(super) fn filesystem(document: &Document, problems: &mut Problems) -> Filesystem {
    let count = document.read_only.len() + document.read_write.len();
    if count > MAX_PATHS
        && let Some(last) = document.read_write.last().or(document.read_only.last())
    {
        problems.error(
            last.at,
            format!("filesystem_policy names {count} paths; {MAX_PATHS} are the most"),
            "name their parents",
        );
    }
    let clean_all = |paths: &[Located], problems: &mut Problems| {
        let cleaned = paths.iter().filter_map(|path| clean(path, problems));
        cleaned.collect::<Vec<_>>()
    };
    let read_only = clean_all(&document.read_only, problems);
    let read_write = clean_all(&document.read_write, problems);
    for (path, located) in read_write.iter().zip(&document.read_write) {
        if path == "/" {
            problems.error(
                located.at,
                "filesystem_policy.read_write: `/` would make every file writable",
                "name the directories that the agent writes to",
            );
        } else if read_only.contains(path) {
            problems.warn(
                located.at,
                format!("{path:?} is in read_only too: it is writable"),
                "keep it in one list",
            );
        }
    }
    Filesystem { read_only, read_write, include_workdir: document.include_workdir.unwrap_or(true) }
}

/// An absolute path without `.`, `//` and a slash at the end.
fn clean(path: &Located, problems: &mut Problems) -> Option<String> {
    let text = &path.text;
    let wrong = if text.len() > MAX_PATH {
        "is longer than 4096 bytes"
    } else if !text.starts_with('/') {
        "is not absolute"
    } else if text.split('/').any(|part| part == "..") {
        "holds `..`"
    } else {
        if text.contains(['*', '?']) {
            problems.warn(
                path.at,
                format!("{text:?}: file rules know no wildcards: it is taken literally"),
                "name a directory: what is below it is included",
            );
        }
        let parts = text.split('/').filter(|part| !part.is_empty() && *part != ".");
        let cleaned = parts.fold(String::new(), |path, part| path + "/" + part);
        return Some(if cleaned.is_empty() { "/".into() } else { cleaned });
    };
    problems.error(path.at, format!("path {text:?} {wrong}"), "write an absolute path");
    None
}

/// Who the agent runs as.
pub(super) fn process(document: &Document, problems: &mut Problems) -> Process {
    Process {
        run_as_user: identity(document.run_as_user.as_ref(), "process.run_as_user", problems),
        run_as_group: identity(document.run_as_group.as_ref(), "process.run_as_group", problems),
        memfd: document.memfd,
        limits: document.limits,
        unix_sockets: document.unix_sockets,
    }
}

fn identity(name: Option<&Located>, what: &str, problems: &mut Problems) -> Option<String> {
    let name = name?;
    let text = name.text.as_str();
    let numeric = text.bytes().all(|b| b.is_ascii_digit());
    let fits = if numeric {
        // The largest number means "no user" to the kernel.
        text.parse::<u32>().is_ok_and(|id| id != u32::MAX)
    } else {
        text.len() <= 32
            && !text.starts_with('-')
            && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-.$".contains(&b))
    };
    if !fits {
        problems.error(
            name.at,
            format!("{what} {text:?} is neither a name nor a number below 4294967295"),
            "write a name of the image's /etc/passwd or /etc/group, or a number",
        );
        return None;
    }
    if text == "root" || text.trim_start_matches('0').is_empty() {
        problems.warn(name.at, format!("{what} is root"), "name an unprivileged one");
    }
    Some(name.text.clone())
}

/// Binaries that no process can have, and those that any process can claim.
pub(super) fn binaries(key: &str, policy: &NetworkPolicy, problems: &mut Problems) {
    if policy.binaries.is_empty() {
        problems.warn(
            policy.at,
            format!("network policy {key:?} names no binaries: it allows nothing"),
            "add `binaries: [{ path: /usr/bin/… }]`",
        );
    }
    if policy.endpoints.is_empty() {
        problems.warn(
            policy.at,
            format!("network policy {key:?} has no endpoints: it allows nothing"),
            "add endpoints, or remove it",
        );
    }
    for binary in &policy.binaries {
        let text = binary.path.text.as_str();
        let glob = text.contains('*');
        if let Some(at) = binary.ancestors {
            problems.warn(
                at,
                format!(
                    "binary {text:?}: `ancestors: true` gives what network policy {key:?} allows to \
                     every program of the agent: any program can become a child of it"
                ),
                "name the executables that connect, each by its own path",
            );
        }
        let guarded =
            |binary: &Binary| binary.sha256.is_some() || binary.tainted == Some(Tainted::Refuse);
        if guarded(binary) {
            if let Some(at) = binary.ancestors {
                problems.error(
                    at,
                    format!("binary {text:?}: `ancestors: true` with `sha256` or `tainted`"),
                    "name the executables that connect, each by its own path: what is asked of \
                     one says nothing of what it starts",
                );
            }
            let again = |other: &&Binary| other.path.text == text && !guarded(other);
            if policy.binaries.iter().find(again).is_some() {
                problems.warn(
                    binary.path.at,
                    format!("binary {text:?} is listed a second time without `sha256` and `tainted: refuse`: they have no effect"),
                    "keep one entry",
                );
            }
        }
        let wrong = if text.len() > MAX_PATH {
            "is longer than 4096 bytes"
        } else if !text.starts_with('/') && !text.starts_with('*') {
            "is not absolute"
        } else if text.contains("//") || text.split('/').any(|p| matches!(p, "." | "..")) {
            "holds `//`, `.` or `..`, which the kernel never reports"
        } else if text.ends_with('/') {
            "ends with a slash, which no binary does"
        } else {
            if !glob && text.contains(['?', '[', '{']) {
                problems.warn(
                    binary.path.at,
                    format!(
                        "binary {text:?} is taken literally: only a path with `*` is a pattern"
                    ),
                    "use `*`",
                );
            }
            if text.split('/').any(|part| part != "**" && part.contains("**")) {
                problems.warn(
                    binary.path.at,
                    format!("binary {text:?}: `**` crosses `/` only as a whole component"),
                    "write `/**/`, or `*`",
                );
            }
            continue;
        };
        problems.error(
            binary.path.at,
            format!("binary {text:?} {wrong}"),
            "write the path of the file",
        );
    }
}

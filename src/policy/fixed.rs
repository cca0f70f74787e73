//! The parts of a policy that a fence has from its start to its end, compared: a running fence can
//! follow what is said of the network, and nothing else.
#![forbid(unsafe_code)]

use super::document::{Compatibility, Filesystem, Memfd, Process, ProcessLimits, UnixSockets};
use super::engine::Policy;

/// A part in which a policy differs from the one that a fence was built by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Difference {
    /// Its key in the file.
    pub part: &'static str,
    /// The fence that runs gives the agent something here that the policy does not: it is more than
    /// this policy's author wanted beside what it says of the network.
    pub exceeds: bool,
}

impl Policy {
    /// In which of the parts that cannot change while the agent runs this policy differs from
    /// `running`, by which the fence was built.
    #[must_use]
    pub fn differences(&self, running: &Policy) -> Vec<Difference> {
        let parts = [
            (
                "filesystem_policy",
                same_files(self.filesystem(), running.filesystem()),
                opens(self.filesystem(), running.filesystem()),
            ),
            (
                "landlock",
                self.landlock() == running.landlock(),
                self.landlock() == Compatibility::BestEffort,
            ),
            (
                "process",
                self.process() == running.process(),
                grants(self.process(), running.process()),
            ),
        ];
        let differing = parts.into_iter().filter(|(_, same, _)| !same);
        differing.map(|(part, _, covers)| Difference { part, exceeds: !covers }).collect()
    }
}

/// The order says nothing.
fn same_files(a: &Filesystem, b: &Filesystem) -> bool {
    opens(a, b) && opens(b, a)
}

/// Whether `wide` opens all that `narrow` does. By the paths as they are written: what a link on the
/// way to one leads to is not known here.
fn opens(wide: &Filesystem, narrow: &Filesystem) -> bool {
    (wide.include_workdir || !narrow.include_workdir)
        && narrow.read_write.iter().all(|path| wide.read_write.contains(path))
        && narrow
            .read_only
            .iter()
            .all(|path| wide.read_only.contains(path) || wide.read_write.contains(path))
}

/// Whether `wide` gives all that `narrow` does. Another user is another, neither more nor less.
fn grants(wide: &Process, narrow: &Process) -> bool {
    let memfd = |memfd| match memfd {
        Memfd::Deny => 0,
        Memfd::Noexec => 1,
        Memfd::Allow => 2,
    };
    (&wide.run_as_user, &wide.run_as_group) == (&narrow.run_as_user, &narrow.run_as_group)
        && memfd(wide.memfd) >= memfd(narrow.memfd)
        && limits(wide.limits, narrow.limits)
        && (wide.unix_sockets == UnixSockets::Report || narrow.unix_sockets == UnixSockets::Refuse)
}

fn limits(wide: ProcessLimits, narrow: ProcessLimits) -> bool {
    let at_least = |wide: Option<u64>, narrow: Option<u64>| match (wide, narrow) {
        (None, _) => true,
        (Some(_), None) => false,
        (Some(wide), Some(narrow)) => wide >= narrow,
    };
    at_least(wide.open_files, narrow.open_files) && at_least(wide.processes, narrow.processes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::{Source, load};

    fn policy(yaml: &str) -> Policy {
        let yaml = format!("version: 1\n{yaml}");
        load(&Source { name: "policy.yaml", bytes: yaml.as_bytes() }, None).expect(&yaml).policy
    }

    /// What differs, with a `+` where the running fence gives more.
    fn told(new: &str, running: &str) -> String {
        let differences = policy(new).differences(&policy(running));
        let told = differences
            .iter()
            .map(|one| format!("{}{}", one.part, if one.exceeds { "+" } else { "" }));
        told.collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn what_a_fence_gives_beyond_the_policy_is_seen() {
        const FILES: &str = "filesystem_policy: { read_only: [/etc, /usr], read_write: [/tmp] }\n";
        let files = |text: &str| format!("filesystem_policy: {text}\n");
        assert_eq!(told(FILES, FILES), "");
        let turned = files("{ read_only: [/usr, /etc], read_write: [/tmp] }");
        assert_eq!(told(&turned, FILES), "");
        for (text, expected) in [
            ("{ read_only: [/etc, /usr, /opt], read_write: [/tmp] }", "filesystem_policy"),
            ("{ read_only: [/etc], read_write: [/tmp, /usr] }", "filesystem_policy"),
            ("{ read_only: [/etc], read_write: [/tmp] }", "filesystem_policy+"),
            ("{ read_only: [/etc, /usr, /tmp] }", "filesystem_policy+"),
            (
                "{ read_only: [/etc, /usr], read_write: [/tmp], include_workdir: false }",
                "filesystem_policy+",
            ),
            // What /usr/lib is, a link or not, is not known.
            ("{ read_only: [/], read_write: [/tmp] }", "filesystem_policy+"),
        ] {
            assert_eq!(told(&files(text), FILES), expected, "{text}");
        }
        let hard = "landlock: { compatibility: hard_requirement }\n";
        assert_eq!(told(hard, ""), "landlock+");
        assert_eq!(told("", hard), "landlock");
        for (wide, narrow) in [
            ("memfd: allow", "memfd: deny"),
            ("memfd: noexec", "memfd: deny"),
            ("memfd: deny", "limits: { open_files: 64 }"),
            ("limits: { processes: 64 }", "limits: { processes: 32 }"),
            ("unix_sockets: report", "unix_sockets: refuse"),
        ] {
            let process = |text| format!("process: {{ {text} }}\n");
            assert_eq!(told(&process(wide), &process(narrow)), "process", "{wide}");
            assert_eq!(told(&process(narrow), &process(wide)), "process+", "{narrow}");
        }
        assert_eq!(told("process: { run_as_user: a }", "process: { run_as_user: b }"), "process+");
        assert_eq!(
            told(&format!("{FILES}{hard}"), "process: { memfd: allow }"),
            "filesystem_policy landlock+ process+"
        );
    }
}

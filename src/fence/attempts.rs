//! The escape table: what an agent may try, each row a real attempt from inside the fence with the
//! exact answer that must come back.
//!
//! Nothing here runs unless it is asked for: `tests/escape` runs the table in fences of its own,
//! `ringfence-supervisor doctor` in the fence of a living pod. Every attempt is harmless where it
//! succeeds, also as root without any fence: what would change something is given arguments that
//! the kernel refuses *after* the check that the row is about, or undoes what it did.
//!
//! | module | the attempts |
//! |---|---|
//! | [`network`] | round the proxy: addresses, protocols, namespaces |
//! | [`sockets`] | socket families and protocols |
//! | [`proxy`] | what the proxy is asked for |
//! | [`mod@bait`] | files that only Landlock guards |
//! | [`files`] | files and devices |
//! | [`credentials`] | users, groups, capabilities |
//! | [`calls`] | system calls |
//! | [`processes`] | the supervisor, the keeper, the proxy, a neighbour of the same user |
//! | [`hygiene`] | what was left lying about |

pub mod bait;
mod calls;
mod credentials;
mod describe;
mod files;
mod hygiene;
mod network;
mod processes;
mod proxy;
mod raw;
mod run;
mod sockets;

use serde::{Deserialize, Serialize};

use super::landlock;

pub(crate) use describe::plain;
pub use describe::{document, errno_name};
pub use run::{Context, run};

/// What guards a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Layer {
    /// The network namespaces, their routes and packet rules.
    Network,
    /// The proxy's judgement.
    Proxy,
    /// The Landlock domain: files, signals, abstract sockets, ptrace.
    Landlock,
    /// The dropped user, groups and capabilities.
    Credentials,
    /// The system call filter.
    Seccomp,
    /// What is done to a process before it becomes the agent: descriptors, session, limits.
    Hygiene,
    /// The kernel itself refuses, with or without a fence.
    Kernel,
}

/// What must come back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expect {
    /// This errno.
    Errno(i32),
    /// An HTTP response with this status.
    Status(u16),
    /// A DNS answer with this code.
    Rcode(u8),
    /// Nothing was tried: a property was looked at, and holds.
    Holds,
}

/// What came back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Seen {
    /// The call failed with this errno.
    Errno(i32),
    /// The call succeeded.
    Worked,
    /// An HTTP response with this status.
    Status(u16),
    /// A DNS answer with this code.
    Rcode(u8),
    /// The property holds.
    Holds,
    /// It does not hold, or the attempt went wrong: how.
    Broken(String),
    /// Not tried, and why.
    Skipped(String),
}

/// What a row needs to mean anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// The architecture with a second and a third set of call numbers.
    X86_64,
    /// Landlock with at least this ABI.
    Landlock(i32),
}

/// One attempt.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// Stable name.
    pub id: &'static str,
    /// What guards it.
    pub layer: Layer,
    /// What refuses it as well when `layer` is switched off.
    pub also: &'static [Layer],
    /// The number in the list of classic mistakes that this project was built against.
    pub mistake: Option<u8>,
    /// What is tried.
    pub what: &'static str,
    /// Any of these is as expected.
    pub expect: &'static [Expect],
    /// Without this the row is skipped.
    pub need: Option<Need>,
    attempt: Attempt,
}

/// How a row is tried.
#[derive(Clone, Copy, Debug)]
enum Attempt {
    /// One system call.
    Call(libc::c_long, [u64; 6]),
    /// clone(2) with these flags.
    Clone(u64),
    /// A function.
    Do(fn(&Context) -> Seen),
    /// A TCP connection, and a request on it.
    Tcp([u8; 4], u16),
    /// A datagram.
    Udp([u8; 4], u16),
    /// A TCP connection over IPv6.
    Tcp6([u16; 8], u16),
    /// A datagram over IPv6.
    Udp6([u16; 8], u16),
    /// These bytes to the proxy.
    Ask(&'static str),
    /// open(2) with these flags; not tried where the policy opens the path for that.
    Open(&'static str, i32),
    /// Something done to a file that lies open to everybody, outside what the policy opens.
    Bait(bait::Deed),
    /// Something done to another process.
    Process(processes::Target, processes::Deed),
}

impl Row {
    const fn new(
        id: &'static str,
        layer: Layer,
        expect: &'static [Expect],
        what: &'static str,
        attempt: Attempt,
    ) -> Self {
        Self { id, layer, also: &[], mistake: None, what, expect, need: None, attempt }
    }

    const fn also(self, also: &'static [Layer]) -> Self {
        Self { also, ..self }
    }

    const fn mistake(self, number: u8) -> Self {
        Self { mistake: Some(number), ..self }
    }

    const fn need(self, need: Need) -> Self {
        Self { need: Some(need), ..self }
    }

    /// Why this machine cannot run the row; `None` when it can.
    #[must_use]
    pub fn unmet(&self) -> Option<String> {
        match self.need? {
            Need::X86_64 if cfg!(target_arch = "x86_64") => None,
            Need::X86_64 => Some("only x86-64 has this".to_owned()),
            Need::Landlock(least) => {
                let have = landlock::abi();
                (have < least)
                    .then(|| format!("needs Landlock ABI {least}, this kernel has {have}"))
            }
        }
    }

    /// What is to be said of what came back.
    #[must_use]
    pub fn judge(&self, seen: &Seen) -> Verdict {
        let as_expected = self.expect.iter().any(|expect| match (expect, seen) {
            (Expect::Errno(want), Seen::Errno(have)) => want == have,
            (Expect::Status(want), Seen::Status(have)) => want == have,
            (Expect::Rcode(want), Seen::Rcode(have)) => want == have,
            (Expect::Holds, Seen::Holds) => true,
            _ => false,
        });
        match seen {
            Seen::Skipped(_) => Verdict::Skipped,
            _ if as_expected => Verdict::AsExpected,
            _ => Verdict::Unexpected,
        }
    }
}

/// The outcome of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// What came back is what must.
    AsExpected,
    /// It is not.
    Unexpected,
    /// The row says nothing here.
    Skipped,
}

/// What the attempts have to know of the fence they are made in. No secret is in it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Facts {
    /// The user, group and other groups that the agent must have.
    pub identity: (u32, u32, Vec<u32>),
    /// Device and inode of the fence's network namespace; `None`: not looked at.
    pub namespace: Option<(u64, u64)>,
    /// Paths that the policy opens, and whether for writing.
    pub opened: Vec<(String, bool)>,
    /// The supervisor's subdirectory of its run directory.
    pub run_dir: Option<String>,
    /// The supervisor's executable.
    pub supervisor: Option<String>,
    /// The bait: a directory that everybody may write, outside of what the policy opens.
    pub bait: Option<String>,
    /// An abstract unix socket that listens outside the fence.
    pub abstract_name: Option<String>,
    /// A TCP port that listens on loopback outside the fence.
    pub loopback_port: Option<u16>,
    /// A process of the agent's user outside the fence, where pids mean the same inside.
    pub neighbour: Option<i32>,
}

/// All rows.
pub fn table() -> impl Iterator<Item = &'static Row> {
    [
        network::ROWS,
        sockets::ROWS,
        proxy::ROWS,
        bait::ROWS,
        files::ROWS,
        credentials::ROWS,
        calls::ROWS,
        processes::ROWS,
        hygiene::ROWS,
    ]
    .into_iter()
    .flatten()
}

// What the tables say over and over.
const EPERM: &[Expect] = &[Expect::Errno(libc::EPERM)];
const EACCES: &[Expect] = &[Expect::Errno(libc::EACCES)];
const ENOSYS: &[Expect] = &[Expect::Errno(libc::ENOSYS)];
const HOLDS: &[Expect] = &[Expect::Holds];

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn ids_are_distinct_and_plain() {
        let mut ids = HashSet::new();
        for row in table() {
            assert!(ids.insert(row.id), "{} twice", row.id);
            let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
            assert!(row.id.chars().all(plain) && row.id.starts_with(char::is_alphabetic));
            assert!(!row.expect.is_empty() && !row.what.is_empty(), "{}", row.id);
            assert!(!row.also.contains(&row.layer), "{} names its layer twice", row.id);
            assert!(row.mistake.is_none_or(|number| (1..=28).contains(&number)), "{}", row.id);
        }
        assert!(ids.len() >= 120, "{} rows", ids.len());
    }

    #[test]
    fn only_what_is_expected_is_as_expected() {
        let expect = &[Expect::Errno(libc::EPERM), Expect::Status(403)];
        let row = Row::new("x", Layer::Seccomp, expect, "x", Attempt::Clone(0));
        for (seen, verdict) in [
            (Seen::Errno(libc::EPERM), Verdict::AsExpected),
            (Seen::Status(403), Verdict::AsExpected),
            (Seen::Errno(libc::EACCES), Verdict::Unexpected),
            (Seen::Status(200), Verdict::Unexpected),
            (Seen::Worked, Verdict::Unexpected),
            (Seen::Holds, Verdict::Unexpected),
            (Seen::Broken("hung".into()), Verdict::Unexpected),
            (Seen::Skipped("no".into()), Verdict::Skipped),
        ] {
            assert_eq!(row.judge(&seen), verdict, "{seen:?}");
        }
    }
}

//! What was asked and what is enforced, as JSON: written before the agent runs.

use std::path::PathBuf;
use std::time::SystemTime;

use serde::Serialize;

use super::identity::User;
use super::keeper::Confinement;
use super::sockets::Sockets;
use crate::fence::landlock::{Access, PathRule};

/// One fence's record. Everything in it was read back from the kernel or is what the agent was
/// verified against.
#[derive(Debug, Serialize)]
pub struct Attestation<'a> {
    /// The supervisor's version.
    pub version: &'static str,
    /// Digest of the policy's files; of those in force where it is followed.
    pub policy_digest: String,
    /// How the policy is followed; `None`: it is the same for the agent's whole life.
    pub live_policy: Option<LivePolicy>,
    /// The agent's user.
    pub user: UserRecord<'a>,
    /// The network namespaces and their rules.
    pub network: NetworkRecord,
    /// What the policy opens, and the base that every fence has.
    pub paths: PathRecord,
    /// Of these, the container's own volumes that joined beyond the policy's lists.
    pub volumes: VolumeRecord,
    /// Ports of the fence's loopback that are relayed to the pod's, as the policy allows.
    pub sidecar_ports: Vec<u16>,
    /// Files, and what else holds for everything in the fence.
    pub landlock: &'a Confinement,
    /// Unix sockets in volumes that the agent reaches; `None`: the kernel guards them.
    pub unix_sockets: Option<Sockets>,
    /// Variables of the container that make programs run other code, by name. They are the
    /// author's, and stay.
    pub environment: Vec<String>,
    /// System calls: filters on the agent.
    pub seccomp_filters: u32,
    /// Executables are bound to connections at connect(2).
    pub binary_identity: bool,
    /// The agent has a PID namespace of its own, and whether /proc shows it.
    pub pid_namespace: PidRecord,
    /// Threads of the proxy, each seen without capability, with `no_new_privs` and a filter.
    pub proxy_threads: usize,
    /// Directories that the policy promised and the image lacked.
    pub made: Vec<PathBuf>,
}

/// A policy that is followed.
#[derive(Debug, Serialize)]
pub struct LivePolicy {
    /// How many policies have been in force.
    pub generation: u64,
    /// Since when this one is, Unix time.
    pub since: u64,
    /// What it adds is held back until the pod is started anew.
    pub bounded: bool,
    /// What is still as the first policy has it.
    pub kept: Vec<String>,
}

impl LivePolicy {
    /// The first, from now on.
    #[must_use]
    pub fn first() -> Self {
        Self { generation: 1, since: Self::now(), bounded: false, kept: Vec::new() }
    }

    /// Seconds of Unix time.
    #[must_use]
    pub fn now() -> u64 {
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        since.map_or(0, |since| since.as_secs())
    }
}

/// The agent's user.
#[derive(Debug, Serialize)]
pub struct UserRecord<'a> {
    uid: u32,
    gid: u32,
    groups: &'a [u32],
    home: &'a str,
    notes: &'a [String],
}

/// The network.
#[derive(Debug, Serialize)]
pub struct NetworkRecord {
    /// Device and inode of the agent's network namespace.
    pub namespace: (u64, u64),
    /// The packet rules were loaded and read back; else why not.
    pub nftables: Result<(), String>,
}

/// Paths, each with all below it.
#[derive(Debug, Serialize)]
pub struct PathRecord {
    read_only: Vec<PathBuf>,
    read_write: Vec<PathBuf>,
}

/// Volumes.
#[derive(Debug, Serialize)]
pub struct VolumeRecord {
    /// Those that the agent only reads.
    pub read_only: Vec<PathBuf>,
    /// Those that it also writes.
    pub read_write: Vec<PathBuf>,
    /// Those that were named and did not join, and why.
    pub left_out: Vec<(PathBuf, String)>,
}

impl From<&[PathRule]> for PathRecord {
    fn from(rules: &[PathRule]) -> Self {
        let with = |access| {
            let rules = rules.iter().filter(|rule| rule.access == access);
            rules.map(|rule| rule.path.clone()).collect()
        };
        Self { read_only: with(Access::ReadOnly), read_write: with(Access::ReadWrite) }
    }
}

/// Processes.
#[derive(Debug, Serialize)]
pub struct PidRecord {
    /// Its own, with the keeper as init.
    pub own: bool,
    /// Why /proc still shows the container's processes.
    pub proc_shared: Option<String>,
}

impl PidRecord {
    /// `own_proc` is what became of mounting a /proc, where that was tried.
    pub fn new(own: bool, own_proc: Option<Result<(), String>>) -> Self {
        let proc_shared = match own_proc {
            Some(Ok(())) => None,
            Some(Err(why)) => Some(why),
            None => Some("the container's PID namespace is the agent's too".to_owned()),
        };
        Self { own, proc_shared }
    }
}

impl<'a> From<&'a User> for UserRecord<'a> {
    fn from(user: &'a User) -> Self {
        Self {
            uid: user.identity.uid,
            gid: user.identity.gid,
            groups: &user.identity.groups,
            home: &user.home,
            notes: &user.notes,
        }
    }
}

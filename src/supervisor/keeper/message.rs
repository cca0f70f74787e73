//! What the supervisor and the keeper say to each other.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::fence::landlock::{Access, PathRule};
use crate::fence::sysctl;
use crate::policy::{Memfd, Process, ProcessLimits};

/// From the supervisor.
#[derive(Debug, Serialize, Deserialize)]
pub enum ToKeeper {
    /// Sent once: what all children share.
    Prepare {
        /// Paths, and whether they are writable.
        rules: Vec<(PathBuf, bool)>,
        /// `landlock.compatibility: hard_requirement`.
        hard: bool,
        /// Report connect(2) to the supervisor.
        listener: bool,
        /// The pod's network settings.
        sysctls: Vec<sysctl::Setting>,
        /// What lies over the pod's `/etc/resolv.conf`, where that names nothing that is reached.
        resolv_conf: Option<PathBuf>,
        /// `process.memfd`.
        memfd: Memfd,
        /// `process.limits`.
        limits: ProcessLimits,
    },
    /// Fork a child. Descriptors: stdin, stdout, stderr, the child's control socket, and a memfd
    /// with the words: the path, `argc` arguments and the environment, each ended by NUL.
    Spawn {
        /// Names the child in [`FromKeeper`].
        id: u64,
        /// How many of the words are arguments.
        argc: usize,
        /// The working directory.
        workdir: PathBuf,
        /// Who it becomes.
        uid: u32,
        /// Its group.
        gid: u32,
        /// Its other groups.
        groups: Vec<u32>,
        /// Stdin is a terminal that becomes its controlling one.
        tty: bool,
    },
    /// Send a signal to a child; one that has ended is passed over.
    Signal {
        /// The child.
        id: u64,
        /// The signal's number.
        signal: i32,
    },
}

impl ToKeeper {
    /// The first message.
    #[must_use]
    pub fn prepare(
        rules: Vec<PathRule>,
        hard: bool,
        listener: bool,
        process: &Process,
        (sysctls, resolv_conf): (Vec<sysctl::Setting>, Option<PathBuf>),
    ) -> Self {
        let writable = |rule: PathRule| (rule.path, matches!(rule.access, Access::ReadWrite));
        let rules = rules.into_iter().map(writable).collect();
        let (memfd, limits) = (process.memfd, process.limits);
        Self::Prepare { rules, hard, listener, sysctls, resolv_conf, memfd, limits }
    }
}

/// To the supervisor.
#[derive(Debug, Serialize, Deserialize)]
pub enum FromKeeper {
    /// Sent first. Descriptors: the fence's network namespace, a route socket and a `sock_diag`
    /// socket made in it.
    Namespace,
    /// The answer to [`ToKeeper::Prepare`].
    Prepared(Prepared),
    /// The answer to [`ToKeeper::Spawn`], with the child's pidfd.
    Spawned {
        /// The child.
        id: u64,
    },
    /// A child has ended.
    Exited {
        /// The child.
        id: u64,
        /// Its exit code, or 128 + the signal that ended it.
        code: i32,
    },
    /// Something could not be done; the fence is not to be used.
    Failed {
        /// What and why.
        what: String,
    },
}

/// What all children share, as far as it could be had.
#[derive(Debug, Serialize, Deserialize)]
pub struct Prepared {
    /// What Landlock enforces.
    pub confinement: Confinement,
    /// A /proc of the agent's PID namespace is mounted; `None` where it shares ours.
    pub own_proc: Option<Result<(), String>>,
    /// The fence has the pod's network settings.
    pub sysctls: Result<(), String>,
    /// The fence's programs are told of a name server that they reach.
    pub resolv_conf: Result<(), String>,
}

/// What holds for everything in the fence: Landlock, and what else the kernel was asked for.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Confinement {
    /// The running kernel's Landlock ABI; 0: none.
    pub abi: i32,
    /// Rules in the domain.
    pub applied: usize,
    /// Paths that were left out, and why.
    pub skipped: Vec<(PathBuf, String)>,
    /// `None`: everything the kernel knows is enforced; else what is missing.
    pub missing: Option<String>,
    /// Nothing at all is enforced (only possible under `best_effort`).
    pub unconfined: bool,
    /// Signals and abstract unix sockets stay in the domain.
    pub scopes: bool,
    /// File rights that are handled, in number.
    pub rights: u32,
    /// Faults of the kernel's Landlock that touch the domain.
    pub errata: Vec<String>,
    /// Each child's bounding set is emptied and its securebits are locked; `false` where
    /// `CAP_SETPCAP` is not granted.
    pub bounding: bool,
    /// Why children have no session keyring of their own; `None`: they have.
    pub keyring: Option<String>,
    /// Which files without a path may be made.
    pub memfd: Memfd,
    /// Resource limits beside that of core dumps, which is always 0.
    pub limits: ProcessLimits,
}

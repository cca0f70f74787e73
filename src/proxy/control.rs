//! The words between the supervisor and the proxy process.
//!
//! One `SOCK_SEQPACKET` pair joins the two; each packet is one JSON message of at most
//! [`MAX_MESSAGE`] bytes, with descriptors beside it (`SCM_RIGHTS`) where the message says so.
//! The supervisor is uid 0 and parses nothing hostile: what comes from the proxy is bounded,
//! typed, and only ever asks for, or answers, the few things below.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::net::SocketAddrV4;

use serde::{Deserialize, Serialize};

use crate::policy::MAX_SIDECAR_PORTS;

/// The longest message in bytes; a longer one is an error on either side.
pub const MAX_MESSAGE: usize = 64 * 1024;

/// The most bytes of a [`NewPolicy`]: three files of at most 1 MiB, of which JSON may make
/// up to six times as much.
pub const MAX_POLICY: u64 = 20 << 20;
/// The sockets that always come with [`ToProxy::Start`].
pub const LISTENERS: usize = 4;

/// The most descriptors beside one message.
pub const MAX_DESCRIPTORS: usize = LISTENERS + MAX_SIDECAR_PORTS;

/// From the supervisor to the proxy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum ToProxy {
    /// Three descriptors: a file with the first policy, a [`NewPolicy`] of at most [`MAX_POLICY`] bytes, JSON;
    /// the files for the agent's certificates, PEM and for Java, empty, open for reading and writing. Sent
    /// once, first.
    Begin {
        /// Of the policy's files; for people.
        digest: String,
    },
    /// Four descriptors in this order, and what follows: the gateway's sockets, made in the gateway's
    /// namespace, proxy (TCP, listening on 10.200.0.1:3128), captured TCP (`IP_TRANSPARENT`,
    /// listening on :15001), policy DNS over UDP (:15053), policy DNS over TCP (listening on
    /// :15053). Then any number of TCP sockets that listen on the fence's loopback, made in the
    /// fence's namespace, on the ports that lead to sidecars.
    /// Sent once, when the agent is about to run.
    Start,
    /// The answer to [`ToSupervisor::Identify`]. With `caller` comes one descriptor: the
    /// executable, opened read-only, to be hashed.
    Caller {
        /// The question's number.
        id: u64,
        /// Who owns the connection; `None` when no record of its connect exists: no access.
        caller: Option<CallerRecord>,
    },
    /// The answer to [`ToSupervisor::GatewaySocket`], with one descriptor: a fresh, unconnected
    /// non-blocking TCP socket of the gateway's namespace.
    GatewaySocket {
        /// The question's number.
        id: u64,
    },
    /// The question `id` could not be answered.
    Failed {
        /// The question's number.
        id: u64,
        /// Why, for a log.
        reason: String,
    },
    /// The TCP ports (of 10.200.0.2 or the wildcard) on which something in the fence listens
    /// now. The proxy listens on exactly these in the pod's namespace; sent on each change.
    Inbound {
        /// Sorted, without repeats.
        ports: Vec<u16>,
    },
    /// The agent runs. With one descriptor: the attestation's file, opened read-only. Only where
    /// there is an admin endpoint; sent again when there is another file.
    Released,
    /// The policy has changed. With one descriptor: a file with a [`NewPolicy`] of at most
    /// [`MAX_POLICY`] bytes, JSON. Answered by [`ToSupervisor::Policy`]; until then no other is sent.
    Policy {
        /// One more than the last that was sent.
        generation: u64,
        /// Of the policy's files.
        digest: String,
        /// Only what the last policy that holds whole allows too may pass.
        bounded: bool,
        /// What keeps the old value until the pod is started anew; for a log.
        kept: Vec<String>,
    },
    /// The policy has changed in a way that cannot be followed: the last one holds.
    PolicyKept {
        /// Why, for a log.
        reason: String,
    },
    /// End: close the listeners, give connections that are open this long to finish, exit 0.
    Stop {
        /// Milliseconds.
        grace_ms: u64,
    },
}

/// From the proxy to the supervisor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum ToSupervisor {
    /// The proxy is locked, has one thread and its CA; sent once, before anything else.
    Ready {
        /// The sandbox CA's certificate, PEM. The key never leaves the proxy.
        ca_pem: String,
    },
    /// The policy is compiled, the agent's certificates are written (but for Java's), the threads are there:
    /// the agent may run. Sent once, after [`ToProxy::Begin`].
    Prepared,
    /// Whose connection is this? Answered by [`ToProxy::Caller`].
    Identify {
        /// Chosen by the proxy, never used twice.
        id: u64,
        /// The agent's end.
        client: SocketAddrV4,
        /// Our end: the listener's address, or for captured TCP the address that was dialled.
        server: SocketAddrV4,
    },
    /// A socket to reach a port of the fence. Answered by [`ToProxy::GatewaySocket`].
    GatewaySocket {
        /// Chosen by the proxy, never used twice.
        id: u64,
    },
    /// The answer to [`ToProxy::Policy`].
    Policy {
        /// That policy's.
        generation: u64,
        /// Why it is not in force; `None`: it is.
        refused: Option<String>,
    },
}

/// A policy on its way to the proxy, which has no files to read it from.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct NewPolicy {
    /// `policy.yaml`.
    pub data: PolicyText,
    /// `policy.rego`, where there is one.
    pub rules: Option<PolicyText>,
    /// More CA certificates that upstreams are verified against, PEM.
    pub upstream_ca: Option<String>,
    /// What the binaries that it names are, where those are links.
    pub links: BTreeMap<String, String>,
}

/// One file of a policy.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PolicyText {
    /// For messages.
    pub name: String,
    /// What is in it.
    pub text: String,
}

/// Who made a connection, as recorded when it called connect(2).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CallerRecord {
    /// The process, as the supervisor numbers it.
    pub pid: u32,
    /// Its executable's path in the container, symlinks resolved by the kernel.
    pub exe: String,
    /// Executables of its parent, its parent's parent and so on, up to the agent's first process.
    pub ancestors: Vec<String>,
    /// Why it runs other code than its executable's and the image's; `None` where it does not, or
    /// where no entry of the policy asks for that look.
    pub tainted: Option<String>,
    /// Whether that was looked at.
    pub looked_at: bool,
}

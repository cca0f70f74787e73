//! What the kernel enforces: two network namespaces, packet rules, Landlock, system call filters,
//! users and capabilities. The only room with `unsafe`.
//!
//! In the order in which the supervisor uses them:
//!
//! | module | what it does |
//! |---|---|
//! | [`netns`] | makes and enters network namespaces |
//! | [`netlink`] | the blocking netlink socket that the four below share |
//! | [`gateway`] | the namespace at the far end of the agent's only cable; holds listeners and nothing else |
//! | [`agent_net`] | the agent's end: one address, one route, no datagrams but DNS |
//! | [`sysctl`] | the pod's own network settings, taken over into the fence |
//! | [`nftables`] | the gateway's packet rules, written as one batch and read back |
//! | [`listeners`] | the gateway's sockets, which the proxy gets by descriptor |
//! | [`sockdiag`] | whose connection is this, and what listens in the fence |
//! | [`landlock`] | which files may be used |
//! | [`seccomp`] | which system calls may be made |
//! | [`notify`] | who calls connect(2) |
//! | [`credentials`] | users, groups, capabilities |
//! | [`rlimits`] | resource limits |
//! | [`spawn`] | the child that becomes the agent |
//! | [`status`] | reads all of it back from outside |
//! | [`attempts`] | tries to get out; runs only for the tests and for `doctor` |

pub mod addresses;
pub mod agent_net;
pub mod attempts;
pub mod credentials;
mod device;
pub mod error;
pub mod gateway;
pub mod landlock;
pub mod listeners;
pub mod netlink;
pub mod netns;
pub mod nftables;
pub mod notify;
pub mod rlimits;
pub mod seccomp;
pub mod sockdiag;
pub mod spawn;
pub mod status;
pub mod sysctl;

pub use error::NetworkError;

#[cfg(test)]
mod network_tests;

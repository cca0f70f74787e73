//! Network namespaces, held by descriptor and never by a path.
//!
//! A namespace that is named nowhere ends with its last process, thread, socket and descriptor:
//! nothing goes stale under `/run/netns`, and no other process can enter it by name.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::thread::{LinkNameSpaceType, UnshareFlags};

use super::error::{NetworkError, Result};

/// A network namespace. The descriptor is close-on-exec.
#[derive(Debug)]
pub struct Namespace(OwnedFd);

/// The namespace of the calling thread.
pub fn current() -> Result<Namespace> {
    let path = "/proc/thread-self/ns/net";
    rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .map(Namespace)
        .map_err(|e| NetworkError::new("open the network namespace", path, e))
}

/// Moves the calling thread, and only it, into a new namespace, and returns that one. Needs
/// `CAP_SYS_ADMIN`.
pub fn unshare() -> Result<Namespace> {
    // SAFETY: CLONE_NEWNET alone: no descriptor table, memory or filesystem state is unshared, so
    // nothing that other threads rely on changes.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }
        .map_err(|e| NetworkError::new("unshare", "the network namespace", e))?;
    current()
}

/// Moves the calling thread, and only it, into `namespace`. Needs `CAP_SYS_ADMIN`.
pub fn enter(namespace: &Namespace) -> Result<()> {
    rustix::thread::move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))
        .map_err(|e| NetworkError::new("enter", "the network namespace", e))
}

impl Namespace {
    /// Takes a descriptor of a namespace that someone else opened (for example over a socket).
    /// That it is one is checked by the kernel when it is used.
    #[must_use]
    pub fn from_fd(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// Device and inode, which tell two namespaces apart as `stat` of `/proc/PID/ns/net` does.
    pub fn id(&self) -> Result<(u64, u64)> {
        let stat = rustix::fs::fstat(&self.0)
            .map_err(|e| NetworkError::new("stat", "the network namespace", e))?;
        Ok((stat.st_dev, stat.st_ino))
    }
}

impl AsFd for Namespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

//! The container's standard error, which the agent shares with us.
//!
//! Descriptors that were handed on share one description, flags included: an agent that makes its
//! stderr non-blocking and keeps the pipe full would make our writes fail, and denials disappear.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{FileType, fstat};

/// Gives this process (and the proxy, which inherits it) a description of its own of a stderr that
/// is a pipe, as the runtime's is. Returns the one it had, for the agent.
///
/// A terminal or a file is shared as it is: a second description of a file would write over what
/// the first wrote.
pub fn separate_stderr() -> io::Result<OwnedFd> {
    let stderr = io::stderr();
    let agents = stderr.as_fd().try_clone_to_owned()?;
    let kind = FileType::from_raw_mode(fstat(&stderr)?.st_mode);
    // Opening fails for an anonymous pipe of another user; it is shared then.
    if kind == FileType::Fifo
        && let Ok(ours) = File::options().write(true).open("/proc/self/fd/2")
    {
        rustix::stdio::dup2_stderr(&ours)?;
    }
    Ok(agents)
}

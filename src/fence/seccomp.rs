//! Which system calls a process may make.
//!
//! Four filters: the agent's (a deny list, because agents run anything), the listener's that
//! reports connect(2), the proxy's (an allow list) and the supervisor's own. Each refuses calls of
//! another architecture and of the x32 ABI, whose numbers mean something else, and answers ENOSYS
//! to calls that are newer than its table. The BPF types and the plain installation are
//! seccompiler's; [`assembler`] says why its compiler is not used.

mod agent;
mod assembler;
mod calls;
mod proxy;
mod supervisor;

#[cfg(test)]
mod interpreter;
#[cfg(all(test, target_arch = "x86_64"))]
mod listed;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fmt;
use std::os::fd::{FromRawFd, OwnedFd};

use rustix::io::Errno;
use seccompiler::sock_filter;

use assembler::{Rule, Table, Verdict};

use crate::policy::Memfd;

/// A compiled filter.
#[derive(Clone, PartialEq, Eq)]
pub struct Program {
    name: &'static str,
    code: Vec<sock_filter>,
}

impl fmt::Debug for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Program({}, {} instructions)", self.name, self.code.len())
    }
}

impl Program {
    /// What the filter is for: `agent`, `connect-listener`, `proxy` or `supervisor`.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Number of BPF instructions.
    #[must_use]
    #[allow(clippy::len_without_is_empty)] // A filter is never empty: the kernel takes none.
    pub fn len(&self) -> usize {
        self.code.len()
    }

    fn compile(name: &'static str, table: &Table) -> Self {
        Self { name, code: table.compile() }
    }
}

/// Choices of the agent's filter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AgentOptions {
    /// Whether files without a path may be made, which CUDA and some WebAssembly runtimes need.
    pub memfd: Memfd,
}

/// The agent's filter. One program holds it all, clone3 included.
#[must_use]
pub fn agent(options: AgentOptions) -> Program {
    Program::compile("agent", &agent::table(options))
}

/// Reports connect(2) to the listener and allows everything else; what is forbidden is the
/// [`agent`] filter's to say, and the kernel takes the stricter answer. Install it first: the
/// agent's filter refuses further ones.
#[must_use]
pub fn connect_listener() -> Program {
    let mut table = Table {
        foreign: Verdict::Allow,
        default: Verdict::Allow,
        last_known: calls::LAST_KNOWN,
        unknown: Verdict::Allow,
        rules: BTreeMap::new(),
    };
    table.set(&[libc::SYS_connect], Rule::Always(Verdict::Notify));
    Program::compile("connect-listener", &table)
}

/// The proxy's filter. Install it last, before the first thread: afterwards there is no exec, no
/// new process, no file opened for writing that Landlock would allow, no executable memory.
#[must_use]
pub fn proxy() -> Program {
    Program::compile("proxy", &proxy::table())
}

/// What a supervisor never needs once the fence stands. The keeper has none of its own: what it
/// forks would inherit it, and that gets the [`agent`]'s.
#[must_use]
pub fn supervisor() -> Program {
    Program::compile("supervisor", &supervisor::table())
}

/// Installs a filter on the calling thread and sets `no_new_privs`. Async-signal-safe.
pub fn install(program: &Program) -> rustix::io::Result<()> {
    outcome(seccompiler::apply_filter(&program.code))
}

fn outcome(result: Result<(), seccompiler::Error>) -> rustix::io::Result<()> {
    match result {
        Ok(()) => Ok(()),
        Err(seccompiler::Error::Prctl(error) | seccompiler::Error::Seccomp(error)) => {
            Err(Errno::from_io_error(&error).unwrap_or(Errno::INVAL))
        }
        Err(_) => Err(Errno::INVAL),
    }
}

/// Installs a filter on every thread of the process and sets `no_new_privs` for each.
pub fn install_everywhere(program: &Program) -> rustix::io::Result<()> {
    outcome(seccompiler::apply_filter_all_threads(&program.code))
}

/// Installs a filter on the calling thread and returns its listener (close-on-exec). Needs
/// `no_new_privs`. EBUSY when a filter above already has a listener. Async-signal-safe.
pub fn install_listener(program: &Program) -> rustix::io::Result<OwnedFd> {
    // A signal to a stopped call makes it start again, and with it a second notification; from
    // Linux 5.19 a call that was received waits for its answer, killed or not interrupted.
    let killable =
        libc::SECCOMP_FILTER_FLAG_NEW_LISTENER | libc::SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV;
    match set_mode_filter(program, killable) {
        Err(Errno::INVAL) => set_mode_filter(program, libc::SECCOMP_FILTER_FLAG_NEW_LISTENER),
        other => other,
    }
}

fn set_mode_filter(program: &Program, flags: libc::c_ulong) -> rustix::io::Result<OwnedFd> {
    let prog = libc::sock_fprog {
        len: u16::try_from(program.code.len()).map_err(|_| Errno::INVAL)?,
        // The kernel only reads it.
        filter: program.code.as_ptr().cast_mut().cast(),
    };
    // SAFETY: `prog` and the instructions it points to live until the call returns, and
    // seccompiler's `sock_filter` has the kernel's layout (repr(C), the same four fields).
    let result = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            flags,
            std::ptr::from_ref(&prog),
        )
    };
    let fd = super::spawn::check(result)?;
    let fd = i32::try_from(fd).map_err(|_| Errno::BADF)?;
    // SAFETY: with NEW_LISTENER the call returns a descriptor that nothing else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

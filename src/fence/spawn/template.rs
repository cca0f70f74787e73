//! What a fenced child does between fork and exec.
//!
//! Everything is prepared before the fork; nothing here allocates, locks or looks a name up. The
//! Landlock domain is not among the steps: the keeper has it, and the child inherits it.

use std::convert::Infallible;
use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd, RawFd};

use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::process::Pid;

use super::message::Reporter;
use super::{
    ChildStep, ExecImage, check, close_range, duplicate_above, exit_code_of_exec, exit_now, place,
    reset_signals,
};
use crate::fence::credentials::{self, Bounding, Identity};
use crate::fence::rlimits::{self, Limits};
use crate::fence::seccomp::{self, Program};

/// Descriptors that become 0, 1 and 2. The same number may be given more than once.
pub type Stdio = [RawFd; 3];

/// Exit code of a child whose fence could not be built.
const NOT_FENCED: i32 = 125;

/// A fenced child, prepared before the fork.
#[derive(Debug)]
pub struct Template {
    /// System call filters, installed last and in this order. The agent's must be the last one:
    /// it refuses further filters.
    pub filters: Vec<Program>,
    /// The filter that reports connect(2), installed before them; its listener is sent to the
    /// parent.
    pub listener: Option<Program>,
    /// Who the child becomes.
    pub identity: Identity,
    /// What is done without `CAP_SETPCAP`; a refusal that is let pass is sent as a warning.
    pub bounding: Bounding,
    /// Resource limits.
    pub limits: Limits,
    /// The program.
    pub exec: ExecImage,
    /// Working directory. Entered as root, as container runtimes do, or else as the user.
    pub workdir: CString,
    /// File mode creation mask, such as 0o022.
    pub umask: u32,
    /// Descriptor 0 is a terminal that becomes the controlling one.
    pub tty: bool,
}

type Failure = (ChildStep, Errno);

fn at<T>(step: ChildStep, result: rustix::io::Result<T>) -> Result<T, Failure> {
    result.map_err(|errno| (step, errno))
}

impl Template {
    /// The child's side. Never returns: it becomes the program, or it ends with 125 (the fence),
    /// 126 or 127 (exec) after a message that says why.
    ///
    /// `control` is the child's end of a seqpacket socket, see [`super::receive`]. `parent` is
    /// what getppid says while the parent lives (`None`: it is outside this PID namespace). Call
    /// it in a forked child only: all other descriptors are closed under their owners.
    pub fn run_child(&self, stdio: Stdio, control: RawFd, parent: Option<Pid>) -> ! {
        reset_signals();
        // Out of the way of 0 to 2. Without it there is no way to tell anything.
        let Ok(control) = duplicate_above(control, 10) else { exit_now(NOT_FENCED) };
        // SAFETY: it was just made, and this function never returns to close it.
        let reporter = Reporter(unsafe { BorrowedFd::borrow_raw(control) });
        let Err((step, errno)) = self.fence(stdio, control, parent, &reporter);
        // If this cannot be sent the parent sees the socket's end before any exec, and the code.
        let _ = reporter.failed(step, errno);
        exit_now(if step == ChildStep::Exec { exit_code_of_exec(errno) } else { NOT_FENCED })
    }

    fn fence(
        &self,
        stdio: Stdio,
        control: RawFd,
        parent: Option<Pid>,
        reporter: &Reporter<'_>,
    ) -> Result<Infallible, Failure> {
        at(ChildStep::Descriptors, place_stdio(stdio))?;
        at(ChildStep::Session, rustix::process::setsid())?;
        if self.tty {
            at(ChildStep::Terminal, take_terminal())?;
        }
        rustix::process::umask(Mode::from_raw_mode(self.umask));
        let entered = rustix::process::chdir(self.workdir.as_c_str());
        at(ChildStep::Limits, rlimits::apply(self.limits))?;
        if let Err(errno) = credentials::own_session_keyring() {
            at(ChildStep::Report, reporter.warning(ChildStep::Keyring, errno))?;
        }

        let dropped = credentials::drop_to(&self.identity, self.bounding)
            .map_err(|error| (error.step, error.errno))?;
        for (taken, step) in
            [(dropped.bounding, ChildStep::Bounding), (dropped.securebits, ChildStep::Securebits)]
        {
            if !taken {
                at(ChildStep::Report, reporter.warning(step, Errno::PERM))?;
            }
        }
        // A change of user clears the death signal, so it comes after.
        at(ChildStep::ParentDeath, credentials::parent_death_signal_kill(parent))?;
        // On a file system that does not trust root only the user may enter.
        if let Err(Errno::ACCESS | Errno::PERM) = entered {
            at(ChildStep::Workdir, rustix::process::chdir(self.workdir.as_c_str()))?;
        } else {
            at(ChildStep::Workdir, entered)?;
        }
        at(ChildStep::Workdir, directory_is_reachable())?;
        at(ChildStep::NoNewPrivs, credentials::no_new_privs())?;
        at(ChildStep::CloseRange, close_all_but(control))?;

        if let Some(program) = &self.listener {
            let listener = at(ChildStep::Listener, seccomp::install_listener(program))?;
            at(ChildStep::SendListener, reporter.listener(listener.as_fd()))?;
        }
        for program in &self.filters {
            at(ChildStep::Filter, seccomp::install(program))?;
        }
        at(ChildStep::Report, reporter.ready())?;
        at(ChildStep::Wait, reporter.wait())?;
        Err((ChildStep::Exec, self.exec.exec()))
    }
}

/// By way of high numbers, because the three may be each other's places.
fn place_stdio(stdio: Stdio) -> rustix::io::Result<()> {
    let mut high = [-1; 3];
    for (to, from) in high.iter_mut().zip(stdio) {
        *to = duplicate_above(from, 10)?;
    }
    for (target, fd) in (0..).zip(high) {
        place(fd, target)?;
    }
    Ok(())
}

/// Takes descriptor 0 as the controlling terminal. In a container it belongs to the session of
/// PID 1: taking it away there needs `CAP_SYS_ADMIN` and the argument 1.
fn take_terminal() -> rustix::io::Result<()> {
    for steal in [1, 0] {
        // SAFETY: the command takes a number.
        let result = unsafe { libc::ioctl(0, libc::TIOCSCTTY, steal) };
        match check(result.into()) {
            Err(Errno::PERM) if steal == 1 => {}
            other => return other.map(drop),
        }
    }
    Ok(())
}

/// A working directory outside the root (by a descriptor that leaked from another mount
/// namespace) would be a way out.
fn directory_is_reachable() -> rustix::io::Result<()> {
    let mut path = [0_u8; 4096];
    // SAFETY: the kernel writes at most the given length to the buffer.
    let result = unsafe { libc::syscall(libc::SYS_getcwd, path.as_mut_ptr(), path.len()) };
    match check(result) {
        // The kernel writes "(unreachable)" before such a path.
        Ok(_) if path[0] == b'/' => Ok(()),
        Ok(_) => Err(Errno::XDEV),
        Err(errno) => Err(errno),
    }
}

/// Closes everything from 3 on but the control socket, rather than marking it: the child may hold
/// a copy of the parent's end, and would then never see it close.
fn close_all_but(control: RawFd) -> rustix::io::Result<()> {
    let control = u32::try_from(control).map_err(|_| Errno::BADF)?;
    close_range(3, control.saturating_sub(1), 0)?;
    close_range(control.saturating_add(1), u32::MAX, 0)
}

//! The supervisor's life while the agent runs: it passes signals on, reaps, serves `enter`, and
//! ends when the agent, the proxy or the keeper does.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, WaitOptions};

use super::entered::Entered;
use super::keeper::{REAPED_AT_ONCE, exit_code};
use super::launch::{Keeper, Launched};
use super::signals::{Signals, timespec};

/// The exit code after `--timeout`, as timeout(1) has it.
pub const TIMED_OUT: i32 = 124;
/// How long an agent has between SIGTERM and SIGKILL after `--timeout`.
const GRACE: Duration = Duration::from_millis(100);

/// The processes that are watched.
#[derive(Debug)]
pub struct Watch {
    /// The signals.
    pub signals: Signals,
    /// The keeper, by which children are signalled and told of.
    pub keeper: Keeper,
    /// The keeper's own pid.
    pub keeper_pid: Pid,
    /// The proxy's pid.
    pub proxy_pid: Pid,
    /// The agent.
    pub agent: Launched,
    /// `enter`.
    pub entered: Entered,
    /// When the agent's time is over.
    pub deadline: Option<Instant>,
    /// There may be more to reap than was.
    pub more: bool,
}

impl Watch {
    /// Runs until the agent has ended; returns the exit code. An error means that the fence
    /// broke: the caller ends, and everything in the fence with it.
    pub fn run(mut self) -> Result<i32> {
        let mut timed_out = false;
        // What came during the start; the descriptor says nothing of it.
        self.signals()?;
        loop {
            if let Some(code) = self.children()? {
                return Ok(if timed_out { TIMED_OUT } else { code });
            }
            let ready = self.wait()?;
            if self.deadline.is_some_and(|at| Instant::now() >= at) {
                let signal = if timed_out { Signal::SIGKILL } else { Signal::SIGTERM };
                self.keeper.signal(self.agent.id, signal as i32)?;
                self.deadline = Some(Instant::now() + GRACE);
                timed_out = true;
            }
            if ready[0] {
                self.signals()?;
            }
            if self.more {
                self.reap()?;
            }
            self.entered.serve(&ready[2..], &mut self.keeper);
        }
    }

    fn wait(&self) -> Result<Vec<bool>> {
        let next = self.deadline.into_iter().chain(self.entered.deadline()).min();
        let timeout = next.map(|at| at.saturating_duration_since(Instant::now()));
        let timeout = if self.more { Some(Duration::ZERO) } else { timeout };
        let mut fds = vec![
            PollFd::new(&self.signals, PollFlags::IN),
            PollFd::new(&self.keeper, PollFlags::IN),
        ];
        fds.extend(self.entered.poll_fds());
        let timeout = timeout.map(timespec);
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error).context("cannot wait for events"),
        }
        Ok(fds.iter().map(|fd| !fd.revents().is_empty()).collect())
    }

    /// The agent's exit code once it has ended.
    fn children(&mut self) -> Result<Option<i32>> {
        let Some(ended) = self.keeper.ended().context("the keeper")? else {
            bail!("the keeper has ended");
        };
        let mut code = None;
        for (id, status) in ended {
            if id == self.agent.id {
                code = Some(status);
            } else {
                self.entered.ended(id, status);
            }
        }
        Ok(code)
    }

    fn signals(&mut self) -> Result<()> {
        let this = rustix::process::getpid().as_raw_nonzero().get().cast_unsigned();
        while let Some(info) = self.signals.next()? {
            let signal = info.ssi_signo.cast_signed();
            if signal == Signal::SIGCHLD as i32 {
                self.more = true;
            } else if info.ssi_pid != this {
                // What comes from ourselves is a SIGPIPE of a stderr that nobody reads.
                self.keeper.signal(self.agent.id, signal).context("cannot signal the agent")?;
            }
        }
        Ok(())
    }

    /// Reaps our own two and, as PID 1, everything that lost its parent; in portions, so that who
    /// forks fast does not keep us from the rest.
    fn reap(&mut self) -> Result<()> {
        for _ in 0..REAPED_AT_ONCE {
            match rustix::process::wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) => {
                    let code = exit_code(status).unwrap_or_default();
                    if pid == self.proxy_pid {
                        bail!("the proxy has ended with code {code}");
                    }
                    if pid == self.keeper_pid {
                        bail!("the keeper has ended with code {code}");
                    }
                }
                Ok(None) | Err(rustix::io::Errno::CHILD) => {
                    self.more = false;
                    break;
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error).context("cannot reap"),
            }
        }
        Ok(())
    }
}

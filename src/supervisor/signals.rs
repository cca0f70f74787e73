//! The signals of this process: all of them are blocked and read from a descriptor.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd, siginfo};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// The signals that come to this process, as a descriptor.
#[derive(Debug)]
pub struct Signals {
    descriptor: SignalFd,
    /// Came before the agent ran, and are for it.
    kept: RefCell<VecDeque<siginfo>>,
}

impl Signals {
    /// Blocks all of them; called first of all, so that every later thread and process starts with
    /// them blocked and none is lost.
    ///
    /// Real-time signals are among them, and those that stand for a fault: a pod's stop signal may
    /// be any. A real fault of this process ends it all the same, since the kernel holds back no
    /// signal that an instruction has caused (signal(7)).
    pub fn block() -> Result<Self> {
        let mask = SigSet::all();
        mask.thread_block().context("cannot block signals")?;
        SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
            .map(|descriptor| Self { descriptor, kept: RefCell::default() })
            .context("cannot make a signalfd")
    }
}

/// How long any of our own processes may take for its part of the start. It takes milliseconds; a
/// node that is short of everything is given this.
pub const START: Duration = Duration::from_secs(60);
/// How often a wait that cannot watch signals looks at them.
const LOOK: Duration = Duration::from_millis(50);

impl Signals {
    /// The next one that has come. What came during the start is first; ask once before the first
    /// wait.
    pub fn next(&self) -> Result<Option<siginfo>> {
        match self.kept.borrow_mut().pop_front() {
            None => self.read(),
            kept => Ok(kept),
        }
    }

    fn read(&self) -> Result<Option<siginfo>> {
        self.descriptor.read_signal().context("cannot read a signal")
    }

    /// Waits for a part of the start to say something. A signal that is to end the container ends
    /// the wait, as does [`START`].
    pub fn wait_for(&self, fd: impl AsFd, what: &str) -> Result<()> {
        let until = Instant::now() + START;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let left = timespec(left);
            let mut ready =
                [PollFd::new(&fd, PollFlags::IN), PollFd::new(&self.descriptor, PollFlags::IN)];
            match poll(&mut ready, Some(&left)) {
                Ok(0) => bail!("{what}: nothing came within {} s", START.as_secs()),
                Ok(_) if !ready[0].revents().is_empty() => return Ok(()),
                Ok(_) => self.go_on()?,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error).context("cannot wait"),
            }
        }
    }

    /// The same for what another thread of ours says.
    pub fn wait_for_thread<T>(&self, told: &Receiver<T>, what: &str) -> Result<T> {
        let until = Instant::now() + START;
        loop {
            match told.recv_timeout(LOOK) {
                Ok(value) => return Ok(value),
                Err(RecvTimeoutError::Disconnected) => bail!("{what}: the thread ended"),
                Err(RecvTimeoutError::Timeout) => self.go_on()?,
            }
            if Instant::now() >= until {
                bail!("{what}: nothing came within {} s", START.as_secs());
            }
        }
    }

    /// Reads what has come, and keeps for the agent what does not end the start.
    fn go_on(&self) -> Result<()> {
        const ENDS: [Signal; 4] =
            [Signal::SIGTERM, Signal::SIGINT, Signal::SIGQUIT, Signal::SIGHUP];
        while let Some(info) = self.read()? {
            let number = info.ssi_signo.cast_signed();
            if let Some(signal) = ENDS.iter().find(|signal| **signal as i32 == number) {
                bail!("ended by {signal} before the agent ran");
            }
            self.kept.borrow_mut().push_back(info);
        }
        Ok(())
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

/// A time as poll(2) takes it.
#[must_use]
pub fn timespec(time: Duration) -> Timespec {
    Timespec {
        tv_sec: time.as_secs().try_into().unwrap_or(i64::MAX),
        tv_nsec: time.subsec_nanos().into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::signal::raise;
    use std::sync::mpsc::channel;

    #[test]
    fn a_signal_ends_the_start_or_waits_for_the_agent() {
        // On this thread alone; the harness has others.
        let signals = Signals::block().unwrap();
        raise(Signal::SIGUSR2).unwrap();
        let (tell, told) = channel();
        tell.send(7).unwrap();
        signals.go_on().unwrap();
        assert_eq!(signals.wait_for_thread(&told, "a thread").unwrap(), 7);
        let kept = signals.next().unwrap().unwrap();
        assert_eq!(kept.ssi_signo.cast_signed(), Signal::SIGUSR2 as i32);
        assert!(signals.next().unwrap().is_none());

        raise(Signal::SIGTERM).unwrap();
        let (silent, _other) = super::super::packet::pair().unwrap();
        let error = signals.wait_for(&silent, "a packet").unwrap_err();
        assert_eq!(error.to_string(), "ended by SIGTERM before the agent ran");
        drop(tell);
        let error = signals.wait_for_thread(&told, "a thread").unwrap_err();
        assert!(error.to_string().contains("ended"), "{error}");
    }
}

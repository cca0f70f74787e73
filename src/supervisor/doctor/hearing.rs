//! Hearing what the attempts say, within bounds: what speaks is of the agent's user, and may go on
//! for ever, in one line, or say nothing at all. A signal ends the wait too, so that bait is taken
//! away by whoever laid it.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use crate::supervisor::signals::timespec;

/// How long the whole table may take; it takes a few seconds.
pub const DEADLINE: Duration = Duration::from_secs(120);
/// The longest line, in bytes; the longest that the attempts write has a few hundred.
const MAX_LINE: usize = 64 << 10;
/// The most of all lines together, in bytes.
const MAX_ALL: usize = 4 << 20;
/// Signals that end this process when nobody blocks them.
const ENDING: [Signal; 3] = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP];

/// Until when to wait; while it lives the signals in [`ENDING`] end a wait and nothing else.
#[derive(Debug)]
pub struct Patience {
    until: Instant,
    mask: SigSet,
    signals: SignalFd,
}

impl Patience {
    /// Begins to count. This process must have one thread.
    pub fn begin(time: Duration) -> Result<Self> {
        let mut mask = SigSet::empty();
        for signal in ENDING {
            mask.add(signal);
        }
        mask.thread_block().context("cannot block signals")?;
        let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
            .context("cannot make a signalfd")?;
        Ok(Self { until: Instant::now() + time, mask, signals })
    }

    /// Waits until `fd` can be read, or has ended.
    pub fn wait(&self, fd: impl AsFd) -> Result<()> {
        loop {
            let left = self.until.saturating_duration_since(Instant::now());
            let left = timespec(left);
            let mut ready =
                [PollFd::new(&self.signals, PollFlags::IN), PollFd::new(&fd, PollFlags::IN)];
            match poll(&mut ready, Some(&left)) {
                Ok(0) => bail!("the attempts take too long: one of them hangs"),
                Ok(_) if !ready[0].revents().is_empty() => {
                    let signal = self.signals.read_signal().ok().flatten();
                    let number = signal.map_or(0, |signal| signal.ssi_signo);
                    bail!("ended by signal {number}");
                }
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error).context("cannot wait"),
            }
        }
    }

    /// Gives each line that comes from `from` to `heard`, until nobody can write any more.
    pub fn lines(&self, from: &OwnedFd, mut heard: impl FnMut(&[u8])) -> Result<()> {
        let (mut line, mut all) = (Vec::new(), 0);
        let mut buffer = [0; 16 << 10];
        loop {
            self.wait(from)?;
            let count = match rustix::io::read(from, &mut buffer) {
                Ok(0) => break,
                Ok(count) => count,
                Err(Errno::INTR) => continue,
                Err(error) => {
                    return Err(io::Error::from(error)).context("cannot read what they say");
                }
            };
            all += count;
            ensure!(all <= MAX_ALL, "the attempts say more than {MAX_ALL} bytes");
            for part in buffer[..count].split_inclusive(|byte| *byte == b'\n') {
                line.extend_from_slice(part);
                ensure!(line.len() <= MAX_LINE, "the attempts say a line above {MAX_LINE} bytes");
                if line.pop_if(|last| *last == b'\n').is_some() {
                    heard(&line);
                    line.clear();
                }
            }
        }
        if !line.is_empty() {
            heard(&line);
        }
        Ok(())
    }
}

impl Drop for Patience {
    fn drop(&mut self) {
        // They were not blocked before: this is the program's main thread.
        let _ = self.mask.thread_unblock();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    /// What is heard of these bytes by a patience with this much time.
    fn hear(bytes: Vec<u8>, time: Duration) -> Result<Vec<Vec<u8>>> {
        let (read, mut write) = io::pipe().unwrap();
        let writer = std::thread::spawn(move || write.write_all(&bytes));
        let mut lines = Vec::new();
        let outcome =
            Patience::begin(time)?.lines(&read.into(), |line| lines.push(line.to_owned()));
        drop(writer.join());
        outcome.map(|()| lines)
    }

    #[test]
    fn lines_come_whole_however_they_arrive() {
        let long = vec![b'x'; 40_000];
        let text = [b"one\n\n", &long[..], b"\nlast"].concat();
        let lines = hear(text, DEADLINE).unwrap();
        assert_eq!(lines, [&b"one"[..], b"", &long, b"last"]);
    }

    #[test]
    fn neither_one_line_nor_all_of_them_are_without_end() {
        let error = hear(vec![b'x'; MAX_LINE + 1], DEADLINE).unwrap_err().to_string();
        assert!(error.contains("a line above"), "{error}");
        let error = hear(b"x\n".repeat(MAX_ALL / 2 + 1), DEADLINE).unwrap_err().to_string();
        assert!(error.contains("more than"), "{error}");
    }

    #[test]
    fn silence_and_signals_end_the_wait() {
        let (read, _write) = io::pipe().unwrap();
        let patience = Patience::begin(Duration::from_millis(5)).unwrap();
        let error = patience.wait(&read).unwrap_err().to_string();
        assert!(error.contains("take too long"), "{error}");
        drop(patience);
        for signal in ENDING {
            let patience = Patience::begin(DEADLINE).unwrap();
            // To this thread alone, which blocks it.
            nix::sys::signal::raise(signal).unwrap();
            let error = patience.wait(&read).unwrap_err().to_string();
            assert!(error.contains(&format!("signal {}", signal as i32)), "{error}");
        }
    }
}

//! Where events go: the container's stderr, one write a line; and who else wants them.

use std::fmt;
use std::io::{self, Write};
use std::str::FromStr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use super::{Class, Event, Severity};

/// How much is written. Denials and findings are, at every level.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Level {
    /// Denials, findings, and what is missing of the fence.
    Error,
    /// The same, with what is worth a look.
    #[default]
    Warn,
    /// Every decision.
    Info,
    /// As `info`, for now.
    Debug,
    /// As `info`, for now.
    Trace,
}

const LEVELS: [(&str, Level); 5] = [
    ("error", Level::Error),
    ("warn", Level::Warn),
    ("info", Level::Info),
    ("debug", Level::Debug),
    ("trace", Level::Trace),
];

/// A word that names no level.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{}' is no log level: write error, warn, info, debug or trace", .0.escape_debug())]
pub struct UnknownLevel(String);

impl FromStr for Level {
    type Err = UnknownLevel;

    fn from_str(word: &str) -> Result<Self, UnknownLevel> {
        LEVELS
            .iter()
            .find(|(name, _)| name.eq_ignore_ascii_case(word))
            .map(|(_, level)| *level)
            .ok_or_else(|| UnknownLevel(word.to_owned()))
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = LEVELS.iter().find(|(_, level)| level == self).map_or("warn", |(name, _)| name);
        f.write_str(word)
    }
}

static LEVEL: AtomicU8 = AtomicU8::new(Level::Warn as u8);

/// Sets the process's level.
pub fn set_level(level: Level) {
    LEVEL.store(level as u8, Ordering::Relaxed);
}

fn level() -> Level {
    let level = LEVEL.load(Ordering::Relaxed);
    let level = LEVELS.iter().map(|(_, known)| *known).find(|known| *known as u8 == level);
    level.unwrap_or_default()
}

/// Who gets events beside stderr, as JSON.
pub trait Tap: Send + Sync {
    /// Whether it wants those too that the level does not let pass.
    fn wants_all(&self) -> bool;

    /// Takes one event, a JSON object on one line without its end; `grave` where no level keeps it
    /// out of the log (a denial, a finding). Called by whichever thread tells of the event: it must
    /// not wait.
    fn take(&self, json: String, grave: bool);
}

static TAP: OnceLock<&'static dyn Tap> = OnceLock::new();

/// Sets the process's tap; one that is there stays.
pub fn tap(tap: &'static dyn Tap) {
    // A second one would be a second proxy in one process, which only tests have.
    let _ = TAP.set(tap);
}

fn tap_wants_all() -> bool {
    TAP.get().is_some_and(|tap| tap.wants_all())
}

/// Whether anybody is told of what goes as it should.
#[must_use]
pub fn informs() -> bool {
    level() >= Level::Info || tap_wants_all()
}

/// Tells of an event of [`Severity::Info`] that is no denial, which is put together only when
/// somebody is to hear of it.
pub fn inform(event: impl FnOnce() -> Event) {
    if informs() {
        emit(&event());
    }
}

/// Events that could not be written since the last one that could.
static LOST: AtomicU64 = AtomicU64::new(0);
/// How long a full stderr is waited for.
const PATIENCE: Duration = Duration::from_secs(1);

/// Writes an event to stderr, when the level lets it pass, and hands it to the [`Tap`].
///
/// A stderr that stays full for a second, or is closed, loses the line: the fence does not depend
/// on who reads its log. How many were lost is said before the next that is written.
pub fn emit(event: &Event) {
    let now = SystemTime::now();
    let passes = event.passes(level());
    if let Some(tap) = TAP.get()
        && (passes || tap.wants_all())
    {
        tap.take(event.json(now), event.passes(Level::Error));
    }
    if passes {
        let lost = LOST.swap(0, Ordering::Relaxed);
        let mut lines = String::new();
        if lost > 0 {
            lines = Event::new(Class::Finding, "LOST", Severity::High)
                .subject(format!("{lost} events were lost: stderr was full"))
                .shorthand();
            lines.push('\n');
        }
        lines += &event.line(now);
        lines.push('\n');
        // The lock keeps lines of two threads apart.
        if write_patiently(&mut std::io::stderr().lock(), lines.as_bytes()).is_err() {
            LOST.fetch_add(lost + 1, Ordering::Relaxed);
        }
    }
}

/// Like `write_all`, but waits where somebody made the descriptor non-blocking.
fn write_patiently(to: &mut impl Write, mut bytes: &[u8]) -> io::Result<()> {
    let until = Instant::now() + PATIENCE;
    while !bytes.is_empty() {
        match to.write(bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => bytes = &bytes[written..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && Instant::now() < until => {
                std::thread::sleep(Duration::from_millis(1));
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_read_back_as_written() {
        for (word, level) in LEVELS {
            assert_eq!(word.parse(), Ok(level));
            assert_eq!(level.to_string(), word);
        }
        assert!("verbose".parse::<Level>().unwrap_err().to_string().contains("warn"));
    }

    #[test]
    fn a_full_pipe_is_waited_for() {
        struct Busy(u8, Vec<u8>);
        impl Write for Busy {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                self.0 += 1;
                if self.0 % 2 == 1 {
                    return Err(io::ErrorKind::WouldBlock.into());
                }
                self.1.push(bytes[0]);
                Ok(1)
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let mut busy = Busy(0, Vec::new());
        write_patiently(&mut busy, b"line").unwrap();
        assert_eq!(busy.1, b"line");
    }
}

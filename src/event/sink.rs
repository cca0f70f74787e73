//! Where events go: the container's stderr, one write a line.
#![forbid(unsafe_code)]

use std::fmt;
use std::io::Write as _;
use std::str::FromStr;
use std::sync::atomic::{AtomicU8, Ordering};

use super::Event;

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

/// Writes an event to stderr, when the level lets it pass.
///
/// A closed or full stderr loses the line: the fence does not depend on who reads its log.
pub fn emit(event: &Event) {
    let level = LEVEL.load(Ordering::Relaxed);
    let level = LEVELS.iter().map(|(_, known)| *known).find(|known| *known as u8 == level);
    if event.passes(level.unwrap_or_default()) {
        let mut line = event.shorthand();
        line.push('\n');
        // One write of a whole line: lines of two threads never mix.
        let _ = std::io::stderr().lock().write_all(line.as_bytes());
    }
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
}

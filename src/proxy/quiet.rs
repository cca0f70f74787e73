//! Keeps what repeats out of the log, and counts it: nothing that was refused goes without a trace.

use std::collections::HashMap;
use std::hash::Hash;
use std::time::{Duration, Instant};

use tokio::time::{Interval, MissedTickBehavior, interval};

/// How long the same refusal is not repeated in the log, and how often what was left out is told.
pub(crate) const QUIET: Duration = Duration::from_secs(10);

/// How many different refusals are told apart within that time; more are only counted.
const TOLD: usize = 512;

/// Keeps a program that tries again and again from filling the log.
pub(crate) struct Quiet<K> {
    told: HashMap<K, Instant>,
    muted: u64,
}

/// Ticks when what was counted is to be told.
pub(crate) fn period() -> Interval {
    let mut period = interval(QUIET);
    period.set_missed_tick_behavior(MissedTickBehavior::Delay);
    period
}

impl<K: Eq + Hash> Quiet<K> {
    pub(crate) fn new() -> Self {
        Self { told: HashMap::new(), muted: 0 }
    }

    /// Whether this is to be told now; counted if not.
    pub(crate) fn tell(&mut self, key: K, now: Instant) -> bool {
        let tell = self.is_new(key, now);
        if !tell {
            self.muted = self.muted.saturating_add(1);
        }
        tell
    }

    /// How many were not told since the last time this was asked.
    pub(crate) fn take_muted(&mut self) -> u64 {
        std::mem::take(&mut self.muted)
    }

    fn is_new(&mut self, key: K, now: Instant) -> bool {
        if let Some(last) = self.told.get_mut(&key) {
            let due = now.duration_since(*last) >= QUIET;
            if due {
                *last = now;
            }
            return due;
        }
        if self.told.len() >= TOLD {
            self.told.retain(|_, last| now.duration_since(*last) < QUIET);
            if self.told.len() >= TOLD {
                return false;
            }
        }
        self.told.insert(key, now);
        true
    }
}

/// How many lines of one kind are written in a row, whatever they say, and how many a second after
/// that.
const BURST: u32 = 200;
const PER_SECOND: u32 = 10;

/// Lets single refusals pass, and of a flood the first of each that can be told apart.
pub(crate) struct Flood {
    quiet: Quiet<u64>,
    /// Lines that may be written, and when that was reckoned.
    left: u32,
    at: Option<Instant>,
}

impl Flood {
    pub(crate) fn new() -> Self {
        Self { quiet: Quiet::new(), left: BURST, at: None }
    }

    /// Whether this is to be told now; counted if not. `what` tells one refusal from another: the
    /// first of each is told, of as many as are told apart ([`QUIET`] seconds, 512).
    pub(crate) fn tell(&mut self, what: u64, now: Instant) -> bool {
        let earned = self.at.map_or(0, |at| now.duration_since(at).as_secs());
        if earned > 0 || self.at.is_none() {
            let earned = u32::try_from(earned).unwrap_or(u32::MAX).saturating_mul(PER_SECOND);
            self.left = self.left.saturating_add(earned).min(BURST);
            self.at = Some(now);
        }
        // Asked in any case, so that it is known later.
        let new = self.quiet.is_new(what, now);
        if self.left > 0 {
            self.left -= 1;
        } else if !new {
            self.quiet.muted = self.quiet.muted.saturating_add(1);
            return false;
        }
        true
    }

    /// How many were not told since the last time this was asked.
    pub(crate) fn take_muted(&mut self) -> u64 {
        self.quiet.take_muted()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_counted_and_the_first_of_each_is_told() {
        let mut flood = Flood::new();
        let start = Instant::now();
        let told = (0..10_000).filter(|_| flood.tell(1, start)).count();
        assert_eq!(told, BURST as usize);
        assert!(flood.tell(2, start), "another one");
        assert!(!flood.tell(2, start));
        assert_eq!(flood.take_muted(), 10_000 - u64::from(BURST) + 1);
        let later = start + Duration::from_secs(2);
        let told = (0..100).filter(|_| flood.tell(1, later)).count();
        assert_eq!(told, 2 * PER_SECOND as usize);
        // However many there are to be told apart: bounded in all.
        let mut flood = Flood::new();
        let told = (0..100_000).filter(|what| flood.tell(*what, start)).count();
        assert!(told <= TOLD + BURST as usize, "{told}");
    }

    #[test]
    fn repeated_refusals_are_told_once_in_a_while_and_memory_is_bounded() {
        let mut quiet = Quiet::new();
        let start = Instant::now();
        assert!(quiet.tell(0, start));
        assert!(!quiet.tell(0, start + QUIET / 2));
        assert!(quiet.tell(0, start + QUIET));
        let told = (1..10_000).filter(|key| quiet.tell(*key, start + QUIET)).count();
        assert_eq!(told, TOLD - 1);
        assert_eq!(quiet.told.len(), TOLD);
        assert!(quiet.tell(20_000, start + QUIET * 3), "old ones make room");
    }

    #[test]
    fn what_is_not_told_is_counted() {
        let mut quiet = Quiet::new();
        let start = Instant::now();
        let told: u64 = (0..2_000).map(|key| u64::from(quiet.tell(key % 1_000, start))).sum();
        assert_eq!(told, TOLD as u64);
        assert_eq!(quiet.take_muted(), 2_000 - told);
        assert_eq!(quiet.take_muted(), 0);
    }
}

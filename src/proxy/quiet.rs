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

#[cfg(test)]
mod tests {
    use super::*;

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

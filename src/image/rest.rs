//! Whom nobody asks for a while.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Entries kept; who rests beyond that is asked all the same.
const MOST: usize = 1024;

/// Those who rest, and until when.
pub(super) struct Resting<K>(Mutex<HashMap<K, Instant>>);

impl<K> Default for Resting<K> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<K: Hash + Eq> Resting<K> {
    /// Whether it is to be left alone now.
    pub(super) fn has(&self, key: &K) -> bool {
        let resting = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        resting.get(key).is_some_and(|until| *until > Instant::now())
    }

    /// Leaves it alone for so long.
    pub(super) fn begin(&self, key: K, rest: Duration) {
        let mut resting = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        if resting.len() >= MOST {
            resting.retain(|_, until| *until > now);
        }
        if resting.len() < MOST {
            resting.insert(key, now + rest);
        }
    }
}

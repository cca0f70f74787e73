//! How many connections the agent may have open, and that none of its programs takes them all.
//!
//! Each of the two listeners has connections that the other cannot take. Of a listener's, a program
//! gets another one while it holds no more than are free there: one that opens all it can ends with
//! half of them, a second one with half of the rest, and a program that has none gets one as long as
//! there is any. Whose a connection is takes a question to the supervisor; few of these are open at a time,
//! and whatever comes meanwhile waits in the listener's backlog.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// The most connections of the agent at a time.
pub(crate) const CONNECTIONS: usize = 1024;

/// The most that one listener may have of them.
const OF_ONE_LISTENER: usize = 768;

/// How many connections of a listener wait for their caller's name at a time.
const IDENTIFYING: usize = 64;

/// What both listeners share.
struct All {
    free: Arc<Semaphore>,
    /// By pid; only those that hold any.
    held: Mutex<HashMap<u32, usize>>,
}

/// The connections of one listener.
#[derive(Clone)]
pub(crate) struct Slots {
    all: Arc<All>,
    own: Arc<Semaphore>,
    identifying: Arc<Semaphore>,
}

impl Slots {
    /// For two listeners.
    pub(crate) fn pair() -> (Self, Self) {
        let free = Arc::new(Semaphore::new(CONNECTIONS));
        let all = Arc::new(All { free, held: Mutex::default() });
        let one = |all| Self {
            all,
            own: Arc::new(Semaphore::new(OF_ONE_LISTENER)),
            identifying: Arc::new(Semaphore::new(IDENTIFYING)),
        };
        (one(Arc::clone(&all)), one(all))
    }

    /// The same connections for one more listener, one of many: its own may wait for their callers'
    /// names, a few at a time, without keeping those of others.
    pub(crate) fn beside(&self) -> Self {
        Self { identifying: Arc::new(Semaphore::new(IDENTIFYING / 8)), ..self.clone() }
    }

    /// Waits until the next connection may be accepted. Kept until its caller is known.
    pub(crate) async fn identifying(&self) -> Option<OwnedSemaphorePermit> {
        // It is never closed.
        Arc::clone(&self.identifying).acquire_owned().await.ok()
    }

    /// For a connection whose caller is not known yet; none when there are too many.
    pub(crate) fn take(&self) -> Option<Slot> {
        let own = Arc::clone(&self.own).try_acquire_owned().ok()?;
        let free = Arc::clone(&self.all.free).try_acquire_owned().ok()?;
        let slots = self.clone();
        Some(Slot { slots, caller: None, _permits: (own, free) })
    }

    /// Waits until no connection of either listener is open.
    pub(crate) async fn drained(&self) {
        let all = u32::try_from(CONNECTIONS).unwrap_or(u32::MAX);
        let _ = self.all.free.acquire_many(all).await;
    }
}

/// One connection's place; free again when this is dropped.
pub(crate) struct Slot {
    slots: Slots,
    caller: Option<u32>,
    _permits: (OwnedSemaphorePermit, OwnedSemaphorePermit),
}

impl Slot {
    /// Counts the connection as one of this process; `false` when it has its share already.
    #[must_use]
    pub(crate) fn belongs_to(&mut self, pid: u32) -> bool {
        let Slots { all, own, .. } = &self.slots;
        let mut held = all.held.lock().unwrap_or_else(PoisonError::into_inner);
        let count = held.get(&pid).copied().unwrap_or_default();
        let free = own.available_permits().min(all.free.available_permits());
        if self.caller.is_some() || count > free {
            return false;
        }
        held.insert(pid, count + 1);
        self.caller = Some(pid);
        true
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let Some(pid) = self.caller else { return };
        let mut held = self.slots.all.held.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = held.get_mut(&pid) {
            *count -= 1;
            if *count == 0 {
                held.remove(&pid);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As many as a process gets.
    fn hog(slots: &Slots, pid: u32) -> Vec<Slot> {
        let one = || slots.take().filter_map_owner(pid);
        std::iter::from_fn(one).take(CONNECTIONS).collect()
    }

    trait Owner {
        fn filter_map_owner(self, pid: u32) -> Option<Slot>;
    }

    impl Owner for Option<Slot> {
        fn filter_map_owner(self, pid: u32) -> Option<Slot> {
            let mut slot = self?;
            slot.belongs_to(pid).then_some(slot)
        }
    }

    #[tokio::test]
    async fn few_callers_of_a_listener_are_looked_for_at_a_time() {
        let (one, other) = Slots::pair();
        let mut asked = Vec::new();
        for _ in 0..64 {
            asked.push(one.identifying().await.expect("a place"));
        }
        let next = one.identifying();
        tokio::pin!(next);
        let waits = tokio::time::timeout(std::time::Duration::from_millis(20), &mut next).await;
        assert!(waits.is_err(), "the next one waits");
        assert!(other.identifying().await.is_some(), "that of the other listener does not");
        asked.pop();
        assert!(next.await.is_some(), "until one is known");
    }

    #[test]
    fn a_listener_leaves_connections_to_the_other() {
        let (one, other) = Slots::pair();
        let taken: Vec<_> = std::iter::from_fn(|| one.take()).take(CONNECTIONS).collect();
        assert_eq!(taken.len(), OF_ONE_LISTENER);
        let rest: Vec<_> = std::iter::from_fn(|| other.take()).take(CONNECTIONS).collect();
        assert_eq!(rest.len(), CONNECTIONS - OF_ONE_LISTENER);
        drop(taken);
        assert!(one.take().is_some());
    }

    #[test]
    fn no_process_takes_all_and_every_other_gets_some() {
        let (one, other) = Slots::pair();
        let first = hog(&one, 1);
        assert_eq!(first.len(), OF_ONE_LISTENER / 2);
        let second = hog(&one, 2);
        assert_eq!(second.len(), OF_ONE_LISTENER / 4);
        // However many come, the next one gets some.
        let many: Vec<_> = (3..8).map(|pid| hog(&one, pid)).collect();
        assert!(many.iter().all(|held| !held.is_empty()));
        assert!(hog(&other, 5000).len() >= 100, "and those of the other listener are there");
        drop((second, many));
        assert!(one.take().filter_map_owner(1).is_none(), "the first has more than its share");
        drop(first);
        assert!(one.all.held.lock().expect("lock").is_empty(), "nothing is held, none is counted");
        assert_eq!(one.all.free.available_permits(), CONNECTIONS);
    }
}

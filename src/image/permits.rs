//! How much is done at once, for one registry and for all: one that hangs does not hold up the others.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Registries whose permits are kept while nobody uses them.
const IDLE: usize = 64;

/// Permits for work that waits for registries.
pub(super) struct Permits {
    all: Arc<Semaphore>,
    each: usize,
    /// By registry, in lower case.
    registries: Mutex<HashMap<String, Arc<Semaphore>>>,
}

/// What holds a turn; it ends when this is dropped.
pub(super) type Turn = (OwnedSemaphorePermit, OwnedSemaphorePermit);

impl Permits {
    /// `all` at once, of which `each` for one registry.
    pub(super) fn new(all: usize, each: usize) -> Self {
        Self { all: Arc::new(Semaphore::new(all)), each, registries: Mutex::default() }
    }

    /// Waits for one of the registry's own, then for one of all: whoever waits for a registry takes
    /// nothing from the others.
    pub(super) async fn turn(&self, registry: &str) -> Turn {
        let own = self.of(registry).acquire_owned().await;
        let all = Arc::clone(&self.all).acquire_owned().await;
        match (own, all) {
            (Ok(own), Ok(all)) => (own, all),
            // Neither is ever closed; should one be, nothing has a turn.
            _ => std::future::pending().await,
        }
    }

    /// Those that nobody holds or waits for are forgotten.
    fn of(&self, registry: &str) -> Arc<Semaphore> {
        let mut known = self.registries.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= IDLE {
            known.retain(|_, permits| {
                Arc::strong_count(permits) > 1 || permits.available_permits() < self.each
            });
        }
        let fresh = || Arc::new(Semaphore::new(self.each));
        Arc::clone(known.entry(registry.to_ascii_lowercase()).or_insert_with(fresh))
    }

    /// How many turns are free.
    #[cfg(test)]
    pub(super) fn free(&self) -> usize {
        self.all.available_permits()
    }
}

#[cfg(test)]
mod tests {
    use std::task::Poll;

    use futures_util::poll;

    use super::*;

    #[tokio::test]
    async fn one_registry_leaves_room_for_the_others() {
        let permits = Permits::new(3, 2);
        let (first, _second) = (permits.turn("a").await, permits.turn("A").await);
        let mut third = Box::pin(permits.turn("a"));
        assert!(poll!(&mut third).is_pending());
        let _other = permits.turn("b").await;
        let mut more = Box::pin(permits.turn("b"));
        assert!(poll!(&mut more).is_pending(), "none of all is left");
        drop(first);
        let Poll::Ready(_more) = poll!(&mut more) else { panic!("it has its turn") };
        assert!(poll!(&mut third).is_pending());
    }

    #[test]
    fn permits_that_nobody_uses_are_forgotten() {
        let permits = Permits::new(16, 4);
        let held = permits.of("Held.example");
        for number in 0..10 * IDLE {
            permits.of(&format!("r{number}.example"));
        }
        assert!(Arc::ptr_eq(&held, &permits.of("held.example")));
        let known = permits.registries.lock().expect("no poison").len();
        assert!(known <= IDLE + 1, "{known}");
    }
}

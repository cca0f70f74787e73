//! A bounded cache whose misses are fetched once, however many ask at the same time.
//!
//! The fetch runs in its own task: when the first caller's time is up the answer still arrives and
//! serves the controller's retry. What failed is kept for seconds only.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;

/// How long an answer stays good.
#[derive(Debug, Clone, Copy)]
pub(super) struct Life(pub(super) Duration);

type Answer<V, E> = Option<(Result<V, E>, Instant)>;

struct Entry<V, E> {
    answer: watch::Receiver<Answer<V, E>>,
    used: u64,
}

/// See the module's documentation. `K` is hashed, `V` and `E` are cloned out.
pub(super) struct Cache<K, V, E> {
    entries: Arc<Mutex<Entries<K, V, E>>>,
    capacity: usize,
}

struct Entries<K, V, E> {
    map: HashMap<K, Entry<V, E>>,
    clock: u64,
}

impl<K, V, E> Cache<K, V, E>
where
    K: Hash + Eq + Clone + Send + 'static,
    V: Clone + Send + Sync + 'static,
    E: Clone + Send + Sync + From<FetchDied> + 'static,
{
    pub(super) fn new(capacity: usize) -> Self {
        let entries = Entries { map: HashMap::new(), clock: 0 };
        Self { entries: Arc::new(Mutex::new(entries)), capacity: capacity.max(1) }
    }

    /// The cached answer for `key` if it is fresh, else that of `fetch`, shared with everyone who
    /// asks while it runs.
    pub(super) async fn get<F>(&self, key: K, fetch: impl FnOnce() -> F) -> Result<V, E>
    where
        F: Future<Output = (Result<V, E>, Life)> + Send + 'static,
    {
        let mut receiver = {
            let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
            entries.clock += 1;
            let clock = entries.clock;
            let now = Instant::now();
            let fresh = entries.map.get_mut(&key).and_then(|entry| {
                let usable = match &*entry.answer.borrow() {
                    Some((_, until)) => *until > now,
                    // Still being fetched, unless its task died without an answer.
                    None => entry.answer.has_changed().is_ok(),
                };
                usable.then(|| {
                    entry.used = clock;
                    entry.answer.clone()
                })
            });
            fresh.unwrap_or_else(|| {
                let (sender, receiver) = watch::channel(None);
                let fetching = fetch();
                tokio::spawn(async move {
                    let (answer, Life(life)) = fetching.await;
                    // Nobody may be waiting any more; the entry still holds a receiver.
                    let _ = sender.send(Some((answer, Instant::now() + life)));
                    // The sender stays until here so that a dead task can be told from a slow one.
                });
                entries.map.insert(key, Entry { answer: receiver.clone(), used: clock });
                entries.evict(self.capacity, now);
                receiver
            })
        };
        let answer = receiver.wait_for(Option::is_some).await.map_err(|_| E::from(FetchDied))?;
        answer.as_ref().map_or_else(|| Err(E::from(FetchDied)), |(answer, _)| answer.clone())
    }
}

impl<K: Hash + Eq + Clone, V, E> Entries<K, V, E> {
    fn evict(&mut self, capacity: usize, now: Instant) {
        if self.map.len() <= capacity {
            return;
        }
        self.map.retain(|_, entry| {
            entry.answer.borrow().as_ref().is_none_or(|(_, until)| *until > now)
        });
        while self.map.len() > capacity {
            let oldest =
                self.map.iter().min_by_key(|(_, entry)| entry.used).map(|(k, _)| k.clone());
            let Some(oldest) = oldest else { return };
            self.map.remove(&oldest);
        }
    }
}

/// The task that fetched an answer ended without one.
#[derive(Debug, Clone, Copy)]
pub(super) struct FetchDied;

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[derive(Debug, Clone, PartialEq)]
    struct Failed;
    impl From<FetchDied> for Failed {
        fn from(_: FetchDied) -> Self {
            Self
        }
    }

    const LONG: Life = Life(Duration::from_secs(3600));
    const NONE: Life = Life(Duration::ZERO);

    #[tokio::test]
    async fn many_askers_cause_one_fetch() {
        let cache: Cache<u8, u8, Failed> = Cache::new(4);
        let fetches = Arc::new(AtomicUsize::new(0));
        let ask = || {
            let fetches = Arc::clone(&fetches);
            cache.get(1, || async move {
                fetches.fetch_add(1, Ordering::SeqCst);
                tokio::task::yield_now().await;
                (Ok(7), LONG)
            })
        };
        let (a, b, c) = tokio::join!(ask(), ask(), ask());
        assert_eq!([a, b, c], [Ok(7), Ok(7), Ok(7)]);
        assert_eq!(fetches.load(Ordering::SeqCst), 1);
    }

    #[tokio::test]
    async fn what_is_out_of_date_is_fetched_again() {
        let cache: Cache<u8, u8, Failed> = Cache::new(4);
        assert_eq!(cache.get(1, || async { (Err(Failed), NONE) }).await, Err(Failed));
        assert_eq!(cache.get(1, || async { (Ok(2), LONG) }).await, Ok(2));
        assert_eq!(cache.get(1, || async { (Ok(3), LONG) }).await, Ok(2));
    }

    #[tokio::test]
    async fn a_caller_who_gives_up_does_not_stop_the_fetch() {
        let cache: Cache<u8, u8, Failed> = Cache::new(4);
        let (go, wait) = tokio::sync::oneshot::channel::<()>();
        {
            let asking = cache.get(1, || async move {
                let _ = wait.await;
                (Ok(9), LONG)
            });
            tokio::pin!(asking);
            assert!(futures_util::poll!(asking.as_mut()).is_pending());
        }
        go.send(()).expect("the fetch still runs");
        assert_eq!(cache.get(1, || async { (Err(Failed), LONG) }).await, Ok(9));
    }

    #[tokio::test]
    async fn a_fetch_that_panics_is_an_error_and_is_tried_again() {
        let cache: Cache<u8, u8, Failed> = Cache::new(4);
        assert_eq!(cache.get(1, || async { panic!("on purpose") }).await, Err(Failed));
        assert_eq!(cache.get(1, || async { (Ok(1), LONG) }).await, Ok(1));
    }

    #[tokio::test]
    async fn the_least_recently_used_goes_first() {
        let cache: Cache<u8, u8, Failed> = Cache::new(2);
        for key in [1, 2] {
            assert_eq!(cache.get(key, || async { (Ok(0), LONG) }).await, Ok(0));
        }
        assert_eq!(cache.get(1, || async { (Ok(9), LONG) }).await, Ok(0));
        assert_eq!(cache.get(3, || async { (Ok(0), LONG) }).await, Ok(0));
        assert_eq!(cache.get(1, || async { (Ok(9), LONG) }).await, Ok(0));
        assert_eq!(cache.get(2, || async { (Ok(9), LONG) }).await, Ok(9));
    }
}

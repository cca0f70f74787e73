//! The policy in force, and its replacement while connections are open.
//!
//! Whatever is decided is decided by one generation of rules, which a [`super::session::Session`]
//! holds: asking is one look at an atomic number, and no lock. When the rules are replaced, every
//! session is woken; what goes on then is judged again ([`super::standing`]), and what begins is
//! judged by the new rules. Connections to upstreams that were made under the old ones carry nothing
//! new.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use tokio::sync::Notify;

use super::upstream::UpstreamTls;
use crate::policy::Policy;

/// One generation.
pub(crate) struct Rules {
    pub(crate) number: u64,
    pub(crate) policy: Arc<Policy>,
    /// The last policy that holds whole: [`Self::policy`] itself, or what bounds it.
    pub(crate) whole: Arc<Policy>,
    pub(crate) upstream_tls: Arc<UpstreamTls>,
}

/// The generation in force.
pub(crate) struct Current {
    number: AtomicU64,
    rules: RwLock<Arc<Rules>>,
    sessions: Mutex<HashMap<u64, Arc<Notify>>>,
    last_session: AtomicU64,
}

/// Wakes a session when the rules are replaced.
pub(crate) struct Alarm {
    current: Arc<Current>,
    session: u64,
    notify: Arc<Notify>,
}

impl Current {
    pub(crate) fn new(rules: Rules) -> Arc<Self> {
        Arc::new(Self {
            number: AtomicU64::new(rules.number),
            rules: RwLock::new(Arc::new(rules)),
            sessions: Mutex::default(),
            last_session: AtomicU64::new(0),
        })
    }

    pub(crate) fn load(&self) -> Arc<Rules> {
        Arc::clone(&self.rules.read().unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) fn is(&self, rules: &Rules) -> bool {
        self.number.load(Ordering::Acquire) == rules.number
    }

    /// Replaces the rules and wakes all sessions. Only by newer ones: whether it did.
    pub(crate) fn replace(&self, rules: Rules) -> bool {
        let number = rules.number;
        {
            let mut now = self.rules.write().unwrap_or_else(PoisonError::into_inner);
            if number <= now.number {
                return false;
            }
            *now = Arc::new(rules);
            self.number.store(number, Ordering::Release);
        }
        let sessions = self.sessions.lock().unwrap_or_else(PoisonError::into_inner);
        for session in sessions.values() {
            session.notify_waiters();
        }
        true
    }

    pub(crate) fn alarm(self: &Arc<Self>) -> Alarm {
        let session = self.last_session.fetch_add(1, Ordering::Relaxed);
        let notify = Arc::new(Notify::new());
        let mut sessions = self.sessions.lock().unwrap_or_else(PoisonError::into_inner);
        sessions.insert(session, Arc::clone(&notify));
        Alarm { current: Arc::clone(self), session, notify }
    }
}

impl Alarm {
    /// Ends when other rules than these are in force.
    pub(crate) async fn outdated(&self, rules: &Rules) {
        loop {
            // Made before the look, so that no replacement falls between the two.
            let woken = self.notify.notified();
            if !self.current.is(rules) {
                return;
            }
            woken.await;
        }
    }
}

impl Drop for Alarm {
    fn drop(&mut self) {
        let mut sessions = self.current.sessions.lock().unwrap_or_else(PoisonError::into_inner);
        sessions.remove(&self.session);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::{Source, load};

    fn rules(number: u64) -> Rules {
        let source = Source { name: "policy.yaml", bytes: b"version: 1\n" };
        let policy = Arc::new(load(&source, None).expect("policy").policy);
        let upstream_tls = Arc::new(UpstreamTls::new(None, Vec::new()));
        Rules { number, whole: Arc::clone(&policy), policy, upstream_tls }
    }

    #[tokio::test]
    async fn whoever_waits_is_woken_and_nobody_is_missed() {
        let current = Current::new(rules(1));
        let first = current.load();
        let waiting: Vec<_> = (0..8)
            .map(|_| {
                let (alarm, rules) = (current.alarm(), Arc::clone(&first));
                tokio::spawn(async move { alarm.outdated(&rules).await })
            })
            .collect();
        tokio::task::yield_now().await;
        let late = current.alarm();
        assert!(current.is(&first));
        assert!(current.replace(rules(2)));
        assert!(!current.replace(rules(2)) && !current.replace(rules(1)), "only newer ones");
        assert!(current.load().number == 2 && !current.is(&first) && current.is(&current.load()));
        for one in waiting {
            one.await.expect("woken");
        }
        // One that comes to look after the change need not wait for the next.
        late.outdated(&first).await;
        drop(late);
        assert!(current.sessions.lock().expect("lock").is_empty());
    }
}

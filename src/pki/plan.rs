//! What is to be done about the webhook's CA next: a function of what the Secret holds, what the
//! caBundles show and the time. No IO.
//!
//! A rotation has three steps, each one write to the Secret at exactly the version that was looked
//! at, so that of several replicas one does it and the others see it done:
//!
//! 1. **next**: a new CA is put beside the current one. From then on it is in the bundle.
//! 2. **promote**: when one replica has seen it in every live bundle for the settling time, by its
//!    own monotonic clock, it becomes current and signs. The one before keeps its place in the
//!    bundle, without its key.
//! 3. **retire**: it leaves the bundle when no leaf by it can be valid any more.
//!
//! Whatever is current has been in the bundle for the settling time, and whatever a replica may
//! still serve is in it: a replica may start, stop or sleep between any two steps.

use std::time::{Duration, Instant, SystemTime};

/// How many former CAs the bundle holds before a rotation on request has to wait. One by age does
/// not: those cannot pile up.
pub const PREVIOUS_MAX: usize = 32;
/// How far clocks may differ, at most: so much longer a former CA stays.
const SKEW: Duration = Duration::from_secs(120);

/// A CA as far as it matters here.
pub trait Certified {
    /// Its certificate as PEM, ending in a newline.
    fn pem(&self) -> &str;
    /// When it was made.
    fn issued(&self) -> SystemTime;
    /// When it expires.
    fn expires(&self) -> SystemTime;
}

/// How long things last.
#[derive(Debug, Clone, Copy)]
pub struct Terms {
    /// A CA's life. It is replaced after two thirds of this, or of its own where that is shorter.
    pub ca_life: Duration,
    /// A leaf's life, at most: so long a former CA may be needed.
    pub leaf_life: Duration,
    /// How long a new CA is in the bundle before it signs: API servers learn of it by watch.
    pub settle: Duration,
}

/// What the Secret holds.
#[derive(Debug, Clone)]
pub struct Held<C> {
    /// Signs leaves.
    pub current: C,
    /// Published, and not signing yet.
    pub next: Option<C>,
    /// Not signing any more, and still in the bundle. The latest first.
    pub previous: Vec<Previous>,
    /// Somebody asked for a rotation.
    pub requested: bool,
}

/// A former CA.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Previous {
    /// Its certificate, PEM.
    pub pem: String,
    /// From when on no leaf by it is valid.
    pub until: SystemTime,
}

/// The next write to the Secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// None.
    Rest,
    /// Put a new CA beside the current one.
    MakeNext,
    /// Let the next one sign.
    Promote,
    /// Drop former CAs whose time is over.
    Retire,
}

impl<C: Certified + Clone> Held<C> {
    /// A first CA.
    #[must_use]
    pub fn first(current: C) -> Self {
        Self { current, next: None, previous: Vec::new(), requested: false }
    }

    /// Everything API servers have to trust, PEM. The order is by text: it is the same before and
    /// after a promotion, which then changes nothing in the configurations.
    #[must_use]
    pub fn bundle(&self) -> String {
        let mut all: Vec<&str> = self.pems().collect();
        all.sort_unstable();
        all.dedup();
        all.concat()
    }

    /// Whether the certificate (PEM) is one of these.
    #[must_use]
    pub fn knows(&self, pem: &str) -> bool {
        self.pems().any(|known| known == pem)
    }

    fn pems(&self) -> impl Iterator<Item = &str> {
        let previous = self.previous.iter().map(|previous| previous.pem.as_str());
        std::iter::once(self.current.pem()).chain(self.next.iter().map(C::pem)).chain(previous)
    }

    /// What is to be done next. `seen` says for how long the next CA has been in every live bundle.
    #[must_use]
    pub fn step(&self, now: SystemTime, seen: Option<Duration>, terms: &Terms) -> Step {
        match (&self.next, seen) {
            (Some(_), Some(seen)) if seen >= terms.settle => return Step::Promote,
            (Some(_), _) => return Step::Rest,
            (None, _) => {}
        }
        let requested = self.requested && self.previous.len() < PREVIOUS_MAX;
        if requested || now >= self.renew_at(terms) {
            Step::MakeNext
        } else if self.previous.iter().any(|previous| over(previous, now, terms)) {
            Step::Retire
        } else {
            Step::Rest
        }
    }

    /// When the current CA has lived two thirds of its life.
    fn renew_at(&self, terms: &Terms) -> SystemTime {
        let own = self.current.expires().duration_since(self.current.issued()).unwrap_or_default();
        self.current.issued() + own.min(terms.ca_life) * 2 / 3
    }

    /// With `next` beside the current one. The request, if any, is met by that.
    #[must_use]
    pub fn with_next(&self, next: C) -> Self {
        Self { next: Some(next), requested: false, ..self.clone() }
    }

    /// With the next CA signing. Nothing changes where there is none.
    #[must_use]
    pub fn promoted(&self, now: SystemTime, terms: &Terms) -> Self {
        let mut after = self.clone();
        if let Some(next) = after.next.take() {
            let former = std::mem::replace(&mut after.current, next);
            let until = former.expires().min(now + terms.leaf_life);
            after.previous.insert(0, Previous { pem: former.pem().to_owned(), until });
        }
        after.retired(now, terms)
    }

    /// Without the former CAs whose time is over.
    #[must_use]
    pub fn retired(&self, now: SystemTime, terms: &Terms) -> Self {
        let mut after = self.clone();
        after.previous.retain(|previous| !over(previous, now, terms));
        after
    }
}

fn over(previous: &Previous, now: SystemTime, terms: &Terms) -> bool {
    now > previous.until + SKEW.min(terms.ca_life)
}

/// Whether every live bundle holds the certificate (PEM); false where there is no bundle at all.
#[must_use]
pub fn in_every(bundles: &[Vec<u8>], pem: &str) -> bool {
    let holds =
        |bundle: &Vec<u8>| std::str::from_utf8(bundle).is_ok_and(|bundle| bundle.contains(pem));
    !bundles.is_empty() && bundles.iter().all(holds)
}

/// Since when, by this process's monotonic clock, the next CA has been in every live bundle.
#[derive(Debug, Clone, Default)]
pub struct Seen(Option<(String, Instant)>);

impl Seen {
    /// Takes in what the bundles show, and says for how long they have shown it without a gap
    /// that was noticed.
    pub fn look(
        &mut self,
        next: Option<&str>,
        bundles: &[Vec<u8>],
        now: Instant,
    ) -> Option<Duration> {
        let Some(next) = next.filter(|next| in_every(bundles, next)) else {
            self.0 = None;
            return None;
        };
        match &self.0 {
            Some((pem, since)) if pem == next => Some(now.saturating_duration_since(*since)),
            _ => {
                self.0 = Some((next.to_owned(), now));
                Some(Duration::ZERO)
            }
        }
    }
}

#[cfg(test)]
#[path = "plan/tests.rs"]
mod tests;

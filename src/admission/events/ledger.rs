//! What was written, and when the same is written again: a controller that is refused tries for
//! ever, and a hostile author can make every pod's verdict another one.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use super::Notice;

/// The same verdict on the same owner is one Event, whose count is brought up to date this often.
pub(super) const PAUSE: Duration = Duration::from_secs(30);
/// One that did not come again for so long is a new Event when it does.
const FORGET: Duration = Duration::from_secs(360);
/// Verdicts remembered.
const REMEMBERED: usize = 1024;
/// New Events of one namespace at once, and how long one more takes.
const BURST: u32 = 20;
const ONE_MORE: Duration = Duration::from_secs(10);
/// Namespaces whose number of Events is remembered.
const NAMESPACES: usize = 1024;

/// What is to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Write {
    /// A new Event.
    New,
    /// The Event of that name has come so many times.
    Series {
        /// Its name.
        name: String,
        /// How many times.
        count: i32,
    },
    /// Nothing now, for this reason.
    Nothing(&'static str),
}

#[derive(Debug)]
struct Entry {
    /// None until it is written.
    name: Option<String>,
    count: i32,
    written: i32,
    seen: Instant,
    wrote: Instant,
}

impl Entry {
    fn series(&mut self, now: Instant) -> Option<Write> {
        let name = self.name.clone()?;
        let due = self.count > self.written && now.duration_since(self.wrote) >= PAUSE;
        due.then(|| {
            (self.written, self.wrote) = (self.count, now);
            Write::Series { name, count: self.count }
        })
    }
}

/// How many new Events a namespace may have at once.
#[derive(Debug, Clone, Copy)]
struct Allowance {
    left: u32,
    since: Instant,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    entries: HashMap<Notice, Entry>,
    allowances: HashMap<String, Allowance>,
}

impl Ledger {
    /// Takes a verdict in, and says what is to be written for it.
    pub(super) fn take(&mut self, notice: &Notice, now: Instant) -> Write {
        if let Some(entry) = self.entries.get_mut(notice) {
            if now.duration_since(entry.seen) < FORGET {
                entry.seen = now;
                entry.count = entry.count.saturating_add(1);
                return entry.series(now).unwrap_or(Write::Nothing("folded"));
            }
            self.entries.remove(notice);
        }
        if self.entries.len() >= REMEMBERED {
            self.entries.retain(|_, entry| now.duration_since(entry.seen) < FORGET);
        }
        if self.entries.len() >= REMEMBERED || !self.allows(&notice.subject.namespace, now) {
            return Write::Nothing("limited");
        }
        let entry = Entry { name: None, count: 1, written: 1, seen: now, wrote: now };
        self.entries.insert(notice.clone(), entry);
        Write::New
    }

    /// Whose count has grown since it was written.
    pub(super) fn due(&mut self, now: Instant) -> Vec<(Notice, Write)> {
        self.entries.retain(|_, entry| now.duration_since(entry.seen) < FORGET);
        let series = |(notice, entry): (&Notice, &mut Entry)| {
            entry.series(now).map(|write| (notice.clone(), write))
        };
        self.entries.iter_mut().filter_map(series).collect()
    }

    /// The Event has been written, under this name.
    pub(super) fn written(&mut self, notice: &Notice, name: String) {
        if let Some(entry) = self.entries.get_mut(notice) {
            entry.name = Some(name);
        }
    }

    /// It has not: somebody deleted it, or it cannot be written. It is a new one next time.
    pub(super) fn failed(&mut self, notice: &Notice) {
        self.entries.remove(notice);
    }

    fn allows(&mut self, namespace: &str, now: Instant) -> bool {
        if self.allowances.len() >= NAMESPACES {
            // After so long it is as if it had never been asked.
            self.allowances.retain(|_, known| now.duration_since(known.since) < ONE_MORE * BURST);
        }
        if self.allowances.len() >= NAMESPACES && !self.allowances.contains_key(namespace) {
            return false;
        }
        let known = self
            .allowances
            .entry(namespace.to_owned())
            .or_insert(Allowance { left: BURST, since: now });
        let earned = now.duration_since(known.since).as_secs() / ONE_MORE.as_secs();
        if earned > 0 {
            let earned = u32::try_from(earned).unwrap_or(BURST);
            known.left = known.left.saturating_add(earned).min(BURST);
            known.since = now;
        }
        if known.left == 0 {
            return false;
        }
        known.left -= 1;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::super::Subject;
    use super::*;
    use crate::admission::Class;

    fn notice(namespace: &str, note: &str) -> Notice {
        let subject = Subject {
            namespace: namespace.into(),
            api_version: "apps/v1".into(),
            kind: "ReplicaSet".into(),
            name: "agent".into(),
            uid: "u".into(),
        };
        Notice { subject, class: Class::HostPid, refused: true, note: note.into() }
    }

    #[test]
    fn the_same_verdict_is_one_event_with_a_count() {
        let (mut ledger, start) = (Ledger::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        let one = notice("ns", "a");
        assert_eq!(ledger.take(&one, start), Write::New);
        ledger.written(&one, "e".into());
        for second in 1..20 {
            assert_eq!(ledger.take(&one, at(second)), Write::Nothing("folded"));
        }
        let series = |count| Write::Series { name: "e".into(), count };
        assert_eq!(ledger.take(&one, at(31)), series(21));
        assert_eq!(ledger.take(&one, at(32)), Write::Nothing("folded"));
        // The last ones are not lost when no more come.
        assert_eq!(ledger.due(at(40)), []);
        assert_eq!(ledger.due(at(62)), [(one.clone(), series(22))]);
        assert_eq!(ledger.due(at(99)), []);
        // Another verdict, and the same much later, are Events of their own.
        assert_eq!(ledger.take(&notice("ns", "b"), at(63)), Write::New);
        assert_eq!(ledger.take(&one, at(32 + 360)), Write::New);
    }

    #[test]
    fn one_that_could_not_be_written_is_tried_anew() {
        let (mut ledger, now) = (Ledger::default(), Instant::now());
        let one = notice("ns", "a");
        assert_eq!(ledger.take(&one, now), Write::New);
        ledger.failed(&one);
        assert_eq!(ledger.take(&one, now), Write::New);
    }

    #[test]
    fn a_namespace_with_ever_new_verdicts_is_limited_and_others_are_not() {
        let (mut ledger, now) = (Ledger::default(), Instant::now());
        let mut many = |namespace: &str, from: u32, now| {
            let all = (from..from + 100).map(|n| notice(namespace, &n.to_string()));
            all.filter(|one| ledger.take(one, now) == Write::New).count()
        };
        assert_eq!(many("hostile", 0, now), BURST as usize);
        assert_eq!(many("hostile", 100, now), 0);
        assert_eq!(many("other", 0, now), BURST as usize);
        assert_eq!(many("hostile", 200, now + ONE_MORE * 2), 2);
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let (mut ledger, now) = (Ledger::default(), Instant::now());
        for n in 0..5000 {
            ledger.take(&notice(&format!("ns-{n}"), "a"), now);
        }
        assert_eq!((ledger.entries.len(), ledger.allowances.len()), (REMEMBERED, NAMESPACES));
        assert_eq!(ledger.take(&notice("late", "a"), now + FORGET), Write::New);
        assert_eq!(ledger.entries.len(), 1);
    }
}

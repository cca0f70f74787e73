//! What the webhook counts, and its text exposition.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use crate::admission::Class;

/// Upper bounds of the latency histogram, in microseconds. Peers start at 100 ms, where all of our
/// work would be one bucket.
const BUCKETS: [u64; 13] = [
    100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 100_000, 500_000, 1_000_000, 5_000_000,
    30_000_000,
];

/// Refusals that the chart's alerts look at: told as zero from the start, like `busy`, because what
/// begins at one has not increased.
const ALERTED: [Class; 2] = [Class::Lookup, Class::Policy];

/// Counters of one process.
#[derive(Debug, Default)]
pub struct Metrics {
    /// By verdict (`untouched`, `injected`, `unchanged`, `refused`) and class slug (or `-`).
    admissions: Mutex<BTreeMap<(&'static str, &'static str), u64>>,
    /// Reviews that were not answered with an `AdmissionReview`, by reason.
    rejected: Mutex<BTreeMap<&'static str, u64>>,
    /// Pods admitted with a warning, by class slug.
    warned: Mutex<BTreeMap<&'static str, u64>>,
    /// Policies that pods follow: objects changed, and changes that were not followed.
    live_policies: [AtomicU64; 2],
    /// Events about verdicts, by what became of them.
    events: Mutex<BTreeMap<&'static str, u64>>,
    self_check_failures: AtomicU64,
    buckets: [AtomicU64; BUCKETS.len()],
    duration_count: AtomicU64,
    duration_micros: AtomicU64,
    certificate_not_after: AtomicU64,
}

impl Metrics {
    /// Counts one answer. A dry run is counted like any other: it has the same cost.
    pub fn admission(&self, verdict: &'static str, class: &'static str, took: Duration) {
        *lock(&self.admissions).entry((verdict, class)).or_default() += 1;
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        if let Some(at) = BUCKETS.iter().position(|bound| micros <= *bound) {
            self.buckets[at].fetch_add(1, Ordering::Relaxed);
        }
        self.duration_count.fetch_add(1, Ordering::Relaxed);
        self.duration_micros.fetch_add(micros, Ordering::Relaxed);
    }

    /// Counts a request that got no review for an answer (413, 415, 503 …).
    pub fn rejected(&self, reason: &'static str) {
        *lock(&self.rejected).entry(reason).or_default() += 1;
    }

    /// Counts a pod of a class that is admitted with a warning.
    pub fn warned(&self, class: &'static str) {
        *lock(&self.warned).entry(class).or_default() += 1;
    }

    /// Counts a change of a policy that pods follow; `followed`: they do.
    pub fn live_policy(&self, followed: bool) {
        self.live_policies[usize::from(!followed)].fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a verdict that was to be told by an Event: `written`, `folded` into one that was written,
    /// `limited`, `dropped` because the queue was full, `failed`.
    pub fn event(&self, became: &'static str) {
        *lock(&self.events).entry(became).or_default() += 1;
    }

    /// Counts a patch of ours that did not do what it should.
    pub fn self_check_failure(&self) {
        self.self_check_failures.fetch_add(1, Ordering::Relaxed);
    }

    /// States when the served certificate expires.
    pub fn set_certificate_not_after(&self, at: SystemTime) {
        let seconds = at.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_secs());
        self.certificate_not_after.store(seconds, Ordering::Relaxed);
    }

    /// The Prometheus text exposition, format 0.0.4.
    #[must_use]
    pub fn render(&self, ready: bool) -> String {
        let mut out = String::with_capacity(4096);
        head(
            &mut out,
            "ringfence_admissions_total",
            "counter",
            "Pods answered, by verdict and class.",
        );
        let mut admissions = lock(&self.admissions).clone();
        for class in ALERTED {
            admissions.entry(("refused", class.slug())).or_default();
        }
        for ((verdict, class), count) in &admissions {
            line(
                &mut out,
                &format!(
                    "ringfence_admissions_total{{verdict=\"{verdict}\",class=\"{class}\"}} {count}"
                ),
            );
        }
        head(
            &mut out,
            "ringfence_requests_rejected_total",
            "counter",
            "Requests refused before they were understood as a review.",
        );
        let mut rejected = lock(&self.rejected).clone();
        rejected.entry("busy").or_default();
        for (reason, count) in &rejected {
            line(
                &mut out,
                &format!("ringfence_requests_rejected_total{{reason=\"{reason}\"}} {count}"),
            );
        }
        head(
            &mut out,
            "ringfence_warnings_total",
            "counter",
            "Pods admitted with a warning, by class.",
        );
        for (class, count) in &*lock(&self.warned) {
            line(&mut out, &format!("ringfence_warnings_total{{class=\"{class}\"}} {count}"));
        }
        head(&mut out, "ringfence_events_total", "counter", "Events about verdicts, by result.");
        for (became, count) in &*lock(&self.events) {
            line(&mut out, &format!("ringfence_events_total{{result=\"{became}\"}} {count}"));
        }
        head(
            &mut out,
            "ringfence_patch_self_check_failures_total",
            "counter",
            "Patches that did not give the pod they were made for; each is a bug.",
        );
        let failures = self.self_check_failures.load(Ordering::Relaxed);
        line(&mut out, &format!("ringfence_patch_self_check_failures_total {failures}"));
        let name = "ringfence_live_policy_changes_total";
        head(&mut out, name, "counter", "Changes of policies that running pods follow, by result.");
        for (result, count) in ["followed", "kept"].iter().zip(&self.live_policies) {
            let count = count.load(Ordering::Relaxed);
            line(&mut out, &format!("{name}{{result=\"{result}\"}} {count}"));
        }
        self.render_durations(&mut out);
        head(
            &mut out,
            "ringfence_webhook_cert_not_after_seconds",
            "gauge",
            "When the served certificate expires, Unix time.",
        );
        let not_after = self.certificate_not_after.load(Ordering::Relaxed);
        line(&mut out, &format!("ringfence_webhook_cert_not_after_seconds {not_after}"));
        head(&mut out, "ringfence_ready", "gauge", "Whether this replica is ready.");
        line(&mut out, &format!("ringfence_ready {}", u8::from(ready)));
        out
    }

    fn render_durations(&self, out: &mut String) {
        const NAME: &str = "ringfence_admission_duration_seconds";
        head(out, NAME, "histogram", "Time from the whole body to the answer, look-ups included.");
        let mut below = 0;
        for (bound, bucket) in BUCKETS.iter().zip(&self.buckets) {
            below += bucket.load(Ordering::Relaxed);
            line(out, &format!("{NAME}_bucket{{le=\"{}\"}} {below}", seconds(*bound)));
        }
        let count = self.duration_count.load(Ordering::Relaxed);
        line(out, &format!("{NAME}_bucket{{le=\"+Inf\"}} {count}"));
        line(out, &format!("{NAME}_sum {}", seconds(self.duration_micros.load(Ordering::Relaxed))));
        line(out, &format!("{NAME}_count {count}"));
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn seconds(micros: u64) -> String {
    let text = format!("{}.{:06}", micros / 1_000_000, micros % 1_000_000);
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

fn head(out: &mut String, name: &str, kind: &str, help: &str) {
    // Writing to a String cannot fail.
    let _ = write!(out, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
}

fn line(out: &mut String, text: &str) {
    out.push_str(text);
    out.push('\n');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_alerts_look_at_is_there_before_it_happens() {
        let text = Metrics::default().render(false);
        for expected in [
            "ringfence_admissions_total{verdict=\"refused\",class=\"lookup-failed\"} 0\n",
            "ringfence_admissions_total{verdict=\"refused\",class=\"policy\"} 0\n",
            "ringfence_requests_rejected_total{reason=\"busy\"} 0\n",
            "ringfence_live_policy_changes_total{result=\"kept\"} 0\n",
            "ringfence_patch_self_check_failures_total 0\n",
        ] {
            assert!(text.contains(expected), "{expected} in\n{text}");
        }
    }

    #[test]
    fn the_exposition_has_cumulative_buckets_and_all_counters() {
        let metrics = Metrics::default();
        metrics.admission("injected", "-", Duration::from_micros(90));
        metrics.admission("refused", "policy", Duration::from_micros(300));
        metrics.admission("injected", "-", Duration::from_secs(60));
        metrics.rejected("body");
        metrics.self_check_failure();
        metrics.live_policy(false);
        metrics.event("folded");
        metrics.set_certificate_not_after(SystemTime::UNIX_EPOCH + Duration::from_secs(7));
        let text = metrics.render(true);
        for expected in [
            "ringfence_admissions_total{verdict=\"injected\",class=\"-\"} 2\n",
            "ringfence_admissions_total{verdict=\"refused\",class=\"policy\"} 1\n",
            "ringfence_requests_rejected_total{reason=\"body\"} 1\n",
            "ringfence_patch_self_check_failures_total 1\n",
            "ringfence_live_policy_changes_total{result=\"kept\"} 1\n",
            "ringfence_events_total{result=\"folded\"} 1\n",
            "ringfence_admission_duration_seconds_bucket{le=\"0.0001\"} 1\n",
            "ringfence_admission_duration_seconds_bucket{le=\"0.0005\"} 2\n",
            "ringfence_admission_duration_seconds_bucket{le=\"30\"} 2\n",
            "ringfence_admission_duration_seconds_bucket{le=\"+Inf\"} 3\n",
            "ringfence_admission_duration_seconds_sum 60.00039\n",
            "ringfence_webhook_cert_not_after_seconds 7\n",
            "ringfence_ready 1\n",
        ] {
            assert!(text.contains(expected), "{expected} in\n{text}");
        }
    }
}

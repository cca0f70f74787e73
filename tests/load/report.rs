//! What came of it, for people.

use std::fmt;
use std::time::Duration;

use tokio::time::Instant;

use crate::Args;
use crate::trouble::Happened;

/// Failures that are printed one by one.
const SHOWN: usize = 20;

/// One admission.
pub struct Sample {
    pub at: Instant,
    pub took: Duration,
    /// Why it failed.
    pub failure: Option<String>,
}

impl Sample {
    pub fn failed(at: Instant, why: String) -> Self {
        Self { at, took: Duration::ZERO, failure: Some(why) }
    }
}

/// Everything.
pub struct Report {
    began: Instant,
    wanted: u64,
    rotations_wanted: u64,
    args: String,
    /// Sorted.
    latencies: Vec<Duration>,
    failures: Vec<Sample>,
    trouble: Happened,
}

impl Report {
    pub fn of(args: &Args, began: Instant, done: Vec<Sample>, trouble: Happened) -> Self {
        let (good, mut failures): (Vec<_>, Vec<_>) =
            done.into_iter().partition(|sample| sample.failure.is_none());
        let mut latencies: Vec<Duration> = good.iter().map(|sample| sample.took).collect();
        latencies.sort_unstable();
        failures.sort_by_key(|sample| sample.at);
        Self {
            began,
            wanted: u64::from(args.rate) * args.seconds,
            // A rotation takes its settling second and the replicas' looks at the Secret.
            rotations_wanted: args.seconds.checked_div(args.rotate_every).unwrap_or(0) / 2,
            args: format!("{} admissions a second for {} s", args.rate, args.seconds),
            latencies,
            failures,
            trouble,
        }
    }

    /// No admission failed, and what was to happen beside did.
    pub fn is_good(&self) -> bool {
        let enough = self.latencies.len() as u64 * 100 >= self.wanted * 95;
        let rotated = self.trouble.rotations as u64 >= self.rotations_wanted;
        self.failures.is_empty() && enough && rotated && self.trouble.missed.is_empty()
    }

    fn percentile(&self, of_thousand: usize) -> Duration {
        let at = (self.latencies.len() * of_thousand / 1000).min(self.latencies.len().max(1) - 1);
        self.latencies.get(at).copied().unwrap_or_default()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let since = |at: Instant| at.saturating_duration_since(self.began).as_secs_f64();
        writeln!(f, "{}", self.args)?;
        for (at, what) in &self.trouble.log {
            writeln!(f, "{:7.2} s  {what}", since(*at))?;
        }
        writeln!(f, "new CAs that signed: {}", self.trouble.rotations)?;
        writeln!(f, "roll-outs that were completed: {}", self.trouble.roll_outs)?;
        for missed in &self.trouble.missed {
            writeln!(f, "MISSED: {missed}")?;
        }
        write!(f, "admitted {} of {}; ms:", self.latencies.len(), self.wanted)?;
        for (name, of_thousand) in
            [("p50", 500), ("p90", 900), ("p99", 990), ("p99.9", 999), ("max", 1000)]
        {
            write!(f, " {name} {:.1}", self.percentile(of_thousand).as_secs_f64() * 1000.0)?;
        }
        writeln!(f, "\nfailed: {}", self.failures.len())?;
        for failure in self.failures.iter().take(SHOWN) {
            let why = failure.failure.as_deref().unwrap_or_default();
            let why: String = why.chars().take(300).collect();
            writeln!(f, "{:7.2} s  {why}", since(failure.at))?;
        }
        Ok(())
    }
}

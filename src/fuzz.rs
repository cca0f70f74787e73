//! What the fuzzers of all rooms share: how cases are counted and named, how valid input is bent,
//! and what is watched while they run.
//!
//! `RINGFENCE_FUZZ_CASES` says how many cases a test tries, `RINGFENCE_FUZZ_SECONDS` after which
//! time it stops before that, `RINGFENCE_FUZZ_SEED` which cases. A failure names seed and case;
//! `RINGFENCE_FUZZ_CASE` runs that one alone.
//!
//! With `RINGFENCE_FUZZ_WATCH` (`tests/fuzz` sets it, and runs each test in a process of its own) no
//! case may take more than a second, and memory may not grow with the number of cases. Without it
//! neither is looked at: tests that run beside others say nothing about time or memory.
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// The longest that a case may take.
const SLOW: Duration = Duration::from_secs(1);

/// How long a case runs before it is said to hang. The process ends then.
const HANGS: Duration = Duration::from_secs(60);

/// How much more memory all cases may need at a time than the first tenth did, in KiB: allocators
/// keep some of what was freed.
const GROWTH: u64 = 32 * 1024;

/// xorshift64*: small, and the same everywhere.
pub(crate) struct Random(u64);

impl Random {
    /// From a seed as [`run`] gives it.
    pub(crate) fn new(seed: u64) -> Self {
        let mut random = Self(seed | 1);
        random.next();
        random
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Less than `limit`; 0 where that is 0.
    pub(crate) fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() >> 33).unwrap_or(0) % limit.max(1)
    }

    /// Once in `many`.
    pub(crate) fn once_in(&mut self, many: usize) -> bool {
        self.below(many) == 0
    }

    pub(crate) fn byte(&mut self) -> u8 {
        self.next().to_be_bytes()[0]
    }

    pub(crate) fn pick<'a, T: ?Sized>(&mut self, from: &[&'a T]) -> &'a T {
        from[self.below(from.len())]
    }

    /// Bends what is valid: bytes are lost, doubled, put in, flipped, cut off, and replaced by
    /// words that hurt, once in a while by many of one. One in eight stays as it is.
    pub(crate) fn bend(&mut self, valid: &[u8], words: &[&str]) -> Vec<u8> {
        let mut bytes = valid.to_vec();
        for _ in 0..self.below(8) {
            let at = self.below(bytes.len() + 1);
            let end = (at + self.below(24)).min(bytes.len());
            match self.below(8) {
                0 => drop(bytes.splice(at..end, [])),
                1 => {
                    let piece = bytes[at..end].to_vec();
                    bytes.splice(at..at, piece);
                }
                2 => bytes.insert(at, self.byte()),
                3 => {
                    let bit = self.below(8);
                    if let Some(byte) = bytes.get_mut(at) {
                        *byte ^= 1 << bit;
                    }
                }
                4 if self.once_in(4) => bytes.truncate(at),
                5 if self.once_in(8) => {
                    let many = self.pick(words).repeat(self.below(600));
                    bytes.splice(at..end, many.bytes());
                }
                _ => drop(bytes.splice(at..end, self.pick(words).bytes())),
            }
        }
        bytes
    }

    /// The same of a text; what is no UTF-8 any more is replaced.
    pub(crate) fn bend_text(&mut self, valid: &str, words: &[&str]) -> String {
        String::from_utf8_lossy(&self.bend(valid.as_bytes(), words)).into_owned()
    }

    /// One of what is valid, bent.
    pub(crate) fn bent(&mut self, valid: &[&str], words: &[&str]) -> Vec<u8> {
        let valid = self.pick(valid);
        self.bend(valid.as_bytes(), words)
    }

    /// The same of texts.
    pub(crate) fn bent_text(&mut self, valid: &[&str], words: &[&str]) -> String {
        let valid = self.pick(valid);
        self.bend_text(valid, words)
    }

    /// The ends of the pieces in which `length` bytes arrive, in order; the last is `length`.
    pub(crate) fn cuts(&mut self, length: usize) -> Vec<usize> {
        let mut cuts: Vec<_> = match self.below(4) {
            // One byte after the other.
            0 if length < 600 => (1..length).collect(),
            _ => (0..self.below(6)).map(|_| self.below(length)).collect(),
        };
        cuts.retain(|cut| *cut > 0);
        cuts.push(length);
        cuts.sort_unstable();
        cuts.dedup();
        cuts
    }
}

/// The value of a variable that holds a number.
pub(crate) fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().expect("a number"))
}

/// Whether one case runs alone: it may be one that shows nothing.
pub(crate) fn alone() -> bool {
    number("RINGFENCE_FUZZ_CASE").is_some()
}

/// Names the case that panics.
struct Named(&'static str, u64, u64);

impl Drop for Named {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let Self(name, seed, case) = self;
            eprintln!("{name}: RINGFENCE_FUZZ_SEED={seed} RINGFENCE_FUZZ_CASE={case}");
        }
    }
}

/// Tries as many cases as are asked for, or `default`.
pub(crate) fn fuzz(name: &'static str, default: u64, mut case: impl FnMut(&mut Random)) {
    run(name, default, |seed| case(&mut Random::new(seed)));
}

/// The same for those who make something else of each case's seed.
pub(crate) fn run(name: &'static str, default: u64, mut case: impl FnMut(u64)) {
    let seed = number("RINGFENCE_FUZZ_SEED").unwrap_or(0x5eed);
    let cases = match number("RINGFENCE_FUZZ_CASE") {
        Some(one) => one..one + 1,
        None => 0..number("RINGFENCE_FUZZ_CASES").unwrap_or(default),
    };
    let seconds = number("RINGFENCE_FUZZ_SECONDS").map(Duration::from_secs);
    let mut watch = std::env::var_os("RINGFENCE_FUZZ_WATCH").map(|_| Watch::new(name, seed));
    let begin = Instant::now();
    let mut tried = 0;
    for number in cases.clone() {
        let spent = begin.elapsed();
        if seconds.is_some_and(|seconds| spent >= seconds) {
            break;
        }
        let _named = Named(name, seed, number);
        let mut once = || case(seed ^ number.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        match &mut watch {
            Some(watch) => {
                watch.case(number, once);
                let share = |part: u128, whole: u128| part * 10 >= whole;
                let time = seconds.is_some_and(|s| share(spent.as_micros(), s.as_micros()));
                if time || share((tried + 1).into(), (cases.end - cases.start).into()) {
                    watch.warm_up();
                }
            }
            None => once(),
        }
        tried += 1;
    }
    if let Some(watch) = watch {
        watch.finish(tried, begin.elapsed());
    }
}

/// Looks at time and memory.
struct Watch {
    name: &'static str,
    slowest: Duration,
    /// The most memory at a time, in KiB, when a tenth was done.
    warm: Option<u64>,
    /// The case that runs, plus one; 0 at the end.
    current: Arc<AtomicU64>,
}

impl Watch {
    fn new(name: &'static str, seed: u64) -> Self {
        let current = Arc::new(AtomicU64::new(0));
        let shared = Arc::clone(&current);
        std::thread::spawn(move || {
            let mut last = 0;
            loop {
                std::thread::sleep(HANGS);
                let now = shared.load(Ordering::Relaxed);
                if now != 0 && now == last {
                    let case = now - 1;
                    println!("{name} hangs: RINGFENCE_FUZZ_SEED={seed} RINGFENCE_FUZZ_CASE={case}");
                    std::process::abort();
                }
                last = now;
            }
        });
        Self { name, slowest: Duration::ZERO, warm: None, current }
    }

    /// A case that seems slow is tried again, by the time that it has the processor: others may have
    /// had it.
    fn case(&mut self, number: u64, mut once: impl FnMut()) {
        self.current.store(number + 1, Ordering::Relaxed);
        let mut time = || {
            let begin = Instant::now();
            once();
            begin.elapsed()
        };
        let mut took = time();
        if took > SLOW {
            let before = on_processor();
            let whole = time();
            // Where the kernel does not count, the clock has to do.
            took = match (before, on_processor()) {
                (Some(before), Some(after)) => after.saturating_sub(before),
                _ => whole,
            };
        }
        assert!(took <= SLOW, "takes {took:?}");
        self.slowest = self.slowest.max(took);
    }

    fn warm_up(&mut self) {
        self.warm.get_or_insert_with(peak);
    }

    /// One line for `tests/fuzz`: name, cases, seconds, slowest case (ms), peak and growth (KiB).
    fn finish(self, tried: u64, took: Duration) {
        self.current.store(0, Ordering::Relaxed);
        let (peak, seconds) = (peak(), took.as_secs_f64());
        let growth = self.warm.map_or(0, |warm| peak.saturating_sub(warm));
        let (name, slowest) = (self.name, self.slowest.as_secs_f64() * 1e3);
        println!("FUZZED {name} {tried} {seconds:.1} {slowest:.1} {peak} {growth}");
        assert!(growth <= GROWTH, "{name}: memory grew by {growth} KiB");
    }
}

/// How long this thread has run on a processor.
fn on_processor() -> Option<Duration> {
    let counted = std::fs::read_to_string("/proc/thread-self/schedstat").ok()?;
    counted.split(' ').next()?.parse().ok().map(Duration::from_nanos)
}

/// The most memory that this process had at a time, in KiB.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.trim().trim_end_matches(" kB").parse().ok()).unwrap_or(0)
}

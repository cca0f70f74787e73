use super::*;

const CA_LIFE: u64 = 2000;
const LEAF_LIFE: u64 = 300;
const SETTLE: u64 = 30;

const TERMS: Terms = Terms {
    ca_life: Duration::from_secs(CA_LIFE),
    leaf_life: Duration::from_secs(LEAF_LIFE),
    settle: Duration::from_secs(SETTLE),
};

fn at(seconds: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000 + seconds)
}

#[derive(Debug, Clone, PartialEq)]
struct Fake {
    pem: String,
    issued: u64,
}

impl Fake {
    fn new(number: u64, issued: u64) -> Self {
        Self { pem: format!("<{number}>\n"), issued }
    }
}

impl Certified for Fake {
    fn pem(&self) -> &str {
        &self.pem
    }
    fn issued(&self) -> SystemTime {
        at(self.issued)
    }
    fn expires(&self) -> SystemTime {
        at(self.issued + CA_LIFE)
    }
}

fn first() -> Held<Fake> {
    Held::first(Fake::new(1, 0))
}

fn with_next() -> Held<Fake> {
    first().with_next(Fake::new(2, 1400))
}

#[test]
fn two_thirds_of_its_life_are_rest() {
    assert_eq!(first().step(at(1333), None, &TERMS), Step::Rest);
    assert_eq!(first().step(at(1334), None, &TERMS), Step::MakeNext);
    // Also when nothing ran for so long that it has expired.
    assert_eq!(first().step(at(9999), None, &TERMS), Step::MakeNext);
}

#[test]
fn the_shorter_of_its_own_life_and_the_one_asked_for_counts() {
    let shorter = Terms { ca_life: Duration::from_secs(300), ..TERMS };
    assert_eq!(first().step(at(199), None, &shorter), Step::Rest);
    assert_eq!(first().step(at(200), None, &shorter), Step::MakeNext);
    let longer = Terms { ca_life: Duration::from_secs(90_000), ..TERMS };
    assert_eq!(first().step(at(1334), None, &longer), Step::MakeNext);
}

#[test]
fn a_request_is_met_once_and_not_beside_a_rotation_that_runs() {
    let asked = Held { requested: true, ..first() };
    assert_eq!(asked.step(at(1), None, &TERMS), Step::MakeNext);
    assert!(!asked.with_next(Fake::new(2, 1)).requested);
    let again = Held { requested: true, ..with_next() };
    assert_eq!(again.step(at(1400), None, &TERMS), Step::Rest);
    assert!(again.promoted(at(1500), &TERMS).requested);
}

#[test]
fn requests_wait_when_there_are_many_former_cas_and_age_does_not() {
    let previous = |number| Previous { pem: format!("<p{number}>\n"), until: at(5000) };
    let full = Held { previous: (0..PREVIOUS_MAX).map(previous).collect(), ..first() };
    let asked = Held { requested: true, ..full };
    assert_eq!(asked.step(at(1), None, &TERMS), Step::Rest);
    assert_eq!(asked.step(at(1334), None, &TERMS), Step::MakeNext);
}

#[test]
fn the_next_one_signs_only_when_it_was_seen_for_the_settling_time() {
    let held = with_next();
    for (seen, step) in [(None, Step::Rest), (Some(0), Step::Rest), (Some(29), Step::Rest)] {
        assert_eq!(held.step(at(9999), seen.map(Duration::from_secs), &TERMS), step);
    }
    assert_eq!(held.step(at(1400), Some(TERMS.settle), &TERMS), Step::Promote);
}

#[test]
fn a_promotion_changes_no_bundle_and_keeps_the_former_until_its_leaves_are_gone() {
    let before = with_next();
    let after = before.promoted(at(1450), &TERMS);
    assert_eq!(before.bundle(), "<1>\n<2>\n");
    assert_eq!(after.bundle(), before.bundle());
    assert_eq!(after.current.pem, "<2>\n");
    assert!(after.next.is_none());
    assert_eq!(after.previous, [Previous { pem: "<1>\n".into(), until: at(1750) }]);
    assert_eq!(after.step(at(1870), None, &TERMS), Step::Rest);
    assert_eq!(after.step(at(1871), None, &TERMS), Step::Retire);
    assert_eq!(after.retired(at(1871), &TERMS).bundle(), "<2>\n");
    // Or until it expires, where that is sooner.
    assert_eq!(before.promoted(at(1900), &TERMS).previous[0].until, at(2000));
}

#[test]
fn a_promotion_of_nothing_is_nothing() {
    let after = first().promoted(at(1), &TERMS);
    assert_eq!((after.bundle(), after.previous.len()), ("<1>\n".into(), 0));
}

#[test]
fn a_gap_or_another_ca_begins_the_settling_anew() {
    let now = Instant::now();
    let later = |seconds| now + Duration::from_secs(seconds);
    let (with, without) = (vec![b"<1>\n<2>\n".to_vec()], vec![b"<1>\n<2>\n".to_vec(), Vec::new()]);
    let mut seen = Seen::default();
    assert_eq!(seen.look(Some("<2>\n"), &with, now), Some(Duration::ZERO));
    assert_eq!(seen.look(Some("<2>\n"), &with, later(9)), Some(Duration::from_secs(9)));
    assert_eq!(seen.look(Some("<2>\n"), &without, later(10)), None);
    assert_eq!(seen.look(Some("<2>\n"), &with, later(11)), Some(Duration::ZERO));
    assert_eq!(seen.look(Some("<1>\n"), &with, later(12)), Some(Duration::ZERO));
    assert_eq!(seen.look(Some("<1>\n"), &[], later(13)), None);
    assert_eq!(seen.look(None, &with, later(14)), None);
}

/// A cluster in which everything takes its time: replicas stop between any two of their calls,
/// their clocks differ, and API servers know a configuration of a while ago.
struct World {
    now: u64,
    began: Instant,
    made: u64,
    secret: (u64, Held<Fake>),
    /// Every bundle there was, and from when on.
    bundles: Vec<(u64, String)>,
    replicas: Vec<Replica>,
    random: u64,
    /// The rule under test: a bundle is written only at the version that was read.
    versioned: bool,
    promotions: u32,
}

struct Replica {
    at: Stage,
    /// Seconds its clock is ahead.
    skew: i64,
    seen: Seen,
    leaf: Leaf,
    ready: bool,
    /// Its machine stands still until then: what it was about to do, it does late.
    asleep_until: u64,
}

#[derive(Clone)]
struct Leaf {
    ca: Fake,
    signed: u64,
    expires: u64,
}

enum Stage {
    Begin,
    /// The version of the bundle that was read.
    Bundle(usize),
    Secret(usize, u64, Held<Fake>),
    Published(usize, u64, Held<Fake>),
}

impl World {
    fn new(seed: u64, versioned: bool) -> Self {
        let mut world = Self {
            now: 0,
            began: Instant::now(),
            made: 1,
            secret: (0, first()),
            bundles: vec![(0, first().bundle())],
            replicas: Vec::new(),
            random: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
            versioned,
            promotions: 0,
        };
        for skew in [-60, 0, 60] {
            let leaf = world.sign(&first().current);
            let (at, seen) = (Stage::Begin, Seen::default());
            world.replicas.push(Replica { at, skew, seen, leaf, ready: true, asleep_until: 0 });
        }
        world
    }

    fn random(&mut self, below: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random % below
    }

    fn sign(&self, ca: &Fake) -> Leaf {
        let expires = (self.now + LEAF_LIFE).min(ca.issued + CA_LIFE);
        Leaf { ca: ca.clone(), signed: self.now, expires }
    }

    /// One call of one replica.
    fn act(&mut self, index: usize) -> Result<(), String> {
        let skewed = self.now.saturating_add_signed(self.replicas[index].skew);
        let stage = std::mem::replace(&mut self.replicas[index].at, Stage::Begin);
        let leaf = self.replicas[index].leaf.clone();
        if self.now >= leaf.signed + (leaf.expires - leaf.signed) * 2 / 3 {
            self.replicas[index].leaf = self.sign(&leaf.ca);
        }
        self.replicas[index].at = match stage {
            Stage::Begin => Stage::Bundle(self.bundles.len()),
            Stage::Bundle(version) => {
                let (secret, held) = self.secret.clone();
                if !held.knows(&leaf.ca.pem) {
                    return Err(format!("replica {index} serves what the secret never heard of"));
                }
                Stage::Secret(version, secret, held)
            }
            Stage::Secret(version, secret, held) => {
                let read = self.bundles[version - 1].1.clone();
                if read != held.bundle() && (!self.versioned || version == self.bundles.len()) {
                    self.bundles.push((self.now, held.bundle()));
                }
                Stage::Published(version, secret, held)
            }
            Stage::Published(version, secret, held) => {
                let live = vec![self.bundles[version - 1].1.clone().into_bytes()];
                if leaf.ca != held.current && in_every(&live, held.current.pem()) {
                    self.replicas[index].leaf = self.sign(&held.current);
                }
                let instant = self.began + Duration::from_secs(self.now);
                let next = held.next.as_ref().map(Fake::pem);
                let seen = self.replicas[index].seen.look(next, &live, instant);
                let after = match held.step(at(skewed), seen, &TERMS) {
                    Step::Rest => None,
                    Step::MakeNext => {
                        self.made += 1;
                        Some(held.with_next(Fake::new(self.made, self.now)))
                    }
                    Step::Promote => Some(held.promoted(at(skewed), &TERMS)),
                    Step::Retire => Some(held.retired(at(skewed), &TERMS)),
                };
                if let Some(after) = after.filter(|_| secret == self.secret.0) {
                    self.promotions += u32::from(after.current != held.current);
                    self.secret = (secret + 1, after);
                }
                self.replicas[index].ready |= self
                    .bundles
                    .last()
                    .is_some_and(|last| last.1.contains(&self.replicas[index].leaf.ca.pem));
                Stage::Begin
            }
        };
        Ok(())
    }

    /// Whether every API server trusts every ready replica, though it learned nothing for a while.
    fn check(&self) -> Result<(), String> {
        let since = self.now.saturating_sub(SETTLE);
        let first = self.bundles.iter().rposition(|(from, _)| *from <= since).unwrap_or(0);
        for replica in self.replicas.iter().filter(|replica| replica.ready) {
            let Leaf { ca, expires, .. } = &replica.leaf;
            if *expires <= self.now {
                return Err(format!("at {}: an expired leaf by {}", self.now, ca.pem));
            }
            if let Some((from, bundle)) =
                self.bundles[first..].iter().find(|b| !b.1.contains(&ca.pem))
            {
                return Err(format!("at {}: {} is not in {bundle} of {from}", self.now, ca.pem));
            }
        }
        Ok(())
    }

    fn run(&mut self, actions: u32) -> Result<(), String> {
        for _ in 0..actions {
            match self.random(100) {
                // A restart loads what the Secret holds, and is ready when the bundle has it.
                0 => {
                    let index = usize::try_from(self.random(3)).unwrap_or(0);
                    let leaf = self.sign(&self.secret.1.current.clone());
                    let replica = &mut self.replicas[index];
                    (replica.at, replica.seen) = (Stage::Begin, Seen::default());
                    (replica.leaf, replica.ready) = (leaf, false);
                }
                1 => {
                    self.secret.0 += 1;
                    self.secret.1.requested = true;
                }
                // Less than a leaf has left when it is renewed.
                2..=4 => {
                    let index = usize::try_from(self.random(3)).unwrap_or(0);
                    let rested = self.replicas[index].asleep_until + 60 < self.now;
                    if rested {
                        self.replicas[index].asleep_until = self.now + 85;
                    }
                }
                _ => {
                    let index = usize::try_from(self.random(3)).unwrap_or(0);
                    if self.replicas[index].asleep_until <= self.now {
                        self.act(index)?;
                    }
                }
            }
            self.now += self.random(3);
            self.check()?;
        }
        Ok(())
    }
}

#[test]
fn no_interleaving_of_replicas_leaves_one_untrusted() {
    for seed in 1..=20 {
        let mut world = World::new(seed, true);
        world.run(5000).unwrap_or_else(|why| panic!("seed {seed}: {why}"));
        assert!(world.promotions > 10, "seed {seed}: {} promotions", world.promotions);
    }
}

#[test]
fn without_the_version_a_late_write_would_leave_one_untrusted() {
    assert!((1..=20).any(|seed| World::new(seed, false).run(5000).is_err()));
}

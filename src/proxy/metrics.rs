//! What the proxy counts, and its Prometheus text.
//!
//! One set a process, as the log is one: whoever reports something counts it, and what is counted
//! in passing is one atomic addition. Every label has a bounded set of values; the largest is the
//! policy's own keys.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use hickory_proto::op::ResponseCode;

use super::destination::DialError;

/// Only ever grows.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    const fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    pub(crate) fn add(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What judged.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Layer {
    /// Host and port.
    L4,
    /// The request.
    L7,
}

const LAYERS: [&str; 2] = ["l4", "l7"];

/// What the policy said.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Verdict {
    Allowed,
    Denied,
    /// Let pass by `enforcement: audit`.
    Audited,
}

const VERDICTS: [&str; 3] = ["allowed", "denied", "audited"];

/// Refused, and not by a rule of the policy.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Refused {
    /// Nobody could say whose connection it is.
    Caller,
    /// The executable is not the one that it was.
    Executable,
    /// The name leads to an address that is not dialled.
    Address,
    /// Not HTTP, not TLS, or not as it must be.
    Protocol,
    /// Went round the proxy.
    Direct,
    /// A DNS question.
    Name,
    /// Too many at a time.
    Limit,
    /// Ended, because the policy changed.
    Revoked,
}

const REFUSED: [&str; 8] =
    ["caller", "executable", "address", "protocol", "direct", "name", "limit", "revoked"];

/// Whose connections.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Kind {
    /// The agent's to the proxy.
    Agent,
    /// From outside to what listens in the fence.
    Inbound,
}

const KINDS: [&str; 2] = ["agent", "inbound"];

/// The other end of a TLS handshake.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Side {
    Agent,
    Upstream,
}

const SIDES: [&str; 2] = ["agent", "upstream"];
const RESULTS: [&str; 2] = ["ok", "failed"];

const UPSTREAM_ERRORS: [&str; 5] = ["resolve", "connect", "timeout", "tls", "proxy"];

const DNS_CODES: [&str; 7] =
    ["noerror", "formerr", "servfail", "nxdomain", "notimp", "refused", "other"];

/// One policy's decisions, by layer and verdict.
type Decisions = [[Counter; VERDICTS.len()]; LAYERS.len()];

/// Policies with their decisions, sorted by key; and those that came later.
#[derive(Debug, Default)]
struct Policies {
    sorted: Vec<(String, Decisions)>,
    later: OnceLock<Box<Policies>>,
}

/// How often policies may bring new keys, and how many there may be: what comes beyond is counted
/// as decisions without a policy.
const LATER: usize = 64;
const KEYS: usize = 4_096;

/// The policy in force.
#[derive(Debug)]
struct InForce {
    generation: u64,
    digest: String,
    since: SystemTime,
}

struct Metrics {
    /// When the proxy began, and its policies.
    started: OnceLock<(SystemTime, Policies)>,
    in_force: Mutex<Option<InForce>>,
    /// Changes of the policy, by whether they were followed.
    changes: [Counter; CHANGES.len()],
    /// Decisions that no policy made (`-`).
    without_policy: Decisions,
    refused: [Counter; REFUSED.len()],
    connections: [Counter; KINDS.len()],
    open: [AtomicI64; KINDS.len()],
    upstream_errors: [Counter; UPSTREAM_ERRORS.len()],
    handshakes: [[Counter; RESULTS.len()]; SIDES.len()],
    dns: [Counter; DNS_CODES.len()],
}

const CHANGES: [&str; 2] = ["followed", "kept"];

static METRICS: Metrics = Metrics {
    started: OnceLock::new(),
    in_force: Mutex::new(None),
    changes: [const { Counter::new() }; CHANGES.len()],
    without_policy: [const { [const { Counter::new() }; VERDICTS.len()] }; LAYERS.len()],
    refused: [const { Counter::new() }; REFUSED.len()],
    connections: [const { Counter::new() }; KINDS.len()],
    open: [const { AtomicI64::new(0) }; KINDS.len()],
    upstream_errors: [const { Counter::new() }; UPSTREAM_ERRORS.len()],
    handshakes: [const { [const { Counter::new() }; RESULTS.len()] }; SIDES.len()],
    dns: [const { Counter::new() }; DNS_CODES.len()],
};

/// Bytes read from the agent.
pub(crate) static UP: Counter = Counter::new();
/// Bytes read from upstreams.
pub(crate) static DOWN: Counter = Counter::new();

/// Begins, with the policy's keys.
pub(crate) fn start<'a>(policies: impl Iterator<Item = &'a str>) {
    METRICS.started.get_or_init(|| (SystemTime::now(), Policies::new(policies)));
}

/// Makes the keys of another policy known. One at a time.
pub(crate) fn policies<'a>(keys: impl Iterator<Item = &'a str>) {
    if let Some((_, policies)) = METRICS.started.get() {
        policies.add(keys);
    }
}

/// Another policy is in force from now on.
pub(crate) fn policy_in_force(generation: u64, digest: &str) {
    let mut in_force = METRICS.in_force.lock().unwrap_or_else(PoisonError::into_inner);
    if in_force.is_some() {
        METRICS.changes[0].add(1);
    }
    let digest = digest.to_owned();
    *in_force = Some(InForce { generation, digest, since: SystemTime::now() });
}

/// Counts a change of the policy that is not followed.
pub(crate) fn policy_kept() {
    METRICS.changes[1].add(1);
}

impl Policies {
    fn new<'a>(keys: impl Iterator<Item = &'a str>) -> Self {
        let mut sorted: Vec<_> = keys.map(|key| (key.to_owned(), Decisions::default())).collect();
        sorted.sort_unstable_by(|(a, _), (b, _)| a.cmp(b));
        Self { sorted, later: OnceLock::new() }
    }

    /// Each part, the first ones first.
    fn parts(&self) -> impl Iterator<Item = &Self> {
        std::iter::successors(Some(self), |part| part.later.get().map(|part| &**part))
    }

    fn of(&self, key: &str) -> Option<&Decisions> {
        self.parts().find_map(|part| {
            let at = part.sorted.binary_search_by(|(have, _)| have.as_str().cmp(key)).ok()?;
            part.sorted.get(at).map(|(_, decisions)| decisions)
        })
    }

    /// Counters are never given up: what they count only grows.
    fn add<'a>(&self, keys: impl Iterator<Item = &'a str>) {
        let (mut count, mut known, mut last) = (0, 0, self);
        for part in self.parts() {
            count += 1;
            known += part.sorted.len();
            last = part;
        }
        let room = if count > LATER { 0 } else { KEYS.saturating_sub(known) };
        let new: Vec<_> = keys.filter(|key| self.of(key).is_none()).take(room).collect();
        if !new.is_empty() {
            let _ = last.later.set(Box::new(Self::new(new.into_iter())));
        }
    }
}

/// Counts a decision of the policy `key`.
pub(crate) fn decided(layer: Layer, verdict: Verdict, key: &str) {
    METRICS.decisions(key)[layer as usize][verdict as usize].add(1);
}

/// Counts what was refused without a rule.
pub(crate) fn refused(what: Refused, count: u64) {
    METRICS.refused[what as usize].add(count);
}

/// Counts a failure on the way to an upstream. What must not be dialled is a refusal instead.
pub(crate) fn dial_failed(error: &DialError) {
    let kind = match error {
        DialError::Forbidden { .. } | DialError::NotByProxy(_) => {
            return refused(Refused::Address, 1);
        }
        DialError::Resolve(_) => 0,
        DialError::Connect(_) => 1,
        DialError::Timeout(_) => 2,
        DialError::Tls(_) => 3,
        DialError::Proxy(_) => 4,
    };
    METRICS.upstream_errors[kind].add(1);
}

/// Counts a TLS handshake that has ended.
pub(crate) fn handshake(side: Side, succeeded: bool) {
    METRICS.handshakes[side as usize][usize::from(!succeeded)].add(1);
}

/// Counts an answer to the fence's DNS questions.
pub(crate) fn dns_answer(code: ResponseCode) {
    let code = match code {
        ResponseCode::NoError => 0,
        ResponseCode::FormErr => 1,
        ResponseCode::ServFail => 2,
        ResponseCode::NXDomain => 3,
        ResponseCode::NotImp => 4,
        ResponseCode::Refused => 5,
        _ => 6,
    };
    METRICS.dns[code].add(1);
}

/// A connection that is open; it ends when this is dropped.
#[derive(Debug)]
pub(crate) struct Open(Kind);

/// Counts a connection.
pub(crate) fn connection(kind: Kind) -> Open {
    METRICS.connections[kind as usize].add(1);
    METRICS.open[kind as usize].fetch_add(1, Ordering::Relaxed);
    Open(kind)
}

impl Drop for Open {
    fn drop(&mut self) {
        METRICS.open[self.0 as usize].fetch_sub(1, Ordering::Relaxed);
    }
}

/// The text exposition, format 0.0.4.
pub(crate) fn render(ready: bool) -> String {
    METRICS.render(ready)
}

impl Metrics {
    fn decisions(&self, key: &str) -> &Decisions {
        let found = self.started.get().and_then(|(_, policies)| policies.of(key));
        found.unwrap_or(&self.without_policy)
    }

    fn render(&self, ready: bool) -> String {
        let mut out = Text(String::with_capacity(4096));
        out.family("ringfence_build_info", "gauge", "The version that runs.");
        out.line("ringfence_build_info", &[("version", env!("CARGO_PKG_VERSION"))], 1);
        if let Some((began, _)) = self.started.get() {
            let began = began.duration_since(UNIX_EPOCH).unwrap_or_default();
            out.family("process_start_time_seconds", "gauge", "Start of the proxy, Unix time.");
            let value = format_args!("{}.{:03}", began.as_secs(), began.subsec_millis());
            out.line("process_start_time_seconds", &[], value);
        }
        out.family("ringfence_ready", "gauge", "Whether the agent was released.");
        out.line("ringfence_ready", &[], u8::from(ready));
        self.render_policy(&mut out);
        self.render_decisions(&mut out);
        out.counters(
            "ringfence_refusals_total",
            "Refused for another reason than a rule of the policy.",
            ("kind", &REFUSED),
            &self.refused,
        );
        out.counters(
            "ringfence_connections_total",
            "Connections that were accepted.",
            ("kind", &KINDS),
            &self.connections,
        );
        let name = "ringfence_connections_open";
        out.family(name, "gauge", "Connections that are open.");
        for (kind, open) in KINDS.into_iter().zip(&self.open) {
            out.line(name, &[("kind", kind)], open.load(Ordering::Relaxed));
        }
        let name = "ringfence_bytes_total";
        out.family(name, "counter", "Bytes read, inside TLS where the proxy ends it: up from the agent, down from upstreams.");
        for (direction, counter) in [("up", &UP), ("down", &DOWN)] {
            out.line(name, &[("direction", direction)], counter.get());
        }
        out.counters(
            "ringfence_upstream_errors_total",
            "Failures on the way to what the policy allows.",
            ("kind", &UPSTREAM_ERRORS),
            &self.upstream_errors,
        );
        let name = "ringfence_tls_handshakes_total";
        out.family(name, "counter", "TLS handshakes that have ended.");
        for (side, results) in SIDES.into_iter().zip(&self.handshakes) {
            for (result, counter) in RESULTS.into_iter().zip(results) {
                out.line(name, &[("side", side), ("result", result)], counter.get());
            }
        }
        out.counters(
            "ringfence_dns_answers_total",
            "Answers to the DNS questions of the fence.",
            ("code", &DNS_CODES),
            &self.dns,
        );
        out.0
    }

    fn render_policy(&self, out: &mut Text) {
        let in_force = self.in_force.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(InForce { generation, digest, since }) = &*in_force {
            out.family("ringfence_policy_info", "gauge", "The policy in force, by its digest.");
            out.line("ringfence_policy_info", &[("digest", digest)], 1);
            let name = "ringfence_policy_generation";
            out.family(name, "gauge", "How many policies have been in force.");
            out.line(name, &[], generation);
            let name = "ringfence_policy_since_seconds";
            out.family(name, "gauge", "Since when the policy is in force, Unix time.");
            let since = since.duration_since(UNIX_EPOCH).unwrap_or_default();
            out.line(name, &[], since.as_secs());
        }
        out.counters(
            "ringfence_policy_changes_total",
            "Changes of the policy: followed, or not, so that the last one was kept.",
            ("result", &CHANGES),
            &self.changes,
        );
    }

    fn render_decisions(&self, out: &mut Text) {
        const NAME: &str = "ringfence_decisions_total";
        out.family(NAME, "counter", "What the policy said: l4 to host and port, l7 to a request.");
        let parts = self.started.get().into_iter().flat_map(|(_, policies)| policies.parts());
        let policies = parts.flat_map(|part| &part.sorted);
        let policies = policies.map(|(key, decisions)| (key.as_str(), decisions));
        for (policy, layers) in policies.chain([("-", &self.without_policy)]) {
            for (layer, verdicts) in LAYERS.into_iter().zip(layers) {
                for (verdict, counter) in VERDICTS.into_iter().zip(verdicts) {
                    let labels = [("layer", layer), ("verdict", verdict), ("policy", policy)];
                    out.line(NAME, &labels, counter.get());
                }
            }
        }
    }
}

/// The exposition while it is written. Writing to a String cannot fail.
struct Text(String);

impl Text {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        let _ = write!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
    }

    fn line(&mut self, name: &str, labels: &[(&str, &str)], value: impl std::fmt::Display) {
        self.0.push_str(name);
        for (index, (label, of)) in labels.iter().enumerate() {
            let before = if index == 0 { '{' } else { ',' };
            let _ = write!(self.0, "{before}{label}=\"{}\"", Label(of));
        }
        let end = if labels.is_empty() { "" } else { "}" };
        let _ = writeln!(self.0, "{end} {value}");
    }

    fn counters(
        &mut self,
        name: &str,
        help: &str,
        (label, values): (&str, &[&str]),
        counters: &[Counter],
    ) {
        self.family(name, "counter", help);
        for (value, counter) in values.iter().zip(counters) {
            self.line(name, &[(label, value)], counter.get());
        }
    }
}

/// A label's value: the exposition knows three escapes. Other characters that a terminal could
/// obey are no use in a policy's key and become `?`.
struct Label<'a>(&'a str);

impl std::fmt::Display for Label<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.chars().try_for_each(|character| match character {
            '\\' => f.write_str("\\\\"),
            '"' => f.write_str("\\\""),
            '\n' => f.write_str("\\n"),
            ' '..='~' => f.write_char(character),
            _ if character.is_alphanumeric() => f.write_char(character),
            _ => f.write_char('?'),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metrics(policies: &[&str]) -> Metrics {
        Metrics {
            started: OnceLock::from((
                UNIX_EPOCH + std::time::Duration::from_millis(1_234),
                Policies::new(policies.iter().copied()),
            )),
            in_force: Mutex::default(),
            changes: Default::default(),
            without_policy: Decisions::default(),
            refused: Default::default(),
            connections: Default::default(),
            open: Default::default(),
            upstream_errors: Default::default(),
            handshakes: Default::default(),
            dns: Default::default(),
        }
    }

    #[test]
    fn decisions_are_told_apart_and_unknown_keys_are_one() {
        let metrics = metrics(&["a", "b"]);
        metrics.decisions("b")[Layer::L7 as usize][Verdict::Denied as usize].add(2);
        for key in ["-", "c", ""] {
            metrics.decisions(key)[Layer::L4 as usize][Verdict::Denied as usize].add(1);
        }
        let text = metrics.render(true);
        for expected in [
            "ringfence_decisions_total{layer=\"l7\",verdict=\"denied\",policy=\"b\"} 2\n",
            "ringfence_decisions_total{layer=\"l7\",verdict=\"denied\",policy=\"a\"} 0\n",
            "ringfence_decisions_total{layer=\"l4\",verdict=\"denied\",policy=\"-\"} 3\n",
            "process_start_time_seconds 1.234\n",
            "ringfence_ready 1\n",
        ] {
            assert!(text.contains(expected), "{expected} in\n{text}");
        }
    }

    #[test]
    fn the_keys_of_later_policies_are_counted_beside_the_first_ones() {
        let metrics = metrics(&["b"]);
        let (_, policies) = metrics.started.get().expect("started");
        let count = |key| metrics.decisions(key)[Layer::L4 as usize][0].add(1);
        count("b");
        policies.add(["a", "b", "c"].into_iter());
        for key in ["a", "b", "c", "d"] {
            count(key);
        }
        policies.add(["d"].into_iter());
        count("d");
        let text = metrics.render(true);
        for (key, times) in [("a", 1), ("b", 2), ("c", 1), ("d", 1), ("-", 1)] {
            let line = format!("{{layer=\"l4\",verdict=\"allowed\",policy=\"{key}\"}} {times}\n");
            assert!(text.contains(&line), "{line} in\n{text}");
        }
        // However often names are changed, what is kept of them is bounded.
        for round in 0..2 * LATER {
            let keys: Vec<_> = (0..100).map(|key| format!("{round}-{key}")).collect();
            policies.add(keys.iter().map(String::as_str));
        }
        assert!(policies.parts().count() <= LATER + 1);
        assert!(policies.parts().map(|part| part.sorted.len()).sum::<usize>() <= KEYS);
    }

    #[test]
    fn the_policy_in_force_is_shown() {
        let metrics = metrics(&[]);
        let since = UNIX_EPOCH + std::time::Duration::from_secs(7);
        let digest = "sha256:ab".to_owned();
        *metrics.in_force.lock().unwrap() = Some(InForce { generation: 3, digest, since });
        metrics.changes[1].add(2);
        let text = metrics.render(true);
        for expected in [
            "ringfence_policy_info{digest=\"sha256:ab\"} 1\n",
            "ringfence_policy_generation 3\n",
            "ringfence_policy_since_seconds 7\n",
            "ringfence_policy_changes_total{result=\"kept\"} 2\n",
        ] {
            assert!(text.contains(expected), "{expected} in\n{text}");
        }
    }

    #[test]
    fn every_line_is_of_the_exposition() {
        let text = metrics(&["a", "q\"\\\n\u{1b}\u{e9}"]).render(false);
        assert!(text.contains("policy=\"q\\\"\\\\\\n?\u{e9}\"} 0\n"), "{text}");
        let mut families = std::collections::BTreeSet::new();
        for line in text.lines() {
            if let Some(family) = line.strip_prefix("# HELP ") {
                let name = family.split(' ').next().unwrap();
                assert!(families.insert(name), "{name} comes twice");
                continue;
            }
            if line.starts_with("# TYPE ") {
                continue;
            }
            let (name, value) = line.rsplit_once(' ').unwrap();
            assert!(value.parse::<f64>().is_ok(), "{line}");
            let name = name.split('{').next().unwrap();
            assert!(families.contains(name), "{line}");
        }
        assert!(families.len() > 8 && text.ends_with('\n'));
    }
}

//! What `doctor` prints: what is enforced, in short, and then row by row.

use std::collections::HashMap;
use std::fmt::Write;

use serde::Serialize;
use serde_json::Value;

use super::Line;
use crate::fence::attempts::{Layer, Row, Seen, Verdict, plain as shown};

/// The outcome of all rows.
#[derive(Debug, Serialize)]
pub struct Report {
    summary: Summary,
    attestation: Value,
    rows: Vec<Entry>,
}

#[derive(Debug, Default, Serialize)]
struct Summary {
    rows: usize,
    as_expected: usize,
    unexpected: usize,
    skipped: usize,
}

#[derive(Debug, Serialize)]
struct Entry {
    id: &'static str,
    layer: Layer,
    #[serde(skip_serializing_if = "Option::is_none")]
    mistake: Option<u8>,
    what: &'static str,
    expected: String,
    seen: String,
    verdict: Verdict,
}

impl Report {
    /// Judges what came back. A row of which nothing was heard, or two things, is not as expected:
    /// what runs in the fence is the agent's user, and the agent could write lines too.
    pub fn new(
        attestation: Value,
        table: impl Iterator<Item = &'static Row>,
        lines: &[Line],
    ) -> Self {
        let mut heard: HashMap<&str, Vec<&Seen>> = HashMap::new();
        for line in lines {
            heard.entry(line.id.as_str()).or_default().push(&line.seen);
        }
        let silence = Seen::Broken("nothing was heard of it".to_owned());
        let twice = Seen::Broken("more than one answer was heard".to_owned());
        let mut summary = Summary::default();
        let rows = table.map(|row| {
            let seen = match heard.get(row.id).map(Vec::as_slice) {
                Some([seen]) => *seen,
                None => &silence,
                Some(_) => &twice,
            };
            let verdict = row.judge(seen);
            summary.rows += 1;
            *match verdict {
                Verdict::AsExpected => &mut summary.as_expected,
                Verdict::Unexpected => &mut summary.unexpected,
                Verdict::Skipped => &mut summary.skipped,
            } += 1;
            Entry {
                id: row.id,
                layer: row.layer,
                mistake: row.mistake,
                what: row.what,
                expected: row.expected(),
                seen: seen.to_string(),
                verdict,
            }
        });
        let rows = rows.collect();
        Self { summary, attestation, rows }
    }

    /// How many rows are not as expected.
    pub fn unexpected(&self) -> usize {
        self.summary.unexpected
    }

    /// For a person.
    pub fn text(&self) -> String {
        let mut out = enforced(&self.attestation);
        let width = |value: fn(&Entry) -> usize| self.rows.iter().map(value).max().unwrap_or(0);
        let (ids, whats) = (width(|row| row.id.len()), width(|row| row.what.chars().count()));
        let mut layer = None;
        for row in &self.rows {
            if layer != Some(row.layer) {
                layer = Some(row.layer);
                // Writing to a string cannot fail.
                let _ = writeln!(out, "\n{}", row.layer);
            }
            let mark = match row.verdict {
                Verdict::AsExpected => "ok  ",
                Verdict::Unexpected => "FAIL",
                Verdict::Skipped => "skip",
            };
            let _ = write!(out, "{mark}  {:ids$}  {:whats$}  {}", row.id, row.what, row.seen);
            if row.verdict == Verdict::Unexpected {
                let _ = write!(out, ", must be {}", row.expected);
            }
            out.push('\n');
        }
        let Summary { rows, as_expected, unexpected, skipped } = self.summary;
        let _ = writeln!(
            out,
            "\n{rows} rows: {as_expected} as expected, {unexpected} not, {skipped} skipped"
        );
        for row in self.rows.iter().filter(|row| row.verdict == Verdict::Unexpected) {
            let _ = writeln!(out, "FAIL {}: {}, must be {}", row.id, row.seen, row.expected);
        }
        out
    }
}

/// What the supervisor has read back from the kernel, and what is missing.
fn enforced(attestation: &Value) -> String {
    let at = |pointer: &str| attestation.pointer(pointer).unwrap_or(&Value::Null);
    let plain = |pointer: &str| match at(pointer) {
        Value::String(text) => shown(text),
        other => other.to_string(),
    };
    let rules = match at("/network/nftables/Err") {
        Value::String(why) => format!("MISSING: {}", shown(why)),
        _ => "read back".to_owned(),
    };
    let landlock = match (at("/landlock/unconfined"), at("/landlock/missing")) {
        (Value::Bool(true), why) => format!("NOT ENFORCED: {}", shown(&why.to_string())),
        (_, Value::Null) => "all rights and scopes".to_owned(),
        (_, what) => format!("all but {}", shown(&what.to_string())),
    };
    let processes = match (at("/pid_namespace/own"), at("/pid_namespace/proc_shared")) {
        (Value::Bool(true), Value::Null) => "a PID namespace and a /proc of its own".to_owned(),
        (Value::Bool(true), why) => {
            format!("a PID namespace of its own, but /proc is shared: {}", shown(&why.to_string()))
        }
        (_, _) => "the container's PID namespace and /proc".to_owned(),
    };
    format!(
        "supervisor   {}\npolicy       {}\nuser         {}:{} groups {}\n\
         network      a namespace of its own; packet rules {rules}\n\
         landlock     ABI {}, {} rules; {landlock}\nseccomp      {} filter(s)\n\
         binaries     {}\nprocesses    {processes}\nproxy        {} threads, each verified\n",
        plain("/version"),
        plain("/policy_digest"),
        at("/user/uid"),
        at("/user/gid"),
        at("/user/groups"),
        at("/landlock/abi"),
        at("/landlock/applied"),
        at("/seccomp_filters"),
        if at("/binary_identity") == &Value::Bool(true) {
            "bound to connections at connect(2)"
        } else {
            "not needed: the policy lets nothing out"
        },
        at("/proxy_threads"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fence::attempts::{Expect, table};

    fn lines(change: impl Fn(&Row) -> Option<Seen>) -> Vec<Line> {
        let seen = |row: &Row| match row.expect[0] {
            Expect::Errno(errno) => Seen::Errno(errno),
            Expect::Status(status) => Seen::Status(status),
            Expect::Rcode(code) => Seen::Rcode(code),
            Expect::Holds => Seen::Holds,
        };
        table()
            .filter_map(|row| {
                let seen = change(row).or(Some(seen(row)))?;
                Some(Line { id: row.id.to_owned(), seen })
            })
            .collect()
    }

    #[test]
    fn one_row_that_works_is_enough() {
        let all = lines(|_| None);
        assert_eq!(Report::new(Value::Null, table(), &all).unexpected(), 0);
        let one = lines(|row| (row.id == "ptrace").then_some(Seen::Worked));
        let report = Report::new(Value::Null, table(), &one);
        assert_eq!(report.unexpected(), 1);
        assert!(
            report.text().contains("FAIL ptrace: it worked, must be EPERM"),
            "{}",
            report.text()
        );
    }

    #[test]
    fn silence_is_a_failure_and_a_skip_is_none() {
        let mut lines = lines(|row| (row.id == "chroot").then_some(Seen::Skipped("x".into())));
        lines.retain(|line| line.id != "mount");
        lines.push(Line { id: "ptrace".into(), seen: Seen::Errno(1) });
        let report = Report::new(Value::Null, table(), &lines);
        assert_eq!((report.unexpected(), report.summary.skipped), (2, 1));
        assert!(report.text().contains("FAIL ptrace: more than one answer"));
        assert!(report.text().contains("FAIL mount: nothing was heard of it"));
    }

    #[test]
    fn what_is_missing_is_said() {
        let attestation = serde_json::json!({
            "network": {"nftables": {"Err": "no module"}},
            "landlock": {"unconfined": true, "missing": "no Landlock"},
            "pid_namespace": {"own": false, "proc_shared": "shared"},
        });
        let text = enforced(&attestation);
        for part in ["MISSING: no module", "NOT ENFORCED", "the container's PID namespace"] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }
}

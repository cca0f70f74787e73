//! `policy.rego` beside `policy.yaml`: recognised by its digest, or obeyed.
//!
//! The rules of the recognised texts are what the native engine does. Any other text decides itself,
//! by regorus; nothing of regorus runs before such a text is loaded. It must keep one of `OpenShell`'s
//! two contracts (see `contract`), and it is asked at load what it will be asked later: a rule that
//! is missing, fails or answers in another shape than the contract's is an error with a line.
#![forbid(unsafe_code)]

mod config;
mod contract;
mod data;
mod judge;
mod memory;
mod nesting;
mod outline;
mod probe;
mod runner;

#[cfg(test)]
mod tests;

use contract::{Contract, SECTIONS};
pub(super) use judge::Judge;
use outline::{Call, Outline};
use runner::{Fault, Runner};
use sha2::{Digest, Sha256};

use super::check;
use super::digest::to_hex;
use super::document::{self, Document};
use super::engine::Policy;
use super::problem::{Place, Problem, Problems, Source};
use super::suggestion::printable;
use super::yaml::Node;

/// SHA-256 in hexadecimal of the exact bytes, and what they are.
const RECOGNISED: &[(&str, &str)] = &[
    ("c8dfce36582aff5b9076331929f0c5f13ab48f10a95cfe99e5593092536bdccd", "examples/policy.rego"),
    (
        "c482cef539722bde9f485deec3e2a6a4ab5035a6e0cbc4ec623a62181c15b2dd",
        "the text without rules that examples/policy.rego was at first",
    ),
];

/// The longest text in bytes: several times `OpenShell`'s own.
const MAX_TEXT: usize = 128 * 1024;

/// A text that the native engine does not stand for.
pub(super) struct Foreign<'t> {
    name: &'t str,
    text: &'t str,
}

/// Reads the text; `None` is one that the native engine stands for.
pub(super) fn read<'t>(source: &Source<'t>) -> Result<Option<Foreign<'t>>, Problem> {
    let refuse = |what: String, fix: &str| Problem {
        file: source.name.to_owned(),
        line: None,
        column: None,
        what,
        fix: Some(fix.to_owned()),
    };
    if source.bytes.len() > MAX_TEXT {
        let what = format!("the text is larger than {MAX_TEXT} bytes");
        return Err(refuse(what, "keep lists in policy.yaml"));
    }
    let digest = to_hex(&Sha256::digest(source.bytes).into());
    if RECOGNISED.iter().any(|(known, _)| *known == digest) {
        return Ok(None);
    }
    let Ok(text) = std::str::from_utf8(source.bytes) else {
        return Err(refuse("the text is not UTF-8".into(), "save it as UTF-8"));
    };
    if let Some(line) = nesting::too_deep(text) {
        let what = "too many brackets are nested in each other".to_owned();
        let problem = refuse(what, "give the inner ones rules of their own");
        return Err(Problem { line: Some(line), ..problem });
    }
    Ok(Some(Foreign { name: source.name, text }))
}

/// What a text is put over: the policy that was compiled, and what it was compiled from.
pub(super) struct Under<'d> {
    pub policy: Policy,
    pub document: &'d Document,
    pub root: &'d Node,
}

impl Foreign<'_> {
    /// Puts the text over a policy without errors: from then on the text decides.
    ///
    /// Returns the warnings too; the errors are all that could be found at once.
    pub fn over(self, under: Under<'_>) -> Result<(Policy, Vec<Problem>), Vec<Problem>> {
        let mut runner = Runner::new(self.text).map_err(|fault| vec![self.unreadable(fault)])?;
        let contract = Contract::detect(&runner).map_err(|missing| {
            missing.into_iter().map(|rule| self.missing(rule)).collect::<Vec<_>>()
        })?;
        let outline = runner.outline().map_err(|fault| vec![self.unreadable(fault)])?;
        let calls = self.bad_calls(&outline);
        if !calls.is_empty() {
            return Err(calls);
        }
        let data = data::document(under.root);
        runner.set_data(&data).map_err(|fault| vec![self.failed(fault, &outline, &[])])?;
        let mut problems = Problems::new(self.name);
        let document = self.sections(&runner, &outline, under.document, &mut problems)?;
        let filesystem = check::filesystem(&document, &mut problems);
        let process = check::process(&document, &mut problems);
        if let Some(line) = self.ancestors() {
            problems.warn(
                Place { line, column: 0 },
                "the text looks at the caller's ancestors: any program can become a child of any \
                 other",
                "look at input.exec.path alone",
            );
        }
        let (errors, warnings) = problems.finish();
        if !errors.is_empty() {
            return Err(errors);
        }
        probe::probe(&runner, contract, &data).map_err(|failed| {
            vec![self.failed(failed.fault, &outline, contract.rules(failed.request))]
        })?;
        let judge = Judge::new(runner, data, contract);
        let policy = under.policy.judged_by(judge, filesystem, document.compatibility, process);
        Ok((policy, warnings))
    }

    /// What the rules of the configuration say, in the place of the file's own sections.
    fn sections(
        &self,
        runner: &Runner,
        outline: &Outline,
        document: &Document,
        problems: &mut Problems,
    ) -> Result<Document, Vec<Problem>> {
        // Our own keys of `process` are the file's, also where the text knows OpenShell's only.
        let mut read = Document {
            memfd: document.memfd,
            limits: document.limits,
            unix_sockets: document.unix_sockets,
            ..Document::default()
        };
        let mut asking = runner.ask(&serde_json::json!({}));
        for (rule, key) in SECTIONS {
            let value =
                asking.rule(rule).map_err(|fault| vec![self.failed(fault, outline, &[rule])])?;
            let at = Place { line: outline.line_of(rule).unwrap_or(0), column: 0 };
            match value {
                Some(value) => {
                    document::section(key, &data::to_node(&value, at), &mut read, problems);
                }
                None if document.has(key) => problems.error(
                    at,
                    format!("{rule} has no value, but policy.yaml has {key}"),
                    format!("write `{rule} := data.{key}`"),
                ),
                None => {}
            }
        }
        Ok(read)
    }

    /// The first line that speaks of ancestors outside comments.
    fn ancestors(&self) -> Option<u64> {
        let speaks = |line: &str| line.split('#').next().unwrap_or("").contains("ancestors");
        u64::try_from(self.text.lines().position(speaks)? + 1).ok()
    }

    /// Calls of functions that are missing, and of a function by itself.
    fn bad_calls(&self, outline: &Outline) -> Vec<Problem> {
        let has =
            |call: &&Call| !call.name.starts_with("data.") && runner::has_function(&call.name);
        let mut problems: Vec<_> = outline
            .foreign_calls()
            .into_iter()
            .filter(|call| !has(call))
            .map(|call| {
                let what = format!("there is no function {:?}", printable(&call.name));
                let fix = "there are OPA's for strings, collections, numbers, types and glob, as in \
                           OpenShell";
                self.problem(Some((call.line, 0)), what, fix)
            })
            .collect();
        if let Some(call) = outline.recursion() {
            let what = format!("the function {:?} comes to call itself", printable(&call.name));
            let fix = "Rego has no recursion: use a comprehension";
            problems.push(self.problem(Some((call.line, 0)), what, fix));
        }
        problems
    }

    fn missing(&self, rule: &'static str) -> Problem {
        let fix = match rule {
            "filesystem_policy" => "add `filesystem_policy := data.filesystem_policy`",
            "landlock_policy" => "add `landlock_policy := data.landlock`",
            "process_policy" => "add `process_policy := data.process`",
            "network_action" => {
                "add it (\"allow\" or \"deny\"), or the later contract's egress_authorization"
            }
            "_matching_endpoint_configs" => {
                "add it, a list of the endpoints that match: without it requests would pass unjudged"
            }
            _ => "add it: docs/rego.md lists the rules that a text must have",
        };
        self.problem(None, format!("there is no rule {rule}"), fix)
    }

    fn unreadable(&self, fault: Fault) -> Problem {
        let fix = if fault.what.starts_with("the package is") {
            "write `package openshell.sandbox`"
        } else {
            "the language is Rego v1: `opa check --v1-compatible` says more"
        };
        self.problem(fault.at, fault.what, fix)
    }

    /// A fault of a rule. Where it has no place, it stands at the first of these rules.
    fn failed(&self, fault: Fault, outline: &Outline, rules: &[&str]) -> Problem {
        let named = rules.iter().find(|rule| fault.what.contains(*rule)).or(rules.first());
        let rule_line = || Some((outline.line_of(named?)?, 0));
        let at = fault.at.or_else(rule_line);
        let fix = if fault.what.contains(runner::OUT_OF_TIME) {
            "make the rule simpler: every decision waits for it"
        } else {
            "mend the rule: every decision that comes to it would be a refusal"
        };
        self.problem(at, fault.what, fix)
    }

    fn problem(&self, at: Option<(u64, u64)>, what: String, fix: &str) -> Problem {
        Problem {
            file: self.name.to_owned(),
            line: at.map(|(line, _)| line),
            column: at.map(|(_, column)| column).filter(|column| *column > 0),
            what,
            fix: Some(fix.to_owned()),
        }
    }
}

//! `policy.yaml` as typed structs: shapes and types, nothing about sense (that is `check`).
#![forbid(unsafe_code)]

mod content;
mod network;
mod process;
mod rules;

use std::collections::BTreeMap;

pub(super) use content::{DEFAULT_MAX as DEFAULT_MAX_CONTENT, MAX as MAX_CONTENT};
pub(super) use network::{Access, Binary, Endpoint, Enforcement, NetworkPolicy, Protocol, Tainted};
pub use process::{Memfd, Process, ProcessLimits, UnixSockets};
pub(super) use rules::{Matcher, OperationRule, Rule};

use super::fields::{Fields, Located};
use super::problem::Problems;
use super::yaml::{Node, Value};

/// Which files the agent reaches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Filesystem {
    /// Read and execute. Absolute and cleaned, in the order of the file.
    pub read_only: Vec<String>,
    /// Everything. Absolute and cleaned, in the order of the file.
    pub read_write: Vec<String>,
    /// Whether the work directory joins `read_write`. True unless the file says otherwise.
    pub include_workdir: bool,
}

/// What happens when the kernel cannot enforce all file rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Compatibility {
    /// Enforce what it can, and say what it cannot. The default.
    #[default]
    BestEffort,
    /// Do not start.
    HardRequirement,
}

/// The whole file.
#[derive(Debug, Default)]
pub(super) struct Document {
    pub read_only: Vec<Located>,
    pub read_write: Vec<Located>,
    pub include_workdir: Option<bool>,
    pub compatibility: Compatibility,
    pub run_as_user: Option<Located>,
    pub run_as_group: Option<Located>,
    pub memfd: Memfd,
    pub limits: ProcessLimits,
    pub unix_sockets: UnixSockets,
    /// By key; the order is the one in which policies name a verdict.
    pub policies: BTreeMap<String, NetworkPolicy>,
    /// The file's own keys that have a value.
    pub keys: Vec<String>,
}

impl Document {
    /// Whether the file has this key, with a value.
    pub fn has(&self, key: &str) -> bool {
        self.keys.iter().any(|known| known == key)
    }
}

/// Reads the whole file.
pub(super) fn read(root: &Node, problems: &mut Problems) -> Document {
    let mut document = Document::default();
    let Some(mut fields) = Fields::of(root, "the policy", problems) else {
        return document;
    };
    if let Some(node) = fields.take("version") {
        version(node, problems);
    }
    for key in ["filesystem_policy", "landlock", "process"] {
        if let Some(node) = fields.take_filled(key) {
            section(key, node, &mut document, problems);
            document.keys.push(key.to_owned());
        }
    }
    if let Some(node) = fields.take_filled("network_policies") {
        document.policies = network_policies(node, problems);
    }
    if let Some(node) = fields.take_filled("network_middlewares") {
        problems.error(
            node.at,
            "network_middlewares are not supported by this version yet: traffic would pass them by",
            "remove them, or keep this policy on OpenShell",
        );
    }
    fields.finish(None, problems);
    document
}

/// Reads what is not about the network.
pub(super) fn section(key: &str, node: &Node, document: &mut Document, problems: &mut Problems) {
    match key {
        "filesystem_policy" => filesystem(node, document, problems),
        "landlock" => landlock(node, document, problems),
        _ => process::read(node, document, problems),
    }
}

fn version(node: &Node, problems: &mut Problems) {
    if !matches!(node.value, Value::Int(1)) {
        problems.error(node.at, "version is not one this program reads", "write `version: 1`");
    }
}

fn filesystem(node: &Node, document: &mut Document, problems: &mut Problems) {
    let Some(mut fields) = Fields::of(node, "filesystem_policy", problems) else {
        return;
    };
    if let Some(node) = fields.take_filled("read_only") {
        document.read_only = texts(node, &fields.name("read_only"), problems);
    }
    if let Some(node) = fields.take_filled("read_write") {
        document.read_write = texts(node, &fields.name("read_write"), problems);
    }
    if let Some(node) = fields.take("include_workdir") {
        document.include_workdir = node.boolean(&fields.name("include_workdir"), problems);
    }
    fields.finish(None, problems);
}

fn landlock(node: &Node, document: &mut Document, problems: &mut Problems) {
    let Some(mut fields) = Fields::of(node, "landlock", problems) else {
        return;
    };
    if let Some(node) = fields.take("compatibility")
        && let Some(word) = node.text(&fields.name("compatibility"), problems)
    {
        match word.text.as_str() {
            "best_effort" => document.compatibility = Compatibility::BestEffort,
            "hard_requirement" => document.compatibility = Compatibility::HardRequirement,
            other => problems.error(
                word.at,
                format!("landlock.compatibility {other:?} is unknown"),
                "write best_effort or hard_requirement",
            ),
        }
    }
    fields.finish(None, problems);
}

fn network_policies(node: &Node, problems: &mut Problems) -> BTreeMap<String, NetworkPolicy> {
    let mut policies = BTreeMap::new();
    for (key, value) in node.map("network_policies", problems).unwrap_or_default() {
        let printable = !key.name.is_empty()
            && key.name.len() <= 253
            && key.name.chars().all(|c| !c.is_control() && !c.is_whitespace());
        if !printable {
            problems.error(
                key.at,
                "the name of a network policy is empty, longer than 253 bytes or holds blanks",
                "use letters, digits, - and _",
            );
            continue;
        }
        policies.insert(key.name.clone(), network::policy(key, value, problems));
    }
    policies
}

fn texts(node: &Node, what: &str, problems: &mut Problems) -> Vec<Located> {
    let items = node.list(what, problems).unwrap_or_default();
    items.iter().filter_map(|item| item.text(&format!("an entry of {what}"), problems)).collect()
}

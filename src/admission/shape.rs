//! The two shapes of fencing (`ringfence.dev/mode` of the namespace): the container's own command in
//! the fence, or a runner that stays as it is and starts its agents through the supervisor.
//!
//! This file is the second, in the reference deployment's form. The binary is a file at
//! [`SANDBOX`], called by the name of `OpenShell`'s supervisor; policy and run directory are where
//! that one looks for them. Its command line is the runner's to write and knows nothing of ours, so
//! what the namespace and the pod decide comes in [`OPTIONS`], which only the supervisor reads.

use serde_json::{Map, Value, json};

use super::command::{Flags, POLICY_DIR, double, recover, single};
use super::json::{list, set, text, unset, words};
use super::mounts::BIN;
use super::{Delivery, PolicyRef, Refusal, SUPERVISOR, mounts, probes};

/// Where the reference deployment's wrappers look for the supervisor.
pub(super) const SANDBOX: &str = "/openshell-sandbox";
/// Flags of ours for a supervisor that is called by that name: a JSON list of words.
pub(super) const OPTIONS: &str = "RINGFENCE_OPTIONS";

/// How the containers of a namespace are fenced.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Shape {
    /// What the container would have run runs in the fence.
    #[default]
    Entrypoint,
    /// The container runs as it is, and starts what is to be fenced through the supervisor.
    Subprocess,
}

impl Shape {
    /// How the binary arrives. An image volume mounts directories only, so a single file has to come
    /// out of an emptyDir.
    pub(super) fn delivery(self, wanted: Delivery) -> Delivery {
        match self {
            Self::Entrypoint => wanted,
            Self::Subprocess => Delivery::Init,
        }
    }

    /// The most that a run directory holds. One fence takes about half a megabyte of it.
    pub(super) fn run_size(self) -> &'static str {
        match self {
            Self::Entrypoint => "16Mi",
            Self::Subprocess => "64Mi",
        }
    }
}

/// The mount of the binary.
pub(super) fn bin_mount() -> Value {
    json!({"name": BIN, "mountPath": SANDBOX, "subPath": SUPERVISOR, "readOnly": true})
}

/// Whether a container is fenced in this shape, as far as one can see from outside.
pub(super) fn is_runner(container: &Value) -> bool {
    let bin = bin_mount();
    let same = |mount: &Value, field| text(mount, field) == text(&bin, field);
    let is_bin = |mount: &Value| ["name", "mountPath", "subPath"].iter().all(|f| same(mount, f));
    list(container, "volumeMounts").iter().any(is_bin)
}

/// What [`OPTIONS`] says of an earlier injection.
pub(super) struct Earlier {
    /// The agents' user, where it was given.
    pub user: Option<String>,
}

/// The earlier injection of a container in this shape, if there was one.
pub(super) fn earlier(container: &Value) -> Option<Earlier> {
    let value = list(container, "env").iter().find(|entry| text(entry, "name") == Some(OPTIONS))?;
    let options: Vec<String> = serde_json::from_str(&single(text(value, "value")?)).ok()?;
    let at = options.iter().position(|word| word == "--run-as");
    Some(Earlier { user: at.and_then(|at| options.get(at + 1).cloned()) })
}

/// Gives a container back what an injection in the other shape had made of it: its own command, its
/// own probes.
///
/// # Errors
/// A command that is not a list of strings.
pub(super) fn bare(container: &mut Map<String, Value>) -> Result<(), Refusal> {
    let holder = Value::Object(container.clone());
    if let Some(found) = recover(&words(&holder, "command")?) {
        match found.command.filter(|command| !command.is_empty()) {
            Some(command) => set(container, "command", json!(command)),
            None => unset(container, "command"),
        }
    }
    probes::unwrap(container)
}

/// The value of [`OPTIONS`].
pub(super) struct Options<'a> {
    pub policy: &'a PolicyRef,
    /// The agents' user, where the policy names none and the container would not have been root.
    pub run_as: Option<&'a str>,
    pub groups: &'a [String],
    /// What both shapes have.
    pub flags: &'a Flags,
}

impl Options<'_> {
    /// The kubelet expands the values of variables as it does words, so each `$` is doubled.
    pub(super) fn build(&self) -> String {
        let mut words: Vec<String> = Vec::new();
        let mut flag = |name: &str, value: &str| words.extend([name.to_owned(), value.to_owned()]);
        if self.policy.has("upstream-ca.crt") {
            flag("--upstream-ca", &format!("{POLICY_DIR}/upstream-ca.crt"));
        }
        if let Some(user) = self.run_as {
            flag("--run-as", user);
        }
        if !self.groups.is_empty() {
            flag("--groups", &self.groups.join(","));
        }
        // The pod's ports are the runner's.
        flag("--inbound", "none");
        for (name, value) in self.flags.iter() {
            flag(name, value);
        }
        double(&json!(words).to_string())
    }
}

/// Refuses what would be mounted over the binary.
///
/// # Errors
/// A mount, device, message path or VOLUME of the image there, or near the fence's other files.
pub(super) fn check_mounts(container: &Value, volumes: &[String]) -> Result<(), Refusal> {
    mounts::check(container, volumes, &[SANDBOX]).map(|_| ())
}

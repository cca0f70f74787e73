//! Whether `PodSecurity` admission will refuse the pod as it is injected: the fence needs more than
//! the levels `baseline` and `restricted` allow, and the API server's own answer comes later, names
//! fields that the author never wrote, and reaches the controller only.
//!
//! What the namespace says counts, as the API server reads it (`pod-security.kubernetes.io/enforce`
//! and `enforce-version`). Its defaults for namespaces without the label, and whom it exempts, are
//! in a file of the API server's: they cannot be seen from here. `warn` and `audit` refuse nothing.

use std::collections::BTreeMap;

use serde_json::Value;

use super::json::{at, containers, field, list, text, yes};
use super::{Profile, baseline};

const LEVEL: &str = "pod-security.kubernetes.io/enforce";
const VERSION: &str = "pod-security.kubernetes.io/enforce-version";

/// The Pod Security level that a namespace with these labels enforces, where one of its pods cannot be
/// fenced by it.
#[must_use]
pub fn enforced_level(labels: &BTreeMap<String, String>) -> Option<&'static str> {
    Enforced::of(labels).map(Enforced::level)
}

/// What a namespace enforces, where that is more than nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Enforced {
    restricted: bool,
    /// Of Kubernetes 1; the latest where none is named.
    minor: u32,
}

impl Enforced {
    /// As the labels say.
    pub(super) fn of(labels: &BTreeMap<String, String>) -> Option<Self> {
        let level = labels.get(LEVEL)?;
        if level == "privileged" {
            return None;
        }
        let minor = labels.get(VERSION).and_then(|version| version.strip_prefix("v1."));
        Some(Self {
            // A word that is none is taken for the strictest level by the API server too.
            restricted: level != "baseline",
            minor: minor.and_then(|minor| minor.parse().ok()).unwrap_or(u32::MAX),
        })
    }

    /// The level's name.
    pub(super) fn level(self) -> &'static str {
        if self.restricted { "restricted" } else { "baseline" }
    }

    /// The fields for which it refuses the pod, each with its place.
    pub(super) fn refuses(self, pod: &Value) -> Vec<String> {
        let spec = field(pod, "spec").unwrap_or(&Value::Null);
        let mut found = Vec::new();
        for name in ["hostNetwork", "hostPID", "hostIPC"] {
            if yes(spec, &[name]) {
                found.push(format!("spec.{name} true"));
            }
        }
        found.extend(baseline::pod(pod, Profile::Hardened));
        if self.restricted {
            found.extend(self.restricted_pod(spec));
        }
        let all = containers(pod).chain(list(spec, "ephemeralContainers"));
        for container in all {
            let name = text(container, "name").unwrap_or_default();
            let fields = self.container(spec, container);
            if !fields.is_empty() {
                found.push(format!("container {name}: {}", fields.join(", ")));
            }
        }
        found
    }

    fn restricted_pod(self, spec: &Value) -> Vec<String> {
        const VOLUMES: [&str; 9] = [
            "configMap",
            "csi",
            "downwardAPI",
            "emptyDir",
            "ephemeral",
            "image",
            "persistentVolumeClaim",
            "projected",
            "secret",
        ];
        let mut found = Vec::new();
        for volume in list(spec, "volumes") {
            // One that names no kind is made an emptyDir.
            let bare = volume.as_object().is_some_and(|volume| volume.len() == 1);
            let known = bare || VOLUMES.iter().any(|kind| field(volume, kind).is_some());
            // baseline has these already.
            if !known && field(volume, "hostPath").is_none() {
                found.push(format!("volume {}", text(volume, "name").unwrap_or_default()));
            }
        }
        let context = |name| at(spec, &["securityContext", name]);
        if !self.user_namespace(spec) {
            if context("runAsNonRoot") == Some(&Value::Bool(false)) {
                found.push("spec.securityContext.runAsNonRoot false".into());
            }
            if self.minor >= 23 && context("runAsUser").and_then(Value::as_i64) == Some(0) {
                found.push("spec.securityContext.runAsUser 0".into());
            }
        }
        found
    }

    /// Fields of a container, named from its security context on.
    fn container(self, spec: &Value, container: &Value) -> Vec<String> {
        let mut found = Vec::new();
        let context = field(container, "securityContext").unwrap_or(&Value::Null);
        if yes(context, &["privileged"]) {
            found.push("privileged true".into());
        }
        let capabilities = field(context, "capabilities").unwrap_or(&Value::Null);
        let allowed = |capability: &str| {
            if self.restricted && self.minor >= 22 {
                capability == "NET_BIND_SERVICE"
            } else {
                baseline::CAPABILITIES.contains(&capability)
            }
        };
        let added: Vec<&str> = list(capabilities, "add")
            .iter()
            .map(|capability| capability.as_str().unwrap_or("?"))
            .filter(|capability| !allowed(capability))
            .collect();
        if !added.is_empty() {
            found.push(format!("capabilities.add {}", added.join(" ")));
        }
        let mut rest = std::borrow::Cow::Borrowed(container);
        if !self.restricted && self.user_namespace(spec) && field(context, "procMount").is_some() {
            // An unmasked /proc is the pod's own then.
            rest.to_mut()["securityContext"]["procMount"] = Value::Null;
        }
        found.extend(baseline::of_container(&rest, true));
        if self.restricted {
            self.restricted_container(spec, context, &mut found);
        }
        found
    }

    fn restricted_container(self, spec: &Value, context: &Value, found: &mut Vec<String>) {
        let of_pod = |path: &[&str]| at(spec, &[&["securityContext"], path].concat());
        if !self.user_namespace(spec) {
            let non_root = field(context, "runAsNonRoot").or_else(|| of_pod(&["runAsNonRoot"]));
            if non_root != Some(&Value::Bool(true)) {
                found.push("runAsNonRoot not true".into());
            }
            let user = field(context, "runAsUser").and_then(Value::as_i64);
            if self.minor >= 23 && user == Some(0) {
                found.push("runAsUser 0".into());
            }
        }
        let windows = self.minor >= 25 && at(spec, &["os", "name"]) == Some(&"windows".into());
        if windows {
            return;
        }
        let escalates = field(context, "allowPrivilegeEscalation") != Some(&Value::Bool(false));
        if self.minor >= 8 && escalates {
            found.push("allowPrivilegeEscalation not false".into());
        }
        let drops = at(context, &["capabilities"]).unwrap_or(&Value::Null);
        if self.minor >= 22 && !list(drops, "drop").iter().any(|dropped| dropped == "ALL") {
            found.push("capabilities.drop without ALL".into());
        }
        let confined = field(context, "seccompProfile").or_else(|| of_pod(&["seccompProfile"]));
        // One of another type is baseline's business.
        if self.minor >= 19 && confined.is_none() {
            found.push("no seccompProfile".into());
        }
    }

    /// Root of a user namespace of the pod's own is not the node's.
    fn user_namespace(self, spec: &Value) -> bool {
        self.minor >= 35 && at(spec, &["hostUsers"]) == Some(&Value::Bool(false))
    }
}

#[cfg(test)]
#[path = "pod_security/tests.rs"]
mod tests;

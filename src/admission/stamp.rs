//! What a replica writes down of itself in a pod that it fenced: which version it is, with which
//! settings and which policy. For people, and so that in a roll-out a pod that another replica made
//! can be told from one that something changed.

use std::fmt::{self, Write as _};

use serde_json::{Map, Value, json};
use sha2::{Digest as _, Sha256};

use super::json::at;
use super::namespace::STATUS;
use super::{PolicyRef, Settings};

/// Version, settings and policy of one replica.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Stamp {
    version: String,
    /// The beginning of a digest over what shapes a pod.
    settings: String,
    /// The digest of the policy; its name where the pod follows it, for its digest is another one soon.
    policy: String,
}

impl Stamp {
    /// That of this replica.
    pub(super) fn own(settings: &Settings, policy: &PolicyRef) -> Self {
        // Plain words and numbers: this cannot fail.
        let shape = serde_json::to_vec(settings).unwrap_or_default();
        let digest = Sha256::digest(shape);
        let settings = digest.iter().take(6).fold(String::new(), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        });
        Self {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            settings,
            policy: match &policy.follows {
                Some(name) => format!("live:{name}"),
                None => policy.digest.clone(),
            },
        }
    }

    /// That of the replica which the pod's annotation names. None where it names none.
    pub(super) fn of(pod: &Value) -> Option<Self> {
        let status = at(pod, &["metadata", "annotations", STATUS])?.as_str()?;
        let status: Value = serde_json::from_str(status).ok()?;
        let word = |key: &str| Some(status.get(key)?.as_str()?.to_owned());
        Some(Self {
            version: word("version")?,
            settings: word("settings").unwrap_or_default(),
            policy: word("policy")?,
        })
    }

    /// Its part of the annotation.
    pub(super) fn write(&self, status: &mut Map<String, Value>) {
        status.insert("version".into(), json!(self.version));
        status.insert("settings".into(), json!(self.settings));
        status.insert("policy".into(), json!(self.policy));
    }
}

impl fmt::Display for Stamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { version, settings, policy } = self;
        write!(f, "version {version:.32?} with settings {settings:.16?} and policy {policy:.80?}")
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Delivery, LogLevel};
    use super::*;

    fn pod(status: &Value) -> Value {
        json!({"metadata": {"annotations": {"ringfence.dev/status": status.to_string()}}})
    }

    #[test]
    fn what_is_written_is_read_back() {
        let own = Stamp::own(&Settings::default(), &PolicyRef::default());
        let mut status = Map::new();
        own.write(&mut status);
        assert_eq!(Stamp::of(&pod(&Value::Object(status))), Some(own));
    }

    #[test]
    fn only_what_shapes_a_pod_is_in_it() {
        let of = |settings: Settings| Stamp::own(&settings, &PolicyRef::default());
        let plain = of(Settings::default());
        // Read from the pod, or only where the policy comes from: its digest is here.
        for same in [
            Settings { delivery: Delivery::Image, ..Settings::default() },
            Settings { release_namespace: "x".into(), ..Settings::default() },
            Settings { default_policy: "x".into(), ..Settings::default() },
        ] {
            assert_eq!(of(same), plain);
        }
        for other in [
            Settings { image: "x".into(), ..Settings::default() },
            Settings { log_level: LogLevel::Debug, ..Settings::default() },
            Settings { install_cpu: "1".into(), ..Settings::default() },
            Settings { pull_secret: Some("x".into()), ..Settings::default() },
        ] {
            assert_ne!(of(other), plain);
        }
    }

    #[test]
    fn what_is_no_stamp_names_no_replica() {
        for status in [json!({}), json!([]), json!("x"), json!({"version": 1, "policy": ""})] {
            assert_eq!(Stamp::of(&pod(&status)), None, "{status}");
        }
        assert_eq!(Stamp::of(&json!({})), None);
        // Before there was a digest of settings.
        let early = Stamp::of(&pod(&json!({"version": "0.0.9", "policy": "sha256:0"})));
        assert_eq!(early.map(|stamp| stamp.settings), Some(String::new()));
    }
}

//! From the data of a policy `ConfigMap` to what a pod needs of it. Shared by the webhook and
//! `ringfence inject`, so that both give a copy the same name and a pod the same digest.

use std::collections::BTreeMap;

use super::command::RUN_DIR;
use super::mounts::meets_run_dir;
use super::{Class, PolicyRef, Refusal};
use crate::policy::{self, Policy, Source};

/// Prefix of the name of a policy that pods follow; the rest is its source's name.
pub const LIVE_PREFIX: &str = "ringfence-live-";
/// Prefix of a copy's name.
pub const COPY_PREFIX: &str = "ringfence-policy-";
/// Keys of a policy `ConfigMap` that reach the pod. Others stay where they are: the supervisor
/// recomputes the digest from the files of exactly these names.
pub const POLICY_KEYS: [&str; 3] = ["policy.yaml", "policy.rego", "upstream-ca.crt"];
/// Hex digits of the digest in a copy's name.
const NAME_DIGITS: usize = 32;

/// A policy that may be mounted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PolicySource {
    /// What [`super::inject()`] needs.
    pub reference: PolicyRef,
    /// The data of the copy.
    pub data: BTreeMap<String, String>,
    /// What its author should know.
    pub warnings: Vec<String>,
}

impl PolicySource {
    /// Checks the data as the supervisor would, before any pod depends on it.
    ///
    /// # Errors
    /// No `policy.yaml`, or a policy that does not load; the message has every problem.
    pub fn read(name: &str, data: &BTreeMap<String, String>) -> Result<Self, Refusal> {
        let refuse = |what: String| {
            Refusal::with_fix(
                Class::Policy,
                format!("policy {name}: {what}"),
                "try it with `ringfence policy check`",
            )
        };
        let data: BTreeMap<String, String> = POLICY_KEYS
            .iter()
            .filter_map(|key| data.get_key_value(*key))
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect();
        let source = |key: &'static str| {
            data.get(key).map(|text| Source { name: key, bytes: text.as_bytes() })
        };
        let yaml =
            source("policy.yaml").ok_or_else(|| refuse("it has no key policy.yaml".into()))?;
        let loaded = policy::load(&yaml, source("policy.rego").as_ref())
            .map_err(|error| refuse(error.to_string()))?;
        if let Some(problem) = cannot_start(&loaded.policy) {
            return Err(refuse(problem));
        }
        let digest =
            policy::digest::digest(data.iter().map(|(key, text)| (key.as_str(), text.as_bytes())));
        let process = loaded.policy.process();
        Ok(Self {
            reference: PolicyRef {
                configmap: copy_name(&digest),
                digest,
                keys: data.keys().cloned().collect(),
                run_as_user: process.run_as_user.clone(),
                run_as_group: process.run_as_group.clone(),
                follows: None,
            },
            warnings: loaded.warnings.iter().map(ToString::to_string).collect(),
            data,
        })
    }
}

/// Why no fence could be built by this policy in any pod: the supervisor would refuse it at start,
/// where only the pod's log says so. Links of the image are the supervisor's to follow.
#[must_use]
pub fn cannot_start(policy: &Policy) -> Option<String> {
    let filesystem = policy.filesystem();
    let lists = [("read_only", &filesystem.read_only), ("read_write", &filesystem.read_write)];
    lists.iter().find_map(|(list, paths)| {
        let path = paths.iter().find(|path| meets_run_dir(path))?;
        Some(format!(
            "filesystem_policy.{list}: {path} opens the supervisor's run directory {RUN_DIR}, whose locks the agent could then hold: leave it out, and name what the agent needs beside it path by path"
        ))
    })
}

/// Name of the `ConfigMap` by which pods of a namespace follow the policy `source`.
#[must_use]
pub fn live_name(source: &str) -> String {
    format!("{LIVE_PREFIX}{source}")
}

/// Name of the copy of a policy with this digest.
fn copy_name(digest: &str) -> String {
    let hex = digest.rsplit(':').next().unwrap_or_default();
    let hex: String = hex.chars().take(NAME_DIGITS).collect();
    format!("{COPY_PREFIX}{hex}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(key, text)| ((*key).to_owned(), (*text).to_owned())).collect()
    }

    #[test]
    fn the_name_follows_the_content() {
        assert_eq!(
            copy_name("sha256:0123456789abcdef0123456789abcdef00000000"),
            "ringfence-policy-0123456789abcdef0123456789abcdef"
        );
    }

    #[test]
    fn data_without_a_policy_is_refused() {
        let refusal = PolicySource::read("p", &data(&[("policy.rego", "x")])).unwrap_err();
        assert_eq!((refusal.class, refusal.code), (Class::Policy, 422));
        assert!(refusal.message.contains("policy p: it has no key policy.yaml"), "{refusal}");
        for (list, path, refused) in [
            ("read_only", "/run", true),
            ("read_write", "/run/ringfence/x", true),
            ("read_only", "/var/run/", true),
            ("read_only", "/", true),
            ("read_write", "/run/app", false),
            ("read_only", "/var", false),
        ] {
            let yaml = format!("version: 1\nfilesystem_policy:\n  {list}: [{path}]\n");
            let read = PolicySource::read("p", &data(&[("policy.yaml", &yaml)]));
            assert_eq!(read.is_err(), refused, "{list} {path}");
            if let Err(refusal) = read {
                assert_eq!((refusal.class, refusal.code), (Class::Policy, 422));
                assert!(
                    refusal.message.contains(list) && refusal.message.contains("/run/ringfence")
                );
            }
        }
        let broken = data(&[("policy.yaml", "network_policies: [")]);
        assert_eq!(PolicySource::read("p", &broken).unwrap_err().class, Class::Policy);
    }
}

//! The policy as it lies in the container: read once, checked against the digest, compiled.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use super::args::RunArgs;
use super::mounted;
use crate::event::{self, Class, Event, Severity};
use crate::policy::{self, Loaded, Problem, Source};
use crate::proxy::control::{NewPolicy, PolicyText};

/// The bytes of the policy's files.
#[derive(Debug, Clone)]
pub struct PolicyFiles {
    data: PolicyText,
    rules: Option<PolicyText>,
    /// More CA certificates that upstreams are verified against, PEM.
    upstream_ca: Option<String>,
}

/// The names that a `ConfigMap` has the files by.
pub const DATA: &str = "policy.yaml";
/// See [`DATA`].
pub const RULES: &str = "policy.rego";
/// See [`DATA`].
pub const UPSTREAM_CA: &str = "upstream-ca.crt";

/// The most that is read of one file, in bytes; a ConfigMap holds no more.
pub const LIMIT: u64 = 1 << 20;

impl PolicyFiles {
    /// Reads what the command line names, and checks the digest where one is given.
    pub fn read(args: &RunArgs) -> Result<Self> {
        if let Some(dir) = &args.live_policy {
            return mounted::read(dir);
        }
        let data = args
            .policy_data
            .as_deref()
            .context("no policy: name one with --policy-data FILE (or OPENSHELL_POLICY_DATA)")?;
        let text = |path: &Path| -> Result<PolicyText> {
            let name = path.display().to_string();
            let meta =
                fs::metadata(path).with_context(|| format!("cannot read the policy {name}"))?;
            ensure!(
                meta.len() <= LIMIT,
                "the policy {name} has {} bytes; the limit is {LIMIT}",
                meta.len()
            );
            let text = fs::read_to_string(path)
                .with_context(|| format!("cannot read the policy {name}"))?;
            Ok(PolicyText { name, text })
        };
        let files = Self {
            data: text(data)?,
            rules: args.policy_rules.as_deref().map(text).transpose()?,
            upstream_ca: args
                .upstream_ca
                .as_deref()
                .map(|path| Ok::<_, anyhow::Error>(text(path)?.text))
                .transpose()?,
        };
        if let Some(expected) = &args.policy_digest {
            let found = files.digest();
            ensure!(
                *expected == found,
                "the mounted policy has the digest {found}, but the pod was admitted with \
                 {expected}: delete the pod, its controller makes one with the policy of now"
            );
        }
        Ok(files)
    }

    /// From texts that were read already.
    #[must_use]
    pub fn new(data: PolicyText, rules: Option<PolicyText>, upstream_ca: Option<String>) -> Self {
        Self { data, rules, upstream_ca }
    }

    /// More CA certificates that upstreams are verified against, PEM.
    #[must_use]
    pub fn upstream_ca(&self) -> &str {
        self.upstream_ca.as_deref().unwrap_or_default()
    }

    /// Whether both have the same authorities for upstreams.
    #[must_use]
    pub fn trusts_as(&self, other: &Self) -> bool {
        self.upstream_ca == other.upstream_ca
    }

    /// The digest over all files under the names that the ConfigMap has them by.
    #[must_use]
    pub fn digest(&self) -> String {
        let mut entries = vec![(DATA, self.data.text.as_bytes())];
        if let Some(rules) = &self.rules {
            entries.push((RULES, rules.text.as_bytes()));
        }
        if let Some(ca) = &self.upstream_ca {
            entries.push((UPSTREAM_CA, ca.as_bytes()));
        }
        policy::digest::digest(entries)
    }

    /// Compiles the policy. The kernel reports an executable by its real path: `resolve` says where the
    /// paths of the binaries that the policy names lead to.
    pub fn load_by(&self, resolve: impl Fn(&str) -> Option<String>) -> Result<Loaded> {
        fn source(text: &PolicyText) -> Source<'_> {
            Source { name: &text.name, bytes: text.text.as_bytes() }
        }
        let rules = self.rules.as_ref().map(source);
        let mut loaded = policy::load(&source(&self.data), rules.as_ref())?;
        loaded.policy.resolve_binaries(resolve);
        Ok(loaded)
    }

    /// What the proxy needs to make the same of it; `links` is what was found in [`Self::load_by`].
    #[must_use]
    pub fn to_proxy(&self, links: BTreeMap<String, String>) -> NewPolicy {
        let Self { data, rules, upstream_ca } = self.clone();
        NewPolicy { data, rules, upstream_ca, links }
    }
}

/// Says what is doubtful in a policy.
pub fn tell_of(warnings: &[Problem]) {
    for warning in warnings {
        event::emit(
            &Event::new(Class::Config, "VALIDATED", Severity::Medium).subject(warning.to_string()),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    fn args(dir: &Path, more: &[&str]) -> RunArgs {
        let data = dir.join("policy.yaml");
        fs::write(&data, "version: 1\n").unwrap();
        let data = data.to_str().unwrap();
        RunArgs::try_parse_from([&["x", "--policy-data", data], more].concat()).unwrap()
    }

    #[test]
    fn another_digest_does_not_start() {
        let dir = tempfile::tempdir().unwrap();
        let digest = PolicyFiles::read(&args(dir.path(), &[])).unwrap().digest();
        assert!(PolicyFiles::read(&args(dir.path(), &["--policy-digest", &digest])).is_ok());
        let error =
            PolicyFiles::read(&args(dir.path(), &["--policy-digest", "sha256:00"])).unwrap_err();
        assert!(error.to_string().contains("admitted with sha256:00"), "{error}");
    }

    #[test]
    fn a_missing_file_is_named() {
        let args = RunArgs::try_parse_from(["x", "--policy-data", "/no/such.yaml"]).unwrap();
        assert!(PolicyFiles::read(&args).unwrap_err().to_string().contains("/no/such.yaml"));
        let args = RunArgs::try_parse_from(["x"]).unwrap();
        assert!(PolicyFiles::read(&args).unwrap_err().to_string().contains("--policy-data"));
    }
}

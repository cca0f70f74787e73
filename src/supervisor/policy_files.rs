//! The policy as it lies in the container: read once, checked against the digest, compiled.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use super::args::RunArgs;
use crate::policy::{self, Loaded, Source};

/// The bytes of the policy's files; also what the proxy gets.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PolicyFiles {
    data: NamedText,
    rules: Option<NamedText>,
    /// More CA certificates that upstreams are verified against, PEM.
    pub upstream_ca: Option<String>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct NamedText {
    name: String,
    text: String,
}

/// The most that is read of one file, in bytes; a ConfigMap holds no more.
const LIMIT: u64 = 1 << 20;

impl PolicyFiles {
    /// Reads what the command line names, and checks the digest where one is given.
    pub fn read(args: &RunArgs) -> Result<Self> {
        let data = args
            .policy_data
            .as_deref()
            .context("no policy: name one with --policy-data FILE (or OPENSHELL_POLICY_DATA)")?;
        let text = |path: &Path| -> Result<NamedText> {
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
            Ok(NamedText { name, text })
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

    /// The digest over all files under the names that the ConfigMap has them by.
    #[must_use]
    pub fn digest(&self) -> String {
        let mut entries = vec![("policy.yaml", self.data.text.as_bytes())];
        if let Some(rules) = &self.rules {
            entries.push(("policy.rego", rules.text.as_bytes()));
        }
        if let Some(ca) = &self.upstream_ca {
            entries.push(("upstream-ca.crt", ca.as_bytes()));
        }
        policy::digest::digest(entries)
    }

    /// Compiles the policy and follows the symlinks of the binaries that it names: the kernel
    /// reports an executable by its real path.
    pub fn load(&self) -> Result<Loaded> {
        fn source(text: &NamedText) -> Source<'_> {
            Source { name: &text.name, bytes: text.text.as_bytes() }
        }
        let rules = self.rules.as_ref().map(source);
        let mut loaded = policy::load(&source(&self.data), rules.as_ref())?;
        loaded.policy.resolve_binaries(|path| {
            fs::canonicalize(path).ok()?.into_os_string().into_string().ok()
        });
        Ok(loaded)
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

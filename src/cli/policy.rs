//! `ringfence policy`: what the webhook and the supervisor would say about a policy, beforehand.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context as _;
use clap::Subcommand;

use crate::admission::cannot_start;
use crate::policy::{self, Source};

#[derive(Debug, Subcommand)]
pub(super) enum Verb {
    /// Read a policy as the supervisor does and print what is wrong with it, one line a problem.
    ///
    /// Exit code 0: it loads (warnings may be printed). 1: it does not.
    Check {
        /// The policy data (`policy.yaml`).
        file: PathBuf,
        /// The rules (`policy.rego`) that would be mounted beside it.
        #[arg(long, value_name = "FILE")]
        rego: Option<PathBuf>,
    },
}

pub(super) fn run(verb: Verb) -> anyhow::Result<ExitCode> {
    let Verb::Check { file, rego } = verb;
    let yaml = read(&file)?;
    let rego = rego.map(|path| read(&path).map(|bytes| (path, bytes))).transpose()?;
    let (name, rego_name) = (
        file.display().to_string(),
        rego.as_ref().map(|(path, _)| path.display().to_string()).unwrap_or_default(),
    );
    let rego = rego.as_ref().map(|(_, bytes)| Source { name: &rego_name, bytes });
    match policy::load(&Source { name: &name, bytes: &yaml }, rego.as_ref()) {
        Ok(loaded) => {
            if let Some(problem) = cannot_start(&loaded.policy) {
                println!("error: {name}: {problem}");
                return Ok(ExitCode::FAILURE);
            }
            for warning in &loaded.warnings {
                println!("warning: {warning}");
            }
            let warnings = match loaded.warnings.len() {
                0 => String::new(),
                1 => ", 1 warning".to_owned(),
                n => format!(", {n} warnings"),
            };
            let engine = match loaded.policy.engine() {
                "rego" => format!("; {rego_name} decides"),
                _ => String::new(),
            };
            println!("{name}: loads{warnings}{engine}");
            Ok(ExitCode::SUCCESS)
        }
        Err(error) => {
            for problem in &error.0 {
                println!("error: {problem}");
            }
            Ok(ExitCode::FAILURE)
        }
    }
}

/// At most one byte more than a policy may have: the reader says the rest.
fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    use std::io::Read as _;
    let file =
        std::fs::File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let mut bytes = Vec::new();
    file.take(policy::MAX_BYTES as u64 + 1)
        .read_to_end(&mut bytes)
        .with_context(|| format!("cannot read {}", path.display()))?;
    Ok(bytes)
}

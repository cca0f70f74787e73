//! `status`: what is enforced for the agent of this container.

use std::path::Path;

use anyhow::{Context, Result, bail};

use super::run_dir;

/// The attestation of each living supervisor, JSON, one after another.
pub fn status(base: &Path) -> Result<String> {
    let living = run_dir::living(base);
    if living.is_empty() {
        bail!("no supervisor lives under {}", base.display());
    }
    let mut text = String::new();
    for dir in living {
        let path = dir.join(run_dir::ATTESTATION);
        text += &std::fs::read_to_string(&path)
            .with_context(|| format!("cannot read {}", path.display()))?;
        text.push('\n');
    }
    Ok(text)
}

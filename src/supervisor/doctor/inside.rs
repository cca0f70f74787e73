//! The other half of `doctor`: what runs in the fence.

use std::io::{self, Write};

use anyhow::{Context as _, Result, ensure};

use super::Line;
use crate::fence::attempts::{Context, run, table};

/// Makes every attempt and writes a line for each.
///
/// Not as root: attempts are harmless where they succeed, but nobody should start them on a machine
/// by mistake.
pub fn attempts(facts: &str) -> Result<()> {
    ensure!(
        !rustix::process::geteuid().is_root(),
        "the attempts are made inside a fence, as the agent's user; use `doctor`"
    );
    let facts = serde_json::from_str(facts).context("cannot understand what to look for")?;
    let context = Context::new(facts);
    let mut stdout = io::stdout().lock();
    for row in table() {
        let line = Line { id: row.id.to_owned(), seen: run(row, &context) };
        serde_json::to_writer(&mut stdout, &line)?;
        writeln!(stdout).and_then(|()| stdout.flush()).context("nobody listens")?;
    }
    Ok(())
}

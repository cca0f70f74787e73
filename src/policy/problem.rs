//! What is wrong with a policy, where, and what to do about it.
#![forbid(unsafe_code)]

use std::fmt;

/// A file to read: the name to show, and what is in it.
#[derive(Debug, Clone, Copy)]
pub struct Source<'a> {
    /// The path to show.
    pub name: &'a str,
    /// The content.
    pub bytes: &'a [u8],
}

/// One thing that is wrong, or worth knowing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The path as given in [`Source::name`].
    pub file: String,
    /// Counted from 1.
    pub line: Option<u64>,
    /// In characters, counted from 1.
    pub column: Option<u64>,
    /// What is wrong: object and cause.
    pub what: String,
    /// What to do.
    pub fix: Option<String>,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.file)?;
        if let Some(line) = self.line {
            write!(f, ":{line}")?;
            if let Some(column) = self.column {
                write!(f, ":{column}")?;
            }
        }
        write!(f, ": {}", self.what)?;
        if let Some(fix) = &self.fix {
            write!(f, "; {fix}")?;
        }
        Ok(())
    }
}

/// Why a policy was not loaded. Never empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoadError(pub Vec<Problem>);

impl fmt::Display for LoadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.0.iter().enumerate() {
            if index > 0 {
                f.write_str("\n")?;
            }
            write!(f, "{problem}")?;
        }
        Ok(())
    }
}

impl std::error::Error for LoadError {}

/// A place in the file: line and column, from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, PartialOrd, Ord)]
pub(super) struct Place {
    pub line: u64,
    pub column: u64,
}

/// Collects problems while a file is read.
#[derive(Debug)]
pub(super) struct Problems {
    file: String,
    errors: Vec<Problem>,
    warnings: Vec<Problem>,
}

impl Problems {
    pub fn new(file: &str) -> Self {
        Self { file: file.to_owned(), errors: Vec::new(), warnings: Vec::new() }
    }

    pub fn error(&mut self, at: Place, what: impl Into<String>, fix: impl Into<String>) {
        let problem = problem(&self.file, at, &what.into(), &fix.into());
        self.errors.push(problem);
    }

    pub fn warn(&mut self, at: Place, what: impl Into<String>, fix: impl Into<String>) {
        let problem = problem(&self.file, at, &what.into(), &fix.into());
        self.warnings.push(problem);
    }

    /// Errors and warnings, each in the order of the file.
    pub fn finish(mut self) -> (Vec<Problem>, Vec<Problem>) {
        self.errors.sort_by_key(|p| (p.line, p.column));
        self.warnings.sort_by_key(|p| (p.line, p.column));
        (self.errors, self.warnings)
    }
}

fn problem(file: &str, at: Place, what: &str, fix: &str) -> Problem {
    let known = |n: u64| (n > 0).then_some(n);
    Problem {
        file: file.to_owned(),
        line: known(at.line),
        column: known(at.column),
        what: shown(what),
        fix: (!fix.is_empty()).then(|| shown(fix)),
    }
}

/// What moves a terminal's cursor, or turns the direction of its text, as an escape: keys and values of
/// the file stand in messages.
fn shown(text: &str) -> String {
    text.chars().fold(String::with_capacity(text.len()), |mut out, c| {
        match c {
            '"' | '\'' | '\\' => out.push(c),
            _ => out.extend(c.escape_debug()),
        }
        out
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_turns_or_moves_the_text_is_escaped() {
        let mut problems = Problems::new("policy.yaml");
        problems.error(
            Place::default(),
            "\u{202e}m.\u{1b}[1m is \"n\u{f6}\" \\u{7}",
            "l\u{2066}\n",
        );
        let (errors, _) = problems.finish();
        let text = errors[0].to_string();
        assert_eq!(text, "policy.yaml: \\u{202e}m.\\u{1b}[1m is \"n\u{f6}\" \\u{7}; l\\u{2066}\\n");
    }
}

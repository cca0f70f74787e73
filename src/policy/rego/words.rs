//! A Rego text as far as it must be understood without an interpreter: which functions it calls, and
//! where a rule stands.
#![forbid(unsafe_code)]

/// A function that the text calls.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Call<'t> {
    /// With dots.
    pub name: &'t str,
    /// From 1.
    pub line: u64,
}

const KEYWORDS: &[&str] =
    &["as", "default", "else", "every", "if", "import", "in", "not", "package", "some", "with"];

/// All calls, in the order of the text, but those by an alias of an import.
pub(super) fn calls(text: &str) -> Vec<Call<'_>> {
    let mut calls = Vec::new();
    let mut aliases = Vec::new();
    let mut previous = "";
    let mut rest = text;
    let mut line = 1;
    while let Some(c) = rest.chars().next() {
        let length = match c {
            '#' => rest.find('\n').unwrap_or(rest.len()),
            '`' => rest[1..].find('`').map_or(rest.len(), |end| end + 2),
            '"' => quoted(rest),
            c if c.is_ascii_alphabetic() || c == '_' => {
                let part = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '.';
                let end = rest.find(|c| !part(c)).unwrap_or(rest.len());
                let name = rest[..end].trim_end_matches('.');
                if previous == "as" {
                    aliases.push(name);
                }
                if rest[end..].starts_with('(') && !KEYWORDS.contains(&name) {
                    calls.push(Call { name, line });
                }
                previous = name;
                end
            }
            c => c.len_utf8(),
        };
        let (read, tail) = rest.split_at(length);
        line += read.bytes().filter(|b| *b == b'\n').count() as u64;
        rest = tail;
    }
    calls.retain(|call| !aliases.contains(&first(call.name)));
    calls
}

/// What stands before the first dot.
pub(super) fn first(name: &str) -> &str {
    name.split('.').next().unwrap_or(name)
}

/// The length of a string with its quotes.
fn quoted(text: &str) -> usize {
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => return at + 1,
            _ => {}
        }
    }
    text.len()
}

/// The line of a rule's first head, from 1.
pub(super) fn line_of(text: &str, rule: &str) -> Option<u64> {
    let head = |line: &str| {
        let line = line.trim_start();
        let line = line.strip_prefix("default ").unwrap_or(line).trim_start();
        line.strip_prefix(rule).is_some_and(|rest| {
            !rest.starts_with(|c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '('))
        })
    };
    text.lines().position(head).and_then(|index| u64::try_from(index + 1).ok())
}

/// The first line that speaks of a word outside comments, from 1.
pub(super) fn mentions(text: &str, word: &str) -> Option<u64> {
    let found = text.lines().position(|line| line.split('#').next().unwrap_or("").contains(word));
    found.and_then(|index| u64::try_from(index + 1).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_found_outside_strings_and_comments() {
        let text = "package p\nimport data.lib as lib\nimport rego.v1\n# none(x)\nf(x) := 1 if {\n\
                    not g.h(x)\n\ty := \"a\\\"i(\" \n z := `b(\n)`\n lib.own(x) == count(x)\n}\n\
                    e if (1 == 1)\n";
        let found: Vec<_> = calls(text).into_iter().map(|call| (call.name, call.line)).collect();
        assert_eq!(found, [("f", 5), ("g.h", 6), ("count", 10)]);
    }

    #[test]
    fn rules_have_lines() {
        let text =
            "package p\n\ndefault allow := false\nallowed := 1\nallow if true\nnet_x(a) := 1\n";
        assert_eq!(line_of(text, "allow"), Some(3));
        assert_eq!(line_of(text, "allowed"), Some(4));
        assert_eq!(line_of(text, "net_x"), None);
        assert_eq!(mentions(text, "true"), Some(5));
    }
}

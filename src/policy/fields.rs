//! Takes typed values out of the YAML tree, and reports what has the wrong shape or an unknown name.
#![forbid(unsafe_code)]

use super::problem::{Place, Problems};
use super::yaml::{Key, Node, Value};

impl Node {
    /// What it is, for a message.
    fn kind(&self) -> &'static str {
        match self.value {
            Value::Null => "nothing",
            Value::Bool(_) => "a boolean",
            Value::Int(_) | Value::Float(_) => "a number",
            Value::Text(_) => "a string",
            Value::List(_) => "a list",
            Value::Map(_) => "a map",
        }
    }

    fn wrong(&self, what: &str, wanted: &str, fix: &str, problems: &mut Problems) {
        let kind = self.kind();
        problems.error(self.at, format!("{what} must be {wanted}, not {kind}"), fix);
    }

    /// A string, or an error.
    pub fn text(&self, what: &str, problems: &mut Problems) -> Option<Located> {
        match &self.value {
            Value::Text(text) => {
                if text.chars().any(char::is_control) {
                    problems.error(
                        self.at,
                        format!("{what} holds a control character"),
                        "remove it",
                    );
                    return None;
                }
                Some(Located { at: self.at, text: text.clone() })
            }
            Value::Int(_) | Value::Float(_) | Value::Bool(_) => {
                self.wrong(what, "a string", "put it in quotes", problems);
                None
            }
            _ => {
                self.wrong(what, "a string", "", problems);
                None
            }
        }
    }

    pub fn boolean(&self, what: &str, problems: &mut Problems) -> Option<bool> {
        if let Value::Bool(value) = self.value {
            return Some(value);
        }
        self.wrong(what, "true or false", "write true or false, without quotes", problems);
        None
    }

    pub fn list(&self, what: &str, problems: &mut Problems) -> Option<&[Node]> {
        if let Value::List(items) = &self.value {
            return Some(items);
        }
        let fix = "write one entry a line, each after `- `; remove the key if nothing is meant";
        self.wrong(what, "a list", fix, problems);
        None
    }

    pub fn map(&self, what: &str, problems: &mut Problems) -> Option<&[(Key, Node)]> {
        if let Value::Map(entries) = &self.value {
            return Some(entries);
        }
        self.wrong(what, "a map", "write `key: value`, without `- `", problems);
        None
    }
}

/// A string of the document and where it stands.
#[derive(Debug, Clone)]
pub(super) struct Located {
    pub at: Place,
    pub text: String,
}

/// The entries of a map, taken one key at a time: what is left at the end was not known.
pub(super) struct Fields<'n> {
    at: Place,
    what: String,
    entries: &'n [(Key, Node)],
    known: Vec<&'static str>,
}

impl<'n> Fields<'n> {
    /// `what` names the map in messages.
    pub fn of(node: &'n Node, what: impl Into<String>, problems: &mut Problems) -> Option<Self> {
        let what = what.into();
        let entries = node.map(&what, problems)?;
        Some(Self { at: node.at, what, entries, known: Vec::new() })
    }

    /// Where the map stands.
    pub fn at(&self) -> Place {
        self.at
    }

    /// The value of a key, if it is there.
    pub fn take(&mut self, name: &'static str) -> Option<&'n Node> {
        self.known.push(name);
        self.entries.iter().find(|(key, _)| key.name == name).map(|(_, node)| node)
    }

    /// As [`Self::take`], but a key without a value counts as absent.
    pub fn take_filled(&mut self, name: &'static str) -> Option<&'n Node> {
        self.take(name).filter(|node| !matches!(node.value, Value::Null))
    }

    /// Names a key for a message.
    pub fn name(&self, key: &str) -> String {
        format!("{}.{key}", self.what)
    }

    /// Keys that nobody asked for. `strict` makes all of them errors; else only those that look
    /// like a known key misspelt.
    pub fn finish(self, strict: Option<&str>, problems: &mut Problems) {
        for (key, _) in self.entries {
            if self.known.contains(&key.name.as_str()) {
                continue;
            }
            let what = format!("{} has an unknown key {:?}", self.what, key.name);
            let near = self.known.iter().find(|known| misspelt(&key.name, known));
            match (near, strict) {
                (Some(near), _) => problems.error(key.at, what, format!("did you mean `{near}`?")),
                (None, Some(why)) => problems.error(key.at, what, why),
                (None, None) => problems.warn(key.at, format!("{what}: ignored"), "remove it"),
            }
        }
    }
}

/// Whether one edit (two or three, in a long word) makes `word` the known key.
fn misspelt(word: &str, known: &str) -> bool {
    let allowed = (known.len() / 4).clamp(1, 3);
    known.len() >= 4 && word.len().abs_diff(known.len()) <= allowed && {
        let word = word.to_lowercase().replace('-', "_");
        distance(word.as_bytes(), known.as_bytes()) <= allowed
    }
}

/// Levenshtein's.
fn distance(a: &[u8], b: &[u8]) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.iter().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn misspellings() {
        assert!(misspelt("alowed_ips", "allowed_ips"));
        assert!(misspelt("deny_rule", "deny_rules"));
        assert!(misspelt("deny-rules", "deny_rules"));
        assert!(misspelt("hosts", "host"));
        assert!(misspelt("binarys", "binaries"));
        assert!(misspelt("network_policy", "network_policies"));
        assert!(misspelt("Binaries", "binaries"));
        assert!(!misspelt("note", "name"));
        assert!(!misspelt("description", "endpoints"));
    }
}

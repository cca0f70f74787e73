//! YAML as a tree in which every value knows its line.
//!
//! The document is read into typed structs from this tree and not by serde's derive, because one
//! run must find every problem, each with its line, and because an unknown key is a warning while
//! a list where a map belongs is an error.
#![forbid(unsafe_code)]

use std::fmt;

use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_saphyr::options::MergeKeyPolicy;
use serde_saphyr::{Location, Spanned};

use super::MAX_BYTES;
use super::problem::{Place, Problem, Source};
use super::suggestion::printable;

/// A value and where it stands.
#[derive(Debug)]
pub(super) struct Node {
    pub at: Place,
    pub value: Value,
}

#[derive(Debug)]
pub(super) enum Value {
    Null,
    Bool(bool),
    Int(i64),
    /// No key takes one; a Rego text may read it.
    Float(f64),
    Text(String),
    List(Vec<Node>),
    Map(Vec<(Key, Node)>),
}

/// A map's key and where it stands.
#[derive(Debug)]
pub(super) struct Key {
    pub at: Place,
    pub name: String,
}

/// Deeper nesting than any policy has.
const MAX_DEPTH: usize = 24;
/// More values than any policy has.
const MAX_NODES: usize = 200_000;

/// Parses one document.
pub(super) fn read(source: &Source<'_>) -> Result<Node, Problem> {
    let refuse = |what: String, fix: &str| Problem {
        file: source.name.to_owned(),
        line: None,
        column: None,
        what,
        fix: Some(fix.to_owned()),
    };
    if source.bytes.len() > MAX_BYTES {
        return Err(refuse(
            format!("the policy is larger than {MAX_BYTES} bytes"),
            "split it, or use wildcards for hosts and paths",
        ));
    }
    let text = std::str::from_utf8(source.bytes).map_err(|error| {
        let read = String::from_utf8_lossy(&source.bytes[..error.valid_up_to()]);
        Problem {
            line: u64::try_from(read.split('\n').count()).ok(),
            ..refuse("the policy is not UTF-8".into(), "save it as UTF-8")
        }
    })?;
    serde_saphyr::from_str_with_options::<Node>(text, options()).map_err(|error| {
        let at = error.location().map(place).unwrap_or_default();
        Problem {
            file: source.name.to_owned(),
            line: (at.line > 0).then_some(at.line),
            column: (at.column > 0).then_some(at.column),
            what: format!("not a YAML document that can be read: {}", message(&error)),
            fix: None,
        }
    })
}

fn options() -> serde_saphyr::Options {
    serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_depth: MAX_DEPTH,
            max_nodes: MAX_NODES,
            max_events: 2 * MAX_NODES,
            max_documents: 1,
            max_aliases: 1000,
            max_anchors: 1000,
            max_total_scalar_bytes: MAX_BYTES,
        },
        // An alias bomb is refused by what it expands to, not by what it looks like.
        alias_limits: serde_saphyr::alias_limits! {
            max_total_replayed_events: MAX_NODES,
            max_replay_stack_depth: MAX_DEPTH,
        },
        duplicate_keys: serde_saphyr::options::DuplicateKeyPolicy::Error,
        // OpenShell's reader does not merge: what one reader merges the other ignores.
        merge_keys: MergeKeyPolicy::Error,
        strict_booleans: true,
        reject_unsupported_tags: true,
        with_snippet: false,
    }
}

/// The first line of the parser's message, without its location (we print our own) and without what
/// it says to programmers.
fn message(error: &serde_saphyr::Error) -> String {
    let text = error.without_snippet().to_string();
    let line = text.lines().next().unwrap_or_default();
    if line.contains("Documents {") {
        return "more than one document in a file".into();
    }
    if line.contains("budget breached") {
        return "larger, deeper or with more aliases than a policy may be".into();
    }
    let line = line.strip_prefix("error: ").unwrap_or(line);
    let cuts = [" at line ", ", set DuplicateKeyPolicy", " by configured policy"];
    let cut = cuts.iter().filter_map(|cut| line.find(cut)).min().unwrap_or(line.len());
    let line: String = line[..cut].chars().filter(|c| !c.is_control()).take(200).collect();
    // It can hold keys of the file, and those can turn the direction of what follows.
    printable(&line)
}

fn place(location: Location) -> Place {
    Place { line: location.line(), column: location.column() }
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let spanned = Spanned::<Value>::deserialize(deserializer)?;
        Ok(Self { at: place(spanned.referenced), value: spanned.value })
    }
}

impl<'de> Deserialize<'de> for Key {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let spanned = Spanned::<String>::deserialize(deserializer)?;
        Ok(Self { at: place(spanned.referenced), name: spanned.value })
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ValueVisitor)
    }
}

struct ValueVisitor;

impl<'de> Visitor<'de> for ValueVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a YAML value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_none<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        Value::deserialize(deserializer)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Int(value))
    }

    fn visit_u64<E: serde::de::Error>(self, value: u64) -> Result<Value, E> {
        i64::try_from(value).map(Value::Int).map_err(|_| E::custom("number out of range"))
    }

    fn visit_i128<E: serde::de::Error>(self, value: i128) -> Result<Value, E> {
        i64::try_from(value).map(Value::Int).map_err(|_| E::custom("number out of range"))
    }

    fn visit_u128<E: serde::de::Error>(self, value: u128) -> Result<Value, E> {
        i64::try_from(value).map(Value::Int).map_err(|_| E::custom("number out of range"))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Value::Float(value))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::Text(value.to_owned()))
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(Value::Text(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = seq.next_element()? {
            items.push(item);
        }
        Ok(Value::List(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut entries: Vec<(Key, Node)> = Vec::new();
        let mut seen = std::collections::HashSet::new();
        while let Some(key) = map.next_key::<Key>()? {
            // The parser refuses these too; a lost denial is worth a second look.
            if !seen.insert(key.name.clone()) {
                return Err(A::Error::custom(format!("duplicate key {:?}", key.name)));
            }
            entries.push((key, map.next_value()?));
        }
        Ok(Value::Map(entries))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Node, Problem> {
        read(&Source { name: "p.yaml", bytes: text.as_bytes() })
    }

    fn entry<'n>(node: &'n Node, name: &str) -> (&'n Key, &'n Node) {
        let Value::Map(entries) = &node.value else { panic!("not a map: {node:?}") };
        let (key, value) = entries.iter().find(|(k, _)| k.name == name).expect("key");
        (key, value)
    }

    #[test]
    fn every_value_knows_its_line() {
        let root = parse("a: 1\nb:\n  - x\n  - { c: true }\n").expect("parses");
        let (key, value) = entry(&root, "b");
        assert_eq!(key.at.line, 2);
        let Value::List(items) = &value.value else { panic!("list") };
        assert_eq!(items[0].at, Place { line: 3, column: 5 });
        let (key, value) = entry(&items[1], "c");
        assert_eq!((key.at.line, key.at.column), (4, 7));
        assert!(matches!(value.value, Value::Bool(true)));
    }

    #[test]
    fn refuses_what_two_readers_read_differently() {
        for (text, line) in [
            ("a: 1\nb: 2\na: 3\n", Some(3)),
            ("a: &x {k: v}\nb:\n  <<: *x\n", Some(3)),
            ("a: !custom 1\n", Some(1)),
            ("a: [1\n", None),
            ("a: 1\n---\nb: 2\n", None),
        ] {
            let problem = parse(text).expect_err(text);
            if line.is_some() {
                assert_eq!(problem.line, line, "{text:?}: {problem}");
            }
        }
    }

    #[test]
    fn messages_are_escaped() {
        for key in ["\u{202e}a", "\"\\u202ea\""] {
            let text = format!("{key}: 1\n{key}: 2\n");
            let problem = parse(&text).expect_err("twice").to_string();
            assert!(problem.is_ascii() && problem.contains("202e"), "{problem:?}");
        }
    }

    #[test]
    fn refuses_bombs() {
        let mut text = String::from("a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n");
        for n in 1..9 {
            let refs = vec![format!("*a{}", n - 1); 10].join(",");
            text += &["a", &n.to_string(), ": &a", &n.to_string(), " [", &refs, "]\n"].concat();
        }
        parse(&text).expect_err("alias bomb");
        parse(&"[".repeat(100_000)).expect_err("deep");
        parse(&format!("a: {}", "x".repeat(MAX_BYTES))).expect_err("large");
        read(&Source { name: "p", bytes: b"a: 1\nb: \xff\n" }).expect_err("not UTF-8");
    }

    #[test]
    fn words_stay_words() {
        let root = parse("a: yes\nb: \"1\"\nc: 1\nd: 10.0.0.1\ne: ~\n").expect("parses");
        assert!(matches!(&entry(&root, "a").1.value, Value::Text(t) if t == "yes"));
        assert!(matches!(&entry(&root, "b").1.value, Value::Text(t) if t == "1"));
        assert!(matches!(entry(&root, "c").1.value, Value::Int(1)));
        assert!(matches!(&entry(&root, "d").1.value, Value::Text(t) if t == "10.0.0.1"));
        assert!(matches!(entry(&root, "e").1.value, Value::Null));
    }
}

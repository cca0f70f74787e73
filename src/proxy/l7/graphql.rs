//! `GraphQL` over HTTP as the proxy reads it: which operations a server could run for a request,
//! and which root fields each selects.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fmt;

use apollo_parser::Parser;
use apollo_parser::cst::{Definition, FragmentDefinition, OperationDefinition, Selection};
use serde::de::{DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use sha2::{Digest, Sha256};

use super::content::{Facts, bare, fold};
use super::json::{self, Key, Keys, MAX_DEPTH, Skip, Text, refuse};
use crate::policy::{Operation, OperationKind, Persisted, digest};

/// What a document may hold at most, as upstream.
const MAX_TOKENS: usize = 20_000;
const MAX_RECURSION: usize = 128;
/// The most operations of a batch.
const MAX_BATCH: usize = 100;

/// What one request object says.
#[derive(Debug, Default)]
pub(super) struct Envelope {
    query: Option<String>,
    operation_name: Option<String>,
    hash: Option<String>,
    id: Option<String>,
}

/// What can be said of a request before its body is read.
pub(super) fn check(facts: &Facts<'_>) -> Result<(), &'static str> {
    match facts.method {
        "GET" => Ok(()),
        "POST" => match facts.media_type()?.as_str() {
            "application/json" | "application/graphql" | "application/graphql+json" => Ok(()),
            _ => Err("a content type other than application/json or application/graphql"),
        },
        _ => Err("a method other than GET and POST"),
    }
}

/// Every operation that a server could run for the request.
pub(super) fn read(facts: &Facts<'_>, body: &[u8]) -> Result<Vec<Operation>, String> {
    let url = query_string(facts.query)?;
    if facts.method == "GET" {
        return operations(&url, None);
    }
    if body.is_empty() {
        return Err("no body".into());
    }
    let name = url.operation_name.as_deref();
    let mut all = Vec::new();
    if facts.media_type()? == "application/graphql" {
        let query = std::str::from_utf8(body).map_err(|_| "a body that is not UTF-8")?;
        let envelope = Envelope { query: Some(query.to_owned()), ..Envelope::default() };
        all.extend(operations(&envelope, name)?);
    } else {
        for envelope in json::read(body, Top)? {
            all.extend(operations(&envelope, name)?);
        }
    }
    // Servers read either; some prefer the one, some the other.
    if url.query.is_some() || url.hash.is_some() || url.id.is_some() {
        all.extend(operations(&url, None)?);
    }
    Ok(all)
}

/// What the query string says. What it may say besides (keys, versions) is not judged.
fn query_string(pairs: &[(String, String)]) -> Result<Envelope, String> {
    /// What servers take for a document, or for the name of one, in other spellings.
    const NAMES: [&str; 15] = [
        "query",
        "operationname",
        "extensions",
        "variables",
        "id",
        "documentid",
        "queryid",
        "docid",
        "doc_id",
        "document",
        "documenthash",
        "queryhash",
        "hash",
        "operationid",
        "persistedquery",
    ];
    let mut envelope = Envelope::default();
    let mut seen = Keys::default();
    for (key, value) in pairs {
        let name = bare(key);
        if !NAMES.contains(&name.as_str()) {
            continue;
        }
        seen.add::<serde_json::Error>(&name)
            .map_err(|_| "a parameter twice in the query string")?;
        let text = Some(value.clone()).filter(|value| !value.is_empty());
        match key.as_str() {
            "query" => envelope.query = text,
            "operationName" => envelope.operation_name = text,
            "variables" => {}
            "id" | "documentId" | "queryId" => envelope.set_id(text)?,
            "extensions" => {
                if let Some(text) = text {
                    envelope.hash = json::read(text.as_bytes(), Extensions(MAX_DEPTH))?;
                }
            }
            _ => return Err("a parameter that could name another document".into()),
        }
    }
    Ok(envelope)
}

impl Envelope {
    fn set_id(&mut self, id: Option<String>) -> Result<(), &'static str> {
        match id {
            Some(_) if self.id.is_some() => Err("two ids of a persisted query"),
            Some(id) => {
                self.id = Some(id);
                Ok(())
            }
            None => Ok(()),
        }
    }
}

/// The operations of one request object. `name` is the operation's name, said elsewhere.
pub(super) fn operations(
    envelope: &Envelope,
    name: Option<&str>,
) -> Result<Vec<Operation>, String> {
    let name = match (envelope.operation_name.as_deref(), name) {
        (Some(one), Some(other)) if one != other => {
            return Err("two values of operationName".into());
        }
        (one, other) => one.or(other).filter(|name| !name.is_empty()),
    };
    let mut all = Vec::new();
    let query = envelope.query.as_deref().filter(|query| !query.trim().is_empty());
    if let Some(query) = query {
        all.push(document(query, name)?);
    }
    // A document with a key beside it: the server may run what it keeps under that key.
    let same = |hash: &str| query.is_some_and(|query| is_hash_of(hash, query));
    let hash = envelope.hash.clone().filter(|hash| !same(hash)).map(Persisted::Hash);
    let id = envelope.id.clone().map(Persisted::Id);
    all.extend(hash.into_iter().chain(id).map(|persisted| Operation {
        kind: None,
        name: None,
        fields: Vec::new(),
        persisted: Some(persisted),
    }));
    if all.is_empty() { Err("neither a document nor a persisted query".into()) } else { Ok(all) }
}

fn is_hash_of(hash: &str, query: &str) -> bool {
    let bytes: [u8; 32] = Sha256::digest(query.as_bytes()).into();
    digest::from_hex(hash) == Some(bytes)
}

/// The operation of a document that runs.
fn document(text: &str, name: Option<&str>) -> Result<Operation, String> {
    plain(text)?;
    let tree = Parser::new(text).recursion_limit(MAX_RECURSION).token_limit(MAX_TOKENS).parse();
    if tree.errors().next().is_some() {
        return Err("a document that is not GraphQL, or too long or too deep".into());
    }
    let mut operations = Vec::new();
    let mut fragments = HashMap::new();
    for definition in tree.document().definitions() {
        match definition {
            Definition::OperationDefinition(operation) => operations.push(operation),
            Definition::FragmentDefinition(fragment) => {
                let name = fragment.fragment_name().and_then(|name| name.name());
                let name = name.ok_or("a fragment without a name")?.text().to_string();
                if fragments.insert(name, fragment).is_some() {
                    return Err("two fragments of one name".into());
                }
            }
            _ => return Err("a document that defines types".into()),
        }
    }
    let names = |operation: &OperationDefinition| operation.name().map(|n| n.text().to_string());
    let mut distinct = HashSet::new();
    let all_named = operations.iter().all(|operation| distinct.insert(names(operation)));
    if !all_named || (operations.len() > 1 && distinct.contains(&None)) {
        return Err("several operations without a name of their own".into());
    }
    let chosen = match name {
        Some(name) => operations.iter().find(|one| names(one).as_deref() == Some(name)),
        None if operations.len() > 1 => {
            return Err("several operations, and no operationName".into());
        }
        None => operations.first(),
    };
    let chosen = chosen.ok_or("no operation of that name")?;
    Ok(Operation {
        kind: Some(kind(chosen)),
        name: names(chosen),
        fields: root_fields(chosen, &fragments)?,
        persisted: None,
    })
}

/// Characters that end a line, or are blank, to some readers and not to others.
fn plain(text: &str) -> Result<(), &'static str> {
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        let odd = match c {
            '\t' | '\n' => false,
            '\r' => chars.peek() != Some(&'\n'),
            '\u{feff}' | '\u{2028}' | '\u{2029}' => true,
            c => c.is_control(),
        };
        if odd {
            return Err("a document with a control character or an odd line break");
        }
    }
    Ok(())
}

fn kind(operation: &OperationDefinition) -> OperationKind {
    match operation.operation_type() {
        Some(word) if word.mutation_token().is_some() => OperationKind::Mutation,
        Some(word) if word.subscription_token().is_some() => OperationKind::Subscription,
        _ => OperationKind::Query,
    }
}

/// The names of all root fields, whatever the conditions under which they are selected.
fn root_fields(
    operation: &OperationDefinition,
    fragments: &HashMap<String, FragmentDefinition>,
) -> Result<Vec<String>, &'static str> {
    let set = operation.selection_set().ok_or("an operation without fields")?;
    let mut fields = BTreeSet::new();
    let mut visited = HashSet::new();
    let mut sets = vec![set];
    while let Some(set) = sets.pop() {
        for selection in set.selections() {
            let inner = match selection {
                Selection::Field(field) => {
                    let name = field.name().ok_or("a field without a name")?;
                    fields.insert(name.text().to_string());
                    continue;
                }
                Selection::InlineFragment(fragment) => fragment.selection_set(),
                Selection::FragmentSpread(spread) => {
                    let name = spread.fragment_name().and_then(|name| name.name());
                    let name = name.ok_or("a fragment without a name")?.text().to_string();
                    let fragment = fragments.get(&name).ok_or("a fragment that is not defined")?;
                    if !visited.insert(name) {
                        continue;
                    }
                    fragment.selection_set()
                }
            };
            sets.push(inner.ok_or("a fragment without fields")?);
        }
    }
    Ok(fields.into_iter().collect())
}

/// A request object, or a list of them.
struct Top;

impl<'de> DeserializeSeed<'de> for Top {
    type Value = Vec<Envelope>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Top {
    type Value = Vec<Envelope>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a request or a batch")
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
        Ok(vec![One.visit_map(map)?])
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        let mut all = Vec::new();
        while let Some(envelope) = seq.next_element_seed(One)? {
            if all.len() >= MAX_BATCH {
                return Err(refuse("a batch of more than 100 requests"));
            }
            all.push(envelope);
        }
        if all.is_empty() { Err(refuse("an empty batch")) } else { Ok(all) }
    }
}

/// A request object.
pub(super) struct One;

impl<'de> DeserializeSeed<'de> for One {
    type Value = Envelope;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Envelope, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for One {
    type Value = Envelope;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a request")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Envelope, A::Error> {
        let mut envelope = Envelope::default();
        let mut keys = Keys::default();
        while let Some(key) = map.next_key_seed(Key)? {
            keys.add(&key)?;
            match key.as_str() {
                "query" => envelope.query = map.next_value_seed(Text)?,
                "operationName" => envelope.operation_name = map.next_value_seed(Text)?,
                "variables" => map.next_value_seed(Skip(MAX_DEPTH))?,
                "extensions" => envelope.hash = map.next_value_seed(Extensions(MAX_DEPTH))?,
                "id" | "documentId" | "queryId" => {
                    let id = map.next_value_seed(Text)?;
                    envelope.set_id(id).map_err(refuse)?;
                }
                _ => return Err(refuse("a member that GraphQL over HTTP does not have")),
            }
        }
        Ok(envelope)
    }
}

/// `extensions`: the hash of a persisted query, if it names one.
struct Extensions(usize);

impl<'de> DeserializeSeed<'de> for Extensions {
    type Value = Option<String>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Extensions {
    type Value = Option<String>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("extensions")
    }

    fn visit_unit<E>(self) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut hash = None;
        let mut keys = Keys::default();
        while let Some(key) = map.next_key_seed(Key)? {
            // As a reader without regard to case would see them.
            keys.add(&fold(&key))?;
            match key.as_str() {
                "persistedQuery" => hash = map.next_value_seed(PersistedQuery)?,
                other if fold(other) == "persistedquery" => {
                    return Err(refuse("persistedQuery in another spelling"));
                }
                _ => map.next_value_seed(Skip(self.0))?,
            }
        }
        Ok(hash)
    }
}

struct PersistedQuery;

impl<'de> DeserializeSeed<'de> for PersistedQuery {
    type Value = Option<String>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for PersistedQuery {
    type Value = Option<String>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a persisted query")
    }

    fn visit_unit<E>(self) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut hash = None;
        let mut keys = Keys::default();
        while let Some(key) = map.next_key_seed(Key)? {
            keys.add(&key)?;
            match key.as_str() {
                "sha256Hash" => hash = map.next_value_seed(Text)?.filter(|hash| !hash.is_empty()),
                "version" => map.next_value_seed(Skip(MAX_DEPTH))?,
                _ => return Err(refuse("a member that persistedQuery does not have")),
            }
        }
        if hash.is_none() { Err(refuse("persistedQuery without sha256Hash")) } else { Ok(hash) }
    }
}

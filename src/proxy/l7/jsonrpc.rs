//! JSON-RPC 2.0 as the proxy reads it, and what MCP adds: the tool of a call.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};

use super::content::fold;
use super::json::{self, Key, Keys, MAX_DEPTH, Skip, Text, refuse};
use crate::policy::{Call, Message, RpcInspection};

/// The most messages of a batch, and the most values of `params` that are kept for rules.
const MAX_MESSAGES: usize = 1000;
const MAX_VALUES: usize = 1024;

/// A message, and what MCP's headers repeat of it.
pub(super) struct Read {
    pub message: Message,
    /// `params.name`, or else `params.uri`.
    pub name: Option<String>,
}

/// Reads a body: one message, or a batch of at least one.
pub(super) fn read(body: &[u8], asked: &RpcInspection) -> Result<Vec<Read>, String> {
    if body.is_empty() {
        return Err("no body".into());
    }
    json::read(body, Top(asked))
}

struct Top<'a>(&'a RpcInspection);

impl<'de> DeserializeSeed<'de> for Top<'_> {
    type Value = Vec<Read>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Top<'_> {
    type Value = Vec<Read>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a message or a batch")
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
        Ok(vec![One(self.0).visit_map(map)?])
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        let mut messages = Vec::new();
        while let Some(message) = seq.next_element_seed(One(self.0))? {
            if messages.len() >= MAX_MESSAGES {
                return Err(refuse("a batch of more than 1000 messages"));
            }
            messages.push(message);
        }
        if messages.is_empty() { Err(refuse("an empty batch")) } else { Ok(messages) }
    }
}

/// One message.
struct One<'a>(&'a RpcInspection);

impl<'de> DeserializeSeed<'de> for One<'_> {
    type Value = Read;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Read, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for One<'_> {
    type Value = Read;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a message")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Read, A::Error> {
        let mut keys = Keys::default();
        let mut version = None;
        let mut method = None;
        let mut params = Params::default();
        let (mut id, mut result, mut error) = (false, false, false);
        while let Some(key) = map.next_key_seed(Key)? {
            keys.add(&key)?;
            match key.as_str() {
                "jsonrpc" => version = map.next_value_seed(Text)?,
                "method" => method = map.next_value_seed(Text)?,
                "params" => {
                    map.next_value_seed(Wanted::top(self.0, &mut params))?;
                }
                "id" => {
                    map.next_value_seed(Id)?;
                    id = true;
                }
                "result" => {
                    map.next_value_seed(Skip(MAX_DEPTH))?;
                    result = true;
                }
                "error" => {
                    map.next_value_seed(Skip(MAX_DEPTH))?;
                    error = true;
                }
                _ => return Err(refuse("a member that JSON-RPC does not have")),
            }
        }
        if version.as_deref() != Some("2.0") {
            return Err(refuse("no `\"jsonrpc\": \"2.0\"`"));
        }
        let message = match (method, result || error) {
            (Some(_), true) => return Err(refuse("both a call and a response")),
            (None, true) if !id || (result && error) || params.seen => {
                return Err(refuse("a response that is not as it must be"));
            }
            (None, true) => Message::Response,
            (None, false) => return Err(refuse("neither a method nor a result")),
            (Some(method), false) => {
                let called = self.0.mcp && method == "tools/call";
                let tool = if called { params.name.clone() } else { None };
                let by_position = params.by_position;
                Message::Call(Call { method, tool, params: params.values, by_position })
            }
        };
        Ok(Read { message, name: params.name.or(params.uri) })
    }
}

/// A string, a number or `null`.
struct Id;

impl<'de> DeserializeSeed<'de> for Id {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl Visitor<'_> for Id {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an id")
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_i64<E>(self, _: i64) -> Result<(), E> {
        Ok(())
    }

    fn visit_u64<E>(self, _: u64) -> Result<(), E> {
        Ok(())
    }

    fn visit_f64<E>(self, _: f64) -> Result<(), E> {
        Ok(())
    }

    fn visit_str<E>(self, _: &str) -> Result<(), E> {
        Ok(())
    }
}

/// What is kept of `params`.
#[derive(Default)]
struct Params {
    seen: bool,
    by_position: bool,
    name: Option<String>,
    uri: Option<String>,
    values: Vec<(String, String)>,
}

impl Params {
    /// One value for each of these paths.
    fn keep<E: Error>(&mut self, paths: &[&str], value: &str) -> Result<(), E> {
        for path in paths {
            if self.values.len() >= MAX_VALUES {
                return Err(refuse("more than 1024 values where a rule looks"));
            }
            self.values.push(((*path).to_owned(), value.to_owned()));
        }
        Ok(())
    }
}

/// Walks `params` and keeps the scalars at the paths that are asked for. Names are compared
/// without regard to case: some servers read them so.
struct Wanted<'a, 'p> {
    params: &'p mut Params,
    /// At `params` itself.
    top: bool,
    /// There, in MCP.
    names: bool,
    depth: Skip,
    /// Paths that end here: scalars, also in lists, are theirs.
    here: Vec<&'a str>,
    /// Paths that go on, each whole and what is left of it.
    below: Vec<(&'a str, &'a str)>,
}

impl<'a, 'p> Wanted<'a, 'p> {
    fn top(asked: &'a RpcInspection, params: &'p mut Params) -> Self {
        params.seen = true;
        let below = asked.params.iter().map(|path| (path.as_str(), path.as_str())).collect();
        let (here, depth) = (Vec::new(), Skip(MAX_DEPTH));
        Self { params, top: true, names: asked.mcp, depth, here, below }
    }

    fn keep<E: Error>(self, value: &str) -> Result<(), E> {
        self.params.keep(&self.here, value)
    }

    /// What is wanted of the value of `key`.
    fn under(&self, key: &str) -> (Vec<&'a str>, Vec<(&'a str, &'a str)>) {
        let key = fold(key);
        let mut here = Vec::new();
        let mut below = Vec::new();
        for (path, rest) in &self.below {
            if fold(rest) == key {
                here.push(*path);
            }
            // A key may hold dots itself.
            for (dot, _) in rest.match_indices('.') {
                if fold(&rest[..dot]) == key {
                    below.push((*path, &rest[dot + 1..]));
                }
            }
        }
        (here, below)
    }
}

impl<'de> DeserializeSeed<'de> for Wanted<'_, '_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        if !self.top && self.here.is_empty() && self.below.is_empty() {
            return self.depth.deserialize(deserializer);
        }
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Wanted<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("parameters")
    }

    fn visit_unit<E: Error>(self) -> Result<(), E> {
        if self.top { Ok(()) } else { self.keep("null") }
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<(), E> {
        self.scalar(&value.to_string())
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<(), E> {
        self.scalar(&value.to_string())
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<(), E> {
        self.scalar(&value.to_string())
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<(), E> {
        self.scalar(&value.to_string())
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<(), E> {
        self.scalar(value)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        let depth = self.depth.deeper()?;
        self.params.by_position |= self.top;
        loop {
            let inner = Wanted {
                params: &mut *self.params,
                top: false,
                names: false,
                depth,
                here: self.here.clone(),
                below: if self.top { Vec::new() } else { self.below.clone() },
            };
            if seq.next_element_seed(inner)?.is_none() {
                return Ok(());
            }
        }
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let depth = self.depth.deeper()?;
        let mut keys = Keys::default();
        let mut folded = Keys::default();
        while let Some(key) = map.next_key_seed(Key)? {
            keys.add(&key)?;
            if self.top {
                folded
                    .add::<A::Error>(&fold(&key))
                    .map_err(|_| refuse::<A::Error>("keys of params that differ in case only"))?;
            }
            let (here, below) = self.under(&key);
            match key.as_str() {
                // In MCP these are strings, and what is called.
                "name" | "uri" if self.names => {
                    let text = map.next_value_seed(Text)?;
                    self.params.keep(&here, text.as_deref().unwrap_or("null"))?;
                    if key == "name" {
                        self.params.name = text;
                    } else {
                        self.params.uri = text;
                    }
                }
                _ => {
                    let params = &mut *self.params;
                    let inner = Wanted { params, top: false, names: false, depth, here, below };
                    map.next_value_seed(inner)?;
                }
            }
        }
        Ok(())
    }
}

impl Wanted<'_, '_> {
    fn scalar<E: Error>(self, value: &str) -> Result<(), E> {
        if self.top {
            Err(refuse("params that is neither a map nor a list"))
        } else {
            self.keep(value)
        }
    }
}

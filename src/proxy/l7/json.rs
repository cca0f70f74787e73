//! JSON that every reader reads in the same way: no key twice in one object, UTF-8, no depth
//! beyond need. What nobody asked for is passed over and not kept.

use std::collections::HashSet;
use std::fmt;
use std::hash::{BuildHasher, RandomState};

use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};

/// Deeper than any request needs.
pub(super) const MAX_DEPTH: usize = 64;

/// Reads one document to its end.
pub(super) fn read<'de, S: DeserializeSeed<'de>>(
    bytes: &'de [u8],
    seed: S,
) -> Result<S::Value, String> {
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    let value = seed.deserialize(&mut deserializer).map_err(|error| reason(&error))?;
    deserializer.end().map_err(|error| reason(&error))?;
    Ok(value)
}

/// What went wrong, without what was sent.
fn reason(error: &serde_json::Error) -> String {
    let text = error.to_string();
    if error.is_data() && !text.starts_with(OURS) {
        return "a value of another type than the protocol has".into();
    }
    let text = text.strip_prefix(OURS).unwrap_or(&text);
    if error.is_data() {
        return text.split(" at line ").next().unwrap_or_default().to_owned();
    }
    format!("not JSON: {text}")
}

/// Marks errors whose text is ours.
const OURS: &str = "ringfence: ";

/// An error with a text of ours.
pub(super) fn refuse<E: Error>(what: &'static str) -> E {
    E::custom(format_args!("{OURS}{what}"))
}

/// The keys of one object, to find one that appears twice.
#[derive(Default)]
pub(super) struct Keys {
    seen: HashSet<u64>,
    hasher: RandomState,
}

impl Keys {
    pub fn add<E: Error>(&mut self, key: &str) -> Result<(), E> {
        if self.seen.insert(self.hasher.hash_one(key)) {
            Ok(())
        } else {
            Err(refuse("a key twice in one object"))
        }
    }
}

/// A key, as text.
pub(super) struct Key;

impl<'de> DeserializeSeed<'de> for Key {
    type Value = String;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<String, D::Error> {
        deserializer.deserialize_str(Text).map(Option::unwrap_or_default)
    }
}

/// A string, or `null` for none.
pub(super) struct Text;

impl<'de> DeserializeSeed<'de> for Text {
    type Value = Option<String>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl Visitor<'_> for Text {
    type Value = Option<String>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string")
    }

    fn visit_str<E>(self, text: &str) -> Result<Self::Value, E> {
        Ok(Some(text.to_owned()))
    }

    fn visit_unit<E>(self) -> Result<Self::Value, E> {
        Ok(None)
    }
}

/// Passes over any value. Holds how many levels may follow.
#[derive(Clone, Copy)]
pub(super) struct Skip(pub usize);

impl Skip {
    /// One level down.
    pub fn deeper<E: Error>(self) -> Result<Self, E> {
        self.0.checked_sub(1).map(Self).ok_or_else(|| refuse("more than 64 levels"))
    }
}

impl<'de> DeserializeSeed<'de> for Skip {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

/// The hash of a key that nobody needs.
struct KeyHash<'k>(&'k mut Keys);

impl<'de> DeserializeSeed<'de> for KeyHash<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for KeyHash<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key")
    }

    fn visit_str<E: Error>(self, key: &str) -> Result<(), E> {
        self.0.add(key)
    }
}

impl<'de> Visitor<'de> for Skip {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_bool<E>(self, _: bool) -> Result<(), E> {
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

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        let inner = self.deeper()?;
        while seq.next_element_seed(inner)?.is_some() {}
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let inner = self.deeper()?;
        let mut keys = Keys::default();
        while map.next_key_seed(KeyHash(&mut keys))?.is_some() {
            map.next_value_seed(inner)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_readers_read_differently_is_refused() {
        let skip = |text: &str| read(text.as_bytes(), Skip(MAX_DEPTH));
        for fine in ["{}", "[1,-2,3.5e3,null,true,\"\\ud83d\\ude00\"]", " {\"a\":{\"b\":[]}} "] {
            assert_eq!(skip(fine), Ok(()), "{fine}");
        }
        let cases = [
            ("{\"a\":1,\"a\":2}", "twice"),
            ("{\"a\":1,\"\\u0061\":2}", "twice"),
            ("[{\"x\":{\"k\":1,\"k\":1}}]", "twice"),
            ("{} {}", "not JSON"),
            ("{}x", "not JSON"),
            ("", "not JSON"),
            ("\u{feff}{}", "not JSON"),
            ("{'a':1}", "not JSON"),
            ("{\"a\":1,}", "not JSON"),
            ("{\"a\":1 /* b */}", "not JSON"),
            ("NaN", "not JSON"),
            ("01", "not JSON"),
            ("\"\\ud800\"", "not JSON"),
            ("\"a\nb\"", "not JSON"),
        ];
        for (text, words) in cases {
            let error = skip(text).expect_err(text);
            assert!(error.contains(words), "{text:?}: {error}");
        }
        assert!(read(b"\"\xff\"", Skip(1)).is_err());
        let deep = |n| format!("{}{}", "[".repeat(n), "]".repeat(n));
        assert_eq!(skip(&deep(MAX_DEPTH)), Ok(()));
        assert!(skip(&deep(MAX_DEPTH + 1)).expect_err("deep").contains("levels"));
        assert!(skip(&deep(100_000)).is_err());
    }

    #[test]
    fn errors_hold_nothing_of_what_was_sent() {
        let error = read(b"[\"secret\"]", Text).expect_err("a list");
        assert_eq!(error, "a value of another type than the protocol has");
        let error = read(b"{\"secret\": nope}", Skip(9)).expect_err("not JSON");
        assert!(!error.contains("secret") && !error.contains("nope"), "{error}");
    }
}

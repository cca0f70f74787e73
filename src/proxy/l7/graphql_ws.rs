//! `GraphQL` on a WebSocket: which operations a client's message starts. The two protocols that
//! servers speak are read alike, whichever was agreed on: `graphql-transport-ws` (`subscribe`) and
//! the older `graphql-ws` (`start`), since some servers take both.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, MapAccess, Visitor};

use super::graphql::{Envelope, One, operations};
use super::json::{self, Key, Keys, MAX_DEPTH, Skip, Text, refuse};
use crate::policy::{Graphql, Operation, Payload, WEBSOCKET_TEXT};

/// What starts nothing: greetings, signs of life, and the end of an operation or of all.
const WITHOUT_OPERATION: [&str; 6] =
    ["connection_init", "ping", "pong", "complete", "stop", "connection_terminate"];

/// Reads one message. `method` is [`WEBSOCKET_TEXT`], or it is a binary one, in which some servers
/// read text; `max` is in bytes.
#[must_use]
pub fn read(method: &str, message: &[u8], max: usize) -> Payload {
    let read = match method {
        WEBSOCKET_TEXT => started(message, max),
        _ => Err("a binary message".into()),
    };
    let graphql = match read {
        Ok(operations) => Graphql { operations, error: None },
        Err(error) => Graphql { operations: Vec::new(), error: Some(error) },
    };
    Payload { graphql: Some(graphql), rpc: None }
}

/// The operations that a text message starts.
fn started(message: &[u8], max: usize) -> Result<Vec<Operation>, String> {
    if message.len() > max {
        return Err(format!("a message of more than {max} bytes"));
    }
    let kind = json::read(message, Kind)?.ok_or("a message without a type")?;
    match kind.as_str() {
        // The payload is read for what it is only now: its type may come after it.
        "subscribe" | "start" => {
            let payload = json::read(message, Started)?;
            operations(&payload.ok_or("a message without a payload")?, None)
        }
        kind if WITHOUT_OPERATION.contains(&kind) => Ok(Vec::new()),
        _ => Err("a type of message that the protocol does not have".into()),
    }
}

/// `{"id": …, "type": …, "payload": …}`, of which the type is kept.
struct Kind;

impl<'de> DeserializeSeed<'de> for Kind {
    type Value = Option<String>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Kind {
    type Value = Option<String>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a message")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut kind = None;
        let mut keys = Keys::default();
        while let Some(key) = map.next_key_seed(Key)? {
            keys.add(&key)?;
            match key.as_str() {
                "type" => kind = map.next_value_seed(Text)?,
                "id" | "payload" => map.next_value_seed(Skip(MAX_DEPTH))?,
                _ => return Err(refuse("a member that GraphQL over WebSocket does not have")),
            }
        }
        Ok(kind)
    }
}

/// The same, of which the payload is kept.
struct Started;

impl<'de> DeserializeSeed<'de> for Started {
    type Value = Option<Envelope>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Started {
    type Value = Option<Envelope>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a message")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut payload = None;
        while let Some(key) = map.next_key_seed(Key)? {
            if key == "payload" {
                payload = Some(map.next_value_seed(One)?);
            } else {
                map.next_value_seed(Skip(MAX_DEPTH))?;
            }
        }
        Ok(payload)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(message: &str) -> Result<String, String> {
        let operations = started(message.as_bytes(), 1000)?;
        let shown: Vec<_> = operations.iter().map(ToString::to_string).collect();
        Ok(shown.join("; "))
    }

    #[test]
    fn operations_are_found_in_both_protocols() {
        for kind in ["subscribe", "start"] {
            let message = format!(
                r#"{{"payload":{{"query":"subscription S {{ a: news b }}","variables":{{}}}},"id":"1","type":"{kind}"}}"#
            );
            assert_eq!(said(&message).as_deref(), Ok("subscription b,news"));
        }
        let chosen = r#"{"id":1,"type":"subscribe","payload":{"query":"query A { a } mutation B { b }","operationName":"B"}}"#;
        assert_eq!(said(chosen).as_deref(), Ok("mutation b"));
        let persisted = r#"{"id":"1","type":"subscribe","payload":{"extensions":{"persistedQuery":{"version":1,"sha256Hash":"ab"}}}}"#;
        assert_eq!(said(persisted).as_deref(), Ok("persisted query ab"));
        for kind in WITHOUT_OPERATION {
            for rest in ["", r#","id":"1""#, r#","payload":{"token":{"x":[1,null]}}"#] {
                assert_eq!(said(&format!(r#"{{"type":"{kind}"{rest}}}"#)).as_deref(), Ok(""));
            }
        }
    }

    #[test]
    fn what_two_servers_could_read_differently_is_refused() {
        let start = |payload: &str| format!(r#"{{"id":"1","type":"start","payload":{payload}}}"#);
        for (message, why) in [
            ("{}".to_owned(), "without a type"),
            (r#"{"type":null}"#.to_owned(), "without a type"),
            (r#"{"type":"subscribe"}"#.to_owned(), "without a payload"),
            (r#"{"type":"Subscribe","payload":{"query":"{ a }"}}"#.to_owned(), "does not have"),
            (r#"{"type":"subscription_start","query":"{ a }"}"#.to_owned(), "does not have"),
            (r#"{"type":"ping","type":"start","payload":{"query":"{ a }"}}"#.to_owned(), "twice"),
            (r#"{"type":"ping","Type":"start"}"#.to_owned(), "does not have"),
            (r#"[{"type":"ping"}]"#.to_owned(), "another type"),
            ("x".to_owned(), "not JSON"),
            (start("null"), "another type"),
            (start(r#""{\"query\":\"{ a }\"}""#), "another type"),
            (start(r#"{"data":"{ a }"}"#), "does not have"),
            (start(r#"{"query":"{ a }","query":"{ b }"}"#), "twice"),
            (start(r#"{"query":"{ a"}"#), "not GraphQL"),
            (start(r#"{"query":""}"#), "neither a document"),
            (format!(r#"{{"type":"ping","payload":"{}"}}"#, "x".repeat(1000)), "more than 1000"),
        ] {
            let error = said(&message).expect_err(&message);
            assert!(error.contains(why), "{message}: {error}");
        }
        let binary = read("WEBSOCKET_BINARY", br#"{"type":"ping"}"#, 1000).graphql.expect("read");
        assert_eq!(binary.error.as_deref(), Some("a binary message"));
    }
}

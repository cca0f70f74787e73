//! A pod in which every field of the API's types has a value, made from the types themselves: a
//! field that a later version of the types adds is in it without anybody remembering.

use k8s_openapi::api::core::v1::Pod;
use serde::de::value::StrDeserializer;
use serde::de::{self, DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize as _, forward_to_deserialize_any};
use serde_json::{Value, json};

/// Answers every question of a type with something.
#[derive(Clone, Copy)]
struct Anything {
    /// What texts are.
    text: &'static str,
}

type Error = serde_json::Error;

impl<'de> Deserializer<'de> for Anything {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_str(self.text)
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_bool(true)
    }

    fn deserialize_i32<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_i32(1)
    }

    fn deserialize_i64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_i64(1)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_some(self)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_seq(Once(Some(self)))
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_map(Fields { kind: "", names: &["x"], value: self })
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        visitor: V,
    ) -> Result<V::Value, Error> {
        let text = match name {
            "Time" | "MicroTime" => "2026-01-01T00:00:00Z",
            "Quantity" => "1",
            _ => self.text,
        };
        visitor.visit_newtype_struct(Self { text })
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        kind: &'static str,
        names: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        visitor.visit_map(Fields { kind, names, value: self })
    }

    forward_to_deserialize_any! {
        i8 i16 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit unit_struct
        tuple tuple_struct enum identifier ignored_any
    }
}

struct Once(Option<Anything>);

impl<'de> SeqAccess<'de> for Once {
    type Error = Error;

    fn next_element_seed<T: DeserializeSeed<'de>>(
        &mut self,
        seed: T,
    ) -> Result<Option<T::Value>, Error> {
        self.0.take().map(|value| seed.deserialize(value)).transpose()
    }
}

/// The fields of a type, each once.
struct Fields {
    kind: &'static str,
    names: &'static [&'static str],
    value: Anything,
}

impl<'de> MapAccess<'de> for Fields {
    type Error = Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, Error> {
        let name = self.names.first();
        name.map(|name| seed.deserialize(StrDeserializer::<Error>::new(name))).transpose()
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Error> {
        let (name, rest) = self.names.split_first().ok_or_else(|| de::Error::custom("no key"))?;
        self.names = rest;
        let text = match (self.kind, *name) {
            ("Pod", "apiVersion") => "v1",
            ("Pod", "kind") => "Pod",
            _ => self.value.text,
        };
        seed.deserialize(Anything { text })
    }
}

/// Every field of the types, but for what makes a pod one that cannot be fenced.
pub(super) fn pod() -> Value {
    let typed = Pod::deserialize(Anything { text: "x" }).expect("the types take everything");
    let debug = format!("{typed:?}");
    assert!(!debug.contains("None"), "a field is empty: {debug}");
    let mut pod = serde_json::to_value(typed).expect("JSON");
    for (pointer, value) in [
        ("/spec/hostNetwork", json!(false)),
        ("/spec/hostPID", json!(false)),
        ("/spec/hostIPC", json!(false)),
        ("/spec/securityContext/windowsOptions", json!({})),
        ("/spec/securityContext/supplementalGroupsPolicy", json!("Merge")),
        ("/spec/containers/0/securityContext/windowsOptions", json!({})),
        ("/spec/containers/0/securityContext/privileged", json!(false)),
        ("/spec/initContainers/0/name", json!("init")),
        ("/spec/ephemeralContainers/0/name", json!("debugger")),
    ] {
        *pod.pointer_mut(pointer).unwrap_or_else(|| panic!("{pointer}")) = value;
    }
    pod
}

#[test]
fn it_has_the_newest_fields() {
    let pod = pod();
    for pointer in [
        "/spec/volumes/0/image/reference",
        "/spec/volumes/0/ephemeral/volumeClaimTemplate/spec/resources/requests/x",
        "/spec/containers/0/restartPolicyRules/0/exitCodes/values",
        "/spec/containers/0/lifecycle/stopSignal",
        "/spec/containers/0/volumeMounts/0/recursiveReadOnly",
        "/spec/hostnameOverride",
        "/status/containerStatuses/0/user/linux/supplementalGroups",
        "/metadata/managedFields/0/fieldsV1",
    ] {
        assert!(pod.pointer(pointer).is_some(), "{pointer}");
    }
}

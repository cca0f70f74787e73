//! Manifests and image configurations, read so that a container runtime cannot see in them what we
//! do not.

use std::fmt;

use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::Value;

use super::Config;

/// Fields of manifests and indices on which the choice of an image depends.
const FIELDS: &[&str] = &[
    "schemaVersion",
    "mediaType",
    "manifests",
    "config",
    "layers",
    "digest",
    "data",
    "platform",
    "architecture",
    "os",
    "variant",
    "os.version",
    "os.features",
    "annotations",
];

/// Go's JSON decoder, and with it every container runtime, takes a name in any case (and these two
/// letters) for the field.
fn fold(name: &str) -> String {
    name.replace('\u{17f}', "s").replace('\u{212a}', "k").to_lowercase()
}

/// A manifest or index that says each thing once and as it is spelt: we and the runtime read the
/// same in it.
pub(super) struct Plain;

impl<'de> Deserialize<'de> for Plain {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Look;
        impl<'de> Visitor<'de> for Look {
            type Value = Plain;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a manifest")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Plain, A::Error> {
                let mut seen = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    let folded = fold(&name);
                    if let Some(field) = FIELDS.iter().find(|field| fold(field) == folded) {
                        if *field != name || seen.contains(field) {
                            return Err(serde::de::Error::custom("a field is ambiguous"));
                        }
                        seen.push(field);
                    }
                    if name == "annotations" {
                        map.next_value::<IgnoredAny>()?;
                    } else {
                        map.next_value::<Plain>()?;
                    }
                }
                Ok(Plain)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Plain, A::Error> {
                while seq.next_element::<Plain>()?.is_some() {}
                Ok(Plain)
            }

            fn visit_bool<E>(self, _: bool) -> Result<Plain, E> {
                Ok(Plain)
            }

            fn visit_i64<E>(self, _: i64) -> Result<Plain, E> {
                Ok(Plain)
            }

            fn visit_u64<E>(self, _: u64) -> Result<Plain, E> {
                Ok(Plain)
            }

            fn visit_f64<E>(self, _: f64) -> Result<Plain, E> {
                Ok(Plain)
            }

            fn visit_str<E>(self, _: &str) -> Result<Plain, E> {
                Ok(Plain)
            }

            fn visit_unit<E>(self) -> Result<Plain, E> {
                Ok(Plain)
            }
        }
        deserializer.deserialize_any(Look)
    }
}

/// The members of an object, every one of a repeated name.
struct Members(Vec<(String, Value)>);

impl<'de> Deserialize<'de> for Members {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Collect;
        impl<'de> Visitor<'de> for Collect {
            type Value = Members;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Members, A::Error> {
                let mut members = Vec::new();
                while let Some(member) = map.next_entry()? {
                    members.push(member);
                }
                Ok(Members(members))
            }
        }
        deserializer.deserialize_map(Collect)
    }
}

impl Members {
    /// The member of that name, unless it is null.
    ///
    /// Container runtimes read `VOLUMES` as `Volumes`, and add up what is said twice. An image that makes use of it would have a volume which we do not see.
    fn only(&self, name: &str) -> Result<Option<&Value>, &'static str> {
        let wanted = fold(name);
        let mut alike = self.0.iter().filter(|(key, _)| fold(key) == wanted);
        match (alike.next(), alike.next()) {
            (None, _) => Ok(None),
            (Some((key, value)), None) if key == name => {
                Ok(Some(value).filter(|value| !value.is_null()))
            }
            _ => Err("its configuration has a field twice or in another spelling"),
        }
    }

    fn words(&self, name: &str) -> Result<Vec<String>, &'static str> {
        let words = match self.only(name)? {
            None => Some(Vec::new()),
            Some(Value::Array(list)) => {
                list.iter().map(|word| word.as_str().map(str::to_owned)).collect()
            }
            Some(_) => None,
        };
        words.ok_or(NO_IMAGE)
    }

    fn text(&self, name: &str) -> Result<String, &'static str> {
        Ok(self.only(name)?.and_then(Value::as_str).unwrap_or_default().to_owned())
    }
}

pub(super) const NO_IMAGE: &str = "the registry holds an artifact there, not a container image";

/// An image configuration with `config` read member by member.
#[derive(serde::Deserialize)]
struct Document {
    config: Members,
}

impl Document {
    fn read(bytes: &[u8]) -> Result<Self, &'static str> {
        let outer: Members = serde_json::from_slice(bytes).map_err(|_| NO_IMAGE)?;
        // Every image configuration has `rootfs`; other artifacts have `{}` or something else.
        outer.only("rootfs")?.and_then(Value::as_object).ok_or(NO_IMAGE)?;
        if outer.only("config")?.is_none() {
            return Ok(Self { config: Members(Vec::new()) });
        }
        // A `Value` has forgotten what was there twice, so the bytes are read once more.
        serde_json::from_slice(bytes).map_err(|_| NO_IMAGE)
    }
}

/// Reads the configuration of a container image; in words why it cannot.
pub(super) fn parse_config(bytes: &[u8]) -> Result<Config, &'static str> {
    let Document { config } = Document::read(bytes)?;
    let mut volumes: Vec<String> = match config.only("Volumes")? {
        None => Vec::new(),
        Some(Value::Object(paths)) => paths.keys().cloned().collect(),
        Some(_) => return Err(NO_IMAGE),
    };
    // The order says nothing, and variants for two architectures are compared.
    volumes.sort_unstable();
    Ok(Config {
        entrypoint: config.words("Entrypoint")?,
        cmd: config.words("Cmd")?,
        user: config.text("User")?,
        working_dir: config.text("WorkingDir")?,
        env: config.words("Env")?,
        volumes,
        digest: None,
    })
}

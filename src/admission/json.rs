//! Reading and editing `Value`s the way the API server means them: null is absent.
//!
//! A review holds JSON that a typed encoder wrote, but `ringfence inject` reads what people write,
//! so a field of another type is a refusal and never a panic.

use serde_json::{Map, Value};

use super::{Class, Refusal};

/// Fields that are compared one by one. Nearly all objects of a pod have fewer, and are asked often:
/// a hash of the name takes longer than that.
const FEW: usize = 12;

/// A field of an object, also one that is null.
pub(super) fn member<'a>(value: &'a Value, name: &str) -> Option<&'a Value> {
    let map = value.as_object()?;
    if map.len() > FEW {
        return map.get(name);
    }
    map.iter().find_map(|(key, value)| (key == name).then_some(value))
}

/// A field, unless it is absent or null.
pub(super) fn field<'a>(value: &'a Value, name: &str) -> Option<&'a Value> {
    member(value, name).filter(|value| !value.is_null())
}

/// A field by a path of names.
pub(super) fn at<'a>(value: &'a Value, path: &[&str]) -> Option<&'a Value> {
    path.iter().try_fold(value, |value, name| field(value, name))
}

/// A list field; absent is empty.
pub(super) fn list<'a>(value: &'a Value, name: &str) -> &'a [Value] {
    member(value, name).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

/// The lists of a pod's spec whose containers can be fenced.
pub(super) const CONTAINERS: [&str; 2] = ["containers", "initContainers"];

/// The regular containers of a pod, then its init containers.
pub(super) fn containers(pod: &Value) -> impl Iterator<Item = &Value> {
    let spec = field(pod, "spec").unwrap_or(&Value::Null);
    CONTAINERS.into_iter().flat_map(|name| list(spec, name))
}

/// A string field.
pub(super) fn text<'a>(value: &'a Value, name: &str) -> Option<&'a str> {
    member(value, name).and_then(Value::as_str)
}

/// A string field that is not empty.
pub(super) fn word<'a>(value: &'a Value, name: &str) -> Option<&'a str> {
    text(value, name).filter(|text| !text.is_empty())
}

/// Whether a field is `true`.
pub(super) fn yes(value: &Value, path: &[&str]) -> bool {
    at(value, path).and_then(Value::as_bool) == Some(true)
}

/// The strings of a list field.
///
/// # Errors
/// A list that holds something else.
pub(super) fn words(value: &Value, name: &str) -> Result<Vec<String>, Refusal> {
    let Some(found) = field(value, name) else {
        return Ok(Vec::new());
    };
    let found = found.as_array().ok_or_else(|| malformed(name, "a list"))?;
    found
        .iter()
        .map(|word| word.as_str().map(str::to_owned))
        .collect::<Option<_>>()
        .ok_or_else(|| malformed(name, "a list of strings"))
}

/// The object itself.
///
/// # Errors
/// It is something else.
pub(super) fn object<'a>(
    value: &'a mut Value,
    name: &str,
) -> Result<&'a mut Map<String, Value>, Refusal> {
    value.as_object_mut().ok_or_else(|| malformed(name, "an object"))
}

/// A field as an object, made where it is absent.
///
/// # Errors
/// It is something else.
pub(super) fn object_in<'a>(
    map: &'a mut Map<String, Value>,
    name: &str,
) -> Result<&'a mut Map<String, Value>, Refusal> {
    let slot = map.entry(name).or_insert(Value::Null);
    if slot.is_null() {
        *slot = Value::Object(Map::new());
    }
    object(slot, name)
}

/// A field as a list, made where it is absent.
///
/// # Errors
/// It is something else.
pub(super) fn list_in<'a>(
    map: &'a mut Map<String, Value>,
    name: &str,
) -> Result<&'a mut Vec<Value>, Refusal> {
    let slot = map.entry(name).or_insert(Value::Null);
    if slot.is_null() {
        *slot = Value::Array(Vec::new());
    }
    slot.as_array_mut().ok_or_else(|| malformed(name, "a list"))
}

/// Sets a field; one that already has the value stays as it is.
pub(super) fn set(map: &mut Map<String, Value>, name: &str, value: Value) {
    if map.get(name) != Some(&value) {
        map.insert(name.to_owned(), value);
    }
}

/// Takes a field away; null counts as absent and stays.
pub(super) fn unset(map: &mut Map<String, Value>, name: &str) {
    if map.get(name).is_some_and(|value| !value.is_null()) {
        map.shift_remove(name);
    }
}

/// Puts elements of ours into a list: what `is_ours` and is not wanted goes, what is wanted
/// replaces the element with the same key in place, the rest is appended. Foreign elements keep
/// their order, and so do ours that were there: a second pass changes nothing.
pub(super) fn upsert(
    list: &mut Vec<Value>,
    wanted: Vec<Value>,
    is_ours: impl Fn(&Value) -> bool,
    same: impl Fn(&Value, &Value) -> bool,
) {
    let mut wanted: Vec<Option<Value>> = wanted.into_iter().map(Some).collect();
    list.retain_mut(|element| {
        if !is_ours(element) {
            return true;
        }
        let slot = wanted.iter_mut().find(|slot| slot.as_ref().is_some_and(|w| same(w, element)));
        let Some(value) = slot.and_then(Option::take) else {
            return false;
        };
        if *element != value {
            *element = value;
        }
        true
    });
    list.extend(wanted.into_iter().flatten());
}

/// The refusal for a field of another type.
pub(super) fn malformed(name: &str, expected: &str) -> Refusal {
    Refusal::new(Class::Malformed, format!("the pod's field {name} is not {expected}"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn null_is_absent() {
        let value = json!({"a": null, "b": {"c": null}});
        assert_eq!(field(&value, "a"), None);
        assert_eq!(at(&value, &["b", "c"]), None);
        assert_eq!(words(&value, "a").unwrap(), Vec::<String>::new());
        let mut value = value;
        list_in(object(&mut value, "pod").unwrap(), "a").unwrap().push(json!(1));
        assert_eq!(value["a"], json!([1]));
    }

    #[test]
    fn another_type_is_a_refusal() {
        let mut value = json!({"a": "x"});
        assert_eq!(words(&value, "a").unwrap_err().class, Class::Malformed);
        let map = object(&mut value, "pod").unwrap();
        assert!(list_in(map, "a").is_err());
        assert!(object_in(map, "a").is_err());
    }

    #[test]
    fn upsert_keeps_positions() {
        let mut list =
            vec![json!({"name": "r1", "v": 1}), json!({"name": "x"}), json!({"name": "r2"})];
        upsert(
            &mut list,
            vec![json!({"name": "r3"}), json!({"name": "r1", "v": 2})],
            |element| element["name"].as_str().unwrap().starts_with('r'),
            |a, b| a["name"] == b["name"],
        );
        assert_eq!(
            list,
            [json!({"name": "r1", "v": 2}), json!({"name": "x"}), json!({"name": "r3"})]
        );
    }
}

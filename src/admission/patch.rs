//! The difference of two documents as JSON Patch operations (RFC 6902).
//!
//! Lists of objects are compared by what identifies an element (a mount's path, else a name), so
//! that an element put in front is one `add` and never a list written anew: another webhook's
//! elements are not repeated, and a field that this version does not know is never touched.

use json_patch::jsonptr::PointerBuf;
use json_patch::{AddOperation, MoveOperation, Patch, PatchOperation};
use json_patch::{RemoveOperation, ReplaceOperation};
use serde_json::Value;

/// How many elements of one list are looked at in search of one that is not where it was expected.
/// Each search is linear and the list comes from a stranger; past this it is written as a whole.
const LOOKS: usize = 1 << 20;

/// Where one is in a document. On the stack, and written out only where something differs: most of a
/// pod does not.
#[derive(Clone, Copy)]
enum Path<'a> {
    Root,
    Key(&'a Path<'a>, &'a str),
    Index(&'a Path<'a>, usize),
}

impl Path<'_> {
    fn pointer(&self) -> PointerBuf {
        let mut pointer = match self {
            Path::Root => return PointerBuf::new(),
            Path::Key(parent, _) | Path::Index(parent, _) => parent.pointer(),
        };
        match self {
            Path::Root => {}
            Path::Key(_, key) => pointer.push_back(*key),
            Path::Index(_, index) => pointer.push_back(*index),
        }
        pointer
    }
}

/// Operations that make `to` out of `from`. Parents come before what they hold.
pub(super) fn diff(from: &Value, to: &Value) -> Patch {
    let mut ops = Vec::new();
    walk(&mut ops, &Path::Root, from, to);
    Patch(ops)
}

/// Whether two documents are the same. As `==`, without a search for each key where both have the same
/// in the same order.
pub(super) fn same(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Object(a), Value::Object(b)) if a.len() == b.len() && a.keys().eq(b.keys()) => {
            a.values().zip(b.values()).all(|(a, b)| same(a, b))
        }
        (Value::Array(a), Value::Array(b)) => {
            a.len() == b.len() && a.iter().zip(b).all(|(a, b)| same(a, b))
        }
        _ => a == b,
    }
}

/// Containers are walked without being compared first: a tree is read once, not once a level.
fn walk(ops: &mut Vec<PatchOperation>, path: &Path<'_>, from: &Value, to: &Value) {
    match (from, to) {
        (Value::Object(from), Value::Object(to)) => {
            // Most objects are as they were, and the same keys in the same order need no search.
            if from.len() == to.len() && from.keys().eq(to.keys()) {
                for ((key, value), wanted) in from.iter().zip(to.values()) {
                    walk(ops, &Path::Key(path, key), value, wanted);
                }
                return;
            }
            for (key, value) in from {
                let path = Path::Key(path, key);
                match to.get(key) {
                    Some(wanted) => walk(ops, &path, value, wanted),
                    None => ops.push(remove(&path)),
                }
            }
            for (key, value) in to {
                if !from.contains_key(key) {
                    ops.push(add(&Path::Key(path, key), value));
                }
            }
        }
        (Value::Array(old), Value::Array(new)) if is_keyed(old) && is_keyed(new) => {
            let before = ops.len();
            if !align(ops, path, old, new) {
                ops.truncate(before);
                ops.push(replace(path, to));
            }
        }
        _ if from == to => {}
        _ => ops.push(replace(path, to)),
    }
}

/// Whether every element is an object: lists of words are values, not collections.
fn is_keyed(list: &[Value]) -> bool {
    list.iter().all(Value::is_object)
}

/// An element of a list, equal to another that is identified by the same word.
#[derive(Clone, Copy)]
struct Element<'a> {
    key: Option<&'a str>,
    value: &'a Value,
}

impl<'a> Element<'a> {
    fn of(value: &'a Value) -> Self {
        // One pass over a small object, not three searches: lists of variables are long.
        let keys = ["mountPath", "devicePath", "name"];
        let fields = value.as_object().into_iter().flatten();
        let rank = |(name, field): (&String, &'a Value)| {
            Some((keys.iter().position(|key| key == name)?, field.as_str()?))
        };
        Self { key: fields.filter_map(rank).min().map(|(_, key)| key), value }
    }
}

impl PartialEq for Element<'_> {
    fn eq(&self, other: &Self) -> bool {
        match (self.key, other.key) {
            (Some(a), Some(b)) => a == b,
            (None, None) => self.value == other.value,
            _ => false,
        }
    }
}

/// Turns one list into another. False where that takes too many searches.
fn align(ops: &mut Vec<PatchOperation>, path: &Path<'_>, old: &[Value], new: &[Value]) -> bool {
    let mut work: Vec<Element<'_>> = old.iter().map(Element::of).collect();
    let new: Vec<Element<'_>> = new.iter().map(Element::of).collect();
    let mut looks = 0;
    for (index, wanted) in new.iter().enumerate() {
        while work.get(index).is_none_or(|there| there != wanted) {
            let Some(there) = work.get(index) else {
                ops.push(add(&Path::Index(path, index), wanted.value));
                work.push(*wanted);
                continue;
            };
            looks += new.len() + work.len() - 2 * index;
            if looks > LOOKS {
                return false;
            }
            if !new[index..].contains(there) {
                ops.push(remove(&Path::Index(path, index)));
                work.remove(index);
            } else if let Some(offset) = work[index..].iter().position(|w| w == wanted) {
                let from = index + offset;
                ops.push(PatchOperation::Move(MoveOperation {
                    from: Path::Index(path, from).pointer(),
                    path: Path::Index(path, index).pointer(),
                }));
                let moved = work.remove(from);
                work.insert(index, moved);
            } else {
                ops.push(add(&Path::Index(path, index), wanted.value));
                work.insert(index, *wanted);
            }
        }
        walk(ops, &Path::Index(path, index), work[index].value, wanted.value);
    }
    for index in (new.len()..work.len()).rev() {
        ops.push(remove(&Path::Index(path, index)));
    }
    true
}

fn add(path: &Path<'_>, value: &Value) -> PatchOperation {
    PatchOperation::Add(AddOperation { path: path.pointer(), value: value.clone() })
}

fn replace(path: &Path<'_>, value: &Value) -> PatchOperation {
    PatchOperation::Replace(ReplaceOperation { path: path.pointer(), value: value.clone() })
}

fn remove(path: &Path<'_>) -> PatchOperation {
    PatchOperation::Remove(RemoveOperation { path: path.pointer() })
}

#[cfg(test)]
mod tests {
    use json_patch::patch;
    use proptest::prelude::*;
    use serde_json::{Map, json};

    use super::*;

    fn ops(from: &Value, to: &Value) -> Value {
        let made = diff(from, to);
        let mut applied = from.clone();
        patch(&mut applied, &made).unwrap();
        assert_eq!(&applied, to);
        serde_json::to_value(made).unwrap()
    }

    #[test]
    fn nothing_to_do_is_no_operation() {
        let pod = json!({"spec": {"containers": [{"name": "a", "env": null}]}});
        assert_eq!(ops(&pod, &pod), json!([]));
    }

    #[test]
    fn an_element_in_front_is_one_add() {
        let from = json!([{"name": "a", "value": "1"}, {"name": "b", "value": "2"}]);
        let to = json!([{"name": "IP"}, {"name": "a", "value": "1"}, {"name": "b", "value": "3"}]);
        assert_eq!(
            ops(&from, &to),
            json!([
                {"op": "add", "path": "/0", "value": {"name": "IP"}},
                {"op": "replace", "path": "/2/value", "value": "3"},
            ])
        );
    }

    #[test]
    fn the_order_of_keys_is_no_difference() {
        let text = |text: &str| serde_json::from_str::<Value>(text).unwrap();
        let (a, b) = (text(r#"{"a": [{"x": 1, "y": 2}]}"#), text(r#"{"a": [{"y": 2, "x": 1}]}"#));
        assert!(same(&a, &b) && ops(&a, &b) == json!([]));
        for other in
            [r#"{"a": [{"x": 1}]}"#, r#"{"a": [{"x": 1, "y": 3}]}"#, r#"{"a": []}"#, "null"]
        {
            assert!(!same(&a, &text(other)) && !same(&text(other), &a), "{other}");
        }
    }

    #[test]
    fn a_missing_parent_comes_whole() {
        let to = json!({"spec": {"volumes": [{"name": "x"}]}});
        assert_eq!(
            ops(&json!({}), &to),
            json!([{"op": "add", "path": "/spec", "value": {"volumes": [{"name": "x"}]}}])
        );
        assert_eq!(ops(&json!({"spec": null}), &to)[0]["op"], json!("replace"));
    }

    #[test]
    fn keys_are_escaped() {
        let made = ops(&json!({"a": {}}), &json!({"a": {"ringfence.dev/s~t": "1"}}));
        assert_eq!(made[0]["path"], json!("/a/ringfence.dev~1s~0t"));
    }

    #[test]
    fn moved_elements_are_moved() {
        let (a, b, c) = (json!({"name": "a"}), json!({"name": "b"}), json!({"name": "c"}));
        let made = ops(&json!([a, b, c]), &json!([c, a, b]));
        assert_eq!(made, json!([{"op": "move", "from": "/2", "path": "/0"}]));
    }

    #[test]
    fn words_are_a_value() {
        let made = ops(&json!({"command": ["a"]}), &json!({"command": ["s", "a"]}));
        assert_eq!(made[0]["op"], json!("replace"));
    }

    #[test]
    fn a_hostile_order_stays_bounded() {
        let forth: Vec<_> = (0..20_000).map(|n| json!({"name": n.to_string()})).collect();
        let back: Vec<_> = forth.iter().rev().cloned().collect();
        assert_eq!(ops(&Value::Array(forth), &Value::Array(back)).as_array().unwrap().len(), 1);
    }

    fn tree() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            "[ab~/$]{0,2}".prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 32, 5, |inner| {
            let map = prop::collection::vec(("[ab~/]{0,2}|name|mountPath", inner.clone()), 0..4)
                .prop_map(|pairs| Value::Object(pairs.into_iter().collect::<Map<_, _>>()));
            prop_oneof![prop::collection::vec(inner, 0..5).prop_map(Value::Array), map]
        })
    }

    proptest! {
        #[test]
        fn applied_it_is_the_target(from in tree(), to in tree()) {
            let mut applied = from.clone();
            patch(&mut applied, &diff(&from, &to)).unwrap();
            prop_assert_eq!(applied, to);
        }
    }
}

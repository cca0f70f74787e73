//! UPDATE: nothing of a pod's shape may change any more, so what is ours is taken from the old
//! object. A manifest that is applied again brings the original command back into the request;
//! without this the API server answers that pod updates may not change fields.

use serde_json::{Map, Value, json};

use super::command::{Original, entered};
use super::inject::{Outcome, finish};
use super::json::{at, field, list, list_in, object, object_in, set, text, unset, upsert, words};
use super::namespace::{INJECT, STATUS};
use super::notes::Notes;
use super::{
    Namespace, Refusal, Settings, env, fenced_containers, install, mounts, probes, security,
};

/// Puts back what an earlier pass injected, exactly as it is in `old`.
///
/// A pod that was created before its namespace had the label is not touched, and no update is
/// ever refused: a pod whose finalizers cannot be removed cannot be deleted. Where the request
/// changes something of its own, that stays, and the API server says what it thinks of it.
#[must_use]
pub fn restore(old: &Value, pod: &Value, ns: &Namespace, settings: &Settings) -> Outcome {
    if !ns.labels.contains_key(INJECT) || fenced_containers(old).is_empty() {
        return Outcome::Untouched;
    }
    match rebuild(old, pod, settings) {
        Ok(target) => finish(pod, &target, Notes::default()),
        // Not the shape of a pod: the API server refuses it with a better message.
        Err(_) => Outcome::Untouched,
    }
}

fn rebuild(old: &Value, pod: &Value, settings: &Settings) -> Result<Value, Refusal> {
    let mut target = pod.clone();
    let old_spec = field(old, "spec").unwrap_or(&Value::Null);
    let spec = object_in(object(&mut target, "pod")?, "spec")?;
    for container in list_in(spec, "containers")? {
        let old = list(old_spec, "containers").iter().find(|old| {
            text(old, "name") == text(container, "name")
                && Original::of(old).is_ok_and(|original| original.injected)
        });
        if let Some(old) = old {
            restore_container(object(container, "containers")?, old, settings)?;
        }
    }
    restore_list(spec, old_spec, "volumes", mounts::is_our_volume)?;
    let is_install = |container: &Value| text(container, "name") == Some(install::NAME);
    if list(old_spec, "initContainers").iter().any(is_install) {
        restore_list(spec, old_spec, "initContainers", is_install)?;
    }
    let unconfined = json!({"type": "Unconfined"});
    if at(old_spec, &["securityContext", "seccompProfile"]) == Some(&unconfined) {
        set(
            object_in(spec, "securityContext")?,
            "seccompProfile",
            unconfined,
        );
    }
    if let Some(status) = at(old, &["metadata", "annotations", STATUS]) {
        let metadata = object_in(object(&mut target, "pod")?, "metadata")?;
        set(object_in(metadata, "annotations")?, STATUS, status.clone());
    }
    Ok(target)
}

fn restore_container(
    container: &mut Map<String, Value>,
    old: &Value,
    settings: &Settings,
) -> Result<(), Refusal> {
    let command = container.get("command").cloned().unwrap_or_default();
    let command = words(&json!({"command": command}), "command")?;
    let is_original = command.is_empty() || Original::of(old)?.command.as_ref() == Some(&command);
    if let Some(ours) = field(old, "command").filter(|_| is_original) {
        set(container, "command", ours.clone());
    }
    let context = object_in(container, "securityContext")?;
    for name in security::FIELDS {
        match at(old, &["securityContext", name]) {
            Some(value) => set(context, name, value.clone()),
            None => unset(context, name),
        }
    }
    for path in probes::EXECS {
        let Some(exec) = probes::exec_mut(container, path) else {
            continue;
        };
        let Some(before) = at(old, path).and_then(|handler| field(handler, "exec")) else {
            continue;
        };
        let wrapped = words(before, "command")?;
        if entered(&wrapped) == Some(words(exec, "command")?.as_slice()) {
            exec["command"] = json!(wrapped);
        }
    }
    if let Some(entries) = container.get_mut("env").and_then(Value::as_array_mut) {
        env::rewrite_urls(entries, settings);
    }
    restore_list(container, old, "env", env::is_ours)?;
    restore_list(container, old, "volumeMounts", mounts::is_ours)
}

/// Gives a list back its elements of ours. Where the foreign ones are the same as before, in
/// whatever order a merge left them, the old order comes back too: it is as immutable as the rest.
fn restore_list(
    holder: &mut Map<String, Value>,
    old: &Value,
    name: &str,
    is_ours: impl Fn(&Value) -> bool,
) -> Result<(), Refusal> {
    let old = list(old, name);
    if old.is_empty() {
        return Ok(());
    }
    let new = list_in(holder, name)?;
    let foreign = |list: &[Value]| {
        let mut texts: Vec<String> = list
            .iter()
            .filter(|element| !is_ours(element))
            .map(Value::to_string)
            .collect();
        texts.sort_unstable();
        texts
    };
    if foreign(new) == foreign(old) {
        if new != old {
            *new = old.to_vec();
        }
        return Ok(());
    }
    let wanted = old
        .iter()
        .filter(|element| is_ours(element))
        .cloned()
        .collect();
    upsert(new, wanted, &is_ours, |a, b| {
        text(a, "name") == text(b, "name")
    });
    Ok(())
}

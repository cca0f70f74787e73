//! UPDATE: nothing of a pod's shape may change any more, so what is ours is taken from the old
//! object. A manifest that is applied again brings the original command back into the request;
//! without this the API server answers that pod updates may not change fields.

use serde_json::{Map, Value, json};

use super::command::{Original, entered};
use super::inject::{Outcome, finish};
use super::json::{CONTAINERS, at, containers, field, list, list_in, object, object_in, set};
use super::json::{text, unset, upsert, words};
use super::namespace::{INJECT, STATUS};
use super::notes::Notes;
use super::pin::is_pinned_from;
use super::supervisor_path;
use super::{
    Class, Namespace, Refusal, env, fenced_containers, install, mounts, probes, pull_secret,
    security,
};

/// Puts back what an earlier pass injected, exactly as it is in `old`.
///
/// Of the namespace only the label's key counts. A pod that was created before its namespace had
/// it is not touched, and no update is refused but one that gives a fenced container another
/// image: a pod whose finalizers cannot be removed cannot be deleted. Where the request changes
/// something of its own, that stays, and the API server says what it thinks of it.
#[must_use]
pub fn restore(old: &Value, pod: &Value, ns: &Namespace) -> Outcome {
    if !ns.labels.contains_key(INJECT) || fenced_containers(old).is_empty() {
        return Outcome::Untouched;
    }
    if let Some(refusal) = image_change(old, pod) {
        return Outcome::Refuse(refusal);
    }
    match rebuild(old, pod) {
        Ok(target) => finish(pod, &target, Notes::default()),
        // Not the shape of a pod: the API server refuses it with a better message.
        Err(_) => Outcome::Untouched,
    }
}

/// The refusal of an update that gives a fenced container another image, the one thing of it that
/// Kubernetes lets change: the binary's place was chosen by the VOLUMEs of the old one.
pub(super) fn image_change(old: &Value, pod: &Value) -> Option<Refusal> {
    let fenced = fenced_containers(old);
    let named =
        |name: &str, pod| containers(pod).find(|container| text(container, "name") == Some(name));
    fenced.iter().find_map(|name| {
        let (old, new) = (named(name, old)?, named(name, pod)?);
        let (old, new) = (text(old, "image").unwrap_or_default(), text(new, "image")?);
        let what = format!(
            "container {name}: its image cannot become {new:?} in place (it is {old:?}), because it was fenced for that"
        );
        (old != new && !is_pinned_from(old, new)).then(|| Refusal::new(Class::ImageChange, what))
    })
}

fn rebuild(old: &Value, pod: &Value) -> Result<Value, Refusal> {
    let mut target = pod.clone();
    let old_spec = field(old, "spec").unwrap_or(&Value::Null);
    let spec = object_in(object(&mut target, "pod")?, "spec")?;
    for name in CONTAINERS {
        // Not made where there is none.
        let Some(Value::Array(containers)) = spec.get_mut(name) else { continue };
        for container in containers {
            let old = list(old_spec, name).iter().find(|old| {
                text(old, "name") == text(container, "name")
                    && Original::of(old).is_ok_and(|original| original.injected)
            });
            if let Some(old) = old {
                restore_container(object(container, name)?, old)?;
            }
        }
    }
    restore_list(spec, old_spec, "volumes", mounts::is_our_volume)?;
    let is_install = |container: &Value| text(container, "name") == Some(install::NAME);
    if let Some(at) = list(old_spec, "initContainers").iter().position(is_install) {
        let containers = list_in(spec, "initContainers")?;
        if !containers.iter().any(is_install) {
            let install = list(old_spec, "initContainers")[at].clone();
            containers.insert(at.min(containers.len()), install);
        }
        restore_list(spec, old_spec, "initContainers", is_install)?;
    }
    restore_list(spec, old_spec, "imagePullSecrets", pull_secret::of(old))?;
    let unconfined = json!({"type": "Unconfined"});
    if at(old_spec, &["securityContext", "seccompProfile"]) == Some(&unconfined) {
        set(object_in(spec, "securityContext")?, "seccompProfile", unconfined);
    }
    if let Some(status) = at(old, &["metadata", "annotations", STATUS]) {
        let metadata = object_in(object(&mut target, "pod")?, "metadata")?;
        set(object_in(metadata, "annotations")?, STATUS, status.clone());
    }
    Ok(target)
}

fn restore_container(container: &mut Map<String, Value>, old: &Value) -> Result<(), Refusal> {
    let command = container.get("command").cloned().unwrap_or_default();
    let command = words(&json!({"command": command}), "command")?;
    // In the other shape the command is the container's own.
    let is_original = supervisor_path(old).is_some()
        && (command.is_empty() || Original::of(old)?.command.as_ref() == Some(&command));
    if let Some(ours) = field(old, "command").filter(|_| is_original) {
        set(container, "command", ours.clone());
    }
    let pinned = text(old, "image").unwrap_or_default();
    let named = container.get("image").and_then(Value::as_str);
    if named.is_some_and(|named| is_pinned_from(pinned, named)) {
        set(container, "image", json!(pinned));
    }
    let is_set = |context: Option<&Value>| context.is_some_and(|context| !context.is_null());
    // An empty one is not the same to the API server as none.
    if is_set(old.get("securityContext")) || is_set(container.get("securityContext")) {
        let context = object_in(container, "securityContext")?;
        for name in security::FIELDS {
            match at(old, &["securityContext", name]) {
                Some(value) => set(context, name, value.clone()),
                None => unset(context, name),
            }
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
        env::restore_urls(entries, list(old, "env"));
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
        // As texts, but for the order of keys: what was restored in an element may have another.
        let text = |element: &Value| {
            let mut element = element.clone();
            element.sort_all_objects();
            element.to_string()
        };
        let mut texts: Vec<String> =
            list.iter().filter(|element| !is_ours(element)).map(text).collect();
        texts.sort_unstable();
        texts
    };
    if foreign(new) == foreign(old) {
        if new != old {
            *new = old.to_vec();
        }
        return Ok(());
    }
    let wanted = old.iter().filter(|element| is_ours(element)).cloned().collect();
    upsert(new, wanted, &is_ours, |a, b| text(a, "name") == text(b, "name"));
    Ok(())
}

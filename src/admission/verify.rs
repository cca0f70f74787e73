//! What the validating webhook asks: is the pod that is about to be stored the one that
//! [`super::inject()`] makes of it, and does an update leave that so.
//!
//! No marker is believed where the pod's author is not. On CREATE the function runs once more over
//! the final pod and must find nothing to do. So whatever another webhook changes after ours is legal
//! exactly when the function does not mind it: see "Other webhooks" in `docs/admission.md`, and "Two
//! versions" there for what the mutating half of another version made.

use std::collections::BTreeMap;

use serde_json::Value;

use super::json::{CONTAINERS, containers, field, list, text};
use super::namespace::{INJECT, Wishes};
use super::plan::plan;
use super::shape::{self, Shape};
use super::stamp::Stamp;
use super::{
    Class, ImageConfig, Mode, Namespace, Outcome, PolicyRef, Refusal, Settings, fenced_containers,
    inject, mounts, restore,
};

/// Whether the final pod is what [`super::inject()`] makes of it: a second pass has nothing to
/// change. With `old` (UPDATE) it is [`verify_update`].
///
/// How the binary is delivered is taken from the pod: both ways are ours, and replicas of the
/// webhook may see the cluster's version change at different moments.
///
/// # Errors
/// The refusal of [`super::inject()`], or one that names the first path that differs.
pub fn verify(
    old: Option<&Value>,
    pod: &Value,
    ns: &Namespace,
    settings: &Settings,
    images: &BTreeMap<String, ImageConfig>,
    policy: &PolicyRef,
) -> Result<(), Refusal> {
    if let Some(old) = old {
        return verify_update(old, pod, ns);
    }
    let delivery = mounts::delivery(pod).unwrap_or(settings.delivery);
    let settings = Settings { delivery, ..settings.clone() };
    let difference = match inject(None, pod, ns, &settings, images, policy) {
        Outcome::Untouched => return Ok(()),
        Outcome::Inject(injection) => match injection.ops.first() {
            None => return Ok(()),
            Some(op) => differs(pod, op.path()),
        },
        // What these name may be ours: another version's volume, its mount, the other profile's
        // seccomp at the pod.
        Outcome::Refuse(refusal) if refusal.class.may_be_ours() => refusal,
        Outcome::Refuse(refusal) => return Err(refusal),
    };
    let policy = Wishes::read(pod, ns)?.refers_to(policy, &settings).into_owned();
    let own = Stamp::own(&settings, &policy);
    match Stamp::of(pod) {
        Some(other) if other != own => made_by(&other, pod, ns, &settings, difference),
        _ => Err(difference),
    }
}

fn differs(pod: &Value, path: impl std::fmt::Display) -> Refusal {
    if fenced_containers(pod).is_empty() {
        return Refusal::with_fix(
            Class::Unfixed,
            "no container of the pod is fenced: it did not pass the mutating webhook",
            "see that pods.ringfence.dev is installed and that no webhook after it takes the fence away",
        );
    }
    Refusal::new(Class::Unfixed, format!("{path} is not as injected"))
}

/// The verdict about a pod which says that another version of Ringfence made it, or this one with
/// other settings or another policy: the other replica of a roll-out.
///
/// Under `enabled` its word counts, as far as the guard goes. Its author is trusted, and the mutating
/// half writes the annotation anew in every pod. Under `strict` nothing is believed: should that half
/// ever not have run, the annotation would be the author's. The API server's clients ask again.
fn made_by(
    other: &Stamp,
    pod: &Value,
    ns: &Namespace,
    settings: &Settings,
    difference: Refusal,
) -> Result<(), Refusal> {
    if Mode::of(ns)? == Mode::Strict {
        let what = format!("the pod was fenced by {other}, and {}", difference.what());
        return Err(Refusal::new(Class::AnotherVersion, what));
    }
    let Some(plan) = plan(pod, ns, settings)? else { return Ok(()) };
    let fenced = plan.containers().all(match plan.wishes.shape {
        Shape::Entrypoint => mounts::starts_through_the_supervisor,
        Shape::Subprocess => shape::is_runner,
    });
    if fenced { Ok(()) } else { Err(difference) }
}

/// Whether an update leaves the fence as it is in the old object, whichever version and policy made
/// it, and brings no image into a container outside the fence that its namespace does not exempt.
///
/// # Errors
/// It does not.
pub fn verify_update(old: &Value, pod: &Value, ns: &Namespace) -> Result<(), Refusal> {
    if !ns.labels.contains_key(INJECT) {
        return Ok(());
    }
    match restore(old, pod, ns) {
        Outcome::Refuse(refusal) => return Err(refusal),
        Outcome::Untouched => {}
        // The annotation is for people, and proves nothing: labels and finalizers may come with it.
        Outcome::Inject(injection) => {
            let first = injection.ops.iter().find(|op| op.path().starts_with(&spec()));
            if let Some(op) = first {
                let what = format!("{} is not as injected", op.path());
                return Err(Refusal::new(Class::Unfixed, what));
            }
        }
    }
    let mut changed = changed_images(old, pod).peekable();
    if changed.peek().is_none() {
        return Ok(());
    }
    let (mode, wishes) = (Mode::of(ns)?, Wishes::read(pod, ns)?);
    let fenced = fenced_containers(old);
    for (list, container) in changed {
        let name = text(container, "name").unwrap_or_default();
        // The init container of ours is not spared: in a pod with a fence its image is as before, and
        // without one it is not ours, whatever its name.
        let judged = list == "containers" || mode == Mode::Strict;
        let is_fenced = fenced.iter().any(|fenced| fenced == name);
        if judged && !is_fenced && !wishes.exempts(container) {
            let image = text(container, "image").unwrap_or_default();
            return Err(Refusal::with_fix(
                Class::ImageChange,
                format!(
                    "container {name} is outside the fence, and the namespace does not exempt its new image {image:?}"
                ),
                "delete the pod and create it anew, fenced, or change ringfence.dev/unfenced-containers of the namespace",
            ));
        }
    }
    Ok(())
}

fn spec() -> json_patch::jsonptr::PointerBuf {
    json_patch::jsonptr::PointerBuf::from_tokens(["spec"])
}

/// Whether an update gives any container another image, the one thing of a running pod's containers
/// that Kubernetes lets change and that this is about.
#[must_use]
pub fn changes_image(old: &Value, pod: &Value) -> bool {
    changed_images(old, pod).next().is_some()
}

/// Containers whose image is another than before, with the name of their list.
fn changed_images<'a>(
    old: &'a Value,
    pod: &'a Value,
) -> impl Iterator<Item = (&'static str, &'a Value)> {
    let spec = field(pod, "spec").unwrap_or(&Value::Null);
    let all =
        CONTAINERS.into_iter().flat_map(|name| list(spec, name).iter().map(move |c| (name, c)));
    all.filter(|(_, container)| {
        let same = |old: &&Value| text(old, "name") == text(container, "name");
        containers(old).find(same).is_none_or(|old| text(old, "image") != text(container, "image"))
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn ns(label: &str, exempt: &str) -> Namespace {
        Namespace {
            name: "n".into(),
            labels: BTreeMap::from([(INJECT.into(), label.into())]),
            annotations: BTreeMap::from([(
                "ringfence.dev/unfenced-containers".into(),
                exempt.into(),
            )]),
            ..Namespace::default()
        }
    }

    fn pod(mcp: &str, init: &str) -> Value {
        json!({"metadata": {}, "spec": {
            "initContainers": [{"name": "init", "image": init}],
            "containers": [{"name": "mcp", "image": mcp}]}})
    }

    #[test]
    fn an_image_outside_the_fence_has_to_be_exempt_too() {
        let (old, exempt) = (pod("r/mcp:1", "r/i:1"), "mcp=r/mcp:*, init=r/i:*");
        let verdict = |label: &str, new: &Value| {
            verify_update(&old, new, &ns(label, exempt)).map_err(|refusal| refusal.class)
        };
        for label in ["enabled", "strict"] {
            assert_eq!(verdict(label, &pod("r/mcp:2", "r/i:1")), Ok(()));
            assert_eq!(verdict(label, &pod("r/evil:2", "r/i:1")), Err(Class::ImageChange));
            assert_eq!(verdict(label, &pod("r/mcp:1", "r/i:2")), Ok(()));
        }
        // Init containers are nobody's business under `enabled`.
        assert_eq!(verdict("enabled", &pod("r/mcp:1", "r/evil:1")), Ok(()));
        assert_eq!(verdict("strict", &pod("r/mcp:1", "r/evil:1")), Err(Class::ImageChange));
        // No name is a way around that.
        let named = |image: &str| {
            let mut pod = pod("r/mcp:1", image);
            pod["spec"]["initContainers"][0]["name"] = json!("ringfence-install");
            pod["spec"]["initContainers"][0]["restartPolicy"] = json!("Always");
            pod
        };
        let verdict_of = verify_update(&named("r/i:1"), &named("r/evil:1"), &ns("strict", exempt));
        assert_eq!(verdict_of.map_err(|refusal| refusal.class), Err(Class::ImageChange));
        // What changes no image passes whatever the namespace says.
        assert_eq!(verdict("nonsense", &old), Ok(()));
        assert_eq!(verdict("nonsense", &pod("x", "y")), Err(Class::Annotation));
        let unlabelled = Namespace { labels: BTreeMap::new(), ..ns("", "") };
        assert_eq!(verify_update(&old, &pod("x", "y"), &unlabelled), Ok(()));
    }

    #[test]
    fn only_another_image_is_a_changed_image() {
        let old = pod("a", "b");
        let mut new = old.clone();
        new["metadata"]["finalizers"] = json!([]);
        assert!(!changes_image(&old, &new));
        assert!(changes_image(&old, &pod("a", "c")) && changes_image(&old, &pod("c", "b")));
        assert!(!changes_image(&json!({}), &json!({"spec": {"containers": null}})));
    }
}

//! `kubectl exec` into a fenced container enters the fence: its command is run by the
//! supervisor's `enter`.
//!
//! The review carries only the options (container and command), so the pod is read live by the
//! caller. `kubectl cp` is an exec too; `attach` reaches the agent itself and needs nothing.

use json_patch::{AddOperation, Patch, PatchOperation};
use serde_json::{Value, json};

use super::command::entered;
use super::json::{containers, field, list, text};
use super::namespace::Wishes;
use super::own::Own;
use super::shape::is_runner;
use super::{Class, Mode, Namespace, Refusal, enter_prefix};

const EXEC: &str = "ringfence.dev/exec";

/// Whether the namespace lets `kubectl exec` into the bare container.
#[must_use]
pub fn is_outside(ns: &Namespace) -> bool {
    ns.annotations.get(EXEC).is_some_and(|value| value == "outside")
}

/// What to change in the options (a `PodExecOptions`) of an exec into `pod`. Nothing where the
/// container is not fenced or the command enters already.
///
/// # Errors
/// Options whose command is not a list of words.
pub fn wrap(options: &Value, pod: &Value) -> Result<Patch, Refusal> {
    let Some(prefix) = container_of(options, pod).and_then(enter_prefix) else {
        return Ok(Patch(Vec::new()));
    };
    let malformed =
        || Refusal::new(Class::Malformed, "the command of the exec is not a list of words");
    if !options.is_object() {
        return Err(malformed());
    }
    let command: Vec<String> = list(options, "command")
        .iter()
        .map(|word| word.as_str().map(str::to_owned).ok_or_else(malformed))
        .collect::<Result<_, _>>()?;
    if entered(&command).is_some() && command.starts_with(&prefix) {
        return Ok(Patch(Vec::new()));
    }
    let wrapped: Vec<String> = prefix.into_iter().chain(command).collect();
    let path = json_patch::jsonptr::PointerBuf::from_tokens(["command"]);
    // Takes the place of what is there, and there may be none.
    Ok(Patch(vec![PatchOperation::Add(AddOperation { path, value: json!(wrapped) })]))
}

/// Where the command of an exec will run, in one word for the audit log; and what to say to who sent
/// it, where they may not expect that.
#[must_use]
pub fn place(options: &Value, pod: &Value) -> (&'static str, Option<String>) {
    match container_of(options, pod) {
        Some(container) if enter_prefix(container).is_some() => ("inside", None),
        Some(container) if is_runner(container) => {
            let name = text(container, "name").unwrap_or_default();
            let warning = format!(
                "ringfence: container {name} is a runner (ringfence.dev/mode: subprocess): the command runs outside the fence, as root with the fence's capabilities"
            );
            ("outside", Some(warning))
        }
        _ => ("outside", None),
    }
}

/// Whether the options of an exec are as [`wrap`] leaves them. Under `strict` a container outside the
/// fence is entered only where its exemption says so (`own=exec`).
///
/// # Errors
/// A command that would run in a fenced container, but outside its fence; or, under `strict`, in a
/// container outside the fence.
pub fn verify(options: &Value, pod: &Value, ns: &Namespace) -> Result<(), Refusal> {
    if !wrap(options, pod)?.is_empty() {
        let what = "the command does not enter the fence of the container";
        return Err(Refusal::new(Class::ExecOutside, what));
    }
    let Some(container) = container_of(options, pod) else { return Ok(()) };
    let fenced = enter_prefix(container).is_some();
    // The pod's own annotations were read when it was admitted, and say nothing about this.
    if fenced
        || Mode::of(ns)? != Mode::Strict
        || Wishes::read(&Value::Null, ns)?.lets_bring(container, Own::Exec)
    {
        return Ok(());
    }
    let name = text(container, "name").unwrap_or_default();
    Err(Refusal::with_fix(
        Class::ExecOutside,
        format!("container {name} is outside the fence, and so would the command be"),
        "let its exemption say own=exec: ringfence.dev/unfenced-containers of the namespace, name=image;own=exec",
    ))
}

/// The container that an exec is for. None where the API server refuses it.
fn container_of<'a>(options: &Value, pod: &'a Value) -> Option<&'a Value> {
    let spec = field(pod, "spec").unwrap_or(&Value::Null);
    let named = text(options, "container").filter(|name| !name.is_empty());
    match (named, list(spec, "containers")) {
        (Some(name), _) => containers(pod).find(|c| text(c, "name") == Some(name)),
        // The API server takes the only container, and refuses where there are several.
        (None, [only]) => Some(only),
        (None, _) => None,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::super::{ImageConfig, Outcome, PolicyRef, Settings, inject};
    use super::*;

    fn bare(names: &[&str]) -> Value {
        let containers: Vec<Value> =
            names.iter().map(|name| json!({ "name": name, "command": ["sh"] })).collect();
        json!({ "spec": { "containers": containers } })
    }

    #[test]
    fn a_container_that_is_not_fenced_is_left_alone() {
        let options = json!({ "command": ["ls"], "container": "a" });
        for pod in [bare(&["a"]), bare(&["b"]), bare(&[]), json!({})] {
            assert_eq!(wrap(&options, &pod).expect("an answer").0, []);
        }
        let options = json!({ "command": ["ls"] });
        assert_eq!(wrap(&options, &bare(&["a", "b"])).expect("an answer").0, []);
    }

    fn fenced() -> Value {
        let mut pod = json!({ "metadata": { "name": "p" }, "spec": { "containers": [
            { "name": "a", "image": "i", "command": ["agent"], "securityContext": { "runAsUser": 1000 } },
        ] } });
        let mut ns = Namespace { name: "n".into(), ..Namespace::default() };
        ns.labels.insert("ringfence.dev/inject".into(), "enabled".into());
        let policy = PolicyRef {
            configmap: "ringfence-policy-0".into(),
            digest: format!("sha256:{}", "0".repeat(64)),
            keys: vec!["policy.yaml".into()],
            ..PolicyRef::default()
        };
        let images = BTreeMap::from([("a".to_owned(), ImageConfig::default())]);
        match inject(None, &pod, &ns, &Settings::default(), &images, &policy) {
            Outcome::Inject(injection) => {
                json_patch::patch(&mut pod, &injection.ops).expect("applies");
            }
            other => panic!("{other:?}"),
        }
        pod
    }

    #[test]
    fn an_exec_into_a_fenced_container_enters_it_once() {
        let pod = fenced();
        for container in [json!("a"), json!(""), json!(null)] {
            let mut options = json!({ "container": container, "command": ["sh", "-c", "id"] });
            let patch = wrap(&options, &pod).expect("an answer");
            json_patch::patch(&mut options, &patch).expect("applies");
            let command: Vec<&str> =
                list(&options, "command").iter().filter_map(Value::as_str).collect();
            assert!(command[0].ends_with("/ringfence-supervisor") && command[1] == "enter");
            assert!(command.ends_with(&["--", "sh", "-c", "id"]), "{command:?}");
            assert_eq!(wrap(&options, &pod).expect("an answer").0, [], "a second round");
            assert_eq!(verify(&options, &pod, &Namespace::default()), Ok(()));
            // Another fence's `enter`, an older place of it, or none.
            for forged in [
                json!(["sh"]),
                json!([]),
                json!([
                    "/ringfence/bin/ringfence-supervisor",
                    "enter",
                    "--run-dir",
                    "/run/ringfence",
                    "--",
                    "sh"
                ]),
                json!([command[0], "enter", "--run-dir", "/tmp", "--", "sh"]),
                json!([command[0], "install", "/tmp"]),
            ] {
                options["command"] = forged;
                let refusal = verify(&options, &pod, &Namespace::default()).expect_err("outside");
                assert_eq!((refusal.class, refusal.code), (Class::ExecOutside, 403), "{options}");
            }
        }
        assert!(wrap(&json!({ "container": "a", "command": [1] }), &pod).is_err());
        // The API server sends an object, and a command in it.
        assert!(wrap(&json!("a"), &pod).is_err());
        let mut without = json!({ "container": "a" });
        let patch = wrap(&without, &pod).expect("an answer");
        json_patch::patch(&mut without, &patch).expect("applies");
        assert_eq!(verify(&without, &pod, &Namespace::default()), Ok(()));
    }

    /// A rollback, or the other replica of a roll-out.
    #[test]
    fn a_fence_that_a_later_version_made_is_entered_too() {
        let mut pod = fenced();
        let command = pod["spec"]["containers"][0]["command"].as_array_mut().expect("a list");
        command.splice(1..1, [json!("--flag-of-tomorrow"), json!("x")]);
        let options = json!({ "container": "a", "command": ["sh"] });
        assert_eq!(wrap(&options, &pod).expect("an answer").len(), 1);
        let refusal = verify(&options, &pod, &Namespace::default()).expect_err("outside");
        assert_eq!(refusal.class, Class::ExecOutside);
        // Nor is its image changed in place as if it were exempt.
        let mut other = pod.clone();
        other["spec"]["containers"][0]["image"] = json!("other");
        let mut ns = Namespace { name: "n".into(), ..Namespace::default() };
        ns.labels.insert("ringfence.dev/inject".into(), "enabled".into());
        ns.annotations.insert("ringfence.dev/unfenced-containers".into(), "*".into());
        let refusal = super::super::verify_update(&pod, &other, &ns).expect_err("fenced");
        assert_eq!(refusal.class, Class::ImageChange);
        assert_eq!(super::super::verify_update(&pod, &pod, &ns), Ok(()));
    }

    #[test]
    fn under_strict_a_container_outside_the_fence_is_entered_where_its_exemption_says_so() {
        let mut pod = fenced();
        let side = json!({ "name": "side", "image": "r/side:1" });
        pod["spec"]["containers"].as_array_mut().expect("a list").push(side);
        let options = json!({ "container": "side", "command": ["sh"] });
        let refused = |label: &str, exempt: &str, options: &Value| {
            let mut ns = Namespace { name: "n".into(), ..Namespace::default() };
            ns.labels.insert("ringfence.dev/inject".into(), label.into());
            ns.annotations.insert("ringfence.dev/unfenced-containers".into(), exempt.into());
            verify(options, &pod, &ns).err().map(|refusal| refusal.class)
        };
        for exempt in ["", "side=r/side:1", "side=r/side:1;own=command+env", "side=r/x;own=exec"] {
            assert_eq!(refused("strict", exempt, &options), Some(Class::ExecOutside), "{exempt}");
            assert_eq!(refused("enabled", exempt, &options), None);
        }
        assert_eq!(refused("strict", "side=r/side:1;own=exec", &options), None);
        // Which of several is meant, or who that is, only the API server can say.
        for container in [json!(null), json!("nobody")] {
            let options = json!({ "container": container, "command": ["sh"] });
            assert_eq!(refused("strict", "", &options), None);
        }
    }

    #[test]
    fn only_the_namespace_lets_exec_out() {
        let mut ns = Namespace::default();
        assert!(!is_outside(&ns));
        ns.annotations.insert(EXEC.into(), "outside".into());
        assert!(is_outside(&ns));
    }
}

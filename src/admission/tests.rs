//! The whole function over the corpus of pods in `tests/corpus/pods`, and what has to hold for any
//! pod: nothing foreign is touched, a second pass changes nothing, an update gets it all back.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::LazyLock;

use json_patch::patch;
use proptest::prelude::*;
use serde_json::{Map, Value, json};

use super::*;

mod cases;
mod every_field;
mod final_pod;
pub(in crate::admission) mod fuzz;
mod openings;
mod pull_secret;
mod roll_out;
mod strict;

/// Every pod of the corpus, with its file's name.
fn corpus() -> Vec<(String, Value)> {
    static CORPUS: LazyLock<Vec<(String, Value)>> = LazyLock::new(read_corpus);
    CORPUS.clone()
}

fn read_corpus() -> Vec<(String, Value)> {
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/corpus/pods");
    let mut files: Vec<_> = std::fs::read_dir(&dir).unwrap().map(|f| f.unwrap().path()).collect();
    files.sort();
    let read = |path: PathBuf| {
        let text = std::fs::read_to_string(&path).unwrap();
        let pod =
            serde_saphyr::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        (path.file_stem().unwrap().to_string_lossy().into_owned(), pod)
    };
    let mut all: Vec<_> = files.into_iter().map(read).collect();
    all.push(("every-field".to_owned(), every_field::pod()));
    all
}

fn pod(name: &str) -> Value {
    corpus().into_iter().find(|(found, _)| found == name).unwrap_or_else(|| panic!("no {name}")).1
}

fn namespace(annotations: &[(&str, &str)]) -> Namespace {
    labelled("enabled", annotations)
}

fn labelled(label: &str, annotations: &[(&str, &str)]) -> Namespace {
    Namespace {
        name: "agents".into(),
        labels: BTreeMap::from([("ringfence.dev/inject".into(), label.into())]),
        annotations: annotations
            .iter()
            .map(|(key, value)| (format!("ringfence.dev/{key}"), (*value).to_owned()))
            .collect(),
        ..Namespace::default()
    }
}

fn policy() -> PolicyRef {
    PolicyRef {
        configmap: "ringfence-policy-0a".into(),
        digest: "sha256:0a".into(),
        keys: vec!["policy.yaml".into(), "upstream-ca.crt".into()],
        run_as_user: None,
        run_as_group: None,
        follows: None,
    }
}

/// What every image's name leads to.
const DIGEST: &str = "sha256:00000000000000000000000000000000000000000000000000000000000000aa";

/// What a registry would say about every image of a pod.
fn images(pod: &Value) -> BTreeMap<String, ImageConfig> {
    let image = ImageConfig {
        entrypoint: vec!["/entry".into(), "$x".into()],
        cmd: vec!["$(HOME)".into()],
        user: "app:web".into(),
        working_dir: "/srv$".into(),
        env: Vec::new(),
        volumes: vec!["/data".into(), "/one/two/three/four/five/six/seven/eight".into()],
        digest: Some(DIGEST.into()),
    };
    let name = |container: &Value| container["name"].as_str().unwrap_or_default().to_owned();
    json::containers(pod).map(|container| (name(container), image.clone())).collect()
}

fn run(pod: &Value, ns: &Namespace, settings: &Settings) -> Outcome {
    inject(None, pod, ns, settings, &images(pod), &policy())
}

fn apply(pod: &Value, injection: &Injection) -> Value {
    let mut after = pod.clone();
    patch(&mut after, &injection.ops).unwrap();
    after
}

fn fenced(pod: &Value, ns: &Namespace, settings: &Settings) -> Value {
    match run(pod, ns, settings) {
        Outcome::Inject(injection) => apply(pod, &injection),
        other => panic!("not injected: {other:?}"),
    }
}

fn classes(injection: &Injection) -> Vec<Class> {
    injection.causes.iter().map(|cause| cause.class).collect()
}

fn refusal(pod: &Value) -> Class {
    match run(pod, &namespace(&[]), &Settings::default()) {
        Outcome::Refuse(refusal) => refusal.class,
        other => panic!("not refused: {other:?}"),
    }
}

fn shapes() -> Vec<Settings> {
    let all = [
        (Delivery::Init, Profile::Hardened),
        (Delivery::Image, Profile::Hardened),
        (Delivery::Init, Profile::Reference),
    ];
    all.map(|(delivery, profile)| Settings { delivery, profile, ..Settings::default() }).to_vec()
}

/// Takes from a pod every path that the contract names as Ringfence's, so that the rest can be
/// compared. Written without the injector's own functions.
fn without_ours(pod: &Value) -> Value {
    without_ours_of(pod, &["containers"])
}

/// The same, for the lists whose containers are fenced.
fn without_ours_of(pod: &Value, fenced: &[&str]) -> Value {
    let mut pod = pod.clone();
    let prune = |list: Option<&mut Value>, ours: &dyn Fn(&str) -> bool| {
        if let Some(list) = list.and_then(Value::as_array_mut) {
            list.retain(|e| !ours(e["name"].as_str().unwrap_or_default()));
        }
    };
    let volume = |name: &str| name == "openshell-policy" || name.starts_with("ringfence-");
    let variable = |name: &str| {
        name == "POD_IP" || name.starts_with("OPENSHELL_") || name == "RINGFENCE_OPTIONS"
    };
    prune(pod.pointer_mut("/spec/volumes"), &volume);
    prune(pod.pointer_mut("/spec/initContainers"), &|name| name == "ringfence-install");
    if let Some(Value::Object(annotations)) = pod.pointer_mut("/metadata/annotations") {
        annotations.remove("ringfence.dev/status");
    }
    if let Some(context) = pod.pointer_mut("/spec/securityContext").and_then(Value::as_object_mut) {
        context.remove("seccompProfile");
    }
    for list in fenced {
        for container in pod["spec"][list].as_array_mut().into_iter().flatten() {
            let map = container.as_object_mut().unwrap();
            map.remove("command");
            if let Some(image) = map.get_mut("image") {
                let pin = format!("@{DIGEST}");
                let named = image.as_str().map(|text| text.strip_suffix(&pin).unwrap_or(text));
                *image = json!(named);
            }
            if let Some(context) = map.get_mut("securityContext").and_then(Value::as_object_mut) {
                let ours = [
                    "runAsUser",
                    "runAsNonRoot",
                    "allowPrivilegeEscalation",
                    "capabilities",
                    "seccompProfile",
                ];
                context.retain(|key, _| !ours.contains(&key.as_str()));
            }
            for probe in [
                "/livenessProbe",
                "/readinessProbe",
                "/startupProbe",
                "/lifecycle/postStart",
                "/lifecycle/preStop",
            ] {
                if let Some(Value::Object(exec)) = container.pointer_mut(&format!("{probe}/exec")) {
                    exec.remove("command");
                }
            }
            prune(container.get_mut("volumeMounts"), &volume);
            prune(container.get_mut("env"), &variable);
            let entries = container.get_mut("env").and_then(Value::as_array_mut);
            for entry in entries.into_iter().flatten() {
                if ["AMBIENT_MCP_URL", "CREDENTIAL_MCP_URLS"]
                    .contains(&entry["name"].as_str().unwrap_or_default())
                {
                    entry.as_object_mut().unwrap().remove("value");
                }
            }
        }
    }
    drop_empty(&mut pod);
    pod
}

/// An absent list, an empty one and null are the same to the API server.
fn drop_empty(value: &mut Value) {
    let empty = |value: &Value| match value {
        Value::Null => true,
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        _ => false,
    };
    match value {
        Value::Object(map) => {
            map.values_mut().for_each(drop_empty);
            map.retain(|_, value| !empty(value));
        }
        Value::Array(list) => list.iter_mut().for_each(drop_empty),
        _ => {}
    }
}

#[test]
fn the_corpus_is_fenced_and_stays_so() {
    for (name, pod) in corpus() {
        for settings in shapes() {
            let ns = namespace(&[("unfenced-containers", "mcp-*=registry.example/mcp:*")]);
            let Outcome::Inject(first) = run(&pod, &ns, &settings) else {
                assert!(name.starts_with("refused-"), "{name} is refused");
                continue;
            };
            assert!(!name.starts_with("refused-"), "{name} is not refused");
            let after = apply(&pod, &first);
            assert_eq!(without_ours(&pod), without_ours(&after), "{name}");
            assert_eq!(
                verify(None, &after, &ns, &settings, &images(&pod), &policy()),
                Ok(()),
                "{name}"
            );
            // Only the VOLUMEs have to be looked up again.
            let needs = needs(&after, &ns, &settings, &policy()).unwrap();
            let of_volumes = |need: &ImageNeed| !need.command && !need.user;
            assert!(needs.images.iter().all(of_volumes), "{name}");
            assert_eq!(needs.images.len(), fenced_containers(&after).len(), "{name}");
            let again = inject(None, &after, &ns, &settings, &images(&after), &policy());
            assert!(matches!(again, Outcome::Inject(i) if i.ops.is_empty()), "{name}");
        }
    }
}

#[test]
fn an_unlabelled_namespace_is_not_touched() {
    for (name, pod) in corpus() {
        let ns = Namespace { labels: BTreeMap::new(), ..namespace(&[("inbound", "bad")]) };
        assert_eq!(run(&pod, &ns, &Settings::default()), Outcome::Untouched, "{name}");
        assert_eq!(needs(&pod, &ns, &Settings::default(), &policy()), Ok(Needs::default()));
    }
}

#[test]
fn a_manifest_applied_again_gets_its_injection_back() {
    let ns = namespace(&[("unfenced-containers", "mcp-*=registry.example/mcp:*")]);
    for (name, bare) in corpus().into_iter().filter(|(name, _)| !name.starts_with("refused-")) {
        for settings in shapes() {
            let live = fenced(&bare, &ns, &settings);
            // A later version with another image, another policy: none of it matters.
            let later = Settings { image: "later".into(), ..settings.clone() };
            let outcome =
                inject(Some(&live), &bare, &ns, &later, &BTreeMap::new(), &PolicyRef::default());
            if fenced_containers(&live).is_empty() {
                assert_eq!(outcome, Outcome::Untouched);
                continue;
            }
            let Outcome::Inject(injection) = outcome else { panic!("{name}: {outcome:?}") };
            let mut after = apply(&bare, &injection);
            let mut live = live;
            drop_empty(&mut after);
            drop_empty(&mut live);
            assert_eq!(after, live, "{name}");
            assert_eq!(
                verify(Some(&live), &after, &ns, &later, &BTreeMap::new(), &policy()),
                Ok(())
            );
        }
    }
}

#[test]
fn an_update_keeps_what_is_the_authors() {
    let ns = namespace(&[]);
    let settings = Settings::default();
    let live = fenced(&pod("plain"), &ns, &settings);
    let mut update = live.clone();
    update["metadata"]["labels"] = json!({"new": "label"});
    update["metadata"]["annotations"].as_object_mut().unwrap().remove("ringfence.dev/status");
    update["spec"]["containers"][0]["env"].as_array_mut().unwrap().reverse();
    let Outcome::Inject(injection) = restore(&live, &update, &ns) else { panic!() };
    let after = apply(&update, &injection);
    assert_eq!(after["metadata"]["labels"]["new"], "label");
    assert_eq!(after["metadata"]["annotations"], live["metadata"]["annotations"]);
    assert_eq!(after["spec"]["containers"][0]["env"], live["spec"]["containers"][0]["env"]);
    // Another command is not hidden: the API server refuses it.
    update["spec"]["containers"][0]["command"] = json!(["something", "else"]);
    let Outcome::Inject(injection) = restore(&live, &update, &ns) else { panic!() };
    assert_eq!(
        apply(&update, &injection)["spec"]["containers"][0]["command"],
        json!(["something", "else"])
    );
    // A pod from before the label, and bad annotations of the namespace, hinder no update.
    let bare = pod("plain");
    assert_eq!(restore(&bare, &bare, &ns), Outcome::Untouched);
    let bad = namespace(&[("inbound", "x")]);
    assert!(matches!(restore(&live, &live, &bad), Outcome::Inject(i) if i.ops.is_empty()));
}

/// A value that nobody knows, for a field that nobody knows.
fn unknown() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<i32>().prop_map(Value::from),
        ".{0,4}".prop_map(Value::from)
    ];
    leaf.prop_recursive(2, 8, 3, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..3).prop_map(Value::Array),
            prop::collection::vec(("[a-z~/]{1,4}", inner), 0..3)
                .prop_map(|pairs| Value::Object(pairs.into_iter().collect::<Map<_, _>>())),
        ]
    })
}

/// Puts unknown fields into every object of a document.
fn sprinkle(value: &mut Value, fields: &mut impl Iterator<Item = Value>) {
    match value {
        Value::Object(map) => {
            map.values_mut().for_each(|value| sprinkle(value, fields));
            if let Some(field) = fields.next() {
                map.insert("x-unknown/~".into(), field);
            }
        }
        Value::Array(list) => list.iter_mut().for_each(|value| sprinkle(value, fields)),
        _ => {}
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn unknown_fields_survive(
        index in any::<prop::sample::Index>(),
        shape in any::<prop::sample::Index>(),
        unknown in prop::collection::vec(unknown(), 1..40),
    ) {
        let corpus: Vec<_> = corpus().into_iter().filter(|(name, _)| !name.starts_with("refused-")).collect();
        let mut pod = corpus[index.index(corpus.len())].1.clone();
        // Labels and annotations have their own rules; everything else may grow.
        sprinkle(&mut pod["spec"], &mut unknown.into_iter());
        let ns = namespace(&[("unfenced-containers", "mcp-*")]);
        let settings = &shapes()[shape.index(3)];
        let after = fenced(&pod, &ns, settings);
        prop_assert_eq!(without_ours(&pod), without_ours(&after));
        let again = run(&after, &ns, settings);
        prop_assert!(matches!(again, Outcome::Inject(i) if i.ops.is_empty()));
        let Outcome::Inject(back) = restore(&after, &pod, &ns) else {
            prop_assert!(fenced_containers(&after).is_empty());
            return Ok(());
        };
        let (mut back, mut after) = (apply(&pod, &back), after);
        drop_empty(&mut back);
        drop_empty(&mut after);
        prop_assert_eq!(back, after);
    }

    #[test]
    fn no_document_makes_it_panic(mut pod in unknown(), spec in unknown(), containers in unknown(), container in unknown()) {
        if let Value::Object(map) = &mut pod { map.insert("spec".into(), spec); }
        if let Some(Value::Object(map)) = pod.get_mut("spec") { map.insert("containers".into(), containers); }
        if let Some(Value::Array(list)) = pod.pointer_mut("/spec/containers") { list.push(container); }
        let _ = run(&pod, &namespace(&[]), &Settings::default());
        let live = fenced(&self::pod("plain"), &namespace(&[]), &Settings::default());
        let _ = restore(&live, &pod, &namespace(&[]));
    }
}

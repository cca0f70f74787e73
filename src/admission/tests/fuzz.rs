//! Reviews as nobody would send them: valid ones, bent at random, by bytes and as trees. Whatever
//! comes, the answer is one that the API server accepts, its patch applies, and a second pass over
//! the patched pod changes nothing.
//!
//! `RINGFENCE_FUZZ_CASES` says how many each test tries, `RINGFENCE_FUZZ_SEED` which; a failure names
//! seed and case, and a case that is named by `RINGFENCE_FUZZ_CASE` runs alone.

use std::sync::LazyLock;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::super::review::{Answer, Review};
use super::super::*;
use super::{Value, apply, corpus, images, json, labelled, policy, run, shapes};

/// xorshift64*: small, and the same everywhere.
pub(in crate::admission) struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub(in crate::admission) fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() >> 33).unwrap_or(0) % limit.max(1)
    }

    fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len())]
    }
}

/// Values that hurt where they are not expected.
static HOSTILE: LazyLock<Vec<Value>> = LazyLock::new(|| {
    let paths =
        ["/", "", "/run", "/ringfence", "//ringfence/d/../bin", "/var/run/ringfence", "/etc"];
    let words = [
        "ringfence-bin",
        "ringfence-run-agent",
        "openshell-policy",
        "ringfence-install",
        "POD_IP",
        "status.podIP",
        "$(POD_IP)",
        "$$",
        "http://localhost:1",
        "strict",
        "enabled",
        "off",
        "root",
        "65530",
        "a\u{0}b",
        "\u{1f9a8}",
        "--",
        "--no-env",
        "enter",
        "CREATE",
        "UPDATE",
        "CONNECT",
        "/ringfence/d/d/d/d/d/d/bin/ringfence-supervisor",
        "--run-as",
        "admission.k8s.io/v1beta1",
    ];
    let texts = paths.iter().chain(&words).map(|&text| Value::from(text));
    let others = [
        json!(null),
        json!(true),
        json!(false),
        json!(0),
        json!(-1),
        json!(65530),
        json!(1e300),
        json!(18_446_744_073_709_551_615_u64),
        json!([]),
        json!({}),
        json!([null]),
        json!([[]]),
        json!({"name": null}),
        json!({"name": "ringfence-bin", "mountPath": "/x"}),
        json!({"": {"": ""}}),
        json!("x".repeat(5000)),
    ];
    texts.chain(others).collect()
});

/// Names that mean something to us; put where they are not expected.
const KEYS: &[&str] = &[
    "command",
    "args",
    "securityContext",
    "volumeMounts",
    "volumes",
    "env",
    "initContainers",
    "containers",
    "ephemeralContainers",
    "annotations",
    "ringfence.dev/policy",
    "name",
    "image",
    "ringfence.dev/transparent",
    "ringfence.dev/inbound",
    "restartPolicy",
    "hostAliases",
    "spec",
    "metadata",
    "lifecycle",
    "livenessProbe",
    "ports",
    "capabilities",
    "runAsUser",
    "exec",
];

fn count(value: &Value) -> usize {
    1 + match value {
        Value::Array(list) => list.iter().map(count).sum(),
        Value::Object(map) => map.values().map(count).sum(),
        _ => 0,
    }
}

/// The `index`-th node, counted from the root.
fn node<'a>(value: &'a mut Value, index: &mut usize) -> Option<&'a mut Value> {
    if *index == 0 {
        return Some(value);
    }
    *index -= 1;
    match value {
        Value::Array(list) => list.iter_mut().find_map(|value| node(value, index)),
        Value::Object(map) => map.values_mut().find_map(|value| node(value, index)),
        _ => None,
    }
}

/// Bends a tree in a few places.
fn bend(tree: &mut Value, random: &mut Random) {
    for _ in 0..=random.below(4) {
        let mut index = random.below(count(tree));
        let other = {
            let mut index = random.below(count(tree));
            node(tree, &mut index).map(|value| value.clone()).unwrap_or_default()
        };
        let Some(at) = node(tree, &mut index) else { continue };
        match (random.below(6), &mut *at) {
            (0, Value::Array(list)) if !list.is_empty() => {
                let at = random.below(list.len());
                let twice = list[at].clone();
                list.insert(random.below(list.len()), twice);
            }
            (1, Value::Array(list)) if !list.is_empty() => {
                drop(list.remove(random.below(list.len())));
            }
            (2, Value::Object(map)) if !map.is_empty() => {
                let key = map.keys().nth(random.below(map.len())).cloned().unwrap_or_default();
                map.shift_remove(&key);
            }
            (3, Value::Object(map)) => {
                let value =
                    if random.below(2) == 0 { other } else { random.pick(&HOSTILE).clone() };
                map.insert((*random.pick(KEYS)).to_owned(), value);
            }
            // What is elsewhere in the tree, but not so often that it grows without end.
            (4, at) if count(&other) < 200 => *at = other,
            (_, at) => *at = random.pick(&HOSTILE).clone(),
        }
    }
}

fn bend_bytes(bytes: &mut Vec<u8>, random: &mut Random) {
    for _ in 0..=random.below(3) {
        let at = random.below(bytes.len() + 1);
        let end = (at + random.below(24)).min(bytes.len());
        match random.below(4) {
            0 => drop(bytes.splice(at..end, [])),
            1 => bytes.truncate(at),
            2 => bytes.insert(at, u8::try_from(random.below(256)).unwrap_or(0)),
            _ => drop(bytes.splice(at..end, random.pick(&HOSTILE).to_string().into_bytes())),
        }
    }
}

/// Valid reviews of every kind that is asked about.
static REVIEWS: LazyLock<Vec<Value>> = LazyLock::new(|| {
    let review = |resource: &str, operation: &str, sub: &str, object: Value, old: Value| {
        json!({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": {
            "uid": "u", "operation": operation, "subResource": sub, "namespace": "agents",
            "name": "p", "dryRun": false, "userInfo": {"username": "me"},
            "resource": {"group": "", "version": "v1", "resource": resource},
            "object": object, "oldObject": old}})
    };
    let mut all = Vec::new();
    for (_, pod) in corpus() {
        all.push(review("pods", "CREATE", "", pod.clone(), json!(null)));
        for label in ["enabled", "strict"] {
            let ns = labelled(label, &[("unfenced-containers", "mcp-*=registry.example/mcp:*")]);
            if let Outcome::Inject(injection) = run(&pod, &ns, &shapes()[0]) {
                let live = apply(&pod, &injection);
                all.push(review("pods", "CREATE", "", live.clone(), json!(null)));
                all.push(review("pods", "UPDATE", "", pod.clone(), live.clone()));
                all.push(review("pods", "UPDATE", "ephemeralcontainers", live.clone(), live));
            }
        }
    }
    let exec = json!({"container": "agent", "command": ["sh"], "stdin": true});
    all.push(review("pods", "CONNECT", "exec", exec, json!(null)));
    let policy = json!({"metadata": {"name": "p"}, "data": {"policy.yaml": "version: 1\n"}});
    all.push(review("configmaps", "CREATE", "", policy, json!(null)));
    all
});

/// Calls `test` with so many bent reviews.
pub(in crate::admission) fn cases(name: &'static str, mut test: impl FnMut(Vec<u8>, &mut Random)) {
    crate::fuzz::run(name, 600, |seed| {
        let mut random = Random(seed.wrapping_add(1) | 1);
        random.next();
        let mut review = random.pick(&REVIEWS).clone();
        if random.below(8) > 0 {
            bend(&mut review, &mut random);
        }
        let mut body = review.to_string().into_bytes();
        if random.below(8) == 0 {
            bend_bytes(&mut body, &mut random);
        }
        test(body, &mut random);
    });
}

/// What the API server checks, and what this project promises beyond that.
pub(in crate::admission) fn assert_well_formed(answer: &[u8], review: &Value, may_patch: bool) {
    let answer: Value = serde_json::from_slice(answer).expect("an answer is JSON");
    assert_eq!(answer["apiVersion"], review["apiVersion"]);
    assert_eq!(answer["kind"], "AdmissionReview");
    let response = answer["response"].as_object().expect("a response");
    assert_eq!(response["uid"], review["request"]["uid"]);
    let allowed = response["allowed"].as_bool().expect("a boolean");
    if !allowed {
        let code = response["status"]["code"].as_u64().expect("a code");
        assert!([403, 422, 500, 503].contains(&code), "{code}");
        let message = response["status"]["message"].as_str().expect("a message");
        assert!(!message.is_empty() && message.chars().count() <= 2048);
        assert!(!message.chars().any(char::is_control), "{message:?}");
        assert_ne!(code, 500, "{message}");
    }
    for warning in response.get("warnings").and_then(Value::as_array).into_iter().flatten() {
        let warning = warning.as_str().expect("a text");
        assert!(warning.chars().count() <= 256 && !warning.chars().any(char::is_control));
    }
    assert_eq!(response.contains_key("patch"), response.contains_key("patchType"));
    if let Some(patch) = response.get("patch") {
        assert!(may_patch && allowed);
        let patch = STANDARD.decode(patch.as_str().expect("a text")).expect("base64");
        let patch: json_patch::Patch = serde_json::from_slice(&patch).expect("a patch");
        assert!(!patch.is_empty());
        let mut object = review["request"]["object"].clone();
        json_patch::patch(&mut object, &patch).expect("it applies");
    }
}

/// The pure half, as the handler calls it once everything is looked up.
fn decide(review: &Review, ns: &Namespace, settings: &Settings) -> [Outcome; 2] {
    let (pod, old) = (&review.object, review.old_object.as_ref());
    let verdict = |verdict: Result<(), Refusal>| {
        verdict.map_or_else(Outcome::Refuse, |()| Outcome::Untouched)
    };
    match (&*review.operation, &*review.sub_resource, old) {
        ("UPDATE", "", Some(old)) => {
            let _ = changes_image(old, pod);
            [restore(old, pod, ns), verdict(verify_update(old, pod, ns))]
        }
        ("UPDATE", "ephemeralcontainers", _) => [ephemeral(pod, ns), Outcome::Untouched],
        ("CONNECT", ..) => {
            let live = &REVIEWS[1]["request"]["object"];
            let ops = exec::wrap(pod, live);
            let wrapped = ops.map(|ops| Outcome::Inject(Injection { ops, ..Injection::default() }));
            [wrapped.unwrap_or_else(Outcome::Refuse), verdict(exec::verify(pod, live, ns))]
        }
        _ => {
            let images = images(pod);
            let _ = (is_fenced(pod, ns, settings), needs(pod, ns, settings, &policy()));
            let first = inject(None, pod, ns, settings, &images, &policy());
            if let Outcome::Inject(injection) = &first {
                let after = apply(pod, injection);
                let again = verify(None, &after, ns, settings, &images, &policy());
                assert_eq!(again, Ok(()), "a second pass changes {after}");
            }
            [first, verdict(verify(None, pod, ns, settings, &images, &policy()))]
        }
    }
}

#[test]
fn every_review_gets_a_well_formed_answer() {
    let (mut answered, mut patched) = (0_u64, 0_u64);
    cases("reviews", |body, random| {
        let label = *random.pick(&["enabled", "strict", "enabled", "strict", "other"]);
        let annotations: &[(&str, &str)] = match random.below(4) {
            0 => &[],
            1 => &[("transparent", "off"), ("policy", "p")],
            2 => &[("nonsense", "x")],
            _ => &[("unfenced-containers", "mcp-*=registry.example/mcp:*")],
        };
        let (ns, settings) = (labelled(label, annotations), random.pick(&shapes()).clone());
        let Ok(review) = Review::parse(&body) else { return };
        let whole: Value = serde_json::from_slice(&body).expect("it was parsed");
        answered += 1;
        let [mutated, validated] = decide(&review, &ns, &settings);
        patched += u64::from(matches!(&mutated, Outcome::Inject(i) if !i.ops.is_empty()));
        assert_well_formed(&Answer::of(mutated).to_bytes(&review.id), &whole, true);
        assert_well_formed(&Answer::of(validated).to_bytes(&review.id), &whole, false);
    });
    println!("{answered} answered, {patched} patched");
    // Alone, a case may be one that is no review.
    assert!(crate::fuzz::alone() || (answered > 0 && patched > 0), "nothing was tried");
}

//! Two versions at once: what the mutating half of one replica made, another one looks at.

use serde_json::{Value, json};

use super::super::*;
use super::{corpus, drop_empty, fenced, images, labelled, policy, shapes};

const EXEMPT: &[(&str, &str)] = &[("unfenced-containers", "mcp-*=registry.example/mcp:*")];

/// Replicas whose pods differ from those of [`Settings::default`] and [`policy`].
fn others() -> Vec<(Settings, PolicyRef)> {
    let with = |change: fn(&mut Settings, &mut PolicyRef)| {
        let (mut settings, mut policy) = (Settings::default(), policy());
        change(&mut settings, &mut policy);
        (settings, policy)
    };
    vec![
        with(|settings, _| settings.image = "ringfence:0.0.9".into()),
        with(|settings, _| settings.log_level = LogLevel::Trace),
        with(|settings, _| settings.profile = Profile::Reference),
        with(|settings, _| settings.delivery = Delivery::Image),
        with(|settings, _| settings.image_pull_policy = "Always".into()),
        with(|_, policy| {
            policy.configmap = "ringfence-policy-0b".into();
            policy.digest = "sha256:0b".into();
            policy.keys = vec!["policy.yaml".into(), "policy.rego".into()];
        }),
    ]
}

/// What a later version might make of a pod: another flag, another volume and its mount.
fn of_a_later_version(mut pod: Value) -> Value {
    let status = pod.pointer_mut("/metadata/annotations/ringfence.dev~1status").unwrap();
    let mut text: Value = serde_json::from_str(status.as_str().unwrap()).unwrap();
    text["version"] = json!("999.0.0");
    *status = json!(text.to_string());
    for container in pod["spec"]["containers"].as_array_mut().unwrap() {
        if supervisor_path(container).is_none() {
            continue;
        }
        let command = container["command"].as_array_mut().unwrap();
        command.splice(1..1, [json!("--flag-of-tomorrow"), json!("x"), json!("--switch")]);
        let mounts = container["volumeMounts"].as_array_mut().unwrap();
        mounts.push(json!({"name": "ringfence-more", "mountPath": "/run/ringfence-more"}));
    }
    let volumes = pod["spec"]["volumes"].as_array_mut().unwrap();
    volumes.push(json!({"name": "ringfence-more", "emptyDir": {}}));
    pod
}

fn look(pod: &Value, label: &str, settings: &Settings, policy: &PolicyRef) -> Result<(), Refusal> {
    verify(None, pod, &labelled(label, EXEMPT), settings, &images(pod), policy)
}

/// Every pod of the corpus that the label value admits, as this replica makes it.
fn admitted(label: &str, settings: &Settings, policy: &PolicyRef) -> Vec<(String, Value)> {
    let ns = labelled(label, EXEMPT);
    let made = corpus().into_iter().filter_map(|(name, bare)| {
        match inject(None, &bare, &ns, settings, &images(&bare), policy) {
            Outcome::Inject(injection) => Some((name, super::apply(&bare, &injection))),
            _ => None,
        }
    });
    made.filter(|(_, pod)| !fenced_containers(pod).is_empty()).collect()
}

#[test]
fn under_enabled_no_pod_is_refused_in_a_roll_out() {
    let (own, own_policy) = (Settings::default(), policy());
    let mut differ = 0;
    for (settings, policy) in others() {
        // Whichever of the two injects, the other one lets it pass.
        for (name, pod) in admitted("enabled", &settings, &policy) {
            assert_eq!(look(&pod, "enabled", &own, &own_policy), Ok(()), "{name}");
        }
        for (name, pod) in admitted("enabled", &own, &own_policy) {
            assert_eq!(look(&pod, "enabled", &settings, &policy), Ok(()), "{name}");
            differ += 1;
        }
    }
    for (name, pod) in admitted("enabled", &own, &own_policy) {
        let later = of_a_later_version(pod);
        assert_eq!(look(&later, "enabled", &own, &own_policy), Ok(()), "{name}");
        differ += 1;
    }
    assert!(differ > 60, "{differ}");
}

/// The author may have written the annotation, so it gains nothing but another wording.
#[test]
fn under_strict_another_replicas_pod_is_to_be_tried_again() {
    let (own, own_policy) = (Settings::default(), policy());
    let mut seen = 0;
    for (settings, policy) in others() {
        for (name, pod) in admitted("strict", &settings, &policy) {
            match look(&pod, "strict", &own, &own_policy) {
                // How the binary is delivered is no difference.
                Ok(()) => assert_eq!(settings.delivery, Delivery::Image, "{name}"),
                Err(refusal) => {
                    assert_eq!((refusal.class, refusal.code), (Class::AnotherVersion, 503));
                    assert_eq!(refusal.retry_after(), Some(1));
                    seen += 1;
                }
            }
        }
    }
    assert!(seen > 20, "{seen}");
    for (name, pod) in admitted("strict", &own, &own_policy) {
        let refusal = look(&of_a_later_version(pod), "strict", &own, &own_policy).unwrap_err();
        assert_eq!(refusal.class, Class::AnotherVersion, "{name}");
    }
}

/// What nobody may do, with another version's name on it: the guard's rule and the classes hold.
#[test]
fn another_versions_name_opens_no_fence() {
    let (own, own_policy) = (Settings::default(), policy());
    let live = of_a_later_version(fenced(&super::pod("plain"), &labelled("enabled", EXEMPT), &own));
    assert_eq!(look(&live, "enabled", &own, &own_policy), Ok(()));
    let mount = |field: &str| {
        let mounts = live["spec"]["containers"][0]["volumeMounts"].as_array().unwrap();
        let at = mounts.iter().position(|mount| mount["name"] == "ringfence-bin").unwrap();
        format!("/spec/containers/0/volumeMounts/{at}/{field}")
    };
    let hostile = [
        ("/spec/containers/0/command", json!(["sh"])),
        ("/spec/containers/0/command", json!(null)),
        ("/spec/containers/0/command/0", json!("/tmp/ringfence-supervisor")),
        ("/spec/containers/0/command/0", json!("/ringfence/d/bin/ringfence-supervisor")),
        (&*mount("name"), json!("scratch")),
        (&*mount("subPath"), json!("x")),
        (&*mount("mountPath"), json!("/ringfence/d/bin")),
        (
            "/spec/containers/0/volumeMounts/-",
            json!({"name": "x", "mountPath": "/x/../ringfence/d"}),
        ),
        (
            "/spec/containers/0/volumeMounts/-",
            json!({"name": "x", "mountPath": "/proc/self/root/x"}),
        ),
        ("/spec/containers/-", json!({"name": "more", "image": "x", "command": ["sh"]})),
        ("/spec/containers/-", json!({"name": "mcp-x", "image": "evil"})),
        ("/spec/hostNetwork", json!(true)),
        ("/spec/hostPID", json!(true)),
        ("/spec/containers/0/securityContext/privileged", json!(true)),
    ];
    for label in ["enabled", "strict"] {
        for (pointer, value) in &hostile {
            let forged = super::final_pod::changed(&live, pointer, value.clone());
            let verdict = look(&forged, label, &own, &own_policy);
            assert!(verdict.is_err(), "{label}: {pointer} {value} passes");
        }
        // Nor does a pod that no webhook of ours has seen, whatever it says of itself.
        let mut bare = super::pod("plain");
        bare["metadata"]["annotations"] = live["metadata"]["annotations"].clone();
        assert!(look(&bare, label, &own, &own_policy).is_err(), "{label}");
    }
}

/// A replica of another version that is asked a second time (`reinvocationPolicy`) makes the pod its
/// own, and the first one could take it back: the command is never wrapped twice.
#[test]
fn a_pod_changes_hands_without_a_trace() {
    let ns = labelled("enabled", EXEMPT);
    let bare = super::pod("plain");
    let own = fenced(&bare, &ns, &Settings::default());
    let plain = |mut pod: Value| {
        drop_empty(&mut pod);
        pod
    };
    for settings in shapes() {
        // What it sets at the pod is not ours to take away: the author may have.
        let reference = settings.profile == Profile::Reference;
        let other = Settings { image: "other".into(), ..settings };
        let theirs = fenced(&own, &ns, &other);
        if other.delivery == Delivery::Init {
            assert_eq!(plain(theirs.clone()), plain(fenced(&bare, &ns, &other)));
        }
        let back = fenced(&theirs, &ns, &Settings::default());
        assert!(reference || plain(back) == plain(own.clone()));
    }
    let mut later = own.clone();
    let command = later["spec"]["containers"][0]["command"].as_array_mut().unwrap();
    command.splice(1..1, [json!("--flag-of-tomorrow"), json!("x"), json!("--switch")]);
    assert_eq!(fenced(&later, &ns, &Settings::default()), own);
}

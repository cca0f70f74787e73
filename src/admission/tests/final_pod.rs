//! Verification of the final pod: what the API server and other webhooks may have done to it after
//! us, and what nobody may.

use serde_json::{Value, json};

use super::super::*;
use super::{corpus, fenced, images, labelled, namespace, pod, policy, shapes};

const EXEMPT: &[(&str, &str)] = &[("unfenced-containers", "mcp-*=registry.example/mcp:*")];

/// The pod as the API server encodes it again: typed, and with the defaults that it fills in. Written
/// from the API's documentation, without the injector's own functions.
fn defaulted(pod: &Value) -> Value {
    let mut pod = pod.clone();
    let default = |map: &mut Value, name: &str, value: Value| {
        if map[name].is_null() {
            map[name] = value;
        }
    };
    let spec = &mut pod["spec"];
    for (name, value) in [
        ("restartPolicy", json!("Always")),
        ("terminationGracePeriodSeconds", json!(30)),
        ("dnsPolicy", json!("ClusterFirst")),
        ("serviceAccountName", json!("default")),
        ("serviceAccount", json!("default")),
        ("securityContext", json!({})),
        ("schedulerName", json!("default-scheduler")),
        ("enableServiceLinks", json!(true)),
        ("preemptionPolicy", json!("PreemptLowerPriority")),
        ("priority", json!(0)),
        (
            "tolerations",
            json!([{"key": "node.kubernetes.io/not-ready", "operator": "Exists",
            "effect": "NoExecute", "tolerationSeconds": 300}]),
        ),
    ] {
        default(spec, name, value);
    }
    // Admission of service accounts: a projected volume, and a mount of it in every container.
    let token = json!({"name": "kube-api-access-x7k2p", "projected": {"defaultMode": 420, "sources": [
        {"serviceAccountToken": {"expirationSeconds": 3607, "path": "token"}}]}});
    if spec["volumes"].is_null() {
        spec["volumes"] = json!([]);
    }
    spec["volumes"].as_array_mut().unwrap().push(token);
    for volume in spec["volumes"].as_array_mut().unwrap() {
        for (source, mode) in [("configMap", 420), ("secret", 420), ("projected", 420)] {
            if volume[source].is_object() {
                default(&mut volume[source], "defaultMode", json!(mode));
            }
        }
        volume.as_object_mut().unwrap().retain(|_, value| !value.is_null());
    }
    for list in ["containers", "initContainers"] {
        for container in spec[list].as_array_mut().into_iter().flatten() {
            for (name, value) in [
                ("imagePullPolicy", json!("IfNotPresent")),
                ("terminationMessagePath", json!("/dev/termination-log")),
                ("terminationMessagePolicy", json!("File")),
                ("resources", json!({})),
            ] {
                default(container, name, value);
            }
            let mount = json!({"name": "kube-api-access-x7k2p", "readOnly": true,
                "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount"});
            if container["volumeMounts"].is_null() {
                container["volumeMounts"] = json!([]);
            }
            container["volumeMounts"].as_array_mut().unwrap().push(mount);
            for entry in container["env"].as_array_mut().into_iter().flatten() {
                if let Some(field) = entry.pointer_mut("/valueFrom/fieldRef") {
                    default(field, "apiVersion", json!("v1"));
                }
            }
            for probe in ["livenessProbe", "readinessProbe", "startupProbe"] {
                if container[probe].is_object() {
                    for (name, value) in [
                        ("timeoutSeconds", 1),
                        ("periodSeconds", 10),
                        ("successThreshold", 1),
                        ("failureThreshold", 3),
                    ] {
                        default(&mut container[probe], name, json!(value));
                    }
                }
            }
            container.as_object_mut().unwrap().retain(|_, value| !value.is_null());
        }
    }
    pod["spec"].as_object_mut().unwrap().retain(|_, value| !value.is_null());
    // Typed, as the API server has it: what it does not know is gone, and the order is another.
    let typed: k8s_openapi::api::core::v1::Pod =
        serde_json::from_value(pod).expect("a pod of the API");
    serde_json::to_value(typed).expect("JSON")
}

#[test]
fn what_the_api_server_fills_in_is_no_difference() {
    for label in ["enabled", "strict"] {
        let mut seen = 0;
        for (name, bare) in corpus() {
            // Not of the API's types: fields that nobody knows, other types.
            if name.starts_with("refused-")
                || ["nulls", "populated", "every-field"].contains(&name.as_str())
            {
                continue;
            }
            for settings in shapes() {
                let ns = labelled(label, EXEMPT);
                let first = inject(None, &bare, &ns, &settings, &images(&bare), &policy());
                let Outcome::Inject(injection) = first else { continue };
                let stored = defaulted(&super::apply(&bare, &injection));
                let verdict = verify(None, &stored, &ns, &settings, &images(&stored), &policy());
                assert_eq!(verdict, Ok(()), "{label} {name}");
                seen += 1;
            }
        }
        assert!(seen >= 12, "{label}: {seen}");
    }
}

fn verdict(pod: &Value) -> Option<Class> {
    let settings = Settings::default();
    verify(None, pod, &namespace(EXEMPT), &settings, &images(pod), &policy()).err().map(|r| r.class)
}

pub(super) fn changed(pod: &Value, pointer: &str, value: Value) -> Value {
    let mut pod = pod.clone();
    match pointer.rsplit_once('/').unwrap() {
        (list, "-") => pod.pointer_mut(list).unwrap().as_array_mut().unwrap().push(value),
        (list, "^") => pod.pointer_mut(list).unwrap().as_array_mut().unwrap().insert(0, value),
        (parent, name) => {
            let name = name.replace("~1", "/");
            let parent = pod.pointer_mut(parent).unwrap_or_else(|| panic!("{pointer}"));
            match parent {
                Value::Array(list) => list[name.parse::<usize>().unwrap()] = value,
                parent => parent[name.as_str()] = value,
            }
        }
    }
    pod
}

/// What a webhook after ours may do. Each of these is in `docs/admission.md`.
#[test]
fn other_webhooks_may_change_what_is_not_ours() {
    let live = fenced(&pod("plain"), &namespace(EXEMPT), &Settings::default());
    assert_eq!(verdict(&live), None);
    for (pointer, value) in [
        ("/metadata/labels", json!({"injected": "yes"})),
        ("/metadata/annotations/sidecar.istio.io~1status", json!("{}")),
        ("/spec/containers/0/env/-", json!({"name": "AWS_REGION", "value": "x"})),
        ("/spec/containers/0/env/^", json!({"name": "FIRST", "value": "x"})),
        ("/spec/containers/0/volumeMounts/-", json!({"name": "ca", "mountPath": "/etc/ssl/certs"})),
        ("/spec/containers/0/resources", json!({"limits": {"cpu": "1"}})),
        ("/spec/containers/0/image", json!("mirror.example/agent:1")),
        ("/spec/containers/0/imagePullPolicy", json!("Always")),
        ("/spec/containers/0/args", json!(["more"])),
        ("/spec/containers/0/ports", json!([{"containerPort": 80}])),
        ("/spec/containers/0/securityContext/readOnlyRootFilesystem", json!(true)),
        ("/spec/containers/-", json!({"name": "mcp-x", "image": "registry.example/mcp:1"})),
        ("/spec/initContainers/-", json!({"name": "istio-init", "image": "x"})),
        ("/spec/initContainers/0/resources", json!({"limits": {"cpu": "1"}})),
        ("/spec/initContainers/0/env", json!([{"name": "AWS_REGION", "value": "x"}])),
        ("/spec/volumes/-", json!({"name": "ca", "configMap": {"name": "ca"}})),
        ("/spec/tolerations", json!([{"operator": "Exists"}])),
        ("/spec/nodeSelector", json!({"a": "b"})),
        ("/spec/hostname", json!("x")),
    ] {
        assert_eq!(verdict(&changed(&live, pointer, value.clone())), None, "{pointer} {value}");
    }
}

/// What nobody may, whoever it is: each would open the fence or replace what builds it.
#[test]
fn what_is_ours_is_nobody_elses() {
    let settings = Settings::default();
    let live = fenced(&pod("plain"), &namespace(EXEMPT), &settings);
    let container = &live["spec"]["containers"][0];
    let at = |list: &str, name: &str| {
        let list = live["spec"]["containers"][0][list].as_array().unwrap();
        list.iter().position(|one| one["name"] == name).unwrap()
    };
    let word = |flag: &str| {
        let command = container["command"].as_array().unwrap();
        command.iter().position(|word| word == flag).unwrap()
    };
    let (bin, run, policy) = (
        at("volumeMounts", "ringfence-bin"),
        at("volumeMounts", "ringfence-run-agent"),
        at("volumeMounts", "openshell-policy"),
    );
    let c = "/spec/containers/0";
    let mount = |index: usize, field: &str| format!("{c}/volumeMounts/{index}/{field}");
    let mut hostile = vec![
        // The command: another one, a shell before ours, flags changed or added.
        (format!("{c}/command"), json!(["sh"])),
        (format!("{c}/command"), json!(null)),
        (format!("{c}/command/^"), json!("env")),
        (format!("{c}/command/0"), json!("/tmp/ringfence-supervisor")),
        (format!("{c}/command/{}", word("--policy-data") + 1), json!("/tmp/policy.yaml")),
        (format!("{c}/command/{}", word("--policy-digest") + 1), json!("sha256:0b")),
        (format!("{c}/command/{}", word("--run-as") + 1), json!("0")),
        (format!("{c}/command/{}", word("--run-as") + 1), json!("65530")),
        (format!("{c}/command/{}", word("--run-dir") + 1), json!("/tmp")),
        (format!("{c}/command/{}", word("--no-env")), json!("--")),
        // The security context.
        (format!("{c}/securityContext/runAsUser"), json!(1000)),
        (format!("{c}/securityContext/allowPrivilegeEscalation"), json!(true)),
        (format!("{c}/securityContext/privileged"), json!(true)),
        (format!("{c}/securityContext/capabilities/add/-"), json!("SYS_MODULE")),
        (format!("{c}/securityContext/capabilities/drop"), json!([])),
        (format!("{c}/securityContext/seccompProfile"), json!({"type": "Unconfined"})),
        // Mounts and volumes.
        (mount(bin, "mountPath"), json!("/ringfence/d/bin")),
        (mount(bin, "subPath"), json!("x")),
        (mount(bin, "readOnly"), json!(false)),
        (mount(run, "name"), json!("scratch")),
        (mount(policy, "name"), json!("scratch")),
        (mount(policy, "subPath"), json!("x")),
        (format!("{c}/volumeMounts/-"), json!({"name": "x", "mountPath": "/ringfence"})),
        (format!("{c}/volumeMounts/-"), json!({"name": "x", "mountPath": "/run"})),
        (format!("{c}/volumeMounts/-"), json!({"name": "x", "mountPath": "/a/b/c/d/e/f/g/h/i"})),
        (format!("{c}/volumeMounts/-"), json!({"name": "ringfence-bin", "mountPath": "/x"})),
        ("/spec/volumes/-".into(), json!({"name": "ringfence-more", "emptyDir": {}})),
        // The environment that the contract names.
        (format!("{c}/env/-"), json!({"name": "POD_IP", "value": "192.0.2.1"})),
        (format!("{c}/env/-"), json!({"name": "OPENSHELL_ENABLED", "value": "false"})),
        (format!("{c}/env/^"), json!({"name": "A", "value": "http://$(POD_IP)"})),
        (format!("{c}/workingDir"), json!("/elsewhere")),
        // Who else is in the pod.
        ("/spec/containers/-".into(), json!({"name": "more", "image": "x", "command": ["sh"]})),
        ("/spec/containers/-".into(), json!({"name": "mcp-x", "image": "evil"})),
        (
            "/spec/containers/-".into(),
            json!({"name": "mcp-x", "image": "registry.example/mcp:1",
            "volumeMounts": [{"name": "ringfence-run-agent", "mountPath": "/x"}]}),
        ),
        ("/spec/hostNetwork".into(), json!(true)),
        ("/spec/hostPID".into(), json!(true)),
        // The init container.
        ("/spec/initContainers/0/image".into(), json!("evil")),
        ("/spec/initContainers/0/command/0".into(), json!("/evil")),
        ("/spec/initContainers/0/args".into(), json!(["x"])),
        ("/spec/initContainers/0/restartPolicy".into(), json!("Always")),
        ("/spec/initContainers/0/securityContext/runAsUser".into(), json!(0)),
        (
            "/spec/initContainers/0/volumeMounts/-".into(),
            json!({"name": "x", "mountPath": "/ringfence-supervisor"}),
        ),
        // What is written down for people.
        ("/metadata/annotations/ringfence.dev~1status".into(), json!("{}")),
        ("/metadata/annotations/ringfence.dev~1unfenced-containers".into(), json!("agent")),
    ];
    for (index, volume) in live["spec"]["volumes"].as_array().unwrap().iter().enumerate() {
        let name = volume["name"].clone();
        if ["scratch"].iter().any(|foreign| name == *foreign) {
            continue;
        }
        for source in [
            json!({"hostPath": {"path": "/"}}),
            json!({"emptyDir": {}}),
            json!({"configMap": {"name": "mine"}}),
            json!({"image": {"reference": "evil"}}),
        ] {
            let mut forged = source;
            forged["name"] = name.clone();
            hostile.push((format!("/spec/volumes/{index}"), forged));
        }
    }
    for (pointer, value) in hostile {
        let forged = changed(&live, &pointer, value.clone());
        assert!(verdict(&forged).is_some(), "{pointer} {value} passes");
    }
}

/// A pod that never met the mutating webhook, and one made by `kubectl debug --copy-to`.
#[test]
fn what_did_not_pass_the_mutating_webhook_is_told_so() {
    let settings = Settings::default();
    let bare = pod("plain");
    let refused = |pod: &Value| {
        verify(None, pod, &namespace(EXEMPT), &settings, &images(pod), &policy()).unwrap_err()
    };
    let refusal = refused(&bare);
    assert_eq!((refusal.class, refusal.code), (Class::Unfixed, 403));
    assert!(refusal.message.contains("did not pass the mutating webhook"), "{refusal}");
    let mut copy = fenced(&bare, &namespace(EXEMPT), &settings);
    copy["spec"]["containers"][0]["command"] = json!(["sh"]);
    copy["spec"]["containers"][0]["image"] = json!("busybox");
    assert_eq!(refused(&copy).class, Class::Unfixed);
    let unlabelled = Namespace::default();
    let verdict = verify(None, &bare, &unlabelled, &settings, &images(&bare), &policy());
    assert_eq!(verdict, Ok(()));
}

/// Replicas may see the cluster's version at different moments; both ways of delivery are ours.
#[test]
fn the_delivery_is_the_pods() {
    for made in [Delivery::Init, Delivery::Image] {
        for known in [Delivery::Init, Delivery::Image] {
            let of = |delivery| Settings { delivery, ..Settings::default() };
            let live = fenced(&pod("plain"), &namespace(&[]), &of(made));
            let verdict =
                verify(None, &live, &namespace(&[]), &of(known), &images(&live), &policy());
            assert_eq!(verdict, Ok(()));
        }
    }
    let settings = Settings::default();
    let mut both = fenced(&pod("plain"), &namespace(&[]), &settings);
    let volumes = both["spec"]["volumes"].as_array_mut().unwrap();
    let bin = volumes.iter_mut().find(|volume| volume["name"] == "ringfence-bin").unwrap();
    bin["image"] = json!({"reference": settings.image, "pullPolicy": "IfNotPresent"});
    assert!(verify(None, &both, &namespace(&[]), &settings, &images(&both), &policy()).is_err());
}

/// An earlier version, with another image, policy and digest, made the pod: its update is compared
/// with what it was, not with what would be made today.
#[test]
fn an_update_is_compared_with_the_old_object() {
    let ns = namespace(EXEMPT);
    let earlier = Settings {
        image: "ringfence:0.0.9".into(),
        profile: Profile::Reference,
        ..Settings::default()
    };
    let live = fenced(&pod("plain"), &ns, &earlier);
    let mut update = live.clone();
    update["metadata"]["finalizers"] = json!(["x/y"]);
    update["metadata"]["annotations"].as_object_mut().unwrap().remove("ringfence.dev/status");
    update["spec"]["tolerations"] = json!([{"operator": "Exists"}]);
    assert_eq!(verify_update(&live, &update, &ns), Ok(()));
    assert_eq!(
        verify(Some(&live), &update, &ns, &Settings::default(), &images(&live), &policy()),
        Ok(())
    );
    for (pointer, value) in [
        ("/spec/containers/0/image", json!("other")),
        ("/spec/initContainers/0/image", json!("evil")),
    ] {
        let changed = changed(&live, pointer, value);
        assert!(verify_update(&live, &changed, &ns).is_err(), "{pointer}");
    }
}

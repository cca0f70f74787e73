//! What an OpenShift wants besides. None was there to try it on: these tests hold the chart's
//! constraints against what the webhook makes of a pod, by the rules of OpenShift's own admission.

use std::collections::BTreeMap;

use ringfence::admission::{
    Delivery, ImageConfig, Namespace, Outcome, PolicyRef, Profile, Settings, inject,
};
use serde_json::{Value, json};

use crate::render::{Chart, Objects, rules};

fn enabled(more: &Value) -> Value {
    let mut values = json!({ "openshift": { "enabled": true } });
    values.as_object_mut().expect("one").extend(more.as_object().expect("one").clone());
    values
}

fn constraints(objects: &Objects) -> Value {
    objects.of("SecurityContextConstraints").next().expect("one").clone()
}

fn named(objects: &Objects, kind: &str, name: &str) -> Value {
    let found = objects.of(kind).find(|object| object["metadata"]["name"] == name);
    found.unwrap_or_else(|| panic!("no {kind} {name}")).clone()
}

fn words(list: &Value) -> Vec<&str> {
    list.as_array().into_iter().flatten().filter_map(Value::as_str).collect()
}

/// A pod as OpenShift's admission leaves it before webhooks: with the namespace's user.
fn fenced(profile: Profile, delivery: Delivery) -> Value {
    let mut pod = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": { "name": "p", "namespace": "ns" },
        "spec": {
            "securityContext": { "fsGroup": 1_000_660_000_u32,
                "seccompProfile": { "type": "RuntimeDefault" },
                "seLinuxOptions": { "level": "s0:c26,c5" } },
            "volumes": [
                { "name": "token", "projected": { "sources": [] } },
                { "name": "work", "ephemeral": {} },
            ],
            "containers": [{ "name": "agent", "image": "agent", "command": ["/agent"],
                "securityContext": { "runAsUser": 1_000_660_000_u32, "runAsNonRoot": true,
                    "allowPrivilegeEscalation": false, "capabilities": { "drop": ["ALL"] } } }],
        },
    });
    let label = ("ringfence.dev/inject".to_owned(), "enabled".to_owned());
    let ns =
        Namespace { name: "ns".into(), labels: BTreeMap::from([label]), ..Namespace::default() };
    let settings = Settings { profile, delivery, ..Settings::default() };
    let images = BTreeMap::from([("agent".to_owned(), ImageConfig::default())]);
    let policy = PolicyRef {
        configmap: "ringfence-policy-0".into(),
        digest: "sha256:0".into(),
        keys: vec!["policy.yaml".into()],
        ..PolicyRef::default()
    };
    let Outcome::Inject(done) = inject(None, &pod, &ns, &settings, &images, &policy) else {
        panic!("it is fenced")
    };
    json_patch::patch(&mut pod, &done.ops).expect("it applies");
    pod
}

/// What the constraints refuse of a pod, or would still change in it: after the webhook's second
/// look nothing may be changed any more.
fn objections(scc: &Value, pod: &Value) -> Vec<String> {
    let mut all = Vec::new();
    let mut object = |bad: bool, what: String| all.extend(bad.then_some(what));
    let spec = &pod["spec"];
    let volumes = words(&scc["volumes"]);
    for volume in spec["volumes"].as_array().into_iter().flatten() {
        for kind in volume.as_object().expect("a volume").keys().filter(|key| *key != "name") {
            object(!volumes.contains(&kind.as_str()), format!("a volume of kind {kind}"));
        }
    }
    let profile = |context: &Value| match context["seccompProfile"]["type"].as_str() {
        Some("RuntimeDefault") => Some("runtime/default"),
        Some("Unconfined") => Some("unconfined"),
        _ => None,
    };
    let of_pod = profile(&spec["securityContext"]);
    let profiles = words(&scc["seccompProfiles"]);
    let containers = ["initContainers", "containers"].map(|list| spec[list].as_array());
    for container in containers.into_iter().flatten().flatten() {
        let (name, context) = (&container["name"], &container["securityContext"]);
        let seccomp = profile(context).or(of_pod).unwrap_or("none");
        object(!profiles.contains(&seccomp), format!("{name}: seccomp {seccomp}"));
        let escalates = context["allowPrivilegeEscalation"] != false;
        object(escalates && scc["allowPrivilegeEscalation"] == false, format!("{name}: escalates"));
        for added in words(&context["capabilities"]["add"]) {
            let allowed = words(&scc["allowedCapabilities"]).contains(&added);
            object(!allowed, format!("{name}: {added}"));
        }
        for dropped in words(&scc["requiredDropCapabilities"]) {
            let is_dropped = words(&context["capabilities"]["drop"]).contains(&dropped);
            object(!is_dropped, format!("{name}: {dropped} is not dropped"));
        }
        let range = scc["runAsUser"]["type"] != "RunAsAny";
        object(range, format!("{name}: user {}", context["runAsUser"]));
    }
    all
}

#[test]
fn the_constraints_are_what_a_fenced_pod_needs_and_no_more() {
    let Some(chart) = Chart::here() else { return };
    for (profile, profile_word) in
        [(Profile::Hardened, "hardened"), (Profile::Reference, "reference")]
    {
        for (delivery, delivery_word) in [(Delivery::Image, "image"), (Delivery::Init, "init")] {
            let supervisor = json!({ "profile": profile_word, "delivery": delivery_word });
            let scc = constraints(&chart.objects(&enabled(&json!({ "supervisor": supervisor }))));
            let pod = fenced(profile, delivery);
            assert_eq!(objections(&scc, &pod), [""; 0], "{supervisor}");
            // Each capability is one of the fence's.
            let context = &pod["spec"]["containers"][0]["securityContext"];
            let mut needed = words(&context["capabilities"]["add"]);
            needed.sort_unstable();
            assert_eq!(words(&scc["allowedCapabilities"]), needed);
            // What the other profile or delivery needs is not granted.
            let reference = profile == Profile::Reference;
            assert_eq!(scc["allowPrivilegeEscalation"], reference);
            assert_eq!(words(&scc["seccompProfiles"]).contains(&"unconfined"), reference);
            assert_eq!(words(&scc["volumes"]).contains(&"image"), delivery == Delivery::Image);
        }
    }
    // `auto` may become an image volume at any upgrade of the cluster.
    let auto = constraints(&chart.objects(&enabled(&json!({}))));
    assert!(words(&auto["volumes"]).contains(&"image"), "{auto}");
    assert_ne!(objections(&auto, &fenced(Profile::Reference, Delivery::Init)), [""; 0]);
}

#[test]
fn they_open_nothing_of_the_host_and_are_nobodys_by_themselves() {
    let Some(chart) = Chart::here() else { return };
    let scc = constraints(&chart.objects(&enabled(&json!({}))));
    assert_eq!(scc["apiVersion"], "security.openshift.io/v1");
    assert_eq!(scc["metadata"]["name"], "ringfence");
    // The type's required fields among them.
    for no in [
        "allowHostDirVolumePlugin",
        "allowHostIPC",
        "allowHostNetwork",
        "allowHostPID",
        "allowHostPorts",
        "allowPrivilegedContainer",
        "readOnlyRootFilesystem",
    ] {
        assert_eq!(scc[no], false, "{no}");
    }
    assert_eq!((&scc["users"], &scc["groups"]), (&json!([]), &json!([])));
    // With a priority, or added capabilities, it would be tried before the namespace's own.
    for none in ["priority", "defaultAddCapabilities"] {
        assert_eq!(scc.get(none), Some(&Value::Null), "{none}");
    }
    assert_eq!(scc["seLinuxContext"], json!({ "type": "MustRunAs" }));
    for any in ["runAsUser", "fsGroup", "supplementalGroups"] {
        assert_eq!(scc[any], json!({ "type": "RunAsAny" }), "{any}");
    }
    let volumes = words(&scc["volumes"]);
    for no in ["*", "hostPath", "csi", "nfs"] {
        assert!(!volumes.contains(&no), "{no}");
    }
    let more = json!({ "openshift": { "enabled": true, "volumes": ["csi"] } });
    assert!(words(&constraints(&chart.objects(&more))["volumes"]).contains(&"csi"));
    for bad in ["hostPath", "*", "none"] {
        let values = json!({ "openshift": { "enabled": true, "volumes": [bad] } });
        let error = chart.text(&values).expect_err("refused");
        assert!(error.contains("openshift"), "{bad}: {error}");
    }
}

#[test]
fn two_roles_are_made_and_bound_to_nobody() {
    let Some(chart) = Chart::here() else { return };
    let off = chart.objects(&json!({}));
    let on = chart.objects(&enabled(&json!({})));
    let names = |objects: &Objects| -> Vec<String> {
        let all = objects.of("ClusterRole").map(|role| role["metadata"]["name"].to_string());
        all.collect()
    };
    assert_eq!(names(&on).len(), names(&off).len() + 2);
    // The names that `ringfence enable --scc` looks for.
    assert_eq!(
        named(&on, "ClusterRole", "ringfence-scc")["rules"],
        json!([{ "apiGroups": ["security.openshift.io"],
            "resources": ["securitycontextconstraints"], "resourceNames": ["ringfence"],
            "verbs": ["use"] }])
    );
    let runner = named(&on, "ClusterRole", "ringfence-openshift-runner");
    let rules = runner["rules"].as_array().expect("rules");
    let groups: Vec<&str> = rules.iter().flat_map(|rule| words(&rule["apiGroups"])).collect();
    for group in ["build.openshift.io", "image.openshift.io", "route.openshift.io"] {
        assert!(groups.contains(&group), "{group}");
    }
    assert!(groups.iter().all(|group| group.ends_with(".openshift.io")), "{groups:?}");
    assert!(!runner["rules"].to_string().contains('*'), "{runner}");
    for binding in ["ClusterRoleBinding", "RoleBinding"] {
        let all = on.of(binding).filter(|found| {
            let role = found["roleRef"]["name"].as_str().unwrap_or_default();
            role.ends_with("-scc") || role.ends_with("-openshift-runner")
        });
        // `helm test` binds it in its own namespace, while it runs.
        let all: Vec<&Value> = all.map(|found| &found["metadata"]["namespace"]).collect();
        let tests: &[&str] = if binding == "RoleBinding" { &["ringfence-selftest"] } else { &[] };
        assert_eq!(all, tests);
    }
    let other = chart.objects(&enabled(&json!({ "fullnameOverride": "fence" })));
    let role = named(&other, "ClusterRole", "fence-scc");
    assert_eq!(role["rules"][0]["resourceNames"], json!(["fence"]));
    assert_eq!(constraints(&other)["metadata"]["name"], "fence");
}

/// Nobody else's webhook asks the API server what others may.
#[test]
fn who_may_use_the_constraints_is_looked_up_only_there() {
    let Some(chart) = Chart::here() else { return };
    let flag = |objects: &Objects| {
        let all = objects.webhook_args();
        all.into_iter().find(|arg| arg.starts_with("--security-context-constraints="))
    };
    let asks = |objects: &Objects| {
        rules(objects).filter(|rule| rule["resources"] == json!(["subjectaccessreviews"])).count()
    };
    let off = chart.objects(&json!({}));
    assert_eq!((flag(&off), asks(&off)), (None, 0));
    let on = chart.objects(&enabled(&json!({ "fullnameOverride": "fence" })));
    assert_eq!(flag(&on).as_deref(), Some("--security-context-constraints=fence"));
    assert_eq!(asks(&on), 1);
    let role = named(&on, "ClusterRole", "fence");
    let rule = json!({ "apiGroups": ["authorization.k8s.io"],
        "resources": ["subjectaccessreviews"], "verbs": ["create"] });
    assert!(role["rules"].as_array().expect("rules").contains(&rule), "{role}");
}

/// A user that is not of the namespace's range is refused there.
#[test]
fn the_charts_own_pods_leave_their_user_to_the_namespace() {
    let Some(chart) = Chart::here() else { return };
    let contexts = |objects: &Objects| -> Vec<Value> {
        let templates = ["Deployment", "Job"]
            .map(|kind| objects.of(kind).map(|object| object["spec"]["template"]["spec"].clone()));
        let pods = objects.of("Pod").map(|pod| pod["spec"].clone());
        let all = templates.into_iter().flatten().chain(pods);
        all.map(|spec| {
            assert!(spec["containers"][0]["securityContext"]["runAsUser"].is_null());
            spec["securityContext"].clone()
        })
        .collect()
    };
    let on = contexts(&chart.objects(&enabled(&json!({}))));
    let seccomp = json!({ "type": "RuntimeDefault" });
    let left = json!({ "runAsNonRoot": true, "seccompProfile": seccomp });
    // The webhook, the hook of an uninstallation, the test.
    assert_eq!(on, [left.clone(), left.clone(), left]);
    let fixed = json!({ "runAsNonRoot": true, "runAsUser": 65532, "runAsGroup": 65532,
        "seccompProfile": seccomp });
    assert_eq!(contexts(&chart.objects(&json!({}))), [fixed.clone(), fixed.clone(), fixed]);
}

//! The label value `strict`: everything is fenced, or the pod is refused.

use serde_json::{Value, json};

use super::super::*;
use super::{
    apply, classes, corpus, drop_empty, images, labelled, policy, shapes, without_ours_of,
};

const EXEMPT: &[(&str, &str)] = &[("unfenced-containers", "mcp-*=registry.example/mcp:*")];

fn run(pod: &Value, settings: &Settings) -> Outcome {
    inject(None, pod, &labelled("strict", EXEMPT), settings, &images(pod), &policy())
}

fn class(pod: &Value) -> Option<Class> {
    match run(pod, &Settings::default()) {
        Outcome::Refuse(refusal) => Some(refusal.class),
        _ => None,
    }
}

fn fenced(pod: &Value, settings: &Settings) -> Value {
    match run(pod, settings) {
        Outcome::Inject(injection) => apply(pod, &injection),
        other => panic!("not injected: {other:?}"),
    }
}

/// An agent with an init container and a native sidecar, as an author would submit it.
fn agent() -> Value {
    json!({"metadata": {}, "spec": {
        "initContainers": [
            {"name": "fetch", "image": "i", "command": ["fetch"]},
            {"name": "side", "image": "i", "restartPolicy": "Always",
                "startupProbe": {"exec": {"command": ["ready"]}}}],
        "containers": [
            {"name": "agent", "image": "i", "command": ["agent"]},
            {"name": "mcp-files", "image": "registry.example/mcp:1", "securityContext": {
                "runAsUser": 7, "allowPrivilegeEscalation": false,
                "capabilities": {"drop": ["ALL"]}}}]}})
}

#[test]
fn init_containers_and_sidecars_are_fenced() {
    for settings in shapes() {
        let pod = agent();
        let after = fenced(&pod, &settings);
        assert_eq!(fenced_containers(&after), ["agent", "fetch", "side"]);
        let lists = ["containers", "initContainers"];
        assert_eq!(without_ours_of(&pod, &lists), without_ours_of(&after, &lists));
        // What is exempt is as it was; the rest has a directory and a port of its own.
        assert_eq!(after["spec"]["containers"][1], pod["spec"]["containers"][1]);
        let text = after.to_string();
        for own in ["ringfence-run-agent", "ringfence-run-fetch", "ringfence-run-side", "15202"] {
            assert!(text.contains(own), "{own} in {text}");
        }
        let init = after["spec"]["initContainers"].as_array().unwrap();
        assert_eq!(init[0]["name"] == "ringfence-install", settings.delivery == Delivery::Init);
        let side = init.last().unwrap();
        assert_eq!(side["startupProbe"]["exec"]["command"][1], "enter");
        let verdict = verify(
            None,
            &after,
            &labelled("strict", EXEMPT),
            &settings,
            &images(&after),
            &policy(),
        );
        assert_eq!(verdict, Ok(()));
        // Each of them is told apart in the needs, and `kubectl exec` enters each.
        let needs = needs(&pod, &labelled("strict", EXEMPT), &settings, &policy()).unwrap();
        let names: Vec<_> = needs.images.iter().map(|need| need.container.as_str()).collect();
        assert_eq!(names, ["agent", "fetch", "side"]);
        for name in names {
            let options = json!({"container": name, "command": ["sh"]});
            assert_eq!(exec::wrap(&options, &after).unwrap().len(), 1, "{name}");
        }
        // Under `enabled` the same pod has one fence.
        let outcome =
            inject(None, &pod, &labelled("enabled", EXEMPT), &settings, &images(&pod), &policy());
        let Outcome::Inject(injection) = outcome else { panic!("refused") };
        assert_eq!(fenced_containers(&apply(&pod, &injection)), ["agent"]);
        assert!(classes(&injection).contains(&Class::InitContainer));
    }
}

#[test]
fn a_manifest_applied_again_gets_all_its_fences_back() {
    for settings in shapes() {
        let mut live = fenced(&agent(), &settings);
        let Outcome::Inject(injection) = restore(&live, &agent(), &labelled("strict", EXEMPT))
        else {
            panic!("not restored")
        };
        let mut after = apply(&agent(), &injection);
        assert_eq!(verify_update(&live, &after, &labelled("strict", EXEMPT)), Ok(()));
        drop_empty(&mut after);
        drop_empty(&mut live);
        assert_eq!(after, live);
        // The image of a fenced init container is as fixed as that of any other.
        let at = live["spec"]["initContainers"].as_array().unwrap().len() - 1;
        let mut other = live.clone();
        other["spec"]["initContainers"][at]["image"] = json!("other");
        let refusal = verify_update(&live, &other, &labelled("strict", EXEMPT)).unwrap_err();
        assert_eq!(refusal.class, Class::ImageChange);
    }
}

/// One change of the agent's pod, and what is said to it.
#[test]
fn what_reaches_around_the_fence_is_refused() {
    let hostile: &[(&str, Value, Class)] = &[
        ("/spec/hostNetwork", json!(true), Class::HostNetwork),
        ("/spec/hostPID", json!(true), Class::HostPid),
        ("/spec/shareProcessNamespace", json!(true), Class::ShareProcessNamespace),
        ("/spec/hostAliases", json!([{"ip": "1.2.3.4"}]), Class::HostAliases),
        ("/spec/dnsConfig", json!({"nameservers": ["1.2.3.4"]}), Class::DnsConfig),
        ("/spec/dnsPolicy", json!("None"), Class::DnsConfig),
        ("/spec/volumes", json!([{"name": "v", "hostPath": {"path": "/"}}]), Class::Baseline),
        (
            "/spec/securityContext",
            json!({"seccompProfile": {"type": "Unconfined"}}),
            Class::Baseline,
        ),
        (
            "/spec/securityContext",
            json!({"sysctls": [{"name": "net.core.somaxconn"}]}),
            Class::Baseline,
        ),
        ("/spec/containers/0/securityContext", json!({"privileged": true}), Class::Privileged),
        (
            "/spec/containers/0/securityContext",
            json!({"capabilities": {"add": ["SYS_ADMIN"]}}),
            Class::Baseline,
        ),
        (
            "/spec/initContainers/0/securityContext",
            json!({"capabilities": {"add": ["SYS_PTRACE"]}}),
            Class::Baseline,
        ),
        ("/spec/initContainers/0/securityContext", json!({"privileged": true}), Class::Privileged),
        (
            "/spec/initContainers/1/ports",
            json!([{"containerPort": 1, "hostPort": 1}]),
            Class::Baseline,
        ),
        ("/spec/containers/1/image", json!("registry.example/other:1"), Class::Baseline),
        ("/spec/containers/1/securityContext/privileged", json!(true), Class::PrivilegedUnfenced),
        ("/spec/containers/1/securityContext/runAsUser", json!(0), Class::UnfencedUser),
        ("/spec/containers/1/securityContext/runAsUser", json!(65530), Class::UnfencedUser),
        ("/spec/containers/1/securityContext/runAsUser", json!(null), Class::UnfencedUser),
        (
            "/spec/containers/1/securityContext/allowPrivilegeEscalation",
            json!(null),
            Class::UnfencedUser,
        ),
        ("/spec/containers/1/securityContext/capabilities", json!({}), Class::UnfencedCapability),
        (
            "/spec/containers/1/volumeMounts",
            json!([{"name": "ringfence-run-agent", "mountPath": "/x"}]),
            Class::ForeignUse,
        ),
        (
            "/spec/containers/0/volumeMounts",
            json!([{"name": "x", "mountPath": "/run"}]),
            Class::Overlap,
        ),
        (
            "/spec/containers/0/volumeMounts",
            json!([{"name": "x", "mountPath": "/etc//resolv.conf", "subPath": "conf"}]),
            Class::DnsConfig,
        ),
        (
            "/spec/initContainers/1/volumeMounts",
            json!([{"name": "x", "mountPath": "/srv/../etc/hosts", "subPath": "hosts"}]),
            Class::HostAliases,
        ),
        ("/spec/containers/0/terminationMessagePath", json!("/etc/resolv.conf"), Class::DnsConfig),
        ("/spec/hostnameOverride", json!("api.example"), Class::HostAliases),
        (
            "/spec/initContainers/0/volumeMounts",
            json!([{"name": "x", "mountPath": "/proc/self/root/etc/hosts"}]),
            Class::Overlap,
        ),
        (
            "/spec/initContainers/0/volumeMounts",
            json!([{"name": "x", "mountPath": "/ringfence/d"}]),
            Class::Overlap,
        ),
        ("/spec/initContainers/0/securityContext", json!({"runAsUser": 65530}), Class::OwnUser),
        ("/metadata/annotations", json!({"kubernetes.io/config.mirror": "x"}), Class::MirrorPod),
    ];
    assert_eq!(class(&agent()), None);
    for (pointer, value, expected) in hostile {
        let mut pod = agent();
        let (parent, name) = pointer.rsplit_once('/').unwrap();
        pod.pointer_mut(parent).unwrap()[name] = value.clone();
        // Another image is no longer exempt: the container is fenced like any other.
        if pointer.ends_with("/image") {
            assert_eq!(fenced_containers(&fenced(&pod, &Settings::default())).len(), 4);
            continue;
        }
        assert_eq!(class(&pod), Some(*expected), "{pointer} {value}");
    }
    let nothing = json!({"spec": {"containers": [agent()["spec"]["containers"][1]]}});
    assert_eq!(class(&nothing), Some(Class::NothingToFence));
}

/// A name and an image make a program only as long as its author brings nothing of theirs.
#[test]
fn an_exempt_container_brings_what_its_exemption_names() {
    let verdict = |exempt: &str, field: &str, value: &Value| {
        let mut pod = agent();
        pod["spec"]["containers"][1][field] = value.clone();
        let ns = labelled("strict", &[("unfenced-containers", exempt)]);
        let settings = Settings::default();
        match inject(None, &pod, &ns, &settings, &images(&pod), &policy()) {
            Outcome::Refuse(refusal) => Some((refusal.class, refusal.message)),
            Outcome::Inject(injection) => {
                let after = apply(&pod, &injection);
                assert_eq!(after["spec"]["containers"][1], pod["spec"]["containers"][1]);
                None
            }
            Outcome::Untouched => panic!("untouched"),
        }
    };
    for (field, value, word) in [
        ("command", json!(["sh"]), "command"),
        ("args", json!(["-c"]), "command"),
        ("workingDir", json!("/x"), "command"),
        ("env", json!([{"name": "LD_PRELOAD", "value": "/x"}]), "env"),
        ("envFrom", json!([{"configMapRef": {"name": "x"}}]), "env"),
        ("volumeMounts", json!([{"name": "x", "mountPath": "/usr/bin"}]), "mounts"),
        ("lifecycle", json!({"postStart": {"exec": {"command": ["x"]}}}), "lifecycle"),
        ("livenessProbe", json!({"exec": {"command": ["x"]}}), "probes"),
        ("stdin", json!(true), "exec"),
    ] {
        let bare = "mcp-*=registry.example/mcp:*";
        let (class, message) = verdict(bare, field, &value).expect("refused");
        assert_eq!(class, Class::UnfencedOwn, "{field}");
        assert!(message.contains(field) && message.contains(&format!("own={word}")), "{message}");
        let all = ["command", "env", "mounts", "lifecycle", "probes", "exec"];
        let others: Vec<&str> = all.into_iter().filter(|other| *other != word).collect();
        let others = format!("{bare};own={}", others.join("+"));
        assert_eq!(verdict(&others, field, &value).expect("refused").0, Class::UnfencedOwn);
        assert_eq!(verdict(&format!("{bare};own={word}"), field, &value), None, "{field}");
        // Whoever is trusted says nothing.
        let mut pod = agent();
        pod["spec"]["containers"][1][field] = value;
        let ns = labelled("enabled", &[("unfenced-containers", bare)]);
        let made = inject(None, &pod, &ns, &Settings::default(), &images(&pod), &policy());
        assert!(matches!(made, Outcome::Inject(_)), "{made:?}");
    }
}

#[test]
fn what_a_tag_means_is_written_behind_it() {
    for settings in shapes() {
        let mut pod = agent();
        pod["spec"]["initContainers"][0]["image"] = json!("r/fetch:1@sha256:0b");
        let after = fenced(&pod, &settings);
        let image = |name: &str| {
            let all = ["containers", "initContainers"].map(|list| after["spec"][list].as_array());
            let found = all.into_iter().flatten().flatten().find(|c| c["name"] == name).unwrap();
            found["image"].as_str().unwrap().to_owned()
        };
        let pinned = format!("i@{}", super::DIGEST);
        assert_eq!([image("agent"), image("side")], [pinned.clone(), pinned]);
        // Named by digest, or exempt, whose pattern is the administrator's.
        assert_eq!(image("fetch"), "r/fetch:1@sha256:0b");
        assert_eq!(image("mcp-files"), "registry.example/mcp:1");
        // A name that lost its digest again, or got another one, is not as injected.
        for other in ["i", "i@sha256:0c"] {
            let mut changed = after.clone();
            changed["spec"]["containers"][0]["image"] = json!(other);
            let ns = labelled("strict", EXEMPT);
            let verdict = verify(None, &changed, &ns, &settings, &images(&changed), &policy());
            // Another digest is another image, named as exactly.
            assert_eq!(verdict.is_err(), other == "i", "{other}");
        }
    }
    let mut unknown = images(&agent());
    unknown.get_mut("agent").unwrap().digest = None;
    let made = inject(
        None,
        &agent(),
        &labelled("strict", EXEMPT),
        &Settings::default(),
        &unknown,
        &policy(),
    );
    assert!(matches!(made, Outcome::Refuse(r) if r.class == Class::ImageTag));
    // Under `enabled` names stay as they are.
    let ns = labelled("enabled", EXEMPT);
    let made = inject(None, &agent(), &ns, &Settings::default(), &unknown, &policy());
    let Outcome::Inject(injection) = made else { panic!("refused") };
    assert_eq!(apply(&agent(), &injection)["spec"]["containers"][0]["image"], "i");
}

/// What passes in an injected container because it is ours is taken from nobody else.
#[test]
fn an_imitated_injection_gains_nothing() {
    let settings = Settings::default();
    let mut forged = fenced(&agent(), &settings);
    let wide = json!({"drop": [], "add": ["SYS_ADMIN", "SYS_MODULE", "ALL"]});
    forged["spec"]["containers"][0]["securityContext"]["capabilities"] = wide.clone();
    let after = fenced(&forged, &settings);
    let capabilities = &after["spec"]["containers"][0]["securityContext"]["capabilities"];
    assert_eq!(capabilities["drop"], json!(["ALL"]));
    assert!(!capabilities.to_string().contains("SYS_MODULE"));
    // An exempt container is not ours, whatever its command looks like.
    let mut exempt = agent();
    let container = &mut exempt["spec"]["containers"][1];
    container["command"] = forged["spec"]["containers"][0]["command"].clone();
    container["securityContext"]["capabilities"] = json!({"drop": ["ALL"], "add": ["SYS_ADMIN"]});
    assert_eq!(class(&exempt), Some(Class::Baseline));
    // Nor is what stands under the init container's name left as the author had it.
    let mut install = agent();
    install["spec"]["initContainers"] = json!([{"name": "ringfence-install", "image": "evil",
        "securityContext": {"seLinuxOptions": {"type": "spc_t"}}}]);
    assert_eq!(class(&install), Some(Class::Baseline));
    install["spec"]["initContainers"][0]["securityContext"] = json!({"privileged": true});
    let after = fenced(&install, &settings);
    assert!(!after["spec"]["initContainers"].to_string().contains("evil"));
    assert!(!after["spec"]["initContainers"].to_string().contains("privileged"));
}

#[test]
fn the_corpus_is_fenced_whole_or_refused() {
    let (mut whole, mut refused) = (0, Vec::new());
    for (name, pod) in corpus().into_iter().filter(|(name, _)| !name.starts_with("refused-")) {
        for settings in shapes() {
            let ns = labelled("strict", EXEMPT);
            match run(&pod, &settings) {
                Outcome::Refuse(refusal) => {
                    assert!(refusal.code < 500, "{name}: {refusal}");
                    refused.push(format!("{name}: {}", refusal.class.slug()));
                }
                Outcome::Inject(first) => {
                    let after = apply(&pod, &first);
                    let lists = ["containers", "initContainers"];
                    assert_eq!(
                        without_ours_of(&pod, &lists),
                        without_ours_of(&after, &lists),
                        "{name}"
                    );
                    let verdict = verify(None, &after, &ns, &settings, &images(&after), &policy());
                    assert_eq!(verdict, Ok(()), "{name}");
                    whole += 1;
                }
                Outcome::Untouched => panic!("{name}"),
            }
        }
    }
    assert!(whole >= 15, "{whole} whole; refused: {refused:#?}");
}

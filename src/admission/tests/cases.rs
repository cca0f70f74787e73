//! Single pods: each class that is refused or warned about, and what exactly is injected.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::super::*;
use super::{classes, fenced, images, labelled, namespace, pod, policy, refusal, run};

#[test]
fn the_reference_runner_gets_the_reference_shape() {
    let pod = pod("reference-runner");
    let settings = Settings { profile: Profile::Reference, ..Settings::default() };
    let ns = namespace(&[("unfenced-containers", "mcp-*")]);
    let after = fenced(&pod, &ns, &settings);
    let runner = &after["spec"]["containers"][0];
    let env: BTreeMap<&str, &str> = runner["env"]
        .as_array()
        .unwrap()
        .iter()
        .map(|e| (e["name"].as_str().unwrap(), e["value"].as_str().unwrap_or_default()))
        .collect();
    assert_eq!(runner["env"][0]["name"], "POD_IP");
    assert_eq!(env["OPENSHELL_ENABLED"], "true");
    assert_eq!(env["OPENSHELL_POLICY_DATA"], "/etc/openshell/policy.yaml");
    assert_eq!(env["AMBIENT_MCP_URL"], "http://$(POD_IP):8090");
    assert_eq!(env["CREDENTIAL_MCP_URLS"], r#"{"github":"http://$(POD_IP):8091/mcp"}"#);
    let context = &runner["securityContext"];
    assert_eq!(context["runAsUser"], 0);
    assert_eq!(context["runAsNonRoot"], false);
    assert_eq!(context["allowPrivilegeEscalation"], true);
    assert_eq!(after["spec"]["securityContext"]["seccompProfile"]["type"], "Unconfined");
    for capability in
        ["NET_ADMIN", "SYS_ADMIN", "SYS_PTRACE", "SETUID", "SETGID", "CHOWN", "DAC_OVERRIDE"]
    {
        assert!(context["capabilities"]["add"].as_array().unwrap().contains(&json!(capability)));
    }
    let policy = after["spec"]["volumes"]
        .as_array()
        .unwrap()
        .iter()
        .find(|v| v["name"] == "openshell-policy");
    assert_eq!(policy.unwrap()["configMap"]["name"], "ringfence-policy-0a");
    // The sidecars are as they were.
    assert_eq!(after["spec"]["containers"][1], pod["spec"]["containers"][1]);
}

#[test]
fn a_command_of_the_image_is_looked_up_and_doubled() {
    let pod = json!({"metadata": {}, "spec": {"containers": [{"name": "a", "image": "i"}]}});
    let ns = namespace(&[]);
    let needed = needs(&pod, &ns, &Settings::default(), &policy()).unwrap();
    assert_eq!(
        needed.images,
        [ImageNeed { container: "a".into(), image: "i".into(), command: true, user: true }]
    );
    let after = fenced(&pod, &ns, &Settings::default());
    let command: Vec<&str> = after["spec"]["containers"][0]["command"]
        .as_array()
        .unwrap()
        .iter()
        .map(|word| word.as_str().unwrap())
        .collect();
    assert!(command.ends_with(&["--no-env", "--", "/entry", "$$x", "$$(HOME)"]), "{command:?}");
    let flag = |name| command[command.iter().position(|word| *word == name).unwrap() + 1];
    assert_eq!(flag("--run-as"), "app:web");
    assert_eq!(flag("--workdir"), "/srv$$");
    assert_eq!(flag("--upstream-ca"), "/etc/openshell/upstream-ca.crt");
    assert!(!command.contains(&"--policy-rules"));
    let none = inject(None, &pod, &ns, &Settings::default(), &BTreeMap::new(), &policy());
    assert!(matches!(none, Outcome::Refuse(r) if r.class == Class::ImageUnread));
}

/// What the policy says, and which files it has, may change while the pod runs.
#[test]
fn a_pod_that_follows_its_policy_depends_on_its_name_alone() {
    let ns = namespace(&[("live-policy", "allowed"), ("policy", "mine")]);
    let settings = Settings::default();
    let after = fenced(&pod("plain"), &ns, &settings);
    let command: Vec<&str> = after["spec"]["containers"][0]["command"]
        .as_array()
        .unwrap()
        .iter()
        .map(|word| word.as_str().unwrap())
        .collect();
    let at = command.iter().position(|word| *word == "--live-policy").unwrap();
    assert_eq!(command[at + 1], "/etc/openshell");
    for flag in ["--policy-data", "--policy-rules", "--policy-digest", "--upstream-ca"] {
        assert!(!command.contains(&flag), "{command:?}");
    }
    let volumes = after["spec"]["volumes"].as_array().unwrap();
    let volume = volumes.iter().find(|volume| volume["name"] == "openshell-policy").unwrap();
    assert_eq!(volume["configMap"]["name"], "ringfence-live-mine");
    let status = after["metadata"]["annotations"]["ringfence.dev/status"].as_str().unwrap();
    assert!(status.contains("\"policy\":\"live:mine\""), "{status}");
    // By the time it is verified the source has another text, and another file.
    let later = PolicyRef {
        configmap: "ringfence-policy-0b".into(),
        digest: "sha256:0b".into(),
        keys: vec!["policy.yaml".into(), "policy.rego".into()],
        ..policy()
    };
    assert_eq!(verify(None, &after, &ns, &settings, &images(&after), &later), Ok(()));
    // The annotation is the namespace's. A pod that follows may come from a replica that has not seen
    // it go; where nothing is believed it is refused.
    let fixed = namespace(&[("policy", "mine")]);
    let strict = labelled("strict", &[("policy", "mine")]);
    for (ns, expected) in [(&fixed, None), (&strict, Some(Class::AnotherVersion))] {
        let verdict = verify(None, &after, ns, &settings, &images(&after), &policy());
        assert_eq!(verdict.err().map(|refusal| refusal.class), expected);
    }
    let mounted =
        json!({"name": "openshell-policy", "configMap": {"name": "ringfence-live-other"}});
    let mut other = after.clone();
    let index = volumes.iter().position(|volume| volume["name"] == "openshell-policy").unwrap();
    other["spec"]["volumes"][index] = mounted;
    assert!(verify(None, &other, &ns, &settings, &images(&other), &policy()).is_err());
    // An update is compared with what it was.
    let manifest = pod("plain");
    let Outcome::Inject(restored) = restore(&after, &manifest, &fixed) else { panic!("restored") };
    let mut applied = manifest.clone();
    json_patch::patch(&mut applied, &restored.ops).unwrap();
    assert_eq!(applied["spec"], after["spec"]);
}

/// All containers of a pod share its loopback.
#[test]
fn each_fenced_container_has_an_admin_port_of_its_own() {
    let pod = json!({"metadata": {}, "spec": {
        "initContainers": [{"name": "side", "image": "s", "restartPolicy": "Always",
            "ports": [{"containerPort": 15202}]}],
        "containers": [
            {"name": "a", "image": "i", "command": ["x"]},
            {"name": "mcp", "image": "m", "ports": [{"containerPort": 15200}]},
            {"name": "b", "image": "i", "command": ["x"]}]}});
    let ns = namespace(&[("unfenced-containers", "mcp")]);
    let after = fenced(&pod, &ns, &Settings::default());
    let port = |index: usize| {
        let command = after["spec"]["containers"][index]["command"].as_array().unwrap();
        let at = command.iter().position(|word| word == "--admin-port").unwrap();
        command[at + 1].clone()
    };
    assert_eq!([port(0), port(2)], [json!("15201"), json!("15203")]);
}

#[test]
fn every_fenced_image_is_read_for_its_volumes() {
    let pod = json!({"metadata": {}, "spec": {"containers": [
        {"name": "a", "image": "i", "command": ["x"], "securityContext": {"runAsUser": 5}},
        {"name": "mcp", "image": "m"}]}});
    let ns = namespace(&[("unfenced-containers", "mcp")]);
    let settings = Settings::default();
    let needed = needs(&pod, &ns, &settings, &policy()).unwrap().images;
    let need = ImageNeed { container: "a".into(), image: "i".into(), command: false, user: false };
    assert_eq!(needed, [need]);
    assert!(needed[0].why().contains("VOLUMEs decide where the supervisor is mounted"));
    let with = |images: &BTreeMap<String, ImageConfig>| {
        inject(None, &pod, &ns, &settings, images, &policy())
    };
    let Outcome::Refuse(unread) = with(&BTreeMap::new()) else { panic!("fenced blindly") };
    assert_eq!((unread.class, unread.code), (Class::ImageUnread, 422));
    assert!(unread.message.contains("image i") && unread.message.contains("VOLUME"));
    let volume = |path: &str| {
        let image = ImageConfig { volumes: vec![path.into()], ..ImageConfig::default() };
        with(&BTreeMap::from([("a".to_owned(), image)]))
    };
    let Outcome::Refuse(near) = volume("/ringfence/d") else { panic!("covered") };
    assert_eq!((near.class, near.code), (Class::Overlap, 422));
    let Outcome::Inject(injection) = volume("/link/2/3/4/5/6/7/8/9/10") else { panic!("refused") };
    let after = super::apply(&pod, &injection);
    let supervisor = supervisor_path(&after["spec"]["containers"][0]).unwrap();
    assert!(supervisor.split('/').count() > 12, "{supervisor}");
}

#[test]
fn a_fenced_container_keeps_its_image() {
    let ns = namespace(&[("unfenced-containers", "mcp-*=registry.example/mcp:*")]);
    let live = fenced(&pod("reference-runner"), &ns, &Settings::default());
    let update = |index: usize, image: Value| {
        let mut new = live.clone();
        new["metadata"]["finalizers"] = json!([]);
        new["spec"]["containers"][index]["image"] = image;
        restore(&live, &new, &ns)
    };
    let Outcome::Refuse(refusal) = update(0, json!("other:2")) else { panic!("changed") };
    assert_eq!((refusal.class, refusal.code), (Class::ImageChange, 422));
    let message = &refusal.message;
    assert!(message.contains("other:2") && message.contains("delete the pod"), "{message}");
    // Outside the fence it is Kubernetes' business, and so is nonsense.
    assert!(matches!(update(1, json!("other:2")), Outcome::Inject(_)));
    assert!(matches!(update(0, Value::Null), Outcome::Inject(_)));
    let same = live["spec"]["containers"][0]["image"].clone();
    assert!(matches!(update(0, same), Outcome::Inject(i) if i.ops.is_empty()));
}

/// After a change of the chart's values nothing is rewritten in a pod that was admitted before it.
#[test]
fn an_update_knows_nothing_of_the_settings() {
    let bare = json!({"metadata": {}, "spec": {"containers": [{"name": "a", "image": "i",
        "command": ["x"], "env": [{"name": "MY_URL", "value": "http://localhost:1"}]}]}});
    let ns = namespace(&[]);
    let listed = |name: &str, ip_family| Settings {
        localhost_url_env: vec![name.into()],
        ip_family,
        ..Settings::default()
    };
    for then in [
        listed("OTHER", IpFamily::Ipv4),
        listed("MY_URL", IpFamily::Ipv4),
        listed("MY_URL", IpFamily::Ipv6),
    ] {
        let mut live = fenced(&bare, &ns, &then);
        for now in [listed("MY_URL", IpFamily::Ipv4), listed("OTHER", IpFamily::Ipv6)] {
            let (none, policy) = (BTreeMap::new(), PolicyRef::default());
            let untouched = inject(Some(&live), &live, &ns, &now, &none, &policy);
            assert!(matches!(untouched, Outcome::Inject(i) if i.ops.is_empty()));
            let Outcome::Inject(again) = inject(Some(&live), &bare, &ns, &now, &none, &policy)
            else {
                panic!("refused")
            };
            let mut again = super::apply(&bare, &again);
            super::drop_empty(&mut again);
            super::drop_empty(&mut live);
            assert_eq!(again, live);
        }
    }
}

#[test]
fn an_update_looks_only_for_the_labels_key() {
    let live = fenced(&pod("plain"), &namespace(&[]), &Settings::default());
    for value in ["strict", "true", ""] {
        let mut ns = namespace(&[("polcy", "misspelt")]);
        ns.labels.insert("ringfence.dev/inject".into(), value.into());
        assert!(matches!(restore(&live, &pod("plain"), &ns), Outcome::Inject(_)), "{value}");
    }
}

#[test]
fn a_groups_policy_that_cannot_be_kept_is_refused() {
    let with = |policy: &str| {
        json!({"spec": {"securityContext": {"supplementalGroupsPolicy": policy},
            "containers": [{"name": "a", "command": ["x"]}]}})
    };
    assert_eq!(refusal(&with("Strict")), Class::NotAvailable);
    let Outcome::Refuse(refusal) = run(&with("Strict"), &namespace(&[]), &Settings::default())
    else {
        panic!()
    };
    let message = refusal.message;
    assert!(message.contains("supplementalGroupsPolicy: Strict is not available"), "{message}");
    let merge = run(&with("Merge"), &namespace(&[]), &Settings::default());
    assert!(matches!(merge, Outcome::Inject(_)));
    // Who is not fenced keeps the policy.
    let exempt = namespace(&[("unfenced-containers", "a")]);
    assert!(matches!(run(&with("Strict"), &exempt, &Settings::default()), Outcome::Inject(_)));
}

#[test]
fn whether_anything_is_fenced_is_asked_of_the_plan() {
    let bare = json!({"spec": {"containers": [{"name": "a"}]}});
    let exempt = namespace(&[("unfenced-containers", "*")]);
    let is_fenced = |pod: &Value, ns: &Namespace| is_fenced(pod, ns, &Settings::default());
    assert_eq!(is_fenced(&bare, &namespace(&[])), Ok(true));
    assert_eq!(is_fenced(&bare, &exempt), Ok(false));
    assert_eq!(is_fenced(&json!({}), &namespace(&[])), Ok(false));
    assert_eq!(is_fenced(&bare, &Namespace::default()), Ok(false));
    // Also a pod that has all of it already, with the policy that a look-up would not find.
    let settings = Settings::default();
    let after =
        inject(None, &bare, &namespace(&[]), &settings, &images(&bare), &PolicyRef::default());
    let Outcome::Inject(injection) = after else { panic!() };
    let after = super::apply(&bare, &injection);
    assert_eq!(is_fenced(&after, &namespace(&[])), Ok(true));
    let host = json!({"spec": {"hostPID": true, "containers": [{"name": "a"}]}});
    assert_eq!(is_fenced(&host, &namespace(&[])).map_err(|r| r.class), Err(Class::HostPid));
}

#[test]
fn a_policy_with_a_user_needs_no_user_of_the_image() {
    let pod = json!({"spec": {"containers": [{"name": "a", "command": ["x"]}]}});
    let policy = PolicyRef { run_as_user: Some("sandbox".into()), ..policy() };
    let needed = needs(&pod, &namespace(&[]), &Settings::default(), &policy).unwrap();
    assert!(needed.images.iter().all(|need| !need.command && !need.user));
}

#[test]
fn classes_that_cannot_be_fenced_are_refused() {
    let base = json!({"spec": {"containers": [
        {"name": "a", "command": ["x"], "securityContext": {"runAsUser": 5}}]}});
    for (path, value, class) in [
        ("hostNetwork", json!(true), Class::HostNetwork),
        ("hostPID", json!(true), Class::HostPid),
        ("hostIPC", json!(true), Class::HostIpc),
        ("os", json!({"name": "windows"}), Class::Windows),
        ("nodeSelector", json!({"kubernetes.io/os": "windows"}), Class::Windows),
        ("volumes", json!([{"name": "ringfence-x", "emptyDir": {}}]), Class::ForeignUse),
        (
            "containers",
            json!([{"name": "a", "command": ["x"], "securityContext": {"privileged": true}}]),
            Class::Privileged,
        ),
        ("containers", json!([{"name": "ringfence-install", "command": ["x"]}]), Class::ForeignUse),
        ("containers", json!([{"name": "a", "command": "x"}]), Class::Malformed),
        (
            "initContainers",
            json!([{"name": "i", "volumeMounts": [{"name": "ringfence-bin", "mountPath": "/x"}]}]),
            Class::ForeignUse,
        ),
        ("securityContext", json!({"runAsUser": 65530}), Class::Entrypoint),
    ] {
        let mut pod = base.clone();
        pod["spec"][path] = value;
        if class == Class::Entrypoint {
            // The container's own user comes first, so the pod's does not matter.
            assert!(matches!(run(&pod, &namespace(&[]), &Settings::default()), Outcome::Inject(_)));
        } else {
            assert_eq!(refusal(&pod), class, "{pod}");
        }
    }
}

#[test]
fn classes_that_are_warned_about() {
    let pod = json!({"metadata": {}, "spec": {
        "shareProcessNamespace": true,
        "initContainers": [{"name": "i"}, {"name": "s", "restartPolicy": "Always"}],
        "containers": [
            {"name": "a", "command": ["x"]},
            {"name": "mcp", "image": "m", "securityContext": {"privileged": true}}]}});
    let mut ns = namespace(&[("unfenced-containers", "mcp")]);
    ns.labels.insert("pod-security.kubernetes.io/enforce".into(), "baseline".into());
    let policy = PolicyRef { run_as_user: Some("root".into()), ..policy() };
    let outcome = inject(None, &pod, &ns, &Settings::default(), &images(&pod), &policy);
    let Outcome::Inject(injection) = outcome else { panic!("{outcome:?}") };
    assert_eq!(
        classes(&injection),
        [
            Class::ShareProcessNamespace,
            Class::InitContainer,
            Class::NativeSidecar,
            Class::Unfenced,
            Class::PrivilegedUnfenced,
            Class::RootUser,
            Class::PodSecurity
        ]
    );
    assert!(injection.warnings.iter().all(|w| w.starts_with("ringfence: ")));
    assert_eq!(injection.audit["containers"], "a");
}

#[test]
fn nothing_to_fence_changes_nothing() {
    let exempt = namespace(&[("unfenced-containers", "*")]);
    let mirror = json!({"metadata": {"annotations": {"kubernetes.io/config.mirror": "x"}},
        "spec": {"hostNetwork": true, "containers": [{"name": "a"}]}});
    let bare = json!({"spec": {"containers": [{"name": "a"}]}});
    for (pod, class) in [(mirror, Class::MirrorPod), (bare, Class::NothingToFence)] {
        let Outcome::Inject(injection) = run(&pod, &exempt, &Settings::default()) else { panic!() };
        assert!(injection.ops.is_empty());
        assert!(classes(&injection).contains(&class));
    }
    for pod in
        [json!({}), json!({"spec": null}), json!({"spec": {"containers": null}}), json!(null)]
    {
        let outcome = run(&pod, &exempt, &Settings::default());
        assert!(matches!(outcome, Outcome::Inject(i) if i.ops.is_empty()));
    }
}

#[test]
fn a_copy_made_by_kubectl_debug_is_fenced_anew() {
    let ns = namespace(&[]);
    let settings = Settings::default();
    let mut copy = fenced(&pod("plain"), &ns, &settings);
    copy["spec"]["containers"][0]["command"] = json!(["sh"]);
    assert!(verify(None, &copy, &ns, &settings, &images(&copy), &policy()).is_err());
    let after = fenced(&copy, &ns, &settings);
    let container = &after["spec"]["containers"][0];
    assert_eq!(enter_prefix(container).unwrap()[1], "enter");
    let command = container["command"].as_array().unwrap();
    assert!(command.contains(&json!("65534:65534")), "uid 0 of an injection is nobody's wish");
}

#[test]
fn forged_marks_prove_nothing() {
    let ns = namespace(&[]);
    let settings = Settings::default();
    let genuine = fenced(&pod("plain"), &ns, &settings);
    let forge = |pointer: &str, value: Value| {
        let mut forged = genuine.clone();
        *forged.pointer_mut(pointer).unwrap_or_else(|| panic!("{pointer}")) = value;
        let verdict = verify(None, &forged, &ns, &settings, &images(&forged), &policy());
        assert!(verdict.is_err(), "{pointer} can be forged");
    };
    let container = "/spec/containers/0";
    forge("/metadata/annotations/ringfence.dev~1status", json!("{}"));
    forge(&format!("{container}/command/0"), json!("/bin/sh"));
    forge(&format!("{container}/command/2"), json!("/tmp/policy.yaml"));
    forge(&format!("{container}/securityContext/capabilities/add"), json!([]));
    forge(&format!("{container}/securityContext/runAsUser"), json!(5));
    forge("/spec/initContainers/0/image", json!("evil"));
    forge("/spec/initContainers/0/command", json!(["/evil"]));
    let volumes = genuine["spec"]["volumes"].as_array().unwrap();
    for (index, volume) in volumes.iter().enumerate() {
        let name = &volume["name"];
        if name.as_str().unwrap().starts_with("ringfence-") {
            let other = json!({"name": name, "hostPath": {"path": "/"}});
            forge(&format!("/spec/volumes/{index}"), other);
        }
    }
}

/// `docs/pains.md` names tests; one that was renamed or removed is missed here.
#[test]
fn the_page_of_pains_names_tests_that_exist() {
    fn read(dir: &std::path::Path, all: &mut String) {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                read(&path, all);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                all.push_str(&std::fs::read_to_string(path).unwrap());
            }
        }
    }
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut source = String::new();
    for dir in ["src", "tests"] {
        read(&root.join(dir), &mut source);
    }
    let page = include_str!("../../../docs/pains.md");
    let quoted: Vec<&str> = page.split('`').skip(1).step_by(2).collect();
    let is_test = |name: &&&str| {
        name.matches('_').count() >= 2
            && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
    };
    let tests: Vec<&&str> = quoted.iter().filter(is_test).collect();
    assert!(tests.len() > 40, "{tests:?}");
    for name in tests {
        assert!(source.contains(&format!("fn {name}(")), "no test is named {name}");
    }
    let rows =
        page.lines().filter(|line| line.starts_with("| ") && !line.starts_with("| #")).count();
    assert_eq!(rows, 30);
}

#[test]
fn ephemeral_containers_are_warned_about() {
    let pod = json!({"spec": {"ephemeralContainers": [{"name": "dbg"}]}});
    let Outcome::Inject(injection) = ephemeral(&pod, &namespace(&[])) else { panic!() };
    assert_eq!(classes(&injection), [Class::EphemeralContainer]);
    let thief = json!({"spec": {"ephemeralContainers": [
        {"name": "dbg", "volumeMounts": [{"name": "ringfence-bin", "mountPath": "/x"}]}]}});
    assert!(
        matches!(ephemeral(&thief, &namespace(&[])), Outcome::Refuse(r) if r.class == Class::ForeignUse)
    );
}

#[test]
fn inbound_ports_can_be_narrowed() {
    for (value, expected) in [("declared", "80,9000"), ("none", "none")] {
        let pod = json!({
            "metadata": {"annotations": {"ringfence.dev/inbound": value}},
            "spec": {"containers": [{"name": "a", "command": ["x"], "ports": [{"containerPort": 80}],
                "readinessProbe": {"tcpSocket": {"port": 9000}}}]}});
        let after = fenced(&pod, &namespace(&[]), &Settings::default());
        let command = after["spec"]["containers"][0]["command"].as_array().unwrap();
        let at = command.iter().position(|word| word == "--inbound").unwrap();
        assert_eq!(command[at + 1], expected);
    }
}

#[test]
fn architectures_are_narrowed_by_the_pod() {
    let find = |spec: Value| {
        let pod = json!({"spec": spec});
        needs(&pod, &namespace(&[]), &Settings::default(), &policy()).unwrap().architectures
    };
    assert_eq!(find(json!({"nodeSelector": {"kubernetes.io/arch": "arm64"}})), ["arm64"]);
    let term = |values: Value| json!({"matchExpressions": [{"key": "kubernetes.io/arch", "operator": "In", "values": values}]});
    let affinity = |terms: Value| json!({"affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}}});
    assert_eq!(
        find(affinity(json!([term(json!(["amd64", "arm64"])), term(json!(["arm64"]))]))),
        ["amd64", "arm64"]
    );
    assert!(find(affinity(json!([term(json!(["amd64"])), {}]))).is_empty());
}

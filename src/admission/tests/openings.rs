//! What a namespace opens beside the plain fence: runners that stay as they are, volumes, sidecars.

use serde_json::{Value, json};

use super::super::*;
use super::*;

const EXEMPT: (&str, &str) = ("unfenced-containers", "mcp-*=registry.example/mcp:*");

/// Every combination that a namespace labelled `enabled` may have.
fn openings() -> [Namespace; 3] {
    let (volumes, ports) = (("volume-mounts", "allowed"), ("sidecar-ports", "8090-8094,20000"));
    [
        namespace(&[EXEMPT, ("mode", "subprocess")]),
        namespace(&[EXEMPT, volumes, ports]),
        namespace(&[EXEMPT, ("mode", "subprocess"), volumes, ports]),
    ]
}

fn words(container: &Value) -> Vec<&str> {
    container["command"].as_array().unwrap().iter().map(|word| word.as_str().unwrap()).collect()
}

fn variable<'a>(container: &'a Value, name: &str) -> Option<&'a str> {
    let entries = container["env"].as_array().unwrap();
    entries.iter().find(|entry| entry["name"] == name)?["value"].as_str()
}

fn options(container: &Value) -> Vec<String> {
    serde_json::from_str(variable(container, "RINGFENCE_OPTIONS").expect("options")).unwrap()
}

fn classes(pod: &Value, ns: &Namespace) -> Vec<Class> {
    match run(pod, ns, &Settings::default()) {
        Outcome::Inject(injection) => super::classes(&injection),
        other => panic!("not injected: {other:?}"),
    }
}

#[test]
fn the_corpus_stays_fenced_whatever_is_opened() {
    for (name, pod) in corpus().into_iter().filter(|(name, _)| !name.starts_with("refused-")) {
        for (settings, ns) in shapes().iter().flat_map(|s| openings().map(|ns| (s.clone(), ns))) {
            let after = fenced(&pod, &ns, &settings);
            assert_eq!(without_ours(&pod), without_ours(&after), "{name}");
            if ns.annotations.contains_key("ringfence.dev/mode") {
                let commands = |pod: &Value| {
                    let commands = json::containers(pod).map(|c| c.get("command").cloned());
                    commands.collect::<Vec<_>>()
                };
                let install = usize::from(!fenced_containers(&after).is_empty());
                let made: Vec<_> = commands(&after);
                assert_eq!(made.len(), commands(&pod).len() + install, "{name}");
                let regular = pod["spec"]["containers"].as_array().map_or(0, Vec::len);
                assert_eq!(made[..regular], commands(&pod)[..regular], "{name}");
            }
            let images = images(&pod);
            assert_eq!(verify(None, &after, &ns, &settings, &images, &policy()), Ok(()), "{name}");
            let again = run(&after, &ns, &settings);
            assert!(matches!(again, Outcome::Inject(i) if i.ops.is_empty()), "{name}");
            // A manifest that is applied again, whatever the namespace says by then.
            if fenced_containers(&after).is_empty() {
                continue;
            }
            for later in openings() {
                let Outcome::Inject(back) = restore(&after, &pod, &later) else { panic!("{name}") };
                let (mut back, mut live) = (apply(&pod, &back), after.clone());
                drop_empty(&mut back);
                drop_empty(&mut live);
                assert_eq!(back, live, "{name}");
                let verdict = verify(Some(&live), &back, &later, &settings, &images, &policy());
                assert_eq!(verdict, Ok(()), "{name}");
            }
        }
    }
}

#[test]
fn a_runner_stays_as_it_is_and_finds_the_supervisor() {
    let bare = pod("reference-runner");
    let ns = namespace(&[EXEMPT, ("mode", "subprocess")]);
    let settings = Settings {
        profile: Profile::Reference,
        // A single file cannot come by an image volume.
        delivery: Delivery::Image,
        ..Settings::default()
    };
    let policy = PolicyRef { keys: POLICY_KEYS.map(str::to_owned).to_vec(), ..policy() };
    let Outcome::Inject(injection) = inject(None, &bare, &ns, &settings, &images(&bare), &policy)
    else {
        panic!("refused")
    };
    let after = apply(&bare, &injection);
    let (before, runner) = (&bare["spec"]["containers"][0], &after["spec"]["containers"][0]);
    for field in ["command", "args", "workingDir", "ports", "resources", "image"] {
        assert_eq!(before.get(field), runner.get(field), "{field}");
    }
    let mounts = runner["volumeMounts"].as_array().unwrap();
    assert!(mounts.contains(&json!({"name": "ringfence-bin", "mountPath": "/openshell-sandbox",
        "subPath": "ringfence-supervisor", "readOnly": true})));
    for path in ["/etc/openshell", "/run/ringfence", "/workspace", "/var/run/secrets/ambient"] {
        assert!(mounts.iter().any(|mount| mount["mountPath"] == path), "{path}");
    }
    assert_eq!(runner["env"][0]["name"], "POD_IP");
    for (name, value) in [
        ("OPENSHELL_ENABLED", "true"),
        ("OPENSHELL_POLICY_RULES", "/etc/openshell/policy.rego"),
        ("OPENSHELL_POLICY_DATA", "/etc/openshell/policy.yaml"),
        ("OPENSHELL_LOG_LEVEL", "warn"),
        ("AMBIENT_MCP_URL", "http://$(POD_IP):8090"),
    ] {
        assert_eq!(variable(runner, name), Some(value), "{name}");
    }
    // The image's user is app: agents are, the runner is root. No admin endpoint, no port.
    let expected = [
        "--upstream-ca",
        "/etc/openshell/upstream-ca.crt",
        "--run-as",
        "app:web",
        "--inbound",
        "none",
    ];
    assert_eq!(options(runner), expected);
    let context = &runner["securityContext"];
    assert_eq!((&context["runAsUser"], &context["runAsNonRoot"]), (&json!(0), &json!(false)));
    assert_eq!(context["allowPrivilegeEscalation"], true);
    assert_eq!(context["capabilities"]["add"].as_array().unwrap().len(), 8);
    assert_eq!(after["spec"]["initContainers"][0]["name"], "ringfence-install");
    let volume = |name: &str| {
        let volumes = after["spec"]["volumes"].as_array().unwrap();
        volumes.iter().find(|volume| volume["name"] == name).unwrap().clone()
    };
    assert!(volume("ringfence-bin")["emptyDir"].is_object());
    // Said plainly: to who made the pod, in the audit log, on the pod.
    assert_eq!(super::classes(&injection), [Class::Unfenced, Class::RaisedUser, Class::Subprocess]);
    let warning = injection.warnings.last().unwrap();
    for word in ["container ambient-code-runner", "outside the fence", "kubectl exec"] {
        assert!(warning.contains(word), "{warning}");
    }
    assert!(warning.ends_with("through /openshell-sandbox is fenced"), "{warning}");
    assert_eq!(injection.audit["mode"], "subprocess");
    let status = after["metadata"]["annotations"]["ringfence.dev/status"].as_str().unwrap();
    let status: Value = serde_json::from_str(status).unwrap();
    assert_eq!(status["mode"], "subprocess");
    assert_eq!(status["containers"], json!(["ambient-code-runner"]));
    // kubectl exec reaches the bare container.
    let exec = json!({"container": "ambient-code-runner", "command": ["sh"]});
    assert!(exec::wrap(&exec, &after).unwrap().is_empty());
    assert_eq!(exec::verify(&exec, &after, &ns), Ok(()));
    let (place, warning) = exec::place(&exec, &after);
    assert_eq!(place, "outside");
    assert!(warning.unwrap().contains("the command runs outside the fence, as root"));
    let sidecar = json!({"container": "mcp-ambient", "command": ["sh"]});
    assert_eq!(exec::place(&sidecar, &after), ("outside", None));
    let plain = fenced(&bare, &namespace(&[EXEMPT]), &Settings::default());
    assert_eq!(exec::place(&exec, &plain), ("inside", None));
    let size = volume("ringfence-run-ambient-code-runner")["emptyDir"]["sizeLimit"].clone();
    assert_eq!(size, "64Mi");
    // What nothing here changes is the same as ever.
    assert_eq!(after["spec"]["containers"][1], bare["spec"]["containers"][1]);
}

#[test]
fn a_runners_probes_and_command_are_its_own() {
    let ns = namespace(&[("mode", "subprocess")]);
    let settings = Settings::default();
    let probes = pod("probes");
    let after = fenced(&probes, &ns, &settings);
    let text = after.to_string();
    assert!(!text.contains("\"enter\""), "{text}");
    // The image's command is nobody's business, its VOLUMEs are.
    let bare = json!({"metadata": {}, "spec": {"containers": [{"name": "a", "image": "i"}]}});
    let needed = needs(&bare, &ns, &settings, &policy()).unwrap().images;
    assert!(matches!(&needed[..], [need] if !need.command && need.user));
    assert_eq!(fenced(&bare, &ns, &settings)["spec"]["containers"][0].get("command"), None);
    for path in ["/openshell-sandbox", "/openshell-sandbox/x", "//./openshell-sandbox", "/"] {
        let mut pod = bare.clone();
        pod["spec"]["containers"][0]["volumeMounts"] = json!([{"name": "x", "mountPath": path}]);
        let refused = |ns: &Namespace| match run(&pod, ns, &settings) {
            Outcome::Refuse(refusal) => Some(refusal.class),
            _ => None,
        };
        assert_eq!(refused(&ns), Some(Class::Overlap), "{path}");
        // Otherwise the place is free.
        assert_eq!(refused(&namespace(&[])).is_some(), path == "/", "{path}");
    }
    assert!(classes(&bare, &ns).contains(&Class::NoRules));
}

#[test]
fn agents_of_a_runner_are_who_it_would_have_been() {
    let ns = namespace(&[("mode", "subprocess")]);
    let with = |context: Value| {
        json!({"metadata": {}, "spec": {"securityContext": {"fsGroup": 5},
            "containers": [{"name": "a", "image": "i", "securityContext": context}]}})
    };
    let of = |pod: &Value, policy: &PolicyRef| {
        let settings = Settings::default();
        let Outcome::Inject(injection) = inject(None, pod, &ns, &settings, &images(pod), policy)
        else {
            panic!("refused")
        };
        let after = apply(pod, &injection);
        let again = inject(None, &after, &ns, &settings, &images(pod), policy);
        assert!(matches!(again, Outcome::Inject(i) if i.ops.is_empty()), "{pod}");
        let container = after["spec"]["containers"][0].clone();
        assert_eq!(container["securityContext"]["runAsUser"], 0);
        (options(&container), super::classes(&injection).contains(&Class::RaisedUser))
    };
    let user = |words: &[String]| {
        let at = words.iter().position(|word| word == "--run-as")?;
        Some(words[at + 1].clone())
    };
    let (words, raised) = of(&with(json!({"runAsUser": 1000, "runAsNonRoot": true})), &policy());
    assert_eq!((user(&words), raised), (Some("1000".into()), true));
    assert!(words.windows(2).any(|pair| pair == ["--groups", "5"]), "{words:?}");
    // Root stays the supervisor's to replace, as when the reference deployment starts it.
    let (words, raised) = of(&with(json!({"runAsUser": 0})), &policy());
    assert_eq!((user(&words), raised), (None, false));
    // The policy's word comes from the policy.
    let named = PolicyRef { run_as_user: Some("sandbox".into()), ..policy() };
    let (words, raised) = of(&with(json!({"runAsUser": 1000})), &named);
    assert_eq!((user(&words), raised), (None, false));
}

#[test]
fn a_pod_changes_its_shape_with_the_namespace() {
    let settings = Settings::default();
    let (plain, runner) = (namespace(&[EXEMPT]), namespace(&[EXEMPT, ("mode", "subprocess")]));
    for name in ["plain", "probes", "reference-runner", "args-only"] {
        let bare = pod(name);
        let there = fenced(&fenced(&bare, &plain, &settings), &runner, &settings);
        assert_eq!(without_ours(&there), without_ours(&bare), "{name}");
        assert!(there.to_string().contains("/openshell-sandbox"));
        assert_eq!(verify(None, &there, &runner, &settings, &images(&bare), &policy()), Ok(()));
        assert!(verify(None, &there, &plain, &settings, &images(&bare), &policy()).is_err());
        let back = fenced(&there, &plain, &settings);
        assert!(!back.to_string().contains("/openshell-sandbox"), "{back}");
        assert!(!back.to_string().contains("RINGFENCE_OPTIONS"), "{back}");
        assert_eq!(verify(None, &back, &plain, &settings, &images(&bare), &policy()), Ok(()));
    }
}

#[test]
fn nothing_of_a_runners_can_be_forged() {
    let ns = namespace(&[EXEMPT, ("mode", "subprocess")]);
    let settings = Settings::default();
    let genuine = fenced(&pod("reference-runner"), &ns, &settings);
    let container = &genuine["spec"]["containers"][0];
    let index = |list: &str, name: &str| {
        let list = container[list].as_array().unwrap();
        list.iter().position(|element| element["name"] == name).unwrap()
    };
    let path = "/spec/containers/0";
    for (pointer, value) in [
        (format!("{path}/env/{}/value", index("env", "RINGFENCE_OPTIONS")), json!("[]")),
        (format!("{path}/env/{}/value", index("env", "OPENSHELL_ENABLED")), json!("false")),
        (
            format!("{path}/volumeMounts/{}/subPath", index("volumeMounts", "ringfence-bin")),
            json!("x"),
        ),
        (format!("{path}/securityContext/capabilities/add"), json!([])),
        ("/spec/initContainers/0/command".to_owned(), json!(["/evil"])),
    ] {
        let mut forged = genuine.clone();
        *forged.pointer_mut(&pointer).unwrap_or_else(|| panic!("{pointer}")) = value;
        let verdict = verify(None, &forged, &ns, &settings, &images(&forged), &policy());
        assert!(verdict.is_err(), "{pointer} can be forged");
    }
    // An update keeps what is ours too, and no other image comes in.
    let mut other = genuine.clone();
    other["spec"]["containers"][0]["image"] = json!("other:2");
    let refusal = verify_update(&genuine, &other, &ns).unwrap_err();
    assert_eq!(refusal.class, Class::ImageChange);
}

#[test]
fn sidecar_ports_become_a_flag_and_their_urls_stay() {
    let bare = pod("reference-runner");
    let ns = namespace(&[EXEMPT, ("sidecar-ports", "8090")]);
    let after = fenced(&bare, &ns, &Settings::default());
    let agent = &after["spec"]["containers"][0];
    assert!(words(agent).windows(2).any(|pair| pair == ["--sidecar-ports", "8090"]));
    // Listed: the fence's own loopback leads there. Not listed: by the pod's address, as ever.
    assert_eq!(variable(agent, "AMBIENT_MCP_URL"), Some("http://localhost:8090"));
    let urls = variable(agent, "CREDENTIAL_MCP_URLS");
    assert_eq!(urls, Some(r#"{"github":"http://$(POD_IP):8091/mcp"}"#));
    // Not exempt, the sidecar would be fenced, and wants the port itself.
    let all = namespace(&[("sidecar-ports", "8090")]);
    let Outcome::Refuse(refusal) = run(&bare, &all, &Settings::default()) else { panic!() };
    assert_eq!((refusal.class, refusal.code), (Class::SidecarPort, 422));
    assert!(refusal.message.contains("mcp-ambient") && refusal.message.contains("8090"));
}

#[test]
fn volumes_become_flags_and_tokens_never() {
    let bare = pod("reference-runner");
    for (label, ns) in [
        ("enabled", labelled("enabled", &[EXEMPT, ("volume-mounts", "allowed")])),
        ("strict", labelled("strict", &[("volume-mounts", "allowed")])),
    ] {
        let after = fenced(&bare, &ns, &Settings::default());
        let argv = words(&after["spec"]["containers"][0]);
        let flags: Vec<_> = argv.windows(2).filter(|w| w[0].starts_with("--volume")).collect();
        assert_eq!(flags, [["--volume-read-write", "/workspace"]], "{label}");
        let injection = run(&bare, &ns, &Settings::default());
        let Outcome::Inject(injection) = injection else { panic!("{injection:?}") };
        assert!(super::classes(&injection).contains(&Class::VolumeLeftOut));
        let said = |warning: &String| {
            warning.contains("/var/run/secrets/ambient") && warning.contains("does not join")
        };
        assert!(injection.warnings.iter().any(said), "{:?}", injection.warnings);
    }
    // Without the annotation there are none.
    let after = fenced(&bare, &namespace(&[EXEMPT]), &Settings::default());
    assert!(!after["spec"].to_string().contains("--volume"));
    // What a later webhook mounts is judged with the rest.
    let ns = namespace(&[EXEMPT, ("volume-mounts", "allowed")]);
    let mut later = fenced(&bare, &ns, &Settings::default());
    let mounts = later["spec"]["containers"][0]["volumeMounts"].as_array_mut().unwrap();
    mounts.push(json!({"name": "token", "mountPath": "/workspace/token"}));
    let after = fenced(&later, &ns, &Settings::default());
    assert!(!words(&after["spec"]["containers"][0]).contains(&"--volume-read-write"));
    // A `$` of the author's is not expanded.
    let mut odd = bare.clone();
    odd["spec"]["containers"][0]["volumeMounts"][0]["mountPath"] = json!("/w/$(HOME)");
    let after = fenced(&odd, &ns, &Settings::default());
    assert!(words(&after["spec"]["containers"][0]).contains(&"/w/$$(HOME)"));
}

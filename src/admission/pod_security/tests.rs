use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::json;

use super::*;
use crate::admission::{
    Class, ImageConfig, Injection, Namespace, Outcome, PodSecurity, PolicyRef, Refusal, Settings,
    inject,
};

fn labels(of_level: &[(&str, &str)]) -> BTreeMap<String, String> {
    let mut all = BTreeMap::from([("ringfence.dev/inject".to_owned(), "enabled".to_owned())]);
    for (key, value) in of_level {
        all.insert(format!("pod-security.kubernetes.io/{key}"), (*value).to_owned());
    }
    all
}

fn ns(of_level: &[(&str, &str)]) -> Namespace {
    Namespace { name: "agents".into(), labels: labels(of_level), ..Namespace::default() }
}

fn outcome(labels: &[(&str, &str)], settings: &Settings) -> Result<Injection, Refusal> {
    let pod = json!({"metadata": {}, "spec": {"containers": [{"name": "agent", "image": "i",
        "command": ["x"], "securityContext": {"runAsUser": 7}}]}});
    let images = BTreeMap::from([("agent".to_owned(), ImageConfig::default())]);
    match inject(None, &pod, &ns(labels), settings, &images, &PolicyRef::default()) {
        Outcome::Inject(injection) => Ok(injection),
        Outcome::Refuse(refusal) => Err(refusal),
        Outcome::Untouched => panic!("the namespace has the label"),
    }
}

#[test]
fn the_level_and_the_fields_of_the_injected_pod_are_named() {
    let said = |labels: &[(&str, &str)], profile| {
        let settings = Settings { profile, ..Settings::default() };
        let injection = outcome(labels, &settings).expect("a warning at most");
        let of_class = |cause: &&crate::admission::Cause| cause.class == Class::PodSecurity;
        let what = injection.causes.iter().find(of_class).map(|cause| cause.what.clone());
        assert_eq!(injection.warnings.is_empty(), what.is_none());
        what.unwrap_or_default()
    };
    let capabilities = "container agent: capabilities.add NET_ADMIN SYS_ADMIN SYS_PTRACE";
    let baseline = said(&[("enforce", "baseline")], Profile::Hardened);
    assert!(
        baseline.contains("namespace agents enforces Pod Security level baseline"),
        "{baseline}"
    );
    assert!(baseline.ends_with(capabilities), "{baseline}");
    let reference = said(&[("enforce", "baseline")], Profile::Reference);
    assert!(reference.contains("spec.securityContext.seccompProfile.type"), "{reference}");
    for level in ["restricted", "restrictd"] {
        let restricted = said(&[("enforce", level)], Profile::Hardened);
        let fields = ["level restricted", "SETPCAP", "runAsNonRoot not true", "runAsUser 0"];
        assert!(fields.iter().all(|field| restricted.contains(field)), "{restricted}");
    }
    // What was not asked of a pod yet in an older version is not named.
    let old = [("enforce", "restricted"), ("enforce-version", "v1.20")];
    let old = said(&old, Profile::Hardened);
    assert!(old.contains("runAsNonRoot not true") && !old.contains("runAsUser"), "{old}");
    // Neither of these refuses a pod.
    for labels in [
        &[][..],
        &[("enforce", "privileged")],
        &[("warn", "restricted"), ("audit", "baseline"), ("enforce-version", "v1.30")],
    ] {
        assert_eq!(said(labels, Profile::Hardened), "", "{labels:?}");
    }
}

#[test]
fn by_setting_it_is_a_refusal() {
    let settings = Settings { pod_security: PodSecurity::Refuse, ..Settings::default() };
    let refusal = outcome(&[("enforce", "baseline")], &settings).expect_err("refused");
    assert_eq!((refusal.class, refusal.code), (Class::PodSecurity, 403));
    assert!(
        refusal.message.contains("SYS_ADMIN") && refusal.message.contains("enforce=privileged")
    );
    outcome(&[("warn", "restricted")], &settings).expect("nothing is enforced");
    outcome(&[], &settings).expect("no label: the cluster's default is not known");
}

/// Kubernetes' own examples of pods that the levels take and refuse, where the Go module with them is
/// in the module cache (the cluster rig fetches it).
#[test]
fn kubernetes_own_examples_are_judged_alike() {
    let Some(examples) = examples() else {
        eprintln!("SKIPPED: no k8s.io/pod-security-admission in the Go module cache");
        return;
    };
    let mut judged = 0;
    for level in ["baseline", "restricted"] {
        for version in std::fs::read_dir(examples.join(level)).expect("readable") {
            let version = version.expect("readable");
            let name = version.file_name().to_string_lossy().into_owned();
            // Which sysctls and fields baseline knows grew until then; the fence's own are the same.
            if name.strip_prefix("v1.").and_then(|minor| minor.parse().ok()) < Some(34) {
                continue;
            }
            let enforced = Enforced::of(&labels(&[("enforce", level), ("enforce-version", &name)]))
                .expect("enforced");
            for (dir, passes) in [("pass", true), ("fail", false)] {
                for file in std::fs::read_dir(version.path().join(dir)).expect("readable") {
                    let path = file.expect("readable").path();
                    let text = std::fs::read_to_string(&path).expect("readable");
                    let pod: Value = serde_saphyr::from_str(&text).expect("YAML");
                    let found = enforced.refuses(&pod);
                    assert_eq!(found.is_empty(), passes, "{}: {found:?}", path.display());
                    judged += 1;
                }
            }
        }
    }
    println!("{judged} pods");
    assert!(judged > 100, "{judged}");
}

fn examples() -> Option<PathBuf> {
    let cache = std::env::var_os("GOMODCACHE").map(PathBuf::from).or_else(|| {
        let home = std::env::var_os("GOPATH").map(PathBuf::from);
        let home = home.or_else(|| Some(Path::new(&std::env::var_os("HOME")?).join("go")))?;
        Some(home.join("pkg/mod"))
    })?;
    let mut found: Vec<PathBuf> = std::fs::read_dir(cache.join("k8s.io"))
        .ok()?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            name.starts_with("pod-security-admission@") && path.join("test/testdata").is_dir()
        })
        .collect();
    found.sort();
    Some(found.pop()?.join("test/testdata"))
}

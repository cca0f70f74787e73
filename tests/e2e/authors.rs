//! The ways in which the author of a pod can try to have a script of theirs run in the
//! supervisor's place, as root with its capabilities: each is refused, or loses.

use std::time::Duration;

use futures_util::future::join_all;
use k8s_openapi::api::core::v1::{ConfigMap, Pod};
use serde_json::{Value, json};
use tokio::time::sleep;

use crate::place::{PATIENCE, Place, fenced, status};

/// One attempt: where the author's files are mounted, and from which image.
struct Attempt {
    name: &'static str,
    mount: Value,
    /// The image with links in it.
    links: bool,
}

fn attempt(name: &'static str, path: &str) -> Attempt {
    Attempt {
        name,
        mount: json!({"mountPath": path}),
        links: false,
    }
}

fn file(name: &'static str, path: &str) -> Attempt {
    let mount = json!({"mountPath": path, "subPath": "ringfence-supervisor"});
    Attempt {
        name,
        mount,
        links: false,
    }
}

fn linked(attempt: Attempt) -> Attempt {
    Attempt {
        links: true,
        ..attempt
    }
}

fn attempts() -> Vec<Attempt> {
    vec![
        // The six of the experiments: a nested subPath, three spellings, a link, a shallow mount.
        file("nested-subpath", "/ringfence/d/bin/ringfence-supervisor"),
        file("nested-subpath-flat", "/ringfence/bin/ringfence-supervisor"),
        attempt("double-slash", "/ringfence//bin/"),
        attempt("double-slash-pad", "/ringfence//d/bin/"),
        attempt("relative", "ringfence/bin"),
        attempt("relative-pad", "ringfence/d/bin"),
        attempt("dots", "/x/../ringfence/bin"),
        attempt("dots-pad", "/x/../ringfence/d/bin"),
        linked(attempt("link", "/x/bin")),
        linked(attempt("link-pad", "/x/d/bin")),
        linked(attempt("link-deep", "/x/d/d/d/bin")),
        linked(attempt("link-whole", "/y")),
        linked(file("link-file", "/y/ringfence-supervisor")),
        linked(file("link-file-pad", "/x/d/d/bin/ringfence-supervisor")),
        attempt("shallow", "/ringfence"),
        linked(attempt("link-shallow", "/x")),
        attempt("exact", "/ringfence/d/bin"),
        // The fence's other files: the policy, and where the supervisor keeps its own.
        attempt("policy", "/etc/openshell"),
        file("policy-file", "/etc/openshell/policy.yaml"),
        attempt("above-the-policy", "/etc"),
        attempt("run-dir", "/run/ringfence"),
        attempt("above-the-run-dir", "/run"),
    ]
}

const RAN: &str = "THE AUTHOR'S SCRIPT RAN";

fn pod(place: &Place, attempt: &Attempt) -> Value {
    place.agent_pod(attempt.name, |container, pod| {
        if attempt.links {
            container["image"] = place.rig.link_image.as_str().into();
        }
        container["command"] = json!([
            "/bin/sh",
            "-c",
            "echo \"the agent is $(id -u)\"; sleep 1000"
        ]);
        let mut mount = attempt.mount.clone();
        mount["name"] = "author".into();
        container["volumeMounts"] = json!([mount]);
        // The script under every path below the mount that the supervisor may be looked for at.
        let items: Vec<_> = ["", "bin/", "d/bin/", "d/d/bin/", "d/d/d/bin/"]
            .iter()
            .map(|dir| json!({"key": "script", "path": format!("{dir}ringfence-supervisor")}))
            .collect();
        pod["spec"]["volumes"] = json!([{
            "name": "author", "configMap": {"name": "author", "defaultMode": 0o755, "items": items},
        }]);
    })
}

/// What came of a pod that was admitted: the agent in the fence, or nothing at all.
async fn watch(place: &Place, name: &str) -> String {
    for _ in 0..PATIENCE.as_secs() * 2 {
        let log = place.logs(name, "agent").await;
        assert!(!log.contains(RAN), "{name}: {log}");
        if log.contains("the agent is ") {
            assert!(log.contains("the agent is 1000"), "{name}: {log}");
            return "ours ran".into();
        }
        let pod = place.api::<Pod>().get(name).await.expect("the pod");
        let state = status(&pod, "agent")
            .and_then(|status| status.state.clone())
            .unwrap_or_default();
        if let Some(ended) = state.terminated {
            // Once more, now that the log is whole.
            let log = place.logs(name, "agent").await;
            assert!(!log.contains(RAN), "{name}: {log}");
            assert_ne!(ended.exit_code, 0, "{name}: {log}");
            return format!(
                "did not start: {}",
                ended.message.or(ended.reason).unwrap_or_default()
            );
        }
        if let Some(waiting) = state.waiting
            && waiting
                .reason
                .as_deref()
                .is_some_and(|reason| reason.contains("Error"))
        {
            return format!("did not start: {}", waiting.message.unwrap_or_default());
        }
        sleep(Duration::from_millis(500)).await;
    }
    panic!("{name}: neither ran nor failed in {PATIENCE:?}");
}

#[tokio::test]
async fn an_authors_script_never_runs_in_the_supervisors_place() {
    fenced("authors", &[], async |place| {
        let script = format!("#!/bin/sh\necho \"{RAN} as $(id -u)\"\nexec sleep 1000\n");
        let map = json!({"metadata": {"name": "author"}, "data": {"script": script}});
        place.create::<ConfigMap>(&map).await.expect("made");
        let attempts = attempts();
        let outcomes = attempts.iter().map(async |attempt| {
            match place.create::<Pod>(&pod(&place, attempt)).await {
                Err(kube::Error::Api(refusal)) => format!("refused: {}", refusal.message),
                Err(error) => panic!("{}: {error}", attempt.name),
                Ok(_) => watch(&place, attempt.name).await,
            }
        });
        for (attempt, outcome) in attempts.iter().zip(join_all(outcomes).await) {
            println!(
                "{} ({}): {outcome}",
                attempt.name, attempt.mount["mountPath"]
            );
        }
    })
    .await;
}

#[tokio::test]
async fn names_and_devices_of_the_fence_are_the_fences() {
    fenced("foreign", &[], async |place| {
        let volume = place.agent_pod("volume", |container, pod| {
            container["volumeMounts"] = json!([{"name": "ringfence-bin", "mountPath": "/data"}]);
            pod["spec"]["volumes"] = json!([{"name": "ringfence-bin", "emptyDir": {}}]);
        });
        let message = place.agent_pod("message", |container, _| {
            container["terminationMessagePath"] = "/ringfence/d/bin/ringfence-supervisor".into();
        });
        let address = place.agent_pod("address", |container, _| {
            container["env"] = json!([{"name": "POD_IP", "value": "192.0.2.1"}]);
        });
        for (pod, word) in [
            (volume, "ringfence-"),
            (message, "/ringfence"),
            (address, "POD_IP"),
        ] {
            let answer = place.refused(&pod).await;
            assert!(answer.contains(word), "{answer}");
        }
    })
    .await;
}

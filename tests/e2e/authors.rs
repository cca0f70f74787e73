//! The ways in which the author of a pod can try to have a script of theirs run in the
//! supervisor's place, as root with its capabilities: each is refused, or loses.

use std::time::Duration;

use futures_util::future::join_all;
use k8s_openapi::api::core::v1::{ConfigMap, Pod};
use serde_json::{Value, json};
use tokio::time::sleep;

use crate::place::{PATIENCE, Place, fenced, status, supervisor, unlabelled};
use crate::rig::Rig;

/// One attempt: an image, and where the author's files are mounted.
struct Attempt {
    name: &'static str,
    image: String,
    /// Nothing is mounted where this is empty.
    path: String,
    /// One file, by a subPath.
    file: bool,
}

/// `bin` is where the supervisor is in a pod without mounts: an author can look that up.
fn attempts(rig: &Rig, bin: &str) -> Vec<Attempt> {
    let below = bin.strip_prefix("/ringfence/").expect("all of ours is below it");
    let program = format!("{bin}/ringfence-supervisor");
    let attempt = |name, path: &str| {
        let image = rig.agent_image.clone();
        Attempt { name, image, path: path.into(), file: false }
    };
    let file = |name, path: &str| Attempt { file: true, ..attempt(name, path) };
    let linked = |attempt| Attempt { image: rig.link_image.clone(), ..attempt };
    let from = |image: &str, attempt| Attempt { image: image.into(), ..attempt };
    vec![
        // The six of the experiments: a nested subPath, three spellings, a link, a shallow mount.
        file("nested-subpath", &program),
        attempt("double-slash", &format!("/ringfence//{below}/")),
        attempt("relative", &bin[1..]),
        attempt("dots", &format!("/x/../ringfence/{below}")),
        linked(attempt("link", &format!("/x/{below}"))),
        attempt("shallow", "/ringfence"),
        // Variations.
        attempt("exact", bin),
        attempt("dot", &format!("/ringfence/./{below}")),
        attempt("padded-dots", &format!("/ringfence/d/../{below}")),
        attempt("trailing", &format!("{bin}/.")),
        linked(attempt("link-to-the-directory", "/y")),
        linked(file("link-to-the-directory-file", "/y/ringfence-supervisor")),
        linked(file("link-file", &format!("/x/{below}/ringfence-supervisor"))),
        linked(attempt("link-deeper", &format!("/x/d/{below}"))),
        linked(file("link-deeper-file", &format!("/x/d/{below}/ringfence-supervisor"))),
        linked(file("link-deepest-file", &format!("/x/d/d/d/{below}/ringfence-supervisor"))),
        linked(attempt("link-shallow", "/x")),
        // What the supervisor's directory leads to is a volume: the author's files, or one that
        // another container could write to while the pod runs.
        from(&rig.home_link_image, attempt("home-link", "/shared")),
        from(
            &rig.home_link_image,
            file("home-link-file", &format!("/shared/{below}/ringfence-supervisor")),
        ),
        from(&rig.home_link_image, attempt(HOME_LINK_EMPTY, "/shared")),
        // The image itself mounts a directory of its own: a VOLUME.
        from(&rig.volume_image, attempt("image-volume", "")),
        from(&rig.link_volume_image, attempt("image-volume-link", "")),
        // The fence's other files: the policy, and where the supervisor keeps its own.
        attempt("policy", "/etc/openshell"),
        file("policy-file", "/etc/openshell/policy.yaml"),
        attempt("above-the-policy", "/etc"),
        attempt("run-dir", "/run/ringfence"),
        attempt("above-the-run-dir", "/run"),
        attempt("var-run", "/var/run/ringfence"),
    ]
}

/// An empty volume instead of the author's files.
const HOME_LINK_EMPTY: &str = "home-link-empty";

const RAN: &str = "THE AUTHOR'S SCRIPT RAN";

fn pod(place: &Place, attempt: &Attempt) -> Value {
    place.agent_pod(attempt.name, |container, pod| {
        container["image"] = attempt.image.as_str().into();
        container["command"] =
            json!(["/bin/sh", "-c", "echo \"the agent is $(id -u)\"; sleep 1000"]);
        if attempt.path.is_empty() {
            return;
        }
        let mut mount = json!({"name": "author", "mountPath": attempt.path});
        if attempt.file {
            mount["subPath"] = "ringfence-supervisor".into();
        }
        container["volumeMounts"] = json!([mount]);
        // The script under every path below the mount that the supervisor may be looked for at.
        let mut items = vec![json!({"key": "script", "path": "ringfence-supervisor"})];
        items.extend((0..12).map(|pads| {
            let path = format!("{}bin/ringfence-supervisor", "d/".repeat(pads));
            json!({"key": "script", "path": path})
        }));
        pod["spec"]["volumes"] = json!([{
            "name": "author", "configMap": {"name": "author", "defaultMode": 0o755, "items": items},
        }]);
        if attempt.name == HOME_LINK_EMPTY {
            pod["spec"]["volumes"] = json!([{"name": "author", "emptyDir": {}}]);
        }
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
        let state =
            status(&pod, "agent").and_then(|status| status.state.clone()).unwrap_or_default();
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
            && waiting.reason.as_deref().is_some_and(|reason| reason.contains("Error"))
        {
            return format!("did not start: {}", waiting.message.unwrap_or_default());
        }
        sleep(Duration::from_millis(500)).await;
    }
    panic!("{name}: neither ran nor failed in {PATIENCE:?}");
}

async fn put_script(place: &Place) {
    let script = format!("#!/bin/sh\necho \"{RAN} as $(id -u)\"\nexec sleep 1000\n");
    let map = json!({"metadata": {"name": "author"}, "data": {"script": script}});
    place.create::<ConfigMap>(&map).await.expect("made");
}

/// The control: where the author's own is what a path leads to, it runs and can be seen to.
#[tokio::test]
async fn an_authors_script_runs_where_nothing_guards_the_path() {
    unlabelled("control", async |place| {
        put_script(&place).await;
        let bin = "/ringfence/d/d/d/d/d/d/bin";
        for attempt in attempts(&place.rig, bin) {
            if !["link", "link-to-the-directory-file", "image-volume-link"].contains(&attempt.name)
            {
                continue;
            }
            let mut pod = pod(&place, &attempt);
            let container = &mut pod["spec"]["containers"][0];
            container["command"] = json!([format!("{bin}/ringfence-supervisor")]);
            place.create::<Pod>(&pod).await.expect("admitted");
            let mut log = String::new();
            for _ in 0..PATIENCE.as_secs() * 2 {
                log = place.logs(attempt.name, "agent").await;
                if log.contains(RAN) {
                    break;
                }
                sleep(Duration::from_millis(500)).await;
            }
            assert!(log.contains(&format!("{RAN} as 0")), "{}: {log}", attempt.name);
        }
    })
    .await;
}

#[tokio::test]
async fn an_authors_script_never_runs_in_the_supervisors_place() {
    fenced("authors", &[], async |place| {
        put_script(&place).await;
        let plain = place.create_dry(&place.agent_pod("plain", |_, _| {})).await;
        let program = supervisor(&plain, "agent").expect("fenced");
        let attempts =
            attempts(&place.rig, program.strip_suffix("/ringfence-supervisor").expect("its name"));
        let outcomes = attempts.iter().map(async |attempt| {
            match place.create::<Pod>(&pod(&place, attempt)).await {
                Err(kube::Error::Api(refusal)) => format!("refused: {}", refusal.message),
                Err(error) => panic!("{}: {error}", attempt.name),
                Ok(_) => watch(&place, attempt.name).await,
            }
        });
        for (attempt, outcome) in attempts.iter().zip(join_all(outcomes).await) {
            println!("{} ({}): {outcome}", attempt.name, attempt.path);
            // The supervisor sees for itself that others could replace it.
            let linked = attempt.name.starts_with("home-link");
            let seen = outcome.contains("/ringfence without following a link");
            assert!(!linked || seen, "{}: {outcome}", attempt.name);
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
        for (pod, word) in [(volume, "ringfence-"), (message, "/ringfence"), (address, "POD_IP")] {
            let answer = place.refused(&pod).await;
            assert!(answer.contains(word), "{answer}");
        }
    })
    .await;
}

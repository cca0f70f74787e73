//! An upgrade of the chart with pods running, and while pods are created: none is refused, and those
//! that run stay what they were. These tests change the release, so they run by themselves
//! (`tests/e2e/run` does so at the end).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use k8s_openapi::api::core::v1::Pod;
use kube::api::{DeleteParams, Patch, PatchParams};
use serde_json::{Value, json};

use crate::place::{Place, fenced, strict, supervisor};
use crate::release::{CHART, RELEASE, helm_done};

/// An upgrade to the same chart with other settings: to the replicas that is another version, since
/// what they make of a pod differs.
async fn upgrade(settings: &str) {
    let words = ["upgrade", RELEASE, CHART, "--reuse-values", "--wait"];
    helm_done(&[&words[..], &["--timeout", "180s", "--set", settings]].concat(), "").await;
}

/// The settings that a pod says it was made with.
fn made_with(pod: &Value) -> String {
    let status = pod["metadata"]["annotations"]["ringfence.dev/status"].as_str().unwrap_or("{}");
    let status: Value = serde_json::from_str(status).expect("JSON");
    status["settings"].as_str().expect("it says so").to_owned()
}

/// Who creates pods without a pause, until told to stop.
struct Creators {
    done: Arc<AtomicBool>,
    tasks: Vec<tokio::task::JoinHandle<Vec<String>>>,
    admitted: Arc<AtomicUsize>,
}

impl Creators {
    /// `again`: by kubectl, which asks again when it is told to. Else one request is one chance.
    fn start(place: &Place, again: bool) -> Self {
        let (done, admitted) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let tasks = (0..3).map(|creator| {
            let (place, done) = (place.clone(), Arc::clone(&done));
            let admitted = Arc::clone(&admitted);
            tokio::spawn(async move {
                let mut seen = Vec::new();
                while !done.load(Ordering::Relaxed) {
                    let mut pod = place.agent_pod(&format!("new-{creator}"), |_, _| {});
                    let made = if again {
                        pod["apiVersion"] = "v1".into();
                        pod["kind"] = "Pod".into();
                        let words = ["create", "--dry-run=server", "-o", "json", "-f", "-"];
                        let made = place.kubectl(&words, &pod.to_string()).await;
                        assert_eq!(made.code, 0, "{made:?}");
                        serde_json::from_str(&made.text).expect("JSON")
                    } else {
                        // Panics when it is refused.
                        serde_json::to_value(place.create_dry(&pod).await).expect("JSON")
                    };
                    let settings = made_with(&made);
                    if !seen.contains(&settings) {
                        seen.push(settings);
                    }
                    admitted.fetch_add(1, Ordering::Relaxed);
                }
                seen
            })
        });
        let tasks = tasks.collect();
        Self { done, tasks, admitted }
    }

    /// How many pods were admitted, and with which settings.
    async fn stop(self) -> (usize, Vec<String>) {
        self.done.store(true, Ordering::Relaxed);
        let mut all = Vec::new();
        for task in self.tasks {
            all.extend(task.await.expect("no pod was refused"));
        }
        all.sort_unstable();
        all.dedup();
        (self.admitted.load(Ordering::Relaxed), all)
    }
}

/// What a pod of the version before can still do.
async fn still_lives(place: &Place, was: &Pod) {
    let name = was.metadata.name.as_deref().expect("a name");
    let now = place.api::<Pod>().get(name).await.expect("it is there");
    assert_eq!(now.metadata.uid, was.metadata.uid);
    assert_eq!(supervisor(&now, "agent"), supervisor(was, "agent"));
    // An exec enters its fence, its labels can be changed, its manifest be applied again.
    let done = place.enter(&now, "id -u; grep CapEff /proc/self/status").await;
    assert_eq!(done.text, "1000\nCapEff:\t0000000000000000\n", "{done:?}");
    let patch = Patch::Merge(json!({"metadata": {"labels": {"upgraded": "yes"}}}));
    place.api::<Pod>().patch(name, &PatchParams::default(), &patch).await.expect("it passes");
    let mut manifest = place.agent_pod(name, |container, _| {
        container["readinessProbe"] =
            json!({"httpGet": {"path": "/health", "port": 8001}, "periodSeconds": 1});
    });
    manifest["metadata"]["labels"]["again"] = "yes".into();
    let done = place.apply(&manifest).await;
    assert_eq!(done.code, 0, "{done:?}");
}

#[tokio::test]
#[ignore = "changes the release: tests/e2e/run does it at the end"]
async fn no_pod_is_refused_in_an_upgrade_and_those_that_run_stay() {
    fenced("upgrade", &[], async |place| {
        strict("upgrade-strict", &[], async move |hostile| {
            let old = [place.start_agent("old").await, hostile.start_agent("old").await];
            let trusted = Creators::start(&place, false);
            // As a controller does: the API server's own client asks again.
            let untrusted = Creators::start(&hostile, true);
            upgrade("supervisor.logLevel=info").await;
            upgrade("supervisor.logLevel=debug").await;
            upgrade("supervisor.logLevel=warn").await;
            for creators in [trusted, untrusted] {
                let (admitted, settings) = creators.stop().await;
                println!("{admitted} pods, made by replicas with {} settings", settings.len());
                assert_eq!(settings.len(), 3, "every version has made pods");
            }
            still_lives(&place, &old[0]).await;
            still_lives(&hostile, &old[1]).await;
            place.api::<Pod>().delete("old", &DeleteParams::default()).await.expect("it ends");
        })
        .await;
    })
    .await;
}

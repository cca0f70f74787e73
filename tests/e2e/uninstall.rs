//! The release is taken away: not while somebody counts on it, and then without leaving anything but
//! what running pods need. And an installation without Helm's records. These change the release, so
//! they run by themselves (`tests/e2e/run` does so at the end).

use std::time::Duration;

use k8s_openapi::api::admissionregistration::v1::{
    MutatingWebhookConfiguration, ValidatingAdmissionPolicy, ValidatingWebhookConfiguration,
};
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Pod, Secret};
use kube::api::{ListParams, Patch, PatchParams, PostParams};
use kube::runtime::wait::await_condition;
use kube::{Api, Client, ResourceExt as _};
use serde_json::json;
use tokio::time::{sleep, timeout};

use crate::place::{PATIENCE, Place, fenced, supervisor};
use crate::release::{CHART, RELEASE, helm, helm_done, kubectl};
use crate::rig::RELEASE_NAMESPACE;

const CA: &str = "ringfence-webhook-ca";

async fn label(place: &Place, value: Option<&str>) {
    let namespaces: Api<Namespace> = Api::all(place.rig.client.clone());
    let patch = Patch::Merge(json!({"metadata": {"labels": {"ringfence.dev/inject": value}}}));
    let patched = namespaces.patch(&place.name, &PatchParams::default(), &patch).await;
    patched.expect("it can be labelled");
}

/// Copies of policies in the namespace.
async fn copies(place: &Place) -> Vec<String> {
    let list = ListParams::default().labels("ringfence.dev/policy-source");
    let found = place.api::<ConfigMap>().list(&list).await.expect("an answer");
    found.items.iter().map(ConfigMap::name_any).collect()
}

async fn is_there(client: &Client) -> [bool; 3] {
    let mutating: Api<MutatingWebhookConfiguration> = Api::all(client.clone());
    let validating: Api<ValidatingWebhookConfiguration> = Api::all(client.clone());
    let guard: Api<ValidatingAdmissionPolicy> = Api::all(client.clone());
    [
        mutating.get_opt(RELEASE).await.expect("an answer").is_some(),
        validating.get_opt(RELEASE).await.expect("an answer").is_some(),
        guard.get_opt("ringfence-guard").await.expect("an answer").is_some(),
    ]
}

/// A pod of the place, tried: whether it has a fence, or why it was refused.
async fn tried(place: &Place) -> Result<bool, kube::Error> {
    let pod = serde_json::from_value(place.agent_pod("again", |_, _| {})).expect("a pod");
    let dry = PostParams { dry_run: true, ..Default::default() };
    let made = place.api::<Pod>().create(&dry, &pod).await?;
    Ok(supervisor(&made, "agent").is_some())
}

/// A pod of the place is fenced, as soon as the API server knows the webhook and reaches it: the
/// configuration arrives there by watch, the Service's endpoints at the node within a second or two.
/// Until then pods are refused; none is made without a fence.
async fn is_fenced(place: &Place) {
    let mut refusal = String::new();
    let made = timeout(PATIENCE, async {
        loop {
            match tried(place).await {
                Ok(fenced) => return fenced,
                Err(error) => refusal = error.to_string(),
            }
            sleep(Duration::from_millis(250)).await;
        }
    });
    assert!(made.await.unwrap_or_else(|_| panic!("no pod is admitted: {refusal}")));
}

/// The namespace counts as labelled, also for the API server, which learns of that by watch.
async fn enabled(place: &Place) {
    label(place, Some("enabled")).await;
    let known = async {
        while matches!(tried(place).await, Ok(false)) {
            sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(PATIENCE, known).await.expect("the label is known");
}

/// Waits for the replicas to have ended. Helm and kubectl do not; and while no new replica is ready,
/// the Service leads to those that end, which serve a certificate of the CA before.
async fn replicas_end(client: &Client) {
    let pods: Api<Pod> = Api::namespaced(client.clone(), RELEASE_NAMESPACE);
    let list = ListParams::default().labels("app.kubernetes.io/component=webhook");
    let gone = async {
        while !pods.list(&list).await.expect("pods").items.is_empty() {
            sleep(Duration::from_millis(250)).await;
        }
    };
    timeout(PATIENCE, gone).await.expect("the replicas end");
}

#[tokio::test]
#[ignore = "changes the release: tests/e2e/run does it at the end"]
async fn the_release_goes_when_nobody_counts_on_it_and_comes_back() {
    fenced("uninstall", &[], async |place| {
        let client = place.rig.client.clone();
        let secrets: Api<Secret> = Api::namespaced(client.clone(), RELEASE_NAMESPACE);
        let values = helm_done(&["get", "values", RELEASE, "-o", "yaml"], "").await;
        place.start_agent("agent").await;
        let used = copies(&place).await;
        assert_eq!(used.len(), 1);
        let mut unused = place.api::<ConfigMap>().get(&used[0]).await.expect("the copy");
        unused.metadata = kube::api::ObjectMeta {
            name: Some("ringfence-policy-00000000000000000000000000000000".into()),
            labels: unused.metadata.labels,
            ..Default::default()
        };
        let made = place.api::<ConfigMap>().create(&PostParams::default(), &unused).await;
        made.expect("a copy that no pod names");

        // Somebody counts on it.
        let done = helm(&["uninstall", RELEASE], "").await;
        assert_ne!(done.code, 0, "{done:?}");
        let log = kubectl(&["logs", "job/ringfence-uninstall"], "").await.text;
        assert!(log.contains(&place.name) && log.contains("--no-hooks"), "{log}");
        assert_eq!(is_there(&client).await, [true; 3]);
        is_fenced(&place).await;
        assert_eq!(copies(&place).await.len(), 2, "nothing was taken away");

        // Nobody does.
        label(&place, None).await;
        helm_done(&["uninstall", RELEASE, "--wait", "--timeout", "120s"], "").await;
        assert_eq!(is_there(&client).await, [false, false, true], "the guard stays");
        assert_eq!(copies(&place).await, used, "what the running pod mounts stays");
        let gone = await_condition(secrets.clone(), CA, |found: Option<&Secret>| found.is_none());
        timeout(PATIENCE, gone).await.expect("the CA goes with it").expect("an answer");
        // The pod that runs keeps its fence.
        let pod = place.ready("agent").await;
        assert!(supervisor(&pod, "agent").is_some());
        let job = kubectl(&["get", "job", "ringfence-uninstall"], "").await;
        assert!(job.text.contains("NotFound"), "{job:?}");

        replicas_end(&client).await;

        // Without Helm's records, from the manifests alone.
        let words = [
            "template",
            RELEASE,
            CHART,
            "--no-hooks",
            "--skip-tests",
            "--kube-version",
            "1.36.3",
            "-f",
            "-",
        ];
        let manifests = helm_done(&words, &values).await;
        let applied = kubectl(&["apply", "-f", "-"], &manifests).await;
        assert_eq!(applied.code, 0, "{applied:?}");
        let words = ["rollout", "status", "deployment", RELEASE, "--timeout=120s"];
        let rolled = kubectl(&words, "").await;
        assert_eq!(rolled.code, 0, "{rolled:?}");
        enabled(&place).await;
        is_fenced(&place).await;
        label(&place, None).await;
        let removed = kubectl(&["delete", "--wait", "-f", "-"], &manifests).await;
        assert_eq!(removed.code, 0, "{removed:?}");
        assert_eq!(is_there(&client).await, [false; 3]);
        let gone = await_condition(secrets.clone(), CA, |found: Option<&Secret>| found.is_none());
        timeout(PATIENCE, gone).await.expect("the CA goes with it").expect("an answer");
        replicas_end(&client).await;

        // And back, as it was.
        let words = ["install", RELEASE, CHART, "--wait", "--timeout", "180s", "-f", "-"];
        helm_done(&words, &values).await;
        enabled(&place).await;
        is_fenced(&place).await;
    })
    .await;
}

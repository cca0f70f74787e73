//! The release is taken away: not while somebody counts on it, and then without leaving anything but
//! what running pods need. And an installation without Helm's records. These change the release, so
//! they run by themselves (`tests/e2e/run` does so at the end).

use std::time::Duration;

use k8s_openapi::api::admissionregistration::v1::{
    MutatingWebhookConfiguration, ValidatingAdmissionPolicy, ValidatingWebhookConfiguration,
};
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Secret};
use kube::api::{ListParams, Patch, PatchParams};
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

/// A pod of the place is fenced, as soon as the API server knows the webhook.
async fn is_fenced(place: &Place) {
    let pod = place.create_dry(&place.agent_pod("again", |_, _| {})).await;
    assert!(supervisor(&pod, "agent").is_some());
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
        let made =
            place.api::<ConfigMap>().create(&kube::api::PostParams::default(), &unused).await;
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
        label(&place, Some("enabled")).await;
        is_fenced(&place).await;
        label(&place, None).await;
        let removed = kubectl(&["delete", "--wait", "-f", "-"], &manifests).await;
        assert_eq!(removed.code, 0, "{removed:?}");
        assert_eq!(is_there(&client).await, [false; 3]);
        let gone = await_condition(secrets.clone(), CA, |found: Option<&Secret>| found.is_none());
        timeout(PATIENCE, gone).await.expect("the CA goes with it").expect("an answer");

        // And back, as it was.
        let words = ["install", RELEASE, CHART, "--wait", "--timeout", "180s", "-f", "-"];
        helm_done(&words, &values).await;
        label(&place, Some("enabled")).await;
        // The API server learns of a configuration by watch.
        sleep(Duration::from_secs(1)).await;
        is_fenced(&place).await;
    })
    .await;
}

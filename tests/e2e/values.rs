//! Values of the chart that change what is admitted. These tests change the release, and run alone:
//! `E2E_THREADS=1 tests/e2e/run --ignored`.

use k8s_openapi::api::core::v1::{ConfigMap, Pod, Secret, ServiceAccount};
use kube::Api;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use serde_json::json;

use crate::place::{fenced, supervisor};
use crate::release::{Release, ringfence};
use crate::rig::RELEASE_NAMESPACE;

#[tokio::test]
#[ignore = "changes the release"]
async fn by_value_what_pod_security_will_refuse_is_refused_at_once() {
    fenced("preflight", &[], async |place| {
        let release = Release::of(&place).await;
        release.upgrade(json!({ "podSecurity": "refuse" }), true).await;
        let api: Api<k8s_openapi::api::core::v1::Namespace> = Api::all(release.client.clone());
        let enforce = async |level: &str| {
            let labels = json!({ "pod-security.kubernetes.io/enforce": level });
            let patch = Patch::Merge(json!({ "metadata": { "labels": labels } }));
            api.patch(&place.name, &PatchParams::default(), &patch).await.expect("labelled");
        };
        enforce("baseline").await;
        release
            .until("answers before the API server does", async || {
                let answer = place.refused(&place.agent_pod("agent", |_, _| {})).await;
                answer.contains("ringfence: namespace") && answer.contains("level baseline")
            })
            .await;
        // The release is back when pods are admitted again.
        enforce("privileged").await;
        release.restore().await;
    })
    .await;
}

/// The API server writes the service account's pull secrets into a pod that names none, before webhooks see
/// it: ours must not be in their place.
#[tokio::test]
#[ignore = "changes the release"]
async fn the_images_pull_secret_comes_after_those_of_the_service_account() {
    fenced("pull-secret", &[], async |place| {
        let release = Release::of(&place).await;
        let mut supervisor = release.values()["supervisor"].clone();
        supervisor["pullSecret"] = "fence-pull".into();
        release.upgrade(json!({ "supervisor": supervisor }), true).await;
        release.admits().await;
        let source = json!({ "metadata": { "name": "fence-pull" },
            "type": "kubernetes.io/dockerconfigjson",
            "stringData": { ".dockerconfigjson": "{\"auths\": {}}" } });
        let source: Secret = serde_json::from_value(source).expect("a secret");
        let theirs: Api<Secret> = Api::namespaced(release.client.clone(), RELEASE_NAMESPACE);
        drop(theirs.delete("fence-pull", &DeleteParams::default()).await);
        theirs.create(&PostParams::default(), &source).await.expect("made");
        let words = [
            "enable",
            &place.name,
            "--release-namespace",
            RELEASE_NAMESPACE,
            "--image-pull-secret",
        ];
        let done = ringfence(&words).await;
        assert_eq!(done.code, 0, "{done:?}");
        let copy = place.api::<Secret>().get("fence-pull").await.expect("copied");
        assert_eq!(copy.type_.as_deref(), Some("kubernetes.io/dockerconfigjson"));

        let names = |pod: &Pod| -> Vec<String> {
            let spec = pod.spec.as_ref().expect("a spec");
            spec.image_pull_secrets.iter().flatten().map(|secret| secret.name.clone()).collect()
        };
        let own = json!({ "imagePullSecrets": [{ "name": "of-account" }] });
        let accounts = place.api::<ServiceAccount>();
        let patch = Patch::Merge(&own);
        accounts.patch("default", &PatchParams::default(), &patch).await.expect("patched");
        // The API server learns of the account by a watch.
        release
            .until("knows the service account", async || {
                let pod = place.create_dry(&place.agent_pod("agent", |_, _| {})).await;
                names(&pod) == ["of-account", "fence-pull"]
            })
            .await;
        let own = place.agent_pod("agent", |_, pod| {
            pod["spec"]["imagePullSecrets"] = json!([{ "name": "of-pod" }]);
        });
        assert_eq!(names(&place.create_dry(&own).await), ["of-pod", "fence-pull"]);
        // Secrets that are not there keep no pod from its start; nor does a manifest that is applied again.
        let mut pod = place.agent_pod("again", |_, _| {});
        pod["apiVersion"] = "v1".into();
        pod["kind"] = "Pod".into();
        for _ in 0..2 {
            let done = place.kubectl(&["apply", "-f", "-"], &pod.to_string()).await;
            assert_eq!(done.code, 0, "{done:?}");
        }
        let done =
            ringfence(&["disable", &place.name, "--release-namespace", RELEASE_NAMESPACE]).await;
        assert!(done.code == 0 && done.text.contains("secret fence-pull, a copy"), "{done:?}");
        theirs.delete("fence-pull", &DeleteParams::default()).await.expect("removed");
        let done =
            ringfence(&["enable", &place.name, "--release-namespace", RELEASE_NAMESPACE]).await;
        assert_eq!(done.code, 0, "{done:?}");
        release.restore().await;
    })
    .await;
}

/// Registries that nobody reaches: one has a mirror, of the other's images it is told what they are.
#[tokio::test]
#[ignore = "changes the release"]
async fn images_come_from_mirrors_and_from_what_is_given() {
    fenced("elsewhere", &[], async |place| {
        let release = Release::of(&place).await;
        let mut registries = release.values()["registries"].clone();
        let real = &place.rig.agent_image;
        let (host, path) = real.split_once('/').expect("a registry and a path");
        registries["mirrors"] = json!({ "mirrored.invalid": [host] });
        registries["images"] =
            json!({ "given.invalid/agent:1": { "entrypoint": ["/usr/bin/given"], "user": "7:7" } });
        let try_one = async |image: &str| -> Result<Pod, kube::Error> {
            let pod = place.agent_pod("agent", |container, _| container["image"] = image.into());
            let pod = serde_json::from_value(pod).expect("a pod");
            let dry = PostParams { dry_run: true, ..PostParams::default() };
            place.api::<Pod>().create(&dry, &pod).await
        };
        let mirrored = format!("mirrored.invalid/{path}");
        for image in [mirrored.as_str(), "given.invalid/agent:1"] {
            let mut pod =
                place.agent_pod("agent", |container, _| container["image"] = image.into());
            pod["apiVersion"] = "v1".into();
            pod["kind"] = "Pod".into();
            // By kubectl: the client library would try again by itself.
            let words = ["create", "--dry-run=server", "-f", "-"];
            let done = place.kubectl(&words, &pod.to_string()).await;
            assert!(done.code != 0 && done.text.contains(image), "{done:?}");
        }
        release.upgrade(json!({ "registries": registries }), true).await;
        release.admits().await;
        // The words of the agent, behind those of its supervisor.
        let words = |pod: &Pod| {
            let container = &pod.spec.as_ref().expect("a spec").containers[0];
            container.command.clone().expect("a fence has them")
        };
        let (found, same) = (try_one(&mirrored).await, try_one(real).await);
        assert_eq!(words(&found.expect("by the mirror")), words(&same.expect("by the registry")));
        let given = words(&try_one("given.invalid/agent:1").await.expect("given"));
        assert!(given.ends_with(&["--".to_owned(), "/usr/bin/given".to_owned()]), "{given:?}");
        release.restore().await;
    })
    .await;
}

/// The rig's API server shows webhooks a certificate for this name.
const API_SERVER: &str = "apiserver.rig.example";

#[tokio::test]
#[ignore = "changes the release"]
async fn by_value_the_webhook_answers_the_api_server_only() {
    fenced("clientca", &[], async |place| {
        let release = Release::of(&place).await;
        let kubeconfig = std::env::var("KUBECONFIG").expect("the rig sets it");
        let ca = std::path::Path::new(&kubeconfig).with_file_name("webhook-client-ca.crt");
        let ca = std::fs::read_to_string(ca).expect("the rig makes it");
        let maps: Api<ConfigMap> = Api::namespaced(release.client.clone(), RELEASE_NAMESPACE);
        let map = json!({ "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": "e2e-client-ca" },
            "data": { "ca.crt": ca } });
        let params = PatchParams::apply("e2e").force();
        maps.patch("e2e-client-ca", &params, &Patch::Apply(&map)).await.expect("written");
        let webhook = |names: &str| {
            let mut webhook = release.values()["webhook"].clone();
            webhook["clientCa"] = json!({ "configMap": "e2e-client-ca", "names": [names] });
            json!({ "webhook": webhook })
        };
        release.upgrade(webhook(API_SERVER), true).await;
        release.admits().await;
        // Somebody who has no certificate hears nothing, and a fence is still made.
        let pod = release.pods().await.remove(0);
        let ip = pod.status.and_then(|status| status.pod_ip).expect("an address");
        let words = ["-sk", "--max-time", "5", "-w", "%{http_code}", &format!("https://{ip}:8443/mutate")];
        let asked = tokio::process::Command::new("curl").args(words).output().await.expect("curl");
        assert!(!asked.status.success(), "{asked:?}");
        assert_eq!(String::from_utf8_lossy(&asked.stdout), "000");
        let fenced = place.create_dry(&place.agent_pod("agent", |_, _| {})).await;
        assert!(supervisor(&fenced, "agent").is_some());

        // The API server's is for another name: nobody is answered, and no pod is made.
        release.upgrade(webhook("other.example"), true).await;
        release
            .until("talks to nobody", async || {
                let pod = serde_json::from_value(place.agent_pod("agent", |_, _| {})).expect("a pod");
                let dry = PostParams { dry_run: true, ..PostParams::default() };
                let made = place.api::<Pod>().create(&dry, &pod).await;
                made.is_err_and(|error| error.to_string().contains("failed calling webhook"))
            })
            .await;
        release.restore().await;
        maps.delete("e2e-client-ca", &DeleteParams::default()).await.expect("deleted");
    })
    .await;
}

//! The final pod is looked at once more: what other webhooks, `kubectl debug` and updates do to it
//! after Ringfence.
//!
//! The other webhook is this program: it listens on the node's address, and its configuration sorts
//! behind Ringfence's, so that it runs later.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use axum::http::StatusCode;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use k8s_openapi::api::admissionregistration::v1::MutatingWebhookConfiguration;
use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use ringfence::admission::server::{
    self, Admit, Answer, Deadline, Hook, Limits, Metrics, Shutdown,
};
use ringfence::pki::{Authority, LeafKey, SubjectName};
use serde_json::{Value, json};
use tokio::net::TcpListener;

use crate::place::{Place, fenced, supervisor};

const LIFE: Duration = Duration::from_secs(86_400);

/// Answers every review with the same patch.
struct Meddler(Value);

impl Admit for Meddler {
    async fn admit(&self, _: Hook, body: Bytes, _: Deadline) -> Answer {
        let review: Value = serde_json::from_slice(&body).expect("a review");
        let answer = json!({
            "apiVersion": review["apiVersion"], "kind": "AdmissionReview",
            "response": { "uid": review["request"]["uid"], "allowed": true,
                "patchType": "JSONPatch", "patch": STANDARD.encode(self.0.to_string()) },
        });
        Answer { status: StatusCode::OK, body: answer.to_string().into_bytes(), ask_another: false }
    }
}

/// Another webhook for one namespace, from here to the end of the test.
struct Other {
    configurations: Api<MutatingWebhookConfiguration>,
    name: String,
    shutdown: Shutdown,
}

impl Other {
    /// `rule` is what it is asked about, `again` its reinvocation policy.
    async fn start(place: &Place, name: &str, patch: Value, rule: Value, again: &str) -> Self {
        let ip: IpAddr = place.rig.node_ip.parse().expect("an address");
        let listener = TcpListener::bind((ip, 0)).await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let authority = Authority::ephemeral("another webhook", LIFE).expect("an authority");
        let key = LeafKey::generate().expect("a key");
        let leaf = authority.leaf(&[SubjectName::Ip(ip)], LIFE, &key).expect("a leaf");
        let resolver = Arc::new(rustls::sign::SingleCertAndKey::from(leaf));
        let tls = Arc::new(server::tls_config(resolver, None).expect("a configuration"));
        let shutdown = Shutdown::default();
        let app = server::router(
            Meddler(patch),
            Limits::default(),
            Arc::new(Metrics::default()),
            Arc::new(|| Ok(())),
        );
        tokio::spawn(server::serve(listener, Some(tls), app, Limits::default(), shutdown.clone()));
        let name = format!("zz-{}-{name}", place.name);
        let configuration = json!({
            "metadata": { "name": name },
            "webhooks": [{
                "name": "meddler.e2e.example",
                "admissionReviewVersions": ["v1"],
                "clientConfig": {
                    "url": format!("https://{address}/mutate"),
                    "caBundle": STANDARD.encode(authority.certificate_pem()),
                },
                "namespaceSelector": { "matchLabels": { "kubernetes.io/metadata.name": place.name } },
                "rules": [rule],
                "failurePolicy": "Fail",
                "reinvocationPolicy": again,
                "sideEffects": "None",
            }],
        });
        let configurations = Api::all(place.rig.client.clone());
        let configuration = serde_json::from_value(configuration).expect("a configuration");
        configurations
            .create(&PostParams::default(), &configuration)
            .await
            .expect("the other webhook can be installed");
        Self { configurations, name, shutdown }
    }

    async fn stop(self) {
        drop(self.configurations.delete(&self.name, &DeleteParams::default()).await);
        self.shutdown.begin(Duration::ZERO).await;
    }
}

fn pods() -> Value {
    json!({ "apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["pods"] })
}

/// The answer to a pod while another webhook is at work, asked until the API server has learnt of
/// that: `seen` is in the answer then.
async fn meddled(place: &Place, name: &str, patch: Value, again: &str, seen: &str) -> String {
    let other = Other::start(place, name, patch, pods(), again).await;
    let params = PostParams { dry_run: true, ..PostParams::default() };
    let pod: Pod =
        serde_json::from_value(place.agent_pod(name, |_, _| {})).expect("the pod of a test");
    let mut text = String::new();
    for _ in 0..60 {
        text = match place.api::<Pod>().create(&params, &pod).await {
            Ok(pod) => serde_json::to_string(&pod).expect("JSON"),
            Err(kube::Error::Api(status)) => format!("refused: {}", status.message),
            Err(error) => panic!("no answer about a pod: {error}"),
        };
        if text.contains(seen) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    other.stop().await;
    assert!(text.contains(seen), "{seen} in: {text}");
    text
}

#[tokio::test]
async fn what_another_webhook_adds_is_legal_and_what_it_takes_away_is_not() {
    fenced("meddled", &[], async |place| {
        // Not ours: a variable, a volume with its mount.
        let patch = json!([
            {"op": "add", "path": "/spec/containers/0/env/-", "value": {"name": "ADDED", "value": "x"}},
            {"op": "add", "path": "/metadata/labels/added", "value": "yes"},
        ]);
        let pod = meddled(&place, "adds", patch, "IfNeeded", "\"ADDED\"").await;
        assert!(!pod.starts_with("refused") && pod.contains("/ringfence-supervisor\""), "{pod}");

        // A container of its own is fenced too: Ringfence is asked again.
        let more = json!([{"op": "add", "path": "/spec/containers/-", "value": {
            "name": "more", "image": place.rig.agent_image, "command": ["sleep", "1000"]}}]);
        let pod = meddled(&place, "container", more, "Never", "ringfence-run-more").await;
        assert!(!pod.starts_with("refused"), "{pod}");

        // Ours, and it insists: the last word is not its own.
        let path = "/spec/containers/0/securityContext/capabilities";
        let patch = json!([{"op": "add", "path": path, "value": {"add": ["SYS_ADMIN", "NET_RAW"]}}]);
        let answer = meddled(&place, "insists", patch, "IfNeeded", "is not as injected").await;
        assert!(answer.contains(path) && answer.contains("verify.ringfence.dev"), "{answer}");
        let patch = json!([{"op": "add", "path": "/spec/hostPID", "value": true}]);
        meddled(&place, "host", patch, "IfNeeded", "spec.hostPID is true").await;

        // Ours, and it gives way: the command that it put there runs inside the fence.
        let patch = json!([{"op": "add", "path": "/spec/containers/0/command", "value": ["wrapped"]}]);
        let pod = meddled(&place, "wraps", patch, "Never", "\"wrapped\"").await;
        assert!(!pod.starts_with("refused") && pod.contains("/ringfence-supervisor\""), "{pod}");
    })
    .await;
}

#[tokio::test]
async fn an_exec_that_another_webhook_takes_out_of_the_fence_is_refused() {
    fenced("unwrapped", &[], async |place| {
        place.start_agent("agent").await;
        let patch = json!([{"op": "add", "path": "/command", "value": ["id"]}]);
        let rule = json!({ "apiGroups": [""], "apiVersions": ["v1"], "operations": ["CONNECT"],
            "resources": ["pods/exec"] });
        let other = Other::start(&place, "exec", patch, rule, "IfNeeded").await;
        let mut done = place.exec("agent", "agent", &["true"]).await;
        for _ in 0..60 {
            if done.code != 0 {
                break;
            }
            tokio::time::sleep(Duration::from_millis(500)).await;
            done = place.exec("agent", "agent", &["true"]).await;
        }
        other.stop().await;
        assert!(done.code != 0 && !done.text.contains("uid="), "{done:?}");
        assert!(done.text.contains("does not enter the fence"), "{done:?}");
    })
    .await;
}

#[tokio::test]
async fn a_copy_made_by_kubectl_debug_is_fenced_anew() {
    fenced("copy", &[], async |place| {
        let pod = place.start_agent("agent").await;
        let words =
            ["debug", "agent", "--copy-to=copy", "--container=agent", "--", "sleep", "1000"];
        let done = place.kubectl(&words, "").await;
        assert_eq!(done.code, 0, "{done:?}");
        let copy = place.api::<Pod>().get("copy").await.expect("made");
        assert_eq!(supervisor(&copy, "agent"), supervisor(&pod, "agent"));
        let command = copy.spec.expect("a spec").containers[0].command.clone().unwrap_or_default();
        assert!(command.ends_with(&["sleep".to_owned(), "1000".to_owned()]), "{command:?}");
    })
    .await;
}

#[tokio::test]
async fn an_update_brings_no_image_past_the_fence() {
    let exempt = [("unfenced-containers", "side=*/agent@*")];
    fenced("images", &exempt, async |place| {
        // The name as the rig gave it, by digest: `*` stays within a component.
        let pod = place.agent_pod("agent", |_, pod| {
            pod["spec"]["containers"] = json!([{
                "name": "side", "image": place.rig.agent_image, "command": ["sleep", "1000"],
            }]);
        });
        place.create::<Pod>(&pod).await.expect("admitted");
        let update = async |patch: Value| {
            let patch = Patch::Strategic(patch);
            place.api::<Pod>().patch("agent", &PatchParams::default(), &patch).await
        };
        let image = |name: &str| json!({"spec": {"containers": [{"name": name, "image": "evil.example/x:1"}]}});
        for (name, word) in [("agent", "fenced for that"), ("side", "exempt")] {
            match update(image(name)).await {
                Err(kube::Error::Api(status)) => {
                    assert!(status.message.contains(word), "{name}: {}", status.message);
                }
                other => panic!("{name}: {other:?}"),
            }
        }
        // What changes no image passes.
        for metadata in [json!({"labels": {"a": "b"}}), json!({"annotations": {"a": "b"}})] {
            update(json!({"metadata": metadata})).await.expect("nothing of ours");
        }
    })
    .await;
}

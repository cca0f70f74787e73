//! The handler with an API server that is away: what it must answer knowing nothing.

use std::time::Duration;

use serde_json::json;

use super::*;
use crate::image::{Images, ImagesConfig};

/// Every request is answered with that object; with none the API server is away.
fn handler(found: Option<Value>) -> Handler {
    let api = tower::service_fn(move |_: axum::http::Request<kube::client::Body>| {
        let found = found.clone();
        async {
            let found = found.ok_or_else(|| std::io::Error::other("nobody there"))?;
            let body = kube::client::Body::from(found.to_string().into_bytes());
            Ok::<_, std::io::Error>(axum::http::Response::new(body))
        }
    });
    let client = kube::Client::new(api, "default");
    let images = Images::new(ImagesConfig::default()).expect("a configuration");
    // The watch is not run: the namespaces have to be read live.
    let (lookups, _) = Lookups::new(client, "release".into(), images);
    let facts = ClusterFacts { delivery: Delivery::Init, architectures: vec!["amd64".into()] };
    let (_, cluster) = watch::channel(Arc::new(facts));
    let metrics = Arc::new(Metrics::default());
    Handler::new(HandlerConfig { lookups, settings: Settings::default(), cluster, metrics })
}

async fn answer(body: &Value) -> (StatusCode, Value) {
    answer_with(None, body).await
}

async fn answer_with(found: Option<Value>, body: &Value) -> (StatusCode, Value) {
    answer_of(Hook::Mutate, found, body).await
}

async fn answer_of(hook: Hook, found: Option<Value>, body: &Value) -> (StatusCode, Value) {
    let deadline = Deadline::after(Duration::from_secs(5));
    let answer = handler(found).admit(hook, body.to_string().into(), deadline).await;
    let body = serde_json::from_slice(&answer.body).unwrap_or_default();
    (answer.status, body)
}

fn review(resource: &str, operation: &str) -> Value {
    json!({ "apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": {
        "uid": "u", "operation": operation, "namespace": "agents", "dryRun": true,
        "resource": { "group": "", "version": "v1", "resource": resource },
        "object": { "spec": { "containers": [{ "name": "a", "command": ["x"] }] } } } })
}

#[tokio::test]
async fn what_is_no_review_is_a_bad_request() {
    for body in [json!([]), json!({ "kind": "AdmissionReview" }), json!({ "kind": "Pod" })] {
        assert_eq!(answer(&body).await.0, StatusCode::BAD_REQUEST, "{body}");
    }
}

#[tokio::test]
async fn a_review_that_breaks_off_after_its_uid_is_refused_by_name() {
    let mut broken = review("pods", "CREATE");
    broken["request"]["resource"] = json!(null);
    let (status, answer) = answer(&broken).await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(answer["response"]["uid"], "u");
    assert_eq!(answer["response"]["allowed"], false);
}

#[tokio::test]
async fn other_kinds_pass_with_a_warning() {
    let (_, answer) = answer(&review("services", "CREATE")).await;
    assert_eq!(answer["response"]["allowed"], true);
    assert!(answer["response"]["warnings"][0].as_str().is_some_and(|w| w.contains("services")));
}

#[tokio::test]
async fn a_namespace_that_cannot_be_read_refuses_the_pod_and_says_to_try_again() {
    let (status, answer) = answer(&review("pods", "CREATE")).await;
    assert_eq!(status, StatusCode::OK);
    let response = &answer["response"];
    assert_eq!(response["allowed"], false);
    assert_eq!(response["status"]["code"], 503);
    let message = response["status"]["message"].as_str().unwrap_or_default();
    assert!(message.contains("namespace agents") && message.contains("nobody there"), "{message}");
    assert!(response.get("patch").is_none());
}

/// An update of a fenced pod, and the same with another image.
fn updates() -> [Value; 2] {
    let fenced = |image: &str| {
        let supervisor = "/ringfence/d/d/d/d/d/d/bin/ringfence-supervisor";
        json!({ "metadata": {}, "spec": { "containers": [
            { "name": "a", "image": image, "command": [supervisor, "--no-env", "--", "x"] }] } })
    };
    ["one", "two"].map(|image| {
        let mut review = review("pods", "UPDATE");
        review["request"]["oldObject"] = fenced("one");
        review["request"]["object"] = fenced(image);
        review
    })
}

#[tokio::test]
async fn an_update_passes_whatever_is_wrong_with_the_namespace() {
    let labelled = |value: &str| {
        json!({ "apiVersion": "v1", "kind": "Namespace",
            "metadata": { "name": "agents", "labels": { "ringfence.dev/inject": value } } })
    };
    let [update, other_image] = updates();
    for (found, word) in [(None, "nobody there"), (Some(labelled("true")), "label")] {
        let (_, answer) = answer_with(found.clone(), &update).await;
        let response = &answer["response"];
        assert_eq!(response["allowed"], true, "{answer}");
        assert!(response.get("patch").is_none(), "{answer}");
        assert!(response["warnings"].to_string().contains(word), "{answer}");
        let (_, answer) = answer_with(found, &other_image).await;
        assert_eq!(answer["response"]["allowed"], false, "{answer}");
    }
    let enabled = Some(labelled("enabled"));
    let (_, answer) = answer_with(enabled.clone(), &update).await;
    assert_eq!(answer["response"]["allowed"], true);
    assert!(answer["response"].get("warnings").is_none(), "{answer}");
    let (_, answer) = answer_with(enabled, &other_image).await;
    assert_eq!(answer["response"]["status"]["code"], 422, "{answer}");
    let mut unlabelled = labelled("enabled");
    unlabelled["metadata"]["labels"] = json!({});
    let (_, answer) = answer_with(Some(unlabelled), &other_image).await;
    assert_eq!(answer["response"]["allowed"], true, "{answer}");
}

#[tokio::test]
async fn a_pod_that_is_exempt_waits_for_no_policy() {
    let exempt = json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": {
        "name": "agents", "labels": { "ringfence.dev/inject": "enabled" },
        "annotations": { "ringfence.dev/unfenced-containers": "*" } } });
    let (_, answer) = answer_with(Some(exempt), &review("pods", "CREATE")).await;
    assert_eq!(answer["response"]["allowed"], true, "{answer}");
    assert!(answer["response"]["warnings"].to_string().contains("no container is left"));
}

#[test]
fn a_copy_that_is_forbidden_is_no_matter_of_trying_again() {
    let refusal = |status: Value| {
        let status: kube::core::Status = serde_json::from_value(status).expect("a status");
        not_copied(&propagate::CopyError::Api {
            what: "create",
            namespace: "agents".into(),
            name: "ringfence-policy-0".into(),
            source: kube::Error::Api(Box::new(status)),
        })
    };
    for (status, fix) in [
        (json!({ "code": 403, "message": "exceeded quota: q" }), "ResourceQuota"),
        (json!({ "code": 403, "message": "User x cannot create" }), "service account"),
        (
            json!({ "code": 403, "message": "being terminated", "details": { "causes": [
                { "reason": "NamespaceTerminating", "message": "m", "field": "f" }] } }),
            "another namespace",
        ),
    ] {
        let said = status["message"].as_str().unwrap_or_default().to_owned();
        let refusal = refusal(status);
        assert_eq!(refusal.class, Class::Policy);
        assert!(refusal.message.contains(&said) && refusal.message.contains(fix), "{refusal}");
    }
    assert_eq!(refusal(json!({ "code": 500, "message": "etcd" })).class, Class::Lookup);
}

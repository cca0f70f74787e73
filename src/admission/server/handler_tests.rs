//! The handler with an API server that is away: what it must answer knowing nothing.

use std::time::Duration;

use serde_json::json;

use super::*;
use crate::image::{Images, ImagesConfig};

fn handler() -> Handler {
    let away = tower::service_fn(|_: axum::http::Request<kube::client::Body>| async {
        Err::<axum::http::Response<kube::client::Body>, _>(std::io::Error::other("nobody there"))
    });
    let client = kube::Client::new(away, "default");
    let images = Images::new(ImagesConfig::default()).expect("a configuration");
    // The watch is not run: the namespaces have to be read live.
    let (lookups, _) = Lookups::new(client, "release".into(), images);
    let facts = ClusterFacts { delivery: Delivery::Init, architectures: vec!["amd64".into()] };
    let (_, cluster) = watch::channel(Arc::new(facts));
    let metrics = Arc::new(Metrics::default());
    Handler::new(HandlerConfig { lookups, settings: Settings::default(), cluster, metrics })
}

async fn answer(body: &Value) -> (StatusCode, Value) {
    let deadline = Deadline::after(Duration::from_secs(5));
    let answer = handler().admit(body.to_string().into(), deadline).await;
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
    for operation in ["CREATE", "UPDATE"] {
        let (status, answer) = answer(&review("pods", operation)).await;
        assert_eq!(status, StatusCode::OK);
        let response = &answer["response"];
        assert_eq!(response["allowed"], false, "{operation}");
        assert_eq!(response["status"]["code"], 503);
        let message = response["status"]["message"].as_str().unwrap_or_default();
        assert!(
            message.contains("namespace agents") && message.contains("nobody there"),
            "{message}"
        );
        assert!(response.get("patch").is_none());
    }
}

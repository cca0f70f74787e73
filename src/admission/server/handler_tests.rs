//! The handler with an API server that is away: what it must answer knowing nothing.

use std::time::Duration;

use serde_json::json;

use super::*;
use crate::admission::PodSecurity;
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
    handler_of(kube::Client::new(api, "default"), ImagesConfig::default())
}

fn handler_of(client: kube::Client, images: ImagesConfig) -> Handler {
    let images = Images::new(images).expect("a configuration");
    // The watch is not run: the namespaces have to be read live.
    let (lookups, _) = Lookups::new(client, "release".into(), images);
    let facts = ClusterFacts { delivery: Delivery::Init, architectures: vec!["amd64".into()] };
    let (_, cluster) = watch::channel(Arc::new(facts));
    let metrics = Arc::new(Metrics::default());
    Handler::new(HandlerConfig {
        lookups: Arc::new(lookups),
        constraints: None,
        copies: Copies::default(),
        settings: Settings::default(),
        cluster,
        metrics,
        events: None,
    })
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

fn namespace(label: &str) -> Value {
    json!({ "apiVersion": "v1", "kind": "Namespace",
        "metadata": { "name": "agents", "labels": { "ringfence.dev/inject": label } } })
}

/// What a validating webhook must never send, whatever it says.
fn no_patch(answer: &Value) {
    assert_eq!(answer["response"]["uid"], "u", "{answer}");
    for key in ["patch", "patchType"] {
        assert!(answer["response"].get(key).is_none(), "{answer}");
    }
}

#[tokio::test]
async fn a_new_pod_is_not_verified_by_knowing_nothing() {
    let (_, answer) = answer_of(Hook::Validate, None, &review("pods", "CREATE")).await;
    no_patch(&answer);
    assert_eq!(answer["response"]["status"]["code"], 503, "{answer}");
    // In a namespace that exempts all of it there is nothing to verify.
    let mut exempt = namespace("enabled");
    exempt["metadata"]["annotations"] = json!({ "ringfence.dev/unfenced-containers": "*" });
    let (_, answer) = answer_of(Hook::Validate, Some(exempt), &review("pods", "CREATE")).await;
    no_patch(&answer);
    assert_eq!(answer["response"]["allowed"], true, "{answer}");
}

#[tokio::test]
async fn only_an_update_of_an_image_depends_on_anything() {
    let [update, other_image] = updates();
    for found in [None, Some(namespace("enabled")), Some(namespace("true"))] {
        let (_, answer) = answer_of(Hook::Validate, found.clone(), &update).await;
        no_patch(&answer);
        assert_eq!(answer["response"]["allowed"], true, "{answer}");
        let (_, answer) = answer_of(Hook::Validate, found, &other_image).await;
        no_patch(&answer);
        assert_eq!(answer["response"]["allowed"], false, "{answer}");
    }
}

#[tokio::test]
async fn an_ephemeral_container_is_refused_under_strict_only() {
    let mut debug = review("pods", "UPDATE");
    debug["request"]["subResource"] = json!("ephemeralcontainers");
    debug["request"]["object"]["spec"]["ephemeralContainers"] = json!([{ "name": "debugger" }]);
    for (label, allowed) in [("enabled", true), ("strict", false), ("true", false)] {
        let (_, answer) = answer_of(Hook::Validate, Some(namespace(label)), &debug).await;
        no_patch(&answer);
        assert_eq!(answer["response"]["allowed"], allowed, "{label}: {answer}");
    }
    let (_, answer) = answer_of(Hook::Validate, None, &debug).await;
    assert_eq!(answer["response"]["status"]["code"], 503, "{answer}");
}

/// One object that is namespace and pod at once: the stand-in answers every read with it.
#[tokio::test]
async fn an_exec_has_to_enter_the_fence() {
    let supervisor = "/ringfence/d/d/d/d/d/d/bin/ringfence-supervisor";
    let mut found = namespace("enabled");
    found["spec"] = json!({ "containers": [
        { "name": "a", "command": [supervisor, "--no-env", "--", "x"] }] });
    let exec = |command: Value| {
        let mut exec = review("pods", "CONNECT");
        exec["request"]["subResource"] = json!("exec");
        exec["request"]["name"] = json!("p");
        exec["request"]["object"] = json!({ "container": "a", "command": command });
        exec
    };
    let inside = json!([supervisor, "enter", "--run-dir", "/run/ringfence", "--", "sh"]);
    for (command, allowed) in [(inside, true), (json!(["sh"]), false)] {
        let (_, answer) = answer_of(Hook::Validate, Some(found.clone()), &exec(command)).await;
        no_patch(&answer);
        assert_eq!(answer["response"]["allowed"], allowed, "{answer}");
    }
    found["metadata"]["annotations"] = json!({ "ringfence.dev/exec": "outside" });
    let (_, answer) = answer_of(Hook::Validate, Some(found), &exec(json!(["sh"]))).await;
    assert_eq!(answer["response"]["allowed"], true, "{answer}");
}

/// An API server with a policy, in whose namespace service accounts may use no constraints.
fn openshift(constraints: bool, pod_security: PodSecurity) -> Handler {
    let api =
        tower::service_fn(move |request: axum::http::Request<kube::client::Body>| async move {
            let (code, answer) = match request.uri().path() {
                "/api/v1/namespaces/agents" => (200, namespace("strict")),
                "/api/v1/namespaces/release/configmaps/openshell-policy" => (
                    200,
                    json!({ "metadata": { "name": "openshell-policy" },
                    "data": { "policy.yaml": "version: 1\n" } }),
                ),
                "/api/v1/namespaces/agents/limitranges" => {
                    (200, json!({ "metadata": {}, "items": [] }))
                }
                "/apis/authorization.k8s.io/v1/subjectaccessreviews" => {
                    assert!(constraints, "nobody wants to know");
                    (201, json!({ "spec": {}, "status": { "allowed": false } }))
                }
                path => (
                    404,
                    json!({ "kind": "Status", "apiVersion": "v1", "status": "Failure", "code": 404,
                    "reason": "NotFound", "message": path }),
                ),
            };
            let body = kube::client::Body::from(answer.to_string().into_bytes());
            axum::http::Response::builder().status(code).body(body)
        });
    let client = kube::Client::new(api, "default");
    let given = "i@sha256:0123456789012345678901234567890123456789012345678901234567890123: {}";
    let given = crate::image::Given::read(given).expect("it reads");
    let images = ImagesConfig { given, ..ImagesConfig::default() };
    let mut handler = handler_of(client.clone(), images);
    handler.0.settings.pod_security = pod_security;
    handler.0.constraints = constraints.then(|| Constraints::new(client, "ringfence".into()));
    handler
}

#[tokio::test]
async fn what_an_openshift_will_refuse_is_said_or_by_value_refused() {
    let mut review = review("pods", "CREATE");
    review["request"]["object"] = json!({ "metadata": {}, "spec": {
        "serviceAccountName": "runner", "containers": [{ "name": "a", "command": ["x"],
            "image": "i@sha256:0123456789012345678901234567890123456789012345678901234567890123",
            "securityContext": { "runAsUser": 7 } }] } });
    let answer = async |constraints, setting| {
        let deadline = Deadline::after(Duration::from_secs(5));
        let body = review.to_string().into();
        let answer = openshift(constraints, setting).admit(Hook::Mutate, body, deadline).await;
        serde_json::from_slice::<Value>(&answer.body).expect("JSON")
    };
    let said = [
        "service account may not use securitycontextconstraints ringfence",
        "ringfence enable agents --scc --strict --service-account runner",
    ];
    let warned = answer(true, PodSecurity::Warn).await;
    assert_eq!(warned["response"]["allowed"], true, "{warned}");
    assert!(warned["response"]["patch"].is_string(), "{warned}");
    let warnings = warned["response"]["warnings"].to_string();
    assert!(said.iter().all(|words| warnings.contains(words)), "{warned}");
    let classes = &warned["response"]["auditAnnotations"]["classes"];
    assert_eq!(classes, "security-context-constraints", "{warned}");

    let refused = answer(true, PodSecurity::Refuse).await;
    assert_eq!(refused["response"]["status"]["code"], 403, "{refused}");
    let message = refused["response"]["status"]["message"].as_str().unwrap_or_default();
    assert!(said.iter().all(|words| message.contains(words)), "{refused}");

    // Elsewhere nothing is asked, nor said.
    let elsewhere = answer(false, PodSecurity::Refuse).await;
    assert_eq!(elsewhere["response"]["allowed"], true, "{elsewhere}");
    assert!(elsewhere["response"].get("warnings").is_none(), "{elsewhere}");
}

#[tokio::test]
async fn a_policy_is_judged_when_it_is_written() {
    let write = |namespace: &str, data: Value| {
        let mut write = review("configmaps", "CREATE");
        write["request"]["namespace"] = json!(namespace);
        write["request"]["name"] = json!("p");
        write["request"]["object"] = json!({ "metadata": { "name": "p" }, "data": data });
        write
    };
    let release = Settings::default().release_namespace;
    let yaml = |text: &str| json!({ "policy.yaml": text });
    for (data, word) in [
        (yaml("version: 1\nnetwork_policies: ["), "policy.yaml:2"),
        (yaml("version: 1\nfilesystem_policy: { read_only: [/run] }\n"), "/run opens"),
        (json!({}), "no key policy.yaml"),
    ] {
        let (_, answer) = answer_of(Hook::Validate, None, &write(&release, data.clone())).await;
        no_patch(&answer);
        let response = &answer["response"];
        assert_eq!(response["status"]["code"], 422, "{answer}");
        let message = response["status"]["message"].as_str().unwrap_or_default();
        assert!(message.contains(word) && message.contains("ringfence policy check"), "{message}");
        // A ConfigMap elsewhere is nobody's policy.
        let (_, answer) = answer_of(Hook::Validate, None, &write("agents", data)).await;
        assert_eq!(answer["response"]["allowed"], true, "{answer}");
    }
    // What does not load (an earlier version took it) can lose its finalizers, and be mended.
    let broken = yaml("version: 1\nnetwork_policies: [");
    let mut update = write(&release, broken.clone());
    update["request"]["operation"] = json!("UPDATE");
    update["request"]["oldObject"] =
        json!({ "metadata": { "name": "p", "finalizers": ["a/b"] }, "data": broken });
    let (_, answer) = answer_of(Hook::Validate, None, &update).await;
    assert_eq!(answer["response"]["allowed"], true, "{answer}");
    for other in [yaml("version: 1\nnetwork_policies: {"), json!({})] {
        update["request"]["object"]["data"] = other;
        let (_, answer) = answer_of(Hook::Validate, None, &update).await;
        assert_eq!(answer["response"]["allowed"], false, "{answer}");
    }
    update["request"]["object"]["data"] = update["request"]["oldObject"]["data"].clone();
    update["request"]["object"]["binaryData"] = json!({ "policy.yaml": "" });
    let (_, answer) = answer_of(Hook::Validate, None, &update).await;
    assert_eq!(answer["response"]["allowed"], false, "{answer}");
    let good = write(&release, yaml("version: 1\nbinaries: []\n"));
    let (_, answer) = answer_of(Hook::Validate, None, &good).await;
    no_patch(&answer);
    assert_eq!(answer["response"]["allowed"], true, "{answer}");
    assert!(answer["response"]["warnings"].to_string().contains("binaries"), "{answer}");
    // The mutating half knows pods only.
    let (_, answer) = answer_with(None, &good).await;
    assert!(answer["response"]["warnings"].to_string().contains("configmaps"), "{answer}");
}

/// The whole way from body to answer, whatever the cluster answers to look-ups.
#[test]
fn bent_reviews_are_answered_or_called_bad_requests() {
    use crate::admission::tests::fuzz::{assert_well_formed, cases};
    let exempt = json!({ "metadata": { "name": "agents",
        "labels": { "ringfence.dev/inject": "enabled" },
        "annotations": { "ringfence.dev/unfenced-containers": "*" } } });
    let found = [None, Some(namespace("enabled")), Some(namespace("strict")), Some(exempt)];
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.expect("a runtime");
    let handlers = {
        let _entered = runtime.enter();
        found.map(handler)
    };
    cases("handler", |body, random| {
        let handler = &handlers[random.below(handlers.len())];
        let hook = [Hook::Mutate, Hook::Validate][random.below(2)];
        let deadline = Deadline::after(Duration::from_secs(5));
        let answer = runtime.block_on(handler.admit(hook, body.clone().into(), deadline));
        if answer.status == StatusCode::OK {
            let review = serde_json::from_slice(&body).expect("it was read as a review");
            assert_well_formed(&answer.body, &review, hook == Hook::Mutate);
        } else {
            assert_eq!(answer.status, StatusCode::BAD_REQUEST);
            assert!(!answer.body.is_empty());
        }
    });
}

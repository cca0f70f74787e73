use std::sync::{Mutex, PoisonError};

use axum::http::{Method, Request, Response};

use super::*;
use crate::admission::{Cause, Injection, Refusal};

fn review(change: impl FnOnce(&mut Value)) -> Review {
    let owner = |kind: &str, controller: bool| {
        json!({ "apiVersion": "apps/v1", "kind": kind, "name": "agent-1", "uid": "u-1",
            "controller": controller })
    };
    let mut body = json!({ "apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview",
        "request": { "uid": "u", "operation": "CREATE", "namespace": "agents", "dryRun": false,
            "resource": { "group": "", "version": "v1", "resource": "pods" },
            "object": { "metadata": { "generateName": "agent-1-", "namespace": "elsewhere",
                "ownerReferences": [owner("Set", false), owner("ReplicaSet", true)] } } } });
    change(&mut body["request"]);
    Review::parse(body.to_string().as_bytes()).expect("a review")
}

fn refused() -> Outcome {
    Outcome::Refuse(Refusal::new(Class::HostPid, "spec.hostPID is true"))
}

fn warned(classes: &[Class]) -> Outcome {
    let causes = classes.iter().map(|class| Cause { class: *class, what: "container a".into() });
    Outcome::Inject(Injection { causes: causes.collect(), ..Injection::default() })
}

#[test]
fn refusals_and_warnings_are_told_to_the_controlling_owner() {
    let told = notices(&review(|_| {}), &refused());
    let [notice] = &told[..] else { panic!("{told:?}") };
    let subject = &notice.subject;
    assert_eq!((subject.kind.as_str(), subject.name.as_str()), ("ReplicaSet", "agent-1"));
    // The request's, not what the pod says.
    assert_eq!(subject.namespace, "agents");
    assert_eq!(notice.note, "ringfence: spec.hostPID is true; remove hostPID");
    let told = notices(&review(|_| {}), &warned(&[Class::RootUser, Class::Unfenced]));
    let [notice] = &told[..] else { panic!("what was exempted is no news: {told:?}") };
    assert!(!notice.refused && notice.class == Class::RootUser);
    assert!(notice.note.contains("container a") && notice.note.contains("set securityContext"));
}

#[test]
fn what_is_fenced_or_tried_or_seen_by_whoever_asked_is_not_told() {
    let plain = Outcome::Inject(Injection::default());
    for outcome in [Outcome::Untouched, plain] {
        assert_eq!(notices(&review(|_| {}), &outcome), []);
    }
    for change in [
        json!({ "dryRun": true }),
        json!({ "operation": "UPDATE" }),
        json!({ "operation": "UPDATE", "subResource": "ephemeralcontainers" }),
        json!({ "operation": "CONNECT", "subResource": "exec" }),
        json!({ "resource": { "group": "", "version": "v1", "resource": "configmaps" } }),
    ] {
        let review = review(|request| {
            for (key, value) in change.as_object().expect("an object") {
                request[key] = value.clone();
            }
        });
        assert_eq!(notices(&review, &refused()), [], "{change}");
    }
}

#[test]
fn a_pod_without_a_usable_owner_is_told_of_on_its_namespace() {
    let long = "x".repeat(300);
    for owners in [
        json!(null),
        json!([]),
        json!([{ "apiVersion": "v1", "kind": "Job", "name": "j", "uid": "u" }]),
        json!([{ "apiVersion": "v1", "kind": "Node", "name": "n", "uid": "u", "controller": true }]),
        json!([{ "apiVersion": "v1", "kind": "Job", "name": long, "uid": "u", "controller": true }]),
        json!([{ "apiVersion": "v1", "kind": 7, "name": "n", "uid": "u", "controller": true }]),
        json!("x"),
    ] {
        let review = review(|request| request["object"]["metadata"]["ownerReferences"] = owners);
        let subject = subject(&review);
        assert_eq!((subject.kind.as_str(), subject.name.as_str()), ("Namespace", "agents"));
    }
}

#[test]
fn a_note_is_as_short_as_the_api_wants_it_and_of_one_line() {
    let refusal = Refusal::new(Class::Policy, "ü\n".repeat(2000));
    let told = notices(&review(|_| {}), &Outcome::Refuse(refusal));
    assert!(told[0].note.len() <= NOTE && told[0].note.len() > NOTE - 4);
    assert!(!told[0].note.contains('\n'));
    assert_eq!(reason(Class::PodSecurity), "RingfencePodSecurity");
    assert_eq!(reason(Class::Constraints), "RingfenceSecurityContextConstraints");
    assert!(Class::ALL.iter().all(|class| reason(*class).len() <= 128));
}

/// An API server that keeps what it is told; a patch of what it does not know is not found.
type Told = Arc<Mutex<Vec<(Method, String, Value)>>>;

fn api(told: &Told, answers: bool) -> Client {
    let told = Arc::clone(told);
    let service = tower::service_fn(move |request: Request<kube::client::Body>| {
        let told = Arc::clone(&told);
        async move {
            if !answers {
                std::future::pending::<()>().await;
            }
            let (head, body) = request.into_parts();
            let mut body: Value = serde_json::from_slice(&body.collect_bytes().await?)?;
            let path = head.uri.path().to_owned();
            told.lock().unwrap_or_else(PoisonError::into_inner).push((
                head.method,
                path,
                body.clone(),
            ));
            body["metadata"]["name"] = json!("ringfence-x");
            let body = kube::client::Body::from(body.to_string().into_bytes());
            Ok::<_, Box<dyn std::error::Error + Send + Sync>>(Response::new(body))
        }
    });
    Client::new(service, "default")
}

async fn until(metrics: &Metrics, line: &str) {
    while !metrics.render(true).contains(line) {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn an_event_is_written_once_and_says_class_cause_and_remedy() {
    let (told, metrics) = (Told::default(), Arc::new(Metrics::default()));
    let (events, write) = Events::new(api(&told, true), "pod-1".into(), Arc::clone(&metrics));
    let writing = tokio::spawn(write);
    for _ in 0..3 {
        events.tell(&review(|_| {}), &refused());
    }
    events.tell(&review(|request| request["dryRun"] = json!(true)), &refused());
    events.tell(
        &review(|_| {}),
        &warned(&[Class::PodSecurity, Class::Constraints, Class::InitContainer]),
    );
    until(&metrics, "ringfence_events_total{result=\"written\"} 4\n").await;
    until(&metrics, "ringfence_events_total{result=\"folded\"} 2\n").await;
    let told = std::mem::take(&mut *told.lock().unwrap_or_else(PoisonError::into_inner));
    let [refused, level, scc, init] = &told[..] else { panic!("{told:?}") };
    let (method, path, event) = refused;
    assert_eq!(method, Method::POST);
    assert_eq!(path, "/apis/events.k8s.io/v1/namespaces/agents/events");
    assert_eq!(
        event["regarding"],
        json!({ "apiVersion": "apps/v1", "kind": "ReplicaSet",
        "name": "agent-1", "namespace": "agents", "uid": "u-1" })
    );
    for (key, value) in [
        ("type", "Warning"),
        ("reason", "RingfenceHostPid"),
        ("action", "Refuse"),
        ("note", "ringfence: spec.hostPID is true; remove hostPID"),
        ("reportingController", CONTROLLER),
        ("reportingInstance", "pod-1"),
    ] {
        assert_eq!(event[key], value);
    }
    assert!(event["eventTime"].is_string());
    // It depends on these whether there will be a pod.
    for grave in [level, scc] {
        assert_eq!((&grave.2["type"], &grave.2["action"]), (&json!("Warning"), &json!("Admit")));
    }
    assert_eq!(
        (&init.2["type"], &init.2["reason"]),
        (&json!("Normal"), &json!("RingfenceInitContainer"))
    );
    // Nobody tells any more: the writer ends.
    drop(events);
    writing.await.expect("ends");
}

#[tokio::test]
async fn no_answer_waits_for_an_api_server_that_hangs() {
    let metrics = Arc::new(Metrics::default());
    let (events, write) =
        Events::new(api(&Told::default(), false), "pod-1".into(), Arc::clone(&metrics));
    let writing = tokio::spawn(write);
    // The call is not even asynchronous; what does not fit is dropped and counted.
    for _ in 0..QUEUE + 50 {
        events.tell(&review(|_| {}), &refused());
    }
    assert!(metrics.render(true).contains("ringfence_events_total{result=\"dropped\"} 50\n"));
    writing.abort();
}

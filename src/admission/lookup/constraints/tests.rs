use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use axum::http::{Request, Response};

use super::*;

/// What the API server says.
#[derive(Clone, Copy)]
enum Says {
    May(bool),
    /// No authorizer of it could tell.
    Fault,
    Forbidden,
    Nothing,
}

/// And how often it was asked.
fn constraints(says: Says) -> (Constraints, Arc<AtomicUsize>) {
    let asked = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&asked);
    let service = tower::service_fn(move |request: Request<kube::client::Body>| {
        let count = Arc::clone(&count);
        async move {
            count.fetch_add(1, Ordering::Relaxed);
            let (head, body) = request.into_parts();
            assert_eq!(head.uri.path(), "/apis/authorization.k8s.io/v1/subjectaccessreviews");
            let mut body: Value = serde_json::from_slice(&body.collect_bytes().await?)?;
            assert_eq!(body["spec"], of("agents", "runner"));
            let code = match says {
                Says::May(may) => {
                    body["status"] = json!({"allowed": may});
                    201
                }
                Says::Fault => {
                    body["status"] =
                        json!({"allowed": false, "evaluationError": "a webhook is down"});
                    201
                }
                Says::Forbidden => {
                    body = json!({"kind": "Status", "apiVersion": "v1", "code": 403,
                        "status": "Failure", "reason": "Forbidden", "message": "not allowed"});
                    403
                }
                Says::Nothing => std::future::pending().await,
            };
            let body = kube::client::Body::from(body.to_string().into_bytes());
            let answer = Response::builder().status(code).body(body)?;
            Ok::<_, Box<dyn std::error::Error + Send + Sync>>(answer)
        }
    });
    (Constraints::new(Client::new(service, "default"), "ringfence".into()), asked)
}

/// What OpenShift's admission asks the authorizer.
fn of(namespace: &str, account: &str) -> Value {
    json!({
        "user": format!("system:serviceaccount:{namespace}:{account}"),
        "groups": ["system:serviceaccounts", format!("system:serviceaccounts:{namespace}"),
            "system:authenticated"],
        "resourceAttributes": {"namespace": namespace, "group": "security.openshift.io",
            "resource": "securitycontextconstraints", "name": "ringfence", "verb": "use"},
    })
}

async fn missing(constraints: &Constraints) -> Option<String> {
    let pod = json!({"spec": {"serviceAccountName": "runner"}});
    constraints.missing_for("agents", &pod, Deadline::after(Duration::from_secs(60))).await
}

#[tokio::test]
async fn who_may_not_use_the_constraints_is_known_and_asked_about_once() {
    for (may, expected) in [(true, None), (false, Some("ringfence"))] {
        let (constraints, asked) = constraints(Says::May(may));
        for _ in 0..3 {
            assert_eq!(missing(&constraints).await.as_deref(), expected);
        }
        assert_eq!(asked.load(Ordering::Relaxed), 1);
    }
}

#[tokio::test]
async fn what_could_not_be_looked_up_is_nobodys_fault() {
    for says in [Says::Fault, Says::Forbidden, Says::Nothing] {
        let (constraints, asked) = constraints(says);
        // The second does not wait again.
        for _ in 0..2 {
            assert_eq!(missing(&constraints).await, None);
        }
        assert_eq!(asked.load(Ordering::Relaxed), 1);
    }
}

#[test]
fn an_answer_is_kept_for_a_short_time_and_not_without_limit() {
    let client = tower::service_fn(|_: Request<kube::client::Body>| async {
        Err::<Response<kube::client::Body>, _>(std::io::Error::other("nobody"))
    });
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let _entered = runtime.enter();
    let constraints = Constraints::new(Client::new(client, "default"), "ringfence".into());
    let of = |n: usize| ("agents".to_owned(), format!("account-{n}"));
    for n in 0..=KEPT {
        constraints.keep(of(n), May::Yes);
    }
    let known = || constraints.known.lock().expect("sound");
    assert_eq!(known().len(), KEPT);
    assert_eq!(constraints.known(&of(0)), Some(May::Yes));
    assert_eq!(constraints.known(&of(KEPT)), None);
    // What has had its time makes room.
    let long_ago = Instant::now().checked_sub(KEEP).expect("a clock that has run");
    known().values_mut().for_each(|known| known.asked = long_ago);
    assert_eq!(constraints.known(&of(0)), None);
    constraints.keep(of(KEPT), May::No);
    assert_eq!(known().len(), 1);
    assert_eq!(constraints.known(&of(KEPT)), Some(May::No));
}

use std::sync::{Arc, Mutex, PoisonError};

use axum::body::to_bytes;
use axum::http::{Method, Request, Response, Uri};
use clap::Parser as _;

use super::*;

/// An API server with an installed chart: what it was asked to write, and what it refuses.
#[derive(Clone, Default)]
pub(super) struct Cluster(Arc<Mutex<State>>);

#[derive(Default)]
pub(super) struct State {
    /// Method, path and body of every write, in order.
    writes: Vec<(String, String, Value)>,
    /// Objects by their paths.
    pub(super) objects: BTreeMap<String, Value>,
    /// A part of a path that may not be written to.
    refuses: Option<&'static str>,
    /// What comes of test pods, in turn, the last for all that follow; none: they are fenced.
    pub(super) pods: Vec<TestPod>,
    /// How many were made.
    pub(super) asked: usize,
    /// The service account of the last one.
    account: Option<String>,
    /// Nobody may make any.
    pub(super) no_pods: bool,
    /// Connections made.
    pub(super) clients: usize,
}

/// What the API server makes of a test pod.
#[derive(Clone, Copy)]
pub(super) enum TestPod {
    Fenced,
    /// With the label's value that it says.
    FencedFor(&'static str),
    Bare,
    Refused(u16, &'static str),
}

const ROLE: &str = "/apis/rbac.authorization.k8s.io/v1/clusterroles/ringfence-scc";
const BINDING: &str = "/apis/rbac.authorization.k8s.io/v1/namespaces/ns/rolebindings/ringfence-scc";
const PULL_SECRETS: &str =
    "/apis/rbac.authorization.k8s.io/v1/namespaces/ns/rolebindings/ringfence-pull-secrets";
const PODS: &str = "/api/v1/namespaces/ns/pods";
const NAMESPACE: &str = "/api/v1/namespaces/ns";
pub(super) const DEPLOYMENT: &str = "/apis/apps/v1/namespaces/ringfence/deployments/ringfence";
const ACCESS: &str = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews";

impl Cluster {
    pub(super) fn new(objects: &[(&str, Value)]) -> Self {
        let chart = "/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations/ringfence";
        let release = json!({"metadata": {}, "spec": {"selector": {}, "template": {"spec": {
            "containers": [{"name": "webhook", "image": "registry.example/ringfence:1"}]}}}});
        let always = [
            (chart, json!({"metadata": {}})),
            (PODS, json!({"metadata": {}, "items": []})),
            (DEPLOYMENT, release),
        ];
        let all = always.iter().chain(objects);
        let objects = all.map(|(path, object)| ((*path).to_owned(), object.clone())).collect();
        Self(Arc::new(Mutex::new(State { objects, ..State::default() })))
    }

    fn refusing(self, what: &'static str) -> Self {
        self.state().refuses = Some(what);
        self
    }

    pub(super) fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn connect(&self) -> impl Fn() -> anyhow::Result<Client> {
        let cluster = self.clone();
        move || Ok(cluster.client())
    }

    fn client(&self) -> Client {
        self.state().clients += 1;
        let cluster = self.clone();
        let service = tower::service_fn(move |request: Request<kube::client::Body>| {
            let cluster = cluster.clone();
            async move {
                let (parts, body) = request.into_parts();
                let body = to_bytes(axum::body::Body::new(body), 1 << 20).await.expect("a body");
                let (code, answer) = cluster.answer(&parts.method, &parts.uri, &body);
                Response::builder().status(code).body(answer.to_string())
            }
        });
        Client::new(service, "default")
    }

    fn answer(&self, method: &Method, uri: &Uri, body: &[u8]) -> (u16, Value) {
        let path = uri.path();
        let status = |code: u16, reason: &str| failure(code, &format!("{path}: {reason}"));
        let mut state = self.state();
        if method == Method::GET {
            let found = state.objects.get(path).cloned();
            return found.map_or_else(|| status(404, "NotFound"), |object| (200, object));
        }
        let body: Value = serde_json::from_slice(body).unwrap_or(Value::Null);
        if path == ACCESS {
            let wanted = json!({"namespace": "ns", "verb": "create", "resource": "pods"});
            assert_eq!(body["spec"]["resourceAttributes"], wanted);
            return (201, json!({"spec": {}, "status": {"allowed": !state.no_pods}}));
        }
        if path == PODS && uri.query().is_some_and(|query| query.contains("dryRun=All")) {
            return state.test_pod(body);
        }
        state.writes.push((method.to_string(), path.to_owned(), body));
        if state.refuses.is_some_and(|part| path.contains(part)) {
            return status(403, "Forbidden");
        }
        (200, json!({"metadata": {}, "roleRef": {"apiGroup": "", "kind": "", "name": ""}}))
    }

    /// What was written: method and path.
    pub(super) fn writes(&self) -> Vec<(String, String)> {
        self.state().writes.iter().map(|(how, path, _)| (how.clone(), path.clone())).collect()
    }
}

impl State {
    fn test_pod(&mut self, mut pod: Value) -> (u16, Value) {
        let turn = self.asked.min(self.pods.len().saturating_sub(1));
        self.asked += 1;
        let made = self.pods.get(turn).copied().unwrap_or(TestPod::Fenced);
        if let TestPod::FencedFor(mode) = made {
            let status = json!({"mode": mode}).to_string();
            pod["metadata"]["annotations"] = json!({"ringfence.dev/status": status});
        }
        self.account = pod["spec"]["serviceAccountName"].as_str().map(str::to_owned);
        match made {
            TestPod::Refused(code, message) => return failure(code, message),
            TestPod::Bare => {}
            TestPod::Fenced | TestPod::FencedFor(_) => {
                let container = &mut pod["spec"]["containers"][0];
                let supervisor = "/ringfence/d/d/d/d/d/d/bin/ringfence-supervisor";
                container["command"] = json!([supervisor, "--no-env", "--", "x"]);
            }
        }
        (201, pod)
    }
}

fn failure(code: u16, message: &str) -> (u16, Value) {
    let reason = if code == 404 { "NotFound" } else { "Forbidden" };
    let status = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure",
        "code": code, "reason": reason, "message": message});
    (code, status)
}

#[derive(clap::Parser)]
struct Line {
    #[command(flatten)]
    args: Enable,
}

pub(super) fn words(more: &[&str]) -> Enable {
    let all = ["enable", "ns"].iter().chain(more);
    Line::try_parse_from(all).unwrap_or_else(|error| panic!("{error}")).args
}

fn place() -> Place {
    words(&[]).place
}

fn wrote(how: &str, path: &str) -> (String, String) {
    (how.to_owned(), path.to_owned())
}

#[tokio::test]
async fn the_constraints_are_granted_before_the_namespace_is_labelled() {
    let cluster = Cluster::new(&[(ROLE, json!({"metadata": {}}))]);
    set_up(&cluster.connect(), &words(&["--scc", "--strict"])).await.expect("enabled");
    assert_eq!(cluster.writes(), [wrote("PATCH", BINDING), wrote("PATCH", NAMESPACE)]);
    let binding = cluster.state().writes[0].2.clone();
    assert_eq!(
        binding["roleRef"],
        json!({"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "ringfence-scc"})
    );
    assert_eq!(
        binding["subjects"],
        json!([{"apiGroup": "rbac.authorization.k8s.io", "kind": "Group",
            "name": "system:serviceaccounts:ns"}])
    );
    assert_eq!(binding["metadata"]["labels"], json!({MANAGED_BY.0: MANAGED_BY.1}));

    let cluster = Cluster::new(&[(ROLE, json!({"metadata": {}}))]);
    let args = words(&["--scc", "--trust-authors", "--service-account=a", "--service-account=b"]);
    set_up(&cluster.connect(), &args).await.expect("enabled");
    let subjects = cluster.state().writes[0].2["subjects"].clone();
    let account = |name: &str| json!({"kind": "ServiceAccount", "name": name, "namespace": "ns"});
    assert_eq!(subjects, json!([account("a"), account("b")]));
    // Others could not be what the test pod is.
    assert_eq!(cluster.state().account.as_deref(), Some("a"));
    // Nobody is granted anything by it alone.
    assert!(Line::try_parse_from(["enable", "ns", "--service-account=a"]).is_err());
}

#[tokio::test]
async fn without_the_charts_role_nothing_is_written() {
    let cluster = Cluster::new(&[]);
    let error = set_up(&cluster.connect(), &words(&["--scc", "--strict", "--pull-secrets"])).await;
    let error = error.expect_err("refused").to_string();
    assert!(error.contains("no clusterrole ringfence-scc"), "{error}");
    assert!(error.contains("openshift.enabled=true"), "{error}");
    assert_eq!(cluster.writes(), []);
    // A namespace that does not ask for it does not need it.
    set_up(&cluster.connect(), &words(&[])).await.expect("enabled");
    assert_eq!(cluster.writes(), [wrote("PATCH", NAMESPACE)]);
}

#[tokio::test]
async fn a_grant_that_fails_is_an_error_and_leaves_the_label_off() {
    let scc: (&str, &[&str]) = ("ringfence-scc", &["--scc", "--strict"]);
    for (grant, flags) in [scc, ("ringfence-pull-secrets", &["--pull-secrets"])] {
        let cluster = Cluster::new(&[(ROLE, json!({"metadata": {}}))]).refusing(grant);
        let error = set_up(&cluster.connect(), &words(flags)).await.expect_err("refused");
        let error = error.to_string();
        assert!(error.contains(&format!("cannot make rolebinding ns/{grant}")), "{error}");
        assert!(!cluster.writes().contains(&wrote("PATCH", NAMESPACE)), "{grant}");
    }
}

#[tokio::test]
async fn disabling_takes_away_what_was_granted_and_nothing_of_others() {
    let role = json!({"apiGroup": "", "kind": "", "name": ""});
    let binding = |by: &str| json!({"metadata": {"labels": {MANAGED_BY.0: by}}, "roleRef": role});
    let ours = Cluster::new(&[(BINDING, binding(MANAGED_BY.1))]);
    take_away(&ours.client(), &place()).await.expect("disabled");
    // The right goes first: with the label gone nothing would hold a pod that uses it.
    assert_eq!(ours.writes(), [wrote("DELETE", BINDING), wrote("PATCH", NAMESPACE)]);

    let theirs = Cluster::new(&[(BINDING, binding("somebody"))]);
    let error = take_away(&theirs.client(), &place()).await.expect_err("refused").to_string();
    assert!(error.contains("rolebinding ns/ringfence-scc was made by somebody else"), "{error}");
    assert_eq!(theirs.writes(), []);
    let theirs = Cluster::new(&[(PULL_SECRETS, binding("somebody"))]);
    take_away(&theirs.client(), &place()).await.expect("disabled");
    assert_eq!(theirs.writes(), [wrote("PATCH", NAMESPACE)]);

    let stuck = Cluster::new(&[(BINDING, binding(MANAGED_BY.1))]).refusing("ringfence-scc");
    let error = take_away(&stuck.client(), &place()).await.expect_err("refused").to_string();
    assert!(error.contains("cannot remove rolebinding ns/ringfence-scc"), "{error}");
    assert_eq!(stuck.writes(), [wrote("DELETE", BINDING)]);
}

#[tokio::test]
async fn a_binding_of_somebody_else_is_not_taken_over() {
    let role = json!({"apiGroup": "", "kind": "", "name": ""});
    let theirs = json!({"metadata": {"labels": {MANAGED_BY.0: "somebody"}}, "roleRef": role});
    let cluster = Cluster::new(&[(ROLE, json!({"metadata": {}})), (BINDING, theirs)]);
    let error = set_up(&cluster.connect(), &words(&["--scc", "--strict"])).await;
    let error = error.expect_err("refused").to_string();
    assert!(error.contains("was made by somebody else"), "{error}");
    assert_eq!(cluster.writes(), []);
}

/// The release's Deployment, by whose word pods name the secret; and that one.
fn with_secret(kind: &str) -> [(&'static str, Value); 2] {
    let container = json!({"name": "webhook", "image": "registry.example/ringfence:1",
        "args": ["webhook", "--supervisor-pull-secret=fence-pull"]});
    let deployment = json!({"metadata": {}, "spec": {"selector": {},
        "template": {"spec": {"containers": [container]}}}});
    let secret = json!({"metadata": {}, "type": kind, "data": {".dockerconfigjson": "e30="}});
    [(DEPLOYMENT, deployment), ("/api/v1/namespaces/ringfence/secrets/fence-pull", secret)]
}

const COPY: &str = "/api/v1/namespaces/ns/secrets/fence-pull";

#[tokio::test]
async fn the_images_pull_secret_is_copied_before_the_namespace_is_labelled() {
    let objects = with_secret("kubernetes.io/dockerconfigjson");
    let cluster = Cluster::new(&objects);
    set_up(&cluster.connect(), &words(&["--image-pull-secret"])).await.expect("enabled");
    assert_eq!(cluster.writes(), [wrote("PATCH", COPY), wrote("PATCH", NAMESPACE)]);
    let copy = cluster.state().writes[0].2.clone();
    assert_eq!(copy["type"], "kubernetes.io/dockerconfigjson");
    assert_eq!(copy["data"], json!({".dockerconfigjson": "e30="}));
    assert_eq!(copy["metadata"]["labels"], json!({MANAGED_BY.0: MANAGED_BY.1}));
    // Only who asks for it gets a credential.
    let cluster = Cluster::new(&objects);
    set_up(&cluster.connect(), &words(&[])).await.expect("enabled");
    assert_eq!(cluster.writes(), [wrote("PATCH", NAMESPACE)]);
}

#[tokio::test]
async fn a_secret_that_is_none_or_somebody_elses_is_not_copied() {
    let theirs = json!({"metadata": {"labels": {MANAGED_BY.0: "somebody"}}});
    let pull = with_secret("kubernetes.io/dockerconfigjson");
    let opaque = with_secret("Opaque");
    let cases: [(Vec<_>, &str); 4] = [
        (vec![], "set supervisor.pullSecret of the chart"),
        (vec![pull[0].clone()], "cannot read secret ringfence/fence-pull"),
        (opaque.to_vec(), "is no pull secret"),
        ([&pull[..], &[(COPY, theirs)]].concat(), "was made by somebody else"),
    ];
    for (objects, words_of) in cases {
        let cluster = Cluster::new(&objects);
        let error = set_up(&cluster.connect(), &words(&["--image-pull-secret"])).await;
        let error = format!("{:#}", error.expect_err("refused"));
        assert!(error.contains(words_of), "{error}");
        assert_eq!(cluster.writes(), [], "{error}");
    }
}

#[tokio::test]
async fn a_strict_namespace_is_loosened_by_its_own_flag_alone() {
    let strict = json!({"metadata": {"labels": {INJECT_LABEL: "strict"}}});
    let objects = [&[(NAMESPACE, strict)], &with_secret("kubernetes.io/dockercfg")[..]].concat();
    let cluster = Cluster::new(&objects);
    // As one does it again for a secret that has changed.
    let error = set_up(&cluster.connect(), &words(&["--image-pull-secret"])).await;
    let error = error.expect_err("refused").to_string();
    assert!(error.contains("--strict") && error.contains("--loosen"), "{error}");
    assert_eq!(cluster.writes(), []);
    for (flag, value) in [("--strict", "strict"), ("--loosen", "enabled")] {
        let cluster = Cluster::new(&objects);
        set_up(&cluster.connect(), &words(&[flag])).await.expect("enabled");
        let label = cluster.state().writes[0].2["metadata"]["labels"][INJECT_LABEL].clone();
        assert_eq!(label, value);
    }
}

#[tokio::test]
async fn who_is_trusted_with_the_constraints_is_said() {
    let cluster = Cluster::new(&[(ROLE, json!({"metadata": {}}))]);
    let error = set_up(&cluster.connect(), &words(&["--scc"])).await.expect_err("refused");
    assert!(error.to_string().contains("--trust-authors"), "{error}");
    assert_eq!(cluster.writes(), []);
    assert!(Line::try_parse_from(["enable", "ns", "--trust-authors"]).is_err());
}

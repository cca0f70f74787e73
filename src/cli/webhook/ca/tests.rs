use std::sync::{Arc, Mutex, PoisonError};

use axum::http::{Method, Request, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use clap::Parser as _;
use serde_json::{Value, json};
use tokio::sync::watch;

use super::*;
use crate::pki::ca_bundle::verify;
use crate::pki::stored::ROTATE;

const NAME: &str = "ringfence.ns.svc";

#[derive(clap::Parser)]
struct Line {
    #[command(flatten)]
    args: Args,
}

fn args() -> Args {
    let line = [
        "webhook",
        "--namespace=ns",
        "--supervisor-image=r/i:1",
        "--ca-secret=ca",
        "--webhook-configuration=x",
    ];
    Line::try_parse_from(line).unwrap_or_else(|error| panic!("{error}")).args
}

/// An API server that knows one Secret and one configuration, and minds versions.
#[derive(Clone, Default)]
struct Cluster(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    version: u64,
    secret: Option<Value>,
    bundle: Option<String>,
    uid: Option<&'static str>,
    configuration_version: u64,
    /// What every request to the Secret is answered.
    refuse: Option<u16>,
}

impl State {
    fn secret(&mut self, mut secret: Value) -> (u16, Value) {
        self.version += 1;
        secret["metadata"]["resourceVersion"] = json!(self.version.to_string());
        self.secret = Some(secret.clone());
        (200, secret)
    }

    fn answer(&mut self, method: &Method, path: &str, body: Value) -> (u16, Value) {
        if path.contains("/secrets") {
            return match (self.refuse, method, self.secret.clone()) {
                (Some(code), ..) => status(code, "InternalError"),
                (_, &Method::GET, Some(secret)) => (200, secret),
                (_, &Method::POST, None) => self.secret(body),
                (_, &Method::POST, Some(_)) => status(409, "AlreadyExists"),
                (_, &Method::PUT, Some(stored)) => {
                    let version = |secret: &Value| secret["metadata"]["resourceVersion"].clone();
                    if version(&stored) == version(&body) {
                        self.secret(body)
                    } else {
                        status(409, "Conflict")
                    }
                }
                _ => status(404, "NotFound"),
            };
        }
        assert!(path.ends_with("/mutatingwebhookconfigurations/x"), "{path}");
        if method == Method::PATCH {
            let version = json!(self.configuration_version.to_string());
            if body["metadata"]["resourceVersion"] != version {
                return status(409, "Conflict");
            }
            self.configuration_version += 1;
            let bundle = body["webhooks"][0]["clientConfig"]["caBundle"].as_str();
            self.bundle = bundle.map(str::to_owned);
        }
        let live = json!({
            "apiVersion": "admissionregistration.k8s.io/v1",
            "kind": "MutatingWebhookConfiguration",
            "metadata": { "name": "x", "uid": self.uid,
                "resourceVersion": self.configuration_version.to_string() },
            "webhooks": [{ "name": "w", "clientConfig": { "caBundle": self.bundle } }],
        });
        (200, live)
    }
}

fn status(code: u16, reason: &str) -> (u16, Value) {
    let status = json!({
        "kind": "Status", "apiVersion": "v1", "status": "Failure", "metadata": {},
        "reason": reason, "message": reason, "code": code,
    });
    (code, status)
}

impl Cluster {
    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn client(&self) -> Client {
        let cluster = self.clone();
        let service = tower::service_fn(move |request: Request<kube::client::Body>| {
            let cluster = cluster.clone();
            async move {
                let (head, body) = request.into_parts();
                let bytes = body.collect_bytes().await?;
                let body =
                    if bytes.is_empty() { Value::Null } else { serde_json::from_slice(&bytes)? };
                let (code, answer) = cluster.state().answer(&head.method, head.uri.path(), body);
                let body = kube::client::Body::from(answer.to_string().into_bytes());
                Ok::<_, Box<dyn std::error::Error + Send + Sync>>(
                    Response::builder().status(code).body(body)?,
                )
            }
        });
        Client::new(service, "ns")
    }

    fn bundle(&self) -> Vec<u8> {
        let bundle = self.state().bundle.clone().unwrap_or_default();
        STANDARD.decode(bundle).expect("base64")
    }

    fn ask_for_a_rotation(&self) {
        let mut secret = self.state().secret.clone().expect("a secret");
        secret["metadata"]["annotations"][ROTATE] = json!("now");
        self.state().secret(secret);
    }
}

/// What lives as long as a replica.
struct Process {
    client: Client,
    store: Store,
    held: Held<Ca>,
    serving: Serving,
    metrics: Metrics,
    trust: watch::Sender<Result<(), String>>,
}

impl Process {
    async fn start(cluster: &Cluster) -> Self {
        let client = cluster.client();
        let store = Store::new(&client, "ns", "ca");
        let terms = args().terms();
        let held = store.load_or_create(terms.ca_life).await.expect("a CA");
        let serving = Serving::by(held.current.clone(), "ringfence", "ns", terms.leaf_life);
        Self {
            client,
            store,
            held,
            serving: serving.expect("a leaf"),
            metrics: Metrics::default(),
            trust: watch::channel(Err("new".to_owned())).0,
        }
    }

    /// Its keeper, for which nothing has to settle: a round is a step.
    fn keeper(&self) -> Keeper<'_> {
        let mut keeper = Keeper::new(
            (&self.client, &args(), &self.store),
            self.held.clone(),
            &self.serving,
            &self.metrics,
            &self.trust,
        );
        keeper.terms.settle = Duration::ZERO;
        keeper
    }

    fn ready(&self) -> bool {
        self.trust.borrow().is_ok()
    }

    fn verifies(&self, bundle: &[u8]) -> Result<(), String> {
        verify(bundle, &self.serving.chain(), NAME)
    }
}

#[tokio::test]
async fn three_replicas_rotate_and_each_is_trusted_at_every_moment() {
    let cluster = Cluster::default();
    let mut processes = Vec::new();
    for _ in 0..3 {
        processes.push(Process::start(&cluster).await);
    }
    let mut keepers: Vec<Keeper<'_>> = processes.iter().map(Process::keeper).collect();
    let first = processes[0].serving.ca_pem();
    for keeper in &mut keepers {
        keeper.round().await.expect("no other CA");
    }
    for process in &processes {
        assert!(process.ready() && process.serving.ca_pem() == first);
    }
    // Each order of three that take turns, and one that takes two.
    let mut current = first;
    for order in [[0, 1, 2, 0], [2, 1, 0, 2], [1, 1, 2, 0], [0, 2, 1, 1]] {
        cluster.ask_for_a_rotation();
        for _ in 0..6 {
            for index in order {
                keepers[index].round().await.expect("no other CA");
                for process in &processes {
                    process.verifies(&cluster.bundle()).expect("trusted");
                    assert!(process.ready());
                }
            }
        }
        let now = processes[0].serving.ca_pem();
        assert_ne!(now, current, "rotated");
        assert!(processes.iter().all(|process| process.serving.ca_pem() == now), "all of them");
        assert!(
            cluster.state().secret.as_ref().expect("secret")["metadata"]["annotations"][ROTATE]
                .is_null()
        );
        current = now;
    }
}

#[tokio::test]
async fn a_replica_that_starts_at_any_step_of_a_rotation_is_trusted() {
    for steps in 0..6 {
        let cluster = Cluster::default();
        let old = Process::start(&cluster).await;
        let mut keeper = old.keeper();
        keeper.round().await.expect("published");
        cluster.ask_for_a_rotation();
        for _ in 0..steps {
            keeper.round().await.expect("a step");
        }
        // The old one is gone; the new one goes on from there.
        let new = Process::start(&cluster).await;
        new.verifies(&cluster.bundle()).expect("trusted from its first moment");
        let mut keeper = new.keeper();
        for _ in 0..6 {
            keeper.round().await.expect("a step");
            assert!(new.ready());
            old.verifies(&cluster.bundle()).expect("the former leaf stays trusted");
        }
        assert_ne!(new.serving.ca_pem(), old.held.current.pem(), "{steps}: the rotation ended");
    }
}

#[tokio::test]
async fn the_secret_decides_and_is_made_again_when_it_is_gone() {
    let cluster = Cluster::default();
    let process = Process::start(&cluster).await;
    let mut keeper = process.keeper();
    keeper.round().await.expect("published");
    cluster.ask_for_a_rotation();
    keeper.round().await.expect("a next one is made");
    keeper.round().await.expect("and published");
    let before = cluster.state().secret.clone().expect("a secret");
    let bundle = cluster.bundle();

    cluster.state().secret = None;
    keeper.round().await.expect("made again");
    let again = cluster.state().secret.clone().expect("a secret");
    assert_eq!((&again["data"]["tls.crt"], cluster.bundle()), (&before["data"]["tls.crt"], bundle));
    keeper.round().await.expect("the same");
    assert!(process.ready());

    // Unreadable, or without a CA: what runs goes on, and steps are not taken.
    cluster.ask_for_a_rotation();
    cluster.state().refuse = Some(500);
    assert!(!keeper.round().await.expect("unknown") && process.ready());
    cluster.state().bundle = None;
    assert!(!keeper.round().await.expect("unknown"));
    assert!(cluster.bundle().is_empty(), "nothing is published while it is unknown");
    cluster.state().refuse = None;
    cluster.state().secret = Some(json!({ "metadata": { "resourceVersion": "9" }, "data": {} }));
    keeper.round().await.expect("broken");
    process.verifies(&cluster.bundle()).expect("published from memory");
    assert_eq!(cluster.state().secret.as_ref().expect("kept")["data"], json!({}));

    cluster.state().secret = None;
    Process::start(&cluster).await;
    keeper.round().await.expect_err("another CA");
    process.verifies(&cluster.bundle()).expect("and nothing published");
}

#[tokio::test]
async fn the_secret_goes_with_the_configuration() {
    let cluster = Cluster::default();
    let process = Process::start(&cluster).await;
    let mut keeper = process.keeper();
    for uid in ["first", "made-again"] {
        cluster.state().uid = Some(uid);
        let before = cluster.state().secret.clone().expect("a secret");
        for _ in 0..3 {
            keeper.round().await.expect("a step");
        }
        let secret = cluster.state().secret.clone().expect("a secret");
        assert_eq!(secret["data"], before["data"]);
        let owners = secret["metadata"]["ownerReferences"].clone();
        assert_eq!(
            owners,
            json!([{ "apiVersion": "admissionregistration.k8s.io/v1", "name": "x", "uid": uid,
                "kind": "MutatingWebhookConfiguration" }])
        );
    }
    // Once it is so, all else goes on, and what is written is not written again.
    let version = cluster.state().version;
    keeper.round().await.expect("at rest");
    assert_eq!(cluster.state().version, version);
    cluster.ask_for_a_rotation();
    for _ in 0..6 {
        keeper.round().await.expect("a step");
    }
    assert_ne!(process.serving.ca_pem(), process.held.current.pem());
}

#[tokio::test]
async fn without_a_secret_the_older_memory_takes_nothing_out_of_the_bundle() {
    let cluster = Cluster::default();
    let (slow, quick) = (Process::start(&cluster).await, Process::start(&cluster).await);
    let (mut late, mut keeper) = (slow.keeper(), quick.keeper());
    late.round().await.expect("published");
    cluster.ask_for_a_rotation();
    for _ in 0..6 {
        keeper.round().await.expect("a step");
    }
    cluster.state().secret = Some(json!({ "metadata": { "resourceVersion": "9" }, "data": {} }));
    for wiped in [false, true] {
        if wiped {
            cluster.state().bundle = None;
        }
        for _ in 0..3 {
            late.round().await.expect("from memory");
            keeper.round().await.expect("from memory");
        }
        for process in [&slow, &quick] {
            process.verifies(&cluster.bundle()).expect("trusted");
        }
    }
}

#[tokio::test]
async fn a_bundle_is_not_written_over_one_that_was_not_seen() {
    let cluster = Cluster::default();
    let client = cluster.client();
    let kind = ca_bundle::ConfigurationKind::Mutating;
    let configuration = Configuration { kind, name: "x".into() };
    let live = configuration.live(&client).await.expect("read");
    ca_bundle::publish(&client, &configuration, &live, "new").await.expect("written");
    let late = ca_bundle::publish(&client, &configuration, &live, "old").await;
    assert!(matches!(late, Err(CaBundleError::Changed { .. })), "{late:?}");
    assert_eq!(cluster.bundle(), b"new");
}

#[tokio::test]
async fn whose_bundle_is_somebody_elses_rotates_nothing() {
    let cluster = Cluster::default();
    let process = Process::start(&cluster).await;
    let mut keeper = process.keeper();
    keeper.configurations.clear();
    cluster.ask_for_a_rotation();
    for _ in 0..4 {
        assert!(keeper.round().await.expect("no step"));
    }
    assert!(process.ready());
    assert!(cluster.state().secret.as_ref().expect("kept")["data"]["next.crt"].is_null());
}

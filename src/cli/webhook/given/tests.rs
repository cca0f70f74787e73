use std::sync::{Arc, Mutex, PoisonError};

use axum::http::{Method, Request, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use clap::Parser as _;
use serde_json::{Value, json};
use tokio::sync::watch;

use super::*;
use crate::pki::{Authority, LeafKey, SubjectName, certificate_pem};

const NAME: &str = "ringfence.ns.svc";
const DAY: Duration = Duration::from_secs(86_400);

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
        "--certificate-secret=given",
        "--webhook-configuration=m",
        "--validating-configuration=v",
    ];
    Line::try_parse_from(line).unwrap_or_else(|error| panic!("{error}")).args
}

/// An API server that knows one Secret and two configurations, and takes no write.
#[derive(Clone, Default)]
struct Cluster(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    secret: Option<Value>,
    /// PEM.
    bundle: String,
    away: bool,
}

impl Cluster {
    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn client(&self) -> Client {
        let cluster = self.clone();
        let service = tower::service_fn(move |request: Request<kube::client::Body>| {
            let (code, answer) = cluster.answer(request.method(), request.uri().path());
            let body = kube::client::Body::from(answer.to_string().into_bytes());
            let response = Response::builder().status(code).body(body);
            std::future::ready(response)
        });
        Client::new(service, "ns")
    }

    fn answer(&self, method: &Method, path: &str) -> (u16, Value) {
        assert_eq!(method, Method::GET, "nothing is written: {path}");
        let state = self.state();
        let status = |code: u16, reason: &str| {
            let status = json!({ "kind": "Status", "apiVersion": "v1", "status": "Failure",
                "metadata": {}, "reason": reason, "message": reason, "code": code });
            (code, status)
        };
        if state.away {
            return status(500, "InternalError");
        }
        if path.ends_with("/namespaces/ns/secrets/given") {
            return state
                .secret
                .clone()
                .map_or_else(|| status(404, "NotFound"), |found| (200, found));
        }
        let kind = if path.ends_with("/mutatingwebhookconfigurations/m") {
            "MutatingWebhookConfiguration"
        } else {
            assert!(path.ends_with("/validatingwebhookconfigurations/v"), "{path}");
            "ValidatingWebhookConfiguration"
        };
        let bundle = (!state.bundle.is_empty()).then(|| STANDARD.encode(&state.bundle));
        let found = json!({ "apiVersion": "admissionregistration.k8s.io/v1", "kind": kind,
            "metadata": { "name": "x" },
            "webhooks": [{ "name": "w", "clientConfig": { "caBundle": bundle } }] });
        (200, found)
    }

    /// Puts a new certificate for `name` by `ca` into the Secret; returns it as PEM.
    fn issue(&self, ca: &Authority, name: &str) -> String {
        let key = LeafKey::generate().expect("a key");
        let leaf = ca.leaf(&[SubjectName::Dns(name.into())], DAY, &key).expect("a leaf");
        let pem = certificate_pem(&leaf.cert[0]);
        self.state().secret = Some(json!({ "apiVersion": "v1", "kind": "Secret",
            "metadata": { "name": "given" }, "data": {
                "tls.crt": STANDARD.encode(&pem), "tls.key": STANDARD.encode(key.key_pem()) } }));
        pem
    }
}

fn authority() -> Authority {
    Authority::ephemeral("somebody's CA", DAY * 365).expect("an authority")
}

/// What lives as long as a replica.
struct Process {
    client: Client,
    source: Source,
    given: Given,
    metrics: Metrics,
    trust: trust::Sender,
}

impl Process {
    async fn start(cluster: &Cluster) -> Self {
        let client = cluster.client();
        let source = Source::new(&client, "ns", "given", NAME);
        let given = Given::new(source.read().await.expect("a certificate"));
        let trust = watch::channel(Err("new".to_owned())).0;
        Self { client, source, given, metrics: Metrics::default(), trust }
    }

    fn follower(&self) -> Follower<'_> {
        let of = (&self.client, &args(), &self.source);
        Follower::new(of, &self.given, &self.metrics, &self.trust)
    }

    fn served(&self) -> String {
        certificate_pem(&self.given.now().chain()[0])
    }

    fn why(&self) -> String {
        self.trust.borrow().clone().err().unwrap_or_default()
    }
}

#[tokio::test]
async fn ready_only_when_the_bundle_that_somebody_else_wrote_verifies_it() {
    let (cluster, ca) = (Cluster::default(), authority());
    let pem = cluster.issue(&ca, NAME);
    let process = Process::start(&cluster).await;
    let mut follower = process.follower();
    let now = Instant::now();
    assert!(!follower.round(now).await);
    let why = process.why();
    assert!(why.contains("has no caBundle yet") && why.contains("cainjector"), "{why}");
    cluster.state().bundle = authority().certificate_pem().to_owned();
    assert!(!follower.round(now).await);
    let why = process.why();
    assert!(why.contains("none of its CAs issued") || why.contains("another key"), "{why}");
    cluster.state().bundle = ca.certificate_pem().to_owned();
    assert!(follower.round(now).await);
    assert_eq!((process.why(), process.served()), (String::new(), pem));
    // Taken out later, that is seen at the next look; and an API server that is away says nothing.
    cluster.state().bundle.clear();
    assert!(follower.round(now + SECRET).await && process.why().is_empty(), "not looked at yet");
    assert!(!follower.round(now + CONFIGURATIONS).await && !process.why().is_empty());
    cluster.state().bundle = ca.certificate_pem().to_owned();
    assert!(follower.round(now + CONFIGURATIONS).await);
    cluster.state().away = true;
    assert!(!follower.round(now + CONFIGURATIONS * 2).await && process.why().is_empty());
}

#[tokio::test]
async fn a_renewed_certificate_is_served_at_once_and_its_end_is_stated() {
    let (cluster, ca) = (Cluster::default(), authority());
    cluster.issue(&ca, NAME);
    cluster.state().bundle = ca.certificate_pem().to_owned();
    let process = Process::start(&cluster).await;
    let mut follower = process.follower();
    assert!(follower.round(Instant::now()).await);
    let renewed = cluster.issue(&ca, NAME);
    assert!(follower.round(Instant::now()).await);
    assert_eq!(process.served(), renewed);
    let seconds = process.given.now().not_after().duration_since(std::time::UNIX_EPOCH);
    let gauge = format!(
        "ringfence_webhook_cert_not_after_seconds {}\n",
        seconds.expect("after 1970").as_secs()
    );
    assert!(process.metrics.render(true).contains(&gauge));
}

#[tokio::test]
async fn certificate_and_bundle_may_change_in_either_order() {
    for bundle_first in [false, true] {
        let (cluster, old, new) = (Cluster::default(), authority(), authority());
        let first = cluster.issue(&old, NAME);
        cluster.state().bundle = old.certificate_pem().to_owned();
        let process = Process::start(&cluster).await;
        let mut follower = process.follower();
        assert!(follower.round(Instant::now()).await);
        let both = format!("{}{}", old.certificate_pem(), new.certificate_pem());
        let second = if bundle_first {
            cluster.state().bundle = both;
            follower.round(Instant::now()).await;
            cluster.issue(&new, NAME)
        } else {
            let second = cluster.issue(&new, NAME);
            assert!(!follower.round(Instant::now()).await, "looked at again soon");
            assert_eq!((process.served(), process.why()), (first, String::new()), "kept, ready");
            cluster.state().bundle = both;
            second
        };
        assert!(follower.round(Instant::now()).await);
        assert_eq!((process.served(), process.why()), (second, String::new()));
        // What an injector does: the bundle of the new one alone.
        cluster.state().bundle = new.certificate_pem().to_owned();
        assert!(follower.round(Instant::now() + CONFIGURATIONS).await);
    }
}

#[tokio::test]
async fn what_cannot_be_served_replaces_nothing() {
    let (cluster, ca) = (Cluster::default(), authority());
    let first = cluster.issue(&ca, NAME);
    cluster.state().bundle = ca.certificate_pem().to_owned();
    let process = Process::start(&cluster).await;
    let mut follower = process.follower();
    assert!(follower.round(Instant::now()).await);
    cluster.issue(&ca, "other.ns.svc");
    follower.round(Instant::now()).await;
    let trouble = follower.trouble.clone().unwrap_or_default();
    assert!(trouble.contains("secret `ns/given`") && trouble.contains("other.ns.svc"), "{trouble}");
    let data = cluster.state().secret.as_mut().expect("there")["data"].take();
    let data = json!({ "tls.crt": data["tls.crt"] });
    cluster.state().secret.as_mut().expect("there")["data"] = data;
    follower.round(Instant::now()).await;
    assert!(follower.trouble.clone().unwrap_or_default().contains("no key tls.key"));
    cluster.state().secret = None;
    follower.round(Instant::now()).await;
    assert!(follower.trouble.clone().unwrap_or_default().contains("does not exist"));
    assert_eq!((process.served(), process.why()), (first, String::new()));
    // One that is trusted by nobody is served where that is so of the former too.
    cluster.state().bundle.clear();
    let last = cluster.issue(&ca, NAME);
    follower.round(Instant::now()).await;
    assert_eq!(process.served(), last);
    assert!(follower.trouble.is_none() && !process.why().is_empty());
}

#[test]
fn a_ca_of_our_own_and_a_given_certificate_exclude_each_other() {
    let base = ["webhook", "--namespace=ns", "--supervisor-image=r/i:1", "--certificate-secret=g"];
    for other in ["--ca-secret=x", "--ca-life=100", "--ca-settle=1", "--certificate-days=3"] {
        assert!(Line::try_parse_from(base.into_iter().chain([other])).is_err(), "{other}");
    }
    assert!(Line::try_parse_from(base).is_ok());
}

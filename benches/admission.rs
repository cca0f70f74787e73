//! What one review costs without look-ups: the body is read, the pod planned, injected, checked
//! against its own patch, and the answer written; and the final pod verified. Then what an idle
//! webhook holds in memory.
//!
//! A benchmark reports; it asserts only that the work was done. `--pods` leaves the memory out,
//! `--count NAME` does 100 reviews of one pod and nothing else, for a counter of instructions.

use std::collections::BTreeMap;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use axum::http::{Method, StatusCode, Uri};
use ringfence::admission::review::{Answer, Review};
use ringfence::admission::{
    ImageConfig, Namespace, Outcome, PolicyRef, Settings, inject, inject_into, is_fenced, needs,
    policy_name, verify,
};
use serde_json::{Value, json};

/// As the program has it.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const ROUNDS: usize = 2000;

fn main() {
    let words: Vec<String> = std::env::args().collect();
    if let Some(at) = words.iter().position(|word| word == "--count") {
        let name = words.get(at + 1).map_or("", String::as_str);
        let (_, pod) = pods().into_iter().find(|(known, _)| *known == name).expect("a pod's name");
        let bench = Bench::new(&pod);
        (0..100).for_each(|_| drop(bench.mutate()));
        return;
    }
    println!(
        "| one review, microseconds | KB | median | 99 % | reviews/s |\n|---|---|---|---|---|"
    );
    for (name, pod) in pods() {
        let bench = Bench::new(&pod);
        report(&format!("{name}: injected"), bench.created.len(), || bench.mutate());
        report(&format!("{name}: verified"), bench.stored.len(), || bench.validate());
    }
    if !words.iter().any(|word| word == "--pods") {
        idle_memory();
    }
}

/// A small pod, one of 50 KB, and one with 2,000 variables.
fn pods() -> [(&'static str, Value); 3] {
    let pod = |variables: usize, length: usize, sidecars: usize| {
        let entry =
            |n: usize| json!({"name": format!("VARIABLE_{n}"), "value": "v".repeat(length)});
        let env: Vec<Value> = (0..variables).map(entry).collect();
        let mut containers = vec![json!({
            "name": "agent", "image": "registry.example/agent:1", "command": ["agent", "--serve"],
            "env": env, "resources": {"requests": {"cpu": "1", "memory": "1Gi"}},
            "ports": [{"containerPort": 8080}],
            "readinessProbe": {"exec": {"command": ["ready"]}, "periodSeconds": 5},
            "volumeMounts": [{"name": "work", "mountPath": "/work"}],
        })];
        containers.extend((0..sidecars).map(|n| {
            json!({"name": format!("side-{n}"), "image": "registry.example/side:1",
                "command": ["side"], "env": env})
        }));
        json!({
            "metadata": {"generateName": "agent-", "labels": {"app": "agent"}},
            "spec": {"containers": containers, "volumes": [{"name": "work", "emptyDir": {}}]},
        })
    };
    [("small", pod(10, 20, 0)), ("50 KB", pod(150, 50, 3)), ("2,000 variables", pod(2000, 20, 0))]
}

struct Bench {
    ns: Namespace,
    settings: Settings,
    policy: PolicyRef,
    images: BTreeMap<String, ImageConfig>,
    created: Vec<u8>,
    stored: Vec<u8>,
}

impl Bench {
    fn new(pod: &Value) -> Self {
        let image = ImageConfig {
            entrypoint: vec!["/entry".into()],
            user: "agent".into(),
            volumes: vec!["/data".into()],
            ..ImageConfig::default()
        };
        let containers = pod["spec"]["containers"].as_array().expect("containers");
        let name = |container: &Value| container["name"].as_str().unwrap_or_default().to_owned();
        let mut bench = Self {
            ns: Namespace {
                name: "agents".into(),
                labels: BTreeMap::from([("ringfence.dev/inject".into(), "enabled".into())]),
                ..Namespace::default()
            },
            settings: Settings::default(),
            policy: PolicyRef {
                configmap: "ringfence-policy-0".into(),
                digest: format!("sha256:{}", "0".repeat(64)),
                keys: vec!["policy.yaml".into()],
                ..PolicyRef::default()
            },
            images: containers.iter().map(|c| (name(c), image.clone())).collect(),
            created: review(pod),
            stored: Vec::new(),
        };
        let Outcome::Inject(injection) = bench.inject(pod) else { panic!("not injected") };
        let mut stored = pod.clone();
        json_patch::patch(&mut stored, &injection.ops).expect("it applies");
        bench.stored = review(&stored);
        bench
    }

    fn inject(&self, pod: &Value) -> Outcome {
        inject(None, pod, &self.ns, &self.settings, &self.images, &self.policy)
    }

    /// What the handler asks before it looks anything up.
    fn plan(&self, pod: &Value) {
        assert!(is_fenced(pod, &self.ns, &self.settings).expect("a plan"));
        policy_name(pod, &self.ns, &self.settings).expect("a name");
        needs(pod, &self.ns, &self.settings, &self.policy).expect("needs");
    }

    fn mutate(&self) -> Vec<u8> {
        let mut review = Review::parse(&self.created).expect("a review");
        self.plan(&review.object);
        let pod = &mut review.object;
        let outcome = inject_into(pod, &self.ns, &self.settings, &self.images, &self.policy);
        let answer = Answer::of(outcome);
        assert!(answer.allowed());
        answer.to_bytes(&review.id)
    }

    fn validate(&self) -> Vec<u8> {
        let review = Review::parse(&self.stored).expect("a review");
        let pod = &review.object;
        self.plan(pod);
        verify(None, pod, &self.ns, &self.settings, &self.images, &self.policy).expect("verified");
        Answer::allow().to_bytes(&review.id)
    }
}

fn review(pod: &Value) -> Vec<u8> {
    json!({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": {
        "uid": "00000000-0000-0000-0000-000000000000", "operation": "CREATE", "namespace": "agents",
        "resource": {"group": "", "version": "v1", "resource": "pods"}, "dryRun": false,
        "userInfo": {"username": "system:serviceaccount:kube-system:replicaset-controller"},
        "object": pod, "oldObject": null}})
    .to_string()
    .into_bytes()
}

fn report(name: &str, bytes: usize, work: impl Fn() -> Vec<u8>) {
    (0..200).for_each(|_| drop(work()));
    let mut times: Vec<Duration> = (0..ROUNDS)
        .map(|_| {
            let began = Instant::now();
            let answer = work();
            let took = began.elapsed();
            assert!(!answer.is_empty());
            took
        })
        .collect();
    times.sort_unstable();
    let micros = |at: usize| times[at].as_micros();
    let (median, late) = (micros(ROUNDS / 2), micros(ROUNDS * 99 / 100));
    let all: Duration = times.iter().sum();
    let rate = ROUNDS as u128 * 1_000_000 / all.as_micros().max(1);
    println!("| {name} | {} | {median} | {late} | {rate} |", bytes / 1000);
}

/// Starts `ringfence webhook` beside an API server that has nothing, and reads what it holds.
fn idle_memory() {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("tokio");
    let _entered = runtime.enter();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("an address");
    listener.set_nonblocking(true).expect("a socket");
    let listener = tokio::net::TcpListener::from_std(listener).expect("a socket");
    runtime.spawn(async { axum::serve(listener, axum::Router::new().fallback(api)).await });
    let directory = tempfile::tempdir().expect("a directory");
    let config = directory.path().join("config");
    let text = json!({"apiVersion": "v1", "kind": "Config", "current-context": "c",
        "clusters": [{"name": "c", "cluster": {"server": format!("http://{address}")}}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        "users": [{"name": "u", "user": {}}]});
    std::fs::write(&config, text.to_string()).expect("written");
    let mut webhook = Command::new(env!("CARGO_BIN_EXE_ringfence"))
        .args(["webhook", "--namespace=ns", "--supervisor-image=r/i:1"])
        .args(["--listen=127.0.0.1:0", "--health-listen=127.0.0.1:0"])
        .env("KUBECONFIG", &config)
        .stderr(Stdio::null())
        .spawn()
        .expect("ringfence starts");
    std::thread::sleep(Duration::from_secs(5));
    let status = std::fs::read_to_string(format!("/proc/{}/status", webhook.id()));
    let ended = webhook.try_wait().expect("its state");
    webhook.kill().expect("it can be ended");
    webhook.wait().expect("it ends");
    assert!(ended.is_none(), "the webhook ended by itself");
    println!("\nidle webhook:");
    let status = status.expect("its status");
    let wanted = ["VmRSS", "RssAnon", "VmHWM", "Threads"];
    for line in status.lines().filter(|line| wanted.iter().any(|name| line.starts_with(name))) {
        println!("  {line}");
    }
}

async fn api(method: Method, uri: Uri, body: String) -> (StatusCode, String) {
    let list = |kind: &str, items: Value| {
        let list = json!({"apiVersion": "v1", "kind": kind, "metadata": {"resourceVersion": "1"},
            "items": items});
        (StatusCode::OK, list.to_string())
    };
    match (method, uri.path()) {
        (Method::GET, "/version") => {
            let version = json!({"major": "1", "minor": "36", "gitVersion": "v1.36.0",
                "gitCommit": "", "gitTreeState": "", "buildDate": "", "goVersion": "",
                "compiler": "", "platform": ""});
            (StatusCode::OK, version.to_string())
        }
        (Method::GET, "/api/v1/namespaces") => {
            if uri.query().is_some_and(|query| query.contains("watch=true")) {
                std::future::pending::<()>().await;
            }
            list("NamespaceList", json!([]))
        }
        (Method::GET, "/api/v1/nodes") => list("NodeList", json!([])),
        (Method::POST, _) => (StatusCode::CREATED, body),
        _ => {
            let status = json!({"kind": "Status", "apiVersion": "v1", "metadata": {},
                "status": "Failure", "message": "not found", "reason": "NotFound", "code": 404});
            (StatusCode::NOT_FOUND, status.to_string())
        }
    }
}

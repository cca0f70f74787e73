//! Load on the webhook while everything around it moves: pods are created (as dry runs) at a steady
//! rate while the replicas roll, one is killed, and the CA is replaced every two seconds. No
//! admission may fail.
//!
//! A real API server asks the webhook; nothing is played. `tests/load/run` installs the chart for it
//! and starts this program in the node's network namespace.
#![forbid(unsafe_code)]

mod report;
mod trouble;

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser as _;
use k8s_openapi::api::core::v1::{Namespace, ServiceAccount};
use kube::api::{DeleteParams, PostParams};
use kube::runtime::wait::await_condition;
use kube::{Api, Client};
use serde_json::json;
use tokio::sync::{Semaphore, mpsc};
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};

use report::{Report, Sample};

/// Admissions that wait for their answer at once, at most. At the rate this is about stands for
/// seconds of standstill.
const OUTSTANDING: usize = 2000;
/// How long one admission may take before it counts as failed. The API server's own limit is 10 s a
/// webhook, and it asks two.
const PATIENCE: Duration = Duration::from_secs(30);

#[derive(Debug, clap::Parser)]
struct Args {
    /// Admissions a second.
    #[arg(long, default_value_t = 200)]
    rate: u32,
    /// For how many seconds.
    #[arg(long, default_value_t = 120)]
    seconds: u64,
    /// Clients beside each other, each with connections of its own.
    #[arg(long, default_value_t = 16)]
    clients: usize,
    /// The release namespace.
    #[arg(long, default_value = "ringfence-system")]
    release_namespace: String,
    /// The Deployment of the webhook.
    #[arg(long, default_value = "ringfence")]
    deployment: String,
    /// Seconds between two requests for a new CA; 0: none.
    #[arg(long, default_value_t = 2)]
    rotate_every: u64,
    /// Whether the replicas roll, again and again.
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set)]
    roll: bool,
    /// Whether a replica is killed with SIGKILL half-way.
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set)]
    kill: bool,
}

fn main() -> ExitCode {
    let Ok(image) = std::env::var("LOAD_IMAGE") else {
        println!("SKIPPED: needs a cluster with Ringfence: start with tests/load/run");
        return ExitCode::SUCCESS;
    };
    let args = Args::parse();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let report = runtime.expect("a runtime").block_on(run(&args, &image));
    print!("{report}");
    if report.is_good() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

async fn run(args: &Args, image: &str) -> Report {
    let client = Client::try_default().await.expect("no cluster: start with tests/load/run");
    let namespace = labelled(&client).await;
    let began = Instant::now();
    let end = began + Duration::from_secs(args.seconds);
    let trouble = trouble::Trouble { client: client.clone(), args, began, end };
    let (done, trouble) = tokio::join!(admissions(args, &namespace, image, end), trouble.make());
    let namespaces: Api<Namespace> = Api::all(client);
    drop(namespaces.delete(&namespace, &DeleteParams::default()).await);
    Report::of(args, began, done, trouble)
}

/// A namespace with the label, ready for pods.
async fn labelled(client: &Client) -> String {
    let namespaces: Api<Namespace> = Api::all(client.clone());
    let wanted = json!({"metadata": {
        "generateName": "load-", "labels": {"ringfence.dev/inject": "enabled"}}});
    let wanted = serde_json::from_value(wanted).expect("a namespace");
    let made = namespaces.create(&PostParams::default(), &wanted).await.expect("it can be made");
    let name = made.metadata.name.expect("the API server named it");
    let accounts: Api<ServiceAccount> = Api::namespaced(client.clone(), &name);
    let there =
        await_condition(accounts, "default", |found: Option<&ServiceAccount>| found.is_some());
    timeout(PATIENCE, there).await.expect("an account in time").expect("an account");
    name
}

/// Creates pods at the rate until `end`, whatever becomes of those before: a webhook that slows down
/// is not spared.
async fn admissions(args: &Args, namespace: &str, image: &str, end: Instant) -> Vec<Sample> {
    let pod: Arc<[u8]> = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"generateName": "load-"},
        "spec": {"restartPolicy": "Never", "containers": [{"name": "agent", "image": image}]},
    })
    .to_string()
    .into_bytes()
    .into();
    let uri: Arc<str> = format!("/api/v1/namespaces/{namespace}/pods?dryRun=All").into();
    let mut clients = Vec::new();
    for _ in 0..args.clients.max(1) {
        clients.push(Client::try_default().await.expect("the same cluster"));
    }
    let places = Arc::new(Semaphore::new(OUTSTANDING));
    let (sender, mut samples) = mpsc::unbounded_channel();
    let mut ticks = interval(Duration::from_secs(1) / args.rate.max(1));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
    for client in clients.iter().cycle() {
        ticks.tick().await;
        let at = Instant::now();
        if at >= end {
            break;
        }
        let sender = sender.clone();
        let Ok(place) = Arc::clone(&places).try_acquire_owned() else {
            let _ = sender.send(Sample::failed(at, "not sent: too many wait for an answer".into()));
            continue;
        };
        let (client, uri, pod) = (client.clone(), Arc::clone(&uri), Arc::clone(&pod));
        tokio::spawn(async move {
            let outcome = timeout(PATIENCE, create(&client, &uri, &pod)).await;
            let outcome = outcome.unwrap_or_else(|_| Err(format!("no answer in {PATIENCE:?}")));
            let _ = sender.send(Sample { at, took: at.elapsed(), failure: outcome.err() });
            drop(place);
        });
    }
    drop(sender);
    let mut all = Vec::new();
    while let Some(sample) = samples.recv().await {
        all.push(sample);
    }
    all
}

/// One admission: created as a dry run, and fenced.
async fn create(client: &Client, uri: &str, pod: &[u8]) -> Result<(), String> {
    let request = http::Request::post(uri)
        .header("content-type", "application/json")
        .body(pod.to_vec())
        .map_err(|error| error.to_string())?;
    match client.request_text(request).await {
        Ok(made) if made.contains("/ringfence-supervisor\"") => Ok(()),
        Ok(made) => Err(format!("not fenced: {made}")),
        Err(kube::Error::Api(status)) => Err(format!("{}: {}", status.code, status.message)),
        Err(error) => Err(format!("no answer: {error:?}")),
    }
}

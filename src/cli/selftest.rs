//! `ringfence selftest`: does a running installation fence a pod? Nothing is created.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, bail};
use kube::Client;

use super::probe::{self, Seen};
use crate::admission::SUPERVISOR;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// A namespace with the label `ringfence.dev/inject` and a policy.
    #[arg(long, short, value_name = "NAME")]
    namespace: String,
    /// An image that the webhook can read without credentials: what a pod is fenced for is its
    /// image, so one that does not exist is refused. It is not pulled and nothing of it is run.
    #[arg(long, value_name = "REFERENCE")]
    image: String,
    /// Seconds to go on trying: after an installation the API server needs a moment.
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    within: u64,
}

pub(super) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let client = Client::try_default().await.context("cannot find the API server")?;
        let until = tokio::time::Instant::now() + Duration::from_secs(args.within);
        loop {
            match check(&client, args).await {
                Ok(()) => {
                    println!("a pod created in namespace {} is fenced", args.namespace);
                    return Ok(ExitCode::SUCCESS);
                }
                Err(error) if tokio::time::Instant::now() >= until => return Err(error),
                Err(error) => {
                    eprintln!("not yet: {error:#}");
                    tokio::time::sleep(Duration::from_secs(2)).await;
                }
            }
        }
    })
}

async fn check(client: &Client, args: &Args) -> anyhow::Result<()> {
    let namespace = &args.namespace;
    match probe::ask(client, namespace, &args.image, None).await? {
        Seen::Fenced { .. } => Ok(()),
        Seen::Refused { text, .. } => bail!("the test pod was refused: {text}"),
        Seen::Bare => bail!(
            "the test pod came back without {SUPERVISOR} as its command: is namespace {namespace} labelled ringfence.dev/inject, and does the webhook configuration select it?"
        ),
    }
}

//! `ringfence rotate-ca`: asks the webhook for a new CA, and waits until that signs.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, bail};
use k8s_openapi::api::core::v1::Secret;
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use serde_json::json;
use tokio::time::Instant;

use crate::api_text::api_text;
use crate::pki::stored::{CURRENT, ROTATE};

const POLL: Duration = Duration::from_millis(500);

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The release namespace.
    #[arg(long, short, value_name = "NAME")]
    namespace: String,
    /// The Secret that holds the CA.
    #[arg(long, value_name = "NAME", default_value = "ringfence-webhook-ca")]
    ca_secret: String,
    /// Seconds to wait until a new CA signs; 0: ask only.
    #[arg(long, value_name = "SECONDS", default_value_t = 180)]
    within: u64,
}

pub(super) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let client = Client::try_default().await.context("cannot find the API server")?;
        rotate(&client, args).await?;
        Ok(ExitCode::SUCCESS)
    })
}

async fn rotate(client: &Client, args: &Args) -> anyhow::Result<()> {
    let api: Api<Secret> = Api::namespaced(client.clone(), &args.namespace);
    let name = &args.ca_secret;
    let before = current(&api, name).await?;
    let patch = Patch::Merge(json!({ "metadata": { "annotations": { ROTATE: "now" } } }));
    // Metadata alone is asked for and answered: no key comes here.
    if let Err(error) = api.patch_metadata(name, &PatchParams::default(), &patch).await {
        bail!("cannot mark secret `{}/{name}`: {}", args.namespace, api_text(&error));
    }
    if args.within == 0 {
        println!("asked for a new CA");
        return Ok(());
    }
    let until = Instant::now() + Duration::from_secs(args.within);
    loop {
        let now = current(&api, name).await?;
        if let Some(now) = now.filter(|now| before.as_ref() != Some(now)) {
            println!(
                "CA {now} signs; the one before is trusted until no certificate by it is valid"
            );
            return Ok(());
        }
        if Instant::now() >= until {
            bail!("asked for, and no new CA signs after {} s: see the webhook's log", args.within);
        }
        tokio::time::sleep(POLL).await;
    }
}

/// The mark of the CA that signs; None before the first rotation of an old Secret.
async fn current(api: &Api<Secret>, name: &str) -> anyhow::Result<Option<String>> {
    match api.get_metadata(name).await {
        Ok(found) => Ok(found.metadata.annotations.unwrap_or_default().remove(CURRENT)),
        Err(error) => bail!("cannot read secret `{name}`: {}", api_text(&error)),
    }
}

//! `ringfence prepare-uninstall`: what the chart's hook runs before anything of the release goes.

use std::collections::BTreeSet;
use std::process::ExitCode;

use anyhow::{Context as _, bail};
use k8s_openapi::api::core::v1::Namespace;
use kube::api::ListParams;
use kube::{Api, Client};

use crate::admission::lookup::INJECT_LABEL;
use crate::api_text::api_text;
use crate::propagate;

/// Namespaces named in a message, at most.
const NAMED: usize = 10;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Go on although namespaces are labelled. The guard then refuses their new pods.
    #[arg(long)]
    force: bool,
    /// A labelled namespace that goes with the release: that of `helm test`. Repeat for several.
    #[arg(long, value_name = "NAMESPACE")]
    except: Vec<String>,
}

pub(super) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let client = Client::try_default().await.context("cannot find the API server")?;
        let mut labelled = labelled(&client).await?;
        labelled.retain(|name| !args.except.contains(name));
        if let Some(why) = refusal(&labelled).filter(|_| !args.force) {
            bail!(why);
        }
        // Where the label is, pods may be on their way to a copy that none names yet.
        match propagate::collect_now(&client, &labelled).await {
            Ok(deleted) => println!("removed {deleted} policy copies that no pod names"),
            // They do no harm, and no reason to keep the release.
            Err(error) => eprintln!("policy copies stay: {}", api_text(&error)),
        }
        Ok(ExitCode::SUCCESS)
    })
}

async fn labelled(client: &Client) -> anyhow::Result<BTreeSet<String>> {
    let api: Api<Namespace> = Api::all(client.clone());
    match api.list_metadata(&ListParams::default().labels(INJECT_LABEL)).await {
        Ok(found) => {
            // Of one that ends nothing is created any more.
            let stays = found.items.iter().filter(|ns| ns.metadata.deletion_timestamp.is_none());
            Ok(stays.map(kube::ResourceExt::name_any).collect())
        }
        Err(error) => {
            bail!("cannot list the namespaces with label {INJECT_LABEL}: {}", api_text(&error))
        }
    }
}

/// Why the release cannot go, where namespaces are labelled.
fn refusal(labelled: &BTreeSet<String>) -> Option<String> {
    if labelled.is_empty() {
        return None;
    }
    let mut names = labelled.iter().take(NAMED).cloned().collect::<Vec<_>>().join(", ");
    if labelled.len() > NAMED {
        names = format!("{names} and {} more", labelled.len() - NAMED);
    }
    Some(format!(
        "not uninstalled: {names}: labelled {INJECT_LABEL}, and nobody would fence their new pods; remove the label (ringfence disable NAMESPACE), or set uninstall.force in the chart's values, or go around this check by helm uninstall --no-hooks"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_names_the_namespaces_and_every_way_out() {
        assert_eq!(refusal(&BTreeSet::new()), None);
        let two = ["a", "b"].map(str::to_owned).into();
        let text = refusal(&two).unwrap();
        for word in ["a, b:", "ringfence disable", "uninstall.force", "--no-hooks"] {
            assert!(text.contains(word), "{word} in {text}");
        }
        let many = (0..30).map(|n| format!("ns-{n:02}")).collect();
        let text = refusal(&many).unwrap();
        assert!(text.contains("ns-09 and 20 more") && !text.contains("ns-10"), "{text}");
    }
}

//! `ringfence enable` and `ringfence disable`: the label of a namespace, and the grant by which the
//! webhook reads its pull secrets.

use std::collections::BTreeMap;
use std::process::ExitCode;

use anyhow::{Context as _, bail};
use k8s_openapi::api::admissionregistration::v1::MutatingWebhookConfiguration;
use k8s_openapi::api::core::v1::{Namespace, Pod};
use k8s_openapi::api::rbac::v1::RoleBinding;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams};
use kube::{Api, Client, ResourceExt as _};
use serde_json::{Value, json};

use crate::admission::lookup::INJECT_LABEL;
use crate::admission::{enforced_level, fenced_containers};
use crate::api_text::api_text;
use crate::propagate::MANAGED_BY;

/// Who writes.
const FIELD_MANAGER: &str = "ringfence-cli";
/// Pods are read in pages of this many.
const PAGE: u32 = 250;

#[derive(Debug, clap::Args)]
pub(super) struct Enable {
    #[command(flatten)]
    place: Place,
    /// Guard against the author of pods too: the label's value is strict.
    #[arg(long)]
    strict: bool,
    /// Let the webhook read the pull secrets of the namespace, for images that need a login: makes the
    /// `RoleBinding` `RELEASE-pull-secrets`.
    #[arg(long)]
    pull_secrets: bool,
}

#[derive(Debug, clap::Args)]
pub(super) struct Disable {
    #[command(flatten)]
    place: Place,
}

#[derive(Debug, clap::Args)]
struct Place {
    /// The namespace.
    namespace: String,
    /// Name of the chart's objects: the release's, where that has "ringfence" in it.
    #[arg(long, value_name = "NAME", default_value = "ringfence")]
    release: String,
    /// The release namespace.
    #[arg(long, value_name = "NAME", default_value = "ringfence")]
    release_namespace: String,
}

pub(super) fn enable(args: &Enable) -> anyhow::Result<ExitCode> {
    run(async |client| {
        let Place { namespace, release, release_namespace } = &args.place;
        if namespace == release_namespace || namespace.starts_with("kube-") {
            bail!(
                "namespace {namespace}: pods of the release's namespace and of kube-* are never fenced"
            );
        }
        is_installed(&client, release).await?;
        let value = if args.strict { "strict" } else { "enabled" };
        if args.pull_secrets {
            grant(&client, &args.place).await?;
        }
        let labels = label(&client, namespace, json!(value)).await?;
        println!("namespace {namespace}: new pods are fenced ({INJECT_LABEL}={value})");
        if let Some(level) = enforced_level(&labels) {
            println!(
                "warning: it enforces the Pod Security level {level}, which refuses fenced pods unless the API server exempts them: kubectl label namespace {namespace} pod-security.kubernetes.io/enforce=privileged --overwrite"
            );
        }
        let (fenced, bare) = pods(&client, namespace).await?;
        if bare > 0 {
            println!(
                "{bare} of {} pods run as they were made, outside a fence; make them anew, as in: kubectl -n {namespace} rollout restart deployment",
                fenced + bare
            );
        }
        Ok(())
    })
}

pub(super) fn disable(args: &Disable) -> anyhow::Result<ExitCode> {
    run(async |client| {
        let Place { namespace, release, .. } = &args.place;
        label(&client, namespace, Value::Null).await?;
        println!("namespace {namespace}: new pods are no longer fenced");
        let bindings: Api<RoleBinding> = Api::namespaced(client.clone(), namespace);
        let name = format!("{release}-pull-secrets");
        match bindings.get_opt(&name).await {
            // One that somebody else made is theirs to remove.
            Ok(Some(found))
                if found.labels().get(MANAGED_BY.0).is_some_and(|by| by == MANAGED_BY.1) =>
            {
                let removed = bindings.delete(&name, &DeleteParams::default()).await;
                removed.map_err(|error| {
                    failed(&format!("remove rolebinding {namespace}/{name}"), &error)
                })?;
                println!("the webhook no longer reads its pull secrets");
            }
            Ok(_) => {}
            Err(error) => {
                eprintln!(
                    "warning: cannot read rolebinding {namespace}/{name}: {}",
                    api_text(&error)
                );
            }
        }
        let (fenced, _) = pods(&client, namespace).await?;
        if fenced > 0 {
            println!("{fenced} pods that run keep their fence until they are made anew");
        }
        Ok(())
    })
}

fn run(work: impl AsyncFnOnce(Client) -> anyhow::Result<()>) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        work(Client::try_default().await.context("cannot find the API server")?).await?;
        Ok(ExitCode::SUCCESS)
    })
}

fn failed(what: &str, error: &kube::Error) -> anyhow::Error {
    anyhow::anyhow!("cannot {what}: {}", api_text(error))
}

/// A label that nobody looks at would be taken for a fence.
async fn is_installed(client: &Client, release: &str) -> anyhow::Result<()> {
    let api: Api<MutatingWebhookConfiguration> = Api::all(client.clone());
    match api.get_opt(release).await {
        Ok(Some(_)) => Ok(()),
        Ok(None) => bail!(
            "there is no mutatingwebhookconfiguration {release}: install the chart first, or name its release by --release"
        ),
        Err(kube::Error::Api(status)) if status.is_forbidden() => {
            eprintln!(
                "warning: whether Ringfence is installed could not be seen: {}",
                status.message
            );
            Ok(())
        }
        Err(error) => Err(failed(&format!("read mutatingwebhookconfiguration {release}"), &error)),
    }
}

/// Returns the labels as they are then.
async fn label(
    client: &Client,
    namespace: &str,
    value: Value,
) -> anyhow::Result<BTreeMap<String, String>> {
    let api: Api<Namespace> = Api::all(client.clone());
    let patch = Patch::Merge(json!({"metadata": {"labels": {INJECT_LABEL: value}}}));
    let params =
        PatchParams { field_manager: Some(FIELD_MANAGER.into()), ..PatchParams::default() };
    let patched = api.patch_metadata(namespace, &params, &patch).await;
    match patched {
        Ok(found) => Ok(found.metadata.labels.unwrap_or_default()),
        Err(error) => Err(failed(&format!("label namespace {namespace}"), &error)),
    }
}

/// Binds the chart's `ClusterRole` for pull secrets to the webhook, in this namespace.
async fn grant(client: &Client, place: &Place) -> anyhow::Result<()> {
    let Place { namespace, release, release_namespace } = place;
    let name = format!("{release}-pull-secrets");
    let binding = json!({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding",
        "metadata": {"name": name, "labels": {MANAGED_BY.0: MANAGED_BY.1}},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": name},
        "subjects": [{"kind": "ServiceAccount", "name": release, "namespace": release_namespace}],
    });
    let api: Api<RoleBinding> = Api::namespaced(client.clone(), namespace);
    let params = PatchParams::apply(FIELD_MANAGER).force();
    let applied = api.patch(&name, &params, &Patch::Apply(&binding)).await;
    applied.map_err(|error| failed(&format!("make rolebinding {namespace}/{name}"), &error))?;
    println!("the webhook may read the pull secrets of namespace {namespace}");
    Ok(())
}

/// How many pods of the namespace are fenced, and how many are not, of those that have not ended.
async fn pods(client: &Client, namespace: &str) -> anyhow::Result<(usize, usize)> {
    let api: Api<Pod> = Api::namespaced(client.clone(), namespace);
    let (mut fenced, mut bare) = (0, 0);
    let mut page = ListParams::default().limit(PAGE);
    loop {
        let found = api.list(&page).await;
        let found =
            found.map_err(|error| failed(&format!("list the pods of {namespace}"), &error))?;
        for pod in &found.items {
            let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
            if matches!(phase, Some("Succeeded" | "Failed")) {
                continue;
            }
            let is_bare = fenced_containers(&serde_json::to_value(pod)?).is_empty();
            *(if is_bare { &mut bare } else { &mut fenced }) += 1;
        }
        match found.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => page = ListParams::default().limit(PAGE).continue_token(&token),
            None => return Ok((fenced, bare)),
        }
    }
}

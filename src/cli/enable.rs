//! `ringfence enable` and `ringfence disable`: the label of a namespace, and the grants that go with it.

mod confirm;
mod grants;
mod image_secret;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::process::ExitCode;

use anyhow::{Context as _, bail};
use k8s_openapi::api::admissionregistration::v1::MutatingWebhookConfiguration;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{Container, Namespace, Pod};
use kube::api::{ListParams, Patch, PatchParams};
use kube::{Api, Client, Config};
use serde_json::{Value, json};

use self::grants::Revoked;
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
    #[command(flatten)]
    guard: Guard,
    /// Let the webhook read the pull secrets of the namespace, for images that need a login: makes the
    /// `RoleBinding` `RELEASE-pull-secrets`.
    #[arg(long)]
    pull_secrets: bool,
    /// Copy the pull secret for the fence's own image (supervisor.pullSecret of the chart) from the release
    /// namespace. Whoever may make pods in the namespace can read the copy.
    #[arg(long)]
    image_pull_secret: bool,
    #[command(flatten)]
    constraints: Constraints,
    #[command(flatten)]
    test: confirm::Test,
}

/// Against whom.
#[derive(Debug, clap::Args)]
struct Guard {
    /// Guard against the author of pods too: the label's value is strict.
    #[arg(long)]
    strict: bool,
    /// Trust the authors of pods from now on, where the label's value is strict.
    #[arg(long, conflicts_with = "strict")]
    loosen: bool,
}

/// What an `OpenShift` needs beside the label.
#[derive(Debug, clap::Args)]
struct Constraints {
    /// On an `OpenShift`, let pods of the namespace use the chart's `SecurityContextConstraints`, which
    /// fenced ones need: makes the `RoleBinding` `RELEASE-scc`.
    #[arg(long)]
    scc: bool,
    /// With --scc and without --strict: authors of the namespace's pods may be uid 0 with `SYS_ADMIN` outside a
    /// fence, in init containers and sidecars, which only --strict fences.
    #[arg(long, requires = "scc", conflicts_with = "strict")]
    trust_authors: bool,
    /// Only pods of this service account, instead of all of the namespace. Repeat for several.
    #[arg(long = "service-account", value_name = "NAME", requires = "scc")]
    service_accounts: Vec<String>,
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
    run(async |connect| set_up(&connect, args).await)
}

pub(super) fn disable(args: &Disable) -> anyhow::Result<ExitCode> {
    run(async |connect| take_away(&connect()?, &args.place).await)
}

/// Every client of `connect` has connections of its own.
async fn set_up(
    connect: &impl Fn() -> anyhow::Result<Client>,
    args: &Enable,
) -> anyhow::Result<()> {
    let client = &connect()?;
    let Place { namespace, release, release_namespace } = &args.place;
    if namespace == release_namespace || namespace.starts_with("kube-") {
        bail!(
            "namespace {namespace}: pods of the release's namespace and of kube-* are never fenced"
        );
    }
    let Constraints { scc, trust_authors, service_accounts } = &args.constraints;
    if *scc && !args.guard.strict && !trust_authors {
        bail!(
            "namespace {namespace}: with --scc whoever may make pods there may also make an init container or sidecar that is uid 0 with SYS_ADMIN, and only --strict fences these: add --strict, or --trust-authors where they may be trusted with that"
        );
    }
    is_installed(client, release).await?;
    if !args.guard.strict && !args.guard.loosen && is_strict(client, namespace).await? {
        bail!(
            "namespace {namespace} is guarded against the authors of its pods ({INJECT_LABEL}=strict), and would no longer be: add --strict to keep it so, or --loosen"
        );
    }
    // Grants before the label: with it and without them pods would be refused.
    if *scc {
        grants::scc(client, &args.place, service_accounts).await?;
    }
    if args.pull_secrets {
        grants::pull_secrets(client, &args.place).await?;
    }
    if args.image_pull_secret {
        image_secret::copy(client, &args.place).await?;
    }
    let value = if args.guard.strict { "strict" } else { "enabled" };
    let labels = label(client, namespace, json!(value)).await?;
    println!("namespace {namespace} is labelled {INJECT_LABEL}={value}");
    if let Some(level) = enforced_level(&labels) {
        println!(
            "warning: it enforces the Pod Security level {level}, which refuses fenced pods unless the API server exempts them: kubectl label namespace {namespace} pod-security.kubernetes.io/enforce=privileged --overwrite"
        );
    }
    let account = service_accounts.first().map(String::as_str);
    let wanted = confirm::Wanted { place: &args.place, mode: value, account };
    let confirmed = confirm::fenced(connect, wanted, &args.test).await;
    // Afterwards, so that those are counted that were made before the label was looked at.
    match pods(client, namespace).await {
        Ok((_, 0)) => {}
        Ok((fenced, bare)) => println!(
            "{bare} of {} pods run as they were made, outside a fence; make them anew, as in: kubectl -n {namespace} rollout restart deployment",
            fenced + bare
        ),
        Err(error) => {
            eprintln!("warning: pods that run outside a fence were not counted: {error:#}");
        }
    }
    confirmed
}

async fn take_away(client: &Client, place: &Place) -> anyhow::Result<()> {
    let Place { namespace, release, .. } = place;
    // Before the label: after it nothing would hold a pod that uses them.
    let scc = grants::scc_name(release);
    match grants::revoke(client, namespace, &scc).await? {
        Revoked::Ours => println!("its pods no longer use securitycontextconstraints {release}"),
        Revoked::Absent => {}
        Revoked::Foreign => bail!(
            "rolebinding {namespace}/{scc} was made by somebody else, and lets pods be uid 0 that nothing fences without the label: remove it first"
        ),
    }
    label(client, namespace, Value::Null).await?;
    println!("namespace {namespace}: new pods are no longer fenced");
    match grants::revoke(client, namespace, &grants::pull_secrets_name(release)).await {
        Ok(Revoked::Ours) => println!("the webhook no longer reads its pull secrets"),
        // One that somebody else made is theirs to remove.
        Ok(Revoked::Absent | Revoked::Foreign) => {}
        Err(error) => eprintln!("warning: the webhook may still read its pull secrets: {error:#}"),
    }
    if let Some(name) = image_secret::left(client, place).await {
        println!(
            "secret {name}, a copy that the fence's image is pulled with, stays for pods that run; when none does: kubectl -n {namespace} delete secret {name}"
        );
    }
    let (fenced, _) = pods(client, namespace).await?;
    if fenced > 0 {
        println!("{fenced} pods that run keep their fence until they are made anew");
    }
    Ok(())
}

fn run<C>(work: C) -> anyhow::Result<ExitCode>
where
    C: AsyncFnOnce(Box<dyn Fn() -> anyhow::Result<Client>>) -> anyhow::Result<()>,
{
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let config = Config::infer().await.context("cannot find the API server")?;
        let connect =
            move || Client::try_from(config.clone()).context("cannot connect to the API server");
        work(Box::new(connect)).await?;
        Ok(ExitCode::SUCCESS)
    })
}

fn failed(what: &str, error: &kube::Error) -> anyhow::Error {
    anyhow::anyhow!("cannot {what}: {}", api_text(error))
}

/// The container of the release's Deployment.
async fn webhook(client: &Client, place: &Place) -> anyhow::Result<Option<Container>> {
    let Place { release, release_namespace, .. } = place;
    let api: Api<Deployment> = Api::namespaced(client.clone(), release_namespace);
    let what = || format!("read deployment {release_namespace}/{release}");
    let found = api.get_opt(release).await.map_err(|error| failed(&what(), &error))?;
    let spec = found.and_then(|found| found.spec?.template.spec);
    Ok(spec.and_then(|spec| spec.containers.into_iter().next()))
}

/// Whether an object with these labels was made here.
fn is_ours(labels: &BTreeMap<String, String>) -> bool {
    labels.get(MANAGED_BY.0).is_some_and(|by| by == MANAGED_BY.1)
}

/// Whether the label says so now.
async fn is_strict(client: &Client, namespace: &str) -> anyhow::Result<bool> {
    let api: Api<Namespace> = Api::all(client.clone());
    let found = api.get_metadata_opt(namespace).await;
    let found = found.map_err(|error| failed(&format!("read namespace {namespace}"), &error))?;
    let labels = found.and_then(|found| found.metadata.labels).unwrap_or_default();
    Ok(labels.get(INJECT_LABEL).is_some_and(|value| value == "strict"))
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

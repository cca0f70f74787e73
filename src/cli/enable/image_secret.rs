//! The pull secret for the image that the fence comes from: a pod can only name one of its own
//! namespace, so the release's is copied there.

use anyhow::{Context as _, bail};
use k8s_openapi::api::core::v1::Secret;
use kube::api::{Patch, PatchParams};
use kube::{Api, Client, ResourceExt as _};
use serde_json::json;

use super::{FIELD_MANAGER, Place, failed, is_ours, webhook};
use crate::propagate::MANAGED_BY;

/// The flag of the webhook's that names it.
const FLAG: &str = "--supervisor-pull-secret=";
/// What a kubelet pulls with.
const TYPES: [&str; 2] = ["kubernetes.io/dockerconfigjson", "kubernetes.io/dockercfg"];

/// Copies it from the release namespace, or brings a copy up to date.
pub(super) async fn copy(client: &Client, place: &Place) -> anyhow::Result<()> {
    let Place { namespace, release, release_namespace } = place;
    let webhook = webhook(client, place).await;
    let webhook = webhook.with_context(|| format!("namespace {namespace} is not labelled"))?;
    let Some(name) = webhook.as_ref().and_then(named) else {
        bail!(
            "deployment {release_namespace}/{release} names no pull secret: set supervisor.pullSecret of the chart, or leave --image-pull-secret out; namespace {namespace} is not labelled"
        );
    };
    let from: Api<Secret> = Api::namespaced(client.clone(), release_namespace);
    let source = from.get(&name).await;
    let source = source
        .map_err(|error| failed(&format!("read secret {release_namespace}/{name}"), &error))?;
    let kind = source.type_.as_deref().unwrap_or_default();
    if !TYPES.contains(&kind) {
        bail!(
            "secret {release_namespace}/{name} is no pull secret: its type is {kind:?} and has to be {}",
            TYPES[0]
        );
    }
    // Whatever else is in it is nobody's there.
    let key = if kind == TYPES[0] { ".dockerconfigjson" } else { ".dockercfg" };
    let mut data = source.data.unwrap_or_default();
    data.retain(|name, _| name == key);
    let to: Api<Secret> = Api::namespaced(client.clone(), namespace);
    let found = to.get_metadata_opt(&name).await;
    let found =
        found.map_err(|error| failed(&format!("read secret {namespace}/{name}"), &error))?;
    if found.is_some_and(|found| !is_ours(found.labels())) {
        bail!(
            "secret {namespace}/{name} was made by somebody else: leave --image-pull-secret out where it pulls the image, else remove it; namespace {namespace} is not labelled"
        );
    }
    let copy = json!({
        "apiVersion": "v1", "kind": "Secret",
        "metadata": {"name": name, "labels": {MANAGED_BY.0: MANAGED_BY.1}},
        "type": kind, "data": data,
    });
    let params = PatchParams::apply(FIELD_MANAGER).force();
    let applied = to.patch(&name, &params, &Patch::Apply(&copy)).await;
    applied.map_err(|error| failed(&format!("make secret {namespace}/{name}"), &error))?;
    println!("pods of namespace {namespace} pull the fence's image with secret {name}, a copy");
    Ok(())
}

/// A copy in the namespace stays while pods may have to pull the image again: its name.
pub(super) async fn left(client: &Client, place: &Place) -> Option<String> {
    let name = named(&webhook(client, place).await.ok()??)?;
    let api: Api<Secret> = Api::namespaced(client.clone(), &place.namespace);
    let found = api.get_metadata_opt(&name).await.ok()??;
    is_ours(found.labels()).then_some(name)
}

/// Which one the webhook has pods name.
fn named(webhook: &k8s_openapi::api::core::v1::Container) -> Option<String> {
    let name = webhook.args.iter().flatten().find_map(|arg| arg.strip_prefix(FLAG))?;
    Some(name.to_owned())
}

//! What a namespace is given beside its label: `RoleBinding`s there, each to a `ClusterRole` that the
//! chart makes and binds to nobody.

use anyhow::bail;
use k8s_openapi::api::rbac::v1::{ClusterRole, RoleBinding};
use kube::api::{DeleteParams, Patch, PatchParams};
use kube::{Api, Client, ResourceExt as _};
use serde_json::{Value, json};

use super::{FIELD_MANAGER, Place, failed, is_ours};
use crate::propagate::MANAGED_BY;

/// The API group of roles, bindings, and the groups that they name.
const RBAC: &str = "rbac.authorization.k8s.io";

/// The webhook reads the pull secrets of the namespace.
pub(super) async fn pull_secrets(client: &Client, place: &Place) -> anyhow::Result<()> {
    let Place { namespace, release, release_namespace } = place;
    let webhook =
        json!({"kind": "ServiceAccount", "name": release, "namespace": release_namespace});
    bind(client, namespace, &pull_secrets_name(release), &json!([webhook])).await?;
    println!("the webhook may read the pull secrets of namespace {namespace}");
    Ok(())
}

/// The pods of these service accounts may be what a fenced pod is on an `OpenShift`; without any
/// named, those of all.
pub(super) async fn scc(client: &Client, place: &Place, accounts: &[String]) -> anyhow::Result<()> {
    let Place { namespace, release, .. } = place;
    let name = scc_name(release);
    // Whoever may bind what they like can bind a role that is not there: it would grant nothing, and
    // every pod would be refused.
    let roles: Api<ClusterRole> = Api::all(client.clone());
    let role = roles.get_opt(&name).await;
    if role.map_err(|error| failed(&format!("read clusterrole {name}"), &error))?.is_none() {
        bail!(
            "there is no clusterrole {name}: the chart makes it, and the SecurityContextConstraints that it is for, with openshift.enabled=true; namespace {namespace} is not labelled"
        );
    }
    let of =
        |name: &String| json!({"kind": "ServiceAccount", "name": name, "namespace": namespace});
    let subjects: Vec<Value> = if accounts.is_empty() {
        let all = format!("system:serviceaccounts:{namespace}");
        vec![json!({"apiGroup": RBAC, "kind": "Group", "name": all})]
    } else {
        accounts.iter().map(of).collect()
    };
    bind(client, namespace, &name, &json!(subjects)).await?;
    let whose = if accounts.is_empty() {
        "every service account".to_owned()
    } else {
        format!("service account {}", accounts.join(", "))
    };
    println!("{whose} of namespace {namespace} may use securitycontextconstraints {release}");
    Ok(())
}

pub(super) fn pull_secrets_name(release: &str) -> String {
    format!("{release}-pull-secrets")
}

pub(super) fn scc_name(release: &str) -> String {
    format!("{release}-scc")
}

/// Makes the binding, or makes one that is there what it should be.
async fn bind(
    client: &Client,
    namespace: &str,
    name: &str,
    subjects: &Value,
) -> anyhow::Result<()> {
    let binding = json!({
        "apiVersion": format!("{RBAC}/v1"), "kind": "RoleBinding",
        "metadata": {"name": name, "labels": {MANAGED_BY.0: MANAGED_BY.1}},
        "roleRef": {"apiGroup": RBAC, "kind": "ClusterRole", "name": name},
        "subjects": subjects,
    });
    let api: Api<RoleBinding> = Api::namespaced(client.clone(), namespace);
    let found = api.get_opt(name).await;
    let found =
        found.map_err(|error| failed(&format!("read rolebinding {namespace}/{name}"), &error))?;
    if found.is_some_and(|found| !is_ours(found.labels())) {
        bail!(
            "rolebinding {namespace}/{name} was made by somebody else: remove it, or keep it and leave the flag out; namespace {namespace} is not labelled"
        );
    }
    let params = PatchParams::apply(FIELD_MANAGER).force();
    let applied = api.patch(name, &params, &Patch::Apply(&binding)).await;
    applied.map_err(|error| failed(&format!("make rolebinding {namespace}/{name}"), &error))?;
    Ok(())
}

/// What came of taking a binding away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Revoked {
    /// It was one that [`bind`] made.
    Ours,
    /// There was none.
    Absent,
    /// It is there, and somebody else's.
    Foreign,
}

/// Takes a binding away that [`bind`] made.
pub(super) async fn revoke(
    client: &Client,
    namespace: &str,
    name: &str,
) -> anyhow::Result<Revoked> {
    let bindings: Api<RoleBinding> = Api::namespaced(client.clone(), namespace);
    let found = bindings.get_opt(name).await;
    let found =
        found.map_err(|error| failed(&format!("read rolebinding {namespace}/{name}"), &error))?;
    let Some(found) = found else { return Ok(Revoked::Absent) };
    if !is_ours(found.labels()) {
        return Ok(Revoked::Foreign);
    }
    let removed = bindings.delete(name, &DeleteParams::default()).await;
    removed.map_err(|error| failed(&format!("remove rolebinding {namespace}/{name}"), &error))?;
    Ok(Revoked::Ours)
}

//! Makes sure that one copy is there, with the right content.

use std::collections::BTreeMap;

use crate::api_text::api_text;
use k8s_openapi::api::core::v1::ConfigMap;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{Patch, PatchParams, PostParams};
use kube::{Api, Client};
use serde_json::json;

use super::{MANAGED_BY, POLICY_SOURCE, UNUSED_SINCE};

/// A copy that should exist.
#[derive(Debug, Clone)]
pub struct PolicyCopy<'a> {
    /// The namespace of the pod.
    pub namespace: &'a str,
    /// The copy's name, from the content's digest.
    pub name: &'a str,
    /// The `ConfigMap` in the release namespace it was made from.
    pub source: &'a str,
    /// Its data, key by key.
    pub data: &'a BTreeMap<String, String>,
}

/// Why a copy could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CopyError {
    /// The API server refused.
    #[error("cannot {what} the policy copy `{namespace}/{name}`: {}", api_text(.source))]
    Api {
        /// `read`, `create`, `keep` or `change`.
        what: &'static str,
        /// The pod's namespace.
        namespace: String,
        /// The copy's name.
        name: String,
        /// What the API server answered.
        #[source]
        source: kube::Error,
    },
    /// It is there, but will be gone in a moment: somebody deletes it, and a finalizer holds it.
    #[error("the policy copy `{namespace}/{name}` is being deleted")]
    Ending {
        /// The pod's namespace.
        namespace: String,
        /// The copy's name.
        name: String,
    },
    /// An object of that name has other content, or can be changed.
    #[error(
        "ConfigMap `{namespace}/{name}` exists but {reason}; it is not ringfence's copy of the policy: delete it"
    )]
    Foreign {
        /// The pod's namespace.
        namespace: String,
        /// The copy's name.
        name: String,
        /// In which way it differs.
        reason: &'static str,
    },
}

/// Makes sure that `copy` exists with exactly its data, immutable; with `dry_run` only checks that
/// nothing is in the way.
///
/// Only "not found" means missing: any other error of the look-up is an error.
///
/// # Errors
/// See [`CopyError`].
pub async fn ensure(
    client: &Client,
    copy: &PolicyCopy<'_>,
    dry_run: bool,
) -> Result<(), CopyError> {
    let api: Api<ConfigMap> = Api::namespaced(client.clone(), copy.namespace);
    let failed = |what| api_failed(copy, what);
    // Most pods find their copy, and a read is cheaper for the API server than a refused write.
    let found = match api.get_opt(copy.name).await.map_err(failed("read"))? {
        Some(found) => found,
        None if dry_run => return Ok(()),
        None => match api.create(&PostParams::default(), &object(copy)).await {
            Ok(_) => return Ok(()),
            Err(kube::Error::Api(status)) if status.is_already_exists() => {
                api.get(copy.name).await.map_err(failed("read"))?
            }
            Err(source) => return Err(failed("create")(source)),
        },
    };
    if found.metadata.deletion_timestamp.is_some() {
        // A pod that was admitted now would wait for it in vain.
        return Err(ending(copy));
    }
    check(&found, copy).map_err(|reason| CopyError::Foreign {
        namespace: copy.namespace.to_owned(),
        name: copy.name.to_owned(),
        reason,
    })?;
    if !dry_run && is_marked_unused(&found) {
        // The collector deletes by resource version: this change keeps the copy for the pod that
        // is about to be stored.
        let keep = json!({ "metadata": { "annotations": { UNUSED_SINCE: null } } });
        api.patch(copy.name, &PatchParams::default(), &Patch::Merge(&keep))
            .await
            .map_err(failed("keep"))?;
    }
    Ok(())
}

pub(super) fn api_failed(
    copy: &PolicyCopy<'_>,
    what: &'static str,
) -> impl FnOnce(kube::Error) -> CopyError {
    let (namespace, name) = (copy.namespace.to_owned(), copy.name.to_owned());
    move |source| CopyError::Api { what, namespace, name, source }
}

pub(super) fn ending(copy: &PolicyCopy<'_>) -> CopyError {
    CopyError::Ending { namespace: copy.namespace.to_owned(), name: copy.name.to_owned() }
}

pub(super) fn is_marked_unused(object: &ConfigMap) -> bool {
    object.metadata.annotations.as_ref().is_some_and(|a| a.contains_key(UNUSED_SINCE))
}

pub(super) fn object(copy: &PolicyCopy<'_>) -> ConfigMap {
    ConfigMap {
        metadata: ObjectMeta {
            name: Some(copy.name.to_owned()),
            labels: Some(BTreeMap::from([
                (MANAGED_BY.0.to_owned(), MANAGED_BY.1.to_owned()),
                (POLICY_SOURCE.to_owned(), copy.source.to_owned()),
            ])),
            ..ObjectMeta::default()
        },
        immutable: Some(true),
        data: Some(copy.data.clone()),
        ..ConfigMap::default()
    }
}

fn check(found: &ConfigMap, copy: &PolicyCopy<'_>) -> Result<(), &'static str> {
    if found.immutable != Some(true) {
        return Err("can be changed");
    }
    if found.binary_data.as_ref().is_some_and(|data| !data.is_empty()) {
        return Err("has binary data");
    }
    let empty = BTreeMap::new();
    if found.data.as_ref().unwrap_or(&empty) != copy.data {
        return Err("has other data");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data() -> BTreeMap<String, String> {
        BTreeMap::from([("policy.yaml".to_owned(), "version: 1\n".to_owned())])
    }

    #[test]
    fn our_own_object_passes_the_check() {
        let data = data();
        let copy = PolicyCopy { namespace: "n", name: "c", source: "s", data: &data };
        check(&object(&copy), &copy).expect("ours");
    }

    #[tokio::test]
    async fn a_copy_that_is_being_deleted_is_none() {
        let data = data();
        let copy = PolicyCopy { namespace: "n", name: "c", source: "s", data: &data };
        for ending in [false, true] {
            let mut found = serde_json::to_value(object(&copy)).expect("JSON");
            if ending {
                found["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
            }
            let api = tower::service_fn(move |_: axum::http::Request<kube::client::Body>| {
                let body = kube::client::Body::from(found.to_string().into_bytes());
                async { Ok::<_, std::io::Error>(axum::http::Response::new(body)) }
            });
            let done = ensure(&Client::new(api, "n"), &copy, false).await;
            assert_eq!(matches!(done, Err(CopyError::Ending { .. })), ending, "{done:?}");
            assert_eq!(done.is_ok(), !ending);
        }
    }

    #[test]
    fn other_data_and_what_can_be_changed_are_foreign() {
        let data = data();
        let copy = PolicyCopy { namespace: "n", name: "c", source: "s", data: &data };
        let mut mutable = object(&copy);
        mutable.immutable = None;
        let mut more = object(&copy);
        more.data.as_mut().expect("has data").insert("policy.rego".into(), "package x".into());
        let mut binary = object(&copy);
        binary.binary_data =
            Some(BTreeMap::from([("x".to_owned(), k8s_openapi::ByteString(vec![0]))]));
        for object in [mutable, more, binary] {
            assert!(check(&object, &copy).is_err());
        }
    }
}

//! Makes sure that one copy is there, with the right content.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

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

/// For how long a copy that was there counts as there. Nobody but a person deletes one that pods name:
/// the collector waits for minutes.
const SEEN: Duration = Duration::from_secs(1);
/// The most copies whose last look is remembered.
const MOST_SEEN: usize = 4096;

/// Makes sure of copies, and asks the API server at most once a second about the same one.
#[derive(Default)]
pub struct Copies {
    /// By namespace, name, and whether it was for a dry run.
    seen: Mutex<HashMap<(String, String, bool), Instant>>,
}

impl Copies {
    /// See [`ensure`].
    ///
    /// # Errors
    /// See [`CopyError`].
    pub async fn ensure(
        &self,
        client: &Client,
        copy: &PolicyCopy<'_>,
        dry_run: bool,
    ) -> Result<(), CopyError> {
        let now = Instant::now();
        let key = (copy.namespace.to_owned(), copy.name.to_owned(), dry_run);
        if self.seen().get(&key).is_some_and(|at| at.elapsed() < SEEN) {
            return Ok(());
        }
        ensure(client, copy, dry_run).await?;
        let mut seen = self.seen();
        if seen.len() >= MOST_SEEN {
            seen.clear();
        }
        seen.insert(key, now);
        Ok(())
    }

    fn seen(&self) -> MutexGuard<'_, HashMap<(String, String, bool), Instant>> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
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

    #[tokio::test]
    async fn a_copy_that_was_seen_is_not_asked_for_again_at_once() {
        use std::sync::Arc;
        use std::sync::atomic::{AtomicUsize, Ordering};
        let data = data();
        let copy = PolicyCopy { namespace: "n", name: "c", source: "s", data: &data };
        let found = serde_json::to_string(&object(&copy)).expect("JSON");
        let asked = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&asked);
        let api = tower::service_fn(move |_: axum::http::Request<kube::client::Body>| {
            // The first time nobody answers.
            let answer = match counted.fetch_add(1, Ordering::Relaxed) {
                0 => Err(std::io::Error::other("nobody")),
                _ => Ok(axum::http::Response::new(kube::client::Body::from(
                    found.clone().into_bytes(),
                ))),
            };
            async { answer }
        });
        let (client, copies) = (Client::new(api, "n"), Copies::default());
        copies.ensure(&client, &copy, false).await.expect_err("nobody answered");
        copies.ensure(&client, &copy, true).await.expect("is there");
        assert_eq!(asked.load(Ordering::Relaxed), 2, "a failure is not remembered");
        copies.ensure(&client, &copy, false).await.expect("is there");
        assert_eq!(asked.load(Ordering::Relaxed), 3, "a dry run makes nothing");
        // Whatever time has passed since.
        copies.seen().values_mut().for_each(|at| *at = Instant::now() + SEEN);
        copies.ensure(&client, &copy, false).await.expect("was seen");
        assert_eq!(asked.load(Ordering::Relaxed), 3);
        let other = PolicyCopy { namespace: "other", ..copy.clone() };
        copies.ensure(&client, &other, false).await.expect("is there");
        assert_eq!(asked.load(Ordering::Relaxed), 4);
        copies.seen().clear();
        copies.ensure(&client, &copy, false).await.expect("is there");
        assert_eq!(asked.load(Ordering::Relaxed), 5);
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

//! Collects copies that no pod names any more, in two steps so that none is missed.
//!
//! A pod that was just answered is not in the API server yet. So a pass first marks an unused copy
//! with the time; an admission that finds the mark takes it off, which changes the resource
//! version; a later pass deletes what has carried its mark long enough, and only at the resource
//! version it saw. Every replica may run this. In doubt a copy stays.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::time::Duration;

use k8s_openapi::api::core::v1::{ConfigMap, Pod};
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, Preconditions};
use kube::core::PartialObjectMeta;
use kube::{Api, Client, ResourceExt as _};
use serde_json::json;

use super::{COPY_PREFIX, LIVE_PREFIX, MANAGED_BY, POLICY_SOURCE, UNUSED_SINCE};

/// How often to call [`collect_once`].
pub const COLLECT_INTERVAL: Duration = Duration::from_secs(300);
/// How long a copy exists before it may be marked, and carries its mark before it is deleted.
const GRACE: SignedDuration = SignedDuration::from_mins(10);
/// Pods are read in pages of this many.
const PAGE: u32 = 250;

/// What a pass does with one copy.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    Keep,
    /// A pod names it again.
    Unmark,
    Mark,
    Delete,
}

/// One pass over all copies in the cluster; returns how many were deleted.
///
/// # Errors
/// When copies or pods cannot be listed; what was decided before that has been done.
pub async fn collect_once(client: &Client, now: Timestamp) -> Result<usize, kube::Error> {
    let mut deleted = 0;
    for (namespace, copies) in copies(client).await? {
        // A young copy needs no look at the pods.
        if copies
            .iter()
            .all(|copy| step(copy, true, now) == Step::Keep && step(copy, false, now) == Step::Keep)
        {
            continue;
        }
        let used = names_in_use(client, &namespace).await?;
        let api: Api<ConfigMap> = Api::namespaced(client.clone(), &namespace);
        for copy in copies {
            let name = copy.name_any();
            let result = match step(&copy, used.contains(&name), now) {
                Step::Keep => Ok(()),
                Step::Unmark => mark(&api, &copy, None).await,
                Step::Mark => mark(&api, &copy, Some(now)).await,
                Step::Delete => delete(&api, &copy).await.map(|()| deleted += 1),
            };
            // Someone else was faster: the next pass sees what is left.
            match result {
                Ok(()) => {}
                Err(kube::Error::Api(status)) if status.is_conflict() || status.is_not_found() => {}
                Err(error) => {
                    tracing::warn!(%namespace, %name, %error, "cannot collect a policy copy");
                }
            }
        }
    }
    Ok(deleted)
}

/// Removes every copy that no pod names, at once; returns how many. Not those in `except`, where pods
/// are still admitted.
///
/// # Errors
/// When copies or pods cannot be listed, or one cannot be deleted.
pub async fn collect_now(client: &Client, except: &BTreeSet<String>) -> Result<usize, kube::Error> {
    let mut deleted = 0;
    for (namespace, copies) in copies(client).await? {
        if except.contains(&namespace) {
            continue;
        }
        let used = names_in_use(client, &namespace).await?;
        let api: Api<ConfigMap> = Api::namespaced(client.clone(), &namespace);
        for copy in copies.iter().filter(|copy| !used.contains(&copy.name_any())) {
            match delete(&api, copy).await {
                Ok(()) => deleted += 1,
                // A replica was faster.
                Err(kube::Error::Api(status)) if status.is_not_found() || status.is_conflict() => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok(deleted)
}

/// All copies of the cluster, by namespace.
async fn copies(
    client: &Client,
) -> Result<BTreeMap<String, Vec<PartialObjectMeta<ConfigMap>>>, kube::Error> {
    let selector = format!("{}={},{POLICY_SOURCE}", MANAGED_BY.0, MANAGED_BY.1);
    let copies: Api<ConfigMap> = Api::all(client.clone());
    let copies = copies.list_metadata(&ListParams::default().labels(&selector)).await?;
    let mut by_namespace: BTreeMap<String, Vec<PartialObjectMeta<ConfigMap>>> = BTreeMap::new();
    for copy in copies.items {
        let Some(namespace) = copy.namespace() else { continue };
        let name = copy.name_any();
        if name.starts_with(COPY_PREFIX) || name.starts_with(LIVE_PREFIX) {
            by_namespace.entry(namespace).or_default().push(copy);
        }
    }
    Ok(by_namespace)
}

fn step(copy: &PartialObjectMeta<ConfigMap>, used: bool, now: Timestamp) -> Step {
    let marked = copy.annotations().get(UNUSED_SINCE);
    let older_than_grace = |since: Timestamp| now.duration_since(since) > GRACE;
    match (used, marked) {
        (true, Some(_)) => Step::Unmark,
        (true, None) => Step::Keep,
        (false, Some(since)) => match since.parse() {
            Ok(since) if older_than_grace(since) => Step::Delete,
            Ok(_) => Step::Keep,
            // Not our hand: begin anew.
            Err(_) => Step::Mark,
        },
        (false, None) => match copy.creation_timestamp() {
            Some(created) if older_than_grace(created.0) => Step::Mark,
            _ => Step::Keep,
        },
    }
}

/// The copies that pods of the namespace name, whatever the phase of the pod.
async fn names_in_use(client: &Client, namespace: &str) -> Result<HashSet<String>, kube::Error> {
    let api: Api<Pod> = Api::namespaced(client.clone(), namespace);
    let mut used = HashSet::new();
    let mut page = ListParams::default().limit(PAGE);
    loop {
        let pods = api.list(&page).await?;
        for pod in &pods.items {
            let volumes = pod.spec.as_ref().and_then(|spec| spec.volumes.as_deref());
            for volume in volumes.unwrap_or_default() {
                used.extend(volume.config_map.as_ref().map(|source| source.name.clone()));
                // A projected volume may hold it too; ours never does, an author's might.
                let sources = volume.projected.as_ref().and_then(|p| p.sources.as_deref());
                for source in sources.unwrap_or_default() {
                    used.extend(source.config_map.as_ref().map(|source| source.name.clone()));
                }
            }
        }
        match pods.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => page = ListParams::default().limit(PAGE).continue_token(&token),
            None => return Ok(used),
        }
    }
}

async fn mark(
    api: &Api<ConfigMap>,
    copy: &PartialObjectMeta<ConfigMap>,
    since: Option<Timestamp>,
) -> Result<(), kube::Error> {
    let patch = json!({ "metadata": {
        "resourceVersion": copy.resource_version(),
        "annotations": { UNUSED_SINCE: since.map(|since| since.to_string()) },
    } });
    api.patch_metadata(&copy.name_any(), &PatchParams::default(), &Patch::Merge(&patch))
        .await
        .map(drop)
}

async fn delete(
    api: &Api<ConfigMap>,
    copy: &PartialObjectMeta<ConfigMap>,
) -> Result<(), kube::Error> {
    let exactly = Preconditions {
        uid: copy.metadata.uid.clone(),
        resource_version: copy.metadata.resource_version.clone(),
    };
    api.delete(&copy.name_any(), &DeleteParams::default().preconditions(exactly)).await.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: &str = "2026-05-06T12:00:00Z";

    fn copy(created: &str, unused_since: Option<&str>) -> PartialObjectMeta<ConfigMap> {
        let annotations = unused_since.map(|since| json!({ UNUSED_SINCE: since }));
        serde_json::from_value(json!({ "apiVersion": "meta.k8s.io/v1",
            "kind": "PartialObjectMetadata",
            "metadata": { "name": "c", "creationTimestamp": created, "annotations": annotations } }))
        .expect("an object")
    }

    #[test]
    fn a_copy_is_marked_then_deleted_and_never_in_doubt() {
        let now = NOW.parse().expect("a time");
        let (old, young) = ("2026-05-06T11:00:00Z", "2026-05-06T11:55:00Z");
        for (created, unused_since, used, expected) in [
            (young, None, false, Step::Keep),
            (old, None, true, Step::Keep),
            (old, None, false, Step::Mark),
            (old, Some(young), false, Step::Keep),
            (old, Some("2026-05-06T11:45:00Z"), false, Step::Delete),
            (old, Some("2026-05-06T11:45:00Z"), true, Step::Unmark),
            (old, Some("yesterday"), false, Step::Mark),
            // A clock that runs ahead elsewhere deletes nothing here.
            (old, Some("2026-05-06T13:00:00Z"), false, Step::Keep),
        ] {
            let found = step(&copy(created, unused_since), used, now);
            assert_eq!(found, expected, "{created} {unused_since:?} {used}");
        }
    }
}

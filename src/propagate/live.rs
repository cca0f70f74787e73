//! Policies that running pods follow: one config map a namespace and policy, changed when its source
//! changes, and only to what was checked.
//!
//! Every replica may do this, and none writes an older text over a newer one: the object is read
//! first, then its source, and what is written holds only for the object that was read. Nobody but
//! the webhook may write these objects; the chart's `live-guard.yaml` sees to it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{ListParams, Patch, PatchParams, PostParams};
use kube::core::PartialObjectMeta;
use kube::runtime::WatchStreamExt as _;
use kube::runtime::watcher::{self, watcher};
use kube::{Api, Client, ResourceExt as _};
use serde_json::{Value, json};

use super::copy::{api_failed, ending, is_marked_unused, object};
use super::{CopyError, LIVE_PREFIX, MANAGED_BY, POLICY_SOURCE, PolicyCopy, UNUSED_SINCE};
use crate::policy::digest::digest;

/// Label that tells these objects from copies.
pub const LIVE: (&str, &str) = ("ringfence.dev/live-policy", "true");
/// Annotation with the digest of the data.
const DIGEST: &str = "ringfence.dev/policy-digest";

/// How often all of them are compared with their sources, whatever the watch says.
const RESYNC: Duration = Duration::from_secs(60);

/// How often a write is tried that others were faster with.
const ATTEMPTS: usize = 5;

/// The data of a source that was read and checked just now; or why it is not followed.
pub type Checked = Result<Arc<BTreeMap<String, String>>, String>;

/// Makes sure that the object of a pod that is about to be stored is there, and is not collected;
/// with `dry_run` only checks that nothing is in the way. `false`: it has other data than `live`.
///
/// # Errors
/// See [`CopyError`].
pub async fn ensure_live(
    client: &Client,
    live: &PolicyCopy<'_>,
    dry_run: bool,
) -> Result<bool, CopyError> {
    let api: Api<ConfigMap> = Api::namespaced(client.clone(), live.namespace);
    let failed = |what| api_failed(live, what);
    let found = match api.get_opt(live.name).await.map_err(failed("read"))? {
        Some(found) => found,
        None if dry_run => return Ok(true),
        None => match api.create(&PostParams::default(), &live_object(live)).await {
            Ok(_) => return Ok(true),
            Err(kube::Error::Api(status)) if status.is_already_exists() => {
                api.get(live.name).await.map_err(failed("read"))?
            }
            Err(source) => return Err(failed("create")(source)),
        },
    };
    if found.metadata.deletion_timestamp.is_some() {
        return Err(ending(live));
    }
    is_ours(&found, live.source).map_err(|reason| CopyError::Foreign {
        namespace: live.namespace.to_owned(),
        name: live.name.to_owned(),
        reason,
    })?;
    if !dry_run && is_marked_unused(&found) {
        let keep = json!({ "metadata": { "annotations": { UNUSED_SINCE: null } } });
        let patch = Patch::Merge(&keep);
        api.patch(live.name, &PatchParams::default(), &patch).await.map_err(failed("keep"))?;
    }
    Ok(found.data.as_ref() == Some(live.data))
}

/// Gives one object the data that its source has now; `true`: it had other data. `source` reads and
/// checks, and is asked after the object was read.
///
/// # Errors
/// See [`CopyError`]; `Ok(Err(_))` is a source that is not followed.
pub async fn bring_up<F: Future<Output = Checked>>(
    client: &Client,
    live: (&str, &str, &str),
    mut source: impl FnMut() -> F,
) -> Result<Result<bool, String>, CopyError> {
    let (namespace, name, of) = live;
    let none = BTreeMap::new();
    let what = PolicyCopy { namespace, name, source: of, data: &none };
    let api: Api<ConfigMap> = Api::namespaced(client.clone(), namespace);
    for attempt in 1.. {
        let found = api.get_opt(name).await.map_err(api_failed(&what, "read"))?;
        let Some(found) = found else { return Ok(Ok(false)) };
        if let Err(why) = is_ours(&found, of) {
            return Ok(Err(format!("ConfigMap {namespace}/{name} {why}")));
        }
        let data = match source().await {
            Ok(data) => data,
            Err(why) => return Ok(Err(why)),
        };
        if found.data.as_ref() == Some(&*data) {
            return Ok(Ok(false));
        }
        let patch = Patch::Merge(change(&found, &data));
        match api.patch(name, &PatchParams::default(), &patch).await {
            Ok(_) => return Ok(Ok(true)),
            Err(kube::Error::Api(status)) if status.is_conflict() && attempt < ATTEMPTS => {}
            Err(kube::Error::Api(status)) if status.is_not_found() => return Ok(Ok(false)),
            Err(error) => return Err(api_failed(&what, "change")(error)),
        }
    }
    Ok(Err(format!("ConfigMap {namespace}/{name} is always another one")))
}

/// Keeps all objects in step with their sources in the release namespace, for ever. `source` reads
/// and checks one by its name; `told` hears of each object that was changed, and of each source that
/// is not followed.
pub async fn follow<F: Future<Output = Checked>>(
    client: &Client,
    release_namespace: &str,
    source: impl Fn(String) -> F,
    told: impl Fn(bool),
) {
    let sources: Api<PartialObjectMeta<ConfigMap>> =
        Api::namespaced(client.clone(), release_namespace);
    let changes = watcher(sources, watcher::Config::default());
    let mut changes = std::pin::pin!(changes.default_backoff().touched_objects());
    let mut tick = tokio::time::interval(RESYNC);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        let only = tokio::select! {
            _ = tick.tick() => None,
            change = changes.next() => match change {
                Some(Ok(changed)) => Some(changed.name_any()),
                Some(Err(error)) => {
                    tracing::warn!(%error, "the watch of policies broke; they are compared once a minute");
                    continue;
                }
                None => return,
            },
        };
        if let Err(error) = in_step(client, only.as_deref(), &source, &told).await {
            tracing::warn!(%error, "the policies that pods follow could not be listed");
        }
    }
}

/// One pass over the objects of one source, or of all.
async fn in_step<F: Future<Output = Checked>>(
    client: &Client,
    only: Option<&str>,
    source: &impl Fn(String) -> F,
    told: &impl Fn(bool),
) -> Result<(), kube::Error> {
    let selector = format!("{}={},{}={}", MANAGED_BY.0, MANAGED_BY.1, LIVE.0, LIVE.1);
    let all: Api<ConfigMap> = Api::all(client.clone());
    let found = all.list_metadata(&ListParams::default().labels(&selector)).await?;
    let mut by_source: BTreeMap<String, Vec<(String, String, Option<String>)>> = BTreeMap::new();
    for object in found.items {
        let (Some(namespace), Some(of)) =
            (object.namespace(), object.labels().get(POLICY_SOURCE).cloned())
        else {
            continue;
        };
        if only.is_none_or(|only| only == of) && object.name_any() == name_of(&of) {
            let digest = object.annotations().get(DIGEST).cloned();
            by_source.entry(of).or_default().push((namespace, object.name_any(), digest));
        }
    }
    for (of, objects) in by_source {
        let digest = match source(of.clone()).await {
            Ok(data) => digest_of(&data),
            Err(why) => {
                tracing::warn!(policy = of, %why, "a policy is not followed: pods keep the last one");
                told(false);
                continue;
            }
        };
        for (namespace, name, has) in objects {
            if has.as_ref() == Some(&digest) {
                continue;
            }
            let object = (namespace.as_str(), name.as_str(), of.as_str());
            match bring_up(client, object, || source(of.clone())).await {
                Ok(Ok(true)) => {
                    tracing::info!(policy = of, %namespace, "pods follow the policy's change");
                    told(true);
                }
                Ok(Ok(false)) => {}
                Ok(Err(why)) => {
                    tracing::warn!(policy = of, %why, "a policy is not followed: pods keep the last one");
                    told(false);
                }
                Err(error) => {
                    tracing::warn!(policy = of, %namespace, %error, "pods do not follow the policy's change");
                    told(false);
                }
            }
        }
    }
    Ok(())
}

fn name_of(source: &str) -> String {
    format!("{LIVE_PREFIX}{source}")
}

fn digest_of(data: &BTreeMap<String, String>) -> String {
    digest(data.iter().map(|(key, text)| (key.as_str(), text.as_bytes())))
}

fn live_object(live: &PolicyCopy<'_>) -> ConfigMap {
    let mut made = object(live);
    made.immutable = None;
    made.metadata.labels.get_or_insert_default().insert(LIVE.0.to_owned(), LIVE.1.to_owned());
    let digest = digest_of(live.data);
    made.metadata.annotations.get_or_insert_default().insert(DIGEST.to_owned(), digest);
    made
}

/// What makes of the object that was found, and of no other state of it, one with this data.
fn change(found: &ConfigMap, data: &BTreeMap<String, String>) -> Value {
    let gone = found.data.iter().flat_map(BTreeMap::keys).filter(|key| !data.contains_key(*key));
    let mut changed = json!(data);
    for key in gone {
        changed[key] = Value::Null;
    }
    json!({
        "metadata": {
            "resourceVersion": found.metadata.resource_version,
            "annotations": { DIGEST: digest_of(data) },
        },
        "data": changed,
        "binaryData": null,
    })
}

fn is_ours(found: &ConfigMap, source: &str) -> Result<(), &'static str> {
    let label = |key: &str| found.labels().get(key).map(String::as_str);
    if label(MANAGED_BY.0) != Some(MANAGED_BY.1) || label(LIVE.0) != Some(LIVE.1) {
        return Err("has not ringfence's labels");
    }
    if label(POLICY_SOURCE) != Some(source) {
        return Err("is another policy's");
    }
    if found.immutable == Some(true) {
        return Err("cannot be changed");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    fn data(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(key, text)| ((*key).to_owned(), (*text).to_owned())).collect()
    }

    fn live(data: &BTreeMap<String, String>) -> PolicyCopy<'_> {
        PolicyCopy { namespace: "n", name: "ringfence-live-p", source: "p", data }
    }

    #[test]
    fn what_is_not_ours_is_not_followed() {
        let data = data(&[("policy.yaml", "version: 1\n")]);
        let own = live_object(&live(&data));
        assert_eq!(is_ours(&own, "p"), Ok(()));
        assert!(is_ours(&own, "q").is_err());
        let mut fixed = own.clone();
        fixed.immutable = Some(true);
        let mut bare = own;
        bare.metadata.labels = None;
        assert!(is_ours(&fixed, "p").is_err() && is_ours(&bare, "p").is_err());
    }

    #[test]
    fn a_change_takes_away_what_the_source_has_not() {
        let before = data(&[("policy.yaml", "a"), ("policy.rego", "b")]);
        let mut found = live_object(&live(&before));
        found.metadata.resource_version = Some("7".into());
        let after = data(&[("policy.yaml", "c")]);
        let mut changed = serde_json::to_value(&found).expect("JSON");
        let change = change(&found, &after);
        assert_eq!(change["metadata"]["resourceVersion"], "7");
        json_patch::merge(&mut changed, &change);
        assert_eq!(changed["data"], json!({ "policy.yaml": "c" }));
        assert_eq!(changed["metadata"]["annotations"][DIGEST], digest_of(&after));
    }

    /// An API server with one object, of which another writer is faster once.
    #[tokio::test]
    async fn an_older_text_is_never_written_over_a_newer_one() {
        let texts = ["old", "new", "newest"].map(|text| data(&[("policy.yaml", text)]));
        let mut object = live_object(&live(&texts[0]));
        object.metadata.resource_version = Some("1".into());
        let stored = Arc::new(Mutex::new((object, Vec::new())));
        let server = Arc::clone(&stored);
        let newest = texts[2].clone();
        let api = tower::service_fn(move |request: axum::http::Request<kube::client::Body>| {
            let server = Arc::clone(&server);
            let newest = newest.clone();
            async move {
                let patch = request.method() == axum::http::Method::PATCH;
                let body = request.into_body().collect_bytes().await.expect("body");
                let mut stored = server.lock().expect("lock");
                let (mut status, mut answer) =
                    (200, serde_json::to_value(&stored.0).expect("JSON"));
                if patch {
                    let asked: Value = serde_json::from_slice(&body).expect("JSON");
                    stored.1.push(asked["data"]["policy.yaml"].clone());
                    if stored.1.len() == 1 {
                        // Somebody else has written what is newest by now.
                        stored.0.data = Some(newest);
                        stored.0.metadata.resource_version = Some("2".into());
                        status = 409;
                        answer = json!({ "kind": "Status", "status": "Failure", "code": 409, "reason": "Conflict", "message": "conflict" });
                    }
                }
                let body = kube::client::Body::from(answer.to_string().into_bytes());
                let response = axum::http::Response::builder().status(status).body(body);
                Ok::<_, std::io::Error>(response.expect("response"))
            }
        });
        // The source as it is at each look: new, then newest.
        let looks = Mutex::new(texts[1..].iter().cloned().map(Arc::new));
        let source = || {
            let next = looks.lock().expect("lock").next().expect("two looks");
            std::future::ready(Ok(next))
        };
        let client = Client::new(api, "n");
        let done = bring_up(&client, ("n", "ringfence-live-p", "p"), source).await;
        assert!(matches!(done, Ok(Ok(false))), "{done:?}");
        assert_eq!(stored.lock().expect("lock").1, ["new"]);
    }

    #[tokio::test]
    async fn a_source_that_is_not_followed_changes_nothing() {
        let before = data(&[("policy.yaml", "a")]);
        let object = serde_json::to_value(live_object(&live(&before))).expect("JSON");
        let api = tower::service_fn(move |request: axum::http::Request<kube::client::Body>| {
            assert_eq!(request.method(), axum::http::Method::GET, "nothing is written");
            let body = kube::client::Body::from(object.to_string().into_bytes());
            async { Ok::<_, std::io::Error>(axum::http::Response::new(body)) }
        });
        let broken = || std::future::ready(Err("it does not load".to_owned()));
        let client = Client::new(api, "n");
        let done = bring_up(&client, ("n", "ringfence-live-p", "p"), broken).await;
        assert!(matches!(done, Ok(Err(why)) if why == "it does not load"));
    }
}

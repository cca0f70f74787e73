//! What an answer depends on beside the pod: its namespace, the policy, limit ranges, its images.
//!
//! Namespaces come from a watch, everything else is read live, policies at most ten times a second;
//! nothing that could not be read is
//! taken as missing, and nothing missing is taken as permission.

mod constraints;
mod policies;

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use k8s_openapi::api::core::v1::{LimitRange, Namespace as ApiNamespace, Pod, Secret};
use kube::api::{ApiResource, DynamicObject, ListParams};
use kube::runtime::reflector::{self, ObjectRef, Store};
use kube::runtime::watcher::{self, watcher};
use kube::runtime::{WatchStreamExt as _, reflector::store::Writer};
use kube::{Api, Client};

use super::server::{Deadline, TimeIsUp};
use super::{Class, ImageConfig, Namespace, Needs, Refusal};
use crate::api_text::api_text;
use crate::image::{Images, credentials};

pub use constraints::Constraints;
pub use policies::Policies;

/// The label that switches Ringfence on; only namespaces that have it are watched.
pub const INJECT_LABEL: &str = "ringfence.dev/inject";
/// What to do about a registry that keeps silent.
const SILENT: &str = "see that the registry is up and that the webhook's pods reach it (name, port, network policies); a controller tries again by itself";

/// Pods of one namespace that may wait for registries at once, of the 128 reviews that a replica
/// answers: images that never come, named by one author, keep the others' places free.
const WAITING_PER_NAMESPACE: usize = 32;

/// Images of one pod that are read at once: one with thousands takes no more than its part.
const READS_PER_POD: usize = 8;

/// For the read of a secret that a pod is given beside its own.
const ADDED_SECRET: Duration = Duration::from_secs(1);

/// Reads what the answer depends on.
pub struct Lookups {
    client: Client,
    images: Images,
    namespaces: Store<ApiNamespace>,
    watch_is_whole: Arc<AtomicBool>,
    policies: Policies,
    /// By namespace; none is kept that nobody waits in.
    waiting: Mutex<HashMap<String, usize>>,
}

/// One pod's place among those of its namespace that wait for registries.
struct Waiting<'a> {
    all: &'a Mutex<HashMap<String, usize>>,
    namespace: &'a str,
}

impl<'a> Waiting<'a> {
    fn begin(all: &'a Mutex<HashMap<String, usize>>, namespace: &'a str) -> Result<Self, Refusal> {
        let mut counts = all.lock().unwrap_or_else(PoisonError::into_inner);
        let count = counts.entry(namespace.to_owned()).or_insert(0);
        if *count >= WAITING_PER_NAMESPACE {
            let what =
                format!("{count} pods of namespace {namespace} wait for the registries of images");
            return Err(Refusal::new(Class::Lookup, what));
        }
        *count += 1;
        Ok(Self { all, namespace })
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let mut counts = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = counts.get_mut(self.namespace) {
            *count -= 1;
            if *count == 0 {
                counts.remove(self.namespace);
            }
        }
    }
}

impl Lookups {
    /// The look-ups, and the watch of namespaces that the caller has to run beside them.
    pub fn new(
        client: Client,
        release_namespace: String,
        images: Images,
    ) -> (Self, impl Future<Output = ()> + Send + 'static) {
        let (namespaces, writer) = reflector::store();
        let watch_is_whole = Arc::new(AtomicBool::new(false));
        let watch = watch_namespaces(client.clone(), writer, Arc::clone(&watch_is_whole));
        let lookups = Self {
            policies: Policies::new(client.clone(), release_namespace),
            client,
            images,
            namespaces,
            watch_is_whole,
            waiting: Mutex::default(),
        };
        (lookups, watch)
    }

    /// For writes that belong to an answer.
    #[must_use]
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Whether the watch has seen all labelled namespaces and is connected.
    #[must_use]
    pub fn watch_is_whole(&self) -> bool {
        self.watch_is_whole.load(Ordering::Acquire)
    }

    /// The namespace: from the watch, or live where the watch has it not or is broken.
    ///
    /// # Errors
    /// When it cannot be read.
    pub async fn namespace(&self, name: &str, deadline: Deadline) -> Result<Namespace, Refusal> {
        if self.watch_is_whole()
            && let Some(found) = self.namespaces.get(&ObjectRef::new(name))
        {
            return Ok(of_api(name, &found));
        }
        let what = format!("namespace {name}");
        let api: Api<ApiNamespace> = Api::all(self.client.clone());
        let found = read(&what, deadline, api.get(name)).await?;
        Ok(of_api(name, &found))
    }

    /// A pod, live: `kubectl exec` is about the pod as it runs. As JSON, so that nothing is lost.
    ///
    /// # Errors
    /// When it cannot be read.
    pub async fn pod(
        &self,
        namespace: &str,
        name: &str,
        deadline: Deadline,
    ) -> Result<serde_json::Value, Refusal> {
        let what = format!("pod {namespace}/{name}");
        let kind = ApiResource::erase::<Pod>(&());
        let api: Api<DynamicObject> = Api::namespaced_with(self.client.clone(), namespace, &kind);
        let found = read(&what, deadline, api.get(name)).await?;
        serde_json::to_value(found)
            .map_err(|error| Refusal::new(Class::Lookup, format!("{what}: {error}")))
    }

    /// The limit ranges of a namespace, as JSON.
    ///
    /// # Errors
    /// When they cannot be read.
    pub async fn limit_ranges(
        &self,
        namespace: &str,
        deadline: Deadline,
    ) -> Result<Vec<serde_json::Value>, Refusal> {
        let what = format!("the LimitRanges of namespace {namespace}");
        let api: Api<LimitRange> = Api::namespaced(self.client.clone(), namespace);
        let found = read(&what, deadline, api.list(&ListParams::default())).await?;
        let values: Result<Vec<_>, _> = found.items.iter().map(serde_json::to_value).collect();
        values.map_err(|error| Refusal::new(Class::Lookup, format!("{what}: {error}")))
    }

    /// The policies of the release namespace.
    #[must_use]
    pub fn policies(&self) -> &Policies {
        &self.policies
    }

    /// The configurations of the images that `needs` names, by container.
    ///
    /// # Errors
    /// When one of them cannot be read; the refusal names image, registry and what was tried. When too
    /// many pods of the namespace wait already.
    pub async fn images(
        &self,
        namespace: &str,
        needs: &Needs,
        node_architectures: &[String],
        deadline: Deadline,
    ) -> Result<BTreeMap<String, ImageConfig>, Refusal> {
        if needs.images.is_empty() {
            return Ok(BTreeMap::new());
        }
        let (credentials, notes) = self.credentials(namespace, needs, deadline).await?;
        // What is in the cache is there at once: only who really waits takes a place.
        let _waiting = Waiting::begin(&self.waiting, namespace)?;
        let architectures = match needs.architectures.as_slice() {
            [] => node_architectures,
            allowed => allowed,
        };
        let reads = needs.images.iter().map(|need| {
            let (credentials, notes) = (&credentials, &notes);
            async move {
                let reading = self.images.config(&need.image, architectures, credentials);
                let config = deadline
                    .run(reading)
                    .await
                    .map_err(|_| {
                        Refusal::with_fix(
                            Class::Lookup,
                            format!(
                                "container {}: the registry of image {} did not answer in time{notes}; {}",
                                need.container, need.image, need.why()
                            ),
                            SILENT,
                        )
                    })?
                    .map_err(|error| {
                        let class =
                            if error.is_retryable() { Class::Lookup } else { Class::ImageUnread };
                        let (container, why) = (&need.container, need.why());
                        let what = format!("container {container}: {error}{notes}; {why}");
                        Refusal::with_fix(class, what, error.fix())
                    })?;
                Ok((need.container.clone(), (*config).clone()))
            }
        });
        let reads: Vec<_> = reads.collect();
        stream::iter(reads).buffer_unordered(READS_PER_POD).try_collect().await
    }

    /// The entries of the pod's pull secrets, and what to add to an error about those that could
    /// not be used. The API server has already put the service account's secrets into a pod that
    /// names none.
    async fn credentials(
        &self,
        namespace: &str,
        needs: &Needs,
        deadline: Deadline,
    ) -> Result<(Vec<credentials::Credential>, String), Refusal> {
        let api: Api<Secret> = Api::namespaced(self.client.clone(), namespace);
        let (mut found, mut notes) = (Vec::new(), String::new());
        for name in &needs.pull_secrets {
            let reading = deadline.run(api.get_opt(name)).await;
            let secret = match reading.map_err(|_| late(&format!("secret {name}")))? {
                Ok(Some(secret)) => secret,
                Ok(None) => {
                    let _ = write!(notes, "; secret `{name}` does not exist");
                    continue;
                }
                Err(kube::Error::Api(status)) if status.is_forbidden() => {
                    let _ = write!(
                        notes,
                        "; ringfence may not read secret `{name}` (bind ClusterRole ringfence-pull-secrets in namespace {namespace})"
                    );
                    continue;
                }
                Err(error) => return Err(unread(&format!("secret {namespace}/{name}"), &error)),
            };
            let data = secret.data.unwrap_or_default();
            match credentials::parse(name, |key| data.get(key).map(|value| value.0.as_slice())) {
                Ok(mut entries) => found.append(&mut entries),
                Err(error) => {
                    let _ = write!(notes, "; {error}");
                }
            }
        }
        // The pod did not ask for this one: where it cannot be used nothing is said, and it takes no more
        // than its part of the pod's time.
        if let Some(name) = &needs.added_secret
            && let reading = tokio::time::timeout(ADDED_SECRET, api.get_opt(name))
            && let Ok(Ok(Ok(Some(secret)))) = deadline.run(reading).await
        {
            let data = secret.data.unwrap_or_default();
            let value = |key: &str| data.get(key).map(|value| value.0.as_slice());
            found.extend(credentials::parse(name, value).unwrap_or_default());
        }
        Ok((found, notes))
    }
}

async fn watch_namespaces(client: Client, writer: Writer<ApiNamespace>, whole: Arc<AtomicBool>) {
    let api: Api<ApiNamespace> = Api::all(client);
    let config = watcher::Config::default().labels(INJECT_LABEL);
    let events = watcher(api, config).default_backoff().reflect(writer);
    let mut events = std::pin::pin!(events);
    while let Some(event) = events.next().await {
        match event {
            // While a list arrives the store holds what was there before it.
            Ok(watcher::Event::Init | watcher::Event::InitApply(_)) => {}
            Ok(_) => whole.store(true, Ordering::Release),
            Err(error) => {
                whole.store(false, Ordering::Release);
                tracing::warn!(%error, "the watch of namespaces broke; they are read live until it is back");
            }
        }
    }
}

fn of_api(name: &str, found: &ApiNamespace) -> Namespace {
    Namespace {
        name: name.to_owned(),
        labels: found.metadata.labels.clone().unwrap_or_default(),
        annotations: found.metadata.annotations.clone().unwrap_or_default(),
        limit_ranges: Vec::new(),
        missing_constraints: None,
    }
}

async fn read<T>(
    what: &str,
    deadline: Deadline,
    reading: impl Future<Output = Result<T, kube::Error>>,
) -> Result<T, Refusal> {
    match deadline.run(reading).await {
        Ok(Ok(found)) => Ok(found),
        Ok(Err(error)) => Err(unread(what, &error)),
        Err(TimeIsUp { .. }) => Err(late(what)),
    }
}

fn unread(what: &str, error: &kube::Error) -> Refusal {
    Refusal::new(Class::Lookup, format!("cannot read {what}: {}", api_text(error)))
}

fn late(what: &str) -> Refusal {
    Refusal::new(Class::Lookup, format!("{what} could not be read in time"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn images_that_never_come_hold_up_one_namespace_only() {
        use futures_util::poll;
        use std::task::Poll;
        // Accepts by its backlog, and never says a word.
        let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let registry = silent.local_addr().expect("an address").to_string();
        let config = crate::image::ImagesConfig {
            insecure: vec![registry.clone()],
            ..crate::image::ImagesConfig::default()
        };
        let api = tower::service_fn(|_: axum::http::Request<kube::client::Body>| async {
            Err::<axum::http::Response<kube::client::Body>, _>(std::io::Error::other("nobody"))
        });
        let images = Images::new(config).expect("a configuration");
        let (lookups, _) = Lookups::new(Client::new(api, "default"), "release".into(), images);
        let needs = |n: usize| Needs {
            images: vec![super::super::ImageNeed {
                container: "a".into(),
                image: format!("{registry}/image:{n}"),
                command: true,
                user: true,
            }],
            ..Needs::default()
        };
        let all: Vec<Needs> = (0..=WAITING_PER_NAMESPACE).map(needs).collect();
        let architectures = ["amd64".to_owned()];
        let deadline = Deadline::after(Duration::from_secs(600));
        let read = |namespace, n: usize| {
            Box::pin(lookups.images(namespace, &all[n], &architectures, deadline))
        };
        let mut waiting = Vec::new();
        for n in 0..WAITING_PER_NAMESPACE {
            let mut reading = read("hostile", n);
            assert!(poll!(&mut reading).is_pending());
            waiting.push(reading);
        }
        let last = WAITING_PER_NAMESPACE;
        let Poll::Ready(Err(refusal)) = poll!(&mut read("hostile", last)) else {
            panic!("one more waits")
        };
        assert_eq!((refusal.class, refusal.code), (Class::Lookup, 503));
        assert!(refusal.message.contains("namespace hostile"), "{refusal}");
        assert!(poll!(&mut read("other", last)).is_pending());
        // Whoever is answered, or given up, makes room.
        waiting.pop();
        assert!(poll!(&mut read("hostile", last)).is_pending());
        drop(waiting);
        assert!(lookups.waiting.lock().expect("sound").is_empty());
    }

    #[tokio::test]
    async fn a_secret_that_the_pod_did_not_ask_for_refuses_nobody() {
        let mute =
            tower::service_fn(|request: axum::http::Request<kube::client::Body>| async move {
                if request.uri().path().ends_with("/slow") {
                    std::future::pending::<()>().await;
                }
                Err::<axum::http::Response<kube::client::Body>, _>(std::io::Error::other("nobody"))
            });
        let images = Images::new(crate::image::ImagesConfig::default()).expect("a configuration");
        let (lookups, _) = Lookups::new(Client::new(mute, "default"), "release".into(), images);
        let deadline = Deadline::after(Duration::from_secs(600));
        for name in ["fence-pull", "slow"] {
            let added = Needs { added_secret: Some(name.into()), ..Needs::default() };
            let found = lookups.credentials("ns", &added, deadline).await.expect("not refused");
            assert!(found.0.is_empty() && found.1.is_empty());
        }
        // One that it names itself has to be read.
        let own = Needs { pull_secrets: vec!["fence-pull".into()], ..Needs::default() };
        assert!(lookups.credentials("ns", &own, deadline).await.is_err());
    }
}

//! The policies of the release namespace, read and checked.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::ConfigMap;
use kube::{Api, Client};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;

use super::super::server::{Deadline, TimeIsUp};
use super::super::{Class, POLICY_KEYS, PolicySource, Refusal};
use super::read;
use crate::propagate::Checked;

/// The key with CAs for upstreams.
const UPSTREAM_CA: &str = "upstream-ca.crt";
/// Policies kept parsed.
const CACHED_POLICIES: usize = 256;
/// For how long a policy that was read counts as the one that is there. The two halves of one
/// admission ask within it, and so do the pods of a deployment: the API server is asked once.
const FRESH: Duration = Duration::from_millis(100);

/// What tells one version of a source `ConfigMap` from another.
type Version = (Option<String>, Option<String>);

/// Reads them.
pub struct Policies {
    client: Client,
    namespace: String,
    known: Mutex<HashMap<String, Known>>,
}

struct Known {
    version: Version,
    /// When the last reading of it began.
    asked: Instant,
    loaded: Arc<PolicySource>,
}

impl Policies {
    pub(super) fn new(client: Client, namespace: String) -> Self {
        Self { client, namespace, known: Mutex::default() }
    }

    /// The policy of that name, as it was at most a tenth of a second ago.
    ///
    /// # Errors
    /// When it is missing, cannot be read, or does not load; the refusal says what to do.
    pub async fn get(&self, name: &str, deadline: Deadline) -> Result<Arc<PolicySource>, Refusal> {
        let fresh = self
            .known()
            .get(name)
            .and_then(|known| (known.asked.elapsed() < FRESH).then(|| Arc::clone(&known.loaded)));
        match fresh {
            Some(loaded) => Ok(loaded),
            None => self.read(name, deadline).await,
        }
    }

    /// The data of a policy for those who follow it, read and checked now.
    ///
    /// # Errors
    /// Why it is not to be followed.
    pub async fn checked(&self, name: String, deadline: Deadline) -> Checked {
        match self.read(&name, deadline).await {
            Ok(source) => Ok(Arc::new(source.data.clone())),
            Err(refusal) => Err(refusal.to_string()),
        }
    }

    async fn read(&self, name: &str, deadline: Deadline) -> Result<Arc<PolicySource>, Refusal> {
        let place = format!("{}/{name}", self.namespace);
        let what = format!("policy ConfigMap {place}");
        let api: Api<ConfigMap> = Api::namespaced(self.client.clone(), &self.namespace);
        let asked = Instant::now();
        let Some(source) = read(&what, deadline, api.get_opt(name)).await? else {
            self.known().remove(name);
            let fix = format!(
                "create it: kubectl -n {} create configmap {name} --from-file=policy.yaml",
                self.namespace
            );
            return Err(Refusal::with_fix(Class::Policy, format!("{what} does not exist"), &fix));
        };
        let version = (source.metadata.uid.clone(), source.metadata.resource_version.clone());
        if let Some(known) = self.known().get_mut(name)
            && known.version == version
        {
            known.asked = asked.max(known.asked);
            return Ok(Arc::clone(&known.loaded));
        }
        let loaded = Arc::new(load_aside(what, place, source, deadline).await?);
        let mut policies = self.known();
        if policies.len() >= CACHED_POLICIES {
            policies.clear();
        }
        // Another reading may have begun later and ended sooner.
        if policies.get(name).is_none_or(|known| known.asked <= asked) {
            let loaded = Arc::clone(&loaded);
            policies.insert(name.to_owned(), Known { version, asked, loaded });
        }
        Ok(loaded)
    }

    /// What is to be said about a policy that is about to be written: warnings for its author.
    ///
    /// # Errors
    /// It does not load, or is no `ConfigMap`.
    pub async fn judge(
        &self,
        name: &str,
        object: &serde_json::Value,
        deadline: Deadline,
    ) -> Result<Vec<String>, Refusal> {
        let place = format!("{}/{name}", self.namespace);
        let what = format!("policy ConfigMap {place}");
        let source: ConfigMap = serde_json::from_value(object.clone())
            .map_err(|error| Refusal::new(Class::Policy, format!("{what}: {error}")))?;
        load_aside(what, place, source, deadline).await.map(|loaded| loaded.warnings)
    }

    fn known(&self) -> MutexGuard<'_, HashMap<String, Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// [`load`], where it keeps no other review waiting: compiling takes what the policy makes it take.
async fn load_aside(
    what: String,
    place: String,
    source: ConfigMap,
    deadline: Deadline,
) -> Result<PolicySource, Refusal> {
    let name = what.clone();
    let loading = tokio::task::spawn_blocking(move || load(&what, &place, source));
    match deadline.run(loading).await {
        Ok(Ok(loaded)) => loaded,
        Ok(Err(error)) => Err(Refusal::new(Class::Lookup, format!("{name}: {error}"))),
        Err(TimeIsUp { .. }) => Err(Refusal::with_fix(
            Class::Policy,
            format!("{name} takes too long to compile"),
            "make it smaller",
        )),
    }
}

/// Checks a source `ConfigMap` and prepares its copy.
fn load(what: &str, place: &str, source: ConfigMap) -> Result<PolicySource, Refusal> {
    let refused = |problem: &str, fix: &str| {
        Refusal::with_fix(Class::Policy, format!("{what} {problem}"), fix)
    };
    let known = |key: &str| POLICY_KEYS.contains(&key);
    if let Some(key) = source.binary_data.unwrap_or_default().keys().find(|key| known(key)) {
        let problem = format!("has {key} as binary data");
        return Err(refused(&problem, "create the ConfigMap from a UTF-8 text file"));
    }
    let data = source.data.unwrap_or_default();
    for key in data.keys().filter(|key| !known(key)) {
        tracing::info!(policy = place, key, "a key of the policy ConfigMap is not used");
    }
    if let Some(bundle) = data.get(UPSTREAM_CA) {
        let certificates: Result<Vec<_>, _> =
            CertificateDer::pem_slice_iter(bundle.as_bytes()).collect();
        if certificates.map_or(true, |list| list.is_empty()) {
            return Err(refused(
                "has an upstream-ca.crt that holds no certificate",
                "put PEM certificates there, or remove the key",
            ));
        }
    }
    let loaded = PolicySource::read(place, &data)?;
    for warning in &loaded.warnings {
        tracing::warn!(policy = place, "{warning}");
    }
    Ok(loaded)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    const POLICY: &str = "version: 1\nnetwork_policies: {}\n";

    fn source(data: &[(&str, &str)]) -> ConfigMap {
        let data = data.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        ConfigMap { data: Some(data), ..ConfigMap::default() }
    }

    fn loaded(data: &[(&str, &str)]) -> Result<PolicySource, Refusal> {
        load("policy ConfigMap ns/p", "ns/p", source(data))
    }

    #[test]
    fn only_what_reaches_the_pod_counts_and_the_copy_has_the_collectors_prefix() {
        let one = loaded(&[("policy.yaml", POLICY)]).expect("loads");
        let same = loaded(&[("policy.yaml", POLICY), ("notes.txt", "x")]).expect("loads");
        assert_eq!(one.reference, same.reference);
        assert_eq!(one.data.keys().collect::<Vec<_>>(), ["policy.yaml"]);
        assert!(one.reference.configmap.starts_with(crate::propagate::COPY_PREFIX));
    }

    /// The two halves of an admission, and pods that come together, ask the API server once; what is
    /// gone is gone at the next look.
    #[tokio::test]
    async fn a_policy_is_read_again_after_a_moment() {
        let asked = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&asked);
        let api = tower::service_fn(move |_: axum::http::Request<kube::client::Body>| {
            let number = counted.fetch_add(1, Ordering::Relaxed);
            async move {
                let (status, body) = match number {
                    0 | 1 => (
                        200,
                        serde_json::json!({
                        "kind": "ConfigMap", "apiVersion": "v1",
                        "metadata": {"name": "p", "uid": "u", "resourceVersion": number.to_string()},
                        "data": {"policy.yaml": POLICY}}),
                    ),
                    _ => (
                        404,
                        serde_json::json!({
                        "kind": "Status", "apiVersion": "v1", "status": "Failure",
                        "reason": "NotFound", "code": 404, "message": "no", "metadata": {}}),
                    ),
                };
                axum::http::Response::builder()
                    .status(status)
                    .body(kube::client::Body::from(body.to_string().into_bytes()))
                    .map_err(std::io::Error::other)
            }
        });
        let policies = Policies::new(Client::new(api, "default"), "release".into());
        let deadline = Deadline::after(Duration::from_secs(60));
        let read_at = |at: Instant| {
            policies.known().values_mut().for_each(|known| known.asked = at);
        };
        let now = Instant::now();
        let first = policies.get("p", deadline).await.expect("is there");
        read_at(now + Duration::from_secs(3600));
        let second = policies.get("p", deadline).await.expect("is there");
        assert!(Arc::ptr_eq(&first, &second));
        assert_eq!(asked.load(Ordering::Relaxed), 1);
        read_at(now);
        policies.checked("p".into(), deadline).await.expect("is there");
        assert_eq!(asked.load(Ordering::Relaxed), 2, "who follows it reads it now");
        assert!(!Arc::ptr_eq(&first, &policies.known()["p"].loaded), "another version");
        read_at(now.checked_sub(FRESH).expect("the machine has run for longer"));
        assert!(policies.get("p", deadline).await.is_err(), "gone");
        assert!(policies.get("p", deadline).await.is_err(), "and not taken from memory");
    }

    #[test]
    fn a_policy_that_does_not_load_is_refused_and_named() {
        for data in [
            &[("policy.yaml", "version: [")][..],
            &[("other.yaml", POLICY)],
            &[("policy.yaml", POLICY), ("policy.rego", "package mine\nallow := true\n")],
            &[("policy.yaml", POLICY), ("upstream-ca.crt", "nonsense")],
        ] {
            let refusal = loaded(data).expect_err("does not load");
            assert_eq!(refusal.class, Class::Policy);
            assert!(refusal.message.contains("ns/p"), "{}", refusal.message);
        }
    }
}

//! The CA bundle of the webhook configurations: published by server-side apply, and checked.
//!
//! The chart's manifest leaves `caBundle` out and this field manager owns that field alone, so
//! neither `helm upgrade` nor a `GitOps` controller sets it back or sees a difference to repair.

use std::sync::Arc;

use crate::api_text::api_text;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use k8s_openapi::api::admissionregistration::v1::{
    MutatingWebhookConfiguration, ValidatingWebhookConfiguration,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::api::{ApiResource, DynamicObject, Patch, PatchParams};
use kube::{Api, Client};
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier as _;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{CertificateError, RootCertStore};
use serde_json::{Value, json};

/// The name under which we own `caBundle`.
pub const FIELD_MANAGER: &str = "ringfence-ca-bundle";

/// A webhook configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Configuration {
    /// Which of the two kinds it is.
    pub kind: ConfigurationKind,
    /// Its name.
    pub name: String,
}

/// The kinds of webhook configurations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConfigurationKind {
    /// `MutatingWebhookConfiguration`
    Mutating,
    /// `ValidatingWebhookConfiguration`
    Validating,
}

impl std::fmt::Display for Configuration {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} `{}`", self.resource().kind, self.name)
    }
}

impl Configuration {
    fn resource(&self) -> ApiResource {
        match self.kind {
            ConfigurationKind::Mutating => ApiResource::erase::<MutatingWebhookConfiguration>(&()),
            ConfigurationKind::Validating => {
                ApiResource::erase::<ValidatingWebhookConfiguration>(&())
            }
        }
    }

    fn api(&self, client: &Client) -> Api<DynamicObject> {
        Api::all_with(client.clone(), &self.resource())
    }

    /// Its entries, live.
    ///
    /// # Errors
    /// When it cannot be read.
    pub async fn live(&self, client: &Client) -> Result<Live, CaBundleError> {
        let live = self.api(client).get(&self.name).await;
        let live =
            live.map_err(|source| CaBundleError::Read { configuration: self.clone(), source })?;
        let (uid, version) = (live.metadata.uid, live.metadata.resource_version);
        Ok(Live { entries: entries(&live.data), version, uid })
    }

    /// This object as the owner of another one, by the uid that it was read with.
    fn owner(&self, uid: &str) -> OwnerReference {
        let kind = self.resource();
        OwnerReference {
            api_version: kind.api_version,
            kind: kind.kind,
            name: self.name.clone(),
            uid: uid.to_owned(),
            ..OwnerReference::default()
        }
    }
}

/// A configuration as it was read: its bundles, and the version they were read at.
#[derive(Debug, Clone)]
pub struct Live {
    entries: Vec<Entry>,
    version: Option<String>,
    uid: Option<String>,
}

impl Live {
    /// The bundle of every entry; empty where it has none.
    pub fn bundles(&self) -> impl Iterator<Item = &Vec<u8>> {
        self.entries.iter().map(|entry| &entry.bundle)
    }

    /// The configuration as the owner of what is of no use without it.
    #[must_use]
    pub fn owner(&self, configuration: &Configuration) -> Option<OwnerReference> {
        self.uid.as_deref().map(|uid| configuration.owner(uid))
    }
}

/// One webhook of a configuration, as far as it matters here.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    name: String,
    /// PEM; empty where there is none.
    bundle: Vec<u8>,
}

fn entries(data: &Value) -> Vec<Entry> {
    let webhooks = data.get("webhooks").and_then(Value::as_array);
    let entry = |webhook: &Value| {
        let bundle = webhook.pointer("/clientConfig/caBundle").and_then(Value::as_str);
        Entry {
            name: webhook.get("name").and_then(Value::as_str).unwrap_or_default().to_owned(),
            bundle: bundle.and_then(|text| STANDARD.decode(text).ok()).unwrap_or_default(),
        }
    };
    webhooks.into_iter().flatten().map(entry).collect()
}

/// Why a CA bundle could not be published or does not fit what is served.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CaBundleError {
    /// The configuration could not be read.
    #[error("cannot read {configuration}: {}", api_text(.source))]
    Read {
        /// Which it is.
        configuration: Configuration,
        /// What the API server answered.
        #[source]
        source: kube::Error,
    },
    /// The configuration could not be changed.
    #[error("cannot set caBundle in {configuration}: {}", api_text(.source))]
    Write {
        /// Which it is.
        configuration: Configuration,
        /// What the API server answered.
        #[source]
        source: kube::Error,
    },
    /// Somebody changed the configuration meanwhile: to be looked at again.
    #[error("{configuration} was changed meanwhile")]
    Changed {
        /// Which it is.
        configuration: Configuration,
    },
    /// A webhook of the configuration carries no, or another, bundle.
    #[error("webhook `{webhook}` of {configuration} has no caBundle yet")]
    Missing {
        /// Which it is.
        configuration: Configuration,
        /// The entry within it.
        webhook: String,
    },
    /// The bundle does not verify the served certificate.
    #[error(
        "the served certificate does not verify against caBundle of webhook `{webhook}` in {configuration}: {reason}"
    )]
    Untrusted {
        /// Which it is.
        configuration: Configuration,
        /// The entry within it.
        webhook: String,
        /// What the verifier said.
        reason: String,
    },
}

/// Writes `bundle` (PEM) as the bundle of every entry of the configuration, at exactly the version
/// that was read, where an entry has another.
///
/// `live` has to be read before whatever `bundle` was made from. Else a replica that slept in between
/// could put back a bundle which lacks the CA that others sign with by now.
///
/// Returns true when something was written. Only `caBundle` is applied; the rest of an entry stays
/// with whoever owns it.
///
/// # Errors
/// When the configuration cannot be patched, or has changed since ([`CaBundleError::Changed`]).
pub async fn publish(
    client: &Client,
    configuration: &Configuration,
    live: &Live,
    bundle: &str,
) -> Result<bool, CaBundleError> {
    let Some(patch) = patch_for(configuration, live, bundle) else { return Ok(false) };
    let params = PatchParams::apply(FIELD_MANAGER).force();
    let api = configuration.api(client);
    match api.patch(&configuration.name, &params, &Patch::Apply(&patch)).await {
        Ok(_) => Ok(true),
        Err(kube::Error::Api(status)) if status.is_conflict() => {
            Err(CaBundleError::Changed { configuration: configuration.clone() })
        }
        Err(source) => Err(CaBundleError::Write { configuration: configuration.clone(), source }),
    }
}

/// The apply patch that gives every entry our bundle, or None when all have it.
fn patch_for(configuration: &Configuration, live: &Live, ca_pem: &str) -> Option<Value> {
    if live.entries.iter().all(|entry| entry.bundle == ca_pem.as_bytes()) {
        return None;
    }
    // All entries, also those that are right: what an apply leaves out is given up.
    let bundle = STANDARD.encode(ca_pem);
    let entries: Vec<Value> = live
        .entries
        .iter()
        .map(|entry| json!({ "name": entry.name, "clientConfig": { "caBundle": bundle } }))
        .collect();
    let resource = configuration.resource();
    Some(json!({
        "apiVersion": resource.api_version,
        "kind": resource.kind,
        // An apply with a version is refused when there is another by now.
        "metadata": { "name": configuration.name, "resourceVersion": live.version },
        "webhooks": entries,
    }))
}

/// Checks that the live bundle of every entry of the configuration verifies `chain` for
/// `server_name`, as the API server will when it calls.
///
/// # Errors
/// When it does not, or the configuration cannot be read.
pub async fn verify_live(
    client: &Client,
    configuration: &Configuration,
    chain: &[CertificateDer<'static>],
    server_name: &str,
) -> Result<(), CaBundleError> {
    verify_all(configuration, &configuration.live(client).await?, chain, server_name)
}

/// The same against a configuration as it was read.
///
/// # Errors
/// When a bundle does not verify it.
pub fn verify_all(
    configuration: &Configuration,
    live: &Live,
    chain: &[CertificateDer<'static>],
    server_name: &str,
) -> Result<(), CaBundleError> {
    for entry in &live.entries {
        let (configuration, webhook) = (configuration.clone(), entry.name.clone());
        if entry.bundle.is_empty() {
            return Err(CaBundleError::Missing { configuration, webhook });
        }
        verify(&entry.bundle, chain, server_name).map_err(|reason| CaBundleError::Untrusted {
            configuration,
            webhook,
            reason,
        })?;
    }
    Ok(())
}

/// Whether `chain` (leaf first) verifies for `server_name` against the PEM bundle, now.
///
/// # Errors
/// The verifier's reason.
pub fn verify(
    bundle_pem: &[u8],
    chain: &[CertificateDer<'static>],
    server_name: &str,
) -> Result<(), String> {
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(bundle_pem) {
        let certificate = certificate.map_err(|e| format!("caBundle is not PEM: {e}"))?;
        roots.add(certificate).map_err(|e| format!("caBundle holds no usable CA: {e}"))?;
    }
    let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), super::provider())
        .build()
        .map_err(|e| e.to_string())?;
    let name = ServerName::try_from(server_name.to_owned()).map_err(|e| e.to_string())?;
    let (leaf, intermediates) = chain.split_first().ok_or("no certificate is served")?;
    verifier
        .verify_server_cert(leaf, intermediates, &name, &[], UnixTime::now())
        .map(drop)
        .map_err(|error| reason(&error))
}

/// The verifier's word, for a person who has to mend it.
fn reason(error: &rustls::Error) -> String {
    let rustls::Error::InvalidCertificate(error) = error else { return error.to_string() };
    match error {
        CertificateError::UnknownIssuer => {
            "none of its CAs issued the certificate (intermediate CAs belong into tls.crt, after the server's certificate)".into()
        }
        CertificateError::BadSignature => {
            "a CA in it has the name of the certificate's issuer, and another key".into()
        }
        CertificateError::Other(other) if other.to_string() == "CaUsedAsEndEntity" => {
            "the certificate is a CA itself: issue one by it that is none, for the server".into()
        }
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn live(bundles: &[Option<&str>]) -> Live {
        let webhooks: Vec<Value> = bundles
            .iter()
            .enumerate()
            .map(|(i, bundle)| {
                json!({
                    "name": format!("w{i}.ringfence.dev"),
                    "clientConfig": {
                        "service": { "name": "s", "namespace": "n" },
                        "caBundle": bundle.map(|bundle| STANDARD.encode(bundle)),
                    },
                })
            })
            .collect();
        let entries = entries(&json!({ "metadata": { "name": "x" }, "webhooks": webhooks }));
        Live { entries, version: Some("7".into()), uid: None }
    }

    fn configuration(kind: ConfigurationKind) -> Configuration {
        Configuration { kind, name: "x".into() }
    }

    #[test]
    fn nothing_is_written_when_every_entry_has_the_bundle() {
        let mutating = configuration(ConfigurationKind::Mutating);
        assert!(patch_for(&mutating, &live(&[Some("ca"), Some("ca")]), "ca").is_none());
        assert!(patch_for(&mutating, &live(&[]), "ca").is_none());
    }

    #[test]
    fn one_difference_applies_the_bundle_to_all_entries_and_nothing_else() {
        let kinds = [ConfigurationKind::Mutating, ConfigurationKind::Validating];
        for (kind, name) in kinds.into_iter().zip(["Mutating", "Validating"]) {
            let patch = patch_for(&configuration(kind), &live(&[Some("ca"), None]), "ca");
            assert_eq!(
                patch.expect("a patch"),
                json!({
                    "apiVersion": "admissionregistration.k8s.io/v1",
                    "kind": format!("{name}WebhookConfiguration"),
                    "metadata": { "name": "x", "resourceVersion": "7" },
                    "webhooks": [
                        { "name": "w0.ringfence.dev", "clientConfig": { "caBundle": "Y2E=" } },
                        { "name": "w1.ringfence.dev", "clientConfig": { "caBundle": "Y2E=" } },
                    ],
                })
            );
        }
    }

    #[test]
    fn a_bundle_that_is_not_pem_does_not_verify() {
        assert!(verify(b"nonsense", &[], "a.b.svc").is_err());
    }
}

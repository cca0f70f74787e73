//! The CA bundle of the webhook configurations: published by server-side apply, and checked.
//!
//! The chart's manifest leaves `caBundle` out and this field manager owns that field alone, so
//! neither `helm upgrade` nor a `GitOps` controller sets it back or sees a difference to repair.

use std::sync::Arc;

use crate::api_text::api_text;
use k8s_openapi::api::admissionregistration::v1::MutatingWebhookConfiguration;
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use rustls::RootCertStore;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier as _;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use serde_json::{Value, json};

/// The name under which we own `caBundle`.
pub const FIELD_MANAGER: &str = "ringfence-ca-bundle";

/// Why a CA bundle could not be published or does not fit what is served.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CaBundleError {
    /// The configuration could not be read.
    #[error("cannot read MutatingWebhookConfiguration `{name}`: {}", api_text(.source))]
    Read {
        /// The configuration's name.
        name: String,
        /// What the API server answered.
        #[source]
        source: kube::Error,
    },
    /// The configuration could not be changed.
    #[error("cannot set caBundle in MutatingWebhookConfiguration `{name}`: {}", api_text(.source))]
    Write {
        /// The configuration's name.
        name: String,
        /// What the API server answered.
        #[source]
        source: kube::Error,
    },
    /// A webhook of the configuration carries no, or another, bundle.
    #[error("webhook `{webhook}` of MutatingWebhookConfiguration `{name}` has no caBundle yet")]
    Missing {
        /// The configuration's name.
        name: String,
        /// The entry within it.
        webhook: String,
    },
    /// The bundle does not verify the served certificate.
    #[error(
        "the served certificate does not verify against caBundle of webhook `{webhook}` in MutatingWebhookConfiguration `{name}`: {reason}"
    )]
    Untrusted {
        /// The configuration's name.
        name: String,
        /// The entry within it.
        webhook: String,
        /// What the verifier said.
        reason: String,
    },
}

/// Writes `ca_pem` as the bundle of every entry of the configuration `name` that has another.
///
/// Returns true when something was written. Only `caBundle` is applied; the rest of an entry stays
/// with whoever owns it.
///
/// # Errors
/// When the configuration cannot be read or patched.
pub async fn publish(client: &Client, name: &str, ca_pem: &str) -> Result<bool, CaBundleError> {
    let api: Api<MutatingWebhookConfiguration> = Api::all(client.clone());
    let live = api
        .get(name)
        .await
        .map_err(|source| CaBundleError::Read { name: name.to_owned(), source })?;
    let Some(patch) = patch_for(name, &live, ca_pem) else { return Ok(false) };
    api.patch(name, &PatchParams::apply(FIELD_MANAGER).force(), &Patch::Apply(&patch))
        .await
        .map_err(|source| CaBundleError::Write { name: name.to_owned(), source })?;
    Ok(true)
}

/// The apply patch that gives every entry our bundle, or None when all have it.
fn patch_for(name: &str, live: &MutatingWebhookConfiguration, ca_pem: &str) -> Option<Value> {
    let webhooks = live.webhooks.as_deref().unwrap_or_default();
    let differs = webhooks.iter().any(|webhook| {
        webhook.client_config.ca_bundle.as_ref().is_none_or(|b| b.0 != ca_pem.as_bytes())
    });
    if !differs {
        return None;
    }
    // All entries, also those that are right: what an apply leaves out is given up.
    let bundle = k8s_openapi::ByteString(ca_pem.as_bytes().to_vec());
    let entries: Vec<Value> = webhooks
        .iter()
        .map(|webhook| json!({ "name": webhook.name, "clientConfig": { "caBundle": bundle } }))
        .collect();
    Some(json!({
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "MutatingWebhookConfiguration",
        "metadata": { "name": name },
        "webhooks": entries,
    }))
}

/// Checks that the live bundle of every entry of `name` verifies `chain` for `server_name`, as the
/// API server will when it calls.
///
/// # Errors
/// When it does not, or the configuration cannot be read.
pub async fn verify_live(
    client: &Client,
    name: &str,
    chain: &[CertificateDer<'static>],
    server_name: &str,
) -> Result<(), CaBundleError> {
    let api: Api<MutatingWebhookConfiguration> = Api::all(client.clone());
    let live = api
        .get(name)
        .await
        .map_err(|source| CaBundleError::Read { name: name.to_owned(), source })?;
    for webhook in live.webhooks.as_deref().unwrap_or_default() {
        let (name, entry) = (name.to_owned(), webhook.name.clone());
        let Some(bundle) = webhook.client_config.ca_bundle.as_ref().filter(|b| !b.0.is_empty())
        else {
            return Err(CaBundleError::Missing { name, webhook: entry });
        };
        verify(&bundle.0, chain, server_name).map_err(|reason| CaBundleError::Untrusted {
            name,
            webhook: entry,
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
        .map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn live(bundles: &[Option<&str>]) -> MutatingWebhookConfiguration {
        let webhooks: Vec<Value> = bundles
            .iter()
            .enumerate()
            .map(|(i, bundle)| {
                json!({
                    "name": format!("w{i}.ringfence.dev"),
                    "admissionReviewVersions": ["v1"],
                    "sideEffects": "None",
                    "clientConfig": {
                        "service": { "name": "s", "namespace": "n" },
                        "caBundle": bundle.map(|b| k8s_openapi::ByteString(b.as_bytes().to_vec())),
                    },
                })
            })
            .collect();
        serde_json::from_value(json!({ "metadata": { "name": "x" }, "webhooks": webhooks }))
            .expect("a valid configuration")
    }

    #[test]
    fn nothing_is_written_when_every_entry_has_the_bundle() {
        assert!(patch_for("x", &live(&[Some("ca"), Some("ca")]), "ca").is_none());
    }

    #[test]
    fn one_difference_applies_the_bundle_to_all_entries_and_nothing_else() {
        let patch = patch_for("x", &live(&[Some("ca"), None]), "ca").expect("a patch");
        assert_eq!(
            patch["webhooks"],
            json!([
                { "name": "w0.ringfence.dev", "clientConfig": { "caBundle": "Y2E=" } },
                { "name": "w1.ringfence.dev", "clientConfig": { "caBundle": "Y2E=" } },
            ])
        );
    }

    #[test]
    fn a_bundle_that_is_not_pem_does_not_verify() {
        assert!(verify(b"nonsense", &[], "a.b.svc").is_err());
    }
}

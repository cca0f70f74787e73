//! Certificate authorities and the leaves they sign: the sandbox CA of a fence and the webhook's
//! own CA.
//!
//! All keys are ECDSA on P-256 and all cryptography is aws-lc-rs, named explicitly: nothing here
//! depends on a process-wide default provider.
#![forbid(unsafe_code)]

pub mod authority;
#[cfg(feature = "webhook")]
pub mod ca_bundle;
#[cfg(feature = "webhook")]
pub mod given;
#[cfg(feature = "webhook")]
pub mod plan;
#[cfg(feature = "webhook")]
pub mod rotation;
#[cfg(feature = "webhook")]
pub mod stored;
#[cfg(feature = "webhook")]
pub mod validity;

use std::sync::{Arc, OnceLock};

use rustls::crypto::CryptoProvider;

pub use authority::{Authority, LeafKey, PkiError, SubjectName, certificate_pem};

/// The one cryptography provider of both programs.
#[must_use]
pub fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: OnceLock<Arc<CryptoProvider>> = OnceLock::new();
    Arc::clone(PROVIDER.get_or_init(|| Arc::new(rustls::crypto::aws_lc_rs::default_provider())))
}

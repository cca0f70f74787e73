//! Ringfence puts AI agents in a fence: their own network namespace behind a proxy that judges
//! each request, under Landlock, seccomp and a dropped user, without a change to their images.
//!
//! Two programs share this crate. `ringfence` is the operator's side (the admission webhook and
//! the verbs a person types); `ringfence-supervisor` is the pod's side (PID 1 of the agent's
//! container). What runs in the pod never links what talks to the API server: each room below is
//! a cargo feature.
//!
//! | room | what it is for | what it may use |
//! |---|---|---|
//! | [`policy`] | what is allowed; pure | nothing |
//! | [`event`] | what happened, in one type | nothing |
//! | [`pki`] | certificate authorities and leaves | nothing |
//! | [`fence`] | what the kernel enforces; the only room with `unsafe` | `policy`, `event` |
//! | [`proxy`] | what the network sees | `policy`, `pki`, `event` |
//! | [`supervisor`] | the pod's PID 1 | `fence`, `proxy`, `policy`, `event` |
//! | [`image`] | ENTRYPOINT, CMD and USER from a registry | nothing |
//! | [`admission`] | what the API server asks | `policy`, `image` |
//! | [`propagate`] | policy copies in labelled namespaces | `policy` |
//! | [`cli`] | the verbs a person types | all of the operator's side |
//!
//! `fence` and `proxy` never see each other.
#![deny(unsafe_code)]

pub mod event;
pub mod policy;

#[cfg(test)]
mod fuzz;

#[cfg(feature = "tls")]
pub mod pki;

#[cfg(feature = "fence")]
#[allow(unsafe_code)]
pub mod fence;

#[cfg(feature = "proxy")]
pub mod proxy;

#[cfg(feature = "supervisor")]
pub mod supervisor;

#[cfg(feature = "webhook")]
pub mod admission;
#[cfg(feature = "webhook")]
pub mod api_text;
#[cfg(feature = "webhook")]
pub mod cli;
#[cfg(feature = "webhook")]
pub mod image;
#[cfg(feature = "webhook")]
pub mod propagate;

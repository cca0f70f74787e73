//! What the API server asks: may this pod come up, and in which shape.
//!
//! The pure half is one function, [`inject()`]: the pod, its namespace, the settings, what is known
//! of its images and its policy go in, JSON Patch operations, warnings or a refusal come out. The
//! webhook, `ringfence inject` and verification all call it, so they cannot disagree. The other
//! half serves it: HTTP, look-ups, certificates.
//!
//! | file | what it is for |
//! |---|---|
//! | `inject` | the function itself |
//! | `verify` | the final pod against it, updates against the old object |
//! | `plan` | what is to be fenced, what has to be looked up before |
//! | `restore` | UPDATE: a re-applied manifest gets its injection back from the old object |
//! | `verdict` | every class of pod that gets another answer than "fenced", as one enum |
//! | `namespace` | labels and annotations of Ringfence, read strictly |
//! | `notes` | warnings, and the classes of the pod as a whole |
//! | `settings`, `stamp` | what the chart decides, and how replicas with other settings are told apart |
//! | `source` | from a policy ConfigMap's data to what a pod needs of it |
//! | `patch` | the difference of two documents as operations, arrays never written as a whole |
//! | `json` | reading and editing `Value`s where null means absent |
//! | `command`, `user` | the supervisor's argv, and the original recovered from it |
//! | `shape` | a runner that stays as it is and starts its agents through the supervisor |
//! | `mounts`, `install` | volumes and mounts of ours, the init container |
//! | `pull_secret` | the secret that the image of ours is pulled with |
//! | `volumes`, `sidecar` | volumes of the container's own that join its files; ports that lead to sidecars |
//! | `security`, `env`, `probes` | the remaining parts of a container |
//! | `strict`, `baseline`, `own`, `pin` | what the label value `strict` asks beside the fence |
//! | `pod_security` | whether PodSecurity admission will refuse the injected pod |
//! | `review` | the AdmissionReview envelope |
//! | `server`, `lookup`, `exec`, `events` | the serving half |
#![forbid(unsafe_code)]

mod baseline;
mod command;
mod env;
pub mod events;
pub mod exec;
mod inject;
mod install;
mod json;
pub mod lookup;
mod mounts;
mod namespace;
mod notes;
mod own;
mod patch;
mod pin;
mod plan;
mod pod_security;
mod probes;
mod pull_secret;
mod restore;
pub mod review;
mod security;
pub mod server;
mod settings;
mod shape;
mod sidecar;
mod source;
mod stamp;
mod strict;
#[cfg(test)]
mod tests;
mod user;
mod verdict;
mod verify;
mod volumes;

pub use crate::image::Config as ImageConfig;
pub use command::{SUPERVISOR, enter_prefix, supervisor_path};
pub use inject::{
    Cause, Injection, Outcome, PolicyRef, ephemeral, fenced_containers, fenced_mode, inject,
    inject_into,
};
pub use namespace::{Mode, Namespace};
pub use plan::{ImageNeed, Needs, is_fenced, is_live, needs, policy_name};
pub use pod_security::enforced_level;
pub use restore::restore;
pub use settings::{Delivery, IpFamily, LogLevel, PodSecurity, Profile, Settings};
pub use source::{COPY_PREFIX, LIVE_PREFIX, POLICY_KEYS, PolicySource, cannot_start, live_name};
pub use verdict::{Class, Refusal, Verdict, table};
pub use verify::{changes_image, verify, verify_update};

//! Policies, as config maps, in the namespaces of the pods that mount them.
//!
//! A pod can only mount a config map of its own namespace, so each admitted pod finds an immutable
//! copy there, named after the content, made before the admission is answered. Editing the source
//! makes another copy; running pods keep theirs. Where the namespace lets pods follow their policy,
//! they mount one object that is changed with its source instead ([`follow`]). What no pod names is
//! collected.
#![forbid(unsafe_code)]

mod collect;
mod copy;
mod live;

pub use collect::{COLLECT_INTERVAL, collect_now, collect_once};
pub use copy::{Copies, CopyError, PolicyCopy, ensure};
pub use live::{Checked, LIVE, bring_up, ensure_live, follow};

/// Prefix of every copy's name; the rest is the beginning of the content's digest.
pub const COPY_PREFIX: &str = "ringfence-policy-";
/// Prefix of the name of a policy that pods follow; the rest is its source's name.
pub const LIVE_PREFIX: &str = "ringfence-live-";
/// Label and value that mark our copies.
pub const MANAGED_BY: (&str, &str) = ("app.kubernetes.io/managed-by", "ringfence");
/// Label naming the source `ConfigMap` in the release namespace.
pub const POLICY_SOURCE: &str = "ringfence.dev/policy-source";
/// Annotation of the collector: since when no pod names the copy (RFC 3339).
pub const UNUSED_SINCE: &str = "ringfence.dev/unused-since";

//! What is allowed: reads `policy.yaml`, checks it, compiles it, and judges connections, requests
//! and destinations by it.
//!
//! Pure: no socket, no file, no clock. Bytes go in, verdicts come out; whoever calls does the
//! reading, the resolving and the refusing. `docs/policy.md` lists the keys and where this reader
//! is stricter than `OpenShell`'s file mode.
#![forbid(unsafe_code)]

mod check;
mod decision;
mod destination;
pub mod digest;
mod document;
mod engine;
mod fields;
mod fixed;
mod glob;
mod host;
mod host_pattern;
mod overrides;
mod path;
mod payload;
mod presets;
mod problem;
mod rego;
mod sidecar_ports;
mod suggestion;
mod volume_path;
mod within;
mod yaml;

pub use decision::{Caller, Connect, Denial, Grant, Inspect, Request, TlsMode, Verdict};
pub use destination::{DestinationDenied, Refusal, forbidden, is_control_plane};
pub use document::{Compatibility, Filesystem, Memfd, Process, ProcessLimits, UnixSockets};
pub use engine::{NameMatch, Policy, WEBSOCKET_BINARY, WEBSOCKET_TEXT};
pub use fixed::Difference;
pub use host::{Host, HostError};
pub use ipnet::IpNet;
pub use overrides::Instead;
pub use path::{CanonicalTarget, PathError, canonical_path};
pub use payload::{
    Call, Exchange, Graphql, Inspection, Message, Operation, OperationKind, Payload, Persisted,
    Rpc, RpcInspection,
};
pub use problem::{LoadError, Problem, Source};
pub use sidecar_ports::{MAX_SIDECAR_PORTS, SidecarPorts};
pub use volume_path::closed_to_volumes;

/// A policy that may be enforced, and what its author should know about it.
#[derive(Debug)]
pub struct Loaded {
    /// Compiled and immutable, but for [`Policy::resolve_binaries`].
    pub policy: Policy,
    /// In the order of the file.
    pub warnings: Vec<Problem>,
}

/// The largest policy in bytes. A `ConfigMap` holds no more.
pub const MAX_BYTES: usize = 1024 * 1024;

/// Reads, checks and compiles a policy.
///
/// # Errors
/// Every problem that makes the file unfit to enforce, in the order of the file: what is not
/// understood, or would be enforced in part only, is refused as a whole.
pub fn load(yaml: &Source<'_>, rego: Option<&Source<'_>>) -> Result<Loaded, LoadError> {
    let mut problems = problem::Problems::new(yaml.name);
    let text = rego.map_or(Ok(None), rego::read);
    let mut errors = Vec::new();
    let foreign = text.unwrap_or_else(|problem| {
        errors.push(problem);
        None
    });
    let root = match yaml::read(yaml) {
        Ok(root) => root,
        Err(problem) => {
            errors.push(problem);
            return Err(LoadError(errors));
        }
    };
    let document = document::read(&root, &mut problems);
    let mut policy = engine::compile(&document, &mut problems);
    let (mut found, mut warnings) = problems.finish();
    errors.append(&mut found);
    if errors.is_empty()
        && let Some(foreign) = foreign
    {
        let under = rego::Under { policy, document: &document, root: &root };
        let (judged, mut more) = foreign.over(under).map_err(LoadError)?;
        policy = judged;
        warnings.append(&mut more);
    }
    if errors.is_empty() { Ok(Loaded { policy, warnings }) } else { Err(LoadError(errors)) }
}

#[cfg(test)]
mod fuzz;

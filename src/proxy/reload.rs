//! Another policy than the one that the proxy began with: read from the supervisor, compiled beside
//! the traffic, put in force at once, reported.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use anyhow::{Context as _, Result, bail, ensure};

use super::control::{MAX_POLICY, NewPolicy, PolicyText, ToProxy, ToSupervisor};
use super::rules::Rules;
use super::upstream::UpstreamTls;
use super::{Shared, metrics, report};
use crate::policy::{self, Policy, Source};

/// The number of the policy that the proxy begins with.
pub(crate) const FIRST: u64 = 1;

/// What rules are made with, beside the policy.
pub(crate) struct Reloader {
    image_roots: Option<Arc<File>>,
    first_roots_pem: Vec<u8>,
}

impl Reloader {
    pub(crate) fn new(image_roots: Option<File>, first_roots_pem: Vec<u8>) -> Self {
        Self { image_roots: image_roots.map(Arc::new), first_roots_pem }
    }

    /// The rules to begin with.
    pub(crate) fn first(&self, policy: Policy) -> Rules {
        let policy = Arc::new(policy);
        let roots = self.first_roots_pem.clone();
        let upstream_tls = Arc::new(UpstreamTls::new(self.image_roots.clone(), roots));
        Rules { number: FIRST, whole: Arc::clone(&policy), policy, upstream_tls }
    }

    /// The rules after `last`.
    fn next(&self, last: &Rules, number: u64, bounded: bool, new: Compiled) -> Rules {
        let Compiled { policy, upstream_ca } = new;
        let (policy, whole) = if bounded {
            let whole = Arc::clone(&last.whole);
            (Arc::new(policy.within(Arc::clone(&whole))), whole)
        } else {
            let policy = Arc::new(policy);
            (Arc::clone(&policy), policy)
        };
        // The same authorities: TLS sessions go on.
        let upstream_tls = if last.upstream_tls.trusts(&upstream_ca) {
            Arc::clone(&last.upstream_tls)
        } else {
            Arc::new(UpstreamTls::new(self.image_roots.clone(), upstream_ca))
        };
        Rules { number, policy, whole, upstream_tls }
    }
}

struct Compiled {
    policy: Policy,
    upstream_ca: Vec<u8>,
}

/// Does what the supervisor says of a change, and answers. The supervisor sends one at a time.
pub(crate) async fn follow(shared: Arc<Shared>, change: ToProxy, fds: Vec<OwnedFd>) {
    let (generation, digest, bounded, kept) = match change {
        ToProxy::Policy { generation, digest, bounded, kept } => {
            (generation, digest, bounded, kept)
        }
        ToProxy::PolicyKept { reason } => return report::policy_kept(&reason),
        _ => return,
    };
    // Compiling takes what the policy makes it take: not on a thread that serves.
    let compiled = tokio::task::spawn_blocking(move || compile(fds)).await;
    let compiled = compiled.map_err(anyhow::Error::from).and_then(|compiled| compiled);
    let refused = match compiled {
        Ok(compiled) => {
            metrics::policies(compiled.policy.names());
            let last = shared.rules.load();
            shared.rules.replace(shared.reloader.next(&last, generation, bounded, compiled));
            metrics::policy_in_force(generation, &digest);
            report::policy_followed(generation, &digest, bounded, &kept);
            None
        }
        Err(error) => {
            let reason = format!("{error:#}");
            report::policy_kept(&reason);
            Some(reason)
        }
    };
    // A supervisor that does not hear this is gone, and so is this process.
    let _ = shared.control.send(&ToSupervisor::Policy { generation, refused }).await;
}

fn source(text: &PolicyText) -> Source<'_> {
    Source { name: &text.name, bytes: text.text.as_bytes() }
}

fn compile(fds: Vec<OwnedFd>) -> Result<Compiled> {
    let Some(file) = fds.into_iter().next().map(File::from) else {
        bail!("the policy's file did not come: out of descriptors");
    };
    let length = file.metadata().context("the policy's file")?.len();
    ensure!(length <= MAX_POLICY, "the policy's file has {length} bytes");
    let mut bytes = vec![0; usize::try_from(length)?];
    file.read_exact_at(&mut bytes, 0).context("the policy's file")?;
    let NewPolicy { data, rules, upstream_ca, links } = serde_json::from_slice(&bytes)?;
    drop(bytes);
    let rules = rules.as_ref().map(source);
    let mut policy = policy::load(&source(&data), rules.as_ref())?.policy;
    policy.resolve_binaries(|path| links.get(path).cloned());
    Ok(Compiled { policy, upstream_ca: upstream_ca.unwrap_or_default().into_bytes() })
}

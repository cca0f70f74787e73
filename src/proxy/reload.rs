//! Another policy than the one that the proxy began with: read from the supervisor, compiled beside
//! the traffic, put in force at once, reported.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};

use anyhow::{Context as _, Result, ensure};
use tokio::runtime::Handle;

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

/// A policy as it came from the supervisor.
pub(crate) struct Compiled {
    pub(crate) policy: Policy,
    upstream_ca: Vec<u8>,
}

/// What the supervisor says of a change, and the descriptors beside it.
pub(crate) type Change = (ToProxy, Vec<OwnedFd>);

/// The longest reason in characters, so that it fits into a message.
const MAX_REASON: usize = 4_096;

/// The thread that does what the supervisor says of changes, one after the other: compiling takes what the
/// policy makes it take.
pub(crate) struct Follower {
    shared: Sender<Arc<Shared>>,
    changes: Sender<Change>,
}

/// Makes the thread, before the agent runs: one that has used up all processes of the pod must not keep a
/// change away.
pub(crate) fn start(runtime: Handle) -> Result<Follower> {
    let (shared, begun) = channel::<Arc<Shared>>();
    let (changes, changed) = channel::<Change>();
    // The stack that it has in the supervisor, which compiles the same first.
    let thread = std::thread::Builder::new().name("policy".into()).stack_size(8 << 20);
    let spawned = thread.spawn(move || {
        let Ok(shared) = begun.recv() else { return };
        for (change, fds) in changed {
            follow(&shared, &runtime, change, fds);
        }
    });
    spawned.context("cannot start the thread that follows the policy")?;
    Ok(Follower { shared, changes })
}

impl Follower {
    /// Follows from now on; where changes go.
    pub(crate) fn begin(self, shared: Arc<Shared>) -> Sender<Change> {
        // It waits for this: it is there.
        let _ = self.shared.send(shared);
        self.changes
    }
}

fn follow(shared: &Shared, runtime: &Handle, change: ToProxy, fds: Vec<OwnedFd>) {
    let (generation, digest, bounded, kept) = match change {
        ToProxy::Policy { generation, digest, bounded, kept } => {
            (generation, digest, bounded, kept)
        }
        ToProxy::PolicyKept { reason } => return report::policy_kept(&reason),
        _ => return,
    };
    let file = fds.into_iter().next().map(File::from);
    let file = file.context("the policy's file did not come: out of descriptors");
    let followed = file.and_then(|file| compile(&file)).and_then(|compiled| {
        let names = compiled.policy.names().map(str::to_owned).collect::<Vec<_>>();
        let last = shared.rules.load();
        let next = shared.reloader.next(&last, generation, bounded, compiled);
        ensure!(
            shared.rules.replace(next),
            "policy {generation} is not newer than the one in force"
        );
        metrics::policies(names.iter().map(String::as_str));
        metrics::policy_in_force(generation, &digest);
        report::policy_followed(generation, &digest, bounded, &kept);
        Ok(())
    });
    let refused = followed.err().map(|error| {
        let mut reason = format!("{error:#}");
        if let Some((end, _)) = reason.char_indices().nth(MAX_REASON) {
            reason.truncate(end);
        }
        report::policy_kept(&reason);
        reason
    });
    // A supervisor that does not hear this is gone, and so is this process.
    let _ = runtime.block_on(shared.control.send(&ToSupervisor::Policy { generation, refused }));
}

fn source(text: &PolicyText) -> Source<'_> {
    Source { name: &text.name, bytes: text.text.as_bytes() }
}

/// Reads and compiles what the supervisor has compiled, too. `file` has a [`NewPolicy`].
pub(crate) fn compile(file: &File) -> Result<Compiled> {
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

//! Follows the policy while the agent runs.
//!
//! The directory is looked at once a second: three stat(2) calls, which need no watch that the kernel
//! could refuse (there are 128 of a user's on a whole node) and miss no kind of change. A policy that
//! has changed is read and checked as at start, and only then handed to the proxy, which compiles the
//! same text and puts it in force; everything that goes wrong leaves the last one in force, and is
//! said once.
//!
//! What was built at start stays: files, user, limits. Where the new policy gives less of these than
//! the fence that runs, what it adds for the network was meant for a fence with less, and is held back
//! ([`Policy::within`]).

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::attestation::LivePolicy;
use super::caller::Callers;
use super::links::Links;
use super::mounted::{self, State};
use super::packet;
use super::policy_files::{self, PolicyFiles};
use super::proxy_process::{self, AdminEndpoint};
use super::proxy_service::Answered;
use super::run_dir;
use super::taint::{Authors, Watched};
use crate::event::{self, Class, Event, Severity};
use crate::policy::{Loaded, Policy};
use crate::proxy::control::ToProxy;

/// How often the directory is looked at. A kubelet takes a minute and more to change it.
const LOOK: Duration = Duration::from_secs(1);

/// How long the proxy may take to compile a policy.
const PATIENCE: Duration = Duration::from_secs(60);

/// After how long one that could not be followed is tried again: what it takes to compile a policy
/// depends on what else the container does.
const AGAIN: Duration = Duration::from_secs(60);

/// The longest reason in characters, so that it fits into a message.
const MAX_REASON: usize = 4_096;

/// What following takes. The fields with `first` are as the fence was built.
#[derive(Debug)]
pub struct Following {
    /// Where the policy is.
    pub dir: PathBuf,
    /// As it was read before the agent ran.
    pub first_files: PolicyFiles,
    /// The same, compiled.
    pub first: Arc<Policy>,
    /// What the paths of binaries led to then.
    pub links: Links,
    /// Who records connects.
    pub callers: Arc<Callers>,
    /// The container's own variables.
    pub authors: Arc<Authors>,
    /// The way to the proxy, and what comes back.
    pub control: OwnedFd,
    /// See [`Self::control`].
    pub answers: Receiver<Answered>,
    /// Is told of the attestation.
    pub admin: AdminEndpoint,
    /// The attestation, and its file.
    pub attested: (Value, PathBuf),
}

struct Follower {
    set: Following,
    /// As it was when it was read last.
    state: Option<State>,
    /// As it was at the last look: one that is still being written is left alone.
    seen: Option<State>,
    /// Of the policy in force.
    digest: String,
    generation: u64,
    in_force: Arc<Policy>,
    /// The last policy that holds whole.
    whole: Arc<Policy>,
    /// What was said last of a change that is not followed.
    told: Option<String>,
    /// When one that could not be followed is tried again.
    again: Option<Instant>,
}

impl Following {
    /// Follows from now on, on a thread of its own.
    pub fn start(self) -> Result<()> {
        let first = Arc::clone(&self.first);
        let follower = Follower {
            // What has changed since it was read is seen at the first look.
            state: None,
            seen: None,
            digest: self.first_files.digest(),
            generation: 1,
            in_force: Arc::clone(&first),
            whole: first,
            told: None,
            again: None,
            set: self,
        };
        // Compiling takes the stack that it has on the main thread.
        let thread = thread::Builder::new().name("policy".into()).stack_size(8 << 20);
        let spawned = thread.spawn(move || follower.run());
        spawned.map(drop).context("cannot start the thread that follows the policy")
    }
}

impl Follower {
    fn run(mut self) {
        loop {
            self.look();
            thread::sleep(LOOK);
        }
    }

    fn look(&mut self) {
        let state = State::of(&self.set.dir);
        let due = self.again.is_some_and(|at| Instant::now() >= at);
        if self.state.as_ref() == Some(&state) && !due {
            return;
        }
        if self.seen.as_ref() != Some(&state) {
            self.seen = Some(state);
            return;
        }
        // One that cannot be read is looked at again: it may be on its way.
        let files = match mounted::read(&self.set.dir) {
            Ok(files) => files,
            Err(error) => return self.keep(&error),
        };
        if State::of(&self.set.dir) != state {
            return;
        }
        self.state = Some(state);
        self.again = None;
        if self.digest == files.digest() {
            self.told = None;
            return;
        }
        match self.follow(&files) {
            Ok(()) => self.told = None,
            Err(error) => {
                self.again = Some(Instant::now() + AGAIN);
                self.keep(&error);
            }
        }
    }

    /// Puts another policy in force, as far as this fence can.
    fn follow(&mut self, files: &PolicyFiles) -> Result<()> {
        let (loaded, links) = self.set.links.later(|resolve| files.load_by(resolve));
        let Loaded { policy, warnings } = loaded?;
        policy_files::tell_of(&warnings);
        let differences = policy.differences(&self.set.first);
        let bounded = differences.iter().any(|difference| difference.exceeds);
        let mut kept: Vec<_> = differences
            .iter()
            .map(|one| {
                let more = if one.exceeds { ", which gives more" } else { "" };
                format!("{} stays as it was at the start{more}", one.part)
            })
            .collect();
        if !files.trusts_as(&self.set.first_files) {
            kept.push(
                "upstream-ca.crt holds for the proxy; the agent's own programs keep the first one"
                    .to_owned(),
            );
        }
        let policy = Arc::new(policy);
        let (whole, new) = if bounded {
            let whole = Arc::clone(&self.whole);
            (Arc::clone(&whole), Arc::new(Policy::clone(&policy).within(whole)))
        } else {
            (Arc::clone(&policy), policy)
        };
        // Before it is in force: a connection that nobody looked at is refused by a policy that asks
        // for a look. Until the proxy has answered either of the two may judge.
        self.watch(&[&self.in_force, &new]);
        self.generation += 1;
        let digest = files.digest();
        if let Err(error) = self.hand_over(files, links, &digest, bounded, &kept) {
            self.watch(&[&self.in_force]);
            return Err(error);
        }
        self.watch(&[&new]);
        (self.in_force, self.whole) = (new, whole);
        self.attest(&digest, bounded, kept);
        self.digest = digest;
        Ok(())
    }

    fn watch(&self, policies: &[&Arc<Policy>]) {
        self.set.callers.watch(Watched::new(policies, &self.set.authors));
    }

    /// Gives the policy to the proxy and waits until it is in force.
    fn hand_over(
        &mut self,
        files: &PolicyFiles,
        links: BTreeMap<String, String>,
        digest: &str,
        bounded: bool,
        kept: &[String],
    ) -> Result<()> {
        let file = proxy_process::policy_file(&files.to_proxy(links))?;
        let generation = self.generation;
        let (digest, kept) = (digest.to_owned(), kept.to_vec());
        let change = ToProxy::Policy { generation, digest, bounded, kept };
        packet::send(&self.set.control, &change, &[file.as_fd()])
            .context("cannot give the policy to the proxy")?;
        loop {
            match self.set.answers.recv_timeout(PATIENCE) {
                // The proxy's mistake: to none that was sent.
                Ok(answered) if answered.generation != generation => {}
                Ok(Answered { refused: None, .. }) => return Ok(()),
                Ok(Answered { refused: Some(reason), .. }) => return Err(Refused(reason).into()),
                // It will come into force: another one beside it would only make both later.
                Err(RecvTimeoutError::Timeout) => {
                    let (is, at) = ("the proxy has not compiled it yet", PATIENCE.as_secs());
                    self.keep(&anyhow::anyhow!("{is}, {at} s after it was told to"));
                }
                Err(RecvTimeoutError::Disconnected) => bail!("the proxy is gone"),
            }
        }
    }

    /// Writes down what is in force, for people.
    fn attest(&mut self, digest: &str, bounded: bool, kept: Vec<String>) {
        let since = LivePolicy::now();
        let live = LivePolicy { generation: self.generation, since, bounded, kept };
        let (attested, path) = &mut self.set.attested;
        attested["policy_digest"] = json!(digest);
        attested["live_policy"] = json!(live);
        let written = serde_json::to_vec_pretty(attested)
            .map_err(anyhow::Error::from)
            .and_then(|bytes| run_dir::replace(path, 0o600, &bytes));
        match written {
            Ok(()) => self.set.admin.released(path),
            Err(error) => event::emit(
                &Event::new(Class::Config, "DEGRADED", Severity::Medium)
                    .subject("the attestation does not show the policy in force")
                    .reason(format!("{error:#}")),
            ),
        }
    }

    /// Says, once, that a change is not followed.
    fn keep(&mut self, error: &anyhow::Error) {
        let mut reason = format!("{error:#}");
        if let Some((end, _)) = reason.char_indices().nth(MAX_REASON) {
            reason.truncate(end);
        }
        if self.told.as_ref() == Some(&reason) {
            return;
        }
        self.told = Some(reason.clone());
        // The proxy has said so itself.
        if error.is::<Refused>() {
            return;
        }
        // By the proxy, whose events people follow.
        let change = ToProxy::PolicyKept { reason: reason.clone() };
        if packet::send(&self.set.control, &change, &[]).is_err() {
            event::emit(
                &Event::new(Class::Config, "POLICY", Severity::High)
                    .subject("a change of the policy is not followed: the last one stays in force")
                    .reason(reason),
            );
        }
    }
}

/// The proxy's own word.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Refused(String);

//! Keeps the CA's Secret, the caBundle of the webhook configurations and the served leaf in step,
//! through rotations too: `pki::plan` says what is next, here it is done.

use std::time::{Duration, Instant, SystemTime};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::Client;

use super::{Args, trust};
use crate::admission::server::Metrics;
use crate::pki::ca_bundle::{self, CaBundleError, Configuration, Live};
use crate::pki::plan::{Certified, Held, Seen, Step, Terms, in_every};
use crate::pki::rotation::Serving;
use crate::pki::stored::{Ca, RotationError, Store, Stored};

/// How often the CA and its bundle are looked at and put back, at most: so long may a replica serve
/// a CA that is not the right one any more.
const INTERVAL: Duration = Duration::from_secs(15);
/// The same until it is right for the first time, after a failure and in a rotation.
const RETRY: Duration = Duration::from_secs(2);

/// What this replica knows between two looks.
pub(super) struct Keeper<'a> {
    client: &'a Client,
    configurations: Vec<Configuration>,
    store: &'a Store,
    server_name: String,
    serving: &'a Serving,
    metrics: &'a Metrics,
    trust: &'a trust::Sender,
    terms: Terms,
    /// What the Secret held when it was last understood.
    held: Held<Ca>,
    seen: Seen,
}

/// The Secret holds another CA than what is served was signed by, and never heard of that one.
#[derive(Debug, thiserror::Error)]
#[error("the CA's secret holds another CA than the one served; restart to load it")]
pub(super) struct Another;

/// What the Secret was found to be.
enum Found {
    /// As read.
    There(Box<Stored>),
    /// Without a CA of ours. No other replica can have loaded another one from it.
    Broken,
    /// Unknown, or changed while it was looked at.
    Unknown,
}

impl<'a> Keeper<'a> {
    pub(super) fn new(
        (client, args, store): (&'a Client, &Args, &'a Store),
        held: Held<Ca>,
        serving: &'a Serving,
        metrics: &'a Metrics,
        trust: &'a trust::Sender,
    ) -> Self {
        Self {
            client,
            configurations: args.configurations(),
            store,
            server_name: args.server_name(),
            serving,
            metrics,
            trust,
            terms: args.terms(),
            held,
            seen: Seen::default(),
        }
    }

    /// Looks again and again. Returns when only a restart helps.
    pub(super) async fn keep(mut self) -> Another {
        let retry = (self.terms.settle / 4).clamp(Duration::from_millis(100), RETRY);
        let interval = (self.terms.ca_life / 20).clamp(retry, INTERVAL.max(retry));
        loop {
            match self.round().await {
                Ok(true) => tokio::time::sleep(interval).await,
                Ok(false) => tokio::time::sleep(retry).await,
                Err(another) => {
                    self.trust.send_modify(|known| *known = Err(another.to_string()));
                    return another;
                }
            }
        }
    }

    /// One look, and at most one step of a rotation. True when all is as it should stay.
    pub(super) async fn round(&mut self) -> Result<bool, Another> {
        // The order matters: configurations first (`ca_bundle::publish` says why).
        let live = self.read_configurations().await;
        let found = self.read_secret().await;
        if let Found::There(stored) = &found {
            if !stored.held.knows(&self.serving.ca_pem()) {
                return Err(Another);
            }
            self.held = stored.held.clone();
        }
        let mut right = !matches!(found, Found::Unknown);
        if right {
            right &= self.publish(&live, matches!(found, Found::Broken)).await;
        }
        let bundles: Vec<Vec<u8>> = if live.iter().all(Option::is_some) {
            live.iter().flatten().flat_map(Live::bundles).cloned().collect()
        } else {
            Vec::new()
        };
        if let Found::There(stored) = found {
            self.sign_with_current(&bundles);
            let first = self.configurations.first().zip(live.first().and_then(Option::as_ref));
            let owner = first.and_then(|(configuration, live)| live.owner(configuration));
            let owner = owner.filter(|owner| !stored.is_owned_by(owner));
            let adopted = match owner {
                Some(owner) => self.adopt((*stored).clone(), owner).await,
                None => false,
            };
            right &= !adopted && self.step(*stored, &bundles).await;
        } else {
            self.seen = Seen::default();
        }
        right &= self.state_trust().await;
        Ok(right)
    }

    async fn read_configurations(&self) -> Vec<Option<Live>> {
        let mut all = Vec::new();
        for configuration in &self.configurations {
            let live = configuration.live(self.client).await;
            // Said again by `state_trust`, which reads it too.
            all.push(live.inspect_err(|error| tracing::debug!(%error, "not read")).ok());
        }
        all
    }

    async fn read_secret(&self) -> Found {
        match self.store.read().await {
            Ok(Some(stored)) => Found::There(Box::new(stored)),
            Ok(None) => {
                match self.store.create(&self.held).await {
                    Ok(()) => tracing::warn!("the CA's secret was gone; made again"),
                    Err(error) => tracing::warn!(%error, "the CA's secret is gone"),
                }
                // What it holds now is for the next look.
                Found::Unknown
            }
            Err(error) => {
                tracing::warn!(%error, "the CA's secret is not as it should be");
                match error {
                    RotationError::Unusable { .. } => Found::Broken,
                    _ => Found::Unknown,
                }
            }
        }
    }

    /// Writes the bundle where there is another. What is known from `memory` only may be older than
    /// what other replicas remember: then a bundle that has the CA of the served leaf is left alone.
    async fn publish(&self, live: &[Option<Live>], memory: bool) -> bool {
        let (bundle, serving) = (self.held.bundle(), self.serving.ca_pem());
        let mut right = true;
        for (configuration, live) in self.configurations.iter().zip(live) {
            let Some(live) = live else {
                right = false;
                continue;
            };
            let bundles: Vec<Vec<u8>> = live.bundles().cloned().collect();
            if memory && in_every(&bundles, &serving) {
                continue;
            }
            match ca_bundle::publish(self.client, configuration, live, &bundle).await {
                Ok(true) => tracing::info!(%configuration, "caBundle written"),
                Ok(false) => {}
                Err(error) => {
                    right = false;
                    if matches!(error, CaBundleError::Changed { .. }) {
                        tracing::debug!(%error, "not written");
                    } else {
                        tracing::warn!(%error, "caBundle not written");
                    }
                }
            }
        }
        right
    }

    /// A leaf by the current CA, as soon as API servers trust that.
    fn sign_with_current(&self, bundles: &[Vec<u8>]) {
        let current = &self.held.current;
        let unasked = self.configurations.is_empty();
        if self.serving.ca_pem() == current.pem() || !(unasked || in_every(bundles, current.pem()))
        {
            return;
        }
        match self.serving.sign_by(current) {
            Ok(()) => {
                self.metrics.set_certificate_not_after(self.serving.not_after());
                tracing::info!(ca = current.mark(), "serving a certificate of another CA");
            }
            Err(error) => tracing::error!(%error, "no certificate by the current CA"),
        }
    }

    /// Has the Secret go with the configuration: without that, after an uninstallation, its CA is of no
    /// use to anybody. True when it was written, and what was read is of an older version.
    async fn adopt(&self, stored: Stored, owner: OwnerReference) -> bool {
        let held = stored.held.clone();
        let written = self.store.replace(stored.owned_by(owner), &held).await;
        // Where it cannot be, the Secret stays behind one day. No more than that.
        written.inspect_err(|error| tracing::debug!(%error, "the CA's secret has no owner")).is_ok()
    }

    /// The next step of a rotation. True when there is none to come soon.
    async fn step(&mut self, stored: Stored, bundles: &[Vec<u8>]) -> bool {
        // Whoever writes the bundle does not look at this Secret: nothing can be published first.
        if self.configurations.is_empty() {
            return true;
        }
        let (held, now) = (&self.held, SystemTime::now());
        let next = held.next.as_ref().map(Certified::pem);
        let seen = self.seen.look(next, bundles, Instant::now());
        let step = held.step(now, seen, &self.terms);
        let after = match step {
            Step::Rest => return held.next.is_none(),
            Step::MakeNext => match Ca::make(self.terms.ca_life) {
                Ok(next) => held.with_next(next),
                Err(error) => {
                    tracing::error!(%error, "no new CA");
                    return false;
                }
            },
            Step::Promote => held.promoted(now, &self.terms),
            Step::Retire => held.retired(now, &self.terms),
        };
        match self.store.replace(stored, &after).await {
            Ok(()) => tracing::info!(
                ?step,
                current = after.current.mark(),
                next = after.next.as_ref().map(Ca::mark),
                former = after.previous.len(),
                "the CA's rotation"
            ),
            Err(error @ RotationError::Changed(_)) => tracing::debug!(%error, "to be seen again"),
            Err(error) => tracing::warn!(%error, ?step, "the CA's rotation stands still"),
        }
        false
    }

    /// States whether the API server can trust what is served; true when it can.
    async fn state_trust(&self) -> bool {
        let mut looks = Vec::new();
        for configuration in &self.configurations {
            let chain = self.serving.chain();
            looks.push(
                ca_bundle::verify_live(self.client, configuration, &chain, &self.server_name).await,
            );
        }
        trust::state(self.trust, looks, "")
    }
}

#[cfg(test)]
#[path = "ca/tests.rs"]
mod tests;

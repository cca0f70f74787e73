//! Follows a serving certificate that somebody else makes, and a caBundle that somebody else writes.
//!
//! Nothing is written here. A new certificate is served when the live caBundle verifies it, and until
//! then the former one, as long as that is verified: so the two may change in either order, and by
//! different hands, without a moment in which API servers trust nothing.

use std::time::{Duration, Instant};

use kube::Client;

use super::{Args, trust};
use crate::admission::server::Metrics;
use crate::pki::ca_bundle::{self, CaBundleError, Configuration, Live};
use crate::pki::given::{Given, Pair, Source};

/// How often the Secret is read: when a new CA is in caBundle, the certificate by it is wanted at once.
const SECRET: Duration = Duration::from_secs(2);
/// How often the configurations are read while all is right.
const CONFIGURATIONS: Duration = Duration::from_secs(15);
/// How often both are read while something is not.
const RETRY: Duration = Duration::from_millis(500);
/// What a person has to look at when caBundle does not fit.
const HINT: &str = "; it is for whoever provides the certificate to write caBundle: value certificates.caBundle of the chart, or cert-manager's cainjector (is it running, and does its log name this configuration?)";

/// What a replica knows between two looks.
pub(super) struct Follower<'a> {
    client: &'a Client,
    configurations: Vec<Configuration>,
    source: &'a Source,
    server_name: String,
    given: &'a Given,
    metrics: &'a Metrics,
    trust: &'a trust::Sender,
    /// What the Secret holds, where something else is still served.
    waiting: Option<Pair>,
    /// What is wrong with the Secret, as it was said last.
    trouble: Option<String>,
    /// When the configurations are looked at again, if the Secret stays as it is.
    look_again: Option<Instant>,
}

impl<'a> Follower<'a> {
    pub(super) fn new(
        (client, args, source): (&'a Client, &Args, &'a Source),
        given: &'a Given,
        metrics: &'a Metrics,
        trust: &'a trust::Sender,
    ) -> Self {
        Self {
            client,
            configurations: args.configurations(),
            source,
            server_name: args.server_name(),
            given,
            metrics,
            trust,
            waiting: None,
            trouble: None,
            look_again: None,
        }
    }

    /// Looks again and again.
    pub(super) async fn keep(mut self) -> std::convert::Infallible {
        loop {
            let pause = if self.round(Instant::now()).await { SECRET } else { RETRY };
            tokio::time::sleep(pause).await;
        }
    }

    /// One look. True when all is as it should stay.
    pub(super) async fn round(&mut self, now: Instant) -> bool {
        self.read_secret().await;
        if self.waiting.is_none() && self.look_again.is_some_and(|again| now < again) {
            return true;
        }
        let mut lives = Vec::new();
        for configuration in &self.configurations {
            lives.push(configuration.live(self.client).await);
        }
        self.choose(&lives);
        let chain = self.given.now();
        let right = trust::state(self.trust, self.judge(lives, &chain), HINT);
        self.look_again = right.then(|| now + CONFIGURATIONS);
        right && self.waiting.is_none()
    }

    async fn read_secret(&mut self) {
        let trouble = match self.source.read().await {
            Ok(pair) => {
                let chain = |pair: &Pair| pair.chain().to_vec();
                let served = chain(&self.given.now()) == chain(&pair);
                if !served && self.waiting.as_ref().map(chain) != Some(chain(&pair)) {
                    tracing::info!(
                        "the secret holds another certificate; it is served as soon as caBundle verifies it"
                    );
                }
                self.waiting = (!served).then_some(pair);
                None
            }
            Err(error) => Some(error.to_string()),
        };
        if trouble != self.trouble {
            if let Some(trouble) = &trouble {
                tracing::error!(%trouble, "the certificate served before is kept");
            } else {
                tracing::info!("the secret is in order again");
            }
            self.trouble = trouble;
        }
    }

    /// Serves what waits where API servers trust it, and where they trust what is served no more.
    fn choose(&mut self, lives: &[Result<Live, CaBundleError>]) {
        let Some(waiting) = &self.waiting else { return };
        let trusted = |pair: &Pair| {
            self.configurations.iter().zip(lives).all(|(configuration, live)| {
                live.as_ref().is_ok_and(|live| {
                    let name = &self.server_name;
                    ca_bundle::verify_all(configuration, live, pair.chain(), name).is_ok()
                })
            })
        };
        let known = lives.iter().all(Result::is_ok);
        if known && (trusted(waiting) || !trusted(&self.given.now())) {
            tracing::info!("serving the certificate of the secret");
            self.metrics.set_certificate_not_after(waiting.not_after());
            self.given.serve(waiting.clone());
            self.waiting = None;
        }
    }

    fn judge(
        &self,
        lives: Vec<Result<Live, CaBundleError>>,
        pair: &Pair,
    ) -> Vec<Result<(), CaBundleError>> {
        let all = self.configurations.iter().zip(lives);
        let judged = all.map(|(configuration, live)| {
            ca_bundle::verify_all(configuration, &live?, pair.chain(), &self.server_name)
        });
        judged.collect()
    }
}

#[cfg(test)]
#[path = "given/tests.rs"]
mod tests;

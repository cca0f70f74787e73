//! Where the serving certificate comes from: a CA of our own, or a Secret that somebody else fills.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::anyhow;
use kube::Client;
use rustls::server::ResolvesServerCert;

use super::given::Follower;
use super::{Args, ca, trust};
use crate::admission::server::Metrics;
use crate::pki::given::{Given, Source};
use crate::pki::plan::Held;
use crate::pki::rotation::Serving;
use crate::pki::stored::{Ca, Store};

/// How often the leaf's age is looked at, where that is not due sooner.
const RENEW_INTERVAL: Duration = Duration::from_secs(60);
/// The same at most, for certificates that live seconds.
const RENEW_PAUSE: Duration = Duration::from_millis(200);

/// The certificate, and what has to be done about it.
pub(super) enum Certificates {
    /// By a CA of our own, whose bundle we write.
    Own { store: Store, held: Box<Held<Ca>>, serving: Arc<Serving> },
    /// By somebody else, who writes the bundle too.
    Given { source: Source, given: Arc<Given> },
}

impl Certificates {
    /// Gets it; that takes as long as it takes, and `trust` has the reason meanwhile.
    ///
    /// # Errors
    /// No leaf can be signed.
    pub(super) async fn obtain(
        client: &Client,
        args: &Args,
        trust: &trust::Sender,
    ) -> anyhow::Result<Self> {
        if let Some(secret) = &args.certificate_secret {
            let source = Source::new(client, &args.namespace, secret, &args.server_name());
            let pair = patiently(trust, || source.read()).await;
            return Ok(Self::Given { source, given: Arc::new(Given::new(pair)) });
        }
        let terms = args.terms();
        let store = Store::new(client, &args.namespace, &args.ca_secret);
        let held = patiently(trust, || store.load_or_create(terms.ca_life)).await;
        let current = held.current.clone();
        let serving = Serving::by(current, &args.service, &args.namespace, terms.leaf_life)?;
        Ok(Self::Own { store, held: Box::new(held), serving: Arc::new(serving) })
    }

    /// For TLS.
    pub(super) fn resolver(&self) -> Arc<dyn ResolvesServerCert> {
        match self {
            Self::Own { serving, .. } => Arc::clone(serving) as _,
            Self::Given { given, .. } => Arc::clone(given) as _,
        }
    }

    /// Keeps it right. Returns when only a restart helps.
    pub(super) async fn keep(
        self,
        client: &Client,
        args: &Args,
        metrics: &Metrics,
        trust: &trust::Sender,
    ) -> anyhow::Error {
        match self {
            Self::Own { store, held, serving } => {
                metrics.set_certificate_not_after(serving.not_after());
                let of = (client, args, &store);
                let keeper = ca::Keeper::new(of, *held, &serving, metrics, trust);
                tokio::select! {
                    another = keeper.keep() => another.into(),
                    () = keep_leaf(&serving, metrics) => anyhow!("the certificate is not renewed"),
                }
            }
            Self::Given { source, given } => {
                metrics.set_certificate_not_after(given.now().not_after());
                let follower = Follower::new((client, args, &source), &given, metrics, trust);
                match follower.keep().await {}
            }
        }
    }
}

/// Tries until it works: at start the API server may be away for a moment, and a restart would
/// only be slower. `trust` has the last error meanwhile: some are for a person to repair.
async fn patiently<T, E: std::fmt::Display, F>(
    trust: &trust::Sender,
    mut attempt: impl FnMut() -> F,
) -> T
where
    F: Future<Output = Result<T, E>>,
{
    let mut pause = Duration::from_millis(500);
    loop {
        match attempt().await {
            Ok(done) => return done,
            Err(error) => {
                tracing::error!(%error, "trying again");
                let why = format!("there is no certificate yet: {error}");
                trust.send_modify(|known| *known = Err(why));
            }
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_secs(15));
    }
}

async fn keep_leaf(serving: &Serving, metrics: &Metrics) {
    loop {
        let due = serving.renew_at().duration_since(SystemTime::now()).unwrap_or_default();
        tokio::time::sleep(due.clamp(RENEW_PAUSE, RENEW_INTERVAL)).await;
        match serving.renew_if_due(SystemTime::now()) {
            Ok(true) => {
                metrics.set_certificate_not_after(serving.not_after());
                tracing::info!("serving certificate renewed");
            }
            Ok(false) => {}
            Err(error) => tracing::error!(%error, "serving certificate not renewed"),
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::watch;

    use super::*;

    #[tokio::test]
    async fn what_keeps_the_certificate_from_being_made_is_shown() {
        let (trust, trusted) = watch::channel(Err(String::new()));
        let mut shown = Vec::new();
        patiently(&trust, || {
            shown.push(trusted.borrow().clone());
            std::future::ready(if shown.len() < 2 { Err("the secret is broken") } else { Ok(()) })
        })
        .await;
        let last = shown.pop().and_then(Result::err).unwrap_or_default();
        assert!(last.contains("the secret is broken"), "{last}");
    }
}

//! Keeps the CA's Secret and the caBundle of the webhook configurations in step with what is served.

use std::time::Duration;

use kube::Client;
use tokio::sync::watch;

use super::Args;
use crate::pki::ca_bundle;
use crate::pki::rotation::{self, RotationError, Serving, Stored};

/// How often the CA and its bundle are looked at and put back: so long may a replica serve a CA that
/// is not the right one any more.
const CA_BUNDLE_INTERVAL: Duration = Duration::from_secs(15);
/// The same until it is right for the first time, or after a failure.
const CA_BUNDLE_RETRY: Duration = Duration::from_secs(2);

/// Publishes the CA in each configuration and states whether the API server can trust us. Returns
/// when the Secret holds another CA, which only a restart loads.
pub(super) async fn keep(
    client: &Client,
    args: &Args,
    serving: &Serving,
    trust: &watch::Sender<Result<(), String>>,
) -> anyhow::Error {
    let server_name = format!("{}.{}.svc", args.service, args.namespace);
    loop {
        let stored = rotation::keep_stored(client, &args.namespace, &args.ca_secret, serving).await;
        let publish = may_publish(&stored);
        let mut right = publish;
        match &stored {
            Ok(Stored::Same) => {}
            Ok(Stored::Restored) => {
                tracing::warn!(secret = args.ca_secret, "the CA's secret was gone; made again");
            }
            Ok(Stored::Another) => {
                let why = format!(
                    "secret `{}/{}` holds another CA than the one served; restart to load it",
                    args.namespace, args.ca_secret
                );
                trust.send_modify(|known| *known = Err(why.clone()));
                return anyhow::Error::msg(why);
            }
            Err(error) => tracing::warn!(%error, "the CA's secret is not as it should be"),
        }
        let mut state = Ok(());
        for configuration in &args.configurations() {
            if publish {
                match ca_bundle::publish(client, configuration, serving.ca_pem()).await {
                    Ok(true) => tracing::info!(%configuration, "caBundle written"),
                    Ok(false) => {}
                    Err(error) => {
                        right = false;
                        tracing::warn!(%error, "caBundle not written");
                    }
                }
            }
            let chain = serving.chain();
            let live = ca_bundle::verify_live(client, configuration, &chain, &server_name).await;
            if let Err(error) = live {
                right = false;
                // That it could not be read says nothing about what it holds: once ready, a replica
                // stays so while the API server is away.
                let unknown = matches!(error, ca_bundle::CaBundleError::Read { .. });
                if !(unknown && trust.borrow().is_ok()) {
                    state = Err(error.to_string());
                }
            }
        }
        trust.send_if_modified(|known| {
            let changed = *known != state;
            if changed {
                match &state {
                    Ok(()) => tracing::info!("ready"),
                    Err(why) => tracing::warn!(%why, "not ready"),
                }
                known.clone_from(&state);
            }
            changed
        });
        tokio::time::sleep(if right { CA_BUNDLE_INTERVAL } else { CA_BUNDLE_RETRY }).await;
    }
}

/// Whether the CA in memory is the one to publish. A Secret that cannot be read may hold another; one
/// that holds no CA has given no replica another.
fn may_publish(stored: &Result<Stored, RotationError>) -> bool {
    match stored {
        Ok(Stored::Same | Stored::Restored) | Err(RotationError::Unusable { .. }) => true,
        Ok(Stored::Another) | Err(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ca_is_published_only_when_the_secret_allows_it() {
        let unusable = RotationError::Unusable {
            namespace: "ns".into(),
            name: "ca".into(),
            reason: "empty".into(),
        };
        let away = RotationError::Secret {
            what: "read",
            namespace: "ns".into(),
            name: "ca".into(),
            source: Box::new(kube::Error::LinesCodecMaxLineLengthExceeded),
        };
        assert!(may_publish(&Ok(Stored::Same)) && may_publish(&Ok(Stored::Restored)));
        assert!(may_publish(&Err(unusable)));
        assert!(!may_publish(&Ok(Stored::Another)) && !may_publish(&Err(away)));
    }
}

//! The webhook's CA is replaced again and again while pods are admitted, and none is refused.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use k8s_openapi::api::core::v1::Secret;
use kube::Api;
use kube::api::{Patch, PatchParams};
use ringfence::pki::stored::{CURRENT, ROTATE};
use serde_json::json;
use tokio::time::{sleep, timeout};

use crate::place::{PATIENCE, fenced};
use crate::rig::RELEASE_NAMESPACE;

/// `tests/e2e/setup` gives the CA a life of two minutes and a second to settle, so that one takes
/// some seconds.
const ROTATIONS: usize = 6;
/// Who creates pods beside each other: several connections, and each new bundle needs new ones.
const CREATORS: usize = 4;

#[tokio::test]
async fn no_pod_is_refused_while_the_ca_is_replaced() {
    fenced("rotation", &[], async |place| {
        let secrets: Api<Secret> = Api::namespaced(place.rig.client.clone(), RELEASE_NAMESPACE);
        let current = async || {
            let found =
                secrets.get_metadata("ringfence-webhook-ca").await.expect("the CA's secret");
            found.metadata.annotations.unwrap_or_default().remove(CURRENT)
        };
        let (done, admitted) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU32::new(0)));
        let creators: Vec<_> = (0..CREATORS)
            .map(|creator| {
                let (place, done, admitted) =
                    (place.clone(), Arc::clone(&done), Arc::clone(&admitted));
                tokio::spawn(async move {
                    while !done.load(Ordering::Relaxed) {
                        let pod = place.agent_pod(&format!("agent-{creator}"), |_, _| {});
                        // Panics when it is refused.
                        place.create_dry(&pod).await;
                        admitted.fetch_add(1, Ordering::Relaxed);
                    }
                })
            })
            .collect();
        let mut seen = vec![current().await];
        for _ in 0..ROTATIONS {
            let ask = Patch::Merge(json!({ "metadata": { "annotations": { ROTATE: "now" } } }));
            let asked =
                secrets.patch_metadata("ringfence-webhook-ca", &PatchParams::default(), &ask).await;
            asked.expect("the secret can be marked");
            let next = timeout(PATIENCE, async {
                loop {
                    let now = current().await;
                    if !seen.contains(&now) {
                        return now;
                    }
                    sleep(Duration::from_millis(250)).await;
                }
            });
            seen.push(next.await.expect("a new CA signs"));
            let before = admitted.load(Ordering::Relaxed);
            timeout(PATIENCE, async {
                while admitted.load(Ordering::Relaxed) < before + 20 {
                    sleep(Duration::from_millis(50)).await;
                }
            })
            .await
            .expect("pods are admitted");
        }
        done.store(true, Ordering::Relaxed);
        for creator in creators {
            creator.await.expect("no pod was refused");
        }
        println!("{} CAs, {} pods", seen.len(), admitted.load(Ordering::Relaxed));
    })
    .await;
}

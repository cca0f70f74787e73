//! What has to be known of the cluster itself: whether image volumes work, and on which
//! architectures pods run.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::Node;
use kube::api::ListParams;
use kube::{Api, Client};
use tokio::sync::watch;

use crate::admission::Delivery;
use crate::admission::server::ClusterFacts;

/// How often versions are looked at.
const INTERVAL: Duration = Duration::from_secs(300);
/// The same after a failure.
const RETRY: Duration = Duration::from_secs(10);
/// The first minor version of Kubernetes 1 with image volumes on by default.
const IMAGE_VOLUMES_SINCE: u32 = 36;
const PAGE: u32 = 500;

/// The facts, and the future that keeps them up to date. They stay as they were while the cluster
/// cannot be read.
pub(super) fn follow(
    client: Client,
    auto: bool,
    delivery: Delivery,
    default_architecture: String,
) -> (watch::Receiver<Arc<ClusterFacts>>, impl Future<Output = ()> + Send + 'static) {
    let first = ClusterFacts { delivery, architectures: vec![default_architecture] };
    let (sender, receiver) = watch::channel(Arc::new(first));
    let follow = async move {
        loop {
            let pause = match read(&client).await {
                Ok((image_volumes, architectures)) => {
                    update(&sender, auto, image_volumes, architectures);
                    INTERVAL
                }
                Err(error) => {
                    tracing::warn!(%error, "versions of the cluster could not be read");
                    RETRY
                }
            };
            tokio::time::sleep(pause).await;
        }
    };
    (receiver, follow)
}

fn update(
    sender: &watch::Sender<Arc<ClusterFacts>>,
    auto: bool,
    image_volumes: bool,
    architectures: Vec<String>,
) {
    sender.send_if_modified(|known| {
        let delivery = match (auto, image_volumes) {
            (false, _) => known.delivery,
            (true, true) => Delivery::Image,
            (true, false) => Delivery::Init,
        };
        let architectures =
            if architectures.is_empty() { known.architectures.clone() } else { architectures };
        let now = ClusterFacts { delivery, architectures };
        let changed = **known != now;
        if changed {
            tracing::info!(delivery = ?now.delivery, architectures = ?now.architectures, "the cluster");
            *known = Arc::new(now);
        }
        changed
    });
}

/// Whether server and all nodes have image volumes, and the nodes' architectures, sorted.
async fn read(client: &Client) -> Result<(bool, Vec<String>), kube::Error> {
    let server = client.apiserver_version().await?;
    let mut image_volumes = has_image_volumes(&server.git_version);
    let mut architectures = Vec::new();
    let api: Api<Node> = Api::all(client.clone());
    let mut page = ListParams::default().limit(PAGE);
    loop {
        let nodes = api.list(&page).await?;
        for info in nodes.items.iter().filter_map(|node| node.status.as_ref()?.node_info.as_ref()) {
            // Only Linux nodes run what is fenced.
            if info.operating_system != "linux" {
                continue;
            }
            image_volumes &= has_image_volumes(&info.kubelet_version);
            architectures.push(info.architecture.clone());
        }
        match nodes.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => page = ListParams::default().limit(PAGE).continue_token(&token),
            None => break,
        }
    }
    architectures.sort_unstable();
    architectures.dedup();
    Ok((image_volumes, architectures))
}

/// Of a version as `v1.36.3`, `v1.36.3-gke.100`. What is not understood has none.
fn has_image_volumes(version: &str) -> bool {
    let mut parts = version.trim_start_matches('v').split('.');
    let mut number = || parts.next().and_then(|part| part.parse::<u32>().ok());
    match (number(), number()) {
        (Some(1), Some(minor)) => minor >= IMAGE_VOLUMES_SINCE,
        (Some(major), Some(_)) => major > 1,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn image_volumes_come_with_1_36() {
        for (version, expected) in [
            ("v1.36.3", true),
            ("v1.36.0-gke.100", true),
            ("v1.40.1+k3s1", true),
            ("v2.0.0", true),
            ("v1.35.9", false),
            ("v1.9.0", false),
            ("", false),
            ("latest", false),
        ] {
            assert_eq!(has_image_volumes(version), expected, "{version}");
        }
    }

    #[test]
    fn a_fixed_delivery_stays_and_no_node_means_no_news() {
        let first = ClusterFacts { delivery: Delivery::Init, architectures: vec!["amd64".into()] };
        let (sender, receiver) = watch::channel(Arc::new(first));
        update(&sender, false, true, vec!["arm64".into()]);
        assert_eq!(receiver.borrow().delivery, Delivery::Init);
        update(&sender, true, true, Vec::new());
        let now = receiver.borrow();
        assert_eq!(
            (now.delivery, now.architectures.as_slice()),
            (Delivery::Image, &["arm64".to_owned()][..])
        );
    }
}

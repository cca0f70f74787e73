//! Annotations: what they switch, and that one which is not understood or not there yet is said so.

use k8s_openapi::api::core::v1::Pod;
use serde_json::json;

use crate::place::fenced;

const BY_PROXY: &str = "curl -sS -m 20 https://upstream.ringfence-upstream.svc.cluster.local/hello";
const CAPTURED: &str =
    "curl -sS -m 20 --noproxy '*' https://upstream.ringfence-upstream.svc.cluster.local/hello";
const BODY: &str = "\"hello\": \"from the upstream\"";

#[tokio::test]
async fn capture_is_switched_off_by_the_namespace_and_by_the_pod() {
    fenced("captured", &[], async |place| {
        // Without an annotation what ignores the proxy is judged, not refused.
        let pod = place.start_agent("agent").await;
        for script in [BY_PROXY, CAPTURED] {
            let done = place.enter(&pod, script).await;
            assert!(done.code == 0 && done.text.contains(BODY), "{script}: {done:?}");
        }
        // A pod can tighten.
        let tight = place.agent_pod("tight", |container, pod| {
            container["readinessProbe"] =
                json!({"httpGet": {"path": "/health", "port": 8001}, "periodSeconds": 1});
            pod["metadata"]["annotations"] = json!({"ringfence.dev/transparent": "off"});
        });
        place.create::<Pod>(&tight).await.expect("admitted");
        let tight = place.ready("tight").await;
        let done = place.enter(&tight, CAPTURED).await;
        assert!(done.code != 0 && !done.text.contains(BODY), "{done:?}");
    })
    .await;
    fenced("uncaptured", &[("transparent", "off")], async |place| {
        let pod = place.start_agent("agent").await;
        let done = place.enter(&pod, BY_PROXY).await;
        assert!(done.code == 0 && done.text.contains(BODY), "{done:?}");
        let done = place.enter(&pod, CAPTURED).await;
        assert!(done.code != 0 && !done.text.contains(BODY), "{done:?}");
        // And cannot loosen.
        let loose = place.agent_pod("loose", |_, pod| {
            pod["metadata"]["annotations"] = json!({"ringfence.dev/transparent": "on"});
        });
        let answer = place.refused(&loose).await;
        assert!(answer.contains("only the namespace can loosen"), "{answer}");
    })
    .await;
}

#[tokio::test]
async fn what_this_version_does_not_have_is_refused() {
    for (key, value, word) in [
        ("live-policy", "on", "the only value is allowed"),
        ("transparent", "yes", "the values are on and off"),
        ("mode", "entrypoint", "the only value is subprocess"),
        ("volume-mounts", "yes", "the only value is allowed"),
        ("sidecar-ports", "8094-8090", "write 8090-8094"),
        ("sidecar-ports", "80", "below 1024"),
    ] {
        fenced("unknown", &[(key, value)], async move |place| {
            let answer = place.refused(&place.agent_pod("agent", |_, _| {})).await;
            assert!(answer.contains(key) && answer.contains(word), "{answer}");
        })
        .await;
    }
}

//! A pod follows a change of its policy: from the source in the release namespace to the next request
//! of its agent; and nobody but the webhook writes what lies between.

use k8s_openapi::api::core::v1::{ConfigMap, Pod};
use kube::Api;
use kube::api::{Patch, PatchParams};
use serde_json::json;
use tokio::time::{sleep, timeout};

use crate::place::{PATIENCE, Place, fenced};
use crate::rig::RELEASE_NAMESPACE;

const HOST: &str = "upstream.ringfence-upstream.svc.cluster.local";
const BODY: &str = "\"hello\": \"from the upstream\"";

async fn reaches(place: &Place, pod: &Pod) -> bool {
    let script = format!("curl -sS -m 20 https://{HOST}/hello");
    let done = place.enter(pod, &script).await;
    done.code == 0 && done.text.contains(BODY)
}

/// Until the agent's requests pass, or do not any more. The kubelet looks at the volumes of a pod every
/// `syncFrequency`, 15 s in the rig.
async fn comes_to(place: &Place, pod: &Pod, passes: bool) {
    let began = std::time::Instant::now();
    let waited = timeout(PATIENCE, async {
        while reaches(place, pod).await != passes {
            sleep(std::time::Duration::from_secs(1)).await;
        }
    });
    waited.await.unwrap_or_else(|_| panic!("requests pass: still not {passes}"));
    println!("requests pass: {passes}, after {:?}", began.elapsed());
}

#[tokio::test]
async fn a_pod_follows_the_source_of_its_policy() {
    let name = "e2e-live";
    fenced("live", &[("policy", name), ("live-policy", "allowed")], async move |place| {
        let policy = place.rig.default_policy().await;
        assert!(policy.contains(HOST), "{policy}");
        place.rig.put_policy(name, &policy).await;
        let pod = place.start_agent("agent").await;
        assert!(reaches(&place, &pod).await);
        let sources: Api<ConfigMap> = Api::namespaced(place.rig.client.clone(), RELEASE_NAMESPACE);
        let change = async |yaml: &str| {
            let patch = Patch::Merge(json!({"data": {"policy.yaml": yaml}}));
            sources.patch(name, &PatchParams::default(), &patch).await.map(drop)
        };
        change(&policy.replace(HOST, "nobody.test")).await.expect("changed");
        comes_to(&place, &pod, false).await;
        // One that does not load is not even written, and nothing comes of it.
        let refused = change("network_policies: [").await.expect_err("refused");
        assert!(refused.to_string().contains("policy.yaml"), "{refused}");
        change(&policy).await.expect("changed");
        comes_to(&place, &pod, true).await;
        let pods = place.api::<Pod>();
        let now = pods.get("agent").await.expect("the pod");
        assert_eq!(now.metadata.uid, pod.metadata.uid, "it is the same pod");
        let restarts = |pod: &Pod| {
            let status = pod.status.as_ref().and_then(|status| status.container_statuses.as_ref());
            status.and_then(|list| list.first()).map(|one| one.restart_count)
        };
        assert_eq!(restarts(&now), Some(0));
        let told = place.logs("agent", "agent").await;
        assert!(told.contains("the policy has changed and is in force"), "{told}");
        place.rig.remove_policy(name).await;
    })
    .await;
}

#[tokio::test]
async fn nobody_writes_a_policy_that_pods_follow() {
    let name = "e2e-live-guard";
    fenced("liveguard", &[("policy", name), ("live-policy", "allowed")], async move |place| {
        let policy = place.rig.default_policy().await;
        place.rig.put_policy(name, &policy).await;
        place.start_agent("agent").await;
        let live = format!("ringfence-live-{name}");
        let grant = ["create", "rolebinding", "author", "--clusterrole=edit"];
        let account = format!("--serviceaccount={}:default", place.name);
        let bound = place.kubectl(&[&grant[..], &[account.as_str()]].concat(), "").await;
        assert_eq!(bound.code, 0, "{bound:?}");
        let author = format!("--as=system:serviceaccount:{}:default", place.name);
        let patch = r#"{"data":{"policy.yaml":"version: 1\n"}}"#;
        let patched = ["patch", "configmap", &live, "--type=merge", "-p", patch];
        let digest = "ringfence.dev/policy-digest=x";
        let annotated = ["annotate", "configmap", &live, "--overwrite", digest];
        let made = ["create", "configmap", "ringfence-live-mine", "--from-literal=policy.yaml=x"];
        let deleted = ["delete", "configmap", &live];
        // The administrator too: the source is the place.
        for words in [&patched[..], &annotated, &made] {
            for who in [&[][..], &[author.as_str()]] {
                let done = place.kubectl(&[words, who].concat(), "").await;
                assert!(done.code != 0 && done.text.contains("ringfence: "), "{words:?}: {done:?}");
            }
        }
        let done = place.kubectl(&[&deleted[..], &[author.as_str()]].concat(), "").await;
        assert!(done.code != 0 && done.text.contains("pods follow this policy"), "{done:?}");
        // Other ConfigMaps are nobody's business.
        let other = ["create", "configmap", "mine", "--from-literal=a=b", author.as_str()];
        let done = place.kubectl(&other, "").await;
        assert_eq!(done.code, 0, "{done:?}");
        // Whoever may change the namespace may take one away; the next pod has it made again.
        let done = place.kubectl(&deleted, "").await;
        assert_eq!(done.code, 0, "{done:?}");
        place.start_agent("second").await;
        place.api::<ConfigMap>().get(&live).await.expect("it is there again");
        place.rig.remove_policy(name).await;
    })
    .await;
}

#[tokio::test]
async fn what_is_in_the_way_of_a_followed_policy_is_named() {
    let name = "e2e-live-dry";
    fenced("livedry", &[("policy", name), ("live-policy", "allowed")], async move |place| {
        let policy = place.rig.default_policy().await;
        place.rig.put_policy(name, &policy).await;
        // A dry run writes nothing.
        place.create_dry(&place.agent_pod("agent", |_, _| {})).await;
        let live = format!("ringfence-live-{name}");
        let found = place.api::<ConfigMap>().get_opt(&live).await.expect("an answer");
        assert!(found.is_none(), "{found:?}");
        place.rig.remove_policy(name).await;
        let answer = place.refused_soon(&place.agent_pod("agent", |_, _| {})).await;
        assert!(answer.contains(name) && answer.contains("does not exist"), "{answer}");
    })
    .await;
}

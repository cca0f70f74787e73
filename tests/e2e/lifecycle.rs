//! How a fenced container ends: as its agent does, or closed.

use std::time::Instant;

use k8s_openapi::api::core::v1::Pod;
use kube::api::{DeleteParams, Patch, PatchParams};
use serde_json::json;

use crate::host::{self, PROXY};
use crate::place::{Place, fenced};

#[tokio::test]
async fn a_deleted_pod_ends_with_the_agents_own_exit_code() {
    fenced("delete", &[], async |place| {
        place.start_agent("agent").await;
        // The finalizer keeps the object until its exit code has been read.
        let api = place.api::<Pod>();
        let finalizers = |list| Patch::Merge(json!({"metadata": {"finalizers": list}}));
        let params = PatchParams::default();
        api.patch("agent", &params, &finalizers(json!(["ringfence.dev/e2e"])))
            .await
            .expect("patched");
        let began = Instant::now();
        api.delete("agent", &DeleteParams::default()).await.expect("deleted");
        let (code, _) = place.ended("agent").await;
        // scripts/demo measures it on a quiet machine; with SIGKILL after the grace period the
        // code would be 137.
        println!("ended after {:?}", began.elapsed());
        api.patch("agent", &params, &finalizers(json!(null))).await.expect("patched");
        assert_eq!(code, 7);
    })
    .await;
}

#[tokio::test]
async fn the_exit_code_is_the_agents() {
    fenced("code", &[], async |place| {
        let cases = [
            ("success", json!(["true"]), 0),
            ("code", json!(["sh", "-c", "exit 42"]), 42),
            ("signal", json!(["sh", "-c", "kill -9 $$$$"]), 137),
            ("missing", json!(["no-such-program"]), 127),
            ("no-program", json!(["/etc/passwd"]), 126),
        ];
        for (name, command, _) in &cases {
            let pod = place.agent_pod(name, |container, _| container["command"] = command.clone());
            place.create::<Pod>(&pod).await.expect("admitted");
        }
        for (name, _, wanted) in &cases {
            let (code, message) = place.ended(name).await;
            assert_eq!(code, *wanted, "{name}: {message}");
        }
    })
    .await;
}

/// Starts an agent with a child of its own, and returns its pod and container.
async fn start_family(place: &Place) -> (Pod, String) {
    let pod = place.agent_pod("agent", |container, _| {
        // A grandchild in a session of its own, as a daemon would be.
        container["command"] = json!(["sh", "-c", "setsid -f sleep 1000; exec sleep 1000"]);
        container["readinessProbe"] =
            json!({"exec": {"command": ["pgrep", "-f", "sleep 1000"]}, "periodSeconds": 1, "timeoutSeconds": 5});
    });
    place.create::<Pod>(&pod).await.expect("admitted");
    let pod = place.ready("agent").await;
    let container = host::container_id(&pod);
    (pod, container)
}

#[tokio::test]
async fn killing_the_supervisor_leaves_no_agent() {
    fenced("supervisor", &[], async |place| {
        let (_, container) = start_family(&place).await;
        let supervisor =
            host::processes(&container).into_iter().find(|process| process.inner_pid == 1);
        host::kill(supervisor.expect("a supervisor").pid);
        host::all_gone(&container).await;
        let (code, _) = place.ended("agent").await;
        assert_eq!(code, 137);
    })
    .await;
}

#[tokio::test]
async fn killing_the_proxy_leaves_no_agent_and_says_so() {
    fenced("proxy", &[], async |place| {
        let (_, container) = start_family(&place).await;
        let proxy = host::processes(&container).into_iter().find(|process| process.uid == PROXY);
        host::kill(proxy.expect("a proxy").pid);
        host::all_gone(&container).await;
        let (code, message) = place.ended("agent").await;
        assert_eq!(code, 125);
        assert!(message.contains("proxy"), "{message}");
        assert!(place.logs("agent", "agent").await.contains("proxy"));
    })
    .await;
}

#[tokio::test]
async fn killing_the_keeper_leaves_no_agent() {
    fenced("keeper", &[], async |place| {
        let (_, container) = start_family(&place).await;
        let keeper = host::processes(&container)
            .into_iter()
            .find(|process| process.uid == 0 && process.inner_pid != 1);
        host::kill(keeper.expect("a keeper").pid);
        host::all_gone(&container).await;
        let (code, message) = place.ended("agent").await;
        assert_eq!(code, 125, "{message}");
        assert!(message.contains("keeper"), "{message}");
    })
    .await;
}

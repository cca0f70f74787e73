//! Pods of another shape than the plain agent's: several fences, a read-only root, a restart, a
//! pod network that has the fence's own addresses.

use std::process::Command;

use k8s_openapi::api::core::v1::Pod;
use serde_json::json;

use crate::host;
use crate::place::{Place, fenced, is_ready, status, supervisor};

const GET: &str = "curl -sS -m 20 https://upstream.ringfence-upstream.svc.cluster.local/hello";
const BODY: &str = "\"hello\": \"from the upstream\"";

#[tokio::test]
async fn two_fenced_containers_in_one_pod_do_not_meet() {
    fenced("two", &[], async |place| {
        let serve = |port: &str| {
            json!(["python3", "-u", "-m", "http.server", port, "--directory", "/usr/share/doc"])
        };
        let pod = place.agent_pod("agent", |container, pod| {
            container["command"] = serve("8001");
            container["readinessProbe"] = json!({"tcpSocket": {"port": 8001}, "periodSeconds": 1});
            pod["spec"]["containers"] = json!([{
                "name": "second", "image": place.rig.agent_image, "command": serve("8002"),
                "readinessProbe": {"tcpSocket": {"port": 8002}, "periodSeconds": 1},
            }]);
        });
        place.create::<Pod>(&pod).await.expect("admitted");
        let pod = place.ready("agent").await;
        assert!(supervisor(&pod, "agent").is_some() && supervisor(&pod, "second").is_some());
        for (container, port) in [("agent", 8002), ("second", 8001)] {
            let get = place.exec("agent", container, &["sh", "-c", GET]).await;
            assert!(get.text.contains(BODY), "{container}: {get:?}");
            // The other's port is not on this fence's loopback.
            let other = format!("curl -sS -m 20 --noproxy '*' http://127.0.0.1:{port}/");
            let other = place.exec("agent", container, &["sh", "-c", &other]).await;
            assert!(other.code == 7, "{container}: {other:?}");
        }
        // Each has its own.
        let network = "grep -c 10.200.0.2 /proc/net/fib_trie; readlink /proc/self/ns/net";
        let first = place.exec("agent", "agent", &["sh", "-c", network]).await;
        let second = place.exec("agent", "second", &["sh", "-c", network]).await;
        assert!(first.text.contains("net:[") && first.text != second.text, "{first:?} {second:?}");
    })
    .await;
}

#[tokio::test]
async fn a_read_only_root_is_no_hindrance() {
    fenced("readonly", &[], async |place| {
        let pod = place.agent_pod("agent", |container, pod| {
            container["securityContext"] = json!({"readOnlyRootFilesystem": true});
            container["readinessProbe"] =
                json!({"httpGet": {"path": "/health", "port": 8001}, "periodSeconds": 1});
            // The policy promises them; the root cannot have them made.
            container["volumeMounts"] = json!([
                {"name": "scratch", "mountPath": "/workspace"},
                {"name": "scratch", "mountPath": "/tmp"},
            ]);
            pod["spec"]["volumes"] = json!([{"name": "scratch", "emptyDir": {}}]);
        });
        place.create::<Pod>(&pod).await.expect("admitted");
        let pod = place.ready("agent").await;
        let done = place.enter(&pod, GET).await;
        assert!(done.text.contains(BODY), "{done:?}");
        let done = place.enter(&pod, "touch /workspace/x && ! touch /home/agent/x").await;
        assert_eq!(done.code, 0, "{done:?}");
    })
    .await;
}

/// Kills the agent and waits until its container has come up again in the same pod.
async fn restart(place: &Place, pod: &Pod) -> Pod {
    let before = status(pod, "agent").map_or(0, |status| status.restart_count);
    // By its own hand: the supervisor ends with it.
    place.enter(pod, "kill -9 $(pgrep -o python3)").await;
    place
        .wait_for("agent", "up again", |pod: Option<&Pod>| {
            pod.is_some_and(|pod| {
                is_ready(pod) && status(pod, "agent").is_some_and(|now| now.restart_count > before)
            })
        })
        .await
}

#[tokio::test]
async fn a_container_comes_up_again_in_its_pod_and_beside_its_own_addresses() {
    fenced("restart", &[], async |place| {
        let pod = place.agent_pod("agent", |container, pod| {
            container["readinessProbe"] =
                json!({"httpGet": {"path": "/health", "port": 8001}, "periodSeconds": 1});
            pod["spec"]["restartPolicy"] = "Always".into();
        });
        place.create::<Pod>(&pod).await.expect("admitted");
        let pod = place.ready("agent").await;

        // The pod's network gets the fence's addresses, as where a cluster's pods live in
        // 10.200.0.0/24; the pod keeps its network over the restart.
        let supervisor = |pod: &Pod| {
            let all = host::processes(&host::container_id(pod));
            all.into_iter().find(|process| process.inner_pid == 1).expect("a supervisor")
        };
        for address in ["10.200.0.1/24", "10.200.0.2/24"] {
            let done = Command::new("nsenter")
                .args([
                    "-t",
                    &supervisor(&pod).pid.to_string(),
                    "-n",
                    "ip",
                    "address",
                    "add",
                    address,
                ])
                .args(["dev", "lo"])
                .status()
                .expect("nsenter(1)");
            assert!(done.success(), "{address}");
        }
        let pod = restart(&place, &pod).await;
        let done = place.enter(&pod, GET).await;
        assert!(done.text.contains(BODY), "{done:?}");
        // What the fence before left in the run directory is gone.
        let pod = restart(&place, &pod).await;
        let run = format!("/proc/{}/root/run/ringfence", supervisor(&pod).pid);
        let left = std::fs::read_dir(run).expect("the run directory").count();
        assert_eq!(left, 1);
    })
    .await;
}

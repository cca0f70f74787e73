//! The escape table in a pod: `kubectl exec POD -- SUPERVISOR doctor`, as a person types it. The
//! webhook makes an `enter` of every exec, and `enter` knows the doctor.

use std::time::Duration;

use k8s_openapi::api::core::v1::{Event, Pod};
use kube::api::ListParams;
use serde_json::{Value, json};
use tokio::time::sleep;

use crate::place::{PATIENCE, Place, fenced, is_ready, supervisor};

/// What may be missing on a node or in the image. Whatever else is skipped, the test fails: in a pod
/// there is a keeper, a proxy and a neighbour to be seen.
const OF_THE_MACHINE: [&str; 6] = [
    "has put /dev/null there",
    "there is no such file here",
    "needs Landlock ABI",
    "no set-user-ID program",
    "32-bit system calls",
    "the policy opens it",
];

/// Runs the doctor by this name and judges its report.
async fn examine(place: &Place, pod: &str, program: &str) {
    let done = place.exec(pod, "agent", &[program, "doctor", "--json"]).await;
    // kubectl adds a line of its own to stderr when the code is not 0.
    let start = done.text.find('{').unwrap_or_else(|| panic!("no report: {done:?}"));
    let mut reports = serde_json::Deserializer::from_str(&done.text[start..]).into_iter::<Value>();
    let report = match reports.next() {
        Some(Ok(report)) => report,
        other => panic!("{other:?}: {done:?}"),
    };
    let mut wrong = Vec::new();
    for row in report["rows"].as_array().expect("rows") {
        let seen = row["seen"].as_str().unwrap_or_default();
        match row["verdict"].as_str() {
            Some("as_expected") => {}
            Some("skipped") if OF_THE_MACHINE.iter().any(|why| seen.contains(why)) => {
                println!("SKIPPED: {}: {seen}", row["id"]);
            }
            _ => wrong.push(format!("{}: {seen}, must be {}", row["id"], row["expected"])),
        }
    }
    println!("{program}: {}", report["summary"]);
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert_eq!(done.code, 0, "{}", report["summary"]);
    assert!(report["summary"]["rows"].as_u64() >= Some(120), "{}", report["summary"]);
    assert_eq!(report["attestation"]["landlock"]["unconfined"], false);
}

#[tokio::test]
async fn nothing_gets_out_of_a_fenced_pod() {
    fenced("doctor", &[], async |place| {
        let pod: Pod = place.start_agent("agent").await;
        let program = supervisor(&pod, "agent").expect("the agent is fenced");
        examine(&place, "agent", &program).await;
        // Nobody has to know where the injector put it.
        examine(&place, "agent", "ringfence-supervisor").await;
        // The agent goes on as before.
        let done = place.enter(&pod, "echo alive").await;
        assert_eq!((done.code, done.text.as_str()), (0, "alive\n"), "{done:?}");
    })
    .await;
}

#[tokio::test]
async fn nothing_gets_out_of_a_pod_with_users_of_its_own() {
    fenced("doctor-users", &[], async |place| {
        let pod = place.agent_pod("agent", |container, pod| {
            pod["spec"]["hostUsers"] = false.into();
            container["readinessProbe"] =
                json!({"httpGet": {"path": "/health", "port": 8001}, "periodSeconds": 1});
        });
        place.create::<Pod>(&pod).await.expect("the pod is admitted");
        let pod = match started(&place).await {
            Ok(pod) => pod,
            Err(why) => {
                println!("SKIPPED: this node makes no pods with users of their own: {why}");
                return;
            }
        };
        let map = place.enter(&pod, "cat /proc/self/uid_map").await;
        let host: Vec<&str> = map.text.split_whitespace().skip(1).take(1).collect();
        assert!(map.code == 0 && host != ["0"], "{map:?}");
        examine(&place, "agent", &supervisor(&pod, "agent").expect("the agent is fenced")).await;
    })
    .await;
}

/// Waits until the pod is ready; what the node says when it cannot make such pods.
async fn started(place: &Place) -> Result<Pod, String> {
    const WORDS: [&str; 4] = ["user namespace", "userns", "idmap", "hostUsers"];
    for _ in 0..PATIENCE.as_secs() {
        let pod = place.api::<Pod>().get("agent").await.expect("the pod can be read");
        if pod.spec.as_ref().and_then(|spec| spec.host_users) != Some(false) {
            return Err("the API server does not keep hostUsers".to_owned());
        }
        if is_ready(&pod) {
            return Ok(pod);
        }
        let events = place.api::<Event>().list(&ListParams::default()).await;
        let messages = events.expect("events can be listed").items.into_iter();
        let mut messages = messages.filter_map(|event| event.message);
        if let Some(message) = messages.find(|text| WORDS.iter().any(|word| text.contains(word))) {
            return Err(message);
        }
        sleep(Duration::from_secs(1)).await;
    }
    panic!("the pod with users of its own is not ready after {PATIENCE:?}");
}

//! The escape table in a pod: `kubectl exec POD -- SUPERVISOR doctor`, as a person types it. The
//! webhook makes an `enter` of every exec, and `enter` knows the doctor.

use k8s_openapi::api::core::v1::Pod;
use serde_json::Value;

use crate::place::{Place, fenced, supervisor};

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

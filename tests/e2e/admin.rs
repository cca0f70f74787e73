//! The admin endpoint of a fenced pod: read from the pod's network namespace, where a port-forward
//! ends, and out of the agent's reach.

use std::process::Command;

use k8s_openapi::api::core::v1::Pod;
use serde_json::Value;

use crate::host::{self, PROXY};
use crate::place::fenced;

const PORT: &str = "15200";

/// curl in the network namespace of the pod's proxy; the body, or what went wrong.
fn get(pod: &Pod, path: &str) -> Result<String, String> {
    let all = host::processes(&host::container_id(pod));
    let proxy = all.iter().find(|process| process.uid == PROXY).ok_or("no proxy")?;
    let done = Command::new("nsenter")
        .args(["-t", &proxy.pid.to_string(), "-n", "curl", "-sS", "-m", "20", "--noproxy", "*"])
        .args(["--fail-with-body", &format!("http://127.0.0.1:{PORT}{path}")])
        .output()
        .expect("nsenter(1)");
    let body = String::from_utf8_lossy(&done.stdout).into_owned();
    if done.status.success() {
        return Ok(body);
    }
    Err(format!("{}: {body}{}", done.status, String::from_utf8_lossy(&done.stderr)))
}

#[tokio::test]
async fn the_admin_endpoint_is_the_nodes_and_not_the_agents() {
    fenced("admin", &[], async |place| {
        let pod = place.start_agent("agent").await;
        assert_eq!(get(&pod, "/readyz").as_deref(), Ok("ok\n"));
        let attestation = get(&pod, "/attestation").expect("the attestation");
        let attestation: Value = serde_json::from_str(&attestation).expect("JSON");
        assert_eq!(attestation["landlock"]["unconfined"], false, "{attestation}");
        let command = pod.spec.as_ref().and_then(|spec| spec.containers[0].command.clone());
        let command = command.expect("the injector wrote it");
        let digest = command.iter().position(|word| word == "--policy-digest").expect("a digest");
        assert_eq!(attestation["policy_digest"], command[digest + 1].as_str());

        // Its own loopback, the pod's address round the proxy, and both through it.
        let direct =
            |address: &str| format!("curl -sS -m 20 --noproxy '*' http://{address}:{PORT}/healthz");
        let proxied = |address: &str| {
            format!(
                "curl -sS -m 20 --noproxy '' -x http://10.200.0.1:3128 -o /dev/null \
                 -w 'status %{{http_code}}' http://{address}:{PORT}/healthz"
            )
        };
        let scripts =
            [direct("127.0.0.1"), direct("$POD_IP"), proxied("127.0.0.1"), proxied("$POD_IP")];
        let scripts: Vec<&str> = scripts.iter().map(String::as_str).collect();
        let done = place.enter_all(&pod, &scripts).await;
        // 7: refused. 28 would be curl's own --max-time.
        assert_eq!(done[0].code, 7, "{:?}", done[0]);
        assert!(![0, 28].contains(&done[1].code), "{:?}", done[1]);
        for proxied in &done[2..] {
            assert!(proxied.text.contains("status 403"), "{proxied:?}");
        }
        let metrics = get(&pod, "/metrics").expect("the metrics");
        let denied = metrics.lines().any(|line| {
            line.starts_with("ringfence_decisions_total{layer=\"l4\",verdict=\"denied\"")
                && !line.ends_with(" 0")
        });
        assert!(denied, "{metrics}");
    })
    .await;
}

//! What leaves the fence and what does not, seen from inside a pod, with the reason in its log.

use k8s_openapi::api::core::v1::{ConfigMap, Pod, Service};
use kube::Api;
use serde_json::json;

use crate::place::{Done, Place, fenced};

const HOST: &str = "upstream.ringfence-upstream.svc.cluster.local";
/// The same server by a name that no policy has.
const OTHER: &str = "other.ringfence-upstream.svc.cluster.local";
const BODY: &str = "\"hello\": \"from the upstream\"";
/// curl's exit code when its own --max-time is over: what is refused must not end like this.
const TIMED_OUT: i32 = 28;

/// Fails, and not by waiting.
fn assert_refused(what: &str, done: &Done) {
    assert_ne!(done.code, 0, "{what} is not refused: {done:?}");
    assert_ne!(done.code, TIMED_OUT, "{what} is not refused but silent: {done:?}");
}

#[tokio::test]
async fn what_the_policy_allows_passes() {
    fenced("allowed", &[], async |place| {
        let pod = place.start_agent("agent").await;
        let cases = [
            ("curl", format!("curl -sS https://{HOST}/hello"), BODY),
            (
                "python3",
                format!(
                    "python3 -c 'import urllib.request as u; \
                     print(u.urlopen(\"https://{HOST}/hello\").read().decode())'"
                ),
                BODY,
            ),
            (
                "git",
                format!("git clone -q https://{HOST}/repo.git /tmp/clone && cat /tmp/clone/README"),
                "cloned through the fence",
            ),
            ("HEAD", format!("curl -sSI https://{HOST}/hello"), "200"),
            // Several requests on one connection.
            ("keep-alive", format!("curl -sS https://{HOST}/hello https://{HOST}/hello"), BODY),
        ];
        let scripts: Vec<&str> = cases.iter().map(|(_, script, _)| script.as_str()).collect();
        let outcomes = place.enter_all(&pod, &scripts).await;
        for ((what, _, wanted), done) in cases.iter().zip(outcomes) {
            assert!(done.code == 0 && done.text.contains(wanted), "{what}: {done:?}");
        }
        // The name the server saw is the one that was asked for.
        let done = place.enter(&pod, &format!("curl -sS https://{HOST}/hello")).await;
        assert!(done.text.contains(&format!("\"host\": \"{HOST}\"")), "{done:?}");
        // TLS was terminated: the certificate is the fence's, and the client trusts it.
        let done = place.enter(&pod, &format!("curl -sSv https://{HOST}/hello 2>&1")).await;
        let issuer = done.text.lines().find(|line| line.contains("issuer:"));
        let issuer = issuer.unwrap_or_else(|| panic!("no issuer: {done:?}"));
        assert!(!issuer.contains("Example upstream CA"), "{issuer}");
    })
    .await;
}

#[tokio::test]
async fn the_rest_is_refused_with_its_reason() {
    fenced("refused", &[], async |place| {
        let pod = place.start_agent("agent").await;
        let services: Api<Service> =
            Api::namespaced(place.rig.client.clone(), "ringfence-upstream");
        let address = services.get("upstream").await.expect("the upstream").spec;
        let address = address.and_then(|spec| spec.cluster_ip).expect("an address");
        let direct = format!("{address}:443");
        let cases = [
            ("another host", format!("curl -sS -m 20 https://{OTHER}/hello"), vec![OTHER]),
            (
                "another port",
                format!("curl -sS -m 20 https://{HOST}:8443/hello"),
                vec![HOST, "8443"],
            ),
            (
                "another program",
                format!("cp /usr/bin/curl /tmp/other && /tmp/other -sS -m 20 https://{HOST}/hello"),
                vec![HOST, "/tmp/other"],
            ),
            (
                "POST",
                format!("curl -sS -m 20 --fail-with-body -d x https://{HOST}/hello"),
                vec!["POST", HOST],
            ),
            (
                "DELETE",
                format!("curl -sS -m 20 --fail-with-body -X DELETE https://{HOST}/hello"),
                vec!["DELETE", HOST],
            ),
            (
                "a direct connection",
                format!("curl -sSk -m 20 --noproxy '*' https://{address}/hello"),
                vec![&direct],
            ),
            (
                "plain HTTP",
                format!("curl -sS -m 20 --fail-with-body http://{OTHER}/hello"),
                vec![OTHER],
            ),
            (
                "the node's API server by address",
                "curl -sSk -m 20 https://10.96.0.1/version".to_owned(),
                vec!["10.96.0.1:443"],
            ),
        ];
        let scripts: Vec<&str> = cases.iter().map(|(_, script, _)| script.as_str()).collect();
        let outcomes = place.enter_all(&pod, &scripts).await;
        for ((what, _, words), done) in cases.iter().zip(outcomes) {
            assert_refused(what, &done);
            assert!(!done.text.contains(BODY), "{what}: {done:?}");
            let line = place.denial("agent", words).await;
            println!("{what}: exit {}, {line}", done.code);
        }
        // What the client is told names the cause too.
        let script = format!("curl -sS -m 20 -d x https://{HOST}/hello");
        let done = place.enter(&pod, &script).await;
        assert!(done.text.contains("\"error\":\"policy_denied\""), "{done:?}");
        assert!(done.text.contains("\"rule\":\"POST /hello\""), "{done:?}");
    })
    .await;
}

#[tokio::test]
async fn packets_that_are_no_tcp_go_nowhere() {
    fenced("packets", &[], async |place| {
        let pod = place.start_agent("agent").await;
        let send = |code: &str| format!("python3 -c 'import socket\n{code}'");
        let cases = [
            (
                "UDP",
                send(
                    "socket.socket(type=socket.SOCK_DGRAM).sendto(b\"x\", (\"10.96.0.10\", 5000))",
                ),
                "PermissionError",
            ),
            (
                "raw",
                send("socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)"),
                "PermissionError",
            ),
            ("packet", send("socket.socket(socket.AF_PACKET, socket.SOCK_RAW)"), "Error"),
            ("IPv6", send("socket.create_connection((\"2001:db8::1\", 443), 20)"), "OSError"),
        ];
        let scripts: Vec<&str> = cases.iter().map(|(_, script, _)| script.as_str()).collect();
        let outcomes = place.enter_all(&pod, &scripts).await;
        for ((what, _, wanted), done) in cases.iter().zip(outcomes) {
            assert!(done.code != 0 && done.text.contains(wanted), "{what}: {done:?}");
            assert!(!done.text.contains("timed out"), "{what}: {done:?}");
        }
    })
    .await;
}

/// A pod with the MCP server beside the agent.
async fn with_mcp(place: &Place) -> Pod {
    let program = include_str!("../../examples/mcp/server.py");
    let map = json!({"metadata": {"name": "mcp"}, "data": {"server.py": program}});
    place.create::<ConfigMap>(&map).await.expect("made");
    let pod = place.agent_pod("agent", |container, pod| {
        container["env"] = json!([{"name": "AMBIENT_MCP_URL", "value": "http://localhost:8090"}]);
        pod["spec"]["volumes"] = json!([{"name": "mcp", "configMap": {"name": "mcp"}}]);
        pod["spec"]["containers"] = json!([{
            "name": "mcp",
            "image": place.rig.agent_image,
            "command": ["python3", "-u", "/opt/mcp/server.py"],
            "readinessProbe": {"tcpSocket": {"port": 8090}, "periodSeconds": 1},
            "volumeMounts": [{"name": "mcp", "mountPath": "/opt/mcp"}],
        }]);
    });
    place.create::<Pod>(&pod).await.expect("admitted");
    place.ready("agent").await
}

#[tokio::test]
async fn the_mcp_sidecar_is_reached_at_the_pods_address() {
    fenced("mcp", &[("unfenced-containers", "mcp")], async |place| {
        let pod = with_mcp(&place).await;
        let address = pod.status.as_ref().and_then(|s| s.pod_ip.clone()).expect("an address");
        let done = place.enter(&pod, "echo \"$AMBIENT_MCP_URL\"; curl -sS $AMBIENT_MCP_URL/").await;
        assert_eq!(done.code, 0, "{done:?}");
        assert!(done.text.starts_with(&format!("http://{address}:8090\n")), "{done:?}");
        assert!(done.text.contains("example-mcp"), "{done:?}");
        // The sidecar is what the annotation says: as it was, and not in the fence.
        let done =
            place.exec("agent", "mcp", &["curl", "-sSk", &format!("https://{OTHER}/")]).await;
        assert!(done.text.contains(BODY), "{done:?}");
        // Another port of the pod's address is not in the policy.
        let done =
            place.enter(&pod, &format!("curl -sS --fail-with-body http://{address}:8001/")).await;
        assert_refused("another port of the pod", &done);
        place.denial("agent", &[&format!("{address}:8001")]).await;
    })
    .await;
}

//! What a namespace opens by annotation: runners that start their agents themselves, sidecars on the
//! pod's loopback, volumes.

use k8s_openapi::api::core::v1::{ConfigMap, Pod, Secret};
use serde_json::{Value, json};

use crate::place::{Place, fenced, strict, supervisor};

const GET: &str = "curl -sS -m 20 https://upstream.ringfence-upstream.svc.cluster.local/hello";
const OTHER: &str = "curl -sS -m 20 https://other.ringfence-upstream.svc.cluster.local/hello";
const BODY: &str = "\"hello\": \"from the upstream\"";
const RULES: &str = include_str!("../../examples/policy.rego");

/// As the reference deployment's wrapper starts an agent; two at once, and then the runner waits.
fn runner() -> String {
    let wrapper = r#"
wrapper() {
  if [ "$OPENSHELL_ENABLED" = "true" ]; then
    /openshell-sandbox \
      --policy-rules "${OPENSHELL_POLICY_RULES:-/etc/openshell/policy.rego}" \
      --policy-data "${OPENSHELL_POLICY_DATA:-/etc/openshell/policy.yaml}" \
      --log-level "${OPENSHELL_LOG_LEVEL:-warn}" -- sh -c "$@"
  fi
}
"#;
    let agent = |name: &str| {
        format!(
            "wrapper 'echo {name} uid $(id -u) $(grep CapEff /proc/self/status); {GET}; {OTHER} || echo \
             {name} other refused; touch /usr/x 2>/dev/null || echo {name} file refused; sleep 2'; \
             echo {name} ended $?"
        )
    };
    format!(
        "{wrapper}\n({}) & ({}) & wait\n({})\necho runner uid $(id -u)\ntouch /tmp/up\nexec sleep 1000",
        agent("one"),
        agent("two"),
        agent("three")
    )
}

#[tokio::test]
async fn a_runner_starts_its_agents_through_the_supervisor() {
    let policy = "e2e-runner";
    fenced("runner", &[("mode", "subprocess"), ("policy", policy)], async move |place| {
        let yaml = place.rig.default_policy().await;
        place.rig.put_policy_files(policy, &yaml, &[("policy.rego", RULES)]).await;
        let mut manifest = place.agent_pod("agent", |container, _| {
            container["command"] = json!(["sh", "-c", runner()]);
            container["readinessProbe"] =
                json!({"exec": {"command": ["test", "-f", "/tmp/up"]}, "periodSeconds": 1});
        });
        // Whoever makes it reads that the runner is outside; twice, since it may be applied again.
        let done = place.apply(&manifest).await;
        for word in ["created", "outside the fence", "kubectl exec", "/openshell-sandbox"] {
            assert!(done.text.contains(word), "{word} in: {done:?}");
        }
        manifest["metadata"]["labels"]["more"] = "b".into();
        let done = place.apply(&manifest).await;
        assert!(done.code == 0 && done.text.contains("configured"), "{done:?}");

        let pod = place.ready("agent").await;
        assert_eq!(supervisor(&pod, "agent"), None, "its own command runs");
        let log = place.logs("agent", "agent").await;
        for name in ["one", "two", "three"] {
            for line in [
                format!("{name} uid 1000 CapEff: 0000000000000000"),
                format!("{name} other refused"),
                format!("{name} file refused"),
                format!("{name} ended 0"),
            ] {
                assert!(log.contains(&line), "{line} in: {log}");
            }
        }
        assert_eq!(log.matches(BODY).count(), 3, "{log}");
        assert!(log.contains("runner uid 0"), "{log}");
        // The bare container, as the warning says.
        let bare = "id -u; grep -c 10.200.0.2 /proc/net/fib_trie; ls -l /openshell-sandbox";
        let done = place.exec("agent", "agent", &["sh", "-c", bare]).await;
        assert!(done.text.starts_with("0\n0\n-rwxr-xr-x"), "{done:?}");
        // And no other than root puts a program there.
        let done = place.exec("agent", "agent", &["sh", "-c", "echo x >/openshell-sandbox"]).await;
        assert_ne!(done.code, 0, "{done:?}");
        let status = pod.metadata.annotations.unwrap_or_default()["ringfence.dev/status"].clone();
        assert!(status.contains("\"mode\":\"subprocess\""), "{status}");
        place.rig.remove_policy(policy).await;
    })
    .await;
}

#[tokio::test]
async fn a_runner_is_nothing_for_strict() {
    strict("strictrunner", &[("mode", "subprocess")], async |place| {
        let answer = place.refused(&place.agent_pod("agent", |_, _| {})).await;
        assert!(answer.contains("label the namespace enabled"), "{answer}");
    })
    .await;
}

/// The default policy with a sidecar on localhost.
async fn with_sidecar(place: &Place) -> String {
    let entry = "network_policies:\n  sidecar:\n    endpoints:\n      - host: localhost\n        \
                 port: 8090\n        protocol: rest\n        enforcement: enforce\n        \
                 rules: [{ allow: { method: GET, path: /ok } }]\n    binaries: [{ path: /usr/bin/curl }]\n";
    let policy = place.rig.default_policy().await;
    let made = policy.replace("network_policies:\n", entry);
    assert_ne!(policy, made);
    made
}

/// Listens on the pod's loopback only: nobody else reaches it.
const SERVER: &str = "
import http.server
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = b'the sidecar saw ' + self.path.encode()
        self.send_response(200)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)
http.server.ThreadingHTTPServer(('127.0.0.1', 8090), Handler).serve_forever()
";

#[tokio::test]
async fn a_sidecar_on_the_pods_loopback_is_reached_as_localhost() {
    let policy = "e2e-sidecar";
    let annotations =
        [("unfenced-containers", "side"), ("sidecar-ports", "8090-8091"), ("policy", policy)];
    fenced("sidecar", &annotations, async move |place| {
        let yaml = with_sidecar(&place).await;
        place.rig.put_policy(policy, &yaml).await;
        let pod = place.agent_pod("agent", |container, pod| {
            container["env"] =
                json!([{"name": "AMBIENT_MCP_URL", "value": "http://localhost:8090"}]);
            container["readinessProbe"] =
                json!({"httpGet": {"path": "/health", "port": 8001}, "periodSeconds": 1});
            pod["spec"]["containers"] = json!([{
                "name": "side", "image": place.rig.agent_image,
                "command": ["python3", "-u", "-c", SERVER],
                "readinessProbe": {"exec": {"command":
                    ["curl", "-sf", "http://127.0.0.1:8090/up"]}, "periodSeconds": 1},
            }]);
        });
        place.create::<Pod>(&pod).await.expect("admitted");
        let pod = place.ready("agent").await;
        // By the URL as somebody wrote it.
        let done = place.enter(&pod, "curl -sS -f -m 20 $AMBIENT_MCP_URL/ok").await;
        assert!(done.code == 0 && done.text.contains("the sidecar saw /ok"), "{done:?}");
        let done = place.enter(&pod, "curl -sS -m 20 $AMBIENT_MCP_URL/other").await;
        assert!(done.text.contains("policy_denied") && !done.text.contains("saw"), "{done:?}");
        place.denial("agent", &["localhost:8090/other"]).await;
        // Another program, another port, the fence's own listener.
        let python =
            "import urllib.request as u; print(u.urlopen('http://localhost:8090/ok').read())";
        let done = place.enter(&pod, &format!("python3 -c \"{python}\"")).await;
        assert!(done.code != 0 && !done.text.contains("the sidecar saw"), "{done:?}");
        place.denial("agent", &["python3", "localhost:8090"]).await;
        let done = place.enter(&pod, "curl -sS -m 20 http://localhost:8091/ok").await;
        assert!(done.code != 0 && done.code != 28, "{done:?}");
        let done = place.enter(&pod, "python3 -m http.server 8090 --bind 127.0.0.1").await;
        assert!(done.text.contains("Address already in use"), "{done:?}");
        // A container that wants the port for itself is told so.
        let taken = place.agent_pod("taken", |container, _| {
            container["ports"] = json!([{"containerPort": 8091}]);
        });
        let answer = place.refused(&taken).await;
        assert!(answer.contains("8091") && answer.contains("sidecar-ports"), "{answer}");
        place.rig.remove_policy(policy).await;
    })
    .await;
}

/// An agent with a volume of each kind.
fn with_volumes(place: &Place, name: &str) -> Value {
    place.agent_pod(name, |container, pod| {
        container["readinessProbe"] =
            json!({"httpGet": {"path": "/health", "port": 8001}, "periodSeconds": 1});
        container["volumeMounts"] = json!([
            {"name": "data", "mountPath": "/srv/data"},
            {"name": "data", "mountPath": "/srv/frozen", "readOnly": true},
            {"name": "config", "mountPath": "/srv/config"},
            {"name": "secret", "mountPath": "/srv/secret"},
            {"name": "holds", "mountPath": "/opt/holds"},
            {"name": "secret", "mountPath": "/opt/holds/secret"},
        ]);
        pod["spec"]["securityContext"] = json!({"fsGroup": 1000});
        pod["spec"]["volumes"] = json!([
            {"name": "data", "emptyDir": {}},
            {"name": "holds", "emptyDir": {}},
            {"name": "config", "configMap": {"name": "words"}},
            {"name": "secret", "secret": {"secretName": "words"}},
        ]);
    })
}

async fn volumes_join(place: Place) {
    let words = json!({"metadata": {"name": "words"}, "stringData": {"word": "xyzzy"}});
    place.create::<Secret>(&words).await.expect("a Secret");
    let words = json!({"metadata": {"name": "words"}, "data": {"word": "plugh"}});
    place.create::<ConfigMap>(&words).await.expect("a ConfigMap");
    place.create::<Pod>(&with_volumes(&place, "agent")).await.expect("admitted");
    let pod = place.ready("agent").await;
    let script = "echo x >/srv/data/x && cat /srv/frozen/x /srv/config/word; \
                  echo y 2>/dev/null >/srv/frozen/y || echo frozen; \
                  cat /srv/secret/word || echo no secret; cat /opt/holds/secret/word || echo no other; \
                  ls /opt/holds || echo not held; \
                  cat /var/run/secrets/kubernetes.io/serviceaccount/token || echo no token";
    let done = place.enter(&pod, script).await;
    for word in ["x\nplugh", "frozen", "no secret", "no other", "not held", "no token"] {
        assert!(done.text.contains(word), "{word} in: {done:?}");
    }
    assert!(!done.text.contains("xyzzy"), "{done:?}");
}

#[tokio::test]
async fn volumes_of_the_pod_join_its_files_but_no_secret_does() {
    fenced("volumes", &[("volume-mounts", "allowed")], volumes_join).await;
    strict("strictvolumes", &[("volume-mounts", "allowed")], volumes_join).await;
    // Without the annotation the policy alone says what is open.
    fenced("novolumes", &[], async |place| {
        let pod = place.agent_pod("agent", |container, pod| {
            container["readinessProbe"] =
                json!({"httpGet": {"path": "/health", "port": 8001}, "periodSeconds": 1});
            container["volumeMounts"] = json!([{"name": "data", "mountPath": "/srv/data"}]);
            pod["spec"]["volumes"] = json!([{"name": "data", "emptyDir": {}}]);
        });
        place.create::<Pod>(&pod).await.expect("admitted");
        let pod = place.ready("agent").await;
        let done = place.enter(&pod, "ls /srv/data").await;
        assert_ne!(done.code, 0, "{done:?}");
    })
    .await;
}

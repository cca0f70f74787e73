//! Whatever makes a pod, it comes up fenced; without the label nothing of it is touched.

use k8s_openapi::api::apps::v1::{Deployment, StatefulSet};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{ConfigMap, Pod, Service};
use kube::Api;
use kube::api::PostParams;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::host;
use crate::place::{Place, fenced, is_ready, supervisor, unlabelled};
use crate::rig::Rig;

/// A controller's template with the plain agent.
fn template(place: &Place, app: &str) -> Value {
    let mut pod = place.agent_pod(app, |container, pod| {
        container["readinessProbe"] =
            json!({"httpGet": {"path": "/health", "port": 8001}, "periodSeconds": 1});
        pod["spec"]["restartPolicy"] = "Always".into();
    });
    pod["metadata"] = json!({"labels": {"app": app}});
    json!({
        "metadata": {"name": app},
        "spec": {"selector": {"matchLabels": {"app": app}}, "template": pod},
    })
}

/// Ready, run by the supervisor, and seen from inside as it should be.
async fn assert_fenced(place: &Place, app: &str) {
    let name = place.pod_of(app).await.metadata.name.expect("a name");
    let pod = place.ready(&name).await;
    assert!(supervisor(&pod, "agent").is_some(), "{app}: {:?}", pod.spec);
    let done = place.enter(&pod, "id -u; grep CapEff /proc/self/status").await;
    assert_eq!(done.code, 0, "{app}: {done:?}");
    assert_eq!(done.text, "1000\nCapEff:\t0000000000000000\n", "{app}");
}

#[tokio::test]
async fn the_pod_of_a_deployment_is_fenced() {
    fenced("deployment", &[], async |place| {
        place.create::<Deployment>(&template(&place, "agent")).await.expect("made");
        assert_fenced(&place, "agent").await;
    })
    .await;
}

#[tokio::test]
async fn the_pod_of_a_stateful_set_is_fenced() {
    fenced("statefulset", &[], async |place| {
        let mut set = template(&place, "agent");
        set["spec"]["serviceName"] = "agent".into();
        place.create::<StatefulSet>(&set).await.expect("made");
        assert_fenced(&place, "agent").await;
    })
    .await;
}

#[tokio::test]
async fn the_pod_of_a_job_is_fenced_and_completes() {
    fenced("job", &[], async |place| {
        let mut pod = place.agent_pod("agent", |container, _| {
            container["command"] = json!(["sh", "-c"]);
            container["args"] = json!(["id -u; grep -E 'CapEff|Seccomp:' /proc/self/status"]);
        });
        pod["metadata"] = json!({"labels": {"app": "agent"}});
        let job =
            json!({"metadata": {"name": "agent"}, "spec": {"backoffLimit": 0, "template": pod}});
        place.create::<Job>(&job).await.expect("made");
        place
            .wait_for("agent", "complete", |job: Option<&Job>| {
                let status = job.and_then(|job| job.status.as_ref());
                status.is_some_and(|status| status.succeeded == Some(1))
            })
            .await;
        let name = place.pod_of("agent").await.metadata.name.expect("a name");
        let log = place.logs(&name, "agent").await;
        assert!(log.contains("1000\nCapEff:\t0000000000000000\nSeccomp:\t2\n"), "{log}");
    })
    .await;
}

#[tokio::test]
async fn a_bare_pod_is_fenced_and_its_manifest_can_be_applied_twice() {
    fenced("bare", &[], async |place| {
        let pod = place.start_agent("agent").await;
        assert_fenced(&place, "agent").await;

        // The manifest that somebody keeps in a file.
        let again = place.agent_pod("twice", |_, _| {});
        for answer in ["created", "unchanged"] {
            let done = place.apply(&again).await;
            assert!(done.code == 0 && done.text.contains(answer), "{done:?}");
        }
        let mut changed = again;
        changed["metadata"]["labels"]["more"] = "yes".into();
        let done = place.apply(&changed).await;
        assert!(done.code == 0 && done.text.contains("configured"), "{done:?}");
        let updated = place.api::<Pod>().get("twice").await.expect("there");
        assert_eq!(supervisor(&updated, "agent"), supervisor(&pod, "agent"));
        assert_eq!(updated.metadata.labels.unwrap_or_default()["more"], "yes");
    })
    .await;
}

#[tokio::test]
async fn a_pod_in_an_unlabelled_namespace_is_byte_identical() {
    // The same request as `tests/e2e/setup` sent before Ringfence was installed.
    let rig = Rig::new().await;
    let baselines: Api<ConfigMap> = Api::namespaced(rig.client.clone(), "e2e-baseline");
    let before = baselines.get("untouched").await.expect("tests/e2e/setup records it");
    let before = before.data.unwrap_or_default()["pod.json"].clone();
    let params = PostParams { dry_run: true, field_manager: Some("e2e".into()) };
    let request = kube::core::Request::new("/api/v1/namespaces/e2e-baseline/pods")
        .create(&params, include_bytes!("untouched.json").to_vec())
        .expect("a request");
    let after = rig.client.request_text(request).await.expect("admitted");
    assert_eq!(without_chance(&after), without_chance(&before));
    assert!(!after.contains("ringfence"), "{after}");
}

/// The bytes without what is drawn or read from a clock at each request.
fn without_chance(raw: &str) -> String {
    let pod: Value = serde_json::from_str(raw).expect("JSON");
    let mut text = raw.trim_end().to_owned();
    let mut replace = |value: &Value, by: &str| {
        let value = value.as_str().expect("a text");
        text = text.replace(value, by);
    };
    replace(&pod["metadata"]["uid"], "UID");
    replace(&pod["metadata"]["creationTimestamp"], "TIME");
    replace(&pod["metadata"]["managedFields"][0]["time"], "TIME");
    let token = pod["spec"]["volumes"].as_array().into_iter().flatten().find(|volume| {
        volume["name"].as_str().is_some_and(|name| name.starts_with("kube-api-access-"))
    });
    replace(&token.expect("a token's volume")["name"], "TOKEN");
    text
}

#[tokio::test]
async fn the_same_pod_runs_as_it_is_where_there_is_no_label() {
    unlabelled("plain", async |place| {
        let pod = place.start_agent("agent").await;
        assert_eq!(supervisor(&pod, "agent"), None);
        let text = serde_json::to_string(&pod.spec).expect("JSON");
        for trace in ["ringfence-supervisor", "/run/ringfence", "OPENSHELL_", "POD_IP"] {
            assert!(!text.contains(trace), "{text}");
        }
        assert_eq!(pod.metadata.annotations, None);
    })
    .await;
}

#[tokio::test]
async fn a_service_and_an_http_probe_reach_the_agents_port() {
    fenced("service", &[], async |place| {
        let service = json!({
            "metadata": {"name": "agent"},
            "spec": {"selector": {"app": "agent"}, "ports": [{"port": 80, "targetPort": 8001}]},
        });
        let service = place.create::<Service>(&service).await.expect("made");
        // Ready by its http probe.
        let pod = place.start_agent("agent").await;
        assert!(is_ready(&pod));
        let address = service.spec.and_then(|spec| spec.cluster_ip).expect("an address");
        // Endpoints and the node's rules follow readiness by a moment.
        let mut answer = String::new();
        for _ in 0..40 {
            answer = get(&format!("{address}:80"), "/whoami").await.unwrap_or_default();
            if answer.contains("\"uid\"") {
                break;
            }
            tokio::time::sleep(std::time::Duration::from_millis(250)).await;
        }
        assert!(answer.contains("\"uid\": 1000"), "{answer}");
        // It answers from a network that is not the pod's.
        let container = host::container_id(&pod);
        let pods = host::processes(&container)
            .into_iter()
            .find(|process| process.inner_pid == 1)
            .map(|supervisor| host::network(supervisor.pid))
            .expect("a supervisor");
        assert!(!answer.contains(&pods), "{pods} in {answer}");
    })
    .await;
}

/// Runtimes open the low ports of a pod to every user, and a pod may set `net.*` of its own.
#[tokio::test]
async fn an_agent_serves_on_port_80_and_has_the_pods_network_settings() {
    fenced("low-port", &[], async |place| {
        let pod = place.agent_pod("agent", |container, pod| {
            container["command"] =
                json!(["python3", "-m", "http.server", "80", "--directory", "/usr/share/doc"]);
            container["readinessProbe"] = json!({"tcpSocket": {"port": 80}, "periodSeconds": 1});
            pod["spec"]["securityContext"] = json!({"sysctls": [
                {"name": "net.ipv4.ip_local_port_range", "value": "20000 30000"},
            ]});
        });
        place.create::<Pod>(&pod).await.expect("admitted");
        let pod = place.ready("agent").await;
        let address = pod.status.as_ref().and_then(|status| status.pod_ip.clone());
        let address = format!("{}:80", address.expect("an address"));
        let answer = get(&address, "/").await.expect("an answer");
        assert!(answer.contains("Directory listing"), "{answer}");
        let range = "cat /proc/sys/net/ipv4/ip_local_port_range";
        let done = place.enter(&pod, range).await;
        assert!(done.text.contains("20000\t30000"), "{done:?}");
    })
    .await;
}

/// A GET as simple as HTTP allows.
async fn get(address: &str, path: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(address).await?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: agent\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    Ok(answer)
}

#[tokio::test]
async fn exec_probes_and_hooks_run_inside_the_fence() {
    fenced("probe", &[], async |place| {
        let inside = "grep -q 10.200.0.2 /proc/net/fib_trie && test \"$(id -u)\" = 1000";
        let pod = place.agent_pod("agent", |container, _| {
            container["readinessProbe"] =
                json!({"exec": {"command": ["sh", "-c", inside]}, "periodSeconds": 1, "timeoutSeconds": 5});
            container["lifecycle"] = json!({"postStart": {"exec": {
                "command": ["sh", "-c", format!("{inside} && touch /tmp/hook-ran-inside")],
            }}});
        });
        place.create::<Pod>(&pod).await.expect("admitted");
        let pod = place.ready("agent").await;
        let done = place.enter(&pod, "ls /tmp/hook-ran-inside").await;
        assert_eq!(done.code, 0, "{done:?}");
    })
    .await;
}

#[tokio::test]
async fn kubectl_exec_enters_the_fence_once() {
    fenced("exec", &[], async |place| {
        let pod = place.start_agent("agent").await;
        let program = supervisor(&pod, "agent").expect("fenced");
        let inside = "grep -c 10.200.0.2 /proc/net/fib_trie; id -u; exit 9";
        let enter = [program.as_str(), "enter", "--run-dir", "/run/ringfence", "--"];
        let script = ["sh", "-c", inside];
        for command in [script.to_vec(), [&enter[..], &script[..]].concat()] {
            let done = place.exec("agent", "agent", &command).await;
            assert_eq!(done.code, 9, "{done:?}");
            assert!(done.text.contains("\n1000\n") && !done.text.starts_with('0'), "{done:?}");
        }
        // What is started that way is refused the same things.
        let done =
            place.enter(&pod, "cat /var/run/secrets/kubernetes.io/serviceaccount/token").await;
        assert!(done.code != 0 && done.text.contains("Permission denied"), "{done:?}");
    })
    .await;
}

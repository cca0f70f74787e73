//! Namespaces labelled `strict`: nothing runs outside the fence that the administrator did not
//! exempt, and nothing of the pod reaches around it.

use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};

use crate::place::{Place, fenced, strict, supervisor};

/// An agent whose init container and sidecar say who they are and what they may.
fn family(place: &Place, name: &str) -> Value {
    let facts =
        "id -u; grep -E 'CapEff|Seccomp:' /proc/self/status; grep -c 10.200.0.2 /proc/net/fib_trie";
    place.agent_pod(name, |container, pod| {
        container["readinessProbe"] =
            json!({"httpGet": {"path": "/health", "port": 8001}, "periodSeconds": 1});
        pod["spec"]["initContainers"] = json!([
            {"name": "fetch", "image": place.rig.agent_image, "command": ["sh", "-c", facts]},
            {"name": "side", "image": place.rig.agent_image, "restartPolicy": "Always",
                "command": ["sh", "-c", format!("{facts}; exec sleep 1000")],
                "startupProbe": {"exec": {"command": ["true"]}, "periodSeconds": 1, "timeoutSeconds": 5}},
        ]);
    })
}

#[tokio::test]
async fn init_containers_and_sidecars_run_inside_the_fence() {
    strict("family", &[], async |place| {
        place.create::<Pod>(&family(&place, "agent")).await.expect("admitted");
        let pod = place.ready("agent").await;
        assert!(supervisor(&pod, "agent").is_some());
        for container in ["fetch", "side"] {
            let log = place.logs("agent", container).await;
            let inside = log.contains("1000\nCapEff:\t0000000000000000\nSeccomp:\t2\n");
            assert!(inside && !log.trim_end().ends_with("\n0"), "{container}: {log}");
        }
        // So do commands that somebody sends there.
        let done = place
            .exec("agent", "side", &["sh", "-c", "id -u; grep CapEff /proc/self/status"])
            .await;
        assert_eq!(done.text, "1000\nCapEff:\t0000000000000000\n", "{done:?}");
        // And under `enabled` the same pod has one fence.
    })
    .await;
    fenced("onefence", &[], async |place| {
        let pod = place.create_dry(&family(&place, "agent")).await;
        let init = pod.spec.and_then(|spec| spec.init_containers).unwrap_or_default();
        let fetch = init.iter().find(|container| container.name == "fetch").expect("it is there");
        assert_eq!(
            fetch.command.as_ref().and_then(|command| command.first()),
            Some(&"sh".to_owned())
        );
    })
    .await;
}

#[tokio::test]
async fn the_manifest_of_such_a_pod_can_be_applied_twice() {
    strict("twice", &[], async |place| {
        let mut pod = family(&place, "agent");
        for (label, answer) in [("a", "created"), ("b", "configured")] {
            pod["metadata"]["labels"]["more"] = label.into();
            let done = place.apply(&pod).await;
            assert!(done.code == 0 && done.text.contains(answer), "{done:?}");
        }
    })
    .await;
}

#[tokio::test]
async fn what_reaches_around_the_fence_is_refused() {
    let exempt = [("unfenced-containers", "side=**/agent@*;own=command")];
    strict("hostile", &exempt, async |place| {
        let with_side = |name: &str, context: Value| {
            place.agent_pod(name, |_, pod| {
                pod["spec"]["containers"] = json!([{ "name": "side", "image": place.rig.agent_image,
                    "command": ["sleep", "1000"], "securityContext": context }]);
            })
        };
        let with_field =
            |name: &str, value: Value| place.agent_pod("agent", |_, pod| pod["spec"][name] = value);
        let side = |context: Value| with_side("agent", context);
        let drop_all = json!({"drop": ["ALL"]});
        let attempts = [
            (with_field("shareProcessNamespace", json!(true)), "spec.shareProcessNamespace"),
            (
                with_field("hostAliases", json!([{"ip": "192.0.2.1", "hostnames": ["upstream"]}])),
                "spec.hostAliases",
            ),
            (with_field("dnsConfig", json!({"nameservers": ["192.0.2.1"]})), "spec.dnsConfig"),
            (
                with_field("volumes", json!([{"name": "node", "hostPath": {"path": "/"}}])),
                "volume node is a hostPath",
            ),
            (
                with_field("securityContext", json!({"seccompProfile": {"type": "Unconfined"}})),
                "seccompProfile",
            ),
            (side(json!({"capabilities": drop_all})), "has no runAsUser"),
            (side(json!({"runAsUser": 0})), "runAsUser 0"),
            (side(json!({"runAsUser": 65530})), "runAsUser 65530"),
            (
                side(json!({"runAsUser": 1000, "capabilities": drop_all})),
                "allowPrivilegeEscalation is not false",
            ),
            (
                side(json!({"runAsUser": 1000, "allowPrivilegeEscalation": false})),
                "does not drop NET_RAW",
            ),
            (
                side(json!({"runAsUser": 1000, "allowPrivilegeEscalation": false,
                    "capabilities": {"drop": ["ALL"], "add": ["NET_RAW"]}})),
                "NET_RAW",
            ),
        ];
        for (pod, word) in attempts {
            let answer = place.refused(&pod).await;
            assert!(answer.contains(word), "{word} in: {answer}");
        }
        let good = json!({"runAsUser": 1000, "allowPrivilegeEscalation": false,
            "capabilities": drop_all});
        let good = with_side("good", good);
        let pod = place.create_dry(&good).await;
        assert!(supervisor(&pod, "agent").is_some() && supervisor(&pod, "side").is_none());
        // An exempt name with another image is a container like any other.
        let pod = place.agent_pod("other", |_, pod| {
            pod["spec"]["containers"] = json!([{ "name": "side", "image": place.rig.link_image,
                "command": ["sleep", "1000"] }]);
        });
        assert!(supervisor(&place.create_dry(&pod).await, "side").is_some());
    })
    .await;
}

#[tokio::test]
async fn an_exempt_container_is_the_administrators_program() {
    let exempt = [("unfenced-containers", "side=**/agent@*;own=command")];
    strict("own", &exempt, async |place| {
        let with_side = |name: &str, more: Value| {
            place.agent_pod(name, |_, pod| {
                let mut side = json!({ "name": "side", "image": place.rig.agent_image,
                    "command": ["sleep", "1000"], "securityContext": { "runAsUser": 1000,
                        "allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]} } });
                for (field, value) in more.as_object().into_iter().flatten() {
                    side[field] = value.clone();
                }
                pod["spec"]["containers"] = json!([side]);
                pod["spec"]["volumes"] = json!([{"name": "author", "emptyDir": {}}]);
            })
        };
        for (more, word) in [
            (json!({"env": [{"name": "LD_PRELOAD", "value": "/tmp/x.so"}]}), "own=env"),
            (json!({"volumeMounts": [{"name": "author", "mountPath": "/usr"}]}), "own=mounts"),
            (json!({"lifecycle": {"postStart": {"exec": {"command": ["id"]}}}}), "own=lifecycle"),
            (json!({"livenessProbe": {"exec": {"command": ["id"]}}}), "own=probes"),
            (json!({"stdin": true}), "own=exec"),
        ] {
            let answer = place.refused(&with_side("agent", more)).await;
            assert!(answer.contains(word), "{word} in: {answer}");
        }
        // With what the exemption names, and the token that Kubernetes mounts, it is admitted. The
        // guard reads the same annotation.
        place.create::<Pod>(&with_side("agent", json!({}))).await.expect("admitted");
        place
            .wait_for::<Pod>("agent", "running", |pod| {
                pod.and_then(|pod| pod.status.as_ref()?.phase.as_deref()) == Some("Running")
            })
            .await;
        let done = place.exec("agent", "side", &["id"]).await;
        assert!(done.code != 0 && done.text.contains("own=exec"), "{done:?}");
    })
    .await;
    let exempt = [("unfenced-containers", "side=**/agent@*;own=comand")];
    strict("misspelt", &exempt, async |place| {
        let answer = place.refused(&place.agent_pod("agent", |_, _| {})).await;
        assert!(answer.contains("the words are command, env"), "{answer}");
    })
    .await;
}

#[tokio::test]
async fn a_tag_is_pinned_to_what_was_looked_at() {
    strict("pinned", &[], async |place| {
        let pod = place.agent_pod("agent", |container, _| {
            container["image"] = place.rig.tagged_image.as_str().into();
            container["readinessProbe"] =
                json!({"httpGet": {"path": "/health", "port": 8001}, "periodSeconds": 1});
        });
        let digest = place.rig.agent_image.split_once('@').expect("a digest").1;
        let pinned = format!("{}@{digest}", place.rig.tagged_image);
        for answer in ["created", "configured"] {
            let mut pod = pod.clone();
            pod["metadata"]["labels"]["more"] = answer.into();
            let done = place.apply(&pod).await;
            assert!(done.code == 0 && done.text.contains(answer), "{done:?}");
            let made = place.ready("agent").await;
            assert_eq!(made.spec.expect("a spec").containers[0].image.as_ref(), Some(&pinned));
        }
    })
    .await;
    fenced("unpinned", &[], async |place| {
        let pod = place.agent_pod("agent", |container, _| {
            container["image"] = place.rig.tagged_image.as_str().into();
        });
        let made = place.create_dry(&pod).await.spec.expect("a spec");
        assert_eq!(made.containers[0].image.as_ref(), Some(&place.rig.tagged_image));
    })
    .await;
}

#[tokio::test]
async fn a_debugger_and_an_exemption_by_name_alone_are_refused() {
    strict("debug", &[], async |place| {
        place.start_agent("agent").await;
        let image = format!("--image={}", place.rig.agent_image);
        let done = place.kubectl(&["debug", "agent", &image, "--", "id"], "").await;
        assert!(done.code != 0 && done.text.contains("ephemeral"), "{done:?}");
    })
    .await;
    strict("byname", &[("unfenced-containers", "side")], async |place| {
        let answer = place.refused(&place.agent_pod("agent", |_, _| {})).await;
        assert!(answer.contains("a name alone exempts nothing"), "{answer}");
    })
    .await;
}

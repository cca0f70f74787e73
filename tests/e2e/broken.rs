//! Broken input: the person who made it reads cause and fix where they look, and no agent runs
//! unfenced meanwhile.

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{ConfigMap, Pod};
use kube::Api;
use kube::api::{ListParams, Patch, PatchParams};
use serde_json::json;
use tokio::net::TcpListener;

use crate::place::{Place, fenced};
use crate::rig::RELEASE_NAMESPACE;

/// The answer to a pod, which has all the `words`; and the event of a Deployment with the same.
async fn assert_refused_everywhere(place: &Place, words: &[&str]) {
    let answer = place.refused(&place.agent_pod("agent", |_, _| {})).await;
    println!("{answer}");
    for word in words {
        assert!(answer.contains(word), "{word} in: {answer}");
    }
    let mut pod = place.agent_pod("agent", |_, pod| pod["spec"]["restartPolicy"] = "Always".into());
    pod["metadata"] = json!({"labels": {"app": "agent"}});
    let deployment = json!({
        "metadata": {"name": "agent"},
        "spec": {"selector": {"matchLabels": {"app": "agent"}}, "template": pod},
    });
    place.create::<Deployment>(&deployment).await.expect("the Deployment itself is no pod");
    place.event(words).await;
    assert_no_pod(place).await;
}

async fn assert_no_pod(place: &Place) {
    let pods = place.api::<Pod>().list(&ListParams::default()).await.expect("listed");
    assert!(pods.items.is_empty(), "{:?}", pods.items);
}

/// What is said to whoever writes the policy; nothing is stored.
async fn assert_not_written(place: &Place, name: &str, yaml: &str, words: &[&str]) {
    let answer = match place.rig.try_policy(name, yaml).await {
        Ok(()) => panic!("{name} was written:\n{yaml}"),
        Err(kube::Error::Api(status)) => status.message.clone(),
        Err(error) => panic!("no answer about {name}: {error}"),
    };
    println!("{answer}");
    for word in words {
        assert!(answer.contains(word), "{word} in: {answer}");
    }
}

#[tokio::test]
async fn a_policy_that_does_not_load() {
    let name = "e2e-does-not-load";
    fenced("badpolicy", &[("policy", name)], async move |place| {
        let policy = place.rig.default_policy().await;
        let broken = policy.replace("access: read-only", "access: read-onyl");
        assert_ne!(policy, broken);
        let line =
            broken.lines().position(|line| line.contains("read-onyl")).expect("it is there") + 1;
        let at = format!("policy.yaml:{line}");
        let words = [name, &at, "read-onyl", "write read-only"];
        assert_not_written(&place, name, &broken, &words).await;
        assert_refused_everywhere(&place, &[name, "does not exist"]).await;
        // A good one is written, and cannot become the broken one.
        place.rig.put_policy(name, &policy).await;
        let api: Api<ConfigMap> = Api::namespaced(place.rig.client.clone(), RELEASE_NAMESPACE);
        let change = Patch::Merge(json!({"data": {"policy.yaml": broken}}));
        match api.patch(name, &PatchParams::default(), &change).await {
            Err(kube::Error::Api(status)) => assert!(status.message.contains(&at), "{status}"),
            other => panic!("{other:?}"),
        }
        place.rig.remove_policy(name).await;
    })
    .await;
}

#[tokio::test]
async fn a_policy_that_is_no_yaml() {
    let name = "e2e-no-yaml";
    fenced("noyaml", &[("policy", name)], async move |place| {
        let yaml = "version: 1\nnetwork_policies: [}\n";
        assert_not_written(&place, name, yaml, &[name, "policy.yaml:2"]).await;
        assert_refused_everywhere(&place, &[name, "does not exist"]).await;
    })
    .await;
}

#[tokio::test]
async fn a_policy_that_no_supervisor_could_start_with() {
    let name = "e2e-opens-run";
    fenced("opensrun", &[("policy", name)], async move |place| {
        let policy = place.rig.default_policy().await;
        for path in ["/run", "/", "/var/run/ringfence"] {
            let opens = policy.replace("read_only:\n", &format!("read_only:\n    - {path}\n"));
            assert_ne!(policy, opens);
            let words = [name, path, "opens the supervisor's run directory"];
            assert_not_written(&place, name, &opens, &words).await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_policy_that_is_not_there() {
    fenced("nopolicy", &[("policy", "e2e-not-there")], async |place| {
        let words = ["ringfence-system/e2e-not-there", "does not exist", "create configmap"];
        assert_refused_everywhere(&place, &words).await;
    })
    .await;
}

#[tokio::test]
async fn a_registry_that_does_not_answer() {
    fenced("registry", &[], async |place| {
        // Takes connections and says nothing.
        let silent = TcpListener::bind((place.rig.node_ip.as_str(), 0)).await.expect("a port");
        let address = silent.local_addr().expect("an address").to_string();
        let _held = tokio::spawn(async move {
            let mut held = Vec::new();
            while let Ok((connection, _)) = silent.accept().await {
                held.push(connection);
            }
        });
        let closed = format!("{}:1", place.rig.node_ip);
        for (registry, fix) in
            [(address, "see that the registry is up"), (closed, "make the image readable")]
        {
            let pod = place.agent_pod("agent", |container, _| {
                container["image"] = format!("{registry}/agent:1").into();
            });
            // By kubectl: the client library would try again by itself.
            let done = place.apply(&pod).await;
            println!("{}", done.text);
            assert_ne!(done.code, 0);
            for word in ["container agent", &registry, fix] {
                assert!(done.text.contains(word), "{word} in: {}", done.text);
            }
        }
        assert_no_pod(&place).await;
    })
    .await;
}

#[tokio::test]
async fn a_pod_in_the_nodes_network() {
    fenced("hostnetwork", &[], async |place| {
        let pod = place.agent_pod("agent", |_, pod| pod["spec"]["hostNetwork"] = true.into());
        let answer = place.refused(&pod).await;
        for word in ["hostNetwork", "remove hostNetwork"] {
            assert!(answer.contains(word), "{word} in: {answer}");
        }
        assert_no_pod(&place).await;
    })
    .await;
}

#[tokio::test]
async fn an_annotation_that_is_misspelt() {
    fenced("misspelt", &[("unfenced-container", "mcp")], async |place| {
        let answer = place.refused(&place.agent_pod("agent", |_, _| {})).await;
        assert!(answer.contains("ringfence.dev/unfenced-container"), "{answer}");
        assert_no_pod(&place).await;
    })
    .await;
}

/// What only the supervisor can find out: it says so in the log and in the termination message,
/// and the agent has not run.
#[tokio::test]
async fn a_policy_that_this_image_cannot_have() {
    let (user, path) = ("e2e-no-such-user", "e2e-no-such-path");
    fenced("nouser", &[("policy", user), ("pod-policy", path)], async move |place| {
        let policy = place.rig.default_policy().await;
        let other = policy.replace("run_as_user: agent", "run_as_user: nemo");
        assert_ne!(policy, other);
        place.rig.put_policy(user, &other).await;
        let other = policy
            .replace("compatibility: best_effort", "compatibility: hard_requirement")
            .replace("read_only:\n", "read_only:\n    - /no/such/path\n");
        assert!(other.contains("/no/such/path") && other.contains("hard_requirement"));
        place.rig.put_policy(path, &other).await;
        for (name, word) in [(user, "nemo"), (path, "/no/such/path")] {
            let pod = place.agent_pod(name, |container, pod| {
                container["command"] = json!(["echo", "the agent ran"]);
                if name == path {
                    pod["metadata"]["annotations"] = json!({"ringfence.dev/policy": path});
                }
            });
            place.create::<Pod>(&pod).await.expect("admitted");
            let (code, message) = place.ended(name).await;
            println!("{message}");
            assert_eq!(code, 125, "{message}");
            assert!(message.contains(word), "{word} in: {message}");
            let log = place.logs(name, "agent").await;
            assert!(log.contains(word) && !log.contains("the agent ran"), "{log}");
        }
        place.rig.remove_policy(user).await;
        place.rig.remove_policy(path).await;
    })
    .await;
}

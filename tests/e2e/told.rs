//! What nobody would see otherwise: verdicts about pods that controllers make come as Events on the
//! controller, and what Pod Security will refuse is said before it does.

use std::time::Duration;

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{Event, Namespace, Pod};
use kube::Api;
use kube::api::{ListParams, Patch, PatchParams, PostParams};
use serde_json::{Value, json};
use tokio::time::sleep;

use crate::place::{PATIENCE, Place, fenced};

/// A Deployment of one agent, its pods changed by `change`.
fn deployment(place: &Place, app: &str, change: impl FnOnce(&mut Value, &mut Value)) -> Value {
    let mut pod = place.agent_pod(app, |container, pod| {
        pod["spec"]["restartPolicy"] = "Always".into();
        change(container, pod);
    });
    pod["metadata"] = json!({"labels": {"app": app}});
    json!({"metadata": {"name": app},
        "spec": {"selector": {"matchLabels": {"app": app}}, "template": pod}})
}

/// Our Events of the namespace with that reason.
async fn with_reason(place: &Place, reason: &str) -> Vec<Event> {
    let all = place.api::<Event>().list(&ListParams::default()).await.expect("events");
    all.items.into_iter().filter(|event| event.reason.as_deref() == Some(reason)).collect()
}

fn about(event: &Event) -> (&str, &str) {
    let object = &event.involved_object;
    (object.kind.as_deref().unwrap_or_default(), object.name.as_deref().unwrap_or_default())
}

/// Lets the namespace enforce a Pod Security level.
async fn enforce(place: &Place, level: &str) {
    let namespaces: Api<Namespace> = Api::all(place.rig.client.clone());
    let labels = json!({"pod-security.kubernetes.io/enforce": level});
    let patch = Patch::Merge(json!({"metadata": {"labels": labels}}));
    namespaces.patch(&place.name, &PatchParams::default(), &patch).await.expect("labelled");
}

#[tokio::test]
async fn a_refusal_is_told_to_the_owner_with_class_and_remedy() {
    fenced("told", &[], async |place| {
        let refused =
            deployment(&place, "agent", |_, pod| pod["spec"]["hostNetwork"] = json!(true));
        place.create::<Deployment>(&refused).await.expect("made: only its pods are refused");
        // The controller's own Event has the message too, and comes again and again.
        let event = first_event(&place, "RingfenceHostNetwork").await;
        let (kind, name) = about(&event);
        assert!(kind == "ReplicaSet" && name.starts_with("agent-"), "{event:?}");
        assert_eq!(
            (event.type_.as_deref(), event.action.as_deref()),
            (Some("Warning"), Some("Refuse"))
        );
        let note = event.message.clone().unwrap_or_default();
        assert!(note.contains("spec.hostNetwork is true; remove hostNetwork"), "{note}");
        place.event(&["Error creating", "hostNetwork"]).await;
        for _ in 0..60 {
            let failed = with_reason(&place, "FailedCreate").await;
            let times: i32 = failed.iter().map(|event| event.count.unwrap_or(1)).sum();
            if times >= 6 {
                break;
            }
            sleep(Duration::from_secs(1)).await;
        }
        // One a replica of the webhook, however often the controller tries.
        let ours = with_reason(&place, "RingfenceHostNetwork").await;
        assert!(ours.len() <= 2, "{ours:?}");
    })
    .await;
}

#[tokio::test]
async fn a_warning_is_told_and_a_plain_fence_is_not() {
    fenced("warned", &[], async |place| {
        let plain = deployment(&place, "plain", |_, _| {});
        place.create::<Deployment>(&plain).await.expect("made");
        let name = place.pod_of("plain").await.metadata.name.expect("a name");
        let begun = deployment(&place, "begun", |container, pod| {
            let image = &container["image"];
            pod["spec"]["initContainers"] =
                json!([{"name": "before", "image": image, "command": ["sleep", "0"]}]);
        });
        place.create::<Deployment>(&begun).await.expect("made");
        let event = first_event(&place, "RingfenceInitContainer").await;
        let (kind, owner) = about(&event);
        assert!(kind == "ReplicaSet" && owner.starts_with("begun-"), "{event:?}");
        assert_eq!(event.type_.as_deref(), Some("Normal"));
        let all = place.api::<Event>().list(&ListParams::default()).await.expect("events");
        let of_plain: Vec<&Event> = all
            .items
            .iter()
            .filter(|event| event.reason.as_deref().is_some_and(|r| r.starts_with("Ringfence")))
            .filter(|event| name.starts_with(about(event).1))
            .collect();
        assert!(of_plain.is_empty(), "{of_plain:?}");
    })
    .await;
}

#[tokio::test]
async fn a_pod_of_nobodys_is_told_of_on_the_namespace_and_a_dry_run_not_at_all() {
    fenced("nobody", &[], async |place| {
        let with =
            |field: &str| place.agent_pod("agent", |_, pod| pod["spec"][field] = json!(true));
        let dry = PostParams { dry_run: true, ..PostParams::default() };
        let tried: Pod = serde_json::from_value(with("hostPID")).expect("a pod");
        for _ in 0..4 {
            place.api::<Pod>().create(&dry, &tried).await.expect_err("refused");
        }
        place.refused(&with("hostIPC")).await;
        let event = first_event(&place, "RingfenceHostIpc").await;
        assert_eq!(about(&event), ("Namespace", place.name.as_str()));
        assert_eq!(with_reason(&place, "RingfenceHostPid").await.len(), 0);
        let done = place.kubectl(&["get", "events", "-o", "wide"], "").await;
        assert!(done.text.contains("RingfenceHostIpc"), "{done:?}");
    })
    .await;
}

#[tokio::test]
async fn what_pod_security_will_refuse_is_said_with_level_and_fields() {
    fenced("level", &[], async |place| {
        for level in ["baseline", "restricted"] {
            enforce(&place, level).await;
            let name = format!("of-{level}");
            let made = deployment(&place, &name, |_, _| {});
            place.create::<Deployment>(&made).await.expect("made");
            // For a moment a replica may still know the level before.
            let said = format!("enforces Pod Security level {level}");
            let words = [&*name, &*said, "SYS_ADMIN"];
            let event = event_about(&place, "RingfencePodSecurity", &words).await;
            assert_eq!(event.type_.as_deref(), Some("Warning"));
            // And so it is: by the API server, which names fields that nobody wrote.
            let refused = place.event(&["violates PodSecurity", level, &name]).await;
            assert_eq!(about(&refused).0, "ReplicaSet");
            // Whoever makes a pod by hand is told with the answer.
            let mut pod = place.agent_pod("by-hand", |_, _| {});
            pod["apiVersion"] = "v1".into();
            pod["kind"] = "Pod".into();
            let text = pod.to_string();
            let done = place.kubectl(&["create", "-f", "-", "--dry-run=server"], &text).await;
            assert!(done.code != 0 && done.text.contains("violates PodSecurity"), "{done:?}");
            assert!(
                done.text.contains(&said) && done.text.contains("Warning: ringfence"),
                "{done:?}"
            );
        }
        enforce(&place, "privileged").await;
        place.start_agent("agent").await;
    })
    .await;
}

/// The first of our Events with that reason.
async fn first_event(place: &Place, reason: &str) -> Event {
    event_about(place, reason, &[""]).await
}

/// The same about an object whose name begins with the first word, and with the others in its note.
async fn event_about(place: &Place, reason: &str, words: &[&str]) -> Event {
    for _ in 0..PATIENCE.as_secs() * 2 {
        let found = with_reason(place, reason).await;
        let fits = |event: &Event| {
            let note = event.message.as_deref().unwrap_or_default();
            about(event).1.starts_with(words[0])
                && words[1..].iter().all(|word| note.contains(word))
        };
        if let Some(event) = found.into_iter().find(fits) {
            return event;
        }
        sleep(Duration::from_millis(500)).await;
    }
    panic!("no event {reason} about {words:?} after {PATIENCE:?}");
}

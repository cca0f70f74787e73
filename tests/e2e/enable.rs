//! `ringfence enable` and `disable`.

use k8s_openapi::api::core::v1::{Namespace, Pod};
use k8s_openapi::api::rbac::v1::RoleBinding;
use kube::api::{Patch, PatchParams};
use kube::{Api, ResourceExt as _};
use serde_json::json;

use crate::place::{supervisor, unlabelled};
use crate::release::ringfence;
use crate::rig::RELEASE_NAMESPACE;

#[tokio::test]
async fn a_namespace_is_enabled_and_disabled_by_hand() {
    unlabelled("enable", async |place| {
        place.create::<Pod>(&place.agent_pod("before", |_, _| {})).await.expect("made");
        let release = ["--release-namespace", RELEASE_NAMESPACE];
        let verb = async |verb: &str, more: &[&str]| {
            let words = [&[verb, place.name.as_str()], &release[..], more].concat();
            ringfence(&words).await
        };
        let namespaces: Api<Namespace> = Api::all(place.rig.client.clone());
        let label = async || {
            let found = namespaces.get(&place.name).await.expect("the namespace");
            found.labels().get("ringfence.dev/inject").cloned()
        };
        let bindings = place.api::<RoleBinding>();
        let bound = async || bindings.get_opt("ringfence-pull-secrets").await.expect("an answer");

        let done = verb("enable", &["--pull-secrets"]).await;
        assert_eq!(done.code, 0, "{done:?}");
        assert!(done.text.contains("1 of 1 pods run as they were made"), "{done:?}");
        assert_eq!(label().await.as_deref(), Some("enabled"));
        let binding = bound().await.expect("made");
        assert_eq!(binding.role_ref.name, "ringfence-pull-secrets");
        assert_eq!(binding.subjects.expect("one")[0].namespace.as_deref(), Some(RELEASE_NAMESPACE));
        let pod = place.create_dry(&place.agent_pod("after", |_, _| {})).await;
        assert!(supervisor(&pod, "agent").is_some());
        // What will refuse its pods is said at once.
        let level = "pod-security.kubernetes.io/enforce";
        for (value, said) in [("baseline", true), ("privileged", false)] {
            let patch = Patch::Merge(json!({"metadata": {"labels": {level: value}}}));
            namespaces.patch(&place.name, &PatchParams::default(), &patch).await.expect("labelled");
            let done = verb("enable", &[]).await;
            assert_eq!(done.code, 0, "{done:?}");
            assert_eq!(done.text.contains("Pod Security level baseline"), said, "{done:?}");
        }
        // Twice is once, and the value can be changed.
        let done = verb("enable", &["--strict"]).await;
        assert_eq!((done.code, label().await.as_deref()), (0, Some("strict")), "{done:?}");

        let done = verb("disable", &[]).await;
        assert_eq!((done.code, label().await, bound().await), (0, None, None), "{done:?}");
        let pod = place.create_dry(&place.agent_pod("after", |_, _| {})).await;
        assert!(supervisor(&pod, "agent").is_none());
        let done = verb("disable", &[]).await;
        assert_eq!(done.code, 0, "{done:?}");

        // A label that nobody looks at would be taken for a fence.
        let done = verb("enable", &["--release", "nobody"]).await;
        assert!(done.code == 1 && done.text.contains("install the chart first"), "{done:?}");
        for never in ["kube-system", RELEASE_NAMESPACE] {
            let done = ringfence(&[&["enable", never], &release[..]].concat()).await;
            assert!(done.code == 1 && done.text.contains("never fenced"), "{done:?}");
        }
        let done = ringfence(&[&["enable", "no-such"], &release[..]].concat()).await;
        assert!(done.code == 1 && done.text.contains("no-such"), "{done:?}");
        assert_eq!(label().await, None);
    })
    .await;
}

//! `ringfence enable` and `disable`.

use k8s_openapi::api::core::v1::{Namespace, Pod, ServiceAccount};
use k8s_openapi::api::rbac::v1::{ClusterRole, RoleBinding};
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::{Api, ResourceExt as _};
use serde_json::{Value, json};

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
        assert!(done.text.contains("new pods are fenced (3 dry runs in a row"), "{done:?}");
        assert_eq!(label().await.as_deref(), Some("enabled"));
        let binding = bound().await.expect("made");
        assert_eq!(binding.role_ref.name, "ringfence-pull-secrets");
        assert_eq!(binding.subjects.expect("one")[0].namespace.as_deref(), Some(RELEASE_NAMESPACE));
        // It came back when the API server looked at the label: nothing is tried again here.
        let pod = place.create_dry(&place.agent_pod("after", |_, _| {})).await;
        assert!(supervisor(&pod, "agent").is_some());
        assert_eq!(
            place.api::<Pod>().list(&ListParams::default()).await.expect("pods").items.len(),
            1
        );
        // A policy that is not there refuses every pod, which is what the test pod is told.
        let policy = |value: Value| {
            let annotations = json!({"ringfence.dev/policy": value});
            let patch = Patch::Merge(json!({"metadata": {"annotations": annotations}}));
            let (namespaces, name) = (namespaces.clone(), place.name.clone());
            async move {
                let params = PatchParams::default();
                namespaces.patch(&name, &params, &patch).await.expect("annotated");
            }
        };
        policy(json!("no-such-policy")).await;
        // The webhook learns of the annotation by a watch.
        let mut done = verb("enable", &[]).await;
        for _ in 0..20 {
            if done.code == 1 {
                break;
            }
            done = verb("enable", &[]).await;
        }
        assert!(done.code == 1 && done.text.contains("no-such-policy"), "{done:?}");
        assert!(done.text.contains("has the label and keeps it"), "{done:?}");
        assert_eq!(label().await.as_deref(), Some("enabled"));
        policy(Value::Null).await;
        // What will refuse its pods is said at once.
        let level = "pod-security.kubernetes.io/enforce";
        for (value, code) in [("baseline", 1), ("privileged", 0)] {
            let patch = Patch::Merge(json!({"metadata": {"labels": {level: value}}}));
            namespaces.patch(&place.name, &PatchParams::default(), &patch).await.expect("labelled");
            // The API server learns of this label by a watch too.
            let mut done = verb("enable", &[]).await;
            for _ in 0..20 {
                if done.code == code {
                    break;
                }
                done = verb("enable", &[]).await;
            }
            assert_eq!(done.code, code, "{done:?}");
            for said in ["Pod Security level baseline", "violates PodSecurity"] {
                assert_eq!(done.text.contains(said), value == "baseline", "{done:?}");
            }
        }
        // Twice is once, and the value can be changed.
        let done = verb("enable", &["--strict"]).await;
        assert_eq!((done.code, label().await.as_deref()), (0, Some("strict")), "{done:?}");
        let done = verb("enable", &["--pull-secrets"]).await;
        assert!(done.code == 1 && done.text.contains("--loosen"), "{done:?}");
        assert_eq!(label().await.as_deref(), Some("strict"));

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

/// Without an OpenShift: the role is all that the verb looks at, and here it grants nothing.
#[tokio::test]
async fn the_use_of_constraints_is_granted_by_hand() {
    unlabelled("enable-scc", async |place| {
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
        let subjects = async || {
            let found = bindings.get_opt("ringfence-scc").await.expect("an answer")?;
            let subjects = found.subjects.unwrap_or_default();
            Some(subjects.into_iter().map(|subject| subject.name).collect::<Vec<_>>())
        };
        let roles: Api<ClusterRole> = Api::all(place.rig.client.clone());
        // What a test before this one may have left.
        drop(roles.delete("ringfence-scc", &DeleteParams::default()).await);

        // The chart is installed without openshift.enabled.
        let done = verb("enable", &["--scc", "--strict"]).await;
        assert!(done.code == 1 && done.text.contains("openshift.enabled=true"), "{done:?}");
        assert_eq!((label().await, subjects().await), (None, None));

        let role = json!({"metadata": {"name": "ringfence-scc"}, "rules": [{
            "apiGroups": ["security.openshift.io"], "resources": ["securitycontextconstraints"],
            "resourceNames": ["ringfence"], "verbs": ["use"]}]});
        let role = serde_json::from_value(role).expect("a role");
        roles.create(&PostParams::default(), &role).await.expect("made");
        let runner =
            json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "runner"}});
        place.create::<ServiceAccount>(&runner).await.expect("made");
        let done = verb("enable", &["--scc", "--strict", "--service-account", "runner"]).await;
        assert_eq!(done.code, 0, "{done:?}");
        assert_eq!(label().await.as_deref(), Some("strict"));
        assert_eq!(subjects().await, Some(vec!["runner".to_owned()]));
        // What is there is made what it should be.
        let done = verb("enable", &["--scc", "--strict"]).await;
        assert_eq!(done.code, 0, "{done:?}");
        let all = format!("system:serviceaccounts:{}", place.name);
        assert_eq!(subjects().await, Some(vec![all]));
        let done = verb("disable", &[]).await;
        assert_eq!((done.code, label().await, subjects().await), (0, None, None), "{done:?}");

        // One that somebody else made stays as it is: an error, and no label.
        let other = json!({"metadata": {"name": "ringfence-scc"}, "roleRef": {
            "apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "view"}});
        let other = serde_json::from_value(other).expect("a binding");
        bindings.create(&PostParams::default(), &other).await.expect("made");
        let done = verb("enable", &["--scc", "--strict"]).await;
        assert!(done.code == 1 && done.text.contains("made by somebody else"), "{done:?}");
        assert_eq!(label().await, None);
        roles.delete("ringfence-scc", &DeleteParams::default()).await.expect("removed");
    })
    .await;
}

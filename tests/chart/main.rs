//! What the chart renders, by `helm template`: no cluster, and no look at one.
//!
//! helm is taken from `HELM`, from `PATH`, or from the programs of the cluster rig. Without one the
//! tests say SKIPPED; with `CHART_NEEDS_HELM` set they fail then.
#![forbid(unsafe_code)]

mod certificates;
mod monitoring;
mod network;
mod openshift;
mod registries;
mod render;

use serde_json::json;

use crate::render::{Chart, helm, rules};

#[test]
fn it_renders_the_same_every_time() {
    let Some(chart) = Chart::here() else { return };
    let once = chart.text(&json!({})).expect("renders");
    assert_eq!(once, chart.text(&json!({})).expect("renders"));
    // What a cluster would have to be asked for would differ between `template` and `install`.
    for file in std::fs::read_dir("charts/ringfence/templates").expect("the chart") {
        let path = file.expect("a file").path();
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        for word in ["lookup ", "genCA", "genSignedCert", "randAlpha", "now "] {
            assert!(!text.contains(&format!("{{{{ {word}")), "{word} in {}", path.display());
            assert!(!text.contains(&format!("({word}")), "{word} in {}", path.display());
        }
    }
}

#[test]
fn events_may_be_written_and_not_read_and_can_be_switched_off() {
    let Some(chart) = Chart::here() else { return };
    let of_events = |objects: &render::Objects| {
        rules(objects).filter(|rule| rule["resources"] == json!(["events"])).collect::<Vec<_>>()
    };
    let on = chart.objects(&json!({}));
    assert_eq!(
        of_events(&on),
        [json!({ "apiGroups": ["events.k8s.io"], "resources": ["events"],
            "verbs": ["create", "patch"] })]
    );
    assert!(on.webhook_args().contains(&"--events=true".to_owned()));
    let off = chart.objects(&json!({ "events": { "enabled": false } }));
    assert!(of_events(&off).is_empty());
    assert!(off.webhook_args().contains(&"--events=false".to_owned()));
}

#[test]
fn what_pod_security_does_is_a_value() {
    let Some(chart) = Chart::here() else { return };
    for (values, flag) in [
        (json!({}), "--pod-security=warn"),
        (json!({ "podSecurity": "refuse" }), "--pod-security=refuse"),
    ] {
        assert!(chart.objects(&values).webhook_args().contains(&flag.to_owned()));
    }
    let error = chart.text(&json!({ "podSecurity": "deny" })).expect_err("no such word");
    assert!(error.contains("podSecurity"), "{error}");
}

#[test]
fn a_webhook_that_writes_says_that_a_dry_run_is_none() {
    let Some(chart) = Chart::here() else { return };
    let objects = chart.objects(&json!({}));
    for (entry, effects) in [
        ("pods.ringfence.dev", "NoneOnDryRun"),
        ("verify.ringfence.dev", "NoneOnDryRun"),
        ("updates.ringfence.dev", "None"),
        ("exec.ringfence.dev", "None"),
    ] {
        let found = objects.webhooks().find(|webhook| webhook["name"] == entry);
        assert_eq!(found.expect(entry)["sideEffects"], effects, "{entry}");
    }
}

#[test]
fn helm_is_there_where_it_has_to_be() {
    assert!(helm().is_some() || std::env::var_os("CHART_NEEDS_HELM").is_none(), "no helm");
}

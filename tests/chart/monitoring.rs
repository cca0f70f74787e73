//! The `PodMonitor` and the alerts.

use std::collections::BTreeSet;

use ringfence::admission::server::Metrics;
use serde_json::{Value, json};

use crate::render::{Chart, Objects};

fn alerts(objects: &Objects) -> Vec<Value> {
    let rule = objects.of("PrometheusRule").next().expect("a PrometheusRule");
    rule["spec"]["groups"][0]["rules"].as_array().expect("rules").clone()
}

fn expr(alerts: &[Value], name: &str) -> String {
    let found = alerts.iter().find(|alert| alert["alert"] == name);
    found.unwrap_or_else(|| panic!("no alert {name}"))["expr"].as_str().expect("text").to_owned()
}

/// The names in an expression that are ours.
fn series(expr: &str) -> impl Iterator<Item = &str> {
    expr.split(|c: char| !c.is_ascii_alphanumeric() && c != '_')
        .filter(|word| word.starts_with("ringfence_"))
}

#[test]
fn every_replica_is_scraped_at_its_health_port() {
    let Some(chart) = Chart::here() else { return };
    let objects = chart.objects(&json!({ "podMonitor": { "enabled": true } }));
    let monitor = objects.of("PodMonitor").next().expect("a PodMonitor");
    assert_eq!(monitor["metadata"]["namespace"], "release");
    let deployment = objects.of("Deployment").next().expect("a Deployment");
    assert_eq!(monitor["spec"]["selector"], deployment["spec"]["selector"]);
    let endpoints = &monitor["spec"]["podMetricsEndpoints"];
    assert_eq!(*endpoints, json!([{ "port": "health", "path": "/metrics" }]));

    let objects = chart.objects(&json!({ "podMonitor": {
        "enabled": true, "namespace": "monitoring", "labels": { "release": "prometheus" },
        "interval": "15s",
    } }));
    let monitor = objects.of("PodMonitor").next().expect("a PodMonitor");
    assert_eq!(monitor["metadata"]["namespace"], "monitoring");
    assert_eq!(monitor["metadata"]["labels"]["release"], "prometheus");
    // Wherever the object is, the pods are in the release namespace.
    assert_eq!(monitor["spec"]["namespaceSelector"], json!({ "matchNames": ["release"] }));
    assert_eq!(monitor["spec"]["podMetricsEndpoints"][0]["interval"], "15s");
    let error = chart.text(&json!({ "podMonitor": { "interval": "often" } })).expect_err("refused");
    assert!(error.contains("interval"), "{error}");
}

/// An alert on a series that nobody writes never fires.
#[test]
fn alerts_are_about_series_that_a_new_replica_has() {
    let Some(chart) = Chart::here() else { return };
    let alerts = alerts(&chart.objects(&json!({ "alerts": { "enabled": true } })));
    let exposition = Metrics::default().render(false);
    let names: BTreeSet<&str> =
        exposition.lines().filter_map(|line| line.split(['{', ' ']).next()).collect();
    for alert in &alerts {
        let expr = alert["expr"].as_str().expect("text");
        assert!(series(expr).next().is_some(), "{expr}");
        for name in series(expr) {
            assert!(names.contains(name), "{name} of {expr}");
        }
        // With their labels too.
        for (before, rest) in expr.match_indices('{').map(|(at, _)| expr.split_at(at)) {
            if before.ends_with("apiserver_admission_webhook_rejection_count") {
                // The API server's own.
                continue;
            }
            let labels = &rest[1..rest.find('}').expect("it ends")];
            let name = series(before).last().expect("a name");
            let found = exposition.lines().any(|line| {
                line.starts_with(&format!("{name}{{"))
                    && labels.split(',').all(|label| line.contains(label))
            });
            assert!(found, "{name}{{{labels}}}");
        }
    }
}

#[test]
fn every_alert_says_what_it_is_and_the_page_what_to_do() {
    let Some(chart) = Chart::here() else { return };
    let page = std::fs::read_to_string("docs/chart.md").expect("the page");
    let objects = chart.objects(&json!({ "alerts": {
        "enabled": true, "namespace": "monitoring", "labels": { "role": "alerts" },
    } }));
    let rule = objects.of("PrometheusRule").next().expect("a PrometheusRule");
    assert_eq!(rule["metadata"]["namespace"], "monitoring");
    assert_eq!(rule["metadata"]["labels"]["role"], "alerts");
    let alerts = alerts(&objects);
    assert!(alerts.len() >= 12, "{}", alerts.len());
    let mut names = BTreeSet::new();
    for alert in &alerts {
        let name = alert["alert"].as_str().expect("a name");
        assert!(names.insert(name), "{name} is there twice");
        assert!(page.contains(&format!("| `{name}` |")), "{name} has no row in docs/chart.md");
        let severity = &alert["labels"]["severity"];
        assert!(severity == "critical" || severity == "warning", "{name}: {severity}");
        for text in ["summary", "description"] {
            let text = alert["annotations"][text].as_str().expect("text");
            assert!(text.ends_with('.') && !text.contains("{{ if"), "{name}: {text}");
        }
    }
    // No row is left behind by an alert that is gone.
    let rows = page.lines().filter_map(|line| line.strip_prefix("| `Ringfence")?.split('`').next());
    for row in rows {
        assert!(names.contains(format!("Ringfence{row}").as_str()), "Ringfence{row}");
    }
}

/// The bounds follow the values that they are about.
#[test]
fn an_alert_comes_after_the_renewal_should_have_and_before_the_time_out() {
    let Some(chart) = Chart::here() else { return };
    let of = |more: Value| {
        let mut values = json!({ "alerts": { "enabled": true } });
        values.as_object_mut().expect("one").extend(more.as_object().expect("one").clone());
        alerts(&chart.objects(&values))
    };
    let late = "RingfenceCertificateNotRenewed";
    let urgent = "RingfenceCertificateExpires";
    let day = 86_400;
    let has = |alerts: &[Value], name: &str, seconds: i32| {
        let expr = expr(alerts, name);
        assert!(expr.contains(&format!("< {seconds} and")), "{seconds} in {expr}");
    };
    // A leaf of thirty days is renewed ten days before its end.
    let own = of(json!({}));
    has(&own, late, 30 * day / 4);
    has(&own, urgent, 3 * day);
    has(&of(json!({ "webhook": { "certificateDays": 1 } })), late, day / 4);
    // No leaf outlives its CA.
    has(&of(json!({ "webhook": { "caLifeSeconds": 3600 } })), late, 900);
    let pem = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
    let given = json!({ "secret": "tls", "caBundle": pem });
    let theirs = of(json!({ "certificates": given, "webhook": { "certificateDays": 365 } }));
    has(&theirs, late, 7 * day);
    has(&theirs, urgent, day);
    let slow = expr(&of(json!({ "webhook": { "timeoutSeconds": 30 } })), "RingfenceSlow");
    assert!(slow.ends_with("> 30 / 2"), "{slow}");
    // What it means that none is ready depends on what then happens to pods.
    let means = |alerts: &[Value]| alerts[0]["annotations"]["description"].to_string();
    assert!(means(&own).contains("No pod is created"), "{}", means(&own));
    let ignored = of(json!({ "webhook": { "failurePolicy": "Ignore" } }));
    assert!(means(&ignored).contains("Only the guard"), "{}", means(&ignored));
}

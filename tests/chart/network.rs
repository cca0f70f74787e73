//! Who may connect to the webhook, and where it may connect to.

use serde_json::{Value, json};

use crate::render::{Chart, Objects};

fn policy(objects: &Objects) -> Value {
    objects.of("NetworkPolicy").next().expect("a NetworkPolicy")["spec"].clone()
}

fn enabled(more: &Value) -> Value {
    let mut all = json!({ "enabled": true });
    all.as_object_mut().expect("it is one").extend(more.as_object().expect("one too").clone());
    json!({ "networkPolicy": all })
}

#[test]
fn there_is_none_unless_asked_for() {
    let Some(chart) = Chart::here() else { return };
    let objects = chart.objects(&json!({}));
    for kind in ["NetworkPolicy", "PodMonitor", "PrometheusRule", "SecurityContextConstraints"] {
        assert!(objects.of(kind).next().is_none(), "{kind}");
    }
}

/// What is left open by default is what nobody can guess: where API servers are, and registries.
#[test]
fn by_default_two_ports_are_open_and_all_ways_out() {
    let Some(chart) = Chart::here() else { return };
    let objects = chart.objects(&enabled(&json!({})));
    let policy = policy(&objects);
    let port = |name: &str| json!({ "ports": [{ "port": name, "protocol": "TCP" }] });
    assert_eq!(policy["ingress"], json!([port("webhook"), port("health")]));
    assert_eq!(policy["egress"], json!([{}]));
    assert_eq!(policy["policyTypes"], json!(["Ingress", "Egress"]));
    // The pods of the Deployment, by the ports that they name; not the hooks' pods.
    let deployment = objects.of("Deployment").next().expect("a Deployment");
    assert_eq!(policy["podSelector"], deployment["spec"]["selector"]);
    let ports = &deployment["spec"]["template"]["spec"]["containers"][0]["ports"];
    let named: Vec<&Value> = ports.as_array().expect("ports").iter().map(|p| &p["name"]).collect();
    assert_eq!(named, ["webhook", "health"]);
}

#[test]
fn each_way_is_narrowed_by_itself() {
    let Some(chart) = Chart::here() else { return };
    let peer = json!({ "namespaceSelector": { "matchLabels": { "a": "b" } } });
    let way_out = json!([{ "ports": [{ "port": 443 }] }, { "ports": [{ "port": 53 }] }]);
    let narrow = policy(&chart.objects(&enabled(&json!({
        "apiServer": ["10.0.0.0/24", "fd00::/64"], "scrapeFrom": [peer], "egress": way_out,
    }))));
    let blocks =
        json!([{ "ipBlock": { "cidr": "10.0.0.0/24" } }, { "ipBlock": { "cidr": "fd00::/64" } }]);
    assert_eq!(narrow["ingress"][0]["from"], blocks);
    assert_eq!(narrow["ingress"][1]["from"], json!([peer]));
    assert_eq!(narrow["egress"], way_out);
    // One does not narrow the other: probes go on, and reviews.
    let only = policy(&chart.objects(&enabled(&json!({ "apiServer": ["10.0.0.0/24"] }))));
    assert_eq!(only["ingress"][1]["from"], Value::Null);
    let only = policy(&chart.objects(&enabled(&json!({ "scrapeFrom": [peer] }))));
    assert_eq!(only["ingress"][0]["from"], Value::Null);
}

#[test]
fn what_would_hold_nothing_or_lock_out_is_refused() {
    let Some(chart) = Chart::here() else { return };
    let mut on_the_node = enabled(&json!({}));
    on_the_node["webhook"] = json!({ "hostNetwork": true });
    for (values, word) in [
        (on_the_node, "hostNetwork"),
        // An address is no range; a peer without a word is everybody's, or nobody's.
        (enabled(&json!({ "apiServer": ["10.0.0.1"] })), "apiServer"),
        (enabled(&json!({ "apiServer": ["kubernetes.default"] })), "apiServer"),
        (enabled(&json!({ "scrapeFrom": [{}] })), "scrapeFrom"),
    ] {
        let error = chart.text(&values).expect_err("refused");
        assert!(error.contains(word), "{word} in {error}");
    }
}

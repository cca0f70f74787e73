//! The serving certificate: a CA of the webhook's own, or one from elsewhere.

use serde_json::{Value, json};

use crate::render::{Chart, Objects, rules};

const PEM: &str = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
/// `base64 <<<PEM`
const ENCODED: &str =
    "LS0tLS1CRUdJTiBDRVJUSUZJQ0FURS0tLS0tCkFBQUEKLS0tLS1FTkQgQ0VSVElGSUNBVEUtLS0tLQo=";

fn bundles(objects: &Objects) -> Vec<Value> {
    objects.webhooks().map(|webhook| webhook["clientConfig"]["caBundle"].clone()).collect()
}

fn injectors(objects: &Objects) -> Vec<Value> {
    let kinds = ["MutatingWebhookConfiguration", "ValidatingWebhookConfiguration"];
    let all = kinds.into_iter().flat_map(|kind| objects.of(kind));
    all.map(|found| found["metadata"]["annotations"]["cert-manager.io/inject-ca-from"].clone())
        .collect()
}

/// What may be done to Secrets and to webhook configurations.
fn power(objects: &Objects) -> Vec<(String, Value, Value)> {
    let mut found: Vec<_> = rules(objects)
        .filter(|rule| {
            let resources = rule["resources"].to_string();
            let pull = rule["resourceNames"].is_null() && rule["verbs"] == json!(["get"]);
            (resources.contains("secrets") && !pull)
                || resources.contains("mutatingwebhookconfigurations")
        })
        .map(|rule| {
            let resource = rule["resources"][0].as_str().unwrap_or_default().to_owned();
            (resource, rule["resourceNames"].clone(), rule["verbs"].clone())
        })
        .collect();
    found.sort_by(|a, b| a.0.cmp(&b.0));
    found
}

#[test]
fn with_a_ca_of_its_own_the_chart_says_nothing_of_certificates() {
    let Some(chart) = Chart::here() else { return };
    let objects = chart.objects(&json!({}));
    assert!(bundles(&objects).iter().all(Value::is_null));
    assert!(injectors(&objects).iter().all(Value::is_null));
    let args = objects.webhook_args();
    assert!(args.contains(&"--ca-secret=ringfence-webhook-ca".to_owned()), "{args:?}");
    assert!(!args.iter().any(|arg| arg.starts_with("--certificate-secret")), "{args:?}");
    assert!(objects.of("Secret").next().is_none(), "no key is rendered");
    let power = power(&objects);
    assert_eq!(power.len(), 3, "{power:?}");
    assert_eq!(power[0].2, json!(["get", "patch"]));
}

#[test]
fn a_certificate_brought_along_has_its_bundle_in_every_entry() {
    let Some(chart) = Chart::here() else { return };
    let values = json!({ "certificates": { "secret": "tls", "caBundle": PEM } });
    let objects = chart.objects(&values);
    let bundles = bundles(&objects);
    assert!(bundles.len() >= 8 && bundles.iter().all(|bundle| *bundle == ENCODED), "{bundles:?}");
    assert!(injectors(&objects).iter().all(Value::is_null));
    given(&objects);
    assert_eq!(chart.text(&values), chart.text(&values));
}

#[test]
fn cainjector_is_told_where_to_look_and_the_field_left_to_it() {
    let Some(chart) = Chart::here() else { return };
    let objects = chart.objects(&json!({
        "certificates": { "secret": "tls", "injectCaFrom": "ringfence-webhook" },
        "webhook": { "annotations": { "admissions.enforcer/disabled": "true" } },
    }));
    assert!(bundles(&objects).iter().all(Value::is_null));
    assert_eq!(injectors(&objects), ["release/ringfence-webhook"; 2]);
    for object in objects.of("MutatingWebhookConfiguration") {
        assert_eq!(object["metadata"]["annotations"]["admissions.enforcer/disabled"], "true");
    }
    given(&objects);
}

/// The webhook reads one Secret, looks at the configurations, and writes neither.
fn given(objects: &Objects) {
    let args = objects.webhook_args();
    assert!(args.contains(&"--certificate-secret=tls".to_owned()), "{args:?}");
    for own in ["--ca-secret", "--ca-life", "--ca-settle", "--certificate-days"] {
        assert!(!args.iter().any(|arg| arg.starts_with(own)), "{args:?}");
    }
    assert_eq!(
        power(objects),
        [
            ("mutatingwebhookconfigurations".into(), json!(["ringfence"]), json!(["get"])),
            ("secrets".into(), json!(["tls"]), json!(["get"])),
        ]
    );
}

#[test]
fn half_of_it_is_an_error_that_says_what_is_missing() {
    let Some(chart) = Chart::here() else { return };
    let key = "-----BEGIN PRIVATE KEY-----\nBBBB\n-----END PRIVATE KEY-----\n";
    for (certificates, word) in [
        (json!({ "secret": "tls" }), "certificates.secret needs"),
        (json!({ "caBundle": PEM }), "need certificates.secret"),
        (json!({ "injectCaFrom": "x" }), "need certificates.secret"),
        (json!({ "secret": "tls", "caBundle": PEM, "injectCaFrom": "x" }), "exclude each other"),
        (json!({ "secret": "tls", "caBundle": "ca.crt" }), "is not PEM"),
        (json!({ "secret": "tls", "caBundle": key }), "holds a private key"),
        (json!({ "secret": "tls", "caBundle": format!("{PEM}{key}") }), "holds a private key"),
        (json!({ "secret": "Not A Name", "caBundle": PEM }), "secret"),
    ] {
        let error = chart.text(&json!({ "certificates": certificates })).expect_err("refused");
        assert!(error.contains(word), "{word} in {error}");
        assert!(!error.contains("BBBB"), "helm shows the key: {error}");
    }
}

#[test]
fn the_values_in_certs_render() {
    let Some(chart) = Chart::here() else { return };
    let read = |path: &str| -> Value {
        let text = std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{path}: {e}"));
        serde_saphyr::from_str(&text).unwrap_or_else(|e| panic!("{path}: {e}"))
    };
    let objects = chart.objects(&read("certs/cert-manager/values.yaml"));
    assert_eq!(injectors(&objects), ["release/ringfence-webhook"; 2]);
    let mut values = read("certs/bring-your-own/values.yaml");
    chart.text(&values).expect_err("the bundle is still to be given");
    values["certificates"]["caBundle"] = json!(PEM);
    assert!(bundles(&chart.objects(&values)).iter().all(|bundle| *bundle == ENCODED));
    // The manifests name the same objects as the values, and the name that API servers verify.
    let text = std::fs::read_to_string("certs/cert-manager/certificate.yaml").expect("manifests");
    let objects: Vec<Value> = serde_saphyr::from_multiple(&text).expect("YAML");
    let leaf = objects.iter().find(|object| {
        object["kind"] == "Certificate" && object["metadata"]["name"] == "ringfence-webhook"
    });
    let leaf = &leaf.expect("the Certificate of the values")["spec"];
    assert_eq!(
        leaf["secretName"],
        read("certs/cert-manager/values.yaml")["certificates"]["secret"]
    );
    assert_eq!(leaf["dnsNames"], json!(["ringfence.ringfence.svc"]));
}

//! Mirrors, given images, plugins of clouds and the API server's certificate: values become flags, and
//! files where the flags look for them.

use serde_json::{Value, json};

use crate::render::{Chart, Objects};

fn values() -> Value {
    json!({
        "registries": {
            "mirrors": { "docker.io": ["m.example:5000/hub", "n.example"], "r.example": ["n.example/r"] },
            "images": { "r.example/agent:1": { "entrypoint": ["/a"], "user": "1000" } },
            "credentialProviders": {
                "config": { "apiVersion": "kubelet.config.k8s.io/v1", "kind": "CredentialProviderConfig",
                    "providers": [] },
                "volume": { "hostPath": { "path": "/opt/plugins" } },
            },
        },
        "webhook": { "clientCa": { "configMap": "api-ca", "names": ["a.example", "b.example"] } },
    })
}

fn pod(objects: &Objects) -> &Value {
    &objects.of("Deployment").next().expect("a Deployment")["spec"]["template"]
}

#[test]
fn the_pull_secret_of_the_fences_image_is_a_value() {
    let Some(chart) = Chart::here() else { return };
    let flag = |objects: &Objects| {
        let all = objects.webhook_args();
        all.into_iter().find(|arg| arg.starts_with("--supervisor-pull-secret="))
    };
    assert_eq!(flag(&chart.objects(&json!({}))), None);
    let named = json!({ "supervisor": { "pullSecret": "fence-pull" } });
    let found = flag(&chart.objects(&named));
    // By this word `ringfence enable --image-pull-secret` finds it in the Deployment.
    assert_eq!(found.as_deref(), Some("--supervisor-pull-secret=fence-pull"));
    let error = chart.text(&json!({ "supervisor": { "pullSecret": "No Name" } }));
    assert!(error.expect_err("no name").contains("pullSecret"));
}

#[test]
fn flags_name_the_files_that_are_mounted() {
    let Some(chart) = Chart::here() else { return };
    let objects = chart.objects(&values());
    let args = objects.webhook_args();
    let mirrors: Vec<&String> =
        args.iter().filter(|arg| arg.starts_with("--registry-mirror=")).collect();
    assert_eq!(
        mirrors,
        [
            "--registry-mirror=docker.io=m.example:5000/hub",
            "--registry-mirror=docker.io=n.example",
            "--registry-mirror=r.example=n.example/r",
        ]
    );
    for arg in ["--client-name=a.example", "--client-name=b.example"] {
        assert!(args.iter().any(|one| one == arg), "{arg}: {args:?}");
    }
    let spec = &pod(&objects)["spec"];
    let mounts = spec["containers"][0]["volumeMounts"].as_array().expect("mounts");
    for (flag, volume, source) in [
        ("--client-ca=", "client-ca", json!({ "configMap": { "name": "api-ca" } })),
        (
            "--image-config=",
            "registries",
            json!({ "configMap": { "name": "ringfence-registries" } }),
        ),
        (
            "--image-credential-provider-config=",
            "registries",
            json!({ "configMap": { "name": "ringfence-registries" } }),
        ),
        (
            "--image-credential-provider-bin-dir=",
            "credential-providers",
            json!({ "hostPath": { "path": "/opt/plugins" } }),
        ),
    ] {
        let path = args.iter().find_map(|arg| arg.strip_prefix(flag)).expect(flag);
        let mount = mounts.iter().find(|mount| mount["name"] == volume).expect(volume);
        assert!(path.starts_with(mount["mountPath"].as_str().expect("a path")), "{path} {mount}");
        let volumes = spec["volumes"].as_array().expect("volumes");
        let mut found = volumes.iter().find(|one| one["name"] == volume).expect(volume).clone();
        found.as_object_mut().expect("an object").remove("name");
        assert_eq!(found, source);
    }
    let data = &objects
        .of("ConfigMap")
        .find(|map| map["metadata"]["name"] == "ringfence-registries")
        .expect("the files")["data"];
    for (file, value) in [
        ("images.yaml", &values()["registries"]["images"]),
        ("credential-providers.yaml", &values()["registries"]["credentialProviders"]["config"]),
    ] {
        let text = data[file].as_str().expect(file);
        assert_eq!(&serde_saphyr::from_str::<Value>(text).expect("YAML"), value);
    }
}

#[test]
fn other_files_need_other_pods_and_none_leave_nothing() {
    let Some(chart) = Chart::here() else { return };
    let mark = |values: &Value| {
        let objects = chart.objects(values);
        pod(&objects)["metadata"]["annotations"]["ringfence.dev/registries"].clone()
    };
    let mut other = values();
    other["registries"]["images"]["r.example/agent:1"]["user"] = "1001".into();
    assert!(mark(&values()).is_string() && mark(&values()) != mark(&other));
    let objects = chart.objects(&json!({}));
    let pod = pod(&objects);
    assert!(pod["metadata"]["annotations"].is_null() && pod["spec"]["volumes"].is_null(), "{pod}");
    let maps = objects.of("ConfigMap").map(|map| map["metadata"]["name"].clone());
    assert!(!maps.into_iter().any(|name| name == "ringfence-registries"));
}

/// `helm upgrade --reuse-values` from a chart that had none of it.
#[test]
fn values_of_an_older_chart_render() {
    let Some(chart) = Chart::here() else { return };
    let old = json!({ "registries": { "credentialProviders": null, "mirrors": null, "images": null },
        "webhook": { "clientCa": null }, "openshift": null, "networkPolicy": null, "alerts": null,
        "podMonitor": null });
    let objects = chart.objects(&old);
    let of_these = |arg: &String| arg.contains("client-ca") || arg.contains("credential");
    assert!(!objects.webhook_args().iter().any(of_these));
}

#[test]
fn half_of_a_setting_is_refused() {
    let Some(chart) = Chart::here() else { return };
    for (values, words) in [
        (
            json!({ "webhook": { "clientCa": { "names": ["a.example"] } } }),
            "webhook.clientCa.configMap",
        ),
        (json!({ "webhook": { "clientCa": { "configMap": "ca" } } }), "webhook.clientCa.names"),
        (
            json!({ "registries": { "credentialProviders": { "volume": { "emptyDir": {} } } } }),
            "registries.credentialProviders.config",
        ),
    ] {
        let error = chart.text(&values).expect_err(words);
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn plugins_without_programs_are_refused() {
    let Some(chart) = Chart::here() else { return };
    let mut values = values();
    values["registries"]["credentialProviders"]["volume"] = json!({});
    let error = chart.text(&values).expect_err("no programs");
    assert!(error.contains("registries.credentialProviders.volume"), "{error}");
    let values = json!({ "registries": { "images": { "a": { "entrypiont": ["x"] } } } });
    let error = chart.text(&values).expect_err("a word that nobody knows");
    assert!(error.contains("entrypiont"), "{error}");
}

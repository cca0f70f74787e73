//! The look-up against a registry of a few lines on loopback: real HTTP, scripted answers.

mod double;

use std::sync::atomic::Ordering;

use serde_json::{Value, json};
use tokio::net::TcpListener;

use super::super::credentials;
use super::super::document::{NO_IMAGE, parse_config};
use super::super::fetch::system_trust_store_exists;
use super::*;
use double::{Store, digest, serve};

fn images(host: &str) -> Images {
    Images::new(ImagesConfig { insecure: vec![host.to_owned()], ..ImagesConfig::default() })
        .expect("a configuration")
}

fn amd64() -> Vec<String> {
    vec!["amd64".to_owned()]
}

fn skipped() -> bool {
    let skip = !system_trust_store_exists();
    if skip {
        println!("SKIPPED: this machine has no CA certificates");
    }
    skip
}

#[tokio::test]
async fn an_image_is_read_and_a_tag_is_asked_for_once() {
    if skipped() {
        return;
    }
    let mut store = Store::default();
    let digest = store.image(
        "team/app",
        Some("1"),
        &json!({ "Entrypoint": ["/app"], "Cmd": ["$HOME"], "User": "1000:1000",
            "WorkingDir": "/srv", "Env": ["A=b"], "Volumes": { "/v": {}, "/a/b": {} } }),
    );
    let store = Arc::new(store);
    let host = serve(Arc::clone(&store)).await;
    let images = images(&host);
    let image = format!("{host}/team/app:1");
    let expected = Config {
        entrypoint: vec!["/app".into()],
        cmd: vec!["$HOME".into()],
        user: "1000:1000".into(),
        working_dir: "/srv".into(),
        env: vec!["A=b".into()],
        volumes: vec!["/a/b".into(), "/v".into()],
        digest: Some(digest),
    };
    for _ in 0..3 {
        let config = images.config(&image, &amd64(), &[]).await.expect("an answer");
        assert_eq!(*config, expected);
    }
    assert_eq!(store.manifests_served.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn an_index_gives_the_architecture_asked_for_and_no_attestation() {
    if skipped() {
        return;
    }
    let mut store = Store::default();
    let same = json!({ "Entrypoint": ["/a"] });
    let amd = store.image("app", None, &same);
    let arm = store.image("app", None, &json!({ "Entrypoint": ["/b"] }));
    let attestation = store.image("app", None, &json!({ "Entrypoint": ["/attestation"] }));
    store.index(
        "app",
        "multi",
        &[("amd64", &attestation, true), ("amd64", &amd, false), ("arm64", &arm, false)],
    );
    let index = store.index("app", "same", &[("amd64", &amd, false), ("arm64", &amd, false)]);
    let host = serve(Arc::new(store)).await;
    let images = images(&host);
    let both = ["amd64".to_owned(), "arm64".to_owned()];
    let multi = format!("{host}/app:multi");
    let config = images.config(&multi, &both[..1], &[]).await.expect("an answer");
    assert_eq!(config.entrypoint, ["/a"]);
    let config = images.config(&multi, &both[1..], &[]).await.expect("an answer");
    assert_eq!(config.entrypoint, ["/b"]);
    let error = images.config(&multi, &both, &[]).await.expect_err("they differ");
    assert!(matches!(error, ImageError::Ambiguous { .. }), "{error}");
    let same = images.config(&format!("{host}/app:same"), &both, &[]).await.expect("they agree");
    // That of the whole, which every architecture can be pulled by.
    assert_eq!(same.digest, Some(index));
    let error = images.config(&multi, &["s390x".to_owned()], &[]).await.expect_err("none");
    assert!(error.to_string().contains("linux/amd64, linux/arm64"), "{error}");
}

#[tokio::test]
async fn a_digest_behind_a_tag_decides_and_is_compared() {
    if skipped() {
        return;
    }
    let mut store = Store::default();
    let first = store.image("app", Some("1"), &json!({ "Entrypoint": ["/first"] }));
    // The tag moves on.
    let second = store.image("app", Some("1"), &json!({ "Entrypoint": ["/second"] }));
    // A registry that answers with another image than it was asked for.
    let wrong = store.objects[&format!("/v2/app/manifests/{second}")].clone();
    let lie = digest(b"nothing");
    store.objects.insert(format!("/v2/app/manifests/{lie}"), wrong);
    let host = serve(Arc::new(store)).await;
    let images = images(&host);
    for (name, entrypoint, digest) in [
        (format!("{host}/app:1"), "/second", &second),
        (format!("{host}/app:1@{first}"), "/first", &first),
        (format!("{host}/app@{first}"), "/first", &first),
    ] {
        let config = images.config(&name, &amd64(), &[]).await.expect("an answer");
        assert_eq!((&*config.entrypoint[0], config.digest.as_ref()), (entrypoint, Some(digest)));
    }
    let error = images.config(&format!("{host}/app:1@{lie}"), &amd64(), &[]).await;
    assert!(matches!(error, Err(ImageError::Registry { .. })), "{error:?}");
}

#[tokio::test]
async fn credentials_are_tried_in_turn_and_named_in_the_error() {
    if skipped() {
        return;
    }
    let mut store = Store::default();
    store.image("app", Some("1"), &json!({ "Cmd": ["x"] }));
    // base64 of `u:right`
    store.basic = Some("dTpyaWdodA==");
    let host = serve(Arc::new(store)).await;
    let images = images(&host);
    let image = format!("{host}/app:1");
    let secret = |name: &str, password: &str| {
        let text = json!({ "auths": { &host: { "username": "u", "password": password } } });
        let text = text.to_string();
        credentials::parse(name, |key| (key == ".dockerconfigjson").then_some(text.as_bytes()))
            .expect("parses")
    };
    let (wrong, right) = (secret("wrong", "no"), secret("right", "right"));
    let error = images.config(&image, &amd64(), &wrong).await.expect_err("refused").to_string();
    assert!(error.contains("secret `wrong`") && error.contains("anonymously"), "{error}");
    let all = [wrong, right].concat();
    images.config(&image, &amd64(), &all).await.expect("the second secret fits");
    // Another tenant gains nothing from what is cached for the first.
    images.config(&image, &amd64(), &[]).await.expect_err("anonymous is still refused");
}

#[tokio::test]
async fn a_missing_image_names_the_remedy_and_not_what_the_registry_said() {
    if skipped() {
        return;
    }
    let host = serve(Arc::default()).await;
    let error = images(&host)
        .config(&format!("{host}/none:1"), &amd64(), &[])
        .await
        .expect_err("no such image");
    let text = error.to_string();
    assert!(error.fix().contains("readable") && !text.contains("must not be shown"), "{text}");
    assert!(!error.is_retryable());
}

#[tokio::test]
async fn a_registry_that_limits_requests_is_left_alone_by_whoever_asked() {
    if skipped() {
        return;
    }
    let mut store = Store { limits: true, ..Store::default() };
    for tag in ["1", "2", "3"] {
        store.image("app", Some(tag), &json!({ "Cmd": ["x"] }));
    }
    let store = Arc::new(store);
    let host = serve(Arc::clone(&store)).await;
    let images = images(&host);
    for tag in ["1", "2", "3"] {
        let error = images.config(&format!("{host}/app:{tag}"), &amd64(), &[]).await;
        let error = error.expect_err(tag);
        assert!(error.is_retryable() && error.to_string().contains("limits the rate"), "{error}");
        assert_eq!(store.manifests_served.load(Ordering::SeqCst), 1, "{tag}");
    }
    // A tenant with an account of theirs has a rate of their own.
    let text = json!({ "auths": { &host: { "registrytoken": "t" } } }).to_string();
    let own =
        credentials::parse("s", |key| (key == ".dockerconfigjson").then_some(text.as_bytes()));
    let config = images.config(&format!("{host}/app:1"), &amd64(), &own.expect("parses")).await;
    assert_eq!(config.expect("an answer").cmd, ["x"]);
}

#[tokio::test]
async fn a_registry_that_does_not_answer_is_retryable() {
    if skipped() {
        return;
    }
    let silent = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let host = silent.local_addr().expect("an address").to_string();
    let config = ImagesConfig {
        insecure: vec![host.clone()],
        limit: Duration::from_millis(200),
        ..ImagesConfig::default()
    };
    let error = Images::new(config)
        .expect("a configuration")
        .config(&format!("{host}/app:1"), &amd64(), &[])
        .await
        .expect_err("silence");
    assert!(error.is_retryable(), "{error}");
}

#[tokio::test]
async fn a_registry_that_hangs_holds_up_nobody_else() {
    if skipped() {
        return;
    }
    let mut store = Store::default();
    store.image("app", Some("1"), &json!({ "Cmd": ["x"] }));
    let well = serve(Arc::new(store)).await;
    let silent = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let hung = silent.local_addr().expect("an address").to_string();
    let limit = Duration::from_secs(5);
    let insecure = vec![well.clone(), hung.clone()];
    let images = Images::new(ImagesConfig { insecure, limit, ..ImagesConfig::default() })
        .expect("a configuration");
    let mut waiting = tokio::task::JoinSet::new();
    for number in 0..=CONCURRENT {
        let (images, image) = (images.clone(), format!("{hung}/app:{number}"));
        waiting.spawn(async move { images.config(&image, &amd64(), &[]).await });
    }
    while images.shared.running.free() > CONCURRENT - CONCURRENT_PER_REGISTRY {
        tokio::task::yield_now().await;
    }
    images.config(&format!("{well}/app:1"), &amd64(), &[]).await.expect("an answer");

    let texts: Vec<String> = waiting
        .join_all()
        .await
        .into_iter()
        .map(|answer| answer.expect_err("silence"))
        .inspect(|error| assert!(error.is_retryable(), "{error}"))
        .map(|error| error.to_string())
        .collect();
    let with = |words: &str| texts.iter().filter(|text| text.contains(words)).count();
    assert_eq!(with("did not answer in time"), CONCURRENT_PER_REGISTRY, "{texts:?}");
    assert_eq!(with("not asked"), CONCURRENT + 1 - CONCURRENT_PER_REGISTRY, "{texts:?}");
}

#[test]
fn an_artifact_is_not_an_image() {
    assert_eq!(parse_config(b"{}"), Err(NO_IMAGE));
    assert_eq!(parse_config(b"[]"), Err(NO_IMAGE));
    assert_eq!(parse_config(br#"{"rootfs":{},"config":{"Entrypoint":"sh"}}"#), Err(NO_IMAGE));
    assert_eq!(parse_config(br#"{"rootfs":{},"config":null}"#), Ok(Config::default()));
}

/// What the runtime would mount and we would not see is not read at all.
#[test]
fn volumes_are_read_or_the_image_is_refused() {
    let parse = |config: &str| {
        let text =
            format!(r#"{{"rootfs": {{}}, "container_config": {{"Volumes": {{}}}}, {config}}}"#);
        parse_config(text.as_bytes()).map(|config| config.volumes)
    };
    assert_eq!(parse(r#""config": {"Volumes": {"/b": {}, "/a": null}}"#).unwrap(), ["/a", "/b"]);
    for none in [r#""config": {"Volumes": null}"#, r#""config": {}"#, r#""config": null"#] {
        assert!(parse(none).unwrap().is_empty(), "{none}");
    }
    for hidden in [
        r#""config": {"volumes": {"/a": {}}}"#,
        r#""config": {"Volume\u017f": {"/a": {}}}"#,
        r#""config": {"Volumes": {"/a": {}}, "Volumes": {}}"#,
        r#""config": {"Volumes": {}, "VOLUMES": {"/a": {}}}"#,
        r#""config": {"Volumes": {"/a": {}}}, "config": {}"#,
        r#""config": {}, "Config": {"Volumes": {"/a": {}}}"#,
        r#""Config": {"Volumes": {"/a": {}}}"#,
    ] {
        let error = parse(hidden).expect_err(hidden);
        assert!(error.contains("twice or in another spelling"), "{hidden}: {error}");
    }
    assert_eq!(parse(r#""config": {"Volumes": ["/a"]}"#), Err(NO_IMAGE));
}

#[test]
fn env_may_differ_between_architectures_and_volumes_may_not() {
    let of = |env: &str, volume: &str| Config {
        env: vec![env.into()],
        volumes: vec![volume.into()],
        ..Config::default()
    };
    assert!(of("ARCH=amd64", "/v").is_fenced_like(&of("ARCH=arm64", "/v")));
    assert!(!of("A=b", "/v").is_fenced_like(&of("A=b", "/w")));
}

/// Which of them a node takes is the runtime's business, so they have to agree.
#[tokio::test]
async fn every_image_that_a_runtime_may_take_is_read() {
    if skipped() {
        return;
    }
    let mut store = Store::default();
    let good = store.image("app", None, &json!({ "Entrypoint": ["/a"] }));
    let twin = store.image("app", None, &json!({ "Entrypoint": ["/a"], "Env": ["A=b"] }));
    let evil = store.image("app", None, &json!({ "Entrypoint": ["/a"], "Volumes": { "/x": {} } }));
    store.index("app", "twins", &[("amd64", &good, false), ("amd64", &twin, false)]);
    store.index("app", "evil", &[("x86_64", &evil, false), ("amd64", &good, false)]);
    let entry = |platform: Value| {
        json!({ "digest": evil, "size": 1, "platform": platform,
            "annotations": { "vnd.docker.reference.type": "attestation-manifest" },
            "mediaType": "application/vnd.oci.image.manifest.v1+json" })
    };
    let mut plain = entry(json!({ "os": "linux", "architecture": "amd64" }));
    plain["digest"] = json!(good);
    let disguised = entry(json!({ "os": "linux", "architecture": "amd64", "variant": "v3" }));
    let index = |more: Value| {
        let mut index = json!({ "schemaVersion": 2, "manifests": [plain.clone()],
            "mediaType": "application/vnd.oci.image.index.v1+json" });
        index.as_object_mut().expect("an object").extend(more.as_object().cloned().unwrap());
        index
    };
    store.manifest("app", Some("annotated"), &index(json!({ "manifests": [plain, disguised] })));
    store.manifest("app", Some("spelling"), &index(json!({ "Manifests": [disguised] })));
    let host = serve(Arc::new(store)).await;
    let images = images(&host);
    images.config(&format!("{host}/app:twins"), &amd64(), &[]).await.expect("they agree");
    for (tag, word) in
        [("evil", "several"), ("annotated", "several"), ("spelling", "another spelling")]
    {
        let image = format!("{host}/app:{tag}");
        let error = images.config(&image, &amd64(), &[]).await.expect_err(tag);
        assert!(error.to_string().contains(word), "{tag}: {error}");
    }
}

#[tokio::test]
async fn an_image_that_is_given_is_asked_of_nobody() {
    let given = Given::read("r.example/app: {cmd: [run]}").expect("reads");
    let images =
        Images::new(ImagesConfig { given, ..ImagesConfig::default() }).expect("a configuration");
    let config = images.config("r.example/app:latest", &amd64(), &[]).await.expect("an answer");
    assert_eq!(config.cmd, ["run"]);
}

#[tokio::test]
async fn a_mirror_is_asked_first_and_the_registry_where_it_fails() {
    if skipped() {
        return;
    }
    let (mut registry, mut mirror) = (Store::default(), Store::default());
    for tag in ["both", "here"] {
        registry.image("app", Some(tag), &json!({ "Cmd": ["registry"] }));
    }
    for tag in ["both", "there"] {
        mirror.image("cache/app", Some(tag), &json!({ "Cmd": ["mirror"] }));
    }
    // base64 of `u:right`: it is asked with what is for the mirror, not with what is for the registry.
    mirror.basic = Some("dTpyaWdodA==");
    let (registry, mirror) = (Arc::new(registry), Arc::new(mirror));
    let (host, other) = (serve(Arc::clone(&registry)).await, serve(Arc::clone(&mirror)).await);
    let silent = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let dead = silent.local_addr().expect("an address").to_string();
    drop(silent);
    let mirrors = [format!("{host}={dead}"), format!("{host}={other}/cache")]
        .iter()
        .map(|text| text.parse().expect("a mirror"))
        .collect();
    let insecure = vec![host.clone(), other.clone(), dead.clone()];
    let images = Images::new(ImagesConfig { mirrors, insecure, ..ImagesConfig::default() })
        .expect("a configuration");
    let secret = |host: &str, user: &str, password: &str| {
        let text = json!({ "auths": { host: { "username": user, "password": password } } });
        let text = text.to_string();
        credentials::parse("s", |key| (key == ".dockerconfigjson").then_some(text.as_bytes()))
            .expect("parses")
    };
    let all = [secret(&host, "registry", "x"), secret(&other, "u", "right")].concat();
    for (tag, cmd) in [("both", "mirror"), ("there", "mirror"), ("here", "registry")] {
        let config = images.config(&format!("{host}/app:{tag}"), &amd64(), &all).await;
        assert_eq!(config.expect(tag).cmd, [cmd], "{tag}");
    }
    let error = images.config(&format!("{host}/app:none"), &amd64(), &all).await;
    let error = error.expect_err("nowhere");
    let text = error.to_string();
    for part in [
        &format!("{dead}, anonymously"),
        &format!("{other}, secret `s`"),
        &format!("registry `{host}`"),
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
}

#[tokio::test]
async fn a_mirror_that_hangs_costs_its_time_once() {
    if skipped() {
        return;
    }
    let mut registry = Store::default();
    for tag in ["1", "2", "3"] {
        registry.image("app", Some(tag), &json!({ "Cmd": ["registry"] }));
    }
    let host = serve(Arc::new(registry)).await;
    // Accepts by its backlog, and never says a word.
    let silent = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let hung = silent.local_addr().expect("an address").to_string();
    let mirrors = std::iter::once(format!("{host}={hung}").parse().expect("a mirror")).collect();
    let insecure = vec![host.clone(), hung.clone()];
    let images = Images::new(ImagesConfig { mirrors, insecure, ..ImagesConfig::default() })
        .expect("a configuration");
    // How often it was connected to since it was looked at last.
    let mut connections = Vec::new();
    let mut asked = async || {
        let before = connections.len();
        let pause = Duration::from_millis(200);
        while let Ok(accepted) = tokio::time::timeout(pause, silent.accept()).await {
            connections.push(accepted.expect("a connection"));
        }
        connections.len() - before
    };
    for (tag, is_asked) in [("1", true), ("2", false), ("3", false)] {
        let config = images.config(&format!("{host}/app:{tag}"), &amd64(), &[]).await;
        assert_eq!(config.expect(tag).cmd, ["registry"]);
        assert!(images.shared.resting.has(&format!("{hung}/app")));
        assert_eq!(asked().await > 0, is_asked, "{tag}");
    }
}

#[tokio::test]
async fn the_nodes_credentials_come_after_the_pods_and_before_none() {
    if skipped() {
        return;
    }
    let mut store = Store::default();
    store.image("app", Some("1"), &json!({ "Cmd": ["x"] }));
    store.basic = Some("dTpyaWdodA==");
    let host = serve(Arc::new(store)).await;
    let dir = tempfile::tempdir().expect("a directory");
    let program = dir.path().join("cloud");
    let answer = json!({ "apiVersion": "credentialprovider.kubelet.k8s.io/v1",
        "cacheKeyType": "Registry", "auth": { &host: { "username": "u", "password": "right" } } });
    let asked = dir.path().join("asked");
    let script = format!("#!/bin/sh\necho >>{}\necho '{answer}'\n", asked.display());
    std::fs::write(&program, script).expect("written");
    let mode = <std::fs::Permissions as std::os::unix::fs::PermissionsExt>::from_mode(0o755);
    std::fs::set_permissions(&program, mode).expect("set");
    let config = format!(
        "apiVersion: kubelet.config.k8s.io/v1\nkind: CredentialProviderConfig\nproviders:\n- name: cloud\n  \
         matchImages: ['{host}']\n  defaultCacheDuration: 1h\n  apiVersion: credentialprovider.kubelet.k8s.io/v1\n"
    );
    let providers = Providers::read(&config, dir.path()).expect("reads");
    let config =
        ImagesConfig { providers, insecure: vec![host.clone()], ..ImagesConfig::default() };
    let images = Images::new(config).expect("a configuration");
    let secret = |password: &str| {
        let text = json!({ "auths": { &host: { "username": "u", "password": password } } });
        let text = text.to_string();
        credentials::parse("s", |key| (key == ".dockerconfigjson").then_some(text.as_bytes()))
            .expect("parses")
    };
    let image = format!("{host}/app:1");
    images.config(&image, &amd64(), &secret("right")).await.expect("the pod's own");
    assert!(!asked.exists(), "no plugin for what the pod can read");
    images.config(&image, &amd64(), &secret("wrong")).await.expect("the nodes'");
    assert!(asked.exists());
    std::fs::write(&program, "#!/bin/sh\nexit 1\n").expect("written");
    let other = images.config(&format!("{host}/none:1"), &amd64(), &[]).await;
    let text = other.expect_err("no such image").to_string();
    assert!(text.contains("credential provider `cloud`") && text.contains("anonymously"), "{text}");
}

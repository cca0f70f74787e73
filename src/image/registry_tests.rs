//! The look-up against a registry of a few lines on loopback: real HTTP, scripted answers.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::json;
use sha2::{Digest as _, Sha256};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;

use super::super::credentials;
use super::*;

fn digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().fold("sha256:".to_owned(), |text, b| format!("{text}{b:02x}"))
}

/// What the registry holds, by URL path; and how many requests for manifests it saw.
#[derive(Default)]
struct Store {
    objects: BTreeMap<String, (String, Vec<u8>)>,
    basic: Option<&'static str>,
    manifests_served: AtomicUsize,
}

impl Store {
    fn blob(&mut self, repository: &str, bytes: &[u8]) -> String {
        let digest = digest(bytes);
        let path = format!("/v2/{repository}/blobs/{digest}");
        self.objects.insert(path, ("application/octet-stream".into(), bytes.to_vec()));
        digest
    }

    fn manifest(&mut self, repository: &str, tag: Option<&str>, value: &Value) -> String {
        let bytes = value.to_string().into_bytes();
        let digest = digest(&bytes);
        let kind = value["mediaType"].as_str().expect("a media type").to_owned();
        for reference in [Some(digest.as_str()), tag].into_iter().flatten() {
            let path = format!("/v2/{repository}/manifests/{reference}");
            self.objects.insert(path, (kind.clone(), bytes.clone()));
        }
        digest
    }

    fn image(&mut self, repository: &str, tag: Option<&str>, config: &Value) -> String {
        let bytes = json!({ "architecture": "amd64", "os": "linux", "config": config,
            "rootfs": { "type": "layers", "diff_ids": [] } })
        .to_string();
        let config = self.blob(repository, bytes.as_bytes());
        self.manifest(
            repository,
            tag,
            &json!({ "schemaVersion": 2, "layers": [],
                "mediaType": "application/vnd.oci.image.manifest.v1+json",
                "config": { "mediaType": "application/vnd.oci.image.config.v1+json",
                    "digest": config, "size": bytes.len() } }),
        )
    }

    fn index(&mut self, repository: &str, tag: &str, entries: &[(&str, &str, bool)]) {
        let manifests: Vec<Value> = entries
            .iter()
            .map(|(architecture, digest, attestation)| {
                let mut entry = json!({ "digest": digest, "size": 1,
                    "mediaType": "application/vnd.oci.image.manifest.v1+json",
                    "platform": { "os": "linux", "architecture": architecture } });
                if *attestation {
                    entry["annotations"] =
                        json!({ "vnd.docker.reference.type": "attestation-manifest" });
                }
                entry
            })
            .collect();
        self.manifest(
            repository,
            Some(tag),
            &json!({ "schemaVersion": 2, "manifests": manifests,
                "mediaType": "application/vnd.oci.image.index.v1+json" }),
        );
    }

    fn answer(&self, head: &str) -> (&'static str, String, Vec<u8>) {
        let path = head.split(' ').nth(1).unwrap_or_default();
        if let Some(wanted) = self.basic {
            let given = head.lines().any(|line| {
                line.to_ascii_lowercase().starts_with("authorization:") && line.contains(wanted)
            });
            if !given {
                let headers = "www-authenticate: Basic realm=\"test\"\r\n".to_owned();
                return ("401 Unauthorized", headers, Vec::new());
            }
        }
        if path.contains("/manifests/") {
            self.manifests_served.fetch_add(1, Ordering::SeqCst);
        }
        match self.objects.get(path) {
            Some((kind, bytes)) => ("200 OK", format!("content-type: {kind}\r\n"), bytes.clone()),
            None if path == "/v2/" => ("200 OK", String::new(), b"{}".to_vec()),
            None => ("404 Not Found", String::new(), b"a body that must not be shown".to_vec()),
        }
    }
}

/// Serves the store until the test ends; returns `host:port`.
async fn serve(store: Arc<Store>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let host = listener.local_addr().expect("an address").to_string();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let store = Arc::clone(&store);
            tokio::spawn(async move {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    match stream.read_u8().await {
                        Ok(byte) => head.push(byte),
                        Err(_) => return,
                    }
                }
                let (status, headers, body) = store.answer(&String::from_utf8_lossy(&head));
                let length = body.len();
                let head = format!(
                    "HTTP/1.1 {status}\r\n{headers}content-length: {length}\r\nconnection: close\r\n\r\n"
                );
                let _ = stream.write_all(head.as_bytes()).await;
                let _ = stream.write_all(&body).await;
            });
        }
    });
    host
}

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
    store.image(
        "team/app",
        Some("1"),
        &json!({ "Entrypoint": ["/app"], "Cmd": ["$HOME"], "User": "1000:1000",
            "WorkingDir": "/srv", "Env": ["A=b"] }),
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
    store.index("app", "same", &[("amd64", &amd, false), ("arm64", &amd, false)]);
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
    images.config(&format!("{host}/app:same"), &both, &[]).await.expect("they agree");
    let error = images.config(&multi, &["s390x".to_owned()], &[]).await.expect_err("none");
    assert!(error.to_string().contains("linux/amd64, linux/arm64"), "{error}");
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
    assert!(error.fix().contains("command:") && !text.contains("must not be shown"), "{text}");
    assert!(!error.is_retryable());
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

#[test]
fn an_artifact_is_not_an_image() {
    assert_eq!(parse_config(b"{}"), None);
    assert_eq!(parse_config(b"[]"), None);
    assert_eq!(parse_config(br#"{"rootfs":{},"config":{"Entrypoint":"sh"}}"#), None);
    assert_eq!(parse_config(br#"{"rootfs":{},"config":null}"#), Some(Config::default()));
}

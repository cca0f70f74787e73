//! A registry of a few lines.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;

pub(super) fn digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().fold("sha256:".to_owned(), |text, b| format!("{text}{b:02x}"))
}

/// What the registry holds, by URL path; and how many requests for manifests it saw.
#[derive(Default)]
pub(super) struct Store {
    pub(super) objects: BTreeMap<String, (String, Vec<u8>)>,
    pub(super) basic: Option<&'static str>,
    /// Whoever has no credentials is told to come later.
    pub(super) limits: bool,
    pub(super) manifests_served: AtomicUsize,
}

impl Store {
    pub(super) fn blob(&mut self, repository: &str, bytes: &[u8]) -> String {
        let digest = digest(bytes);
        let path = format!("/v2/{repository}/blobs/{digest}");
        self.objects.insert(path, ("application/octet-stream".into(), bytes.to_vec()));
        digest
    }

    pub(super) fn manifest(
        &mut self,
        repository: &str,
        tag: Option<&str>,
        value: &Value,
    ) -> String {
        let bytes = value.to_string().into_bytes();
        let digest = digest(&bytes);
        let kind = value["mediaType"].as_str().expect("a media type").to_owned();
        for reference in [Some(digest.as_str()), tag].into_iter().flatten() {
            let path = format!("/v2/{repository}/manifests/{reference}");
            self.objects.insert(path, (kind.clone(), bytes.clone()));
        }
        digest
    }

    pub(super) fn image(&mut self, repository: &str, tag: Option<&str>, config: &Value) -> String {
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

    pub(super) fn index(
        &mut self,
        repository: &str,
        tag: &str,
        entries: &[(&str, &str, bool)],
    ) -> String {
        let manifests: Vec<Value> = entries
            .iter()
            .map(|(architecture, digest, attestation)| {
                let mut entry = json!({ "digest": digest, "size": 1,
                    "mediaType": "application/vnd.oci.image.manifest.v1+json",
                    "platform": { "os": "linux", "architecture": architecture } });
                if *attestation {
                    entry["platform"] = json!({ "os": "unknown", "architecture": "unknown" });
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
        )
    }

    pub(super) fn answer(&self, head: &str) -> (&'static str, String, Vec<u8>) {
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
        let anonymous = !head.to_ascii_lowercase().contains("\r\nauthorization:");
        if path.contains("/manifests/") {
            self.manifests_served.fetch_add(1, Ordering::SeqCst);
        }
        if self.limits && anonymous && path.contains("/manifests/") {
            return ("429 Too Many Requests", "retry-after: 60\r\n".to_owned(), Vec::new());
        }
        match self.objects.get(path) {
            Some((kind, bytes)) => ("200 OK", format!("content-type: {kind}\r\n"), bytes.clone()),
            None if path == "/v2/" => ("200 OK", String::new(), b"{}".to_vec()),
            None => ("404 Not Found", String::new(), b"a body that must not be shown".to_vec()),
        }
    }
}

/// Serves the store until the test ends; returns `host:port`.
pub(super) async fn serve(store: Arc<Store>) -> String {
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

//! The release, for the tests that change it, and the program that a person types.

use std::process::Stdio;
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use kube::api::ListParams;
use kube::{Api, Client, ResourceExt as _};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::process::Command;
use tokio::time::{sleep, timeout};

use crate::place::{Done, PATIENCE, Place};
use crate::rig::RELEASE_NAMESPACE;

pub const RELEASE: &str = "ringfence";
pub const CHART: &str = "charts/ringfence";

/// Runs a program to its end.
async fn run(program: &str, words: &[&str], input: &str) -> Done {
    let mut child = Command::new(program)
        .args(words)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap_or_else(|error| panic!("{program}: {error}"));
    let mut stdin = child.stdin.take().expect("it is piped");
    // It may end without having read all.
    drop(stdin.write_all(input.as_bytes()).await);
    drop(stdin);
    let output = child.wait_with_output().await.expect("it ends");
    let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.push_str(&String::from_utf8_lossy(&output.stderr));
    Done { code: output.status.code().unwrap_or(-1), text }
}

/// `helm` in the release namespace.
pub async fn helm(words: &[&str], input: &str) -> Done {
    run("helm", &[&["-n", RELEASE_NAMESPACE], words].concat(), input).await
}

/// The same, which has to succeed.
pub async fn helm_done(words: &[&str], input: &str) -> String {
    let done = helm(words, input).await;
    assert_eq!(done.code, 0, "helm {words:?}: {}", done.text);
    done.text
}

/// `kubectl` in the release namespace.
pub async fn kubectl(words: &[&str], input: &str) -> Done {
    run("kubectl", &[&["-n", RELEASE_NAMESPACE], words].concat(), input).await
}

/// `ringfence`.
pub async fn ringfence(words: &[&str]) -> Done {
    run(env!("CARGO_BIN_EXE_ringfence"), words, "").await
}

/// The release, with the values it has when the test begins.
pub struct Release {
    pub client: Client,
    place: Place,
    values: Value,
}

impl Release {
    pub async fn of(place: &Place) -> Self {
        let words = ["get", "values", RELEASE, "-o", "json"];
        let values = serde_json::from_str(&helm_done(&words, "").await).expect("values");
        Self { client: place.rig.client.clone(), place: place.clone(), values }
    }

    /// The values it had.
    pub fn values(&self) -> &Value {
        &self.values
    }

    /// `helm upgrade --wait`, with `more` beside the values that the release had.
    pub async fn upgrade(&self, more: Value, wait: bool) {
        let mut values = self.values.clone();
        for (key, value) in more.as_object().expect("values") {
            values[key] = value.clone();
        }
        let mut words = vec!["upgrade", RELEASE, CHART, "--reset-values", "-f", "-"];
        if wait {
            words.extend(["--wait", "--timeout", "180s"]);
        }
        helm_done(&words, &values.to_string()).await;
    }

    /// Replicas that are not about to end.
    pub async fn pods(&self) -> Vec<Pod> {
        let api: Api<Pod> = Api::namespaced(self.client.clone(), RELEASE_NAMESPACE);
        let list = ListParams::default().labels("app.kubernetes.io/component=webhook");
        let all = api.list(&list).await.expect("pods").items;
        all.into_iter().filter(|pod| pod.metadata.deletion_timestamp.is_none()).collect()
    }

    /// Waits for it; says what the replicas say where it does not come.
    pub async fn until(&self, what: &str, condition: impl AsyncFn() -> bool) {
        let waiting = async {
            while !condition().await {
                sleep(Duration::from_millis(500)).await;
            }
        };
        if timeout(PATIENCE, waiting).await.is_err() {
            let mut said = String::new();
            for pod in self.pods().await {
                let answer = ask(&pod, "/readyz").await;
                said.extend([pod.name_any().as_str(), ": ", answer.as_str(), "\n"]);
            }
            panic!("no release that {what} after {PATIENCE:?}: {said}");
        }
    }

    /// Waits until pods are admitted, whatever was between.
    pub async fn admits(&self) {
        self.until("admits pods", async || {
            let pod = self.place.agent_pod("tried", |_, _| {});
            let pod = serde_json::from_value(pod).expect("a pod");
            let dry = kube::api::PostParams { dry_run: true, ..Default::default() };
            self.place.api::<Pod>().create(&dry, &pod).await.is_ok()
        })
        .await;
    }

    /// Back to what it was.
    pub async fn restore(&self) {
        self.upgrade(json!({}), true).await;
        self.admits().await;
    }
}

/// What a replica answers on its health port; nothing where it does not.
pub async fn ask(pod: &Pod, path: &str) -> String {
    let ip = pod.status.as_ref().and_then(|status| status.pod_ip.clone()).unwrap_or_default();
    let asking = async {
        let mut stream = TcpStream::connect((ip.as_str(), 8080)).await?;
        let request = format!("GET {path} HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut text = String::new();
        stream.read_to_string(&mut text).await?;
        Ok::<_, std::io::Error>(text)
    };
    timeout(Duration::from_secs(5), asking).await.ok().and_then(Result::ok).unwrap_or_default()
}

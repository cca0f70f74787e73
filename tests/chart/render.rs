//! helm, and what came out of it.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use serde_json::Value;

/// A helm that can be run.
pub fn helm() -> Option<PathBuf> {
    let named = std::env::var_os("HELM").map(PathBuf::from);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let in_path = std::env::split_paths(&path).map(|dir| dir.join("helm"));
    let found = named.into_iter().chain(in_path).find(|path| path.is_file());
    found.or_else(|| {
        let home = std::env::var_os("HOME").map(PathBuf::from).unwrap_or_default();
        let cache = std::env::var_os("RINGFENCE_CACHE").map_or_else(
            || {
                let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
                cache.unwrap_or_else(|| home.join(".cache")).join("ringfence")
            },
            PathBuf::from,
        );
        let all = std::fs::read_dir(cache.join("cluster")).ok()?;
        all.filter_map(|entry| Some(entry.ok()?.path().join("helm"))).find(|path| path.is_file())
    })
}

/// The chart, and a helm to render it.
pub struct Chart(PathBuf);

impl Chart {
    /// None, and a word about it, where there is no helm.
    pub fn here() -> Option<Self> {
        let helm = helm();
        if helm.is_none() {
            eprintln!("SKIPPED: no helm in HELM, PATH or the cluster rig's cache");
        }
        helm.map(Self)
    }

    /// The manifests with these values, or what helm says.
    pub fn text(&self, values: &Value) -> Result<String, String> {
        let mut child = Command::new(&self.0)
            .args([
                "template",
                "ringfence",
                "charts/ringfence",
                "-n",
                "release",
                "-f",
                "-",
                "--kube-version=1.36",
            ])
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("helm runs");
        let mut stdin = child.stdin.take().expect("it is piped");
        stdin.write_all(values.to_string().as_bytes()).expect("helm reads");
        drop(stdin);
        let output = child.wait_with_output().expect("helm ends");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
    }

    /// The same as objects.
    pub fn objects(&self, values: &Value) -> Objects {
        let text = self.text(values).unwrap_or_else(|error| panic!("{values}: {error}"));
        Objects(serde_saphyr::from_multiple(&text).expect("YAML"))
    }
}

/// What was rendered.
pub struct Objects(pub Vec<Value>);

impl Objects {
    /// The objects of a kind.
    pub fn of<'a>(&'a self, kind: &'a str) -> impl Iterator<Item = &'a Value> {
        self.0.iter().filter(move |object| object["kind"] == kind)
    }

    /// The entries of both webhook configurations.
    pub fn webhooks(&self) -> impl Iterator<Item = &Value> {
        let kinds = ["MutatingWebhookConfiguration", "ValidatingWebhookConfiguration"];
        let all = kinds.into_iter().flat_map(|kind| self.of(kind));
        all.flat_map(|object| object["webhooks"].as_array().into_iter().flatten())
    }

    /// The flags of the webhook.
    pub fn webhook_args(&self) -> Vec<String> {
        let deployment = self.of("Deployment").next().expect("a Deployment");
        let args = &deployment["spec"]["template"]["spec"]["containers"][0]["args"];
        serde_json::from_value(args.clone()).expect("words")
    }
}

/// Every rule of a role.
pub fn rules(objects: &Objects) -> impl Iterator<Item = Value> {
    let roles = ["ClusterRole", "Role"].into_iter().flat_map(|kind| objects.of(kind));
    roles.flat_map(|role| role["rules"].as_array().cloned().unwrap_or_default())
}

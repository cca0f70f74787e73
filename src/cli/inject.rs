//! `ringfence inject`: a manifest as the webhook would admit it, without a cluster.
//!
//! The same function as the webhook's, so the output is what a cluster with the same settings
//! stores. What the webhook would look up is given by flag.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, bail, ensure};
use serde_json::Value;

use crate::admission::{
    ImageConfig, Namespace, Needs, Outcome, POLICY_KEYS, PolicySource, Settings, inject_into, needs,
};
use crate::image::Given;

/// The largest manifest in bytes.
const MAX_MANIFEST: u64 = 64 << 20;

/// Prints a manifest with every pod and pod template in it fenced.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The manifest, YAML (any number of documents) or JSON; `-` is stdin.
    #[arg(short, long, value_name = "FILE", required = true)]
    filename: Vec<PathBuf>,
    /// A file of the policy: `policy.yaml`, `policy.rego` or `upstream-ca.crt`. What it is is told
    /// by its extension.
    #[arg(long, value_name = "FILE", required = true)]
    policy: Vec<PathBuf>,
    /// Name of the namespace that the manifest is for; messages name it.
    #[arg(short, long, value_name = "NAME", default_value = "default")]
    namespace: String,
    /// The namespace is labelled `strict` instead of `enabled`.
    #[arg(long)]
    strict: bool,
    /// An annotation of the namespace, as in `ringfence.dev/unfenced-containers=mcp-*`.
    #[arg(long, value_name = "KEY=VALUE", value_parser = pair)]
    namespace_annotation: Vec<(String, String)>,
    /// The chart's values that shape a pod, as YAML.
    #[arg(long, value_name = "FILE")]
    settings: Option<PathBuf>,
    /// What images are, as YAML: a map of image to `entrypoint`, `cmd`, `user`, `workingDir`,
    /// `volumes` (a list of paths), `digest` (`sha256:…`; for --strict, which pins tags to it). Needed
    /// for every container that is to be fenced: the VOLUMEs of its image decide where the supervisor
    /// is mounted. An image with nothing of all that is `{}`.
    #[arg(long, value_name = "FILE")]
    image_config: Option<PathBuf>,
    /// How to print. Without it: JSON if the manifest is JSON, else YAML.
    #[arg(short, long, value_enum)]
    output: Option<Output>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Output {
    Json,
    Yaml,
}

fn pair(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("write KEY=VALUE")?;
    Ok((key.to_owned(), value.to_owned()))
}

/// Reads, injects, prints. Warnings go to stderr; a refusal is an error and nothing is printed.
pub(super) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let fencer = Fencer::new(&args)?;
    let mut documents = Vec::new();
    let mut json = true;
    for path in args.filename {
        let text = read(&path)?;
        json &= text.trim_start().starts_with(['{', '[']);
        let parsed = parse(&text).with_context(|| format!("cannot read {}", path.display()))?;
        documents.extend(parsed);
    }
    let mut warnings = Vec::new();
    for document in &mut documents {
        fencer.document(document, &mut warnings)?;
    }
    for warning in warnings {
        eprintln!("warning: {warning}");
    }
    let text = match args.output.unwrap_or(if json { Output::Json } else { Output::Yaml }) {
        Output::Json => print_json(&documents)?,
        Output::Yaml => print_yaml(&documents)?,
    };
    let written = std::io::stdout().lock().write_all(text.as_bytes());
    match written {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(ExitCode::SUCCESS),
        done => done.map(|()| ExitCode::SUCCESS).context("cannot write to stdout"),
    }
}

/// All that is the same for every pod of the manifest.
struct Fencer {
    namespace: Namespace,
    settings: Settings,
    policy: PolicySource,
    images: Given,
}

impl Fencer {
    fn new(args: &Args) -> anyhow::Result<Self> {
        let settings: Settings =
            args.settings.as_deref().map(load).transpose()?.unwrap_or_default();
        let images = args.image_config.as_deref().map(load_images).transpose()?;
        let mut data = BTreeMap::new();
        for path in &args.policy {
            let key = policy_key(path)?;
            ensure!(data.insert(key.to_owned(), read(path)?).is_none(), "two files are {key}");
        }
        let policy = PolicySource::read(&settings.default_policy, &data)?;
        let label = if args.strict { "strict" } else { "enabled" };
        let label = ("ringfence.dev/inject".to_owned(), label.to_owned());
        Ok(Self {
            namespace: Namespace {
                name: args.namespace.clone(),
                labels: BTreeMap::from([label]),
                annotations: args.namespace_annotation.iter().cloned().collect(),
                ..Namespace::default()
            },
            settings,
            policy,
            images: images.unwrap_or_default(),
        })
    }

    /// Fences every pod of a document; anything else stays as it is.
    fn document(&self, document: &mut Value, warnings: &mut Vec<String>) -> anyhow::Result<()> {
        let kind = document.get("kind").and_then(Value::as_str).unwrap_or_default();
        let path = match kind {
            "Pod" => "",
            "Deployment"
            | "ReplicaSet"
            | "StatefulSet"
            | "DaemonSet"
            | "Job"
            | "ReplicationController" => "/spec/template",
            "CronJob" => "/spec/jobTemplate/spec/template",
            "PodTemplate" => "/template",
            kind if kind.ends_with("List") => {
                let items = document.get_mut("items").and_then(Value::as_array_mut);
                return items
                    .into_iter()
                    .flatten()
                    .try_for_each(|item| self.document(item, warnings));
            }
            _ => return Ok(()),
        };
        let what = describe(document, kind);
        let Some(pod) = document.pointer_mut(path) else {
            bail!("{what} has no pod template");
        };
        self.pod(pod, warnings).with_context(|| format!("cannot fence {what}"))
    }

    fn pod(&self, pod: &mut Value, warnings: &mut Vec<String>) -> anyhow::Result<()> {
        let policy = &self.policy.reference;
        let needed = needs(pod, &self.namespace, &self.settings, policy)?;
        let images = self.images_for(&needed)?;
        match inject_into(pod, &self.namespace, &self.settings, &images, policy) {
            Outcome::Untouched => Ok(()),
            Outcome::Refuse(refusal) => Err(refusal.into()),
            Outcome::Inject(injection) => {
                warnings.extend(injection.warnings);
                Ok(())
            }
        }
    }

    /// What the webhook would read from registries.
    fn images_for(&self, needed: &Needs) -> anyhow::Result<BTreeMap<String, ImageConfig>> {
        needed
            .images
            .iter()
            .map(|need| {
                let config = self.images.find(&need.image).with_context(|| {
                    let (container, image, why) = (&need.container, &need.image, need.why());
                    format!(
                        "container {container}: image {image} is not known; {why}; tell what it \
                         is by --image-config"
                    )
                })?;
                Ok((need.container.clone(), (*config).clone()))
            })
            .collect()
    }
}

fn describe(document: &Value, kind: &str) -> String {
    let metadata = document.get("metadata");
    let name = |key| metadata.and_then(|metadata| metadata.get(key)).and_then(Value::as_str);
    format!("{kind} {}", name("name").or_else(|| name("generateName")).unwrap_or("without a name"))
}

/// The `ConfigMap` key that a file is.
fn policy_key(path: &Path) -> anyhow::Result<&'static str> {
    let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
    Ok(match extension {
        "yaml" | "yml" => POLICY_KEYS[0],
        "rego" => POLICY_KEYS[1],
        "crt" | "pem" => POLICY_KEYS[2],
        _ => bail!("{} is neither .yaml, .rego nor .crt", path.display()),
    })
}

fn read(path: &Path) -> anyhow::Result<String> {
    let mut text = String::new();
    let mut read_all =
        |from: &mut dyn std::io::Read| from.take(MAX_MANIFEST).read_to_string(&mut text);
    let done = if path == Path::new("-") {
        read_all(&mut std::io::stdin().lock())
    } else {
        std::fs::File::open(path).and_then(|mut file| read_all(&mut file))
    };
    let length = done.with_context(|| format!("cannot read {}", path.display()))?;
    ensure!((length as u64) < MAX_MANIFEST, "{} is too large", path.display());
    Ok(text)
}

fn load<T: serde::de::DeserializeOwned>(path: &Path) -> anyhow::Result<T> {
    serde_saphyr::from_str(&read(path)?).with_context(|| format!("cannot read {}", path.display()))
}

fn load_images(path: &Path) -> anyhow::Result<Given> {
    Given::read(&read(path)?).with_context(|| format!("cannot read {}", path.display()))
}

/// The documents of a manifest; empty ones are left out.
fn parse(text: &str) -> anyhow::Result<Vec<Value>> {
    // `defaultMode: 0400` is octal to Kubernetes, which reads YAML 1.1.
    let options = serde_saphyr::options! { legacy_octal_numbers: true };
    let documents: Vec<Value> = serde_saphyr::from_multiple_with_options(text, options)?;
    Ok(documents.into_iter().filter(|document| !document.is_null()).collect())
}

/// One document as it is, several as a List: JSON has no other way to hold them.
fn print_json(documents: &[Value]) -> anyhow::Result<String> {
    let mut text = match documents {
        [one] => serde_json::to_string_pretty(one)?,
        many => serde_json::to_string_pretty(
            &serde_json::json!({"apiVersion": "v1", "kind": "List", "items": many}),
        )?,
    };
    text.push('\n');
    Ok(text)
}

fn print_yaml(documents: &[Value]) -> anyhow::Result<String> {
    let mut text = String::new();
    for (index, document) in documents.iter().enumerate() {
        if index > 0 {
            text.push_str("---\n");
        }
        text.push_str(&serde_saphyr::to_string(document)?);
        if !text.ends_with('\n') {
            text.push('\n');
        }
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fencer(images: &[&str]) -> Fencer {
        let data = BTreeMap::from([("policy.yaml".to_owned(), "version: 1\n".to_owned())]);
        let label = ("ringfence.dev/inject".to_owned(), "enabled".to_owned());
        let lines: Vec<String> =
            images.iter().map(|name| format!("{name}: {{cmd: [run], user: '7'}}")).collect();
        Fencer {
            namespace: Namespace {
                name: "default".into(),
                labels: BTreeMap::from([label]),
                ..Namespace::default()
            },
            settings: Settings::default(),
            policy: PolicySource::read("p", &data).unwrap(),
            images: Given::read(&lines.join("\n")).expect("reads"),
        }
    }

    fn fence(text: &str) -> anyhow::Result<Vec<Value>> {
        let mut documents = parse(text)?;
        let fencer = fencer(&["agent"]);
        documents.iter_mut().try_for_each(|one| fencer.document(one, &mut Vec::new()))?;
        Ok(documents)
    }

    #[test]
    fn every_workload_is_fenced() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus/workloads");
        for file in std::fs::read_dir(dir).unwrap() {
            let path = file.unwrap().path();
            let text = std::fs::read_to_string(&path).unwrap();
            let made = fence(&text).unwrap();
            let printed = print_yaml(&made).unwrap();
            assert!(printed.contains("bin/ringfence-supervisor"), "{}", path.display());
            // What was printed reads back as the same, and is fenced already.
            assert_eq!(parse(&printed).unwrap(), made, "{}", path.display());
            assert_eq!(fence(&printed).unwrap(), made, "{}", path.display());
            assert_eq!(parse(&print_json(&made[..1]).unwrap()).unwrap(), made[..1]);
        }
    }

    #[test]
    fn other_documents_stay_as_they_are() {
        let text = "kind: ConfigMap\ndata: {on: \"yes\", \"y\": \"0755\", t: \"1e3\", d: \"2026-01-01\", n: \"~\", m: \"<<\", s: \"1:30\"}\n";
        let made = fence(text).unwrap();
        assert_eq!(made, parse(text).unwrap());
        let printed = print_yaml(&made).unwrap();
        assert_eq!(parse(&printed).unwrap(), made);
        for word in ["yes", "0755", "1e3", "2026-01-01", "~", "<<", "1:30"] {
            let quoted = [format!("\"{word}\""), format!("'{word}'")];
            assert!(quoted.iter().any(|quoted| printed.contains(quoted)), "{word} in {printed}");
        }
    }

    #[test]
    fn numbers_are_read_as_kubernetes_reads_them() {
        let made = parse("a: 0400\nb: yes\nc: 1.5\nd: null\n---\n---\n").unwrap();
        assert_eq!(made, [serde_json::json!({"a": 256, "b": true, "c": 1.5, "d": null})]);
    }

    #[test]
    fn errors_name_the_object_and_the_fix() {
        let pod = "kind: Pod\nmetadata: {name: p}\nspec: {containers: [{name: c, image: other}]}\n";
        let error = format!("{:#}", fence(pod).unwrap_err());
        assert!(
            error.contains("cannot fence Pod p") && error.contains("--image-config"),
            "{error}"
        );
        let host =
            "kind: Pod\nmetadata: {name: p}\nspec: {hostNetwork: true, containers: [{name: c}]}\n";
        let error = format!("{:#}", fence(host).unwrap_err());
        assert!(error.contains("spec.hostNetwork is true"), "{error}");
        assert!(fence("kind: Job\nmetadata: {name: j}\n").is_err());
        assert!(policy_key(Path::new("policy.txt")).is_err());
    }

    #[test]
    fn settings_are_read_strictly() {
        let settings: Settings = serde_saphyr::from_str(
            "delivery: image\nprofile: reference\nipFamily: ipv6\nlogLevel: info\n",
        )
        .unwrap();
        assert_eq!(settings.image, Settings::default().image);
        assert!(serde_saphyr::from_str::<Settings>("delivry: image\n").is_err());
    }
}

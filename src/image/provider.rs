//! Credentials of the nodes: the plugins by which a kubelet logs in to the registries of clouds.
//!
//! The configuration and the programs are the kubelet's own (`CredentialProviderConfig` v1, exec
//! protocol `credentialprovider.kubelet.k8s.io/v1`), so a cluster whose nodes need no pull secret for
//! their cloud's registry needs none here. A plugin is asked with the repository alone, on stdin; what
//! it answers is kept for as long and for as much as it says.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use k8s_openapi::jiff::SignedDuration;
use oci_client::Reference;
use oci_client::secrets::RegistryAuth;
use serde::Deserialize;
use serde_json::json;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::Command;

use super::cache::{Cache, FetchDied, Life};
use super::credentials::{Credential, is_named};
use super::permits::Permits;

const CONFIG: &str = "kubelet.config.k8s.io/v1";
const PROTOCOL: &str = "credentialprovider.kubelet.k8s.io/v1";
/// A plugin that has not answered by then, its turn included, has failed; the API server waits 10 s for
/// the whole answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// No answer is kept for longer.
const LONGEST: Duration = Duration::from_secs(30 * 86_400);
/// How long a failure is remembered.
const FAILURE_LIFE: Duration = Duration::from_secs(3);
/// The longest answer, in bytes.
const MAX_ANSWER: u64 = 1 << 20;
/// What goes to the log of what a plugin that failed said, in bytes.
const MAX_COMPLAINT: u64 = 2048;
/// Answers kept, by image.
const CACHED: usize = 512;
/// Answers for whole registries kept.
const CACHED_WIDE: usize = 128;
/// Runs of one plugin at once.
const CONCURRENT: usize = 8;
/// The same for one registry, so that names which lead nowhere hold up their own registry only.
const CONCURRENT_PER_REGISTRY: usize = 2;

/// Why the plugins cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProviderError {
    /// It is not such a configuration; the reader's words name the line.
    #[error(transparent)]
    Malformed(#[from] serde_saphyr::Error),
    /// It is of a kind or version that is not known here.
    #[error("{what} is {found:?}, and has to be {wanted:?}")]
    Version {
        /// The field.
        what: String,
        /// Its value.
        found: String,
        /// What it has to be.
        wanted: &'static str,
    },
    /// Something about one plugin.
    #[error("credential provider `{name}`: {reason}")]
    Provider {
        /// Its name.
        name: String,
        /// What is wrong.
        reason: String,
    },
}

/// The kubelet's file.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct File {
    api_version: String,
    kind: String,
    providers: Vec<Entry>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Entry {
    name: String,
    match_images: Vec<String>,
    default_cache_duration: String,
    api_version: String,
    #[serde(default)]
    args: Vec<String>,
    #[serde(default)]
    env: Vec<Variable>,
    /// A token of the pod's service account is what a kubelet may ask for, and nobody else.
    #[serde(default)]
    token_attributes: Option<serde_json::Value>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Variable {
    name: String,
    value: String,
}

/// What a plugin answers.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Answer {
    api_version: String,
    cache_key_type: Scope,
    #[serde(default)]
    cache_duration: Option<String>,
    #[serde(default)]
    auth: Option<BTreeMap<String, Login>>,
}

#[derive(Deserialize)]
struct Login {
    #[serde(default)]
    username: String,
    #[serde(default)]
    password: String,
}

/// For which images an answer is good.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
enum Scope {
    Image,
    Registry,
    Global,
}

type Credentials = Arc<Vec<Credential>>;

/// Why a plugin gave nothing, in words for the author of a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Failed(pub(super) &'static str);

impl From<FetchDied> for Failed {
    fn from(_: FetchDied) -> Self {
        Self("it was interrupted")
    }
}

/// The plugins of a cluster's nodes. Cheap to clone.
#[derive(Clone, Default)]
pub struct Providers(Arc<Vec<Arc<Provider>>>);

impl std::fmt::Debug for Providers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.0.iter().map(|provider| &provider.name)).finish()
    }
}

pub(super) struct Provider {
    name: String,
    program: PathBuf,
    args: Vec<String>,
    env: Vec<(String, String)>,
    images: Vec<String>,
    life: Duration,
    running: Permits,
    /// By repository.
    answers: Cache<String, Credentials, Failed>,
    /// Those for a whole registry, by its name, and for all, by the empty one.
    wide: Mutex<HashMap<String, (Credentials, Instant)>>,
}

impl Providers {
    /// Reads the text of the kubelet's `--image-credential-provider-config`, whose programs are in
    /// `directory`.
    ///
    /// # Errors
    /// When it is not such a file, a program is missing, or one wants a service account's token.
    pub fn read(text: &str, directory: &Path) -> Result<Self, ProviderError> {
        let file: File = serde_saphyr::from_str(text)?;
        is("apiVersion", &file.api_version, CONFIG)?;
        is("kind", &file.kind, "CredentialProviderConfig")?;
        let providers = file.providers.into_iter().map(|entry| Provider::of(entry, directory));
        Ok(Self(Arc::new(
            providers.map(|provider| provider.map(Arc::new)).collect::<Result<_, _>>()?,
        )))
    }

    /// The plugins that are to be asked for the image, in the order of the file.
    pub(super) fn of<'a>(
        &'a self,
        image: &'a Reference,
    ) -> impl Iterator<Item = &'a Arc<Provider>> {
        self.0.iter().filter(|provider| provider.images.iter().any(|one| is_named(one, image)))
    }
}

fn is(what: &str, found: &str, wanted: &'static str) -> Result<(), ProviderError> {
    if found == wanted {
        return Ok(());
    }
    let (what, found) = (what.to_owned(), found.to_owned());
    Err(ProviderError::Version { what, found, wanted })
}

impl Provider {
    fn of(entry: Entry, directory: &Path) -> Result<Self, ProviderError> {
        let name = entry.name;
        let wrong = |reason: String| ProviderError::Provider { name: name.clone(), reason };
        is(&format!("apiVersion of credential provider `{name}`"), &entry.api_version, PROTOCOL)?;
        if entry.token_attributes.is_some() {
            return Err(wrong(
                "tokenAttributes asks for a token of the pod's service account, which ringfence has not"
                    .to_owned(),
            ));
        }
        if name.is_empty() || name == "." || name == ".." || name.contains(['/', ' ', '\0']) {
            return Err(wrong("its name is no name of a file".to_owned()));
        }
        if entry.match_images.is_empty() {
            return Err(wrong("matchImages is empty".to_owned()));
        }
        let life = duration(&entry.default_cache_duration)
            .ok_or_else(|| wrong("defaultCacheDuration is no duration, as in 12h".to_owned()))?;
        let program = directory.join(&name);
        if !program.is_file() {
            return Err(wrong(format!("there is no program {}", program.display())));
        }
        Ok(Self {
            name,
            program,
            args: entry.args,
            env: entry.env.into_iter().map(|one| (one.name, one.value)).collect(),
            images: entry.match_images,
            life,
            running: Permits::new(CONCURRENT, CONCURRENT_PER_REGISTRY),
            answers: Cache::new(CACHED),
            wide: Mutex::default(),
        })
    }

    /// For messages.
    pub(super) fn source(&self) -> String {
        format!("credential provider `{}`", self.name)
    }

    /// What the plugin gives for the image. It goes on when the caller gives up, and serves the next.
    pub(super) async fn credentials(
        self: &Arc<Self>,
        image: &Reference,
    ) -> Result<Credentials, Failed> {
        let repository = format!("{}/{}", image.registry(), image.repository());
        let (this, registry) = (Arc::clone(self), image.registry().to_owned());
        let asked = repository.clone();
        self.answers
            .get(repository, || async move {
                match this.known_or_new(&registry, &asked).await {
                    Ok((credentials, until)) => {
                        let life = until.saturating_duration_since(Instant::now());
                        (Ok(credentials), Life(life))
                    }
                    Err(failed) => (Err(failed), Life(FAILURE_LIFE)),
                }
            })
            .await
    }

    async fn known_or_new(
        &self,
        registry: &str,
        repository: &str,
    ) -> Result<(Credentials, Instant), Failed> {
        if let Some(known) = self.known(registry) {
            return Ok(known);
        }
        let until = tokio::time::Instant::now() + PATIENCE;
        let turn = tokio::time::timeout_at(until, self.running.turn(registry)).await;
        let _turn = turn.map_err(|_| Failed("it was not asked: too many wait for it"))?;
        // Whoever had the turn before may have been told for this one as well.
        if let Some(known) = self.known(registry) {
            return Ok(known);
        }
        let running = tokio::time::timeout_at(until, self.run(repository)).await;
        let answer = running.map_err(|_| Failed("it did not answer in time"))??;
        let life = match &answer.cache_duration {
            None => self.life,
            Some(text) => duration(text).ok_or(Failed("its answer is not understood"))?,
        };
        let until = Instant::now() + life;
        let source = self.source();
        let credentials = answer.auth.unwrap_or_default().into_iter().map(|(key, login)| {
            Credential::of(&source, &key, RegistryAuth::Basic(login.username, login.password))
        });
        let credentials: Credentials = Arc::new(credentials.collect());
        let key = match answer.cache_key_type {
            Scope::Image => return Ok((credentials, until)),
            Scope::Registry => registry,
            Scope::Global => "",
        };
        let mut wide = self.wide.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        if wide.len() >= CACHED_WIDE {
            wide.retain(|_, (_, until)| *until > now);
        }
        if wide.len() >= CACHED_WIDE {
            let first =
                wide.iter().min_by_key(|(_, (_, until))| *until).map(|(key, _)| key.clone());
            first.map(|key| wide.remove(&key));
        }
        wide.insert(key.to_owned(), (Arc::clone(&credentials), until));
        Ok((credentials, until))
    }

    fn known(&self, registry: &str) -> Option<(Credentials, Instant)> {
        let wide = self.wide.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let fresh = |key| wide.get(key).filter(|(_, until)| *until > now).cloned();
        fresh(registry).or_else(|| fresh(""))
    }

    /// Runs the plugin once. What it says of a failure goes to the log: it may name what the author
    /// of a pod is not to know.
    async fn run(&self, repository: &str) -> Result<Answer, Failed> {
        let failed = |words: &'static str, error: &dyn std::fmt::Display| {
            tracing::warn!(provider = self.name, %repository, %error, "{words}");
            Failed(words)
        };
        let mut child = Command::new(&self.program)
            .args(&self.args)
            .envs(self.env.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(|error| failed("it cannot be started", &error))?;
        let (Some(mut stdin), Some(stdout), Some(stderr)) =
            (child.stdin.take(), child.stdout.take(), child.stderr.take())
        else {
            return Err(failed("it cannot be started", &"its pipes are missing"));
        };
        let request = json!({ "apiVersion": PROTOCOL, "kind": "CredentialProviderRequest",
            "image": repository })
        .to_string();
        let ask = async move {
            // One that does not read it may answer all the same.
            drop(stdin.write_all(request.as_bytes()).await);
        };
        let ((), answer, complaint) =
            tokio::join!(ask, read(stdout, MAX_ANSWER), read(stderr, MAX_COMPLAINT));
        let status = child.wait().await.map_err(|error| failed("it failed", &error))?;
        if !status.success() {
            let complaint = String::from_utf8_lossy(&complaint);
            return Err(failed("it failed", &format!("{status}: {}", complaint.escape_debug())));
        }
        // The error would repeat a part of the answer.
        let answer: Answer = serde_json::from_slice(&answer).map_err(|_| {
            failed("its answer is not understood", &"not an answer of its protocol")
        })?;
        if answer.api_version != PROTOCOL {
            return Err(failed("its answer is not understood", &"another apiVersion"));
        }
        Ok(answer)
    }
}

/// The first `most` bytes; the rest is read and dropped, so that the writer comes to its end.
async fn read(mut from: impl AsyncRead + Unpin, most: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    drop((&mut from).take(most).read_to_end(&mut bytes).await);
    drop(tokio::io::copy(&mut from, &mut tokio::io::sink()).await);
    bytes
}

/// A duration as Go writes it, `12h0m0s` or `0`; none below zero, and the longest that is kept.
fn duration(text: &str) -> Option<Duration> {
    let signed: SignedDuration =
        if text == "0" { SignedDuration::ZERO } else { text.parse().ok()? };
    Some(Duration::try_from(signed).ok()?.min(LONGEST))
}

#[cfg(test)]
#[path = "provider_tests.rs"]
mod tests;

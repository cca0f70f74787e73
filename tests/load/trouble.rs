//! What happens to the webhook meanwhile.

use std::time::Duration;

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::Secret;
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use ringfence::pki::stored::{CURRENT, ROTATE};
use serde_json::json;
use tokio::time::{Instant, interval, sleep, sleep_until};

use crate::Args;

/// How often things are looked at.
const POLL: Duration = Duration::from_millis(250);
/// The load runs undisturbed for so long at first.
const CALM: Duration = Duration::from_secs(5);

/// What happened.
#[derive(Default)]
pub struct Happened {
    pub log: Vec<(Instant, String)>,
    /// CAs that signed, beside the first.
    pub rotations: usize,
    pub roll_outs: usize,
    /// What was to happen and did not.
    pub missed: Vec<String>,
}

pub struct Trouble<'a> {
    pub client: Client,
    pub args: &'a Args,
    pub began: Instant,
    pub end: Instant,
}

impl Trouble<'_> {
    /// Makes it, until the end.
    pub async fn make(&self) -> Happened {
        let (rotated, rolled, killed) = tokio::join!(self.rotate(), self.roll(), self.kill());
        let mut all = Happened { rotations: rotated, ..rolled };
        all.log.extend(killed.log);
        all.missed.extend(killed.missed);
        all.log.sort_by_key(|(at, _)| *at);
        all
    }

    /// Asks for a new CA every so many seconds, as `ringfence rotate-ca` does; how many signed.
    async fn rotate(&self) -> usize {
        if self.args.rotate_every == 0 {
            return 0;
        }
        let name = format!("{}-webhook-ca", self.args.deployment);
        let secrets: Api<Secret> =
            Api::namespaced(self.client.clone(), &self.args.release_namespace);
        let current = async || {
            let found = secrets.get_metadata(&name).await.ok()?;
            found.metadata.annotations.unwrap_or_default().remove(CURRENT)
        };
        let mut seen: Vec<String> = current().await.into_iter().collect();
        let every = Duration::from_secs(self.args.rotate_every);
        let mut ask = interval(every);
        while Instant::now() < self.end {
            ask.tick().await;
            let patch = Patch::Merge(json!({"metadata": {"annotations": {ROTATE: "now"}}}));
            let asked = secrets.patch_metadata(&name, &PatchParams::default(), &patch).await;
            asked.expect("the CA's secret can be marked");
            let until = Instant::now() + every - POLL;
            while Instant::now() < until {
                if let Some(now) = current().await.filter(|now| !seen.contains(now)) {
                    seen.push(now);
                }
                sleep(POLL).await;
            }
        }
        seen.len().saturating_sub(1)
    }

    /// Restarts the replicas as `kubectl rollout restart` does, one roll-out after the other.
    async fn roll(&self) -> Happened {
        let mut happened = Happened::default();
        if !self.args.roll {
            return happened;
        }
        let api: Api<Deployment> =
            Api::namespaced(self.client.clone(), &self.args.release_namespace);
        sleep_until(self.began + CALM).await;
        while Instant::now() < self.end {
            let number = happened.roll_outs + 1;
            let stamp = format!("{}-{number}", std::process::id());
            let patch = json!({"spec": {"template": {"metadata": {"annotations": {
                "load.ringfence.dev/restarted": stamp}}}}});
            let patched = api
                .patch(&self.args.deployment, &PatchParams::default(), &Patch::Merge(patch))
                .await;
            let generation = patched.expect("it can be restarted").metadata.generation;
            happened.log.push((Instant::now(), format!("roll-out {number} begins")));
            loop {
                let now = api.get(&self.args.deployment).await.expect("the deployment");
                if is_rolled_out(&now, generation) {
                    happened.roll_outs += 1;
                    happened.log.push((Instant::now(), format!("roll-out {number} is complete")));
                    break;
                }
                if Instant::now() >= self.end {
                    break;
                }
                sleep(POLL).await;
            }
        }
        if happened.roll_outs == 0 {
            happened.missed.push("no roll-out was completed".into());
        }
        happened
    }

    /// Kills one replica's process half-way. The node's processes can be seen from here.
    async fn kill(&self) -> Happened {
        let mut happened = Happened::default();
        if !self.args.kill {
            return happened;
        }
        sleep_until(self.began + (self.end - self.began) / 2).await;
        let namespace = format!("--namespace={}", self.args.release_namespace);
        let Some(process) = replicas(&namespace).pop() else {
            happened.missed.push("no process of a replica was found".into());
            return happened;
        };
        let killed = std::process::Command::new("kill").args(["-9", &process.to_string()]).status();
        if killed.is_ok_and(|status| status.success()) {
            let what = format!("kill -9 of one replica (process {process})");
            happened.log.push((Instant::now(), what));
        } else {
            happened.missed.push(format!("process {process} could not be killed"));
        }
        happened
    }
}

/// Processes of the release's webhook.
fn replicas(namespace: &str) -> Vec<u32> {
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let number = |name: std::ffi::OsString| name.to_str()?.parse().ok();
    let is_replica = |process: &u32| {
        let words = std::fs::read(format!("/proc/{process}/cmdline")).unwrap_or_default();
        let words: Vec<&[u8]> = words.split(|byte| *byte == 0).collect();
        words.starts_with(&[b"/ringfence", b"webhook"]) && words.contains(&namespace.as_bytes())
    };
    let mut all: Vec<u32> =
        processes.filter_map(|entry| number(entry.file_name())).filter(is_replica).collect();
    all.sort_unstable();
    all
}

fn is_rolled_out(deployment: &Deployment, generation: Option<i64>) -> bool {
    let wanted = deployment.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(1);
    deployment.status.as_ref().is_some_and(|status| {
        status.observed_generation >= generation
            && status.updated_replicas == Some(wanted)
            && status.replicas == Some(wanted)
            && status.available_replicas == Some(wanted)
    })
}

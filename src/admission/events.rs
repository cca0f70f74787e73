//! Events for verdicts that nobody may have seen: a pod that a controller makes is refused to the
//! controller, and its warnings go nowhere.
//!
//! One is written on the pod's controlling owner (a ReplicaSet, a Job), on the namespace where there
//! is none: for refusals, and for pods that are admitted with a warning; not for what is simply
//! fenced, nor for what the administrator exempted. No answer waits for one: they go through a
//! bounded queue, what is too much is dropped and counted. A dry run writes none.

mod ledger;

use std::sync::Arc;
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::api::events::v1::{Event, EventSeries};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use kube::api::{Patch, PatchParams, PostParams};
use kube::{Api, Client};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::time::MissedTickBehavior;

use self::ledger::{Ledger, Write};
use super::json::{at, list, word, yes};
use super::review::{Review, cut};
use super::server::Metrics;
use super::{Class, Outcome};

/// Verdicts that may wait to be written.
const QUEUE: usize = 256;
/// For one write; while the API server hangs the queue fills and the rest is dropped.
const PATIENCE: Duration = Duration::from_secs(5);
/// Bytes of a note, at most (`k8s.io/api/events/v1`).
const NOTE: usize = 1024;
/// Characters of what the pod says about its owner; a real one is shorter.
const WORD: usize = 253;
/// Who reports.
const CONTROLLER: &str = "ringfence.dev/webhook";
/// What the administrator wished for is no news with every pod.
const QUIET: [Class; 1] = [Class::Unfenced];

/// Of these warnings it depends whether there will be a pod.
const GRAVE: [Class; 2] = [Class::PodSecurity, Class::Constraints];

/// What an Event is about.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Subject {
    namespace: String,
    api_version: String,
    kind: String,
    name: String,
    uid: String,
}

/// A verdict to be told.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Notice {
    subject: Subject,
    class: Class,
    refused: bool,
    note: String,
}

/// Takes verdicts, and never waits.
#[derive(Debug, Clone)]
pub struct Events {
    queue: mpsc::Sender<Notice>,
    metrics: Arc<Metrics>,
}

impl Events {
    /// The queue, and what writes it out: the caller has to run it beside. `instance` is this
    /// replica's name.
    pub fn new(
        client: Client,
        instance: String,
        metrics: Arc<Metrics>,
    ) -> (Self, impl Future<Output = ()> + Send + 'static) {
        let (queue, notices) = mpsc::channel(QUEUE);
        let writer = Writer { client, instance, metrics: Arc::clone(&metrics) };
        (Self { queue, metrics }, writer.run(notices))
    }

    /// Tells the owner of the pod under review of its verdict, where there is something to tell.
    pub fn tell(&self, review: &Review, outcome: &Outcome) {
        for notice in notices(review, outcome) {
            if self.queue.try_send(notice).is_err() {
                self.metrics.event("dropped");
            }
        }
    }
}

/// What there is to tell.
fn notices(review: &Review, outcome: &Outcome) -> Vec<Notice> {
    let creates = review.resource == "/v1/pods"
        && (review.operation.as_str(), review.sub_resource.as_str()) == ("CREATE", "");
    // Whoever updates a pod, or enters one, reads the answer.
    if !creates || review.dry_run {
        return Vec::new();
    }
    let notice = |class: Class, refused, note: &str| Notice {
        subject: subject(review),
        class,
        refused,
        note: bytes(cut(note, NOTE)),
    };
    match outcome {
        Outcome::Untouched => Vec::new(),
        Outcome::Refuse(refusal) => vec![notice(refusal.class, true, &refusal.message)],
        Outcome::Inject(injection) => {
            let loud = injection.causes.iter().filter(|cause| !QUIET.contains(&cause.class));
            loud.map(|cause| {
                let class = cause.class;
                let note = format!("ringfence: {}: {}; {}", cause.what, class.why(), class.fix());
                notice(class, false, &note)
            })
            .collect()
        }
    }
}

/// The controlling owner as the pod names it, else the namespace. What it names is the author's
/// word: the Event is in the pod's own namespace whatever it says.
fn subject(review: &Review) -> Subject {
    let metadata = at(&review.object, &["metadata"]).unwrap_or(&Value::Null);
    let owner = list(metadata, "ownerReferences").iter().find(|owner| yes(owner, &["controller"]));
    let words = owner.and_then(|owner| {
        let all = ["apiVersion", "kind", "name", "uid"].map(|name| word(owner, name));
        let [Some(api_version), Some(kind), Some(name), Some(uid)] = all else { return None };
        // A mirror pod's is the node, which is in no namespace.
        let fits = kind != "Node" && all.iter().flatten().all(|word| word.len() <= WORD);
        fits.then_some([api_version, kind, name, uid])
    });
    let namespace = &review.namespace;
    let [api_version, kind, name, uid] = words.unwrap_or(["v1", "Namespace", namespace, ""]);
    Subject {
        namespace: namespace.clone(),
        api_version: api_version.to_owned(),
        kind: kind.to_owned(),
        name: name.to_owned(),
        uid: uid.to_owned(),
    }
}

/// The same of at most [`NOTE`] bytes.
fn bytes(mut note: String) -> String {
    while note.len() > NOTE {
        note.pop();
    }
    note
}

/// `host-network` as `RingfenceHostNetwork`: reasons are words in this spelling.
fn reason(class: Class) -> String {
    let mut reason = "Ringfence".to_owned();
    for part in class.slug().split('-') {
        let mut letters = part.chars();
        reason.extend(letters.next().map(|first| first.to_ascii_uppercase()));
        reason.push_str(letters.as_str());
    }
    reason
}

struct Writer {
    client: Client,
    instance: String,
    metrics: Arc<Metrics>,
}

impl Writer {
    async fn run(self, mut notices: mpsc::Receiver<Notice>) {
        let mut ledger = Ledger::default();
        let mut tick = tokio::time::interval(ledger::PAUSE);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let due = tokio::select! {
                notice = notices.recv() => {
                    let Some(notice) = notice else { return };
                    let write = ledger.take(&notice, Instant::now());
                    if let Write::Nothing(why) = write {
                        self.metrics.event(why);
                        continue;
                    }
                    vec![(notice, write)]
                }
                _ = tick.tick() => ledger.due(Instant::now()),
            };
            for (notice, write) in due {
                let done = tokio::time::timeout(PATIENCE, self.write(&notice, &write)).await;
                match done {
                    Ok(Ok(name)) => {
                        ledger.written(&notice, name);
                        self.metrics.event("written");
                    }
                    failed => {
                        ledger.failed(&notice);
                        self.metrics.event("failed");
                        let namespace = &notice.subject.namespace;
                        tracing::debug!(namespace, ?failed, "an event was not written");
                    }
                }
            }
        }
    }

    /// Writes it; returns the Event's name.
    async fn write(&self, notice: &Notice, write: &Write) -> Result<String, kube::Error> {
        let api: Api<Event> = Api::namespaced(self.client.clone(), &notice.subject.namespace);
        let now = MicroTime(Timestamp::now());
        let done = match write {
            Write::Series { name, count } => {
                let series = EventSeries { count: *count, last_observed_time: now };
                let patch = Patch::Merge(json!({ "series": series }));
                api.patch(name, &PatchParams::default(), &patch).await?
            }
            Write::New | Write::Nothing(_) => {
                api.create(&PostParams::default(), &self.event(notice, now)).await?
            }
        };
        Ok(done.metadata.name.unwrap_or_default())
    }

    fn event(&self, notice: &Notice, now: MicroTime) -> Event {
        let subject = &notice.subject;
        let grave = notice.refused || GRAVE.contains(&notice.class);
        Event {
            metadata: ObjectMeta {
                generate_name: Some("ringfence-".into()),
                namespace: Some(subject.namespace.clone()),
                ..ObjectMeta::default()
            },
            regarding: Some(ObjectReference {
                api_version: Some(subject.api_version.clone()),
                kind: Some(subject.kind.clone()),
                name: Some(subject.name.clone()),
                namespace: Some(subject.namespace.clone()),
                uid: Some(subject.uid.clone()).filter(|uid| !uid.is_empty()),
                ..ObjectReference::default()
            }),
            type_: Some(if grave { "Warning" } else { "Normal" }.into()),
            reason: Some(reason(notice.class)),
            action: Some(if notice.refused { "Refuse" } else { "Admit" }.into()),
            note: Some(notice.note.clone()),
            event_time: Some(now),
            reporting_controller: Some(CONTROLLER.into()),
            reporting_instance: Some(self.instance.clone()),
            ..Event::default()
        }
    }
}

#[cfg(test)]
#[path = "events/tests.rs"]
mod tests;

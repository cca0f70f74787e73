//! From a review to an answer: look up what it depends on, decide, put the policy in place.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use axum::body::Bytes;
use axum::http::StatusCode;
use serde_json::Value;
use tokio::sync::watch;

use super::{Admit, Answer, Deadline, Hook, Metrics};
use crate::admission::events::Events;
use crate::admission::lookup::{Constraints, Lookups};
use crate::admission::restore::image_change;
use crate::admission::review::{Answer as Decision, Review};
use crate::admission::{
    Class, Delivery, ImageConfig, Injection, Mode, Namespace, Outcome, PolicyRef, PolicySource,
    Refusal, Settings, ephemeral, exec, inject_into, is_fenced, is_live, live_name, needs,
    policy_name, restore,
};
use crate::propagate::{self, Copies, PolicyCopy};

/// What is known of the cluster; it changes while the process runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClusterFacts {
    /// How the supervisor's binary reaches pods.
    pub delivery: Delivery,
    /// Architectures of the nodes, as `kubernetes.io/arch` has them. Never empty.
    pub architectures: Vec<String>,
}

/// What a [`Handler`] is made of.
pub struct HandlerConfig {
    /// The look-ups.
    pub lookups: Arc<Lookups>,
    /// On an `OpenShift`: who may use the constraints that fenced pods need.
    pub constraints: Option<Constraints>,
    /// The copies of policies that pods were given.
    pub copies: Copies,
    /// The chart's values; `delivery` is taken from the cluster's facts.
    pub settings: Settings,
    /// What is known of the cluster.
    pub cluster: watch::Receiver<Arc<ClusterFacts>>,
    /// Where to count.
    pub metrics: Arc<Metrics>,
    /// Who tells owners of verdicts, where anyone does.
    pub events: Option<Events>,
}

/// Answers reviews of pods.
pub struct Handler(pub(super) HandlerConfig);

/// What the answer about a pod depends on, looked up.
#[derive(Default)]
pub(super) struct Known {
    /// With the cluster's delivery.
    pub settings: Settings,
    /// Name and content of the policy; `None` where nothing of the pod is to be fenced.
    pub policy: Option<(String, Arc<PolicySource>)>,
    /// By container.
    pub images: BTreeMap<String, ImageConfig>,
}

impl Known {
    /// What `inject` needs of the policy.
    pub(super) fn policy(&self) -> PolicyRef {
        self.policy.as_ref().map(|(_, source)| source.reference.clone()).unwrap_or_default()
    }
}

impl Handler {
    /// A handler of this configuration.
    #[must_use]
    pub fn new(config: HandlerConfig) -> Self {
        Self(config)
    }

    async fn decide(&self, review: &mut Review, deadline: Deadline) -> Outcome {
        let decided = match (review.operation.as_str(), review.sub_resource.as_str()) {
            ("CREATE", "") => self.create(review, deadline).await,
            ("UPDATE", "") => self.update(review, deadline).await,
            ("UPDATE", "ephemeralcontainers") => self
                .0
                .lookups
                .namespace(&review.namespace, deadline)
                .await
                .map(|ns| ephemeral(&review.object, &ns)),
            ("CONNECT", "exec") => self.exec(review, deadline).await,
            _ => Ok(Outcome::Untouched),
        };
        decided.unwrap_or_else(Outcome::Refuse)
    }

    /// The review's pod becomes what it is to be.
    async fn create(&self, review: &mut Review, deadline: Deadline) -> Result<Outcome, Refusal> {
        let Some(mut ns) = self.labelled(review, deadline).await? else {
            return Ok(Outcome::Untouched);
        };
        let pod = &mut review.object;
        // Beside the rest, so that it takes no time of its own.
        let (known, missing) = tokio::join!(
            self.know(pod, &ns, deadline),
            self.missing_constraints(pod, &ns.name, deadline),
        );
        let known = known?;
        ns.missing_constraints = missing;
        let live = is_live(pod, &ns)?;
        // Only an init container is fitted to them.
        if known.policy.is_some() && known.settings.delivery == Delivery::Init {
            ns.limit_ranges = self.0.lookups.limit_ranges(&ns.name, deadline).await?;
        }
        let outcome = inject_into(pod, &ns, &known.settings, &known.images, &known.policy());
        if let (Outcome::Inject(_), Some((name, policy))) = (&outcome, &known.policy) {
            self.provide(name, policy, (&ns, live), review.dry_run, deadline).await?;
        }
        Ok(outcome)
    }

    async fn missing_constraints(
        &self,
        pod: &Value,
        namespace: &str,
        deadline: Deadline,
    ) -> Option<String> {
        self.0.constraints.as_ref()?.missing_for(namespace, pod, deadline).await
    }

    /// Looks up policy and images. A pod of which nothing is to be fenced waits for neither.
    pub(super) async fn know(
        &self,
        pod: &Value,
        ns: &Namespace,
        deadline: Deadline,
    ) -> Result<Known, Refusal> {
        let facts = Arc::clone(&self.0.cluster.borrow());
        let settings = Settings { delivery: facts.delivery, ..self.0.settings.clone() };
        if !is_fenced(pod, ns, &settings)? {
            return Ok(Known { settings, ..Known::default() });
        }
        let name = policy_name(pod, ns, &settings)?;
        let policy = self.0.lookups.policies().get(&name, deadline).await?;
        let needs = needs(pod, ns, &settings, &policy.reference)?;
        let images =
            self.0.lookups.images(&ns.name, &needs, &facts.architectures, deadline).await?;
        Ok(Known { settings, policy: Some((name, policy)), images })
    }

    /// Puts the policy's copy into the pod's namespace, before the pod is admitted.
    async fn provide(
        &self,
        source: &str,
        policy: &PolicySource,
        (ns, live): (&Namespace, bool),
        dry_run: bool,
        deadline: Deadline,
    ) -> Result<(), Refusal> {
        let name = if live { live_name(source) } else { policy.reference.configmap.clone() };
        let copy = PolicyCopy { namespace: &ns.name, name: &name, source, data: &policy.data };
        let client = self.0.lookups.client();
        let late = |_| Refusal::new(Class::Lookup, "the policy could not be copied in time");
        if !live {
            let copying = self.0.copies.ensure(client, &copy, dry_run);
            return deadline.run(copying).await.map_err(late)?.map_err(|e| not_copied(&e));
        }
        let copying = propagate::ensure_live(client, &copy, dry_run);
        let same = deadline.run(copying).await.map_err(late)?.map_err(|e| not_copied(&e))?;
        if same || dry_run {
            return Ok(());
        }
        // The pod must not begin by what the policy was: whoever follows it may be behind.
        let checked = || self.0.lookups.policies().checked(source.to_owned(), deadline);
        let changing = propagate::bring_up(client, (&ns.name, &name, source), checked);
        let changed = deadline.run(changing).await.map_err(late)?.map_err(|e| not_copied(&e))?;
        changed.map(drop).map_err(|why| Refusal::new(Class::Policy, why))
    }

    async fn update(&self, review: &Review, deadline: Deadline) -> Result<Outcome, Refusal> {
        let Some(old) = &review.old_object else { return Ok(Outcome::Untouched) };
        // An update must pass whatever is wrong with the namespace: Jobs count their pods by one,
        // and a pod whose finalizers cannot be removed cannot be deleted. Nothing is granted by it:
        // what was fenced stays so, because Kubernetes lets nothing of it change but the image.
        let ns = match self.0.lookups.namespace(&review.namespace, deadline).await {
            Ok(ns) => ns,
            Err(refusal) if image_change(old, &review.object).is_some() => return Err(refusal),
            Err(refusal) => return Ok(passed(&review.namespace, &refusal)),
        };
        let mut outcome = restore(old, &review.object, &ns);
        if let Err(refusal) = Mode::of(&ns) {
            match &mut outcome {
                Outcome::Untouched => return Ok(passed(&ns.name, &refusal)),
                Outcome::Inject(injection) => injection.warnings.push(refusal.message),
                Outcome::Refuse(_) => {}
            }
        }
        Ok(outcome)
    }

    async fn exec(&self, review: &Review, deadline: Deadline) -> Result<Outcome, Refusal> {
        let Some(ns) = self.labelled(review, deadline).await? else {
            return Ok(Outcome::Untouched);
        };
        if exec::is_outside(&ns) {
            return Ok(Outcome::Untouched);
        }
        let pod = self.0.lookups.pod(&ns.name, &review.name, deadline).await?;
        let ops = exec::wrap(&review.object, &pod)?;
        let (place, warning) = exec::place(&review.object, &pod);
        let audit = BTreeMap::from([("exec".to_owned(), place.to_owned())]);
        let warnings = warning.into_iter().collect();
        Ok(Outcome::Inject(Injection { ops, warnings, audit, ..Injection::default() }))
    }

    /// The namespace, where it has the label.
    pub(super) async fn labelled(
        &self,
        review: &Review,
        deadline: Deadline,
    ) -> Result<Option<Namespace>, Refusal> {
        let ns = self.0.lookups.namespace(&review.namespace, deadline).await?;
        Ok((Mode::of(&ns)? != Mode::Off).then_some(ns))
    }

    fn count(&self, hook: Hook, outcome: &Outcome, began: Instant) {
        let (verdict, class) = match outcome {
            Outcome::Untouched | Outcome::Inject(_) if hook == Hook::Validate => ("verified", "-"),
            Outcome::Untouched => ("untouched", "-"),
            Outcome::Inject(injection) if injection.ops.is_empty() => ("unchanged", "-"),
            Outcome::Inject(_) => ("injected", "-"),
            Outcome::Refuse(refusal) => ("refused", refusal.class.slug()),
        };
        self.0.metrics.admission(verdict, class, began.elapsed());
        if let Outcome::Inject(injection) = outcome {
            for cause in &injection.causes {
                self.0.metrics.warned(cause.class.slug());
            }
        }
        if matches!(outcome, Outcome::Refuse(refusal) if refusal.class == Class::SelfCheck) {
            self.0.metrics.self_check_failure();
        }
    }
}

impl Admit for Handler {
    async fn admit(&self, hook: Hook, body: Bytes, deadline: Deadline) -> Answer {
        let began = Instant::now();
        let mut review = match Review::parse(&body) {
            Ok(review) => review,
            Err(error) => {
                self.0.metrics.rejected("unreadable");
                tracing::warn!(%error, "not a review");
                return match &error.id {
                    Some(id) => {
                        let refusal = Refusal::new(Class::Malformed, &error);
                        decided(Decision::deny(refusal).to_bytes(id))
                    }
                    None => Answer {
                        status: StatusCode::BAD_REQUEST,
                        body: format!("{error}\n").into_bytes(),
                        ask_another: false,
                    },
                };
            }
        };
        // The body is in the review now; keeping both for the look-ups would double the memory.
        drop(body);
        let known: &[&str] = match hook {
            Hook::Mutate => &["/v1/pods"],
            Hook::Validate => &["/v1/pods", "/v1/configmaps"],
        };
        if !known.contains(&&*review.resource) {
            let warning =
                format!("ringfence was asked about {}, and does not know it", review.resource);
            return decided(Decision::allow().warn(warning).to_bytes(&review.id));
        }
        let outcome = match hook {
            Hook::Mutate => self.decide(&mut review, deadline).await,
            Hook::Validate => self.validate(&review, deadline).await,
        };
        self.count(hook, &outcome, began);
        if let Some(events) = &self.0.events {
            events.tell(&review, &outcome);
        }
        if let Outcome::Refuse(refusal) = &outcome {
            tracing::info!(
                namespace = review.namespace,
                pod = name_of(&review),
                user = review.user,
                class = refusal.class.slug(),
                dry_run = review.dry_run,
                message = refusal.message,
                "refused"
            );
        }
        let decision = Decision::of(outcome);
        let ask_another = decision.refusal().is_some_and(|r| r.retry_after().is_some());
        Answer { ask_another, ..decided(decision.to_bytes(&review.id)) }
    }
}

/// An update that is let through as it is, with the reason as a warning.
fn passed(namespace: &str, refusal: &Refusal) -> Outcome {
    tracing::warn!(namespace, message = refusal.message, "an update is let through as it is");
    Outcome::Inject(Injection { warnings: vec![refusal.message.clone()], ..Injection::default() })
}

/// Why the policy's copy is not there. What the API server forbids does not get better by itself.
fn not_copied(error: &propagate::CopyError) -> Refusal {
    let fix = match error {
        propagate::CopyError::Foreign { .. } => "delete it; ringfence then makes its own",
        propagate::CopyError::Api { source: kube::Error::Api(status), .. }
            if status.code == 403 =>
        {
            let causes = status.details.iter().flat_map(|details| &details.causes);
            if causes.into_iter().any(|cause| cause.reason == "NamespaceTerminating") {
                "create the pod in another namespace, or here when the namespace exists again"
            } else if status.message.contains("exceeded quota") {
                "let the namespace's ResourceQuota have one more ConfigMap: each version of a policy that pods use is one"
            } else {
                "let the service account of ringfence make ConfigMaps in the namespace, or change the admission rule that refuses them"
            }
        }
        propagate::CopyError::Api { .. } | propagate::CopyError::Ending { .. } => {
            return Refusal::new(Class::Lookup, error);
        }
    };
    Refusal::with_fix(Class::Policy, error, fix)
}

fn decided(body: Vec<u8>) -> Answer {
    Answer { status: StatusCode::OK, body, ask_another: false }
}

/// Most pods have no name yet when we see them.
fn name_of(review: &Review) -> &str {
    if !review.name.is_empty() {
        return &review.name;
    }
    let generated = review.object.pointer("/metadata/generateName").and_then(Value::as_str);
    generated.unwrap_or("-")
}

#[cfg(test)]
#[path = "handler_tests.rs"]
mod tests;

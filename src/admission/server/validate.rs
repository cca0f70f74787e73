//! The validating half: the final object, looked at once more. Nothing is written for it, and no
//! answer carries a patch.

use super::Deadline;
use super::handler::Handler;
use crate::admission::json::field;
use crate::admission::review::Review;
use crate::admission::{
    Injection, Outcome, Refusal, changes_image, ephemeral, exec, verify, verify_update,
};

impl Handler {
    /// Whether the object may be stored, or the connection be made.
    pub(super) async fn validate(&self, review: &Review, deadline: Deadline) -> Outcome {
        let operation = (review.operation.as_str(), review.sub_resource.as_str());
        if review.resource == "/v1/configmaps" {
            return match operation {
                ("CREATE" | "UPDATE", "") => self.policy_written(review, deadline).await,
                _ => Outcome::Untouched,
            };
        }
        let verified = match operation {
            ("CREATE", "") => self.created(review, deadline).await,
            ("UPDATE", "") => self.updated(review, deadline).await,
            ("UPDATE", "ephemeralcontainers") => self.debugged(review, deadline).await,
            ("CONNECT", "exec") => self.entered(review, deadline).await,
            _ => Ok(()),
        };
        verified.map_or_else(Outcome::Refuse, |()| Outcome::Untouched)
    }

    /// The function runs again over the final pod, with what it depends on looked up again: by now
    /// most of that is in the cache.
    async fn created(&self, review: &Review, deadline: Deadline) -> Result<(), Refusal> {
        let Some(ns) = self.labelled(review, deadline).await? else { return Ok(()) };
        let pod = &review.object;
        let known = self.know(pod, &ns, deadline).await?;
        verify(None, pod, &ns, &known.settings, &known.images, &known.policy())
    }

    /// An update that changes no image depends on nothing: the API server has compared the rest.
    async fn updated(&self, review: &Review, deadline: Deadline) -> Result<(), Refusal> {
        let Some(old) = &review.old_object else { return Ok(()) };
        if !changes_image(old, &review.object) {
            return Ok(());
        }
        let ns = self.0.lookups.namespace(&review.namespace, deadline).await?;
        verify_update(old, &review.object, &ns)
    }

    async fn debugged(&self, review: &Review, deadline: Deadline) -> Result<(), Refusal> {
        let ns = self.0.lookups.namespace(&review.namespace, deadline).await?;
        match ephemeral(&review.object, &ns) {
            Outcome::Refuse(refusal) => Err(refusal),
            Outcome::Untouched | Outcome::Inject(_) => Ok(()),
        }
    }

    async fn entered(&self, review: &Review, deadline: Deadline) -> Result<(), Refusal> {
        let Some(ns) = self.labelled(review, deadline).await? else { return Ok(()) };
        if exec::is_outside(&ns) {
            return Ok(());
        }
        let pod = self.0.lookups.pod(&ns.name, &review.name, deadline).await?;
        exec::verify(&review.object, &pod, &ns)
    }

    /// A policy is judged when it is written, as it will be when a pod needs it. What its author
    /// should know comes as warnings. An update that changes nothing of it passes: labels and
    /// finalizers, and with them the end of a policy that no longer loads, do not depend on it.
    async fn policy_written(&self, review: &Review, deadline: Deadline) -> Outcome {
        if review.namespace != self.0.settings.release_namespace {
            return Outcome::Untouched;
        }
        let same = |old, name| field(old, name) == field(&review.object, name);
        let old = review.old_object.as_ref();
        if old.is_some_and(|old| same(old, "data") && same(old, "binaryData")) {
            return Outcome::Untouched;
        }
        let judged = self.0.lookups.policies().judge(&review.name, &review.object, deadline).await;
        match judged {
            Ok(warnings) => Outcome::Inject(Injection { warnings, ..Injection::default() }),
            Err(refusal) => Outcome::Refuse(refusal),
        }
    }
}

//! Whether `OpenShift` will let a pod's service account be what a fenced pod is: its admission comes
//! after ours, and without the right to use constraints that allow it the pod is refused to a
//! controller that nobody reads.
//!
//! It is asked before, of the API server's authorizer. The answer is for a warning, or a refusal
//! where the chart wants one; what could not be looked up is a line of the log, and the pod goes on.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use k8s_openapi::api::authorization::v1::SubjectAccessReview;
use kube::api::PostParams;
use kube::{Api, Client};
use serde_json::{Value, json};

use crate::admission::notes::service_account;
use crate::admission::server::Deadline;
use crate::api_text::api_text;

/// An answer counts for so long: whoever grants the right should not be told for long that it is
/// missing.
const KEEP: Duration = Duration::from_secs(10);
/// Answers that are kept; the names of service accounts are their authors' choice.
const KEPT: usize = 1024;
/// For one question, of the ten seconds that an answer about a pod may take.
const PATIENCE: Duration = Duration::from_secs(1);

/// Asks about the use of one `SecurityContextConstraints`.
pub struct Constraints {
    client: Client,
    name: String,
    known: Mutex<HashMap<Account, Known>>,
}

/// Namespace and name of a service account.
type Account = (String, String);

#[derive(Debug, Clone, Copy)]
struct Known {
    asked: Instant,
    may: May,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum May {
    Yes,
    No,
    /// It could not be looked up.
    Unknown,
}

impl Known {
    fn counts(&self) -> bool {
        self.asked.elapsed() < KEEP
    }
}

impl Constraints {
    /// Of the constraints of this name.
    #[must_use]
    pub fn new(client: Client, name: String) -> Self {
        Self { client, name, known: Mutex::default() }
    }

    /// The name of the constraints, where the pod's service account may not use them. `None` where it
    /// may, and where that could not be looked up.
    pub async fn missing_for(
        &self,
        namespace: &str,
        pod: &Value,
        deadline: Deadline,
    ) -> Option<String> {
        let account = service_account(pod);
        let may = self.may_use(namespace, account, deadline).await;
        (may == May::No).then(|| self.name.clone())
    }

    async fn may_use(&self, namespace: &str, account: &str, deadline: Deadline) -> May {
        let of = (namespace.to_owned(), account.to_owned());
        if let Some(known) = self.known(&of) {
            return known;
        }
        // A pod that waits for a registry as well is not to lose more than its part to this.
        let asking = tokio::time::timeout(PATIENCE, self.ask(namespace, account));
        let may = match deadline.run(asking).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) | Err(_) => Err("it was not answered in time".to_owned()),
        };
        if let Err(error) = &may {
            let constraints = &self.name;
            tracing::warn!(
                namespace,
                account,
                constraints,
                error,
                "whether a service account may use the constraints could not be looked up"
            );
        }
        let may = match may {
            Ok(true) => May::Yes,
            Ok(false) => May::No,
            Err(_) => May::Unknown,
        };
        self.keep(of, may);
        may
    }

    fn known(&self, of: &Account) -> Option<May> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.get(of).filter(|known| known.counts()).map(|known| known.may)
    }

    fn keep(&self, of: Account, may: May) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= KEPT {
            known.retain(|_, known| known.counts());
        }
        // More accounts than that in so short a time are asked about each time.
        if known.len() < KEPT {
            known.insert(of, Known { asked: Instant::now(), may });
        }
    }

    /// As `OpenShift`'s admission asks it of the same authorizer.
    async fn ask(&self, namespace: &str, account: &str) -> Result<bool, String> {
        let review = json!({
            "metadata": {},
            "spec": {
                "user": format!("system:serviceaccount:{namespace}:{account}"),
                "groups": [
                    "system:serviceaccounts",
                    format!("system:serviceaccounts:{namespace}"),
                    "system:authenticated",
                ],
                "resourceAttributes": {
                    "namespace": namespace,
                    "group": "security.openshift.io",
                    "resource": "securitycontextconstraints",
                    "name": self.name,
                    "verb": "use",
                },
            },
        });
        let review: SubjectAccessReview =
            serde_json::from_value(review).map_err(|error| error.to_string())?;
        let api: Api<SubjectAccessReview> = Api::all(self.client.clone());
        let answer = api.create(&PostParams::default(), &review).await;
        let answer = answer.map_err(|error| api_text(&error))?;
        let status = answer.status.ok_or("it was not answered")?;
        match status.evaluation_error.filter(|_| !status.allowed) {
            Some(error) => Err(error),
            None => Ok(status.allowed),
        }
    }
}

#[cfg(test)]
#[path = "constraints/tests.rs"]
mod tests;

//! A pod that is made as a dry run, to see what the API server makes of it. Nothing is created.

use k8s_openapi::api::core::v1::Pod;
use kube::api::PostParams;
use kube::{Api, Client};
use serde_json::json;

use crate::admission::{fenced_containers, fenced_mode};
use crate::api_text::api_text;

/// The name of its container.
pub(super) const CONTAINER: &str = "agent";
/// What it would run.
const COMMAND: &str = "/ringfence-selftest";

/// What the API server made of the pod.
#[derive(Debug)]
pub(super) enum Seen {
    /// It came back fenced; and for which value of the namespace's label, where it says so.
    Fenced {
        /// `enabled` or `strict`.
        mode: Option<String>,
    },
    /// It came back, and nobody had fenced it.
    Bare,
    /// It was not admitted, or nobody answered.
    Refused {
        /// The HTTP status, where there was one.
        code: Option<u16>,
        /// The reason.
        text: String,
    },
}

/// Makes the pod in a namespace, as a dry run. What a pod is fenced for is its image, so the webhook
/// has to be able to read that one; it is not pulled and nothing of it is run.
///
/// As it is written the pod meets every Pod Security level, so that none refuses it unless it was fenced.
///
/// `account`: the service account that it names; `None`: none.
pub(super) async fn ask(
    client: &Client,
    namespace: &str,
    image: &str,
    account: Option<&str>,
) -> anyhow::Result<Seen> {
    let pod: Pod = serde_json::from_value(json!({
        "metadata": {"generateName": "ringfence-selftest-"},
        "spec": {
            "restartPolicy": "Never",
            "serviceAccountName": account,
            "automountServiceAccountToken": false,
            "containers": [{
                "name": CONTAINER,
                "image": image,
                "command": [COMMAND],
                "securityContext": {
                    "runAsUser": 65534,
                    "runAsNonRoot": true,
                    "allowPrivilegeEscalation": false,
                    "capabilities": {"drop": ["ALL"]},
                    "seccompProfile": {"type": "RuntimeDefault"},
                },
            }],
        },
    }))?;
    let api: Api<Pod> = Api::namespaced(client.clone(), namespace);
    let parameters = PostParams { dry_run: true, ..PostParams::default() };
    let admitted = match api.create(&parameters, &pod).await {
        Ok(admitted) => serde_json::to_value(admitted)?,
        Err(error) => {
            let code = if let kube::Error::Api(status) = &error { Some(status.code) } else { None };
            return Ok(Seen::Refused { code, text: api_text(&error) });
        }
    };
    let fenced = fenced_containers(&admitted) == [CONTAINER];
    Ok(if fenced { Seen::Fenced { mode: fenced_mode(&admitted) } } else { Seen::Bare })
}

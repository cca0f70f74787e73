//! The pull secret for the image that the fence itself comes from. A kubelet pulls every image of a pod,
//! that of an image volume too, with the secrets that the pod names, and those are the agent's.
//!
//! By the time a webhook sees a pod that names none, the API server has written those of its service
//! account into it, and looks no more when there are any: so one more is added to what is there, at the
//! end. It has to be in the pod's namespace under that name; where it is not the kubelet goes on
//! without it.

use serde_json::{Map, Value, json};

use super::json::{at, list_in, text};
use super::namespace::STATUS;
use super::{Refusal, Settings};

/// The field of the pod, and that of the status annotation.
const FIELD: &str = "imagePullSecrets";
const KEY: &str = "pullSecret";

/// Has the pod name the secret, where it does not yet.
pub(super) fn apply(spec: &mut Map<String, Value>, settings: &Settings) -> Result<(), Refusal> {
    let Some(name) = settings.pull_secret() else { return Ok(()) };
    let secrets = list_in(spec, FIELD)?;
    if !secrets.iter().any(|secret| text(secret, "name") == Some(name)) {
        secrets.push(json!({"name": name}));
    }
    Ok(())
}

/// Writes down which it was, for [`of`].
pub(super) fn write(status: &mut Map<String, Value>, settings: &Settings) {
    if let Some(name) = settings.pull_secret() {
        status.insert(KEY.into(), json!(name));
    }
}

/// Whether an element of the field is what a pod's annotation says was added. Nothing rests on that word:
/// the field may not change any more, whosever element it is.
pub(super) fn of(pod: &Value) -> impl Fn(&Value) -> bool + use<> {
    let status = at(pod, &["metadata", "annotations", STATUS]).and_then(Value::as_str);
    let status = status.and_then(|status| serde_json::from_str::<Value>(status).ok());
    let name = status.and_then(|status| text(&status, KEY).map(str::to_owned));
    move |secret| name.is_some() && text(secret, "name") == name.as_deref()
}

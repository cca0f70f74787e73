//! The `AdmissionReview` envelope, `admission.k8s.io/v1` and `v1beta1`.
//!
//! Read by hand from a `Value`: the uid first, so that everything that goes wrong after it can be
//! answered in a way the API server accepts. Written by hand too: the patch is a base64 string,
//! patch and patchType come together or not at all, an allowed review has no status.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use json_patch::Patch;
use serde_json::{Map, Value, json};

use super::json::{at, field, text, word, yes};
use super::{Outcome, Refusal};

const VERSIONS: &[&str] = &["admission.k8s.io/v1", "admission.k8s.io/v1beta1"];
/// More warnings than this are summed up in one.
const MAX_WARNINGS: usize = 8;
/// Characters of a warning; the API server may cut longer ones.
const MAX_WARNING: usize = 256;
/// Characters of a refusal's message.
const MAX_MESSAGE: usize = 2048;

/// A request of the API server.
#[derive(Debug, Clone, PartialEq)]
pub struct Review {
    /// How to answer it.
    pub id: ReviewId,
    /// `CREATE`, `UPDATE`, `DELETE` or `CONNECT`.
    pub operation: String,
    /// `group/version/resource`, the group empty for the core API: `/v1/pods`.
    pub resource: String,
    /// `exec`, `ephemeralcontainers`, or empty.
    pub sub_resource: String,
    /// The namespace of the request. The one in the object may be empty.
    pub namespace: String,
    /// The object's name; empty where the API server still has to make one up.
    pub name: String,
    /// Nothing may be written for this request.
    pub dry_run: bool,
    /// Who asks.
    pub user: String,
    /// Null for DELETE.
    pub object: Value,
    /// The object before an UPDATE or DELETE.
    pub old_object: Option<Value>,
}

/// What an answer has to repeat.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReviewId {
    api_version: String,
    uid: String,
}

/// A body that is not a review.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Unreadable {
    /// Known where the body got that far: then a refusal can be answered. Otherwise the answer is
    /// an HTTP 400.
    pub id: Option<ReviewId>,
    /// What is wrong.
    pub message: String,
}

impl Review {
    /// Reads a body.
    ///
    /// # Errors
    /// Not JSON, not an `AdmissionReview` of a known version, no request or uid in it.
    pub fn parse(body: &[u8]) -> Result<Self, Unreadable> {
        let without = |message: String| Unreadable { id: None, message };
        let mut review: Value = serde_json::from_slice(body)
            .map_err(|error| without(format!("the body is not JSON: {error}")))?;
        let api_version = text(&review, "apiVersion").unwrap_or_default().to_owned();
        if text(&review, "kind") != Some("AdmissionReview") || !VERSIONS.contains(&&*api_version) {
            return Err(without("the body is not an AdmissionReview of a known version".into()));
        }
        let uid = field(&review, "request").and_then(|request| word(request, "uid"));
        let uid = uid.ok_or_else(|| without("the review has no request.uid".into()))?.to_owned();
        let id = ReviewId { api_version, uid };
        let mut request = review["request"].take();
        let with = |what: &str| Unreadable {
            id: Some(id.clone()),
            message: format!("the review has no request.{what}"),
        };
        let part = |path: &[&str]| {
            let found = at(&request, path).and_then(Value::as_str);
            found.unwrap_or_default().to_owned()
        };
        let [group, version, resource] =
            ["group", "version", "resource"].map(|name| part(&["resource", name]));
        if resource.is_empty() {
            return Err(with("resource"));
        }
        let operation = part(&["operation"]);
        if operation.is_empty() {
            return Err(with("operation"));
        }
        Ok(Self {
            operation,
            resource: format!("{group}/{version}/{resource}"),
            sub_resource: part(&["subResource"]),
            namespace: part(&["namespace"]),
            name: part(&["name"]),
            dry_run: yes(&request, &["dryRun"]),
            user: part(&["userInfo", "username"]),
            object: request.get_mut("object").map(Value::take).unwrap_or_default(),
            old_object: request
                .get_mut("oldObject")
                .map(Value::take)
                .filter(|object| !object.is_null()),
            id,
        })
    }
}

/// An answer, ready to be sent with status 200.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    allowed: bool,
    patch: Option<Patch>,
    refusal: Option<Refusal>,
    warnings: Vec<String>,
    audit: BTreeMap<String, String>,
}

impl Answer {
    /// Admits the object as it is.
    #[must_use]
    pub fn allow() -> Self {
        Self {
            allowed: true,
            patch: None,
            refusal: None,
            warnings: Vec::new(),
            audit: BTreeMap::new(),
        }
    }

    /// Admits the object with changes; with none it is [`Answer::allow`].
    #[must_use]
    pub fn allow_with_patch(patch: Patch) -> Self {
        Self { patch: Some(patch).filter(|patch| !patch.is_empty()), ..Self::allow() }
    }

    /// Does not admit the object.
    #[must_use]
    pub fn deny(refusal: Refusal) -> Self {
        let audit = BTreeMap::from([("refused".to_owned(), refusal.class.slug().to_owned())]);
        Self { allowed: false, refusal: Some(refusal), audit, ..Self::allow() }
    }

    /// The answer of a mutating webhook.
    #[must_use]
    pub fn of(outcome: Outcome) -> Self {
        match outcome {
            Outcome::Untouched => Self::allow(),
            Outcome::Inject(injection) => Self {
                warnings: injection.warnings,
                audit: injection.audit,
                ..Self::allow_with_patch(injection.ops)
            },
            Outcome::Refuse(refusal) => Self::deny(refusal),
        }
    }

    /// Adds a warning for the person who made the request.
    #[must_use]
    pub fn warn(mut self, warning: impl Into<String>) -> Self {
        self.warnings.push(warning.into());
        self
    }

    /// Adds an audit annotation. The API server puts the webhook's name before the key.
    #[must_use]
    pub fn audit(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.audit.insert(key.into(), value.into());
        self
    }

    /// Whether the object is admitted.
    #[must_use]
    pub fn allowed(&self) -> bool {
        self.allowed
    }

    /// The refusal, where there is one.
    #[must_use]
    pub fn refusal(&self) -> Option<&Refusal> {
        self.refusal.as_ref()
    }

    /// The body.
    #[must_use]
    pub fn to_bytes(&self, id: &ReviewId) -> Vec<u8> {
        let mut response = Map::new();
        response.insert("uid".into(), json!(id.uid));
        response.insert("allowed".into(), json!(self.allowed));
        if let Some(refusal) = &self.refusal {
            let mut status = json!({
                "status": "Failure",
                "code": refusal.code,
                "reason": refusal.reason,
                "message": cut(&refusal.message, MAX_MESSAGE),
            });
            if let Some(seconds) = refusal.retry_after() {
                status["details"] = json!({ "retryAfterSeconds": seconds });
            }
            response.insert("status".into(), status);
        }
        if let Some(patch) = &self.patch {
            // An operation is a plain tree with string keys: this cannot fail.
            let patch = serde_json::to_vec(patch).unwrap_or_default();
            response.insert("patchType".into(), json!("JSONPatch"));
            response.insert("patch".into(), json!(STANDARD.encode(patch)));
        }
        if !self.warnings.is_empty() {
            response.insert("warnings".into(), json!(self.bounded_warnings()));
        }
        if !self.audit.is_empty() {
            response.insert("auditAnnotations".into(), json!(self.audit));
        }
        let review =
            json!({"apiVersion": id.api_version, "kind": "AdmissionReview", "response": response});
        review.to_string().into_bytes()
    }

    fn bounded_warnings(&self) -> Vec<String> {
        let mut warnings: Vec<String> = self
            .warnings
            .iter()
            .take(MAX_WARNINGS)
            .map(|warning| cut(warning, MAX_WARNING))
            .collect();
        let more = self.warnings.len().saturating_sub(MAX_WARNINGS);
        if more > 0 {
            warnings.push(format!("ringfence: {more} more warnings; see `ringfence inject`"));
        }
        warnings
    }
}

/// A text of at most so many characters and without control characters: warnings travel in HTTP
/// headers.
pub(super) fn cut(text: &str, limit: usize) -> String {
    let clean = |c: char| if c.is_control() { ' ' } else { c };
    let mut cut: String = text.chars().map(clean).take(limit).collect();
    if text.chars().nth(limit).is_some() {
        cut.pop();
        cut.push('…');
    }
    cut
}

#[cfg(test)]
mod tests {
    use super::super::{Class, Injection};
    use super::*;

    fn body(version: &str, request: &Value) -> Vec<u8> {
        json!({"apiVersion": version, "kind": "AdmissionReview", "request": request})
            .to_string()
            .into_bytes()
    }

    fn create() -> Value {
        json!({
            "uid": "u-1", "operation": "CREATE", "namespace": "agents", "dryRun": null,
            "resource": {"group": "", "version": "v1", "resource": "pods"},
            "object": {"metadata": {"generateName": "a-"}}, "oldObject": null,
            "userInfo": {"username": "me"},
        })
    }

    fn answer(version: &str, answer: &Answer) -> Value {
        let review = Review::parse(&body(version, &create())).unwrap();
        serde_json::from_slice(&answer.to_bytes(&review.id)).unwrap()
    }

    #[test]
    fn a_request_is_read() {
        let review = Review::parse(&body("admission.k8s.io/v1", &create())).unwrap();
        assert_eq!(review.resource, "/v1/pods");
        assert_eq!((review.namespace.as_str(), review.name.as_str()), ("agents", ""));
        assert_eq!(review.object["metadata"]["generateName"], "a-");
        assert_eq!((review.old_object, review.dry_run), (None, false));
    }

    #[test]
    fn what_is_no_review_is_an_error() {
        let no_uid = body("admission.k8s.io/v1", &json!({"operation": "CREATE"}));
        for bytes in
            [&b""[..], b"[]", b"{}", b"null", &no_uid, &body("admission.k8s.io/v2", &create())]
        {
            assert_eq!(Review::parse(bytes).unwrap_err().id, None);
        }
        let deep = format!("{}{}", "[".repeat(1000), "]".repeat(1000));
        assert!(Review::parse(deep.as_bytes()).is_err());
        let bare = Review::parse(&body("admission.k8s.io/v1", &json!({"uid": "u"}))).unwrap_err();
        assert_eq!(bare.id.unwrap().uid, "u");
    }

    #[test]
    fn answers_are_what_the_api_server_checks() {
        for version in VERSIONS {
            assert_eq!(
                answer(version, &Answer::allow()),
                json!({"apiVersion": version, "kind": "AdmissionReview",
                    "response": {"uid": "u-1", "allowed": true}})
            );
        }
        assert_eq!(
            answer(VERSIONS[0], &Answer::allow_with_patch(Patch::default())),
            answer(VERSIONS[0], &Answer::allow())
        );
        let ops: Patch =
            serde_json::from_value(json!([{"op": "add", "path": "/a", "value": 1}])).unwrap();
        let injected = Outcome::Inject(Injection { ops, ..Injection::default() });
        let made = answer(VERSIONS[0], &Answer::of(injected));
        assert_eq!(made["response"]["patchType"], "JSONPatch");
        assert_eq!(
            STANDARD.decode(made["response"]["patch"].as_str().unwrap()).unwrap(),
            br#"[{"op":"add","path":"/a","value":1}]"#
        );
    }

    #[test]
    fn a_refusal_has_code_reason_and_message() {
        let refusal = Refusal::new(Class::HostPid, "spec.hostPID is true");
        let made = answer(VERSIONS[0], &Answer::deny(refusal));
        assert_eq!(made["response"]["allowed"], false);
        assert_eq!(made["response"]["status"]["code"], 403);
        assert_eq!(made["response"]["status"]["reason"], "Forbidden");
        assert_eq!(made["response"]["auditAnnotations"]["refused"], "host-pid");
        assert_eq!(made["response"].get("patch"), None);
        assert_eq!(made["response"]["status"].get("details"), None);
        let again = Refusal::new(Class::AnotherVersion, "x");
        let made = answer(VERSIONS[0], &Answer::deny(again));
        assert_eq!(made["response"]["status"]["code"], 503);
        assert_eq!(made["response"]["status"]["details"], json!({"retryAfterSeconds": 1}));
    }

    #[test]
    fn warnings_are_bounded() {
        let many = (0..20)
            .fold(Answer::allow(), |answer, n| answer.warn(format!("{n}\n{}", "ü".repeat(400))));
        let made = answer(VERSIONS[0], &many);
        let warnings = made["response"]["warnings"].as_array().unwrap();
        assert_eq!(warnings.len(), MAX_WARNINGS + 1);
        let first = warnings[0].as_str().unwrap();
        assert_eq!(first.chars().count(), MAX_WARNING);
        assert!(first.starts_with("0 ü") && first.ends_with('…'));
    }
}

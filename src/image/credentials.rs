//! Registry credentials, those of pull secrets above all: parsing, and which of them fit an image.
//!
//! The rules are the kubelet's: an entry fits when its host matches (a `*` stands within one
//! label) and its path is a prefix of the image's; longer paths are tried first; Docker Hub has
//! three names. Nothing here is ever printed: `Debug` shows no secret.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use oci_client::Reference;
use oci_client::secrets::RegistryAuth;
use serde_json::Value;
use sha2::{Digest as _, Sha256};

/// One entry of a pull secret.
#[derive(Clone)]
pub struct Credential {
    /// Where it came from, for messages: a secret of the pod, a credential provider.
    pub source: String,
    host: String,
    path: String,
    auth: RegistryAuth,
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Credential({} for {}{})", self.source, self.host, self.path)
    }
}

/// Why a pull secret could not be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CredentialError {
    /// The Secret has neither of the two keys that hold registry credentials.
    #[error("secret `{0}` has neither .dockerconfigjson nor .dockercfg")]
    WrongType(String),
    /// The value is not what the key promises. The text is not repeated: it is a secret.
    #[error("secret `{0}` holds no valid registry configuration")]
    Malformed(String),
}

/// Reads the entries of one Secret, given its name and a look-up of its data by key.
///
/// # Errors
/// When neither key is there, or the value does not parse.
pub fn parse<'a>(
    secret: &str,
    data: impl Fn(&str) -> Option<&'a [u8]>,
) -> Result<Vec<Credential>, CredentialError> {
    let malformed = || CredentialError::Malformed(secret.to_owned());
    let (bytes, nested) = match (data(".dockerconfigjson"), data(".dockercfg")) {
        (Some(bytes), _) => (bytes, true),
        (None, Some(bytes)) => (bytes, false),
        (None, None) => return Err(CredentialError::WrongType(secret.to_owned())),
    };
    let document: Value = serde_json::from_slice(bytes).map_err(|_| malformed())?;
    let entries = if nested { document.get("auths") } else { Some(&document) };
    let entries = match entries {
        Some(Value::Object(map)) => map,
        // `{}` is what some tools write for "no credentials".
        None => return Ok(Vec::new()),
        Some(_) => return Err(malformed()),
    };
    let mut credentials = Vec::new();
    for (server, entry) in entries {
        if let Some(auth) = auth_of(entry) {
            credentials.push(Credential::of(&format!("secret `{secret}`"), server, auth));
        }
    }
    Ok(credentials)
}

fn auth_of(entry: &Value) -> Option<RegistryAuth> {
    let text = |key: &str| entry.get(key).and_then(Value::as_str).filter(|s| !s.is_empty());
    if let Some(token) = text("registrytoken") {
        return Some(RegistryAuth::Bearer(token.to_owned()));
    }
    if let (Some(user), Some(password)) = (text("username"), text("password")) {
        return Some(RegistryAuth::Basic(user.to_owned(), password.to_owned()));
    }
    let decoded = STANDARD.decode(text("auth")?.trim()).ok()?;
    let decoded = String::from_utf8(decoded).ok()?;
    let (user, password) = decoded.split_once(':')?;
    // Docker pads some old entries with NUL.
    Some(RegistryAuth::Basic(user.to_owned(), password.trim_end_matches('\0').to_owned()))
}

/// Host and path of a configuration key: `https://index.docker.io/v1/`, `registry.example/team`.
fn server_key(server: &str) -> (String, String) {
    let bare = server
        .strip_prefix("https://")
        .or_else(|| server.strip_prefix("http://"))
        .unwrap_or(server);
    let (host, path) = bare.split_once('/').unwrap_or((bare, ""));
    // `/v1/` and `/v2/` are API versions, not a part of any repository's name.
    let path = path.trim_end_matches('/');
    let path = if path == "v1" || path == "v2" { "" } else { path };
    (hub_name(&host.to_ascii_lowercase()).to_owned(), path.to_owned())
}

/// Docker Hub under one of its names.
pub(super) fn hub_name(host: &str) -> &str {
    match host {
        "index.docker.io" | "registry-1.docker.io" | "registry.hub.docker.com" => "docker.io",
        other => other,
    }
}

/// Whether a pattern like those of pull secrets' keys (`*.registry.example/path`) names the image.
pub(super) fn is_named(pattern: &str, image: &Reference) -> bool {
    let any = Credential::of("", pattern, RegistryAuth::Anonymous);
    any.fits(image.registry(), image.repository())
}

impl Credential {
    /// What `source` gives for the images that a key of such a configuration names.
    pub(super) fn of(source: &str, server: &str, auth: RegistryAuth) -> Self {
        let (host, path) = server_key(server);
        Self { source: source.to_owned(), host, path, auth }
    }

    fn fits(&self, registry: &str, repository: &str) -> bool {
        let path_fits = self.path.is_empty()
            || repository == self.path
            || repository.strip_prefix(&self.path).is_some_and(|rest| rest.starts_with('/'));
        path_fits && host_fits(&self.host, hub_name(&registry.to_ascii_lowercase()))
    }
}

/// Label by label; `*` in the pattern stands for any run of characters within one label. The port
/// must be the same.
fn host_fits(pattern: &str, host: &str) -> bool {
    let split = |s: &str| -> (String, String) {
        let (name, port) = s.rsplit_once(':').unwrap_or((s, ""));
        (name.to_owned(), port.to_owned())
    };
    let ((pattern, pattern_port), (host, port)) = (split(pattern), split(host));
    let (patterns, labels): (Vec<&str>, Vec<&str>) =
        (pattern.split('.').collect(), host.split('.').collect());
    pattern_port == port
        && patterns.len() == labels.len()
        && patterns.iter().zip(&labels).all(|(p, l)| label_fits(p, l))
}

fn label_fits(pattern: &str, label: &str) -> bool {
    let Some((first, rest)) = pattern.split_once('*') else { return pattern == label };
    let Some(mut left) = label.strip_prefix(first) else { return false };
    let mut parts = rest.split('*').peekable();
    while let Some(part) = parts.next() {
        if parts.peek().is_none() {
            return left.ends_with(part);
        }
        let Some(at) = left.find(part) else { return false };
        left = &left[at + part.len()..];
    }
    true
}

/// The credentials to try for an image, best first: longer paths before shorter, then exact hosts
/// before patterns, then in the order given. Anonymous access is the caller's last resort.
#[must_use]
pub fn matching<'a>(all: &'a [Credential], image: &Reference) -> Vec<&'a Credential> {
    let mut fitting: Vec<&Credential> =
        all.iter().filter(|c| c.fits(image.registry(), image.repository())).collect();
    fitting.sort_by_key(|c| (std::cmp::Reverse(c.path.len()), c.host.contains('*')));
    fitting
}

/// What to send, and a hash that tells tenants apart in the cache without keeping the secret.
#[must_use]
pub fn auth_and_identity(credential: Option<&Credential>) -> (RegistryAuth, [u8; 32]) {
    let Some(credential) = credential else {
        return (RegistryAuth::Anonymous, [0; 32]);
    };
    let mut hash = Sha256::new();
    match &credential.auth {
        RegistryAuth::Anonymous => {}
        RegistryAuth::Basic(user, password) => {
            hash.update((user.len() as u64).to_be_bytes());
            hash.update(user);
            hash.update(password);
        }
        RegistryAuth::Bearer(token) => {
            hash.update(u64::MAX.to_be_bytes());
            hash.update(token);
        }
    }
    (credential.auth.clone(), hash.finalize().into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn credentials(json: &str) -> Vec<Credential> {
        parse("s", |key| (key == ".dockerconfigjson").then_some(json.as_bytes())).expect("parses")
    }

    fn image(name: &str) -> Reference {
        name.parse().expect("a reference")
    }

    #[test]
    fn user_and_password_come_from_fields_or_from_auth() {
        let all = credentials(
            r#"{"auths":{
                "a.example":{"username":"u","password":"p"},
                "b.example":{"auth":"dTpwOnE="},
                "c.example":{"registrytoken":"t"},
                "d.example":{}}}"#,
        );
        let found: Vec<_> = all.iter().map(|c| (c.host.as_str(), c.auth.clone())).collect();
        assert_eq!(
            found,
            [
                ("a.example", RegistryAuth::Basic("u".into(), "p".into())),
                ("b.example", RegistryAuth::Basic("u".into(), "p:q".into())),
                ("c.example", RegistryAuth::Bearer("t".into())),
            ]
        );
    }

    #[test]
    fn the_longest_path_is_tried_first_and_hub_names_are_one() {
        let all = credentials(
            r#"{"auths":{
                "https://index.docker.io/v1/":{"username":"hub","password":"p"},
                "r.example":{"username":"all","password":"p"},
                "r.example/team":{"username":"team","password":"p"},
                "r.example/team/app":{"username":"app","password":"p"},
                "*.example":{"username":"any","password":"p"}}}"#,
        );
        let users = |name: &str| -> Vec<String> {
            matching(&all, &image(name))
                .iter()
                .map(|c| match &c.auth {
                    RegistryAuth::Basic(user, _) => user.clone(),
                    _ => unreachable!("only basic above"),
                })
                .collect()
        };
        assert_eq!(users("r.example/team/app:1"), ["app", "team", "all", "any"]);
        assert_eq!(users("r.example/teammate/app"), ["all", "any"]);
        assert_eq!(users("busybox"), ["hub"]);
        assert!(users("x.r.example/a").is_empty());
    }

    #[test]
    fn a_star_stays_within_its_label_and_ports_must_agree() {
        assert!(host_fits("*.dkr.*.example", "1.dkr.eu-1.example"));
        assert!(!host_fits("*.example", "a.b.example"));
        assert!(host_fits("reg*y.example", "registry.example"));
        assert!(!host_fits("r.example", "r.example:5000"));
        assert!(host_fits("r.example:5000", "r.example:5000"));
    }

    #[test]
    fn a_bad_secret_is_named_and_not_shown() {
        let bad = parse("pull", |k| (k == ".dockercfg").then_some(b"hunter2".as_slice()));
        let text = bad.expect_err("does not parse").to_string();
        assert!(text.contains("pull") && !text.contains("hunter2"));
        let shown = format!(
            "{:?}",
            credentials(r#"{"auths":{"a":{"username":"u","password":"hunter2"}}}"#)
        );
        assert!(!shown.contains("hunter2"));
    }

    #[test]
    fn tenants_have_different_identities() {
        let all = credentials(
            r#"{"auths":{"a":{"username":"u","password":"1"},"b":{"username":"u","password":"2"}}}"#,
        );
        let one = auth_and_identity(Some(&all[0])).1;
        let two = auth_and_identity(Some(&all[1])).1;
        assert_ne!(one, two);
        assert_ne!(one, auth_and_identity(None).1);
    }
}

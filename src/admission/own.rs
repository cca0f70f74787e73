//! What of an exempt container is its author's. An exemption names a program by container and image;
//! with a command, a variable or a mount of theirs an author makes another program of it, outside the
//! fence. So under `strict` the administrator says which of these an exempt container may bring:
//! `name=image;own=env+mounts`.

use serde_json::Value;

use super::json::{at, field, list, text, word, yes};

/// One word of `own=`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Own {
    Command,
    Env,
    Mounts,
    Lifecycle,
    Probes,
    Exec,
}

/// Where Kubernetes itself mounts the service account's token.
const TOKEN_DIR: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
/// The API server's own default.
const MESSAGE_PATH: &str = "/dev/termination-log";

impl Own {
    /// All of them, as the annotation writes them.
    pub(super) const ALL: [(&str, Self); 6] = [
        ("command", Self::Command),
        ("env", Self::Env),
        ("mounts", Self::Mounts),
        ("lifecycle", Self::Lifecycle),
        ("probes", Self::Probes),
        ("exec", Self::Exec),
    ];

    /// Reads one.
    pub(super) fn of(word: &str) -> Option<Self> {
        Self::ALL.iter().find(|(known, _)| *known == word).map(|(_, own)| *own)
    }

    /// The field by which a container brings this, if any.
    pub(super) fn brought(self, pod: &Value, container: &Value) -> Option<String> {
        let filled = |names: &[&str]| {
            let found = names.iter().find(|name| !list(container, name).is_empty());
            found.map(|name| (*name).to_owned())
        };
        let exec = |paths: &[[&str; 2]]| {
            let found = paths.iter().find(|path| {
                let path: Vec<&str> =
                    path.iter().copied().filter(|step| !step.is_empty()).collect();
                at(container, &path).and_then(|handler| field(handler, "exec")).is_some()
            });
            found.map(|path| path.join(".").trim_end_matches('.').to_owned() + ".exec")
        };
        match self {
            Self::Command => filled(&["command", "args"])
                .or_else(|| word(container, "workingDir").map(|_| "workingDir".to_owned())),
            Self::Env => filled(&["env", "envFrom"]),
            Self::Mounts => mount(pod, container),
            Self::Lifecycle => exec(&[["lifecycle", "postStart"], ["lifecycle", "preStop"]]),
            Self::Probes => {
                exec(&[["livenessProbe", ""], ["readinessProbe", ""], ["startupProbe", ""]])
            }
            // What can be typed into a running program by `kubectl attach` is a command of sorts.
            Self::Exec => yes(container, &["stdin"]).then(|| "stdin".to_owned()),
        }
    }
}

/// The first thing that is mounted for the author.
fn mount(pod: &Value, container: &Value) -> Option<String> {
    let mounts = list(container, "volumeMounts").iter();
    if let Some(mount) = mounts.clone().find(|mount| !is_token(pod, mount)) {
        return Some(format!("volumeMounts at {:?}", text(mount, "mountPath").unwrap_or_default()));
    }
    if !list(container, "volumeDevices").is_empty() {
        return Some("volumeDevices".to_owned());
    }
    let message = word(container, "terminationMessagePath")?;
    (message != MESSAGE_PATH).then(|| "terminationMessagePath".to_owned())
}

/// Whether a mount is the service account's token, which the API server puts into every container. Its
/// volume is one of nothing but what the API server would put there.
fn is_token(pod: &Value, mount: &Value) -> bool {
    let spec = field(pod, "spec").unwrap_or(&Value::Null);
    let volume = list(spec, "volumes").iter().find(|v| text(v, "name") == text(mount, "name"));
    let sources =
        volume.and_then(|v| field(v, "projected")).map_or(&[][..], |p| list(p, "sources"));
    let usual = |source: &Value| match source.as_object() {
        Some(map) if map.len() == 1 => {
            map.contains_key("serviceAccountToken")
                || map.contains_key("downwardAPI")
                || at(source, &["configMap", "name"]).and_then(Value::as_str)
                    == Some("kube-root-ca.crt")
        }
        _ => false,
    };
    text(mount, "mountPath") == Some(TOKEN_DIR)
        && yes(mount, &["readOnly"])
        && ["subPath", "subPathExpr"].iter().all(|key| word(mount, key).is_none())
        && !sources.is_empty()
        && sources.iter().all(usual)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn brought(container: &Value) -> Vec<&'static str> {
        brought_in(&json!({}), container)
    }

    fn brought_in(pod: &Value, container: &Value) -> Vec<&'static str> {
        let all = Own::ALL.iter().filter(|(_, own)| own.brought(pod, container).is_some());
        all.map(|(word, _)| *word).collect()
    }

    #[test]
    fn each_field_of_the_authors_has_its_word() {
        for (field, value, word) in [
            ("command", json!(["sh"]), "command"),
            ("args", json!(["-c"]), "command"),
            ("workingDir", json!("/tmp"), "command"),
            ("env", json!([{"name": "LD_PRELOAD", "value": "/x"}]), "env"),
            ("envFrom", json!([{"configMapRef": {"name": "x"}}]), "env"),
            ("volumeMounts", json!([{"name": "x", "mountPath": "/usr/bin"}]), "mounts"),
            ("volumeDevices", json!([{"name": "x", "devicePath": "/dev/x"}]), "mounts"),
            ("terminationMessagePath", json!("/etc/config"), "mounts"),
            ("lifecycle", json!({"postStart": {"exec": {"command": ["x"]}}}), "lifecycle"),
            ("lifecycle", json!({"preStop": {"exec": {"command": ["x"]}}}), "lifecycle"),
            ("livenessProbe", json!({"exec": {"command": ["x"]}}), "probes"),
            ("readinessProbe", json!({"exec": {"command": ["x"]}}), "probes"),
            ("startupProbe", json!({"exec": {"command": ["x"]}}), "probes"),
            ("stdin", json!(true), "exec"),
        ] {
            let mut container = json!({"name": "mcp", "image": "i"});
            container[field] = value;
            assert_eq!(brought(&container), [word], "{container}");
        }
        // What Kubernetes fills in, and what starts nothing.
        let plain = json!({"name": "mcp", "image": "i", "command": [], "env": null,
            "terminationMessagePath": "/dev/termination-log", "stdin": false, "workingDir": "",
            "livenessProbe": {"httpGet": {"port": 80}}, "lifecycle": {"preStop": {"sleep": {"seconds": 1}}},
            "ports": [{"containerPort": 80}], "resources": {"limits": {"cpu": "1"}}});
        assert_eq!(brought(&plain), [""; 0]);
    }

    #[test]
    fn the_service_accounts_token_is_nobodys_mount() {
        let usual = json!([
            {"serviceAccountToken": {"path": "token"}},
            {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
            {"downwardAPI": {"items": [{"path": "namespace"}]}}]);
        let pod = |sources: Value| json!({"spec": {"volumes": [{"name": "kube-api-access-x", "projected": {"sources": sources}}]}});
        let mount = json!({"name": "kube-api-access-x", "mountPath": TOKEN_DIR, "readOnly": true});
        let with = |mount: &Value| json!({"volumeMounts": [mount]});
        assert_eq!(brought_in(&pod(usual.clone()), &with(&mount)), [""; 0]);
        for (field, value) in [
            ("mountPath", json!("/usr/bin")),
            ("readOnly", json!(false)),
            ("subPath", json!("token")),
            ("name", json!("other")),
        ] {
            let mut other = mount.clone();
            other[field] = value;
            assert_eq!(brought_in(&pod(usual.clone()), &with(&other)), ["mounts"], "{other}");
        }
        for sources in [
            json!([]),
            json!([{"secret": {"name": "x"}}]),
            json!([{"configMap": {"name": "mine"}}]),
            json!([{"serviceAccountToken": {}, "secret": {"name": "x"}}]),
        ] {
            assert_eq!(brought_in(&pod(sources.clone()), &with(&mount)), ["mounts"], "{sources}");
        }
    }
}

//! A container's own volumes that join the files of its fence (`ringfence.dev/volume-mounts: allowed`).
//!
//! What a volume is decides, and where it is mounted: never a Secret, a token or what else a type
//! says holds what is not for the agent; never over a place of the system's. Both are the pod's
//! author's to write, so what is not known does not join. A volume that holds the mount of one that
//! stays out stays out too: a rule for a directory is one for all below it.
//!
//! The supervisor looks once more at what was really mounted.

use std::collections::BTreeMap;

use serde_json::Value;

use super::command::Flags;
use super::json::{at, field, list, text, yes};
use super::mounts::{clean, is_ours, mount_path, paths};
use crate::policy::closed_to_volumes;

/// Where the API server mounts the service account's token by itself; that it stays out is no news.
const ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

/// What becomes of a container's volumes.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Volumes {
    /// Path, and whether the agent may write there.
    joined: BTreeMap<String, bool>,
    /// Of those that stay out, what is to be said.
    pub left_out: Vec<String>,
}

impl Volumes {
    /// `volumes` are the VOLUMEs of the container's image.
    pub(super) fn of(pod: &Value, container: &Value, volumes: &[String]) -> Self {
        let spec = field(pod, "spec").unwrap_or(&Value::Null);
        let mut found = Self::default();
        let mounts = list(container, "volumeMounts");
        for mount in mounts.iter().filter(|mount| !is_ours(mount)) {
            let path = mount_path(mount);
            match writable(spec, mount) {
                Ok(writable) => {
                    found.joined.insert(path.to_owned(), writable);
                }
                Err(why) => found.leave_out(path, &why),
            }
        }
        // What is mounted otherwise is nobody's volume, and may hold anything.
        let ours: Vec<&str> = mounts.iter().filter(|m| is_ours(m)).map(mount_path).collect();
        let all: Vec<&str> = paths(container).map(|(_, path)| path).collect();
        let all = all.into_iter().filter(|path| !ours.contains(path));
        found.close_over(&all.chain(volumes.iter().map(String::as_str)).collect::<Vec<_>>());
        found
    }

    /// Leaves out what holds a mount that stays out, or lies below it in another spelling, until
    /// nothing does.
    fn close_over(&mut self, all: &[&str]) {
        let within = |inner: &str, path: &str| {
            inner.strip_prefix(path).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        };
        let all: Vec<_> = all.iter().map(|path| (*path, clean(path))).collect();
        loop {
            let holds = |path: &String| {
                let place = clean(path);
                let inner = all.iter().find(|(spelling, inner)| {
                    within(inner, &place) && !self.joined.contains_key(*spelling)
                });
                inner.map(|(spelling, _)| (path.clone(), (*spelling).to_owned()))
            };
            let Some((path, inner)) = self.joined.keys().find_map(holds) else {
                return;
            };
            self.joined.remove(&path);
            self.leave_out(&path, &format!("{inner:?} is mounted in it and stays out"));
        }
    }

    fn leave_out(&mut self, path: &str, why: &str) {
        if path != ACCOUNT {
            self.left_out.push(format!("the volume at {path:?} ({why})"));
        }
    }

    /// Adds the flags, in the order of the paths.
    pub(super) fn flags(&self, flags: &mut Flags) {
        for (path, writable) in &self.joined {
            let name = if *writable { "--volume-read-write" } else { "--volume-read-only" };
            flags.push(name, path);
        }
    }
}

/// Whether the agent may write to what is mounted.
///
/// # Errors
/// Why it does not join.
fn writable(spec: &Value, mount: &Value) -> Result<bool, String> {
    if let Some(why) = closed_to_volumes(mount_path(mount)) {
        return Err(why);
    }
    if text(mount, "mountPropagation").is_some_and(|how| how != "None") {
        return Err("what is mounted there later would join".to_owned());
    }
    let name = text(mount, "name").unwrap_or_default();
    let volume = list(spec, "volumes").iter().find(|volume| text(volume, "name") == Some(name));
    let Some(volume) = volume else {
        return Err("the pod has no such volume".to_owned());
    };
    Ok(is_writable(volume)? && !yes(mount, &["readOnly"]))
}

/// The same by what the volume is.
fn is_writable(volume: &Value) -> Result<bool, String> {
    let kinds: Vec<&str> = volume
        .as_object()
        .into_iter()
        .flatten()
        .filter(|(key, value)| *key != "name" && !value.is_null())
        .map(|(key, _)| key.as_str())
        .collect();
    match kinds.as_slice() {
        ["emptyDir" | "ephemeral"] => Ok(true),
        ["persistentVolumeClaim"] => Ok(!yes(volume, &["persistentVolumeClaim", "readOnly"])),
        ["configMap" | "image"] => Ok(false),
        ["projected"] => {
            let sources = at(volume, &["projected"]).map_or(&[][..], |p| list(p, "sources"));
            let plain = |source: &Value| {
                source.as_object().is_some_and(|source| {
                    let mut kinds = source.iter().filter(|(_, value)| !value.is_null());
                    kinds.all(|(kind, _)| kind == "configMap")
                })
            };
            if sources.iter().all(plain) {
                Ok(false)
            } else {
                Err("a projected volume with more than ConfigMaps".to_owned())
            }
        }
        ["secret"] => Err("a Secret".to_owned()),
        // The manifest as kubectl applied it is among a pod's annotations, with the variables of every
        // container.
        ["downwardAPI"] => Err("what the pod says of itself".to_owned()),
        [kind] => Err(format!("a volume of kind {kind}")),
        _ => Err("a volume of no one kind".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod(volumes: &Value) -> Value {
        json!({"spec": {"volumes": volumes}})
    }

    fn flags(found: &Volumes) -> Vec<String> {
        let mut flags = Flags::default();
        found.flags(&mut flags);
        flags.iter().map(|(name, value)| format!("{name} {value}")).collect()
    }

    #[test]
    fn volumes_join_by_what_they_are() {
        let kinds = json!([
            {"name": "e", "emptyDir": {}},
            {"name": "p", "persistentVolumeClaim": {"claimName": "x"}},
            {"name": "pr", "persistentVolumeClaim": {"claimName": "x", "readOnly": true}},
            {"name": "eph", "ephemeral": {"volumeClaimTemplate": {}}},
            {"name": "c", "configMap": {"name": "x"}},
            {"name": "i", "image": {"reference": "x"}},
            {"name": "proj", "projected": {"sources": [{"configMap": {"name": "x"}, "secret": null}]}},
            {"name": "s", "secret": {"secretName": "x"}},
            {"name": "tok", "projected": {"sources": [{"configMap": {}}, {"serviceAccountToken": {}}]}},
            {"name": "psec", "projected": {"sources": [{"secret": {}}]}},
            {"name": "pdown", "projected": {"sources": [{"downwardAPI": {}}]}},
            {"name": "d", "downwardAPI": {}},
            {"name": "h", "hostPath": {"path": "/"}},
            {"name": "csi", "csi": {"driver": "secrets-store.csi.k8s.io"}},
            {"name": "n", "nfs": {}},
            {"name": "two", "emptyDir": {}, "secret": {}},
            {"name": "none"},
            {"name": "later", "volumeOfTomorrow": {}},
        ]);
        let mounts: Vec<Value> = kinds
            .as_array()
            .unwrap()
            .iter()
            .map(|volume| {
                let name = volume["name"].as_str().unwrap();
                json!({"name": name, "mountPath": format!("/v/{name}")})
            })
            .collect();
        let found = Volumes::of(&pod(&kinds), &json!({"volumeMounts": mounts}), &[]);
        assert_eq!(
            flags(&found),
            [
                "--volume-read-only /v/c",
                "--volume-read-write /v/e",
                "--volume-read-write /v/eph",
                "--volume-read-only /v/i",
                "--volume-read-write /v/p",
                "--volume-read-only /v/pr",
                "--volume-read-only /v/proj",
            ]
        );
        assert_eq!(found.left_out.len(), mounts.len() - 7, "{:?}", found.left_out);
        assert!(found.left_out.contains(&"the volume at \"/v/s\" (a Secret)".to_owned()));
    }

    #[test]
    fn a_mount_says_how_and_where() {
        let volumes = json!([{"name": "e", "emptyDir": {}}]);
        let of = |mount: Value| {
            let mut mount = mount;
            mount["name"] = json!("e");
            flags(&Volumes::of(&pod(&volumes), &json!({"volumeMounts": [mount]}), &[]))
        };
        assert_eq!(of(json!({"mountPath": "/d", "readOnly": true})), ["--volume-read-only /d"]);
        assert_eq!(of(json!({"mountPath": "/d", "mountPropagation": "None"})).len(), 1);
        assert_eq!(of(json!({"mountPath": "/dev/shm"})).len(), 1);
        for mount in [
            json!({"mountPath": "/d", "mountPropagation": "HostToContainer"}),
            json!({"mountPath": "/d/"}),
            json!({"mountPath": "/d/../etc"}),
            json!({"mountPath": "d"}),
            json!({"mountPath": "/proc/sys"}),
            json!({"mountPath": "/usr/local"}),
            json!({"mountPath": "/var/run/secrets/x"}),
            json!({"mountPath": null}),
        ] {
            assert!(of(mount.clone()).is_empty(), "{mount}");
        }
        let unknown = json!({"volumeMounts": [{"name": "other", "mountPath": "/d"}]});
        assert!(flags(&Volumes::of(&pod(&volumes), &unknown, &[])).is_empty());
    }

    /// A rule for a directory is one for all below it.
    #[test]
    fn a_volume_that_holds_what_stays_out_stays_out() {
        let volumes = json!([
            {"name": "a", "emptyDir": {}}, {"name": "b", "emptyDir": {}},
            {"name": "c", "emptyDir": {}}, {"name": "token", "projected": {"sources": [{"serviceAccountToken": {}}]}},
        ]);
        let found = |mounts: Value, more: Value, image: &[String]| {
            let mut container = json!({"volumeMounts": mounts});
            container.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            flags(&Volumes::of(&pod(&volumes), &container, image))
        };
        let mounts = json!([
            {"name": "a", "mountPath": "/a"}, {"name": "b", "mountPath": "/a/b"},
            {"name": "c", "mountPath": "/ab"},
        ]);
        assert_eq!(found(mounts.clone(), json!({}), &[]).len(), 3);
        // The last ones are the same directory as `/a/b`, and what is mounted later lies on top.
        for inner in ["/a/b/token", "a//b/./token", "/x/../a/b/token", "/a/b/", "/y/../a/./b"] {
            let mut with = mounts.clone();
            with.as_array_mut().unwrap().push(json!({"name": "token", "mountPath": inner}));
            assert_eq!(found(with, json!({}), &[]), ["--volume-read-write /ab"], "{inner}");
        }
        let device = json!({"volumeDevices": [{"name": "x", "devicePath": "/ab/disk"}]});
        assert_eq!(found(mounts.clone(), device, &[]).len(), 2);
        let message = json!({"terminationMessagePath": "/ab/log"});
        assert_eq!(found(mounts.clone(), message, &[]).len(), 2);
        assert_eq!(found(mounts.clone(), json!({}), &["/ab/cache".into()]).len(), 2);
        assert_eq!(found(mounts, json!({}), &["/ab".into()]).len(), 3);
    }

    #[test]
    fn the_accounts_token_is_left_out_without_a_word() {
        let volumes = json!([
            {"name": "kube-api-access-x", "projected": {"sources": [{"serviceAccountToken": {}}]}}]);
        let container =
            json!({"volumeMounts": [{"name": "kube-api-access-x", "mountPath": ACCOUNT}]});
        let found = Volumes::of(&pod(&volumes), &container, &[]);
        assert_eq!(found, Volumes::default());
    }
}

//! Volumes and mounts of ours, and who may not come near them.
//!
//! A container runtime sorts mounts, and with them the VOLUMEs of the image, by the number of
//! components in their path and mounts the shallow ones first. Symlinks of the image are followed. Under a shallow mount of ours an author can put another program in the
//! supervisor's place (a spelling that the API server does not compare, a symlink of the image),
//! which then runs as root with eight capabilities. So the binary's directory is deeper than any
//! other path of the container, which makes it the last one mounted, and whatever names our paths
//! in any spelling is refused.

use std::fmt::Write as _;

use serde_json::{Map, Value, json};
use sha2::{Digest as _, Sha256};

use super::command::{PAD, POLICY_DIR, ROOT, RUN_DIR, SUPERVISOR, is_bin_dir, supervisor_path};
use super::json::{at, list, list_in, text, upsert, word};
use super::shape::SANDBOX;
use super::{Class, Delivery, PolicyRef, Refusal, Settings};

/// Names that start so are ours.
const PREFIX: &str = "ringfence-";
/// Volume of the supervisor's binary.
pub(super) const BIN: &str = "ringfence-bin";
/// Volume of the policy; the name is the reference deployment's.
const POLICY: &str = "openshell-policy";
/// Volumes of the run directories, one a container.
const RUN: &str = "ringfence-run-";

/// The least depth. Deep enough for what the cluster mounts by itself (the service account's token
/// has five components), so that mounts of later webhooks rarely change ours.
const MIN_DEPTH: usize = 8;

/// What a path of the image is called in a message.
const VOLUME: &str = "the image's VOLUME";

/// A path as the kubelet and the runtime understand it: absolute, without `.`, `..` and empty
/// components. `/var/run` is `/run` in every image that has either.
pub(super) fn clean(path: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    if parts.starts_with(&["var", "run"]) {
        parts.remove(0);
    }
    format!("/{}", parts.join("/"))
}

/// Components of a path, counted generously: `..` is not taken off.
fn depth(path: &str) -> usize {
    path.split('/').filter(|part| !matches!(*part, "" | ".")).count()
}

/// Whether one path is the other, lies in it or holds it.
fn overlap(a: &str, b: &str) -> bool {
    let within = |inner: &str, outer: &str| {
        outer == "/"
            || inner
                .strip_prefix(outer)
                .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    };
    within(a, b) || within(b, a)
}

/// Whether a path would cover something of ours, or of `more`.
fn is_near(path: &str, more: &[&str]) -> bool {
    [ROOT, RUN_DIR, POLICY_DIR].iter().chain(more).any(|ours| overlap(path, ours))
}

/// Whether a path goes through a process of `/proc`. Its `root` is a link to the root directory, which
/// a runtime may follow when it mounts: every path has another spelling there. Files of `/proc` itself
/// (`/proc/meminfo`) are no such way.
fn is_through_proc(path: &str) -> bool {
    let path = clean(path);
    path.strip_prefix("/proc/").is_some_and(|rest| rest.contains('/'))
}

/// Whether a path is a file, or lies in it.
fn is_or_in(path: &str, file: &str) -> bool {
    clean(path).strip_prefix(file).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// What a container has mounted at a file, with the name of the field: where the runtime puts a
/// file of its own, its author's comes in its place.
pub(super) fn at_file(container: &Value, file: &str) -> Option<String> {
    paths(container)
        .find(|(_, path)| is_or_in(path, file))
        .map(|(field, path)| format!("{field} {path:?}"))
}

/// Each path at which something is mounted into a container, with the name of its field.
pub(super) fn paths(container: &Value) -> impl Iterator<Item = (&'static str, &str)> {
    let mounts = list(container, "volumeMounts").iter().map(|m| ("mountPath", mount_path(m)));
    let devices = list(container, "volumeDevices")
        .iter()
        .map(|device| ("devicePath", text(device, "devicePath").unwrap_or_default()));
    let message = word(container, "terminationMessagePath");
    mounts.chain(devices).chain(message.map(|path| ("terminationMessagePath", path)))
}

/// Whether a path of a policy is the supervisor's run directory, lies in it or holds it.
pub(super) fn meets_run_dir(path: &str) -> bool {
    overlap(&clean(path), RUN_DIR)
}

/// Name of the volume of a container's run directory, within Kubernetes' 63 characters.
fn run_volume(container: &str) -> String {
    let name = format!("{RUN}{container}");
    if name.len() <= 63 && name.is_ascii() {
        return name;
    }
    let hash = Sha256::digest(container);
    let short: String = name.chars().filter(char::is_ascii).take(46).collect();
    let short = format!("{}-", short.trim_end_matches('-'));
    hash.iter().take(8).fold(short, |mut name, byte| {
        let _ = write!(name, "{byte:02x}");
        name
    })
}

/// Whether a mount of a fenced container is one that the injector made, in this or an earlier pass.
pub(super) fn is_ours(mount: &Value) -> bool {
    let (name, path) = (text(mount, "name").unwrap_or_default(), clean(mount_path(mount)));
    match name {
        BIN => is_bin_dir(&path) || path == SANDBOX,
        POLICY => path == POLICY_DIR,
        name => name.starts_with(RUN) && path == RUN_DIR,
    }
}

/// Whether a container's command is the supervisor, from the mount that an injector made for it, with
/// nothing else mounted there: what the chart's guard asks too. Another version may have made it.
pub(super) fn starts_through_the_supervisor(container: &Value) -> bool {
    let Some(program) = supervisor_path(container) else { return false };
    let holds_it = |path: &str| format!("{path}/{SUPERVISOR}") == program;
    let whole =
        |mount: &Value| ["subPath", "subPathExpr"].iter().all(|key| word(mount, key).is_none());
    let mut mounts = list(container, "volumeMounts").iter();
    mounts.any(|m| text(m, "name") == Some(BIN) && holds_it(mount_path(m)) && whole(m))
        && paths(container).all(|(_, path)| {
            holds_it(path) || !(is_through_proc(path) || overlap(&clean(path), ROOT))
        })
}

pub(super) fn mount_path(mount: &Value) -> &str {
    text(mount, "mountPath").unwrap_or_default()
}

/// Refuses everything that a fenced container has near our paths, and finds the directory of the
/// binary: deeper than whatever else there is, the VOLUMEs of its image included.
///
/// # Errors
/// A foreign mount, device, message path or VOLUME over ours, a foreign use of a volume of ours.
pub(super) fn bin_dir(container: &Value, volumes: &[String]) -> Result<String, Refusal> {
    let deepest = check(container, volumes, &[])?;
    let pads = MIN_DEPTH.max(deepest + 1) - 2;
    Ok(format!("{ROOT}/{}bin", format!("{PAD}/").repeat(pads)))
}

/// Refuses everything that a fenced container has near our paths and `more`, and says how deep the
/// rest is.
///
/// # Errors
/// As [`bin_dir`].
pub(super) fn check(
    container: &Value,
    volumes: &[String],
    more: &[&str],
) -> Result<usize, Refusal> {
    let name = text(container, "name").unwrap_or_default();
    let mut deepest = 0;
    let mut look = |what: &str, path: &str| {
        if is_through_proc(path) {
            return Err(Refusal::with_fix(
                Class::Overlap,
                format!(
                    "container {name}: {what} {path:?} goes through a process of /proc, which leads anywhere"
                ),
                "mount at the path that is meant",
            ));
        }
        if is_near(&clean(path), more) {
            let fix = if what == VOLUME {
                "use an image without that VOLUME"
            } else {
                Class::Overlap.fix()
            };
            return Err(Refusal::with_fix(
                Class::Overlap,
                format!("container {name}: {what} {path:?} is the fence's, lies in it or holds it"),
                fix,
            ));
        }
        deepest = deepest.max(depth(path));
        Ok(())
    };
    for mount in list(container, "volumeMounts").iter().filter(|mount| !is_ours(mount)) {
        foreign_use(name, mount)?;
        look("mountPath", mount_path(mount))?;
    }
    for device in list(container, "volumeDevices") {
        foreign_use(name, device)?;
        look("devicePath", text(device, "devicePath").unwrap_or_default())?;
    }
    look(
        "terminationMessagePath",
        word(container, "terminationMessagePath").unwrap_or("/dev/termination-log"),
    )?;
    volumes.iter().try_for_each(|path| look(VOLUME, path))?;
    Ok(deepest)
}

/// Refuses a container outside the fence that mounts what belongs to it.
///
/// # Errors
/// It does.
pub(super) fn unfenced(container: &Value) -> Result<(), Refusal> {
    let name = text(container, "name").unwrap_or_default();
    let used = ["volumeMounts", "volumeDevices"];
    used.iter().flat_map(|key| list(container, key)).try_for_each(|mount| foreign_use(name, mount))
}

fn foreign_use(container: &str, mount: &Value) -> Result<(), Refusal> {
    let volume = text(mount, "name").unwrap_or_default();
    if volume.starts_with(PREFIX) {
        let what = format!("container {container} mounts volume {volume}");
        return Err(Refusal::new(Class::ForeignUse, what));
    }
    Ok(())
}

/// The mount of the binary's directory.
pub(super) fn bin_mount(bin_dir: &str) -> Value {
    json!({"name": BIN, "mountPath": bin_dir, "readOnly": true})
}

/// Sets the mounts of a fenced container, that of the binary among them.
///
/// # Errors
/// `volumeMounts` is not a list.
pub(super) fn apply(
    container: &mut Map<String, Value>,
    name: &str,
    bin: Value,
) -> Result<(), Refusal> {
    let wanted = vec![
        bin,
        json!({"name": run_volume(name), "mountPath": RUN_DIR}),
        json!({"name": POLICY, "mountPath": POLICY_DIR, "readOnly": true}),
    ];
    let same = |a: &Value, b: &Value| {
        let kind = |mount: &Value| {
            let name = text(mount, "name").unwrap_or_default();
            if name.starts_with(RUN) { RUN.to_owned() } else { name.to_owned() }
        };
        kind(a) == kind(b)
    };
    upsert(list_in(container, "volumeMounts")?, wanted, is_ours, same);
    Ok(())
}

/// Sets the pod's volumes for the containers that are fenced; each has a run directory of at most
/// `run_size`.
///
/// # Errors
/// A volume of our name that is something else.
pub(super) fn volumes(
    spec: &mut Map<String, Value>,
    fenced: &[String],
    policy: &PolicyRef,
    settings: &Settings,
    run_size: &str,
) -> Result<(), Refusal> {
    // Written with every default of the API server, so that a second pass finds nothing to do.
    let mut wanted = vec![match settings.delivery {
        Delivery::Image => json!({"name": BIN, "image": {
            "reference": settings.image, "pullPolicy": settings.image_pull_policy}}),
        Delivery::Init => json!({"name": BIN, "emptyDir": {"sizeLimit": "64Mi"}}),
    }];
    wanted.extend(fenced.iter().map(|container| {
        json!({"name": run_volume(container), "emptyDir": {"medium": "Memory", "sizeLimit": run_size}})
    }));
    wanted.push(json!({"name": POLICY, "configMap": {
        "name": policy.configmap, "defaultMode": 0o444}}));
    let volumes = list_in(spec, "volumes")?;
    for volume in volumes.iter() {
        let name = text(volume, "name").unwrap_or_default();
        let foreign = match name {
            BIN => false,
            POLICY => at(volume, &["configMap"]).is_none(),
            name => name.starts_with(PREFIX) && !name.starts_with(RUN),
        };
        if foreign {
            return Err(Refusal::new(Class::ForeignUse, format!("the pod has a volume {name}")));
        }
    }
    upsert(volumes, wanted, is_our_volume, |a, b| text(a, "name") == text(b, "name"));
    Ok(())
}

/// How the binary reaches a pod that went through an injection; `None` where no volume says so.
pub(super) fn delivery(pod: &Value) -> Option<Delivery> {
    let spec = at(pod, &["spec"])?;
    let volume = list(spec, "volumes").iter().find(|volume| text(volume, "name") == Some(BIN))?;
    match (at(volume, &["image"]), at(volume, &["emptyDir"])) {
        (Some(_), None) => Some(Delivery::Image),
        (None, Some(_)) => Some(Delivery::Init),
        _ => None,
    }
}

/// Whether a volume's name is ours.
pub(super) fn is_our_volume(volume: &Value) -> bool {
    text(volume, "name").is_some_and(|name| name == POLICY || name.starts_with(PREFIX))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn container(mount: &Value) -> Value {
        json!({"name": "agent", "volumeMounts": [mount]})
    }

    fn class(container: &Value) -> Option<Class> {
        bin_dir(container, &[]).err().map(|refusal| refusal.class)
    }

    /// Each of these made the author's script run in the supervisor's place under a mount at
    /// `/ringfence/bin`.
    #[test]
    fn five_spellings_are_refused() {
        for path in [
            "/ringfence/bin/ringfence-supervisor",
            "/ringfence//bin/",
            "ringfence/bin",
            "/x/../ringfence/bin",
            "/./ringfence/d/../d/bin",
        ] {
            let mount = json!({"name": "scripts", "mountPath": path, "subPath": "evil.sh"});
            assert_eq!(class(&container(&mount)), Some(Class::Overlap), "{path}");
        }
    }

    /// A runtime that follows `root` finds the container's root directory behind it.
    #[test]
    fn a_process_of_proc_is_no_way_to_the_same_place() {
        for path in [
            "/proc/self/root/ringfence",
            "/proc/1/root/run/ringfence",
            "proc//thread-self/root/etc/openshell",
            "/x/../proc/self/task/1/root/ringfence/d",
            "/proc/self/cwd/run",
        ] {
            let mount = json!({"name": "scripts", "mountPath": path});
            assert_eq!(class(&container(&mount)), Some(Class::Overlap), "{path}");
            assert_eq!(class(&json!({"terminationMessagePath": path})), Some(Class::Overlap));
            assert!(bin_dir(&json!({}), &[path.into()]).is_err(), "{path}");
        }
        for path in ["/proc/meminfo", "/processes/self/root", "/srv/proc/self/root"] {
            assert_eq!(class(&container(&json!({"name": "x", "mountPath": path}))), None, "{path}");
        }
    }

    /// The sixth: `/link` of the image points to where the binary is, or to a parent of it. The
    /// text says nothing, so the order of mounting has to: ours comes last.
    #[test]
    fn a_symlink_of_the_image_does_not_help() {
        for path in
            ["/link", "/link/d/bin", "/a/b/c/d/e/f/g/h/i/j/bin", "/a/./b//c/../d/e/f/g/h/bin"]
        {
            let dir =
                bin_dir(&container(&json!({"name": "scripts", "mountPath": path})), &[]).unwrap();
            assert!(depth(&dir) > depth(path), "{dir} is not deeper than {path}");
        }
        let device = json!({"volumeDevices": [{"name": "x", "devicePath": "/1/2/3/4/5/6/7/8/9"}]});
        assert!(depth(&bin_dir(&device, &[]).unwrap()) > 9);
        let message = json!({"terminationMessagePath": "/1/2/3/4/5/6/7/8/9/10"});
        assert!(depth(&bin_dir(&message, &[]).unwrap()) > 10);
        assert_eq!(bin_dir(&json!({}), &[]).unwrap(), "/ringfence/d/d/d/d/d/d/bin");
    }

    /// The seventh: the image says where its VOLUMEs are, and what is in them.
    #[test]
    fn a_volume_of_the_image_does_not_help() {
        for path in ["/link/1/2/3/4/5/6/7/8/9", "x/../y/1/2/3/4/5/6/7/8", "/data"] {
            let dir = bin_dir(&json!({}), &["/data".into(), path.into()]).unwrap();
            assert!(depth(&dir) > depth(path), "{dir} is not deeper than {path}");
        }
        for path in ["/ringfence/d/d/d/d/d/d/bin", "/", "", "/run", "//x/../ringfence/d", "etc"] {
            let refusal = bin_dir(&json!({"name": "agent"}), &[path.into()]).unwrap_err();
            assert_eq!(refusal.class, Class::Overlap, "{path}");
            let message = refusal.message;
            assert!(message.contains("VOLUME") && message.contains("without that"), "{message}");
        }
    }

    #[test]
    fn what_holds_or_equals_ours_is_refused() {
        for path in [
            "/",
            "",
            "/ringfence",
            "/run",
            "/run/ringfence",
            "/run/ringfence/x",
            "/var/run",
            "/var/run/ringfence",
            "/etc",
            "/etc/openshell",
            "/etc/openshell/policy.yaml",
            "/x/..",
            "run/./ringfence/",
        ] {
            let mount = json!({"name": "x", "mountPath": path});
            assert_eq!(class(&container(&mount)), Some(Class::Overlap), "{path}");
            let device = json!({"volumeDevices": [{"name": "x", "devicePath": path}]});
            assert_eq!(class(&device), Some(Class::Overlap), "{path}");
            if !path.is_empty() {
                assert_eq!(
                    class(&json!({"terminationMessagePath": path})),
                    Some(Class::Overlap),
                    "{path}"
                );
            }
        }
        for path in
            ["/run/app", "/etc/openshell2", "/ringfenced", "/var/run/secrets/x", "/x/ringfence"]
        {
            assert_eq!(class(&container(&json!({"name": "x", "mountPath": path}))), None, "{path}");
        }
    }

    #[test]
    fn our_volumes_are_ours() {
        for mount in [
            json!({"name": "ringfence-bin", "mountPath": "/usr/bin"}),
            json!({"name": "ringfence-run-other", "mountPath": "/x", "subPathExpr": "$(X)"}),
            json!({"name": "ringfence-x", "mountPath": "/x"}),
        ] {
            assert_eq!(class(&container(&mount)), Some(Class::ForeignUse), "{mount}");
            assert_eq!(unfenced(&container(&mount)).unwrap_err().class, Class::ForeignUse);
        }
        assert!(unfenced(&container(&json!({"name": "x", "mountPath": "/ringfence"}))).is_ok());
    }

    #[test]
    fn mounts_are_replaced_in_place() {
        let mut made = json!({"volumeMounts": [
            {"name": "ringfence-bin", "mountPath": "/ringfence/d/bin", "subPath": "evil"},
            {"name": "work", "mountPath": "/work"},
            {"name": "ringfence-run-old", "mountPath": "/run/ringfence"},
            {"name": "ringfence-bin", "mountPath": "/ringfence/bin"}]});
        let dir = bin_dir(&made, &[]).unwrap();
        apply(made.as_object_mut().unwrap(), "agent", bin_mount(&dir)).unwrap();
        assert_eq!(
            made,
            json!({"volumeMounts": [
            {"name": "ringfence-bin", "mountPath": dir, "readOnly": true},
            {"name": "work", "mountPath": "/work"},
            {"name": "ringfence-run-agent", "mountPath": "/run/ringfence"},
            {"name": "openshell-policy", "mountPath": "/etc/openshell", "readOnly": true}]})
        );
    }

    #[test]
    fn volumes_are_refused_taken_over_or_made() {
        let policy = PolicyRef { configmap: "ringfence-policy-1".into(), ..PolicyRef::default() };
        let run = |volumes: Value| {
            let mut spec = json!({"volumes": volumes});
            super::volumes(
                spec.as_object_mut().unwrap(),
                &["a".into()],
                &policy,
                &Settings::default(),
                "16Mi",
            )
            .map(|()| spec["volumes"].clone())
            .map_err(|refusal| refusal.class)
        };
        let foreign = json!([{"name": "openshell-policy", "emptyDir": {}}]);
        assert_eq!(run(foreign), Err(Class::ForeignUse));
        assert_eq!(run(json!([{"name": "ringfence-x", "emptyDir": {}}])), Err(Class::ForeignUse));
        let made = run(json!([
            {"name": "openshell-policy", "configMap": {"name": "theirs"}},
            {"name": "ringfence-run-gone", "emptyDir": {}}, {"name": "x"}]))
        .unwrap();
        assert_eq!(
            made,
            json!([
            {"name": "openshell-policy", "configMap": {"name": "ringfence-policy-1", "defaultMode": 292}},
            {"name": "x"},
            {"name": "ringfence-bin", "emptyDir": {"sizeLimit": "64Mi"}},
            {"name": "ringfence-run-a", "emptyDir": {"medium": "Memory", "sizeLimit": "16Mi"}}])
        );
        assert_eq!(run(made.clone()), Ok(made));
    }

    #[test]
    fn long_names_fit() {
        let long = "a".repeat(63);
        let other = format!("{}b", "a".repeat(62));
        assert_eq!(run_volume(&long).len(), 63);
        assert_ne!(run_volume(&long), run_volume(&other));
        assert_eq!(run_volume("agent"), "ringfence-run-agent");
    }
}

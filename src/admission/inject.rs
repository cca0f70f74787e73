//! The function itself: pod in, operations out.

use std::collections::BTreeMap;

use json_patch::Patch;
use serde_json::{Value, json};

use super::command::{self, Argv, Original};
use super::json::{containers, field, list, list_in, object, object_in, set, text};
use super::namespace::{Inbound, STATUS};
use super::notes::Notes;
use super::plan::{Plan, plan};
use super::{Class, ImageConfig, Mode, Namespace, Refusal, Settings};
use super::{env, install, mounts, patch, probes, restore, security, supervisor_path, user};

/// The policy copy that this pod mounts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PolicyRef {
    /// Name of the immutable copy, `ringfence-policy-<hash>`.
    pub configmap: String,
    /// `policy::digest::digest` of its data, `sha256:<hex>`.
    pub digest: String,
    /// Keys of the data: `policy.yaml`, `policy.rego`, `upstream-ca.crt`.
    pub keys: Vec<String>,
    /// `process.run_as_user`.
    pub run_as_user: Option<String>,
    /// `process.run_as_group`.
    pub run_as_group: Option<String>,
}

impl PolicyRef {
    /// Whether the policy has this key.
    pub(super) fn has(&self, key: &str) -> bool {
        self.keys.iter().any(|have| have == key)
    }
}

/// A pod as it is to be admitted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Injection {
    /// What to change; empty where the pod already is as it should be.
    pub ops: Patch,
    /// For the person who created the pod, one a cause.
    pub warnings: Vec<String>,
    /// Audit annotations: key without prefix, value.
    pub audit: BTreeMap<String, String>,
    /// The classes that warned, for metrics and Events.
    pub classes: Vec<Class>,
}

/// The answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Not ours: the namespace has no label, or the pod was created before it had one.
    Untouched,
    /// Admitted.
    Inject(Injection),
    /// Not admitted.
    Refuse(Refusal),
}

/// What has to change so that this pod comes up fenced.
///
/// With `old` (UPDATE) nothing is computed anew: what is ours is taken from the old object, see
/// [`restore()`]; `images` and `policy` are not looked at.
#[must_use]
pub fn inject(
    old: Option<&Value>,
    pod: &Value,
    ns: &Namespace,
    settings: &Settings,
    images: &BTreeMap<String, ImageConfig>,
    policy: &PolicyRef,
) -> Outcome {
    if let Some(old) = old {
        return restore(old, pod, ns);
    }
    match build(pod, ns, settings, images, policy) {
        Ok(None) => Outcome::Untouched,
        Ok(Some((target, notes))) => finish(pod, &target, notes),
        Err(refusal) => Outcome::Refuse(refusal),
    }
}

/// The pod as it is to be: the same document with what is ours put right.
fn build(
    pod: &Value,
    ns: &Namespace,
    settings: &Settings,
    images: &BTreeMap<String, ImageConfig>,
    policy: &PolicyRef,
) -> Result<Option<(Value, Notes)>, Refusal> {
    let Some(mut plan) = plan(pod, ns, settings)? else {
        return Ok(None);
    };
    let mut target = pod.clone();
    plan.notes.audit.insert("mode".into(), plan.mode.as_str().into());
    if plan.fenced.is_empty() {
        return Ok(Some((target, plan.notes)));
    }
    let spec = object_in(object(&mut target, "pod")?, "spec")?;
    let mut admin_ports = probes::admin_ports(containers(pod));
    let mut names = Vec::new();
    for slot in plan.fenced.clone() {
        let container = &mut list_in(spec, slot.list)?[slot.index];
        let name = text(container, "name").unwrap_or_default().to_owned();
        // 0, which is none, where the pod declares them all.
        let admin_port = admin_ports.next().unwrap_or(0);
        let fence = Fence { pod, settings, policy, image: images.get(&name), admin_port };
        fence.apply(container, &name, &mut plan)?;
        names.push(name);
    }
    security::pod(spec, settings.profile)?;
    mounts::volumes(spec, &names, policy, settings)?;
    install::apply(spec, ns, settings)?;
    annotate(&mut target, &names, &mut plan, policy)?;
    Ok(Some((target, plan.notes)))
}

/// What one container is fenced with.
struct Fence<'a> {
    pod: &'a Value,
    settings: &'a Settings,
    policy: &'a PolicyRef,
    image: Option<&'a ImageConfig>,
    admin_port: u16,
}

impl Fence<'_> {
    fn apply(&self, container: &mut Value, name: &str, plan: &mut Plan<'_>) -> Result<(), Refusal> {
        let original = Original::of(container)?;
        // Also where nothing of the image is run: a VOLUME that we do not know of may be mounted
        // over the supervisor.
        let Some(known) = self.image else {
            let image = text(container, "image").unwrap_or_default();
            let what = format!(
                "container {name}: image {image} was not read; its VOLUMEs decide where the supervisor is mounted"
            );
            return Err(Refusal::new(Class::ImageUnread, what));
        };
        let bin_dir = mounts::bin_dir(container, &known.volumes)?;
        let child = command::child(container, &original, self.image)?;
        let run_as = user::run_as(self.pod, container, &original, self.image, self.policy)?;
        if run_as.was_root {
            let what = format!("container {name} would run as root");
            plan.notes.meet(Class::RootUser, plan.mode, what)?;
        }
        let inbound = match plan.wishes.inbound {
            Inbound::Mirror => "mirror".to_owned(),
            Inbound::None => "none".to_owned(),
            Inbound::Declared => {
                let ports = probes::declared_ports(container);
                let ports: Vec<String> = ports.iter().map(u16::to_string).collect();
                if ports.is_empty() { "none".to_owned() } else { ports.join(",") }
            }
        };
        let argv = Argv {
            bin_dir: &bin_dir,
            policy: self.policy,
            workdir: command::workdir(container, &original, self.image).as_deref(),
            run_as: &run_as.flag,
            groups: &user::groups(self.pod)?,
            log_level: self.settings.log_level.as_str(),
            inbound: &inbound,
            transparent: plan.wishes.transparent,
            admin_port: self.admin_port,
            child: &child,
        }
        .build();
        let map = object(container, "containers")?;
        set(map, "command", argv);
        security::container(map, self.settings.profile)?;
        let entries = list_in(map, "env")?;
        let unread = env::apply(entries, name, original.injected, self.policy, self.settings)?;
        for variable in unread {
            let what = format!("container {name}, variable {variable}");
            plan.notes.meet(Class::LocalhostUrl, plan.mode, what)?;
        }
        mounts::apply(map, name, &bin_dir)?;
        probes::wrap(map, &format!("{bin_dir}/{}", command::SUPERVISOR))
    }
}

/// Writes down, for people, what was done.
fn annotate(
    target: &mut Value,
    names: &[String],
    plan: &mut Plan<'_>,
    policy: &PolicyRef,
) -> Result<(), Refusal> {
    let status = json!({
        "version": env!("CARGO_PKG_VERSION"),
        "mode": plan.mode.as_str(),
        "containers": names,
        "policy": policy.digest,
    });
    let metadata = object_in(object(target, "pod")?, "metadata")?;
    set(object_in(metadata, "annotations")?, STATUS, json!(status.to_string()));
    plan.notes.audit.insert("containers".into(), names.join(","));
    plan.notes.audit.insert("policy".into(), policy.digest.clone());
    Ok(())
}

/// Turns a target into operations and applies them to the input before anybody else does.
pub(super) fn finish(pod: &Value, target: &Value, notes: Notes) -> Outcome {
    let ops = patch::diff(pod, target);
    if let Err(what) = check(pod, target, &ops) {
        return Outcome::Refuse(Refusal::new(Class::SelfCheck, what));
    }
    let mut audit = notes.audit;
    if !notes.classes.is_empty() {
        let slugs: Vec<&str> = notes.classes.iter().map(|class| class.slug()).collect();
        audit.insert("classes".into(), slugs.join(","));
    }
    Outcome::Inject(Injection { ops, warnings: notes.warnings, audit, classes: notes.classes })
}

/// Whether the operations make the target, and nothing else, of the pod.
fn check(pod: &Value, target: &Value, ops: &Patch) -> Result<(), String> {
    let same = if ops.is_empty() {
        // Verification's usual case: a copy would be most of its work.
        pod == target
    } else {
        let mut applied = pod.clone();
        json_patch::patch(&mut applied, ops).map_err(|error| error.to_string())?;
        applied == *target
    };
    if same { Ok(()) } else { Err("the result differs".to_owned()) }
}

/// Names of the containers of a (live) pod whose command is ours: what `kubectl exec` has to enter.
/// Regular containers first, then init containers.
#[must_use]
pub fn fenced_containers(pod: &Value) -> Vec<String> {
    let fenced = containers(pod).filter(|container| supervisor_path(container).is_some());
    fenced.filter_map(|container| text(container, "name").map(str::to_owned)).collect()
}

/// UPDATE of `pods/ephemeralcontainers`: never fenced, so warned about or refused.
#[must_use]
pub fn ephemeral(pod: &Value, ns: &Namespace) -> Outcome {
    let mode = match Mode::of(ns) {
        Ok(Mode::Off) => return Outcome::Untouched,
        Ok(mode) => mode,
        Err(refusal) => return Outcome::Refuse(refusal),
    };
    let spec = field(pod, "spec").unwrap_or(&Value::Null);
    let mut notes = Notes::default();
    let checked = list(spec, "ephemeralContainers").iter().try_for_each(|container| {
        mounts::unfenced(container)?;
        let name = text(container, "name").unwrap_or_default();
        notes.meet(Class::EphemeralContainer, mode, format!("ephemeral container {name}"))
    });
    match checked {
        Ok(()) => finish(pod, pod, notes),
        Err(refusal) => Outcome::Refuse(refusal),
    }
}

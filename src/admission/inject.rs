//! The function itself: pod in, operations out.

use std::collections::BTreeMap;

use json_patch::Patch;
use serde_json::{Map, Value, json};

use super::command::{self, Argv, Flags, Original};
use super::env::Variables;
use super::json::{at, containers, field, list, list_in, object, object_in, set, text};
use super::namespace::{Inbound, STATUS};
use super::notes::{self, Notes};
use super::pin::pin;
use super::plan::{Plan, plan};
use super::shape::{self, Options, Shape};
use super::source::live_name;
use super::stamp::Stamp;
use super::volumes::Volumes;
use super::{Class, ImageConfig, Mode, Namespace, Refusal, Settings};
use super::{
    env, install, mounts, patch, probes, pull_secret, restore, security, sidecar, supervisor_path,
    user,
};

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
    /// The policy's name, where the pod follows it: `configmap` is then what is kept in step with it.
    pub follows: Option<String>,
}

impl PolicyRef {
    /// The same policy, followed by its name.
    pub(super) fn followed(&self, name: &str) -> Self {
        let (configmap, follows) = (live_name(name), Some(name.to_owned()));
        // Nothing of the pod but its user depends on what is in it.
        let keys = vec!["policy.yaml".to_owned()];
        Self { configmap, keys, follows, ..self.clone() }
    }

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
    /// What is behind the warnings, one a class: for metrics and Events.
    pub causes: Vec<Cause>,
}

/// A class that warned, and of what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cause {
    /// The class.
    pub class: Class,
    /// The first thing of that class, without why and what to do.
    pub what: String,
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

/// As [`inject()`] for a pod that nobody needs as it was: where it is admitted it becomes what the
/// operations make of it, which is how they are checked, and no copy is made for that.
#[must_use]
pub fn inject_into(
    pod: &mut Value,
    ns: &Namespace,
    settings: &Settings,
    images: &BTreeMap<String, ImageConfig>,
    policy: &PolicyRef,
) -> Outcome {
    match build(pod, ns, settings, images, policy) {
        Ok(None) => Outcome::Untouched,
        Ok(Some((target, notes))) => {
            let ops = patch::diff(pod, &target);
            checked(become_target(pod, &target, &ops), ops, notes)
        }
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
    let policy = &*plan.wishes.refers_to(policy, settings);
    let delivery = plan.wishes.shape.delivery(settings.delivery);
    let settings = &Settings { delivery, ..settings.clone() };
    let mut target = pod.clone();
    plan.notes.audit.insert("mode".into(), plan.mode_word().into());
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
    if plan.wishes.shape == Shape::Subprocess {
        let what = format!("container {}", names.join(", "));
        plan.notes.meet(Class::Subprocess, plan.mode, what)?;
        if !policy.has("policy.rego") {
            plan.notes.meet(Class::NoRules, plan.mode, "the policy has no policy.rego")?;
        }
    }
    security::pod(spec, settings.profile)?;
    mounts::volumes(spec, &names, policy, settings, plan.wishes.shape.run_size())?;
    install::apply(spec, ns, settings)?;
    pull_secret::apply(spec, settings)?;
    let mut status = Map::new();
    Stamp::own(settings, policy).write(&mut status);
    pull_secret::write(&mut status, settings);
    annotate(&mut target, &names, &mut plan, status)?;
    plan.notes.audit.insert("policy".into(), policy.digest.clone());
    notes::pod_security(&mut plan.notes, &target, ns, plan.mode, settings.pod_security)?;
    notes::constraints(&mut plan.notes, pod, ns, plan.mode, settings.pod_security)?;
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
        sidecar::check(container, &plan.wishes.sidecar_ports)?;
        let flags = self.flags(container, name, &known.volumes, plan)?;
        let run_as = user::run_as(self.pod, container, &original, self.image, self.policy)?;
        let groups = user::groups(self.pod)?;
        match plan.wishes.shape {
            Shape::Entrypoint => {
                if run_as.was_root {
                    let what = format!("container {name} would run as root");
                    plan.notes.meet(Class::RootUser, plan.mode, what)?;
                }
                let bin_dir = mounts::bin_dir(container, &known.volumes)?;
                let argv = Argv {
                    bin_dir: &bin_dir,
                    policy: self.policy,
                    workdir: command::workdir(container, &original, self.image).as_deref(),
                    run_as: &run_as.flag,
                    groups: &groups,
                    log_level: self.settings.log_level.as_str(),
                    inbound: &inbound(container, plan),
                    flags: &flags,
                    admin_port: self.admin_port,
                    child: &command::child(container, &original, self.image)?,
                }
                .build();
                let map = object(container, "containers")?;
                // Runners are not there under it.
                if plan.mode == Mode::Strict {
                    pin(map, name, known)?;
                }
                set(map, "command", argv);
                self.surround(map, name, &original, mounts::bin_mount(&bin_dir), None, plan)?;
                probes::wrap(map, &format!("{bin_dir}/{}", command::SUPERVISOR))
            }
            Shape::Subprocess => {
                shape::check_mounts(container, &known.volumes)?;
                let was_root = run_as.was_root || (original.runner && original.user.is_none());
                let own = !was_root && !run_as.is_policys;
                if own {
                    let what = format!("container {name} would run as {}", run_as.flag);
                    plan.notes.meet(Class::RaisedUser, plan.mode, what)?;
                }
                let run_as = own.then_some(run_as.flag.as_str());
                let options =
                    Options { policy: self.policy, run_as, groups: &groups, flags: &flags };
                let map = object(container, "containers")?;
                shape::bare(map)?;
                self.surround(map, name, &original, shape::bin_mount(), Some(options.build()), plan)
            }
        }
    }

    /// What the namespace opens beyond the policy's own word.
    fn flags(
        &self,
        container: &Value,
        name: &str,
        volumes: &[String],
        plan: &mut Plan<'_>,
    ) -> Result<Flags, Refusal> {
        let mut flags = Flags::default();
        // The supervisor's own default is written only where it is off.
        if !plan.wishes.transparent {
            flags.push("--transparent", "off");
        }
        if plan.wishes.volume_mounts {
            let volumes = Volumes::of(self.pod, container, volumes);
            volumes.flags(&mut flags);
            for left_out in volumes.left_out {
                let what = format!("container {name}: {left_out}");
                plan.notes.meet(Class::VolumeLeftOut, plan.mode, what)?;
            }
        }
        if !plan.wishes.sidecar_ports.is_empty() {
            flags.push("--sidecar-ports", plan.wishes.sidecar_ports.to_string());
        }
        Ok(flags)
    }

    /// What a container has around its command in both shapes.
    fn surround(
        &self,
        map: &mut Map<String, Value>,
        name: &str,
        original: &Original,
        bin: Value,
        options: Option<String>,
        plan: &mut Plan<'_>,
    ) -> Result<(), Refusal> {
        security::container(map, self.settings.profile)?;
        let entries = list_in(map, "env")?;
        let variables = Variables {
            policy: self.policy,
            settings: self.settings,
            ports: &plan.wishes.sidecar_ports,
            options,
        };
        let unread = env::apply(entries, name, original.injected, variables)?;
        for variable in unread {
            let what = format!("container {name}, variable {variable}");
            plan.notes.meet(Class::LocalhostUrl, plan.mode, what)?;
        }
        mounts::apply(map, name, bin)
    }
}

/// The value of `--inbound`.
fn inbound(container: &Value, plan: &Plan<'_>) -> String {
    match plan.wishes.inbound {
        Inbound::Mirror => "mirror".to_owned(),
        Inbound::None => "none".to_owned(),
        Inbound::Declared => {
            let ports = probes::declared_ports(container);
            let ports: Vec<String> = ports.iter().map(u16::to_string).collect();
            if ports.is_empty() { "none".to_owned() } else { ports.join(",") }
        }
    }
}

/// Writes down, for people, what was done.
fn annotate(
    target: &mut Value,
    names: &[String],
    plan: &mut Plan<'_>,
    mut status: Map<String, Value>,
) -> Result<(), Refusal> {
    status.insert("mode".into(), json!(plan.mode_word()));
    status.insert("containers".into(), json!(names));
    let metadata = object_in(object(target, "pod")?, "metadata")?;
    let status = Value::Object(status).to_string();
    set(object_in(metadata, "annotations")?, STATUS, json!(status));
    plan.notes.audit.insert("containers".into(), names.join(","));
    Ok(())
}

/// Turns a target into operations and applies them to the input before anybody else does.
pub(super) fn finish(pod: &Value, target: &Value, notes: Notes) -> Outcome {
    let ops = patch::diff(pod, target);
    // Verification's usual case: a copy would be most of its work.
    let same = if ops.is_empty() {
        Ok(patch::same(pod, target))
    } else {
        become_target(&mut pod.clone(), target, &ops)
    };
    checked(same, ops, notes)
}

/// Whether the operations make the target, and nothing else, of the pod, which then is that.
fn become_target(pod: &mut Value, target: &Value, ops: &Patch) -> Result<bool, String> {
    json_patch::patch(pod, ops).map_err(|error| error.to_string())?;
    Ok(patch::same(pod, target))
}

/// The answer, unless the operations do not do what they should.
fn checked(same: Result<bool, String>, ops: Patch, notes: Notes) -> Outcome {
    let what = match same {
        Ok(true) => {
            let mut audit = notes.audit;
            if !notes.causes.is_empty() {
                let slugs: Vec<&str> =
                    notes.causes.iter().map(|cause| cause.class.slug()).collect();
                audit.insert("classes".into(), slugs.join(","));
            }
            let (warnings, causes) = (notes.warnings, notes.causes);
            return Outcome::Inject(Injection { ops, warnings, audit, causes });
        }
        Ok(false) => "the result differs".to_owned(),
        Err(error) => error,
    };
    Outcome::Refuse(Refusal::new(Class::SelfCheck, what))
}

/// Names of the containers of a (live) pod that an injection has made its own, in either shape.
/// Regular containers first, then init containers.
#[must_use]
pub fn fenced_containers(pod: &Value) -> Vec<String> {
    let is_fenced =
        |container: &&Value| supervisor_path(container).is_some() || shape::is_runner(container);
    let fenced = containers(pod).filter(is_fenced);
    fenced.filter_map(|container| text(container, "name").map(str::to_owned)).collect()
}

/// For which value of the namespace's label a pod says that it was fenced: for people, since anyone can
/// write it into a pod that nobody has fenced.
#[must_use]
pub fn fenced_mode(pod: &Value) -> Option<String> {
    let status = at(pod, &["metadata", "annotations", STATUS])?.as_str()?;
    let status: Value = serde_json::from_str(status).ok()?;
    text(&status, "mode").map(str::to_owned)
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

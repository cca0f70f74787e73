//! What is to be fenced, and what has to be looked up before that is possible.

use serde_json::Value;

use super::command::Original;
use super::json::{at, field, list, text, word, yes};
use super::namespace::Wishes;
use super::notes::{self, Notes};
use super::shape::Shape;
use super::{Class, Mode, Namespace, PolicyRef, Refusal, Settings, install, mounts, strict, user};

/// What has to be known of the images before [`super::inject()`] can run.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Needs {
    /// One entry a container whose image has to be read.
    pub images: Vec<ImageNeed>,
    /// Names of the pod's own pull secrets.
    pub pull_secrets: Vec<String>,
    /// One more that it is given, for the fence's image; a kubelet tries it for all.
    pub added_secret: Option<String>,
    /// The pod's service account, `default` where it names none.
    pub service_account: String,
    /// Values of `kubernetes.io/arch` (Go's names) that the pod allows; empty: any.
    pub architectures: Vec<String>,
}

/// One image to read: that of each fenced container, for its VOLUMEs if for nothing else.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageNeed {
    /// The container's name: the key of the map given to [`super::inject()`].
    pub container: String,
    /// Its image reference, as the pod has it.
    pub image: String,
    /// ENTRYPOINT or CMD is needed: without it there is nothing to run.
    pub command: bool,
    /// USER is needed.
    pub user: bool,
}

impl ImageNeed {
    /// Why the image has to be read, for a message about it.
    #[must_use]
    pub fn why(&self) -> &'static str {
        match (self.command, self.user) {
            (true, _) => {
                "it is needed because the container has no command, and because its VOLUMEs decide where the supervisor is mounted"
            }
            (false, true) => {
                "it is needed because the pod sets no runAsUser, and because its VOLUMEs decide where the supervisor is mounted"
            }
            (false, false) => {
                "it is needed because its VOLUMEs decide where the supervisor is mounted"
            }
        }
    }
}

/// The name of the policy `ConfigMap` (in the release namespace) that applies to this pod.
///
/// # Errors
/// A pod that asks for a policy its namespace does not offer, or a bad annotation.
pub fn policy_name(pod: &Value, ns: &Namespace, settings: &Settings) -> Result<String, Refusal> {
    Ok(Wishes::read(pod, ns)?.policy.unwrap_or_else(|| settings.default_policy.clone()))
}

/// Whether this pod follows changes of its policy while it runs.
///
/// # Errors
/// As [`policy_name`].
pub fn is_live(pod: &Value, ns: &Namespace) -> Result<bool, Refusal> {
    Ok(Wishes::read(pod, ns)?.live)
}

/// What was understood of a pod before anything is changed.
pub(super) struct Plan<'a> {
    pub wishes: Wishes,
    /// Regular containers first.
    pub fenced: Vec<Slot>,
    pod: &'a Value,
    pub notes: Notes,
    pub mode: Mode,
}

/// Where a container is in the spec.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Slot {
    /// `containers` or `initContainers`.
    pub list: &'static str,
    pub index: usize,
}

/// Decides what is fenced. `None` where the namespace has no label.
pub(super) fn plan<'a>(
    pod: &'a Value,
    ns: &Namespace,
    settings: &Settings,
) -> Result<Option<Plan<'a>>, Refusal> {
    let mode = Mode::of(ns)?;
    if mode == Mode::Off {
        return Ok(None);
    }
    let wishes = Wishes::read(pod, ns)?;
    let spec = field(pod, "spec").unwrap_or(&Value::Null);
    let containers = list(spec, "containers");
    let mut notes = Notes::default();
    let done = notes::whole_pod(&mut notes, pod, mode)?;
    let mut plan = Plan { wishes, fenced: Vec::new(), pod, notes, mode };
    // A pod without containers gets a better answer from the API server than from here.
    if done || containers.is_empty() {
        return Ok(Some(plan));
    }
    strict::whole_pod(&mut plan.notes, pod, mode, settings.profile)?;
    let init = list(spec, "initContainers");
    if mode != Mode::Strict {
        let init: Vec<&Value> = init
            .iter()
            .filter(|container| text(container, "name") != Some(install::NAME))
            .collect();
        init.iter().try_for_each(|container| mounts::unfenced(container))?;
        notes::init_containers(&mut plan.notes, &init, mode)?;
    }
    plan.sort_out("containers", containers)?;
    if plan.fenced.is_empty() {
        plan.notes.meet(Class::NothingToFence, mode, "no container is left")?;
    }
    if mode == Mode::Strict {
        plan.sort_out("initContainers", init)?;
    }
    Ok(Some(plan))
}

impl<'a> Plan<'a> {
    /// How the pod is fenced, in one word: a runner's namespace is always labelled `enabled`.
    pub(super) fn mode_word(&self) -> &'static str {
        match self.wishes.shape {
            Shape::Entrypoint => self.mode.as_str(),
            Shape::Subprocess => "subprocess",
        }
    }

    /// Tells the containers of a list that are to be fenced from the exempted ones.
    fn sort_out(&mut self, list: &'static str, containers: &'a [Value]) -> Result<(), Refusal> {
        let mut exempt = Vec::new();
        for (index, container) in containers.iter().enumerate() {
            let name = text(container, "name").unwrap_or_default();
            if name == install::NAME {
                // The init container is put right whatever it is; what is left of it is judged.
                if list == "initContainers" {
                    strict::container(&mut self.notes, container, self.mode, true)?;
                    continue;
                }
                return Err(Refusal::new(
                    Class::ForeignUse,
                    format!("a container is named {name}"),
                ));
            }
            if self.wishes.exempts(container) {
                mounts::unfenced(container)?;
                strict::container(&mut self.notes, container, self.mode, false)?;
                strict::unfenced(&mut self.notes, self.pod, container, self.mode)?;
                strict::brought(&mut self.notes, self.pod, container, &self.wishes, self.mode)?;
                exempt.push(container);
                continue;
            }
            let injected = Original::of(container)?.injected;
            strict::container(&mut self.notes, container, self.mode, injected)?;
            strict::name_files(&mut self.notes, container, self.mode)?;
            if yes(container, &["securityContext", "privileged"]) {
                let what = format!("container {name} is privileged");
                self.notes.meet(Class::Privileged, self.mode, what)?;
            }
            self.fenced.push(Slot { list, index });
        }
        if !exempt.is_empty() {
            let names: Vec<_> = exempt.iter().filter_map(|c| text(c, "name")).collect();
            let what = format!("container {}", names.join(", "));
            self.notes.meet(Class::Unfenced, self.mode, what)?;
            notes::privileged(&mut self.notes, &exempt, self.mode)?;
        }
        Ok(())
    }

    /// The containers to be fenced, as they are.
    pub(super) fn containers(&self) -> impl Iterator<Item = &'a Value> {
        let spec = field(self.pod, "spec").unwrap_or(&Value::Null);
        self.fenced.iter().map(|slot| &list(spec, slot.list)[slot.index])
    }
}

/// Whether anything of this pod is to be fenced. Where nothing is (a mirror pod, every container
/// exempted), the answer depends on no policy and no image.
///
/// # Errors
/// As [`needs`].
pub fn is_fenced(pod: &Value, ns: &Namespace, settings: &Settings) -> Result<bool, Refusal> {
    Ok(plan(pod, ns, settings)?.is_some_and(|plan| !plan.fenced.is_empty()))
}

/// What has to be looked up before [`super::inject()`] can answer. Empty for a namespace without the label.
///
/// # Errors
/// Pods that are refused whatever the look-ups say.
pub fn needs(
    pod: &Value,
    ns: &Namespace,
    settings: &Settings,
    policy: &PolicyRef,
) -> Result<Needs, Refusal> {
    let Some(plan) = plan(pod, ns, settings)? else {
        return Ok(Needs::default());
    };
    let spec = field(pod, "spec").unwrap_or(&Value::Null);
    let added = settings.pull_secret().map(str::to_owned);
    let mut needs = Needs {
        pull_secrets: list(spec, "imagePullSecrets")
            .iter()
            .filter_map(|secret| word(secret, "name").map(str::to_owned))
            .filter(|name| added.as_ref() != Some(name))
            .collect(),
        added_secret: added,
        service_account: word(spec, "serviceAccountName").unwrap_or("default").to_owned(),
        architectures: architectures(spec),
        images: Vec::new(),
    };
    for container in plan.containers() {
        let original = Original::of(container)?;
        // A runner's command stays as it is, whoever names it.
        let command = original.command.is_none() && plan.wishes.shape == Shape::Entrypoint;
        let user = !user::is_known(pod, container, &original, policy)?;
        needs.images.push(ImageNeed {
            container: text(container, "name").unwrap_or_default().to_owned(),
            image: text(container, "image").unwrap_or_default().to_owned(),
            command,
            user,
        });
    }
    Ok(needs)
}

/// The architectures that the node selector and the required node affinity leave.
fn architectures(spec: &Value) -> Vec<String> {
    const KEY: &str = "kubernetes.io/arch";
    if let Some(arch) = at(spec, &["nodeSelector", KEY]).and_then(Value::as_str) {
        return vec![arch.to_owned()];
    }
    let required = ["affinity", "nodeAffinity", "requiredDuringSchedulingIgnoredDuringExecution"];
    let terms = at(spec, &required).map_or(&[][..], |required| list(required, "nodeSelectorTerms"));
    let mut found: Vec<String> = Vec::new();
    for term in terms {
        let named = list(term, "matchExpressions")
            .iter()
            .find(|e| text(e, "key") == Some(KEY) && text(e, "operator") == Some("In"));
        // Terms are alternatives: one that says nothing allows every architecture.
        let Some(named) = named else {
            return Vec::new();
        };
        for arch in list(named, "values").iter().filter_map(Value::as_str) {
            if !found.iter().any(|have| have == arch) {
                found.push(arch.to_owned());
            }
        }
    }
    found
}

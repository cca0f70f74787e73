//! What is said about a pod while it is looked at: warnings and the classes behind them.

use std::collections::BTreeMap;
use std::fmt::Display;

use serde_json::Value;

use super::json::{at, list, text, yes};
use super::pod_security::Enforced;
use super::{Cause, Class, Mode, Namespace, PodSecurity, Refusal, Verdict};

/// Past this many characters the API server may cut a warning.
const MAX_WARNING: usize = 256;

/// Collected so far.
#[derive(Debug, Default)]
pub(super) struct Notes {
    pub warnings: Vec<String>,
    pub causes: Vec<Cause>,
    pub audit: BTreeMap<String, String>,
}

impl Notes {
    /// Meets a class: refuses the pod, warns or says nothing, as the table says.
    ///
    /// # Errors
    /// The class is refused under this label value.
    pub(super) fn meet(
        &mut self,
        class: Class,
        mode: Mode,
        what: impl Display,
    ) -> Result<(), Refusal> {
        match class.verdict(mode) {
            Verdict::Refuse => return Err(Refusal::new(class, what)),
            Verdict::Fence => return Ok(()),
            Verdict::Warn | Verdict::Pass => {}
        }
        let text = format!("ringfence: {what}: {}", class.why());
        self.warnings.push(text.chars().take(MAX_WARNING).collect());
        if self.causes.iter().all(|cause| cause.class != class) {
            self.causes.push(Cause { class, what: what.to_string() });
        }
        Ok(())
    }
}

/// Meets the classes of the pod as a whole. True where there is nothing of it to fence.
///
/// # Errors
/// A pod that cannot be fenced.
pub(super) fn whole_pod(notes: &mut Notes, pod: &Value, mode: Mode) -> Result<bool, Refusal> {
    if at(pod, &["metadata", "annotations", "kubernetes.io/config.mirror"]).is_some() {
        notes.meet(Class::MirrorPod, mode, "mirror of a static pod")?;
        return Ok(true);
    }
    for (field, class) in [
        ("hostNetwork", Class::HostNetwork),
        ("hostPID", Class::HostPid),
        ("hostIPC", Class::HostIpc),
        ("shareProcessNamespace", Class::ShareProcessNamespace),
    ] {
        if yes(pod, &["spec", field]) {
            notes.meet(class, mode, format!("spec.{field} is true"))?;
        }
    }
    if let Some(sign) = windows(pod) {
        notes.meet(Class::Windows, mode, sign)?;
    }
    Ok(false)
}

/// Meets the Pod Security level of the namespace, with the pod as it is injected.
///
/// # Errors
/// The level refuses the pod, and `setting` wants that known at once.
pub(super) fn pod_security(
    notes: &mut Notes,
    injected: &Value,
    ns: &Namespace,
    mode: Mode,
    setting: PodSecurity,
) -> Result<(), Refusal> {
    let Some(enforced) = Enforced::of(&ns.labels) else { return Ok(()) };
    let fields = enforced.refuses(injected);
    if fields.is_empty() {
        return Ok(());
    }
    let (name, level) = (&ns.name, enforced.level());
    let what = format!(
        "namespace {name} enforces Pod Security level {level}, which refuses the injected pod for {}",
        fields.join("; ")
    );
    match setting {
        PodSecurity::Warn => notes.meet(Class::PodSecurity, mode, what),
        PodSecurity::Refuse => Err(Refusal::new(Class::PodSecurity, what)),
    }
}

/// Meets the constraints of an `OpenShift`, where the pod's service account may not use them.
///
/// # Errors
/// `setting` wants that known at once.
pub(super) fn constraints(
    notes: &mut Notes,
    pod: &Value,
    ns: &Namespace,
    mode: Mode,
    setting: PodSecurity,
) -> Result<(), Refusal> {
    let Some(missing) = &ns.missing_constraints else { return Ok(()) };
    let (name, account) = (&ns.name, service_account(pod));
    let authors = if mode == Mode::Strict { "--strict" } else { "--trust-authors" };
    // --service-account names all that may: others that have the right lose it where they are not named.
    let what = format!(
        "namespace {name}: a pod's service account may not use securitycontextconstraints {missing} (it may after: ringfence enable {name} --scc {authors} --service-account {account}, with one more for each other that may)"
    );
    match setting {
        PodSecurity::Warn => notes.meet(Class::Constraints, mode, what),
        PodSecurity::Refuse => Err(Refusal::new(Class::Constraints, what)),
    }
}

/// The pod's service account. The API server has written it into the pod before webhooks see it.
pub(super) fn service_account(pod: &Value) -> &str {
    at(pod, &["spec", "serviceAccountName"])
        .and_then(Value::as_str)
        .filter(|name| !name.is_empty())
        .unwrap_or("default")
}

/// What says that the pod is for Windows nodes.
fn windows(pod: &Value) -> Option<&'static str> {
    let spec = pod.get("spec")?;
    let is_windows = |value: Option<&Value>| value.and_then(Value::as_str) == Some("windows");
    if is_windows(at(spec, &["os", "name"])) {
        return Some("spec.os.name is windows");
    }
    let selector = |key| is_windows(at(spec, &["nodeSelector", key]));
    if selector("kubernetes.io/os") || selector("beta.kubernetes.io/os") {
        return Some("spec.nodeSelector asks for windows");
    }
    let options = ["securityContext", "windowsOptions"];
    let set = |holder: &Value| {
        at(holder, &options).and_then(Value::as_object).is_some_and(|o| !o.is_empty())
    };
    (set(spec) || list(spec, "containers").iter().any(set)).then_some("windowsOptions are set")
}

/// Meets the init containers: none of them is fenced.
///
/// # Errors
/// The label value refuses them.
pub(super) fn init_containers(
    notes: &mut Notes,
    containers: &[&Value],
    mode: Mode,
) -> Result<(), Refusal> {
    for (class, what) in
        [(Class::InitContainer, "init container"), (Class::NativeSidecar, "sidecar")]
    {
        let names: Vec<&str> = containers
            .iter()
            .filter(|c| {
                (text(c, "restartPolicy") == Some("Always")) == (class == Class::NativeSidecar)
            })
            .map(|c| text(c, "name").unwrap_or_default())
            .collect();
        if !names.is_empty() {
            notes.meet(class, mode, format!("{what} {}", names.join(", ")))?;
        }
    }
    privileged(notes, containers, mode)
}

/// Meets privileged containers among those that are not fenced.
///
/// # Errors
/// The label value refuses them.
pub(super) fn privileged(
    notes: &mut Notes,
    containers: &[&Value],
    mode: Mode,
) -> Result<(), Refusal> {
    for container in containers {
        if yes(container, &["securityContext", "privileged"]) {
            let name = text(container, "name").unwrap_or_default();
            notes.meet(
                Class::PrivilegedUnfenced,
                mode,
                format!("container {name} is privileged"),
            )?;
        }
    }
    Ok(())
}

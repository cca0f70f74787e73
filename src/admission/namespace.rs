//! Labels and annotations of Ringfence, read strictly: what is not understood is refused with the
//! reason, never passed over. Only the namespace, which the administrator holds, can loosen.

use std::borrow::Cow;
use std::collections::BTreeMap;

use globset::{GlobBuilder, GlobMatcher};
use serde_json::Value;

use super::json::{at, text};
use super::own::Own;
use super::shape::Shape;
use super::{Class, PolicyRef, Refusal, Settings};
use crate::policy::SidecarPorts;

/// Prefix of every key of ours.
pub(super) const PREFIX: &str = "ringfence.dev/";
/// Our annotation on the pod. Written for people; never read back as proof of anything.
pub(super) const STATUS: &str = "ringfence.dev/status";

pub(super) const INJECT: &str = "ringfence.dev/inject";
const POLICY: &str = "ringfence.dev/policy";
const POD_POLICY: &str = "ringfence.dev/pod-policy";
const UNFENCED: &str = "ringfence.dev/unfenced-containers";
const INBOUND: &str = "ringfence.dev/inbound";
const EXEC: &str = "ringfence.dev/exec";
const LIVE: &str = "ringfence.dev/live-policy";
const TRANSPARENT: &str = "ringfence.dev/transparent";
const MODE: &str = "ringfence.dev/mode";
pub(super) const VOLUME_MOUNTS: &str = "ringfence.dev/volume-mounts";
pub(super) const SIDECAR_PORTS: &str = "ringfence.dev/sidecar-ports";

/// The namespace a pod is created in, as the API server has it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Namespace {
    /// Its name: the request's, not the one in the pod.
    pub name: String,
    /// `metadata.labels`
    pub labels: BTreeMap<String, String>,
    /// `metadata.annotations`
    pub annotations: BTreeMap<String, String>,
    /// Its `LimitRange` objects as JSON; the init container is fitted to them.
    pub limit_ranges: Vec<Value>,
    /// On an `OpenShift`: the constraints that fenced pods need, where the service account of the pod in
    /// question may not use them.
    pub missing_constraints: Option<String>,
}

/// What the label says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// No label: pods stay byte-identical.
    Off,
    /// Guards against the agent.
    Enabled,
    /// Guards against the pod's author too.
    Strict,
}

impl Mode {
    /// The word of the label.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Enabled => "enabled",
            Self::Strict => "strict",
        }
    }

    /// Reads the namespace's label.
    ///
    /// # Errors
    /// A value other than `enabled` and `strict`.
    pub fn of(ns: &Namespace) -> Result<Self, Refusal> {
        match ns.labels.get(INJECT).map(String::as_str) {
            None => Ok(Self::Off),
            Some("enabled") => Ok(Self::Enabled),
            Some("strict") => Ok(Self::Strict),
            Some(other) => Err(Refusal::with_fix(
                Class::Annotation,
                format!("namespace {}: label {INJECT} is {other:?}", ns.name),
                "the values are enabled and strict; remove the label to switch Ringfence off",
            )),
        }
    }
}

/// How the fence treats connections from outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Inbound {
    /// What listens in the fence is reachable.
    Mirror,
    /// Only the ports the container declares and its probes use.
    Declared,
    /// Nothing is.
    None,
}

/// One entry of `ringfence.dev/unfenced-containers`.
#[derive(Debug)]
struct Exemption {
    name: GlobMatcher,
    image: Option<GlobMatcher>,
    /// What the container may bring of its author's, which matters under `strict`.
    own: Vec<Own>,
}

/// The annotations of a namespace and of one pod in it, understood.
#[derive(Debug)]
pub(super) struct Wishes {
    exemptions: Vec<Exemption>,
    pub inbound: Inbound,
    /// Whether connections that do not go by the proxy are judged (else they are refused).
    pub transparent: bool,
    /// Name of the policy `ConfigMap`, where anything names one.
    pub policy: Option<String>,
    pub shape: Shape,
    /// Whether a container's own volumes join the files of its fence.
    pub volume_mounts: bool,
    pub sidecar_ports: SidecarPorts,
    /// Whether the pod follows changes of its policy while it runs.
    pub live: bool,
}

impl Wishes {
    /// The policy as this pod refers to it: by what it says, or, where the pod follows it, by its name.
    pub(super) fn refers_to<'p>(
        &self,
        policy: &'p PolicyRef,
        settings: &Settings,
    ) -> Cow<'p, PolicyRef> {
        if !self.live {
            return Cow::Borrowed(policy);
        }
        let name = self.policy.as_deref().unwrap_or(&settings.default_policy);
        Cow::Owned(policy.followed(name))
    }

    /// Reads what the namespace and the pod say.
    ///
    /// # Errors
    /// An unknown key under `ringfence.dev/`, a bad value, a key of the namespace on the pod, an
    /// exemption by name alone under `strict`.
    pub(super) fn read(pod: &Value, ns: &Namespace) -> Result<Self, Refusal> {
        let mode = Mode::of(ns)?;
        let mut transparent = true;
        let place = format!("namespace {}", ns.name);
        let mut exemptions = Vec::new();
        let (mut shape, mut volume_mounts) = (Shape::Entrypoint, false);
        let mut sidecar_ports = SidecarPorts::default();
        for (key, value) in ns.annotations.iter().filter(|(key, _)| key.starts_with(PREFIX)) {
            match key.as_str() {
                POLICY => name_of(&place, key, value)?,
                POD_POLICY => {
                    for name in entries(value) {
                        name_of(&place, key, name)?;
                    }
                }
                UNFENCED => exemptions = read_exemptions(&place, value, mode)?,
                TRANSPARENT => {
                    transparent = match value.as_str() {
                        "on" => true,
                        "off" => false,
                        _ => return Err(bad(&place, key, value, "the values are on and off")),
                    }
                }
                LIVE if value == "allowed" => {}
                EXEC if value == "outside" => {}
                EXEC => return Err(bad(&place, key, value, "the only value is outside")),
                MODE if value == "subprocess" && mode == Mode::Strict => {
                    let fix = "label the namespace enabled: the runner is outside the fence, as root, and under strict nothing of the author's may be";
                    return Err(bad(&place, key, value, fix));
                }
                MODE if value == "subprocess" => shape = Shape::Subprocess,
                MODE => return Err(bad(&place, key, value, "the only value is subprocess")),
                VOLUME_MOUNTS if value == "allowed" => volume_mounts = true,
                LIVE | VOLUME_MOUNTS => {
                    return Err(bad(&place, key, value, "the only value is allowed"));
                }
                SIDECAR_PORTS => {
                    sidecar_ports = value.parse().map_err(|why| bad(&place, key, value, why))?;
                }
                _ => return Err(unknown(&place, key)),
            }
        }
        let mut wishes = Self {
            exemptions,
            inbound: Inbound::Mirror,
            transparent,
            policy: ns.annotations.get(POLICY).cloned(),
            shape,
            volume_mounts,
            sidecar_ports,
            live: ns.annotations.contains_key(LIVE),
        };
        if wishes.live && wishes.shape == Shape::Subprocess {
            return Err(Refusal::with_fix(
                Class::NotAvailable,
                format!("{place}: {LIVE} does not go with {MODE}: subprocess"),
                "remove one of the two: each agent of a runner keeps the policy that its pod was admitted with",
            ));
        }
        wishes.read_pod(pod, ns)?;
        Ok(wishes)
    }

    fn read_pod(&mut self, pod: &Value, ns: &Namespace) -> Result<(), Refusal> {
        let Some(found) = at(pod, &["metadata", "annotations"]).and_then(Value::as_object) else {
            return Ok(());
        };
        for (key, value) in found.iter().filter(|(key, _)| key.starts_with(PREFIX)) {
            let value = value.as_str().unwrap_or_default();
            match key.as_str() {
                STATUS => {}
                INBOUND => {
                    self.inbound = match value {
                        "declared" => Inbound::Declared,
                        "none" => Inbound::None,
                        _ => {
                            return Err(bad("pod", key, value, "the values are declared and none"));
                        }
                    }
                }
                // A pod can only tighten.
                TRANSPARENT if value == "off" || (value == "on" && self.transparent) => {
                    self.transparent = value == "on";
                }
                TRANSPARENT if value == "on" => {
                    let fix = "remove it from the pod: only the namespace can loosen";
                    return Err(bad("pod", key, value, fix));
                }
                TRANSPARENT => return Err(bad("pod", key, value, "the value is off")),
                POLICY => {
                    let offered = ns.annotations.get(POD_POLICY).map_or("", String::as_str);
                    let own = self.policy.as_deref() == Some(value);
                    if !own && !entries(offered).any(|name| name == value) {
                        return Err(Refusal::with_fix(
                            Class::Policy,
                            format!("pod: {POLICY} asks for {value:?}"),
                            &format!("namespace {} has to list it in {POD_POLICY}", ns.name),
                        ));
                    }
                    self.policy = Some(value.to_owned());
                }
                POD_POLICY | UNFENCED | EXEC | LIVE | MODE | VOLUME_MOUNTS | SIDECAR_PORTS => {
                    return Err(Refusal::with_fix(
                        Class::Annotation,
                        format!("pod: {key} belongs on the namespace"),
                        "remove it from the pod",
                    ));
                }
                _ => return Err(unknown("pod", key)),
            }
        }
        Ok(())
    }

    /// Whether the namespace exempts this container.
    pub(super) fn exempts(&self, container: &Value) -> bool {
        self.exemptions_of(container).next().is_some()
    }

    /// Whether one of the exemptions of this container lets it bring that.
    pub(super) fn lets_bring(&self, container: &Value, own: Own) -> bool {
        self.exemptions_of(container).any(|exemption| exemption.own.contains(&own))
    }

    fn exemptions_of(&self, container: &Value) -> impl Iterator<Item = &Exemption> {
        let name = text(container, "name").unwrap_or_default();
        let image = text(container, "image").unwrap_or_default();
        self.exemptions.iter().filter(move |exemption| {
            exemption.name.is_match(name)
                && exemption.image.as_ref().is_none_or(|glob| glob.is_match(image))
        })
    }
}

/// `name glob` or `name glob=image glob`, the latter with `;own=word+word` behind it or without,
/// separated by commas. Under `strict` a name alone is not enough: names are the author's to choose.
fn read_exemptions(place: &str, value: &str, mode: Mode) -> Result<Vec<Exemption>, Refusal> {
    entries(value)
        .map(|entry| {
            let (program, own) = match entry.split_once(';') {
                Some((program, own)) => (program.trim(), read_own(place, own)?),
                None => (entry, Vec::new()),
            };
            let (name, image) = match program.split_once('=') {
                Some((name, image)) => (name.trim(), Some(image.trim())),
                None => (program, None),
            };
            if name.is_empty() || image == Some("") {
                return Err(bad(place, UNFENCED, entry, "write name or name=image"));
            }
            if image.is_none() && mode == Mode::Strict {
                let fix = "write name=image: under strict a name alone exempts nothing";
                return Err(bad(place, UNFENCED, entry, fix));
            }
            // `*` stays within one component of an image's name: an exemption for
            // `registry/mcp:*` is not one for `registry/mcp:x/anything`.
            let glob = |pattern: &str| {
                GlobBuilder::new(pattern)
                    .literal_separator(true)
                    .build()
                    .map(|glob| glob.compile_matcher())
                    .map_err(|error| bad(place, UNFENCED, pattern, error.kind()))
            };
            Ok(Exemption { name: glob(name)?, image: image.map(glob).transpose()?, own })
        })
        .collect()
}

/// `own=word+word`
fn read_own(place: &str, value: &str) -> Result<Vec<Own>, Refusal> {
    let words = value.trim().strip_prefix("own=").map(|words| words.split('+'));
    let read: Option<Vec<Own>> =
        words.and_then(|words| words.map(|word| Own::of(word.trim())).collect());
    read.ok_or_else(|| {
        let words = Own::ALL.map(|(word, _)| word).join(", ");
        let fix = format!("write name=image;own=env+mounts; the words are {words}");
        bad(place, UNFENCED, value, fix)
    })
}

fn entries(value: &str) -> impl Iterator<Item = &str> {
    value.split(',').map(str::trim).filter(|entry| !entry.is_empty())
}

/// Kubernetes' rule for the name of a `ConfigMap`.
fn name_of(place: &str, key: &str, value: &str) -> Result<(), Refusal> {
    let inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let good = value.len() <= 253
        && value.split('.').all(|label| {
            label.bytes().all(|byte| inner(byte) || byte == b'-')
                && label.bytes().next().is_some_and(inner)
                && label.bytes().next_back().is_some_and(inner)
        });
    if good { Ok(()) } else { Err(bad(place, key, value, "it is not a ConfigMap's name")) }
}

fn bad(place: &str, key: &str, value: &str, fix: impl std::fmt::Display) -> Refusal {
    let value: String = value.chars().take(80).collect();
    Refusal::with_fix(Class::Annotation, format!("{place}: {key} is {value:?}"), &fix.to_string())
}

fn unknown(place: &str, key: &str) -> Refusal {
    Refusal::with_fix(
        Class::Annotation,
        format!("{place}: {key} is not a key of Ringfence"),
        "correct its spelling, or remove it",
    )
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn ns(annotations: &[(&str, &str)]) -> Namespace {
        Namespace {
            name: "agents".into(),
            annotations: annotations
                .iter()
                .map(|(key, value)| (format!("{PREFIX}{key}"), (*value).to_owned()))
                .collect(),
            ..Namespace::default()
        }
    }

    fn pod(key: &str, value: &str) -> Value {
        json!({"metadata": {"annotations": {format!("{PREFIX}{key}"): value}}})
    }

    fn class(pod: &Value, ns: &Namespace) -> Class {
        Wishes::read(pod, ns).unwrap_err().class
    }

    #[test]
    fn the_label_is_read_strictly() {
        let mut ns = ns(&[]);
        assert_eq!(Mode::of(&ns), Ok(Mode::Off));
        ns.labels.insert(INJECT.into(), "enabled".into());
        assert_eq!(Mode::of(&ns), Ok(Mode::Enabled));
        ns.labels.insert(INJECT.into(), "strict".into());
        assert_eq!(Mode::of(&ns), Ok(Mode::Strict));
        ns.labels.insert(INJECT.into(), "true".into());
        assert_eq!(Mode::of(&ns).unwrap_err().code, 422);
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        let bare = json!({});
        for (key, value) in [
            ("policy", "Not A Name"),
            ("policy", ""),
            ("pod-policy", "a,-b"),
            ("exec", "inside"),
            ("live-policy", "x"),
            ("unfenced-containers", "a=["),
            ("unfenced-containers", "=x"),
            ("unfenced-containers", "a=x;"),
            ("unfenced-containers", "a=x;own"),
            ("unfenced-containers", "a=x;own="),
            ("unfenced-containers", "a=x;own=comand"),
            ("unfenced-containers", "a=x;own=env;own=command"),
            ("unfenced-containers", "a=x;owns=env"),
            ("inbound", "none"),
            ("transparent", "no"),
            ("transparent", ""),
            ("mode", "entrypoint"),
            ("mode", ""),
            ("volume-mounts", "yes"),
            ("sidecar-ports", "80"),
            ("sidecar-ports", "8090-8080"),
            ("sidecar-ports", ""),
            ("polcy", "x"),
        ] {
            assert_eq!(class(&bare, &ns(&[(key, value)])), Class::Annotation, "{key}={value}");
        }
        for (key, value) in [
            ("inbound", "all"),
            ("exec", "outside"),
            ("live-policy", "allowed"),
            ("unfenced-containers", "a"),
            ("mode", "subprocess"),
            ("volume-mounts", "allowed"),
            ("sidecar-ports", "8090"),
            ("x", ""),
        ] {
            assert_eq!(class(&pod(key, value), &ns(&[])), Class::Annotation, "{key}={value}");
        }
        assert!(Wishes::read(&pod("status", "whatever"), &ns(&[])).is_ok());
        // The agents of a runner are started with what was there at admission.
        let both = ns(&[("live-policy", "allowed"), ("mode", "subprocess")]);
        assert_eq!(class(&bare, &both), Class::NotAvailable);
        assert!(Wishes::read(&bare, &ns(&[("live-policy", "allowed")])).unwrap().live);
    }

    #[test]
    fn a_pod_chooses_only_what_is_offered() {
        let ns = ns(&[("policy", "base"), ("pod-policy", "wide, narrow")]);
        assert_eq!(Wishes::read(&json!({}), &ns).unwrap().policy.unwrap(), "base");
        assert_eq!(Wishes::read(&pod("policy", "narrow"), &ns).unwrap().policy.unwrap(), "narrow");
        assert_eq!(class(&pod("policy", "other"), &ns), Class::Policy);
        assert_eq!(class(&pod("policy", "wide, narrow"), &ns), Class::Policy);
    }

    #[test]
    fn capture_is_switched_by_the_namespace_and_only_off_by_the_pod() {
        let read = |pod: &Value, ns: &Namespace| {
            Wishes::read(pod, ns).map(|wishes| wishes.transparent).map_err(|r| r.class)
        };
        let (bare, on, off) = (json!({}), pod("transparent", "on"), pod("transparent", "off"));
        assert_eq!(
            [&bare, &on, &off].map(|pod| read(pod, &ns(&[]))),
            [Ok(true), Ok(true), Ok(false)]
        );
        let closed = ns(&[("transparent", "off")]);
        assert_eq!(
            [&bare, &on, &off].map(|pod| read(pod, &closed)),
            [Ok(false), Err(Class::Annotation), Ok(false)]
        );
        assert_eq!(read(&pod("transparent", "x"), &ns(&[])), Err(Class::Annotation));
    }

    #[test]
    fn under_strict_a_name_alone_exempts_nothing() {
        let mut ns = ns(&[("unfenced-containers", "mcp=registry.example/mcp:*, side")]);
        assert!(Wishes::read(&json!({}), &ns).is_ok());
        ns.labels.insert(INJECT.into(), "strict".into());
        let refusal = Wishes::read(&json!({}), &ns).unwrap_err();
        assert_eq!((refusal.class, refusal.code), (Class::Annotation, 422));
        assert!(refusal.message.contains("\"side\"") && refusal.message.contains("name=image"));
    }

    #[test]
    fn the_namespace_says_how_containers_are_fenced() {
        let read = |pairs: &[(&str, &str)]| Wishes::read(&json!({}), &ns(pairs)).unwrap();
        let plain = read(&[]);
        assert_eq!((plain.shape, plain.volume_mounts), (Shape::Entrypoint, false));
        assert!(plain.sidecar_ports.is_empty());
        let all = [
            ("mode", "subprocess"),
            ("volume-mounts", "allowed"),
            ("sidecar-ports", "8090-8094, 9000"),
        ];
        let wishes = read(&all);
        assert_eq!((wishes.shape, wishes.volume_mounts), (Shape::Subprocess, true));
        assert_eq!(wishes.sidecar_ports.to_string(), "8090-8094,9000");
        let mut strict = ns(&all[1..]);
        strict.labels.insert(INJECT.into(), "strict".into());
        assert!(Wishes::read(&json!({}), &strict).is_ok());
        strict.annotations.insert(MODE.into(), "subprocess".into());
        let refusal = Wishes::read(&json!({}), &strict).unwrap_err();
        assert_eq!((refusal.class, refusal.code), (Class::Annotation, 422));
        assert!(refusal.message.contains("the runner is outside the fence"), "{refusal}");
        let refusal = Wishes::read(&json!({}), &ns(&[("sidecar-ports", "15200")])).unwrap_err();
        assert!(refusal.message.contains("admin endpoints"), "{refusal}");
    }

    #[test]
    fn exemptions_match_name_and_image() {
        let wishes = Wishes::read(
            &json!({}),
            &ns(&[("unfenced-containers", "mcp=registry.example/mcp:*, side-*")]),
        )
        .unwrap();
        let container = |name: &str, image: &str| json!({"name": name, "image": image});
        assert!(wishes.exempts(&container("mcp", "registry.example/mcp:1.2")));
        assert!(!wishes.exempts(&container("mcp", "registry.example/mcp:1/evil")));
        assert!(!wishes.exempts(&container("mcp", "registry.example/other:1")));
        assert!(!wishes.exempts(&container("mcp2", "registry.example/mcp:1")));
        assert!(wishes.exempts(&container("side-car", "anything")));
    }

    #[test]
    fn an_exemption_says_what_its_container_may_bring() {
        let value = "mcp=r/mcp:*; own=env + mounts, mcp=r/mcp:2;own=probes, bare=r/*";
        let wishes = Wishes::read(&json!({}), &ns(&[("unfenced-containers", value)])).unwrap();
        let may = |name: &str, image: &str| {
            let container = json!({"name": name, "image": image});
            let all = Own::ALL.iter().filter(|(_, own)| wishes.lets_bring(&container, *own));
            all.map(|(word, _)| *word).collect::<Vec<_>>()
        };
        assert_eq!(may("mcp", "r/mcp:1"), ["env", "mounts"]);
        assert_eq!(may("mcp", "r/mcp:2"), ["env", "mounts", "probes"]);
        assert_eq!(may("bare", "r/x"), [""; 0]);
        assert_eq!(may("other", "r/mcp:1"), [""; 0]);
    }
}

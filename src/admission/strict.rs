//! What the label value `strict` asks beside the fence itself: its author is hostile, so nothing of
//! the pod may reach around the fence from outside. The table of classes decides; under `enabled`
//! all of this is met and nothing is said.

use serde_json::Value;

use super::json::{at, field, list, text};
use super::namespace::Wishes;
use super::notes::Notes;
use super::own::Own;
use super::user::{OWN, id};
use super::{Class, Mode, Profile, Refusal, baseline, mounts};

/// Files of a fenced container from which its proxy learns the addresses of the policy's names. The
/// kubelet and the runtime write them, unless something is mounted there.
const NAME_FILES: [(&str, Class); 2] =
    [("/etc/hosts", Class::HostAliases), ("/etc/resolv.conf", Class::DnsConfig)];

/// Meets the fields of the pod as a whole.
///
/// # Errors
/// The label value refuses one of them.
pub(super) fn whole_pod(
    notes: &mut Notes,
    pod: &Value,
    mode: Mode,
    profile: Profile,
) -> Result<(), Refusal> {
    let spec = field(pod, "spec").unwrap_or(&Value::Null);
    // The name of `hostnameOverride` is one of the hosts file, and any domain's.
    for (name, class) in [
        ("hostAliases", Class::HostAliases),
        ("hostnameOverride", Class::HostAliases),
        ("dnsConfig", Class::DnsConfig),
    ] {
        let empty = |value: &Value| match value {
            Value::String(word) => word.is_empty(),
            Value::Array(list) => list.is_empty(),
            Value::Object(map) => map.is_empty(),
            _ => false,
        };
        if field(spec, name).is_some_and(|value| !empty(value)) {
            notes.meet(class, mode, format!("spec.{name} is set"))?;
        }
    }
    if text(spec, "dnsPolicy") == Some("None") {
        notes.meet(Class::DnsConfig, mode, "spec.dnsPolicy is None")?;
    }
    if !list(spec, "ephemeralContainers").is_empty() {
        notes.meet(Class::EphemeralContainer, mode, "spec.ephemeralContainers is set")?;
    }
    match baseline::pod(pod, profile) {
        Some(what) => notes.meet(Class::Baseline, mode, what),
        None => Ok(()),
    }
}

/// Meets a container of whichever kind, as it was submitted. `fenced`: the capabilities of a
/// container that went through an injection are ours, and replaced in any case.
///
/// # Errors
/// The label value refuses it.
pub(super) fn container(
    notes: &mut Notes,
    container: &Value,
    mode: Mode,
    capabilities_are_ours: bool,
) -> Result<(), Refusal> {
    match baseline::container(container, capabilities_are_ours) {
        Some(what) => notes.meet(Class::Baseline, mode, what),
        None => Ok(()),
    }
}

/// Meets what a container that is to be fenced has in the place of files that its proxy reads.
///
/// # Errors
/// The label value refuses it.
pub(super) fn name_files(notes: &mut Notes, container: &Value, mode: Mode) -> Result<(), Refusal> {
    let name = text(container, "name").unwrap_or_default();
    NAME_FILES.iter().try_for_each(|(file, class)| match mounts::at_file(container, file) {
        Some(what) => notes.meet(*class, mode, format!("container {name}: {what} is {file}")),
        None => Ok(()),
    })
}

/// Meets what an exempt container brings of its author's.
///
/// # Errors
/// The label value refuses what the exemption does not name.
pub(super) fn brought(
    notes: &mut Notes,
    pod: &Value,
    container: &Value,
    wishes: &Wishes,
    mode: Mode,
) -> Result<(), Refusal> {
    let name = text(container, "name").unwrap_or_default();
    let all = Own::ALL.iter().filter(|(_, own)| !wishes.lets_bring(container, *own));
    for (word, own) in all {
        if let Some(field) = own.brought(pod, container) {
            let what = format!(
                "container {name} is outside the fence and has {field}, which its exemption does not name (own={word})"
            );
            notes.meet(Class::UnfencedOwn, mode, what)?;
        }
    }
    Ok(())
}

/// Meets a container that stays outside the fence, in the network of the fence's proxy.
///
/// # Errors
/// The label value refuses it, or a user is not a number.
pub(super) fn unfenced(
    notes: &mut Notes,
    pod: &Value,
    container: &Value,
    mode: Mode,
) -> Result<(), Refusal> {
    let name = text(container, "name").unwrap_or_default();
    let spec = field(pod, "spec").unwrap_or(&Value::Null);
    // The image's USER is not asked: whoever makes the image is not the administrator either.
    match id(container, "runAsUser")?.or(id(spec, "runAsUser")?) {
        None => {
            let what = format!("container {name} is outside the fence and has no runAsUser");
            notes.meet(Class::UnfencedUser, mode, what)?;
        }
        Some(user) if user == "0" || user == OWN.to_string() => {
            let what = format!("container {name} is outside the fence with runAsUser {user}");
            notes.meet(Class::UnfencedUser, mode, what)?;
        }
        Some(_) => {}
    }
    // With a program that is setuid root, in the image or on a volume, it is no more than a start.
    if at(container, &["securityContext", "allowPrivilegeEscalation"]) != Some(&Value::Bool(false))
    {
        let what = format!(
            "container {name} is outside the fence, and allowPrivilegeEscalation is not false"
        );
        notes.meet(Class::UnfencedUser, mode, what)?;
    }
    let listed = |kind: &str| {
        let found = at(container, &["securityContext", "capabilities", kind]);
        found.and_then(Value::as_array).map_or(&[][..], Vec::as_slice)
    };
    // Runtimes differ in which spellings they take, so adding is read generously, dropping exactly.
    let adds = |word: &Value| {
        let word = word.as_str().unwrap_or("ALL").to_ascii_uppercase();
        let word = word.strip_prefix("CAP_").unwrap_or(&word);
        matches!(word, "ALL" | "NET_ADMIN" | "NET_RAW")
    };
    if let Some(added) = listed("add").iter().find(|word| adds(word)) {
        let what = format!("container {name} is outside the fence and adds capability {added}");
        return notes.meet(Class::UnfencedCapability, mode, what);
    }
    // A runtime's default set has it, and a program with file capabilities takes it from there.
    if !listed("drop").iter().any(|word| word == "ALL" || word == "NET_RAW") {
        let what = format!("container {name} is outside the fence and does not drop NET_RAW");
        return notes.meet(Class::UnfencedCapability, mode, what);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn classes(pod: &Value, container: &Value) -> Option<Class> {
        unfenced(&mut Notes::default(), pod, container, Mode::Strict).err().map(|r| r.class)
    }

    fn context(context: &Value) -> Value {
        let mut container = json!({"name": "mcp", "securityContext": context});
        container["securityContext"]["allowPrivilegeEscalation"] = json!(false);
        container
    }

    #[test]
    fn an_unfenced_container_says_who_it_is_and_drops_net_raw() {
        let bare = json!({});
        let caps = |caps: Value| context(&json!({"runAsUser": 7, "capabilities": caps}));
        let drop = json!({"drop": ["ALL"]});
        for (container, expected) in [
            (context(&json!({"capabilities": drop})), Some(Class::UnfencedUser)),
            (
                context(&json!({"runAsNonRoot": true, "capabilities": drop})),
                Some(Class::UnfencedUser),
            ),
            (context(&json!({"runAsUser": 0, "capabilities": drop})), Some(Class::UnfencedUser)),
            (
                context(&json!({"runAsUser": 65530, "capabilities": drop})),
                Some(Class::UnfencedUser),
            ),
            (context(&json!({"runAsUser": -1, "capabilities": drop})), Some(Class::Malformed)),
            (context(&json!({"runAsUser": 7})), Some(Class::UnfencedCapability)),
            (caps(json!({"drop": ["net_raw"]})), Some(Class::UnfencedCapability)),
            (caps(json!({"drop": ["ALL"], "add": ["NET_RAW"]})), Some(Class::UnfencedCapability)),
            (
                caps(json!({"drop": ["ALL"], "add": ["cap_net_admin"]})),
                Some(Class::UnfencedCapability),
            ),
            (caps(json!({"drop": ["ALL"], "add": ["all"]})), Some(Class::UnfencedCapability)),
            (caps(json!({"drop": ["ALL"], "add": ["NET_BIND_SERVICE"]})), None),
            (caps(json!({"drop": ["NET_RAW"]})), None),
        ] {
            assert_eq!(classes(&bare, &container), expected, "{container}");
        }
        // A user that a program of the container changes is not one.
        let mut made = caps(drop.clone());
        for value in [json!(null), json!(true)] {
            made["securityContext"]["allowPrivilegeEscalation"] = value;
            assert_eq!(classes(&bare, &made), Some(Class::UnfencedUser), "{made}");
        }
        // The pod's user counts where the container has none.
        let of_pod = context(&json!({"capabilities": drop}));
        let user = |uid: u32| json!({"spec": {"securityContext": {"runAsUser": uid}}});
        assert_eq!(classes(&user(7), &of_pod), None);
        assert_eq!(classes(&user(0), &of_pod), Some(Class::UnfencedUser));
    }

    #[test]
    fn fields_that_reach_around_the_fence_are_refused() {
        let run = |spec: Value, mode| {
            let pod = json!({"spec": spec});
            whole_pod(&mut Notes::default(), &pod, mode, Profile::Hardened).err().map(|r| r.class)
        };
        for (spec, class) in [
            (json!({"hostAliases": [{"ip": "1.2.3.4", "hostnames": ["a"]}]}), Class::HostAliases),
            (json!({"dnsConfig": {"nameservers": ["1.2.3.4"]}}), Class::DnsConfig),
            (json!({"dnsPolicy": "None"}), Class::DnsConfig),
            (json!({"hostnameOverride": "api.example"}), Class::HostAliases),
            (json!({"ephemeralContainers": [{"name": "x"}]}), Class::EphemeralContainer),
            (json!({"volumes": [{"name": "x", "hostPath": {"path": "/"}}]}), Class::Baseline),
        ] {
            assert_eq!(run(spec.clone(), Mode::Strict), Some(class), "{spec}");
            assert_eq!(run(spec, Mode::Enabled), None);
        }
        let empty = json!({"hostAliases": [], "dnsConfig": null, "hostnameOverride": "", "dnsPolicy": "ClusterFirst"});
        assert_eq!(run(empty, Mode::Strict), None);
    }
}

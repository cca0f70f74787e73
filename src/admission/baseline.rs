//! The Pod Security Standard "baseline" (kubernetes.io, Pod Security Standards), as far as the
//! classes of [`super::Class`] do not have it already: host namespaces and privileged containers.
//!
//! Written as a list of what is allowed: a value that this version does not know is refused. The
//! API server's own check cannot do this work, because it sees the injected pod, which needs more
//! than the level allows.

use serde_json::Value;

use super::Profile;
use super::json::{at, list, text};
use super::probes::EXECS;

/// Capabilities that a container may add.
pub(super) const CAPABILITIES: [&str; 13] = [
    "AUDIT_WRITE",
    "CHOWN",
    "DAC_OVERRIDE",
    "FOWNER",
    "FSETID",
    "KILL",
    "MKNOD",
    "NET_BIND_SERVICE",
    "SETFCAP",
    "SETGID",
    "SETPCAP",
    "SETUID",
    "SYS_CHROOT",
];

/// Sysctls that concern the pod alone.
const SYSCTLS: [&str; 12] = [
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.ping_group_range",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_rmem",
    "net.ipv4.tcp_syncookies",
    "net.ipv4.tcp_wmem",
];

/// `SELinux` types that keep a container in.
const SELINUX: [&str; 5] =
    ["", "container_t", "container_init_t", "container_kvm_t", "container_engine_t"];

/// The older form of `appArmorProfile`; the container's name follows.
const APPARMOR: &str = "container.apparmor.security.beta.kubernetes.io/";

/// The first thing of the pod as a whole that the standard refuses. With [`Profile::Reference`] the
/// pod's seccomp profile is the fence's own.
pub(super) fn pod(pod: &Value, profile: Profile) -> Option<String> {
    let spec = pod.get("spec").unwrap_or(&Value::Null);
    for volume in list(spec, "volumes") {
        if at(volume, &["hostPath"]).is_some() {
            let name = text(volume, "name").unwrap_or_default();
            return Some(format!("volume {name} is a hostPath"));
        }
    }
    let annotations = at(pod, &["metadata", "annotations"]).and_then(Value::as_object);
    for (key, value) in annotations.into_iter().flatten() {
        let good = |value: &str| {
            value.is_empty() || value == "runtime/default" || value.starts_with("localhost/")
        };
        if key.starts_with(APPARMOR) && !value.as_str().is_some_and(good) {
            return Some(format!("annotation {key} is {value}"));
        }
    }
    let context = at(spec, &["securityContext"]).unwrap_or(&Value::Null);
    for sysctl in list(context, "sysctls") {
        let name = text(sysctl, "name").unwrap_or_default();
        if !SYSCTLS.contains(&name) {
            return Some(format!("spec.securityContext.sysctls has {name:?}"));
        }
    }
    of_context(context, profile == Profile::Reference)
        .map(|what| format!("spec.securityContext.{what}"))
}

/// The first thing of a container that the standard refuses.
pub(super) fn container(container: &Value, capabilities_are_ours: bool) -> Option<String> {
    let name = text(container, "name").unwrap_or_default();
    of_container(container, capabilities_are_ours).map(|what| format!("container {name}: {what}"))
}

/// The same without its name.
pub(super) fn of_container(container: &Value, capabilities_are_ours: bool) -> Option<String> {
    let context = at(container, &["securityContext"]).unwrap_or(&Value::Null);
    if !capabilities_are_ours {
        let capabilities = at(context, &["capabilities"]).unwrap_or(&Value::Null);
        for added in list(capabilities, "add") {
            if !added.as_str().is_some_and(|added| CAPABILITIES.contains(&added)) {
                return Some(format!("securityContext.capabilities.add has {added}"));
            }
        }
    }
    if let Some(kind) = at(context, &["procMount"]).filter(|kind| *kind != "Default") {
        return Some(format!("securityContext.procMount is {kind}"));
    }
    if let Some(what) = of_context(context, false) {
        return Some(format!("securityContext.{what}"));
    }
    for port in list(container, "ports") {
        if let Some(port) = at(port, &["hostPort"]).filter(|port| port.as_u64() != Some(0)) {
            return Some(format!("ports has hostPort {port}"));
        }
    }
    EXECS.iter().find_map(|path| {
        let handler = at(container, path)?;
        let host = ["httpGet", "tcpSocket"].iter().find_map(|kind| at(handler, &[kind, "host"]));
        let host = host.filter(|host| *host != "")?;
        Some(format!("{} has host {host}", path.join(".")))
    })
}

/// What a security context of the pod and one of a container have alike.
fn of_context(context: &Value, seccomp_is_ours: bool) -> Option<String> {
    let options = at(context, &["seLinuxOptions"]).unwrap_or(&Value::Null);
    for name in ["user", "role"] {
        if let Some(value) = at(options, &[name]).filter(|value| *value != "") {
            return Some(format!("seLinuxOptions.{name} is {value}"));
        }
    }
    let known = |value: &Value, known: &[&str]| value.as_str().is_some_and(|v| known.contains(&v));
    if let Some(value) = at(options, &["type"]).filter(|value| !known(value, &SELINUX)) {
        return Some(format!("seLinuxOptions.type is {value}"));
    }
    for name in ["seccompProfile", "appArmorProfile"] {
        if name == "seccompProfile" && seccomp_is_ours {
            continue;
        }
        let Some(profile) = at(context, &[name]) else { continue };
        let kind = at(profile, &["type"]).unwrap_or(&Value::Null);
        if !known(kind, &["RuntimeDefault", "Localhost"]) {
            return Some(format!("{name}.type is {kind}"));
        }
    }
    let host_process = at(context, &["windowsOptions", "hostProcess"]);
    host_process.filter(|value| *value != false).map(|_| "windowsOptions.hostProcess is set".into())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_levels_own_examples_of_pods_are_told_apart() {
        let of_pod = |spec: Value| pod(&json!({"spec": spec}), Profile::Hardened);
        for (spec, word) in [
            (json!({"volumes": [{"name": "v", "hostPath": {"path": "/"}}]}), "hostPath"),
            (
                json!({"securityContext": {"sysctls": [{"name": "kernel.msgmax", "value": "1"}]}}),
                "msgmax",
            ),
            (json!({"securityContext": {"seLinuxOptions": {"type": "spc_t"}}}), "spc_t"),
            (json!({"securityContext": {"seLinuxOptions": {"user": "u"}}}), "user"),
            (json!({"securityContext": {"seLinuxOptions": {"role": "r"}}}), "role"),
            (json!({"securityContext": {"seccompProfile": {"type": "Unconfined"}}}), "seccomp"),
            (json!({"securityContext": {"seccompProfile": {}}}), "seccomp"),
            (json!({"securityContext": {"appArmorProfile": {"type": "Unconfined"}}}), "appArmor"),
            (json!({"securityContext": {"windowsOptions": {"hostProcess": true}}}), "hostProcess"),
        ] {
            let found = of_pod(spec.clone());
            assert!(found.as_ref().is_some_and(|found| found.contains(word)), "{spec}: {found:?}");
        }
        for spec in [
            json!({}),
            json!({"volumes": [{"name": "v", "hostPath": null}, {"name": "w", "emptyDir": {}}]}),
            json!({"securityContext": {
                "sysctls": [{"name": "net.ipv4.tcp_syncookies", "value": "1"}],
                "seLinuxOptions": {"type": "container_t", "level": "s0:c1"},
                "seccompProfile": {"type": "Localhost", "localhostProfile": "x"},
                "appArmorProfile": {"type": "RuntimeDefault"},
                "windowsOptions": {"hostProcess": false}}}),
        ] {
            assert_eq!(of_pod(spec.clone()), None, "{spec}");
        }
        let annotated = |value: &str| {
            let key = format!("{APPARMOR}agent");
            pod(&json!({"metadata": {"annotations": {key: value}}}), Profile::Hardened)
        };
        assert!(annotated("unconfined").is_some());
        assert_eq!([annotated("runtime/default"), annotated("localhost/x")], [None, None]);
        // The fence's own, in the reference profile.
        let unconfined =
            json!({"spec": {"securityContext": {"seccompProfile": {"type": "Unconfined"}}}});
        assert_eq!(pod(&unconfined, Profile::Reference), None);
    }

    #[test]
    fn containers_are_told_apart() {
        let probe = |probe: Value| json!({"readinessProbe": probe});
        for (made, word) in [
            (json!({"securityContext": {"capabilities": {"add": ["NET_RAW"]}}}), "NET_RAW"),
            (json!({"securityContext": {"capabilities": {"add": ["kill"]}}}), "kill"),
            (json!({"securityContext": {"procMount": "Unmasked"}}), "procMount"),
            (json!({"securityContext": {"seccompProfile": {"type": "Unconfined"}}}), "seccomp"),
            (json!({"ports": [{"containerPort": 1, "hostPort": 80}]}), "hostPort"),
            (probe(json!({"httpGet": {"host": "169.254.169.254", "port": 80}})), "host"),
            (probe(json!({"tcpSocket": {"host": "10.0.0.1", "port": 80}})), "host"),
            (json!({"lifecycle": {"preStop": {"httpGet": {"host": "x", "port": 1}}}}), "host"),
        ] {
            let found = container(&made, false);
            assert!(found.as_ref().is_some_and(|found| found.contains(word)), "{made}: {found:?}");
        }
        let good = json!({"name": "a",
            "securityContext": {"capabilities": {"add": ["KILL"], "drop": ["ALL"]}, "procMount": "Default"},
            "ports": [{"containerPort": 1, "hostPort": 0}, {"containerPort": 2}],
            "readinessProbe": {"httpGet": {"host": "", "port": 80}}});
        assert_eq!(container(&good, false), None);
        let ours = json!({"securityContext": {"capabilities": {"add": ["SYS_ADMIN"]}}});
        assert_eq!(container(&ours, true), None);
    }
}

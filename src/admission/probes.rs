//! Exec probes and lifecycle commands run inside the fence; ports that have to stay reachable.

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

use super::Refusal;
use super::command::{enter, entered};
use super::json::{at, list, text, word, words};

/// Where a container keeps commands that the kubelet runs in it.
pub(super) const EXECS: &[&[&str]] = &[
    &["livenessProbe"],
    &["readinessProbe"],
    &["startupProbe"],
    &["lifecycle", "postStart"],
    &["lifecycle", "preStop"],
];

/// Puts `enter` before every command of the kubelet's. An earlier one is looked through.
///
/// # Errors
/// A command that is not a list of strings.
pub(super) fn wrap(container: &mut Map<String, Value>, supervisor: &str) -> Result<(), Refusal> {
    for path in EXECS {
        let Some(exec) = exec_mut(container, path) else {
            continue;
        };
        let command = words(exec, "command")?;
        if command.is_empty() {
            continue;
        }
        let mut wanted = enter(supervisor);
        wanted.extend_from_slice(entered(&command).unwrap_or(&command));
        if wanted != command {
            exec["command"] = json!(wanted);
        }
    }
    Ok(())
}

/// Takes `enter` away again from where an injection had put it.
///
/// # Errors
/// A command that is not a list of strings.
pub(super) fn unwrap(container: &mut Map<String, Value>) -> Result<(), Refusal> {
    for path in EXECS {
        let Some(exec) = exec_mut(container, path) else {
            continue;
        };
        let command = words(exec, "command")?;
        if let Some(own) = entered(&command) {
            exec["command"] = json!(own);
        }
    }
    Ok(())
}

/// The `exec` object of a probe or lifecycle handler.
pub(super) fn exec_mut<'a>(
    container: &'a mut Map<String, Value>,
    path: &[&str],
) -> Option<&'a mut Value> {
    let (first, rest) = path.split_first()?;
    let holder =
        rest.iter().try_fold(container.get_mut(*first)?, |value, name| value.get_mut(*name))?;
    holder.get_mut("exec").filter(|exec| exec.is_object())
}

/// Ports the container declares and those its HTTP, TCP and gRPC probes use, in order.
pub(super) fn declared_ports(container: &Value) -> Vec<u16> {
    let mut found = BTreeSet::new();
    let number = |value: &Value| value.as_u64().and_then(|port| u16::try_from(port).ok());
    let declared = list(container, "ports")
        .iter()
        .filter(|port| word(port, "protocol").is_none_or(|protocol| protocol == "TCP"));
    found.extend(declared.clone().filter_map(|port| number(port.get("containerPort")?)));
    for path in EXECS {
        let Some(handler) = at(container, path) else {
            continue;
        };
        for kind in ["httpGet", "tcpSocket", "grpc"] {
            let Some(port) = at(handler, &[kind, "port"]) else {
                continue;
            };
            let named = || {
                let port = declared.clone().find(|entry| text(entry, "name") == port.as_str())?;
                number(port.get("containerPort")?)
            };
            let parsed = || port.as_str().and_then(|port| port.parse().ok());
            found.extend(number(port).or_else(named).or_else(parsed));
        }
    }
    found.remove(&0);
    found.into_iter().collect()
}

/// The first port of an admin endpoint: below it are Istio's.
const ADMIN_FIRST: u16 = 15200;
/// The last: the proxy opens none of these for what listens in a fence.
const ADMIN_LAST: u16 = 15299;

/// Ports for admin endpoints, one for each fenced container, in order: all containers of a pod
/// share one loopback. What any of them declares or is probed on is left to it.
pub(super) fn admin_ports<'a>(
    containers: impl Iterator<Item = &'a Value>,
) -> impl Iterator<Item = u16> {
    let taken: BTreeSet<u16> = containers.flat_map(declared_ports).collect();
    (ADMIN_FIRST..=ADMIN_LAST).filter(move |port| !taken.contains(port))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SUPERVISOR: &str = "/ringfence/d/bin/ringfence-supervisor";

    #[test]
    fn every_exec_is_wrapped_once() {
        let mut container = json!({
            "livenessProbe": {"exec": {"command": ["a", "$(X)"]}, "periodSeconds": 5},
            "readinessProbe": {"httpGet": {"port": 80}},
            "startupProbe": {"exec": {"command": []}},
            "lifecycle": {"preStop": {"exec": {"command": ["b"]}}, "postStart": null, "stopSignal": "SIGINT"},
        });
        let map = container.as_object_mut().unwrap();
        wrap(map, "/ringfence/d/d/bin/ringfence-supervisor").unwrap();
        wrap(map, SUPERVISOR).unwrap();
        let entered = |words: &[&str]| {
            let mut command = enter(SUPERVISOR);
            command.extend(words.iter().map(|&word| word.to_owned()));
            json!(command)
        };
        assert_eq!(container["livenessProbe"]["exec"]["command"], entered(&["a", "$(X)"]));
        assert_eq!(container["livenessProbe"]["periodSeconds"], 5);
        assert_eq!(container["startupProbe"]["exec"]["command"], json!([]));
        assert_eq!(container["lifecycle"]["preStop"]["exec"]["command"], entered(&["b"]));
    }

    #[test]
    fn ports_are_found() {
        let container = json!({
            "ports": [{"containerPort": 80, "name": "http"}, {"containerPort": 53, "protocol": "UDP"}],
            "livenessProbe": {"httpGet": {"port": "http"}},
            "readinessProbe": {"tcpSocket": {"port": 9000}},
            "startupProbe": {"grpc": {"port": 9001}},
            "lifecycle": {"preStop": {"httpGet": {"port": "81"}}},
        });
        assert_eq!(declared_ports(&container), [80, 81, 9000, 9001]);
        assert!(declared_ports(&json!({"ports": null})).is_empty());
    }

    #[test]
    fn admin_ports_leave_declared_ones_alone() {
        let containers = [
            json!({"ports": [{"containerPort": 15201}, {"containerPort": 15203, "protocol": "UDP"}]}),
            json!({"readinessProbe": {"tcpSocket": {"port": 15200}}}),
        ];
        let ports: Vec<u16> = admin_ports(containers.iter()).take(3).collect();
        assert_eq!(ports, [15202, 15203, 15204]);
        let all = json!({"ports": (ADMIN_FIRST..=ADMIN_LAST)
            .map(|port| json!({"containerPort": port})).collect::<Vec<_>>()});
        assert_eq!(admin_ports([all].iter()).next(), None);
    }
}

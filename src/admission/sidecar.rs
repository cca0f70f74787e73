//! Ports of the fence's loopback that lead to a sidecar (`ringfence.dev/sidecar-ports`).

use serde_json::Value;

use super::json::text;
use super::namespace::SIDECAR_PORTS;
use super::probes::declared_ports;
use super::{Class, Refusal};
use crate::policy::SidecarPorts;

/// Refuses a fenced container that wants one of the ports for itself: the fence listens there.
///
/// # Errors
/// It declares one, or is probed on it.
pub(super) fn check(container: &Value, ports: &SidecarPorts) -> Result<(), Refusal> {
    let Some(port) = declared_ports(container).into_iter().find(|port| ports.contains(*port))
    else {
        return Ok(());
    };
    let name = text(container, "name").unwrap_or_default();
    let what = format!(
        "container {name} declares port {port} or is probed on it, which {SIDECAR_PORTS} of the namespace gives to a sidecar"
    );
    Err(Refusal::new(Class::SidecarPort, what))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_a_container_declares_or_is_probed_on_is_not_a_sidecars() {
        let ports: SidecarPorts = "8090-8094".parse().unwrap();
        for container in [
            json!({"name": "a", "ports": [{"containerPort": 8092}]}),
            json!({"name": "a", "readinessProbe": {"httpGet": {"port": 8094}}}),
            json!({"name": "a", "ports": [{"containerPort": 8090, "name": "web", "protocol": "TCP"}]}),
        ] {
            let refusal = check(&container, &ports).unwrap_err();
            assert_eq!((refusal.class, refusal.code), (Class::SidecarPort, 422), "{container}");
            assert!(refusal.message.contains("container a") && refusal.message.contains("809"));
            assert_eq!(check(&container, &SidecarPorts::default()), Ok(()));
        }
        let other =
            json!({"ports": [{"containerPort": 8001}, {"containerPort": 8090, "protocol": "UDP"}]});
        assert_eq!(check(&other, &ports), Ok(()));
    }
}

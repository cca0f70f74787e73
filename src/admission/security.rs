//! The security context that the supervisor needs. Only the fields named here are ours; whatever
//! else the author set (`SELinux` options, a read-only root) stays.

use serde_json::{Map, Value, json};

use super::json::{object_in, set, unset};
use super::{Profile, Refusal};

/// The reference deployment's seven, and SETPCAP to empty the bounding set.
const CAPABILITIES: [&str; 8] = [
    "NET_ADMIN",
    "SYS_ADMIN",
    "SYS_PTRACE",
    "SETUID",
    "SETGID",
    "CHOWN",
    "DAC_OVERRIDE",
    "SETPCAP",
];

/// Fields of a container's security context that are ours.
pub(super) const FIELDS: &[&str] =
    &["runAsUser", "runAsNonRoot", "allowPrivilegeEscalation", "capabilities", "seccompProfile"];

/// Sets a fenced container's security context.
///
/// # Errors
/// It is not an object.
pub(super) fn container(map: &mut Map<String, Value>, profile: Profile) -> Result<(), Refusal> {
    let context = object_in(map, "securityContext")?;
    set(context, "runAsUser", json!(0));
    set(context, "runAsNonRoot", json!(false));
    set(context, "capabilities", json!({"drop": ["ALL"], "add": CAPABILITIES}));
    set(context, "allowPrivilegeEscalation", json!(profile == Profile::Reference));
    match profile {
        Profile::Hardened => set(context, "seccompProfile", json!({"type": "RuntimeDefault"})),
        Profile::Reference => unset(context, "seccompProfile"),
    }
    Ok(())
}

/// Sets what belongs on the pod: nothing with the hardened profile.
///
/// # Errors
/// A security context that is not an object.
pub(super) fn pod(spec: &mut Map<String, Value>, profile: Profile) -> Result<(), Refusal> {
    if profile == Profile::Reference {
        let context = object_in(spec, "securityContext")?;
        set(context, "seccompProfile", json!({"type": "Unconfined"}));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn foreign_fields_stay() {
        let mut made = json!({"securityContext": {
            "runAsUser": 5, "runAsGroup": 6, "readOnlyRootFilesystem": true,
            "capabilities": {"add": ["NET_RAW"]}, "seccompProfile": {"type": "Localhost"}}});
        container(made.as_object_mut().unwrap(), Profile::Hardened).unwrap();
        assert_eq!(
            made["securityContext"],
            json!({"runAsUser": 0, "runAsGroup": 6, "readOnlyRootFilesystem": true,
                "runAsNonRoot": false, "allowPrivilegeEscalation": false,
                "capabilities": {"drop": ["ALL"], "add": CAPABILITIES},
                "seccompProfile": {"type": "RuntimeDefault"}})
        );
    }

    #[test]
    fn the_reference_profile_is_the_reference_deployment() {
        let mut spec = json!({"securityContext": null});
        let map = spec.as_object_mut().unwrap();
        pod(map, Profile::Reference).unwrap();
        assert_eq!(map["securityContext"], json!({"seccompProfile": {"type": "Unconfined"}}));
        container(map, Profile::Reference).unwrap();
        assert_eq!(map["securityContext"]["allowPrivilegeEscalation"], json!(true));
        assert_eq!(map["securityContext"].get("seccompProfile"), None);
        let mut hardened = json!({});
        pod(hardened.as_object_mut().unwrap(), Profile::Hardened).unwrap();
        assert_eq!(hardened, json!({}));
    }
}

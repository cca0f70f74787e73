//! The init container that copies the supervisor's binary, where there are no image volumes.
//!
//! What it leaves behind runs as root in another container, so whatever could make it run or read
//! something else is ours: image, command, security context, mounts. What other webhooks add to
//! every container (environment, the service account's token, a `LimitRange`'s resources) may stay.

use serde_json::{Map, Value, json};

use super::json::{at, field, list, list_in, object, object_in, set, text, unset, upsert};
use super::mounts::BIN;
use super::{Delivery, Namespace, Refusal, Settings};

/// Its name.
pub(super) const NAME: &str = "ringfence-install";
/// Where it sees the volume.
const DIR: &str = "/ringfence-bin";

/// Puts the init container at index 0, corrects an earlier one in its place, or takes it away.
///
/// # Errors
/// `initContainers` is not a list of objects.
pub(super) fn apply(
    spec: &mut Map<String, Value>,
    ns: &Namespace,
    settings: &Settings,
) -> Result<(), Refusal> {
    let is_ours = |container: &Value| text(container, "name") == Some(NAME);
    if settings.delivery == Delivery::Image {
        if let Some(containers) = spec.get_mut("initContainers").and_then(Value::as_array_mut) {
            containers.retain(|container| !is_ours(container));
        }
        return Ok(());
    }
    let resources = if is_best_effort(spec) { json!({}) } else { resources(ns, settings) };
    let containers = list_in(spec, "initContainers")?;
    let mut seen = false;
    containers.retain(|container| !is_ours(container) || !std::mem::replace(&mut seen, true));
    let index = containers.iter().position(is_ours).unwrap_or_else(|| {
        // Resources are set once: a LimitRange may have its say afterwards.
        containers.insert(0, json!({"name": NAME, "resources": resources}));
        0
    });
    shape(object(&mut containers[index], NAME)?, settings)
}

fn shape(container: &mut Map<String, Value>, settings: &Settings) -> Result<(), Refusal> {
    set(container, "image", json!(settings.image));
    set(container, "imagePullPolicy", json!(settings.image_pull_policy));
    set(container, "command", json!(["/ringfence-supervisor", "install", DIR]));
    for name in ["args", "restartPolicy", "volumeDevices"] {
        unset(container, name);
    }
    set(container, "terminationMessagePath", json!("/dev/termination-log"));
    set(container, "terminationMessagePolicy", json!("File"));
    let context = object_in(container, "securityContext")?;
    set(context, "runAsUser", json!(65532));
    set(context, "runAsGroup", json!(65532));
    set(context, "runAsNonRoot", json!(true));
    set(context, "allowPrivilegeEscalation", json!(false));
    set(context, "readOnlyRootFilesystem", json!(true));
    set(context, "capabilities", json!({"drop": ["ALL"]}));
    set(context, "seccompProfile", json!({"type": "RuntimeDefault"}));
    unset(context, "privileged");
    // A mount over the binary or over the target would be the author's word instead of ours.
    let harmless = |mount: &Value| {
        let path = text(mount, "mountPath").unwrap_or_default();
        let volume = text(mount, "name").unwrap_or_default();
        volume != BIN && path.starts_with("/var/run/secrets/") && !path.contains("..")
    };
    let mount = json!({"name": BIN, "mountPath": DIR});
    upsert(list_in(container, "volumeMounts")?, vec![mount], |m| !harmless(m), PartialEq::eq);
    Ok(())
}

/// Whether no container of the pod asks for CPU or memory. Then ours does not either: it would
/// take the pod out of its quality-of-service class.
fn is_best_effort(spec: &Map<String, Value>) -> bool {
    let asks = |holder: &Value| {
        ["requests", "limits"].iter().any(|kind| {
            ["cpu", "memory"].iter().any(|what| {
                at(holder, &["resources", kind, what]).is_some_and(|amount| {
                    amount.as_f64() != Some(0.0) && amount.as_str() != Some("0")
                })
            })
        })
    };
    let own = spec.get("resources").is_some_and(|r| asks(&json!({"resources": r})));
    let containers = ["containers", "initContainers"]
        .iter()
        .filter_map(|name| spec.get(*name)?.as_array())
        .flatten()
        .filter(|container| text(container, "name") != Some(NAME));
    !own && !containers.into_iter().any(asks)
}

/// Requests equal limits, so that a Guaranteed pod stays so; fitted to the namespace's limits.
fn resources(ns: &Namespace, settings: &Settings) -> Value {
    let cpu = fit(ns, "cpu", &settings.install_cpu);
    let memory = fit(ns, "memory", &settings.install_memory);
    json!({
        "limits": {"cpu": cpu, "memory": memory},
        "requests": {"cpu": cpu, "memory": memory},
    })
}

/// The nearest quantity that every `LimitRange` for containers admits.
fn fit(ns: &Namespace, what: &str, wanted: &str) -> String {
    let mut best = wanted.to_owned();
    let limits = ns
        .limit_ranges
        .iter()
        .flat_map(|range| at(range, &["spec"]).map_or(&[][..], |spec| list(spec, "limits")))
        .filter(|limit| text(limit, "type") == Some("Container"));
    for limit in limits {
        let bound = |kind: &str| {
            let bound = field(at(limit, &[kind])?, what)?;
            Some((bound.as_str()?.to_owned(), quantity(bound.as_str()?)?))
        };
        let Some(value) = quantity(&best) else {
            return best;
        };
        if let Some((text, least)) = bound("min")
            && value < least
        {
            best = text;
        } else if let Some((text, most)) = bound("max")
            && value > most
        {
            best = text;
        }
    }
    best
}

/// A Kubernetes quantity as a number, exact enough to compare.
fn quantity(text: &str) -> Option<f64> {
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, suffix) = text.split_at(digits);
    let scale = match suffix {
        "" => 1.0,
        "n" => 1e-9,
        "u" => 1e-6,
        "m" => 1e-3,
        "k" => 1e3,
        "M" => 1e6,
        "G" => 1e9,
        "T" => 1e12,
        "P" => 1e15,
        "E" => 1e18,
        "Ki" => 1024.0,
        "Mi" => 1024.0 * 1024.0,
        "Gi" => 1024.0 * 1024.0 * 1024.0,
        "Ti" => 1024.0 * 1024.0 * 1024.0 * 1024.0,
        other => return text.parse().ok().filter(|_| other.starts_with(['e', 'E'])),
    };
    number.parse::<f64>().ok().map(|number| number * scale)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(spec: &mut Value, ns: &Namespace, delivery: Delivery) {
        let settings = Settings { delivery, ..Settings::default() };
        apply(spec.as_object_mut().unwrap(), ns, &settings).unwrap();
    }

    #[test]
    fn it_is_first_and_stays_as_it_is() {
        let mut spec = json!({"initContainers": [{"name": "theirs"}]});
        run(&mut spec, &Namespace::default(), Delivery::Init);
        assert_eq!(spec["initContainers"][0]["name"], NAME);
        assert_eq!(spec["initContainers"][0]["resources"], json!({}));
        let before = spec.clone();
        run(&mut spec, &Namespace::default(), Delivery::Init);
        assert_eq!(spec, before);
        run(&mut spec, &Namespace::default(), Delivery::Image);
        assert_eq!(spec, json!({"initContainers": [{"name": "theirs"}]}));
    }

    #[test]
    fn a_forged_one_is_corrected() {
        let token = json!({"name": "kube-api-access-x", "readOnly": true,
            "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount"});
        let mut spec = json!({"initContainers": [{"name": "a"}, {
            "name": NAME, "image": "evil", "args": ["x"], "restartPolicy": "Always",
            "env": [{"name": "X", "value": "y"}], "resources": {"limits": {"cpu": "1"}},
            "securityContext": {"privileged": true, "runAsUser": 0},
            "volumeMounts": [
                {"name": "scripts", "mountPath": "/ringfence-supervisor", "subPath": "evil.sh"},
                {"name": "scripts", "mountPath": "/var/run/secrets/../../../ringfence-bin"},
                token,
                {"name": "ringfence-bin", "mountPath": "/var/run/secrets/x"}],
        }, {"name": NAME}]});
        run(&mut spec, &Namespace::default(), Delivery::Init);
        let list = spec["initContainers"].as_array().unwrap();
        assert_eq!(list.len(), 2);
        let made = &list[1];
        assert_eq!(made["command"], json!(["/ringfence-supervisor", "install", "/ringfence-bin"]));
        assert_eq!(made["volumeMounts"], json!([token, {"name": BIN, "mountPath": DIR}]));
        assert_eq!(made["image"], json!(Settings::default().image));
        assert_eq!(made["resources"], json!({"limits": {"cpu": "1"}}));
        assert_eq!(made["securityContext"].get("privileged"), None);
        assert_eq!((made.get("args"), made.get("restartPolicy")), (None, None));
        assert_eq!(made["env"][0]["name"], "X");
    }

    #[test]
    fn the_class_of_service_stays() {
        let mut spec = json!({"containers": [{"resources": {"requests": {"cpu": "1"}}}]});
        run(&mut spec, &Namespace::default(), Delivery::Init);
        assert_eq!(
            spec["initContainers"][0]["resources"],
            json!({"limits": {"cpu": "100m", "memory": "64Mi"}, "requests": {"cpu": "100m", "memory": "64Mi"}})
        );
        let mut spec = json!({"resources": {"limits": {"memory": "1Gi"}}, "containers": [{}]});
        run(&mut spec, &Namespace::default(), Delivery::Init);
        assert_ne!(spec["initContainers"][0]["resources"], json!({}));
    }

    #[test]
    fn it_fits_the_limit_range() {
        let ns = Namespace {
            limit_ranges: vec![json!({"spec": {"limits": [
                {"type": "Pod", "min": {"cpu": "9"}},
                {"type": "Container", "min": {"cpu": "0.2", "memory": "32Mi"}, "max": {"memory": "50M"}}]}})],
            ..Namespace::default()
        };
        assert_eq!(fit(&ns, "cpu", "100m"), "0.2");
        assert_eq!(fit(&ns, "memory", "64Mi"), "50M");
        assert_eq!(fit(&ns, "memory", "40Mi"), "40Mi");
        assert_eq!(quantity("1e3"), Some(1000.0));
        assert_eq!(quantity("1Ki"), Some(1024.0));
        assert_eq!(quantity("x"), None);
    }
}

//! Who the agent is: the user and groups that the supervisor gives it by flag.
//!
//! The container itself runs as uid 0, so whom it would have been has to be found first: the
//! policy's word, else the container's, the pod's, the image's. Root is never an answer.

use serde_json::Value;

use super::command::Original;
use super::json::{at, list, text, word};
use super::{Class, ImageConfig, PolicyRef, Refusal};

/// The proxy's uid and gid.
pub(super) const OWN: u32 = 65530;
/// Who root becomes.
const NOBODY: &str = "65534";

/// The agent's user.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct RunAs {
    /// `USER[:GROUP]`, numbers or names; names are resolved in the container.
    pub flag: String,
    /// It would have been root.
    pub was_root: bool,
    /// The policy names it.
    pub is_policys: bool,
}

/// Whether the user is known without reading the image.
///
/// # Errors
/// As [`run_as`].
pub(super) fn is_known(
    pod: &Value,
    container: &Value,
    original: &Original,
    policy: &PolicyRef,
) -> Result<bool, Refusal> {
    Ok(declared(pod, container, original, policy)?.is_some())
}

/// Decides the user.
///
/// # Errors
/// The proxy's uid, or a name that cannot be one.
pub(super) fn run_as(
    pod: &Value,
    container: &Value,
    original: &Original,
    image: Option<&ImageConfig>,
    policy: &PolicyRef,
) -> Result<RunAs, Refusal> {
    let from_image = || image.map_or(String::new(), |image| image.user.trim().to_owned());
    let chosen = declared(pod, container, original, policy)?.unwrap_or_else(from_image);
    let (user, own_group) = match chosen.split_once(':') {
        Some((user, group)) => (user, Some(group).filter(|group| !group.is_empty())),
        None => (chosen.as_str(), None),
    };
    let name = text(container, "name").unwrap_or_default();
    let group = match policy.run_as_group.as_deref().filter(|group| !group.is_empty()) {
        Some(group) => Some(group.to_owned()),
        None => id(container, "runAsGroup")?.or(id(pod_spec(pod), "runAsGroup")?),
    };
    let was_root = is_root(user);
    let group = match (group, own_group) {
        (Some(group), _) => Some(group),
        (None, Some(group)) if !(was_root && is_root(group)) => Some(group.to_owned()),
        _ if was_root => Some(NOBODY.to_owned()),
        _ => None,
    };
    let user = if was_root { NOBODY } else { user };
    for word in std::iter::once(user).chain(group.as_deref()) {
        check(name, word)?;
    }
    let flag = group.map_or_else(|| user.to_owned(), |group| format!("{user}:{group}"));
    let is_policys = policy.run_as_user.as_deref().is_some_and(|user| !user.is_empty());
    Ok(RunAs { flag, was_root, is_policys })
}

/// `USER[:GROUP]` from the policy, the container, an earlier injection or the pod.
fn declared(
    pod: &Value,
    container: &Value,
    original: &Original,
    policy: &PolicyRef,
) -> Result<Option<String>, Refusal> {
    if let Some(user) = policy.run_as_user.as_deref().filter(|user| !user.is_empty()) {
        return Ok(Some(user.to_owned()));
    }
    let own = id(container, "runAsUser")?;
    // In a container that is injected already, uid 0 is ours and says nothing. What its flag says
    // is believed, but for the two users that nobody may become by writing a flag.
    let own = own.filter(|user| !(original.injected && is_root(user)));
    let earlier = original.user.clone().filter(|chosen| {
        let user = chosen.split(':').next().unwrap_or_default();
        !is_root(user) && user.parse() != Ok(OWN)
    });
    Ok(match own.or(earlier) {
        Some(user) => Some(user),
        None => id(pod_spec(pod), "runAsUser")?,
    })
}

fn pod_spec(pod: &Value) -> &Value {
    pod.get("spec").unwrap_or(&Value::Null)
}

/// A numeric field of the security context of a container or a pod's spec.
///
/// # Errors
/// It is no number of a user or group.
pub(super) fn id(holder: &Value, name: &str) -> Result<Option<String>, Refusal> {
    let Some(found) = at(holder, &["securityContext", name]) else {
        return Ok(None);
    };
    let id = found.as_u64().and_then(|id| u32::try_from(id).ok());
    id.map(|id| Some(id.to_string()))
        .ok_or_else(|| super::json::malformed(name, "a user or group number"))
}

fn is_root(word: &str) -> bool {
    word.is_empty() || word == "root" || word.parse() == Ok(0u32)
}

/// Refuses what is the proxy's, and what a flag could not carry.
fn check(container: &str, word: &str) -> Result<(), Refusal> {
    if word.parse() == Ok(OWN) {
        return Err(Refusal::new(
            Class::OwnUser,
            format!("container {container} asks for uid or gid {OWN}"),
        ));
    }
    let good = |c: char| c.is_alphanumeric() || matches!(c, '_' | '.' | '-' | '$' | '@' | '\\');
    if word.is_empty() || word.starts_with('-') || word.len() > 256 || !word.chars().all(good) {
        return Err(Refusal::with_fix(
            Class::Malformed,
            format!("container {container}: {word:?} is not the name of a user or group"),
            "set securityContext.runAsUser",
        ));
    }
    Ok(())
}

/// Supplementary groups: `fsGroup` and `supplementalGroups`, each once, in that order. The groups
/// which the image's `/etc/group` gives to the user are added by the supervisor.
///
/// # Errors
/// Not a number, the proxy's gid, or a policy that keeps the image's groups away: the supervisor
/// would add them all the same.
pub(super) fn groups(pod: &Value) -> Result<Vec<String>, Refusal> {
    let mut groups: Vec<String> = id(pod_spec(pod), "fsGroup")?.into_iter().collect();
    let context = at(pod, &["spec", "securityContext"]).unwrap_or(&Value::Null);
    if let Some(wish) = word(context, "supplementalGroupsPolicy").filter(|&wish| wish != "Merge") {
        return Err(Refusal::with_fix(
            Class::NotAvailable,
            format!(
                "spec.securityContext.supplementalGroupsPolicy: {wish} is not available in this version: the agent gets the groups of the image's /etc/group"
            ),
            "remove it, or set it to Merge, if the agent may have those groups; else use an image whose /etc/group gives it none",
        ));
    }
    for group in list(context, "supplementalGroups") {
        let group = group.as_u64().and_then(|id| u32::try_from(id).ok());
        let group = group
            .ok_or_else(|| super::json::malformed("supplementalGroups", "a list of group numbers"))?
            .to_string();
        if !groups.contains(&group) {
            groups.push(group);
        }
    }
    for group in &groups {
        check("(all)", group)?;
    }
    Ok(groups)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn decide(pod: &Value, container: &Value, image: &str, policy: &str) -> Result<RunAs, Class> {
        let image = ImageConfig { user: image.into(), ..ImageConfig::default() };
        let policy = PolicyRef { run_as_user: Some(policy.into()), ..PolicyRef::default() };
        let original = Original::of(container).unwrap();
        run_as(pod, container, &original, Some(&image), &policy).map_err(|refusal| refusal.class)
    }

    fn flag(pod: &Value, container: &Value, image: &str, policy: &str) -> String {
        decide(pod, container, image, policy).unwrap().flag
    }

    fn user(uid: u32) -> Value {
        json!({"securityContext": {"runAsUser": uid}})
    }

    #[test]
    fn the_first_source_wins() {
        let pod = json!({"spec": user(2)});
        assert_eq!(flag(&pod, &user(3), "4", "5"), "5");
        assert_eq!(flag(&pod, &user(3), "4", ""), "3");
        assert_eq!(flag(&pod, &json!({}), "4", ""), "2");
        assert_eq!(flag(&json!({}), &json!({}), "4", ""), "4");
        assert_eq!(flag(&json!({}), &json!({}), "app:web", ""), "app:web");
    }

    #[test]
    fn root_becomes_nobody() {
        for image in ["", "0", "root", "0:0", "root:root", "00", ":"] {
            let found = decide(&json!({}), &json!({}), image, "").unwrap();
            assert_eq!(
                found,
                RunAs { flag: "65534:65534".into(), was_root: true, is_policys: false },
                "{image:?}"
            );
        }
        assert_eq!(flag(&json!({}), &user(0), "5", ""), "65534:65534");
        assert_eq!(flag(&json!({}), &json!({}), "5", "root"), "65534:65534");
        assert_eq!(flag(&json!({}), &json!({}), "0:staff", ""), "65534:staff");
    }

    #[test]
    fn gid_0_stays_where_the_container_had_it() {
        let container = json!({"securityContext": {"runAsUser": 0, "runAsGroup": 0}});
        assert_eq!(flag(&json!({}), &container, "", ""), "65534:0");
        assert_eq!(flag(&json!({}), &json!({}), "1001:0", ""), "1001:0");
        assert_eq!(
            flag(&json!({"spec": {"securityContext": {"runAsGroup": 7}}}), &user(5), "", ""),
            "5:7"
        );
    }

    #[test]
    fn an_earlier_flag_is_believed_but_for_root_and_the_proxy() {
        let fenced = |user: &str| {
            json!({"securityContext": {"runAsUser": 0}, "command": [
                "/ringfence/d/bin/ringfence-supervisor", "--run-as", user, "--no-env", "--", "sh"]})
        };
        let pod = json!({"spec": user(2)});
        assert_eq!(flag(&pod, &fenced("app:3"), "", ""), "app:3");
        for forged in ["0", "root:5", "65530", ""] {
            assert_eq!(flag(&pod, &fenced(forged), "", ""), "2", "{forged}");
        }
    }

    #[test]
    fn the_proxys_ids_are_refused() {
        assert_eq!(decide(&json!({}), &user(OWN), "", ""), Err(Class::OwnUser));
        assert_eq!(decide(&json!({}), &json!({}), "5:65530", ""), Err(Class::OwnUser));
        assert_eq!(decide(&json!({}), &json!({}), "", "65530"), Err(Class::OwnUser));
        let pod = json!({"spec": {"securityContext": {"supplementalGroups": [65530]}}});
        assert_eq!(groups(&pod).unwrap_err().class, Class::OwnUser);
    }

    #[test]
    fn what_is_no_name_is_refused() {
        for image in ["-x", "a b", "x:--groups", "a\nb"] {
            assert_eq!(
                decide(&json!({}), &json!({}), image, ""),
                Err(Class::Malformed),
                "{image:?}"
            );
        }
        let context = json!({"securityContext": {"runAsUser": -1}});
        assert_eq!(decide(&json!({}), &context, "", ""), Err(Class::Malformed));
    }

    #[test]
    fn groups_come_from_the_pod() {
        let pod =
            json!({"spec": {"securityContext": {"fsGroup": 5, "supplementalGroups": [6, 5, 0]}}});
        assert_eq!(groups(&pod).unwrap(), ["5", "6", "0"]);
        assert!(groups(&json!({})).unwrap().is_empty());
    }
}

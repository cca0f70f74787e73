//! Environment of a fenced container: the pod's address first, `OpenShell`'s variables, and URLs of
//! `localhost` that mean a sidecar.

use serde_json::{Value, json};

use super::command::POLICY_DIR;
use super::json::{at, field, text};
use super::shape::OPTIONS;
use super::{Class, IpFamily, PolicyRef, Refusal, Settings};
use crate::policy::SidecarPorts;

const POD_IP: &str = "POD_IP";
const RULES: &str = "OPENSHELL_POLICY_RULES";
const NAMES: &[&str] =
    &["OPENSHELL_ENABLED", RULES, "OPENSHELL_POLICY_DATA", "OPENSHELL_LOG_LEVEL", OPTIONS];

/// Whether a variable is one that the injector sets.
pub(super) fn is_ours(entry: &Value) -> bool {
    text(entry, "name").is_some_and(|name| name == POD_IP || NAMES.contains(&name))
}

/// What a container's variables depend on.
pub(super) struct Variables<'a> {
    pub policy: &'a PolicyRef,
    pub settings: &'a Settings,
    /// Ports of `localhost` that lead to sidecars: URLs with these stay as they are.
    pub ports: &'a SidecarPorts,
    /// The value of [`OPTIONS`], where the container has it.
    pub options: Option<String>,
}

/// Changes the list of a container. Returns names of listed variables that have no literal value.
///
/// # Errors
/// A `POD_IP` that is not the pod's address.
pub(super) fn apply(
    list: &mut Vec<Value>,
    container: &str,
    injected: bool,
    variables: Variables<'_>,
) -> Result<Vec<String>, Refusal> {
    let Variables { policy, settings, ports, options } = variables;
    let unread = rewrite_urls(list, settings, ports);
    pod_ip(list, container, injected)?;
    let mut wanted = vec![json!({"name": "OPENSHELL_ENABLED", "value": "true"})];
    if policy.has("policy.rego") {
        wanted.push(json!({"name": RULES, "value": format!("{POLICY_DIR}/policy.rego")}));
    }
    let data = format!("{POLICY_DIR}/policy.yaml");
    wanted.push(json!({"name": "OPENSHELL_POLICY_DATA", "value": data}));
    let level = settings.log_level.as_str();
    wanted.push(json!({"name": "OPENSHELL_LOG_LEVEL", "value": level}));
    wanted.extend(options.map(|options| json!({"name": OPTIONS, "value": options})));
    super::json::upsert(
        list,
        wanted,
        |entry| text(entry, "name").is_some_and(|name| NAMES.contains(&name)),
        |a, b| text(a, "name") == text(b, "name"),
    );
    Ok(unread)
}

/// `$(POD_IP)` is expanded only from entries before the one that uses it, so ours is the first.
/// Once injected it may stay behind an entry that another webhook put in front and that does not
/// use it: two webhooks that both insist on the first place would never come to rest.
fn pod_ip(list: &mut Vec<Value>, container: &str, injected: bool) -> Result<(), Refusal> {
    let is_pod_ip = |entry: &Value| text(entry, "name") == Some(POD_IP);
    let wanted = json!({
        "name": POD_IP,
        "valueFrom": {"fieldRef": {"apiVersion": "v1", "fieldPath": "status.podIP"}},
    });
    // Lists are long, and nearly all have one or none.
    let places: Vec<usize> = (0..list.len()).filter(|&at| is_pod_ip(&list[at])).collect();
    let Some(&first) = places.first() else {
        list.insert(0, wanted);
        return Ok(());
    };
    for entry in places.iter().map(|&at| &list[at]) {
        let source = at(entry, &["valueFrom", "fieldRef"]);
        let address = source.and_then(|source| text(source, "fieldPath")) == Some("status.podIP");
        let literal = text(entry, "value").is_some_and(|value| !value.is_empty());
        if !address || literal {
            return Err(Refusal::new(
                Class::PodIp,
                format!("container {container} sets POD_IP to something else"),
            ));
        }
    }
    let used = |entry: &Value| text(entry, "value").is_some_and(|v| v.contains("$(POD_IP)"));
    let stays = (injected || first == 0) && !list[..first].iter().any(used);
    if places.len() > usize::from(stays) {
        let mut kept = !stays;
        list.retain(|entry| !is_pod_ip(entry) || !std::mem::replace(&mut kept, true));
    }
    if !stays {
        list.insert(0, wanted);
    } else if list[first] != wanted {
        list[first] = wanted;
    }
    Ok(())
}

/// Rewrites the listed variables, every entry of the same name. A second time nothing changes.
fn rewrite_urls(list: &mut [Value], settings: &Settings, ports: &SidecarPorts) -> Vec<String> {
    // The fence listens for IPv4 there.
    let stays = |_: &str, place: &str, port: &str| {
        !place.starts_with('[') && port.parse().is_ok_and(|port| ports.contains(port))
    };
    let mut unread = Vec::new();
    for entry in list {
        let Some(name) = text(entry, "name") else { continue };
        if !settings.localhost_url_env.iter().any(|listed| listed == name) {
            continue;
        }
        if field(entry, "valueFrom").is_some() {
            unread.push(name.to_owned());
        } else if let Some(value) = text(entry, "value") {
            let rewritten = rewrite(value, settings.ip_family, stays);
            if rewritten != value {
                entry["value"] = json!(rewritten);
            }
        }
    }
    unread
}

/// UPDATE: gives entries the value back that an earlier injection had made of theirs. By the values
/// alone: which variables are rewritten, and how, may have been another setting then, and `env`
/// cannot change any more.
pub(super) fn restore_urls(list: &mut [Value], old: &[Value]) {
    // Which URLs stayed depended on the ports of then: those that are in the old value as they were.
    let stayed = |old: &str, before: &str, place: &str| {
        old.get(before.len()..).is_some_and(|rest| rest.starts_with(place))
    };
    let made_of = |value: &str, old: &str| {
        let stays = |before: &str, place: &str, _: &str| stayed(old, before, place);
        [IpFamily::Ipv4, IpFamily::Ipv6].iter().any(|family| rewrite(value, *family, stays) == old)
    };
    for entry in list {
        let (Some(name), Some(value)) = (text(entry, "name"), text(entry, "value")) else {
            continue;
        };
        let values = || {
            let same = old.iter().filter(|old| text(old, "name") == Some(name));
            same.filter_map(|old| text(old, "value"))
        };
        if values().any(|old| old == value) {
            continue;
        }
        if let Some(old) = values().find(|old| made_of(value, old)) {
            entry["value"] = json!(old);
        }
    }
}

/// Replaces the host of every `http` and `https` URL that names this machine. Works on the text,
/// so a JSON map of URLs keeps its form to the last space.
///
/// `stays` is asked about each, with what was made of the text before it, its host and port, and the
/// port alone.
fn rewrite(value: &str, family: IpFamily, stays: impl Fn(&str, &str, &str) -> bool) -> String {
    let host = match family {
        IpFamily::Ipv4 => "$(POD_IP)",
        IpFamily::Ipv6 => "[$(POD_IP)]",
    };
    let mut out = String::with_capacity(value.len() + 16);
    let mut rest = value;
    while let Some(start) = next_authority(rest) {
        let (before, authority) = rest.split_at(start);
        out.push_str(before);
        let ends = |c: char| c.is_whitespace() || "/\\?#\"',<>".contains(c);
        let (authority, after) =
            authority.split_at(authority.find(ends).unwrap_or(authority.len()));
        let (user, place) = authority.split_at(authority.rfind('@').map_or(0, |at| at + 1));
        out.push_str(user);
        match local_host(place) {
            Some(port) if !stays(&out, place, digits(port)) => {
                out.push_str(host);
                out.push_str(port);
            }
            _ => out.push_str(place),
        }
        rest = after;
    }
    out.push_str(rest);
    out
}

/// Where the next URL's authority begins, with `/` plain or escaped as JSON may have it.
fn next_authority(text: &str) -> Option<usize> {
    let bytes = text.as_bytes();
    let mut from = 0;
    loop {
        let colon = from + text[from..].find(':')?;
        from = colon + 1;
        let slashes = ["//", "\\/\\/"].iter().find(|slashes| text[from..].starts_with(*slashes));
        let scheme = |name: &str| {
            let start = colon.checked_sub(name.len());
            start.is_some_and(|start| bytes[start..colon].eq_ignore_ascii_case(name.as_bytes()))
        };
        if let Some(slashes) = slashes
            && (scheme("http") || scheme("https"))
        {
            return Some(from + slashes.len());
        }
    }
}

/// The port part (with its colon, or empty) of an authority that names this machine.
fn local_host(authority: &str) -> Option<&str> {
    let after = ["localhost", "127.0.0.1", "[::1]"].iter().find_map(|host| {
        let head = authority.get(..host.len())?;
        head.eq_ignore_ascii_case(host).then(|| &authority[host.len()..])
    })?;
    let port = after.strip_prefix(':').map(|port| port.trim_end_matches(['}', ']', ')', ';']));
    let plain = after.trim_end_matches(['}', ']', ')', ';']).is_empty();
    let good = |port: &str| !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit());
    // `localhost:$(PORT)` is a port too, once expanded.
    (plain || port.is_some_and(|port| good(port) || port.starts_with("$("))).then_some(after)
}

/// The digits of what [`local_host`] returns.
fn digits(port: &str) -> &str {
    let port = port.strip_prefix(':').unwrap_or_default();
    &port[..port.find(|c: char| !c.is_ascii_digit()).unwrap_or(port.len())]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn none(_: &str, _: &str, _: &str) -> bool {
        false
    }

    fn v4(value: &str) -> String {
        rewrite(value, IpFamily::Ipv4, none)
    }

    #[test]
    fn urls_of_this_machine_are_rewritten() {
        for (value, expected) in [
            ("http://localhost:8090", "http://$(POD_IP):8090"),
            ("https://127.0.0.1/x?u=http://[::1]:1/", "https://$(POD_IP)/x?u=http://$(POD_IP):1/"),
            ("HTTP://LocalHost", "HTTP://$(POD_IP)"),
            ("http://me:pw@localhost:1/@localhost", "http://me:pw@$(POD_IP):1/@localhost"),
            ("http://localhost:$(PORT)/", "http://$(POD_IP):$(PORT)/"),
            (
                "http://localhost:8090,http://localhost:8091",
                "http://$(POD_IP):8090,http://$(POD_IP):8091",
            ),
            (
                r#"{"a": "http://localhost:8090/mcp", "localhost":"http:\/\/127.0.0.1:1"}"#,
                r#"{"a": "http://$(POD_IP):8090/mcp", "localhost":"http:\/\/$(POD_IP):1"}"#,
            ),
        ] {
            assert_eq!(v4(value), expected);
            assert_eq!(v4(expected), expected);
        }
        assert_eq!(rewrite("http://[::1]:1", IpFamily::Ipv6, none), "http://[$(POD_IP)]:1");
    }

    #[test]
    fn other_urls_stay() {
        for value in [
            "http://localhost.example/",
            "http://localhostx:1",
            "http://127.0.0.10:1",
            "localhost:8090",
            "ftp://localhost/",
            "http://api.example/localhost",
            "http://localhost@evil.example/",
            "",
            "http://ünïcode/",
            "$$(X)",
            "http:",
            "http:/",
            "://localhost",
            "ü://localhost",
            "http://",
        ] {
            assert_eq!(v4(value), value);
        }
    }

    fn run(mut list: Vec<Value>, injected: bool) -> Result<Vec<Value>, Class> {
        let variables = Variables {
            policy: &PolicyRef::default(),
            settings: &Settings::default(),
            ports: &SidecarPorts::default(),
            options: None,
        };
        apply(&mut list, "c", injected, variables).map(|_| list).map_err(|refusal| refusal.class)
    }

    fn ip() -> Value {
        json!({"name": "POD_IP", "valueFrom": {"fieldRef": {"apiVersion": "v1", "fieldPath": "status.podIP"}}})
    }

    fn names(list: &[Value]) -> Vec<&str> {
        list.iter().map(|entry| entry["name"].as_str().unwrap()).collect()
    }

    #[test]
    fn the_address_is_first_and_there_once() {
        let list =
            run(vec![json!({"name": "A", "value": "$(POD_IP)"}), ip(), ip()], false).unwrap();
        assert_eq!(names(&list)[..2], ["POD_IP", "A"]);
        assert_eq!(names(&list).len(), 5);
        assert_eq!(run(list.clone(), true).unwrap(), list);
        let bare =
            json!({"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}});
        assert_eq!(run(vec![bare], false).unwrap()[0], ip());
    }

    #[test]
    fn another_webhooks_entry_in_front_is_no_quarrel() {
        let front = vec![
            json!({"name": "B", "value": "x"}),
            ip(),
            json!({"name": "A", "value": "$(POD_IP)"}),
        ];
        assert_eq!(names(&run(front.clone(), true).unwrap())[..3], ["B", "POD_IP", "A"]);
        assert_eq!(names(&run(front, false).unwrap())[..3], ["POD_IP", "B", "A"]);
        let used = vec![json!({"name": "B", "value": "$(POD_IP)"}), ip()];
        assert_eq!(names(&run(used, true).unwrap())[..2], ["POD_IP", "B"]);
    }

    #[test]
    fn another_meaning_of_the_address_is_refused() {
        for entry in [
            json!({"name": "POD_IP", "value": "10.0.0.1"}),
            json!({"name": "POD_IP", "value": ""}),
            json!({"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.hostIP"}}}),
            json!({"name": "POD_IP", "valueFrom": {"secretKeyRef": {"name": "x", "key": "y"}}}),
        ] {
            assert_eq!(run(vec![ip(), entry], false), Err(Class::PodIp));
        }
    }

    #[test]
    fn our_names_are_ours() {
        let list = vec![
            json!({"name": "OPENSHELL_ENABLED", "value": "false"}),
            json!({"name": "OPENSHELL_POLICY_RULES", "value": "/mine"}),
            json!({"name": "OPENSHELL_ENABLED", "valueFrom": {"x": 1}}),
            json!({"name": "OPENSHELL_ENDPOINT", "value": "theirs"}),
        ];
        let list = run(list, false).unwrap();
        assert_eq!(
            names(&list),
            [
                "POD_IP",
                "OPENSHELL_ENABLED",
                "OPENSHELL_ENDPOINT",
                "OPENSHELL_POLICY_DATA",
                "OPENSHELL_LOG_LEVEL"
            ]
        );
        assert_eq!(list[1]["value"], "true");
    }

    #[test]
    fn duplicates_are_all_rewritten_and_references_reported() {
        let mut list = vec![
            json!({"name": "AMBIENT_MCP_URL", "value": "http://localhost:1"}),
            json!({"name": "OTHER", "value": "http://localhost:1"}),
            json!({"name": "AMBIENT_MCP_URL", "value": "http://localhost:2"}),
            json!({"name": "CREDENTIAL_MCP_URLS", "valueFrom": {"configMapKeyRef": {}}}),
        ];
        let none = SidecarPorts::default();
        assert_eq!(rewrite_urls(&mut list, &Settings::default(), &none), ["CREDENTIAL_MCP_URLS"]);
        assert_eq!(list[0]["value"], "http://$(POD_IP):1");
        assert_eq!(list[1]["value"], "http://localhost:1");
        assert_eq!(list[2]["value"], "http://$(POD_IP):2");
    }

    /// The fence's own loopback leads to the sidecar then, under the policy's `localhost`.
    #[test]
    fn urls_of_sidecar_ports_stay() {
        let ports: SidecarPorts = "8090-8091".parse().unwrap();
        let mut list = vec![json!({"name": "CREDENTIAL_MCP_URLS", "value":
            r#"{"a":"http://localhost:8090/mcp","b":"http://127.0.0.1:8092","c":"http://localhost:8091","d":"http://localhost:$(P)","e":"http://[::1]:8090"}"#})];
        assert!(rewrite_urls(&mut list, &Settings::default(), &ports).is_empty());
        let made = r#"{"a":"http://localhost:8090/mcp","b":"http://$(POD_IP):8092","c":"http://localhost:8091","d":"http://$(POD_IP):$(P)","e":"http://$(POD_IP):8090"}"#;
        assert_eq!(list[0]["value"], made);
        // A manifest that is applied again, when the namespace has other ports or none.
        let old = [json!({"name": "A", "value": "http://localhost:8090,http://$(POD_IP):8092"})];
        let mut new =
            [json!({"name": "A", "value": "http://localhost:8090,http://localhost:8092"})];
        restore_urls(&mut new, &old);
        assert_eq!(new, old);
        let mut other =
            [json!({"name": "A", "value": "http://127.0.0.1:8090,http://localhost:8092"})];
        let before = other.clone();
        restore_urls(&mut other, &old);
        assert_eq!(other, before, "the author's own change is shown to the API server");
    }

    #[test]
    fn an_old_value_comes_back_only_where_it_was_made_of_the_new_one() {
        let old = [
            json!({"name": "A", "value": "http://$(POD_IP):1"}),
            json!({"name": "B", "value": "http://[$(POD_IP)]:2/x"}),
            json!({"name": "C", "value": "http://localhost:3"}),
            json!({"name": "D", "value": "http://$(POD_IP):4"}),
            json!({"name": "E", "valueFrom": {}}),
        ];
        let mut new = [
            json!({"name": "A", "value": "http://localhost:1"}),
            json!({"name": "B", "value": "http://127.0.0.1:2/x"}),
            json!({"name": "C", "value": "http://localhost:3"}),
            json!({"name": "D", "value": "http://localhost:5"}),
            json!({"name": "E", "value": "http://localhost:6"}),
            json!({"name": "F", "value": "http://localhost:7"}),
        ];
        let before = new.clone();
        restore_urls(&mut new, &old);
        assert_eq!(new[..2], old[..2]);
        assert_eq!(new[2..], before[2..]);
    }
}

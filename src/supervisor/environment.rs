//! The agent's environment: the container's own, without what is not the agent's, with the way
//! to the proxy and to its CA.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::identity::User;

/// Names that never reach the agent (OpenShell's `SUPERVISOR_ONLY_ENV_VARS` among them).
const NOT_THE_AGENTS: [&str; 11] = [
    "OPENSHELL_SANDBOX_TOKEN",
    "OPENSHELL_SANDBOX_TOKEN_FILE",
    "OPENSHELL_K8S_SA_TOKEN_FILE",
    "OPENSHELL_TLS_CA",
    "OPENSHELL_TLS_CERT",
    "OPENSHELL_TLS_KEY",
    "OPENSHELL_POLICY_RULES",
    "OPENSHELL_POLICY_DATA",
    "OPENSHELL_ENDPOINT",
    "OPENSHELL_SANDBOX_ID",
    "OPENSHELL_SANDBOX_COMMAND",
];
/// All the spellings that clients read.
const PROXY: [&str; 7] = [
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "ALL_PROXY",
    "http_proxy",
    "https_proxy",
    "all_proxy",
    "grpc_proxy",
];
/// Variables whose file is added to a client's own store.
const ONE_CA: [&str; 2] = ["NODE_EXTRA_CA_CERTS", "DENO_CERT"];
/// Variables whose file replaces a client's own store.
const WHOLE_BUNDLE: [&str; 9] = [
    "SSL_CERT_FILE",
    "REQUESTS_CA_BUNDLE",
    "CURL_CA_BUNDLE",
    "GIT_SSL_CAINFO",
    "PIP_CERT",
    "CARGO_HTTP_CAINFO",
    "AWS_CA_BUNDLE",
    "NPM_CONFIG_CAFILE",
    "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH",
];

/// Where the agent finds the proxy and its CA.
#[derive(Debug)]
pub struct Ways<'a> {
    /// The proxy's URL.
    pub proxy: &'a str,
    /// The sandbox CA alone.
    pub ca: &'a Path,
    /// The sandbox CA with what upstreams are verified against.
    pub bundle: &'a Path,
}

/// Builds the agent's environment from the container's.
pub fn agent(
    container: impl IntoIterator<Item = (OsString, OsString)>,
    user: &User,
    ways: &Ways<'_>,
) -> BTreeMap<OsString, OsString> {
    let mut env: BTreeMap<OsString, OsString> = container
        .into_iter()
        .filter(|(name, _)| !NOT_THE_AGENTS.iter().any(|hidden| name == OsStr::new(hidden)))
        // A name that execve(2) could not carry whole.
        .filter(|(name, _)| !name.is_empty() && !name.as_bytes().contains(&b'='))
        .collect();
    let mut set = |name: &str, value: &OsStr| env.insert(name.into(), value.into());
    set("OPENSHELL_SANDBOX", OsStr::new("1"));
    for name in PROXY {
        set(name, OsStr::new(ways.proxy));
    }
    for name in ["NO_PROXY", "no_proxy"] {
        set(name, OsStr::new("127.0.0.1,localhost,::1"));
    }
    set("NODE_USE_ENV_PROXY", OsStr::new("1"));
    for name in ONE_CA {
        set(name, ways.ca.as_os_str());
    }
    for name in WHOLE_BUNDLE {
        set(name, ways.bundle.as_os_str());
    }
    // The runtime sets HOME for uid 0, which is the supervisor's and not the agent's.
    let roots = env.get(OsStr::new("HOME")).is_none_or(|home| home == "/root" || home.is_empty());
    if roots {
        env.insert("HOME".into(), (&user.home).into());
    }
    if let Some(name) = &user.name {
        for variable in ["USER", "LOGNAME"] {
            if env.contains_key(OsStr::new(variable)) {
                env.insert(variable.into(), name.into());
            }
        }
    }
    env
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fence::credentials::Identity;

    fn build(container: &[(&str, &str)]) -> BTreeMap<OsString, OsString> {
        let user = User {
            identity: Identity { uid: 1000, gid: 1000, groups: vec![] },
            name: Some("agent".into()),
            home: "/home/agent".into(),
            notes: vec![],
        };
        let ways = Ways {
            proxy: "http://10.200.0.1:3128",
            ca: Path::new("/r/ca.pem"),
            bundle: Path::new("/r/b.pem"),
        };
        agent(container.iter().map(|(k, v)| (k.into(), v.into())), &user, &ways)
    }

    fn get<'a>(env: &'a BTreeMap<OsString, OsString>, name: &str) -> Option<&'a str> {
        env.get(OsStr::new(name)).map(|value| value.to_str().unwrap())
    }

    #[test]
    fn the_container_cannot_send_the_agent_round_the_proxy() {
        let env = build(&[("HTTPS_PROXY", "http://elsewhere"), ("NO_PROXY", "*"), ("A", "1")]);
        assert_eq!(get(&env, "HTTPS_PROXY"), Some("http://10.200.0.1:3128"));
        assert_eq!(get(&env, "NO_PROXY"), Some("127.0.0.1,localhost,::1"));
        assert_eq!(get(&env, "A"), Some("1"));
    }

    #[test]
    fn tokens_and_policy_paths_are_not_handed_on() {
        let env = build(&[("OPENSHELL_SANDBOX_TOKEN", "s"), ("OPENSHELL_POLICY_DATA", "/p")]);
        assert_eq!(get(&env, "OPENSHELL_SANDBOX_TOKEN"), None);
        assert_eq!(get(&env, "OPENSHELL_POLICY_DATA"), None);
    }

    #[test]
    fn home_is_the_agents_unless_the_image_says_another() {
        assert_eq!(get(&build(&[("HOME", "/root")]), "HOME"), Some("/home/agent"));
        assert_eq!(get(&build(&[]), "HOME"), Some("/home/agent"));
        assert_eq!(get(&build(&[("HOME", "/srv")]), "HOME"), Some("/srv"));
    }
}

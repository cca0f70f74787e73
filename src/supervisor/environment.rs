//! The agent's environment: the container's own, without what is not the agent's, with the way
//! to the proxy and to its CA.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::identity::User;
use crate::event::{self, Class, Event, Severity};

/// Names that never reach the agent: the supervisor's own settings, and what OpenShell's images and
/// drivers keep for their supervisor (its `SUPERVISOR_ONLY_ENV_VARS` among them), secrets foremost.
const NOT_THE_AGENTS: [&str; 22] = [
    "OPENSHELL_ENDPOINT",
    "OPENSHELL_INFERENCE_ROUTES",
    "OPENSHELL_K8S_SA_TOKEN_FILE",
    "OPENSHELL_MAIN_PROCESS_SPEC",
    "OPENSHELL_NETWORK_RUNTIME_CAPABILITIES",
    "OPENSHELL_OCI_IMAGE_USER",
    "OPENSHELL_POLICY_DATA",
    "OPENSHELL_POLICY_RULES",
    "OPENSHELL_PROVIDER_SPIFFE_WORKLOAD_API_SOCKET",
    "OPENSHELL_REQUIRE_RUNTIME_PID_LIMIT",
    "OPENSHELL_SANDBOX_COMMAND",
    "OPENSHELL_SANDBOX_GID",
    "OPENSHELL_SANDBOX_ID",
    "OPENSHELL_SANDBOX_TOKEN",
    "OPENSHELL_SANDBOX_TOKEN_FILE",
    "OPENSHELL_SANDBOX_UID",
    "OPENSHELL_SSH_HANDSHAKE_SECRET",
    "OPENSHELL_SSH_SOCKET_PATH",
    "OPENSHELL_TLS_CA",
    "OPENSHELL_TLS_CERT",
    "OPENSHELL_TLS_KEY",
    "OPENSHELL_USER_ENVIRONMENT",
];
/// Names that make programs load or run code that is not theirs, and that no image needs to work.
/// An agent can set them for what it starts; none is to come from outside unseen. The like that
/// images do need (`LD_LIBRARY_PATH`, `NODE_OPTIONS`, `PYTHONPATH`) stay.
const FOREIGN_CODE: [&str; 12] = [
    "BASH_ENV",
    "BUN_OPTIONS",
    "GLIBC_TUNABLES",
    "LD_AUDIT",
    "LD_DEBUG",
    "LD_DEBUG_OUTPUT",
    "LD_DYNAMIC_WEAK",
    "LD_ORIGIN_PATH",
    "LD_PRELOAD",
    "LD_PROFILE",
    "LD_SHOW_AUXV",
    "PYTHONSTARTUP",
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
    let (foreign, mut env): (BTreeMap<OsString, OsString>, BTreeMap<OsString, OsString>) =
        container
            .into_iter()
            .filter(|(name, _)| !is_one_of(name, &NOT_THE_AGENTS))
            // A name that execve(2) could not carry whole.
            .filter(|(name, _)| !name.is_empty() && !name.as_bytes().contains(&b'='))
            .partition(|(name, _)| is_one_of(name, &FOREIGN_CODE));
    if !foreign.is_empty() {
        let names: Vec<_> = foreign.keys().map(|name| name.to_string_lossy()).collect();
        event::emit(
            &Event::new(Class::Config, "DEGRADED", Severity::Low)
                .subject(format!("left out of the agent's environment: {}", names.join(" "))),
        );
    }
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

fn is_one_of(name: &OsStr, names: &[&str]) -> bool {
    names.iter().any(|known| name == OsStr::new(known))
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
    fn the_agent_gets_what_openshells_would() {
        let env = build(&[]);
        for (value, names) in [
            (
                "http://10.200.0.1:3128",
                "HTTP_PROXY HTTPS_PROXY ALL_PROXY http_proxy https_proxy all_proxy grpc_proxy",
            ),
            ("127.0.0.1,localhost,::1", "NO_PROXY no_proxy"),
            ("1", "OPENSHELL_SANDBOX NODE_USE_ENV_PROXY"),
            ("/r/ca.pem", "NODE_EXTRA_CA_CERTS DENO_CERT"),
            ("/r/b.pem", "SSL_CERT_FILE REQUESTS_CA_BUNDLE CURL_CA_BUNDLE GIT_SSL_CAINFO"),
            ("/r/b.pem", "CARGO_HTTP_CAINFO AWS_CA_BUNDLE PIP_CERT"),
        ] {
            for name in names.split(' ') {
                assert_eq!(get(&env, name), Some(value), "{name}");
            }
        }
    }

    #[test]
    fn foreign_code_does_not_come_along() {
        let env = build(&[("LD_PRELOAD", "/x.so"), ("BASH_ENV", "/x"), ("PYTHONPATH", "/app")]);
        assert_eq!((get(&env, "LD_PRELOAD"), get(&env, "BASH_ENV")), (None, None));
        assert_eq!(get(&env, "PYTHONPATH"), Some("/app"));
    }

    #[test]
    fn home_is_the_agents_unless_the_image_says_another() {
        assert_eq!(get(&build(&[("HOME", "/root")]), "HOME"), Some("/home/agent"));
        assert_eq!(get(&build(&[]), "HOME"), Some("/home/agent"));
        assert_eq!(get(&build(&[("HOME", "/srv")]), "HOME"), Some("/srv"));
    }
}

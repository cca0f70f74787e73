//! The agent's environment: the container's own, without what is not the agent's, with the way
//! to the proxy and to its CA.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::agent_files::AgentFiles;
use super::identity::User;
use crate::event::{self, Class, Event, Severity};

/// Names that never reach the agent: the supervisor's own settings, and what OpenShell's images and
/// drivers keep for their supervisor (its `SUPERVISOR_ONLY_ENV_VARS` among them), secrets foremost.
const NOT_THE_AGENTS: [&str; 23] = [
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
    super::openshell::OPTIONS,
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

/// Single clients' own variables for a bundle, which go before the ones above. Ours where the image
/// has one: the bundle that it names does not have the sandbox CA.
const OWN_BUNDLE: [&str; 11] = [
    "BUNDLE_SSL_CA_CERT",
    "CLOUDSDK_CORE_CUSTOM_CA_CERTS_FILE",
    "CONDA_SSL_VERIFY",
    "HEX_CACERTS_PATH",
    "HTTPLIB2_CA_CERTS",
    "HTTPS_CA_FILE",
    "JULIA_SSL_CA_ROOTS_PATH",
    "NIX_SSL_CERT_FILE",
    "PERL_LWP_SSL_CA_FILE",
    "WEBSOCKET_CLIENT_CA_BUNDLE",
    "YARN_HTTPS_CA_FILE_PATH",
];
/// Single clients' own variables for a proxy, which go before those of all. They are taken away: in
/// the fence there is no other proxy.
const OWN_PROXY: [&str; 7] = [
    "CARGO_HTTP_PROXY",
    "GLOBAL_AGENT_HTTPS_PROXY",
    "GLOBAL_AGENT_HTTP_PROXY",
    "GLOBAL_AGENT_NO_PROXY",
    "PIP_PROXY",
    "YARN_HTTPS_PROXY",
    "YARN_HTTP_PROXY",
];
/// How npm's settings begin as variables, and those that would go before ours: npm knows no case
/// and takes `-` for `_`.
const NPM: &str = "npm_config_";
const NPM_OWN: [&str; 6] = ["ca", "cafile", "http_proxy", "https_proxy", "noproxy", "proxy"];
/// Java's options. The first is every Java's and always set; each of the others goes before it, and
/// gets the same where it names a trust store.
const JAVA: [&str; 3] = ["JAVA_TOOL_OPTIONS", "JDK_JAVA_OPTIONS", "_JAVA_OPTIONS"];
const JAVA_STORE: &str = "-Djavax.net.ssl.trustStore";

/// Where the agent finds the proxy and the sandbox CA.
#[derive(Debug)]
pub struct Ways<'a> {
    /// The proxy's URL.
    pub proxy: &'a str,
    /// What trusts the sandbox CA.
    pub files: &'a AgentFiles,
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
    env.retain(|name, _| !is_one_of(name, &OWN_PROXY) && !is_npms_own(name));
    let overridden: Vec<_> =
        env.keys().filter(|name| is_one_of(name, &OWN_BUNDLE)).cloned().collect();
    let mut set = |name: &str, value: &OsStr| env.insert(name.into(), value.into());
    set("OPENSHELL_SANDBOX", OsStr::new("1"));
    for name in PROXY {
        set(name, OsStr::new(ways.proxy));
    }
    for name in ["NO_PROXY", "no_proxy"] {
        set(name, OsStr::new("127.0.0.1,localhost,::1"));
    }
    set("NODE_USE_ENV_PROXY", OsStr::new("1"));
    let files = ways.files;
    for name in ONE_CA {
        set(name, files.ca.as_os_str());
    }
    for name in WHOLE_BUNDLE {
        set(name, files.bundle.as_os_str());
    }
    // In the place of /etc/wgetrc: the agent's own file and the image's WGETRC still count.
    for name in ["SYSTEM_WGETRC", "SYSTEM_WGET2RC"] {
        set(name, files.wgetrc.as_os_str());
    }
    set("APT_CONFIG", files.apt.as_os_str());
    for name in overridden {
        env.insert(name, files.bundle.clone().into());
    }
    for name in JAVA.map(OsStr::new) {
        let own = env.get(name).map(OsString::as_os_str);
        if let Some(options) = java_options(own, name == JAVA[0], &files.java) {
            env.insert(name.into(), options);
        }
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

/// The options with our trust store, the last of which counts; `None` where they stay as they are.
fn java_options(own: Option<&OsStr>, always: bool, store: &Path) -> Option<OsString> {
    let mut options = own.unwrap_or_default().to_owned();
    let names_another = memchr::memmem::find(options.as_bytes(), JAVA_STORE.as_bytes()).is_some();
    if !always && !names_another {
        return None;
    }
    if !options.is_empty() {
        options.push(" ");
    }
    options.push(format!("{JAVA_STORE}="));
    options.push(store);
    if names_another {
        // Theirs would be tried on ours.
        options.push(format!(" {JAVA_STORE}Password=changeit {JAVA_STORE}Type=JKS"));
    }
    Some(options)
}

fn is_npms_own(name: &OsStr) -> bool {
    let name = name.to_string_lossy().to_ascii_lowercase().replace('-', "_");
    name.strip_prefix(NPM).is_some_and(|setting| NPM_OWN.contains(&setting))
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
        let files = AgentFiles::new(Path::new("/r"));
        let ways = Ways { proxy: "http://10.200.0.1:3128", files: &files };
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
            ("/r/ca-bundle.pem", "SSL_CERT_FILE REQUESTS_CA_BUNDLE CURL_CA_BUNDLE GIT_SSL_CAINFO"),
            ("/r/ca-bundle.pem", "CARGO_HTTP_CAINFO AWS_CA_BUNDLE PIP_CERT NPM_CONFIG_CAFILE"),
            ("/r/ca-bundle.pem", "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH"),
            ("/r/wgetrc", "SYSTEM_WGETRC SYSTEM_WGET2RC"),
            ("/r/apt.conf", "APT_CONFIG"),
            ("-Djavax.net.ssl.trustStore=/r/java.jks", "JAVA_TOOL_OPTIONS"),
        ] {
            for name in names.split(' ') {
                assert_eq!(get(&env, name), Some(value), "{name}");
            }
        }
    }

    #[test]
    fn what_a_single_client_goes_by_first_does_not_lead_elsewhere() {
        let env = build(&[
            ("npm_config_cafile", "/other.pem"),
            ("npm_config_CA", "-----BEGIN"),
            ("NPM_CONFIG_HTTPS-PROXY", "http://elsewhere"),
            ("npm_config_registry", "https://npm.test"),
            ("PIP_PROXY", "http://elsewhere"),
            ("CARGO_HTTP_PROXY", "http://elsewhere"),
            ("HTTPLIB2_CA_CERTS", "/other.pem"),
            ("SSL_CERT_DIR", "/certs"),
            ("WGETRC", "/own"),
        ]);
        for gone in [
            "npm_config_cafile",
            "npm_config_CA",
            "NPM_CONFIG_HTTPS-PROXY",
            "PIP_PROXY",
            "CARGO_HTTP_PROXY",
            "NIX_SSL_CERT_FILE",
        ] {
            assert_eq!(get(&env, gone), None, "{gone}");
        }
        for (name, value) in [
            ("NPM_CONFIG_CAFILE", "/r/ca-bundle.pem"),
            ("npm_config_registry", "https://npm.test"),
            ("HTTPLIB2_CA_CERTS", "/r/ca-bundle.pem"),
            // More places to trust, in which ours is not missed; other settings.
            ("SSL_CERT_DIR", "/certs"),
            ("WGETRC", "/own"),
        ] {
            assert_eq!(get(&env, name), Some(value), "{name}");
        }
    }

    #[test]
    fn javas_own_options_stay_and_ours_come_last() {
        const OURS: &str = "-Djavax.net.ssl.trustStore=/r/java.jks";
        let env = build(&[("JAVA_TOOL_OPTIONS", "-Xmx1g"), ("JDK_JAVA_OPTIONS", "-Xss1m")]);
        assert_eq!(get(&env, "JAVA_TOOL_OPTIONS"), Some(&*format!("-Xmx1g {OURS}")));
        assert_eq!(get(&env, "JDK_JAVA_OPTIONS"), Some("-Xss1m"));
        assert_eq!(get(&env, "_JAVA_OPTIONS"), None);
        let theirs = "-Djavax.net.ssl.trustStore=/x -Djavax.net.ssl.trustStorePassword=y";
        let env = build(&[("_JAVA_OPTIONS", theirs)]);
        let both = format!(
            "{theirs} {OURS} -Djavax.net.ssl.trustStorePassword=changeit \
             -Djavax.net.ssl.trustStoreType=JKS"
        );
        assert_eq!(get(&env, "_JAVA_OPTIONS"), Some(&*both));
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

//! Variables that make a program run code which it does not name itself: the loader's, and the
//! runtimes' own.
//!
//! What no image needs to work ([`environment`](super::environment) lists it) is taken from the
//! agent's environment. The rest stays: it comes from the image and the pod's author, who also
//! write the agent's command, and images set it with reason (a library path for a GPU, heap sizes
//! for node or Java). Taking it away would guard against nobody: the agent can set each anew for
//! what it starts. So those are named in the attestation, and a binary that must run no other code
//! than its own is one for the policy's `tainted: refuse`.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;

/// How names begin: the loader's, functions that bash imports, .NET's profilers, Lua's first script
/// and its places of modules (each also with a version behind it).
const PREFIXES: [&str; 7] =
    ["LD_", "BASH_FUNC_", "CORECLR_PROFILER", "COR_PROFILER", "LUA_INIT", "LUA_PATH", "LUA_CPATH"];

/// npm reads its settings in capitals as well.
const NPM: &str = "npm_config_node_options";

/// Whole names.
const NAMES: [&str; 58] = [
    "BASH_ENV",
    "BUN_OPTIONS",
    "CLASSPATH",
    "CORECLR_ENABLE_PROFILING",
    "COR_ENABLE_PROFILING",
    "DENO_V8_FLAGS",
    "DOTNET_STARTUP_HOOKS",
    "ELECTRON_RUN_AS_NODE",
    "ENV",
    "GCONV_PATH",
    "GEM_HOME",
    "GEM_PATH",
    "GIT_ASKPASS",
    "GIT_CONFIG",
    "GIT_CONFIG_COUNT",
    "GIT_CONFIG_GLOBAL",
    "GIT_CONFIG_PARAMETERS",
    "GIT_CONFIG_SYSTEM",
    "GIT_EDITOR",
    "GIT_EXEC_PATH",
    "GIT_EXTERNAL_DIFF",
    "GIT_PAGER",
    "GIT_PROXY_COMMAND",
    "GIT_SEQUENCE_EDITOR",
    "GIT_SSH",
    "GIT_SSH_COMMAND",
    "GIT_TEMPLATE_DIR",
    "GLIBC_TUNABLES",
    "JAVA_TOOL_OPTIONS",
    "JDK_JAVA_OPTIONS",
    "LESSCLOSE",
    "LESSOPEN",
    "NODE_OPTIONS",
    "NODE_PATH",
    "OPENSSL_CONF",
    "OPENSSL_ENGINES",
    "OPENSSL_MODULES",
    "PERL5DB",
    "PERL5LIB",
    "PERL5OPT",
    "PERLLIB",
    "PHPRC",
    "PHP_INI_SCAN_DIR",
    "PYTHONBREAKPOINT",
    "PYTHONEXECUTABLE",
    "PYTHONHOME",
    "PYTHONINSPECT",
    "PYTHONPATH",
    "PYTHONPLATLIBDIR",
    "PYTHONPYCACHEPREFIX",
    "PYTHONSTARTUP",
    "PYTHONUSERBASE",
    "PYTHONWARNINGS",
    "RUBYLIB",
    "RUBYOPT",
    "SSH_ASKPASS",
    "ZDOTDIR",
    "_JAVA_OPTIONS",
];

/// Whether a variable of this name makes programs run other code.
#[must_use]
pub fn steers(name: &OsStr) -> bool {
    let bytes = name.as_bytes();
    PREFIXES.iter().any(|prefix| bytes.starts_with(prefix.as_bytes()))
        || NAMES.iter().any(|known| known.as_bytes() == bytes)
        || NPM.as_bytes().eq_ignore_ascii_case(bytes)
}

/// The names among the agent's environment that the container brought along, sorted; what is not
/// printable is shown with marks. The rest of them is ours.
#[must_use]
pub fn names(
    environment: &BTreeMap<OsString, OsString>,
    container: impl IntoIterator<Item = (OsString, OsString)>,
) -> Vec<String> {
    let names = container.into_iter().map(|(name, _)| name);
    let names = names.filter(|name| steers(name) && environment.contains_key(name));
    let sorted: BTreeSet<_> = names.map(|name| name.to_string_lossy().into_owned()).collect();
    sorted.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_runs_other_code_is_told_from_what_does_not() {
        for name in [
            "LD_PRELOAD",
            "LD_AUDIT",
            "LD_LIBRARY_PATH",
            "GLIBC_TUNABLES",
            "NODE_OPTIONS",
            "BUN_OPTIONS",
            "PYTHONPATH",
            "PYTHONSTARTUP",
            "PYTHONHOME",
            "JAVA_TOOL_OPTIONS",
            "BASH_ENV",
            "GIT_SSH_COMMAND",
            "GIT_PROXY_COMMAND",
            "PERL5OPT",
            "ELECTRON_RUN_AS_NODE",
            "BASH_FUNC_git%%",
            "CORECLR_ENABLE_PROFILING",
            "CORECLR_PROFILER_PATH_64",
            "COR_ENABLE_PROFILING",
            "COR_PROFILER",
            "LUA_INIT",
            "LUA_INIT_5_4",
            "LUA_CPATH_5_4",
            "GEM_HOME",
            "GEM_PATH",
            "GIT_SEQUENCE_EDITOR",
            "LESSOPEN",
            "LESSCLOSE",
            "npm_config_node_options",
            "NPM_CONFIG_NODE_OPTIONS",
            "npm_config_Node_Options",
        ] {
            assert!(steers(OsStr::new(name)), "{name}");
        }
        for name in [
            "PATH",
            "HOME",
            "PYTHONUNBUFFERED",
            "PYTHON_VERSION",
            "GIT_SSL_CAINFO",
            "GIT_AUTHOR_NAME",
            "LDAP",
            "BASH_VERSION",
            "CORECLR",
            "COR_OTHER",
            "LUA",
            "LESS",
            "npm_config_registry",
            "node_options",
            "",
        ] {
            assert!(!steers(OsStr::new(name)), "{name}");
        }
    }

    #[test]
    fn names_are_sorted_and_without_values() {
        let container = [("PATH", "/bin"), ("NODE_OPTIONS", "-r x"), ("LD_LIBRARY_PATH", "/s")]
            .map(|(name, value)| (OsString::from(name), OsString::from(value)));
        let mut environment = BTreeMap::from(container.clone());
        environment.insert("JAVA_TOOL_OPTIONS".into(), "ours".into());
        assert_eq!(names(&environment, container.clone()), ["LD_LIBRARY_PATH", "NODE_OPTIONS"]);
        environment.remove(OsStr::new("NODE_OPTIONS"));
        assert_eq!(names(&environment, container), ["LD_LIBRARY_PATH"]);
    }
}

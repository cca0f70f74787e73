//! Called as `openshell-sandbox`: the command line of OpenShell v0.0.56 in file mode.
//!
//! A wrapper script that starts that program starts this one instead and sees the same flags,
//! variables, defaults and exit codes. What file mode does not have (a gateway's policy, its SSH
//! server, `inference.local`) is refused by name: an agent that starts without what its operator
//! asked for is worse than one that does not start.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use clap::Parser;

use super::args::RunArgs;
use super::{failure, install, run};
use crate::event::Level;

/// The name by which this program is that one.
pub const NAME: &str = "openshell-sandbox";
/// Flags of our own for a supervisor that is called by that name, a JSON list of words: its command
/// line has none of them, and is not ours to write. The injector sets the variable; whoever starts
/// the program could as well start it by its own name.
pub const OPTIONS: &str = "RINGFENCE_OPTIONS";
/// What that program ends with when it could not build its sandbox. Ours is 125, which says more,
/// but what calls it by its own name knows 1.
const FAILED: u8 = 1;
/// Run when neither the command line nor the environment names a command.
const DEFAULT_COMMAND: &str = "/bin/bash";

/// The flags of v0.0.56. Variables are read in [`Args::into_run`].
#[derive(Debug, Parser)]
#[command(name = NAME, version, about = "Runs a command inside the fence that a policy describes.")]
struct Args {
    /// The command and its arguments; also without `--` before it. Default:
    /// `OPENSHELL_SANDBOX_COMMAND` split at blanks, else /bin/bash.
    #[arg(trailing_var_arg = true, value_name = "COMMAND")]
    command: Vec<String>,
    /// The agent's working directory (default: this process's).
    #[arg(short = 'w', long, value_name = "DIR")]
    workdir: Option<PathBuf>,
    /// Seconds after which the agent is ended; 0: never.
    #[arg(short = 't', long, default_value_t = 0, value_name = "SECONDS")]
    timeout: u64,
    /// The policy's Rego text.
    #[arg(long, value_name = "FILE")]
    policy_rules: Option<PathBuf>,
    /// The policy's data, YAML.
    #[arg(long, value_name = "FILE")]
    policy_data: Option<PathBuf>,
    /// What is written to stderr; `RUST_LOG` outranks it. Denials always are.
    #[arg(long, value_name = "LEVEL")]
    log_level: Option<String>,
    #[command(flatten)]
    inert: Inert,
    /// Gateway mode, which this program does not serve.
    #[arg(long, value_name = "ID")]
    sandbox_id: Option<String>,
    /// Gateway mode, which this program does not serve.
    #[arg(long, value_name = "NAME")]
    sandbox: Option<String>,
    /// Gateway mode, which this program does not serve.
    #[arg(long, value_name = "URL")]
    openshell_endpoint: Option<String>,
    /// Not served: routes of inference.local.
    #[arg(long, value_name = "FILE")]
    inference_routes: Option<PathBuf>,
    /// Not served: the SSH server's socket.
    #[arg(long, value_name = "PATH")]
    ssh_socket_path: Option<PathBuf>,
}

/// Flags that v0.0.56 reads and that change nothing, there or here.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Inert {
    /// Accepted. The agent always has a session of its own, with the terminal where there is one.
    #[arg(short = 'i', long, hide = true)]
    pub interactive: bool,
    /// Accepted, as in OpenShell v0.0.56, without effect.
    #[arg(long, hide = true)]
    pub health_check: bool,
    /// Accepted, as in OpenShell v0.0.56, without effect.
    #[arg(long, default_value_t = 8080, hide = true, value_name = "PORT")]
    pub health_port: u16,
}

/// Whether argv\[0\] says that this program is to behave as `openshell-sandbox`.
#[must_use]
pub fn is_called(program: Option<&OsStr>) -> bool {
    program.and_then(|path| Path::new(path).file_name()) == Some(OsStr::new(NAME))
}

/// Reads the command line as the program does, for tests of other modules.
#[cfg(test)]
pub(super) fn parse(
    argv: Vec<OsString>,
    lookup: impl Fn(&str) -> Option<String>,
) -> Result<RunArgs, String> {
    let args = Args::try_parse_from(argv).map_err(|error| error.to_string())?;
    args.into_run(lookup)
}

/// The program's `main`; returns the exit code.
#[must_use]
pub fn main(argv: Vec<OsString>) -> u8 {
    // Both verbs are looked for before the flags are read, so no command can have their names.
    match argv.get(1).and_then(|word| word.to_str()) {
        Some("copy-self") => return copy_self(argv.get(2)),
        Some("debug-rpc") => {
            return refuse("debug-rpc asks a gateway: this version serves file mode only");
        }
        _ => {}
    }
    let args = match Args::try_parse_from(argv) {
        Ok(args) => args,
        Err(error) => {
            drop(error.print());
            // 2 for a wrong command line, 0 for --help.
            return u8::try_from(error.exit_code()).unwrap_or(FAILED);
        }
    };
    let run = match args.into_run(|name| std::env::var(name).ok()) {
        Ok(args) => run::run(args).inspect_err(failure::tell),
        Err(reason) => return refuse(&reason),
    };
    run.map_or(FAILED, |code| u8::try_from(code).unwrap_or(u8::MAX))
}

fn refuse(reason: &str) -> u8 {
    failure::tell(&anyhow::Error::msg(reason.to_owned()));
    FAILED
}

fn copy_self(destination: Option<&OsString>) -> u8 {
    let copied = match destination {
        Some(path) => install::copy_self(Path::new(path)),
        None => Err(anyhow::Error::msg("copy-self needs a destination")),
    };
    match copied {
        Ok(_) => 0,
        Err(error) => {
            eprintln!("{NAME}: {error:#}");
            FAILED
        }
    }
}

impl Args {
    /// The same run in this program's own terms.
    fn into_run(self, lookup: impl Fn(&str) -> Option<String>) -> Result<RunArgs, String> {
        let set = |name: &str| lookup(name).filter(|value| !value.is_empty());
        let rules = self.policy_rules.or_else(|| set("OPENSHELL_POLICY_RULES").map(Into::into));
        let data = self.policy_data.or_else(|| set("OPENSHELL_POLICY_DATA").map(Into::into));
        // Both files: file mode, whatever else is said. A policy.yaml alone will do here as well.
        if !(rules.is_some() && data.is_some()) {
            for (flag, given, variable) in [
                ("--sandbox-id", self.sandbox_id.is_some(), "OPENSHELL_SANDBOX_ID"),
                ("--sandbox", self.sandbox.is_some(), "OPENSHELL_SANDBOX"),
                ("--openshell-endpoint", self.openshell_endpoint.is_some(), "OPENSHELL_ENDPOINT"),
            ] {
                // A fence inside a fence sees OPENSHELL_SANDBOX=1, which asks for nothing.
                let in_env = set(variable).is_some_and(|value| value != "1");
                if given || in_env {
                    return Err(format!(
                        "{flag} ({variable}) asks for a gateway's policy: this version serves \
                         file mode only; give --policy-rules and --policy-data"
                    ));
                }
            }
        }
        for (flag, given, variable) in [
            ("--inference-routes", self.inference_routes.is_some(), "OPENSHELL_INFERENCE_ROUTES"),
            ("--ssh-socket-path", self.ssh_socket_path.is_some(), "OPENSHELL_SSH_SOCKET_PATH"),
        ] {
            if given || set(variable).is_some() {
                return Err(format!(
                    "{flag} ({variable}) is not served by this version: leave it out"
                ));
            }
        }
        let mut command = self.command;
        if command.is_empty()
            && let Some(words) = set("OPENSHELL_SANDBOX_COMMAND")
        {
            command = words.split_whitespace().map(str::to_owned).collect();
        }
        if command.is_empty() {
            command = vec![DEFAULT_COMMAND.to_owned()];
        }
        let level = [set("RUST_LOG"), self.log_level, set("OPENSHELL_LOG_LEVEL")]
            .iter()
            .flatten()
            .find_map(|filter| level_of(filter));
        let own = options(set(OPTIONS))?;
        Ok(RunArgs {
            policy_rules: rules,
            policy_data: data,
            workdir: self.workdir,
            timeout: self.timeout,
            log_level: Some(level.unwrap_or_default()),
            command,
            ..own
        })
    }
}

/// Our own flags as the variable has them; the defaults are written once, where the flags are.
///
/// What is that program's, or would start another command, is not for here.
fn options(value: Option<String>) -> Result<RunArgs, String> {
    let wrong = |why: &dyn std::fmt::Display| format!("{OPTIONS}: {why}");
    let words: Vec<String> = match value {
        Some(value) => serde_json::from_str(&value)
            .map_err(|error| wrong(&format_args!("it is not a JSON list of words: {error}")))?,
        None => Vec::new(),
    };
    let own = RunArgs::try_parse_from([NAME.to_owned()].into_iter().chain(words))
        .map_err(|error| wrong(&error.to_string().trim_end()))?;
    if !own.command.is_empty() || own.policy_data.is_some() || own.policy_rules.is_some() {
        return Err(wrong(&"the command and the policy come by the command line"));
    }
    Ok(own)
}

/// The modules of that program whose events we have: its own, and the target of its OCSF lines.
const TARGETS: [&str; 2] = ["openshell_sandbox", "ocsf"];

/// What a filter of the form `level` or `target=level,…` (`RUST_LOG`) says of our events; `None`
/// where it is empty. As there the longest target that fits counts, and a word that is no level
/// is a target.
fn level_of(filter: &str) -> Option<Level> {
    let mut found: Option<(usize, Level)> = None;
    let mut any = false;
    for directive in filter.split(',').map(str::trim).filter(|directive| !directive.is_empty()) {
        any = true;
        let (target, level) = match directive.split_once('=') {
            Some((target, word)) => (target, level_word(word).unwrap_or_default()),
            None => match level_word(directive) {
                Some(level) => ("", level),
                None => (directive, Level::Trace),
            },
        };
        let fits = TARGETS.iter().any(|ours| ours.starts_with(target));
        if fits && found.is_none_or(|(length, _)| target.len() >= length) {
            found = Some((target.len(), level));
        }
    }
    // A filter that speaks of others only leaves errors.
    any.then(|| found.map_or(Level::Error, |(_, level)| level))
}

fn level_word(word: &str) -> Option<Level> {
    match word {
        // Nothing below denials can be switched off.
        "0" | "1" => Some(Level::Error),
        "2" => Some(Level::Warn),
        "3" => Some(Level::Info),
        "4" => Some(Level::Debug),
        "5" => Some(Level::Trace),
        word if word.eq_ignore_ascii_case("off") => Some(Level::Error),
        word => word.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run_with(words: &[&str], env: &[(&str, &str)]) -> Result<RunArgs, String> {
        let argv = [&[NAME], words].concat().iter().map(OsString::from).collect();
        parse(argv, |name| {
            env.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
        })
    }

    const FILES: [&str; 4] = ["--policy-rules", "/r", "--policy-data", "/d"];

    #[test]
    fn it_is_called_by_its_file_name() {
        for (program, yes) in [
            (Some("openshell-sandbox"), true),
            (Some("/openshell-sandbox"), true),
            (Some("bin/openshell-sandbox"), true),
            (Some("/openshell-sandbox/x"), false),
            (Some("ringfence-supervisor"), false),
            (Some(""), false),
            (None, false),
        ] {
            assert_eq!(is_called(program.map(OsStr::new)), yes, "{program:?}");
        }
    }

    #[test]
    fn a_command_needs_no_dashes_and_keeps_its_own() {
        for words in [&["sh", "-c", "--help"][..], &["--", "sh", "-c", "--help"]] {
            let run =
                run_with(&[&FILES[..], &["-w", "/srv", "-t", "9", "-i"], words].concat(), &[]);
            let run = run.unwrap();
            assert_eq!(run.command, ["sh", "-c", "--help"]);
            assert_eq!((run.workdir, run.timeout), (Some("/srv".into()), 9));
            assert_eq!(run.policy_rules, Some("/r".into()));
        }
    }

    #[test]
    fn the_command_has_two_defaults() {
        let env = [("OPENSHELL_SANDBOX_COMMAND", "sleep  7")];
        assert_eq!(run_with(&FILES, &env).unwrap().command, ["sleep", "7"]);
        assert_eq!(run_with(&FILES, &[]).unwrap().command, ["/bin/bash"]);
        assert_eq!(run_with(&[&FILES[..], &["id"]].concat(), &env).unwrap().command, ["id"]);
    }

    #[test]
    fn file_mode_outranks_a_gateway_and_nothing_else_does() {
        let gateway = ["--sandbox-id", "x", "--openshell-endpoint", "http://h"];
        assert!(run_with(&[&FILES[..], &gateway].concat(), &[]).is_ok());
        for words in [&gateway[..], &["--policy-data", "/d", "--sandbox", "s"]] {
            let error = run_with(words, &[]).unwrap_err();
            assert!(error.contains("file mode only"), "{error}");
        }
        let error = run_with(&[], &[("OPENSHELL_ENDPOINT", "http://h")]).unwrap_err();
        assert!(error.contains("OPENSHELL_ENDPOINT"), "{error}");
        assert!(run_with(&["--policy-data", "/d"], &[("OPENSHELL_SANDBOX", "1")]).is_ok());
        for words in [["--inference-routes", "/x"], ["--ssh-socket-path", "/x"]] {
            let error = run_with(&[&FILES[..], &words].concat(), &[]).unwrap_err();
            assert!(error.starts_with(words[0]), "{error}");
        }
        assert!(run_with(&FILES, &[("OPENSHELL_SSH_SOCKET_PATH", "/x")]).is_err());
    }

    #[test]
    fn flags_without_effect_and_variables_without_meaning_are_accepted() {
        let words = [&FILES[..], &["--health-check", "--health-port", "9"]].concat();
        let env = [
            ("OPENSHELL_CONTAINER_IMAGE", "x"),
            ("OPENSHELL_ROUTE_REFRESH_INTERVAL_SECS", "x"),
            ("OPENSHELL_TELEMETRY_ENABLED", "x"),
            ("OPENSHELL_SANDBOX_TOKEN", "x"),
        ];
        assert!(run_with(&words, &env).is_ok());
        assert!(run_with(&["--health-port", "x"], &[]).is_err());
        assert!(run_with(&["--no-such-flag"], &[]).is_err());
    }

    #[test]
    fn our_own_flags_come_by_a_variable() {
        let with = |value: &str| run_with(&[&FILES[..], &["id"]].concat(), &[(OPTIONS, value)]);
        let run = with(
            r#"["--upstream-ca","/c","--run-as","7","--groups","5,6","--inbound","none","--volume-read-write","/d x","--sidecar-ports","8090"]"#,
        );
        let run = run.unwrap();
        assert_eq!((run.upstream_ca, run.run_as), (Some("/c".into()), Some("7".into())));
        assert_eq!((run.groups, run.inbound), (vec![5, 6], crate::supervisor::args::Inbound::None));
        assert_eq!(run.volume_read_write, [PathBuf::from("/d x")]);
        assert_eq!(
            (run.sidecar_ports.to_string(), run.command),
            ("8090".into(), vec!["id".into()])
        );
        assert_eq!(run.policy_data, Some("/d".into()));
        assert!(with("").is_ok() && with("[]").is_ok());
        for bad in [
            "--inbound none",
            "{}",
            r#"["--no-such-flag"]"#,
            r#"["--sidecar-ports","80"]"#,
            r#"["--policy-data","/other"]"#,
            r#"["--","sh"]"#,
            r#"["--help"]"#,
        ] {
            let error = with(bad).unwrap_err();
            assert!(error.starts_with(OPTIONS), "{bad}: {error}");
        }
    }

    #[test]
    fn rust_log_outranks_the_flag_and_the_flag_the_variable() {
        let level = |words: &[&str], env: &[(&str, &str)]| {
            run_with(&[&FILES[..], words].concat(), env).unwrap().log_level.unwrap()
        };
        assert_eq!(level(&[], &[]), Level::Warn);
        assert_eq!(level(&[], &[("OPENSHELL_LOG_LEVEL", "info")]), Level::Info);
        let env = [("OPENSHELL_LOG_LEVEL", "info"), ("RUST_LOG", "debug")];
        assert_eq!(level(&["--log-level", "error"], &env[..1]), Level::Error);
        assert_eq!(level(&["--log-level", "error"], &env), Level::Debug);
    }

    #[test]
    fn filters_read_as_tracings() {
        for (filter, level) in [
            ("", None),
            (" , ", None),
            ("INFO", Some(Level::Info)),
            ("off", Some(Level::Error)),
            ("3", Some(Level::Info)),
            ("hyper=trace", Some(Level::Error)),
            ("hyper=trace,info", Some(Level::Info)),
            ("warn,openshell_sandbox=debug", Some(Level::Debug)),
            ("openshell_sandbox=debug,warn", Some(Level::Debug)),
            ("openshell", Some(Level::Trace)),
            ("ocsf=info", Some(Level::Info)),
        ] {
            assert_eq!(level_of(filter), level, "{filter}");
        }
    }
}

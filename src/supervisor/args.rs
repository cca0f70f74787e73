//! The command line, and the environment where the command line allows it (DESIGN 4.3).

use std::net::IpAddr;
use std::path::PathBuf;

use clap::{Parser, Subcommand};

use super::openshell::Inert;
use crate::event::Level;
use crate::policy::SidecarPorts;

/// Runs a command inside the fence that a policy describes.
///
/// Exit codes: the command's own; 128+n when signal n ended it; 124 after --timeout; 125 when
/// the fence could not be built or broke; 126 and 127 when the command could not be executed or
/// was not found.
#[derive(Debug, Parser)]
#[command(name = "ringfence-supervisor", version, args_conflicts_with_subcommands = true)]
pub struct Args {
    /// What to do instead of running a command.
    #[command(subcommand)]
    pub verb: Option<Verb>,
    /// How to run it.
    #[command(flatten)]
    pub run: RunArgs,
}

/// Verbs beside running a command.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Copies this program to DIR/ringfence-supervisor.
    Install {
        /// A directory that exists and is writable.
        dir: PathBuf,
    },
    /// Copies this program to DEST, mode 0755; missing directories are made.
    CopySelf {
        /// The file, or a directory that exists.
        dest: PathBuf,
    },
    /// Runs a command inside the fence of the supervisor that runs in this container.
    Enter(EnterArgs),
    /// Prints what is enforced for the agent of this container, as JSON.
    Status {
        /// Where the supervisor keeps its files.
        #[arg(long, default_value = super::run_dir::DEFAULT)]
        run_dir: PathBuf,
    },
    /// Tries to get out of the fence of this container, and prints what came back, row by row.
    Doctor(DoctorArgs),
    /// The attempts of `doctor`; started inside the fence only.
    #[command(hide = true)]
    Attempts {
        /// What to look for, JSON.
        facts: String,
    },
}

/// `enter`'s own arguments.
#[derive(Debug, Parser)]
pub struct EnterArgs {
    /// Where the supervisor keeps its files; of several supervisors, the subdirectory of one.
    #[arg(long, default_value = super::run_dir::DEFAULT)]
    pub run_dir: PathBuf,
    /// Seconds to wait for the fence to be up.
    #[arg(long, default_value_t = 5)]
    pub wait: u64,
    /// The command and its arguments.
    #[arg(last = true, required = true, value_name = "CMD")]
    pub command: Vec<String>,
}

/// `doctor`'s own arguments.
///
/// Exit codes: 0 when every row is as expected or was skipped, 1 when one is not, 125 when the
/// attempts could not be made.
#[derive(Debug, Parser)]
pub struct DoctorArgs {
    /// Where the supervisor keeps its files.
    #[arg(long, default_value = super::run_dir::DEFAULT)]
    pub run_dir: PathBuf,
    /// Seconds to wait for the fence to be up.
    #[arg(long, default_value_t = 5)]
    pub wait: u64,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

/// The arguments of a run.
#[derive(Debug, Clone, Parser)]
pub struct RunArgs {
    /// The policy's Rego text; absent or recognised: the native engine decides.
    #[arg(long, value_name = "FILE")]
    pub policy_rules: Option<PathBuf>,
    /// The policy's data, YAML. Required.
    #[arg(long, value_name = "FILE")]
    pub policy_data: Option<PathBuf>,
    /// What the policy's files must hash to (`sha256:<hex>`); another digest does not start.
    #[arg(long, value_name = "DIGEST")]
    pub policy_digest: Option<String>,
    /// The policy as a directory that is followed while the agent runs: `policy.yaml`, `policy.rego`
    /// and `upstream-ca.crt`, as a mounted `ConfigMap` has them. What is said of the network follows
    /// a change; the rest is the first policy's until the end.
    #[arg(
        long,
        value_name = "DIR",
        conflicts_with_all = ["policy_rules", "policy_data", "policy_digest", "upstream_ca"]
    )]
    pub live_policy: Option<PathBuf>,
    /// More CA certificates (PEM) that upstreams are verified against.
    #[arg(long, value_name = "FILE")]
    pub upstream_ca: Option<PathBuf>,
    /// Reach upstreams by this HTTP proxy, which is asked by CONNECT; never taken from the
    /// environment.
    #[arg(long, value_name = "http://HOST:PORT")]
    pub upstream_proxy: Option<String>,
    /// A file with `user:password` for the upstream proxy, readable by root alone.
    #[arg(long, value_name = "FILE", requires = "upstream_proxy")]
    pub upstream_proxy_auth_file: Option<PathBuf>,
    /// What is reached without the upstream proxy: *, hosts (with all below them), addresses and
    /// ranges, separated by commas.
    #[arg(
        long,
        value_name = "LIST",
        requires = "upstream_proxy",
        default_value = "",
        hide_default_value = true
    )]
    pub no_upstream_proxy: String,
    /// The agent's working directory (default: this process's).
    #[arg(short = 'w', long, value_name = "DIR")]
    pub workdir: Option<PathBuf>,
    /// The agent's user, by number or by a name of the image's /etc/passwd.
    #[arg(long, value_name = "USER[:GROUP]")]
    pub run_as: Option<String>,
    /// More groups of the agent, by number.
    #[arg(long, value_delimiter = ',', value_name = "GID")]
    pub groups: Vec<u32>,
    /// Seconds after which the agent is ended; 0: never.
    #[arg(short = 't', long, default_value_t = 0, value_name = "SECONDS")]
    pub timeout: u64,
    /// What is written to stderr: error, warn, info, debug or trace. Denials always are.
    #[arg(long, value_name = "LEVEL")]
    pub log_level: Option<Level>,
    /// Which of the agent's ports the pod listens on: mirror (what listens in the fence), none,
    /// or a list of ports.
    #[arg(long, default_value = "mirror", value_name = "mirror|none|PORTS")]
    pub inbound: Inbound,
    /// Whether programs that ignore the proxy reach what the policy allows: on, or off (names do
    /// not resolve in the fence, and direct connections are refused).
    #[arg(long, default_value = "on", value_name = "on|off")]
    pub transparent: Transparent,
    /// A volume of the container's own that the agent reads beyond what the policy lists.
    #[arg(long, value_name = "PATH")]
    pub volume_read_only: Vec<PathBuf>,
    /// A volume of the container's own that the agent also writes.
    #[arg(long, value_name = "PATH")]
    pub volume_read_write: Vec<PathBuf>,
    /// Ports of the fence's own loopback that lead to the same ports of the pod's, on which sidecars
    /// listen, as far as the policy's endpoints for localhost and 127.0.0.1 allow.
    #[arg(
        long,
        value_name = "PORTS",
        default_value = "",
        hide_default_value = true,
        value_parser = sidecar_ports
    )]
    pub sidecar_ports: SidecarPorts,
    /// The port of the admin endpoint on the pod's loopback; 0: off.
    #[arg(long, default_value_t = 0, value_name = "PORT")]
    pub admin_port: u16,
    /// Where the supervisor keeps its files.
    #[arg(long, default_value = super::run_dir::DEFAULT, value_name = "DIR")]
    pub run_dir: PathBuf,
    /// Do not start where the container's cgroup sets no limit of processes.
    #[arg(long)]
    pub require_pid_limit: bool,
    /// Take nothing from the environment: an image's ENV can forge names, argv cannot.
    #[arg(long)]
    pub no_env: bool,
    /// What OpenShell's command line has and what changes nothing.
    #[command(flatten)]
    pub inert: Inert,
    /// The command and its arguments.
    #[arg(last = true, value_name = "CMD")]
    pub command: Vec<String>,
}

/// None where nothing is said.
fn sidecar_ports(text: &str) -> Result<SidecarPorts, String> {
    if text.is_empty() { Ok(SidecarPorts::default()) } else { text.parse() }
}

/// Whether connections that do not go by the proxy are judged or refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Transparent {
    /// Judged like those by the proxy.
    #[default]
    On,
    /// Refused.
    Off,
}

/// Which of the agent's ports are reachable at the pod's address.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Inbound {
    /// What listens in the fence.
    Mirror,
    /// Nothing.
    None,
    /// These, while they listen in the fence.
    Ports(Vec<u16>),
}

impl std::str::FromStr for Inbound {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "mirror" => Ok(Self::Mirror),
            "none" => Ok(Self::None),
            list => list
                .split(',')
                .map(|port| match port.trim().parse() {
                    Ok(0) | Err(_) => {
                        Err(format!("'{port}' is not mirror, none or a port from 1 to 65535"))
                    }
                    Ok(port) => Ok(port),
                })
                .collect::<Result<_, _>>()
                .map(Self::Ports),
        }
    }
}

impl RunArgs {
    /// What the flags together cannot mean.
    ///
    /// # Errors
    /// A sidecar's port that is also the agent's, or the admin endpoint's.
    pub fn check_ports(&self) -> Result<(), String> {
        let taken = |port: &u16| self.sidecar_ports.contains(*port);
        if let Inbound::Ports(ports) = &self.inbound
            && let Some(port) = ports.iter().copied().find(|port| taken(port))
        {
            return Err(format!(
                "--sidecar-ports and --inbound both have port {port}: the fence's own listener would \
                 keep the agent from it; take it out of one of them"
            ));
        }
        if taken(&self.admin_port) {
            return Err(format!(
                "--sidecar-ports has the port of the admin endpoint, {}: give that another by \
                 --admin-port",
                self.admin_port
            ));
        }
        Ok(())
    }

    /// Fills what the command line left open from OPENSHELL_* variables, unless `--no-env`.
    ///
    /// `lookup` reads one variable; an unknown log level is an error that names the variable.
    pub fn complete(mut self, lookup: impl Fn(&str) -> Option<String>) -> Result<Self, String> {
        if self.no_env {
            return Ok(self);
        }
        let path = |name: &str| lookup(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let followed = self.live_policy.is_some();
        if self.policy_rules.is_none() && !followed {
            self.policy_rules = path("OPENSHELL_POLICY_RULES");
        }
        if self.policy_data.is_none() && !followed {
            self.policy_data = path("OPENSHELL_POLICY_DATA");
        }
        if self.log_level.is_none()
            && let Some(level) = lookup("OPENSHELL_LOG_LEVEL")
        {
            let level = level.parse().map_err(|error| format!("OPENSHELL_LOG_LEVEL: {error}"))?;
            self.log_level = Some(level);
        }
        if self.command.is_empty()
            && let Some(command) = lookup("OPENSHELL_SANDBOX_COMMAND")
        {
            self.command = command.split_whitespace().map(str::to_owned).collect();
        }
        self.require_pid_limit |= lookup("OPENSHELL_REQUIRE_RUNTIME_PID_LIMIT").is_some();
        Ok(self)
    }
}

/// The pod's addresses (`POD_IP` by the downward API, `POD_IPS` where set): the proxy never dials
/// them unless the policy says so. An image's ENV cannot add harm here: an address too many is
/// one more refusal.
pub fn pod_ips(lookup: impl Fn(&str) -> Option<String>) -> Vec<IpAddr> {
    ["POD_IP", "POD_IPS"]
        .iter()
        .filter_map(|name| lookup(name))
        .flat_map(|list| {
            list.split(',').filter_map(|ip| ip.trim().parse().ok()).collect::<Vec<_>>()
        })
        .collect()
}

/// The Kubernetes API's address in the cluster, which every container is told: never dialled by
/// accident. Here too an image's ENV can only add a refusal.
pub fn api_server(lookup: impl Fn(&str) -> Option<String>) -> Vec<IpAddr> {
    lookup("KUBERNETES_SERVICE_HOST").and_then(|ip| ip.trim().parse().ok()).into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &[&str]) -> Result<Args, clap::Error> {
        Args::try_parse_from([&["ringfence-supervisor"], words].concat())
    }

    #[test]
    fn the_command_keeps_its_own_flags() {
        let args = parse(&["--policy-data", "/p", "--no-env", "--", "sh", "-c", "--help"]).unwrap();
        assert_eq!(args.run.command, ["sh", "-c", "--help"]);
        assert!(args.run.no_env);
    }

    #[test]
    fn inbound_takes_three_forms_and_nothing_else() {
        assert_eq!("mirror".parse(), Ok(Inbound::Mirror));
        assert_eq!("none".parse(), Ok(Inbound::None));
        assert_eq!("80,8001".parse(), Ok(Inbound::Ports(vec![80, 8001])));
        for bad in ["", "0", "70000", "80,", "all"] {
            assert!(bad.parse::<Inbound>().is_err(), "{bad}");
        }
    }

    #[test]
    fn transparent_is_on_or_off() {
        let transparent = |words: &[&str]| Some(parse(words).ok()?.run.transparent);
        assert_eq!(transparent(&["--", "true"]), Some(Transparent::On));
        assert_eq!(transparent(&["--transparent", "on", "--", "true"]), Some(Transparent::On));
        assert_eq!(transparent(&["--transparent", "off", "--", "true"]), Some(Transparent::Off));
        assert_eq!(transparent(&["--transparent", "no", "--", "true"]), None);
    }

    #[test]
    fn sidecar_ports_are_nobody_elses() {
        let run = |words: &[&str]| parse(&[words, &["--", "true"]].concat()).map(|args| args.run);
        assert!(run(&[]).unwrap().sidecar_ports.is_empty());
        let ports = run(&["--sidecar-ports", "8090-8094,9000"]).unwrap();
        assert_eq!(ports.sidecar_ports.to_string(), "8090-8094,9000");
        assert_eq!(ports.check_ports(), Ok(()));
        for bad in ["80", "x", "15200", "3128"] {
            assert!(run(&["--sidecar-ports", bad]).is_err(), "{bad}");
        }
        let with = |more: &[&str]| {
            run(&[&["--sidecar-ports", "8090"], more].concat()).unwrap().check_ports()
        };
        assert_eq!(with(&["--inbound", "80,8091", "--admin-port", "15200"]), Ok(()));
        let error = with(&["--inbound", "80,8090"]).unwrap_err();
        assert!(error.contains("8090") && error.contains("--inbound"), "{error}");
        let error = with(&["--admin-port", "8090"]).unwrap_err();
        assert!(error.contains("--admin-port"), "{error}");
    }

    #[test]
    fn the_upstream_proxy_is_a_flag_and_its_companions_need_it() {
        let run = |words: &[&str]| parse(words).map(|args| args.run);
        let proxy = ["--upstream-proxy", "http://p:1"];
        let args = run(&[&proxy[..], &["--no-upstream-proxy", "a,b", "--", "true"]].concat());
        let args = args.unwrap().no_upstream_proxy;
        assert_eq!(args, "a,b");
        assert!(run(&["--no-upstream-proxy", "a", "--", "true"]).is_err());
        assert!(run(&["--upstream-proxy-auth-file", "/f", "--", "true"]).is_err());
        let plain = run(&["--", "true"]).unwrap();
        let all = |name: &str| (!name.contains("LOG_LEVEL")).then(|| "http://forged:1".to_owned());
        assert_eq!(plain.complete(all).unwrap().upstream_proxy, None);
    }

    #[test]
    fn no_env_ignores_the_environment() {
        let lookup = |name: &str| (name == "OPENSHELL_POLICY_DATA").then(|| "/forged".to_owned());
        let args = parse(&["--", "true"]).unwrap().run;
        assert_eq!(args.clone().complete(lookup).unwrap().policy_data, Some("/forged".into()));
        let args = RunArgs { no_env: true, ..args };
        assert_eq!(args.complete(lookup).unwrap().policy_data, None);
    }

    #[test]
    fn a_policy_that_is_followed_is_the_only_one() {
        let followed = ["--live-policy", "/etc/openshell"];
        let args = parse(&[&followed[..], &["--", "true"]].concat()).unwrap().run;
        let all = |name: &str| name.contains("POLICY").then(|| "/forged".to_owned());
        let args = args.complete(all).unwrap();
        assert_eq!(args.live_policy, Some("/etc/openshell".into()));
        assert_eq!((args.policy_data, args.policy_rules), (None, None));
        for other in ["--policy-data", "--policy-rules", "--policy-digest", "--upstream-ca"] {
            assert!(parse(&[&followed[..], &[other, "x", "--", "true"]].concat()).is_err());
        }
    }

    #[test]
    fn a_limit_of_processes_is_required_by_flag_or_variable() {
        let lookup = |name: &str| (name == "OPENSHELL_REQUIRE_RUNTIME_PID_LIMIT").then(String::new);
        let args = parse(&["--", "true"]).unwrap().run;
        assert!(args.clone().complete(lookup).unwrap().require_pid_limit);
        assert!(!args.clone().complete(|_| None).unwrap().require_pid_limit);
        assert!(!RunArgs { no_env: true, ..args }.complete(lookup).unwrap().require_pid_limit);
        assert!(parse(&["--require-pid-limit", "--", "true"]).unwrap().run.require_pid_limit);
    }

    #[test]
    fn verbs_and_run_flags_do_not_mix() {
        assert!(parse(&["install", "/x"]).is_ok());
        assert!(parse(&["enter", "--", "id"]).is_ok());
        assert!(parse(&["enter"]).is_err());
    }

    #[test]
    fn pod_ips_come_from_both_variables() {
        let lookup = |name: &str| match name {
            "POD_IP" => Some("10.0.0.5".to_owned()),
            "POD_IPS" => Some("10.0.0.5,fd00::5".to_owned()),
            _ => None,
        };
        assert_eq!(pod_ips(lookup).len(), 3);
    }
}

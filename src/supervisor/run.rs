//! The order in which a fence is built (DESIGN section 2). Read it from top to bottom: each step
//! needs the ones before it, and the agent runs only when all have been seen to hold.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::Pid;

use super::agent_files::AgentFiles;
use super::args::{self, RunArgs};
use super::attestation::{Attestation, LivePolicy, NetworkRecord, PidRecord};
use super::caller::Callers;
use super::entered::{Entered, Setting};
use super::environment::{self, Ways};
use super::identity::{Database, User};
use super::init::Watch;
use super::keeper::{self, Prepared, ToKeeper};
use super::launch::{Keeper, LaunchError, Starting};
use super::links::Links;
use super::live::Following;
use super::losses::Losses;
use super::policy_files::{self, PolicyFiles};
use super::proxy_process::{self, AdminEndpoint, ProxyConfig};
use super::proxy_service::ProxyService;
use super::run_dir::{ATTESTATION, RunDir};
use super::signals::Signals;
use super::taint::{Authors, Watched};
use super::{
    filesystem, gateway, own_path, process_limit, progress, resolv_conf, sockets, stdio, steering,
    upstream_proxy, volumes,
};
use crate::event;
use crate::fence::{credentials, seccomp, sysctl};
use crate::policy::{Compatibility, Policy, Process};

/// Builds the fence, runs the command in it, and returns the exit code to end with.
#[allow(clippy::too_many_lines, reason = "the order of building is one page, read downwards")]
pub fn run(args: RunArgs) -> Result<i32> {
    // 1. Arguments, policy: read once. Nothing privileged yet.
    credentials::undumpable().context("cannot make this process undumpable")?;
    let agents_stderr = stdio::separate_stderr().context("cannot set up stderr")?;
    let signals = Signals::block()?;
    let lookup = |name: &str| std::env::var(name).ok();
    let args = args.complete(lookup).map_err(anyhow::Error::msg)?;
    let level = args.log_level.unwrap_or_default();
    event::set_level(level);
    check(&args)?;
    progress::loading(&args);
    let files = PolicyFiles::read(&args)?;
    let upstream_proxy = upstream_proxy::Settings::read(&args)?;

    // 2. The keeper makes the fence's network namespace from here on. It is forked while this process has
    //    one thread. The policy is compiled meanwhile; if it cannot be, both end.
    let own_pids = !rustix::process::getpid().is_init();
    let (keeper_pid, keeper) = keeper::start(own_pids).context("cannot start the keeper")?;
    let (policy, links) = load(&files)?;
    progress::validated(&files, &policy);

    // 3. User, working directory, our own directory, those that the policy promises.
    let user = resolve_user(&args, &policy)?;
    let workdir = match &args.workdir {
        Some(dir) => dir.clone(),
        None => std::env::current_dir().context("cannot see the working directory")?,
    };
    let dir = RunDir::create(&args.run_dir)?;
    let agents = AgentFiles::new(&dir.tls());
    let included = filesystem::guard(policy.filesystem(), args.workdir.as_deref(), &args.run_dir)?;
    let made = filesystem::make_missing(policy.filesystem(), &user)?;
    let hard = policy.landlock() == Compatibility::HardRequirement;
    let volumes = volumes::join(&args, hard)?;

    // 4. The keeper, once it has made the fence's namespace, takes on the Landlock domain that all it forks
    //    inherit. Meanwhile a thread makes the gateway's namespace and the network between the two (veth,
    //    addresses, routes, rules; read back), and the proxy drops, locks itself, makes the CA, writes the
    //    agent's certificates and compiles the policy, too.
    let rules = filesystem::rules(policy.filesystem(), included, &dir.tls(), &volumes.rules);
    let paths = rules.as_slice().into();
    upstream_proxy::keep_from(&user.identity, &args, hard.then_some(rules.as_slice()))?;
    // Without a record of its connect nobody owns a connection. A policy that is followed may come to
    // allow some, and processes that run cannot be made to report then.
    let listener = args.live_policy.is_some() || policy.lets_out();
    let taken_over = (sysctl::read(), resolv_conf::write(&dir)?);
    keeper::prepare(
        &keeper,
        &ToKeeper::prepare(rules.clone(), hard, listener, policy.process(), taken_over),
    )?;
    progress::creating();
    let gateway = gateway::start(keeper.try_clone()?, args.sidecar_ports.clone())?;
    let addresses = (args::pod_ips(lookup), args::api_server(lookup));
    let config = ProxyConfig::new(&files, addresses, &args, upstream_proxy, level);
    let (digest, first) = (files.digest(), files.to_proxy(links.found()));
    let (proxy_pid, proxy) =
        proxy_process::start(&config, digest.clone(), &first, &agents.make(&dir)?)
            .context("cannot start the proxy")?;

    // 5. The agent is forked; it gives up everything and waits for our word before it executes.
    let namespace = signals.wait_for_thread(gateway.fence(), "the fence's namespace")??;
    let ways = Ways { proxy: PROXY_URL, files: &agents };
    let env = environment::agent(std::env::vars_os(), &user, &ways);
    let given = env.iter().map(|(name, value)| (name.clone(), value.clone()));
    let authors = Authors::of(std::env::vars_os().chain(given));
    let watched = Watched::new(&[&policy], &authors);
    let callers = Arc::new(Callers::new(keeper_pid, watched));
    let mut keeper = Keeper::new(keeper, namespace, Arc::clone(&callers), listener);
    signals.wait_for(&keeper, "the keeper")?;
    let Prepared { confinement, own_proc, sysctls, resolv_conf } = keeper.prepared()?;
    let setting = Setting { identity: user.identity.clone(), env, workdir };
    let forked = fork_agent(&mut keeper, &setting, &args.command, &agents_stderr);
    agents.write_settings(&dir, std::env::var_os("APT_CONFIG").as_deref())?;
    let sockets = sockets::check(&rules, policy.process().unix_sockets)?;

    // 6. The network is there; what is lost is told; the proxy's certificate comes back.
    let network = signals.wait_for_thread(gateway.built(), "the network")??;
    progress::created(namespace);
    progress::confined(&confinement, hard, volumes.rules.len());
    Losses {
        user: &user,
        rules: &network.rules,
        sysctls: &sysctls,
        resolv_conf: &resolv_conf,
        confinement: &confinement,
        sockets: sockets.as_ref(),
    }
    .report();
    let forked = match forked {
        Ok(forked) => forked,
        Err(error) => return not_run(error),
    };
    signals.wait_for(&proxy, "the proxy's certificate")?;
    let certificate = proxy_process::ready(&proxy)?;
    dir.write(&agents.ca, 0o644, certificate.as_bytes())?;
    progress::tls_enabled(&agents.ca);
    // From here on this process neither mounts nor makes namespaces.
    seccomp::install_everywhere(&seccomp::supervisor()).context("cannot install our own filter")?;

    // 7. The agent and each thread of the proxy are seen from outside to be locked; attested; released. The proxy
    //    serves from here on: what the agent connects to before it does waits at the listeners.
    if let Err(error) = keeper.verified(&forked) {
        return not_run(error);
    }
    signals.wait_for(&proxy, "the policy and the agent's certificates")?;
    proxy_process::prepared(&proxy)?;
    let proxy_threads = proxy_process::verify(proxy_pid)?;
    let attestation = Attestation {
        version: env!("CARGO_PKG_VERSION"),
        policy_digest: digest,
        live_policy: args.live_policy.is_some().then(LivePolicy::first),
        user: (&user).into(),
        network: NetworkRecord { namespace, nftables: network.rules },
        paths,
        volumes: (&volumes).into(),
        sidecar_ports: args.sidecar_ports.iter().collect(),
        landlock: &confinement,
        unix_sockets: sockets,
        environment: steering::names(&setting.env, std::env::vars_os()),
        seccomp_filters: 1 + u32::from(listener),
        binary_identity: listener,
        pid_namespace: PidRecord::new(own_pids, own_proc),
        proxy_threads,
        made,
    };
    let record = dir.path().join(ATTESTATION);
    let attested = serde_json::to_value(&attestation)?;
    dir.write(&record, 0o600, &serde_json::to_vec_pretty(&attested)?)?;
    proxy_process::hand_over(&proxy, network.listeners)?;
    progress::listening(&args.sidecar_ports);
    let admin = AdminEndpoint::new(&proxy, args.admin_port)?;
    let (diag, inbound) = (network.diag, args.inbound);
    let followed = match &args.live_policy {
        Some(dir) => {
            let (answered, answers) = sync_channel(4);
            let control = proxy.try_clone().context("cannot keep the control socket")?;
            Some((dir.clone(), control, Arc::clone(&callers), answered, answers))
        }
        None => None,
    };
    let answered = followed.as_ref().map(|(_, _, _, answered, _)| answered.clone());
    gateway.serve(ProxyService { control: proxy, diag, callers, inbound, answered })?;
    let agent = match keeper.finish(&forked) {
        Ok(agent) => agent,
        Err(error) => return not_run(error),
    };
    admin.released(&record);
    progress::launched(&args.command, agent.pid, &user);
    if let Some((policy_dir, control, callers, _, answers)) = followed {
        Following {
            dir: policy_dir,
            first_files: files,
            first: policy,
            links,
            callers,
            authors,
            control,
            answers,
            admin,
            attested: (attested, record),
        }
        .start()?;
    }
    let entered = Entered::listen(&dir, setting)?;
    let deadline = (args.timeout > 0).then(|| Instant::now() + Duration::from_secs(args.timeout));
    let watch =
        Watch { signals, keeper, keeper_pid, proxy_pid, agent, entered, deadline, more: true };
    let outcome = watch.run();
    end(keeper_pid);
    drop(dir);
    progress::cleaned_up();
    outcome
}

/// What the agent's programs are told.
const PROXY_URL: &str = "http://10.200.0.1:3128";

/// Whether a fence can be built at all.
fn check(args: &RunArgs) -> Result<()> {
    own_path::check()?;
    process_limit::check(args.require_pid_limit)?;
    if args.command.is_empty() {
        bail!("no command: write it after `--`");
    }
    args.check_ports().map_err(anyhow::Error::msg)?;
    if !rustix::process::geteuid().is_root() {
        bail!("the supervisor builds the fence as uid 0; it was started as another user");
    }
    Ok(())
}

fn fork_agent(
    keeper: &mut Keeper,
    setting: &Setting,
    words: &[String],
    stderr: &OwnedFd,
) -> Result<Starting, LaunchError> {
    let tty = rustix::termios::isatty(io::stdin());
    let command = setting.command(words, setting.env.clone(), setting.workdir.clone(), tty)?;
    let (stdin, stdout) = (io::stdin(), io::stdout());
    keeper.begin(command, [stdin.as_fd(), stdout.as_fd(), stderr.as_fd()])
}

/// The agent was not executed. Where the fence held, what was to run in it is at fault, and the
/// exit code is a shell's.
fn not_run(error: LaunchError) -> Result<i32> {
    match error {
        LaunchError::Fence(error) => Err(error),
        error => {
            eprintln!("ringfence-supervisor: {error}");
            Ok(error.exit_code())
        }
    }
}

/// Compiles the policy and says what is doubtful in it; with what the paths in it lead to.
fn load(files: &PolicyFiles) -> Result<(Arc<Policy>, Links)> {
    let (loaded, links) = Links::first(|resolve| files.load_by(resolve));
    let loaded = loaded?;
    policy_files::tell_of(&loaded.warnings);
    Ok((Arc::new(loaded.policy), links))
}

/// Whom a policy that is followed names now, if that is somebody else than the flag, which says whom it
/// named when the pod was admitted: what it allows is meant for whom it names now. As the webhook reads
/// it: an empty name is none, root becomes 65534.
fn named_since(flag: &str, process: &Process) -> Option<String> {
    let user = process.run_as_user.as_deref().filter(|user| !user.is_empty())?;
    let root = user == "root" || user.parse() == Ok(0_u32);
    let user = if root { "65534" } else { user };
    if flag.split(':').next() == Some(user) {
        return None;
    }
    let group = process.run_as_group.as_deref().filter(|group| !group.is_empty());
    Some(match group.or(root.then_some("65534")) {
        Some(group) => format!("{user}:{group}"),
        None => user.to_owned(),
    })
}

/// The flag, else the policy's user, else nobody; never root.
fn resolve_user(args: &RunArgs, policy: &Policy) -> Result<User> {
    let process = policy.process();
    let live = args.live_policy.as_ref().and(args.run_as.as_deref());
    let other = live.and_then(|flag| named_since(flag, process));
    let flag = other.as_ref().or(args.run_as.as_ref());
    let spec = match (flag, &process.run_as_user) {
        (Some(spec), _) => spec.clone(),
        (None, Some(user)) => match &process.run_as_group {
            Some(group) => format!("{user}:{group}"),
            None => user.clone(),
        },
        (None, None) => match &process.run_as_group {
            Some(group) => format!("sandbox:{group}"),
            None => "sandbox".to_owned(),
        },
    };
    Database::read()?
        .resolve(&spec, &args.groups)
        .with_context(|| format!("user '{}'", spec.escape_debug()))
}

/// Ends what is left in the fence. As PID 1 our own end does it; elsewhere the keeper is the init
/// of the agent's PID namespace and takes everything with it. The proxy has another uid, and ends
/// by its parent-death signal.
fn end(keeper: Pid) {
    // It may have ended already.
    let _ = rustix::process::kill_process(keeper, rustix::process::Signal::KILL);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_followed_policy_names_another_user() {
        let named = |flag: &str, user: &str, group: &str| {
            let some = |text: &str| Some(text.to_owned());
            let process = Process {
                run_as_user: some(user),
                run_as_group: some(group),
                ..Process::default()
            };
            named_since(flag, &process)
        };
        // The flag knows more: the group that the pod asks for.
        assert_eq!(named("app:web", "app", ""), None);
        assert_eq!(named("1000:7", "", "x"), None);
        assert_eq!(named("65534:65534", "root", ""), None);
        assert_eq!(named("app:web", "other", ""), Some("other".into()));
        assert_eq!(named("app:web", "other", "g"), Some("other:g".into()));
        assert_eq!(named("app", "0", ""), Some("65534:65534".into()));
        assert_eq!(named_since("app", &Process::default()), None);
    }
}

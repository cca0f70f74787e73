//! The order in which a fence is built (DESIGN section 2). Read it from top to bottom: each step
//! needs the ones before it, and the agent runs only when all have been seen to hold.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::Pid;

use super::args::{self, RunArgs};
use super::attestation::{Attestation, NetworkRecord, PidRecord};
use super::caller::Callers;
use super::entered::{Entered, Setting};
use super::environment::{self, Ways};
use super::identity::{Database, User};
use super::init::{Signals, Watch};
use super::keeper::{self, Confinement, FromKeeper, ToKeeper};
use super::launch::{self, Keeper, LaunchError, Launched};
use super::policy_files::PolicyFiles;
use super::proxy_process::{self, ProxyConfig};
use super::proxy_service::ProxyService;
use super::run_dir::{ATTESTATION, RunDir};
use super::{filesystem, own_path, process_limit, progress, stdio};
use crate::event::{self, Class, Event, Severity};
use crate::fence::listeners::{Listeners, listeners};
use crate::fence::netlink::Route;
use crate::fence::netns::{self, Namespace};
use crate::fence::nftables::Nftables;
use crate::fence::sockdiag::SockDiag;
use crate::fence::{agent_net, gateway, seccomp};
use crate::policy::{Compatibility, Policy};

/// Builds the fence, runs the command in it, and returns the exit code to end with.
pub fn run(args: RunArgs) -> Result<i32> {
    // 1. Arguments, policy: read once, compiled. Nothing privileged yet.
    let agents_stderr = stdio::separate_stderr().context("cannot set up stderr")?;
    let signals = Signals::block()?;
    let lookup = |name: &str| std::env::var(name).ok();
    let args = args.complete(lookup).map_err(anyhow::Error::msg)?;
    let level = args.log_level.unwrap_or_default();
    event::set_level(level);
    own_path::check()?;
    check(&args)?;
    process_limit::check(args.require_pid_limit)?;
    progress::loading(&args);
    let files = PolicyFiles::read(&args)?;
    let policy = load(&files)?;
    progress::validated(&files, &policy);

    // 2. The proxy, and the keeper with the fence's network namespace, in parallel with us. Both
    //    are forked while this process has one thread.
    let config = ProxyConfig::new(files.clone(), args::pod_ips(lookup), &args.inbound, level);
    let (proxy_pid, proxy) = proxy_process::start(&config).context("cannot start the proxy")?;
    let own_pids = !rustix::process::getpid().is_init();
    let (keeper_pid, keeper) = keeper::start(own_pids).context("cannot start the keeper")?;

    // 3. User, working directory, the directories that the policy promises.
    let user = resolve_user(&args, &policy)?;
    let workdir = match &args.workdir {
        Some(dir) => dir.clone(),
        None => std::env::current_dir().context("cannot see the working directory")?,
    };
    let made = filesystem::make_missing(policy.filesystem(), &user)?;
    let dir = RunDir::create(&args.run_dir)?;

    // 4. The gateway, the fence, the veth between them, addresses, routes, rules; read back.
    progress::creating();
    let network = Network::build(&keeper)?;
    let namespace = network.namespace.id()?;
    progress::created(namespace);

    // 5. The listeners go to the proxy, its certificate comes back, and it is seen to be locked.
    proxy_process::hand_over(&proxy, network.listeners)?;
    progress::listening();
    let (ca, bundle) = proxy_process::ready(&proxy)?;
    let proxy_threads = proxy_process::verify(proxy_pid)?;
    let ca = dir.write("tls/ca.pem", 0o644, ca.as_bytes())?;
    let bundle = dir.write("tls/ca-bundle.pem", 0o644, bundle.as_bytes())?;
    progress::tls_enabled(&ca);

    // 6. The keeper takes on the Landlock domain that all it forks inherit.
    let callers = Arc::new(Callers::new(keeper_pid));
    let listener = policy.names_binaries();
    let mut keeper = Keeper::new(keeper, namespace, Arc::clone(&callers), listener);
    let rules = filesystem::rules(policy.filesystem(), args.workdir.as_deref(), &dir.tls());
    let hard = policy.landlock() == Compatibility::HardRequirement;
    keeper.prepare(&ToKeeper::prepare(rules, hard, listener))?;
    let confinement = keeper.confinement()?;
    progress::confined(&confinement, hard);
    report(&confinement, &user, &network.rules);
    let (gateway, diag, inbound) = (network.gateway, network.diag, args.inbound.clone());
    ProxyService { control: proxy, gateway, diag, callers, inbound }.start()?;
    // From here on this process neither mounts nor makes namespaces.
    seccomp::install(&seccomp::supervisor_sealed()).context("cannot install our own filter")?;

    // 7. The agent: attested, forked, stripped, verified from outside, released.
    let attestation = Attestation {
        version: env!("CARGO_PKG_VERSION"),
        policy_digest: files.digest(),
        user: (&user).into(),
        network: NetworkRecord { namespace, nftables: network.rules },
        landlock: &confinement,
        seccomp_filters: 1 + u32::from(listener),
        binary_identity: listener,
        pid_namespace: PidRecord { own: own_pids, proc_shared: network.proc_shared },
        proxy_threads,
        made,
    };
    dir.write(ATTESTATION, 0o600, &serde_json::to_vec_pretty(&attestation)?)?;
    let ways = Ways { proxy: PROXY_URL, ca: &ca, bundle: &bundle };
    let env = environment::agent(std::env::vars_os(), &user, &ways);
    let setting = Setting { identity: user.identity, env, workdir };
    let agent = match start_agent(&mut keeper, &setting, &args.command, &agents_stderr) {
        Ok(agent) => agent,
        // The fence holds; what was to run in it is at fault.
        Err(LaunchError::Fence(error)) => return Err(error),
        Err(error) => {
            eprintln!("ringfence-supervisor: {error}");
            return Ok(error.exit_code());
        }
    };
    let entered = Entered::listen(&dir, setting)?;
    let deadline = (args.timeout > 0).then(|| Instant::now() + Duration::from_secs(args.timeout));
    let watch =
        Watch { signals, keeper, keeper_pid, proxy_pid, agent, entered, deadline, more: false };
    let outcome = watch.run();
    end(keeper_pid);
    drop(dir);
    progress::cleaned_up();
    outcome
}

/// What the agent's programs are told.
const PROXY_URL: &str = "http://10.200.0.1:3128";

fn check(args: &RunArgs) -> Result<()> {
    if args.command.is_empty() {
        bail!("no command: write it after `--`");
    }
    if args.admin_port != 0 {
        bail!("--admin-port: the admin endpoint is not available in this version; give 0");
    }
    if !rustix::process::geteuid().is_root() {
        bail!("the supervisor builds the fence as uid 0; it was started as another user");
    }
    Ok(())
}

fn start_agent(
    keeper: &mut Keeper,
    setting: &Setting,
    words: &[String],
    stderr: &OwnedFd,
) -> Result<Launched, LaunchError> {
    let tty = rustix::termios::isatty(io::stdin());
    let command = setting.command(words, setting.env.clone(), setting.workdir.clone(), tty)?;
    let (stdin, stdout) = (io::stdin(), io::stdout());
    let agent = keeper.launch(&command, [stdin.as_fd(), stdout.as_fd(), stderr.as_fd()])?;
    event::inform(|| {
        Event::new(Class::Proc, "LAUNCH", Severity::Info)
            .subject(words.join(" "))
            .field("pid", agent.pid.as_raw_nonzero())
            .field("uid", setting.identity.uid)
    });
    Ok(agent)
}

/// Compiles the policy and says what is doubtful in it.
fn load(files: &PolicyFiles) -> Result<Policy> {
    let loaded = files.load()?;
    for warning in &loaded.warnings {
        event::emit(
            &Event::new(Class::Config, "VALIDATED", Severity::Medium).subject(warning.to_string()),
        );
    }
    Ok(loaded.policy)
}

/// The flag, else the policy's user, else nobody; never root.
fn resolve_user(args: &RunArgs, policy: &Policy) -> Result<User> {
    let process = policy.process();
    let spec = match (&args.run_as, &process.run_as_user) {
        (Some(spec), _) => spec.clone(),
        (None, Some(user)) => match &process.run_as_group {
            Some(group) => format!("{user}:{group}"),
            None => user.clone(),
        },
        (None, None) => "sandbox".to_owned(),
    };
    Database::read()?
        .resolve(&spec, &args.groups)
        .with_context(|| format!("user '{}'", spec.escape_debug()))
}

/// The two namespaces, the gateway's sockets, and what was read back.
struct Network {
    gateway: Namespace,
    namespace: Namespace,
    listeners: Listeners,
    diag: SockDiag,
    rules: Result<(), String>,
    proc_shared: Option<String>,
}

impl Network {
    /// The keeper has made the fence's namespace meanwhile; this thread makes the gateway's,
    /// builds both ends and the listeners, and returns to the pod's.
    fn build(keeper: impl AsFd) -> Result<Self> {
        let pod = netns::current()?;
        let gateway = netns::unshare()?;
        let route = Route::open()?;
        let (message, descriptors) = launch::receive(keeper).context("the keeper")?;
        let (FromKeeper::Namespace { own_proc }, Ok([namespace, fence_route, diag])) =
            (message, <[_; 3]>::try_from(descriptors))
        else {
            bail!("the keeper did not hand over the fence's namespace");
        };
        let namespace = Namespace::from_fd(namespace);
        let report = gateway::build(&route, &namespace).context("the gateway")?;
        agent_net::build(&Route::from_fd(fence_route), &route).context("the fence's network")?;
        let listeners = listeners().context("the gateway's listeners")?;
        netns::enter(&pod).context("cannot return to the pod's network namespace")?;
        Ok(Self {
            gateway,
            namespace,
            listeners,
            diag: SockDiag::from_fd(diag),
            rules: match report.nftables {
                Nftables::Applied { .. } => Ok(()),
                Nftables::Missing(why) => Err(why),
            },
            proc_shared: match own_proc {
                Some(Ok(())) => None,
                Some(Err(why)) => Some(why),
                None => Some("the container's PID namespace is the agent's too".to_owned()),
            },
        })
    }
}

/// Says what is not enforced.
fn report(confinement: &Confinement, user: &User, rules: &Result<(), String>) {
    for note in &user.notes {
        event::emit(&Event::new(Class::Config, "DEGRADED", Severity::Low).subject(note.clone()));
    }
    if let Err(why) = rules {
        event::emit(
            &Event::new(Class::Config, "DEGRADED", Severity::High).subject(format!(
                "packet rules are missing: nothing leaves the fence, but what is refused may hang: {why}"
            )),
        );
    }
    if let Some(missing) = &confinement.missing {
        let severity = if confinement.unconfined { Severity::High } else { Severity::Low };
        event::emit(
            &Event::new(Class::Config, "DEGRADED", severity)
                .subject(format!("landlock: {missing}")),
        );
    }
    for (path, why) in &confinement.skipped {
        event::emit(
            &Event::new(Class::Config, "DEGRADED", Severity::Low)
                .subject(format!("landlock: left out {}: {why}", path.display())),
        );
    }
}

/// Ends what is left in the fence. As PID 1 our own end does it; elsewhere the keeper is the init
/// of the agent's PID namespace and takes everything with it. The proxy has another uid, and ends
/// by its parent-death signal.
fn end(keeper: Pid) {
    // It may have ended already.
    let _ = rustix::process::kill_process(keeper, rustix::process::Signal::KILL);
}

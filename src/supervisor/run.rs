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
use super::keeper::{self, Confinement, FromKeeper, Prepared, ToKeeper};
use super::launch::{self, Keeper, LaunchError, Starting};
use super::policy_files::PolicyFiles;
use super::proxy_process::{self, ProxyConfig};
use super::proxy_service::ProxyService;
use super::run_dir::{ATTESTATION, RunDir};
use super::taint::Watched;
use super::{filesystem, losses, own_path, process_limit, progress, sockets, stdio, steering};
use crate::event::{self, Class, Event, Severity};
use crate::fence::listeners::{Listeners, listeners};
use crate::fence::netlink::Route;
use crate::fence::netns::{self, Namespace};
use crate::fence::nftables::Nftables;
use crate::fence::sockdiag::SockDiag;
use crate::fence::{agent_net, credentials, gateway, seccomp, sysctl};
use crate::policy::{Compatibility, Policy};

/// Builds the fence, runs the command in it, and returns the exit code to end with.
pub fn run(args: RunArgs) -> Result<i32> {
    // 1. Arguments, policy: read once. Nothing privileged yet.
    credentials::undumpable().context("cannot make this process undumpable")?;
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

    // 2. The keeper with the fence's network namespace, and the proxy, in parallel with us. The
    //    keeper is forked while this process has one thread. The policy is compiled here and in
    //    the proxy at the same time; if it cannot be, all three end.
    let own_pids = !rustix::process::getpid().is_init();
    let (keeper_pid, keeper) = keeper::start(own_pids).context("cannot start the keeper")?;
    let config = ProxyConfig::new(files.clone(), args::pod_ips(lookup), &args, level);
    let (proxy_pid, proxy) = proxy_process::start(&config).context("cannot start the proxy")?;

    let policy = load(&files)?;
    progress::validated(&files, &policy);

    // 3. User, working directory, the directories that the policy promises.
    let user = resolve_user(&args, &policy)?;
    let workdir = match &args.workdir {
        Some(dir) => dir.clone(),
        None => std::env::current_dir().context("cannot see the working directory")?,
    };
    let made = filesystem::make_missing(policy.filesystem(), &user)?;
    let dir = RunDir::create(&args.run_dir)?;

    // 4. The gateway, the fence, the veth between them, addresses, routes, rules; read back. The
    //    keeper, once it has made the fence's namespace, takes on the Landlock domain that all it
    //    forks inherit.
    let rules = filesystem::rules(policy.filesystem(), args.workdir.as_deref(), &dir.tls());
    let paths = rules.as_slice().into();
    let hard = policy.landlock() == Compatibility::HardRequirement;
    let listener = policy.names_binaries();
    keeper::prepare(
        &keeper,
        &ToKeeper::prepare(rules.clone(), hard, listener, policy.process(), sysctl::read()),
    )?;
    progress::creating();
    let network = Network::build(&keeper)?;
    let namespace = network.namespace.id()?;
    progress::created(namespace);
    let [ca, bundle] = ["tls/ca.pem", "tls/ca-bundle.pem"].map(|name| dir.path().join(name));
    proxy_process::hand_over(&proxy, network.listeners, &dir.make(&bundle, 0o644)?)?;
    progress::listening();
    let callers = Arc::new(Callers::new(keeper_pid, Watched::new(&policy, std::env::vars_os())));
    let mut keeper = Keeper::new(keeper, namespace, Arc::clone(&callers), listener);
    let Prepared { confinement, own_proc, sysctls } = keeper.prepared()?;
    progress::confined(&confinement, hard);
    let (gateway, diag, inbound) = (network.gateway, network.diag, args.inbound.clone());
    let service = ProxyService { gateway, diag, callers, inbound }.start()?;

    // 5. The agent is forked; it gives up everything and waits for our word before it executes.
    let ways = Ways { proxy: PROXY_URL, ca: &ca, bundle: &bundle };
    let env = environment::agent(std::env::vars_os(), &user, &ways);
    let setting = Setting { identity: user.identity.clone(), env, workdir };
    let forked = match fork_agent(&mut keeper, &setting, &args.command, &agents_stderr) {
        Ok(forked) => forked,
        Err(error) => return not_run(error),
    };

    // 6. What is lost is told; the proxy's certificate comes back, and the proxy is seen to be
    //    locked.
    let sockets = sockets::check(&rules, policy.process().unix_sockets)?;
    report(&confinement, &user, &network.rules, &sysctls);
    losses::report(&confinement, sockets.as_ref());
    let certificate = proxy_process::ready(&proxy)?;
    let proxy_threads = proxy_process::verify(proxy_pid)?;
    dir.write(&ca, 0o644, certificate.as_bytes())?;
    progress::tls_enabled(&ca);
    service.entered()?;
    // From here on this process neither mounts nor makes or enters namespaces.
    seccomp::install_everywhere(&seccomp::supervisor_sealed())
        .context("cannot install our own filter")?;
    proxy_process::bundled(&proxy)?;
    service.serve(proxy)?;

    // 7. Attested, verified from outside, released.
    let attestation = Attestation {
        version: env!("CARGO_PKG_VERSION"),
        policy_digest: files.digest(),
        user: (&user).into(),
        network: NetworkRecord { namespace, nftables: network.rules },
        paths,
        landlock: &confinement,
        unix_sockets: sockets,
        environment: steering::names(&setting.env),
        seccomp_filters: 1 + u32::from(listener),
        binary_identity: listener,
        pid_namespace: PidRecord::new(own_pids, own_proc),
        proxy_threads,
        made,
    };
    let record = dir.path().join(ATTESTATION);
    dir.write(&record, 0o600, &serde_json::to_vec_pretty(&attestation)?)?;
    let agent = match keeper.finish(&forked) {
        Ok(agent) => agent,
        Err(error) => return not_run(error),
    };
    event::inform(|| {
        Event::new(Class::Proc, "LAUNCH", Severity::Info)
            .subject(args.command.join(" "))
            .field("pid", agent.pid.as_raw_nonzero())
            .field("uid", user.identity.uid)
    });
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
        (None, None) => match &process.run_as_group {
            Some(group) => format!("sandbox:{group}"),
            None => "sandbox".to_owned(),
        },
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
}

impl Network {
    /// The keeper has made the fence's namespace meanwhile; this thread makes the gateway's,
    /// builds both ends and the listeners, and returns to the pod's.
    fn build(keeper: impl AsFd) -> Result<Self> {
        let pod = netns::current()?;
        let gateway = netns::unshare()?;
        let route = Route::open()?;
        let (message, descriptors) = launch::receive(keeper).context("the keeper")?;
        let (FromKeeper::Namespace, Ok([namespace, fence_route, diag])) =
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
        })
    }
}

/// Says what is not enforced.
fn report(
    confinement: &Confinement,
    user: &User,
    rules: &Result<(), String>,
    sysctls: &Result<(), String>,
) {
    let lost = sysctls.as_ref().err().map(|why| {
        format!("the fence does not have the pod's network settings (low ports among them): {why}")
    });
    for note in user.notes.iter().cloned().chain(lost) {
        event::emit(&Event::new(Class::Config, "DEGRADED", Severity::Low).subject(note));
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

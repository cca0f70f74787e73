//! The proxy's process: locked before it has a second thread, seen from outside.
//!
//! It is this program executed again, with an empty environment and two descriptors: its end of
//! the control socket as standard input, and a memfd with what it has to know as standard output.
//! (Those a program may take without `unsafe`.) It gives up root, every capability
//! and the file system itself; the supervisor reads back from outside that it did, thread by
//! thread, since credentials, `no_new_privs` and filters are each thread's own.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::SigSet;
use rustix::process::{Pid, Resource};
use serde::{Deserialize, Serialize};

use super::args::{Inbound, RunArgs, Transparent};
use super::identity::PROXY;
use super::packet;
use super::policy_files::PolicyFiles;
use super::{trust_store, upstream_proxy};
use crate::event::{self, Class, Event, Level, Severity};
use crate::fence::credentials::{self, Bounding, Identity};
use crate::fence::listeners::Listeners;
use crate::fence::{addresses, landlock, seccomp, spawn, status};
use crate::proxy;
use crate::proxy::control::{MAX_POLICY, NewPolicy, ToProxy, ToSupervisor};

/// Read by the proxy while it lives: the resolver's files.
const RESOLV_CONF: &str = "/etc/resolv.conf";
const HOSTS: &str = "/etc/hosts";
/// Also readable by it: a static program finds no getrandom(3) at run time, and the resolver's
/// query numbers come from these.
const RANDOM: [&str; 2] = ["/dev/urandom", "/dev/random"];

/// What the proxy has to know. It goes through a memfd that nobody else gets: credentials for an
/// upstream proxy are in it.
#[derive(Debug, Serialize, Deserialize)]
pub struct ProxyConfig {
    parent: i32,
    live_policy: bool,
    /// See [`PolicyFiles::upstream_ca`].
    upstream_ca: String,
    pod_ips: Vec<IpAddr>,
    api_server: Vec<IpAddr>,
    inbound: Inbound,
    admin_port: u16,
    transparent: bool,
    upstream_proxy: Option<upstream_proxy::Settings>,
    log_level: String,
}

impl ProxyConfig {
    /// From the supervisor's own arguments. The policy itself is another parameter of [`start`].
    #[must_use]
    pub fn new(
        policy: &PolicyFiles,
        (pod_ips, api_server): (Vec<IpAddr>, Vec<IpAddr>),
        args: &RunArgs,
        upstream_proxy: Option<upstream_proxy::Settings>,
        level: Level,
    ) -> Self {
        Self {
            parent: rustix::process::getpid().as_raw_nonzero().get(),
            live_policy: args.live_policy.is_some(),
            upstream_ca: policy.upstream_ca().to_owned(),
            pod_ips,
            api_server,
            inbound: args.inbound.clone(),
            admin_port: args.admin_port,
            transparent: args.transparent == Transparent::On,
            upstream_proxy,
            log_level: level.to_string(),
        }
    }
}

/// Starts the proxy. It compiles `policy` as soon as it is locked, and writes the agent's certificates into
/// `files`, PEM and for Java; see [`prepared`].
pub fn start(
    config: &ProxyConfig,
    digest: String,
    policy: &NewPolicy,
    files: &[File; 2],
) -> Result<(Pid, OwnedFd)> {
    let (ours, theirs) = packet::pair().context("cannot make the control socket")?;
    let (policy, [bundle, java]) = (policy_file(policy)?, files);
    packet::send(&ours, &ToProxy::Begin { digest }, &[&policy, bundle, java].map(AsFd::as_fd))
        .context("cannot give the policy to the proxy")?;
    let memfd = rustix::fs::memfd_create("ringfence-config", rustix::fs::MemfdFlags::CLOEXEC)
        .context("cannot make a memfd")?;
    let mut file = File::from(memfd);
    file.write_all(&serde_json::to_vec(config)?).context("cannot write the configuration")?;
    file.rewind().context("cannot rewind the configuration")?;
    let child = Command::new("/proc/self/exe")
        .arg0("ringfence-supervisor")
        .arg("proxy")
        .env_clear()
        .stdin(theirs)
        .stdout(file)
        .spawn()
        .context("cannot execute ourselves as the proxy")?;
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).context("no pid")?;
    Ok((pid, ours))
}

/// The proxy's own `main`, in the process that [`start`] made.
pub fn main() -> Result<()> {
    // Whatever the supervisor was started with is none of ours: descriptors, blocked signals, and
    // its process group, whose signals are for the agent.
    spawn::close_range(3, u32::MAX, 0).context("cannot close descriptors")?;
    SigSet::empty().thread_set_mask().context("cannot unblock signals")?;
    let _ = rustix::process::setsid();
    let control = std::io::stdin().as_fd().try_clone_to_owned().context("no control socket")?;
    let config = std::io::stdout().as_fd().try_clone_to_owned().context("no configuration")?;
    let null = File::options().read(true).write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&null)?;
    let mut bytes = Vec::new();
    File::from(config).read_to_end(&mut bytes).context("cannot read the configuration")?;
    let config: ProxyConfig = serde_json::from_slice(&bytes).context(
        "the configuration: this verb is the supervisor's own and is not to be called by hand",
    )?;
    event::set_level(config.log_level.parse().map_err(anyhow::Error::msg)?);
    let parent = Pid::from_raw(config.parent);
    // Once more after the change of user, which clears it; before anything that could take long.
    if credentials::parent_death_signal_kill(parent).is_err() {
        return Ok(());
    }
    match serve(config, control) {
        // Nobody is left to be told, and the supervisor has said why it ended.
        Err(_) if rustix::process::getppid() != parent => Ok(()),
        outcome => outcome,
    }
}

fn serve(config: ProxyConfig, control: OwnedFd) -> Result<()> {
    let image_roots = trust_store::open().context("cannot open the image's trust store")?;
    // A second family, or an address that nobody was told of, is the pod's own as well. What the
    // downward API says comes first. Afterwards the filter forbids to ask.
    let mut pod_ips = config.pod_ips;
    pod_ips.extend(addresses::reachable().context("cannot see the pod's addresses")?);
    lock(config.parent)?;
    proxy::run(
        proxy::Config {
            live_policy: config.live_policy,
            pod_ips,
            api_server: config.api_server,
            extra_roots_pem: config.upstream_ca.into_bytes(),
            image_roots,
            inbound: match config.inbound {
                Inbound::Mirror => proxy::Inbound::Mirror,
                Inbound::Ports(ports) => proxy::Inbound::Ports(ports),
                Inbound::None => proxy::Inbound::None,
            },
            admin_port: config.admin_port,
            resolv_conf: PathBuf::from(RESOLV_CONF),
            hosts: PathBuf::from(HOSTS),
            transparent: config.transparent,
            upstream_proxy: config.upstream_proxy.map(|settings| settings.proxy()).transpose()?,
        },
        control,
    )
}

/// Gives up everything that the proxy does not need; this process has one thread.
fn lock(parent: i32) -> Result<()> {
    // Two descriptors a connection, of which there may be 2,048; afterwards the filter forbids it.
    let mut files = rustix::process::getrlimit(Resource::Nofile);
    files.current = files.maximum;
    rustix::process::setrlimit(Resource::Nofile, files)
        .context("cannot raise the proxy's limit of open files")?;
    let identity = identity();
    credentials::drop_to(&identity, Bounding::of_this_process())
        .context("cannot drop to the proxy's user")?;
    credentials::parent_death_signal_kill(Pid::from_raw(parent))
        .context("cannot bind the proxy's life to the supervisor's")?;
    credentials::undumpable().context("cannot make the proxy undumpable")?;
    credentials::no_new_privs().context("cannot set no_new_privs")?;
    // Without Landlock in the kernel the proxy still has no capability, no file it could write
    // and its own filter; the attestation says what is missing.
    landlock::proxy_domain(&[RESOLV_CONF, HOSTS, RANDOM[0], RANDOM[1]].map(Path::new))
        .context("cannot confine the proxy to its files")?;
    seccomp::install(&seccomp::proxy()).context("cannot install the proxy's filter")?;
    Ok(())
}

/// The proxy's user.
#[must_use]
pub fn identity() -> Identity {
    Identity { uid: PROXY, gid: PROXY, groups: Vec::new() }
}

/// Waits until the proxy is ready; returns the sandbox CA's certificate, PEM.
pub fn ready(control: impl AsFd) -> Result<String> {
    let packet = packet::receive(control)
        .context("cannot hear the proxy")?
        .context("the proxy ended before it was ready; its own message is above")?;
    match packet.json().context("the proxy's first message")? {
        ToSupervisor::Ready { ca_pem } => Ok(ca_pem),
        other => bail!("the proxy began with {other:?}"),
    }
}

/// Hands the listeners to the proxy, which serves from then on; this process keeps none.
pub fn hand_over(control: impl AsFd, listeners: Listeners) -> Result<()> {
    let Listeners { proxy, captured, dns_udp, dns_tcp, sidecars } = listeners;
    let mut descriptors = [&proxy, &captured, &dns_udp, &dns_tcp].map(AsFd::as_fd).to_vec();
    descriptors.extend(sidecars.iter().map(AsFd::as_fd));
    packet::send(control, &ToProxy::Start, &descriptors).context(
        "cannot hand the listeners to the proxy (if it has ended, its own message is above)",
    )
}

/// A file with a policy, as the proxy reads it.
pub fn policy_file(policy: &NewPolicy) -> Result<File> {
    let bytes = serde_json::to_vec(policy)?;
    if bytes.len() as u64 > MAX_POLICY {
        bail!("the policy takes {} bytes on its way to the proxy", bytes.len());
    }
    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    let memfd = rustix::fs::memfd_create("ringfence-policy", flags)
        .context("cannot make a memfd for the policy")?;
    let mut file = File::from(memfd);
    file.write_all(&bytes).context("cannot write the policy for the proxy")?;
    Ok(file)
}

/// A way to tell the proxy's admin endpoint that the agent runs; none where there is no endpoint.
#[derive(Debug)]
pub struct AdminEndpoint(Option<OwnedFd>);

impl AdminEndpoint {
    /// Of the proxy at the other end of `control`, which may be given away afterwards.
    pub fn new(control: &OwnedFd, port: u16) -> Result<Self> {
        let ours = (port != 0).then(|| control.try_clone()).transpose();
        ours.map(Self).context("cannot keep the control socket for the admin endpoint")
    }

    /// The agent runs; `attestation` is its file, as it is now. A failure is told and changes nothing: the agent
    /// is held by none of this.
    pub fn released(&self, attestation: &Path) {
        let Some(control) = &self.0 else { return };
        let sent = File::open(attestation)
            .map_err(anyhow::Error::from)
            .with_context(|| format!("cannot open {}", attestation.display()))
            .and_then(|file| {
                packet::send(control, &ToProxy::Released, &[file.as_fd()])
                    .context("cannot tell the proxy")
            });
        if let Err(error) = sent {
            event::emit(
                &Event::new(Class::Config, "DEGRADED", Severity::Medium)
                    .subject("the admin endpoint does not know that the agent runs")
                    .reason(format!("{error:#}")),
            );
        }
    }
}

/// Waits until the agent may run as far as the proxy is concerned: it has compiled the policy, written the agent's
/// certificates and made its threads.
pub fn prepared(control: impl AsFd) -> Result<()> {
    let packet = packet::receive(control)
        .context("cannot hear the proxy")?
        .context("the proxy ended before it was able to serve; its own message is above")?;
    match packet.json().context("the proxy's second message")? {
        ToSupervisor::Prepared => Ok(()),
        other => bail!("the proxy went on with {other:?}"),
    }
}

/// Reads from outside, thread by thread, that the proxy is locked; returns how many it has.
///
/// A thread that has ended since they were listed needs no lock; one that never was seen would,
/// so the list is taken anew until every thread on it was read.
pub fn verify(pid: Pid) -> Result<usize> {
    for _ in 0..100 {
        let threads = status::threads(pid).context("cannot list the proxy's threads")?;
        ensure!(!threads.is_empty(), "the proxy has no thread");
        let mut all = true;
        for thread in &threads {
            all &= verify_thread(pid, *thread)?;
        }
        if all {
            return Ok(threads.len());
        }
    }
    bail!("the proxy's threads come and go: they cannot be verified")
}

/// `false` when the thread has ended.
fn verify_thread(pid: Pid, thread: Pid) -> Result<bool> {
    let status = match status::Status::read(pid, Some(thread)) {
        Ok(status) => status,
        Err(error) if is_gone(&error) => return Ok(false),
        Err(error) => return Err(error).context("cannot read the status of the proxy's thread"),
    };
    // Without CAP_SETPCAP, which the run reports, bounding sets stay.
    let verified = match Bounding::of_this_process() {
        Bounding::Required => status.verify_fenced(&identity(), 1),
        Bounding::IfPermitted => status.verify_fenced_but_bounding(&identity(), 1),
    };
    verified
        .with_context(|| format!("the proxy's thread {} is not locked", thread.as_raw_nonzero()))?;
    Ok(true)
}

/// ENOENT from open(2), or ESRCH from a read(2) that came later.
fn is_gone(error: &std::io::Error) -> bool {
    error.kind() == std::io::ErrorKind::NotFound
        || error.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error())
}

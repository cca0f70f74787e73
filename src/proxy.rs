//! What the network sees: the one way out of the fence, and the one way in.
//!
//! The proxy runs as a process of its own, without capabilities and locked before its first
//! thread, in the pod's network namespace; the listeners it gets were made in the gateway's. All
//! hostile bytes are parsed here. What passes is decided by [`crate::policy`], in this order, and
//! nothing is done for a connection before the step above it has said yes:
//!
//! 1. who is it: the supervisor's record of the connect, and the executable's hash ([`caller`]);
//! 2. may it connect there: host and port, before any look-up ([`session`]);
//! 3. which addresses has the name, and may each be dialled ([`destination`]);
//! 4. what is spoken, and is it what was judged: SNI, `Host`, `:authority` ([`tunnel`]);
//! 5. may this request pass, each one ([`l7`]); what is sent on is written anew ([`http`],
//!    [`http2`]).
//!
//! The policy may change meanwhile ([`reload`]): what begins is judged by the new one, what goes on
//! is judged again ([`standing`]).
//!
//! A program that ignores the proxy goes the same way: [`dns`] gives it an address for a name, and
//! [`transparent`] finds the name again when the gateway catches the connection. So does one that
//! connects to a port of the fence's own loopback which leads to a [`sidecar`].
#![forbid(unsafe_code)]

mod admin;
mod bundle;
mod caller;
mod connect;
pub mod control;
mod control_client;
mod destination;
mod dns;
mod forward;
#[cfg(test)]
mod fuzz;
mod greeting;
mod http;
mod http2;
mod inbound;
mod java_store;
mod l7;
mod listener;
mod metrics;
mod quiet;
mod refusal;
mod reload;
mod report;
mod resolve;
mod roots;
mod rules;
mod session;
mod sidecar;
mod slots;
mod standing;
mod stream;
mod tls;
mod transparent;
mod tunnel;
mod upstream;
mod upstream_proxy;
mod wire;

use std::fs::File;
use std::net::{IpAddr, TcpListener, UdpSocket};
use std::num::NonZero;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::pki::Authority;
use crate::policy::{Policy, SidecarPorts};
use admin::Admin;
use caller::Executables;
use control::{LISTENERS, ToProxy};
use control_client::{Begin, Control};
use dns::pool::Pool;
use l7::held::Room;
use reload::{FIRST, Reloader};
use resolve::Resolver;
use rules::Current;
use slots::Slots;
use tls::AgentTls;

pub use inbound::Inbound;
pub use l7::content::{Facts, read as read_content};
pub use l7::graphql_ws::read as read_message;
pub use upstream_proxy::{UpstreamProxy, UpstreamProxyError};

/// The sandbox CA's common name.
const CA_NAME: &str = "Ringfence Sandbox CA";

/// How long the sandbox CA is valid: longer than any pod lives.
const CA_VALID: Duration = Duration::from_secs(10 * 365 * 86_400);

/// What the proxy works with.
#[derive(Debug)]
pub struct Config {
    /// Whether the policy may be another one later.
    pub live_policy: bool,
    /// The pod's own addresses.
    pub pod_ips: Vec<IpAddr>,
    /// The addresses of the Kubernetes API in the cluster, as far as they are known.
    pub api_server: Vec<IpAddr>,
    /// Authorities that the operator trusts upstreams by, PEM; may be empty.
    pub extra_roots_pem: Vec<u8>,
    /// The image's trust store, PEM, if it has one; read when the first upstream is verified.
    pub image_roots: Option<File>,
    /// Which ports of the fence are reachable from outside.
    pub inbound: Inbound,
    /// The port of the admin endpoint on the pod's loopback; 0: none.
    pub admin_port: u16,
    /// The resolver's configuration; read when the first name is looked up.
    pub resolv_conf: PathBuf,
    /// The hosts file; followed.
    pub hosts: PathBuf,
    /// Whether programs that ignore the proxy are served: names get addresses, and captured
    /// connections are judged. Otherwise no name exists and all are refused.
    pub transparent: bool,
    /// The operator's proxy that upstreams are reached by, if there is one.
    pub upstream_proxy: Option<UpstreamProxy>,
}

/// What all connections share.
pub(crate) struct Shared {
    rules: Arc<Current>,
    pod_ips: Vec<IpAddr>,
    api_server: Vec<IpAddr>,
    control: Arc<Control>,
    executables: Executables,
    resolver: Resolver,
    agent_tls: AgentTls,
    reloader: Reloader,
    upstream_proxy: Option<UpstreamProxy>,
    inbound: inbound::Ports,
    /// Ports of the fence's loopback, and of the pod's, on which sidecars are reached.
    sidecars: SidecarPorts,
    admin: Arc<Admin>,
    transparent: bool,
    pool: Pool,
    http2: http2::Limits,
    /// Becomes true when the proxy is to end: long connections begin nothing new then.
    stopping: watch::Sender<bool>,
    /// For bodies that are read before they are judged.
    room: Room,
}

/// Runs the proxy until the supervisor says stop or closes the control socket.
///
/// The caller has locked the process and there is one thread; the others are made here. All that could
/// fail for what the policy, the image or the pod's limits are comes before [`ToSupervisor::Prepared`], for
/// which the agent's start waits; the rest after it. What the agent connects to before it is served waits at the
/// listeners.
pub fn run(config: Config, control: OwnedFd) -> Result<()> {
    let authority = Authority::ephemeral(CA_NAME, CA_VALID)?;
    let ca_pem = authority.certificate_pem();
    control_client::ready(&control, ca_pem)?;
    let Some(begin) = control_client::begin(&control).context("waiting for the policy")? else {
        return Ok(());
    };
    let Begin { digest, policy, mut bundle, java } = begin;
    bundle::write(config.image_roots.as_ref(), &config.extra_roots_pem, ca_pem, &mut bundle)?;
    let policy =
        reload::compile(&policy).context("the policy, which the supervisor could compile")?.policy;
    let agent_tls = AgentTls::new(authority)?;
    let workers = std::thread::available_parallelism().map_or(2, NonZero::get).clamp(2, 4);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(workers)
        .thread_name("proxy")
        .enable_all()
        .build()
        .context("cannot start the proxy's runtime")?;
    let follower =
        config.live_policy.then(|| reload::start(runtime.handle().clone())).transpose()?;
    control_client::prepared(&control)?;
    let prepared = Prepared { digest, policy, agent_tls, follower, bundle, java };
    let result = runtime.block_on(serve(config, prepared, control));
    // What still runs is past its grace.
    runtime.shutdown_background();
    result
}

/// What there is before the agent runs.
struct Prepared {
    digest: String,
    policy: Policy,
    agent_tls: AgentTls,
    follower: Option<reload::Follower>,
    bundle: File,
    java: File,
}

async fn serve(config: Config, prepared: Prepared, control: OwnedFd) -> Result<()> {
    let Prepared { digest, policy, agent_tls, follower, bundle, java } = prepared;
    let control = Arc::new(Control::new(control).context("control socket")?);
    let Start { listeners, sidecars } =
        match control.next().await.context("waiting for the listeners")? {
            None => return Ok(()),
            Some((ToProxy::Start, fds)) => Start::new(fds)?,
            Some((other, _)) => bail!("the supervisor went on with {other:?}"),
        };
    let ports = sidecar::ports(&sidecars)?;
    metrics::start(policy.names());
    metrics::policy_in_force(FIRST, &digest);
    let admin = Admin::new(config.admin_port);
    let reloader = Reloader::new(config.image_roots, config.extra_roots_pem);
    let rules = Current::new(reloader.first(policy));
    let shared = Arc::new(Shared {
        resolver: Resolver::new(config.resolv_conf, config.hosts, &config.pod_ips),
        rules,
        pod_ips: config.pod_ips.iter().map(IpAddr::to_canonical).collect(),
        api_server: config.api_server.iter().map(IpAddr::to_canonical).collect(),
        executables: Executables::new(),
        agent_tls,
        reloader,
        upstream_proxy: config.upstream_proxy,
        inbound: inbound::Ports::new(
            config.inbound,
            ports.clone(),
            Arc::clone(&admin),
            Arc::clone(&control),
        ),
        sidecars: ports,
        admin: Arc::clone(&admin),
        transparent: config.transparent,
        pool: Pool::new(),
        room: Room::new(),
        http2: http2::Limits::new(),
        stopping: watch::Sender::new(false),
        control,
    });
    let (slots, captured_slots) = Slots::pair();
    let dns = dns::PolicyDns::new(config.transparent.then(|| Arc::clone(&shared)));
    let mut listening = JoinSet::new();
    listening.spawn(listener::serve(listeners.proxy, Arc::clone(&shared), slots.clone()));
    for sidecar in sidecars {
        let slots = captured_slots.beside();
        listening.spawn(transparent::serve(sidecar, Arc::clone(&shared), slots));
    }
    let captured = transparent::serve(listeners.captured, Arc::clone(&shared), captured_slots);
    listening.spawn(captured);
    listening.spawn(dns::serve_udp(listeners.dns_udp, Arc::clone(&dns)));
    listening.spawn(dns::serve_tcp(listeners.dns_tcp, dns));
    listening.spawn(report::tell_of_floods());
    if let Some(listener) = admin.listen() {
        listening.spawn(admin::serve(listener, Arc::clone(&admin)));
    }
    tokio::spawn(async move { javas(&java, &bundle) });

    let policies = follower.map(|follower| follower.begin(Arc::clone(&shared)));
    let grace = loop {
        tokio::select! {
            message = shared.control.next() => match message.context("control socket")? {
                None => return Ok(()),
                Some((ToProxy::Inbound { ports }, _)) => shared.inbound.follow(&ports),
                Some((ToProxy::Released, descriptors)) => admin.released(descriptors),
                Some((change @ (ToProxy::Policy { .. } | ToProxy::PolicyKept { .. }), fds)) => {
                    let policies = policies.as_ref().context("this policy is not followed")?;
                    policies.send((change, fds)).context("the thread that follows the policy")?;
                }
                Some((ToProxy::Stop { grace_ms }, _)) => break Duration::from_millis(grace_ms),
                Some((other, _)) => bail!("the supervisor said {other:?} at the wrong time"),
            },
            ended = listening.join_next() => {
                // Each serves for ever: this is a fault, and the agent must not outlive it.
                bail!("a listener ended: {ended:?}");
            }
        }
    };
    listening.shutdown().await;
    shared.stopping.send_replace(true);
    shared.inbound.follow(&[]);
    let drained = async {
        tokio::select! {
            () = slots.drained() => {}
            // The supervisor is still asked who connections that came late belong to.
            () = answers(&shared.control) => {}
        }
    };
    let _ = tokio::time::timeout(grace, drained).await;
    Ok(())
}

/// Writes Java's certificates. No start waits for this: from its exec to the moment at which it opens
/// its store a Java takes hundreds of times as long.
fn javas(java: &File, bundle: &File) {
    let written = bundle::read(bundle, u64::MAX).and_then(|pem| java_store::write(java, &pem));
    if let Err(error) = written {
        report::no_java_store(&error);
    }
}

/// Hands answers to those who wait until the supervisor is gone.
async fn answers(control: &Control) {
    while let Ok(Some(_)) = control.next().await {}
}

/// What comes with [`ToProxy::Start`].
struct Start {
    listeners: Listeners,
    sidecars: Vec<tokio::net::TcpListener>,
}

/// The gateway's sockets.
struct Listeners {
    proxy: tokio::net::TcpListener,
    captured: tokio::net::TcpListener,
    dns_udp: tokio::net::UdpSocket,
    dns_tcp: tokio::net::TcpListener,
}

impl Start {
    /// In the order of [`ToProxy::Start`].
    fn new(mut fds: Vec<OwnedFd>) -> Result<Self> {
        let count = fds.len();
        let sidecars = fds.split_off(count.min(LISTENERS));
        let Ok(listeners) = <[OwnedFd; LISTENERS]>::try_from(fds) else {
            bail!("{count} listeners came, not {LISTENERS}: out of descriptors?");
        };
        let listeners = Listeners::new(listeners)?;
        let sidecars = sidecars.into_iter().map(|fd| tcp_listener("sidecar", fd));
        let sidecars = sidecars.collect::<Result<_>>()?;
        Ok(Self { listeners, sidecars })
    }
}

/// A socket that listens, for the runtime.
fn tcp_listener(name: &str, fd: OwnedFd) -> Result<tokio::net::TcpListener> {
    let listener = TcpListener::from(fd);
    ensure!(listener.local_addr().is_ok(), "{name}: not a TCP listener");
    listener.set_nonblocking(true).with_context(|| name.to_owned())?;
    tokio::net::TcpListener::from_std(listener).with_context(|| name.to_owned())
}

impl Listeners {
    fn new([proxy, captured, dns_udp, dns_tcp]: [OwnedFd; LISTENERS]) -> Result<Self> {
        let udp = UdpSocket::from(dns_udp);
        udp.set_nonblocking(true).context("DNS over UDP")?;
        Ok(Self {
            proxy: tcp_listener("proxy", proxy)?,
            captured: tcp_listener("captured TCP", captured)?,
            dns_udp: tokio::net::UdpSocket::from_std(udp).context("DNS over UDP")?,
            dns_tcp: tcp_listener("DNS over TCP", dns_tcp)?,
        })
    }
}

//! A network namespace with an upstream, a proxy in it, and clients.

#[path = "rig/client.rs"]
mod client;
#[path = "rig/log.rs"]
mod log;
#[path = "rig/namespace.rs"]
mod namespace;
#[path = "rig/policy.rs"]
mod policy;
#[path = "rig/supervisor.rs"]
mod supervisor;

use std::fs::File;
use std::io::Write;
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::AtomicU32;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ringfence::pki::Authority;
use ringfence::proxy::control::{ToProxy, ToSupervisor};
use ringfence::proxy::{Config, Inbound, UpstreamProxy, run};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustls::{ClientConnection, StreamOwned};

pub use client::{client, client_config, read_head, read_response, read_to_end};
pub use log::{log_of, log_of_alone};
pub use namespace::ip;
use namespace::{Captured, capture, new_namespace};
use policy::HOSTS;
pub use policy::POLICY;
pub use supervisor::Who;
use supervisor::{Change, OTHER, fence, policy_file, receive, send};

use crate::upstream::Upstream;

/// Where upstreams listen; a private address, since loopback is never dialled.
pub const UPSTREAM: &str = "10.77.0.1";
/// The same where there is only IPv6.
pub const UPSTREAM6: &str = "2001:db8:77::1";

pub const ADMIN_PORT: u16 = 15200;

const PROXY: &str = "10.200.0.1:3128";
const CAPTURED: &str = "10.200.0.1:15001";
pub const DNS: &str = "10.200.0.1:15053";

pub struct Rig {
    pub upstream: Upstream,
    /// Signs for upstreams that the proxy trusts.
    pub authority: Authority,
    pub who: Arc<Mutex<Option<Who>>>,
    /// The process that is said to have made every connection.
    pub pid: Arc<AtomicU32>,
    pub ca_pem: String,
    pub bundle_pem: String,
    pub dir: tempfile::TempDir,
    control: Arc<OwnedFd>,
    fence: Sender<(u16, Sender<TcpListener>)>,
    captured: Option<Captured>,
    proxy: Option<std::thread::JoinHandle<()>>,
    /// What the proxy says of changes of the policy, and the number of the last.
    changes: Mutex<(u64, Receiver<Change>)>,
}

/// Runs `test` in a new network namespace, as root; otherwise says that it is skipped.
pub fn in_namespace(test: impl FnOnce(Rig) + Send + 'static) {
    in_namespace_with(Inbound::Mirror, test);
}

pub fn in_namespace_with(inbound: Inbound, test: impl FnOnce(Rig) + Send + 'static) {
    in_namespace_after(|| {}, inbound, test);
}

/// The same, with what comes before the proxy in the same namespace.
pub fn in_namespace_after(
    before: impl FnOnce() + Send + 'static,
    inbound: Inbound,
    test: impl FnOnce(Rig) + Send + 'static,
) {
    start(Setup { inbound, ..Setup::default() }, before, test);
}

/// With a proxy of the operator's on the way out.
pub fn behind(upstream_proxy: UpstreamProxy, test: impl FnOnce(Rig) + Send + 'static) {
    start(Setup { upstream_proxy: Some(upstream_proxy), ..Setup::default() }, || {}, test);
}

/// With programs that ignore the proxy, whose connections to this port of any address are caught.
pub fn capturing(port: u16, test: impl FnOnce(Rig) + Send + 'static) {
    let setup = Setup { captured: Some(port), ..Setup::default() };
    start(setup, || {}, test);
}

/// The same with all of that switched off.
pub fn not_transparent(port: u16, test: impl FnOnce(Rig) + Send + 'static) {
    let setup = Setup { captured: Some(port), transparent: false, ..Setup::default() };
    start(setup, || {}, test);
}

/// A pod that has IPv6 only; its own address is `fd00:88::1`.
pub fn in_ipv6_namespace(test: impl FnOnce(Rig) + Send + 'static) {
    start(Setup { ipv6: true, ..Setup::default() }, || {}, test);
}

struct Setup {
    ipv6: bool,
    inbound: Inbound,
    captured: Option<u16>,
    transparent: bool,
    upstream_proxy: Option<UpstreamProxy>,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            ipv6: false,
            inbound: Inbound::Mirror,
            captured: None,
            transparent: true,
            upstream_proxy: None,
        }
    }
}

fn start(
    setup: Setup,
    before: impl FnOnce() + Send + 'static,
    test: impl FnOnce(Rig) + Send + 'static,
) {
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED: needs root");
        return;
    }
    // A thread of its own: what it starts (threads, programs, sockets) lives in its namespace.
    let thread = std::thread::spawn(move || {
        let own = if setup.ipv6 {
            ["addr add 2001:db8:77::1/128 dev lo nodad", "addr add fd00:88::1/128 dev lo nodad"]
        } else {
            ["addr add 10.77.0.1/32 dev lo", "addr add 10.88.0.1/32 dev lo"]
        };
        new_namespace(&["link set lo up", own[0], own[1]]);
        // The gateway's, which lie elsewhere.
        ip("addr add 10.200.0.1/32 dev lo");
        ip("addr add 10.200.0.2/32 dev lo");
        before();
        test(Rig::start(setup));
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

impl Rig {
    fn start(setup: Setup) -> Self {
        let day = Duration::from_secs(86_400);
        let authority = Authority::ephemeral("Upstream CA", day).expect("authority");
        let dir = tempfile::tempdir().expect("tempdir");
        let hosts = dir.path().join("hosts");
        let (address, pod_ip) =
            if setup.ipv6 { (UPSTREAM6, "fd00:88::1") } else { (UPSTREAM, "10.88.0.1") };
        std::fs::write(&hosts, HOSTS.replace(UPSTREAM, address)).expect("hosts");
        let config = Config {
            live_policy: true,
            pod_ips: vec![pod_ip.parse().expect("ip")],
            api_server: vec!["10.96.0.1".parse().expect("ip")],
            extra_roots_pem: authority.certificate_pem().into(),
            image_roots: None,
            inbound: setup.inbound,
            transparent: setup.transparent,
            admin_port: ADMIN_PORT,
            upstream_proxy: setup.upstream_proxy,
            resolv_conf: dir.path().join("no-resolv.conf"),
            hosts,
        };
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .expect("socketpair");
        let upstream_ca = authority.certificate_pem().to_owned();
        let upstream = Upstream::start(&authority, address);
        let proxy = std::thread::spawn(move || run(config, theirs).expect("proxy"));
        let (ready, _) = receive(&ours).expect("ready");
        let ToSupervisor::Ready { ca_pem } = ready else { panic!("{ready:?}") };
        let file = |name: &str| {
            let options = File::options().read(true).write(true).create_new(true).to_owned();
            OwnedFd::from(options.open(dir.path().join(name)).expect("a file"))
        };
        let tcp = |address| {
            let listener = TcpListener::bind(address).expect("listener");
            // As many wait as at the gateway's.
            rustix::net::listen(&listener, 4096).expect("backlog");
            OwnedFd::from(listener)
        };
        let (captured, caught) = match setup.captured.map(capture) {
            Some((captured, listener)) => (Some(captured), OwnedFd::from(listener)),
            None => (None, tcp(CAPTURED)),
        };
        let listeners =
            [tcp(PROXY), caught, OwnedFd::from(UdpSocket::bind(DNS).expect("socket")), tcp(DNS)];
        let files = [file("bundle.pem"), file("java.jks")];
        let policy = policy_file(POLICY, None).into();
        let begin = ToProxy::Begin { digest: "sha256:first".into() };
        send(&ours, &begin, &[&policy, &files[0], &files[1]].map(AsFd::as_fd));
        let (prepared, _) = receive(&ours).expect("prepared");
        assert_eq!(prepared, ToSupervisor::Prepared);
        send(&ours, &ToProxy::Start, &listeners.each_ref().map(AsFd::as_fd));
        let bundle_pem = std::fs::read_to_string(dir.path().join("bundle.pem")).expect("bundle");
        assert_eq!(bundle_pem, upstream_ca + &ca_pem);
        let curl = Who { exe: "/usr/bin/curl".into(), file: "/usr/bin/curl".into() };
        let who = Arc::new(Mutex::new(Some(curl)));
        let control = Arc::new(ours);
        let pid = Arc::new(AtomicU32::new(42));
        let (answers, changes) = channel();
        let fence = fence(Arc::clone(&control), Arc::clone(&who), Arc::clone(&pid), answers);
        let changes = Mutex::new((1, changes));
        let proxy = Some(proxy);
        Self {
            upstream,
            authority,
            who,
            pid,
            ca_pem,
            bundle_pem,
            dir,
            control,
            fence,
            captured,
            proxy,
            changes,
        }
    }

    /// Has the proxy follow another policy, and waits until it does; or why it does not.
    pub fn follow(&self, yaml: &str) -> Result<(), String> {
        self.follow_as(yaml, false, None)
    }

    /// The same with all that may be said of a change.
    pub fn follow_as(
        &self,
        yaml: &str,
        bounded: bool,
        upstream_ca: Option<String>,
    ) -> Result<(), String> {
        let upstream_ca = upstream_ca.or_else(|| Some(self.authority.certificate_pem().to_owned()));
        let file = policy_file(yaml, upstream_ca);
        let mut changes = self.changes.lock().expect("lock");
        changes.0 += 1;
        let (generation, kept) = (changes.0, Vec::new());
        let digest = format!("sha256:{generation}");
        let change = ToProxy::Policy { generation, digest, bounded, kept };
        send(&self.control, &change, &[file.as_fd()]);
        let answer = changes.1.recv_timeout(Duration::from_secs(60)).expect("an answer");
        assert_eq!(answer.0, generation);
        answer.1.map_or(Ok(()), Err)
    }

    /// Says something to the proxy.
    pub fn tell(&self, message: &ToProxy) {
        send(&self.control, message, &[]);
    }

    /// Says that the agent runs, with what was attested.
    pub fn released(&self, attestation: &File) {
        send(&self.control, &ToProxy::Released, &[attestation.as_fd()]);
    }

    /// A listener inside the fence.
    pub fn listen_in_fence(&self, port: u16) -> TcpListener {
        let (sender, receiver) = channel();
        self.fence.send((port, sender)).expect("fence");
        receiver.recv().expect("listener")
    }

    /// Waits until the proxy has ended by itself.
    pub fn ended(&mut self) {
        self.proxy.take().expect("once").join().expect("proxy");
    }

    pub fn bundle(&self) -> String {
        self.dir.path().join("bundle.pem").display().to_string()
    }

    /// A connection to the proxy.
    #[allow(clippy::unused_self, reason = "there is a proxy because there is a rig")]
    pub fn connect(&self) -> TcpStream {
        let address: SocketAddr = PROXY.parse().expect("address");
        let tcp = TcpStream::connect(address).expect("proxy");
        tcp.set_nodelay(true).expect("nodelay");
        tcp.set_read_timeout(Some(Duration::from_secs(20))).expect("timeout");
        tcp
    }

    /// A connection to the proxy of another process.
    #[allow(clippy::unused_self, reason = "there is a proxy because there is a rig")]
    pub fn connect_as_other(&self) -> TcpStream {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None);
        let socket = socket.expect("socket");
        let address = |text: String| text.parse::<SocketAddr>().expect("address").into();
        socket.bind(&address(format!("{OTHER}:0"))).expect("bind");
        socket.connect(&address(PROXY.to_owned())).expect("proxy");
        socket.into()
    }

    /// A connection to any address that the gateway catches.
    pub fn direct(&self, address: impl Into<SocketAddr>) -> TcpStream {
        let (sender, receiver) = channel();
        let captured = self.captured.as_ref().expect("a rig that captures");
        captured.send((address.into(), sender)).expect("namespace");
        let tcp = receiver.recv().expect("caught");
        tcp.set_nodelay(true).expect("nodelay");
        tcp.set_read_timeout(Some(Duration::from_secs(20))).expect("timeout");
        tcp
    }

    /// Sends `bytes` and reads to the end of the connection.
    pub fn exchange(&self, bytes: &[u8]) -> String {
        let mut tcp = self.connect();
        tcp.write_all(bytes).expect("send");
        read_to_end(&mut tcp)
    }

    /// An established tunnel.
    pub fn tunnel(&self, authority: &str) -> TcpStream {
        let mut tcp = self.connect();
        write!(tcp, "CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n\r\n").expect("send");
        let head = read_head(&mut tcp);
        assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
        tcp
    }

    /// TLS in a tunnel, verified by the sandbox CA only.
    pub fn tls(
        &self,
        authority: &str,
        sni: &str,
        alpn: &[&str],
    ) -> StreamOwned<ClientConnection, TcpStream> {
        StreamOwned::new(self.client(sni, alpn), self.tunnel(authority))
    }

    pub fn client(&self, sni: &str, alpn: &[&str]) -> ClientConnection {
        client(self.ca_pem.as_bytes(), sni, alpn)
    }
}

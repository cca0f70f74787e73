//! A network namespace with an upstream, a proxy in it, and clients.

use std::fs::File;
use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ringfence::pki::{Authority, provider};
use ringfence::proxy::control::{
    CallerRecord, MAX_MESSAGE, NewPolicy, PolicyText, ToProxy, ToSupervisor,
};
use ringfence::proxy::{Config, Inbound, UpstreamProxy, run};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

use crate::upstream::Upstream;

/// Where upstreams listen; a private address, since loopback is never dialled.
pub const UPSTREAM: &str = "10.77.0.1";
/// The same where there is only IPv6.
pub const UPSTREAM6: &str = "2001:db8:77::1";

pub const ADMIN_PORT: u16 = 15200;

const PROXY: &str = "10.200.0.1:3128";
/// Where connections of another process come from, and its pid.
const OTHER: &str = "10.200.0.2";
const OTHER_PID: u32 = 1000;
const CAPTURED: &str = "10.200.0.1:15001";
pub const DNS: &str = "10.200.0.1:15053";

/// What the proxy begins with.
pub const POLICY: &str = r#"
version: 1
network_policies:
  api:
    endpoints:
      - host: api.test
        port: 443
        protocol: rest
        enforcement: enforce
        rules:
          - allow: { method: GET, path: "/ok/**" }
          - allow: { method: POST, path: "/post" }
          - allow: { method: GET, path: "/search", query: { q: "cats" } }
      - { host: api.test, port: 80, protocol: rest, enforcement: enforce, access: read-only }
      - { host: api.test, ports: [80, 443], path: /graphql, protocol: graphql, enforcement: enforce, access: read-only }
      - { host: audited.test, port: 443, path: /graphql, protocol: graphql, enforcement: audit, access: read-only }
      - host: api.test
        port: 443
        path: /mcp
        protocol: mcp
        enforcement: enforce
        rules: [{ allow: { method: initialize } }, { allow: { method: tools/call, tool: search } }]
      - { host: api.test, port: 80, path: /rpc, protocol: json-rpc, enforcement: enforce, rules: [{ allow: { method: reports.list } }] }
      - { host: slow.test, port: 9090, path: /graphql, protocol: graphql, enforcement: enforce, access: read-only, graphql_max_body_bytes: 8388608 }
      - { host: rpc.test, port: 4433, path: /graphql, protocol: graphql, enforcement: enforce, access: read-only }
      - host: rpc.test
        ports: [4433, 8081]
        protocol: rest
        enforcement: enforce
        rules:
          - allow: { method: POST, path: "/echo.Echo/*" }
          - allow: { method: GET, path: "/ok/**" }
      - { host: audited.test, port: 443, protocol: rest, enforcement: audit, access: read-only }
    binaries: [{ path: /usr/bin/curl }]
  sockets:
    endpoints:
      - host: ws.test
        ports: [8080, 8082, 8443]
        protocol: websocket
        enforcement: enforce
        rules:
          - allow: { method: GET, path: "**" }
          - allow: { method: WEBSOCKET_TEXT, path: "/echo/**" }
          - allow: { method: WEBSOCKET_BINARY, path: /echo/binary }
        deny_rules: [{ method: GET, path: /denied }]
      - host: ws.test
        ports: [8080, 8443]
        path: /graphql
        protocol: websocket
        enforcement: enforce
        rules:
          - allow: { method: GET, path: /graphql }
          - allow: { operation_type: subscription, fields: [ticks] }
      - { host: auditws.test, port: 8080, protocol: websocket, enforcement: audit, access: read-only }
      - { host: star.test, port: 8080, protocol: rest, enforcement: enforce, access: full }
      - { host: rest.test, port: 8080, protocol: rest, enforcement: enforce, access: read-write }
    binaries: [{ path: /usr/bin/curl }]
  whole:
    endpoints:
      - { host: raw.test, ports: [80, 443, 2525, 4433, 8081] }
      - { host: skip.test, port: 443, tls: skip }
      - { host: expired.test, port: 4434 }
      - { host: nowhere.test, port: 443 }
      - { host: closed.test, port: 9 }
      - { host: meta.test, port: 80 }
      - { host: mixed.test, port: 80 }
      - { host: "*.wild.test", port: 443 }
      - { host: 127.0.0.1, port: 8090 }
      - { host: pod.ringfence.internal, ports: [80, 7001, 15200] }
      - { port: 15200, allowed_ips: ["10.88.0.1/32"] }
      - { host: own.test, port: 80 }
      - { host: kubernetes.default.svc, port: 443 }
      - { host: kubernetes.default.evil.test, port: 443 }
      - { host: cluster.test, port: 443, allowed_ips: ["10.96.0.0/28"] }
      - { host: meant.test, port: 443, allowed_ips: ["10.96.0.0/29"] }
      - { host: db.prod, port: 80 }
      - { host: short, port: 80 }
      - { host: broken.test, port: 80 }
      - { host: 10.77.0.1, port: 80, allowed_ips: ["10.0.0.0/8"] }
      - { host: 10.77.0.1, port: 2525 }
      - { host: "*.ringfence.internal", port: 81 }
      - { host: pod.ringfence.internal, port: 82, allowed_ips: ["10.99.0.0/16"] }
      - { host: pod.ringfence.internal, port: 83, allowed_ips: ["10.88.0.0/16"] }
      - { port: 84, allowed_ips: ["10.99.0.0/16"] }
      - { host: "*.ringfence.internal", port: 85, allowed_ips: ["10.88.0.1/32"] }
      - { host: "2001:db8:77::1", ports: [80, 443] }
      - { host: "*.wild6.test", port: 80, allowed_ips: ["2001:db8:77::/48"] }
      - { port: 86, allowed_ips: ["2001:db8:77::/48"] }
      - { host: db.test, port: 3306, protocol: sql, access: full, enforcement: audit }
    binaries: [{ path: /usr/bin/curl }]
"#;

const HOSTS: &str = "\
10.77.0.1 ws.test auditws.test star.test rest.test
10.77.0.1 db.test slow.test
10.77.0.1 api.test raw.test skip.test audited.test expired.test closed.test one.wild.test rpc.test
169.254.169.254 meta.test
10.77.0.1 mixed.test
127.0.0.1 mixed.test
10.88.0.1 own.test
";

/// Who the supervisor's double says made every connection.
#[derive(Clone)]
pub struct Who {
    pub exe: String,
    pub file: PathBuf,
}

/// A policy by its number, and why it is not in force; `None`: it is.
type Change = (u64, Option<String>);

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

pub fn client(ca_pem: &[u8], sni: &str, alpn: &[&str]) -> ClientConnection {
    let name = ServerName::try_from(sni.to_owned()).expect("name");
    ClientConnection::new(client_config(ca_pem, alpn), name).expect("client")
}

/// With sessions of its own.
pub fn client_config(ca_pem: &[u8], alpn: &[&str]) -> Arc<ClientConfig> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(ca_pem).expect("pem")).expect("root");
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = alpn.iter().map(|one| one.as_bytes().to_vec()).collect();
    Arc::new(config)
}

/// One head, its empty line included.
pub fn read_head(from: &mut impl Read) -> String {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        match from.read(&mut byte) {
            Ok(1) => head.push(byte[0]),
            end => panic!("{end:?} after {:?}", String::from_utf8_lossy(&head)),
        }
    }
    String::from_utf8(head).expect("utf-8")
}

/// One response with its body by Content-Length.
pub fn read_response(from: &mut impl Read) -> (String, String) {
    let head = read_head(from);
    let length = head
        .lines()
        .find_map(|line| line.strip_prefix("Content-Length: "))
        .map_or(0, |length| length.parse().expect("length"));
    let mut body = vec![0; length];
    from.read_exact(&mut body).expect("body");
    (head, String::from_utf8(body).expect("utf-8"))
}

/// All until the end, however it comes.
pub fn read_to_end(from: &mut impl Read) -> String {
    let mut all = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => break,
            Ok(read) => all.extend_from_slice(&buffer[..read]),
            Err(error) => {
                assert_ne!(error.kind(), std::io::ErrorKind::WouldBlock, "nothing came: {all:?}");
                break;
            }
        }
    }
    String::from_utf8_lossy(&all).into_owned()
}

/// Connects from the namespace of [`capture`].
type Captured = Sender<(SocketAddr, Sender<TcpStream>)>;

/// A namespace in which this port of every address leads to one listener, whose connections have
/// the address that was dialled: what the gateway's packet rules do, for one port.
fn capture(port: u16) -> (Captured, TcpListener) {
    let (sender, wishes) = channel::<(SocketAddr, Sender<TcpStream>)>();
    let (made, listener) = channel();
    std::thread::spawn(move || {
        new_namespace(&["link set lo up", "route add local default dev lo"]);
        made.send(TcpListener::bind(("0.0.0.0", port)).expect("listener")).expect("rig");
        for (address, wisher) in wishes {
            // On a busy machine a connection beyond the limit may be reset before it is made.
            let again = || std::thread::sleep(Duration::from_millis(20));
            let mut tries = (0..100).map(|_| TcpStream::connect(address).inspect_err(|_| again()));
            let _ = wisher.send(tries.find_map(Result::ok).expect("caught"));
        }
    });
    (sender, listener.recv().expect("listener"))
}

/// The fence's namespace: a thread in it makes listeners, another answers the proxy from it.
fn fence(
    control: Arc<OwnedFd>,
    who: Arc<Mutex<Option<Who>>>,
    pid: Arc<AtomicU32>,
    changes: Sender<Change>,
) -> Sender<(u16, Sender<TcpListener>)> {
    let (sender, wishes) = channel::<(u16, Sender<TcpListener>)>();
    std::thread::spawn(move || {
        new_namespace(&["link set lo up", "addr add 10.200.0.2/32 dev lo"]);
        std::thread::spawn(move || answer(&control, &who, &pid, &changes));
        for (port, wisher) in wishes {
            let _ = wisher.send(TcpListener::bind(("10.200.0.2", port)).expect("listener"));
        }
    });
    sender
}

/// Runs another test of this program by itself and returns what the proxy logged; none without
/// root.
pub fn log_of(test: &str) -> Option<String> {
    log_with(test, &[])
}

/// The same of a test that only runs by itself (`#[ignore]`).
pub fn log_of_alone(test: &str) -> Option<String> {
    log_with(test, &["--ignored"])
}

fn log_with(test: &str, more: &[&str]) -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED: needs root");
        return None;
    }
    let output = Command::new(std::env::current_exe().expect("path"))
        .args(["--exact", test, "--nocapture"])
        .args(more)
        .output()
        .expect("test program");
    let told = String::from_utf8_lossy(&output.stdout);
    let log = String::from_utf8_lossy(&output.stderr).into_owned();
    let tail: Vec<&str> = log.lines().rev().take(20).collect();
    let passed = output.status.success() && told.contains("1 passed");
    assert!(passed, "{test}: {told}\n{}", tail.into_iter().rev().collect::<Vec<_>>().join("\n"));
    Some(log)
}

/// Runs `ip` in the namespace of the calling thread.
pub fn ip(words: &str) {
    let status = Command::new("ip").args(words.split(' ')).status().expect("ip");
    assert!(status.success(), "ip {words}");
}

/// Moves the calling thread, and what it starts, to a new network namespace.
fn new_namespace(addresses: &[&str]) {
    // SAFETY: only this thread's network namespace changes, no memory or descriptor table.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }
        .expect("new network namespace");
    for words in addresses {
        ip(words);
    }
}

fn answer(control: &OwnedFd, who: &Mutex<Option<Who>>, pid: &AtomicU32, changes: &Sender<Change>) {
    while let Some((question, _)) = receive(control) {
        match question {
            ToSupervisor::Identify { id, client, .. } => match who.lock().expect("lock").clone() {
                None => send(control, &ToProxy::Caller { id, caller: None }, &[]),
                Some(Who { exe, file }) => {
                    let file = match File::open(file) {
                        Ok(file) => file,
                        Err(error) => {
                            let reason = error.to_string();
                            send(control, &ToProxy::Failed { id, reason }, &[]);
                            continue;
                        }
                    };
                    let pid = match client.ip().to_string().as_str() {
                        OTHER => OTHER_PID,
                        _ => pid.load(Ordering::Relaxed),
                    };
                    let caller = Some(CallerRecord { pid, exe, ..CallerRecord::default() });
                    send(control, &ToProxy::Caller { id, caller }, &[file.as_fd()]);
                }
            },
            ToSupervisor::GatewaySocket { id } => {
                let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
                let socket =
                    rustix::net::socket_with(AddressFamily::INET, SocketType::STREAM, flags, None)
                        .expect("socket");
                send(control, &ToProxy::GatewaySocket { id }, &[socket.as_fd()]);
            }
            ToSupervisor::Policy { generation, refused } => {
                let _ = changes.send((generation, refused));
            }
            ToSupervisor::Ready { .. } | ToSupervisor::Prepared => panic!("ready twice"),
        }
    }
}

/// A policy as the supervisor hands it over.
fn policy_file(yaml: &str, upstream_ca: Option<String>) -> File {
    let data = PolicyText { name: "policy.yaml".into(), text: yaml.into() };
    let links = std::collections::BTreeMap::new();
    let new = NewPolicy { data, rules: None, upstream_ca, links };
    let mut file = tempfile::tempfile().expect("file");
    file.write_all(&serde_json::to_vec(&new).expect("json")).expect("written");
    file
}

fn send(control: &OwnedFd, message: &ToProxy, fds: &[BorrowedFd<'_>]) {
    let bytes = serde_json::to_vec(message).expect("json");
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut beside = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        assert!(beside.push(SendAncillaryMessage::ScmRights(fds)));
    }
    // A proxy that has ended hears nothing.
    let _ = sendmsg(control, &[IoSlice::new(&bytes)], &mut beside, SendFlags::NOSIGNAL);
}

fn receive(control: &OwnedFd) -> Option<(ToSupervisor, Vec<OwnedFd>)> {
    let mut bytes = vec![0; MAX_MESSAGE];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut beside = RecvAncillaryBuffer::new(&mut space);
    let got =
        recvmsg(control, &mut [IoSliceMut::new(&mut bytes)], &mut beside, RecvFlags::CMSG_CLOEXEC)
            .ok()?;
    let mut fds = Vec::new();
    for message in beside.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    (got.bytes > 0).then(|| (serde_json::from_slice(&bytes[..got.bytes]).expect("json"), fds))
}

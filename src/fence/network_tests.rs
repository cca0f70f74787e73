//! Gateway and fence, built and then tried from inside with real sockets. Each test has a thread
//! of its own, which never comes back to the machine's namespace. Needs root.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType};

use super::agent_net::{self, FenceReport, Ipv6};
use super::gateway::{self, AGENT, CAPTURE_PORT, GATEWAY, GatewayReport, PROXY_PORT};
use super::listeners::{self, Listeners};
use super::netlink::Route;
use super::netns::{self, Namespace};
use super::nftables::{self, Nftables};
use super::sockdiag::SockDiag;

mod inward;
mod outward;

/// How long to wait before something counts as silent.
const PATIENCE: Duration = Duration::from_secs(2);

/// Runs `body` in a thread of its own.
fn in_thread(body: impl FnOnce() + Send + 'static) {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: needs root");
        return;
    }
    if let Err(panic) = std::thread::spawn(body).join() {
        std::panic::resume_unwind(panic);
    }
}

/// A built pair of namespaces; the calling thread is in the fence afterwards.
struct Rig {
    gateway: Namespace,
    fence: Namespace,
    proxy: TcpListener,
    captured: TcpListener,
    dns_udp: UdpSocket,
    dns_tcp: TcpListener,
    diag: SockDiag,
    gateway_report: GatewayReport,
    fence_report: FenceReport,
}

fn rig() -> Rig {
    rig_after(|| ())
}

/// `before` runs in each namespace while it is new.
fn rig_after(before: impl Fn()) -> Rig {
    let gateway = netns::unshare().unwrap();
    before();
    let gateway_route = Route::open().unwrap();
    let fence = netns::unshare().unwrap();
    before();
    let fence_route = Route::open().unwrap();
    let diag = SockDiag::open().unwrap();
    netns::enter(&gateway).unwrap();
    let gateway_report = gateway::build(&gateway_route, &fence).unwrap();
    let Listeners { proxy, captured, dns_udp, dns_tcp, .. } = listeners::listeners().unwrap();
    let fence_report = agent_net::build(&fence_route, &gateway_route).unwrap();
    netns::enter(&fence).unwrap();
    Rig {
        gateway,
        fence,
        proxy: proxy.into(),
        captured: captured.into(),
        dns_udp: dns_udp.into(),
        dns_tcp: dns_tcp.into(),
        diag,
        gateway_report,
        fence_report,
    }
}

impl Rig {
    /// How many connections the gateway's kernel tracks; leaves the thread in the fence.
    fn tracked(&self) -> Option<u64> {
        netns::enter(&self.gateway).unwrap();
        let count = std::fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_count");
        netns::enter(&self.fence).unwrap();
        match count {
            Ok(count) => Some(count.trim().parse().unwrap()),
            Err(e) => {
                eprintln!("SKIPPED: the kernel does not show the count ({e})");
                None
            }
        }
    }

    /// A socket of the gateway's, connected from there.
    fn connect_from_gateway(&self, to: SocketAddrV4) -> io::Result<TcpStream> {
        netns::enter(&self.gateway).unwrap();
        let socket = listeners::socket().unwrap();
        netns::enter(&self.fence).unwrap();
        match rustix::net::connect(&socket, &to) {
            Ok(()) | Err(Errno::INPROGRESS) => {}
            Err(e) => return Err(e.into()),
        }
        assert!(wait(&socket, PollFlags::OUT), "no answer from {to}");
        rustix::net::sockopt::socket_error(&socket)??;
        Ok(blocking(socket.into()))
    }
}

/// False after [`PATIENCE`].
fn wait(fd: &impl AsFd, flags: PollFlags) -> bool {
    let timeout = PATIENCE.try_into().unwrap();
    poll(&mut [PollFd::new(fd, flags)], Some(&timeout)).unwrap() == 1
}

fn blocking(stream: TcpStream) -> TcpStream {
    stream.set_nonblocking(false).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    stream
}

fn accept(listener: &TcpListener) -> TcpStream {
    assert!(wait(listener, PollFlags::IN), "nothing to accept");
    blocking(listener.accept().unwrap().0)
}

fn v4(address: [u8; 4], port: u16) -> SocketAddrV4 {
    SocketAddrV4::new(address.into(), port)
}

fn connect(to: SocketAddrV4) -> io::Result<TcpStream> {
    TcpStream::connect_timeout(&to.into(), PATIENCE).map(blocking)
}

fn addresses(stream: &TcpStream) -> (SocketAddrV4, SocketAddrV4) {
    match (stream.local_addr().unwrap(), stream.peer_addr().unwrap()) {
        (SocketAddr::V4(local), SocketAddr::V4(peer)) => (local, peer),
        other => panic!("not IPv4: {other:?}"),
    }
}

/// Bytes pass in both directions.
fn talk(a: &mut TcpStream, b: &mut TcpStream) {
    let mut buffer = [0; 4];
    for _ in 0..2 {
        a.write_all(b"ping").unwrap();
        b.read_exact(&mut buffer).unwrap();
        assert_eq!(&buffer, b"ping");
        b.write_all(b"pong").unwrap();
        a.read_exact(&mut buffer).unwrap();
        assert_eq!(&buffer, b"pong");
    }
}

fn errno(error: &io::Error) -> Option<Errno> {
    Errno::from_io_error(error)
}

fn megabyte(mut from: TcpStream, mut to: TcpStream) {
    let data: Vec<u8> = (0..1_048_576_u32).map(|i| i.to_le_bytes()[0] ^ 0x5a).collect();
    let sent = data.clone();
    let writer = std::thread::spawn(move || from.write_all(&sent));
    let mut received = vec![0; data.len()];
    to.read_exact(&mut received).unwrap();
    writer.join().unwrap().unwrap();
    assert!(received == data);
}

#[test]
fn what_was_built_is_reported() {
    in_thread(|| {
        let rig = rig();
        let Nftables::Applied { rules, digest } = &rig.gateway_report.nftables else {
            panic!("no packet rules: {:?}", rig.gateway_report);
        };
        assert_eq!(*rules, 13);
        assert_eq!(digest.len(), 64);
        assert_eq!(rig.fence_report.address, AGENT);
        assert_eq!(rig.fence_report.ipv6, Ipv6::Unreachable);
        assert_ne!(rig.gateway.id().unwrap(), rig.fence.id().unwrap());
        assert_eq!(netns::current().unwrap().id().unwrap(), rig.fence.id().unwrap());
    });
}

#[test]
fn settings_copied_from_a_strict_node_do_not_matter() {
    in_thread(|| {
        let rig = rig_after(|| {
            for (name, value) in [
                ("ip_forward", "1"),
                ("conf/all/rp_filter", "1"),
                ("conf/default/rp_filter", "1"),
                ("conf/all/arp_ignore", "8"),
                ("conf/default/arp_ignore", "8"),
                ("conf/all/arp_filter", "1"),
                ("conf/default/accept_local", "1"),
                ("conf/default/route_localnet", "1"),
                ("conf/all/ignore_routes_with_linkdown", "1"),
            ] {
                std::fs::write(format!("/proc/sys/net/ipv4/{name}"), value)
                    .unwrap_or_else(|e| panic!("{name}: {e}"));
            }
        });
        let mut client = connect(SocketAddrV4::new(GATEWAY, PROXY_PORT)).unwrap();
        talk(&mut client, &mut accept(&rig.proxy));
        let mut client = connect(v4([1, 2, 3, 4], 80)).unwrap();
        talk(&mut client, &mut accept(&rig.captured));
        let client = UdpSocket::bind("0.0.0.0:0").unwrap();
        client.connect("8.8.8.8:53").unwrap();
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        client.send(b"q").unwrap();
        assert!(wait(&rig.dns_udp, PollFlags::IN));
        let (_, from) = rig.dns_udp.recv_from(&mut [0; 8]).unwrap();
        rig.dns_udp.send_to(b"a", from).unwrap();
        client.recv(&mut [0; 8]).unwrap();
        let listener = TcpListener::bind("0.0.0.0:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let mut outer = rig.connect_from_gateway(SocketAddrV4::new(AGENT, port)).unwrap();
        talk(&mut outer, &mut accept(&listener));
    });
}

#[test]
fn without_packet_rules_nothing_leaves_and_nothing_hangs() {
    in_thread(|| {
        let gateway = netns::unshare().unwrap();
        std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
        let gateway_route = Route::open().unwrap();
        let fence = netns::unshare().unwrap();
        let fence_route = Route::open().unwrap();
        netns::enter(&gateway).unwrap();
        gateway::lay_cable(&gateway_route, &fence).unwrap();
        let listeners = listeners::listeners().unwrap();
        agent_net::build(&fence_route, &gateway_route).unwrap();
        netns::enter(&fence).unwrap();

        let proxy = TcpListener::from(listeners.proxy);
        let mut client = connect(SocketAddrV4::new(GATEWAY, PROXY_PORT)).unwrap();
        talk(&mut client, &mut accept(&proxy));
        for to in [v4([1, 2, 3, 4], 80), v4([10, 200, 0, 7], 80), SocketAddrV4::new(GATEWAY, 22)] {
            let refused = connect(to).unwrap_err();
            assert_eq!(errno(&refused), Some(Errno::CONNREFUSED), "{to}");
        }
        let any = UdpSocket::bind("0.0.0.0:0").unwrap();
        assert_eq!(errno(&any.send_to(b"x", "8.8.8.8:123").unwrap_err()), Some(Errno::ACCESS));
    });
}

#[test]
fn building_often_leaves_nothing_behind() {
    in_thread(|| {
        // A namespace of this test's own, to count what is left in it.
        let home = netns::unshare().unwrap();
        for _ in 0..50 {
            let rig = rig();
            drop(rig);
            netns::enter(&home).unwrap();
        }
        let devices = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap();
        assert!(!devices.contains("eth0") && !devices.contains("fence"), "{devices}");
    });
}

#[test]
fn a_second_build_in_the_same_place_fails_and_says_where() {
    in_thread(|| {
        let rig = rig();
        netns::enter(&rig.gateway).unwrap();
        let route = Route::open().unwrap();
        let error = gateway::build(&route, &rig.fence).unwrap_err();
        assert_eq!(error.errno(), Some(Errno::EXIST.raw_os_error()));
        assert!(error.to_string().starts_with("create the veth pair: "), "{error}");
    });
}

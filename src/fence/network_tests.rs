//! Gateway and fence, built and then tried from inside with real sockets. Each test has a thread
//! of its own, which never comes back to the machine's namespace. Needs root.

use std::io::{self, Read, Write};
use std::net::{
    IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream, UdpSocket,
};
use std::os::fd::AsFd;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType};

use super::agent_net::{self, FenceReport, Ipv6};
use super::gateway::{self, AGENT, CAPTURE_PORT, GATEWAY, GatewayReport, PROXY_PORT};
use super::listeners::{self, Listeners};
use super::netlink::Route;
use super::netns::{self, Namespace};
use super::nftables::Nftables;
use super::sockdiag::SockDiag;

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
    let Listeners {
        proxy,
        captured,
        dns_udp,
        dns_tcp,
    } = listeners::listeners().unwrap();
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
        assert_eq!(
            netns::current().unwrap().id().unwrap(),
            rig.fence.id().unwrap()
        );
    });
}

#[test]
fn the_proxy_is_reached_at_its_address() {
    in_thread(|| {
        let rig = rig();
        let mut client = connect(SocketAddrV4::new(GATEWAY, PROXY_PORT)).unwrap();
        let mut server = accept(&rig.proxy);
        assert_eq!(*addresses(&server).1.ip(), AGENT);
        talk(&mut client, &mut server);
    });
}

#[test]
fn other_tcp_is_captured_with_its_address() {
    in_thread(|| {
        let rig = rig();
        let gateway = GATEWAY.octets();
        for to in [
            v4([1, 2, 3, 4], 80),
            v4([1, 2, 3, 4], PROXY_PORT),
            v4([169, 254, 169, 254], 80),
            v4([10, 200, 0, 7], 80),
            v4([10, 96, 0, 1], 443),
            v4(gateway, 22),
            v4(gateway, CAPTURE_PORT),
            v4(gateway, gateway::DNS_PORT),
            v4([8, 8, 8, 8], CAPTURE_PORT),
            v4(gateway, 40_000),
        ] {
            let mut client = connect(to).unwrap_or_else(|e| panic!("{to}: {e}"));
            let mut server = accept(&rig.captured);
            let (local, peer) = addresses(&server);
            assert_eq!((local, *peer.ip()), (to, AGENT));
            talk(&mut client, &mut server);
        }
    });
}

#[test]
fn a_megabyte_passes_a_captured_connection_both_ways() {
    in_thread(|| {
        let rig = rig();
        let client = connect(v4([93, 184, 216, 34], 443)).unwrap();
        let server = accept(&rig.captured);
        megabyte(client.try_clone().unwrap(), server.try_clone().unwrap());
        megabyte(server, client);
    });
}

fn megabyte(mut from: TcpStream, mut to: TcpStream) {
    let data: Vec<u8> = (0..1_048_576_u32)
        .map(|i| i.to_le_bytes()[0] ^ 0x5a)
        .collect();
    let sent = data.clone();
    let writer = std::thread::spawn(move || from.write_all(&sent));
    let mut received = vec![0; data.len()];
    to.read_exact(&mut received).unwrap();
    writer.join().unwrap().unwrap();
    assert!(received == data);
}

#[test]
fn a_connection_that_the_proxy_closes_ends_at_the_client() {
    in_thread(|| {
        let rig = rig();
        let to = v4([1, 2, 3, 4], 80);
        // More than once from the same port, so that the gateway still waits for late packets of
        // the one before.
        for _ in 0..3 {
            let mut client = connect(to).unwrap();
            drop(accept(&rig.captured));
            assert_eq!(client.read(&mut [0; 1]).unwrap(), 0);
        }
    });
}

#[test]
fn loopback_of_the_fence_is_its_own() {
    in_thread(|| {
        let _rig = rig();
        let refused = connect(v4([127, 0, 0, 1], 9)).unwrap_err();
        assert_eq!(errno(&refused), Some(Errno::CONNREFUSED));
        let refused = connect(SocketAddrV4::new(AGENT, PROXY_PORT)).unwrap_err();
        assert_eq!(errno(&refused), Some(Errno::CONNREFUSED));
        for loopback in [
            IpAddr::V4(Ipv4Addr::LOCALHOST),
            IpAddr::V6(Ipv6Addr::LOCALHOST),
        ] {
            let one = UdpSocket::bind((loopback, 0)).unwrap();
            let two = UdpSocket::bind((loopback, 0)).unwrap();
            one.send_to(b"x", two.local_addr().unwrap()).unwrap();
            assert!(wait(&two, PollFlags::IN));
        }
    });
}

#[test]
fn datagrams_fail_at_once() {
    in_thread(|| {
        let _rig = rig();
        let any = UdpSocket::bind("0.0.0.0:0").unwrap();
        for to in [
            "8.8.8.8:123",
            "10.200.0.1:15053",
            "10.200.0.7:5353",
            "1.1.1.1:443",
        ] {
            let error = any.send_to(b"x", to).unwrap_err();
            assert_eq!(errno(&error), Some(Errno::ACCESS), "{to}");
            assert_eq!(
                errno(&any.connect(to).unwrap_err()),
                Some(Errno::ACCESS),
                "{to}"
            );
        }
        let lite = rustix::net::ipproto::UDPLITE;
        match rustix::net::socket_with(
            AddressFamily::INET,
            SocketType::DGRAM,
            SocketFlags::CLOEXEC,
            Some(lite),
        ) {
            Ok(socket) => {
                for to in [v4([8, 8, 8, 8], 53), v4([8, 8, 8, 8], 80)] {
                    assert_eq!(
                        rustix::net::connect(&socket, &to),
                        Err(Errno::ACCESS),
                        "{to}"
                    );
                }
            }
            Err(e) => eprintln!("SKIPPED: this kernel has no UDP-Lite ({e})"),
        }
    });
}

#[test]
fn dns_is_answered_from_the_address_that_was_asked() {
    in_thread(|| {
        let rig = rig();
        rig.dns_udp.set_nonblocking(false).unwrap();
        for server in [
            "8.8.8.8:53",
            "10.96.0.10:53",
            "10.200.0.1:53",
            "169.254.20.10:53",
        ] {
            let client = UdpSocket::bind("0.0.0.0:0").unwrap();
            client.connect(server).unwrap();
            client.set_read_timeout(Some(PATIENCE)).unwrap();
            for _ in 0..2 {
                client.send(b"query").unwrap();
                assert!(
                    wait(&rig.dns_udp, PollFlags::IN),
                    "{server}: no query arrived"
                );
                let mut buffer = [0; 16];
                let (length, from) = rig.dns_udp.recv_from(&mut buffer).unwrap();
                assert_eq!(
                    (&buffer[..length], from.ip()),
                    (&b"query"[..], AGENT.into())
                );
                rig.dns_udp.send_to(b"answer", from).unwrap();
                // A connected socket takes only what comes from the address it is connected to.
                let length = client.recv(&mut buffer).unwrap();
                assert_eq!(&buffer[..length], b"answer", "{server}");
            }
        }
        let mut client = connect(v4([8, 8, 8, 8], 53)).unwrap();
        let mut server = accept(&rig.dns_tcp);
        assert_eq!(addresses(&server).0, v4([8, 8, 8, 8], 53));
        talk(&mut client, &mut server);
    });
}

#[test]
fn ipv6_is_unreachable_at_once() {
    in_thread(|| {
        let _rig = rig();
        for to in [
            "[2001:db8::1]:80",
            "[fe80::1]:80",
            "[ff02::1]:80",
            "[64:ff9b::1]:53",
        ] {
            let to: SocketAddr = to.parse().unwrap();
            let error = TcpStream::connect_timeout(&to, PATIENCE).unwrap_err();
            let expected = [Some(Errno::NETUNREACH), Some(Errno::INVAL)];
            assert!(expected.contains(&errno(&error)), "tcp {to}: {error}");
            let socket = UdpSocket::bind("[::]:0").unwrap();
            let error = socket.send_to(b"x", to).unwrap_err();
            assert!(
                matches!(
                    errno(&error),
                    Some(Errno::NETUNREACH | Errno::INVAL | Errno::ADDRNOTAVAIL)
                ),
                "udp {to}: {error}"
            );
        }
    });
}

#[test]
fn the_proxy_reaches_what_listens_in_the_fence() {
    in_thread(|| {
        let rig = rig();
        for bind in ["0.0.0.0:0", "[::]:0", "10.200.0.2:0"] {
            let listener = TcpListener::bind(bind).unwrap();
            let port = listener.local_addr().unwrap().port();
            let mut outer = rig
                .connect_from_gateway(SocketAddrV4::new(AGENT, port))
                .unwrap();
            let mut inner = accept(&listener);
            talk(&mut outer, &mut inner);
            talk(&mut inner, &mut outer);
            megabyte(outer.try_clone().unwrap(), inner.try_clone().unwrap());
            megabyte(inner, outer);
        }
        let closed = rig
            .connect_from_gateway(SocketAddrV4::new(AGENT, 9))
            .unwrap_err();
        assert_eq!(errno(&closed), Some(Errno::CONNREFUSED));
    });
}

#[test]
fn the_agent_cannot_use_the_port_of_an_inbound_connection() {
    in_thread(|| {
        let rig = rig();
        let listener = TcpListener::bind("0.0.0.0:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let outer = rig
            .connect_from_gateway(SocketAddrV4::new(AGENT, port))
            .unwrap();
        let taken = addresses(&outer).0;
        assert_eq!(*taken.ip(), GATEWAY);
        let _inner = accept(&listener);
        let _client = connect(taken).unwrap();
        assert_eq!(addresses(&accept(&rig.captured)).0, taken);
    });
}

#[test]
fn a_cookie_names_the_clients_socket() {
    in_thread(|| {
        let mut rig = rig();
        for to in [SocketAddrV4::new(GATEWAY, PROXY_PORT), v4([1, 2, 3, 4], 80)] {
            let listener = if *to.ip() == GATEWAY {
                &rig.proxy
            } else {
                &rig.captured
            };
            let mapped = SocketAddr::new(to.ip().to_ipv6_mapped().into(), to.port());
            for to_any in [SocketAddr::V4(to), mapped] {
                let client = TcpStream::connect_timeout(&to_any, PATIENCE).unwrap();
                let accepted = accept(listener);
                let (server, from) = addresses(&accepted);
                let cookie = rustix::net::sockopt::socket_cookie(&client).unwrap();
                assert_eq!(
                    rig.diag.cookie(from, server).unwrap(),
                    Some(cookie),
                    "{to_any}"
                );
                let other = SocketAddrV4::new(*server.ip(), server.port() + 1);
                assert_eq!(rig.diag.cookie(from, other).unwrap(), None);
                drop(client);
                drop(accepted);
                assert_eq!(rig.diag.cookie(from, server).unwrap(), None);
            }
        }
        // A listener on the client's port is not its connection.
        let listener = TcpListener::bind("0.0.0.0:0").unwrap();
        let client = SocketAddrV4::new(AGENT, listener.local_addr().unwrap().port());
        assert_eq!(rig.diag.cookie(client, v4([1, 2, 3, 4], 80)).unwrap(), None);
    });
}

#[test]
fn what_listens_is_listed_unless_on_loopback() {
    in_thread(|| {
        let mut rig = rig();
        assert_eq!(rig.diag.listening().unwrap(), []);
        let bind = |address: &str| TcpListener::bind(address).unwrap();
        let seen = [
            "0.0.0.0:0",
            "[::]:0",
            "10.200.0.2:0",
            "[::ffff:10.200.0.2]:0",
        ]
        .map(bind);
        let hidden = ["127.0.0.1:0", "[::1]:0", "127.0.0.2:0"].map(bind);
        let only = rustix::net::socket(AddressFamily::INET6, SocketType::STREAM, None).unwrap();
        rustix::net::sockopt::set_ipv6_v6only(&only, true).unwrap();
        rustix::net::bind(&only, &"[::]:0".parse::<SocketAddr>().unwrap()).unwrap();
        rustix::net::listen(&only, 1).unwrap();

        let mut expected = seen
            .each_ref()
            .map(|l| l.local_addr().unwrap().port())
            .to_vec();
        expected.sort_unstable();
        assert_eq!(rig.diag.listening().unwrap(), expected);
        drop((seen, hidden));
        assert_eq!(rig.diag.listening().unwrap(), []);
    });
}

#[test]
fn many_listeners_fit() {
    in_thread(|| {
        let mut rig = rig();
        let all: Vec<_> = (0..700)
            .map(|_| TcpListener::bind("0.0.0.0:0").unwrap())
            .collect();
        assert_eq!(rig.diag.listening().unwrap().len(), all.len());
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
        let mut outer = rig
            .connect_from_gateway(SocketAddrV4::new(AGENT, port))
            .unwrap();
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
        for to in [
            v4([1, 2, 3, 4], 80),
            v4([10, 200, 0, 7], 80),
            SocketAddrV4::new(GATEWAY, 22),
        ] {
            let refused = connect(to).unwrap_err();
            assert_eq!(errno(&refused), Some(Errno::CONNREFUSED), "{to}");
        }
        let any = UdpSocket::bind("0.0.0.0:0").unwrap();
        assert_eq!(
            errno(&any.send_to(b"x", "8.8.8.8:123").unwrap_err()),
            Some(Errno::ACCESS)
        );
    });
}

#[test]
fn a_flood_of_queries_is_cut_and_ends() {
    in_thread(|| {
        let rig = rig();
        // Far more than pass in the time this takes on any machine.
        let sent = 20_000;
        for _ in 0..sent {
            let client = UdpSocket::bind("0.0.0.0:0").unwrap();
            client.send_to(b"q", "8.8.8.8:53").unwrap();
        }
        netns::enter(&rig.gateway).unwrap();
        let tracked = std::fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_count");
        match tracked {
            Ok(count) => assert!(count.trim().parse::<u32>().unwrap() < sent, "{count}"),
            Err(e) => eprintln!("SKIPPED: the kernel does not show the count ({e})"),
        }
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
        assert!(
            !devices.contains("eth0") && !devices.contains("fence"),
            "{devices}"
        );
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
        assert!(
            error.to_string().starts_with("create the veth pair: "),
            "{error}"
        );
    });
}

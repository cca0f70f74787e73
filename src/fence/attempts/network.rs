//! Ways round the proxy: addresses, source addresses, the namespaces' own set-up.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::time::Duration;

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketType};

use super::Attempt::{Do, Tcp, Tcp6, Udp, Udp6};
use super::Layer::{Credentials, Landlock, Network};
use super::sockets::fresh;
use super::{Context, EACCES, EPERM, Expect, HOLDS, Row, Seen, raw};

/// A captured connection is reset; without packet rules in the kernel it is refused at once.
const RESET: &[Expect] = &[Expect::Errno(libc::ECONNRESET), Expect::Errno(libc::ECONNREFUSED)];
const REFUSED: &[Expect] = &[Expect::Errno(libc::ECONNREFUSED)];
/// A kernel without IPv6 has no such socket.
const NO_IPV6: &[Expect] = &[Expect::Errno(libc::ENETUNREACH), Expect::Errno(libc::EAFNOSUPPORT)];
/// The domain's scope would say EPERM, if the name could be found at all.
const NOT_FOUND: &[Expect] = &[Expect::Errno(libc::ECONNREFUSED), Expect::Errno(libc::EPERM)];
const NXDOMAIN: &[Expect] = &[Expect::Rcode(3)];

const fn tcp_row(id: &'static str, what: &'static str, ip: [u8; 4], port: u16) -> Row {
    Row::new(id, Network, RESET, what, Tcp(ip, port))
}

const fn udp_row(id: &'static str, what: &'static str, ip: [u8; 4], port: u16) -> Row {
    Row::new(id, Network, EACCES, what, Udp(ip, port))
}

const fn change(id: &'static str, what: &'static str, attempt: fn(&Context) -> Seen) -> Row {
    Row::new(id, Credentials, EPERM, what, Do(attempt))
}

const PUBLIC6: [u16; 8] = [0x2606, 0x4700, 0x4700, 0, 0, 0, 0, 0x1111];

pub(super) const ROWS: &[Row] = &[
    Row::new("network-namespace", Network, HOLDS, "the namespace is the fence's", Do(namespace)),
    Row::new(
        "network-devices",
        Network,
        HOLDS,
        "no device but lo and the cable, tunnels of the kernel's own aside",
        Do(devices),
    ),
    tcp_row("tcp-https", "HTTPS round the proxy", [1, 1, 1, 1], 443),
    tcp_row("tcp-http", "HTTP round the proxy", [93, 184, 216, 34], 80),
    tcp_row("tcp-dns-over-tls", "DNS over TLS round the fence's own", [9, 9, 9, 9], 853),
    tcp_row("tcp-ssh", "ssh", [140, 82, 121, 4], 22),
    tcp_row("tcp-metadata", "the cloud's metadata address", [169, 254, 169, 254], 80),
    tcp_row("tcp-link-local", "a link-local address", [169, 254, 170, 2], 80),
    tcp_row("tcp-service", "a cluster service", [10, 96, 0, 1], 443),
    tcp_row("tcp-kubelet", "a node's kubelet", [172, 18, 0, 2], 10250),
    tcp_row("tcp-gateway-ssh", "another port of the gateway", [10, 200, 0, 1], 22),
    tcp_row("tcp-gateway-capture", "the port of captured connections", [10, 200, 0, 1], 15001),
    tcp_row("tcp-on-link", "a neighbour on the cable", [10, 200, 0, 7], 80),
    tcp_row("tcp-multicast-range", "a reserved address", [240, 0, 0, 1], 80),
    Row::new(
        "tcp-pod-loopback",
        Network,
        REFUSED,
        "a port that listens on the pod's loopback",
        Do(pod_loopback),
    ),
    Row::new("tcp6-public", Network, NO_IPV6, "HTTPS over IPv6", Tcp6(PUBLIC6, 443)),
    Row::new(
        "tcp6-metadata",
        Network,
        NO_IPV6,
        "the metadata address of IPv6",
        Tcp6([0xfd00, 0x0ec2, 0, 0, 0, 0, 0, 0x254], 80),
    ),
    Row::new(
        "tcp6-nat64",
        Network,
        NO_IPV6,
        "an IPv4 address by NAT64",
        Tcp6([0x64, 0xff9b, 0, 0, 0, 0, 0xa9fe, 0xa9fe], 80),
    ),
    Row::new("udp6-quic", Network, NO_IPV6, "QUIC over IPv6", Udp6(PUBLIC6, 443)),
    Row::new("udp6-dns", Network, NO_IPV6, "DNS over IPv6", Udp6(PUBLIC6, 53)),
    udp_row("udp-quic", "QUIC", [1, 1, 1, 1], 443),
    udp_row("udp-ntp", "NTP", [162, 159, 200, 1], 123),
    udp_row("udp-metadata", "the metadata address", [169, 254, 169, 254], 80),
    udp_row("udp-gateway-dns", "the DNS listener by its own port", [10, 200, 0, 1], 15053),
    udp_row("udp-on-link", "a neighbour on the cable", [10, 200, 0, 7], 5353),
    udp_row("udp-multicast", "SSDP's multicast group", [239, 255, 255, 250], 1900),
    udp_row("udp-broadcast", "broadcast", [255, 255, 255, 255], 67),
    Row::new(
        "dns-udp-other-server",
        Network,
        NXDOMAIN,
        "DNS over UDP to another server: the fence's own answers",
        Do(|_| dns_udp([8, 8, 8, 8])),
    )
    .mistake(20),
    Row::new(
        "dns-tcp-other-server",
        Network,
        NXDOMAIN,
        "DNS over TCP to another server: the fence's own answers",
        Do(|_| dns_tcp([1, 1, 1, 1])),
    )
    .mistake(20),
    Row::new(
        "dns-node-local",
        Network,
        NXDOMAIN,
        "DNS to the node's cache",
        Do(|_| dns_udp([169, 254, 20, 10])),
    )
    .mistake(20),
    Row::new(
        "abstract-socket-outside",
        Network,
        NOT_FOUND,
        "an abstract unix socket of the pod's namespace",
        Do(abstract_socket),
    )
    .also(&[Landlock])
    .mistake(15),
    Row::new(
        "source-bind",
        Network,
        &[Expect::Errno(libc::EADDRNOTAVAIL)],
        "binding to an address that is not ours",
        Do(|_| spoof(false)),
    ),
    Row::new(
        "source-freebind",
        Network,
        // Which of the two is the kernel's choice: there is no route from there, or no such source.
        &[Expect::Errno(libc::ENETUNREACH), Expect::Errno(libc::EINVAL)],
        "sending from such an address (IP_FREEBIND)",
        Do(|_| spoof(true)),
    ),
    change("ip-transparent", "any source address (IP_TRANSPARENT)", |_| {
        option(libc::SOL_IP, libc::IP_TRANSPARENT)
    }),
    change("socket-mark", "a routing mark (SO_MARK)", |_| option(libc::SOL_SOCKET, libc::SO_MARK)),
    change("socket-buffer-force", "more kernel memory than the limit (SO_RCVBUFFORCE)", |_| {
        option(libc::SOL_SOCKET, libc::SO_RCVBUFFORCE)
    }),
    change("netlink-link-add", "a network device", |_| route_netlink(16)),
    change("netlink-link-set", "changing a network device", |_| route_netlink(19)),
    change("netlink-address-add", "an address", |_| route_netlink(20)),
    change("netlink-route-add", "a route", |_| route_netlink(24)),
    change("netlink-route-delete", "removing a route", |_| route_netlink(25)),
    change("netlink-neighbour-add", "an ARP entry", |_| route_netlink(28)),
    change("netlink-rule-add", "a routing rule", |_| route_netlink(32)),
    change("netlink-rule-delete", "removing the rule that stops datagrams", |_| route_netlink(33)),
    change("ioctl-device-flags", "SIOCSIFFLAGS", |_| device_ioctl(0x8914)),
    change("ioctl-device-address", "SIOCSIFADDR", |_| device_ioctl(0x8916)),
    change("ioctl-route-add", "SIOCADDRT", |_| device_ioctl(0x890B)),
];

/// How long one step of a connection may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// Connects, asks for something and waits for an answer.
pub(super) fn tcp(to: SocketAddr) -> Seen {
    let exchange = || -> std::io::Result<usize> {
        let mut stream = TcpStream::connect_timeout(&to, PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
        stream.read(&mut [0; 64])
    };
    match exchange() {
        Ok(0) => Seen::Broken("connected, and closed without a word".to_owned()),
        // Nobody said anything, and nobody refused either.
        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Seen::Worked,
        other => raw::seen_io(other),
    }
}

pub(super) fn udp(to: SocketAddr) -> Seen {
    let any: IpAddr = if to.is_ipv4() { [0; 4].into() } else { [0_u16; 8].into() };
    let send = || -> std::io::Result<usize> {
        let socket = UdpSocket::bind((any, 0))?;
        socket.set_broadcast(true)?;
        socket.send_to(b"x", to)
    };
    raw::seen_io(send())
}

fn namespace(context: &Context) -> Seen {
    use std::os::unix::fs::MetadataExt;
    let Some(wanted) = context.facts.namespace else {
        return Seen::Skipped("not known which namespace the fence's is".to_owned());
    };
    match std::fs::metadata("/proc/self/ns/net") {
        Ok(data) if (data.dev(), data.ino()) == wanted => Seen::Holds,
        Ok(data) => Seen::Broken(format!("in namespace {}, not in {}", data.ino(), wanted.1)),
        Err(error) => Seen::Broken(error.to_string()),
    }
}

/// With their modules loaded, every new namespace has these; they lead nowhere, and only
/// `CAP_NET_ADMIN` could change that.
const TUNNELS: [&str; 9] =
    ["tunl0", "gre0", "gretap0", "erspan0", "ip_vti0", "ip6_vti0", "sit0", "ip6tnl0", "ip6gre0"];

fn devices(_: &Context) -> Seen {
    let text = std::fs::read_to_string("/proc/self/net/dev").unwrap_or_default();
    let names: Vec<&str> =
        text.lines().skip(2).filter_map(|line| Some(line.split_once(':')?.0.trim())).collect();
    let others = names.iter().filter(|name| !["lo", "eth0"].contains(*name));
    let ours = names.contains(&"lo") && names.contains(&"eth0");
    if ours && others.into_iter().all(|name| TUNNELS.contains(name)) {
        Seen::Holds
    } else {
        Seen::Broken(format!("devices: {}", names.join(" ")))
    }
}

fn pod_loopback(context: &Context) -> Seen {
    match context.facts.loopback_port {
        Some(port) => tcp(([127, 0, 0, 1], port).into()),
        None => Seen::Skipped("nothing listens there for this row".to_owned()),
    }
}

fn abstract_socket(context: &Context) -> Seen {
    let Some(name) = &context.facts.abstract_name else {
        return Seen::Skipped("nothing listens there for this row".to_owned());
    };
    let connect = std::os::unix::net::SocketAddr::from_abstract_name(name)
        .and_then(|address| std::os::unix::net::UnixStream::connect_addr(&address));
    raw::seen_io(connect)
}

/// A query for the text records of a name that exists outside and that a policy would not name.
fn query() -> Vec<u8> {
    let mut query = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in ["ringfence-escape", "example", "com"] {
        query.push(u8::try_from(label.len()).unwrap_or(0));
        query.extend_from_slice(label.as_bytes());
    }
    query.extend_from_slice(&[0, 0, 16, 0, 1]);
    query
}

fn rcode(answer: &[u8]) -> Seen {
    match answer {
        [0x12, 0x34, flags, code, ..] if flags & 0x80 != 0 => Seen::Rcode(code & 0x0F),
        _ => Seen::Broken("the answer is no answer to the question".to_owned()),
    }
}

fn dns_udp(server: [u8; 4]) -> Seen {
    let ask = || -> std::io::Result<Vec<u8>> {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.connect((IpAddr::from(server), 53))?;
        socket.send(&query())?;
        let mut answer = vec![0; 512];
        let length = socket.recv(&mut answer)?;
        answer.truncate(length);
        Ok(answer)
    };
    ask().map_or_else(|error| raw::seen_io::<()>(Err(error)), |answer| rcode(&answer))
}

fn dns_tcp(server: [u8; 4]) -> Seen {
    let ask = || -> std::io::Result<[u8; 6]> {
        let mut stream = TcpStream::connect_timeout(&(server, 53).into(), PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let query = query();
        stream.write_all(&u16::try_from(query.len()).unwrap_or(0).to_be_bytes())?;
        stream.write_all(&query)?;
        let mut answer = [0; 6];
        stream.read_exact(&mut answer)?;
        Ok(answer)
    };
    ask().map_or_else(|error| raw::seen_io::<()>(Err(error)), |answer| rcode(&answer[2..]))
}

/// From an address of the documentation's own range. To the DNS port, where datagrams do leave
/// the namespace.
fn spoof(freebind: bool) -> Seen {
    fresh(SocketType::DGRAM, |socket| {
        if freebind {
            let set = raw::set_option(socket, libc::SOL_IP, libc::IP_FREEBIND, 1);
            if set != Seen::Worked {
                return set;
            }
        }
        let source = SocketAddr::from(([192, 0, 2, 7], 0));
        let bound = rustix::net::bind(socket, &source);
        if !freebind || bound.is_err() {
            return raw::seen(bound);
        }
        let to = SocketAddr::from(([8, 8, 8, 8], 53));
        raw::seen(rustix::net::sendto(socket, &query(), SendFlags::empty(), &to))
    })
}

fn option(level: i32, name: i32) -> Seen {
    fresh(SocketType::DGRAM, |socket| raw::set_option(socket, level, name, 1))
}

/// One request to change the network, of which the kernel understands no more than its kind: the
/// right to change is asked for first.
fn route_netlink(kind: u16) -> Seen {
    const REQUEST_AND_ACK: u16 = 5;
    const ERROR: u16 = 2;
    let ask = || -> rustix::io::Result<Vec<u8>> {
        let socket = rustix::net::socket(AddressFamily::NETLINK, SocketType::RAW, None)?;
        let mut message = Vec::new();
        message.extend_from_slice(&32_u32.to_ne_bytes());
        message.extend_from_slice(&kind.to_ne_bytes());
        message.extend_from_slice(&REQUEST_AND_ACK.to_ne_bytes());
        message.resize(32, 0);
        rustix::net::send(&socket, &message, SendFlags::empty())?;
        let mut answer = vec![0; 256];
        let (length, _) = rustix::net::recv(&socket, &mut answer[..], RecvFlags::empty())?;
        answer.truncate(length);
        Ok(answer)
    };
    let answer = match ask() {
        Ok(answer) => answer,
        Err(errno) => return raw::seen::<()>(Err(errno)),
    };
    let code = answer.get(16..20).and_then(|code| code.try_into().ok()).map(i32::from_ne_bytes);
    match (answer.get(4..6) == Some(&ERROR.to_ne_bytes()[..]), code) {
        (true, Some(0)) => Seen::Worked,
        (true, Some(code)) => Seen::Errno(-code),
        _ => Seen::Broken("netlink answered with something else than a result".to_owned()),
    }
}

/// With the name of a device that does not exist.
fn device_ioctl(command: u64) -> Seen {
    fresh(SocketType::DGRAM, |socket: &OwnedFd| {
        let mut request = [0_u8; 128];
        request[..7].copy_from_slice(b"nosuch0");
        let fd = u64::from(socket.as_raw_fd().unsigned_abs());
        let args = [fd, command, raw::address(&request), 0, 0, 0];
        raw::seen(raw::call(libc::SYS_ioctl, args))
    })
}

//! Whose connection is this, and what listens in the fence: asked of the kernel over a
//! `sock_diag` socket of the fence's namespace. No capability is needed to ask, so that the socket
//! can be passed on; it only ever shows the namespace in which it was opened.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, SocketAddrV4};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use netlink_packet_core::NLM_F_DUMP;
use netlink_packet_sock_diag::SockDiagMessage;
use netlink_packet_sock_diag::constants::{AF_INET, AF_INET6, IPPROTO_TCP};
use netlink_packet_sock_diag::inet::nlas::Nla;
use netlink_packet_sock_diag::inet::{
    ExtensionFlags, InetRequest, InetResponse, SocketId, StateFlags,
};
use rustix::io::Errno;
use rustix::net::netlink::SOCK_DIAG;

use super::error::Result;
use super::gateway::AGENT;
use super::netlink::{self, Batch};

/// A socket that says which TCP sockets its namespace has.
#[derive(Debug)]
pub struct SockDiag(OwnedFd);

impl SockDiag {
    /// Opens one in the namespace of the calling thread, which must be the fence's.
    pub fn open() -> Result<Self> {
        netlink::open(Some(SOCK_DIAG)).map(Self)
    }

    /// Takes one that another thread opened.
    #[must_use]
    pub fn from_fd(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// The cookie (what `getsockopt(SO_COOKIE)` says) of the socket of the fence whose own address
    /// is `client` and whose peer is `server`, IPv4 or IPv6 with mapped addresses. `None` where
    /// there is no such socket: it may be closed, and listeners and sockets that only wait for
    /// late packets do not count.
    pub fn cookie(&mut self, client: SocketAddrV4, server: SocketAddrV4) -> Result<Option<u64>> {
        let object = format!("the connection {client} to {server}");
        let mut batch = Batch::new();
        batch.typed("look up", &object, 0, &exact(client, server));
        let replies = match batch.exchange(&self.0) {
            Err(e) if e.errno() == Some(Errno::NOENT.raw_os_error()) => return Ok(None),
            replies => replies?,
        };
        for reply in &replies.messages {
            let SockDiagMessage::InetResponse(found) = reply.parse("look up", &object)? else {
                continue;
            };
            // Where no connection matches, the kernel looks for a listener on the client's port.
            if is_connection(&found) && is_between(&found.header.socket_id, client, server) {
                return Ok(Some(whole(found.header.socket_id.cookie)));
            }
        }
        Ok(None)
    }

    /// The TCP ports that the gateway can reach, because something listens on them at 0.0.0.0, at
    /// :: (unless for IPv6 only) or at 10.200.0.2. Sorted, each once; what listens on loopback
    /// only is not among them.
    pub fn listening(&mut self) -> Result<Vec<u16>> {
        let mut ports = BTreeSet::new();
        for (family, mut id) in [(AF_INET, SocketId::new_v4()), (AF_INET6, SocketId::new_v6())] {
            id.cookie = ANY_COOKIE;
            let request = request(family, StateFlags::LISTEN, id);
            let object = "the sockets that listen";
            let mut batch = Batch::new();
            batch.typed("list", object, NLM_F_DUMP, &request);
            for reply in &batch.exchange(&self.0)?.messages {
                let SockDiagMessage::InetResponse(found) = reply.parse("list", object)? else {
                    continue;
                };
                if is_reachable(&found) {
                    ports.insert(found.header.socket_id.source_port);
                }
            }
        }
        Ok(ports.into_iter().collect())
    }
}

impl AsFd for SockDiag {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Not asking for a cookie.
const ANY_COOKIE: [u8; 8] = [0xff; 8];

fn request(family: u8, states: StateFlags, socket_id: SocketId) -> SockDiagMessage {
    SockDiagMessage::InetRequest(InetRequest {
        family,
        protocol: IPPROTO_TCP,
        extensions: ExtensionFlags::empty(),
        states,
        socket_id,
    })
}

/// The kernel keeps connections between mapped addresses with those of IPv4: asking for IPv4
/// finds both.
fn exact(client: SocketAddrV4, server: SocketAddrV4) -> SockDiagMessage {
    let id = SocketId {
        source_port: client.port(),
        destination_port: server.port(),
        source_address: (*client.ip()).into(),
        destination_address: (*server.ip()).into(),
        interface_id: 0,
        cookie: ANY_COOKIE,
    };
    request(AF_INET, StateFlags::all(), id)
}

/// States of a socket that a process can still hold and that has a peer. Not: a request that is
/// being answered, `TIME_WAIT` (both have cookies of their own), closed, listening. Nor `SYN_SENT`:
/// the connections that are asked for were accepted, so the client's end has left it; one that has
/// not is another socket's, on a tuple that changed hands.
fn is_connection(found: &InetResponse) -> bool {
    let state = 1_u32.checked_shl(found.header.state.into()).unwrap_or(0);
    (StateFlags::ESTABLISHED
        | StateFlags::FIN_WAIT1
        | StateFlags::FIN_WAIT2
        | StateFlags::CLOSE_WAIT
        | StateFlags::LAST_ACK
        | StateFlags::CLOSING)
        .bits()
        & state
        != 0
}

fn is_between(id: &SocketId, client: SocketAddrV4, server: SocketAddrV4) -> bool {
    ipv4(id.source_address) == Some(*client.ip())
        && id.source_port == client.port()
        && ipv4(id.destination_address) == Some(*server.ip())
        && id.destination_port == server.port()
}

fn is_reachable(found: &InetResponse) -> bool {
    let ipv6_only = found.nlas.iter().any(|nla| matches!(nla, Nla::SkV6Only(true)));
    match found.header.socket_id.source_address {
        IpAddr::V6(address) if address.is_unspecified() => !ipv6_only,
        address => {
            ipv4(address).is_some_and(|address| address.is_unspecified() || address == AGENT)
        }
    }
}

fn ipv4(address: IpAddr) -> Option<Ipv4Addr> {
    match address {
        IpAddr::V4(address) => Some(address),
        IpAddr::V6(address) => address.to_ipv4_mapped(),
    }
}

/// The kernel shows the cookie as two words in the machine's order, the low one first.
fn whole(cookie: [u8; 8]) -> u64 {
    let word = |at: usize| {
        u32::from_ne_bytes([cookie[at], cookie[at + 1], cookie[at + 2], cookie[at + 3]])
    };
    (u64::from(word(4)) << 32) | u64::from(word(0))
}

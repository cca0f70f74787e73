//! The namespace at the far end of the agent's only cable. It holds listening sockets and nothing
//! else, so that a packet of the agent's has nowhere to go, with or without packet rules:
//!
//! - every address is local here (`local default dev lo`), so that nothing is forwarded, even
//!   where the node's `ip_forward=1` was copied, and a TCP connection that no rule captures is
//!   refused at once;
//! - there is no other interface;
//! - the packet rules ([`nftables`](super::nftables)) then bring TCP and DNS to our listeners.
//!
//! `local default` is in the main table and not in the local one: there it would come before the
//! route back to the agent as soon as the kernel keeps the two tables apart.

use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd};

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVeth, LinkAttribute, LinkInfo, LinkMessage,
};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteScope, RouteType};

use super::device::{self, End, LOOPBACK, NEW};
use super::error::Result;
use super::netlink::{Batch, Route};
use super::netns::Namespace;
use super::nftables::{self, Nftables};

/// The gateway's address.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 200, 0, 1);
/// The agent's address.
pub const AGENT: Ipv4Addr = Ipv4Addr::new(10, 200, 0, 2);
/// Where the proxy listens, on [`GATEWAY`] only.
pub const PROXY_PORT: u16 = 3128;
/// Where captured TCP connections arrive.
pub const CAPTURE_PORT: u16 = 15001;
/// Where DNS queries arrive, over UDP and TCP.
pub const DNS_PORT: u16 = 15053;

/// The end of the cable in the gateway.
pub(super) const GATEWAY_END: End =
    End { name: "fence", index: 200, mac: [0x02, 0, 10, 200, 0, 1], address: GATEWAY };
/// The end of the cable in the fence; named as programs expect it.
pub(super) const AGENT_END: End =
    End { name: "eth0", index: 200, mac: [0x02, 0, 10, 200, 0, 2], address: AGENT };

/// What was built and read back.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct GatewayReport {
    /// The gateway's address.
    pub address: Ipv4Addr,
    /// The packet rules. Without them nothing is captured and DNS does not answer, but nothing
    /// gets out either.
    pub nftables: Nftables,
}

/// Builds the gateway: cable, address, routes, packet rules; read back, all but the device.
///
/// The calling thread must be in the gateway's namespace, in which `gateway` was opened; the far
/// end of the cable goes straight into `fence`. Needs `CAP_NET_ADMIN` in both. The cable carries
/// nothing before [`agent_net::build`](super::agent_net::build) has set up the other end; that
/// also reads back this one.
pub fn build(gateway: &Route, fence: &Namespace) -> Result<GatewayReport> {
    lay_cable(gateway, fence)?;
    Ok(GatewayReport { address: GATEWAY, nftables: nftables::apply()? })
}

/// Everything but the packet rules.
pub(super) fn lay_cable(gateway: &Route, fence: &Namespace) -> Result<()> {
    let routes = [
        device::route(
            RouteType::Unicast,
            RouteScope::Link,
            Some(AGENT),
            vec![
                RouteAttribute::Oif(GATEWAY_END.index),
                RouteAttribute::PrefSource(RouteAddress::Inet(GATEWAY)),
            ],
        ),
        device::route(
            RouteType::Local,
            RouteScope::Host,
            None,
            vec![RouteAttribute::Oif(LOOPBACK)],
        ),
    ];
    let mut batch = Batch::new();
    batch.typed("create", "the veth pair", NEW, &cable(fence));
    batch.typed("bring up", "lo of the gateway", 0, &device::up(LOOPBACK));
    GATEWAY_END.configure(&mut batch, &AGENT_END);
    for (route, name) in routes.iter().zip(["the route to the agent", "the local default route"]) {
        batch.typed("add", name, NEW, &RouteNetlinkMessage::NewRoute(route.clone()));
    }
    gateway.exchange(batch)?;
    GATEWAY_END.check_addresses(gateway)?;
    device::check_routes(gateway, &routes)
}

/// The veth pair. One queue an end: the kernel's default is one a processor, each with its own
/// entry in sysfs.
fn cable(fence: &Namespace) -> RouteNetlinkMessage {
    let end = |end: &End| {
        let mut link = LinkMessage::default();
        link.header.index = end.index;
        link.attributes = vec![
            LinkAttribute::IfName(end.name.to_owned()),
            LinkAttribute::Address(end.mac.to_vec()),
            LinkAttribute::NumTxQueues(1),
            LinkAttribute::NumRxQueues(1),
        ];
        link
    };
    let mut peer = end(&AGENT_END);
    peer.attributes.push(LinkAttribute::NetNsFd(fence.as_fd().as_raw_fd()));
    let mut link = end(&GATEWAY_END);
    link.attributes.push(LinkAttribute::LinkInfo(vec![
        LinkInfo::Kind(InfoKind::Veth),
        LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer))),
    ]));
    RouteNetlinkMessage::NewLink(link)
}

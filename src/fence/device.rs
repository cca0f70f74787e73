//! The cable between gateway and fence: the messages that set up one of its ends, and what its
//! ends must look like when read back.
//!
//! Per-device settings go in by `IFLA_AF_SPEC`, because `/proc/sys` may be read-only and belongs
//! to whoever mounted it. A new namespace copies the node's settings, and of several (`rp_filter`,
//! `arp_ignore`) the larger of `all` and the device's own counts, so that a node's `all` cannot be
//! lowered here. The design does without them: each end has the other as a permanent neighbour,
//! so there is no ARP to be ignored, and each has a route back, so that a reverse path check passes.

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use netlink_packet_core::{DefaultNla, NLA_F_NESTED, NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::address::{AddressAttribute, AddressMessage, AddressScope};
use netlink_packet_route::link::{
    AfSpecInet, AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InetDevConf, LinkAttribute, LinkFlags,
    LinkMessage, State,
};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::error::{NetworkError, Result};
use super::netlink::{Batch, Replies, Route, attribute};

/// Index of the loopback device in every namespace.
pub(super) const LOOPBACK: u32 = 1;
/// Makes a new object and fails where one is.
pub(super) const NEW: u16 = NLM_F_CREATE | NLM_F_EXCL;

const INET_CONF: u16 = 1;

/// The settings both ends get: (`IPV4_DEVCONF_*` of `linux/ip.h`, value).
const SETTINGS: [(u16, u32); 12] = [
    (1, 0),  // forwarding
    (3, 0),  // proxy_arp
    (4, 0),  // accept_redirects
    (6, 0),  // send_redirects
    (8, 0),  // rp_filter: `all` may still say 1, and passes
    (9, 0),  // accept_source_route
    (11, 0), // log_martians: the agent must not fill the node's log
    (19, 0), // arp_ignore
    (23, 0), // accept_local
    (24, 0), // src_valid_mark
    (26, 0), // route_localnet
    (29, 0), // ignore_routes_with_linkdown
];

/// One end of the cable.
pub(super) struct End {
    pub(super) name: &'static str,
    /// Chosen here, so that every message can be written before the device exists. High, since
    /// some kernels put tunnel devices of their own into each new namespace.
    pub(super) index: u32,
    pub(super) mac: [u8; 6],
    pub(super) address: Ipv4Addr,
}

impl End {
    /// Settings, then up, then address and neighbour. The order matters: an interface that comes
    /// up before its settings gives itself a link-local IPv6 address.
    pub(super) fn configure(&self, batch: &mut Batch, other: &Self) {
        let mut settings = Vec::new();
        for (setting, value) in SETTINGS {
            attribute(&mut settings, setting, &value.to_ne_bytes());
        }
        let inet = AfSpecInet::Other(DefaultNla::new(INET_CONF | NLA_F_NESTED, settings));
        let inet6 = AfSpecInet6::AddrGenMode(In6AddrGenMode::None);
        batch.typed("set", self.named("settings"), 0, &self.set(AfSpecUnspec::Inet(vec![inet])));
        batch.typed(
            "set",
            self.named("IPv6 address generation"),
            0,
            &self.set(AfSpecUnspec::Inet6(vec![inet6])),
        );
        batch.optional();
        batch.typed("bring up", self.name, 0, &up(self.index));

        let mut address = AddressMessage::default();
        address.header.family = AddressFamily::Inet;
        address.header.prefix_len = 32;
        address.header.scope = AddressScope::Universe;
        address.header.index = self.index;
        address.attributes = vec![
            AddressAttribute::Local(self.address.into()),
            AddressAttribute::Address(self.address.into()),
        ];
        let address = RouteNetlinkMessage::NewAddress(address);
        batch.typed("add", self.named(&format!("address {}/32", self.address)), NEW, &address);

        let mut neighbour = NeighbourMessage::default();
        neighbour.header.family = AddressFamily::Inet;
        neighbour.header.ifindex = self.index;
        neighbour.header.state = NeighbourState::Permanent;
        neighbour.attributes = vec![
            NeighbourAttribute::Destination(NeighbourAddress::Inet(other.address)),
            NeighbourAttribute::LinkLayerAddress(other.mac.to_vec()),
        ];
        let neighbour = RouteNetlinkMessage::NewNeighbour(neighbour);
        batch.typed("add", self.named(&format!("neighbour {}", other.address)), NEW, &neighbour);
    }

    fn named(&self, what: &str) -> String {
        format!("{what} of {}", self.name)
    }

    fn set(&self, spec: AfSpecUnspec) -> RouteNetlinkMessage {
        let mut link = LinkMessage::default();
        link.header.index = self.index;
        link.attributes = vec![LinkAttribute::AfSpecUnspec(vec![spec])];
        RouteNetlinkMessage::SetLink(link)
    }

    /// Waits until the kernel lets packets out at this end, and compares the device with what
    /// [`End::configure`] asked for.
    ///
    /// When the far end comes up, this one is told by a work queue, and until that has run the
    /// kernel drops what is sent here: a client's first connection would take a second, the time
    /// to its second SYN. Kernels from 6.8 do the work when asked for the device, so that the
    /// first question is the last. They do the opposite too: asked before the far end is up, they
    /// stop the device, which waits some milliseconds for all processors.
    pub(super) fn check_running(&self, route: &Route) -> Result<()> {
        for _ in 0..2000 {
            let mut batch = Batch::new();
            let mut request = LinkMessage::default();
            request.header.index = self.index;
            batch.typed("read back", self.name, 0, &RouteNetlinkMessage::GetLink(request));
            let link = self.find(&route.exchange(batch)?)?;
            if link.attributes.contains(&LinkAttribute::OperState(State::Up)) {
                return self.check(&link);
            }
            std::thread::sleep(Duration::from_micros(500));
        }
        let found = "it is not running after a second".to_owned();
        Err(NetworkError::differs("wait for", self.name, found))
    }

    fn find(&self, replies: &Replies) -> Result<LinkMessage> {
        for reply in &replies.messages {
            if let RouteNetlinkMessage::NewLink(link) = reply.parse("read back", self.name)?
                && link.header.index == self.index
            {
                return Ok(link);
            }
        }
        Err(NetworkError::differs("read back", self.name, "no such device".into()))
    }

    fn check(&self, link: &LinkMessage) -> Result<()> {
        let differs = |what: &str| Err(NetworkError::differs("read back", self.name, what.into()));
        if !link.header.flags.contains(LinkFlags::Up) {
            return differs("it is down");
        }
        if !link.attributes.contains(&LinkAttribute::Address(self.mac.to_vec())) {
            return differs("it has another hardware address");
        }
        let specs = link.attributes.iter().find_map(|attribute| match attribute {
            LinkAttribute::AfSpecUnspec(specs) => Some(specs.as_slice()),
            _ => None,
        });
        let mut ipv4 = false;
        for spec in specs.unwrap_or_default() {
            match spec {
                AfSpecUnspec::Inet(values) => {
                    ipv4 = values
                        .iter()
                        .any(|value| matches!(value, AfSpecInet::DevConf(c) if all_zero(c)));
                }
                AfSpecUnspec::Inet6(values) => {
                    let none = AfSpecInet6::AddrGenMode(In6AddrGenMode::None);
                    if !values.contains(&none) {
                        return differs("it gives itself IPv6 addresses");
                    }
                }
                _ => {}
            }
        }
        if ipv4 { Ok(()) } else { differs("its IPv4 settings are not those that were set") }
    }

    /// Compares the addresses of the namespace with the one this end was given: no other device
    /// but loopback has one, of either family.
    pub(super) fn check_addresses(&self, route: &Route) -> Result<()> {
        let request = RouteNetlinkMessage::GetAddress(AddressMessage::default());
        let mut own = false;
        for answer in route.dump("the addresses", &request)? {
            let RouteNetlinkMessage::NewAddress(found) = answer else {
                continue;
            };
            if found.header.index == LOOPBACK {
                continue;
            }
            let local = AddressAttribute::Local(IpAddr::V4(self.address));
            if found.header.index != self.index
                || found.header.prefix_len != 32
                || !found.attributes.contains(&local)
            {
                let found = format!("unexpected {:?}", found.attributes);
                return Err(NetworkError::differs("read back", "the addresses", found));
            }
            own = true;
        }
        if own {
            return Ok(());
        }
        Err(NetworkError::differs("read back", self.named("address"), "it is missing".into()))
    }
}

fn all_zero(conf: &InetDevConf) -> bool {
    // The fields of SETTINGS, which are all set to zero.
    [
        conf.forwarding,
        conf.proxy_arp,
        conf.accept_redirects,
        conf.send_redirects,
        conf.rp_filter,
        conf.accept_source_route,
        conf.log_martians,
        conf.arp_ignore,
        conf.accept_local,
        conf.src_vmark,
        conf.route_localnet,
        conf.ignore_routes_with_linkdown,
    ]
    .iter()
    .all(|value| *value == 0)
}

/// Brings a device up.
pub(super) fn up(index: u32) -> RouteNetlinkMessage {
    let mut link = LinkMessage::default();
    link.header.index = index;
    link.header.flags = LinkFlags::Up;
    link.header.change_mask = LinkFlags::Up;
    RouteNetlinkMessage::SetLink(link)
}

/// A route of the main table: `kind`, `scope`, destination (`None`: any) and the rest.
pub(super) fn route(
    kind: RouteType,
    scope: RouteScope,
    destination: Option<Ipv4Addr>,
    attributes: Vec<RouteAttribute>,
) -> RouteMessage {
    let mut route = RouteMessage::default();
    route.header.address_family = AddressFamily::Inet;
    route.header.table = RouteHeader::RT_TABLE_MAIN;
    route.header.protocol = RouteProtocol::Static;
    route.header.scope = scope;
    route.header.kind = kind;
    route.attributes = attributes;
    if let Some(address) = destination {
        route.header.destination_prefix_length = 32;
        route.attributes.push(RouteAttribute::Destination(RouteAddress::Inet(address)));
    }
    route
}

/// Compares the main table with `expected`: the same number of routes, and of each all that was
/// asked for.
pub(super) fn check_routes(socket: &Route, expected: &[RouteMessage]) -> Result<()> {
    let mut request = RouteMessage::default();
    request.header.address_family = AddressFamily::Inet;
    let found: Vec<RouteMessage> = socket
        .dump("the routes", &RouteNetlinkMessage::GetRoute(request))?
        .into_iter()
        .filter_map(|answer| match answer {
            RouteNetlinkMessage::NewRoute(route) => Some(route),
            _ => None,
        })
        .filter(|route| route.header.table == RouteHeader::RT_TABLE_MAIN)
        .collect();
    let shown = |wanted: &RouteMessage| {
        found.iter().any(|route| {
            route.header.kind == wanted.header.kind
                && route.header.scope == wanted.header.scope
                && route.header.destination_prefix_length == wanted.header.destination_prefix_length
                && wanted.attributes.iter().all(|a| route.attributes.contains(a))
        })
    };
    if found.len() == expected.len() && expected.iter().all(shown) {
        return Ok(());
    }
    Err(NetworkError::differs("read back", "the routes", format!("found {found:?}")))
}

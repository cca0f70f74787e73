//! The agent's end of the cable: one address, one route, and no datagrams but DNS.
//!
//! Datagrams other than DNS are refused here and not in the gateway, because only here is the
//! refusal an error of the system call (`EACCES`, at once); a rule in the gateway could only stay
//! silent, or answer with ICMP, of which the kernel sends a few a second. Loopback is untouched:
//! its table comes before these rules.

use std::net::Ipv4Addr;

use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteScope, RouteType,
};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleMessage, RulePortRange};
use netlink_packet_route::{AddressFamily, IpProtocol, RouteNetlinkMessage};

use super::device::{self, LOOPBACK, NEW};
use super::error::{NetworkError, Result};
use super::gateway::{AGENT, AGENT_END, GATEWAY, GATEWAY_END};
use super::netlink::{Batch, Route};

/// What was built and read back.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct FenceReport {
    /// Name of the interface.
    pub device: &'static str,
    /// The agent's address.
    pub address: Ipv4Addr,
    /// What becomes of IPv6.
    pub ipv6: Ipv6,
}

/// What becomes of IPv6 beyond loopback.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Ipv6 {
    /// A rule answers `ENETUNREACH`; there is no address and no route either.
    Unreachable,
    /// The kernel has none.
    Absent,
}

/// Builds the fence's end and reads it back, then waits until the cable carries packets both ways
/// and reads back both its ends.
///
/// `fence` was opened in the agent's namespace and `gateway` in the gateway's, after
/// [`gateway::build`](super::gateway::build); the calling thread may be in any.
pub fn build(fence: &Route, gateway: &Route) -> Result<FenceReport> {
    let mut default = device::route(
        RouteType::Unicast,
        RouteScope::Universe,
        None,
        vec![
            RouteAttribute::Oif(AGENT_END.index),
            RouteAttribute::Gateway(RouteAddress::Inet(GATEWAY)),
        ],
    );
    default.header.flags = RouteFlags::Onlink;

    let mut batch = Batch::new();
    batch.typed("bring up", "lo of the fence", 0, &device::up(LOOPBACK));
    AGENT_END.configure(&mut batch, &GATEWAY_END);
    let add = RouteNetlinkMessage::NewRoute(default.clone());
    batch.typed("add", format!("the default route by {GATEWAY}"), NEW, &add);
    let rules = rules();
    for (name, rule) in &rules {
        batch.typed("add the rule", name, NEW, &RouteNetlinkMessage::NewRule(rule.clone()));
        if rule.header.family == AddressFamily::Inet6 {
            batch.optional();
        }
    }
    let replies = fence.exchange(batch)?;
    AGENT_END.check_addresses(fence)?;
    device::check_routes(fence, &[default])?;
    let ipv6 = check_rules(fence, &rules)?;
    if ipv6 == Ipv6::Absent && replies.skipped.is_empty() {
        let found = "the kernel took it and does not show it".to_owned();
        return Err(NetworkError::differs("read back the rule", IPV6, found));
    }
    GATEWAY_END.check_running(gateway)?;
    AGENT_END.check_running(fence)?;
    Ok(FenceReport { device: AGENT_END.name, address: AGENT, ipv6 })
}

const IPV6: &str = "IPv6 unreachable";
/// UDP-Lite, which the library has no name for.
const UDP_LITE: u8 = 136;

/// The rules in the order in which the kernel asks them: after the local table (0), before main
/// (32766).
fn rules() -> [(&'static str, RuleMessage); 4] {
    let rule = |family, priority: u32, action, more: Vec<RuleAttribute>| {
        let mut rule = RuleMessage::default();
        rule.header.family = family;
        rule.header.action = action;
        rule.attributes = more;
        rule.attributes.push(RuleAttribute::Priority(priority));
        rule
    };
    let protocol = |number: u8| RuleAttribute::IpProtocol(IpProtocol::from(number));
    let dns = RuleAttribute::DestinationPortRange(RulePortRange { start: 53, end: 53 });
    let udp = 17;
    let inet = AddressFamily::Inet;
    let mut to_main = rule(inet, 100, RuleAction::ToTable, vec![protocol(udp), dns]);
    to_main.header.table = RouteHeader::RT_TABLE_MAIN;
    [
        ("udp dport 53 lookup main", to_main),
        ("udp prohibit", rule(inet, 101, RuleAction::Prohibit, vec![protocol(udp)])),
        ("udplite prohibit", rule(inet, 102, RuleAction::Prohibit, vec![protocol(UDP_LITE)])),
        (IPV6, rule(AddressFamily::Inet6, 100, RuleAction::Unreachable, vec![])),
    ]
}

/// Compares the rules of both families with `expected` and the kernel's own (local, main,
/// default).
fn check_rules(fence: &Route, expected: &[(&str, RuleMessage)]) -> Result<Ipv6> {
    let request = RouteNetlinkMessage::GetRule(RuleMessage::default());
    let found: Vec<RuleMessage> = fence
        .dump("the rules", &request)?
        .into_iter()
        .filter_map(|answer| match answer {
            RouteNetlinkMessage::NewRule(rule) => Some(rule),
            _ => None,
        })
        // The list also has the rules of multicast routing, which are a family of their own.
        .filter(|rule| matches!(rule.header.family, AddressFamily::Inet | AddressFamily::Inet6))
        .filter(|rule| !is_kernels_own(rule))
        .collect();
    let mut ipv6 = Ipv6::Absent;
    let mut matched = 0;
    for (name, wanted) in expected {
        let shown = found.iter().any(|rule| {
            rule.header.family == wanted.header.family
                && rule.header.action == wanted.header.action
                && rule.header.table == wanted.header.table
                && rule.header.src_len == 0
                && rule.header.dst_len == 0
                && wanted.attributes.iter().all(|a| rule.attributes.contains(a))
        });
        if shown {
            matched += 1;
            if wanted.header.family == AddressFamily::Inet6 {
                ipv6 = Ipv6::Unreachable;
            }
        } else if wanted.header.family != AddressFamily::Inet6 {
            let found = "the kernel does not show it".to_owned();
            return Err(NetworkError::differs("read back the rule", *name, found));
        }
    }
    if matched != found.len() {
        return Err(NetworkError::differs("read back", "the rules", format!("found {found:?}")));
    }
    Ok(ipv6)
}

/// The rules every namespace begins with: priority 0 (shown as none) to local, 32766 to main and
/// 32767 to default.
fn is_kernels_own(rule: &RuleMessage) -> bool {
    let priority = rule
        .attributes
        .iter()
        .find_map(|a| if let RuleAttribute::Priority(p) = a { Some(*p) } else { None })
        .unwrap_or(0);
    rule.header.action == RuleAction::ToTable
        && matches!((priority, rule.header.table), (0, 255) | (32766, 254) | (32767, 253))
}

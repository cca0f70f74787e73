//! The gateway's packet rules: written as one transaction, which the kernel takes whole or not at
//! all, then read back rule by rule. No program is run and no C library is used.
//!
//! One table of family `inet`, so that IPv6 meets the same chains:
//!
//! - what does not come from the agent's address over the cable is dropped;
//! - TCP to the proxy passes. All other TCP is given to a listener by `tproxy`, which leaves the
//!   packet's address as it was: `getsockname` of the accepted socket is what the agent asked for.
//!   `tproxy` looks for an existing connection of the packet first, so that it also carries the
//!   answers on connections that the proxy made into the fence
//!   ([`listeners::socket`](super::listeners::socket)); a fresh SYN to such a port has no
//!   connection and is captured like any other;
//! - no TCP is tracked: a table of connections could be filled by the agent;
//! - UDP to port 53 is redirected to the DNS listener. Here tracking is needed, since the answer
//!   has to come from the address and port that was asked. How many queries pass is limited: the
//!   kernel keeps an entry for each for 30 s;
//! - going out, answers to the agent pass, and nothing else.

use std::fmt::Write as _;

use libc::{NF_ACCEPT, NF_DROP};
use netlink_packet_core::{NLM_F_APPEND, NLM_F_CREATE, NLM_F_EXCL};
use rustix::io::Errno;
use rustix::net::netlink::NETFILTER;
use sha2::{Digest, Sha256};

use super::error::{NetworkError, Result};
use super::gateway::{AGENT, CAPTURE_PORT, DNS_PORT, GATEWAY, GATEWAY_END, PROXY_PORT};
use super::netlink::{self, Batch, attribute, nested};
use expression::Expressions;

mod expression;
mod read_back;

const TABLE: &str = "ringfence";
/// DNS queries a second, and at once. With the kernel's 30 s for an entry this bounds the table
/// at 15,500 entries, about 5 MB.
pub(super) const QUERIES: u64 = 500;

/// What the kernel holds after [`apply`].
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Nftables {
    /// All rules are there, read back.
    Applied {
        /// How many rules the kernel shows.
        rules: usize,
        /// SHA-256 of chains and rules as they were written, in hexadecimal. The same for every
        /// fence of one version.
        digest: String,
    },
    /// The kernel lacks a part of it, and holds none of it. The reason.
    Missing(String),
}

struct Chain {
    name: &'static str,
    kind: &'static str,
    hook: u32,
    priority: i32,
    policy: u32,
}

const PREROUTING: u32 = 0;
const FORWARD: u32 = 2;
const OUTPUT: u32 = 3;
/// Before connection tracking (-200), so that `notrack` works, and after reassembly (-400).
const RAW: i32 = -300;
const DESTINATION_NAT: i32 = -100;

const CHAINS: [Chain; 4] = [
    Chain { name: "in", kind: "filter", hook: PREROUTING, priority: RAW, policy: DROP },
    Chain { name: "out", kind: "filter", hook: OUTPUT, priority: RAW, policy: DROP },
    Chain { name: "through", kind: "filter", hook: FORWARD, priority: 0, policy: DROP },
    Chain { name: "dns", kind: "nat", hook: PREROUTING, priority: DESTINATION_NAT, policy: ACCEPT },
];
const DROP: u32 = NF_DROP.cast_unsigned();
const ACCEPT: u32 = NF_ACCEPT.cast_unsigned();

struct Rule {
    chain: &'static str,
    /// The rule as `nft` would write it, kept as its comment.
    text: String,
    expressions: Vec<u8>,
}

fn rules() -> Vec<Rule> {
    let rule = |chain, text: String, expressions: Expressions| Rule {
        chain,
        text,
        expressions: expressions.finish(),
    };
    let new = Expressions::default;
    let cable = GATEWAY_END.index;
    let name = GATEWAY_END.name;
    vec![
        rule("in", format!("iif != {name} drop"), new().iif_is_not(cable).drop()),
        rule("in", "meta nfproto != ipv4 drop".into(), new().not_ipv4().drop()),
        rule("in", format!("ip saddr != {AGENT} drop"), new().source_is_not(AGENT).drop()),
        rule(
            "in",
            format!("ip daddr {GATEWAY} tcp dport {PROXY_PORT} notrack accept"),
            new().tcp().destination(GATEWAY).destination_port(PROXY_PORT).notrack().accept(),
        ),
        rule(
            "in",
            format!("tcp dport 53 notrack tproxy ip to :{DNS_PORT} accept"),
            new().tcp().destination_port(53).notrack().tproxy(DNS_PORT).accept(),
        ),
        rule(
            "in",
            format!("meta l4proto tcp notrack tproxy ip to :{CAPTURE_PORT} accept"),
            new().tcp().notrack().tproxy(CAPTURE_PORT).accept(),
        ),
        rule(
            "in",
            format!("udp dport 53 limit rate {QUERIES}/second burst {QUERIES} packets accept"),
            new().udp().destination_port(53).limit(QUERIES).accept(),
        ),
        rule("out", format!("oif != {name} drop"), new().oif_is_not(cable).drop()),
        rule("out", "meta nfproto != ipv4 drop".into(), new().not_ipv4().drop()),
        rule("out", format!("ip daddr != {AGENT} drop"), new().destination_is_not(AGENT).drop()),
        rule("out", "meta l4proto tcp notrack accept".into(), new().tcp().notrack().accept()),
        rule(
            "out",
            format!("udp sport {DNS_PORT} accept"),
            new().udp().source_port(DNS_PORT).accept(),
        ),
        rule(
            "dns",
            format!("udp dport 53 redirect to :{DNS_PORT}"),
            new().udp().destination_port(53).redirect(DNS_PORT),
        ),
    ]
}

/// Writes the rules into the namespace of the calling thread and reads them back. Needs
/// `CAP_NET_ADMIN` there.
pub(super) fn apply() -> Result<Nftables> {
    let socket = match netlink::open(Some(NETFILTER)) {
        Err(e) if e.errno() == Some(Errno::PROTONOSUPPORT.raw_os_error()) => {
            return Ok(Nftables::Missing(e.to_string()));
        }
        opened => opened?,
    };
    let rules = rules();
    let written = transaction(&rules).exchange_closed(&socket);
    match written {
        Err(e) if is_missing(&e) => return Ok(Nftables::Missing(e.to_string())),
        written => written?,
    };
    read_back::chains(&socket)?;
    read_back::rules(&socket, &rules)?;
    Ok(Nftables::Applied { rules: rules.len(), digest: digest(&rules) })
}

/// The kernel has no `nf_tables`, or lacks one of the expressions or chain types.
fn is_missing(error: &NetworkError) -> bool {
    let unsupported = [Errno::NOENT, Errno::OPNOTSUPP, Errno::AFNOSUPPORT, Errno::PROTONOSUPPORT];
    unsupported.iter().any(|errno| error.errno() == Some(errno.raw_os_error()))
}

/// The kinds of message, in the subsystem's half of the number.
fn kind(message: libc::c_int) -> u16 {
    u16::try_from((libc::NFNL_SUBSYS_NFTABLES << 8) | message).expect("a small constant")
}

/// `struct nfgenmsg`: family, version 0, and for the marks of a transaction the subsystem.
fn header(family: libc::c_int, resource: libc::c_int) -> Vec<u8> {
    let [high, low] = u16::try_from(resource).expect("a small constant").to_be_bytes();
    vec![u8::try_from(family).expect("a small constant"), 0, high, low]
}

fn string(out: &mut Vec<u8>, kind: u16, value: &str) {
    nested(out, kind, |out| {
        out.extend_from_slice(value.as_bytes());
        out.push(0);
    });
}

// Attributes, from linux/netfilter/nf_tables.h.
const TABLE_NAME: u16 = 1;
const CHAIN_TABLE: u16 = 1;
const CHAIN_NAME: u16 = 3;
const CHAIN_HOOK: u16 = 4;
const CHAIN_POLICY: u16 = 5;
const CHAIN_TYPE: u16 = 7;
const HOOK_NUMBER: u16 = 1;
const HOOK_PRIORITY: u16 = 2;
const RULE_TABLE: u16 = 1;
const RULE_CHAIN: u16 = 2;
const RULE_EXPRESSIONS: u16 = 4;
const RULE_USERDATA: u16 = 7;

fn transaction(rules: &[Rule]) -> Batch {
    let mut batch = Batch::new();
    let marks = header(libc::AF_UNSPEC, libc::NFNL_SUBSYS_NFTABLES);
    let begin = u16::try_from(libc::NFNL_MSG_BATCH_BEGIN).expect("a small constant");
    let new = NLM_F_CREATE | NLM_F_EXCL;
    batch.push("write", "the packet rules", begin, 0, &marks);

    let mut table = header(libc::NFPROTO_INET, 0);
    string(&mut table, TABLE_NAME, TABLE);
    batch.push("add", "the table of packet rules", kind(libc::NFT_MSG_NEWTABLE), new, &table);
    for chain in &CHAINS {
        let mut payload = header(libc::NFPROTO_INET, 0);
        string(&mut payload, CHAIN_TABLE, TABLE);
        chain.write(&mut payload);
        let name = format!("the chain of packet rules {}", chain.name);
        batch.push("add", name, kind(libc::NFT_MSG_NEWCHAIN), new, &payload);
    }
    for rule in rules {
        let mut payload = header(libc::NFPROTO_INET, 0);
        string(&mut payload, RULE_TABLE, TABLE);
        string(&mut payload, RULE_CHAIN, rule.chain);
        attribute(&mut payload, RULE_EXPRESSIONS, &rule.expressions);
        attribute(&mut payload, RULE_USERDATA, &comment(&rule.text));
        let flags = NLM_F_CREATE | NLM_F_APPEND;
        let name = format!("\"{}\"", rule.text);
        batch.push("add the packet rule", name, kind(libc::NFT_MSG_NEWRULE), flags, &payload);
    }
    batch.push("write", "the packet rules", begin + 1, 0, &marks);
    batch
}

impl Chain {
    /// The attributes, in the order in which the kernel shows them.
    fn write(&self, out: &mut Vec<u8>) {
        string(out, CHAIN_NAME, self.name);
        nested(out, CHAIN_HOOK, |out| {
            attribute(out, HOOK_NUMBER, &self.hook.to_be_bytes());
            attribute(out, HOOK_PRIORITY, &self.priority.to_be_bytes());
        });
        attribute(out, CHAIN_POLICY, &self.policy.to_be_bytes());
        string(out, CHAIN_TYPE, self.kind);
    }
}

/// A rule's comment as `nft list ruleset` shows it: type 0, length, text with a NUL.
fn comment(text: &str) -> Vec<u8> {
    let mut out = vec![0, u8::try_from(text.len() + 1).expect("a rule is short")];
    out.extend_from_slice(text.as_bytes());
    out.push(0);
    out
}

fn digest(rules: &[Rule]) -> String {
    let mut all = Vec::new();
    for chain in &CHAINS {
        chain.write(&mut all);
    }
    for rule in rules {
        string(&mut all, RULE_CHAIN, rule.chain);
        attribute(&mut all, RULE_EXPRESSIONS, &rule.expressions);
    }
    let mut text = String::with_capacity(64);
    for byte in Sha256::digest(&all) {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_and_names_fit() {
        for rule in rules() {
            assert!(comment(&rule.text).len() <= 128, "{}", rule.text);
            assert!(CHAINS.iter().any(|chain| chain.name == rule.chain));
        }
    }

    #[test]
    fn a_changed_rule_is_seen() {
        let rules = rules();
        for (index, one) in rules.iter().enumerate() {
            assert!(read_back::same_expressions(&one.expressions, &one.expressions));
            for (other, two) in rules.iter().enumerate() {
                let same = read_back::same_expressions(&one.expressions, &two.expressions);
                assert_eq!(same, index == other || one.text == two.text, "{}", one.text);
            }
        }
    }

    #[test]
    fn the_digest_is_stable_and_depends_on_every_rule() {
        let all = rules();
        assert_eq!(digest(&all), digest(&rules()));
        for left_out in 0..all.len() {
            let mut fewer = rules();
            fewer.remove(left_out);
            assert_ne!(digest(&all), digest(&fewer));
        }
    }
}

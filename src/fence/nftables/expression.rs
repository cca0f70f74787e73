//! What a packet rule is made of: the kernel's expressions, encoded in the order in which it
//! shows them. Matches load a field into register 1 and compare it; a comparison that fails ends
//! the rule.

use std::net::Ipv4Addr;

use super::super::netlink::{attribute, nested};
use super::{ACCEPT, DROP, string};

// From linux/netfilter/nf_tables.h.
const ELEMENT: u16 = 1;
pub(super) const NAME: u16 = 1;
pub(super) const DATA: u16 = 2;
const DATA_VALUE: u16 = 1;
const DATA_VERDICT: u16 = 2;
const VERDICT_CODE: u16 = 1;

/// The verdict's register, and the first for data.
const VERDICT: u32 = 0;
const REGISTER: u32 = 1;

const META_IIF: u32 = 4;
const META_OIF: u32 = 5;
const META_NFPROTO: u32 = 15;
const META_L4PROTO: u32 = 16;

const EQUAL: u32 = 0;
const NOT_EQUAL: u32 = 1;

const NETWORK_HEADER: u32 = 1;
const TRANSPORT_HEADER: u32 = 2;

const IPV4: u8 = 2;
const TCP: u8 = 6;
const UDP: u8 = 17;

/// The expressions of one rule, in order.
#[derive(Default)]
pub(super) struct Expressions(Vec<u8>);

impl Expressions {
    pub(super) fn finish(self) -> Vec<u8> {
        self.0
    }

    /// The expression `name` with numbers as its attributes, in network order.
    fn numbers(mut self, name: &str, values: &[(u16, u32)]) -> Self {
        self.push(name, |out| {
            for (kind, value) in values {
                attribute(out, *kind, &value.to_be_bytes());
            }
        });
        self
    }

    fn push(&mut self, name: &str, data: impl FnOnce(&mut Vec<u8>)) {
        nested(&mut self.0, ELEMENT, |out| {
            string(out, NAME, name);
            nested(out, DATA, data);
        });
    }

    fn compare(mut self, operator: u32, wanted: &[u8]) -> Self {
        self.push("cmp", |out| {
            attribute(out, 1, &REGISTER.to_be_bytes());
            attribute(out, 2, &operator.to_be_bytes());
            nested(out, 3, |out| attribute(out, DATA_VALUE, wanted));
        });
        self
    }

    fn meta(self, key: u32, operator: u32, wanted: &[u8]) -> Self {
        self.numbers("meta", &[(2, key), (1, REGISTER)]).compare(operator, wanted)
    }

    fn payload(self, base: u32, offset: u32, operator: u32, wanted: &[u8]) -> Self {
        let length = u32::try_from(wanted.len()).expect("a field is short");
        self.numbers("payload", &[(1, REGISTER), (2, base), (3, offset), (4, length)])
            .compare(operator, wanted)
    }

    /// Device indexes are in the machine's order; everything else is as in the packet.
    pub(super) fn iif_is_not(self, index: u32) -> Self {
        self.meta(META_IIF, NOT_EQUAL, &index.to_ne_bytes())
    }

    pub(super) fn oif_is_not(self, index: u32) -> Self {
        self.meta(META_OIF, NOT_EQUAL, &index.to_ne_bytes())
    }

    pub(super) fn not_ipv4(self) -> Self {
        self.meta(META_NFPROTO, NOT_EQUAL, &[IPV4])
    }

    pub(super) fn tcp(self) -> Self {
        self.meta(META_L4PROTO, EQUAL, &[TCP])
    }

    pub(super) fn udp(self) -> Self {
        self.meta(META_L4PROTO, EQUAL, &[UDP])
    }

    pub(super) fn source_is_not(self, address: Ipv4Addr) -> Self {
        self.payload(NETWORK_HEADER, 12, NOT_EQUAL, &address.octets())
    }

    pub(super) fn destination(self, address: Ipv4Addr) -> Self {
        self.payload(NETWORK_HEADER, 16, EQUAL, &address.octets())
    }

    pub(super) fn destination_is_not(self, address: Ipv4Addr) -> Self {
        self.payload(NETWORK_HEADER, 16, NOT_EQUAL, &address.octets())
    }

    pub(super) fn source_port(self, port: u16) -> Self {
        self.payload(TRANSPORT_HEADER, 0, EQUAL, &port.to_be_bytes())
    }

    pub(super) fn destination_port(self, port: u16) -> Self {
        self.payload(TRANSPORT_HEADER, 2, EQUAL, &port.to_be_bytes())
    }

    pub(super) fn notrack(self) -> Self {
        self.numbers("notrack", &[])
    }

    /// The rule goes on for `rate` packets a second and as many at once, and ends above that.
    pub(super) fn limit(mut self, rate: u64) -> Self {
        let burst = u32::try_from(rate).unwrap_or(u32::MAX);
        self.push("limit", |out| {
            attribute(out, 1, &rate.to_be_bytes());
            attribute(out, 2, &1_u64.to_be_bytes());
            attribute(out, 3, &burst.to_be_bytes());
            attribute(out, 4, &0_u32.to_be_bytes());
        });
        self
    }

    fn load_port(mut self, port: u16) -> Self {
        self.push("immediate", |out| {
            attribute(out, 1, &REGISTER.to_be_bytes());
            nested(out, 2, |out| {
                attribute(out, DATA_VALUE, &port.to_be_bytes());
            });
        });
        self
    }

    pub(super) fn tproxy(self, port: u16) -> Self {
        self.load_port(port).numbers("tproxy", &[(1, u32::from(IPV4)), (3, REGISTER)])
    }

    pub(super) fn redirect(self, port: u16) -> Self {
        self.load_port(port).numbers("redir", &[(1, REGISTER)])
    }

    fn verdict(mut self, code: u32) -> Self {
        self.push("immediate", |out| {
            attribute(out, 1, &VERDICT.to_be_bytes());
            nested(out, 2, |out| {
                nested(out, DATA_VERDICT, |out| {
                    attribute(out, VERDICT_CODE, &code.to_be_bytes());
                });
            });
        });
        self
    }

    pub(super) fn accept(self) -> Self {
        self.verdict(ACCEPT)
    }

    pub(super) fn drop(self) -> Self {
        self.verdict(DROP)
    }
}

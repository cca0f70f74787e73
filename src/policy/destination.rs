//! Which addresses may be dialled for a name that was allowed.
//!
//! The table is written from the special-purpose address registries (RFC 6890 and what came after)
//! and the metadata services of the clouds. Unknown is refused: of IPv6 only `2000::/3` and `fc00::/7`
//! are ever dialled.
#![forbid(unsafe_code)]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::decision::Grant;
use super::host::Host;

/// An address that is not dialled, and why.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{ip}: {refusal}")]
pub struct DestinationDenied {
    /// The address.
    pub ip: IpAddr,
    /// Why.
    pub refusal: Refusal,
}

/// Why an address is not dialled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Never dialled, whatever the policy says: see [`forbidden`].
    #[error("{0} is never dialled")]
    Forbidden(&'static str),
    /// etcd, the Kubernetes API and the kubelet have these ports: 2379, 2380, 6443, 10250, 10255.
    #[error("a control-plane port is never dialled")]
    ControlPlanePort,
    /// The endpoints list addresses, or the host is an address, and this one is not among them.
    #[error("not in allowed_ips")]
    NotInAllowedIps,
    /// A private address for a host that only a wildcard names.
    #[error("a private address needs allowed_ips, or an endpoint that names the host exactly")]
    Private,
}

impl DestinationDenied {
    /// The end of the refusal's `detail` as `OpenShell` words it.
    #[must_use]
    pub fn detail(&self) -> &'static str {
        match self.refusal {
            Refusal::NotInAllowedIps => "allowed_ips check failed",
            Refusal::ControlPlanePort => "declared endpoint check failed",
            Refusal::Forbidden(_) | Refusal::Private => "internal address",
        }
    }
}

/// etcd, Kubernetes API, kubelet.
pub(super) const CONTROL_PLANE_PORTS: [u16; 5] = [2379, 2380, 6443, 10250, 10255];

/// Whether a port is one that is never dialled: for who does not see the address.
#[must_use]
pub fn is_control_plane(port: u16) -> bool {
    CONTROL_PLANE_PORTS.contains(&port)
}

/// Judges one resolved address.
pub(super) fn judge(
    grant: &Grant,
    host: &Host,
    port: u16,
    ip: IpAddr,
) -> Result<(), DestinationDenied> {
    // A mapped address reaches what it maps.
    let ip = ip.to_canonical();
    let deny = |refusal| Err(DestinationDenied { ip, refusal });
    if let Some(what) = forbidden(ip) {
        return deny(Refusal::Forbidden(what));
    }
    if CONTROL_PLANE_PORTS.contains(&port) {
        return deny(Refusal::ControlPlanePort);
    }
    if host.ip().is_some_and(|literal| literal != ip) {
        return deny(Refusal::NotInAllowedIps);
    }
    if grant.allowed_ips.iter().any(|net| net.contains(&ip)) {
        return Ok(());
    }
    if grant.restricted || (host.is_ip() && !grant.exact_host) {
        return deny(Refusal::NotInAllowedIps);
    }
    if private(ip) && !grant.exact_host {
        return deny(Refusal::Private);
    }
    Ok(())
}

/// What makes this address one that is never dialled, whatever the policy says; `None` when nothing
/// does. An IPv4-mapped address is judged as the IPv4 address in it.
#[must_use]
pub fn forbidden(ip: IpAddr) -> Option<&'static str> {
    match ip.to_canonical() {
        IpAddr::V4(ip) => forbidden_v4(ip),
        IpAddr::V6(ip) => forbidden_v6(ip),
    }
}

const METADATA: &str = "a cloud's metadata address";

fn forbidden_v4(ip: Ipv4Addr) -> Option<&'static str> {
    match ip.octets() {
        [0, ..] => Some("an unspecified address (0.0.0.0/8)"),
        [127, ..] => Some("a loopback address"),
        [169, 254, 169, 254] | [100, 100, 100, 200] | [168, 63, 129, 16] | [192, 0, 0, 192] => {
            Some(METADATA)
        }
        [169, 254, ..] => Some("a link-local address"),
        [192, 88, 99, _] => Some("a 6to4 relay address"),
        [224..=239, ..] => Some("a multicast address"),
        [255, 255, 255, 255] => Some("the broadcast address"),
        [240..=255, ..] => Some("a reserved address (240.0.0.0/4)"),
        _ => None,
    }
}

fn forbidden_v6(ip: Ipv6Addr) -> Option<&'static str> {
    match ip.segments() {
        [0, 0, 0, 0, 0, 0, 0, 0] => Some("the unspecified address"),
        [0, 0, 0, 0, 0, 0, 0, 1] => Some("a loopback address"),
        [0, 0, 0, 0, 0, 0, _, _] => Some("an IPv4-compatible address"),
        [0x64, 0xff9b, ..] => Some("a NAT64 address"),
        [0xfd00, 0x0ec2, ..]
        | [0xfd00, 0x0042, 0, 0, 0, 0, 0, 0x42]
        | [0xfd20, 0x00ce, 0, 0, 0, 0, 0, 0x254] => Some(METADATA),
        [0x2001, 0, ..] => Some("a Teredo address"),
        [0x2002, ..] => Some("a 6to4 address"),
        // An interface identifier of RFC 5214, 6.1, whatever the prefix and its two flags.
        [_, _, _, _, 0 | 0x0100 | 0x0200 | 0x0300, 0x5efe, _, _] => {
            Some("an ISATAP address, which has an IPv4 address in it")
        }
        [0xfe80..=0xfebf, ..] => Some("a link-local address"),
        [0xff00..=0xffff, ..] => Some("a multicast address"),
        [0x2000..=0x3fff | 0xfc00..=0xfdff, ..] => None,
        _ => Some("an address outside global unicast (2000::/3)"),
    }
}

/// Whether an address is not on the public Internet: private networks, and ranges for carriers,
/// benchmarks, documentation and protocols, which clusters use as if they were private.
fn private(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => matches!(
            ip.octets(),
            [10, ..]
                | [172, 16..=31, ..]
                | [192, 168, ..]
                | [100, 64..=127, ..]
                | [192, 0, 0 | 2, _]
                | [198, 18 | 19, ..]
                | [198, 51, 100, _]
                | [203, 0, 113, _]
        ),
        IpAddr::V6(ip) => matches!(
            ip.segments(),
            [0xfc00..=0xfdff, ..] | [0x2001, 0..=0x01ff | 0x0db8, ..] | [0x3fff, 0..=0x0fff, ..]
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::{Inspect, TlsMode};

    fn grant(allowed_ips: &[&str], restricted: bool, exact_host: bool) -> Grant {
        Grant {
            policy: "p".into(),
            inspect: Inspect::None,
            tls: TlsMode::Auto,
            allowed_ips: allowed_ips.iter().map(|net| net.parse().expect("net")).collect(),
            restricted,
            exact_host,
            allow_encoded_slash: false,
            unread: false,
            also: None,
        }
    }

    fn dial(grant: &Grant, host: &str, port: u16, ip: &str) -> Result<(), Refusal> {
        let host = Host::parse(host).expect("host");
        judge(grant, &host, port, ip.parse().expect("ip")).map_err(|denied| denied.refusal)
    }

    const NEVER: &[&str] = &[
        "0.0.0.0",
        "0.1.2.3",
        "127.0.0.1",
        "127.255.255.255",
        "169.254.1.1",
        "169.254.169.254",
        "100.100.100.200",
        "168.63.129.16",
        "192.0.0.192",
        "192.88.99.1",
        "224.0.0.1",
        "239.255.255.255",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "::127.0.0.1",
        "::8.8.8.8",
        "::ffff:127.0.0.1",
        "::ffff:169.254.169.254",
        "::ffff:0.0.0.0",
        "64:ff9b::8.8.8.8",
        "64:ff9b::a9fe:a9fe",
        "64:ff9b:1::1",
        "2001::1",
        "2001:0:ffff::1",
        "2002::1",
        "2002:7f00:1::",
        "fe80::1",
        "febf::1",
        "fec0::1",
        "ff02::1",
        "fd00:ec2::254",
        "fd00:ec2::23",
        "fd20:ce::254",
        "fd00:42::42",
        "2a00:1:2:3:0:5efe:10.0.0.1",
        "2a00:1:2:3:200:5efe:127.0.0.1",
        "fd00:1:2:3:100:5efe:a9fe:a9fe",
        "fe80::5efe:10.0.0.1",
        "64:ff9b:1:fffe::127.0.0.1",
        "100::1",
        "100:0:0:1::1",
        "1000::1",
        "4000::1",
        "5f00::1",
        "::ffff:0:1.2.3.4",
    ];

    #[test]
    fn never_means_never() {
        let everything = grant(&["0.0.0.0/0", "::/0"], false, true);
        for ip in NEVER {
            let verdict = dial(&everything, "example.com", 443, ip);
            assert!(matches!(verdict, Err(Refusal::Forbidden(_))), "{ip}: {verdict:?}");
        }
    }

    const PRIVATE: &[&str] = &[
        "10.0.0.1",
        "172.16.0.1",
        "172.31.255.255",
        "192.168.1.1",
        "100.64.0.1",
        "100.127.255.255",
        "192.0.0.1",
        "192.0.2.1",
        "198.18.0.1",
        "198.19.255.255",
        "198.51.100.1",
        "203.0.113.1",
        "fc00::1",
        "fdff::1",
        "::ffff:10.0.0.1",
        "2001:db8::1",
        "2001:20::1",
        "2001:1::1",
        "3fff::1",
        "3fff:fff::1",
    ];

    #[test]
    fn private_needs_a_reason() {
        let wild = grant(&[], false, false);
        let exact = grant(&[], false, true);
        for ip in PRIVATE {
            assert_eq!(dial(&wild, "a.example.com", 443, ip), Err(Refusal::Private), "{ip}");
            assert_eq!(dial(&exact, "a.example.com", 443, ip), Ok(()), "{ip}");
        }
        for ip in ["8.8.8.8", "172.32.0.1", "100.128.0.1", "2606:4700::1111", "2a00::1", "3ffe::1"]
        {
            assert_eq!(dial(&wild, "a.example.com", 443, ip), Ok(()), "{ip}");
        }
    }

    #[test]
    fn allowed_ips_restrict() {
        let listed = grant(&["10.0.0.0/8", "fd00:1::/32"], true, true);
        assert_eq!(dial(&listed, "a.example.com", 80, "10.1.2.3"), Ok(()));
        assert_eq!(dial(&listed, "a.example.com", 80, "fd00:1::2"), Ok(()));
        assert_eq!(dial(&listed, "a.example.com", 80, "::ffff:10.1.2.3"), Ok(()));
        for ip in ["8.8.8.8", "192.168.0.1", "2606:4700::1111"] {
            assert_eq!(dial(&listed, "a.example.com", 80, ip), Err(Refusal::NotInAllowedIps));
        }
    }

    #[test]
    fn address_literals_dial_themselves_only() {
        let exact = grant(&[], false, true);
        assert_eq!(dial(&exact, "10.0.0.1", 80, "10.0.0.1"), Ok(()));
        assert_eq!(dial(&exact, "10.0.0.1", 80, "10.0.0.2"), Err(Refusal::NotInAllowedIps));
        assert_eq!(dial(&exact, "8.8.8.8", 80, "8.8.8.8"), Ok(()));
        let hostless = grant(&["10.0.0.0/8"], true, false);
        assert_eq!(dial(&hostless, "10.0.0.1", 80, "10.0.0.1"), Ok(()));
        assert_eq!(dial(&hostless, "10.0.0.1", 80, "10.0.0.2"), Err(Refusal::NotInAllowedIps));
        assert_eq!(dial(&hostless, "8.8.8.8", 80, "8.8.8.8"), Err(Refusal::NotInAllowedIps));
    }

    #[test]
    fn control_plane_ports_are_never_dialled() {
        let exact = grant(&["0.0.0.0/0"], false, true);
        for port in CONTROL_PLANE_PORTS {
            for ip in ["10.0.0.1", "8.8.8.8"] {
                assert_eq!(dial(&exact, "a.example.com", port, ip), Err(Refusal::ControlPlanePort));
            }
        }
    }
}

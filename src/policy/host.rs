//! A host as it is judged, resolved, dialled and logged: one spelling only.
//!
//! What two programs could read differently (short IPv4 forms, zones, Unicode) is refused, so that
//! the name that was judged is the name that is reached.
#![forbid(unsafe_code)]

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// A DNS name in lower case without its trailing dot, or an IP address.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Host {
    /// Canonical; IPv6 without brackets.
    text: String,
    ip: Option<IpAddr>,
}

/// Why a host was refused. Holds nothing of what was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HostError {
    /// Nothing there.
    #[error("host is empty")]
    Empty,
    /// Longer than DNS allows.
    #[error("host is longer than 253 bytes")]
    TooLong,
    /// `a..b`, `.a`, or only a dot.
    #[error("host has an empty label")]
    EmptyLabel,
    /// Longer than DNS allows.
    #[error("host has a label longer than 63 bytes")]
    LongLabel,
    /// Outside ASCII.
    #[error("host is not ASCII: write international names in their A-label form (xn--…)")]
    NotAscii,
    /// A control character, a space, or any other character that no host has.
    #[error("host has a character that is not allowed in one")]
    Character,
    /// Names that end like a number but are not a dotted quad: `127.1`, `0x7f.1`, `2130706433`.
    #[error(
        "host is an ambiguous IPv4 address: write all four numbers in decimal, no leading zeros"
    )]
    AmbiguousIpv4,
    /// Bad brackets, zone, or not an address.
    #[error("host is not a plain IPv6 address")]
    BadIpv6,
    /// An IPv4 address in IPv6 clothes.
    #[error("host is an IPv4 address written as IPv6: write it as IPv4")]
    EmbeddedIpv4,
}

impl Host {
    /// Reads a host without port: a DNS name, a dotted-quad IPv4 address, or an IPv6 address with or
    /// without brackets. Underscores are allowed, as in service names.
    ///
    /// # Errors
    /// See [`HostError`].
    pub fn parse(text: &str) -> Result<Self, HostError> {
        if text.is_empty() {
            return Err(HostError::Empty);
        }
        if !text.is_ascii() {
            return Err(HostError::NotAscii);
        }
        if text.contains([':', '[', ']']) {
            return parse_ipv6(text);
        }
        if !text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.')) {
            return Err(HostError::Character);
        }
        let name = text.strip_suffix('.').unwrap_or(text).to_ascii_lowercase();
        if name.len() > 253 {
            return Err(HostError::TooLong);
        }
        for label in name.split('.') {
            if label.is_empty() {
                return Err(HostError::EmptyLabel);
            }
            if label.len() > 63 {
                return Err(HostError::LongLabel);
            }
        }
        if name.rsplit('.').next().is_some_and(is_number) {
            // A dot after an address is a name to some resolvers and an address to others.
            return match name.parse::<Ipv4Addr>() {
                Ok(ip) if !text.ends_with('.') => Ok(Self { text: name, ip: Some(ip.into()) }),
                _ => Err(HostError::AmbiguousIpv4),
            };
        }
        Ok(Self { text: name, ip: None })
    }

    /// The name, or the address without brackets.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Whether this is an address: nothing to resolve.
    #[must_use]
    pub fn is_ip(&self) -> bool {
        self.ip.is_some()
    }

    /// The address, if it is one.
    #[must_use]
    pub fn ip(&self) -> Option<IpAddr> {
        self.ip
    }
}

/// As it stands before `:port`: IPv6 in brackets.
impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.ip {
            Some(IpAddr::V6(_)) => write!(f, "[{}]", self.text),
            _ => f.write_str(&self.text),
        }
    }
}

impl From<IpAddr> for Host {
    /// IPv4-mapped addresses become IPv4, which is what they reach.
    fn from(ip: IpAddr) -> Self {
        let ip = ip.to_canonical();
        Self { text: ip.to_string(), ip: Some(ip) }
    }
}

impl std::str::FromStr for Host {
    type Err = HostError;

    fn from_str(text: &str) -> Result<Self, HostError> {
        Self::parse(text)
    }
}

fn parse_ipv6(text: &str) -> Result<Host, HostError> {
    let inner = match text.strip_prefix('[') {
        Some(rest) => rest.strip_suffix(']').ok_or(HostError::BadIpv6)?,
        None => text,
    };
    // Refuses zones, brackets and ports too.
    let ip: Ipv6Addr = inner.parse().map_err(|_| HostError::BadIpv6)?;
    let embedded = ip.to_ipv4().is_some() && ip != Ipv6Addr::LOCALHOST && !ip.is_unspecified();
    if embedded {
        return Err(HostError::EmbeddedIpv4);
    }
    Ok(Host { text: ip.to_string(), ip: Some(ip.into()) })
}

/// Whether a resolver could take a name with this last label for an IPv4 address (the rule of the
/// URL standard: digits, or `0x` and hexadecimal digits).
fn is_number(label: &str) -> bool {
    let hex = label.strip_prefix("0x");
    label.bytes().all(|b| b.is_ascii_digit())
        || hex.is_some_and(|h| h.bytes().all(|b| b.is_ascii_hexdigit()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn one_spelling() {
        for (text, canonical) in [
            ("example.com", "example.com"),
            ("EXAMPLE.com.", "example.com"),
            ("localhost", "localhost"),
            ("my_service-1.ns", "my_service-1.ns"),
            ("xn--bcher-kva.example", "xn--bcher-kva.example"),
            ("10.0.0.1", "10.0.0.1"),
            ("[2001:DB8:0:0::1]", "2001:db8::1"),
            ("2001:db8::1", "2001:db8::1"),
            ("[::1]", "::1"),
            ("1.example", "1.example"),
            ("0xg.example0", "0xg.example0"),
        ] {
            assert_eq!(Host::parse(text).expect(text).as_str(), canonical, "{text}");
        }
        assert_eq!(Host::parse("::1").expect("ip").to_string(), "[::1]");
        assert_eq!(Host::parse("1.2.3.4").expect("ip").to_string(), "1.2.3.4");
        assert!(Host::parse("1.2.3.4").expect("ip").is_ip());
        assert!(!Host::parse("a.b").expect("name").is_ip());
    }

    #[test]
    fn ambiguous_hosts_are_refused() {
        for text in [
            "",
            ".",
            "..",
            "a..b",
            ".a",
            "a b",
            "a\0b",
            "a\nb",
            "\u{7f}",
            "user@host",
            "a%b",
            "a/b",
            "a\\b",
            "a?b",
            "a#b",
            "ä.example",
            "a\u{3002}b",
            "127.1",
            "0x7f.1",
            "0x7f000001",
            "017.0.0.1",
            "0177.0.0.1",
            "2130706433",
            "1.2.3",
            "1.2.3.4.5",
            "256.0.0.1",
            "1.2.3.4.",
            "a.1",
            "a.0x1",
            "a.0x",
            "[::1",
            "::1]",
            "[]",
            "[::1%eth0]",
            "fe80::1%1",
            "[::ffff:1.2.3.4]",
            "::1.2.3.4",
            "[v1.x]",
            "[1.2.3.4]",
            "a:80",
            "1.2.3.4:80",
            "[::1]:80",
            ":::",
            "*.example.com",
        ] {
            assert!(Host::parse(text).is_err(), "{text:?} was taken");
        }
        assert!(Host::parse(&"a".repeat(63)).is_ok());
        assert!(Host::parse(&"a".repeat(64)).is_err());
        let long = ["a".repeat(63), "b".repeat(63), "c".repeat(63), "d".repeat(61)].join(".");
        assert!(Host::parse(&long).is_ok());
        assert!(Host::parse(&format!("{long}e")).is_err());
    }

    proptest! {
        #[test]
        fn canonical_form_is_a_fixed_point(text in "[a-zA-Z0-9._:\\[\\]x-]{0,20}|[0-9.]{1,16}|[0-9a-f:]{2,20}") {
            if let Ok(host) = Host::parse(&text) {
                prop_assert_eq!(&Host::parse(host.as_str()).expect("canonical"), &host);
                prop_assert_eq!(&Host::parse(&host.to_string()).expect("shown"), &host);
                prop_assert!(!host.as_str().bytes().any(|b| b.is_ascii_uppercase()));
                // What libc would read as an address is one, or was refused.
                if let Some(last) = host.as_str().rsplit('.').next() {
                    let number = last.bytes().all(|b| b.is_ascii_digit());
                    prop_assert!(!number || host.is_ip());
                }
            }
        }

        #[test]
        fn never_panics(text in any::<String>()) {
            let _ = Host::parse(&text);
        }
    }
}

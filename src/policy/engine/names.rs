//! What a name or a port could ever be allowed for, whoever asks: what policy DNS answers, and
//! which captured connections are worth a look.
#![forbid(unsafe_code)]

use super::Policy;
use crate::policy::host::Host;
use crate::policy::within;

/// How the endpoints of a policy cover a host, on any port and for any binary.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NameMatch {
    /// No endpoint names it: no connection by this name is allowed, but to addresses that an
    /// endpoint without a host lists.
    None,
    /// Only wildcards do.
    Wildcard,
    /// An endpoint names it as it is.
    Exact,
}

impl Policy {
    /// Whether some endpoint covers this host. A Rego text is not asked: it could only be asked about
    /// one caller and port at a time, and no name may leave the fence for nothing.
    #[must_use]
    pub fn names_host(&self, host: &Host) -> NameMatch {
        let own = if self.names.exact.contains(host.as_str()) {
            NameMatch::Exact
        } else if self.names.wild.iter().any(|wild| wild.matches(host)) {
            NameMatch::Wildcard
        } else {
            NameMatch::None
        };
        match &self.bounds {
            Some(bounds) => within::names(own, bounds.names_host(host)),
            None => own,
        }
    }

    /// Whether some endpoint has this port: on all others nothing is ever allowed.
    #[must_use]
    pub fn names_port(&self, port: u16) -> bool {
        let bounded = |bounds: &Policy| !bounds.names_port(port);
        self.ports.contains_key(&port) && !self.bounded_by(bounded)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::{Source, load};

    const POLICY: &str = "
network_policies:
  a:
    endpoints:
      - { host: api.example.com, port: 443 }
      - { host: \"*.example.com\", ports: [80, 8080] }
      - { host: \"**.svc.cluster.local\", port: 80 }
      - { port: 84, allowed_ips: [\"10.0.0.0/8\"] }
    binaries: [{ path: /usr/bin/curl }]
";

    #[test]
    fn names_and_ports() {
        let source = Source { name: "policy.yaml", bytes: POLICY.as_bytes() };
        let policy = load(&source, None).expect("policy").policy;
        let covers = |name| policy.names_host(&Host::parse(name).expect(name));
        // Exactly on one port outweighs a wildcard on others.
        assert_eq!(covers("API.example.com."), NameMatch::Exact);
        assert_eq!(covers("other.example.com"), NameMatch::Wildcard);
        assert_eq!(covers("api.github.com.ns.svc.cluster.local"), NameMatch::Wildcard);
        for name in ["example.com", "a.b.example.com", "api.example.com.evil", "10.0.0.1"] {
            assert_eq!(covers(name), NameMatch::None, "{name}");
        }
        for port in [443, 80, 8080, 84] {
            assert!(policy.names_port(port), "{port}");
        }
        assert!(!policy.names_port(22));
    }
}

//! The ports of the pod's loopback that a fence relays to: `ringfence.dev/sidecar-ports` of a
//! namespace and `--sidecar-ports` of the supervisor, written `8090-8094,9000`.
//!
//! They only say where the fence listens. Who may connect, and what may be said, is decided by the
//! endpoints for `localhost` and `127.0.0.1`.
#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use super::is_control_plane;

/// The most ports: each is a listening socket of every fence.
pub const MAX_SIDECAR_PORTS: usize = 64;

/// Ports below it need a capability that the supervisor does not have.
const FIRST: u16 = 1024;

/// A set of ports, none of which belongs to the fence itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SidecarPorts(BTreeSet<u16>);

impl SidecarPorts {
    /// Whether it is one of them.
    #[must_use]
    pub fn contains(&self, port: u16) -> bool {
        self.0.contains(&port)
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// In ascending order.
    pub fn iter(&self) -> impl Iterator<Item = u16> {
        self.0.iter().copied()
    }
}

/// Of ports that are known already: what sockets listen on.
impl FromIterator<u16> for SidecarPorts {
    fn from_iter<I: IntoIterator<Item = u16>>(ports: I) -> Self {
        Self(ports.into_iter().collect())
    }
}

/// The shortest way to write them, and the only one that this program writes.
impl fmt::Display for SidecarPorts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut ports = self.iter().peekable();
        let mut comma = "";
        while let Some(first) = ports.next() {
            let mut last = first;
            while let Some(next) = ports.next_if(|next| last.checked_add(1) == Some(*next)) {
                last = next;
            }
            write!(f, "{comma}{first}")?;
            if last > first {
                write!(f, "-{last}")?;
            }
            comma = ",";
        }
        Ok(())
    }
}

impl FromStr for SidecarPorts {
    type Err = String;

    /// # Errors
    /// What is wrong, and how to write it.
    fn from_str(text: &str) -> Result<Self, String> {
        let mut ports = BTreeSet::new();
        for entry in text.split(',').map(str::trim) {
            let (first, last) = entry.split_once('-').unwrap_or((entry, entry));
            let (Some(first), Some(last)) = (number(first), number(last)) else {
                return Err(format!(
                    "{entry:?} is neither a port nor a range of ports: write it as in 8090-8094,9000"
                ));
            };
            if first > last {
                return Err(format!("{entry:?} ends before it begins: write {last}-{first}"));
            }
            for port in first..=last {
                if let Some(why) = refused(port) {
                    return Err(format!("port {port} {why}: choose another"));
                }
                ports.insert(port);
                if ports.len() > MAX_SIDECAR_PORTS {
                    return Err(format!(
                        "these are more than {MAX_SIDECAR_PORTS} ports: name only those on which sidecars listen"
                    ));
                }
            }
        }
        Ok(Self(ports))
    }
}

/// Digits only: a sign or a blank is a slip.
fn number(text: &str) -> Option<u16> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|_| digits)
}

/// Why a port cannot be one.
fn refused(port: u16) -> Option<&'static str> {
    match port {
        0..FIRST => Some("is below 1024, where the fence cannot listen"),
        3128 | 15_001 | 15_053 => Some("is the fence's own"),
        // Of any container of the pod.
        15_200..=15_299 => Some("is one of the fences' admin endpoints (15200 to 15299)"),
        port if is_control_plane(port) => Some("is a control plane's, which is never dialled"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_and_ranges_are_read_and_written_shortest() {
        for (text, written) in [
            ("8090-8094,9000", "8090-8094,9000"),
            ("9000, 8091 ,8090", "8090-8091,9000"),
            ("8090,8092-8093,8091", "8090-8093"),
            ("65535", "65535"),
            ("65534-65535", "65534-65535"),
            ("1024-1024", "1024"),
        ] {
            let ports: SidecarPorts = text.parse().unwrap();
            assert_eq!(ports.to_string(), written, "{text}");
            assert_eq!(written.parse(), Ok(ports));
        }
        assert_eq!(SidecarPorts::default().to_string(), "");
        let most: SidecarPorts = "20000-20063".parse().unwrap();
        assert_eq!(most.len(), MAX_SIDECAR_PORTS);
        assert!(most.contains(20063) && !most.contains(20064) && !most.is_empty());
    }

    #[test]
    fn what_is_no_port_of_a_sidecar_is_refused_with_the_fix() {
        for (text, word) in [
            ("", "write it as in"),
            ("8090,", "write it as in"),
            ("all", "write it as in"),
            ("+8090", "write it as in"),
            ("8090-", "write it as in"),
            ("8090-8094-8099", "write it as in"),
            ("70000", "write it as in"),
            ("8094-8090", "write 8090-8094"),
            ("0", "below 1024"),
            ("80", "below 1024"),
            ("1000-2000", "below 1024"),
            ("3128", "the fence's own"),
            ("15001", "the fence's own"),
            ("15053", "the fence's own"),
            ("15200", "admin endpoints"),
            ("15190-15210", "admin endpoints"),
            ("10250", "never dialled"),
            ("20000-20064", "more than 64"),
        ] {
            let error = text.parse::<SidecarPorts>().unwrap_err();
            assert!(error.contains(word), "{text}: {error}");
        }
    }
}

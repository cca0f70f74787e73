//! Sidecars: what listens on the pod's loopback, reached from the fence's own.
//!
//! The fence listens on the same ports of its loopback. What connects there is judged like whatever
//! else ignores the proxy ([`super::transparent`]), by one of two names: `localhost` and `127.0.0.1`,
//! of which the client says which it means. Only an endpoint that names one of them itself opens the
//! way, and only here is a loopback address ever dialled.

use std::net::{IpAddr, Ipv4Addr};

use anyhow::{Context as _, Result, ensure};
use tokio::net::TcpListener;

use super::destination::Origin;
use super::greeting::{Asked, asked_for};
use super::session::Session;
use super::stream::Conn;
use super::transparent::{SERVER_FIRST, SILENCE};
use crate::policy::{Connect, Host, Inspect, SidecarPorts};

/// Where a sidecar listens, and the fence for it.
const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// The name of [`LOOPBACK`] in policies and URLs.
const NAME: &str = "localhost";

/// The ports that the fence listens on for sidecars.
///
/// # Errors
/// A socket that listens elsewhere.
pub(super) fn ports(listeners: &[TcpListener]) -> Result<SidecarPorts> {
    let port = |listener: &TcpListener| {
        let address = listener.local_addr().context("sidecar")?;
        ensure!(address.ip() == LOOPBACK, "sidecar: {address} is not the fence's loopback");
        Ok(address.port())
    };
    listeners.iter().map(port).collect()
}

/// Both names, the word first.
fn names() -> [Host; 2] {
    // A name without a dot is read by anybody.
    let name = Host::parse(NAME).unwrap_or_else(|_| Host::from(LOOPBACK));
    [name, Host::from(LOOPBACK)]
}

/// The name that stands for a connection to a port of the fence's loopback; what cannot be told is
/// told to `unclear`.
pub(super) async fn judged_name(
    session: &Session,
    client: &mut Conn,
    port: u16,
    unclear: impl FnOnce(&str),
) -> Option<Host> {
    let names = names();
    let allowed = |name: &Host| match session.policy().connect(session.caller(), name, port) {
        Connect::Allow(grant) => Some(grant.inspect),
        Connect::Deny(_) => None,
    };
    let answers = names.each_ref().map(allowed);
    // Which name to take where the client says none: one that is allowed.
    let Some(first) = answers.iter().position(Option::is_some) else {
        return names.into_iter().next();
    };
    let opaque = answers.contains(&Some(Inspect::None));
    match asked_for(client, if opaque { SERVER_FIRST } else { SILENCE }).await {
        Asked::Host(host) if names.contains(&host) => return Some(host),
        Asked::Host(_) => unclear("it asks for another host than localhost or 127.0.0.1"),
        Asked::Nothing => return names.into_iter().nth(first),
        Asked::Unclear(reason) => unclear(&reason),
        Asked::Gone => unclear("closed before it said whom it asks for"),
    }
    None
}

/// Where a judged destination is a sidecar: its address.
///
/// # Errors
/// It is one, and no endpoint says so itself: why not.
pub(super) fn address(ports: &SidecarPorts, origin: &Origin) -> Result<Option<IpAddr>, String> {
    let Origin { host, port, grant } = origin;
    if !ports.contains(*port) || !is_loopback(host) {
        return Ok(None);
    }
    for grant in grant.all() {
        if !grant.exact_host {
            return Err(format!("no endpoint names {host} itself, without a wildcard"));
        }
        if grant.restricted && !grant.allowed_ips.iter().any(|net| net.contains(&LOOPBACK)) {
            return Err("not in allowed_ips".to_owned());
        }
    }
    Ok(Some(LOOPBACK))
}

/// Whether a host is one of the two names.
pub(super) fn is_loopback(host: &Host) -> bool {
    host.as_str() == NAME || host.ip() == Some(LOOPBACK)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::{Grant, TlsMode};

    fn origin(host: &str, port: u16, exact_host: bool, ips: &[&str], restricted: bool) -> Origin {
        let grant = Grant {
            policy: "p".into(),
            inspect: Inspect::None,
            tls: TlsMode::Auto,
            allowed_ips: ips.iter().map(|net| net.parse().expect("net")).collect(),
            restricted,
            exact_host,
            allow_encoded_slash: false,
            unread: false,
            also: None,
        };
        Origin { host: Host::parse(host).expect("host"), port, grant }
    }

    #[test]
    fn a_loopback_is_dialled_for_a_sidecar_that_an_endpoint_names() {
        let ports: SidecarPorts = "8090".parse().expect("ports");
        let of = |origin| address(&ports, &origin);
        for host in ["localhost", "127.0.0.1", "LocalHost"] {
            assert_eq!(of(origin(host, 8090, true, &[], false)), Ok(Some(LOOPBACK)), "{host}");
            assert_eq!(of(origin(host, 8090, true, &["127.0.0.0/8"], true)), Ok(Some(LOOPBACK)));
            // Not a sidecar's.
            assert_eq!(of(origin(host, 8091, true, &[], false)), Ok(None));
            // A wildcard, or a range without a host, names nobody.
            assert!(of(origin(host, 8090, false, &[], false)).is_err());
            assert!(of(origin(host, 8090, false, &["127.0.0.0/8"], true)).is_err());
            assert!(of(origin(host, 8090, true, &["10.0.0.0/8"], true)).is_err());
        }
        for host in ["127.0.0.2", "localhost.example", "a.localhost", "10.0.0.1"] {
            assert_eq!(of(origin(host, 8090, true, &[], false)), Ok(None), "{host}");
        }
    }
}

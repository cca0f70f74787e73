//! From a judged host and port to a connected socket: resolve, check every address, dial one of
//! those that were checked.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::time::{Instant, timeout_at};

use super::Shared;
use super::resolve::ResolveError;
use super::stream::tune;
use crate::policy::{Grant, Host};

/// The name by which the agent reaches what else runs in its pod, where the policy allows it.
pub(crate) const POD_HOST: &str = "pod.ringfence.internal";

/// How long one address may take to answer, and all together.
const DIAL_ONE: Duration = Duration::from_secs(5);
const DIAL_ALL: Duration = Duration::from_secs(10);

/// How long a look-up may take.
const RESOLVE: Duration = Duration::from_secs(10);

/// A judged destination: what is resolved, dialled, named in TLS and in `Host`, and logged.
#[derive(Debug, Clone)]
pub(crate) struct Origin {
    pub(crate) host: Host,
    pub(crate) port: u16,
    pub(crate) grant: Grant,
}

/// Why there is no connection.
#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum DialError {
    /// An address that must not be dialled. `check` is the short form that clients know.
    #[error("{reason}")]
    Forbidden { check: &'static str, reason: String },
    #[error("name not resolved: {0}")]
    Resolve(String),
    #[error("connection failed: {0}")]
    Connect(String),
    #[error("no answer in time: {0}")]
    Timeout(String),
    #[error("TLS with the upstream failed: {0}")]
    Tls(String),
}

/// Resolves the judged name, checks all its addresses, and connects to the first that answers.
pub(crate) async fn dial(shared: &Shared, origin: &Origin) -> Result<TcpStream, DialError> {
    let addresses = addresses(shared, origin).await?;
    let end = Instant::now() + DIAL_ALL;
    let mut last = DialError::Connect("no address".to_owned());
    for ip in addresses {
        let address = SocketAddr::new(ip, origin.port);
        let one = (Instant::now() + DIAL_ONE).min(end);
        match timeout_at(one, TcpStream::connect(address)).await {
            Ok(Ok(tcp)) => {
                tune(&tcp);
                return Ok(tcp);
            }
            Ok(Err(error)) => last = DialError::Connect(format!("{address}: {}", error.kind())),
            Err(_) => last = DialError::Timeout(format!("connect to {address}")),
        }
        if Instant::now() >= end {
            break;
        }
    }
    Err(last)
}

async fn addresses(shared: &Shared, origin: &Origin) -> Result<Vec<IpAddr>, DialError> {
    let Origin { host, port, grant } = origin;
    if host.as_str() == POD_HOST {
        let own = shared.pod_ips.first().copied();
        let own = own.ok_or(DialError::Resolve("the pod's address is not known".to_owned()))?;
        if grant.exact_host && !grant.restricted {
            // The policy named it; the address is the pod's own by definition.
            not_ours(shared, own, *port)?;
        } else {
            check(shared, origin, own)?;
        }
        return Ok(vec![own]);
    }
    let resolving = tokio::time::timeout(RESOLVE, shared.resolver.resolve(host));
    let addresses = match resolving.await {
        Err(_) => return Err(DialError::Resolve("no answer in time".to_owned())),
        Ok(Err(error @ ResolveError::Config { .. })) => {
            return Err(DialError::Resolve(error.to_string()));
        }
        Ok(Err(error)) => return Err(DialError::Resolve(error.to_string())),
        Ok(Ok(addresses)) => addresses,
    };
    // One address that must not be dialled spoils the name: whoever answers for it could answer
    // with another order the next time.
    for ip in &addresses {
        check(shared, origin, ip.to_canonical())?;
    }
    Ok(addresses.into_iter().map(|ip| ip.to_canonical()).collect())
}

/// Whether one address may be dialled: by the policy, and the pod's own only if it is listed.
fn check(shared: &Shared, origin: &Origin, ip: IpAddr) -> Result<(), DialError> {
    let Origin { host, port, grant } = origin;
    shared.policy.destination(grant, host, *port, ip).map_err(|denied| DialError::Forbidden {
        check: check_name(grant),
        reason: denied.to_string(),
    })?;
    if shared.pod_ips.contains(&ip) {
        if !grant.allowed_ips.iter().any(|net| net.contains(&ip)) {
            return Err(DialError::Forbidden {
                check: "internal address",
                reason: format!("{ip} is the pod's own address: list it in allowed_ips"),
            });
        }
        not_ours(shared, ip, *port)?;
    }
    Ok(())
}

/// A port of the pod that leads back into the fence, or to the admin endpoint, is never dialled.
fn not_ours(shared: &Shared, ip: IpAddr, port: u16) -> Result<(), DialError> {
    if shared.admin.is_at(port) {
        return Err(DialError::Forbidden {
            check: "internal address",
            reason: format!("{ip}:{port} is the port of the admin endpoint"),
        });
    }
    if shared.inbound.serves(port) {
        return Err(DialError::Forbidden {
            check: "internal address",
            reason: format!("{ip}:{port} leads back into the fence"),
        });
    }
    Ok(())
}

fn check_name(grant: &Grant) -> &'static str {
    if !grant.allowed_ips.is_empty() {
        "allowed_ips check failed"
    } else if grant.exact_host {
        "declared endpoint check failed"
    } else {
        "internal address"
    }
}

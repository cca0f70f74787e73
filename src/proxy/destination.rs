//! From a judged host and port to a connected socket: resolve, check every address, dial one of
//! those that were checked.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout};

use super::session::Session;
use super::stream::tune;
use super::{Shared, sidecar};
use crate::policy::{Grant, Host, IpNet, NameMatch};

/// The name by which the agent reaches what else runs in its pod, where the policy allows it.
pub(crate) const POD_HOST: &str = "pod.ringfence.internal";

/// How long one address may take to answer, and all together.
const DIAL_ONE: Duration = Duration::from_secs(5);
const DIAL_ALL: Duration = Duration::from_secs(10);

/// After how long the next address is tried beside those that have not answered (RFC 8305, 5).
const STAGGER: Duration = Duration::from_millis(250);

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
    /// An address that must not be dialled. `check` is the short form that clients know. The
    /// address itself is for the log only: who asked for a name need not learn what it leads to.
    #[error("{ip}: {reason}")]
    Forbidden { check: &'static str, ip: IpAddr, reason: String },
    /// A destination that is not asked of the upstream proxy.
    #[error("{0}")]
    NotByProxy(&'static str),
    #[error("upstream proxy: {0}")]
    Proxy(String),
    #[error("name not resolved: {0}")]
    Resolve(String),
    #[error("connection failed: {0}")]
    Connect(String),
    #[error("no answer in time: {0}")]
    Timeout(String),
    #[error("TLS with the upstream failed: {0}")]
    Tls(String),
}

/// Resolves the judged name, checks all its addresses, and connects to the first that answers; or
/// asks the operator's proxy for the name.
pub(crate) async fn dial(session: &Session, origin: &Origin) -> Result<TcpStream, DialError> {
    let shared = &*session.shared;
    if let Some(ip) = sidecar_of(shared, origin)? {
        return first_to_answer(vec![ip], origin.port).await;
    }
    if let Some(proxy) = shared.upstream_proxy.as_ref().filter(|proxy| proxy.is_for(origin)) {
        proxy.allows(origin)?;
        if let Some(ip) = origin.host.ip() {
            check(session, origin, ip)?;
        }
        return proxy.dial(&shared.resolver, &origin.host, origin.port).await;
    }
    let addresses = addresses(session, origin).await?;
    first_to_answer(addresses, origin.port).await
}

/// Happy eyeballs (RFC 8305): the families in turn, each address given a little time before the
/// next is tried beside it. All of them were checked.
pub(super) async fn first_to_answer(
    addresses: Vec<IpAddr>,
    port: u16,
) -> Result<TcpStream, DialError> {
    let end = Instant::now() + DIAL_ALL;
    let mut waiting = alternating(addresses).into_iter();
    // What is not needed any more is closed with this.
    let mut attempts = JoinSet::new();
    let mut last = DialError::Connect("no address".to_owned());
    loop {
        if let Some(ip) = waiting.next() {
            attempts.spawn(attempt(SocketAddr::new(ip, port)));
        }
        let next = if waiting.len() > 0 { (Instant::now() + STAGGER).min(end) } else { end };
        tokio::select! {
            ended = attempts.join_next() => match ended {
                Some(Ok(Ok(tcp))) => return Ok(tcp),
                // The next one need not wait.
                Some(Ok(Err(error))) => last = error,
                Some(Err(error)) => last = DialError::Connect(error.to_string()),
                None => return Err(last),
            },
            () = sleep_until(next) => if Instant::now() >= end {
                return Err(DialError::Timeout("none of the addresses".to_owned()));
            },
        }
    }
}

async fn attempt(address: SocketAddr) -> Result<TcpStream, DialError> {
    match timeout(DIAL_ONE, TcpStream::connect(address)).await {
        Ok(Ok(tcp)) => {
            tune(&tcp);
            Ok(tcp)
        }
        Ok(Err(error)) => Err(DialError::Connect(format!("{address}: {}", error.kind()))),
        Err(_) => Err(DialError::Timeout(format!("connect to {address}"))),
    }
}

/// The families in turn, IPv6 first; within each the order stays.
fn alternating(addresses: Vec<IpAddr>) -> Vec<IpAddr> {
    let (six, four): (Vec<_>, Vec<_>) = addresses.into_iter().partition(IpAddr::is_ipv6);
    let (mut six, mut four) = (six.into_iter(), four.into_iter());
    let mut sorted = Vec::new();
    loop {
        let before = sorted.len();
        sorted.extend(six.next());
        sorted.extend(four.next());
        if sorted.len() == before {
            return sorted;
        }
    }
}

async fn addresses(session: &Session, origin: &Origin) -> Result<Vec<IpAddr>, DialError> {
    let shared = &*session.shared;
    let Origin { host, port, .. } = origin;
    if host.as_str() == POD_HOST {
        let own = shared.pod_ips.first().copied();
        let own = own.ok_or(DialError::Resolve("the pod's address is not known".to_owned()))?;
        check(session, origin, own)?;
        return Ok(vec![own]);
    }
    // A name that only an endpoint without a host lets pass is any name: looked up outside, it
    // would tell its labels to whoever runs its zone.
    let named = host.is_ip() || session.policy().names_host(host) != NameMatch::None;
    let resolving = tokio::time::timeout(RESOLVE, async {
        if named {
            shared.resolver.resolve(host).await
        } else {
            shared.resolver.resolve_inside(host).await
        }
    });
    let addresses = match resolving.await {
        Err(_) => return Err(DialError::Resolve("no answer in time".to_owned())),
        Ok(Err(error)) if named => return Err(DialError::Resolve(error.to_string())),
        Ok(Err(error)) => {
            return Err(DialError::Resolve(format!("{error}; {ONLY_INSIDE}")));
        }
        Ok(Ok(addresses)) => addresses,
    };
    // One address that must not be dialled spoils the name: whoever answers for it could answer
    // with another order the next time.
    for ip in &addresses {
        check(session, origin, ip.to_canonical())?;
    }
    if let Some(proxy) = &shared.upstream_proxy {
        proxy.is_not_among(&shared.resolver, &addresses, *port).await?;
    }
    Ok(addresses.into_iter().map(|ip| ip.to_canonical()).collect())
}

/// The address of a sidecar in the pod's network, where that is what is meant.
fn sidecar_of(shared: &Shared, origin: &Origin) -> Result<Option<IpAddr>, DialError> {
    let forbidden = |reason| DialError::Forbidden {
        check: check_name(&origin.grant),
        ip: std::net::Ipv4Addr::LOCALHOST.into(),
        reason,
    };
    let found = sidecar::address(&shared.sidecars, origin).map_err(forbidden)?;
    if let Some(ip) = found {
        not_ours(shared, ip, origin.port)?;
    }
    Ok(found)
}

const ONLY_INSIDE: &str = "no endpoint of the policy names this host, so that only the hosts file \
                           and the pod's search domains were asked";

/// Whether a connection to this address, which was dialled under other rules, may go on.
pub(crate) fn may_stay(session: &Session, origin: &Origin, ip: IpAddr) -> Result<(), DialError> {
    if sidecar_of(&session.shared, origin)?.is_some() {
        return Ok(());
    }
    let proxy = session.shared.upstream_proxy.as_ref().filter(|proxy| proxy.is_for(origin));
    match (proxy, origin.host.ip()) {
        // The address is the proxy's.
        (Some(proxy), None) => proxy.allows(origin),
        (Some(_), Some(ip)) => check(session, origin, ip),
        (None, _) => check(session, origin, ip.to_canonical()),
    }
}

/// Whether one address may be dialled: by the policy, and the pod's own only if it is listed.
fn check(session: &Session, origin: &Origin, ip: IpAddr) -> Result<(), DialError> {
    origin.grant.all().try_for_each(|grant| check_one(session, origin, grant, ip))
}

/// The same for one of the grants that hold together.
fn check_one(
    session: &Session,
    origin: &Origin,
    grant: &Grant,
    ip: IpAddr,
) -> Result<(), DialError> {
    let (shared, Origin { host, port, .. }) = (&*session.shared, origin);
    // The policy named it; the address is the pod's own by definition.
    let pod = host.as_str() == POD_HOST && shared.pod_ips.first() == Some(&ip);
    if pod && grant.exact_host && !grant.restricted {
        return not_ours(shared, ip, *port);
    }
    session.policy().destination(grant, host, *port, ip).map_err(|denied| {
        DialError::Forbidden {
            check: check_name(grant),
            ip,
            reason: if sidecar::is_loopback(host) {
                format!("{}, but for ports of sidecars (--sidecar-ports)", denied.refusal)
            } else {
                denied.refusal.to_string()
            },
        }
    })?;
    if shared.pod_ips.contains(&ip) {
        if !grant.allowed_ips.iter().any(|net| net.contains(&ip)) {
            return Err(DialError::Forbidden {
                check: "internal address",
                ip,
                reason: "the pod's own address: list it in allowed_ips".to_owned(),
            });
        }
        not_ours(shared, ip, *port)?;
    }
    if shared.api_server.contains(&ip) && !means_api_server(grant, host, ip) {
        return Err(DialError::Forbidden {
            check: "internal address",
            ip,
            reason: "the Kubernetes API: name kubernetes.default.svc, or list it in allowed_ips"
                .to_owned(),
        });
    }
    Ok(())
}

/// Whether the policy says that it is the Kubernetes API that is wanted: a name that somebody has
/// lead there does not.
fn means_api_server(grant: &Grant, host: &Host, ip: IpAddr) -> bool {
    const OWN: &str = "kubernetes.default";
    let own_name = host
        .as_str()
        .strip_prefix(OWN)
        .is_some_and(|rest| rest.is_empty() || rest == ".svc" || rest.starts_with(".svc."));
    host.ip() == Some(ip)
        || (own_name && grant.exact_host)
        || grant.allowed_ips.iter().any(|net| net.contains(&ip) && is_narrow(net))
}

/// A range that was written for few hosts, not for a cluster.
fn is_narrow(net: &IpNet) -> bool {
    net.max_prefix_len() - net.prefix_len() <= 3
}

/// A port of the pod that leads back into the fence, or to the admin endpoint, is never dialled.
fn not_ours(shared: &Shared, ip: IpAddr, port: u16) -> Result<(), DialError> {
    let what = if shared.admin.is_at(port) {
        "is the port of the admin endpoint"
    } else if shared.inbound.serves(port) {
        "leads back into the fence"
    } else {
        return Ok(());
    };
    let reason = format!("port {port} {what}");
    Err(DialError::Forbidden { check: "internal address", ip, reason })
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_are_tried_in_turn() {
        let order = |list: &[&str]| -> Vec<String> {
            let ips = list.iter().map(|ip| ip.parse().expect("ip")).collect();
            alternating(ips).iter().map(IpAddr::to_string).collect()
        };
        assert_eq!(
            order(&["1.1.1.1", "1.1.1.2", "1.1.1.3", "2001::1", "2001::2"]),
            ["2001::1", "1.1.1.1", "2001::2", "1.1.1.2", "1.1.1.3"]
        );
        assert_eq!(order(&["1.1.1.2", "1.1.1.1"]), ["1.1.1.2", "1.1.1.1"]);
        assert!(order(&[]).is_empty());
    }
}

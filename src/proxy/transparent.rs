//! Connections that ignore the proxy: the gateway catches them, and they are judged like those
//! that do not.
//!
//! What is judged is a name: that for which the fence's DNS gave the address out, else the one in
//! the client's first bytes (SNI, `Host`), else the address itself. What is dialled is what the
//! judged name resolves to, never the packet's address. From there on the connection is a tunnel
//! like any other. Whatever may not pass is reset: the program fails at once.

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::destination::{DialError, Origin, dial};
use super::greeting::{Asked, asked_for};
use super::inbound::RESERVED;
use super::listener::accept;
use super::metrics::Refused;
use super::quiet::{Quiet, period};
use super::session::{NotAdmitted, Session};
use super::slots::{Slot, Slots};
use super::standing::Admitted;
use super::stream::{Conn, Stream, tune};
use super::{Shared, caller, report, sidecar, tunnel};
use crate::policy::{Connect, Host, Inspect};

/// How long the caller's name may take where it is only for the log.
const LOOK_UP: Duration = Duration::from_millis(200);

/// How many such connections are named at a time; more are reported without a name.
const NAMED: usize = 64;

/// How long a client of an address that is itself allowed may be silent before it is taken for
/// one that waits for the server to speak.
pub(super) const SERVER_FIRST: Duration = Duration::from_millis(300);

/// How long any other client of an address may be silent: its first bytes are all that could let
/// it pass.
pub(super) const SILENCE: Duration = Duration::from_secs(2);

const USE_THE_PROXY: &str = "direct connection: use the proxy at http://10.200.0.1:3128";
const NO_PORT: &str = "direct connection to a port that no endpoint of the policy has";
const CONNECT_BY_NAME: &str = "; connect by a name that the policy allows, or use the proxy at \
                               http://10.200.0.1:3128";

/// What all captured connections share.
struct Captured {
    shared: Arc<Shared>,
    /// By address and, where one was read from the connection, name.
    quiet: Mutex<Quiet<(SocketAddr, Option<Host>)>>,
    naming: Arc<Semaphore>,
}

/// Accepts and serves until it is aborted.
pub(crate) async fn serve(listener: TcpListener, shared: Arc<Shared>, slots: Slots) {
    let captured = Arc::new(Captured {
        shared,
        quiet: Mutex::new(Quiet::new()),
        naming: Arc::new(Semaphore::new(NAMED)),
    });
    let mut period = period();
    loop {
        let identifying = slots.identifying().await;
        let (tcp, peer) = tokio::select! {
            accepted = accept(&listener) => accepted,
            _ = period.tick() => {
                let quiet = captured.quiet.lock();
                let muted = quiet.unwrap_or_else(PoisonError::into_inner).take_muted();
                report::more_refused(muted, Refused::Direct);
                continue;
            }
        };
        // With IP_TRANSPARENT our end has the address that was dialled.
        let Ok(destination) = tcp.local_addr() else {
            continue;
        };
        if let Some(reason) = hopeless(&captured.shared, destination) {
            refuse_unheard(&captured, tcp, peer, destination, reason);
            continue;
        }
        let Some(slot) = slots.take() else {
            if captured.tell(destination, None) {
                report::captured(None, &destination, "too many connections at a time");
            }
            reset(tcp);
            continue;
        };
        begin(Arc::clone(&captured), tcp, (peer, destination), (slot, identifying));
    }
}

/// Gives a connection a task; not inlined, as the listener's is not.
#[inline(never)]
fn begin(
    captured: Arc<Captured>,
    tcp: TcpStream,
    addresses: (SocketAddr, SocketAddr),
    permits: (Slot, Option<OwnedSemaphorePermit>),
) {
    tokio::spawn(async move { connection(&captured, tcp, addresses, permits).await });
}

impl Captured {
    /// Whether a refusal is told now; counted if not.
    fn tell(&self, destination: SocketAddr, name: Option<&Host>) -> bool {
        let mut quiet = self.quiet.lock().unwrap_or_else(PoisonError::into_inner);
        quiet.tell((destination, name.cloned()), Instant::now())
    }
}

/// Why nothing that the client could say would let it pass.
fn hopeless(shared: &Shared, destination: SocketAddr) -> Option<&'static str> {
    let port = destination.port();
    if destination.ip().is_loopback() {
        // The fence's own socket: nothing was caught.
        None
    } else if !shared.transparent || is_ours(destination) {
        Some(USE_THE_PROXY)
    } else if !shared.rules.load().policy.names_port(port) {
        Some(NO_PORT)
    } else {
        None
    }
}

/// The gateway's own network and ports.
fn is_ours(destination: SocketAddr) -> bool {
    const OURS: [u8; 3] = [10, 200, 0];
    match destination.ip() {
        IpAddr::V4(ip) => ip.octets()[..3] == OURS || RESERVED.contains(&destination.port()),
        // Nothing but IPv4 is caught.
        IpAddr::V6(_) => true,
    }
}

/// As it is told: by the name that DNS gave the address out for, where it did.
fn shown(shared: &Shared, destination: SocketAddr) -> String {
    let name = match destination.ip() {
        IpAddr::V4(ip) => shared.pool.name(ip),
        IpAddr::V6(_) => None,
    };
    match name {
        Some(name) => format!("{name}:{}", destination.port()),
        None => destination.to_string(),
    }
}

/// Refuses without a word from the client; who it is is found out only for the log.
fn refuse_unheard(
    captured: &Arc<Captured>,
    tcp: TcpStream,
    peer: SocketAddr,
    destination: SocketAddr,
    reason: &'static str,
) {
    if !captured.tell(destination, None) {
        return reset(tcp);
    }
    let Ok(slot) = Arc::clone(&captured.naming).try_acquire_owned() else {
        report::captured(None, &shown(&captured.shared, destination), reason);
        return reset(tcp);
    };
    let captured = Arc::clone(captured);
    tokio::spawn(async move {
        let _slot = slot;
        let looked = caller::look_up(&captured.shared.control, &tcp, peer);
        let who = tokio::time::timeout(LOOK_UP, looked).await.ok().and_then(Result::ok);
        let who = who.as_ref().map(|(who, _)| (who.exe.as_str(), who.pid));
        report::captured(who, &shown(&captured.shared, destination), reason);
        reset(tcp);
    });
}

async fn connection(
    captured: &Captured,
    tcp: TcpStream,
    (peer, to): (SocketAddr, SocketAddr),
    (mut slot, identifying): (Slot, Option<OwnedSemaphorePermit>),
) {
    tune(&tcp);
    let rules = captured.shared.rules.load();
    let identified = caller::identify(&captured.shared, &rules.policy, &tcp, peer).await;
    drop(identifying);
    let mut session = match identified {
        Ok(identity) if !slot.belongs_to(identity.pid) => {
            if captured.tell(to, None) {
                let who = Some((identity.caller.exe.as_str(), identity.pid));
                let reason = "too many connections of this process at a time";
                report::captured(who, &shown(&captured.shared, to), reason);
            }
            return reset(tcp);
        }
        Ok(identity) => Session::new(Arc::clone(&captured.shared), rules, identity),
        Err(error) => {
            if captured.tell(to, None) {
                report::captured(None, &shown(&captured.shared, to), &error.to_string());
            }
            return reset(tcp);
        }
    };
    let mut client = Conn::new(Stream::Tcp(tcp));
    let Some(host) = judged_name(captured, &session, &mut client, to).await else {
        return abort(client);
    };
    // The client may have taken its time, and the policy may have changed.
    let judged = match session.renewed().await {
        Ok(renewed) => {
            session = renewed;
            session.judge(&host, to.port()).await
        }
        Err(error) => Err(NotAdmitted::Caller(error)),
    };
    let grant = match judged {
        Ok(grant) => grant,
        Err(why) => {
            // An executable that is not the one it was is a finding, whoever else was refused there.
            let finding = matches!(why, NotAdmitted::Caller(_));
            if captured.tell(to, Some(&host)) || finding {
                denied(&session, &host, to.port(), why);
            }
            return abort(client);
        }
    };
    let origin = Origin { host, port: to.port(), grant };
    match dial(&session, &origin).await {
        Ok(upstream) => {
            report::connect_allowed(&session, &origin);
            tunnel::run(Admitted { session, origin }, client, upstream).await;
        }
        Err(error) => {
            let finding = matches!(error, DialError::Forbidden { .. } | DialError::NotByProxy(_));
            if captured.tell(to, Some(&origin.host)) || finding {
                report::dial_failed(&session, &origin, &error);
            }
            abort(client);
        }
    }
}

/// The name that stands for the connection; none where it cannot be told, which is reported, or
/// where the client is gone.
async fn judged_name(
    captured: &Captured,
    session: &Session,
    client: &mut Conn,
    to: SocketAddr,
) -> Option<Host> {
    let shared = &session.shared;
    if to.ip().is_loopback() {
        let unclear = |reason: &str| unclear(captured, session, to, reason);
        return sidecar::judged_name(session, client, to.port(), unclear).await;
    }
    if let IpAddr::V4(ip) = to.ip()
        && let Some(name) = shared.pool.name(ip)
    {
        return Some(Host::clone(&name));
    }
    let literal = Host::from(to.ip());
    let allowed = session.policy().connect(session.caller(), &literal, to.port());
    let opaque = matches!(allowed, Connect::Allow(grant) if grant.inspect == Inspect::None);
    match asked_for(client, if opaque { SERVER_FIRST } else { SILENCE }).await {
        // An address in `Host` that is not the one that was dialled means one of the two is a lie.
        Asked::Host(host) if host.is_ip() && host != literal => {
            unclear(captured, session, to, "Host is another address than the one connected to");
            None
        }
        Asked::Host(host) => Some(host),
        Asked::Nothing => Some(literal),
        Asked::Unclear(reason) => {
            unclear(captured, session, to, &reason);
            None
        }
        Asked::Gone => {
            unclear(captured, session, to, "closed before it said whom it asks for");
            None
        }
    }
}

fn unclear(captured: &Captured, session: &Session, to: SocketAddr, reason: &str) {
    if captured.tell(to, None) {
        report::captured(Some((&session.caller().exe, session.pid())), &to, reason);
    }
}

fn denied(session: &Session, host: &Host, port: u16, why: NotAdmitted) {
    match why {
        NotAdmitted::Policy(mut denial) => {
            if host.is_ip() {
                denial.reason.push_str(CONNECT_BY_NAME);
            }
            report::connect_denied(session, host, port, &denial);
        }
        NotAdmitted::Caller(error) => report::caller_not_trusted(session, host, port, &error),
    }
}

/// Resets a connection that may have been read from.
fn abort(client: Conn) {
    if let Stream::Tcp(tcp) = client.into_stream() {
        reset(tcp);
    }
}

/// Closes with a reset: the program fails at once instead of waiting for an answer.
fn reset(tcp: TcpStream) {
    let _ = socket2::SockRef::from(&tcp).set_linger(Some(Duration::ZERO));
    drop(tcp);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_ours_is_never_a_destination() {
        let ours = |text: &str| is_ours(text.parse().expect("address"));
        for address in ["10.200.0.1:443", "10.200.0.77:80", "8.8.8.8:15001", "8.8.8.8:15053"] {
            assert!(ours(address), "{address}");
        }
        assert!(ours("198.18.0.1:3128") && ours("[2001:db8::1]:443"));
        assert!(!ours("10.200.1.1:443") && !ours("198.18.0.1:443"));
        assert!(!ours("10.201.0.1:80"));
    }
}

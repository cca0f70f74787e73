//! Connections from outside to what listens in the fence: the same ports on the pod's addresses,
//! open exactly while the fence listens on them.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::AbortHandle;

use super::admin::Admin;
use super::control_client::Control;
use super::listener::accept;
use super::metrics::{self, Kind};
use super::report;
use super::stream::{Carried, Conn, Stream, duplex, tune};
use crate::policy::SidecarPorts;

/// The fence's address, as the gateway reaches it.
const FENCE: Ipv4Addr = Ipv4Addr::new(10, 200, 0, 2);

/// Ours in the gateway: never opened in the pod, so that nobody takes the one for the other.
pub(crate) const RESERVED: [u16; 3] = [3128, 15_001, 15_053];

/// What the injector allots to admin endpoints.
const ADMIN_PORTS: std::ops::RangeInclusive<u16> = 15_200..=15_299;

/// The most connections at a time, and the most ports.
const CONNECTIONS: usize = 1024;
const PORTS: usize = 256;

/// How long the fence may take to accept.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

const BACKLOG: i32 = 1024;

/// Which ports of the fence are reachable from outside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Inbound {
    /// All on which something listens.
    Mirror,
    /// None.
    None,
    /// Those of these on which something listens.
    Ports(Vec<u16>),
}

/// The open ports.
pub(crate) struct Ports {
    allowed: Inbound,
    /// Where sidecars listen, or will: an agent that listens there must not be taken for one.
    sidecars: SidecarPorts,
    admin: Arc<Admin>,
    control: Arc<Control>,
    slots: Arc<Semaphore>,
    open: Mutex<BTreeMap<u16, AbortHandle>>,
}

impl Ports {
    pub(crate) fn new(
        allowed: Inbound,
        sidecars: SidecarPorts,
        admin: Arc<Admin>,
        control: Arc<Control>,
    ) -> Self {
        let slots = Arc::new(Semaphore::new(CONNECTIONS));
        Self { allowed, sidecars, admin, control, slots, open: Mutex::default() }
    }

    /// Whether a port of the pod leads into the fence.
    pub(crate) fn serves(&self, port: u16) -> bool {
        self.open.lock().unwrap_or_else(PoisonError::into_inner).contains_key(&port)
    }

    /// Opens and closes until the pod listens where the fence does. Open connections stay. A port
    /// that cannot be opened is reported and tried again at the next change.
    pub(crate) fn follow(&self, listening: &[u16]) {
        let wanted: BTreeSet<u16> = listening
            .iter()
            .copied()
            .filter(|port| *port != 0 && !RESERVED.contains(port) && !self.admin.is_at(*port))
            .filter(|port| !self.sidecars.contains(*port))
            .filter(|port| match &self.allowed {
                // Another container's admin endpoint may be to come there, and people would read
                // what this agent answers in its place.
                Inbound::Mirror => !ADMIN_PORTS.contains(port),
                Inbound::None => false,
                Inbound::Ports(ports) => ports.contains(port),
            })
            .take(PORTS)
            .collect();
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.retain(|port, task| {
            let keep = wanted.contains(port);
            if !keep {
                task.abort();
            }
            keep
        });
        for port in wanted {
            if open.contains_key(&port) {
                continue;
            }
            match listen(port) {
                Ok(listener) => {
                    let (control, slots) = (Arc::clone(&self.control), Arc::clone(&self.slots));
                    let task = tokio::spawn(serve(listener, port, control, slots));
                    open.insert(port, task.abort_handle());
                }
                Err(error) => report::inbound_failed(port, &error),
            }
        }
    }
}

/// On the wildcard of both families, or of IPv4 where there is no other.
fn listen(port: u16) -> io::Result<TcpListener> {
    let bind = |domain, address: SocketAddr| {
        let socket = Socket::new(domain, Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
        if domain == Domain::IPV6 {
            socket.set_only_v6(false)?;
        }
        socket.set_reuse_address(true)?;
        socket.bind(&address.into())?;
        socket.listen(BACKLOG)?;
        TcpListener::from_std(socket.into())
    };
    bind(Domain::IPV6, (Ipv6Addr::UNSPECIFIED, port).into()).or_else(|error| {
        match error.raw_os_error().map(rustix::io::Errno::from_raw_os_error) {
            Some(
                rustix::io::Errno::AFNOSUPPORT
                | rustix::io::Errno::ADDRNOTAVAIL
                | rustix::io::Errno::NOPROTOOPT,
            ) => bind(Domain::IPV4, (Ipv4Addr::UNSPECIFIED, port).into()),
            _ => Err(error),
        }
    })
}

async fn serve(listener: TcpListener, port: u16, control: Arc<Control>, slots: Arc<Semaphore>) {
    loop {
        let (tcp, _) = accept(&listener).await;
        // Beyond the limit new connections wait in the backlog.
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else {
            return;
        };
        let control = Arc::clone(&control);
        tokio::spawn(async move {
            let _slot = slot;
            let _open = metrics::connection(Kind::Inbound);
            tune(&tcp);
            match connect(&control, port).await {
                Ok(inner) => {
                    let mut outer = Conn::new(Stream::Tcp(tcp));
                    let mut inner = Conn::new(Stream::Tcp(inner));
                    duplex(&mut outer, &mut inner, &mut Carried::default()).await;
                }
                // As if nothing listened: what a client of a closed port sees.
                Err(_) => {
                    let _ = socket2::SockRef::from(&tcp).set_linger(Some(Duration::ZERO));
                }
            }
        });
    }
}

/// Into the fence, by a socket of the gateway's namespace.
async fn connect(control: &Control, port: u16) -> io::Result<TcpStream> {
    let socket: OwnedFd = control.gateway_socket().await.map_err(io::Error::other)?;
    let socket = TcpSocket::from_std_stream(std::net::TcpStream::from(socket));
    let connecting = socket.connect(SocketAddr::from((FENCE, port)));
    let tcp = tokio::time::timeout(CONNECT_TIMEOUT, connecting)
        .await
        .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    tune(&tcp);
    Ok(tcp)
}

//! The proxy's sockets. They are made in the gateway's namespace, those for sidecars in the fence's,
//! stay in it wherever they are passed, and need no capability to be used.

use std::ffi::c_int;
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::net::{AddressFamily, SocketFlags, SocketType};

use super::error::{NetworkError, Result};
use super::gateway::{CAPTURE_PORT, DNS_PORT, GATEWAY, PROXY_PORT};
use super::netns::{self, Namespace};

/// Connections that wait to be accepted; the kernel's own default limit for a namespace.
const BACKLOG: i32 = 4096;

/// The sockets the proxy listens on; close-on-exec and non-blocking.
#[derive(Debug)]
pub struct Listeners {
    /// 10.200.0.1:3128: the explicit proxy.
    pub proxy: OwnedFd,
    /// Every other TCP connection. `getsockname` of an accepted socket is the address that was
    /// asked for, which may be one of 10.200.0.0/24 or one of these ports: those are to be refused.
    pub captured: OwnedFd,
    /// DNS over UDP. The answer to a query goes to where it came from; the kernel puts the
    /// address back that was asked.
    pub dns_udp: OwnedFd,
    /// DNS over TCP. `getsockname` of an accepted socket is the server that was asked.
    pub dns_tcp: OwnedFd,
    /// Of the fence's own loopback, one for each port that leads to a sidecar; see [`sidecars`].
    pub sidecars: Vec<OwnedFd>,
}

/// Makes the gateway's listeners in the namespace of the calling thread, which must be the gateway's,
/// built.
/// Needs `CAP_NET_ADMIN` there.
pub fn listeners() -> Result<Listeners> {
    let any = Ipv4Addr::UNSPECIFIED;
    Ok(Listeners {
        proxy: listener(SocketType::STREAM, GATEWAY, PROXY_PORT, "the gateway")?,
        captured: listener(SocketType::STREAM, any, CAPTURE_PORT, "the gateway")?,
        dns_udp: listener(SocketType::DGRAM, GATEWAY, DNS_PORT, "the gateway")?,
        dns_tcp: listener(SocketType::STREAM, any, DNS_PORT, "the gateway")?,
        sidecars: Vec::new(),
    })
}

/// Makes a listener on each of these ports of the fence's own loopback, for the proxy to relay.
///
/// The calling thread must be in `gateway`, and is again afterwards; `fence` must be built. Needs
/// `CAP_SYS_ADMIN` in both. After an error the thread may be in either.
pub fn sidecars(
    fence: &Namespace,
    gateway: &Namespace,
    ports: impl IntoIterator<Item = u16>,
) -> Result<Vec<OwnedFd>> {
    let mut ports = ports.into_iter().peekable();
    if ports.peek().is_none() {
        return Ok(Vec::new());
    }
    netns::enter(fence)?;
    let listen = |port| listener(SocketType::STREAM, Ipv4Addr::LOCALHOST, port, "the fence");
    let made = ports.map(listen).collect();
    netns::enter(gateway)?;
    made
}

/// An unconnected, non-blocking, close-on-exec TCP socket of the calling thread's namespace, with
/// which the proxy connects to what listens in the fence.
///
/// It is transparent because the packet rules pass an answer from the fence only if it belongs to
/// a connection of a transparent socket. Needs `CAP_NET_ADMIN` in the namespace.
pub fn socket() -> Result<OwnedFd> {
    let object = "a TCP socket of the gateway";
    let fd = open(SocketType::STREAM, object)?;
    set_transparent(&fd, object)?;
    Ok(fd)
}

fn listener(kind: SocketType, address: Ipv4Addr, port: u16, place: &str) -> Result<OwnedFd> {
    let name = if kind == SocketType::STREAM { "tcp" } else { "udp" };
    let address = SocketAddrV4::new(address, port);
    let object = format!("{name} {address} in {place}");
    let fd = open(kind, &object)?;
    if address.ip().is_unspecified() {
        // tproxy gives a packet to a listener only if that may answer from any address.
        set_transparent(&fd, &object)?;
    }
    rustix::net::bind(&fd, &address).map_err(|e| NetworkError::new("bind", &object, e))?;
    if kind == SocketType::STREAM {
        rustix::net::listen(&fd, BACKLOG)
            .map_err(|e| NetworkError::new("listen on", &object, e))?;
    }
    Ok(fd)
}

fn open(kind: SocketType, object: &str) -> Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    rustix::net::socket_with(AddressFamily::INET, kind, flags, None)
        .map_err(|e| NetworkError::new("open", object, e))
}

fn set_transparent(fd: &OwnedFd, object: &str) -> Result<()> {
    let on: c_int = 1;
    let length = libc::socklen_t::try_from(size_of_val(&on)).expect("four");
    // SAFETY: the option's value is a `c_int` that lives through the call, and `length` is its
    // size; the descriptor is open, since it is borrowed.
    let result = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::SOL_IP,
            libc::IP_TRANSPARENT,
            (&raw const on).cast(),
            length,
        )
    };
    if result == 0 {
        return Ok(());
    }
    Err(NetworkError::new("make transparent", object, io::Error::last_os_error()))
}

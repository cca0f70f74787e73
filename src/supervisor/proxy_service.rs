//! Answers the proxy: who owns this connection, give me a socket into the fence; and tells it
//! what listens in the fence. Runs on the gateway's thread.

use std::net::SocketAddrV4;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::SyncSender;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::args::Inbound;
use super::caller::Callers;
use super::packet;
use crate::fence::listeners;
use crate::fence::sockdiag::SockDiag;
use crate::proxy::control::{ToProxy, ToSupervisor};

/// How often the fence's listening ports are looked at. There is no notification for them; a dump
/// of the listening sockets of one small namespace costs some 50 µs.
const LOOK: Timespec = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };

/// What the gateway's thread works with.
#[derive(Debug)]
pub struct ProxyService {
    /// Our end of the control socket.
    pub control: OwnedFd,
    /// A `sock_diag` socket of the fence's namespace.
    pub diag: SockDiag,
    /// The records of connects.
    pub callers: Arc<Callers>,
    /// Which ports of the fence are told of.
    pub inbound: Inbound,
    /// Where answers to changes of the policy go, where it is followed.
    pub answered: Option<SyncSender<Answered>>,
}

/// What the proxy says of a change of the policy.
#[derive(Debug)]
pub struct Answered {
    /// Which one.
    pub generation: u64,
    /// Why it is not in force; `None`: it is.
    pub refused: Option<String>,
}

impl ProxyService {
    /// Serves until the proxy's end of the socket closes; that the proxy has ended the main thread
    /// learns as its parent. The calling thread is in the gateway's namespace.
    pub fn serve(mut self) {
        let mut told = Vec::new();
        let looks = self.inbound != Inbound::None;
        loop {
            let mut ready = [PollFd::new(&self.control, PollFlags::IN)];
            match poll(&mut ready, looks.then_some(&LOOK)) {
                Ok(0) => {
                    let ports = self.ports();
                    if ports != told
                        && packet::send(
                            &self.control,
                            &ToProxy::Inbound { ports: ports.clone() },
                            &[],
                        )
                        .is_ok()
                    {
                        told = ports;
                    }
                }
                Ok(_) => match packet::receive(&self.control) {
                    Ok(Some(packet)) => {
                        if self.answer(&packet).is_err() {
                            return;
                        }
                    }
                    Ok(None) | Err(_) => return,
                },
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => return,
            }
        }
    }

    fn ports(&mut self) -> Vec<u16> {
        let mut ports = self.diag.listening().unwrap_or_default();
        if let Inbound::Ports(declared) = &self.inbound {
            ports.retain(|port| declared.contains(port));
        }
        ports
    }

    /// Answers one question. An answer that cannot be sent is told as a failure of that question;
    /// only when that cannot be sent either is the proxy gone.
    pub(super) fn answer(&mut self, packet: &packet::Packet) -> std::io::Result<()> {
        let (id, answered) = match packet.json()? {
            ToSupervisor::Identify { id, client, server } => {
                (id, self.identify(id, client, server))
            }
            ToSupervisor::GatewaySocket { id } => (id, self.gateway_socket(id)),
            ToSupervisor::Policy { generation, refused } => {
                if let Some(answered) = &self.answered {
                    // One is waited for at a time: more, or none to tell, are not worth memory.
                    let _ = answered.try_send(Answered { generation, refused });
                }
                return Ok(());
            }
            // Said once, before this thread began.
            ToSupervisor::Ready { .. } | ToSupervisor::Prepared => return Ok(()),
        };
        answered.or_else(|error| {
            let reason = error.to_string();
            packet::send(&self.control, &ToProxy::Failed { id, reason }, &[])
        })
    }

    fn identify(
        &mut self,
        id: u64,
        client: SocketAddrV4,
        server: SocketAddrV4,
    ) -> std::io::Result<()> {
        let (caller, executable) = self.callers.find(&mut self.diag, client, server)?.unzip();
        let descriptors: Vec<_> = executable.iter().map(|file| file.as_fd()).collect();
        packet::send(&self.control, &ToProxy::Caller { id, caller }, &descriptors)
    }

    fn gateway_socket(&self, id: u64) -> std::io::Result<()> {
        let socket = listeners::socket().map_err(std::io::Error::other)?;
        packet::send(&self.control, &ToProxy::GatewaySocket { id }, &[socket.as_fd()])
    }
}

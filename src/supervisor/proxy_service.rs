//! Answers the proxy: who owns this connection, give me a socket into the fence; and tells it
//! what listens in the fence.
//!
//! One thread, which lives in the gateway's network namespace: a socket stays in the namespace
//! that it was made in.

use std::net::SocketAddrV4;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::args::Inbound;
use super::caller::Callers;
use super::packet;
use crate::fence::listeners;
use crate::fence::netns::{self, Namespace};
use crate::fence::sockdiag::SockDiag;
use crate::proxy::control::{ToProxy, ToSupervisor};

/// How often the fence's listening ports are looked at. There is no notification for them; a dump
/// of the listening sockets of one small namespace costs some 50 µs.
const LOOK: Timespec = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };

/// What the thread works with.
#[derive(Debug)]
pub struct ProxyService {
    /// The gateway's namespace.
    pub gateway: Namespace,
    /// A `sock_diag` socket of the fence's namespace.
    pub diag: SockDiag,
    /// The records of connects.
    pub callers: Arc<Callers>,
    /// Which ports of the fence are told of.
    pub inbound: Inbound,
}

/// The thread, before it serves.
#[derive(Debug)]
pub struct Waiting {
    entered: Receiver<Result<()>>,
    control: SyncSender<OwnedFd>,
}

impl ProxyService {
    /// Starts the thread, which goes to the gateway's namespace and waits for [`Waiting::serve`].
    pub fn start(self) -> Result<Waiting> {
        let (tell, entered) = sync_channel(1);
        let (control, told) = sync_channel(1);
        thread::Builder::new()
            .name("gateway".into())
            .spawn(move || {
                drop(tell.send(netns::enter(&self.gateway).map_err(anyhow::Error::from)));
                if let Ok(control) = told.recv() {
                    Service { control, of: self }.serve();
                }
            })
            .context("cannot start the gateway's thread")?;
        Ok(Waiting { entered, control })
    }
}

impl Waiting {
    /// Waits until the thread is where it has to be.
    pub fn entered(&self) -> Result<()> {
        self.entered
            .recv()
            .context("the gateway's thread ended")?
            .context("cannot enter the gateway")
    }

    /// Has it serve on our end of the control socket, until the proxy's end closes; that the proxy
    /// has ended the main thread learns as its parent.
    pub fn serve(self, control: OwnedFd) -> Result<()> {
        self.control.send(control).ok().context("the gateway's thread ended")
    }
}

/// The thread, while it serves.
pub(super) struct Service {
    /// Our end of the control socket.
    pub(super) control: OwnedFd,
    /// What it works with.
    pub(super) of: ProxyService,
}

impl Service {
    fn serve(mut self) {
        let mut told = Vec::new();
        let looks = self.of.inbound != Inbound::None;
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
        let mut ports = self.of.diag.listening().unwrap_or_default();
        if let Inbound::Ports(declared) = &self.of.inbound {
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
            // Said once, before this thread began.
            ToSupervisor::Ready { .. } | ToSupervisor::Bundled => return Ok(()),
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
        let (caller, executable) = self.of.callers.find(&mut self.of.diag, client, server)?.unzip();
        let descriptors: Vec<_> = executable.iter().map(|file| file.as_fd()).collect();
        packet::send(&self.control, &ToProxy::Caller { id, caller }, &descriptors)
    }

    fn gateway_socket(&self, id: u64) -> std::io::Result<()> {
        let socket = listeners::socket().map_err(std::io::Error::other)?;
        packet::send(&self.control, &ToProxy::GatewaySocket { id }, &[socket.as_fd()])
    }
}

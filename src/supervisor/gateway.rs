//! The thread that lives in the gateway's network namespace. It makes that namespace, builds both
//! ends of the network, hands out the listeners, and stays: a socket belongs to the namespace that
//! it was made in, and the proxy needs new ones for inbound connections.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;

use anyhow::{Context, Result, bail};

use super::keeper::FromKeeper;
use super::launch;
use super::proxy_service::ProxyService;
use crate::fence::listeners::{self, Listeners, listeners};
use crate::fence::netlink::Route;
use crate::fence::netns::{self, Namespace};
use crate::fence::nftables::Nftables;
use crate::fence::sockdiag::SockDiag;
use crate::fence::{agent_net, gateway};
use crate::policy::SidecarPorts;

/// The thread.
#[derive(Debug)]
pub struct Gateway {
    built: Receiver<Result<Network>>,
    serve: SyncSender<ProxyService>,
}

/// What it built, read back.
#[derive(Debug)]
pub struct Network {
    /// The fence's namespace.
    pub namespace: Namespace,
    /// The gateway's sockets for the proxy, and the fence's.
    pub listeners: Listeners,
    /// A `sock_diag` socket of the fence's namespace.
    pub diag: SockDiag,
    /// The packet rules are loaded; else why not.
    pub rules: Result<(), String>,
}

/// Starts the thread. It hears the keeper's first message on `keeper`, which nobody else may read
/// before [`Gateway::built`].
pub fn start(keeper: OwnedFd, sidecars: SidecarPorts) -> Result<Gateway> {
    let (tell, built) = sync_channel(1);
    let (serve, told) = sync_channel::<ProxyService>(1);
    thread::Builder::new()
        .name("gateway".into())
        .spawn(move || {
            let built = Network::build(&keeper, &sidecars);
            // From here on it is the main thread's alone.
            drop(keeper);
            drop(tell.send(built));
            if let Ok(service) = told.recv() {
                service.serve();
            }
        })
        .context("cannot start the gateway's thread")?;
    Ok(Gateway { built, serve })
}

impl Gateway {
    /// Where the network comes.
    pub fn built(&self) -> &Receiver<Result<Network>> {
        &self.built
    }

    /// Has the thread answer the proxy from now on.
    pub fn serve(self, service: ProxyService) -> Result<()> {
        self.serve.send(service).ok().context("the gateway's thread ended")
    }
}

impl Network {
    /// The keeper makes the fence's namespace meanwhile.
    fn build(keeper: &OwnedFd, sidecars: &SidecarPorts) -> Result<Self> {
        let own = netns::unshare()?;
        let route = Route::open()?;
        let (message, descriptors) = launch::receive(keeper.as_fd()).context("the keeper")?;
        let (FromKeeper::Namespace, Ok([namespace, fence_route, diag])) =
            (message, <[_; 3]>::try_from(descriptors))
        else {
            bail!("the keeper did not hand over the fence's namespace");
        };
        let namespace = Namespace::from_fd(namespace);
        let report = gateway::build(&route, &namespace).context("the gateway")?;
        agent_net::build(&Route::from_fd(fence_route), &route).context("the fence's network")?;
        let mut listeners = listeners().context("the gateway's listeners")?;
        listeners.sidecars =
            listeners::sidecars(&namespace, &own, sidecars.iter()).context("--sidecar-ports")?;
        Ok(Self {
            namespace,
            listeners,
            diag: SockDiag::from_fd(diag),
            rules: match report.nftables {
                Nftables::Applied { .. } => Ok(()),
                Nftables::Missing(why) => Err(why),
            },
        })
    }
}

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
    fence: Receiver<Result<(u64, u64)>>,
    built: Receiver<Result<Network>>,
    serve: SyncSender<ProxyService>,
}

/// What it built, read back.
#[derive(Debug)]
pub struct Network {
    /// The gateway's sockets for the proxy, and the fence's.
    pub listeners: Listeners,
    /// A `sock_diag` socket of the fence's namespace.
    pub diag: SockDiag,
    /// The packet rules are loaded; else why not.
    pub rules: Result<(), String>,
}

/// Starts the thread. It hears the keeper's first message on `keeper`, which nobody else may read
/// before [`Gateway::fence`].
pub fn start(keeper: OwnedFd, sidecars: SidecarPorts) -> Result<Gateway> {
    let (tell_fence, fence) = sync_channel(1);
    let (tell, built) = sync_channel(1);
    let (serve, told) = sync_channel::<ProxyService>(1);
    thread::Builder::new()
        .name("gateway".into())
        .spawn(move || {
            let namespaces = Namespaces::join(&keeper);
            // From here on it is the main thread's alone.
            drop(keeper);
            let namespaces = match namespaces {
                Ok((namespaces, fence)) => {
                    drop(tell_fence.send(Ok(fence)));
                    namespaces
                }
                Err(error) => return drop(tell_fence.send(Err(error))),
            };
            drop(tell.send(namespaces.build(&sidecars)));
            if let Ok(service) = told.recv() {
                service.serve();
            }
        })
        .context("cannot start the gateway's thread")?;
    Ok(Gateway { fence, built, serve })
}

impl Gateway {
    /// Where device and inode of the fence's namespace come, as soon as it is there.
    pub fn fence(&self) -> &Receiver<Result<(u64, u64)>> {
        &self.fence
    }

    /// Where the network comes.
    pub fn built(&self) -> &Receiver<Result<Network>> {
        &self.built
    }

    /// Has the thread answer the proxy from now on.
    pub fn serve(self, service: ProxyService) -> Result<()> {
        self.serve.send(service).ok().context("the gateway's thread ended")
    }
}

/// The two that are to be joined, and ways to configure them.
struct Namespaces {
    own: Namespace,
    route: Route,
    fence: Namespace,
    fence_route: Route,
    diag: SockDiag,
}

impl Namespaces {
    /// Makes the gateway's; the keeper makes the fence's meanwhile, whose device and inode come second.
    fn join(keeper: &OwnedFd) -> Result<(Self, (u64, u64))> {
        let own = netns::unshare()?;
        let route = Route::open()?;
        let (message, descriptors) = launch::receive(keeper.as_fd()).context("the keeper")?;
        let (FromKeeper::Namespace, Ok([fence, fence_route, diag])) =
            (message, <[_; 3]>::try_from(descriptors))
        else {
            bail!("the keeper did not hand over the fence's namespace");
        };
        let fence = Namespace::from_fd(fence);
        let id = fence.id()?;
        let fence_route = Route::from_fd(fence_route);
        Ok((Self { own, route, fence, fence_route, diag: SockDiag::from_fd(diag) }, id))
    }

    fn build(self, sidecars: &SidecarPorts) -> Result<Network> {
        let Self { own, route, fence, fence_route, diag } = self;
        let report = gateway::build(&route, &fence).context("the gateway")?;
        agent_net::build(&fence_route, &route).context("the fence's network")?;
        let mut listeners = listeners().context("the gateway's listeners")?;
        listeners.sidecars =
            listeners::sidecars(&fence, &own, sidecars.iter()).context("--sidecar-ports")?;
        let rules = match report.nftables {
            Nftables::Applied { .. } => Ok(()),
            Nftables::Missing(why) => Err(why),
        };
        Ok(Network { listeners, diag, rules })
    }
}

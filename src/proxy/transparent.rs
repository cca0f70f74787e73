//! Connections that ignore the proxy: the gateway catches them, they are reported and refused.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use super::listener::accept;
use super::metrics::Refused;
use super::quiet::{Quiet, period};
use super::{Shared, caller, report};

/// How long the caller's name may take: it is only for the log.
const LOOK_UP: Duration = Duration::from_millis(200);

/// How many connections are named at a time; more are reported without a name.
const NAMED: usize = 64;

/// Refuses until it is aborted.
pub(crate) async fn serve(listener: TcpListener, shared: Arc<Shared>) {
    let mut quiet = Quiet::new();
    let naming = Arc::new(Semaphore::new(NAMED));
    let mut period = period();
    loop {
        let (tcp, peer) = tokio::select! {
            accepted = accept(&listener) => accepted,
            _ = period.tick() => {
                report::more_refused(quiet.take_muted(), Refused::Direct);
                continue;
            }
        };
        // With IP_TRANSPARENT our end has the address that was dialled.
        let Ok(destination) = tcp.local_addr() else {
            continue;
        };
        if !quiet.tell(destination, Instant::now()) {
            reset(tcp);
            continue;
        }
        let Ok(slot) = Arc::clone(&naming).try_acquire_owned() else {
            report::captured(None, destination);
            reset(tcp);
            continue;
        };
        let shared = Arc::clone(&shared);
        tokio::spawn(async move {
            let _slot = slot;
            let looked = caller::look_up(&shared.control, &tcp, peer);
            let who = tokio::time::timeout(LOOK_UP, looked).await.ok().and_then(Result::ok);
            let who = who.as_ref().map(|(who, _)| (who.exe.as_str(), who.pid));
            report::captured(who, destination);
            reset(tcp);
        });
    }
}

/// Closes with a reset: the program fails at once instead of waiting for an answer.
fn reset(tcp: TcpStream) {
    let _ = socket2::SockRef::from(&tcp).set_linger(Some(Duration::ZERO));
    drop(tcp);
}

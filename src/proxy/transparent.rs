//! Connections that ignore the proxy: the gateway catches them, they are reported and refused.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use super::listener::accept;
use super::{Shared, caller, report};

/// How long the caller's name may take: it is only for the log.
const LOOK_UP: Duration = Duration::from_millis(200);

/// How many connections are named at a time; more are refused without a name.
const NAMED: usize = 64;

/// How long the same refusal is not repeated in the log.
pub(crate) const QUIET: Duration = Duration::from_secs(10);

/// How many different refusals are told apart within that time; more are not logged.
const TOLD: usize = 512;

/// Keeps a program that tries again and again from filling the log.
pub(crate) struct Quiet<K> {
    told: HashMap<K, Instant>,
}

impl<K: Eq + Hash> Quiet<K> {
    pub(crate) fn new() -> Self {
        Self { told: HashMap::new() }
    }

    /// Whether this is to be told now.
    pub(crate) fn tell(&mut self, key: K, now: Instant) -> bool {
        if let Some(last) = self.told.get_mut(&key) {
            let due = now.duration_since(*last) >= QUIET;
            if due {
                *last = now;
            }
            return due;
        }
        if self.told.len() >= TOLD {
            self.told.retain(|_, last| now.duration_since(*last) < QUIET);
            if self.told.len() >= TOLD {
                return false;
            }
        }
        self.told.insert(key, now);
        true
    }
}

/// Refuses until it is aborted.
pub(crate) async fn serve(listener: TcpListener, shared: Arc<Shared>) {
    let mut quiet = Quiet::new();
    let naming = Arc::new(Semaphore::new(NAMED));
    loop {
        let (tcp, peer) = accept(&listener).await;
        // With IP_TRANSPARENT our end has the address that was dialled.
        let Ok(destination) = tcp.local_addr() else {
            continue;
        };
        let tell = quiet.tell(destination, Instant::now());
        match Arc::clone(&naming).try_acquire_owned() {
            Ok(slot) if tell => {
                let shared = Arc::clone(&shared);
                tokio::spawn(async move {
                    let _slot = slot;
                    let looked = caller::identify(&shared.control, peer, destination);
                    let who = tokio::time::timeout(LOOK_UP, looked).await.ok().and_then(Result::ok);
                    let who = who.as_ref().map(|who| (who.caller.exe.as_str(), who.pid));
                    report::captured(who, destination);
                    reset(tcp);
                });
            }
            _ => reset(tcp),
        }
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
    fn repeated_refusals_are_told_once_in_a_while_and_memory_is_bounded() {
        let mut quiet = Quiet::new();
        let start = Instant::now();
        assert!(quiet.tell(0, start));
        assert!(!quiet.tell(0, start + QUIET / 2));
        assert!(quiet.tell(0, start + QUIET));
        let told = (1..10_000).filter(|key| quiet.tell(*key, start + QUIET)).count();
        assert_eq!(told, TOLD - 1);
        assert_eq!(quiet.told.len(), TOLD);
        assert!(quiet.tell(20_000, start + QUIET * 3), "old ones make room");
    }
}

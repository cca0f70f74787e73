//! Network namespaces of threads.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

/// Runs `ip` in the namespace of the calling thread.
pub fn ip(words: &str) {
    let status = Command::new("ip").args(words.split(' ')).status().expect("ip");
    assert!(status.success(), "ip {words}");
}

/// Moves the calling thread, and what it starts, to a new network namespace.
pub fn new_namespace(addresses: &[&str]) {
    // SAFETY: only this thread's network namespace changes, no memory or descriptor table.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }
        .expect("new network namespace");
    for words in addresses {
        ip(words);
    }
}

/// Connects from the namespace of [`capture`].
pub type Captured = Sender<(SocketAddr, Sender<TcpStream>)>;

/// A namespace in which this port of every address leads to one listener, whose connections have
/// the address that was dialled: what the gateway's packet rules do, for one port.
pub fn capture(port: u16) -> (Captured, TcpListener) {
    let (sender, wishes) = channel::<(SocketAddr, Sender<TcpStream>)>();
    let (made, listener) = channel();
    std::thread::spawn(move || {
        new_namespace(&["link set lo up", "route add local default dev lo"]);
        made.send(TcpListener::bind(("0.0.0.0", port)).expect("listener")).expect("rig");
        for (address, wisher) in wishes {
            // On a busy machine a connection beyond the limit may be reset before it is made.
            let again = || std::thread::sleep(Duration::from_millis(20));
            let mut tries = (0..100).map(|_| TcpStream::connect(address).inspect_err(|_| again()));
            let _ = wisher.send(tries.find_map(Result::ok).expect("caught"));
        }
    });
    (sender, listener.recv().expect("listener"))
}

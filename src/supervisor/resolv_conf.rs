//! The name servers that programs of the fence are told of.
//!
//! The fence answers DNS at every IPv4 address, whatever `/etc/resolv.conf` names. In a pod that
//! has IPv6 only it names no such address, and the fence has no IPv6: there, and only there, the
//! fence gets a file of its own over the pod's.

use std::fs::File;
use std::io::{self, Read};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use anyhow::Result;
use rustix::mount::{MountPropagationFlags, mount_bind, mount_change};
use rustix::thread::UnshareFlags;

use super::run_dir::RunDir;
use crate::fence::gateway::GATEWAY;

/// The pod's file.
pub const PATH: &str = "/etc/resolv.conf";

/// The longest that is read, in bytes.
const MAX: u64 = 64 * 1024;

/// Writes what the fence needs in place of the pod's file; `None` where that will do.
pub fn write(dir: &RunDir) -> Result<Option<PathBuf>> {
    let mut text = Vec::new();
    // One that cannot be read is the agent's to find out.
    if File::open(PATH).and_then(|file| file.take(MAX).read_to_end(&mut text)).is_err() {
        return Ok(None);
    }
    let Some(ours) = instead(&String::from_utf8_lossy(&text)) else { return Ok(None) };
    let path = dir.tls().join("resolv.conf");
    dir.write(&path, 0o644, ours.as_bytes())?;
    Ok(Some(path))
}

/// The same file with a server that the fence reaches, where it names none that it does.
fn instead(text: &str) -> Option<String> {
    let server = |line: &&str| line.split_ascii_whitespace().next() == Some("nameserver");
    let reached = |line: &str| {
        line.split_ascii_whitespace().nth(1).is_some_and(|ip| ip.parse::<Ipv4Addr>().is_ok())
    };
    let mut servers = text.lines().filter(server).peekable();
    // Without any, resolvers ask the loopback, in every pod alike.
    if servers.peek().is_none() || servers.any(reached) {
        return None;
    }
    let mut ours = format!("nameserver {GATEWAY}\n");
    for line in text.lines().filter(|line| !server(line)) {
        ours.push_str(line);
        ours.push('\n');
    }
    Some(ours)
}

/// Lays `file` over the pod's, in a mount namespace of the calling process, which has one thread;
/// `own`: it is in one already.
pub fn mount(file: &Path, own: bool) -> io::Result<()> {
    if !own {
        #[allow(deprecated, reason = "the replacement is unsafe for flags that are not used here")]
        rustix::thread::unshare(UnshareFlags::NEWNS)?;
        // What is mounted into the pod later is still seen.
        let flags = MountPropagationFlags::REC | MountPropagationFlags::DOWNSTREAM;
        mount_change("/", flags)?;
    }
    mount_bind(file, PATH)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_where_no_server_can_be_reached() {
        for fine in [
            "",
            "search a.b\n",
            "nameserver 10.96.0.10\n",
            "nameserver fd00::a\nnameserver 10.96.0.10\n",
            "nameserver\t127.0.0.1\n",
        ] {
            assert_eq!(instead(fine), None, "{fine:?}");
        }
        let text = "# pod\nsearch ns.svc.cluster.local\nnameserver fd00::a\n nameserver fe80::1%eth0\noptions ndots:5";
        let ours = "nameserver 10.200.0.1\n# pod\nsearch ns.svc.cluster.local\noptions ndots:5\n";
        assert_eq!(instead(text).as_deref(), Some(ours));
        assert_eq!(instead("nameserver nonsense\n").as_deref(), Some("nameserver 10.200.0.1\n"));
    }
}

//! The addresses of the calling thread's network namespace.

use std::net::IpAddr;

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{AddressAttribute, AddressMessage, AddressScope};

use super::device::LOOPBACK;
use super::error::Result;
use super::netlink::Route;

/// The addresses of both families by which others reach this namespace: not those of loopback, nor
/// of one link only. Needs no capability.
pub fn reachable() -> Result<Vec<IpAddr>> {
    let request = RouteNetlinkMessage::GetAddress(AddressMessage::default());
    let answers = Route::open()?.dump("the addresses", &request)?;
    Ok(answers.into_iter().filter_map(address).collect())
}

fn address(answer: RouteNetlinkMessage) -> Option<IpAddr> {
    let RouteNetlinkMessage::NewAddress(message) = answer else { return None };
    let header = &message.header;
    if header.index == LOOPBACK || header.scope != AddressScope::Universe {
        return None;
    }
    // Where the two ends of a link have addresses of their own, `Address` is the other end's.
    let (mut local, mut other) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(ip) => local = Some(*ip),
            AddressAttribute::Address(ip) => other = Some(*ip),
            _ => {}
        }
    }
    local.or(other)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn addresses_of_both_families() {
        if !rustix::process::geteuid().is_root() {
            println!("SKIPPED: needs root");
            return;
        }
        let test = || {
            crate::fence::netns::unshare().unwrap();
            assert!(reachable().unwrap().is_empty());
            for words in [
                "link set lo up",
                "address add 10.1.1.1/32 dev lo",
                "link add eth0 type veth peer name eth1",
                "address add 10.1.2.3/24 dev eth0",
                "address add fd00:1::5/64 dev eth0 nodad",
                "address add 10.1.3.1 peer 10.1.3.2 dev eth1",
                "link set eth0 up",
                "link set eth1 up",
            ] {
                let ip = Command::new("ip").args(words.split(' ')).status().unwrap();
                assert!(ip.success(), "{words}");
            }
            let mut found: Vec<_> = reachable().unwrap().iter().map(IpAddr::to_string).collect();
            found.sort_unstable();
            assert_eq!(found, ["10.1.2.3", "10.1.3.1", "fd00:1::5"]);
        };
        std::thread::spawn(test).join().unwrap();
    }
}

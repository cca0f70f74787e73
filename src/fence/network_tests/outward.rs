//! What the agent tries to reach: where it arrives, and how it fails.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::*;

#[test]
fn the_proxy_is_reached_at_its_address() {
    in_thread(|| {
        let rig = rig();
        let mut client = connect(SocketAddrV4::new(GATEWAY, PROXY_PORT)).unwrap();
        let mut server = accept(&rig.proxy);
        assert_eq!(*addresses(&server).1.ip(), AGENT);
        talk(&mut client, &mut server);
    });
}

#[test]
fn other_tcp_is_captured_with_its_address() {
    in_thread(|| {
        let rig = rig();
        let gateway = GATEWAY.octets();
        for to in [
            v4([1, 2, 3, 4], 80),
            v4([1, 2, 3, 4], PROXY_PORT),
            v4([169, 254, 169, 254], 80),
            v4([10, 200, 0, 7], 80),
            v4([10, 96, 0, 1], 443),
            v4(gateway, 22),
            v4(gateway, CAPTURE_PORT),
            v4(gateway, gateway::DNS_PORT),
            v4([8, 8, 8, 8], CAPTURE_PORT),
            v4(gateway, 40_000),
        ] {
            let mut client = connect(to).unwrap_or_else(|e| panic!("{to}: {e}"));
            let mut server = accept(&rig.captured);
            let (local, peer) = addresses(&server);
            assert_eq!((local, *peer.ip()), (to, AGENT));
            talk(&mut client, &mut server);
        }
    });
}

#[test]
fn a_megabyte_passes_a_captured_connection_both_ways() {
    in_thread(|| {
        let rig = rig();
        let client = connect(v4([93, 184, 216, 34], 443)).unwrap();
        let server = accept(&rig.captured);
        megabyte(client.try_clone().unwrap(), server.try_clone().unwrap());
        megabyte(server, client);
    });
}

#[test]
fn a_connection_that_the_proxy_closes_ends_at_the_client() {
    in_thread(|| {
        let rig = rig();
        let to = v4([1, 2, 3, 4], 80);
        // More than once from the same port, so that the gateway still waits for late packets of
        // the one before.
        for _ in 0..3 {
            let mut client = connect(to).unwrap();
            drop(accept(&rig.captured));
            assert_eq!(client.read(&mut [0; 1]).unwrap(), 0);
        }
    });
}

#[test]
fn loopback_of_the_fence_is_its_own() {
    in_thread(|| {
        let _rig = rig();
        let refused = connect(v4([127, 0, 0, 1], 9)).unwrap_err();
        assert_eq!(errno(&refused), Some(Errno::CONNREFUSED));
        let refused = connect(SocketAddrV4::new(AGENT, PROXY_PORT)).unwrap_err();
        assert_eq!(errno(&refused), Some(Errno::CONNREFUSED));
        for loopback in [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)] {
            let one = UdpSocket::bind((loopback, 0)).unwrap();
            let two = UdpSocket::bind((loopback, 0)).unwrap();
            one.send_to(b"x", two.local_addr().unwrap()).unwrap();
            assert!(wait(&two, PollFlags::IN));
        }
    });
}

#[test]
fn datagrams_fail_at_once() {
    in_thread(|| {
        let _rig = rig();
        let any = UdpSocket::bind("0.0.0.0:0").unwrap();
        for to in ["8.8.8.8:123", "10.200.0.1:15053", "10.200.0.7:5353", "1.1.1.1:443"] {
            let error = any.send_to(b"x", to).unwrap_err();
            assert_eq!(errno(&error), Some(Errno::ACCESS), "{to}");
            assert_eq!(errno(&any.connect(to).unwrap_err()), Some(Errno::ACCESS), "{to}");
        }
        let lite = rustix::net::ipproto::UDPLITE;
        match rustix::net::socket_with(
            AddressFamily::INET,
            SocketType::DGRAM,
            SocketFlags::CLOEXEC,
            Some(lite),
        ) {
            Ok(socket) => {
                for to in [v4([8, 8, 8, 8], 53), v4([8, 8, 8, 8], 80)] {
                    assert_eq!(rustix::net::connect(&socket, &to), Err(Errno::ACCESS), "{to}");
                }
            }
            Err(e) => eprintln!("SKIPPED: this kernel has no UDP-Lite ({e})"),
        }
    });
}

#[test]
fn dns_is_answered_from_the_address_that_was_asked() {
    in_thread(|| {
        let rig = rig();
        rig.dns_udp.set_nonblocking(false).unwrap();
        for server in ["8.8.8.8:53", "10.96.0.10:53", "10.200.0.1:53", "169.254.20.10:53"] {
            let client = UdpSocket::bind("0.0.0.0:0").unwrap();
            client.connect(server).unwrap();
            client.set_read_timeout(Some(PATIENCE)).unwrap();
            for _ in 0..2 {
                client.send(b"query").unwrap();
                assert!(wait(&rig.dns_udp, PollFlags::IN), "{server}: no query arrived");
                let mut buffer = [0; 16];
                let (length, from) = rig.dns_udp.recv_from(&mut buffer).unwrap();
                assert_eq!((&buffer[..length], from.ip()), (&b"query"[..], AGENT.into()));
                rig.dns_udp.send_to(b"answer", from).unwrap();
                // A connected socket takes only what comes from the address it is connected to.
                let length = client.recv(&mut buffer).unwrap();
                assert_eq!(&buffer[..length], b"answer", "{server}");
            }
        }
        let mut client = connect(v4([8, 8, 8, 8], 53)).unwrap();
        let mut server = accept(&rig.dns_tcp);
        assert_eq!(addresses(&server).0, v4([8, 8, 8, 8], 53));
        talk(&mut client, &mut server);
    });
}

#[test]
fn ipv6_is_unreachable_at_once() {
    in_thread(|| {
        let _rig = rig();
        for to in ["[2001:db8::1]:80", "[fe80::1]:80", "[ff02::1]:80", "[64:ff9b::1]:53"] {
            let to: SocketAddr = to.parse().unwrap();
            let error = TcpStream::connect_timeout(&to, PATIENCE).unwrap_err();
            let expected = [Some(Errno::NETUNREACH), Some(Errno::INVAL)];
            assert!(expected.contains(&errno(&error)), "tcp {to}: {error}");
            let socket = UdpSocket::bind("[::]:0").unwrap();
            let error = socket.send_to(b"x", to).unwrap_err();
            assert!(
                matches!(
                    errno(&error),
                    Some(Errno::NETUNREACH | Errno::INVAL | Errno::ADDRNOTAVAIL)
                ),
                "udp {to}: {error}"
            );
        }
    });
}

#[test]
fn a_flood_of_queries_is_cut_and_ends() {
    in_thread(|| {
        let rig = rig();
        // Far more than pass in the time this takes on any machine.
        let sent = 20_000;
        let began = Instant::now();
        for _ in 0..sent {
            let client = UdpSocket::bind("0.0.0.0:0").unwrap();
            client.send_to(b"q", "8.8.8.8:53").unwrap();
        }
        let seconds = began.elapsed().as_secs() + 1;
        if let Some(count) = rig.tracked() {
            // What may pass in that time, and what may pass at once.
            let most = nftables::QUERIES * (seconds + 1);
            assert!((1..=most).contains(&count), "{count} entries, at most {most} in {seconds} s");
        }
    });
}

#[test]
fn tcp_takes_no_entry_of_the_tracked_connections() {
    in_thread(|| {
        let rig = rig();
        let held: Vec<_> = (1_000..1_500u16)
            .map(|port| {
                let client = connect(v4([93, 184, 216, 34], port)).unwrap();
                (client, accept(&rig.captured))
            })
            .collect();
        if let Some(count) = rig.tracked() {
            assert_eq!(count, 0, "with {} connections", held.len());
        }
    });
}

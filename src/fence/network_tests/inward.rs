//! What the proxy reaches in the fence, and what it learns about the fence's sockets.

use super::*;

#[test]
fn the_proxy_reaches_what_listens_in_the_fence() {
    in_thread(|| {
        let rig = rig();
        for bind in ["0.0.0.0:0", "[::]:0", "10.200.0.2:0"] {
            let listener = TcpListener::bind(bind).unwrap();
            let port = listener.local_addr().unwrap().port();
            let mut outer = rig.connect_from_gateway(SocketAddrV4::new(AGENT, port)).unwrap();
            let mut inner = accept(&listener);
            talk(&mut outer, &mut inner);
            talk(&mut inner, &mut outer);
            megabyte(outer.try_clone().unwrap(), inner.try_clone().unwrap());
            megabyte(inner, outer);
        }
        let closed = rig.connect_from_gateway(SocketAddrV4::new(AGENT, 9)).unwrap_err();
        assert_eq!(errno(&closed), Some(Errno::CONNREFUSED));
    });
}

#[test]
fn the_agent_cannot_use_the_port_of_an_inbound_connection() {
    in_thread(|| {
        let rig = rig();
        let listener = TcpListener::bind("0.0.0.0:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let outer = rig.connect_from_gateway(SocketAddrV4::new(AGENT, port)).unwrap();
        let taken = addresses(&outer).0;
        assert_eq!(*taken.ip(), GATEWAY);
        let _inner = accept(&listener);
        let _client = connect(taken).unwrap();
        assert_eq!(addresses(&accept(&rig.captured)).0, taken);
    });
}

#[test]
fn a_cookie_names_the_clients_socket() {
    in_thread(|| {
        let mut rig = rig();
        for to in [SocketAddrV4::new(GATEWAY, PROXY_PORT), v4([1, 2, 3, 4], 80)] {
            let listener = if *to.ip() == GATEWAY { &rig.proxy } else { &rig.captured };
            let mapped = SocketAddr::new(to.ip().to_ipv6_mapped().into(), to.port());
            for to_any in [SocketAddr::V4(to), mapped] {
                let client = TcpStream::connect_timeout(&to_any, PATIENCE).unwrap();
                let accepted = accept(listener);
                let (server, from) = addresses(&accepted);
                let cookie = rustix::net::sockopt::socket_cookie(&client).unwrap();
                assert_eq!(rig.diag.cookie(from, server).unwrap(), Some(cookie), "{to_any}");
                let other = SocketAddrV4::new(*server.ip(), server.port() + 1);
                assert_eq!(rig.diag.cookie(from, other).unwrap(), None);
                drop(client);
                drop(accepted);
                assert_eq!(rig.diag.cookie(from, server).unwrap(), None);
            }
        }
        // A listener on the client's port is not its connection.
        let listener = TcpListener::bind("0.0.0.0:0").unwrap();
        let client = SocketAddrV4::new(AGENT, listener.local_addr().unwrap().port());
        assert_eq!(rig.diag.cookie(client, v4([1, 2, 3, 4], 80)).unwrap(), None);
    });
}

#[test]
fn what_listens_is_listed_unless_on_loopback() {
    in_thread(|| {
        let mut rig = rig();
        assert!(rig.diag.listening().unwrap().is_empty());
        let bind = |address: &str| TcpListener::bind(address).unwrap();
        let seen = ["0.0.0.0:0", "[::]:0", "10.200.0.2:0", "[::ffff:10.200.0.2]:0"].map(bind);
        let hidden = ["127.0.0.1:0", "[::1]:0", "127.0.0.2:0"].map(bind);
        let only = rustix::net::socket(AddressFamily::INET6, SocketType::STREAM, None).unwrap();
        rustix::net::sockopt::set_ipv6_v6only(&only, true).unwrap();
        rustix::net::bind(&only, &"[::]:0".parse::<SocketAddr>().unwrap()).unwrap();
        rustix::net::listen(&only, 1).unwrap();

        let mut expected = seen.each_ref().map(|l| l.local_addr().unwrap().port()).to_vec();
        expected.sort_unstable();
        assert_eq!(rig.diag.listening().unwrap(), expected);
        drop((seen, hidden));
        assert!(rig.diag.listening().unwrap().is_empty());
    });
}

#[test]
fn many_listeners_fit() {
    in_thread(|| {
        let mut rig = rig();
        let all: Vec<_> = (0..700).map(|_| TcpListener::bind("0.0.0.0:0").unwrap()).collect();
        assert_eq!(rig.diag.listening().unwrap().len(), all.len());
    });
}

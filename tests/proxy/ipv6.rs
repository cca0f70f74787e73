//! A pod that has IPv6 only: upstreams, names, name servers and its own addresses. The fence itself
//! has IPv4 alone, whatever the pod has.

use std::io::Write as _;
use std::net::{TcpListener, TcpStream};

use ringfence::proxy::control::ToProxy;

use crate::dns::name_server_at;
use crate::rig::{Rig, UPSTREAM6, in_ipv6_namespace, in_namespace, ip, read_head, read_to_end};

const POD6: &str = "fd00:88::1";

fn connect(rig: &Rig, authority: &str) -> String {
    rig.exchange(format!("CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n\r\n").as_bytes())
}

fn get(rig: &Rig, authority: &str) -> String {
    let request = format!(
        "GET http://{authority}/x HTTP/1.1\r\nHost: {authority}\r\nConnection: close\r\n\r\n"
    );
    rig.exchange(request.as_bytes())
}

#[test]
fn an_address_is_a_host_like_any_other() {
    in_ipv6_namespace(|rig| {
        let answer = get(&rig, &format!("[{UPSTREAM6}]"));
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
        assert!(answer.contains(&format!("\r\nHost: [{UPSTREAM6}]\r\n")), "{answer}");
        // In every spelling, in a tunnel.
        for spelling in [UPSTREAM6.to_owned(), "2001:DB8:77:0:0::1".to_owned()] {
            let mut tcp = rig.tunnel(&format!("[{spelling}]:80"));
            write!(tcp, "GET /y HTTP/1.1\r\nHost: [{spelling}]\r\nConnection: close\r\n\r\n")
                .expect("send");
            let answer = read_to_end(&mut tcp);
            assert!(answer.starts_with("HTTP/1.1 200 "), "{spelling}: {answer}");
        }
        // In TLS: no name in it, and a certificate for the address on both sides.
        let mut tls = rig.tls(&format!("[{UPSTREAM6}]:443"), UPSTREAM6, &["http/1.1"]);
        write!(tls, "GET /z HTTP/1.1\r\nHost: [{UPSTREAM6}]\r\n\r\n").expect("send");
        assert!(read_head(&mut tls).starts_with("HTTP/1.1 200 "));
        for (authority, status) in [
            (format!("[{UPSTREAM6}]:81"), "403"),
            ("[2001:db8:77::2]:80".to_owned(), "403"),
            ("[::1]:80".to_owned(), "403"),
            (format!("{UPSTREAM6}:80"), "400"),
            (format!("[{UPSTREAM6}%25lo]:80"), "400"),
        ] {
            let answer = connect(&rig, &authority);
            assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{authority}: {answer}");
        }
        assert_eq!(rig.upstream.requests().len(), 4);
    });
}

#[test]
fn names_with_ipv6_addresses_only() {
    in_ipv6_namespace(|rig| {
        // From the hosts file, and from a name server that itself has an IPv6 address.
        let asked = name_server_at(&rig, UPSTREAM6, &["one.wild6.test", "db.prod"]);
        for host in ["raw.test", "one.wild6.test", "db.prod"] {
            let answer = get(&rig, host);
            assert!(answer.starts_with("HTTP/1.1 200 "), "{host}: {answer}");
        }
        let asked = asked.lock().expect("lock").clone();
        assert_eq!(asked, ["one.wild6.test", "db.prod"], "A is not asked for");
        let mut tls = rig.tls("api.test:443", "api.test", &["http/1.1"]);
        tls.write_all(b"GET /ok/1 HTTP/1.1\r\nHost: api.test\r\n\r\n").expect("send");
        assert!(read_head(&mut tls).starts_with("HTTP/1.1 200 "));
    });
}

#[test]
fn networks_of_ipv6_let_pass_and_keep_away() {
    in_ipv6_namespace(|rig| {
        let path = rig.dir.path().join("hosts");
        let text = format!(
            "{UPSTREAM6} in.test one.wild6.test two.wild.test\nfd00:99::1 out.test\n\
             {POD6} pod.wild6.test own.test\n64:ff9b::a9fe:a9fe meta.test\n::ffff:169.254.169.254 mapped.test\n"
        );
        std::fs::write(&path, text).expect("hosts");
        // Port 86 is for any host in 2001:db8:77::/48.
        let listener = TcpListener::bind((UPSTREAM6, 86)).expect("listener");
        drop(rig.tunnel("in.test:86"));
        drop(rig.tunnel(&format!("[{UPSTREAM6}]:86")));
        drop(listener);
        for (authority, reason) in [
            ("out.test:86", "not in allowed_ips"),
            ("[fd00:99::1]:86", "not in allowed_ips"),
            // Documentation's addresses are private: a wildcard alone does not reach them.
            ("two.wild.test:443", "a private address needs allowed_ips"),
            ("pod.wild6.test:80", "not in allowed_ips"),
            ("own.test:80", "the pod's own address"),
            ("meta.test:80", "NAT64"),
        ] {
            let answer = connect(&rig, authority);
            assert!(answer.contains("\"error\":\"ssrf_denied\""), "{authority}: {answer}");
            assert!(answer.contains(reason), "{authority}: {answer}");
        }
        assert_eq!(rig.upstream.requests(), Vec::<String>::new());
    });
}

#[test]
fn what_listens_in_the_fence_is_reached_at_the_pods_ipv6_address() {
    in_ipv6_namespace(|rig| {
        let inside = rig.listen_in_fence(7000);
        rig.tell(&ToProxy::Inbound { ports: vec![7000] });
        let address = format!("[{POD6}]:7000");
        crate::gateway::wait_for(&address);
        let mut outer = TcpStream::connect(&address).expect("inbound");
        outer.write_all(b"hello").expect("send");
        outer.shutdown(std::net::Shutdown::Write).expect("end");
        // The first one was that of the wait.
        let mut said = String::new();
        while said.is_empty() {
            let (mut inner, _) = inside.accept().expect("accept");
            said = read_to_end(&mut inner);
        }
        assert_eq!(said, "hello");
        // And it does not lead back in.
        let answer = connect(&rig, "pod.ringfence.internal:7000");
        assert!(!answer.starts_with("HTTP/1.1 200 "), "{answer}");
    });
}

#[test]
fn the_pods_own_name_is_its_ipv6_address() {
    in_ipv6_namespace(|rig| {
        let pod = TcpListener::bind((POD6, 80)).expect("neighbour");
        let neighbour = std::thread::spawn(move || pod.accept().map(|(_, from)| from));
        drop(rig.tunnel("pod.ringfence.internal:80"));
        neighbour.join().expect("thread").expect("the neighbour was reached");
    });
}

#[test]
fn of_two_families_ipv6_comes_first_and_ipv4_beside_it() {
    in_namespace(|rig| {
        ip(&format!("addr add {UPSTREAM6}/128 dev lo nodad"));
        let hosts = rig.dir.path().join("hosts");
        std::fs::write(&hosts, format!("10.77.0.1 raw.test\n{UPSTREAM6} raw.test\n"))
            .expect("hosts");
        let six = TcpListener::bind((UPSTREAM6, 80)).expect("listener");
        let tunnel = rig.tunnel("raw.test:80");
        six.set_nonblocking(true).expect("nonblocking");
        assert!(six.accept().is_ok(), "the tunnel leads to IPv6");
        drop((six, tunnel));
        // Nobody listens there now: the other family answers.
        assert!(get(&rig, "raw.test").starts_with("HTTP/1.1 200 "));
        assert_eq!(rig.upstream.requests().len(), 1);
    });
}

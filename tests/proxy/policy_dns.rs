//! The fence's DNS over sockets: which names exist, and that nothing else is said or asked.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream, UdpSocket};
use std::time::Duration;

use hickory_proto::op::{Message, Query, ResponseCode};
use hickory_proto::rr::{Name, RData, RecordType};

use crate::dns::name_server;
use crate::rig::{DNS, in_namespace, log_of, not_transparent};

/// Asks as a resolver does.
pub fn ask(name: &str, kind: RecordType) -> Message {
    let mut query = Message::query();
    query.metadata.id = 7;
    query.add_query(Query::query(Name::from_ascii(name).expect("name"), kind));
    let udp = UdpSocket::bind("10.200.0.2:0").expect("socket");
    udp.set_read_timeout(Some(Duration::from_secs(10))).expect("timeout");
    udp.send_to(&query.to_vec().expect("query"), DNS).expect("send");
    let mut answer = [0; 512];
    let (length, _) = udp.recv_from(&mut answer).expect("answer");
    let answer = Message::from_vec(&answer[..length]).expect("answer");
    assert_eq!(answer.metadata.id, 7);
    assert_eq!(answer.queries, query.queries, "what was asked");
    answer
}

/// The address that a name gets.
pub fn address(name: &str) -> Ipv4Addr {
    let answer = ask(name, RecordType::A);
    match answer.answers.as_slice() {
        [one] => match one.data {
            RData::A(ip) => {
                assert_eq!(one.ttl, 30);
                assert!(matches!(ip.0.octets(), [198, 18 | 19, ..]), "{ip}");
                ip.0
            }
            _ => panic!("{answer:?}"),
        },
        _ => panic!("{answer:?}"),
    }
}

fn code(name: &str) -> ResponseCode {
    let answer = ask(name, RecordType::A);
    assert!(answer.answers.is_empty(), "{answer:?}");
    answer.metadata.response_code
}

#[test]
fn names_of_the_policy_get_an_address_without_a_look_up() {
    in_namespace(|rig| {
        let asked = name_server(&rig, &[]);
        let api = address("api.test.");
        assert_eq!(address("API.test."), api);
        assert_ne!(address("raw.test."), api);
        // Without a dot as well, when that is what the policy has.
        address("short.");
        for kind in [RecordType::AAAA, RecordType::HTTPS, RecordType::SVCB, RecordType::TXT] {
            let answer = ask("api.test.", kind);
            assert_eq!(answer.metadata.response_code, ResponseCode::NoError, "{kind}");
            assert!(answer.answers.is_empty(), "{kind}");
        }
        let [a, b, c, d] = api.octets();
        let answer = ask(&format!("{d}.{c}.{b}.{a}.in-addr.arpa."), RecordType::PTR);
        assert!(
            matches!(&answer.answers[0].data, RData::PTR(name) if name.0.to_ascii() == "api.test.")
        );
        assert_eq!(code("exfil.example.com."), ResponseCode::NXDomain);
        assert_eq!(code("x.api.test."), ResponseCode::NXDomain);
        assert_eq!(*asked.lock().expect("lock"), Vec::<String>::new());
    });
}

#[test]
fn a_name_under_a_wildcard_must_exist() {
    in_namespace(|rig| {
        let known = ["two.wild.test", "api.test.wild.test.svc.test"];
        let asked = name_server(&rig, Box::leak(Box::new(known)));
        // The first from the hosts file.
        assert_ne!(address("one.wild.test."), address("two.wild.test."));
        let answer = ask("two.wild.test.", RecordType::AAAA);
        assert_eq!(answer.metadata.response_code, ResponseCode::NoError);
        assert!(answer.answers.is_empty());
        assert_eq!(code("three.wild.test."), ResponseCode::NXDomain);
        let answer = ask("three.wild.test.", RecordType::AAAA);
        assert_eq!(answer.metadata.response_code, ResponseCode::NXDomain);
        assert_eq!(code("broken.wild.test."), ResponseCode::ServFail);
        // As it is, and never with a search domain behind it.
        let asked = asked.lock().expect("lock");
        assert!(asked.iter().all(|name| name.ends_with(".wild.test")), "{asked:?}");
        assert!(asked.iter().any(|name| name == "three.wild.test"), "{asked:?}");
    });
}

#[test]
fn over_tcp_the_same_is_said() {
    in_namespace(|rig| {
        let _asked = name_server(&rig, &["two.wild.test"]);
        let mut tcp = TcpStream::connect(DNS).expect("tcp");
        tcp.set_read_timeout(Some(Duration::from_secs(10))).expect("timeout");
        for (name, answers) in [("api.test.", 1), ("two.wild.test.", 1), ("other.test.", 0)] {
            let mut query = Message::query();
            query.add_query(Query::query(Name::from_ascii(name).expect("name"), RecordType::A));
            let query = query.to_vec().expect("query");
            let length = u16::try_from(query.len()).expect("length");
            tcp.write_all(&[&length.to_be_bytes()[..], &query].concat()).expect("send");
            let mut length = [0; 2];
            tcp.read_exact(&mut length).expect("length");
            let mut answer = vec![0; u16::from_be_bytes(length).into()];
            tcp.read_exact(&mut answer).expect("answer");
            let answer = Message::from_vec(&answer).expect("answer");
            assert_eq!(answer.answers.len(), answers, "{name}");
        }
    });
}

#[test]
fn switched_off_no_name_exists() {
    not_transparent(443, |_rig| {
        assert_eq!(code("api.test."), ResponseCode::NXDomain);
        assert_eq!(code("one.wild.test."), ResponseCode::NXDomain);
    });
}

#[test]
fn what_a_resolver_asks_on_its_way() {
    in_namespace(|rig| {
        let _asked = name_server(&rig, &[]);
        assert_eq!(code("api.test.ns.svc.test."), ResponseCode::NXDomain);
        assert_eq!(code("exfil.example.com.ns.svc.test."), ResponseCode::NXDomain);
        assert_eq!(code("exfil.example.com."), ResponseCode::NXDomain);
    });
}

#[test]
fn refused_names_are_reported_and_search_domains_are_not() {
    if let Some(log) = log_of("policy_dns::what_a_resolver_asks_on_its_way") {
        assert!(log.contains("DENIED DNS A exfil.example.com. "), "{log}");
        assert!(log.contains("no endpoint of the policy names this host"), "{log}");
        assert!(log.contains("exfil.example.com.ns.svc.test."), "{log}");
        assert!(!log.contains("api.test"), "{log}");
    }
}

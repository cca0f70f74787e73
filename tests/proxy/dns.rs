//! Look-ups: after the decision, of the name that was judged, in an order that nobody can bend.

use std::net::{IpAddr, UdpSocket};
use std::sync::{Arc, Mutex};

use hickory_proto::op::{Message, MessageType, Metadata, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA};
use hickory_proto::rr::{RData, Record, RecordType};

use crate::rig::{Rig, UPSTREAM, in_namespace};

/// A name server that knows these names, each at the upstream's address, and fails for names that
/// start with `broken`. Returns what it was asked.
pub fn name_server(rig: &Rig, known: &'static [&str]) -> Arc<Mutex<Vec<String>>> {
    name_server_at(rig, UPSTREAM, known)
}

/// The same at this address, which it also gives out.
pub fn name_server_at(
    rig: &Rig,
    address: &'static str,
    known: &'static [&str],
) -> Arc<Mutex<Vec<String>>> {
    let text = format!("nameserver {address}\nsearch ns.svc.test svc.test\noptions ndots:5\n");
    std::fs::write(rig.dir.path().join("no-resolv.conf"), text).expect("resolv.conf");
    let socket = UdpSocket::bind((address, 53)).expect("port 53");
    let asked = Arc::new(Mutex::new(Vec::new()));
    let log = Arc::clone(&asked);
    std::thread::spawn(move || {
        let mut buffer = [0; 1500];
        while let Ok((length, peer)) = socket.recv_from(&mut buffer) {
            let query = Message::from_vec(&buffer[..length]).expect("query");
            let question = query.queries[0].clone();
            let name = question.name.to_ascii().to_ascii_lowercase();
            log.lock().expect("lock").push(name.trim_end_matches('.').to_owned());
            let mut answer =
                Message::new(query.metadata.id, MessageType::Response, query.metadata.op_code);
            answer.metadata = Metadata::response_from_request(&query.metadata);
            if name.starts_with("broken") {
                answer.metadata.response_code = ResponseCode::ServFail;
            } else if !known.contains(&name.trim_end_matches('.')) {
                answer.metadata.response_code = ResponseCode::NXDomain;
            } else {
                let data = match (address.parse().expect("address"), question.query_type) {
                    (IpAddr::V4(ip), RecordType::A) => Some(RData::A(A(ip))),
                    (IpAddr::V6(ip), RecordType::AAAA) => Some(RData::AAAA(AAAA(ip))),
                    _ => None,
                };
                let record = |data| Record::from_rdata(question.name.clone(), 30, data);
                answer.answers.extend(data.map(record));
            }
            answer.add_query(question);
            socket.send_to(&answer.to_vec().expect("answer"), peer).expect("send");
        }
    });
    asked
}

fn get(rig: &Rig, host: &str) -> String {
    let request =
        format!("GET http://{host}/ HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
    rig.exchange(request.as_bytes())
}

#[test]
fn a_name_with_a_dot_is_tried_as_it_is_first() {
    in_namespace(|rig| {
        let known = ["db.prod", "db.prod.ns.svc.test", "short.svc.test"];
        let asked = name_server(&rig, Box::leak(Box::new(known)));
        let answer = get(&rig, "db.prod");
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
        assert_eq!(*asked.lock().expect("lock"), ["db.prod"]);
        asked.lock().expect("lock").clear();
        let answer = get(&rig, "short");
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
        assert!(answer.contains("\r\nHost: short\r\n"), "{answer}");
        assert_eq!(*asked.lock().expect("lock"), ["short.ns.svc.test", "short.svc.test"]);
        asked.lock().expect("lock").clear();
        // What exists comes from the cache.
        assert!(get(&rig, "short").starts_with("HTTP/1.1 200 "));
        assert!(!asked.lock().expect("lock").iter().any(|name| name == "short.svc.test"));
    });
}

#[test]
fn the_search_domains_are_for_names_that_do_not_exist() {
    in_namespace(|rig| {
        let asked = name_server(&rig, &["db.prod.svc.test", "broken.test.svc.test"]);
        let answer = get(&rig, "db.prod");
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
        let expected = ["db.prod", "db.prod.ns.svc.test", "db.prod.svc.test"];
        assert_eq!(*asked.lock().expect("lock"), expected);
        // A server that fails is no proof that a name does not exist.
        let answer = get(&rig, "broken.test");
        assert!(answer.contains("upstream_unreachable"), "{answer}");
        assert!(!asked.lock().expect("lock").iter().any(|name| name == "broken.test.svc.test"));
    });
}

#[test]
fn a_refused_name_is_never_looked_up() {
    in_namespace(|rig| {
        let asked = name_server(&rig, &[]);
        let answer = get(&rig, "c2VjcmV0.exfil.test");
        assert!(answer.contains("policy_denied"), "{answer}");
        let answer = rig.exchange(
            b"CONNECT c2VjcmV0.exfil.test:443 HTTP/1.1\r\nHost: c2VjcmV0.exfil.test:443\r\n\r\n",
        );
        assert!(answer.contains("policy_denied"), "{answer}");
        assert_eq!(*asked.lock().expect("lock"), Vec::<String>::new());
    });
}

#[test]
fn a_name_that_no_endpoint_has_is_only_looked_up_inside() {
    in_namespace(|rig| {
        // Port 84 is allowed to any host at 10.99.0.0/16.
        let connect = |host: &str| {
            rig.exchange(
                format!("CONNECT {host}:84 HTTP/1.1\r\nHost: {host}:84\r\n\r\n").as_bytes(),
            )
        };
        let asked = name_server(&rig, &["secret.exfil.example", "db.ns.svc.test"]);
        let answer = connect("secret.exfil.example");
        assert!(answer.starts_with("HTTP/1.1 502 "), "{answer}");
        assert!(answer.contains("only the hosts file and the pod's search domains"), "{answer}");
        let outside = |name: &String| !name.ends_with(".svc.test");
        assert!(!asked.lock().expect("lock").iter().any(outside), "{asked:?}");
        // What the cluster has is found, with or without its domain; and where it leads is not told.
        for host in ["db", "db.ns", "db.ns.svc.test"] {
            asked.lock().expect("lock").clear();
            let answer = connect(host);
            assert!(answer.contains("\"error\":\"ssrf_denied\""), "{host}: {answer}");
            assert!(!answer.contains("10.77.0.1"), "{answer}");
            assert!(!asked.lock().expect("lock").iter().any(outside), "{host}: {asked:?}");
        }
        let answer = connect("api.test");
        assert!(answer.contains("ssrf_denied") && !answer.contains("10.77"), "{answer}");
    });
}

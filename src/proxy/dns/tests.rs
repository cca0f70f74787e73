//! What is answered without asking anybody; the rest is tested over sockets (tests/proxy).

use super::*;
use crate::policy::{Source, load};

const POLICY: &str = "
network_policies:
  a:
    endpoints:
      - { host: api.example.com, port: 443 }
      - { host: \"**.svc.cluster.local\", port: 80 }
      - { host: 10.0.0.1, port: 80 }
    binaries: [{ path: /usr/bin/curl }]
";

fn query(name: &str, kind: RecordType) -> Message {
    let mut query = Message::query();
    query.metadata.id = 4711;
    query.metadata.recursion_desired = true;
    query.add_query(Query::query(Name::from_ascii(name).expect("name"), kind));
    query
}

/// Nothing is known: as with `--transparent off`.
fn off(query: &[u8]) -> Option<Vec<u8>> {
    match PolicyDns::new(None).begin(query) {
        Step::Send(answer) => answer,
        Step::LookUp(..) => panic!("looked up"),
    }
}

#[test]
fn without_capture_every_name_does_not_exist() {
    let query = query("Exfil.example.com.", RecordType::A);
    let answer = off(&query.to_vec().expect("encode")).expect("answer");
    let answer = Message::from_vec(&answer).expect("decode");
    assert_eq!(answer.metadata.id, 4711);
    assert_eq!(answer.metadata.message_type, MessageType::Response);
    assert_eq!(answer.metadata.response_code, ResponseCode::NXDomain);
    assert!(answer.metadata.recursion_available && answer.metadata.recursion_desired);
    assert_eq!(answer.queries[0].name, query.queries[0].name);
    assert!(answer.answers.is_empty());
}

#[test]
fn what_is_no_query_is_not_answered() {
    assert!(off(b"").is_none());
    assert!(off(b"\x12\x34").is_none());
    let response = Message::response(1, OpCode::Query).to_vec().expect("encode");
    assert!(off(&response).is_none(), "answering answers makes a loop");
}

#[test]
fn queries_that_are_none_are_told_so() {
    let code = |message: &Message| {
        let answer = off(&message.to_vec().expect("encode")).expect("answer");
        Message::from_vec(&answer).expect("decode").metadata.response_code
    };
    let mut two = query("a.example.com.", RecordType::A);
    two.add_query(Query::query(Name::root(), RecordType::A));
    assert_eq!(code(&two), ResponseCode::FormErr);
    let mut none = query("a.example.com.", RecordType::A);
    none.queries.clear();
    assert_eq!(code(&none), ResponseCode::FormErr);
    let mut update = query("a.example.com.", RecordType::A);
    update.metadata.op_code = OpCode::Status;
    assert_eq!(code(&update), ResponseCode::NotImp);
}

/// In words: an address, a name, `nothing`, `no such name`, `refused`, `look up`.
fn said(pool: &Pool, name: &str, kind: RecordType) -> String {
    let source = Source { name: "policy.yaml", bytes: POLICY.as_bytes() };
    let policy = load(&source, None).expect("policy").policy;
    match known(&policy, pool, &query(name, kind).queries[0]) {
        Known::Answer(Answer::Address(ip)) => ip.to_string(),
        Known::Answer(Answer::Address6(ip)) => ip.to_string(),
        Known::Answer(Answer::Pointer(name)) => name.to_ascii(),
        Known::Answer(Answer::Empty) => "nothing".to_owned(),
        Known::Answer(Answer::NoSuchName) => "no such name".to_owned(),
        Known::Answer(Answer::Failed) => "failed".to_owned(),
        Known::Refused => "refused".to_owned(),
        Known::Ask(host) => format!("look up {host}"),
    }
}

#[test]
fn names_of_the_policy_have_one_address_and_nothing_else() {
    let pool = Pool::new();
    assert_eq!(said(&pool, "1.0.18.198.in-addr.arpa.", RecordType::PTR), "no such name");
    assert_eq!(said(&pool, "api.example.com.", RecordType::AAAA), "nothing");
    assert_eq!(said(&pool, "API.Example.com.", RecordType::A), "198.18.0.1");
    assert_eq!(said(&pool, "api.example.com.", RecordType::A), "198.18.0.1");
    for kind in [RecordType::AAAA, RecordType::HTTPS, RecordType::SVCB, RecordType::TXT] {
        assert_eq!(said(&pool, "api.example.com.", kind), "nothing", "{kind}");
    }
    assert_eq!(said(&pool, "1.0.18.198.in-addr.arpa.", RecordType::PTR), "api.example.com.");
    assert_eq!(said(&pool, "1.0.18.198.in-addr.arpa.", RecordType::A), "nothing");
}

#[test]
fn a_wildcards_name_is_looked_up_until_it_has_an_address() {
    let pool = Pool::new();
    let name = "Db.ns.svc.cluster.local.";
    for kind in [RecordType::A, RecordType::AAAA] {
        assert_eq!(said(&pool, name, kind), "look up db.ns.svc.cluster.local");
    }
    let host = Host::parse(name).expect("host");
    pool.assign(&host, Why::Wild).expect("address");
    assert_eq!(said(&pool, name, RecordType::A), "198.18.0.1");
    assert_eq!(said(&pool, name, RecordType::AAAA), "nothing");
}

#[test]
fn localhost_is_this_machine_and_the_rest_is_refused() {
    let pool = Pool::new();
    for name in ["localhost.", "LOCALHOST.", "a.b.localhost."] {
        assert_eq!(said(&pool, name, RecordType::A), "127.0.0.1");
        assert_eq!(said(&pool, name, RecordType::AAAA), "::1");
        assert_eq!(said(&pool, name, RecordType::MX), "nothing");
    }
    assert_eq!(said(&pool, "1.0.0.127.in-addr.arpa.", RecordType::PTR), "localhost.");
    for name in [
        "example.com.",
        "x.api.example.com.",
        "svc.cluster.local.",
        "notlocalhost.",
        ".",
        "10.0.0.1.",
        "a\\.b.svc.cluster.local.",
        "8.8.8.8.in-addr.arpa.",
        "in-addr.arpa.",
        "x.1.0.18.198.in-addr.arpa.",
    ] {
        assert_eq!(said(&pool, name, RecordType::A), "refused", "{name}");
    }
    let mut chaos = query("api.example.com.", RecordType::A);
    chaos.queries[0].query_class = DNSClass::CH;
    let source = Source { name: "policy.yaml", bytes: POLICY.as_bytes() };
    let policy = load(&source, None).expect("policy").policy;
    assert!(matches!(known(&policy, &pool, &chaos.queries[0]), Known::Refused));
}

proptest::proptest! {
    #[test]
    fn no_bytes_make_it_panic(query in proptest::collection::vec(proptest::num::u8::ANY, 0..600)) {
        let _ = off(&query);
    }

    #[test]
    fn no_name_makes_it_panic(labels in proptest::collection::vec("[ -~]{1,20}", 0..6)) {
        let Ok(name) = Name::from_labels(labels.iter().map(String::as_bytes)) else {
            return Ok(());
        };
        let source = Source { name: "policy.yaml", bytes: POLICY.as_bytes() };
        let policy = load(&source, None).expect("policy").policy;
        let _ = known(&policy, &Pool::new(), &Query::query(name, RecordType::A));
    }
}

#[test]
fn look_ups_come_by_the_second_after_a_burst() {
    let begin = Instant::now();
    let mut rate = Rate { left: BURST, since: begin };
    assert!((0..BURST).all(|_| rate.take(begin)));
    assert!(!rate.take(begin) && !rate.take(begin + Duration::from_millis(40)));
    let later = begin + Duration::from_secs(1);
    assert_eq!((0..BURST).filter(|_| rate.take(later)).count(), PER_SECOND as usize);
    assert!((0..BURST).all(|_| rate.take(later + Duration::from_secs(3600))));
}

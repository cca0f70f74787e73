//! Queries and answers, bent: each query gets one answer that reads as its own, or none. See
//! [`crate::fuzz`].

use super::*;
use crate::fuzz::{alone, fuzz};
use crate::policy::{Source, load};

const POLICY: &str = "
network_policies:
  a:
    endpoints:
      - { host: api.example.com, port: 443 }
      - { host: \"**.svc.cluster.local\", port: 80 }
    binaries: [{ path: /usr/bin/curl }]
";
const NAMES: [&str; 8] = [
    "api.example.com.",
    "Db.ns.svc.cluster.local.",
    "localhost.",
    "1.0.18.198.in-addr.arpa.",
    "1.0.0.127.in-addr.arpa.",
    "other.test.",
    "a\\.b.svc.cluster.local.",
    ".",
];
const WORDS: [&str; 14] = [
    "\0",
    "\0\u{1}\0\u{1}",
    "\u{3}com",
    "\u{3f}",
    "\u{40}",
    "\0\u{c}\0\u{1}",
    "\0\u{29}\u{4}\0",
    "\0\0\u{29}\u{10}\0\0\0\0\0\0",
    "\u{7}example\u{3}com\0",
    "\u{3}svc\u{7}cluster\u{5}local\0",
    "\u{1}*",
    "in-addr",
    ".",
    "\\",
];

/// Names in messages can point elsewhere, which no text can say.
fn point(bytes: &mut Vec<u8>, random: &mut crate::fuzz::Random) {
    if random.once_in(3) {
        let at = random.below(bytes.len() + 1);
        let to = [0, 12, random.byte()][random.below(3)];
        bytes.splice(at..at, [0xc0 | (random.byte() & 1), to]);
    }
}

#[test]
fn queries() {
    let source = Source { name: "policy.yaml", bytes: POLICY.as_bytes() };
    let policy = load(&source, None).expect("policy").policy;
    let (pool, off) = (Pool::new(), PolicyDns::new(None));
    // As many names as are told apart, and for ever: others are counted, and the log stays short.
    let later = Instant::now() + Duration::from_secs(86_400);
    for name in 0..1_000 {
        off.quiet.lock().expect("lock").tell(name.to_string(), later);
    }
    let kinds =
        [RecordType::A, RecordType::AAAA, RecordType::PTR, RecordType::TXT, RecordType::ANY];
    let mut named = 0_u64;
    fuzz("queries", 500, |random| {
        let mut query = Message::query();
        query.metadata.id = 4711;
        let name = Name::from_ascii(random.pick(&NAMES)).expect("name");
        query.add_query(Query::query(name, kinds[random.below(kinds.len())]));
        let mut bytes = random.bend(&query.to_vec().expect("encode"), &WORDS);
        point(&mut bytes, random);
        bytes.truncate(QUERY_MAX);
        // Nothing is known, and nobody is asked.
        if let Step::Send(Some(answer)) = off.begin(&bytes) {
            let answer = Message::from_vec(&answer).expect("it reads");
            assert_eq!(answer.metadata.message_type, MessageType::Response);
            assert_eq!(answer.metadata.id.to_be_bytes(), bytes[..2]);
            assert_ne!(answer.metadata.response_code, ResponseCode::NoError);
            assert!(answer.queries.len() <= 1 && answer.answers.is_empty());
        }
        let Ok(message) = Message::from_vec(&bytes) else { return };
        for question in &message.queries {
            let name = question.name.to_lowercase().to_ascii();
            match known(&policy, &pool, question) {
                Known::Answer(answer) => {
                    named += 1;
                    let asked = Asked { metadata: message.metadata, question: question.clone() };
                    let bytes = asked.answer(answer).expect("encode");
                    let answer = Message::from_vec(&bytes).expect("it reads");
                    assert_eq!(answer.queries, std::slice::from_ref(question), "{name}");
                    assert!(answer.answers.iter().all(|record| record.name == question.name));
                }
                Known::Ask(host) => assert!(host.as_str().ends_with(".svc.cluster.local")),
                Known::Refused => {}
            }
        }
    });
    assert!(alone() || named > 0, "no name was known");
    assert!(pool.address(&Host::parse("other.test").expect("host")).is_none());
}

/// As a server outside may send them: the resolver's library reads them, and their names are ours.
#[test]
fn answers() {
    let mut read = 0_u64;
    fuzz("answers", 500, |random| {
        let name = Name::from_ascii(random.pick(&NAMES)).expect("name");
        let mut answer = Message::new(4711, MessageType::Response, OpCode::Query);
        answer.add_query(Query::query(name.clone(), RecordType::A));
        for _ in 0..random.below(4) {
            let data = match random.below(3) {
                0 => RData::A(A(Ipv4Addr::new(10, 0, 0, random.byte()))),
                1 => RData::AAAA(AAAA(Ipv6Addr::LOCALHOST)),
                _ => RData::PTR(PTR(Name::from_ascii(random.pick(&NAMES)).expect("name"))),
            };
            answer.add_answer(Record::from_rdata(name.clone(), TTL, data));
        }
        let mut bytes = random.bend(&answer.to_vec().expect("encode"), &WORDS);
        point(&mut bytes, random);
        let Ok(message) = Message::from_vec(&bytes) else { return };
        read += 1;
        for record in message.answers.iter().chain(&message.additionals) {
            if let Ok(host) = Host::parse(&record.name.to_lowercase().to_ascii()) {
                assert_eq!(Host::parse(host.as_str()).as_ref(), Ok(&host));
            }
        }
    });
    assert!(alone() || read > 0, "nothing was read");
}

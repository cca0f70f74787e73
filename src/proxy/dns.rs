//! DNS for the fence: every name does not exist. Programs that use the proxy never ask; the answer
//! makes the others fail at once, and no name leaves the fence.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use hickory_proto::op::{Message, MessageType, Metadata, OpCode, ResponseCode};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::Semaphore;

use super::listener::accept;
use super::metrics::{self, Refused};
use super::quiet::{Quiet, period};
use super::report;

/// The longest query that is read, in bytes. Queries are short; EDNS options make some longer.
const QUERY_MAX: usize = 1232;

/// How many TCP connections at a time, and how long one may rest.
const CONNECTIONS: usize = 64;
const IDLE: Duration = Duration::from_secs(5);

/// What has been told of, shared by both transports.
pub(crate) struct PolicyDns {
    quiet: Mutex<Quiet<String>>,
}

impl PolicyDns {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self { quiet: Mutex::new(Quiet::new()) })
    }

    /// The answer to one query, none to what is not a query.
    fn answer(&self, query: &[u8]) -> Option<Vec<u8>> {
        let query = Message::from_vec(query).ok()?;
        let asked = &query.metadata;
        if asked.message_type != MessageType::Query {
            return None;
        }
        let mut metadata = Metadata::response_from_request(asked);
        metadata.recursion_available = true;
        metadata.response_code = match (asked.op_code, query.queries.as_slice()) {
            (OpCode::Query, [question]) => {
                let name = question.name.to_lowercase().to_ascii();
                let mut quiet = self.quiet.lock().unwrap_or_else(PoisonError::into_inner);
                if quiet.tell(name.clone(), Instant::now()) {
                    report::name_refused(&name, &question.query_type);
                }
                // Not REFUSED: resolvers would go on to the next server, or give up altogether.
                ResponseCode::NXDomain
            }
            (OpCode::Query, _) => ResponseCode::FormErr,
            _ => ResponseCode::NotImp,
        };
        metrics::dns_answer(metadata.response_code);
        let mut answer = Message::new(asked.id, MessageType::Response, asked.op_code);
        answer.metadata = metadata;
        answer.queries.extend(query.queries.iter().take(1).cloned());
        answer.to_vec().ok()
    }
}

/// Answers datagrams until it is aborted, and tells how many names went untold.
pub(crate) async fn serve_udp(socket: UdpSocket, dns: Arc<PolicyDns>) {
    let mut query = [0; QUERY_MAX];
    let mut period = period();
    loop {
        let received = tokio::select! {
            received = socket.recv_from(&mut query) => received,
            _ = period.tick() => {
                let muted = dns.quiet.lock().unwrap_or_else(PoisonError::into_inner).take_muted();
                report::more_refused(muted, Refused::Name);
                continue;
            }
        };
        match received {
            Ok((length, peer)) => {
                if let Some(answer) = dns.answer(&query[..length]) {
                    let _ = socket.try_send_to(&answer, peer);
                }
            }
            // An earlier answer's port was closed; nothing to be done about it.
            Err(_) => tokio::task::yield_now().await,
        }
    }
}

/// Answers on connections until it is aborted.
pub(crate) async fn serve_tcp(listener: TcpListener, dns: Arc<PolicyDns>) {
    let slots = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let (tcp, _) = accept(&listener).await;
        let Ok(slot) = Arc::clone(&slots).try_acquire_owned() else {
            continue;
        };
        let dns = Arc::clone(&dns);
        tokio::spawn(async move {
            let _slot = slot;
            let _ = connection(tcp, &dns).await;
        });
    }
}

/// Messages with their length before them (RFC 1035, section 4.2.2).
async fn connection(mut tcp: TcpStream, dns: &PolicyDns) -> std::io::Result<()> {
    let mut query = [0; QUERY_MAX];
    loop {
        let length = tokio::time::timeout(IDLE, tcp.read_u16()).await??;
        let Some(query) = query.get_mut(..usize::from(length)) else {
            return Ok(());
        };
        tokio::time::timeout(IDLE, tcp.read_exact(query)).await??;
        let Some(answer) = dns.answer(query) else {
            return Ok(());
        };
        let mut framed = u16::try_from(answer.len()).unwrap_or(0).to_be_bytes().to_vec();
        framed.extend_from_slice(&answer);
        tokio::time::timeout(IDLE, tcp.write_all(&framed)).await??;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hickory_proto::op::Query;
    use hickory_proto::rr::{Name, RecordType};

    #[test]
    fn every_name_does_not_exist() {
        let mut query = Message::query();
        query.metadata.id = 4711;
        query.metadata.recursion_desired = true;
        let name = Name::from_ascii("Exfil.example.com.").expect("name");
        query.add_query(Query::query(name.clone(), RecordType::A));
        let answer = PolicyDns::new().answer(&query.to_vec().expect("encode")).expect("answer");
        let answer = Message::from_vec(&answer).expect("decode");
        assert_eq!(answer.metadata.id, 4711);
        assert_eq!(answer.metadata.message_type, MessageType::Response);
        assert_eq!(answer.metadata.response_code, ResponseCode::NXDomain);
        assert!(answer.metadata.recursion_available && answer.metadata.recursion_desired);
        assert_eq!(answer.queries[0].name, name);
        assert!(answer.answers.is_empty());
    }

    #[test]
    fn what_is_no_query_is_not_answered() {
        let dns = PolicyDns::new();
        assert!(dns.answer(b"").is_none());
        assert!(dns.answer(b"\x12\x34").is_none());
        let response = Message::response(1, OpCode::Query).to_vec().expect("encode");
        assert!(dns.answer(&response).is_none(), "answering answers makes a loop");
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_make_it_panic(query in proptest::collection::vec(proptest::num::u8::ANY, 0..600)) {
            let _ = PolicyDns::new().answer(&query);
        }
    }
}

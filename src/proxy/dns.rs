//! DNS for the fence: a name that the policy could allow gets an address of ours, which leads back
//! to the name when a connection to it is caught; every other name does not exist, so that programs
//! fail at once. Of what is asked nothing leaves the fence but names under a wildcard of the policy:
//! those must exist outside as well, or search domains would turn every name into one of them.

pub(crate) mod pool;

use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use hickory_proto::op::{Message, MessageType, Metadata, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA, PTR};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::Semaphore;

use super::listener::accept;
use super::metrics::{self, Refused};
use super::quiet::{Quiet, period};
use super::resolve::ResolveError;
use super::{Shared, report};
use crate::policy::{Host, NameMatch, Policy};
use pool::{Pool, Why};

/// The longest query that is read, in bytes. Queries are short; EDNS options make some longer.
const QUERY_MAX: usize = 1232;

/// How many TCP connections at a time, and how long one may rest.
const CONNECTIONS: usize = 64;
const IDLE: Duration = Duration::from_secs(5);

/// How many names are looked up outside at a time, and how long one may take: as long as clients
/// wait before they ask again.
const LOOK_UPS: usize = 64;

/// How many names below wildcards are looked up a second, and how many at once after a pause. A
/// program asks for some; who puts data into names asks for many.
const PER_SECOND: u32 = 20;
const BURST: u32 = 200;
const TOO_MANY: &str = "too many names below the policy's wildcards are asked for";
const LOOK_UP: Duration = Duration::from_secs(4);

/// How long clients may keep an answer, in seconds. It stays true for ever; programs that ask
/// again see a name of a wildcard that is gone.
const TTL: u32 = 30;

const OFF: &str = "names are resolved by the proxy at http://10.200.0.1:3128";
const NOT_NAMED: &str = "no endpoint of the policy names this host, on any port";

/// Answers; shared by both transports.
pub(crate) struct PolicyDns {
    quiet: Mutex<Quiet<String>>,
    /// `None`: no name exists.
    shared: Option<Arc<Shared>>,
    look_ups: Arc<Semaphore>,
    rate: Mutex<Rate>,
}

/// A bucket of look-ups that fills with time.
struct Rate {
    left: u32,
    since: Instant,
}

impl Rate {
    /// Takes one; `false` where none is left.
    fn take(&mut self, now: Instant) -> bool {
        let each = Duration::from_secs(1) / PER_SECOND;
        let passed = now.saturating_duration_since(self.since).as_nanos() / each.as_nanos();
        let came = u32::try_from(passed).unwrap_or(BURST).min(BURST);
        if came > 0 {
            self.left = self.left.saturating_add(came).min(BURST);
            // What is left of a step is lost once in a while; nothing rests on it.
            self.since = now;
        }
        let taken = self.left.checked_sub(1);
        self.left = taken.unwrap_or(0);
        taken.is_some()
    }
}

/// What a question deserves.
enum Answer {
    Address(Ipv4Addr),
    Address6(Ipv6Addr),
    /// A reverse look-up's.
    Pointer(Name),
    /// The name exists and has nothing of the kind.
    Empty,
    NoSuchName,
    Failed,
}

/// What a question comes to without asking anybody.
enum Known {
    Answer(Answer),
    /// A name that is refused.
    Refused,
    /// Only wildcards cover it: it must exist.
    Ask(Host),
}

/// A query of one question, and what was found for it so far.
struct Asked {
    metadata: Metadata,
    question: Query,
}

/// What to do about a query.
enum Step {
    Send(Option<Vec<u8>>),
    LookUp(Asked, Host),
}

impl PolicyDns {
    /// `shared` when names are to get addresses.
    pub(crate) fn new(shared: Option<Arc<Shared>>) -> Arc<Self> {
        let look_ups = Arc::new(Semaphore::new(LOOK_UPS));
        let rate = Mutex::new(Rate { left: BURST, since: Instant::now() });
        Arc::new(Self { quiet: Mutex::new(Quiet::new()), shared, look_ups, rate })
    }

    /// All that needs no waiting.
    fn begin(&self, query: &[u8]) -> Step {
        let Ok(query) = Message::from_vec(query) else {
            return Step::Send(None);
        };
        let metadata = query.metadata;
        if metadata.message_type != MessageType::Query {
            return Step::Send(None);
        }
        let question = match (metadata.op_code, <[Query; 1]>::try_from(query.queries)) {
            (OpCode::Query, Ok([question])) => question,
            (OpCode::Query, Err(queries)) => {
                let first = queries.into_iter().next();
                return Step::Send(response(&metadata, first, ResponseCode::FormErr, None));
            }
            (_, queries) => {
                let queries = queries.map_or_else(|several| several, Vec::from);
                let first = queries.into_iter().next();
                return Step::Send(response(&metadata, first, ResponseCode::NotImp, None));
            }
        };
        let asked = Asked { metadata, question };
        let known = match &self.shared {
            Some(shared) => known(&shared.rules.load().policy, &shared.pool, &asked.question),
            None => Known::Refused,
        };
        match known {
            Known::Answer(answer) => Step::Send(asked.answer(answer)),
            Known::Ask(host) => Step::LookUp(asked, host),
            Known::Refused => {
                self.tell(&asked.question);
                // Not REFUSED: resolvers would go on to the next server, or give up altogether.
                Step::Send(asked.answer(Answer::NoSuchName))
            }
        }
    }

    /// The answer for a name that a wildcard covers.
    async fn look_up(&self, asked: Asked, host: Host) -> Option<Vec<u8>> {
        let Some(shared) = &self.shared else {
            return asked.answer(Answer::Failed);
        };
        // Beyond the limits clients are told to ask again.
        let Ok(_permit) = self.look_ups.try_acquire() else {
            return asked.answer(Answer::Failed);
        };
        if !self.rate.lock().unwrap_or_else(PoisonError::into_inner).take(Instant::now()) {
            self.refuse(&asked.question, TOO_MANY);
            return asked.answer(Answer::Failed);
        }
        let exists = tokio::time::timeout(LOOK_UP, shared.resolver.exists(&host)).await;
        let answer = match exists {
            Ok(Ok(())) if asked.question.query_type == RecordType::A => {
                shared.pool.assign(&host, Why::Wild).map_or(Answer::Failed, Answer::Address)
            }
            Ok(Ok(()) | Err(ResolveError::NoAddress)) => Answer::Empty,
            Ok(Err(ResolveError::NoSuchName)) => Answer::NoSuchName,
            Ok(Err(_)) | Err(_) => Answer::Failed,
        };
        asked.answer(answer)
    }

    async fn answer(&self, query: &[u8]) -> Option<Vec<u8>> {
        match self.begin(query) {
            Step::Send(answer) => answer,
            Step::LookUp(asked, host) => self.look_up(asked, host).await,
        }
    }

    /// Reports a refused name.
    fn tell(&self, question: &Query) {
        match &self.shared {
            // A resolver on its way to a name that the policy has refuses nobody anything.
            Some(shared) if is_searched(shared, &question.name.to_lowercase().to_ascii()) => {}
            Some(_) => self.refuse(question, NOT_NAMED),
            None => self.refuse(question, OFF),
        }
    }

    fn refuse(&self, question: &Query, reason: &str) {
        let name = question.name.to_lowercase().to_ascii();
        let mut quiet = self.quiet.lock().unwrap_or_else(PoisonError::into_inner);
        if quiet.tell(name.clone(), Instant::now()) {
            report::name_refused(&name, &question.query_type, reason);
        }
    }
}

/// Whether this is a name of the policy with one of the search domains behind it.
fn is_searched(shared: &Shared, name: &str) -> bool {
    let name = name.strip_suffix('.').unwrap_or(name);
    shared.resolver.search().iter().any(|domain| {
        let front = name.strip_suffix(domain.as_str()).and_then(|front| front.strip_suffix('.'));
        let host = front.and_then(|front| Host::parse(front).ok());
        host.is_some_and(|host| {
            is_localhost(&host) || shared.rules.load().policy.names_host(&host) != NameMatch::None
        })
    })
}

fn known(policy: &Policy, pool: &Pool, question: &Query) -> Known {
    let kind = question.query_type;
    let name = question.name.to_lowercase().to_ascii();
    if question.query_class != DNSClass::IN {
        return Known::Refused;
    }
    if let Some(ip) = reverse(&name) {
        return reversed(pool, ip, kind);
    }
    let Ok(host) = Host::parse(&name) else {
        return Known::Refused;
    };
    let address = |ip| match kind {
        RecordType::A => Answer::Address(ip),
        _ => Answer::Empty,
    };
    if is_localhost(&host) {
        return Known::Answer(match kind {
            RecordType::AAAA => Answer::Address6(Ipv6Addr::LOCALHOST),
            _ => address(Ipv4Addr::LOCALHOST),
        });
    }
    if host.is_ip() {
        return Known::Refused;
    }
    // First: the policy may have named it once, and not any more.
    let named = policy.names_host(&host);
    if named != NameMatch::None
        && let Some(ip) = pool.address(&host)
    {
        return Known::Answer(address(ip));
    }
    match named {
        NameMatch::Exact if kind != RecordType::A => Known::Answer(Answer::Empty),
        NameMatch::Exact => {
            Known::Answer(pool.assign(&host, Why::Exact).map_or(Answer::Failed, Answer::Address))
        }
        NameMatch::Wildcard => Known::Ask(host),
        NameMatch::None => Known::Refused,
    }
}

/// Which name an address belongs to, where it is one of ours.
fn reversed(pool: &Pool, ip: Ipv4Addr, kind: RecordType) -> Known {
    let name = if ip.is_loopback() {
        Name::from_ascii("localhost.").ok()
    } else if pool::covers(ip) {
        pool.name(ip).and_then(|host| Name::from_ascii(format!("{}.", host.as_str())).ok())
    } else {
        return Known::Refused;
    };
    Known::Answer(match name {
        Some(name) if kind == RecordType::PTR => Answer::Pointer(name),
        Some(_) => Answer::Empty,
        None => Answer::NoSuchName,
    })
}

/// The address that a name below in-addr.arpa stands for.
fn reverse(name: &str) -> Option<Ipv4Addr> {
    let digits = name.strip_suffix('.').unwrap_or(name).strip_suffix(".in-addr.arpa")?;
    let [d, c, b, a] = digits.parse::<Ipv4Addr>().ok()?.octets();
    Some(Ipv4Addr::new(a, b, c, d))
}

/// RFC 6761, 6.3: whatever ends in it is this machine.
fn is_localhost(host: &Host) -> bool {
    host.as_str() == "localhost" || host.as_str().ends_with(".localhost")
}

impl Asked {
    fn answer(self, answer: Answer) -> Option<Vec<u8>> {
        let (code, data) = match answer {
            Answer::Address(ip) => (ResponseCode::NoError, Some(RData::A(A(ip)))),
            Answer::Address6(ip) => (ResponseCode::NoError, Some(RData::AAAA(AAAA(ip)))),
            Answer::Pointer(name) => (ResponseCode::NoError, Some(RData::PTR(PTR(name)))),
            Answer::Empty => (ResponseCode::NoError, None),
            Answer::NoSuchName => (ResponseCode::NXDomain, None),
            Answer::Failed => (ResponseCode::ServFail, None),
        };
        response(&self.metadata, Some(self.question), code, data)
    }
}

fn response(
    asked: &Metadata,
    question: Option<Query>,
    code: ResponseCode,
    data: Option<RData>,
) -> Option<Vec<u8>> {
    metrics::dns_answer(code);
    let mut answer = Message::new(asked.id, MessageType::Response, asked.op_code);
    answer.metadata = Metadata::response_from_request(asked);
    answer.metadata.recursion_available = true;
    answer.metadata.response_code = code;
    if let (Some(question), Some(data)) = (&question, data) {
        answer.add_answer(Record::from_rdata(question.name.clone(), TTL, data));
    }
    answer.queries.extend(question);
    answer.to_vec().ok()
}

/// Answers datagrams until it is aborted, and tells how many names went untold.
pub(crate) async fn serve_udp(socket: UdpSocket, dns: Arc<PolicyDns>) {
    let socket = Arc::new(socket);
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
        let Ok((length, peer)) = received else {
            // An earlier answer's port was closed; nothing to be done about it.
            tokio::task::yield_now().await;
            continue;
        };
        match dns.begin(&query[..length]) {
            Step::Send(Some(answer)) => drop(socket.try_send_to(&answer, peer)),
            Step::Send(None) => {}
            Step::LookUp(asked, host) => {
                // As many as wait at a time; each beyond that is answered at once.
                let (socket, dns) = (Arc::clone(&socket), Arc::clone(&dns));
                tokio::spawn(async move {
                    if let Some(answer) = dns.look_up(asked, host).await {
                        let _ = socket.send_to(&answer, peer).await;
                    }
                });
            }
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
        let Some(answer) = dns.answer(query).await else {
            return Ok(());
        };
        let mut framed = u16::try_from(answer.len()).unwrap_or(0).to_be_bytes().to_vec();
        framed.extend_from_slice(&answer);
        tokio::time::timeout(IDLE, tcp.write_all(&framed)).await??;
    }
}

#[cfg(test)]
mod tests;

#[cfg(test)]
mod fuzz;

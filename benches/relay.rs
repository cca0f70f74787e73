//! What the proxy costs: keep-alive HTTPS with each request judged, a new connection for each
//! request, and one large download; each beside the same client and server without a proxy, in turn.
//!
//! Three processes in a network namespace of their own: the client (this one), the proxy (the
//! library's own `run`, with a double in the supervisor's place) and the upstream. Needs root and
//! ip(8). A benchmark reports; it asserts only that every answer was the right one.
//!
//! `relay [ROUNDS] [SECONDS]`; `RINGFENCE_BENCH_ONLY=keep-alive|connect|download` runs one part.

#[path = "relay_parts/double.rs"]
mod double;
#[path = "relay_parts/upstream.rs"]
mod upstream;

use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

const ROLE: &str = "RINGFENCE_BENCH_ROLE";
const DIRECTORY: &str = "RINGFENCE_BENCH_DIRECTORY";
const ONLY: &str = "RINGFENCE_BENCH_ONLY";

const UPSTREAM: &str = "10.77.0.1:443";
const NAME: &str = "api.bench.test";
const PROXY: &str = "10.200.0.1:3128";
/// The body of a small answer, in bytes, and of the large one.
const SMALL: usize = 1024;
const LARGE: u32 = 256 << 20;

/// How many connections are busy at a time.
const KEEP_ALIVE: usize = 32;
const CONNECT: usize = 8;

fn main() {
    let role = std::env::var(ROLE).unwrap_or_default();
    match role.as_str() {
        "" => {
            let this = std::env::current_exe().expect("this program has a path");
            let mut command = Command::new("unshare");
            command.args(["--net", "--"]).arg(this).args(std::env::args().skip(1));
            panic!("cannot run unshare(1): {}", command.env(ROLE, "client").exec());
        }
        "client" => client(),
        "proxy" => double::serve(&directory()),
        "upstream" => upstream::serve(&directory()),
        other => panic!("no role {other}"),
    }
}

fn directory() -> PathBuf {
    std::env::var_os(DIRECTORY).expect("a directory").into()
}

/// Ends with the benchmark.
struct Ending(Child);

impl Drop for Ending {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts this program in another role and waits for the file that says it serves.
fn start(role: &str, directory: &Path, ready: &str) -> Ending {
    let child = Command::new(std::env::current_exe().expect("this program has a path"))
        .env(ROLE, role)
        .env(DIRECTORY, directory)
        .spawn()
        .expect("this program can be started");
    println!("{role}: pid {}", child.id());
    let child = Ending(child);
    for _ in 0..500 {
        if directory.join(ready).exists() {
            return child;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    panic!("the {role} does not get ready");
}

/// The client's two ways.
#[derive(Clone)]
struct Ways {
    direct: Arc<ClientConfig>,
    proxied: Arc<ClientConfig>,
}

impl Ways {
    async fn open(&self, proxy: bool) -> TlsStream<TcpStream> {
        let name = ServerName::try_from(NAME).expect("a name");
        let tcp = TcpStream::connect(if proxy { PROXY } else { UPSTREAM }).await;
        let mut tcp = tcp.expect("connected");
        tcp.set_nodelay(true).expect("nodelay");
        let config = if proxy {
            let connect = format!("CONNECT {NAME}:443 HTTP/1.1\r\nHost: {NAME}:443\r\n\r\n");
            tcp.write_all(connect.as_bytes()).await.expect("sent");
            let mut answer = [0; 256];
            let count = tcp.read(&mut answer).await.expect("answered");
            let answer = String::from_utf8_lossy(&answer[..count]);
            assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
            &self.proxied
        } else {
            &self.direct
        };
        let connector = TlsConnector::from(Arc::clone(config));
        connector.connect(name, tcp).await.expect("handshake")
    }
}

/// One small request and its answer.
async fn exchange(tls: &mut TlsStream<TcpStream>, buffer: &mut [u8]) {
    let request = format!("GET /ok/item HTTP/1.1\r\nHost: {NAME}\r\nUser-Agent: bench\r\n\r\n");
    tls.write_all(request.as_bytes()).await.expect("sent");
    tls.flush().await.expect("sent");
    let mut got = 0;
    loop {
        let count = tls.read(&mut buffer[got..]).await.expect("answered");
        assert!(count > 0, "closed");
        got += count;
        if let Some(head) = buffer[..got].windows(4).position(|four| four == b"\r\n\r\n")
            && got >= head + 4 + SMALL
        {
            assert!(buffer.starts_with(b"HTTP/1.1 200 ") && got == head + 4 + SMALL);
            return;
        }
    }
}

/// Requests a second, each connection busy all the time.
async fn keep_alive(ways: Ways, proxy: bool, time: Duration) -> f64 {
    let mut tasks = tokio::task::JoinSet::new();
    let start = Instant::now();
    for _ in 0..KEEP_ALIVE {
        let ways = ways.clone();
        tasks.spawn(async move {
            let (mut tls, mut buffer) = (ways.open(proxy).await, vec![0; 8192]);
            let mut count = 0u32;
            while start.elapsed() < time {
                exchange(&mut tls, &mut buffer).await;
                count += 1;
            }
            count
        });
    }
    let count: u32 = tasks.join_all().await.into_iter().sum();
    f64::from(count) / start.elapsed().as_secs_f64()
}

/// The same with a connection for each request.
async fn connect(ways: Ways, proxy: bool, time: Duration) -> f64 {
    let mut tasks = tokio::task::JoinSet::new();
    let start = Instant::now();
    for _ in 0..CONNECT {
        let ways = ways.clone();
        tasks.spawn(async move {
            let (mut count, mut buffer) = (0u32, vec![0; 8192]);
            while start.elapsed() < time {
                exchange(&mut ways.open(proxy).await, &mut buffer).await;
                count += 1;
            }
            count
        });
    }
    let count: u32 = tasks.join_all().await.into_iter().sum();
    f64::from(count) / start.elapsed().as_secs_f64()
}

/// Megabytes a second of one large answer.
async fn download(ways: Ways, proxy: bool) -> f64 {
    let mut tls = ways.open(proxy).await;
    let request = format!("GET /ok/large HTTP/1.1\r\nHost: {NAME}\r\n\r\n");
    let start = Instant::now();
    tls.write_all(request.as_bytes()).await.expect("sent");
    tls.flush().await.expect("sent");
    let (mut got, mut buffer) = (0, vec![0; 256 * 1024]);
    while got < LARGE as usize {
        let count = tls.read(&mut buffer).await.expect("answered");
        assert!(count > 0, "closed after {got}");
        got += count;
    }
    assert!(got < LARGE as usize + 1024, "the head and the body, no more");
    f64::from(LARGE) / 1e6 / start.elapsed().as_secs_f64()
}

fn client() {
    let words: Vec<u64> = std::env::args().skip(1).filter_map(|word| word.parse().ok()).collect();
    let rounds = words.first().copied().unwrap_or(7);
    let time = Duration::from_secs(words.get(1).copied().unwrap_or(2));
    for words in ["link set lo up", "addr add 10.77.0.1/32 dev lo", "addr add 10.200.0.1/32 dev lo"]
    {
        let status = Command::new("ip").args(words.split(' ')).status().expect("ip(8)");
        assert!(status.success(), "ip {words}");
    }
    // Thousands of closed connections to one address would keep their ports for a minute, and looking
    // for a free one would be most of what is measured.
    std::fs::write("/proc/sys/net/ipv4/tcp_max_tw_buckets", "64").expect("sysctl");
    let directory = tempfile::tempdir().expect("a temporary directory");
    let _upstream = start("upstream", directory.path(), "upstream-ca.pem");
    let _proxy = start("proxy", directory.path(), "bundle.pem");
    let config = |file: &str| {
        let pem = std::fs::read(directory.path().join(file)).expect("certificates");
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_slice_iter(&pem) {
            roots.add(certificate.expect("PEM")).expect("a certificate");
        }
        let mut config = ClientConfig::builder_with_provider(ringfence::pki::provider())
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        // Each program that is started anew has none either.
        config.resumption = rustls::client::Resumption::disabled();
        Arc::new(config)
    };
    let ways = Ways { direct: config("upstream-ca.pem"), proxied: config("bundle.pem") };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime");
    let only = std::env::var(ONLY).unwrap_or_default();
    let part = |name: &str| only.is_empty() || only == name;
    println!("{rounds} rounds, {time:?} each; in turn without and with the proxy");
    if part("keep-alive") {
        table("keep-alive, requests/s", rounds, |proxy| {
            runtime.block_on(keep_alive(ways.clone(), proxy, time))
        });
    }
    if part("connect") {
        table("a connection each, requests/s", rounds, |proxy| {
            runtime.block_on(connect(ways.clone(), proxy, time))
        });
    }
    if part("download") {
        table("256 MiB, MB/s", rounds, |proxy| runtime.block_on(download(ways.clone(), proxy)));
    }
}

fn table(what: &str, rounds: u64, run: impl Fn(bool) -> f64) {
    let (mut direct, mut proxied) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        direct.push(run(false));
        proxied.push(run(true));
    }
    let middle = |list: &mut Vec<f64>| {
        list.sort_by(f64::total_cmp);
        (list[list.len() / 2], list[0], list[list.len() - 1])
    };
    let (direct, proxied) = (middle(&mut direct), middle(&mut proxied));
    let ratio = 100.0 * proxied.0 / direct.0;
    println!(
        "{what}: without {:.0} ({:.0} to {:.0}), with {:.0} ({:.0} to {:.0}): {ratio:.0} %",
        direct.0, direct.1, direct.2, proxied.0, proxied.1, proxied.2
    );
}

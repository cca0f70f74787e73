//! Upstreams: small blocking servers, over TLS and plain, that remember what reached them.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ringfence::pki::{Authority, LeafKey, SubjectName, provider};
use rustls::{ServerConfig, ServerConnection, StreamOwned};

use crate::h2_upstream;

/// What reached the upstreams: each request's head and body, and each TLS connection's name.
#[derive(Clone, Default)]
pub struct Upstream {
    address: &'static str,
    seen: Arc<Mutex<Vec<String>>>,
    /// How many TLS sessions on 443 were resumed.
    pub resumed: Arc<AtomicUsize>,
}

impl Upstream {
    /// Listens on 443 (TLS, HTTP/1.1), 80 (HTTP/1.1), 2525 (speaks first), 4433 (TLS, HTTP/2), 8081
    /// (HTTP/2) and 4434 (a certificate of another name).
    pub fn start(authority: &Authority, address: &'static str) -> Self {
        let upstream = Self { address, ..Self::default() };
        let key = LeafKey::generate().expect("key");
        let config = |names: &[&str], alpn: &[&str]| {
            let mut names: Vec<_> =
                names.iter().map(|n| SubjectName::Dns((*n).to_owned())).collect();
            names.push(SubjectName::Ip(address.parse().expect("address")));
            let leaf = authority.leaf(&names, Duration::from_secs(3600), &key).expect("leaf");
            let mut config = ServerConfig::builder_with_provider(provider())
                .with_safe_default_protocol_versions()
                .expect("versions")
                .with_no_client_auth()
                .with_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(leaf)));
            config.alpn_protocols = alpn.iter().map(|one| one.as_bytes().to_vec()).collect();
            Arc::new(config)
        };
        let names =
            ["api.test", "raw.test", "skip.test", "audited.test", "one.wild.test", "rpc.test"];
        let https = config(&names, &["http/1.1", "imap"]);
        let h2 = config(&names, &["h2"]);
        let wrong = config(&["other.test"], &[]);
        let resumed = Arc::clone(&upstream.resumed);
        upstream.listen(443, move |seen, tcp| {
            let mut tls = accept(&https, tcp)?;
            if tls.conn.handshake_kind() == Some(rustls::HandshakeKind::Resumed) {
                resumed.fetch_add(1, Ordering::Relaxed);
            }
            let alpn = tls.conn.alpn_protocol().map(|p| String::from_utf8_lossy(p).into_owned());
            let name = tls.conn.server_name().unwrap_or("-").to_owned();
            seen.push(format!("TLS {name} {}", alpn.as_deref().unwrap_or("-")));
            if alpn.as_deref() == Some("imap") {
                tls.write_all(b"* OK imap\r\n").ok()?;
                return tls.flush().ok();
            }
            http(seen, tls)
        });
        upstream.listen(80, http);
        upstream.listen(2525, |seen, mut tcp| {
            tcp.write_all(b"220 hello\r\n").ok()?;
            let mut line = String::new();
            BufReader::new(tcp.try_clone().ok()?).read_line(&mut line).ok()?;
            seen.push(format!("SMTP {}", line.trim_end()));
            tcp.write_all(b"250 ok\r\n").ok()
        });
        let listener = |port| TcpListener::bind((address, port)).expect("upstream");
        h2_upstream::listen(listener(4433), Some(h2), Seen(Arc::clone(&upstream.seen)));
        h2_upstream::listen(listener(8081), None, Seen(Arc::clone(&upstream.seen)));
        upstream.listen(4434, move |_, tcp| accept(&wrong, tcp).map(drop));
        upstream
    }

    fn listen(
        &self,
        port: u16,
        serve: impl Fn(&Seen, TcpStream) -> Option<()> + Send + Sync + 'static,
    ) {
        let listener = TcpListener::bind((self.address, port)).expect("upstream");
        let (serve, seen) = (Arc::new(serve), Seen(Arc::clone(&self.seen)));
        std::thread::spawn(move || {
            for tcp in listener.incoming() {
                let (serve, seen) = (Arc::clone(&serve), seen.clone());
                std::thread::spawn(move || serve(&seen, tcp.expect("accept")));
            }
        });
    }

    /// What has reached the upstreams so far.
    pub fn seen(&self) -> Vec<String> {
        self.seen.lock().expect("lock").clone()
    }

    /// The requests that have, without the TLS connections.
    pub fn requests(&self) -> Vec<String> {
        self.seen().into_iter().filter(|one| !one.starts_with("TLS ")).collect()
    }
}

#[derive(Clone)]
pub struct Seen(Arc<Mutex<Vec<String>>>);

impl Seen {
    pub fn push(&self, what: String) {
        self.0.lock().expect("lock").push(what);
    }
}

fn accept(
    config: &Arc<ServerConfig>,
    tcp: TcpStream,
) -> Option<StreamOwned<ServerConnection, TcpStream>> {
    let mut tls = StreamOwned::new(ServerConnection::new(Arc::clone(config)).ok()?, tcp);
    while tls.conn.is_handshaking() {
        tls.conn.complete_io(&mut tls.sock).ok()?;
    }
    Some(tls)
}

/// Serves requests until the end. Paths choose the answer; most are answered with what arrived.
fn http(seen: &Seen, stream: impl Read + Write) -> Option<()> {
    let mut stream = BufReader::new(stream);
    loop {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if stream.read_line(&mut head).ok()? == 0 {
                return None;
            }
        }
        let header = |name: &str| {
            head.lines().find_map(|line| {
                let (field, value) = line.split_once(": ")?;
                field.eq_ignore_ascii_case(name).then(|| value.to_owned())
            })
        };
        if header("expect").is_some() {
            stream.get_mut().write_all(b"HTTP/1.1 100 Continue\r\n\r\n").ok()?;
            stream.get_mut().flush().ok()?;
        }
        let mut body = Vec::new();
        if let Some(length) = header("content-length") {
            body.resize(length.parse().ok()?, 0);
            stream.read_exact(&mut body).ok()?;
        } else if header("transfer-encoding").is_some() {
            loop {
                let mut line = String::new();
                stream.read_line(&mut line).ok()?;
                let size = usize::from_str_radix(line.trim_end(), 16).ok()?;
                let mut chunk = vec![0; size + 2];
                stream.read_exact(&mut chunk).ok()?;
                if size == 0 {
                    break;
                }
                body.extend_from_slice(&chunk[..size]);
            }
        }
        let target = head.split(' ').nth(1)?.to_owned();
        let answer = format!("{head}{}", String::from_utf8_lossy(&body));
        seen.push(answer.clone());
        let out = stream.get_mut();
        match target.as_str() {
            "/ok/sse" => {
                out.write_all(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n").ok()?;
                out.write_all(b"Transfer-Encoding: chunked\r\n\r\n").ok()?;
                for n in 0..3 {
                    let event = format!("data: {n}\n\n");
                    write!(out, "{:x};ext=1\r\n{event}\r\n", event.len()).ok()?;
                    out.flush().ok()?;
                    std::thread::sleep(Duration::from_millis(30));
                }
                out.write_all(b"0\r\nTrailer: x\r\n\r\n").ok()?;
            }
            "/ok/close" => {
                out.write_all(b"HTTP/1.1 200 OK\r\n\r\nuntil the end").ok()?;
                return out.flush().ok();
            }
            "/ok/once" => {
                out.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nonce").ok()?;
                return out.flush().ok();
            }
            "/ok/nothing" => out.write_all(b"HTTP/1.1 204 No Content\r\n\r\n").ok()?,
            "/ok/both" => out
                .write_all(
                    b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
                )
                .ok()?,
            "/ok/cut" => {
                out.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\nhalf").ok()?;
                return out.flush().ok();
            }
            "/ok/big" => {
                let length = 8 * 1024 * 1024;
                write!(out, "HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n").ok()?;
                out.write_all(&vec![b'x'; length]).ok()?;
            }
            "/ws" => {
                out.write_all(
                    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
                )
                .ok()?;
                out.flush().ok()?;
                let mut frame = [0; 4];
                stream.read_exact(&mut frame).ok()?;
                stream.get_mut().write_all(&frame).ok()?;
                return stream.get_mut().flush().ok();
            }
            _ => {
                let head_only = head.starts_with("HEAD ");
                write!(out, "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", answer.len()).ok()?;
                if !head_only {
                    out.write_all(answer.as_bytes()).ok()?;
                }
            }
        }
        out.flush().ok()?;
    }
}

//! The way out through a proxy of the operator's, which is asked for by name (`CONNECT`) after our
//! own decision. TLS stays between us and the destination.
//!
//! That proxy resolves the names. What they lead to cannot be checked here: private ranges are then
//! its rules' matter. Names that stand for something special where it runs are not asked of it, nor
//! are hosts whose endpoint lists addresses, since nothing could hold it to them.

use std::fmt;
use std::net::IpAddr;
use std::time::Duration;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::connect::authority;
use super::destination::{DialError, Origin, POD_HOST, first_to_answer};
use super::resolve::Resolver;
use crate::policy::{Host, IpNet, is_control_plane};

/// How long the proxy may take to answer: it resolves and dials meanwhile.
const ANSWER: Duration = Duration::from_secs(30);

/// The longest head of its answer in bytes.
const HEAD_MAX: usize = 8 * 1024;

/// Names that a machine resolves to itself, to its cloud's metadata service or to its cluster.
const SPECIAL: [&str; 5] =
    ["localhost", "metadata", "metadata.google.internal", "instance-data", "kubernetes"];
const SPECIAL_DOMAINS: [&str; 4] = [".localhost", ".instance-data", ".ec2.internal", ".local"];

/// Why there is no such proxy.
#[derive(Debug, thiserror::Error)]
pub enum UpstreamProxyError {
    /// Not `http://host:port`.
    #[error("the upstream proxy is not http://host:port: {0}")]
    Url(String),
    /// Not `user:password` on one line.
    #[error("the upstream proxy's credentials are not `user:password` on one line")]
    Credentials,
    /// An entry that is no host, domain, address or range.
    #[error("'{}' is no host, domain, address or range", .0.escape_debug())]
    Direct(String),
}

/// What is reached without the proxy.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Direct {
    All,
    /// This host and all below it.
    Domain(String),
    Net(IpNet),
}

/// A proxy of the operator's.
#[derive(Clone)]
pub struct UpstreamProxy {
    host: Host,
    port: u16,
    /// The value of `Proxy-Authorization`.
    authorization: Option<String>,
    direct: Vec<Direct>,
}

/// Without the credentials.
impl fmt::Debug for UpstreamProxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UpstreamProxy")
            .field("host", &self.host)
            .field("port", &self.port)
            .field("authorized", &self.authorization.is_some())
            .field("direct", &self.direct)
            .finish()
    }
}

impl UpstreamProxy {
    /// `url`: `http://host:port`. `credentials`: `user:password`, a line break at the end is left
    /// out. `direct`: what is reached without it, separated by commas: `*`, a host with all below
    /// it (a leading dot changes nothing), an address or a range.
    pub fn new(
        url: &str,
        credentials: Option<&str>,
        direct: &str,
    ) -> Result<Self, UpstreamProxyError> {
        // A person may have put the credentials where they must not be: the URL is not repeated.
        let wrong = |why: &str| UpstreamProxyError::Url(why.to_owned());
        let rest = url.strip_prefix("http://").ok_or_else(|| wrong("it does not begin so"))?;
        let rest = rest.strip_suffix('/').unwrap_or(rest);
        if rest.contains('@') {
            return Err(wrong("credentials belong in a file"));
        }
        let (host, port) = authority(rest, None).map_err(UpstreamProxyError::Url)?;
        let authorization = credentials
            .map(|text| {
                let text = text.strip_suffix('\n').unwrap_or(text);
                let text = text.strip_suffix('\r').unwrap_or(text);
                let sound = text.contains(':') && !text.chars().any(char::is_control);
                let value = || format!("Basic {}", BASE64_STANDARD.encode(text));
                sound.then(value).ok_or(UpstreamProxyError::Credentials)
            })
            .transpose()?;
        let entries = direct.split(',').map(str::trim).filter(|entry| !entry.is_empty());
        let direct = entries.map(parse_direct).collect::<Result<_, _>>()?;
        Ok(Self { host, port, authorization, direct })
    }

    /// Whether this destination is asked of it. What is in the pod itself never is.
    pub(super) fn is_for(&self, origin: &Origin) -> bool {
        let host = origin.host.as_str();
        let direct = |entry: &Direct| match entry {
            Direct::All => true,
            Direct::Domain(domain) => host
                .strip_suffix(domain.as_str())
                .is_some_and(|front| front.is_empty() || front.ends_with('.')),
            Direct::Net(net) => origin.host.ip().is_some_and(|ip| net.contains(&ip)),
        };
        host != POD_HOST && !self.direct.iter().any(direct)
    }

    /// Whether it may be asked for a host whose address only it will know.
    pub(super) fn allows(&self, origin: &Origin) -> Result<(), DialError> {
        let Origin { host, port, grant } = origin;
        let name = host.as_str();
        if is_control_plane(*port) {
            Err(DialError::NotByProxy("a control-plane port is never dialled"))
        } else if (name, *port) == (self.host.as_str(), self.port) {
            Err(DialError::NotByProxy(ITSELF))
        } else if host.is_ip() {
            // Its address is checked like any.
            Ok(())
        } else if is_special(name) {
            Err(DialError::NotByProxy(
                "this name stands for something else where the upstream proxy runs: name it in \
                 --no-upstream-proxy",
            ))
        } else if grant.all().any(|grant| grant.restricted) {
            Err(DialError::NotByProxy(
                "the endpoint allows certain addresses only, to which the upstream proxy cannot \
                 be held: name the host in --no-upstream-proxy",
            ))
        } else {
            Ok(())
        }
    }

    /// Refuses to dial it as a destination: the agent could ask it for anything.
    pub(super) async fn is_not_among(
        &self,
        resolver: &Resolver,
        addresses: &[IpAddr],
        port: u16,
    ) -> Result<(), DialError> {
        if port != self.port {
            return Ok(());
        }
        // Where its name is not known nothing leads to it either.
        let own = resolver.resolve(&self.host).await.unwrap_or_default();
        let is_own = |ip: &IpAddr| own.iter().any(|own| own.to_canonical() == ip.to_canonical());
        if addresses.iter().any(is_own) { Err(DialError::NotByProxy(ITSELF)) } else { Ok(()) }
    }

    /// A connection to `host:port` through it.
    pub(super) async fn dial(
        &self,
        resolver: &Resolver,
        host: &Host,
        port: u16,
    ) -> Result<TcpStream, DialError> {
        let addresses = resolver.resolve(&self.host).await;
        let addresses =
            addresses.map_err(|error| DialError::Proxy(format!("its name: {error}")))?;
        let tcp = first_to_answer(addresses, self.port)
            .await
            .map_err(|error| DialError::Proxy(error.to_string()))?;
        match timeout(ANSWER, self.ask(tcp, host, port)).await {
            Ok(answer) => answer,
            Err(_) => Err(DialError::Proxy("no answer in time".to_owned())),
        }
    }

    async fn ask(
        &self,
        mut tcp: TcpStream,
        host: &Host,
        port: u16,
    ) -> Result<TcpStream, DialError> {
        let failed = |error: std::io::Error| DialError::Proxy(error.kind().to_string());
        let mut request = format!("CONNECT {host}:{port} HTTP/1.1\r\nHost: {host}:{port}\r\n");
        if let Some(authorization) = &self.authorization {
            request.push_str("Proxy-Authorization: ");
            request.push_str(authorization);
            request.push_str("\r\n");
        }
        request.push_str("\r\n");
        tcp.write_all(request.as_bytes()).await.map_err(failed)?;
        let head = read_head(&mut tcp).await?;
        match status(&head) {
            Some(200..=299) => Ok(tcp),
            Some(407) => Err(DialError::Proxy(match self.authorization {
                Some(_) => "it does not accept our credentials (407)".to_owned(),
                None => "it asks for credentials (407): --upstream-proxy-auth-file".to_owned(),
            })),
            Some(status) => Err(DialError::Proxy(format!("it answered {status}"))),
            None => Err(DialError::Proxy("its answer is not HTTP/1.x".to_owned())),
        }
    }
}

const ITSELF: &str = "this is the upstream proxy itself";

fn is_special(name: &str) -> bool {
    // The cluster's own API, whatever the cluster's domain is.
    let api = name.strip_prefix("kubernetes.default");
    SPECIAL.contains(&name)
        || SPECIAL_DOMAINS.iter().any(|domain| name.ends_with(domain))
        || api.is_some_and(|rest| rest.is_empty() || rest == ".svc" || rest.starts_with(".svc."))
}

fn parse_direct(entry: &str) -> Result<Direct, UpstreamProxyError> {
    if entry == "*" {
        return Ok(Direct::All);
    }
    if let Ok(net) = entry.parse::<IpNet>() {
        return Ok(Direct::Net(net));
    }
    if let Ok(ip) = entry.parse::<IpAddr>() {
        return Ok(Direct::Net(ip.into()));
    }
    let domain = entry.strip_prefix('.').unwrap_or(entry);
    let wrong = || UpstreamProxyError::Direct(entry.to_owned());
    let host = Host::parse(domain).map_err(|_| wrong())?;
    if host.is_ip() { Err(wrong()) } else { Ok(Direct::Domain(host.as_str().to_owned())) }
}

/// The answer's head and not a byte more: what follows it is the destination's.
async fn read_head(tcp: &mut TcpStream) -> Result<Vec<u8>, DialError> {
    const END: &[u8] = b"\r\n\r\n";
    let failed = |error: std::io::Error| DialError::Proxy(error.kind().to_string());
    let mut head = Vec::new();
    let mut seen = [0; 1024];
    loop {
        let count = tcp.peek(&mut seen).await.map_err(failed)?;
        if count == 0 {
            return Err(DialError::Proxy("it closed without an answer".to_owned()));
        }
        // The end may have begun in what was taken before.
        let taken = head.len();
        head.extend_from_slice(&seen[..count]);
        let from = taken.saturating_sub(END.len() - 1);
        let end = head[from..].windows(END.len()).position(|four| four == END);
        let length = end.map_or(head.len(), |at| from + at + END.len());
        tcp.read_exact(&mut seen[..length - taken]).await.map_err(failed)?;
        if end.is_some() {
            head.truncate(length);
            return Ok(head);
        }
        if head.len() > HEAD_MAX {
            return Err(DialError::Proxy("the head of its answer is too long".to_owned()));
        }
    }
}

/// The three digits behind `HTTP/1.x `.
fn status(head: &[u8]) -> Option<u16> {
    let rest = head.strip_prefix(b"HTTP/1.0 ").or_else(|| head.strip_prefix(b"HTTP/1.1 "))?;
    let digits = std::str::from_utf8(rest.get(..3)?).ok()?;
    let plain = digits.bytes().all(|byte| byte.is_ascii_digit());
    let ends = matches!(rest.get(3), Some(b' ' | b'\r'));
    if plain && ends { digits.parse().ok() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::{Grant, Inspect, TlsMode};

    fn origin(host: &str, port: u16, restricted: bool) -> Origin {
        let grant = Grant {
            policy: "p".into(),
            inspect: Inspect::None,
            tls: TlsMode::Auto,
            allowed_ips: Vec::new(),
            restricted,
            exact_host: true,
            allow_encoded_slash: false,
            unread: false,
            also: None,
        };
        Origin { host: Host::parse(host).expect("host"), port, grant }
    }

    #[test]
    fn what_a_proxy_is() {
        let proxy = UpstreamProxy::new("http://proxy.corp:3128/", Some("me:it\n"), "").expect("ok");
        assert_eq!((proxy.host.as_str(), proxy.port), ("proxy.corp", 3128));
        assert_eq!(proxy.authorization.as_deref(), Some("Basic bWU6aXQ="));
        let shown = format!("{proxy:?}");
        assert!(!shown.contains("bWU6aXQ") && !shown.contains("me:it"), "{shown}");
        for bad in ["proxy:3128", "https://proxy:3128", "http://proxy", "http://u:p@proxy:1", ""] {
            let error = UpstreamProxy::new(bad, None, "").expect_err(bad).to_string();
            assert!(!error.contains("u:p"), "{error}");
        }
        for bad in ["", "me", "me:it\nX: y", "me:it\r\n\r\n", "a:\0"] {
            let made = UpstreamProxy::new("http://p:1", Some(bad), "");
            assert!(matches!(made, Err(UpstreamProxyError::Credentials)), "{bad:?}");
        }
        for bad in ["10.0.0.0/33", "a b", "127.1", "[::1]"] {
            assert!(UpstreamProxy::new("http://p:1", None, bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_goes_by_it() {
        let list = "corp.example, .svc ,10.0.0.0/8,fd00::1";
        let proxy = UpstreamProxy::new("http://proxy.corp:3128", None, list).expect("ok");
        let is_for = |host: &str| proxy.is_for(&origin(host, 443, false));
        for host in ["example.com", "notcorp.example", "11.0.0.1", "corp.example.com"] {
            assert!(is_for(host), "{host}");
        }
        for host in ["corp.example", "a.corp.example", "db.prod.svc", "10.1.2.3", "[fd00::1]"] {
            assert!(!is_for(host), "{host}");
        }
        assert!(!is_for(POD_HOST));
        let none = UpstreamProxy::new("http://proxy.corp:3128", None, "*").expect("ok");
        assert!(!none.is_for(&origin("example.com", 443, false)));
    }

    #[test]
    fn what_it_is_not_asked_for() {
        let proxy = UpstreamProxy::new("http://proxy.corp:3128", None, "").expect("ok");
        let allows =
            |host: &str, port, restricted| proxy.allows(&origin(host, port, restricted)).is_ok();
        assert!(allows("example.com", 443, false) && allows("8.8.8.8", 443, true));
        assert!(!allows("example.com", 443, true), "addresses cannot be held to");
        assert!(!allows("example.com", 6443, false) && !allows("proxy.corp", 3128, false));
        for host in [
            "localhost",
            "a.localhost",
            "metadata.google.internal",
            "printer.local",
            "kubernetes.default.svc",
            "kubernetes.default.svc.k8s.example",
        ] {
            assert!(!allows(host, 443, false), "{host}");
        }
    }

    #[test]
    fn statuses() {
        assert_eq!(status(b"HTTP/1.1 200 OK\r\n\r\n"), Some(200));
        assert_eq!(status(b"HTTP/1.0 407\r\n\r\n"), Some(407));
        for bad in [&b""[..], b"HTTP/1.1 +20 OK", b"HTTP/1.1 2000 OK", b"HTTP/2 200 OK", b"SSH-2"] {
            assert_eq!(status(bad), None);
        }
    }
}

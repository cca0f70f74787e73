//! What the proxy is asked for: destinations that no policy can open, spellings that mean another
//! thing to another reader, and what is not HTTP/1.1.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use super::Attempt::{Ask, Do};
use super::Layer::Proxy;
use super::{Context, Expect, Row, Seen, raw};
use crate::fence::gateway::{GATEWAY, PROXY_PORT};

const FORBIDDEN: &[Expect] = &[Expect::Status(403)];
/// Of a caller that is not known (with a policy that names no binaries, nobody is) the request is
/// refused before anything in it is.
const BAD_REQUEST: &[Expect] = &[Expect::Status(400), Expect::Status(403)];
const TOO_LARGE: &[Expect] = &[Expect::Status(431)];

const fn forbidden(id: &'static str, what: &'static str, request: &'static str) -> Row {
    Row::new(id, Proxy, FORBIDDEN, what, Ask(request))
}

const fn bad(id: &'static str, what: &'static str, request: &'static str) -> Row {
    Row::new(id, Proxy, BAD_REQUEST, what, Ask(request))
}

/// A CONNECT whose `Host` says the same.
macro_rules! connect {
    ($to:literal) => {
        concat!("CONNECT ", $to, " HTTP/1.1\r\nHost: ", $to, "\r\n\r\n")
    };
}

macro_rules! get {
    ($host:literal, $path:literal) => {
        concat!("GET http://", $host, $path, " HTTP/1.1\r\nHost: ", $host, "\r\n\r\n")
    };
}

pub(super) const ROWS: &[Row] = &[
    forbidden("connect-metadata", "the metadata address", connect!("169.254.169.254:80")),
    forbidden("connect-metadata-tls", "its TLS port", connect!("169.254.169.254:443")),
    forbidden("connect-metadata-alibaba", "Alibaba's", connect!("100.100.100.200:80")),
    forbidden("connect-metadata-azure", "Azure's wire server", connect!("168.63.129.16:80")),
    forbidden("connect-metadata-oracle", "Oracle's", connect!("192.0.0.192:80")),
    forbidden("connect-metadata6", "EC2's over IPv6", connect!("[fd00:ec2::254]:80")),
    forbidden("connect-loopback", "the pod's loopback", connect!("127.0.0.1:80")),
    forbidden("connect-loopback-net", "another loopback address", connect!("127.8.8.8:80")),
    forbidden("connect-loopback6", "loopback of IPv6", connect!("[::1]:80")),
    forbidden("connect-localhost", "loopback by name", connect!("localhost:10250")),
    forbidden("connect-unspecified", "0.0.0.0", connect!("0.0.0.0:80")),
    forbidden("connect-unspecified6", "[::]", connect!("[::]:80")),
    forbidden("connect-link-local", "a link-local address", connect!("169.254.170.2:80")),
    forbidden("connect-link-local6", "the same of IPv6", connect!("[fe80::1]:80")),
    forbidden("connect-multicast", "a multicast address", connect!("224.0.0.1:80")),
    forbidden("connect-broadcast", "the broadcast address", connect!("255.255.255.255:80")),
    forbidden("connect-nat64", "metadata by NAT64", connect!("[64:ff9b::a9fe:a9fe]:80")),
    forbidden("connect-6to4", "metadata by 6to4", connect!("[2002:a9fe:a9fe::]:80")),
    forbidden("connect-teredo", "a Teredo address", connect!("[2001:0:1::1]:80")),
    forbidden("connect-admin-port", "the admin endpoint", connect!("127.0.0.1:15200")),
    forbidden("connect-proxy-itself", "the proxy by itself", connect!("10.200.0.1:3128")),
    forbidden("connect-kubelet", "a kubelet", connect!("127.0.0.1:10250")),
    forbidden(
        "connect-unknown-host",
        "a host that no policy names",
        connect!("ringfence-escape.invalid:443"),
    )
    .mistake(20),
    forbidden(
        "connect-odd-port",
        "a port that no policy names",
        connect!("ringfence-escape.invalid:1"),
    ),
    forbidden(
        "plain-metadata",
        "metadata by a plain request",
        get!("169.254.169.254", "/latest/meta-data/"),
    )
    .mistake(22),
    forbidden("plain-loopback", "loopback by a plain request", get!("127.0.0.1:15200", "/metrics"))
        .mistake(22),
    forbidden(
        "plain-unknown-host",
        "another host by a plain request",
        get!("ringfence-escape.invalid", "/"),
    )
    .mistake(22),
    forbidden("plain-proxy-itself", "the proxy's own address", get!("10.200.0.1:3128", "/"))
        .mistake(22),
    forbidden(
        "plain-host-header",
        "one host in the target, another in Host",
        "GET http://169.254.169.254/ HTTP/1.1\r\nHost: example.com\r\n\r\n",
    )
    .mistake(23),
    forbidden(
        "plain-h2c-upgrade",
        "an upgrade to h2c",
        "GET http://ringfence-escape.invalid/ HTTP/1.1\r\nHost: ringfence-escape.invalid\r\n\
         Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n",
    )
    .mistake(24),
    bad("http2-prior-knowledge", "HTTP/2 by prior knowledge", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        .mistake(24),
    bad("connect-mapped", "metadata mapped to IPv6", connect!("[::ffff:169.254.169.254]:80"))
        .mistake(21),
    bad("connect-decimal", "metadata as one number", connect!("2852039166:80")).mistake(21),
    bad("connect-hexadecimal", "metadata in hexadecimal", connect!("0xa9fea9fe:80")).mistake(21),
    bad("connect-octal", "loopback in octal", connect!("0177.0.0.1:80")).mistake(21),
    bad("connect-short", "loopback with parts left out", connect!("127.1:80")).mistake(21),
    bad("connect-zone", "an address with a zone", connect!("[fe80::1%25eth0]:80")).mistake(21),
    bad("connect-nul", "NUL within a name", connect!("169.254.169.254\0.example.com:80"))
        .mistake(21),
    bad("connect-userinfo", "user information before the host", connect!("a@169.254.169.254:80"))
        .mistake(21),
    bad("connect-backslash", "a backslash in the host", connect!("example.com\\@127.0.0.1:80"))
        .mistake(21),
    bad("connect-no-port", "no port", connect!("ringfence-escape.invalid")),
    bad("connect-port-zero", "port 0", connect!("ringfence-escape.invalid:0")),
    bad("connect-port-wraps", "a port of more than 16 bits", connect!("ringfence-escape.invalid:65616"))
        .mistake(14),
    bad(
        "connect-body",
        "CONNECT with a body",
        "CONNECT ringfence-escape.invalid:443 HTTP/1.1\r\nHost: ringfence-escape.invalid\r\n\
         Content-Length: 1\r\n\r\nx",
    )
    .mistake(24),
    bad("origin-form", "the proxy as if it were the server", "GET / HTTP/1.1\r\nHost: x\r\n\r\n"),
    bad("options-asterisk", "OPTIONS *", "OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n"),
    bad(
        "https-target",
        "an https target without CONNECT",
        "GET https://ringfence-escape.invalid/ HTTP/1.1\r\nHost: ringfence-escape.invalid\r\n\r\n",
    ),
    bad("other-scheme", "ftp", "GET ftp://127.0.0.1/ HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"),
    bad(
        "two-lengths",
        "two content lengths",
        "POST http://ringfence-escape.invalid/ HTTP/1.1\r\nHost: ringfence-escape.invalid\r\n\
         Content-Length: 0\r\nContent-Length: 5\r\n\r\n",
    )
    .mistake(24),
    bad(
        "length-and-chunked",
        "a length and chunks",
        "POST http://ringfence-escape.invalid/ HTTP/1.1\r\nHost: ringfence-escape.invalid\r\n\
         Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    )
    .mistake(24),
    bad("bare-line-feeds", "lines without CR", "GET http://x.invalid/ HTTP/1.1\nHost: x.invalid\n\n")
        .mistake(24),
    bad("two-hosts", "two Host fields", "GET http://x.invalid/ HTTP/1.1\r\nHost: x.invalid\r\nHost: y\r\n\r\n")
        .mistake(24),
    bad("socks5", "SOCKS 5", "\x05\x01\x00\r\n\r\n"),
    bad("tls-to-proxy", "TLS to the proxy itself", "\x16\x03\x01\x00\x05hello\r\n\r\n"),
    Row::new("head-too-long", Proxy, TOO_LARGE, "a head without an end", Do(endless_head)),
];

const PATIENCE: Duration = Duration::from_secs(12);

/// Sends these bytes to the proxy; the status of its answer.
pub(super) fn ask(request: &[u8]) -> Seen {
    let exchange = || -> std::io::Result<Vec<u8>> {
        let mut stream =
            TcpStream::connect_timeout(&(GATEWAY, PROXY_PORT).into(), Duration::from_secs(5))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(request)?;
        let mut answer = Vec::new();
        while answer.len() < 12 {
            let mut bytes = [0; 512];
            match stream.read(&mut bytes)? {
                0 => break,
                count => answer.extend_from_slice(&bytes[..count]),
            }
        }
        Ok(answer)
    };
    match exchange() {
        Ok(answer) => status(&answer),
        Err(error) => raw::seen_io::<()>(Err(error)),
    }
}

fn status(answer: &[u8]) -> Seen {
    let status = answer
        .strip_prefix(b"HTTP/1.1 ")
        .and_then(|rest| std::str::from_utf8(rest.get(..3)?).ok()?.parse().ok());
    match status {
        Some(status) => Seen::Status(status),
        None => Seen::Broken(format!("no HTTP answer: {}", answer.escape_ascii())),
    }
}

fn endless_head(_: &Context) -> Seen {
    let head =
        format!("GET http://x.invalid/ HTTP/1.1\r\nHost: x.invalid\r\nX: {}", "a".repeat(70_000));
    ask(head.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_answer_of_http_has_a_status() {
        assert_eq!(status(b"HTTP/1.1 403 Forbidden\r\n"), Seen::Status(403));
        for answer in [&b""[..], b"HTTP/1.1", b"HTTP/1.1 4x3 ", b"HTTP/2 403 ", b"\x15\x03"] {
            assert!(matches!(status(answer), Seen::Broken(_)), "{answer:?}");
        }
    }
}

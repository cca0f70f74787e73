//! Writing heads: always from what was parsed, never the bytes that came in.

use std::io::Write as _;

use super::head::{Fields, Framing, RequestHead, ResponseHead};

/// Fields that belong to one connection (RFC 9110, section 7.6.1), or that are written from what
/// they were parsed into.
const NOT_FORWARDED: [&str; 11] = [
    "connection",
    "content-length",
    "host",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

const EXTENSIONS: &str = "sec-websocket-extensions";

/// What a request becomes on the upstream connection.
pub(crate) struct Rewrite<'a> {
    /// The judged target, origin-form.
    pub(crate) target: &'a str,
    /// The judged authority.
    pub(crate) host: &'a str,
    /// Pass on the wish to change protocols.
    pub(crate) upgrade: bool,
    /// The length of the whole body, where it has been read: sent with that, whatever framing it
    /// had.
    pub(crate) content: Option<usize>,
    /// The WebSocket extensions to offer in place of the client's; empty for none. `None`: as the
    /// client wrote them.
    pub(crate) extensions: Option<&'a str>,
}

/// The head as it goes to the upstream.
pub(crate) fn request(head: &RequestHead, rewrite: &Rewrite<'_>) -> Vec<u8> {
    let mut out = Vec::with_capacity(1024);
    put(
        &mut out,
        &[
            head.method().as_bytes(),
            b" ",
            rewrite.target.as_bytes(),
            b" HTTP/1.1\r\nHost: ",
            rewrite.host.as_bytes(),
            b"\r\n",
        ],
    );
    // Whoever has sent its body waits for no `100 Continue`.
    let answered = rewrite.content.map(|_| "expect");
    let offered = rewrite.extensions.map(|_| EXTENSIONS);
    fields(&mut out, &head.fields, &[answered, offered]);
    let framing = match rewrite.content {
        Some(length) if head.framing != Framing::Empty => Framing::Length(length as u64),
        _ => head.framing,
    };
    match framing {
        // Writing to a Vec cannot fail.
        Framing::Length(length) => drop(write!(out, "Content-Length: {length}\r\n")),
        Framing::Chunked => out.extend_from_slice(b"Transfer-Encoding: chunked\r\n"),
        Framing::Empty | Framing::Close => {}
    }
    if let Some(protocol) = head.upgrade().filter(|_| rewrite.upgrade) {
        put(&mut out, &[b"Connection: Upgrade\r\nUpgrade: ", protocol, b"\r\n"]);
    }
    if let Some(extensions) = rewrite.extensions.filter(|extensions| !extensions.is_empty()) {
        put(&mut out, &[b"Sec-WebSocket-Extensions: ", extensions.as_bytes(), b"\r\n"]);
    }
    out.extend_from_slice(b"\r\n");
    out
}

/// The head as it goes to the client. `chunked`: whether the body is sent in chunks; `keep`:
/// whether the connection goes on after it, for a client of HTTP/1.`minor`.
pub(crate) fn response(head: &ResponseHead, chunked: bool, keep: bool, minor: u8) -> Vec<u8> {
    let mut out = Vec::with_capacity(1024);
    let _ = write!(out, "HTTP/1.1 {} ", head.status);
    put(&mut out, &[head.reason(), b"\r\n"]);
    fields(&mut out, &head.fields, &[]);
    if chunked {
        out.extend_from_slice(b"Transfer-Encoding: chunked\r\n");
    } else if !matches!(head.status, 100..=199 | 204) {
        // Also where there is no body: an answer to HEAD tells the length there would be.
        if let Some(length) = head.fields.all("content-length").next() {
            put(&mut out, &[b"Content-Length: ", length, b"\r\n"]);
        }
    }
    if head.status == 101 {
        if let Some(protocol) = head.fields.all("upgrade").next() {
            put(&mut out, &[b"Connection: Upgrade\r\nUpgrade: ", protocol, b"\r\n"]);
        }
    } else if head.status >= 200 && !keep {
        out.extend_from_slice(b"Connection: close\r\n");
    } else if head.status >= 200 && minor == 0 {
        out.extend_from_slice(b"Connection: keep-alive\r\n");
    }
    out.extend_from_slice(b"\r\n");
    out
}

fn fields(out: &mut Vec<u8>, fields: &Fields, also_not: &[Option<&str>]) {
    for (name, value) in fields.not_nominated() {
        let mut dropped = NOT_FORWARDED.iter().copied().chain(also_not.iter().copied().flatten());
        if !dropped.any(|f| name.eq_ignore_ascii_case(f.as_bytes())) {
            put(out, &[name, b": ", value, b"\r\n"]);
        }
    }
}

fn put(out: &mut Vec<u8>, parts: &[&[u8]]) {
    for part in parts {
        out.extend_from_slice(part);
    }
}

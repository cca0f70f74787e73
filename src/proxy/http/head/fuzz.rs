//! Heads of requests and responses, bent: what is accepted is read alike however it arrives, and
//! what is written from it is read in the same way again. See [`crate::fuzz`].

use super::*;
use crate::fuzz::{alone, fuzz};
use crate::proxy::http::write::{self, Rewrite};

const REQUESTS: [&str; 6] = [
    "GET /a?b=c HTTP/1.1\r\nHost: h:8\r\nAccept: */*\r\n\r\n",
    "POST /x HTTP/1.1\r\nHost: h\r\nContent-Length: 12\r\nExpect: 100-continue\r\n\r\n",
    "PUT http://h/x HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\nTrailer: x\r\nTE: trailers\r\n\r\n",
    "CONNECT h:443 HTTP/1.1\r\nHost: h:443\r\nProxy-Connection: keep-alive\r\n\r\n",
    "GET / HTTP/1.0\r\nConnection: keep-alive, x-y\r\nX-Y: 1\r\n\r\n",
    "GET /w HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: \
     dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
];
const RESPONSES: [&str; 6] = [
    "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nSet-Cookie: a=b\r\n\r\n",
    "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n",
    "HTTP/1.0 404 Not Found\r\n\r\n",
    "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
    "HTTP/1.1 304 Not Modified\r\nContent-Length: 7\r\nETag: \"x\"\r\n\r\n",
    "HTTP/1.1 100 Continue\r\n\r\n",
];
const WORDS: [&str; 36] = [
    "\r\n",
    "\n",
    "\r",
    "\r\n\r\n",
    "\r\n ",
    "\r\n\t",
    ":",
    " ",
    "\t",
    "\0",
    "\u{b}",
    "\u{7f}",
    "é",
    "Host: h\r\n",
    "Host : h\r\n",
    "host:x\r\n",
    "Content-Length: 0\r\n",
    "Content-Length: +1\r\n",
    "Content-Length: 1, 1\r\n",
    "Content-Length: 0x10\r\n",
    "Content-Length: 999999999999999999999\r\n",
    "Content_Length: 3\r\n",
    "Transfer-Encoding: chunked\r\n",
    "Transfer-Encoding: \tchunked \r\n",
    "Transfer-Encoding: gzip, chunked\r\n",
    "Transfer-Encoding: xchunked\r\n",
    "Transfer-Encoding\r\n",
    "Connection: content-length, host, x\r\n",
    "Connection: transfer-encoding\r\n",
    "Upgrade: h2c\r\n",
    "HTTP/1.1",
    "HTTP/1.0",
    "HTTP/2.0",
    "GET",
    "HEAD",
    ";",
];

/// As [`whole`] finds the end of a head that arrives in pieces.
fn arrives(bytes: &[u8], cuts: &[usize], max: usize) -> Result<Option<usize>, HeadError> {
    let mut seen = 0;
    for &cut in cuts {
        let data = &bytes[..cut];
        if !data.first().is_none_or(u8::is_ascii_alphabetic) {
            return Err(HeadError::LeadingLine);
        }
        if let Some(length) = find_end(data, seen)? {
            return if length > max { Err(HeadError::TooLong) } else { Ok(Some(length)) };
        }
        seen = cut;
        if seen >= max {
            return Err(HeadError::TooLong);
        }
    }
    Ok(None)
}

#[test]
fn requests() {
    let mut good = 0_u64;
    fuzz("requests", 1_000, |random| {
        let bytes = random.bent(&REQUESTS, &WORDS);
        let cuts = random.cuts(bytes.len());
        let end = arrives(&bytes, &[bytes.len()], REQUEST_MAX);
        if bytes.len() < REQUEST_MAX {
            assert_eq!(arrives(&bytes, &cuts, REQUEST_MAX), end, "{bytes:?} {cuts:?}");
        }
        let Ok(Some(length)) = end else { return };
        let Ok(head) = parse_request(bytes[..length].to_vec()) else { return };
        good += 1;
        let (keep, upgrade) = (head.keep_alive(), head.upgrade().is_some());
        let rewrite = Rewrite {
            target: "/judged",
            host: "judged.test",
            upgrade: upgrade && keep && random.once_in(2),
            content: None,
            extensions: random.once_in(2).then_some(""),
        };
        let sent = write::request(&head, &rewrite);
        let again = parse_request(sent.clone());
        let again = again.unwrap_or_else(|error| panic!("{error}: {sent:?} of {bytes:?}"));
        assert_eq!(find_end(&sent, 0), Ok(Some(sent.len())), "{sent:?}");
        assert_eq!((again.method(), again.target()), (head.method(), "/judged"));
        assert_eq!((again.host(), again.framing), (Some("judged.test"), head.framing));
        assert_eq!(again.upgrade(), head.upgrade().filter(|_| rewrite.upgrade), "{sent:?}");
        assert!(!again.fields.has("proxy-authorization") && !again.fields.has("te"));
    });
    assert!(alone() || good > 0, "nothing was accepted");
}

#[test]
fn responses() {
    let mut good = 0_u64;
    fuzz("responses", 1_000, |random| {
        let bytes = random.bent(&RESPONSES, &WORDS);
        let cuts = random.cuts(bytes.len());
        let end = arrives(&bytes, &[bytes.len()], RESPONSE_MAX);
        if bytes.len() < RESPONSE_MAX {
            assert_eq!(arrives(&bytes, &cuts, RESPONSE_MAX), end, "{bytes:?} {cuts:?}");
        }
        let Ok(Some(length)) = end else { return };
        let method = random.pick(&["GET", "HEAD", "POST", "head"]);
        let Ok(head) = parse_response(bytes[..length].to_vec(), method) else { return };
        good += 1;
        let minor = u8::from(random.once_in(2));
        // As the relay writes it.
        let chunked = head.framing == Framing::Chunked && minor > 0;
        let delimited = chunked || matches!(head.framing, Framing::Empty | Framing::Length(_));
        let keep = delimited && random.once_in(2);
        let sent = write::response(&head, chunked, keep, minor);
        let again = parse_response(sent.clone(), method);
        let again = again.unwrap_or_else(|error| panic!("{error}: {sent:?} of {bytes:?}"));
        assert_eq!(find_end(&sent, 0), Ok(Some(sent.len())), "{sent:?}");
        assert_eq!((again.status, again.reason()), (head.status, head.reason()));
        let framing = if delimited { head.framing } else { Framing::Close };
        assert_eq!(again.framing, framing, "{sent:?} of {bytes:?}");
    });
    assert!(alone() || good > 0, "nothing was accepted");
}

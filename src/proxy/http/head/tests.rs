//! Heads that are taken, and those that are refused, each with its reason.

use super::*;

pub(crate) fn request(text: &str) -> Result<RequestHead, HeadError> {
    let raw = text.as_bytes().to_vec();
    match find_end(&raw, 0)? {
        Some(length) if length == raw.len() => parse_request(raw),
        _ => Err(HeadError::Truncated),
    }
}

pub(crate) fn response(text: &str, method: &str) -> Result<ResponseHead, HeadError> {
    let raw = text.as_bytes().to_vec();
    find_end(&raw, 0)?.ok_or(HeadError::Truncated)?;
    parse_response(raw, method)
}

#[test]
fn plain_request() {
    let head = request("POST /a?b=c HTTP/1.1\r\nHost: h:8\r\nX: 1\r\nContent-Length: 5\r\n\r\n")
        .expect("head");
    assert_eq!((head.method(), head.target(), head.minor), ("POST", "/a?b=c", 1));
    assert_eq!(head.host(), Some("h:8"));
    assert_eq!(head.framing, Framing::Length(5));
    assert!(head.keep_alive());
}

#[test]
fn ambiguous_framing_is_refused() {
    let cases = [
        ("Content-Length: 5\r\nTransfer-Encoding: chunked", HeadError::LengthAndEncoding),
        ("Content-Length: 5\r\nContent-Length: 5", HeadError::RepeatedLength),
        ("Content-Length: 5\r\nContent-Length: 6", HeadError::RepeatedLength),
        ("Content-Length: 5, 5", HeadError::BadLength),
        ("Content-Length: +5", HeadError::BadLength),
        ("Content-Length: -0", HeadError::BadLength),
        ("Content-Length: 0x5", HeadError::BadLength),
        ("Content-Length:", HeadError::BadLength),
        ("Content-Length: 9999999999999999999", HeadError::BadLength),
        ("Content-Length : 5", HeadError::Syntax),
        ("Transfer-Encoding: gzip, chunked", HeadError::BadEncoding),
        ("Transfer-Encoding: chunked, chunked", HeadError::BadEncoding),
        ("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked", HeadError::BadEncoding),
        ("Transfer-Encoding: xchunked", HeadError::BadEncoding),
        ("Transfer-Encoding: chunked;q=1", HeadError::BadEncoding),
        ("Transfer-Encoding:\x0bchunked", HeadError::Syntax),
        ("X: 1\r\n folded", HeadError::Folded),
        ("X: 1\r\n\tfolded", HeadError::Folded),
        (" X: 1", HeadError::Folded),
        ("X: a\rb", HeadError::BareLineBreak),
        ("X: a\nY: b", HeadError::BareLineBreak),
        ("X: a\0b", HeadError::Nul),
        ("X\u{e9}: a", HeadError::Syntax),
        (": a", HeadError::Syntax),
        ("X a", HeadError::Syntax),
        ("Host: other", HeadError::BadHost),
    ];
    for (lines, expected) in cases {
        let text = format!("POST / HTTP/1.1\r\nHost: h\r\n{lines}\r\n\r\n");
        assert_eq!(request(&text).map(|_| ()).expect_err(lines), expected, "{lines:?}");
    }
}

#[test]
fn request_lines_that_are_refused() {
    for line in [
        "GET  / HTTP/1.1",
        "GET / HTTP/2.0",
        "GET / HTTP/1.2",
        "GET / http/1.1",
        "GET /",
        " GET / HTTP/1.1",
        "\r\nGET / HTTP/1.1",
        "GET /a b HTTP/1.1",
        "GET /\u{e9} HTTP/1.1",
        "G\x01T / HTTP/1.1",
        "PRI * HTTP/2.0",
    ] {
        let text = format!("{line}\r\nHost: h\r\n\r\n");
        assert!(request(&text).is_err(), "{line:?}");
    }
    assert_eq!(request("GET / HTTP/1.1\r\n\r\n").map(|_| ()), Err(HeadError::BadHost));
    request("GET / HTTP/1.0\r\n\r\n").expect("HTTP/1.0 needs no Host");
    let encoded = request("POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n");
    assert_eq!(encoded.map(|_| ()), Err(HeadError::BadEncoding));
}

#[test]
fn end_is_found_wherever_the_segments_split() {
    let head = b"GET / HTTP/1.1\r\nHost: h\r\n\r\n";
    for split in 0..head.len() {
        assert_eq!(find_end(&head[..split], 0), Ok(None), "{split}");
        assert_eq!(find_end(head, split), Ok(Some(head.len())), "{split}");
    }
    let mut with_body = head.to_vec();
    with_body.extend_from_slice(b"\n\0body");
    assert_eq!(find_end(&with_body, 0), Ok(Some(head.len())));
}

#[test]
fn response_framing_follows_status_and_method() {
    let framing = |text: &str, method| response(text, method).map(|head| head.framing);
    let cases: &[(&str, &str, Framing)] = &[
        ("HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n", "GET", Framing::Length(3)),
        ("HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n", "HEAD", Framing::Empty),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\n\r\n", "GET", Framing::Chunked),
        ("HTTP/1.1 200\r\n\r\n", "GET", Framing::Close),
        ("HTTP/1.0 200 OK\r\n\r\n", "GET", Framing::Close),
        ("HTTP/1.1 204 No Content\r\n\r\n", "GET", Framing::Empty),
        ("HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n", "GET", Framing::Empty),
        ("HTTP/1.1 101 Switching Protocols\r\n\r\n", "GET", Framing::Empty),
    ];
    for (text, method, expected) in cases {
        assert_eq!(framing(text, method), Ok(*expected), "{text:?}");
    }
    let both = "HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n";
    assert_eq!(framing(both, "GET"), Err(HeadError::LengthAndEncoding));
    assert_eq!(framing("HTTP/1.1 099 No\r\n\r\n", "GET"), Err(HeadError::Syntax));
}

#[test]
fn keep_alive_by_version_and_option() {
    let keep = |text: &str| request(text).expect("head").keep_alive();
    assert!(!keep("GET / HTTP/1.1\r\nHost: h\r\nConnection: x, CLOSE\r\n\r\n"));
    assert!(!keep("GET / HTTP/1.0\r\n\r\n"));
    assert!(keep("GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"));
    assert!(keep("GET / HTTP/1.0\r\nProxy-Connection: Keep-Alive\r\n\r\n"));
}

proptest::proptest! {
    #[test]
    fn no_bytes_make_the_reader_panic(raw in proptest::collection::vec(proptest::num::u8::ANY, 0..200)) {
        let mut text = b"GET / HTTP/1.1\r\nHost: h\r\n".to_vec();
        text.extend_from_slice(&raw);
        text.extend_from_slice(b"\r\n\r\n");
        if let Ok(Some(length)) = find_end(&text, 0) {
            let _ = parse_request(text[..length].to_vec());
            let _ = parse_response(text[..length].to_vec(), "GET");
        }
    }
}

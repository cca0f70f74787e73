//! Reading request and response heads, strictly (RFC 9112), and the framing they announce.

use std::ops::Range;
use std::time::Duration;

use tokio::time::{Instant, timeout, timeout_at};

use crate::proxy::stream::Reader;

/// The longest request head in bytes.
pub(crate) const REQUEST_MAX: usize = 16 * 1024;

/// The longest response head in bytes; upstreams set long cookies and policies.
const RESPONSE_MAX: usize = 64 * 1024;

/// How long a head may take from its first byte to its last.
pub(crate) const HEAD_TIMEOUT: Duration = Duration::from_secs(10);

/// The most header fields in a request, and in a response.
const REQUEST_FIELDS: usize = 100;
const RESPONSE_FIELDS: usize = 256;

/// Why a head was not accepted. The text goes to the peer and into the log; it holds nothing of
/// what was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum HeadError {
    #[error("line break without carriage return, or carriage return without line break")]
    BareLineBreak,
    #[error("NUL byte in the head")]
    Nul,
    #[error("folded header line")]
    Folded,
    #[error("head does not start with a request line")]
    LeadingLine,
    #[error("head is not HTTP/1.x")]
    Syntax,
    #[error("head is too long")]
    TooLong,
    #[error("too many header fields")]
    TooManyFields,
    #[error("head did not arrive in time")]
    Timeout,
    #[error("connection closed within a head")]
    Truncated,
    #[error("more than one Content-Length")]
    RepeatedLength,
    #[error("Content-Length is not a plain number")]
    BadLength,
    #[error("both Content-Length and Transfer-Encoding")]
    LengthAndEncoding,
    #[error("Transfer-Encoding is not exactly `chunked`")]
    BadEncoding,
    #[error("exactly one Host is needed")]
    BadHost,
    #[error("connection error within a head")]
    Io,
}

/// One header field: where its name and value lie in the raw head.
#[derive(Debug, Clone)]
struct Field {
    name: Range<usize>,
    value: Range<usize>,
}

/// The fields of a head, over its raw bytes.
#[derive(Debug)]
pub(crate) struct Fields {
    raw: Vec<u8>,
    fields: Vec<Field>,
}

impl Fields {
    /// Names and values in order. Names are tokens, so ASCII.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        self.fields.iter().map(|f| (&self.raw[f.name.clone()], &self.raw[f.value.clone()]))
    }

    /// The values of one field, in order.
    pub(crate) fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a [u8]> {
        self.iter()
            .filter(move |(field, _)| field.eq_ignore_ascii_case(name.as_bytes()))
            .map(|(_, value)| value)
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.all(name).next().is_some()
    }

    /// The comma-separated members of one field, trimmed, empty ones left out.
    pub(crate) fn members<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a [u8]> {
        self.all(name)
            .flat_map(|value| value.split(|byte| *byte == b','))
            .map(<[u8]>::trim_ascii)
            .filter(|member| !member.is_empty())
    }

    /// Whether `Connection` names this option.
    pub(crate) fn connection(&self, option: &str) -> bool {
        self.members("connection").any(|member| member.eq_ignore_ascii_case(option.as_bytes()))
    }
}

/// How a message's body ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Framing {
    /// There is none.
    Empty,
    /// After this many bytes.
    Length(u64),
    /// With the chunk of size 0.
    Chunked,
    /// With the connection (responses only).
    Close,
}

/// A request head.
#[derive(Debug)]
pub(crate) struct RequestHead {
    pub(crate) fields: Fields,
    method: Range<usize>,
    target: Range<usize>,
    /// HTTP/1.`minor`.
    pub(crate) minor: u8,
    pub(crate) framing: Framing,
}

impl RequestHead {
    /// A token, so ASCII.
    pub(crate) fn method(&self) -> &str {
        std::str::from_utf8(&self.fields.raw[self.method.clone()]).unwrap_or_default()
    }

    /// As sent; printable ASCII.
    pub(crate) fn target(&self) -> &str {
        std::str::from_utf8(&self.fields.raw[self.target.clone()]).unwrap_or_default()
    }

    /// The one `Host`; `None` only for HTTP/1.0.
    pub(crate) fn host(&self) -> Option<&str> {
        self.fields.all("host").next().and_then(|value| std::str::from_utf8(value).ok())
    }

    /// Whether the client wants to go on after this request.
    pub(crate) fn keep_alive(&self) -> bool {
        let named = |option| {
            self.fields.connection(option)
                || self
                    .fields
                    .members("proxy-connection")
                    .any(|member| member.eq_ignore_ascii_case(str::as_bytes(option)))
        };
        if self.minor == 0 { named("keep-alive") } else { !named("close") }
    }

    /// The protocol this request asks to change to, if any.
    pub(crate) fn upgrade(&self) -> Option<&[u8]> {
        self.fields.all("upgrade").next()
    }
}

/// A response head.
#[derive(Debug)]
pub(crate) struct ResponseHead {
    pub(crate) fields: Fields,
    pub(crate) status: u16,
    reason: Range<usize>,
    pub(crate) framing: Framing,
    /// Whether the upstream will take another request.
    pub(crate) keep_alive: bool,
}

impl ResponseHead {
    pub(crate) fn reason(&self) -> &[u8] {
        &self.fields.raw[self.reason.clone()]
    }
}

/// Waits for a request head. `None`: the client closed, or sent nothing within `idle`, which is
/// how connections end.
pub(crate) async fn read_request(
    reader: &mut Reader,
    idle: Duration,
) -> Result<Option<RequestHead>, HeadError> {
    if reader.data().is_empty() {
        reader.shrink();
        match timeout(idle, reader.fill()).await {
            Ok(Ok(read)) if read > 0 => {}
            _ => return Ok(None),
        }
    }
    let raw = read_raw(reader, REQUEST_MAX, HEAD_TIMEOUT).await?;
    parse_request(raw).map(Some)
}

/// Waits for the rest of a request head that has begun, and leaves it in the reader.
pub(crate) async fn peek_request(reader: &mut Reader) -> Result<RequestHead, HeadError> {
    let length = whole(reader, REQUEST_MAX, HEAD_TIMEOUT).await?;
    parse_request(reader.data()[..length].to_vec())
}

/// Waits for a response head, for as long as it takes: how slow an upstream may be is the
/// client's choice. `None`: closed before the first byte.
pub(crate) async fn read_response(
    reader: &mut Reader,
    method: &str,
) -> Result<Option<ResponseHead>, HeadError> {
    if reader.data().is_empty() {
        match reader.fill().await {
            Ok(read) if read > 0 => {}
            _ => return Ok(None),
        }
    }
    let raw = read_raw(reader, RESPONSE_MAX, Duration::from_secs(60)).await?;
    parse_response(raw, method).map(Some)
}

/// Takes the bytes of one head, its empty line included, out of the reader.
async fn read_raw(reader: &mut Reader, max: usize, time: Duration) -> Result<Vec<u8>, HeadError> {
    let length = whole(reader, max, time).await?;
    let raw = reader.data()[..length].to_vec();
    reader.consume(length);
    Ok(raw)
}

/// Waits until the reader holds a whole head, and says how long that is.
async fn whole(reader: &mut Reader, max: usize, time: Duration) -> Result<usize, HeadError> {
    let deadline = Instant::now() + time;
    let mut seen = 0;
    loop {
        // Neither method nor version begins otherwise: no need to wait for more.
        if !reader.data().first().is_none_or(u8::is_ascii_alphabetic) {
            return Err(HeadError::LeadingLine);
        }
        if let Some(length) = find_end(reader.data(), seen)? {
            if length > max {
                return Err(HeadError::TooLong);
            }
            return Ok(length);
        }
        seen = reader.data().len();
        if seen >= max {
            return Err(HeadError::TooLong);
        }
        match timeout_at(deadline, reader.fill()).await {
            Err(_) => return Err(HeadError::Timeout),
            Ok(Err(_)) => return Err(HeadError::Io),
            Ok(Ok(0)) => return Err(HeadError::Truncated),
            Ok(Ok(_)) => {}
        }
    }
}

/// The length of the head at the start of `data`, looking from about `from` on. Line breaks are
/// checked here, before the end is known: a head of bare line feeds never ends.
fn find_end(data: &[u8], from: usize) -> Result<Option<usize>, HeadError> {
    let mut index = from.saturating_sub(3);
    while index < data.len() {
        match data[index] {
            b'\n' => {
                if index == 0 || data[index - 1] != b'\r' {
                    return Err(HeadError::BareLineBreak);
                }
                if index >= 3 && data[index - 2] == b'\n' {
                    return Ok(Some(index + 1));
                }
            }
            b'\r' if data.get(index + 1).is_some_and(|next| *next != b'\n') => {
                return Err(HeadError::BareLineBreak);
            }
            0 => return Err(HeadError::Nul),
            _ => {}
        }
        index += 1;
    }
    Ok(None)
}

/// What httparse leaves to its caller: folded lines and what comes before the first line.
fn check_lines(raw: &[u8]) -> Result<(), HeadError> {
    if !raw.first().is_some_and(u8::is_ascii_alphabetic) {
        return Err(HeadError::LeadingLine);
    }
    let folded = raw.windows(2).any(|pair| pair[0] == b'\n' && matches!(pair[1], b' ' | b'\t'));
    if folded { Err(HeadError::Folded) } else { Ok(()) }
}

fn parse_request(raw: Vec<u8>) -> Result<RequestHead, HeadError> {
    check_lines(&raw)?;
    let mut slots = [httparse::EMPTY_HEADER; REQUEST_FIELDS];
    let mut request = httparse::Request::new(&mut slots);
    match request.parse(&raw) {
        Ok(httparse::Status::Complete(length)) if length == raw.len() => {}
        Err(httparse::Error::TooManyHeaders) => return Err(HeadError::TooManyFields),
        _ => return Err(HeadError::Syntax),
    }
    let (Some(method), Some(target), Some(minor)) = (request.method, request.path, request.version)
    else {
        return Err(HeadError::Syntax);
    };
    if !target.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(HeadError::Syntax);
    }
    let method = range(&raw, method.as_bytes());
    let target = range(&raw, target.as_bytes());
    let fields = collect(&raw, request.headers);
    let fields = Fields { raw, fields };
    let framing = request_framing(&fields, minor)?;
    match fields.all("host").count() {
        1 => {}
        0 if minor == 0 => {}
        _ => return Err(HeadError::BadHost),
    }
    Ok(RequestHead { fields, method, target, minor, framing })
}

fn parse_response(raw: Vec<u8>, method: &str) -> Result<ResponseHead, HeadError> {
    check_lines(&raw)?;
    let mut slots = [httparse::EMPTY_HEADER; RESPONSE_FIELDS];
    let mut response = httparse::Response::new(&mut slots);
    match response.parse(&raw) {
        Ok(httparse::Status::Complete(length)) if length == raw.len() => {}
        Err(httparse::Error::TooManyHeaders) => return Err(HeadError::TooManyFields),
        _ => return Err(HeadError::Syntax),
    }
    let (Some(status), Some(minor)) = (response.code, response.version) else {
        return Err(HeadError::Syntax);
    };
    // httparse gives an empty text for a reason that is not ASCII; then none is sent on.
    let reason = response.reason.filter(|reason| !reason.is_empty());
    let reason = reason.map_or(0..0, |reason| range(&raw, reason.as_bytes()));
    let fields = collect(&raw, response.headers);
    let fields = Fields { raw, fields };
    let framing = response_framing(&fields, minor, status, method)?;
    let keep_alive = framing != Framing::Close
        && if minor == 0 { fields.connection("keep-alive") } else { !fields.connection("close") };
    Ok(ResponseHead { fields, status, reason, framing, keep_alive })
}

fn collect(raw: &[u8], headers: &[httparse::Header<'_>]) -> Vec<Field> {
    headers
        .iter()
        .map(|header| Field {
            name: range(raw, header.name.as_bytes()),
            value: range(raw, header.value),
        })
        .collect()
}

/// Where `part`, a slice of `raw`, lies in it.
fn range(raw: &[u8], part: &[u8]) -> Range<usize> {
    let start = part.as_ptr() as usize - raw.as_ptr() as usize;
    start..start + part.len()
}

fn request_framing(fields: &Fields, minor: u8) -> Result<Framing, HeadError> {
    let length = content_length(fields)?;
    if !fields.has("transfer-encoding") {
        return Ok(length.map_or(Framing::Empty, Framing::Length));
    }
    if length.is_some() {
        return Err(HeadError::LengthAndEncoding);
    }
    if minor == 0 {
        return Err(HeadError::BadEncoding);
    }
    chunked(fields)
}

/// RFC 9112, section 6.3. Where it lets Transfer-Encoding win over Content-Length we refuse: such
/// a response is broken or an attempt to split it.
fn response_framing(
    fields: &Fields,
    minor: u8,
    status: u16,
    method: &str,
) -> Result<Framing, HeadError> {
    let length = content_length(fields)?;
    let encoded = fields.has("transfer-encoding");
    if length.is_some() && encoded {
        return Err(HeadError::LengthAndEncoding);
    }
    // Methods are case-sensitive: to an upstream `head` is some other method.
    if method == "HEAD" || matches!(status, 100..=199 | 204 | 304) {
        return Ok(Framing::Empty);
    }
    if encoded {
        if minor == 0 {
            return Err(HeadError::BadEncoding);
        }
        return chunked(fields);
    }
    Ok(length.map_or(Framing::Close, Framing::Length))
}

fn chunked(fields: &Fields) -> Result<Framing, HeadError> {
    let mut values = fields.all("transfer-encoding");
    match (values.next(), values.next()) {
        (Some(value), None) if value.eq_ignore_ascii_case(b"chunked") => Ok(Framing::Chunked),
        _ => Err(HeadError::BadEncoding),
    }
}

fn content_length(fields: &Fields) -> Result<Option<u64>, HeadError> {
    let mut values = fields.all("content-length");
    let Some(value) = values.next() else {
        return Ok(None);
    };
    if values.next().is_some() {
        return Err(HeadError::RepeatedLength);
    }
    // No sign, no list, no space; 18 digits fit any integer a peer may use.
    if value.is_empty() || value.len() > 18 || !value.iter().all(u8::is_ascii_digit) {
        return Err(HeadError::BadLength);
    }
    Ok(Some(value.iter().fold(0, |sum, digit| sum * 10 + u64::from(digit - b'0'))))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(text: &str) -> Result<RequestHead, HeadError> {
        let raw = text.as_bytes().to_vec();
        match find_end(&raw, 0)? {
            Some(length) if length == raw.len() => parse_request(raw),
            _ => Err(HeadError::Truncated),
        }
    }

    fn response(text: &str, method: &str) -> Result<ResponseHead, HeadError> {
        let raw = text.as_bytes().to_vec();
        find_end(&raw, 0)?.ok_or(HeadError::Truncated)?;
        parse_response(raw, method)
    }

    #[test]
    fn plain_request() {
        let head =
            request("POST /a?b=c HTTP/1.1\r\nHost: h:8\r\nX: 1\r\nContent-Length: 5\r\n\r\n")
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
}

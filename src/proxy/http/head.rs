//! Reading request and response heads, strictly (RFC 9112).

mod framing;

use std::ops::Range;
use std::time::Duration;

use tokio::time::{Instant, timeout, timeout_at};

pub(crate) use framing::Framing;
use framing::{request_framing, response_framing};

use crate::proxy::stream::Reader;

/// The longest request head in bytes.
pub(crate) const REQUEST_MAX: usize = 16 * 1024;

/// The longest response head in bytes; upstreams set long cookies and policies.
pub(crate) const RESPONSE_MAX: usize = 64 * 1024;

/// How long a head may take from its first byte to its last.
pub(crate) const HEAD_TIMEOUT: Duration = Duration::from_secs(10);

/// The most header fields in a request, and in a response.
pub(crate) const REQUEST_FIELDS: usize = 100;
pub(crate) const RESPONSE_FIELDS: usize = 256;

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

    /// Those that `Connection` does not name, which alone may go on: what is judged must be among
    /// them.
    pub(crate) fn not_nominated(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        let nominated: Vec<&[u8]> = self.members("connection").collect();
        self.iter().filter(move |(name, _)| {
            !nominated.iter().any(|nominated| name.eq_ignore_ascii_case(nominated))
        })
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
    // Three digits for httparse; `099` is no status to anybody, and would be written as `99`.
    if status < 100 {
        return Err(HeadError::Syntax);
    }
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

#[cfg(test)]
pub(crate) mod tests;

#[cfg(test)]
mod fuzz;

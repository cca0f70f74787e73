//! How a message's body ends, from its head alone: the rule that request smuggling turns on.

use super::{Fields, HeadError};

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

/// RFC 9112, section 6.3, without its leniency: whatever two readers could take differently is
/// refused.
pub(super) fn request_framing(fields: &Fields, minor: u8) -> Result<Framing, HeadError> {
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

/// The same for a response. Where the RFC lets Transfer-Encoding win over Content-Length we refuse: such
/// a response is broken or an attempt to split it.
pub(super) fn response_framing(
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

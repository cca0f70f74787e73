//! The opening handshake, checked on both sides (RFC 6455, sections 4.1 and 4.2): what the client
//! asks for must be whole, what is offered to the server is only what we can read, and what the
//! server answers must fit what was offered.

use std::fmt;

use aws_lc_rs::digest;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;

use crate::proxy::http::head::{Fields, Framing, RequestHead, ResponseHead};

/// What `Sec-WebSocket-Accept` is made with.
const GUID: &[u8] = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11";

const EXTENSIONS: &str = "sec-websocket-extensions";
const PROTOCOL: &str = "sec-websocket-protocol";

/// The most offers of one extension, and the most subprotocols.
const OFFERS_MAX: usize = 8;
const PROTOCOLS_MAX: usize = 64;

/// What is wrong with a handshake. The text goes to the client and into the log; it holds nothing
/// of what was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum HandshakeError {
    #[error("a WebSocket begins with GET over HTTP/1.1, without a body")]
    Request,
    #[error("Upgrade is not exactly `websocket`")]
    Upgrade,
    #[error("Connection does not name Upgrade")]
    Connection,
    #[error("Sec-WebSocket-Key is not 16 bytes in base64, once")]
    Key,
    #[error("Sec-WebSocket-Version is not 13, once")]
    Version,
    #[error("Sec-WebSocket-Protocol is not a list of different names")]
    Protocols,
    #[error("Sec-WebSocket-Extensions is malformed")]
    Extensions,
    #[error("Sec-WebSocket-Accept does not fit the key")]
    Accept,
    #[error("the server chose a subprotocol that was not offered")]
    Protocol,
    #[error("the server chose an extension that was not offered")]
    Extension,
    #[error("the server answered with parameters of permessage-deflate that were not offered")]
    Parameters,
}

/// What a client asks for.
#[derive(Debug)]
pub(crate) struct Offer {
    /// The `Sec-WebSocket-Accept` that answers its key.
    accept: String,
    protocols: Vec<String>,
    deflate: Vec<Deflate>,
}

/// What both sides have agreed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Agreed {
    /// With `permessage-deflate`: whether the client's compressed messages may refer to those
    /// before them.
    pub(super) takeover: Option<bool>,
}

/// Parameters of `permessage-deflate` (RFC 7692, section 7.1).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Deflate {
    server_no_context_takeover: bool,
    client_no_context_takeover: bool,
    server_max_window_bits: Option<u8>,
    client_max_window_bits: Bits,
}

/// `client_max_window_bits`, which may stand without a value in an offer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Bits {
    #[default]
    Absent,
    Any,
    Most(u8),
}

impl Offer {
    /// Whether the request asks for a WebSocket and nothing else, well or badly.
    pub(crate) fn is_asked(head: &RequestHead) -> bool {
        let mut members = head.fields.members("upgrade").peekable();
        members.peek().is_some() && members.all(|one| one.eq_ignore_ascii_case(b"websocket"))
    }

    /// Reads what the client asks for.
    pub(crate) fn read(head: &RequestHead) -> Result<Self, HandshakeError> {
        let empty = matches!(head.framing, Framing::Empty | Framing::Length(0));
        if head.method() != "GET" || head.minor == 0 || !empty {
            return Err(HandshakeError::Request);
        }
        check_upgrade(&head.fields)?;
        let key = one(&head.fields, "sec-websocket-key").ok_or(HandshakeError::Key)?;
        // As many characters as 16 bytes take, so that nothing long is decoded.
        let bytes = (key.len() == 24).then(|| BASE64_STANDARD.decode(key).ok()).flatten();
        if bytes.is_none_or(|bytes| bytes.len() != 16) {
            return Err(HandshakeError::Key);
        }
        if one(&head.fields, "sec-websocket-version") != Some(b"13") {
            return Err(HandshakeError::Version);
        }
        let mut protocols: Vec<String> = Vec::new();
        for member in head.fields.members(PROTOCOL) {
            let name = token(member).ok_or(HandshakeError::Protocols)?;
            if protocols.len() >= PROTOCOLS_MAX || protocols.iter().any(|other| other == name) {
                return Err(HandshakeError::Protocols);
            }
            protocols.push(name.to_owned());
        }
        let offered = extensions(&head.fields)?;
        // What we cannot read is not offered; a server would have to decline what is malformed.
        let deflate = offered.iter().filter(|one| one.name == "permessage-deflate");
        let deflate: Vec<_> = deflate.filter_map(Deflate::read).take(OFFERS_MAX).collect();
        Ok(Self { accept: accept(key), protocols, deflate })
    }

    /// The extensions to offer to the server in place of the client's.
    pub(crate) fn extensions(&self) -> String {
        let offers: Vec<_> = self.deflate.iter().map(ToString::to_string).collect();
        offers.join(", ")
    }

    /// Checks a 101 against what was offered.
    pub(crate) fn agree(&self, head: &ResponseHead) -> Result<Agreed, HandshakeError> {
        check_upgrade(&head.fields)?;
        if one(&head.fields, "sec-websocket-accept") != Some(self.accept.as_bytes()) {
            return Err(HandshakeError::Accept);
        }
        if head.fields.has(PROTOCOL) {
            let chosen = one(&head.fields, PROTOCOL).unwrap_or_default();
            if !self.protocols.iter().any(|offered| offered.as_bytes() == chosen) {
                return Err(HandshakeError::Protocol);
            }
        }
        let answered = extensions(&head.fields)?;
        let takeover = match answered.as_slice() {
            [] => None,
            [one] if one.name == "permessage-deflate" && !self.deflate.is_empty() => {
                let answer = Deflate::read(one).ok_or(HandshakeError::Parameters)?;
                if !self.deflate.iter().any(|offer| answer.fits(*offer)) {
                    return Err(HandshakeError::Parameters);
                }
                Some(!answer.client_no_context_takeover)
            }
            _ => return Err(HandshakeError::Extension),
        };
        Ok(Agreed { takeover })
    }
}

impl Deflate {
    /// `None`: a parameter that is unknown, twice there, or has a value that it must not have.
    fn read(extension: &Extension<'_>) -> Option<Self> {
        let mut read = Self::default();
        let bits = |value: &str| match value {
            "8" | "9" | "10" | "11" | "12" | "13" | "14" | "15" => value.parse::<u8>().ok(),
            _ => None,
        };
        for (name, value) in &extension.parameters {
            let twice = match (*name, value) {
                ("server_no_context_takeover", None) => {
                    std::mem::replace(&mut read.server_no_context_takeover, true)
                }
                ("client_no_context_takeover", None) => {
                    std::mem::replace(&mut read.client_no_context_takeover, true)
                }
                ("server_max_window_bits", Some(value)) => {
                    read.server_max_window_bits.replace(bits(value)?).is_some()
                }
                ("client_max_window_bits", value) => {
                    let bits = match value {
                        None => Bits::Any,
                        Some(value) => Bits::Most(bits(value)?),
                    };
                    std::mem::replace(&mut read.client_max_window_bits, bits) != Bits::Absent
                }
                _ => return None,
            };
            if twice {
                return None;
            }
        }
        Some(read)
    }

    /// Whether this answers that offer.
    fn fits(self, offer: Self) -> bool {
        let server = match (offer.server_max_window_bits, self.server_max_window_bits) {
            (None, _) => true,
            (Some(most), Some(bits)) => bits <= most,
            (Some(_), None) => false,
        };
        let client = match (offer.client_max_window_bits, self.client_max_window_bits) {
            (_, Bits::Absent) | (Bits::Any, Bits::Most(_)) => true,
            // In an answer it has a value.
            (Bits::Absent, _) | (_, Bits::Any) => false,
            (Bits::Most(most), Bits::Most(bits)) => bits <= most,
        };
        let takeover = self.server_no_context_takeover || !offer.server_no_context_takeover;
        server && client && takeover
    }
}

impl fmt::Display for Deflate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("permessage-deflate")?;
        if self.server_no_context_takeover {
            f.write_str("; server_no_context_takeover")?;
        }
        if self.client_no_context_takeover {
            f.write_str("; client_no_context_takeover")?;
        }
        if let Some(bits) = self.server_max_window_bits {
            write!(f, "; server_max_window_bits={bits}")?;
        }
        match self.client_max_window_bits {
            Bits::Most(bits) => write!(f, "; client_max_window_bits={bits}"),
            Bits::Any => f.write_str("; client_max_window_bits"),
            Bits::Absent => Ok(()),
        }
    }
}

/// One entry of `Sec-WebSocket-Extensions`.
#[derive(Debug, PartialEq, Eq)]
struct Extension<'a> {
    name: &'a str,
    parameters: Vec<(&'a str, Option<&'a str>)>,
}

fn extensions(fields: &Fields) -> Result<Vec<Extension<'_>>, HandshakeError> {
    let mut all = Vec::new();
    for value in fields.all(EXTENSIONS) {
        list(value, &mut all).ok_or(HandshakeError::Extensions)?;
    }
    Ok(all)
}

/// Reads `name; parameter; parameter=value, …`, where a value may stand in quotes but must be a
/// token all the same (RFC 6455, section 9.1).
fn list<'a>(value: &'a [u8], all: &mut Vec<Extension<'a>>) -> Option<()> {
    // No token holds a comma, a semicolon or a quote, so that none of them is part of a value.
    for member in value.split(|byte| *byte == b',').map(<[u8]>::trim_ascii) {
        if member.is_empty() {
            continue;
        }
        let mut parts = member.split(|byte| *byte == b';').map(<[u8]>::trim_ascii);
        let name = token(parts.next()?)?;
        let mut parameters = Vec::new();
        for part in parts {
            parameters.push(match part.iter().position(|byte| *byte == b'=') {
                None => (token(part)?, None),
                Some(at) => {
                    let value = part[at + 1..].trim_ascii();
                    let bare = value.strip_prefix(b"\"").map(|rest| rest.strip_suffix(b"\""));
                    (token(part[..at].trim_ascii())?, Some(token(bare.unwrap_or(Some(value))?)?))
                }
            });
        }
        all.push(Extension { name, parameters });
    }
    Some(())
}

/// A name of HTTP's grammar (RFC 9110, section 5.6.2).
fn token(bytes: &[u8]) -> Option<&str> {
    let good = |byte: &u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(byte);
    let token = !bytes.is_empty() && bytes.iter().all(good);
    if token { std::str::from_utf8(bytes).ok() } else { None }
}

fn check_upgrade(fields: &Fields) -> Result<(), HandshakeError> {
    if !one(fields, "upgrade").is_some_and(|one| one.eq_ignore_ascii_case(b"websocket")) {
        return Err(HandshakeError::Upgrade);
    }
    if fields.connection("upgrade") { Ok(()) } else { Err(HandshakeError::Connection) }
}

/// The value of a field that is there once.
fn one<'a>(fields: &'a Fields, name: &'a str) -> Option<&'a [u8]> {
    let mut values = fields.all(name);
    let value = values.next()?;
    if values.next().is_some() { None } else { Some(value) }
}

fn accept(key: &[u8]) -> String {
    let mut sum = digest::Context::new(&digest::SHA1_FOR_LEGACY_USE_ONLY);
    sum.update(key);
    sum.update(GUID);
    BASE64_STANDARD.encode(sum.finish())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proxy::http::head::tests as head;

    const GOOD: &str = "GET /chat HTTP/1.1\r\nHost: h\r\nUpgrade: WebSocket\r\n\
                        Connection: keep-alive, Upgrade\r\n\
                        Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
                        Sec-WebSocket-Version: 13\r\n";
    const ANSWER: &str = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\
                          Connection: Upgrade\r\n\
                          Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n";

    fn read(head: &str) -> Result<Offer, HandshakeError> {
        Offer::read(&head::request(&format!("{head}\r\n")).expect("head"))
    }

    fn agree(offer: &Offer, more: &str) -> Result<Agreed, HandshakeError> {
        let answer = format!("{ANSWER}{more}\r\n");
        offer.agree(&head::response(&answer, "GET").expect("head"))
    }

    #[test]
    fn the_rfcs_example() {
        let offer = read(GOOD).expect("good");
        assert_eq!(agree(&offer, ""), Ok(Agreed { takeover: None }));
        assert_eq!(offer.extensions(), "");
    }

    #[test]
    fn requests_that_are_not_whole() {
        for (from, to, error) in [
            ("GET ", "POST ", HandshakeError::Request),
            ("GET ", "get ", HandshakeError::Request),
            ("HTTP/1.1", "HTTP/1.0", HandshakeError::Request),
            ("Host: h\r\n", "Host: h\r\nContent-Length: 1\r\n", HandshakeError::Request),
            ("Upgrade: WebSocket", "Upgrade: websocket, h2c", HandshakeError::Upgrade),
            ("Upgrade: WebSocket", "Upgrade: x\r\nUpgrade: websocket", HandshakeError::Upgrade),
            ("keep-alive, Upgrade", "keep-alive", HandshakeError::Connection),
            ("dGhlIHNhbXBsZSBub25jZQ==", "dGhlIHNhbXBsZSBub25jZQ", HandshakeError::Key),
            ("dGhlIHNhbXBsZSBub25jZQ==", "dGhlIHNhbXBsZSBub25jZTEy", HandshakeError::Key),
            ("dGhlIHNhbXBsZSBub25jZQ==", "", HandshakeError::Key),
            ("Version: 13", "Version: 8", HandshakeError::Version),
            ("Version: 13", "Version: 13\r\nSec-WebSocket-Version: 13", HandshakeError::Version),
            ("Host", "Sec-WebSocket-Protocol: a, a\r\nHost", HandshakeError::Protocols),
            ("Host", "Sec-WebSocket-Protocol: a b\r\nHost", HandshakeError::Protocols),
            ("Host", "Sec-WebSocket-Extensions: a;\r\nHost", HandshakeError::Extensions),
            ("Host", "Sec-WebSocket-Extensions: a;b=\"c\r\nHost", HandshakeError::Extensions),
            ("Host", "Sec-WebSocket-Extensions: a;b=\"c,d\"\r\nHost", HandshakeError::Extensions),
        ] {
            assert_eq!(read(&GOOD.replacen(from, to, 1)).err(), Some(error), "{to}");
        }
        let key = format!("{GOOD}Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n");
        assert_eq!(read(&key).err(), Some(HandshakeError::Key));
    }

    #[test]
    fn only_what_can_be_read_is_offered() {
        for (offered, sent) in [
            ("permessage-deflate", "permessage-deflate"),
            (
                "permessage-deflate; client_max_window_bits",
                "permessage-deflate; client_max_window_bits",
            ),
            (
                "x-webkit-deflate-frame, permessage-deflate;client_max_window_bits=\"9\" , , bbf;a=1",
                "permessage-deflate; client_max_window_bits=9",
            ),
            (
                "permessage-deflate; server_no_context_takeover; server_max_window_bits=10, \
                 permessage-deflate; client_no_context_takeover",
                "permessage-deflate; server_no_context_takeover; server_max_window_bits=10, \
                 permessage-deflate; client_no_context_takeover",
            ),
            ("permessage-deflate; mux", ""),
            ("permessage-deflate; server_max_window_bits", ""),
            ("permessage-deflate; server_max_window_bits=7", ""),
            ("permessage-deflate; server_max_window_bits=09", ""),
            ("permessage-deflate; client_max_window_bits=16", ""),
            ("permessage-deflate; client_no_context_takeover=1", ""),
            ("permessage-deflate; client_max_window_bits; client_max_window_bits=9", ""),
            ("permessage-bzip2", ""),
        ] {
            let offer = read(&format!("{GOOD}Sec-WebSocket-Extensions: {offered}\r\n"));
            assert_eq!(offer.expect(offered).extensions(), sent, "{offered}");
        }
    }

    #[test]
    fn answers_that_fit_and_those_that_do_not() {
        let offer = |offered: &str| {
            read(&format!("{GOOD}Sec-WebSocket-Extensions: {offered}\r\n")).expect("good")
        };
        let answer = |offer: &Offer, chosen: &str| {
            agree(offer, &format!("Sec-WebSocket-Extensions: {chosen}\r\n"))
        };
        let plain = offer("permessage-deflate");
        let takeover = |takeover| Ok(Agreed { takeover: Some(takeover) });
        assert_eq!(answer(&plain, "permessage-deflate"), takeover(true));
        assert_eq!(
            answer(&plain, "permessage-deflate; client_no_context_takeover"),
            takeover(false)
        );
        assert_eq!(answer(&plain, "permessage-deflate; server_max_window_bits=9"), takeover(true));
        let bits =
            offer("permessage-deflate; server_max_window_bits=10; client_max_window_bits=12");
        let fits = "permessage-deflate; server_max_window_bits=10; client_max_window_bits=8";
        assert_eq!(answer(&bits, fits), takeover(true));
        for (offer, chosen) in [
            (&plain, "permessage-deflate; client_max_window_bits=9"),
            (&plain, "permessage-deflate; client_max_window_bits"),
            (&plain, "permessage-deflate; other"),
            (&bits, "permessage-deflate"),
            (&bits, "permessage-deflate; server_max_window_bits=11"),
            (&bits, "permessage-deflate; server_max_window_bits=9; client_max_window_bits=13"),
            (&offer("permessage-deflate; server_no_context_takeover"), "permessage-deflate"),
        ] {
            assert_eq!(answer(offer, chosen), Err(HandshakeError::Parameters), "{chosen}");
        }
        let two = "permessage-deflate, permessage-deflate";
        assert_eq!(answer(&plain, two), Err(HandshakeError::Extension));
        assert_eq!(answer(&plain, "bbf"), Err(HandshakeError::Extension));
        let none = read(GOOD).expect("good");
        assert_eq!(answer(&none, "permessage-deflate"), Err(HandshakeError::Extension));
    }

    #[test]
    fn answers_to_another_question() {
        let offer = read(GOOD).expect("good");
        let chosen = "Sec-WebSocket-Protocol: chat\r\n";
        assert_eq!(agree(&offer, chosen), Err(HandshakeError::Protocol));
        let offer = read(&format!("{GOOD}Sec-WebSocket-Protocol: chat, super\r\n")).expect("good");
        assert_eq!(agree(&offer, chosen), Ok(Agreed { takeover: None }));
        assert_eq!(agree(&offer, &chosen.repeat(2)), Err(HandshakeError::Protocol));
        assert_eq!(agree(&offer, &chosen.replace("chat", "Chat")), Err(HandshakeError::Protocol));
        for (from, to, error) in [
            ("s3pP", "S3pP", HandshakeError::Accept),
            ("Sec-WebSocket-Accept", "X", HandshakeError::Accept),
            ("Upgrade: websocket", "Upgrade: h2c", HandshakeError::Upgrade),
            ("Connection: Upgrade", "Connection: close", HandshakeError::Connection),
        ] {
            let answer = ANSWER.replacen(from, to, 1) + "\r\n";
            let answer = head::response(&answer, "GET").expect("head");
            assert_eq!(offer.agree(&answer), Err(error), "{to}");
        }
    }
}

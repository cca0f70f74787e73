//! Frames: their headers, read strictly (RFC 6455, section 5), and the close codes.

/// The longest header in bytes: two bytes, a length of eight, a key of four.
pub(super) const HEADER_MAX: usize = 14;

/// The longest payload of a control frame in bytes.
pub(super) const CONTROL_MAX: usize = 125;

/// What is wrong with what a peer sent. The text goes to the client and into the log; it holds
/// nothing of what was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Violation {
    #[error("client frame without a mask")]
    NotMasked,
    #[error("masked frame from the server")]
    Masked,
    #[error("reserved bit that no extension gave a meaning")]
    ReservedBit,
    #[error("reserved opcode")]
    ReservedOpcode,
    #[error("fragmented control frame")]
    FragmentedControl,
    #[error("control frame of more than 125 bytes")]
    LongControl,
    #[error("frame length not in its shortest form")]
    LongLength,
    #[error("frame length with its first bit set")]
    HugeLength,
    #[error("continuation of nothing")]
    Continuation,
    #[error("new message within a message")]
    Interrupted,
    #[error("close frame that is malformed")]
    Close,
    #[error("data behind a close frame")]
    AfterClose,
    #[error("text that is not UTF-8")]
    Utf8,
    #[error("malformed compressed message")]
    Deflate,
    #[error("message is too long")]
    TooLong,
    #[error("message has too many fragments")]
    TooManyFragments,
    #[error("message did not arrive in time")]
    Timeout,
    #[error("too many long messages at a time")]
    Busy,
}

impl Violation {
    /// What a close frame says about it (RFC 6455, section 7.4).
    pub(super) fn code(self) -> u16 {
        match self {
            Self::Utf8 | Self::Deflate => 1007,
            Self::TooManyFragments | Self::Timeout => 1008,
            Self::TooLong => 1009,
            Self::Busy => 1013,
            _ => 1002,
        }
    }
}

/// Who sent a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    /// Masks.
    Client,
    /// Does not.
    Server,
}

/// What a frame is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Opcode {
    Continuation,
    Text,
    Binary,
    Close,
    Ping,
    Pong,
}

impl Opcode {
    fn read(bits: u8) -> Option<Self> {
        Some(match bits {
            0x0 => Self::Continuation,
            0x1 => Self::Text,
            0x2 => Self::Binary,
            0x8 => Self::Close,
            0x9 => Self::Ping,
            0xA => Self::Pong,
            _ => return None,
        })
    }

    fn bits(self) -> u8 {
        match self {
            Self::Continuation => 0x0,
            Self::Text => 0x1,
            Self::Binary => 0x2,
            Self::Close => 0x8,
            Self::Ping => 0x9,
            Self::Pong => 0xA,
        }
    }

    pub(super) fn is_control(self) -> bool {
        matches!(self, Self::Close | Self::Ping | Self::Pong)
    }
}

/// A frame's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    /// The last frame of its message.
    pub(super) fin: bool,
    /// The message is compressed.
    pub(super) compressed: bool,
    pub(super) opcode: Opcode,
    /// The payload's length in bytes.
    pub(super) length: u64,
    /// The client's key; zero, which changes nothing, for a server's frame.
    pub(super) key: [u8; 4],
}

impl Header {
    /// Reads the header at the start of `data`, and says how long it is; `None` when it takes more
    /// to tell. `deflate`: whether `permessage-deflate` was agreed on.
    ///
    /// What can be refused by its first byte is.
    pub(super) fn read(
        data: &[u8],
        from: Side,
        deflate: bool,
    ) -> Result<Option<(Self, usize)>, Violation> {
        let Some(&first) = data.first() else { return Ok(None) };
        let opcode = Opcode::read(first & 0x0F).ok_or(Violation::ReservedOpcode)?;
        let (fin, compressed) = (first & 0x80 != 0, first & 0x40 != 0);
        // Compression is said once, in a message's first frame (RFC 7692, section 6).
        let may_compress = deflate && matches!(opcode, Opcode::Text | Opcode::Binary);
        if first & 0x30 != 0 || (compressed && !may_compress) {
            return Err(Violation::ReservedBit);
        }
        if opcode.is_control() && !fin {
            return Err(Violation::FragmentedControl);
        }
        let Some(&second) = data.get(1) else { return Ok(None) };
        match (from, second & 0x80 != 0) {
            (Side::Client, false) => return Err(Violation::NotMasked),
            (Side::Server, true) => return Err(Violation::Masked),
            _ => {}
        }
        let short = second & 0x7F;
        if opcode.is_control() && usize::from(short) > CONTROL_MAX {
            return Err(Violation::LongControl);
        }
        let (length, mut size) = match short {
            126 => {
                let Some(bytes) = data.get(2..4) else { return Ok(None) };
                (be(bytes), 4)
            }
            127 => {
                let Some(bytes) = data.get(2..10) else { return Ok(None) };
                (be(bytes), 10)
            }
            short => (u64::from(short), 2),
        };
        let shortest = match size {
            4 => length > 125,
            10 => length > 0xFFFF,
            _ => true,
        };
        if length >> 63 != 0 {
            return Err(Violation::HugeLength);
        }
        if !shortest {
            return Err(Violation::LongLength);
        }
        let mut key = [0; 4];
        if from == Side::Client {
            let Some(bytes) = data.get(size..size + 4) else { return Ok(None) };
            key.copy_from_slice(bytes);
            size += 4;
        }
        Ok(Some((Self { fin, compressed, opcode, length, key }, size)))
    }
}

fn be(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |number, byte| (number << 8) | u64::from(*byte))
}

/// A whole frame's header, as we write it: one frame, nothing compressed. `key` masks, towards the
/// server. Returns the bytes and how many of them count.
pub(super) fn header(
    opcode: Opcode,
    length: usize,
    key: Option<[u8; 4]>,
) -> ([u8; HEADER_MAX], usize) {
    let mut out = [0; HEADER_MAX];
    out[0] = 0x80 | opcode.bits();
    let mut size = 2;
    match u16::try_from(length) {
        Ok(short @ 0..=125) => out[1] = short.to_be_bytes()[1],
        Ok(long) => {
            out[1] = 126;
            out[2..4].copy_from_slice(&long.to_be_bytes());
            size = 4;
        }
        Err(_) => {
            out[1] = 127;
            out[2..10].copy_from_slice(&(length as u64).to_be_bytes());
            size = 10;
        }
    }
    if let Some(key) = key {
        out[1] |= 0x80;
        out[size..size + 4].copy_from_slice(&key);
        size += 4;
    }
    (out, size)
}

/// A control frame. What is longer than a control frame may be is cut.
pub(super) fn control(opcode: Opcode, payload: &[u8], key: Option<[u8; 4]>) -> Vec<u8> {
    let payload = &payload[..payload.len().min(CONTROL_MAX)];
    let (header, size) = header(opcode, payload.len(), key);
    let mut out = header[..size].to_vec();
    out.extend_from_slice(payload);
    if let Some(key) = key {
        mask(&mut out[size..], key, 0);
    }
    out
}

/// The payload of a close frame with a code and a reason, which is ASCII and is cut where it is too
/// long.
pub(super) fn close(code: u16, reason: &str) -> Vec<u8> {
    let reason = reason.as_bytes();
    let mut out = code.to_be_bytes().to_vec();
    out.extend_from_slice(&reason[..reason.len().min(CONTROL_MAX - 2)]);
    out
}

/// Masks or unmasks: the same. `at` is where in the frame's payload `data` begins.
pub(super) fn mask(data: &mut [u8], mut key: [u8; 4], at: u64) {
    // Below 4.
    key.rotate_left(usize::try_from(at % 4).unwrap_or(0));
    let mut words = data.chunks_exact_mut(4);
    let word = u32::from_ne_bytes(key);
    for four in &mut words {
        let mut bytes = [0; 4];
        bytes.copy_from_slice(four);
        four.copy_from_slice(&(u32::from_ne_bytes(bytes) ^ word).to_ne_bytes());
    }
    for (byte, key) in words.into_remainder().iter_mut().zip(key) {
        *byte ^= key;
    }
}

/// Checks a close frame's payload: nothing, or a code that may be sent and text.
pub(super) fn check_close(payload: &[u8]) -> Result<(), Violation> {
    let code = match payload {
        [] => return Ok(()),
        [_] => return Err(Violation::Close),
        [high, low, ..] => u16::from_be_bytes([*high, *low]),
    };
    if !matches!(code, 1000..=1003 | 1007..=1014 | 3000..=4999) {
        return Err(Violation::Close);
    }
    std::str::from_utf8(&payload[2..]).map(drop).map_err(|_| Violation::Utf8)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(data: &[u8], from: Side) -> Result<Option<(Header, usize)>, Violation> {
        Header::read(data, from, true)
    }

    #[test]
    fn headers() {
        let (header, size) = read(b"\xC1\xFE\x01\x00abcd", Side::Client).unwrap().unwrap();
        assert_eq!((header.length, size, header.key), (256, 8, *b"abcd"));
        assert!(header.fin && header.compressed && header.opcode == Opcode::Text);
        let (header, size) = read(b"\x02\x7F\0\0\0\0\0\x01\0\0", Side::Server).unwrap().unwrap();
        assert_eq!((header.length, size, header.fin), (65536, 10, false));
    }

    #[test]
    fn what_is_wrong_is_said_as_soon_as_it_shows() {
        for (data, side, violation) in [
            (&b"\x83"[..], Side::Client, Violation::ReservedOpcode),
            (b"\x8B", Side::Server, Violation::ReservedOpcode),
            (b"\x91", Side::Client, Violation::ReservedBit),
            (b"\xA1", Side::Client, Violation::ReservedBit),
            (b"\xC0", Side::Client, Violation::ReservedBit),
            (b"\xC9", Side::Client, Violation::ReservedBit),
            (b"\x08", Side::Client, Violation::FragmentedControl),
            (b"\x81\x01", Side::Client, Violation::NotMasked),
            (b"\x81\x81", Side::Server, Violation::Masked),
            (b"\x89\xFE", Side::Client, Violation::LongControl),
            (b"\x81\xFE\0\x7D", Side::Client, Violation::LongLength),
            (b"\x81\xFF\0\0\0\0\0\0\xFF\xFF", Side::Client, Violation::LongLength),
            (b"\x81\xFF\x80\0\0\0\0\x01\0\0", Side::Client, Violation::HugeLength),
        ] {
            assert_eq!(read(data, side), Err(violation), "{data:x?}");
            for length in 0..data.len() {
                assert!(matches!(read(&data[..length], side), Ok(None)), "{data:x?} {length}");
            }
        }
        assert_eq!(Header::read(b"\xC1", Side::Client, false), Err(Violation::ReservedBit));
    }

    #[test]
    fn close_payloads() {
        for good in [&b""[..], b"\x03\xE8", b"\x03\xF0no rule", b"\x0F\xA0", b"\x13\x87\xC3\xA9"] {
            assert_eq!(check_close(good), Ok(()), "{good:x?}");
        }
        for bad in [&b"\x03"[..], b"\0\0", b"\x03\xEC", b"\x03\xED", b"\x03\xF7", b"\x07\xD0"] {
            assert_eq!(check_close(bad), Err(Violation::Close), "{bad:x?}");
        }
        assert_eq!(check_close(b"\x03\xE8\xC3"), Err(Violation::Utf8));
        assert_eq!(close(1008, &"x".repeat(999)).len(), CONTROL_MAX);
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(
            length in prop_oneof![0..200_usize, 65_000..66_000_usize],
            key in any::<Option<[u8; 4]>>(),
        ) {
            let (bytes, size) = header(Opcode::Binary, length, key);
            let side = if key.is_some() { Side::Client } else { Side::Server };
            let (read, read_size) = read(&bytes[..size], side).unwrap().unwrap();
            prop_assert_eq!(read_size, size);
            prop_assert_eq!(read.length, length as u64);
            prop_assert_eq!(read.key, key.unwrap_or_default());
            prop_assert!(read.fin && !read.compressed && read.opcode == Opcode::Binary);
        }

        #[test]
        fn masking_in_pieces_is_masking(
            data in prop::collection::vec(any::<u8>(), 0..70),
            key in any::<[u8; 4]>(),
            cut in 0..70_usize,
        ) {
            let simple: Vec<u8> = data.iter().zip(key.iter().cycle()).map(|(b, k)| b ^ k).collect();
            let cut = cut.min(data.len());
            let mut pieces = data.clone();
            mask(&mut pieces[..cut], key, 0);
            mask(&mut pieces[cut..], key, cut as u64);
            prop_assert_eq!(pieces, simple);
        }
    }
}

//! The reader of the client's frames, fed in all sorts of pieces.

use miniz_oxide::deflate::core::{
    CompressorOxide, TDEFLFlush, TDEFLStatus, compress, create_comp_flags_from_zip_params,
};
use proptest::prelude::*;

use super::*;

pub(in crate::proxy::l7::websocket) const KEY: [u8; 4] = *b"\x1f\x80\x00\xc3";

/// A client's frame. `first` is its first byte.
pub(in crate::proxy::l7::websocket) fn client(first: u8, payload: &[u8]) -> Vec<u8> {
    let (mut header, size) = frame::header(Opcode::Text, payload.len(), Some(KEY));
    header[0] = first;
    let mut out = header[..size].to_vec();
    out.extend_from_slice(payload);
    frame::mask(&mut out[size..], KEY, 0);
    out
}

/// The client's compressor.
pub(in crate::proxy::l7::websocket) struct Deflater(Box<CompressorOxide>);

impl Deflater {
    pub(in crate::proxy::l7::websocket) fn new() -> Self {
        // Negative: no zlib header.
        let flags = create_comp_flags_from_zip_params(6, -15, 0);
        Self(Box::new(CompressorOxide::new(flags)))
    }

    /// One message, without the four bytes that end it.
    pub(in crate::proxy::l7::websocket) fn message(&mut self, text: &[u8]) -> Vec<u8> {
        let mut out = vec![0; text.len() + text.len() / 8 + 256];
        let (status, read, written) = compress(&mut self.0, text, &mut out, TDEFLFlush::Sync);
        assert_eq!((status, read), (TDEFLStatus::Okay, text.len()));
        out.truncate(written);
        assert!(out.ends_with(&[0, 0, 0xFF, 0xFF]));
        out.truncate(written - 4);
        out
    }
}

/// What comes of `bytes`, fed in pieces that end at `cuts` (modulo the length).
pub(in crate::proxy::l7::websocket) fn read(
    messages: &mut Messages,
    bytes: &[u8],
    cuts: &[usize],
) -> Result<Vec<(Item, Vec<u8>)>, Violation> {
    let mut ends: Vec<usize> = cuts.iter().map(|cut| cut % (bytes.len() + 1)).collect();
    ends.push(bytes.len());
    ends.sort_unstable();
    let (mut at, mut items) = (0, Vec::new());
    for end in ends {
        loop {
            let (used, item) = messages.feed(&bytes[at..end])?;
            at += used;
            match item {
                Some(item @ (Item::Text | Item::Binary)) => {
                    items.push((item, messages.message().to_vec()));
                    messages.sent()?;
                }
                Some(item) => items.push((item, messages.control().to_vec())),
                None if used == 0 => break,
                None => {}
            }
        }
    }
    Ok(items)
}

fn all(takeover: Option<bool>, bytes: &[u8]) -> Result<Vec<(Item, Vec<u8>)>, Violation> {
    read(&mut Messages::new(takeover), bytes, &[])
}

fn text(content: &[u8]) -> (Item, Vec<u8>) {
    (Item::Text, content.to_vec())
}

#[test]
fn messages_and_what_comes_between_their_fragments() {
    let bytes = [
        client(0x81, b"one"),
        client(0x01, b"t\xC3"),
        client(0x89, b"ping"),
        client(0x00, b""),
        client(0x8A, b""),
        client(0x80, b"\xA9wo"),
        client(0x82, b"\xFF"),
        client(0x81, b""),
        client(0x88, b"\x03\xE8bye"),
    ]
    .concat();
    let expected = vec![
        text(b"one"),
        (Item::Ping, b"ping".to_vec()),
        (Item::Pong, Vec::new()),
        text("t\u{e9}wo".as_bytes()),
        (Item::Binary, b"\xFF".to_vec()),
        text(b""),
        (Item::Close, b"\x03\xE8bye".to_vec()),
    ];
    assert_eq!(all(None, &bytes), Ok(expected));
}

#[test]
fn what_is_refused() {
    let far = [&b"\xCA\x7E"[..], &[0]].concat();
    for (bytes, violation) in [
        (client(0x80, b"x"), Violation::Continuation),
        ([client(0x01, b"x"), client(0x81, b"y")].concat(), Violation::Interrupted),
        ([client(0x02, b"x"), client(0x02, b"y")].concat(), Violation::Interrupted),
        (client(0x81, b"\xC3"), Violation::Utf8),
        (client(0x81, b"\xED\xA0\x80"), Violation::Utf8),
        ([client(0x88, b""), client(0x89, b"")].concat(), Violation::AfterClose),
        ([client(0x88, b""), vec![0]].concat(), Violation::AfterClose),
        (client(0x88, b"\x03"), Violation::Close),
        (client(0x88, b"\x03\xEE"), Violation::Close),
        (client(0xC9, b""), Violation::ReservedBit),
        ([client(0x01, b"x"), client(0xC0, b"y")].concat(), Violation::ReservedBit),
        // A block type that does not exist; nothing at all; half a block.
        (client(0xC1, b"\x06"), Violation::Deflate),
        (client(0xC1, b""), Violation::Deflate),
        (client(0xC1, b"\xF2\x48\xCD"), Violation::Deflate),
        // A stored block that is longer than its message.
        (client(0xC1, b"\x00\x05\x00\xFA\xFFHel"), Violation::Deflate),
        // RFC 7692, 7.2.3.4: a last block, and what may follow it.
        (client(0xC1, b"\xF3\x48\xCD\xC9\xC9\x07\x00\x00"), Violation::Deflate),
        // Refers to before the first message: RFC 7692, 7.2.3.2, second message.
        (client(0xC1, b"\xF2\x00\x11\x00\x00"), Violation::Deflate),
        (client(0xC1, &far), Violation::Deflate),
    ] {
        assert_eq!(all(Some(true), &bytes), Err(violation), "{bytes:x?}");
    }
    assert_eq!(all(None, &client(0xC1, b"\x00")), Err(Violation::ReservedBit));
}

/// The examples of RFC 7692, section 7.2.3.
#[test]
fn compressed_messages() {
    let hello = b"\xF2\x48\xCD\xC9\xC9\x07\x00";
    let again = b"\xF2\x00\x11\x00\x00";
    let stored = b"\x00\x05\x00\xFA\xFFHello\x00";
    let blocks = b"\xF2\x48\x05\x00\x00\x00\xFF\xFF\xCA\xC9\xC9\x07\x00";
    let bytes = [
        client(0x41, &hello[..3]),
        client(0x80, &hello[3..]),
        // Not compressed: no part of the window.
        client(0x81, b"between"),
        client(0xC1, again),
        client(0xC2, stored),
        client(0xC1, blocks),
        client(0xC1, b"\x00"),
    ]
    .concat();
    let hello_text = text(b"Hello");
    let expected = vec![
        hello_text.clone(),
        text(b"between"),
        hello_text.clone(),
        (Item::Binary, b"Hello".to_vec()),
        hello_text.clone(),
        text(b""),
    ];
    assert_eq!(all(Some(true), &bytes), Ok(expected));
    // Without takeover each message stands alone.
    let twice = [client(0xC1, hello), client(0xC1, hello)].concat();
    assert_eq!(all(Some(false), &twice), Ok(vec![hello_text.clone(), hello_text]));
    let twice = [client(0xC1, hello), client(0xC1, again)].concat();
    assert_eq!(all(Some(false), &twice), Err(Violation::Deflate));
}

#[test]
fn a_window_reaches_over_many_messages_and_no_further() {
    let noise = |seed: u64| -> Vec<u8> {
        let mut state = seed | 1;
        let step = |_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 56) as u8
        };
        (0..20_000).map(step).collect()
    };
    let (mut deflater, mut messages) = (Deflater::new(), Messages::new(Some(true)));
    for round in 0..6 {
        let data = noise(round % 2);
        let compressed = deflater.message(&data);
        // The second time it is all references.
        let items = read(&mut messages, &client(0xC2, &compressed), &[5, 999]);
        assert_eq!(items, Ok(vec![(Item::Binary, data)]));
    }
    let (inflater, _) = messages.inflater.as_mut().expect("made");
    assert_eq!(inflater.begin().len(), WINDOW);
}

#[test]
fn long_messages() {
    let most = vec![b'x'; MESSAGE_MAX];
    let more = vec![b'x'; MESSAGE_MAX + 1];
    assert_eq!(all(None, &client(0x81, &most)), Ok(vec![text(&most)]));
    // Known from its header.
    let begun = &client(0x81, &more)[..14];
    assert_eq!(all(None, begun), Err(Violation::TooLong));
    let halves = [client(0x01, &most), client(0x80, b"x")].concat();
    assert_eq!(all(None, &halves), Err(Violation::TooLong));
    let (mut one, mut other) = (Deflater::new(), Deflater::new());
    assert_eq!(all(Some(true), &client(0xC1, &one.message(&most))), Ok(vec![text(&most)]));
    assert_eq!(all(Some(true), &client(0xC1, &other.message(&more))), Err(Violation::TooLong));
    // Empty stored blocks: long and nothing in them.
    let empty = [0, 0, 0, 0xFF, 0xFF].repeat(MESSAGE_MAX / 5 + 20_000);
    assert_eq!(all(Some(true), &client(0xC1, &empty)), Err(Violation::TooLong));
    let fragments = [client(0x01, b""), client(0x00, b"").repeat(FRAGMENTS_MAX)].concat();
    assert_eq!(all(None, &fragments), Err(Violation::TooManyFragments));
}

/// A bomb costs what it may cost and no more.
#[test]
fn a_bomb_is_bounded() {
    let mut messages = Messages::new(Some(true));
    let bomb = client(0xC1, &Deflater::new().message(&vec![0; 64 * 1024 * 1024]));
    assert!(bomb.len() < 100_000);
    assert_eq!(read(&mut messages, &bomb, &[]), Err(Violation::TooLong));
    assert!(messages.buffer.bytes.capacity() <= MESSAGE_MAX + WINDOW + 64);
}

/// Both in one test: what is counted is one number for the process, and tests run side by side.
#[test]
fn shares_are_taken_and_given_back() {
    let mut held = Share::default();
    assert_eq!(held.set(POOL + 1), Err(Violation::Busy));
    assert_eq!(held.0, 0);
    let mut buffer = Buffer::default();
    buffer.begin(&[]).expect("begin");
    buffer.append(&[0; 1000], KEY, 0).expect("short");
    assert_eq!(buffer.share.0, 0);
    buffer.append(&vec![0; 100_000], KEY, 1000).expect("long");
    assert_eq!(buffer.share.0, buffer.bytes.len() - FREE);
    buffer.clear().expect("clear");
    assert_eq!((buffer.share.0, buffer.bytes.capacity()), (0, 0));
}

#[test]
fn what_goes_on_is_one_frame_with_the_same_content() {
    let mut messages = Messages::new(Some(true));
    let bytes = [
        client(0x41, b"\xF2\x48\xCD"),
        client(0x80, b"\xC9\xC9\x07\x00"),
        client(0xC1, b"\xF2\x00\x11\x00\x00"),
    ]
    .concat();
    let mut at = 0;
    let mut sent = Vec::new();
    while at < bytes.len() {
        let (used, item) = messages.feed(&bytes[at..]).expect("good");
        at += used;
        if item == Some(Item::Text) {
            sent.push(messages.wire(Opcode::Text, KEY).to_vec());
            messages.sent().expect("sent");
        }
    }
    assert_eq!(sent, [client(0x81, b"Hello"), client(0x81, b"Hello")]);
}

#[test]
fn the_servers_frames_are_followed() {
    let server = |first: u8, payload: &[u8]| {
        let (mut header, size) = frame::header(Opcode::Text, payload.len(), None);
        header[0] = first;
        [&header[..size], payload].concat()
    };
    let good = [
        server(0x41, b"\xF2\x48"),
        server(0x89, b""),
        server(0x80, b"x"),
        server(0x82, &vec![7; 70_000]),
        server(0x88, b"\x03\xE8"),
    ]
    .concat();
    let mut follower = Follower::new(true);
    assert_eq!(follower.pass(&good), Ok(good.len()));
    assert!(follower.between_frames() && follower.closed());
    assert_eq!(follower.pass(b"\x81"), Err(Violation::AfterClose));
    // In pieces: nothing is let through of a header that is not whole.
    let mut follower = Follower::new(true);
    let (mut from, mut passed) = (0, 0);
    for end in 0..=good.len() {
        passed += follower.pass(&good[from..end]).expect("good");
        from = passed;
    }
    assert_eq!(passed, good.len());
    for (bytes, violation) in [
        (client(0x81, b"x"), Violation::Masked),
        (server(0x80, b"x"), Violation::Continuation),
        (server(0xC9, b"x"), Violation::ReservedBit),
        (server(0x83, b"x"), Violation::ReservedOpcode),
    ] {
        let mut follower = Follower::new(true);
        let both = [server(0x82, b"before"), bytes].concat();
        assert_eq!(follower.pass(&both), Ok(8));
        assert_eq!(follower.pass(&both[8..]), Err(violation));
    }
    assert_eq!(Follower::new(false).pass(&server(0xC1, b"x")), Err(Violation::ReservedBit));
    // Only the frame that has begun.
    let mut follower = Follower::new(false);
    assert_eq!(follower.pass(&[0x82, 5, 1]), Ok(3));
    assert_eq!(follower.rest(&[2, 3, 4, 5, 0x82, 1]), 4);
    assert!(follower.between_frames() && !follower.closed());
}

proptest! {
    /// However the bytes come, they say the same.
    #[test]
    fn splits_change_nothing(
        contents in prop::collection::vec(("[a-c\u{e9}]{0,300}", any::<bool>(), 0..4_usize), 1..6),
        cuts in prop::collection::vec(any::<usize>(), 0..20),
    ) {
        let mut deflater = Deflater::new();
        let (mut bytes, mut expected) = (Vec::new(), Vec::new());
        for (content, compressed, fragments) in contents {
            let payload =
                if compressed { deflater.message(content.as_bytes()) } else { content.clone().into() };
            let mut first = if compressed { 0x41 } else { 0x01 };
            let mut rest = &payload[..];
            for _ in 0..fragments {
                let (part, after) = rest.split_at(rest.len() / 2);
                bytes.extend(client(first, part));
                bytes.extend(client(0x89, b"between"));
                expected.push((Item::Ping, b"between".to_vec()));
                (first, rest) = (0, after);
            }
            bytes.extend(client(first | 0x80, rest));
            expected.push(text(content.as_bytes()));
        }
        prop_assert_eq!(all(Some(true), &bytes), Ok(expected.clone()));
        prop_assert_eq!(read(&mut Messages::new(Some(true)), &bytes, &cuts), Ok(expected));
    }
}

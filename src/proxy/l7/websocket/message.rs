//! The client's frames, put together to messages: fed with bytes as they come, bounded in length,
//! in number of fragments, and in memory over all connections.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::deflate::{Inflater, WINDOW};
use super::frame::{self, HEADER_MAX, Header, Opcode, Side, Violation};

/// The longest message in bytes, decompressed.
pub(super) const MESSAGE_MAX: usize = 4 * 1024 * 1024;

/// The most frames in one message.
const FRAGMENTS_MAX: usize = 4096;

/// How much longer than itself a compressed message may be, in bytes: what cannot be compressed is
/// stored, with five bytes for each block.
const STORED: u64 = 64 * 1024;

/// What all messages that are being put together may hold at once, beside [`FREE`] for each
/// connection, in bytes.
const POOL: usize = 64 * 1024 * 1024;

/// What a connection holds without asking the pool, in bytes.
const FREE: usize = 16 * 1024;

/// What a decompressor holds in bytes: its window and its tables.
const INFLATER: usize = WINDOW + 16 * 1024;

static POOLED: AtomicUsize = AtomicUsize::new(0);

/// A share of the pool; given back when dropped.
#[derive(Default)]
struct Share(usize);

impl Share {
    /// Makes the share this large.
    fn set(&mut self, size: usize) -> Result<(), Violation> {
        let old = self.0;
        if size > old {
            let add = size - old;
            let taken = POOLED.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |pooled| {
                pooled.checked_add(add).filter(|sum| *sum <= POOL)
            });
            taken.map_err(|_| Violation::Busy)?;
        } else {
            POOLED.fetch_sub(old - size, Ordering::Relaxed);
        }
        self.0 = size;
        Ok(())
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        POOLED.fetch_sub(self.0, Ordering::Relaxed);
    }
}

/// One message: room for a frame's header, what it may refer to, and the message itself.
#[derive(Default)]
pub(super) struct Buffer {
    bytes: Vec<u8>,
    /// Where the message begins and ends in `bytes`.
    start: usize,
    end: usize,
    share: Share,
}

impl Buffer {
    /// Begins a message behind `window`.
    fn begin(&mut self, window: &[u8]) -> Result<(), Violation> {
        self.start = HEADER_MAX + window.len();
        self.end = self.start;
        self.lengthen(self.start)?;
        self.bytes[HEADER_MAX..self.start].copy_from_slice(window);
        Ok(())
    }

    /// Has at least `length` bytes.
    fn lengthen(&mut self, length: usize) -> Result<(), Violation> {
        if length > self.bytes.len() {
            // One more, so that a message of exactly the limit ends before its room does.
            let most = self.start + MESSAGE_MAX + 1;
            if length > most {
                return Err(Violation::TooLong);
            }
            let length = self.bytes.len().saturating_mul(2).max(length).max(1024).min(most);
            self.share.set(length.saturating_sub(FREE))?;
            self.bytes.reserve_exact(length - self.bytes.len());
            self.bytes.resize(length, 0);
        }
        Ok(())
    }

    /// Appends masked bytes, the first of which is number `at` of its frame.
    fn append(&mut self, data: &[u8], key: [u8; 4], at: u64) -> Result<(), Violation> {
        let end = self.end + data.len();
        self.lengthen(end)?;
        let room = &mut self.bytes[self.end..end];
        room.copy_from_slice(data);
        frame::mask(room, key, at);
        self.end = end;
        Ok(())
    }

    /// Window, message and free room, and where the free room begins.
    pub(super) fn space(&mut self) -> Result<(&mut [u8], usize), Violation> {
        if self.end == self.bytes.len() {
            self.grow()?;
        }
        Ok((&mut self.bytes[HEADER_MAX..], self.end - HEADER_MAX))
    }

    /// More free room.
    pub(super) fn grow(&mut self) -> Result<(), Violation> {
        self.lengthen(self.bytes.len() + 1)
    }

    /// So much of the free room belongs to the message now.
    pub(super) fn filled(&mut self, count: usize) {
        self.end += count;
    }

    /// The window and the message.
    pub(super) fn with_window(&self) -> &[u8] {
        &self.bytes[HEADER_MAX..self.end]
    }

    fn message(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    /// The message as one frame. Its content is masked from here on.
    fn frame(&mut self, opcode: Opcode, key: [u8; 4]) -> &[u8] {
        let (header, size) = frame::header(opcode, self.end - self.start, Some(key));
        frame::mask(&mut self.bytes[self.start..self.end], key, 0);
        let start = self.start - size;
        self.bytes[start..self.start].copy_from_slice(&header[..size]);
        &self.bytes[start..self.end]
    }

    /// Forgets the message, and gives back what a short one does not need.
    fn clear(&mut self) -> Result<(), Violation> {
        self.end = self.start;
        if self.bytes.len() > FREE {
            self.bytes = Vec::new();
            self.share.set(0)?;
        }
        Ok(())
    }
}

/// What a client has said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Item {
    /// A message: it is in the buffer.
    Text,
    Binary,
    /// A control frame: its payload is [`Messages::control`].
    Ping,
    Pong,
    Close,
}

/// A frame that has begun.
struct Frame {
    header: Header,
    /// How much of its payload was read.
    at: u64,
}

/// A message that has begun.
struct Message {
    item: Item,
    compressed: bool,
    fragments: usize,
    /// The lengths of its frames together.
    length: u64,
}

/// The client's side of a connection.
pub(super) struct Messages {
    /// With `permessage-deflate`; whether a message may refer to those before it.
    takeover: Option<bool>,
    /// Made for the first compressed message.
    inflater: Option<(Inflater, Share)>,
    buffer: Buffer,
    frame: Option<Frame>,
    message: Option<Message>,
    control: Vec<u8>,
    closed: bool,
}

impl Messages {
    /// `takeover`: what was agreed on about compression, see [`super::Agreed`].
    pub(super) fn new(takeover: Option<bool>) -> Self {
        Self {
            takeover,
            inflater: None,
            buffer: Buffer::default(),
            frame: None,
            message: None,
            control: Vec::new(),
            closed: false,
        }
    }

    /// Takes bytes from the start of `data`, at most to the end of a frame. Returns how many, and
    /// what they complete. None taken: it takes more to go on.
    pub(super) fn feed(&mut self, data: &[u8]) -> Result<(usize, Option<Item>), Violation> {
        let mut used = 0;
        let mut frame = match self.frame.take() {
            Some(frame) => frame,
            None if self.closed && !data.is_empty() => return Err(Violation::AfterClose),
            None => {
                let read = Header::read(data, Side::Client, self.takeover.is_some())?;
                let Some((header, size)) = read else { return Ok((0, None)) };
                self.begin(&header)?;
                used = size;
                Frame { header, at: 0 }
            }
        };
        let left = usize::try_from(frame.header.length - frame.at).unwrap_or(usize::MAX);
        let part = &data[used..];
        let part = &part[..part.len().min(left)];
        self.payload(&frame, part)?;
        used += part.len();
        frame.at += part.len() as u64;
        if frame.at < frame.header.length {
            self.frame = Some(frame);
            return Ok((used, None));
        }
        Ok((used, self.end(&frame.header)?))
    }

    /// Within a frame or a message.
    pub(super) fn begun(&self) -> bool {
        self.frame.is_some() || self.message.is_some()
    }

    /// The message that was completed.
    pub(super) fn message(&self) -> &[u8] {
        self.buffer.message()
    }

    /// The payload of the control frame that was completed.
    pub(super) fn control(&self) -> &[u8] {
        &self.control
    }

    /// The message that was completed, as one frame under `key`. Call it once, then
    /// [`Messages::sent`].
    pub(super) fn wire(&mut self, opcode: Opcode, key: [u8; 4]) -> &[u8] {
        self.buffer.frame(opcode, key)
    }

    /// The message is not needed any more.
    pub(super) fn sent(&mut self) -> Result<(), Violation> {
        self.buffer.clear()
    }

    fn begin(&mut self, header: &Header) -> Result<(), Violation> {
        let item = match header.opcode {
            Opcode::Close | Opcode::Ping | Opcode::Pong => {
                self.control.clear();
                return Ok(());
            }
            Opcode::Text => Some(Item::Text),
            Opcode::Binary => Some(Item::Binary),
            Opcode::Continuation => None,
        };
        let message = match (item, self.message.as_mut()) {
            (Some(_), Some(_)) => return Err(Violation::Interrupted),
            (None, None) => return Err(Violation::Continuation),
            (None, Some(message)) => message,
            (Some(item), None) => {
                let compressed = header.compressed;
                let window = match self.takeover {
                    Some(takeover) if compressed => {
                        if self.inflater.is_none() {
                            let mut share = Share::default();
                            share.set(INFLATER)?;
                            self.inflater = Some((Inflater::new(takeover), share));
                        }
                        self.inflater.as_mut().map(|(inflater, _)| inflater.begin())
                    }
                    _ => None,
                };
                self.buffer.begin(window.unwrap_or_default())?;
                self.message.insert(Message { item, compressed, fragments: 0, length: 0 })
            }
        };
        message.fragments += 1;
        if message.fragments > FRAGMENTS_MAX {
            return Err(Violation::TooManyFragments);
        }
        // Both are below 2^63.
        message.length = message.length.saturating_add(header.length);
        let most = MESSAGE_MAX as u64 + if message.compressed { STORED } else { 0 };
        if message.length > most { Err(Violation::TooLong) } else { Ok(()) }
    }

    fn payload(&mut self, frame: &Frame, data: &[u8]) -> Result<(), Violation> {
        let key = frame.header.key;
        if frame.header.opcode.is_control() {
            let from = self.control.len();
            self.control.extend_from_slice(data);
            frame::mask(&mut self.control[from..], key, frame.at);
            return Ok(());
        }
        match (&self.message, &mut self.inflater) {
            (Some(Message { compressed: true, .. }), Some((inflater, _))) => {
                let mut scratch = [0; 4096];
                let mut at = frame.at;
                for part in data.chunks(scratch.len()) {
                    let plain = &mut scratch[..part.len()];
                    plain.copy_from_slice(part);
                    frame::mask(plain, key, at);
                    at += part.len() as u64;
                    inflater.add(plain, &mut self.buffer)?;
                }
                Ok(())
            }
            _ => self.buffer.append(data, key, frame.at),
        }
    }

    /// A frame is complete.
    fn end(&mut self, header: &Header) -> Result<Option<Item>, Violation> {
        match header.opcode {
            Opcode::Ping => return Ok(Some(Item::Ping)),
            Opcode::Pong => return Ok(Some(Item::Pong)),
            Opcode::Close => {
                frame::check_close(&self.control)?;
                self.closed = true;
                return Ok(Some(Item::Close));
            }
            _ if !header.fin => return Ok(None),
            _ => {}
        }
        let Some(message) = self.message.take() else { return Err(Violation::Continuation) };
        if let (true, Some((inflater, _))) = (message.compressed, &mut self.inflater) {
            inflater.end(&mut self.buffer)?;
        }
        if self.buffer.message().len() > MESSAGE_MAX {
            return Err(Violation::TooLong);
        }
        if message.item == Item::Text && std::str::from_utf8(self.buffer.message()).is_err() {
            return Err(Violation::Utf8);
        }
        Ok(Some(message.item))
    }
}

/// The server's frames: where they begin and end, while their content passes.
pub(super) struct Follower {
    deflate: bool,
    /// How much of a payload is still to come.
    left: u64,
    within_message: bool,
    closed: bool,
}

impl Follower {
    pub(super) fn new(deflate: bool) -> Self {
        Self { deflate, left: 0, within_message: false, closed: false }
    }

    /// How many bytes from the start of `data` may pass. None: it takes more to tell.
    pub(super) fn pass(&mut self, data: &[u8]) -> Result<usize, Violation> {
        let mut passed = self.rest(data);
        while self.left == 0 && passed < data.len() {
            match self.header(&data[passed..]) {
                // What came before it passes first.
                Err(_) if passed > 0 => break,
                Err(violation) => return Err(violation),
                Ok(None) => break,
                Ok(Some(size)) => {
                    passed += size;
                    passed += self.rest(&data[passed..]);
                }
            }
        }
        Ok(passed)
    }

    /// The same, but not beyond the frame that has begun.
    pub(super) fn rest(&mut self, data: &[u8]) -> usize {
        let count = data.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        self.left -= count as u64;
        count
    }

    /// Whether a frame of ours may stand here.
    pub(super) fn between_frames(&self) -> bool {
        self.left == 0
    }

    /// Whether the server has said its last frame.
    pub(super) fn closed(&self) -> bool {
        self.closed
    }

    fn header(&mut self, data: &[u8]) -> Result<Option<usize>, Violation> {
        if self.closed {
            return Err(Violation::AfterClose);
        }
        let read = Header::read(data, Side::Server, self.deflate)?;
        let Some((header, size)) = read else { return Ok(None) };
        match header.opcode {
            Opcode::Text | Opcode::Binary if self.within_message => {
                return Err(Violation::Interrupted);
            }
            Opcode::Continuation if !self.within_message => return Err(Violation::Continuation),
            Opcode::Text | Opcode::Binary | Opcode::Continuation => {
                self.within_message = !header.fin;
            }
            Opcode::Close => self.closed = true,
            Opcode::Ping | Opcode::Pong => {}
        }
        self.left = header.length;
        Ok(Some(size))
    }
}

#[cfg(test)]
pub(super) mod tests;

//! Moving one message body: read by its own framing, checked, and written with ours.

mod content;

use std::io::{self, Write as _};
use std::time::Duration;

use tokio::io::{AsyncWrite, AsyncWriteExt as _};

pub(crate) use content::Content;

use super::head::Framing;
use crate::proxy::stream::Reader;

/// How much is gathered before it is written, in bytes.
const GATHER: usize = 64 * 1024;

/// The longest line with a chunk's size, and the longest trailer section, in bytes.
const SIZE_LINE_MAX: usize = 256;
const TRAILERS_MAX: usize = 8 * 1024;

/// Why a body was not moved to its end.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BodyError {
    #[error("body ended early")]
    Truncated,
    #[error("malformed chunk in the body")]
    Chunk,
    #[error("body could not be read: {0}")]
    Read(io::Error),
    #[error("body could not be sent: {0}")]
    Write(io::Error),
    /// It was held, and others wait for its room.
    #[error("the upstream did not take the body within {} s", .0.as_secs())]
    Unread(Duration),
}

/// How long a held body of so many bytes may take to be sent: others wait for its room.
pub(crate) fn patience(length: usize) -> Duration {
    const LEAST: Duration = Duration::from_secs(30);
    const SLOWEST: usize = 256 * 1024;
    LEAST + Duration::from_secs((length / SLOWEST) as u64)
}

/// How a body is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Encoding {
    /// As it is: the head told the length, or the end of the connection does.
    Plain,
    /// In chunks.
    Chunked,
}

/// Sends `head`, then moves one body behind it, and returns the body's bytes.
///
/// What has arrived with the head leaves with the head, in one write. Trailers and chunk
/// extensions are dropped.
pub(crate) async fn send<W: AsyncWrite + Unpin>(
    mut head: Vec<u8>,
    from: &mut Reader,
    framing: Framing,
    to: &mut W,
    encoding: Encoding,
) -> Result<u64, BodyError> {
    match framing {
        Framing::Empty => {
            write(to, &mut head).await?;
            Ok(0)
        }
        Framing::Length(length) => {
            plain(head, from, Some(length), to).await?;
            Ok(length)
        }
        Framing::Close => plain(head, from, None, to).await,
        Framing::Chunked => chunks(head, from, to, encoding).await,
    }
}

/// Sends `head`, then a body that was read before and is given up once it is sent. A receiver that
/// does not take it within `patience` is given up too.
pub(crate) async fn send_held<W: AsyncWrite + Unpin>(
    mut head: Vec<u8>,
    held: impl AsRef<[u8]>,
    to: &mut W,
    patience: Duration,
) -> Result<u64, BodyError> {
    let content = held.as_ref();
    let sending = async {
        if head.len() + content.len() <= GATHER {
            head.extend_from_slice(content);
            return write(to, &mut head).await;
        }
        write(to, &mut head).await?;
        to.write_all(content).await.map_err(BodyError::Write)?;
        to.flush().await.map_err(BodyError::Write)
    };
    let sent = tokio::time::timeout(patience, sending).await;
    sent.map_err(|_| BodyError::Unread(patience))??;
    Ok(content.len() as u64)
}

/// A body of `length` bytes, or to the end of the stream.
async fn plain<W: AsyncWrite + Unpin>(
    mut head: Vec<u8>,
    from: &mut Reader,
    length: Option<u64>,
    to: &mut W,
) -> Result<u64, BodyError> {
    let limit = length.unwrap_or(u64::MAX);
    let mut moved = 0u64;
    while moved < limit {
        let data = from.data();
        if data.is_empty() {
            write(to, &mut head).await?;
            match from.fill_much().await.map_err(BodyError::Read)? {
                0 if length.is_none() => return Ok(moved),
                0 => return Err(BodyError::Truncated),
                _ => continue,
            }
        }
        let take = data.len().min(usize::try_from(limit - moved).unwrap_or(usize::MAX));
        let data = &data[..take];
        if head.is_empty() {
            to.write_all(data).await.map_err(BodyError::Write)?;
            to.flush().await.map_err(BodyError::Write)?;
        } else {
            head.extend_from_slice(data);
            write(to, &mut head).await?;
        }
        from.consume(take);
        moved += take as u64;
    }
    write(to, &mut head).await?;
    Ok(moved)
}

async fn chunks<W: AsyncWrite + Unpin>(
    mut out: Vec<u8>,
    from: &mut Reader,
    to: &mut W,
    encoding: Encoding,
) -> Result<u64, BodyError> {
    let mut decoder = Decoder::default();
    let mut moved = 0u64;
    loop {
        match decoder.step(from.data())? {
            Step::More => {
                write(to, &mut out).await?;
                if from.fill_much().await.map_err(BodyError::Read)? == 0 {
                    return Err(BodyError::Truncated);
                }
            }
            Step::Skip(count) => from.consume(count),
            Step::Data(count) => {
                if encoding == Encoding::Chunked {
                    // Writing to a Vec cannot fail.
                    let _ = write!(out, "{count:x}\r\n");
                }
                out.extend_from_slice(&from.data()[..count]);
                if encoding == Encoding::Chunked {
                    out.extend_from_slice(b"\r\n");
                }
                from.consume(count);
                moved += count as u64;
                if out.len() >= GATHER {
                    write(to, &mut out).await?;
                }
            }
            Step::End(count) => {
                from.consume(count);
                if encoding == Encoding::Chunked {
                    out.extend_from_slice(b"0\r\n\r\n");
                }
                write(to, &mut out).await?;
                return Ok(moved);
            }
        }
    }
}

/// Writes out and empties `bytes`.
async fn write<W: AsyncWrite + Unpin>(to: &mut W, bytes: &mut Vec<u8>) -> Result<(), BodyError> {
    if !bytes.is_empty() {
        to.write_all(bytes).await.map_err(BodyError::Write)?;
        to.flush().await.map_err(BodyError::Write)?;
        bytes.clear();
    }
    Ok(())
}

/// Where in a chunked body the next byte lies.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) enum Decoder {
    /// At a line with a size.
    #[default]
    Size,
    /// Inside a chunk with this many bytes to come.
    Data(u64),
    /// Behind a chunk's last byte.
    DataEnd,
    /// In the trailer section, of which this many bytes were seen.
    Trailers(usize),
}

/// What the first bytes of the input are.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    /// Not enough to say.
    More,
    /// Framing of this length.
    Skip(usize),
    /// Content of this length.
    Data(usize),
    /// The last framing, of this length.
    End(usize),
}

impl Decoder {
    fn step(&mut self, data: &[u8]) -> Result<Step, BodyError> {
        match *self {
            Self::Size => {
                let Some(line) = line(data, SIZE_LINE_MAX)? else {
                    return Ok(Step::More);
                };
                let size = chunk_size(line)?;
                *self = if size == 0 { Self::Trailers(0) } else { Self::Data(size) };
                Ok(Step::Skip(line.len() + 2))
            }
            Self::Data(_) if data.is_empty() => Ok(Step::More),
            Self::Data(left) => {
                let count = data.len().min(usize::try_from(left).unwrap_or(usize::MAX));
                let left = left - count as u64;
                *self = if left == 0 { Self::DataEnd } else { Self::Data(left) };
                Ok(Step::Data(count))
            }
            Self::DataEnd => match data {
                [b'\r', b'\n', ..] => {
                    *self = Self::Size;
                    Ok(Step::Skip(2))
                }
                [] | [b'\r'] => Ok(Step::More),
                _ => Err(BodyError::Chunk),
            },
            Self::Trailers(seen) => {
                let Some(line) = line(data, TRAILERS_MAX)? else {
                    return Ok(Step::More);
                };
                let length = line.len() + 2;
                if line.is_empty() {
                    return Ok(Step::End(length));
                }
                if seen + length > TRAILERS_MAX || !line.contains(&b':') {
                    return Err(BodyError::Chunk);
                }
                *self = Self::Trailers(seen + length);
                Ok(Step::Skip(length))
            }
        }
    }
}

/// The line at the start of `data` without its CR LF, which are the only CR and LF allowed.
fn line(data: &[u8], max: usize) -> Result<Option<&[u8]>, BodyError> {
    match data.iter().position(|byte| matches!(byte, b'\r' | b'\n' | 0)) {
        Some(end) if end > max => Err(BodyError::Chunk),
        Some(end) => match &data[end..] {
            [b'\r', b'\n', ..] => Ok(Some(&data[..end])),
            [b'\r'] => Ok(None),
            _ => Err(BodyError::Chunk),
        },
        None if data.len() > max => Err(BodyError::Chunk),
        None => Ok(None),
    }
}

/// Hexadecimal digits and nothing else before the line's end or a `;`.
fn chunk_size(line: &[u8]) -> Result<u64, BodyError> {
    let digits = line.split(|byte| *byte == b';').next().unwrap_or_default();
    if digits.is_empty() || digits.len() > 15 || !digits.iter().all(u8::is_ascii_hexdigit) {
        return Err(BodyError::Chunk);
    }
    let digits = std::str::from_utf8(digits).map_err(|_| BodyError::Chunk)?;
    u64::from_str_radix(digits, 16).map_err(|_| BodyError::Chunk)
}

#[cfg(test)]
mod held_tests {
    use super::*;

    #[tokio::test]
    async fn a_receiver_that_takes_nothing_is_given_up() {
        let (mut near, mut far) = tokio::io::duplex(16);
        let body = vec![b'x'; 1000];
        let short = Duration::from_millis(20);
        let sent = send_held(b"head".to_vec(), &body, &mut near, short).await;
        assert!(matches!(sent, Err(BodyError::Unread(_))), "{sent:?}");
        let reading = tokio::spawn(async move {
            let mut all = Vec::new();
            tokio::io::AsyncReadExt::read_to_end(&mut far, &mut all).await.map(|_| all)
        });
        let long = Duration::from_secs(60);
        let sent = send_held(b"head".to_vec(), &body, &mut near, long).await.expect("taken");
        drop(near);
        assert_eq!(sent, 1000);
        assert!(reading.await.expect("task").expect("bytes").ends_with(&body));
        assert_eq!(patience(0), Duration::from_secs(30));
        assert_eq!(patience(8 << 20), Duration::from_secs(62));
    }
}

#[cfg(test)]
mod fuzz;

#[cfg(test)]
mod tests {
    use super::*;

    /// Decodes `input` fed in pieces of `piece` bytes: content, and what was left over.
    fn decode(input: &[u8], piece: usize) -> Result<Option<(Vec<u8>, usize)>, BodyError> {
        let mut decoder = Decoder::default();
        let mut content = Vec::new();
        let (mut start, mut end) = (0, piece.min(input.len()));
        loop {
            match decoder.step(&input[start..end])? {
                Step::More if end == input.len() => return Ok(None),
                Step::More => end = (end + piece).min(input.len()),
                Step::Skip(count) => start += count,
                Step::Data(count) => {
                    content.extend_from_slice(&input[start..start + count]);
                    start += count;
                }
                Step::End(count) => return Ok(Some((content, input.len() - start - count))),
            }
        }
    }

    #[test]
    fn body_is_the_same_however_it_is_split() {
        let input = b"5\r\nhello\r\n00A;x=\"y\"\r\n, 23456789\r\n0\r\nTrailer: 1\r\n\r\nNEXT";
        for piece in 1..input.len() {
            let (content, left) = decode(input, piece).expect("valid").expect("complete");
            assert_eq!(content, b"hello, 23456789");
            assert_eq!(left, 4, "the next request is untouched");
        }
    }

    #[test]
    fn malformed_chunks_are_refused() {
        let cases: &[&[u8]] = &[
            b"\r\nhello\r\n0\r\n\r\n",
            b" 5\r\nhello\r\n0\r\n\r\n",
            b"5 \r\nhello\r\n0\r\n\r\n",
            b"+5\r\nhello\r\n0\r\n\r\n",
            b"-5\r\nhello\r\n0\r\n\r\n",
            b"0x5\r\nhello\r\n0\r\n\r\n",
            b"5\nhello\r\n0\r\n\r\n",
            b"5;a\nb\r\nhello\r\n0\r\n\r\n",
            b"5;a\rb\r\nhello\r\n0\r\n\r\n",
            b"5\r\nhello0\r\n\r\n",
            b"5\r\nhello\n0\r\n\r\n",
            b"5\r\nhello\r\n0\r\n\n",
            b"ffffffffffffffff\r\n",
            b"5\r\nhello\r\n0\r\nno colon\r\n\r\n",
        ];
        for input in cases {
            for piece in [1, input.len()] {
                assert!(decode(input, piece).is_err(), "{}", String::from_utf8_lossy(input));
            }
        }
    }

    #[test]
    fn endless_size_lines_and_trailers_are_refused() {
        let mut line = b"5;".to_vec();
        line.resize(SIZE_LINE_MAX + 2, b'a');
        assert!(decode(&line, 64).is_err());
        let mut trailers = b"0\r\n".to_vec();
        for _ in 0..=TRAILERS_MAX / 8 {
            trailers.extend_from_slice(b"a: bcd\r\n");
        }
        assert!(decode(&trailers, 1024).is_err());
    }

    proptest::proptest! {
        #[test]
        fn any_content_survives(
            pieces in proptest::collection::vec(proptest::collection::vec(proptest::num::u8::ANY, 1..300), 0..8),
            split in 1usize..64,
        ) {
            let mut input = Vec::new();
            for piece in &pieces {
                write!(input, "{:X}\r\n", piece.len()).expect("write");
                input.extend_from_slice(piece);
                input.extend_from_slice(b"\r\n");
            }
            input.extend_from_slice(b"0\r\n\r\n");
            let (content, left) = decode(&input, split).expect("valid").expect("complete");
            proptest::prop_assert_eq!(content, pieces.concat());
            proptest::prop_assert_eq!(left, 0);
        }
    }
}

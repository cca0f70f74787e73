//! The last events and those that come, for whoever reads `/events`.
//!
//! While nobody reads, only what the log level lets pass is kept; a reader gets all that happens
//! from then on. Whoever tells of an event never waits for a reader: one that does not keep up is
//! cut off.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use hyper::body::{Bytes, Frame, SizeHint};
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::mpsc::{Receiver, Sender, channel};

use super::Leash;
use crate::event::Tap;

/// How many events are kept, and how many bytes of them.
const KEPT: usize = 512;
const KEPT_BYTES: usize = 256 * 1024;

/// How many events a reader may lag behind.
const LAG: usize = 256;

/// The events of this process.
pub(super) static RING: Ring = Ring::new();

#[derive(Debug)]
pub(super) struct Ring {
    state: Mutex<State>,
    /// How many read; seen without the lock by everything that could be told.
    readers: AtomicUsize,
}

#[derive(Debug)]
struct State {
    kept: VecDeque<Bytes>,
    bytes: usize,
    readers: Vec<Reader>,
}

#[derive(Debug)]
struct Reader {
    lines: Sender<Bytes>,
    leash: Arc<Leash>,
}

/// What one reader gets: what was kept, then what comes.
#[derive(Debug)]
pub(super) struct Reading {
    kept: VecDeque<Bytes>,
    lines: Receiver<Bytes>,
}

impl Ring {
    const fn new() -> Self {
        let state = State { kept: VecDeque::new(), bytes: 0, readers: Vec::new() };
        Self { state: Mutex::new(state), readers: AtomicUsize::new(0) }
    }

    /// Begins to read. `leash` ends the connection that lags behind.
    pub(super) fn read(&self, leash: &Arc<Leash>) -> Reading {
        let (sender, lines) = channel(LAG);
        leash.streams.store(true, Ordering::Relaxed);
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.readers.push(Reader { lines: sender, leash: Arc::clone(leash) });
        self.readers.store(state.readers.len(), Ordering::Relaxed);
        Reading { kept: state.kept.clone(), lines }
    }
}

impl Tap for Ring {
    fn wants_all(&self) -> bool {
        self.readers.load(Ordering::Relaxed) > 0
    }

    fn take(&self, json: String) {
        let line = Bytes::from(json);
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.bytes += line.len();
        state.kept.push_back(line.clone());
        while state.kept.len() > KEPT || state.bytes > KEPT_BYTES {
            let Some(oldest) = state.kept.pop_front() else { break };
            state.bytes -= oldest.len();
        }
        state.readers.retain(|reader| match reader.lines.try_send(line.clone()) {
            Ok(()) => true,
            Err(TrySendError::Closed(_)) => false,
            Err(TrySendError::Full(_)) => {
                reader.leash.cut.notify_one();
                false
            }
        });
        self.readers.store(state.readers.len(), Ordering::Relaxed);
    }
}

/// How events are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// One JSON object a line.
    Lines,
    /// `text/event-stream`.
    EventStream,
}

impl Form {
    fn frame(self, json: &Bytes) -> Bytes {
        let (before, after) = match self {
            Self::Lines => (&b""[..], &b"\n"[..]),
            Self::EventStream => (&b"data: "[..], &b"\n\n"[..]),
        };
        [before, json, after].concat().into()
    }
}

/// The body of a response.
#[derive(Debug)]
pub(super) enum Body {
    /// At once; taken when it was sent.
    Whole(Option<Bytes>),
    /// As long as the client reads.
    Events(Reading, Form),
}

impl Body {
    pub(super) fn whole(bytes: Bytes) -> Self {
        Self::Whole(Some(bytes).filter(|bytes| !bytes.is_empty()))
    }

    pub(super) fn events(reading: Reading, form: Form) -> Self {
        Self::Events(reading, form)
    }
}

impl hyper::body::Body for Body {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let data = match &mut *self {
            Self::Whole(bytes) => bytes.take(),
            Self::Events(reading, form) => {
                let line = match reading.kept.pop_front() {
                    Some(line) => Some(line),
                    None => match reading.lines.poll_recv(cx) {
                        Poll::Ready(line) => line,
                        Poll::Pending => return Poll::Pending,
                    },
                };
                line.map(|line| form.frame(&line))
            }
        };
        Poll::Ready(data.map(|data| Ok(Frame::data(data))))
    }

    fn is_end_stream(&self) -> bool {
        matches!(self, Self::Whole(None))
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Whole(bytes) => {
                SizeHint::with_exact(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64))
            }
            Self::Events(..) => SizeHint::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(reading: &mut Reading) -> Vec<String> {
        let mut lines: Vec<Bytes> = reading.kept.drain(..).collect();
        while let Ok(line) = reading.lines.try_recv() {
            lines.push(line);
        }
        lines.iter().map(|line| String::from_utf8(line.to_vec()).unwrap()).collect()
    }

    #[test]
    fn a_reader_gets_what_was_kept_and_what_comes() {
        let ring = Ring::new();
        assert!(!ring.wants_all());
        ring.take("1".into());
        let mut reading = ring.read(&Arc::default());
        assert!(ring.wants_all());
        ring.take("2".into());
        assert_eq!(texts(&mut reading), ["1", "2"]);
        drop(reading);
        ring.take("3".into());
        assert!(!ring.wants_all(), "who went away is not written for");
        assert_eq!(texts(&mut ring.read(&Arc::default())), ["1", "2", "3"]);
    }

    #[test]
    fn what_is_kept_is_bounded_by_number_and_by_bytes() {
        let ring = Ring::new();
        for number in 0..KEPT + 7 {
            ring.take(number.to_string());
        }
        let kept = texts(&mut ring.read(&Arc::default()));
        assert_eq!((kept.len(), kept[0].as_str()), (KEPT, "7"));
        for _ in 0..100 {
            ring.take("x".repeat(10_000));
        }
        let state = ring.state.lock().unwrap();
        assert_eq!(state.kept.len(), KEPT_BYTES / 10_000);
        assert_eq!(state.bytes, state.kept.iter().map(Bytes::len).sum::<usize>());
    }

    #[tokio::test]
    async fn a_reader_that_lags_is_cut() {
        let ring = Ring::new();
        let leash = Arc::new(Leash::default());
        let mut reading = ring.read(&leash);
        for number in 0..LAG {
            ring.take(number.to_string());
        }
        assert!(ring.wants_all());
        ring.take("one too many".into());
        let cut = tokio::time::timeout(std::time::Duration::from_secs(20), leash.cut.notified());
        cut.await.expect("its connection is ended");
        assert!(!ring.wants_all());
        assert_eq!(texts(&mut reading).len(), LAG);
        assert_eq!(reading.lines.recv().await, None);
    }
}

//! The last events and those that come, for whoever reads `/events`.
//!
//! While nobody reads, only what the log level lets pass is kept; a reader gets all that happens
//! from then on. Whoever tells of an event never waits for a reader.
//!
//! Denials and findings have room of their own, in what is kept and in what waits for a reader: what
//! the agent is allowed to do, however often, does not push out what it was refused. A reader that
//! lags loses the rest first, and is told how much; one that cannot even take the denials is cut off.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::SystemTime;

use hyper::body::{Bytes, Frame, SizeHint};

use super::Leash;
use crate::event::{Class, Event, Severity, Tap};

/// How many events of each of the two classes are kept, and how many bytes of them; and how many
/// may wait for a reader.
const KEPT: usize = 512;
const KEPT_BYTES: usize = 256 * 1024;

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
    kept: Lines,
    /// The number of the next event.
    next: u64,
    readers: Vec<Arc<Reader>>,
}

/// Events of both classes, numbered in the order in which they came.
#[derive(Debug, Default, Clone)]
struct Lines {
    grave: Line,
    other: Line,
}

/// Events of one class.
#[derive(Debug, Default, Clone)]
struct Line {
    events: VecDeque<(u64, Bytes)>,
    bytes: usize,
}

impl Line {
    const fn new() -> Self {
        Self { events: VecDeque::new(), bytes: 0 }
    }

    /// Whether one more of this length goes beyond what a class may have.
    fn is_full(&self, length: usize) -> bool {
        self.events.len() >= KEPT || self.bytes + length > KEPT_BYTES
    }

    fn push(&mut self, number: u64, event: Bytes) {
        self.bytes += event.len();
        self.events.push_back((number, event));
    }

    fn pop(&mut self) -> Option<(u64, Bytes)> {
        let (number, event) = self.events.pop_front()?;
        self.bytes -= event.len();
        Some((number, event))
    }

    fn first(&self) -> u64 {
        self.events.front().map_or(u64::MAX, |(number, _)| *number)
    }
}

impl Lines {
    fn of(&mut self, grave: bool) -> &mut Line {
        if grave { &mut self.grave } else { &mut self.other }
    }

    /// The next in order.
    fn pop(&mut self) -> Option<(u64, Bytes)> {
        let grave = self.grave.first() < self.other.first();
        self.of(grave).pop()
    }
}

#[derive(Debug)]
struct Reader {
    waiting: Mutex<Waiting>,
    leash: Arc<Leash>,
}

/// What a reader has not got yet.
#[derive(Debug, Default)]
struct Waiting {
    lines: Lines,
    /// How many were left out since the last that was put in line.
    left_out: u64,
    waker: Option<Waker>,
    /// Nothing more comes.
    ended: bool,
}

/// What one reader gets: what was kept, then what comes.
#[derive(Debug)]
pub(super) struct Reading(Arc<Reader>);

impl Ring {
    const fn new() -> Self {
        let kept = Lines { grave: Line::new(), other: Line::new() };
        let state = State { kept, next: 0, readers: Vec::new() };
        Self { state: Mutex::new(state), readers: AtomicUsize::new(0) }
    }

    /// Begins to read. `leash` ends the connection that lags behind.
    pub(super) fn read(&self, leash: &Arc<Leash>) -> Reading {
        leash.streams.store(true, Ordering::Relaxed);
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let waiting = Waiting { lines: state.kept.clone(), ..Waiting::default() };
        let reader = Arc::new(Reader { waiting: waiting.into(), leash: Arc::clone(leash) });
        state.readers.push(Arc::clone(&reader));
        self.readers.store(state.readers.len(), Ordering::Relaxed);
        Reading(reader)
    }
}

impl Tap for Ring {
    fn wants_all(&self) -> bool {
        self.readers.load(Ordering::Relaxed) > 0
    }

    fn take(&self, json: String, grave: bool) {
        let event = Bytes::from(json);
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let number = state.next;
        state.next += 1;
        let kept = state.kept.of(grave);
        while kept.is_full(event.len()) && kept.pop().is_some() {}
        kept.push(number, event.clone());
        state.readers.retain(|reader| reader.take(number, &event, grave));
        self.readers.store(state.readers.len(), Ordering::Relaxed);
    }
}

impl Reader {
    fn waiting(&self) -> std::sync::MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `false` when it reads no more.
    fn take(&self, number: u64, event: &Bytes, grave: bool) -> bool {
        let mut waiting = self.waiting();
        if waiting.ended {
            return false;
        }
        let full = waiting.lines.of(grave).is_full(event.len());
        match (full, grave) {
            (false, _) => waiting.lines.of(grave).push(number, event.clone()),
            (true, false) => waiting.left_out += 1,
            (true, true) => {
                waiting.ended = true;
                self.leash.cut.notify_one();
            }
        }
        let ended = waiting.ended;
        if let Some(waker) = waiting.waker.take() {
            waker.wake();
        }
        !ended
    }
}

impl Reading {
    fn poll_next(&mut self, cx: &Context<'_>) -> Poll<Option<Bytes>> {
        let mut waiting = self.0.waiting();
        if let Some((_, event)) = waiting.lines.pop() {
            return Poll::Ready(Some(event));
        }
        let left_out = std::mem::take(&mut waiting.left_out);
        if left_out > 0 {
            let event = Event::new(Class::Finding, "LOST", Severity::Low)
                .subject(format!("{left_out} events were left out: they came too fast to be read"))
                .to_json(SystemTime::now());
            return Poll::Ready(Some(event.into()));
        }
        if waiting.ended {
            return Poll::Ready(None);
        }
        waiting.waker = Some(cx.waker().clone());
        Poll::Pending
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        let mut waiting = self.0.waiting();
        waiting.ended = true;
        waiting.lines = Lines::default();
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
            Self::Events(reading, form) => match reading.poll_next(cx) {
                Poll::Ready(event) => event.map(|event| form.frame(&event)),
                Poll::Pending => return Poll::Pending,
            },
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
        let mut lines = Vec::new();
        let cx = Context::from_waker(Waker::noop());
        while let Poll::Ready(Some(line)) = reading.poll_next(&cx) {
            lines.push(String::from_utf8(line.to_vec()).unwrap());
        }
        lines
    }

    #[test]
    fn a_reader_gets_what_was_kept_and_what_comes_in_order() {
        let ring = Ring::new();
        assert!(!ring.wants_all());
        ring.take("1".into(), false);
        ring.take("2".into(), true);
        let mut reading = ring.read(&Arc::default());
        assert!(ring.wants_all());
        ring.take("3".into(), false);
        ring.take("4".into(), true);
        assert_eq!(texts(&mut reading), ["1", "2", "3", "4"]);
        drop(reading);
        ring.take("5".into(), false);
        assert!(!ring.wants_all(), "who went away is not written for");
        assert_eq!(texts(&mut ring.read(&Arc::default())), ["1", "2", "3", "4", "5"]);
    }

    #[test]
    fn what_is_kept_is_bounded_by_number_and_by_bytes() {
        let ring = Ring::new();
        for number in 0..KEPT + 7 {
            ring.take(number.to_string(), false);
        }
        let kept = texts(&mut ring.read(&Arc::default()));
        assert_eq!((kept.len(), kept[0].as_str()), (KEPT, "7"));
        for _ in 0..100 {
            ring.take("x".repeat(10_000), true);
        }
        let state = ring.state.lock().unwrap();
        let grave = &state.kept.grave;
        assert_eq!(grave.events.len(), KEPT_BYTES / 10_000);
        assert_eq!(grave.bytes, grave.events.iter().map(|(_, event)| event.len()).sum::<usize>());
        assert_eq!(state.kept.other.events.len(), KEPT, "each class has its own room");
    }

    #[test]
    fn noise_pushes_no_denial_out() {
        let ring = Ring::new();
        ring.take("kept denial".into(), true);
        let leash = Arc::new(Leash::default());
        let mut reading = ring.read(&leash);
        for _ in 0..20 * KEPT {
            ring.take("noise".into(), false);
        }
        ring.take("denial".into(), true);
        assert!(ring.wants_all(), "the reader stays");
        let got = texts(&mut reading);
        assert_eq!(got[0], "kept denial");
        assert_eq!(got.iter().filter(|line| *line == "noise").count(), KEPT);
        assert_eq!(got[got.len() - 2], "denial");
        let left_out = format!("{} events were left out", 19 * KEPT);
        assert!(got[got.len() - 1].contains(&left_out), "{}", got[got.len() - 1]);
        let late = texts(&mut ring.read(&leash));
        assert_eq!((late[0].as_str(), late[late.len() - 1].as_str()), ("kept denial", "denial"));
    }

    #[tokio::test]
    async fn a_reader_that_cannot_take_the_denials_is_cut() {
        let ring = Ring::new();
        let leash = Arc::new(Leash::default());
        let mut reading = ring.read(&leash);
        for number in 0..KEPT {
            ring.take(number.to_string(), true);
        }
        assert!(ring.wants_all());
        ring.take("one too many".into(), true);
        let cut = tokio::time::timeout(std::time::Duration::from_secs(20), leash.cut.notified());
        cut.await.expect("its connection is ended");
        assert!(!ring.wants_all());
        assert_eq!(texts(&mut reading).len(), KEPT);
        let cx = Context::from_waker(Waker::noop());
        assert!(matches!(reading.poll_next(&cx), Poll::Ready(None)));
    }
}

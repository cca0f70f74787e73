//! One judged stream and its upstream, both HTTP/2: both bodies at the same time, interim responses,
//! trailers, and the reason when either end gives up.

use std::future::{Future as _, poll_fn};
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use h2::client::{ResponseFuture, SendRequest};
use h2::server::SendResponse;
use h2::{Reason, RecvStream, SendStream};
use http::{Request, Response};

use super::body::{Broken, pump, send_held};
use super::fields;
use crate::proxy::http::head::RESPONSE_MAX;
use crate::proxy::l7::held::Held;

/// The most interim (1xx) responses before a final one.
const INTERIM_MAX: usize = 32;

/// What has come of interim responses. No window holds them back, so that they are bounded together:
/// by [`INTERIM_MAX`], and by the size of one head.
#[derive(Debug, Default)]
pub(super) struct Interim {
    count: usize,
    bytes: usize,
}

impl Interim {
    /// Counts one more; false when it is one too many.
    #[must_use]
    pub(super) fn takes<T>(&mut self, response: &Response<T>) -> bool {
        let fields = response.headers().iter();
        self.count += 1;
        self.bytes += fields.map(|(name, value)| name.as_str().len() + value.len()).sum::<usize>();
        self.count <= INTERIM_MAX && self.bytes <= RESPONSE_MAX
    }

    pub(super) fn none(&self) -> bool {
        self.count == 0
    }
}

/// How an exchange ended before the agent had a response.
#[derive(Debug)]
pub(super) enum Unanswered {
    /// The agent ended it, or is gone: there is nobody to tell.
    Agent,
    /// Nothing of it was sent.
    NotBegun(String),
    /// The upstream says that it has not worked on it (GOAWAY).
    Untouched,
    /// The upstream ended this stream, for this reason.
    Reset(Reason),
    /// No answer will come.
    Lost {
        what: String,
        /// The connection broke; it may have been given up before the request came.
        broke: bool,
    },
}

/// The agent's side of a stream.
pub(super) struct Agent<'a> {
    pub(super) body: &'a mut RecvStream,
    /// The whole body, where it had to be read to be judged: taken when it is sent.
    pub(super) held: &'a mut Option<Held>,
    pub(super) respond: &'a mut SendResponse<Bytes>,
}

impl Agent<'_> {
    /// Whether the request has no body.
    pub(super) fn is_empty(&self) -> bool {
        let held = self.held.as_ref();
        held.map_or_else(|| self.body.is_end_stream(), |held| held.bytes.is_empty())
    }
}

/// What an upstream answers.
enum Answer {
    Interim(Response<()>),
    Final(Response<RecvStream>),
}

/// Sends a judged request on and its response back. Once the agent has the head of a response,
/// nothing is left to tell: what goes wrong then ends the stream.
pub(super) async fn run(
    agent: Agent<'_>,
    mut send: SendRequest<Bytes>,
    request: Request<()>,
) -> Result<(), Unanswered> {
    let empty = agent.is_empty();
    let (mut answer, mut up) =
        send.send_request(request, empty).map_err(|error| Unanswered::NotBegun(told(&error)))?;
    // More streams than the upstream takes at a time: the handle must not keep the connection.
    drop(send);
    let ended = exchange(agent, &mut answer, &mut up, empty).await;
    match ended {
        Ended::Whole => Ok(()),
        Ended::ByAgent(reason) => {
            up.send_reset(reason);
            Err(Unanswered::Agent)
        }
        Ended::Before(why) => Err(why),
    }
}

enum Ended {
    /// With a response, whatever became of it.
    Whole,
    ByAgent(Reason),
    /// Without one.
    Before(Unanswered),
}

async fn exchange(
    agent: Agent<'_>,
    answer: &mut ResponseFuture,
    up: &mut SendStream<Bytes>,
    empty: bool,
) -> Ended {
    let Agent { body, held, respond } = agent;
    let held = held.take();
    let mut upload = pin!(async {
        match held {
            Some(held) => send_held(up, held).await,
            None => pump(body, up).await,
        }
    });
    let mut uploading = !empty;
    let mut interim = Interim::default();
    let response = loop {
        tokio::select! {
            biased;
            reset = poll_fn(|cx| respond.poll_reset(cx)) => return Ended::ByAgent(by_agent(reset)),
            answered = poll_fn(|cx| poll_answer(answer, cx)) => match answered {
                Ok(Answer::Final(response)) => break response,
                Ok(Answer::Interim(response)) if !interim.takes(&response) => {
                    let what = "too many interim responses".to_owned();
                    return Ended::Before(Unanswered::Lost { what, broke: false });
                }
                Ok(Answer::Interim(response)) => {
                    let (mut head, ()) = response.into_parts();
                    head.headers = fields::of_response(head.headers);
                    // An error is a reset, which is seen above.
                    let _ = respond.send_informational(Response::from_parts(head, ()));
                }
                Err(error) => return Ended::Before(unanswered(&error)),
            },
            sent = &mut upload, if uploading => {
                uploading = false;
                match sent {
                    Err(Broken::From(error)) => return Ended::ByAgent(reason_of(&error)),
                    Err(Broken::Unread(what)) => {
                        return Ended::Before(Unanswered::Lost { what, broke: false });
                    }
                    // An upstream that has heard enough may have answered.
                    Ok(()) | Err(Broken::To(_)) => {}
                }
            }
        }
    };
    let (mut head, mut from) = response.into_parts();
    head.headers = fields::of_response(head.headers);
    let over = from.is_end_stream();
    let Ok(mut down) = respond.send_response(Response::from_parts(head, ()), over) else {
        return Ended::ByAgent(Reason::CANCEL);
    };
    if !over {
        let broken = {
            let mut download = pin!(pump(&mut from, &mut down));
            loop {
                tokio::select! {
                    biased;
                    got = &mut download => break got.err(),
                    sent = &mut upload, if uploading => {
                        uploading = false;
                        if let Err(Broken::From(error)) = sent {
                            return Ended::ByAgent(reason_of(&error));
                        }
                    }
                }
            }
        };
        match broken {
            None => {}
            Some(Broken::To(reason)) => {
                return Ended::ByAgent(reason.unwrap_or(Reason::CANCEL));
            }
            // Only of what was held.
            Some(Broken::Unread(_)) => return Ended::ByAgent(Reason::CANCEL),
            // Half a response must not look like a whole one.
            Some(Broken::From(error)) => {
                down.send_reset(upstream_reason(&error));
                return Ended::Whole;
            }
        }
    }
    // An upstream that has answered may go on listening, and says so when it does not.
    if uploading {
        tokio::select! {
            sent = &mut upload => if let Err(Broken::From(error)) = sent {
                return Ended::ByAgent(reason_of(&error));
            },
            reset = poll_fn(|cx| respond.poll_reset(cx)) => return Ended::ByAgent(by_agent(reset)),
        }
    }
    Ended::Whole
}

/// An interim response, or else the final one. The order keeps one from being skipped that comes
/// while this looks.
fn poll_answer(
    answer: &mut ResponseFuture,
    cx: &mut Context<'_>,
) -> Poll<Result<Answer, h2::Error>> {
    match ready!(answer.poll_informational(cx)) {
        Some(interim) => Poll::Ready(interim.map(Answer::Interim)),
        None => Pin::new(answer).poll(cx).map(|response| response.map(Answer::Final)),
    }
}

fn by_agent(reset: Result<Reason, h2::Error>) -> Reason {
    reset.unwrap_or(Reason::CANCEL)
}

/// Why the agent ended a stream. A connection that is gone cancels what it asked for.
fn reason_of(error: &h2::Error) -> Reason {
    error.reason().filter(|_| error.is_reset()).unwrap_or(Reason::CANCEL)
}

/// What an agent is told of a response that broke off.
pub(super) fn upstream_reason(error: &h2::Error) -> Reason {
    let told = error.is_reset() && error.is_remote();
    error.reason().filter(|_| told).unwrap_or(Reason::INTERNAL_ERROR)
}

fn unanswered(error: &h2::Error) -> Unanswered {
    match error.reason() {
        // The client can judge by the code what to do.
        Some(reason) if error.is_reset() && error.is_remote() => Unanswered::Reset(reason),
        Some(Reason::NO_ERROR) if error.is_go_away() && error.is_remote() => Unanswered::Untouched,
        _ => Unanswered::Lost { what: told(error), broke: error.is_io() },
    }
}

/// An error in words, without what the peer wrote into it.
pub(super) fn told(error: &h2::Error) -> String {
    match (error.reason(), error.get_io()) {
        (Some(reason), _) => format!("HTTP/2: {reason}"),
        (None, Some(error)) => format!("HTTP/2: connection lost: {}", error.kind()),
        (None, None) => "HTTP/2: no stream could be opened".to_owned(),
    }
}

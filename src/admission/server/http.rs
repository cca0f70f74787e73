//! Routes, and the way of one request from header to answer.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::header::{CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, HeaderValue, RETRY_AFTER};
use axum::http::{Request, StatusCode};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, post};
use futures_util::StreamExt as _;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::{Limits, Metrics, Phase, Shutdown};

/// Used where the API server names no time-out; its own default.
const DEFAULT_BUDGET: Duration = Duration::from_secs(10);
/// Kept back of the budget, so that our answer arrives before the API server gives up.
const MARGIN: Duration = Duration::from_millis(500);

/// When the answer has to be on its way.
#[derive(Debug, Clone, Copy)]
pub struct Deadline(Instant);

impl Deadline {
    /// A deadline this far away.
    #[must_use]
    pub fn after(budget: Duration) -> Self {
        Self(Instant::now() + budget)
    }

    /// From the query of the request, as `?timeout=10s`, minus a margin.
    #[must_use]
    pub fn from_query(query: Option<&str>) -> Self {
        let named = query
            .unwrap_or_default()
            .split('&')
            .find_map(|pair| pair.strip_prefix("timeout="))
            .and_then(parse_duration);
        let budget = named.unwrap_or(DEFAULT_BUDGET).min(Duration::from_secs(30));
        // Of a very short budget half is kept: some answer is better than none.
        Self::after(budget.saturating_sub(MARGIN).max(budget / 2))
    }

    /// Runs `work` as long as there is time.
    ///
    /// # Errors
    /// When the time is up; the work is dropped.
    pub async fn run<F: Future>(self, work: F) -> Result<F::Output, TimeIsUp> {
        tokio::time::timeout_at(self.0.into(), work).await.map_err(|_| TimeIsUp)
    }
}

/// The budget of the request is used up.
#[derive(Debug, Clone, Copy, thiserror::Error)]
#[error("no answer within the time that the API server gives; try again")]
pub struct TimeIsUp;

/// A Go duration of whole units: `10s`, `1m30s`, `500ms`.
fn parse_duration(text: &str) -> Option<Duration> {
    let mut rest = text;
    let mut total = Duration::ZERO;
    if rest.is_empty() {
        return None;
    }
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit())?;
        let number: u32 = rest[..digits].parse().ok()?;
        let unit_end =
            rest[digits..].find(|c: char| c.is_ascii_digit()).map_or(rest.len(), |n| n + digits);
        let unit = match &rest[digits..unit_end] {
            "ms" => Duration::from_millis(1),
            "s" => Duration::from_secs(1),
            "m" => Duration::from_secs(60),
            _ => return None,
        };
        total = total.checked_add(unit.checked_mul(number)?)?;
        rest = &rest[unit_end..];
    }
    Some(total)
}

/// What to send back.
#[derive(Debug)]
pub struct Answer {
    /// 200 for a decision.
    pub status: StatusCode,
    /// JSON for a decision, else text.
    pub body: Vec<u8>,
    /// Another replica may say something else. An API server stays with the one it is connected to, so
    /// this ends the connection.
    pub ask_another: bool,
}

/// Which of the two questions a review is. A review itself does not tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hook {
    /// What is to be changed.
    Mutate,
    /// Whether the final object may be; never answered with a patch.
    Validate,
}

/// Answers reviews. The one implementation outside of tests is [`super::Handler`].
pub trait Admit: Send + Sync + 'static {
    /// Answers the body of one request, before `deadline`.
    fn admit(
        &self,
        hook: Hook,
        body: Bytes,
        deadline: Deadline,
    ) -> impl Future<Output = Answer> + Send;
}

struct Shared<A> {
    admit: A,
    limits: Limits,
    metrics: Arc<Metrics>,
    in_flight: Semaphore,
    /// In KiB, because a semaphore counts no further than 32 bits.
    bodies: Arc<Semaphore>,
}

/// `/mutate`, `/validate`, and the two health paths for those who can only reach this port.
pub fn router<A: Admit>(
    admit: A,
    limits: Limits,
    metrics: Arc<Metrics>,
    ready: Arc<dyn Fn() -> Result<(), String> + Send + Sync>,
) -> Router {
    let shared = Arc::new(Shared {
        admit,
        in_flight: Semaphore::new(limits.in_flight),
        bodies: Arc::new(Semaphore::new(limits.all_bodies >> 10)),
        limits,
        metrics,
    });
    let hook = |hook| {
        post(move |state: State<Arc<Shared<A>>>, request: Request<Body>| {
            review::<A>(hook, state, request)
        })
    };
    Router::new()
        .route("/mutate", hook(Hook::Mutate))
        .route("/validate", hook(Hook::Validate))
        .with_state(shared)
        .merge(health(ready))
}

/// `/healthz`, `/readyz` and `/metrics`, in the clear: for the kubelet and for Prometheus.
pub fn health_router(
    metrics: Arc<Metrics>,
    ready: Arc<dyn Fn() -> Result<(), String> + Send + Sync>,
) -> Router {
    let is_ready = Arc::clone(&ready);
    let exposition = move || async move {
        let text = metrics.render(is_ready().is_ok());
        ([(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text)
    };
    Router::new().route("/metrics", get(exposition)).merge(health(ready))
}

fn health(ready: Arc<dyn Fn() -> Result<(), String> + Send + Sync>) -> Router {
    let readyz = move || async move {
        match ready() {
            Ok(()) => (StatusCode::OK, "ok\n".to_owned()),
            Err(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {why}\n")),
        }
    };
    Router::new().route("/healthz", get(|| async { "ok\n" })).route("/readyz", get(readyz))
}

/// Readiness that ends with the shutdown, whatever `inner` says.
pub fn ready_unless_ending(
    shutdown: Shutdown,
    inner: impl Fn() -> Result<(), String> + Send + Sync + 'static,
) -> Arc<dyn Fn() -> Result<(), String> + Send + Sync> {
    Arc::new(move || match shutdown.phase() {
        Phase::Running => inner(),
        Phase::Lingering | Phase::Draining => Err("shutting down".to_owned()),
    })
}

async fn review<A: Admit>(
    hook: Hook,
    State(shared): State<Arc<Shared<A>>>,
    request: Request<Body>,
) -> Response {
    let deadline = Deadline::from_query(request.uri().query());
    if !is_json(request.headers().get(CONTENT_TYPE).map(HeaderValue::as_bytes)) {
        shared.metrics.rejected("content-type");
        return plain(StatusCode::UNSUPPORTED_MEDIA_TYPE, "the body has to be application/json");
    }
    let Ok(_permit) = shared.in_flight.try_acquire() else {
        shared.metrics.rejected("busy");
        return busy();
    };
    let (bytes, _held) = match read(&shared, request).await {
        Ok(read) => read,
        Err(response) => return *response,
    };
    let answer = shared.admit.admit(hook, bytes, deadline).await;
    let kind = if answer.status == StatusCode::OK { "application/json" } else { "text/plain" };
    let mut response = (answer.status, [(CONTENT_TYPE, kind)], answer.body).into_response();
    if answer.ask_another {
        response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

/// Reads the body within the limits; the permits stand for its memory.
async fn read<A>(
    shared: &Shared<A>,
    request: Request<Body>,
) -> Result<(Bytes, Vec<OwnedSemaphorePermit>), Box<Response>> {
    let too_large = || {
        shared.metrics.rejected("too-large");
        Box::new(plain(StatusCode::PAYLOAD_TOO_LARGE, "the review is larger than 7 MiB"))
    };
    let declared =
        request.headers().get(CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse().ok());
    if declared.is_some_and(|length: usize| length > shared.limits.body) {
        return Err(too_large());
    }
    let mut permits = Vec::new();
    let mut body = Vec::with_capacity(declared.unwrap_or(0).min(64 << 10));
    let mut frames = request.into_body().into_data_stream();
    let reading = async {
        while let Some(frame) = frames.next().await {
            let Ok(frame) = frame else {
                shared.metrics.rejected("body");
                return Err(Box::new(plain(StatusCode::BAD_REQUEST, "the body broke off")));
            };
            if body.len() + frame.len() > shared.limits.body {
                return Err(too_large());
            }
            let kib =
                u32::try_from((body.len() + frame.len()).div_ceil(1 << 10)).unwrap_or(u32::MAX);
            let have: usize = permits.iter().map(OwnedSemaphorePermit::num_permits).sum();
            let more = kib.saturating_sub(u32::try_from(have).unwrap_or(u32::MAX));
            if more > 0 {
                let Ok(permit) = Arc::clone(&shared.bodies).try_acquire_many_owned(more) else {
                    shared.metrics.rejected("busy");
                    return Err(Box::new(busy()));
                };
                permits.push(permit);
            }
            body.extend_from_slice(&frame);
        }
        Ok(())
    };
    match tokio::time::timeout(shared.limits.body_time, reading).await {
        Ok(Ok(())) => Ok((body.into(), permits)),
        Ok(Err(response)) => Err(response),
        Err(_) => {
            shared.metrics.rejected("body");
            Err(Box::new(plain(StatusCode::REQUEST_TIMEOUT, "the body did not arrive in time")))
        }
    }
}

fn is_json(content_type: Option<&[u8]>) -> bool {
    let Some(text) = content_type.and_then(|bytes| std::str::from_utf8(bytes).ok()) else {
        return false;
    };
    let essence = text.split(';').next().unwrap_or_default().trim();
    essence.eq_ignore_ascii_case("application/json")
}

fn busy() -> Response {
    let text = "ringfence has too many reviews in flight; try again\n";
    (StatusCode::SERVICE_UNAVAILABLE, [(RETRY_AFTER, "1")], text).into_response()
}

fn plain(status: StatusCode, text: &str) -> Response {
    (status, format!("{text}\n")).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_as_go_writes_them() {
        for (text, expected) in [
            ("10s", Some(10_000)),
            ("1m30s", Some(90_000)),
            ("500ms", Some(500)),
            ("", None),
            ("10", None),
            ("s", None),
            ("10h", None),
            ("99999999999s", None),
        ] {
            assert_eq!(parse_duration(text), expected.map(Duration::from_millis), "{text}");
        }
    }

    #[test]
    fn only_json_is_json() {
        assert!(is_json(Some(b"application/json")));
        assert!(is_json(Some(b"Application/JSON; charset=utf-8")));
        for other in
            [None, Some(b"text/json".as_slice()), Some(b"application/jsonp"), Some(b"\xff")]
        {
            assert!(!is_json(other));
        }
    }

    #[tokio::test]
    async fn the_deadline_ends_the_work() {
        let late = Deadline::after(Duration::ZERO).run(std::future::pending::<()>()).await;
        assert!(late.is_err());
        assert_eq!(Deadline::from_query(Some("timeout=2s")).run(async { 1 }).await.ok(), Some(1));
    }
}

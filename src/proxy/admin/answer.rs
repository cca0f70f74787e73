//! The answers of the admin endpoint, path by path.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use hyper::body::Bytes;
use hyper::header::X_CONTENT_TYPE_OPTIONS;
use hyper::header::{ACCEPT, ALLOW, CACHE_CONTROL, CONTENT_TYPE, HOST, HeaderValue};
use hyper::{HeaderMap, Method, Request, Response, StatusCode, Uri};

use super::events::{Body, Form, RING};
use super::{Admin, Leash, Released};
use crate::proxy::connect::authority;
use crate::proxy::metrics;

const TEXT: &str = "text/plain; charset=utf-8";
const EXPOSITION: &str = "text/plain; version=0.0.4; charset=utf-8";
const JSON: &str = "application/json";
const JSON_LINES: &str = "application/x-ndjson";
const EVENT_STREAM: &str = "text/event-stream";

/// The longest attestation that is read, in bytes.
const ATTESTATION_MAX: u64 = 4 * 1024 * 1024;

/// Answers one request; what it carries is not read.
pub(super) fn to<B>(admin: &Admin, request: &Request<B>, leash: &Arc<Leash>) -> Response<Body> {
    // A page in a person's browser may have had its own name resolved to 127.0.0.1, where their
    // port-forward listens: the browser then sends that name.
    if !names_loopback(request.headers(), request.uri()) {
        return text(
            StatusCode::MISDIRECTED_REQUEST,
            "the Host header must be localhost or a loopback address\n",
        );
    }
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        let mut response = text(StatusCode::METHOD_NOT_ALLOWED, "GET and HEAD only\n");
        response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return response;
    }
    let released = admin.attested();
    let runs = !matches!(released, Released::NotYet);
    match request.uri().path() {
        "/healthz" => text(StatusCode::OK, "ok\n"),
        "/readyz" if runs => text(StatusCode::OK, "ok\n"),
        "/readyz" => text(StatusCode::SERVICE_UNAVAILABLE, "not ready: the agent waits\n"),
        "/metrics" => whole(StatusCode::OK, EXPOSITION, metrics::render(runs)),
        "/attestation" => match released {
            Released::NotYet => {
                text(StatusCode::SERVICE_UNAVAILABLE, "not ready: the agent waits\n")
            }
            Released::With(None) => {
                text(StatusCode::INTERNAL_SERVER_ERROR, "the attestation's file did not come\n")
            }
            Released::With(Some(file)) => match read(&file) {
                Ok(attestation) => whole(StatusCode::OK, JSON, attestation),
                Err(error) => {
                    let what = format!("cannot read the attestation: {error}\n");
                    whole(StatusCode::INTERNAL_SERVER_ERROR, TEXT, what)
                }
            },
        },
        "/events" => events(request, leash),
        _ => text(
            StatusCode::NOT_FOUND,
            "there are /healthz, /readyz, /metrics, /events and /attestation\n",
        ),
    }
}

fn events<B>(request: &Request<B>, leash: &Arc<Leash>) -> Response<Body> {
    let accepted = request.headers().get_all(ACCEPT).into_iter();
    let mut accepted = accepted.filter_map(|value| value.to_str().ok()).flat_map(|v| v.split(','));
    let (form, kind) = if accepted.any(|one| one.trim().starts_with(EVENT_STREAM)) {
        (Form::EventStream, EVENT_STREAM)
    } else {
        (Form::Lines, JSON_LINES)
    };
    let body = if request.method() == Method::HEAD {
        Body::whole(Bytes::new())
    } else {
        Body::events(RING.read(leash), form)
    };
    respond(StatusCode::OK, kind, body)
}

/// Whether the request was meant for a loopback: exactly one Host, and with a whole URL as the
/// target its authority too.
fn names_loopback(headers: &HeaderMap, target: &Uri) -> bool {
    let mut hosts = headers.get_all(HOST).into_iter();
    let (Some(host), None) = (hosts.next(), hosts.next()) else {
        return false;
    };
    host.to_str().is_ok_and(is_loopback)
        && target.authority().is_none_or(|name| is_loopback(name.as_str()))
}

fn is_loopback(name: &str) -> bool {
    authority(name, Some(80)).is_ok_and(|(host, _)| {
        host.as_str() == "localhost" || host.ip().is_some_and(|ip| ip.is_loopback())
    })
}

fn read(file: &File) -> io::Result<Vec<u8>> {
    let length = file.metadata()?.len();
    if length > ATTESTATION_MAX {
        return Err(io::Error::other(format!("{length} bytes are too many")));
    }
    let mut bytes = vec![0; usize::try_from(length).unwrap_or(0)];
    file.read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}

fn text(status: StatusCode, text: &'static str) -> Response<Body> {
    whole(status, TEXT, text)
}

fn whole(status: StatusCode, kind: &'static str, body: impl Into<Bytes>) -> Response<Body> {
    respond(status, kind, Body::whole(body.into()))
}

fn respond(status: StatusCode, kind: &'static str, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    for (name, value) in
        [(CONTENT_TYPE, kind), (CACHE_CONTROL, "no-store"), (X_CONTENT_TYPE_OPTIONS, "nosniff")]
    {
        response.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    fn loopback(hosts: &[&str], target: &str) -> bool {
        let mut headers = HeaderMap::new();
        for host in hosts {
            headers.append(HOST, HeaderValue::from_str(host).unwrap());
        }
        names_loopback(&headers, &target.parse().unwrap())
    }

    #[test]
    fn only_loopback_names_are_served() {
        for host in [
            "localhost",
            "LOCALHOST:15200",
            "127.0.0.1",
            "127.0.0.1:8080",
            "127.9.9.9:1",
            "[::1]",
            "[::1]:15200",
        ] {
            assert!(loopback(&[host], "/metrics"), "{host}");
        }
        for host in [
            "",
            "evil.example",
            "localhost.evil.example",
            "evil.example:15200",
            "x@localhost",
            "localhost@evil.example",
            "10.0.0.1",
            "[::ffff:127.0.0.1]",
            "127.1",
            "2130706433",
            "::1",
            "localhost:x",
            "localhost/",
        ] {
            assert!(!loopback(&[host], "/metrics"), "{host}");
        }
        assert!(!loopback(&[], "/metrics"));
        assert!(!loopback(&["localhost", "localhost"], "/metrics"));
        assert!(loopback(&["localhost"], "http://127.0.0.1:15200/metrics"));
        assert!(!loopback(&["localhost"], "http://evil.example/metrics"));
    }
}

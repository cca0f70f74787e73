//! A stream of HTTP/2 over an upstream that speaks HTTP/1.1: for clients that speak only HTTP/2.
//! Trailers of requests and responses are dropped, as HTTP/1.1 here has none.

use std::future::poll_fn;
use std::io::Write as _;
use std::pin::pin;

use bytes::Bytes;
use h2::{Reason, RecvStream};
use http::header::{CONTENT_LENGTH, EXPECT};
use http::request::Parts;
use http::{HeaderName, HeaderValue, Response, StatusCode};
use tokio::io::{AsyncWrite, AsyncWriteExt as _};

use super::body::{self, Broken};
use super::exchange::{Agent, Interim, Unanswered};
use super::fields;
use crate::proxy::http::body::{BodyError, Content, patience, send_held};
use crate::proxy::http::head::{self, Framing, HeadError, ResponseHead};
use crate::proxy::l7::judge::Judged;
use crate::proxy::stream::Conn;

/// Sends a judged request on and its response back; whether the connection may carry another.
pub(super) async fn run(
    agent: Agent<'_>,
    conn: &mut Conn,
    head: &Parts,
    judged: &Judged,
) -> Result<bool, Unanswered> {
    let Conn { rd, wr } = conn;
    let framing = match &agent.held {
        Some(held) if !held.bytes.is_empty() => Framing::Length(held.bytes.len() as u64),
        _ => framing(head, agent.is_empty()),
    };
    let Agent { body, held, respond } = agent;
    let held = held.take();
    let head_bytes = request(head, judged, framing, held.is_some());
    let mut upload = pin!(async {
        match held {
            Some(held) => {
                let patience = patience(held.bytes.len());
                match send_held(head_bytes, held, wr, patience).await {
                    Ok(_) => Ok(()),
                    Err(error @ BodyError::Unread(_)) => Err(Broken::Unread(error.to_string())),
                    Err(_) => Err(Broken::To(None)),
                }
            }
            None => upload(head_bytes, body, framing, wr).await,
        }
    });
    let mut uploading = true;
    let mut interim = Interim::default();
    let response = loop {
        tokio::select! {
            biased;
            _ = poll_fn(|cx| respond.poll_reset(cx)) => return Err(Unanswered::Agent),
            sent = &mut upload, if uploading => {
                uploading = false;
                match sent {
                    // An upstream that has heard enough closes its ear; its answer may be there.
                    Ok(()) | Err(Broken::To(_)) => {}
                    Err(Broken::From(_)) => return Err(Unanswered::Agent),
                    Err(Broken::Unread(what)) => {
                        return Err(Unanswered::Lost { what, broke: false });
                    }
                }
            }
            read = head::read_response(rd, head.method.as_str()) => {
                let response = answered(read, &interim)?;
                if response.status >= 200 {
                    break response;
                }
                if let Some(response) = translated(&response) {
                    if !interim.takes(&response) {
                        let what = "too many interim responses".to_owned();
                        return Err(Unanswered::Lost { what, broke: false });
                    }
                    let _ = respond.send_informational(response);
                }
            }
        }
    };
    let mut content = Content::new(response.framing);
    let translated = translated(&response).ok_or_else(|| Unanswered::Lost {
        what: "response refused: a field that HTTP/2 cannot have".to_owned(),
        broke: false,
    })?;
    let Ok(mut down) = respond.send_response(translated, content.is_done()) else {
        return Err(Unanswered::Agent);
    };
    while !content.is_done() {
        let piece = tokio::select! {
            biased;
            _ = poll_fn(|cx| down.poll_reset(cx)) => return Err(Unanswered::Agent),
            piece = content.next(rd) => piece,
            sent = &mut upload, if uploading => {
                uploading = false;
                match sent {
                    Ok(()) | Err(Broken::To(_) | Broken::Unread(_)) => continue,
                    Err(Broken::From(_)) => return Err(Unanswered::Agent),
                }
            }
        };
        let sent = match piece {
            Ok(Some(piece)) => {
                let last = content.is_done();
                body::send(&mut down, piece, last).await
            }
            Ok(None) => body::send(&mut down, Bytes::new(), true).await,
            // Half a response must not look like a whole one.
            Err(_) => {
                down.send_reset(Reason::INTERNAL_ERROR);
                return Ok(false);
            }
        };
        if sent.is_err() {
            return Err(Unanswered::Agent);
        }
    }
    // Answered before the request's body was complete: the rest is not read.
    Ok(!uploading && response.keep_alive)
}

fn answered(
    read: Result<Option<ResponseHead>, HeadError>,
    interim: &Interim,
) -> Result<ResponseHead, Unanswered> {
    let lost = |what: String, broke| Err(Unanswered::Lost { what, broke });
    match read {
        Ok(Some(head)) if head.status == 101 => {
            lost("changed protocols without being asked".to_owned(), false)
        }
        Ok(Some(head)) => Ok(head),
        Ok(None) => lost("closed without an answer".to_owned(), interim.none()),
        Err(error @ (HeadError::Io | HeadError::Truncated)) => lost(error.to_string(), false),
        Err(error) => lost(format!("response refused: {error}"), false),
    }
}

/// A head as HTTP/2 has it.
fn translated(head: &ResponseHead) -> Option<Response<()>> {
    let mut response = Response::new(());
    *response.status_mut() = StatusCode::from_u16(head.status).ok()?;
    let nominated: Vec<&[u8]> = head.fields.members("connection").collect();
    for (name, value) in head.fields.iter() {
        if nominated.iter().any(|one| name.eq_ignore_ascii_case(one)) {
            continue;
        }
        let name = HeaderName::from_bytes(name).ok()?;
        response.headers_mut().append(name, HeaderValue::from_bytes(value).ok()?);
    }
    let (mut parts, ()) = response.into_parts();
    parts.headers = fields::of_response(parts.headers);
    if head.status < 200 || head.status == 204 {
        parts.headers.remove(CONTENT_LENGTH);
    }
    Some(Response::from_parts(parts, ()))
}

/// How the request's body is framed: by the length that it tells, which the library holds it to,
/// or in chunks.
fn framing(head: &Parts, empty: bool) -> Framing {
    let length = head.headers.get(CONTENT_LENGTH).and_then(|length| length.to_str().ok());
    match length.and_then(|length| length.parse().ok()) {
        Some(length) => Framing::Length(length),
        None if empty && matches!(head.method.as_str(), "POST" | "PUT" | "PATCH") => {
            Framing::Length(0)
        }
        None if empty => Framing::Empty,
        None => Framing::Chunked,
    }
}

/// `held`: the body is here, and nobody waits to be asked for it.
fn request(head: &Parts, judged: &Judged, framing: Framing, held: bool) -> Vec<u8> {
    let mut out = Vec::with_capacity(1024);
    let Judged { target, authority, .. } = judged;
    // Writing to a Vec cannot fail.
    let _ = write!(out, "{} {target} HTTP/1.1\r\nHost: {authority}\r\n", head.method);
    if held {
        let mut fields = head.headers.clone();
        fields.remove(EXPECT);
        fields::write_http1(&mut out, &fields);
    } else {
        fields::write_http1(&mut out, &head.headers);
    }
    match framing {
        Framing::Length(length) => drop(write!(out, "Content-Length: {length}\r\n")),
        Framing::Chunked => out.extend_from_slice(b"Transfer-Encoding: chunked\r\n"),
        Framing::Empty | Framing::Close => {}
    }
    out.extend_from_slice(b"\r\n");
    out
}

/// Sends the head, then the body behind it.
async fn upload<W: AsyncWrite + Unpin>(
    head: Vec<u8>,
    from: &mut RecvStream,
    framing: Framing,
    to: &mut W,
) -> Result<(), Broken> {
    let chunked = framing == Framing::Chunked;
    let mut out = head;
    loop {
        write(to, &out).await?;
        out.clear();
        let Some(data) = from.data().await else { break };
        let data = data.map_err(Broken::From)?;
        if data.is_empty() {
            continue;
        }
        if chunked {
            let _ = write!(out, "{:x}\r\n", data.len());
        }
        out.extend_from_slice(&data);
        if chunked {
            out.extend_from_slice(b"\r\n");
        }
        let _ = from.flow_control().release_capacity(data.len());
    }
    // Read, so that a stream that ends in a reset does not look whole.
    let _ = from.trailers().await.map_err(Broken::From)?;
    if chunked { write(to, b"0\r\n\r\n").await } else { Ok(()) }
}

async fn write<W: AsyncWrite + Unpin>(to: &mut W, bytes: &[u8]) -> Result<(), Broken> {
    if !bytes.is_empty() {
        to.write_all(bytes).await.map_err(|_| Broken::To(None))?;
        to.flush().await.map_err(|_| Broken::To(None))?;
    }
    Ok(())
}

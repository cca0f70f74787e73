//! An upstream that speaks HTTP/2, over TLS and in the clear: paths choose what it does.

use std::fmt::Write as _;
use std::future::poll_fn;
use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use h2::server::{Connection, SendResponse};
use h2::{Reason, RecvStream, SendStream};
use http::{HeaderMap, Request, Response, StatusCode};
use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::Notify;
use tokio_rustls::TlsAcceptor;

use crate::upstream::Seen;

/// Serves until the test's program ends.
pub fn listen(listener: TcpListener, tls: Option<Arc<ServerConfig>>, seen: Seen) {
    std::thread::spawn(move || {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
        runtime.block_on(async move {
            listener.set_nonblocking(true).expect("nonblocking");
            let listener = tokio::net::TcpListener::from_std(listener).expect("listener");
            loop {
                let (tcp, _) = listener.accept().await.expect("accept");
                let (seen, tls) = (seen.clone(), tls.clone());
                tokio::spawn(async move {
                    match tls {
                        Some(tls) => {
                            let Ok(tls) = TlsAcceptor::from(tls).accept(tcp).await else { return };
                            seen.push("H2 over TLS".to_owned());
                            connection(tls, seen).await;
                        }
                        None => connection(tcp, seen).await,
                    }
                });
            }
        });
    });
}

async fn connection(io: impl AsyncRead + AsyncWrite + Unpin, seen: Seen) {
    let mut builder = h2::server::Builder::new();
    builder.initial_window_size(1 << 20).initial_connection_window_size(4 << 20);
    let Ok(mut connection): Result<Connection<_, Bytes>, _> = builder.handshake(io).await else {
        return;
    };
    let leave = Arc::new(Notify::new());
    loop {
        tokio::select! {
            accepted = connection.accept() => {
                let Some(Ok((request, respond))) = accepted else { return };
                let (seen, leave) = (seen.clone(), Arc::clone(&leave));
                tokio::spawn(async move {
                    let _ = stream(request, respond, &seen, &leave).await;
                });
            }
            () = leave.notified() => connection.graceful_shutdown(),
        }
    }
}

#[allow(clippy::too_many_lines, reason = "what it does is a list of paths")]
async fn stream(
    request: Request<RecvStream>,
    mut respond: SendResponse<Bytes>,
    seen: &Seen,
    leave: &Notify,
) -> Result<(), h2::Error> {
    let (head, mut body) = request.into_parts();
    let mut asked = format!("{} {}\n", head.method, head.uri);
    for (name, value) in &head.headers {
        let value = String::from_utf8_lossy(value.as_bytes());
        writeln!(asked, "{name}: {value}").expect("text");
    }
    seen.push(asked.clone());
    let ok = || Response::new(());
    let grpc = || {
        let mut response = Response::new(());
        let kind = http::HeaderValue::from_static("application/grpc");
        response.headers_mut().insert("content-type", kind);
        response
    };
    match head.uri.path() {
        // Everything back, as it comes; trailers behind it.
        "/echo.Echo/Stream" => {
            let mut out = respond.send_response(grpc(), false)?;
            while let Some(data) = body.data().await {
                let data = data?;
                let _ = body.flow_control().release_capacity(data.len());
                send(&mut out, data).await?;
            }
            let trailers = body.trailers().await?;
            out.send_trailers(status(trailers.as_ref()))
        }
        "/echo.Echo/Early" => {
            let mut response = grpc();
            response.headers_mut().insert("grpc-status", "7".parse().expect("value"));
            respond.send_response(response, true).map(drop)
        }
        "/echo.Echo/Reset" => {
            respond.send_reset(Reason::INADEQUATE_SECURITY);
            Ok(())
        }
        "/echo.Echo/Half" => {
            let mut out = respond.send_response(grpc(), false)?;
            send(&mut out, Bytes::from_static(b"half")).await?;
            out.send_reset(Reason::HTTP_1_1_REQUIRED);
            Ok(())
        }
        "/ok/hang" => {
            let reason = poll_fn(|cx| respond.poll_reset(cx)).await?;
            seen.push(format!("RESET {reason:?}"));
            Ok(())
        }
        "/ok/interim" => {
            let mut hints = Response::new(());
            *hints.status_mut() = StatusCode::EARLY_HINTS;
            hints.headers_mut().insert("link", "</x>".parse().expect("value"));
            respond.send_informational(hints)?;
            let mut out = respond.send_response(ok(), false)?;
            out.send_data(Bytes::from_static(b"final"), true)
        }
        // 16 of them, 16 KiB each.
        "/ok/many-hints" => {
            for _ in 0..16 {
                let mut hints = Response::new(());
                *hints.status_mut() = StatusCode::EARLY_HINTS;
                hints.headers_mut().insert("link", "x".repeat(16 << 10).parse().expect("value"));
                respond.send_informational(hints)?;
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            respond.send_response(ok(), true).map(drop)
        }
        "/ok/long-head" => {
            let mut response = ok();
            for _ in 0..4 {
                response.headers_mut().append("x-long", "x".repeat(15 << 10).parse().expect("v"));
            }
            respond.send_response(response, true).map(drop)
        }
        "/ok/events" => {
            let mut out = respond.send_response(ok(), false)?;
            for n in 0..3 {
                send(&mut out, format!("data: {n}\n\n").into()).await?;
                tokio::time::sleep(Duration::from_millis(30)).await;
            }
            out.send_data(Bytes::new(), true)
        }
        "/ok/big" => {
            let mut out = respond.send_response(ok(), false)?;
            for sent in 0..16 {
                send(&mut out, vec![b'x'; 1 << 20].into()).await?;
                seen.push(format!("SENT {}", sent + 1));
            }
            out.send_data(Bytes::new(), true)
        }
        "/ok/leave" => {
            respond.send_response(ok(), true)?;
            leave.notify_one();
            Ok(())
        }
        // What arrived, with its body; then trailers, where the client reads them.
        _ => {
            let mut whole = asked.into_bytes();
            while let Some(data) = body.data().await {
                let data = data?;
                let _ = body.flow_control().release_capacity(data.len());
                whole.extend_from_slice(&data);
            }
            let trailers = body.trailers().await?;
            let mut out = respond.send_response(ok(), false)?;
            send(&mut out, whole.into()).await?;
            if head.headers.contains_key("te") {
                return out.send_trailers(status(trailers.as_ref()));
            }
            out.send_data(Bytes::new(), true)
        }
    }
}

fn status(request: Option<&HeaderMap>) -> HeaderMap {
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", "0".parse().expect("value"));
    let names: Vec<_> =
        request.into_iter().flatten().map(|(name, _)| name.as_str().to_owned()).collect();
    trailers.insert("x-request-trailers", names.join(",").parse().expect("value"));
    trailers
}

async fn send(out: &mut SendStream<Bytes>, mut data: Bytes) -> Result<(), h2::Error> {
    while !data.is_empty() {
        out.reserve_capacity(data.len());
        if out.capacity() == 0 {
            match poll_fn(|cx| out.poll_capacity(cx)).await {
                Some(room) => room?,
                None => return Err(Reason::CANCEL.into()),
            };
        }
        let room = out.capacity().min(data.len());
        out.send_data(data.split_to(room), false)?;
    }
    Ok(())
}

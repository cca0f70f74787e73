//! Plain requests through the proxy: `GET http://host/path`. Each is judged anew, since each may go
//! to another host.

use super::connect::{self, authority};
use super::http::head::{self, RequestHead};
use super::l7::judge::Scheme;
use super::l7::rest::{self, IDLE, Link, Next};
use super::listener::{refusal_for, refuse};
use super::refusal::Refusal;
use super::report;
use super::session::Session;
use super::stream::Conn;
use crate::policy::Host;

/// Serves the requests of one connection, the first of which was read, to its end.
pub(crate) async fn serve(mut session: Session, mut client: Conn, mut head: RequestHead) {
    let mut link: Option<Link> = None;
    loop {
        // A connection that carried plain requests may go on as a tunnel.
        if head.method() == "CONNECT" {
            return connect::serve(session, client, &head).await;
        }
        let (host, port, path) = match absolute(head.target()) {
            Ok(target) => target,
            Err(reason) => {
                report::request_refused(&session, head.method(), &"the proxy", &reason);
                let refusal = Refusal::new(400, "invalid_request_target", &reason);
                return refuse(client, &refusal).await;
            }
        };
        let mut admitted = match session.admit(head.method(), host, port).await {
            Ok(admitted) => admitted,
            Err(refusal) => return refuse(client, &refusal).await,
        };
        if admitted.origin.grant.unread {
            report::connect_allowed(&admitted.session, &admitted.origin);
        }
        let mut here = match link.take() {
            Some(link) if link.leads_to(&admitted.origin) => link,
            _ => Link::none(&admitted.origin, Scheme::Http),
        };
        let next = rest::request(&mut admitted, &mut client, &mut here, &head, &path).await;
        if matches!(next, Next::Request) {
            link = Some(here);
        }
        session = admitted.session.clone();
        let Some((again, _)) = rest::finish(admitted, client, next).await else {
            return;
        };
        client = again;
        head = match head::read_request(&mut client.rd, IDLE).await {
            Ok(Some(head)) => head,
            Ok(None) => return client.close().await,
            Err(error) => {
                report::request_refused(&session, "-", &"the proxy", &error.to_string());
                return refuse(client, &refusal_for(error)).await;
            }
        };
    }
}

/// Takes `http://host[:port]/path` apart: what is judged first, and the origin-form of the rest.
fn absolute(target: &str) -> Result<(Host, u16, String), String> {
    let invalid = |detail: &str| Err(detail.to_owned());
    let scheme =
        |name: &str| target.get(..name.len()).is_some_and(|start| start.eq_ignore_ascii_case(name));
    if scheme("https://") {
        return invalid("Use CONNECT for HTTPS URLs");
    }
    if !scheme("http://") {
        return invalid("this is a proxy: the target is an http:// URL, or CONNECT host:port");
    }
    let rest = &target["http://".len()..];
    let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    let (host, port) = authority(&rest[..end], Some(Scheme::Http.default_port()))?;
    let path = &rest[end..];
    let path = if path.starts_with('/') { path.to_owned() } else { format!("/{path}") };
    Ok((host, port, path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn absolute_targets() {
        let read = |target| absolute(target).ok().map(|(h, p, path)| format!("{h} {p} {path}"));
        assert_eq!(read("http://H.example/a?b").as_deref(), Some("h.example 80 /a?b"));
        assert_eq!(read("HTTP://h:8080").as_deref(), Some("h 8080 /"));
        assert_eq!(read("http://h?q=http://x/").as_deref(), Some("h 80 /?q=http://x/"));
        assert_eq!(read("http://[::1]/").as_deref(), Some("[::1] 80 /"));
        for bad in [
            "/",
            "*",
            "h:80",
            "https://h/",
            "ftp://h/",
            "http:///",
            "http://u@h/",
            "http://h:/",
            "http://h\\@x/",
            "http://",
            "httpx://h/",
        ] {
            assert!(read(bad).is_none(), "{bad}");
        }
    }
}

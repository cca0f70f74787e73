//! `CONNECT host:port`: judged, resolved, dialled, answered, and then looked into.

use super::destination::dial;
use super::http::head::{Framing, RequestHead};
use super::listener::refuse;
use super::refusal::Refusal;
use super::session::Session;
use super::standing::Admitted;
use super::stream::Conn;
use super::{report, tunnel};
use crate::policy::Host;

const ESTABLISHED: &[u8] = b"HTTP/1.1 200 Connection Established\r\n\r\n";

/// Serves one CONNECT to the end of its connection.
pub(crate) async fn serve(session: Session, mut client: Conn, head: &RequestHead) {
    let (host, port) = match target(head) {
        Ok(target) => target,
        Err(reason) => {
            report::request_refused(&session, "CONNECT", &head.target(), &reason);
            let refusal = Refusal::new(400, "invalid_request_target", &reason);
            return refuse(client, &refusal).await;
        }
    };
    let admitted = match session.admit("CONNECT", host, port).await {
        Ok(admitted) => admitted,
        Err(refusal) => return refuse(client, &refusal).await,
    };
    // Long connections keep no rules that are not in force.
    drop(session);
    let Admitted { session, origin } = &admitted;
    let upstream = match dial(session, origin).await {
        Ok(upstream) => upstream,
        Err(error) => {
            return refuse(client, &session.unreachable("CONNECT", origin, &error)).await;
        }
    };
    report::connect_allowed(session, origin);
    if client.send(ESTABLISHED).await.is_ok() {
        tunnel::run(admitted, client, upstream).await;
    }
}

fn target(head: &RequestHead) -> Result<(Host, u16), String> {
    if head.framing != Framing::Empty {
        return Err("CONNECT has no body".to_owned());
    }
    authority(head.target(), None)
}

/// Reads `host:port`, `1.2.3.4:port` or `[v6]:port`; `default` stands for a port left out.
pub(crate) fn authority(text: &str, default: Option<u16>) -> Result<(Host, u16), String> {
    // Only brackets make a colon part of a host.
    let bracket = text.rfind(']').map_or(0, |at| at + 1);
    let (host, port) = match text[bracket..].find(':') {
        Some(colon) => (&text[..bracket + colon], Some(&text[bracket + colon + 1..])),
        None => (text, None),
    };
    if host.contains(':') != host.starts_with('[') {
        return Err("an IPv6 address stands in brackets".to_owned());
    }
    let host = Host::parse(host).map_err(|error| error.to_string())?;
    let port = match (port, default) {
        (Some(port), _) => parse_port(port).ok_or("port is not a number from 1 to 65535")?,
        (None, Some(default)) => default,
        (None, None) => return Err("host without a port".to_owned()),
    };
    Ok((host, port))
}

/// Digits only, no sign, no leading zero.
fn parse_port(text: &str) -> Option<u16> {
    let plain = text.bytes().all(|byte| byte.is_ascii_digit()) && !text.starts_with('0');
    if plain { text.parse().ok() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn authorities() {
        let read = |text| authority(text, None).map(|(host, port)| format!("{host} {port}"));
        assert_eq!(read("Example.com.:443").as_deref(), Ok("example.com 443"));
        assert_eq!(read("10.0.0.1:80").as_deref(), Ok("10.0.0.1 80"));
        assert_eq!(read("[2001:DB8::1]:8443").as_deref(), Ok("[2001:db8::1] 8443"));
        for bad in [
            "",
            ":443",
            "h",
            "h:",
            "h:0",
            "h:+1",
            "h:01",
            "h:65536",
            "h:1:2",
            "h:1x",
            "h: 1",
            "2001:db8::1:443",
            "[2001:db8::1]",
            "[::1",
            "[::1]443",
            "[h]:1",
            "u@h:1",
            "h/x:1",
            "127.1:80",
            "0x7f000001:80",
            "2130706433:80",
            "[fe80::1%eth0]:1",
            "[::ffff:1.2.3.4]:1",
            "]:1",
            "a]:1",
            "http://h:1",
            "é:1",
        ] {
            assert!(read(bad).is_err(), "{bad:?}");
        }
        assert_eq!(authority("h", Some(80)).map(|(_, port)| port), Ok(80));
    }
}

//! Whom a captured client asks for, read from its first bytes and left in the reader: the name in
//! its `ClientHello`, or `Host` of its first request.

use std::time::Duration;

use tokio::time::timeout;

use super::connect::authority;
use super::http::head::{self, HEAD_TIMEOUT};
use super::stream::Conn;
use super::tunnel::{First, client_hello, recognise};
use crate::policy::Host;

/// What the client's first bytes name.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Asked {
    /// This host.
    Host(Host),
    /// No host: there is none in them, or the client waits for the server to speak.
    Nothing,
    /// What they name cannot be told.
    Unclear(String),
    /// The client is gone.
    Gone,
}

/// Reads as much as it takes. A client that says nothing for `silence` asks for nothing.
pub(crate) async fn asked_for(client: &mut Conn, silence: Duration) -> Asked {
    loop {
        match recognise(client.rd.data()) {
            Some(First::Tls) => return in_tls(client).await,
            Some(First::Http) => return in_http(client).await,
            Some(_) => return Asked::Nothing,
            None => {}
        }
        let begun = !client.rd.data().is_empty();
        let wait = if begun { HEAD_TIMEOUT } else { silence };
        match timeout(wait, client.rd.fill()).await {
            Err(_) if begun => return Asked::Unclear("incomplete HTTP request".to_owned()),
            Err(_) => return Asked::Nothing,
            Ok(Ok(0) | Err(_)) => return Asked::Gone,
            Ok(Ok(_)) => {}
        }
    }
}

async fn in_tls(client: &mut Conn) -> Asked {
    match client_hello(client).await {
        Ok(Some(accepted)) => match accepted.client_hello().server_name().map(Host::parse) {
            Some(Ok(host)) => Asked::Host(host),
            Some(Err(error)) => Asked::Unclear(format!("the name in TLS (SNI): {error}")),
            None => Asked::Nothing,
        },
        Ok(None) => Asked::Gone,
        Err(reason) => Asked::Unclear(reason),
    }
}

async fn in_http(client: &mut Conn) -> Asked {
    // Stands for a port that was left out; a port that is there is compared once the host is
    // judged, with each request's.
    const NO_PORT: u16 = 0;
    let head = match head::peek_request(&mut client.rd).await {
        Ok(head) => head,
        Err(error) => return Asked::Unclear(error.to_string()),
    };
    if !head.fields.has("host") {
        return Asked::Nothing;
    }
    match head.host().map(|host| authority(host, Some(NO_PORT))) {
        Some(Ok((host, _))) => Asked::Host(host),
        Some(Err(error)) => Asked::Unclear(format!("Host: {error}")),
        None => Asked::Unclear("Host is not text".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt as _;
    use tokio::net::{TcpListener, TcpStream};

    use super::*;
    use crate::proxy::stream::Stream;

    /// What is found when `parts` come one after the other.
    async fn found(parts: &[&[u8]], close: bool) -> Asked {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("listener");
        let address = listener.local_addr().expect("address");
        let mut peer = TcpStream::connect(address).await.expect("peer");
        let (tcp, _) = listener.accept().await.expect("accept");
        let mut client = Conn::new(Stream::Tcp(tcp));
        let send = async {
            for part in parts {
                peer.write_all(part).await.expect("send");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            if close {
                peer.shutdown().await.expect("shutdown");
            }
        };
        let (asked, ()) = tokio::join!(asked_for(&mut client, Duration::from_millis(500)), send);
        if !close {
            let sent: usize = parts.iter().map(|part| part.len()).sum();
            assert!(client.rd.data().len() <= sent);
            assert!(parts.concat().starts_with(client.rd.data()), "left as it came");
        }
        asked
    }

    fn host(name: &str) -> Asked {
        Asked::Host(Host::parse(name).expect("host"))
    }

    #[tokio::test]
    async fn names_in_requests() {
        let whole = b"GET / HTTP/1.1\r\nHost: Api.example.com:8080\r\n\r\n";
        assert_eq!(found(&[whole], false).await, host("api.example.com"));
        let (start, end) = whole.split_at(20);
        assert_eq!(found(&[start, end], false).await, host("api.example.com"));
        assert_eq!(found(&[b"GET / HTTP/1.0\r\n\r\n"], false).await, Asked::Nothing);
        assert_eq!(found(&[b"\x00raw"], false).await, Asked::Nothing);
        assert_eq!(found(&[], false).await, Asked::Nothing);
        assert_eq!(found(&[], true).await, Asked::Gone);
        for unclear in [
            &b"GET / HTTP/1.1\r\n\r\n"[..],
            b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: \xff\r\n\r\n",
            b"GET / HTTP/1.1\nHost: a\n\n",
        ] {
            let asked = found(&[unclear], false).await;
            assert!(matches!(asked, Asked::Unclear(_)), "{unclear:?}: {asked:?}");
        }
    }

    #[tokio::test]
    async fn names_in_tls() {
        let hello = |name: &str| {
            let config = rustls::ClientConfig::builder_with_provider(crate::pki::provider())
                .with_safe_default_protocol_versions()
                .expect("versions")
                .with_root_certificates(rustls::RootCertStore::empty())
                .with_no_client_auth();
            let name = name.to_owned().try_into().expect("name");
            let mut client = rustls::ClientConnection::new(config.into(), name).expect("client");
            let mut bytes = Vec::new();
            client.write_tls(&mut bytes).expect("hello");
            bytes
        };
        let named = hello("API.example.com");
        assert_eq!(found(&[&named], false).await, host("api.example.com"));
        let parts: Vec<&[u8]> = [&named[..1], &named[1..7], &named[7..]].into();
        assert_eq!(found(&parts, false).await, host("api.example.com"));
        assert_eq!(found(&[&hello("10.0.0.1")], false).await, Asked::Nothing);
        let no_hello = b"\x16\x03\x01\x00\x04\x02\x00\x00\x00";
        assert!(matches!(found(&[no_hello], false).await, Asked::Unclear(_)));
        assert_eq!(found(&[&named[..40]], true).await, Asked::Gone);
    }
}

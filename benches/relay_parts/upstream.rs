//! The upstream: TLS, keep-alive, two answers.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use ringfence::pki::{Authority, LeafKey, SubjectName, provider};
use rustls::ServerConfig;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

use crate::{LARGE, NAME, SMALL, UPSTREAM};

/// Serves for ever, once the authority's certificate is in the directory.
pub fn serve(directory: &Path) {
    let day = Duration::from_secs(86_400);
    let authority = Authority::ephemeral("Upstream CA", day).expect("an authority");
    let key = LeafKey::generate().expect("a key");
    let leaf = authority.leaf(&[SubjectName::Dns(NAME.to_owned())], day, &key).expect("a leaf");
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(leaf)));
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let listener = TcpListener::bind(UPSTREAM).await.expect("a listener");
        let part = directory.join("part");
        std::fs::write(&part, authority.certificate_pem()).expect("the certificate");
        std::fs::rename(part, directory.join("upstream-ca.pem")).expect("the certificate");
        loop {
            let (tcp, _) = listener.accept().await.expect("accepted");
            let acceptor = acceptor.clone();
            tokio::spawn(async move { connection(tcp, &acceptor).await });
        }
    });
}

async fn connection(tcp: TcpStream, acceptor: &TlsAcceptor) -> std::io::Result<()> {
    tcp.set_nodelay(true)?;
    let mut tls = acceptor.accept(tcp).await?;
    let small = [answer(SMALL).as_bytes(), &[b'x'; SMALL]].concat();
    let (mut request, mut buffer) = (Vec::new(), vec![0; 8192]);
    loop {
        let count = tls.read(&mut buffer).await?;
        if count == 0 {
            return Ok(());
        }
        request.extend_from_slice(&buffer[..count]);
        if !request.ends_with(b"\r\n\r\n") {
            continue;
        }
        if request.starts_with(b"GET /ok/large ") {
            tls.write_all(answer(LARGE as usize).as_bytes()).await?;
            let piece = vec![b'x'; 256 * 1024];
            for _ in 0..LARGE as usize / piece.len() {
                tls.write_all(&piece).await?;
            }
        } else {
            tls.write_all(&small).await?;
        }
        tls.flush().await?;
        request.clear();
    }
}

fn answer(length: usize) -> String {
    format!("HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: {length}\r\n\r\n")
}

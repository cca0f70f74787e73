//! Clients, and what they read.

use std::io::Read;
use std::sync::Arc;

use ringfence::pki::provider;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore};

pub fn client(ca_pem: &[u8], sni: &str, alpn: &[&str]) -> ClientConnection {
    let name = ServerName::try_from(sni.to_owned()).expect("name");
    ClientConnection::new(client_config(ca_pem, alpn), name).expect("client")
}

/// With sessions of its own.
pub fn client_config(ca_pem: &[u8], alpn: &[&str]) -> Arc<ClientConfig> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(ca_pem).expect("pem")).expect("root");
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = alpn.iter().map(|one| one.as_bytes().to_vec()).collect();
    Arc::new(config)
}

/// One head, its empty line included.
pub fn read_head(from: &mut impl Read) -> String {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        match from.read(&mut byte) {
            Ok(1) => head.push(byte[0]),
            end => panic!("{end:?} after {:?}", String::from_utf8_lossy(&head)),
        }
    }
    String::from_utf8(head).expect("utf-8")
}

/// One response with its body by Content-Length.
pub fn read_response(from: &mut impl Read) -> (String, String) {
    let head = read_head(from);
    let length = head
        .lines()
        .find_map(|line| line.strip_prefix("Content-Length: "))
        .map_or(0, |length| length.parse().expect("length"));
    let mut body = vec![0; length];
    from.read_exact(&mut body).expect("body");
    (head, String::from_utf8(body).expect("utf-8"))
}

/// All until the end, however it comes.
pub fn read_to_end(from: &mut impl Read) -> String {
    let mut all = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => break,
            Ok(read) => all.extend_from_slice(&buffer[..read]),
            Err(error) => {
                assert_ne!(error.kind(), std::io::ErrorKind::WouldBlock, "nothing came: {all:?}");
                break;
            }
        }
    }
    String::from_utf8_lossy(&all).into_owned()
}

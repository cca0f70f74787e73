//! Handshakes with the server's own configuration, over a pipe.

use std::time::Duration;

use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use rustls::pki_types::PrivateKeyDer;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::*;
use crate::pki::Authority;
use crate::pki::rotation::{LEAF_LIFE, Serving};

/// Somebody who issues certificates for clients.
struct Issuing {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

impl Issuing {
    fn new() -> Self {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let pem = params.self_signed(&key).expect("a CA").pem();
        Self { issuer: Issuer::new(params, key), pem }
    }

    fn certificate(&self, name: &str, usage: ExtendedKeyUsagePurpose) -> Certificate {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::new([name.to_owned()]).expect("a name");
        params.extended_key_usages = vec![usage];
        let certificate = params.signed_by(&key, &self.issuer).expect("signed");
        let key = PrivateKeyDer::try_from(key.serialize_der()).expect("PKCS#8");
        (certificate.der().clone(), key)
    }
}

type Certificate = (CertificateDer<'static>, PrivateKeyDer<'static>);

/// What comes of a connection with, or without, a certificate: a byte there and back, or an error.
async fn connect(clients: Arc<ClientAuth>, certificate: Option<Certificate>) -> Result<(), String> {
    let ca = Authority::ephemeral("test CA", Duration::from_secs(86_400)).expect("an authority");
    let mut roots = RootCertStore::empty();
    for der in CertificateDer::pem_slice_iter(ca.certificate_pem().as_bytes()) {
        roots.add(der.expect("PEM")).expect("a CA");
    }
    let serving = Serving::new(ca, "hook", "ns", LEAF_LIFE).expect("a leaf");
    let server = crate::admission::server::tls_config(Arc::new(serving), Some(clients));
    let server = tokio_rustls::TlsAcceptor::from(Arc::new(server.expect("a configuration")));
    let client = rustls::ClientConfig::builder_with_provider(crate::pki::provider())
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(roots);
    let client = match certificate {
        Some((chain, key)) => client.with_client_auth_cert(vec![chain], key).expect("a pair"),
        None => client.with_no_client_auth(),
    };
    let (near, far) = tokio::io::duplex(1 << 16);
    let answering = async move {
        let mut stream = server.accept(far).await.map_err(|error| error.to_string())?;
        let byte = stream.read_u8().await.map_err(|error| error.to_string())?;
        stream.write_u8(byte).await.map_err(|error| error.to_string())
    };
    let asking = async move {
        let connector = tokio_rustls::TlsConnector::from(Arc::new(client));
        let name = ServerName::try_from("hook.ns.svc").expect("a name");
        let mut stream = connector.connect(name, near).await.map_err(|error| error.to_string())?;
        stream.write_u8(7).await.map_err(|error| error.to_string())?;
        // TLS 1.3 tells a client of its refusal where it reads.
        stream.read_u8().await.map(drop).map_err(|error| error.to_string())
    };
    let (answered, asked) = tokio::join!(answering, asking);
    assert_eq!(answered.is_ok(), asked.is_ok(), "{answered:?} {asked:?}");
    answered
}

#[tokio::test]
async fn only_the_api_servers_certificate_is_let_in() {
    use ExtendedKeyUsagePurpose::{ClientAuth as Client, ServerAuth as Server};
    let (ours, other) = (Issuing::new(), Issuing::new());
    let named = ["api.cluster.example".to_owned(), "api-2.cluster.example".to_owned()];
    let named = Arc::new(ClientAuth::new(ours.pem.as_bytes(), &named).expect("verifies"));
    let any = Arc::new(ClientAuth::new(ours.pem.as_bytes(), &[]).expect("verifies"));
    let name = "api.cluster.example";
    for (clients, certificate, good) in [
        (&named, Some(ours.certificate(name, Client)), true),
        (&named, Some(ours.certificate("api-2.cluster.example", Client)), true),
        (&named, Some(ours.certificate("kubelet.cluster.example", Client)), false),
        (&named, Some(other.certificate(name, Client)), false),
        (&named, Some(ours.certificate(name, Server)), false),
        (&named, None, false),
        (&any, Some(ours.certificate("kubelet.cluster.example", Client)), true),
        (&any, Some(other.certificate(name, Client)), false),
        (&any, None, false),
    ] {
        let done = connect(Arc::clone(clients), certificate).await;
        assert_eq!(done.is_ok(), good, "{done:?}");
    }
}

#[test]
fn what_verifies_nobody_is_refused() {
    let pem = Issuing::new().pem;
    for (bundle, name) in
        [("", "a.example"), ("no certificate", "a.example"), (&pem, "10.0.0.1"), (&pem, "a b")]
    {
        ClientAuth::new(bundle.as_bytes(), &[name.to_owned()]).expect_err(name);
    }
}

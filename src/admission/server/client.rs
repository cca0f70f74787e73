//! Who may ask for reviews: whoever has a certificate of the API server's.

use std::sync::Arc;

use rustls::client::danger::HandshakeSignatureValid;
use rustls::client::verify_server_name;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, RootCertStore,
    SignatureScheme,
};

/// Why the client's certificates cannot be verified.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientAuthError {
    /// The bundle is not PEM, or holds nothing.
    #[error("it holds no certificate: {0}")]
    Bundle(String),
    /// A name is none.
    #[error("`{0}` is not a DNS name")]
    Name(String),
}

/// Verifies the certificate of whoever connects; without one there is no connection.
#[derive(Debug)]
pub struct ClientAuth {
    chain: Arc<dyn ClientCertVerifier>,
    names: Vec<ServerName<'static>>,
}

impl ClientAuth {
    /// Takes certificates for TLS clients (RFC 5280, 4.2.1.12) by a CA of the bundle (PEM), that have
    /// one of the DNS names; any of that CA's without names.
    ///
    /// # Errors
    /// When the bundle or a name is none.
    pub fn new(bundle_pem: &[u8], names: &[String]) -> Result<Self, ClientAuthError> {
        let bundle = |error: &dyn std::fmt::Display| ClientAuthError::Bundle(error.to_string());
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_slice_iter(bundle_pem) {
            let certificate = certificate.map_err(|error| bundle(&error))?;
            roots.add(certificate).map_err(|error| bundle(&error))?;
        }
        let roots = Arc::new(roots);
        let chain = WebPkiClientVerifier::builder_with_provider(roots, crate::pki::provider())
            .build()
            .map_err(|error| bundle(&error))?;
        let names = names.iter().map(|name| match ServerName::try_from(name.clone()) {
            Ok(parsed @ ServerName::DnsName(_)) => Ok(parsed),
            _ => Err(ClientAuthError::Name(name.clone())),
        });
        Ok(Self { chain, names: names.collect::<Result<_, _>>()? })
    }
}

impl ClientCertVerifier for ClientAuth {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.chain.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self.chain.verify_client_cert(end_entity, intermediates, now)?;
        let parsed = ParsedCertificate::try_from(end_entity)?;
        let has = |name| verify_server_name(&parsed, name).is_ok();
        if self.names.is_empty() || self.names.iter().any(has) {
            return Ok(verified);
        }
        Err(Error::InvalidCertificate(CertificateError::NotValidForName))
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}

#[cfg(test)]
#[path = "client_tests.rs"]
mod tests;

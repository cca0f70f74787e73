//! TLS towards the agent: one leaf a host, signed on demand by the sandbox CA.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustls::ServerConfig;
use rustls::crypto::aws_lc_rs::{Ticketer, kx_group};
use rustls::server::{NoServerSessionStorage, ProducesTickets};
use rustls::sign::SingleCertAndKey;

use crate::pki::{Authority, LeafKey, PkiError, SubjectName, provider};
use crate::policy::Host;

/// The application protocols that we speak on both sides, and an older name.
pub(crate) const HTTP2: &[u8] = b"h2";
pub(crate) const HTTP11: &[u8] = b"http/1.1";
pub(crate) const HTTP10: &[u8] = b"http/1.0";

/// How long a leaf is valid, and how long it is used: clients keep sessions for a while.
const LEAF_VALID: Duration = Duration::from_secs(30 * 86_400);
const LEAF_USED: Duration = Duration::from_secs(20 * 86_400);

/// How many hosts' leaves are kept.
const KEPT: usize = 256;

/// Why no TLS configuration could be made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TlsError {
    #[error(transparent)]
    Pki(#[from] PkiError),
    #[error("TLS configuration: {0}")]
    Rustls(#[from] rustls::Error),
}

/// Makes and keeps what is needed to be any host towards the agent.
pub(crate) struct AgentTls {
    authority: Authority,
    key: LeafKey,
    tickets: Arc<dyn ProducesTickets>,
    kept: Mutex<Kept>,
}

#[derive(Default)]
struct Kept {
    hosts: HashMap<String, Entry>,
    /// Counts uses: the entry with the smallest number was used longest ago.
    clock: u64,
}

struct Entry {
    config: Arc<ServerConfig>,
    made: Instant,
    used: u64,
}

impl AgentTls {
    pub(crate) fn new(authority: Authority) -> Result<Self, TlsError> {
        Ok(Self {
            authority,
            key: LeafKey::generate()?,
            tickets: Ticketer::new()?,
            kept: Mutex::default(),
        })
    }

    /// What to answer a `ClientHello` for `host` with. `alpn`: the protocol to agree on, none to
    /// leave the extension out.
    pub(crate) fn config(
        &self,
        host: &Host,
        alpn: Option<&[u8]>,
    ) -> Result<Arc<ServerConfig>, TlsError> {
        let config = match self.kept(host.as_str()) {
            Some(config) => config,
            None => self.make(host)?,
        };
        if alpn == Some(HTTP11) {
            return Ok(config);
        }
        let mut config = ServerConfig::clone(&config);
        config.alpn_protocols = alpn.map(<[u8]>::to_vec).into_iter().collect();
        Ok(Arc::new(config))
    }

    fn kept(&self, host: &str) -> Option<Arc<ServerConfig>> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.clock += 1;
        let now = kept.clock;
        let entry = kept.hosts.get_mut(host).filter(|entry| entry.made.elapsed() < LEAF_USED)?;
        entry.used = now;
        Some(Arc::clone(&entry.config))
    }

    /// Signs outside the lock: two connections at once may both do it, the second stays.
    fn make(&self, host: &Host) -> Result<Arc<ServerConfig>, TlsError> {
        let name = match host.ip() {
            Some(ip) => SubjectName::Ip(ip),
            None => SubjectName::Dns(host.as_str().to_owned()),
        };
        let leaf = self.authority.leaf(&[name], LEAF_VALID, &self.key)?;
        let mut crypto = rustls::crypto::CryptoProvider::clone(&provider());
        // The agent is a veth away: nothing here outlives today's traffic.
        crypto.kx_groups = vec![kx_group::X25519, kx_group::SECP256R1, kx_group::SECP384R1];
        let mut config = ServerConfig::builder_with_provider(Arc::new(crypto))
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_cert_resolver(Arc::new(SingleCertAndKey::from(leaf)));
        config.alpn_protocols = vec![HTTP11.to_vec()];
        // Tickets carry the sessions, bound to their server name, for all hosts with one key.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.ticketer = Arc::clone(&self.tickets);
        let config = Arc::new(config);
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.hosts.len() >= KEPT && !kept.hosts.contains_key(host.as_str()) {
            let oldest = kept.hosts.iter().min_by_key(|(_, entry)| entry.used);
            if let Some(oldest) = oldest.map(|(host, _)| host.clone()) {
                kept.hosts.remove(&oldest);
            }
        }
        let entry = Entry { config: Arc::clone(&config), made: Instant::now(), used: kept.clock };
        kept.hosts.insert(host.as_str().to_owned(), entry);
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_hosts_as_are_asked_for_and_no_more_kept() {
        let authority =
            Authority::ephemeral("Test CA", Duration::from_secs(3600)).expect("authority");
        let tls = AgentTls::new(authority).expect("tls");
        let host = |n: usize| Host::parse(&format!("h{n}.example.com")).expect("host");
        let first = tls.config(&host(0), Some(HTTP11)).expect("config");
        for n in 1..=KEPT {
            // The first one stays in use.
            let again = tls.config(&host(0), Some(HTTP11)).expect("config");
            assert!(Arc::ptr_eq(&first, &again));
            tls.config(&host(n), Some(HTTP11)).expect("config");
        }
        assert_eq!(tls.kept.lock().expect("lock").hosts.len(), KEPT);
        assert!(tls.kept("h1.example.com").is_none(), "the one used longest ago is gone");
    }
}

//! Names to addresses, only after the policy has said yes: the hosts file, then DNS in the pod's
//! namespace.
//!
//! A name with a dot is looked up as it is and only then with the search domains, whatever
//! `ndots` says: `api.example.com` must not become `api.example.com.some-namespace.svc…` because
//! that happens to exist, and needs one question instead of five. A name without a dot has only
//! the search domains.

use std::io::Read as _;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::SystemTime;

use hickory_resolver::config::{LookupIpStrategy, ResolveHosts, ResolverConfig};
use hickory_resolver::net::NetError;
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::proto::rr::Name;
use hickory_resolver::{TokioResolver, system_conf};
use tokio::sync::OnceCell;

use crate::policy::Host;

/// The most addresses of a name that are looked at.
const ADDRESSES: usize = 16;

/// The longest hosts or resolv.conf file that is read, in bytes.
const FILE_MAX: u64 = 1024 * 1024;

/// Why a name has no address.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ResolveError {
    #[error("no such name")]
    NoSuchName,
    #[error("the name has no address")]
    NoAddress,
    #[error("DNS: {0}")]
    Dns(String),
    #[error("{path}: {what}")]
    Config { path: String, what: String },
}

/// Looks names up.
pub(crate) struct Resolver {
    resolv_conf: PathBuf,
    strategy: LookupIpStrategy,
    dns: OnceCell<(TokioResolver, Vec<Name>)>,
    search: OnceLock<Vec<String>>,
    hosts: Hosts,
}

impl Resolver {
    /// The files are read when they are first needed. Addresses of a family that the pod does
    /// not have are not asked for.
    pub(crate) fn new(resolv_conf: PathBuf, hosts: PathBuf, pod_ips: &[IpAddr]) -> Self {
        let strategy =
            match (pod_ips.iter().any(IpAddr::is_ipv4), pod_ips.iter().any(IpAddr::is_ipv6)) {
                (true, false) => LookupIpStrategy::Ipv4Only,
                (false, true) => LookupIpStrategy::Ipv6Only,
                _ => LookupIpStrategy::Ipv4AndIpv6,
            };
        Self {
            resolv_conf,
            strategy,
            dns: OnceCell::new(),
            search: OnceLock::new(),
            hosts: Hosts::new(hosts),
        }
    }

    /// The addresses of a name, at least one, in the order to try them.
    pub(crate) async fn resolve(&self, host: &Host) -> Result<Vec<IpAddr>, ResolveError> {
        self.find(host, true).await
    }

    /// The same of what the hosts file has and of names within the pod's search domains: no other
    /// leaves the pod.
    pub(crate) async fn resolve_inside(&self, host: &Host) -> Result<Vec<IpAddr>, ResolveError> {
        let within = |domain: &String| {
            let front = host.as_str().strip_suffix(domain.as_str());
            !domain.is_empty() && front.is_some_and(|front| front.ends_with('.'))
        };
        let inside = self.search().iter().any(within);
        self.find(host, inside).await
    }

    /// `whole`: whether the name is asked for as it is, too.
    async fn find(&self, host: &Host, whole: bool) -> Result<Vec<IpAddr>, ResolveError> {
        if let Some(ip) = host.ip() {
            return Ok(vec![ip]);
        }
        let name = host.as_str();
        let listed = self.hosts.find(name);
        if !listed.is_empty() {
            return Ok(listed);
        }
        let (dns, search) = self.dns.get_or_try_init(|| async { self.configure() }).await?;
        let absolute = absolute(name)?;
        let mut result = Err(ResolveError::NoSuchName);
        let whole = (whole && name.contains('.')).then(|| absolute.clone());
        let searched = search.iter().filter_map(|domain| {
            let mut relative = absolute.clone();
            relative.set_fqdn(false);
            let mut name = relative.append_domain(domain).ok()?;
            name.set_fqdn(true);
            Some(name)
        });
        for name in whole.into_iter().chain(searched) {
            match look_up(dns, name).await {
                Err(ResolveError::NoSuchName) => {}
                Err(ResolveError::NoAddress) => result = Err(ResolveError::NoAddress),
                // A server that fails says nothing about the name: going on to the next
                // candidate could reach somebody else.
                found => return found,
            }
        }
        result
    }

    /// Whether the name has an address as it is, without search domains: what the fence's DNS
    /// asks, whose clients have done the searching.
    pub(crate) async fn exists(&self, host: &Host) -> Result<(), ResolveError> {
        if !self.hosts.find(host.as_str()).is_empty() {
            return Ok(());
        }
        let (dns, _) = self.dns.get_or_try_init(|| async { self.configure() }).await?;
        look_up(dns, absolute(host.as_str())?).await.map(drop)
    }

    /// The pod's search domains, in lower case and without the last dot; none where the file
    /// cannot be read.
    pub(crate) fn search(&self) -> &[String] {
        self.search.get_or_init(|| {
            let parsed = read(&self.resolv_conf).ok().and_then(|bytes| {
                system_conf::parse_resolv_conf(&bytes).ok().map(|(config, _)| config)
            });
            let plain =
                |name: &Name| name.to_lowercase().to_ascii().trim_end_matches('.').to_owned();
            parsed.iter().flat_map(|config| config.search().iter().map(plain)).collect()
        })
    }

    fn configure(&self) -> Result<(TokioResolver, Vec<Name>), ResolveError> {
        let failed = |what: String| ResolveError::Config {
            path: self.resolv_conf.display().to_string(),
            what,
        };
        let bytes = read(&self.resolv_conf).map_err(|error| failed(error.to_string()))?;
        let (config, mut options) =
            system_conf::parse_resolv_conf(&bytes).map_err(|error| failed(error.to_string()))?;
        let search = config.search().to_vec();
        options.ip_strategy = self.strategy;
        options.use_hosts_file = ResolveHosts::Never;
        options.cache_size = 1024;
        let servers = config.name_servers().to_vec();
        let config = ResolverConfig::from_parts(None, Vec::new(), servers);
        let mut builder =
            TokioResolver::builder_with_config(config, TokioRuntimeProvider::default());
        *builder.options_mut() = options;
        let resolver = builder.build().map_err(|error| failed(error.to_string()))?;
        Ok((resolver, search))
    }
}

fn absolute(name: &str) -> Result<Name, ResolveError> {
    let mut name =
        Name::from_ascii(name).map_err(|_| ResolveError::Dns("not a DNS name".to_owned()))?;
    name.set_fqdn(true);
    Ok(name)
}

/// Asks for one whole name.
async fn look_up(dns: &TokioResolver, name: Name) -> Result<Vec<IpAddr>, ResolveError> {
    match dns.lookup_ip(name).await {
        Ok(found) => {
            let addresses: Vec<IpAddr> = found.iter().take(ADDRESSES).collect();
            if addresses.is_empty() { Err(ResolveError::NoAddress) } else { Ok(addresses) }
        }
        Err(error) if error.is_nx_domain() => Err(ResolveError::NoSuchName),
        Err(error) if error.is_no_records_found() => Err(ResolveError::NoAddress),
        Err(error) => Err(ResolveError::Dns(describe(&error))),
    }
}

/// The error without what the server sent.
fn describe(error: &NetError) -> String {
    match error {
        NetError::Timeout => "no answer in time".to_owned(),
        NetError::Io(error) => error.to_string(),
        NetError::NoConnections => "no server could be reached".to_owned(),
        _ => "the server failed".to_owned(),
    }
}

fn read(path: &PathBuf) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    std::fs::File::open(path)?.take(FILE_MAX).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The lines of a hosts file, one name each.
type Entries = Arc<Vec<(IpAddr, String)>>;

/// The hosts file, read again when it changes.
struct Hosts {
    path: PathBuf,
    read: Mutex<Option<(SystemTime, Entries)>>,
}

impl Hosts {
    fn new(path: PathBuf) -> Self {
        Self { path, read: Mutex::default() }
    }

    /// The addresses of a lower-case name.
    fn find(&self, name: &str) -> Vec<IpAddr> {
        let matching = self.entries();
        matching.iter().filter(|(_, n)| n == name).map(|(ip, _)| *ip).take(ADDRESSES).collect()
    }

    fn entries(&self) -> Entries {
        let modified = std::fs::metadata(&self.path).and_then(|meta| meta.modified()).ok();
        let mut kept = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        if let (Some((at, entries)), Some(modified)) = (&*kept, modified)
            && *at == modified
        {
            return Arc::clone(entries);
        }
        let entries = Arc::new(parse_hosts(&read(&self.path).unwrap_or_default()));
        *kept = modified.map(|modified| (modified, Arc::clone(&entries)));
        entries
    }
}

fn parse_hosts(bytes: &[u8]) -> Vec<(IpAddr, String)> {
    let text = String::from_utf8_lossy(bytes);
    let mut entries = Vec::new();
    for line in text.lines() {
        let mut words = line.split('#').next().unwrap_or_default().split_ascii_whitespace();
        let Some(Ok(ip)) = words.next().map(str::parse::<IpAddr>) else {
            continue;
        };
        for name in words {
            let name = name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase();
            entries.push((ip, name));
        }
    }
    entries
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn hosts_file_is_followed_and_literals_need_none() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("hosts");
        let text = "10.1.1.1 One.example. one # 10.9.9.9 no\n::1 six\nnonsense x\n10.1.1.2 one\n";
        std::fs::write(&path, text).expect("write");
        let resolver = Resolver::new("/nonexistent".into(), path.clone(), &[]);
        let resolve = |name: &str| {
            let host = Host::parse(name).expect("host");
            let resolver = &resolver;
            async move { resolver.resolve(&host).await }
        };
        let ip = |text: &str| text.parse::<IpAddr>().expect("ip");
        assert_eq!(resolve("ONE.example").await.expect("listed"), [ip("10.1.1.1")]);
        assert_eq!(resolve("one").await.expect("listed"), [ip("10.1.1.1"), ip("10.1.1.2")]);
        assert_eq!(resolve("10.7.7.7").await.expect("literal"), [ip("10.7.7.7")]);
        let error = resolve("no").await.expect_err("no DNS here").to_string();
        assert!(error.starts_with("/nonexistent: "), "{error}");
        std::fs::write(&path, "10.2.2.2 two\n").expect("write");
        let later = SystemTime::now() + std::time::Duration::from_secs(5);
        let file = std::fs::File::options().write(true).open(&path).expect("open");
        file.set_modified(later).expect("touch");
        assert_eq!(resolve("two").await.expect("listed"), [ip("10.2.2.2")]);
    }
}

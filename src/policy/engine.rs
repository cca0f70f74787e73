//! The compiled policy: judges connections, requests and destinations.
//!
//! Everything is looked up by port, then by host; what a wildcard or no host names is tried one by
//! one. An endpoint stands for itself: the answer is the union over all endpoints that match, and a
//! denial beats every allowance.
#![forbid(unsafe_code)]

mod binaries;
mod compile;
mod content;
mod loose;
mod names;
mod request;

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use binaries::Named;
pub(super) use compile::compile;
use content::ContentRules;
use ipnet::IpNet;
use loose::Paths;
pub use names::NameMatch;

use super::decision::{Caller, Connect, Denial, Grant, Inspect, Request, TlsMode};
use super::destination::{self, DestinationDenied};
use super::document::{Compatibility, Filesystem, Process, Protocol};
use super::glob::{PathGlob, Scope, ValueGlob};
use super::host::Host;
use super::host_pattern::Wild;
use super::payload::{Inspection, Payload};
use super::rego::Judge;
use super::{suggestion, within};

/// A compiled policy. Nothing in it changes but by [`Policy::resolve_binaries`].
#[derive(Clone)]
pub struct Policy {
    filesystem: Filesystem,
    landlock: Compatibility,
    process: Process,
    /// Sorted by key: the index of the smallest key is the smallest index.
    policies: Vec<Named>,
    endpoints: Vec<Endpoint>,
    ports: HashMap<u16, Port>,
    names: Names,
    /// Who decides instead, where the policy came with a text of its own.
    judge: Option<Arc<Judge>>,
    /// Nothing passes that this one does not let pass too.
    pub(super) bounds: Option<Arc<Policy>>,
}

/// The hosts of all endpoints, whatever their ports.
#[derive(Debug, Clone, Default)]
struct Names {
    exact: HashSet<String>,
    wild: Vec<Wild>,
}

/// Indices of endpoints for one port.
#[derive(Debug, Clone, Default)]
struct Port {
    exact: HashMap<String, Vec<usize>>,
    wild: Vec<(Wild, usize)>,
    hostless: Vec<usize>,
    /// Whether one of them reads the content of requests.
    content: bool,
}

#[derive(Debug, Clone)]
#[allow(clippy::struct_excessive_bools, reason = "each is a condition of its own")]
struct Endpoint {
    policy: usize,
    named: bool,
    exact: bool,
    tls_skip: bool,
    /// `protocol: sql`.
    unread: bool,
    allowed_ips: Vec<IpNet>,
    inspected: Option<Inspected>,
}

#[derive(Debug, Clone)]
struct Inspected {
    protocol: Protocol,
    scope: Scope,
    enforce: bool,
    encoded_slash: bool,
    allow: Vec<Rule>,
    deny: Vec<DenyRule>,
    /// The endpoint's path in lower case, for its denials.
    folded: Scope,
    /// Instead of `allow` and `deny`, which are empty then.
    content: Option<ContentRules>,
    /// Beside them, on a WebSocket: rules for what text messages say in `GraphQL`.
    messages: Option<ContentRules>,
}

impl Inspected {
    /// Why the request cannot be judged, where this endpoint has a say.
    fn unreadable(&self, request: &Request<'_>) -> Option<String> {
        let content = self.content.as_ref().filter(|content| self.reads(content, request.path))?;
        content.unreadable(request.payload)
    }

    /// Whether the content of a request to this path matters.
    fn reads(&self, content: &ContentRules, path: &str) -> bool {
        self.scope.allows(path) || (content.has_denials() && self.scope.denies(path))
    }

    /// The rules for what a message on a WebSocket with this path says.
    fn reads_messages(&self, path: &str) -> Option<&ContentRules> {
        self.messages.as_ref().filter(|messages| self.reads(messages, path))
    }

    fn denies(&self, request: &Request<'_>) -> bool {
        if let Some(content) = &self.content {
            return content.denies(request.payload) && self.scope.denies(request.path);
        }
        let mut rules = self.deny.iter().filter(|rule| rule.concerns(request)).peekable();
        if rules.peek().is_none() {
            return false;
        }
        // Put together only where a denial could come of it.
        let paths = Paths::of(request.path);
        let in_scope = self.scope.denies(request.path) || paths.within(&self.folded);
        in_scope && rules.any(|rule| rule.denies(request, &paths))
    }
}

#[derive(Debug, Clone)]
struct Rule {
    method: Method,
    path: PathGlob,
    query: Vec<(String, Vec<ValueGlob>)>,
}

/// A rule that refuses, and its path in lower case: see [`loose`].
#[derive(Debug, Clone)]
struct DenyRule {
    rule: Rule,
    folded: PathGlob,
}

#[derive(Debug, Clone)]
enum Method {
    Any,
    /// HEAD too.
    Get,
    Other(String),
}

/// The method of a client's text message.
pub const WEBSOCKET_TEXT: &str = "WEBSOCKET_TEXT";
/// The method of a client's binary message. Ours: upstream's rules do not name these.
pub const WEBSOCKET_BINARY: &str = "WEBSOCKET_BINARY";

impl Method {
    fn matches(&self, method: &str) -> bool {
        match self {
            Self::Any => true,
            Self::Get => ["GET", "HEAD"].iter().any(|get| get.eq_ignore_ascii_case(method)),
            Self::Other(other) => other.eq_ignore_ascii_case(method),
        }
    }
}

impl Rule {
    /// Each key is there, and each of its values matches.
    fn allows(&self, request: &Request<'_>) -> bool {
        self.method.matches(request.method)
            && self.path.matches(request.path)
            && self.query.iter().all(|(key, globs)| {
                let mut values = request.query.iter().filter(|(k, _)| k == key).peekable();
                values.peek().is_some()
                    && values.all(|(_, value)| globs.iter().any(|glob| glob.matches(value)))
            })
    }
}

impl DenyRule {
    fn concerns(&self, request: &Request<'_>) -> bool {
        self.rule.method.matches(request.method)
    }

    /// The path matches in some reading, and of each key one value does: an absent key denies
    /// nothing.
    fn denies(&self, request: &Request<'_>, paths: &Paths) -> bool {
        let Rule { path, query, .. } = &self.rule;
        (path.matches(request.path) || paths.matched_by(&self.folded))
            && query.iter().all(|(key, globs)| loose::query_has(request, key, globs))
    }
}

/// The smallest index seen.
#[derive(Default, Clone, Copy)]
struct Smallest(Option<usize>);

impl Smallest {
    fn see(&mut self, index: usize) {
        self.0 = Some(self.0.map_or(index, |seen| seen.min(index)));
    }
}

impl Policy {
    /// Who decides: `native`, or `rego` where the policy came with a text of its own.
    #[must_use]
    pub fn engine(&self) -> &'static str {
        if self.judge.is_some() { "rego" } else { "native" }
    }

    /// Which files the agent reaches.
    #[must_use]
    pub fn filesystem(&self) -> &Filesystem {
        &self.filesystem
    }

    /// What happens when the kernel cannot enforce all file rules.
    #[must_use]
    pub fn landlock(&self) -> Compatibility {
        self.landlock
    }

    /// Who the agent runs as.
    #[must_use]
    pub fn process(&self) -> &Process {
        &self.process
    }

    /// The policies' keys, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.policies.iter().map(|policy| policy.key.as_str())
    }

    /// Whether anything may pass at all. Then each connection needs an owner, also where every
    /// program may make it: without a record of its connect it is nobody's, and refused.
    #[must_use]
    pub fn lets_out(&self) -> bool {
        self.judge.is_some() || !self.policies.is_empty()
    }

    /// Whether a verdict can depend on who asks.
    #[must_use]
    pub fn names_binaries(&self) -> bool {
        self.judge.is_some()
            || self.policies.iter().any(|policy| !policy.anyone)
            || self.bounded_by(Policy::names_binaries)
    }

    /// Whether the policy that bounds this one says so.
    fn bounded_by(&self, says: impl FnOnce(&Policy) -> bool) -> bool {
        self.bounds.as_deref().is_some_and(says)
    }

    /// Whether a verdict on this executable needs its SHA-256 ([`Caller::sha256`]).
    #[must_use]
    pub fn pins(&self, exe: &str) -> bool {
        self.policies.iter().any(|policy| policy.pins(exe))
            || self.bounded_by(|bounds| bounds.pins(exe))
    }

    /// Whether a verdict on this executable needs a look at the code that it runs
    /// ([`Caller::tainted`]).
    #[must_use]
    pub fn watches(&self, exe: &str) -> bool {
        self.policies.iter().any(|policy| policy.watches(exe))
            || self.bounded_by(|bounds| bounds.watches(exe))
    }

    /// Whether [`Policy::watches`] says yes to any executable.
    #[must_use]
    pub fn watches_any(&self) -> bool {
        self.policies.iter().any(Named::watches_any) || self.bounded_by(Policy::watches_any)
    }

    /// Adds, for each binary named without a wildcard that is a symlink, what it points to.
    ///
    /// `resolve` follows all links and returns the final absolute path, or `None` where there is
    /// none. Called once at start, before the agent runs: later the agent may own the links.
    pub fn resolve_binaries(&mut self, resolve: impl Fn(&str) -> Option<String>) {
        for policy in &mut self.policies {
            policy.resolve(&resolve);
        }
        if let Some(judge) = &mut self.judge {
            Arc::make_mut(judge).resolve_binaries(&resolve);
        }
    }

    /// Lets a text decide, with what it says about files and processes.
    pub(super) fn judged_by(
        self,
        judge: Judge,
        filesystem: Filesystem,
        landlock: Compatibility,
        process: Process,
    ) -> Self {
        Self { filesystem, landlock, process, judge: Some(Arc::new(judge)), ..self }
    }

    /// Judges a connection, before any DNS look-up.
    #[must_use]
    pub fn connect(&self, caller: &Caller, host: &Host, port: u16) -> Connect {
        let own = match &self.judge {
            Some(judge) => judge.connect(self, caller, host, port),
            None => self.connect_natively(caller, host, port),
        };
        match &self.bounds {
            Some(bounds) => within::connect(own, bounds.connect(caller, host, port)),
            None => own,
        }
    }

    /// As [`Policy::connect`], by the policy's own rules alone.
    pub(super) fn connect_natively(&self, caller: &Caller, host: &Host, port: u16) -> Connect {
        let mut smallest = Smallest::default();
        let mut inspect = false;
        let mut skip = false;
        let mut listed = false;
        let mut named = false;
        let mut exact_host = false;
        let mut allow_encoded_slash = false;
        let mut unread = true;
        let mut allowed_ips = Vec::new();
        for endpoint in self.matching(caller, host, port) {
            smallest.see(endpoint.policy);
            if let Some(inspected) = &endpoint.inspected {
                inspect = true;
                allow_encoded_slash |= inspected.encoded_slash;
            }
            skip |= endpoint.tls_skip;
            unread &= endpoint.unread;
            named |= endpoint.named;
            exact_host |= endpoint.exact;
            listed |= endpoint.named && !endpoint.allowed_ips.is_empty();
            allowed_ips.extend_from_slice(&endpoint.allowed_ips);
        }
        let Some(policy) = smallest.0 else {
            return Connect::Deny(self.unmatched(caller, host, port, None));
        };
        Connect::Allow(Grant {
            policy: self.policies[policy].key.clone(),
            inspect: if inspect { Inspect::Rest } else { Inspect::None },
            tls: if skip && !inspect { TlsMode::Skip } else { TlsMode::Auto },
            allowed_ips,
            restricted: listed || !named,
            exact_host,
            allow_encoded_slash,
            unread,
            also: None,
        })
    }

    /// Whether the content of requests to this path must be read before [`Policy::request`] is
    /// asked about them, and how. `path` is canonical.
    #[must_use]
    pub fn inspection(
        &self,
        caller: &Caller,
        host: &Host,
        port: u16,
        path: &str,
    ) -> Option<Inspection> {
        let own = match &self.judge {
            Some(judge) => judge.inspection(self, caller, host, port, path),
            None => self.inspection_natively(caller, host, port, path),
        };
        match &self.bounds {
            Some(bounds) => within::inspection(own, bounds.inspection(caller, host, port, path)),
            None => own,
        }
    }

    fn inspection_natively(
        &self,
        caller: &Caller,
        host: &Host,
        port: u16,
        path: &str,
    ) -> Option<Inspection> {
        if !self.ports.get(&port)?.content {
            return None;
        }
        let mut inspection = Inspection { max_bytes: usize::MAX, ..Inspection::default() };
        for inspected in self.matching(caller, host, port).filter_map(|e| e.inspected.as_ref()) {
            if let Some(content) = inspected.content.as_ref().filter(|c| inspected.reads(c, path)) {
                content.ask(&mut inspection);
            }
        }
        (inspection.max_bytes < usize::MAX).then_some(inspection)
    }

    /// Judges one address that the host resolved to, before it is dialled. Each is judged alone:
    /// dial only those that pass.
    ///
    /// The pod's own addresses are the caller's to judge: this room does not know them.
    ///
    /// # Errors
    /// Why the address must not be dialled.
    pub fn destination(
        &self,
        grant: &Grant,
        host: &Host,
        port: u16,
        ip: IpAddr,
    ) -> Result<(), DestinationDenied> {
        grant.all().try_for_each(|grant| destination::judge(grant, host, port, ip))
    }

    /// The endpoints for a host and a port, whoever asks.
    fn candidates<'p>(
        &'p self,
        host: &'p Host,
        port: u16,
    ) -> impl Iterator<Item = &'p Endpoint> + 'p {
        self.ports.get(&port).into_iter().flat_map(move |port| {
            let exact = port.exact.get(host.as_str()).into_iter().flatten();
            let wild = port.wild.iter().filter(|(wild, _)| wild.matches(host)).map(|(_, i)| i);
            exact.chain(wild).chain(&port.hostless).map(|index| &self.endpoints[*index])
        })
    }

    fn matching<'p>(
        &'p self,
        caller: &'p Caller,
        host: &'p Host,
        port: u16,
    ) -> impl Iterator<Item = &'p Endpoint> + 'p {
        // Endpoints of one policy stand side by side: ask once.
        let mut last = None;
        self.candidates(host, port).filter(move |endpoint| match last {
            Some((policy, admitted)) if policy == endpoint.policy => admitted,
            _ => {
                let admitted = self.policies[endpoint.policy].admits(caller);
                last = Some((endpoint.policy, admitted));
                admitted
            }
        })
    }

    /// Why entries that ask more of a caller than its path refuse this one, where no policy for the
    /// host and port admits it.
    pub(super) fn guarded_refusal(
        &self,
        caller: &Caller,
        host: &Host,
        port: u16,
    ) -> Option<String> {
        let mut policies = self.candidates(host, port).map(|e| &self.policies[e.policy]);
        let refusal = policies.find_map(|policy| policy.refuses(caller))?;
        let admitted = self.matching(caller, host, port).next().is_some();
        (!admitted).then_some(refusal)
    }

    /// Whether an endpoint for this caller asks that requests are judged.
    pub(super) fn inspects(&self, caller: &Caller, host: &Host, port: u16) -> bool {
        self.matching(caller, host, port).any(|endpoint| endpoint.inspected.is_some())
    }

    /// The refusal of a connection that no endpoint allows.
    fn unmatched(
        &self,
        caller: &Caller,
        host: &Host,
        port: u16,
        request: Option<&Request<'_>>,
    ) -> Denial {
        let refused = self
            .candidates(host, port)
            .find_map(|endpoint| self.policies[endpoint.policy].refuses(caller));
        if let Some(reason) = refused {
            return Denial {
                policy: "-".into(),
                reason,
                rule: request.map(rule_line).unwrap_or_default(),
                suggestion: NO_LINE_FOR_IT.into(),
            };
        }
        let listed = |path: &&String| {
            self.candidates(host, port).any(|e| self.policies[e.policy].lists(path))
        };
        let reason = if self.candidates(host, port).next().is_none() {
            NO_HOST.into()
        } else if let Some(ancestor) = caller.ancestors.iter().find(listed) {
            let ancestor = suggestion::printable(ancestor);
            format!("{NO_BINARY}: its ancestor {ancestor} is listed; {ONLY_ITSELF}")
        } else {
            NO_BINARY.into()
        };
        Denial {
            policy: "-".into(),
            reason,
            rule: request.map(rule_line).unwrap_or_default(),
            suggestion: suggestion::allow(&caller.exe, host, port, None),
        }
    }
}

const NO_HOST: &str = "no policy allows this host and port";
const NO_BINARY: &str = "the policy allows this host and port, but not for this binary";
const ONLY_ITSELF: &str = "only the executable itself counts";
pub(super) const DENY_RULE: &str = "a deny rule refuses this request";
const NO_RULE: &str = "no rule allows this request";
const ONLY_WEBSOCKET: &str = "only WebSocket connections are allowed here, not plain requests";
const NO_WEBSOCKET: &str = "no endpoint with `protocol: websocket` covers this path, and no rule \
                            allows every method of it";
const NO_COVER: &str = "no endpoint of the policy covers this path";
pub(super) const ENCODED_SLASH: &str =
    "the endpoint does not allow an encoded slash (%2F) in paths";
const NO_LINE_FOR_IT: &str = "# an entry of `binaries` names this executable and asks more of it \
                              (`sha256`, `tainted`): run what it asks for, or change the entry";
pub(super) const NO_LINE: &str = "# a deny rule refuses this request, and no added line can allow it: remove \
                       that rule or make it narrower";

pub(super) const NEAR: &str =
    "many servers take this path for one whose requests are read, and nobody reads it";
pub(super) const NO_NEAR: &str = "# write the path as the endpoint does, or give it a pattern that covers this \
                       spelling too";
pub(super) const UNREADABLE: &str = "# what cannot be read cannot be judged, and no line can allow it: send it \
                          as the protocol says, or name another protocol for this path";

pub(super) fn rule_line(request: &Request<'_>) -> String {
    let line = match request.payload.map(Payload::summary) {
        Some(said) if !said.is_empty() => format!("{} {} {said}", request.method, request.path),
        _ => format!("{} {}", request.method, request.path),
    };
    suggestion::printable(&line)
}

/// Counts only: a policy may be long.
impl fmt::Debug for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Policy")
            .field("network_policies", &self.policies.len())
            .field("endpoints", &self.endpoints.len())
            .field("engine", &self.engine())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;

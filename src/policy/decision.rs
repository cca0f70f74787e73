//! What is asked of a policy and what it answers.
#![forbid(unsafe_code)]

use ipnet::IpNet;

use super::payload::Payload;

/// Who asks: the process behind a connection, as the kernel named it when it called connect(2).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Caller {
    /// The executable's absolute path.
    pub exe: String,
    /// The executables of its parent, its parent's parent and so on. They count only for binaries
    /// with `ancestors: true`: any program can get any ancestor.
    pub ancestors: Vec<String>,
    /// SHA-256 of the executable; `None` where nobody read it. Needed where
    /// [`super::Policy::pins`] the executable: without it no pinned entry is the caller's.
    pub sha256: Option<[u8; 32]>,
    /// Why it runs other code than its executable's and the image's; `None` where it does not, or
    /// where nobody looked. Needed where [`super::Policy::watches`] the executable.
    pub tainted: Option<String>,
}

/// The answer to "may this process connect there?".
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Connect {
    /// Resolve the name, ask [`super::Policy::destination`] about each address, dial.
    Allow(Grant),
    /// Resolve nothing, dial nothing.
    Deny(Denial),
}

/// A connection that may be made, and under which conditions.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(clippy::struct_excessive_bools, reason = "each is a condition of its own")]
pub struct Grant {
    /// The lexicographically smallest key among the policies that match: the name for logs.
    pub policy: String,
    /// Whether each request must be judged.
    pub inspect: Inspect,
    /// What to do with TLS. Always `Auto` where requests are judged.
    pub tls: TlsMode,
    /// Addresses that may be dialled in any case (but the forbidden ones).
    pub allowed_ips: Vec<IpNet>,
    /// Only `allowed_ips` may be dialled: an endpoint that names the host lists addresses, or none
    /// names the host.
    pub restricted: bool,
    /// An endpoint names this very host, without a wildcard: private addresses may be dialled
    /// (where not `restricted`).
    pub exact_host: bool,
    /// An inspected endpoint allows `%2F` in paths: pass this to [`super::canonical_path`].
    pub allow_encoded_slash: bool,
    /// Only endpoints with `protocol: sql` let it pass: in audit, since nobody reads what is said.
    pub unread: bool,
    /// The grant of the policy that bounds this one: its conditions hold too ([`Self::all`]).
    pub also: Option<Box<Grant>>,
}

/// How deep a connection is looked into.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Inspect {
    /// Host and port only. [`super::Policy::request`] allows everything.
    None,
    /// Each HTTP request and each message of a WebSocket is judged: what is neither must be refused.
    Rest,
}

/// What happens to TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TlsMode {
    /// Found by the first bytes, and terminated.
    Auto,
    /// Passed through unread.
    Skip,
}

/// One HTTP request.
#[derive(Debug, Clone, Copy, Default)]
pub struct Request<'a> {
    /// As sent; compared without regard to case.
    pub method: &'a str,
    /// The canonical path (see [`super::canonical_path`]), without the query.
    pub path: &'a str,
    /// The query's pairs, decoded, in order.
    pub query: &'a [(String, String)],
    /// What its content says, where [`super::Policy::inspection`] asked for it.
    pub payload: Option<&'a Payload>,
    /// The methods that its header fields ask a server to take instead ([`super::Instead`]):
    /// each must be allowed as well.
    pub overrides: &'a [String],
}

/// The answer to "may this request pass?".
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Forward it.
    Allow {
        /// The smallest key among the policies that allow it.
        policy: String,
    },
    /// Not allowed, but `enforcement: audit` lets it pass: forward it and log it.
    Audit {
        /// The policy that would have refused it.
        policy: String,
        /// Why it would have been refused.
        reason: String,
    },
    /// Refuse it.
    Deny(Denial),
}

/// A refusal, with what a person needs to act on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Denial {
    /// The policy that refused, `-` when none matched.
    pub policy: String,
    /// Printable ASCII, about 512 bytes; names no other policy, and of what the agent chose at most
    /// the path of an ancestor. The words of a `policy.rego` are its author's.
    pub reason: String,
    /// `GET /path` for a request (path canonical, so printable ASCII), empty for a connection.
    pub rule: String,
    /// Lines of YAML that would allow it, or a comment why no line can. Printable ASCII and
    /// newlines only, at most about 2 KiB.
    pub suggestion: String,
}

//! What a Rego text answers about a connection, read strictly: what is not understood is refused.
#![forbid(unsafe_code)]

use ipnet::IpNet;
use serde_json::{Map, Value as Json};

use super::runner::Fault;
use crate::policy::check::parse_network;
use crate::policy::document::{DEFAULT_MAX_CONTENT, MAX_CONTENT};
use crate::policy::glob::Scope;
use crate::policy::suggestion::printable;

/// What the text says about a connection.
#[derive(Debug)]
pub(super) struct Egress {
    pub allowed: bool,
    /// The policy that it names. Printable ASCII.
    pub policy: Option<String>,
    /// Its words for a refusal. Printable ASCII, bounded.
    pub reason: Option<String>,
    pub configs: Vec<Config>,
    /// An endpoint names the host without a wildcard.
    pub exact_host: bool,
    /// An endpoint names the host.
    pub named: bool,
}

/// The object that describes an endpoint.
#[derive(Debug)]
#[allow(clippy::struct_excessive_bools, reason = "an endpoint's own keys")]
pub(super) struct Config {
    pub named: bool,
    pub inspected: bool,
    /// The most that is read of a `GraphQL` request, in bytes; `None` for other protocols.
    graphql: Option<usize>,
    denies: bool,
    pub enforce: bool,
    pub tls_skip: bool,
    pub allow_encoded_slash: bool,
    pub allowed_ips: Vec<IpNet>,
    /// `protocol: sql`.
    pub unread: bool,
    scope: Scope,
}

impl Config {
    /// Whether it is an inspected endpoint that speaks for this path.
    pub fn covers(&self, path: &str) -> bool {
        self.inspected && self.scope.allows(path)
    }

    /// How much of a request's content must be read, where it is an endpoint for this path that asks
    /// for it.
    pub fn reads(&self, path: &str) -> Option<usize> {
        let speaks = self.scope.allows(path) || (self.denies && self.scope.denies(path));
        self.graphql.filter(|_| speaks)
    }

    fn read(value: &Json) -> Result<Self, Fault> {
        let Json::Object(fields) = value else {
            return Err(shape("an endpoint's configuration", "an object", value));
        };
        let text = |key: &str| match fields.get(key) {
            None | Some(Json::Null) => Ok(None),
            Some(Json::String(text)) => Ok(Some(text.as_str()).filter(|text| !text.is_empty())),
            Some(other) => Err(shape(&format!("an endpoint's {key}"), "a string", other)),
        };
        let protocol = text("protocol")?.map(str::to_ascii_lowercase);
        let unread = protocol.as_deref() == Some("sql");
        let (inspected, graphql) = match protocol.as_deref() {
            // As in policy.yaml: bytes pass unread.
            None | Some("sql" | "tcp") => (false, None),
            Some("rest") => (true, None),
            Some("graphql") => (true, Some(max_content(fields)?)),
            Some(word) => return Err(unknown("protocol", word)),
        };
        let enforce = match text("enforcement")? {
            None | Some("audit") => false,
            Some("enforce") => true,
            Some(word) => return Err(unknown("enforcement", word)),
        };
        let tls_skip = match text("tls")? {
            None | Some("terminate" | "passthrough") => false,
            Some("skip") => true,
            Some(word) => return Err(unknown("tls", word)),
        };
        let scope = match text("path")? {
            None => Scope::Any,
            Some(path) => Scope::new(path).map_err(|bad| Fault::new(printable(&bad.what)))?,
        };
        Ok(Self {
            named: text("host")?.is_some(),
            inspected,
            unread,
            graphql,
            denies: fields
                .get("deny_rules")
                .and_then(Json::as_array)
                .is_some_and(|l| !l.is_empty()),
            enforce,
            tls_skip,
            allow_encoded_slash: boolean(fields, "allow_encoded_slash")?,
            allowed_ips: addresses(fields)?,
            scope,
        })
    }
}

fn max_content(fields: &Map<String, Json>) -> Result<usize, Fault> {
    let key = "graphql_max_body_bytes";
    let bytes = match fields.get(key) {
        None | Some(Json::Null) => return Ok(DEFAULT_MAX_CONTENT),
        Some(value) => value.as_u64().filter(|bytes| *bytes > 0).map(usize::try_from),
    };
    match bytes {
        Some(bytes) => Ok(bytes.unwrap_or(MAX_CONTENT).min(MAX_CONTENT)),
        None => Err(Fault::new(format!("an endpoint's {key} must be a positive integer"))),
    }
}

fn addresses(fields: &Map<String, Json>) -> Result<Vec<IpNet>, Fault> {
    let items = match fields.get("allowed_ips") {
        None | Some(Json::Null) => return Ok(Vec::new()),
        Some(Json::Array(items)) => items,
        Some(other) => return Err(shape("an endpoint's allowed_ips", "a list", other)),
    };
    let network = |item: &Json| match item.as_str().map(|text| (text, parse_network(text))) {
        Some((_, Some(network))) => Ok(network.trunc()),
        Some((text, None)) => Err(unknown("allowed_ips", text)),
        None => Err(shape("an entry of an endpoint's allowed_ips", "a string", item)),
    };
    items.iter().map(network).collect()
}

/// The list of configurations; a single one may stand for a list, as in `OpenShell`.
pub(super) fn configs(value: Option<&Json>) -> Result<Vec<Config>, Fault> {
    match value {
        None => Ok(Vec::new()),
        Some(Json::Array(items)) => items.iter().map(Config::read).collect(),
        Some(one @ Json::Object(_)) => Ok(vec![Config::read(one)?]),
        Some(other) => Err(shape("the list of endpoint configurations", "a list", other)),
    }
}

/// Whether one of the endpoints that matched names the host.
pub(super) fn names_host(value: Option<&Json>) -> Result<bool, Fault> {
    let items = match value {
        None => return Ok(false),
        Some(Json::Array(items)) => items,
        Some(other) => return Err(shape("matched_endpoints", "a list", other)),
    };
    let host = |item: &Json| item.get("host").and_then(Json::as_str).map(str::to_owned);
    Ok(items.iter().filter_map(host).any(|host| !host.is_empty()))
}

/// A string or nothing; bounded, and made printable.
pub(super) fn words(what: &str, value: Option<&Json>) -> Result<Option<String>, Fault> {
    match value {
        None | Some(Json::Null) => Ok(None),
        Some(Json::String(text)) if text.is_empty() => Ok(None),
        Some(Json::String(text)) => Ok(Some(printable(text))),
        Some(other) => Err(shape(what, "a string", other)),
    }
}

/// A yes, a no, or nothing, which is a no.
pub(super) fn yes(what: &str, value: Option<&Json>) -> Result<bool, Fault> {
    match value {
        None => Ok(false),
        Some(Json::Bool(value)) => Ok(*value),
        Some(other) => Err(shape(what, "true or false", other)),
    }
}

fn boolean(fields: &Map<String, Json>, key: &str) -> Result<bool, Fault> {
    match fields.get(key) {
        Some(Json::Null) => Ok(false),
        value => yes(&format!("an endpoint's {key}"), value),
    }
}

pub(super) fn shape(what: &str, wanted: &str, found: &Json) -> Fault {
    let kind = match found {
        Json::Null => "null",
        Json::Bool(_) => "a boolean",
        Json::Number(_) => "a number",
        Json::String(_) => "a string",
        Json::Array(_) => "a list",
        Json::Object(_) => "an object",
    };
    Fault::new(format!("{what} must be {wanted}, not {kind}"))
}

pub(super) fn unknown(key: &str, word: &str) -> Fault {
    Fault::new(format!("{key}: {:?} is not supported with a policy.rego", printable(word)))
}

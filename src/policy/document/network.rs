//! One entry of `network_policies`: its endpoints, rules and binaries.
#![forbid(unsafe_code)]

use super::content::{self, Content};
use super::process::one_of;
use super::rules::{Rule, allow_rules, deny_rules};
use crate::policy::digest::{self, Sha256};
use crate::policy::fields::{Fields, Located};
use crate::policy::problem::{Place, Problems};
use crate::policy::yaml::{Key, Node, Value};

/// One entry of `network_policies`.
#[derive(Debug)]
pub(in crate::policy) struct NetworkPolicy {
    /// Where its key stands.
    pub at: Place,
    pub endpoints: Vec<Endpoint>,
    pub binaries: Vec<Binary>,
}

/// One entry of `binaries`.
#[derive(Debug)]
pub(in crate::policy) struct Binary {
    pub path: Located,
    /// Where `ancestors: true` stands: descendants of the binary are meant too.
    pub ancestors: Option<Place>,
    /// What the file must hash to.
    pub sha256: Option<Sha256>,
    /// What is done with a caller that runs other code than its own.
    pub tainted: Option<Tainted>,
}

/// What is done with a caller that runs other code than its executable's and the image's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::policy) enum Tainted {
    Report,
    Refuse,
}

#[derive(Debug)]
pub(in crate::policy) struct Endpoint {
    /// `<policy>.endpoints[i]`, for messages.
    pub name: String,
    pub at: Place,
    /// Never empty.
    pub host: Option<Located>,
    pub ports: Vec<u16>,
    /// Where the ports stand.
    pub ports_at: Place,
    pub path: Option<Located>,
    /// `None` inside: refused already.
    pub protocol: Option<(Place, Option<Protocol>)>,
    pub tls_skip: Option<Place>,
    pub enforcement: Option<(Place, Enforcement)>,
    /// `None` inside: refused already.
    pub access: Option<(Place, Option<Access>)>,
    pub rules: Option<(Place, Vec<Rule>)>,
    pub deny_rules: Option<(Place, Vec<Rule>)>,
    pub allowed_ips: Option<(Place, Vec<Located>)>,
    pub allow_encoded_slash: bool,
    pub content: Content,
}

impl Endpoint {
    /// What it speaks, if that is something known.
    pub fn protocol(&self) -> Option<Protocol> {
        self.protocol.and_then(|(_, protocol)| protocol)
    }

    /// Whether a rule says what an operation of `GraphQL` must be.
    pub fn has_operations(&self) -> bool {
        let lists = self.rules.iter().chain(&self.deny_rules);
        lists.flat_map(|(_, rules)| rules).any(|rule| rule.operation.written().is_some())
    }

    /// Whether requests are judged. One with an unknown protocol counts: the policy is refused.
    pub fn inspects(&self) -> bool {
        self.protocol.is_some_and(|(_, protocol)| protocol.is_none_or(Protocol::inspects))
    }
}

/// What an endpoint speaks, and so what its rules judge.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::policy) enum Protocol {
    /// Method, path and query of each request.
    Rest,
    /// The handshake, and each message that the client sends.
    WebSocket,
    /// Each operation of a request.
    Graphql,
    /// Each call of a request.
    JsonRpc,
    /// The same, with tools, sessions and event streams.
    Mcp,
    /// Nothing: bytes pass unread (see `check`).
    Sql,
    /// Nothing: upstream's word for an endpoint of host and port only.
    Tcp,
}

impl Protocol {
    /// Upstream's word for it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Rest => "rest",
            Self::WebSocket => "websocket",
            Self::Graphql => "graphql",
            Self::JsonRpc => "json-rpc",
            Self::Mcp => "mcp",
            Self::Sql => "sql",
            Self::Tcp => "tcp",
        }
    }

    /// Whether requests are judged: otherwise host and port decide.
    pub fn inspects(self) -> bool {
        !matches!(self, Self::Sql | Self::Tcp)
    }

    /// Whether the content of requests is judged.
    pub fn reads_content(self) -> bool {
        matches!(self, Self::Graphql | Self::JsonRpc | Self::Mcp)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::policy) enum Enforcement {
    Audit,
    Enforce,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::policy) enum Access {
    ReadOnly,
    ReadWrite,
    Full,
}

pub(super) fn policy(key: &Key, node: &Node, problems: &mut Problems) -> NetworkPolicy {
    let mut policy = NetworkPolicy { at: key.at, endpoints: Vec::new(), binaries: Vec::new() };
    let name = &key.name;
    let Some(mut fields) = Fields::of(node, format!("network policy {name:?}"), problems) else {
        return policy;
    };
    if let Some(node) = fields.take_filled("name") {
        node.text(&fields.name("name"), problems);
    }
    if let Some(node) = fields.take_filled("endpoints") {
        let items = node.list(&fields.name("endpoints"), problems).unwrap_or_default();
        for (index, item) in items.iter().enumerate() {
            policy.endpoints.extend(endpoint(format!("{name}.endpoints[{index}]"), item, problems));
        }
    }
    if let Some(node) = fields.take_filled("binaries") {
        let items = node.list(&fields.name("binaries"), problems).unwrap_or_default();
        for (index, item) in items.iter().enumerate() {
            let what = format!("{name}.binaries[{index}]");
            policy.binaries.extend(binary(what, item, problems));
        }
    }
    fields.finish(None, problems);
    policy
}

fn binary(what: String, node: &Node, problems: &mut Problems) -> Option<Binary> {
    let mut fields = Fields::of(node, what, problems)?;
    let path = fields.take("path").and_then(|path| path.text(&fields.name("path"), problems));
    if path.is_none()
        && !matches!(&node.value, Value::Map(m) if m.iter().any(|(k, _)| k.name == "path"))
    {
        problems.error(node.at, format!("{} is missing", fields.name("path")), "name the binary");
    }
    // Ours. A value that is not a boolean is an error, and the policy does not load.
    let ancestors = fields
        .take("ancestors")
        .and_then(|node| node.boolean(&fields.name("ancestors"), problems)?.then_some(node.at));
    let sha256 = fields.take("sha256").map(|node| digest(node, &fields.name("sha256"), problems));
    let words = [("report", Tainted::Report), ("refuse", Tainted::Refuse)];
    let tainted = fields
        .take("tainted")
        .and_then(|node| one_of(node, &fields.name("tainted"), &words, problems));
    if fields.take("harness").is_some() {
        problems.warn(node.at, "`harness` has no effect", "remove it");
    }
    fields.take("advisor_proposed");
    fields.finish(None, problems);
    // A digest that is not one is an error already; the entry must not stand without it.
    Some(Binary { path: path?, ancestors, sha256: sha256.flatten(), tainted })
}

/// 64 hexadecimal digits, with or without `sha256:` before them.
fn digest(node: &Node, what: &str, problems: &mut Problems) -> Option<Sha256> {
    let word = node.text(what, problems)?;
    let digits = word.text.strip_prefix("sha256:").unwrap_or(&word.text);
    let digest = digest::from_hex(digits);
    if digest.is_none() {
        problems.error(
            word.at,
            format!("{what} {:?} is not a SHA-256", word.text),
            "write the 64 digits that `sha256sum` prints for the file",
        );
    }
    digest
}

fn endpoint(name: String, node: &Node, problems: &mut Problems) -> Option<Endpoint> {
    let mut fields = Fields::of(node, name.clone(), problems)?;
    let text = |fields: &mut Fields<'_>, key: &'static str, problems: &mut Problems| {
        let node = fields.take(key)?;
        node.text(&fields.name(key), problems)
    };
    let host = text(&mut fields, "host", problems).filter(|host| !host.text.is_empty());
    let path = text(&mut fields, "path", problems).filter(|path| !path.text.is_empty());
    let protocol = text(&mut fields, "protocol", problems);
    let tls = text(&mut fields, "tls", problems);
    let enforcement = text(&mut fields, "enforcement", problems);
    let access = text(&mut fields, "access", problems);
    let (ports_at, ports) = ports(&mut fields, node.at, problems);
    let rules = fields.take("rules").map(|node| (node.at, allow_rules(&name, node, problems)));
    let deny_rules =
        fields.take("deny_rules").map(|node| (node.at, deny_rules(&name, node, problems)));
    let allowed_ips = fields.take("allowed_ips").map(|node| {
        let what = fields.name("allowed_ips");
        let items = node.list(&what, problems).unwrap_or_default();
        let what = format!("an entry of {what}");
        (node.at, items.iter().filter_map(|item| item.text(&what, problems)).collect())
    });
    let allow_encoded_slash = fields
        .take("allow_encoded_slash")
        .and_then(|node| node.boolean(&fields.name("allow_encoded_slash"), problems))
        .unwrap_or(false);
    let content = content::read(&mut fields, problems);
    let endpoint = Endpoint {
        at: node.at,
        host,
        ports,
        ports_at,
        path,
        protocol: protocol.map(|word| (word.at, read_protocol(&name, &word, problems))),
        tls_skip: tls.and_then(|word| read_tls(&name, &word, problems)),
        enforcement: enforcement.and_then(|word| read_enforcement(&name, &word, problems)),
        access: access.map(|word| (word.at, read_access(&name, &word, problems))),
        rules,
        deny_rules,
        allowed_ips,
        allow_encoded_slash,
        content,
        name,
    };
    without_effect(&mut fields, problems);
    fields.finish(None, problems);
    Some(endpoint)
}

/// `ports` wins over `port`, as upstream.
fn ports(fields: &mut Fields<'_>, at: Place, problems: &mut Problems) -> (Place, Vec<u16>) {
    let single = fields.take("port");
    let several = fields.take("ports");
    let nodes = match several {
        Some(node) => match node.list(&fields.name("ports"), problems) {
            Some([]) | None => &[][..],
            Some(items) => items,
        },
        None => &[][..],
    };
    let shapeless = several.is_some_and(|node| !matches!(node.value, Value::List(_)));
    let nodes: Vec<&Node> = match single {
        Some(node) if nodes.is_empty() => vec![node],
        _ => nodes.iter().collect(),
    };
    if let (Some(single), Some(_)) = (single, several)
        && let Value::Int(port) = single.value
        && !nodes.iter().any(|node| matches!(node.value, Value::Int(p) if p == port))
    {
        problems.warn(
            single.at,
            "`ports` is there too: `port` has no effect",
            "remove one of them",
        );
    }
    if nodes.is_empty() && !shapeless {
        problems.error(
            at,
            format!("{} is missing: the endpoint would match nothing", fields.name("port")),
            "add `port: 443`",
        );
    }
    let mut ports = Vec::new();
    for node in &nodes {
        match node.value {
            Value::Int(port @ 1..=65535) => ports.extend(u16::try_from(port)),
            _ => problems.error(
                node.at,
                format!("{} is not a port", fields.name("port")),
                "write a number from 1 to 65535, without quotes",
            ),
        }
    }
    ports.sort_unstable();
    ports.dedup();
    (nodes.first().map_or(at, |node| node.at), ports)
}

fn read_protocol(name: &str, word: &Located, problems: &mut Problems) -> Option<Protocol> {
    const KNOWN: [Protocol; 7] = [
        Protocol::Rest,
        Protocol::WebSocket,
        Protocol::Graphql,
        Protocol::JsonRpc,
        Protocol::Mcp,
        Protocol::Sql,
        Protocol::Tcp,
    ];
    let lower = word.text.to_ascii_lowercase();
    if let Some(known) = KNOWN.into_iter().find(|known| known.word() == lower) {
        return Some(known);
    }
    problems.error(
        word.at,
        format!("{name}: unknown protocol {:?}", word.text),
        "use rest, websocket, graphql, json-rpc or mcp; remove the key to allow the whole host \
         and port",
    );
    None
}

fn read_tls(name: &str, word: &Located, problems: &mut Problems) -> Option<Place> {
    match word.text.as_str() {
        "skip" => return Some(word.at),
        "terminate" | "passthrough" => problems.warn(
            word.at,
            format!("{name}: `tls: {}` is deprecated: TLS is detected", word.text),
            "remove it",
        ),
        "" => {}
        other => problems.error(
            word.at,
            format!("{name}: unknown value {other:?} for tls"),
            "write `tls: skip`, or remove the key: TLS is detected",
        ),
    }
    None
}

fn read_enforcement(
    name: &str,
    word: &Located,
    problems: &mut Problems,
) -> Option<(Place, Enforcement)> {
    match word.text.as_str() {
        "audit" => Some((word.at, Enforcement::Audit)),
        "enforce" => Some((word.at, Enforcement::Enforce)),
        other => {
            problems.error(
                word.at,
                format!("{name}: unknown enforcement {other:?}"),
                "write enforce to refuse, audit to log only",
            );
            None
        }
    }
}

fn read_access(name: &str, word: &Located, problems: &mut Problems) -> Option<Access> {
    let access = match word.text.as_str() {
        "read-only" => Access::ReadOnly,
        "read-write" => Access::ReadWrite,
        "full" => Access::Full,
        other => {
            problems.error(
                word.at,
                format!("{name}: unknown access {other:?}"),
                "write read-only, read-write or full",
            );
            return None;
        }
    };
    Some(access)
}

/// Keys of upstream that mean nothing here.
fn without_effect(fields: &mut Fields<'_>, problems: &mut Problems) {
    const GATEWAY: &[&str] = &[
        "websocket_credential_rewrite",
        "request_body_credential_rewrite",
        "allow_uninspected_credentials",
        "credential_signing",
        "signing_service",
        "signing_region",
        "credential_binding",
        "advisor_proposed",
    ];
    for key in GATEWAY {
        if let Some(node) = fields.take(key) {
            let what = format!("{} has no effect without a gateway", fields.name(key));
            problems.warn(node.at, what, "remove it");
        }
    }
}

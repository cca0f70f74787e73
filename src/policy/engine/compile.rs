//! From the document to the compiled policy. A pattern that is not one is found here.
#![forbid(unsafe_code)]

use std::collections::HashMap;

use super::binaries::Asks;
use super::content::{CallMethod, CallRule, ContentRules, GraphqlRules, Kind, OperationRule};
use super::content::{Registered, RpcRules, TOOLS_CALL};
use super::{DenyRule, Endpoint, Inspected, Method, Named, Names, Policy, Port, Rule};
use crate::policy::document::{
    self, Access, DEFAULT_MAX_CONTENT, Document, Enforcement, Matcher, NetworkPolicy, Protocol,
};
use crate::policy::fields::Located;
use crate::policy::glob::{Bad, PathGlob, Scope, ValueGlob};
use crate::policy::host_pattern::HostPattern;
use crate::policy::payload::OperationKind;
use crate::policy::problem::{Place, Problems};
use crate::policy::{check, presets};

/// Checks and compiles. What it returns may be enforced only if `problems` holds no error.
pub(in crate::policy) fn compile(document: &Document, problems: &mut Problems) -> Policy {
    let mut compiler = Compiler {
        endpoints: Vec::new(),
        ports: HashMap::new(),
        names: Names::default(),
        problems,
    };
    let mut policies = Vec::new();
    for (key, policy) in &document.policies {
        check::binaries(key, policy, compiler.problems);
        check::endpoints(policy, compiler.problems);
        for endpoint in &policy.endpoints {
            compiler.endpoint(policies.len(), endpoint);
        }
        policies.push(compiler.named(key, policy));
    }
    let Compiler { endpoints, ports, names, .. } = compiler;
    Policy {
        filesystem: check::filesystem(document, problems),
        landlock: document.compatibility,
        process: check::process(document, problems),
        policies,
        endpoints,
        ports,
        names,
        judge: None,
        bounds: None,
    }
}

struct Compiler<'p> {
    endpoints: Vec<Endpoint>,
    ports: HashMap<u16, Port>,
    names: Names,
    problems: &'p mut Problems,
}

impl Compiler<'_> {
    /// Reports a bad pattern.
    fn good<T>(&mut self, at: Place, name: &str, result: Result<T, Bad>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(bad) => {
                self.problems.error(at, format!("{name}: {}", bad.what), bad.fix);
                None
            }
        }
    }

    fn named(&mut self, key: &str, policy: &NetworkPolicy) -> Named {
        let mut named = Named::new(key);
        for binary in &policy.binaries {
            if let Some(glob) =
                self.good(binary.path.at, key, PathGlob::of_binary(&binary.path.text))
            {
                let ancestors = binary.ancestors.is_some();
                let (sha256, tainted) = (binary.sha256, binary.tainted);
                named.add(glob, Asks { ancestors, sha256, tainted });
            }
        }
        named
    }

    fn endpoint(&mut self, policy: usize, endpoint: &document::Endpoint) {
        let name = &endpoint.name;
        let allowed_ips = check::addresses(endpoint, self.problems);
        let host = match &endpoint.host {
            Some(host) => match self.good(host.at, name, HostPattern::parse(&host.text)) {
                Some(pattern) => Some(pattern),
                None => return,
            },
            None => None,
        };
        let inspected = endpoint.inspects().then(|| self.inspected(endpoint));
        let content = inspected.as_ref().is_some_and(|inspected| inspected.content.is_some());
        let index = self.endpoints.len();
        for port in &endpoint.ports {
            let port = self.ports.entry(*port).or_default();
            port.content |= content;
            match &host {
                Some(HostPattern::Exact(host)) => {
                    port.exact.entry(host.as_str().to_owned()).or_default().push(index);
                }
                Some(HostPattern::Wild(wild)) => port.wild.push((wild.clone(), index)),
                None => port.hostless.push(index),
            }
        }
        match &host {
            Some(HostPattern::Exact(host)) if !endpoint.ports.is_empty() => {
                self.names.exact.insert(host.as_str().to_owned());
            }
            Some(HostPattern::Wild(wild)) if !endpoint.ports.is_empty() => {
                self.names.wild.push(wild.clone());
            }
            _ => {}
        }
        self.endpoints.push(Endpoint {
            policy,
            named: host.is_some(),
            exact: matches!(host, Some(HostPattern::Exact(_))),
            tls_skip: endpoint.tls_skip.is_some(),
            unread: endpoint.protocol() == Some(Protocol::Sql),
            allowed_ips,
            inspected,
        });
    }

    fn inspected(&mut self, endpoint: &document::Endpoint) -> Inspected {
        let name = &endpoint.name;
        let scope = match &endpoint.path {
            Some(path) => self.good(path.at, name, Scope::new(&path.text)).unwrap_or(Scope::Any),
            None => Scope::Any,
        };
        // What is none was refused, and the policy does not load.
        let protocol = endpoint.protocol().unwrap_or(Protocol::Rest);
        let enforce = endpoint.enforcement.is_some_and(|(_, e)| e == Enforcement::Enforce);
        let encoded_slash = endpoint.allow_encoded_slash;
        // One that is no pattern was reported.
        let folded = endpoint.path.as_ref().and_then(|path| Scope::folded(&path.text).ok());
        let folded = folded.unwrap_or(Scope::Any);
        if protocol.reads_content() {
            let content = Some(self.content(endpoint, protocol, &scope));
            let (allow, deny) = (Vec::new(), Vec::new());
            return Inspected {
                protocol,
                scope,
                enforce,
                encoded_slash,
                allow,
                deny,
                folded,
                content,
                messages: None,
            };
        }
        // On a WebSocket a rule is for methods, or for operations.
        let by_method = |rule: &&document::Rule| rule.operation.written().is_none();
        let rules = endpoint.rules.iter().flat_map(|(_, rules)| rules);
        let rules = rules.filter(by_method);
        let mut allow: Vec<_> = rules.filter_map(|rule| self.rule(name, rule)).collect();
        if let Some((_, Some(access))) = endpoint.access {
            let preset = presets::methods(protocol, access).iter().map(|method| Rule {
                method: read_method(method),
                path: PathGlob::Any,
                query: Vec::new(),
            });
            allow.extend(preset);
        }
        let deny = endpoint.deny_rules.iter().flat_map(|(_, rules)| rules).filter(by_method);
        let deny = deny.filter_map(|rule| self.deny_rule(name, rule)).collect();
        let messages = (protocol == Protocol::WebSocket && endpoint.has_operations())
            .then(|| self.graphql(endpoint, None, None));
        Inspected {
            protocol,
            scope,
            enforce,
            encoded_slash,
            allow,
            deny,
            folded,
            content: None,
            messages,
        }
    }

    fn content(
        &mut self,
        endpoint: &document::Endpoint,
        protocol: Protocol,
        scope: &Scope,
    ) -> ContentRules {
        let options = &endpoint.content;
        let name = &endpoint.name;
        // One that is no pattern was reported.
        let near = endpoint.path.as_ref();
        let near = near.and_then(|path| Scope::new(&path.text.to_lowercase()).ok());
        let allow = || endpoint.rules.iter().flat_map(|(_, rules)| rules);
        let deny = || endpoint.deny_rules.iter().flat_map(|(_, rules)| rules);
        if protocol == Protocol::Graphql {
            let access = endpoint.access.and_then(|(_, access)| access);
            return self.graphql(endpoint, access, near);
        }
        let mcp = protocol == Protocol::Mcp;
        let all_known = options.allow_all_known_methods();
        let mut rules = RpcRules {
            mcp,
            strict_tool_names: options.strict_tool_names(),
            scoped: !matches!(scope, Scope::Any),
            allow: allow().filter_map(|rule| self.call(name, rule, mcp)).collect(),
            deny: deny().filter_map(|rule| self.call(name, rule, mcp)).collect(),
        };
        if mcp && all_known && allow().next().is_none() {
            let (tool, params) = (Vec::new(), Vec::new());
            rules.allow.push(CallRule { method: CallMethod::Known, tool, params });
        }
        let json_rpc = options.json_rpc.and_then(|(_, max)| max);
        let of_mcp = options.mcp.as_ref().and_then(|(_, mcp)| mcp.max);
        let max = if mcp { of_mcp.or(json_rpc) } else { json_rpc };
        ContentRules { max: max.unwrap_or(DEFAULT_MAX_CONTENT), near, kind: Kind::Rpc(rules) }
    }

    /// Rules for operations of `GraphQL`: those that the endpoint lists, and what `access` allows.
    fn graphql(
        &mut self,
        endpoint: &document::Endpoint,
        access: Option<Access>,
        near: Option<Scope>,
    ) -> ContentRules {
        let options = &endpoint.content;
        let name = &endpoint.name;
        let allow = endpoint.rules.iter().flat_map(|(_, rules)| rules);
        let deny = endpoint.deny_rules.iter().flat_map(|(_, rules)| rules);
        let mut rules = GraphqlRules {
            allow: allow.filter_map(|rule| self.operation(name, &rule.operation)).collect(),
            deny: deny.filter_map(|rule| self.operation(name, &rule.operation)).collect(),
            registry: HashMap::new(),
        };
        if let Some(access) = access {
            let preset = presets::operations(access).iter();
            let rule = |kind: &_| OperationRule { kind: *kind, name: None, fields: Vec::new() };
            rules.allow.extend(preset.map(rule));
        }
        if let (Some((_, true)), Some((_, entries))) =
            (options.persisted_queries, &options.registry)
        {
            rules.registry.extend(entries.iter().map(|(key, query)| {
                let fields = query.fields.as_ref();
                let texts = |list: &Vec<Located>| list.iter().map(|f| f.text.clone()).collect();
                let registered = Registered {
                    kind: query.operation_type.as_ref().and_then(|word| read_kind(&word.text)),
                    name: query.operation_name.as_ref().map(|name| name.text.clone()),
                    fields: fields.map(|(_, list)| texts(list)),
                };
                (key.clone(), registered)
            }));
        }
        let max = options.graphql_max.map_or(DEFAULT_MAX_CONTENT, |(_, max)| max);
        ContentRules { max, near, kind: Kind::Graphql(rules) }
    }

    /// `None` for what `check` refuses.
    fn operation(&mut self, name: &str, rule: &document::OperationRule) -> Option<OperationRule> {
        let kind = rule.operation_type.as_ref()?;
        let written = rule.operation_name.as_ref().filter(|name| !name.text.is_empty());
        let operation = match written {
            Some(glob) => Some(self.good(glob.at, name, ValueGlob::new(&glob.text))?),
            None => None,
        };
        let fields = rule.fields.iter().flat_map(|(_, fields)| fields);
        let globs = fields.map(|glob| self.good(glob.at, name, ValueGlob::new(&glob.text)));
        Some(OperationRule {
            kind: read_kind(&kind.text),
            name: operation,
            fields: globs.collect::<Option<_>>()?,
        })
    }

    /// `None` for what `check` refuses.
    fn call(&mut self, name: &str, rule: &document::Rule, mcp: bool) -> Option<CallRule> {
        let tool = rule.tool().filter(|_| mcp);
        let method = rule.method.as_ref().filter(|method| !method.text.is_empty());
        let method = match method {
            // A tool has one method only, and without one MCP's own are meant.
            None if tool.is_some() => CallMethod::Glob(ValueGlob::Literal(TOOLS_CALL.into())),
            None if mcp => CallMethod::Known,
            None => return None,
            Some(method) if method.text == "*" => CallMethod::Any,
            Some(method) => {
                CallMethod::Glob(self.good(method.at, name, ValueGlob::new(&method.text))?)
            }
        };
        let tool = match tool {
            Some(tool) => self.values(name, tool)?,
            None => Vec::new(),
        };
        let mut params = Vec::new();
        for (key, matcher) in &rule.params {
            if !mcp || key != "name" {
                params.push((key.clone(), self.values(name, matcher)?));
            }
        }
        Some(CallRule { method, tool, params })
    }

    fn values(&mut self, name: &str, matcher: &Matcher) -> Option<Vec<ValueGlob>> {
        let globs = matcher.0.iter();
        globs.map(|glob| self.good(glob.at, name, ValueGlob::new(&glob.text))).collect()
    }

    fn deny_rule(&mut self, name: &str, rule: &document::Rule) -> Option<DenyRule> {
        let folded = rule.path.as_ref().and_then(|path| PathGlob::folded(&path.text).ok());
        Some(DenyRule { rule: self.rule(name, rule)?, folded: folded? })
    }

    /// `None` for a rule that can never match; `check` has said so.
    fn rule(&mut self, name: &str, rule: &document::Rule) -> Option<Rule> {
        let path = rule.path.as_ref()?;
        let path = self.good(path.at, name, PathGlob::of_path(&path.text));
        let mut query = Vec::new();
        for (key, matcher) in &rule.query {
            query.push((key.clone(), self.values(name, matcher).unwrap_or_default()));
        }
        Some(Rule { method: read_method(&rule.method.as_ref()?.text), path: path?, query })
    }
}

fn read_method(text: &str) -> Method {
    match text {
        "*" => Method::Any,
        get if get.eq_ignore_ascii_case("GET") => Method::Get,
        other => Method::Other(other.to_ascii_uppercase()),
    }
}

/// `None`: any.
fn read_kind(text: &str) -> Option<OperationKind> {
    let kinds = [OperationKind::Query, OperationKind::Mutation, OperationKind::Subscription];
    kinds.into_iter().find(|kind| kind.word().eq_ignore_ascii_case(text))
}

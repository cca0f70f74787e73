//! From the document to the compiled policy. A pattern that is not one is found here.
#![forbid(unsafe_code)]

use std::collections::HashMap;

use super::binaries::Asks;
use super::{Endpoint, Inspected, Method, Named, Names, Policy, Port, Rule};
use crate::policy::document::{self, Document, Enforcement, NetworkPolicy};
use crate::policy::fields::Located;
use crate::policy::glob::{Bad, PathGlob, Scope, ValueGlob};
use crate::policy::host_pattern::HostPattern;
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
        let inspected = endpoint.protocol.is_some().then(|| self.inspected(endpoint));
        let index = self.endpoints.len();
        for port in &endpoint.ports {
            let port = self.ports.entry(*port).or_default();
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
        let mut allow: Vec<_> = endpoint
            .rules
            .iter()
            .flat_map(|(_, rules)| rules)
            .filter_map(|rule| self.rule(name, rule))
            .collect();
        if let Some((_, Some(access))) = endpoint.access {
            let preset = presets::methods(access).iter().map(|method| Rule {
                method: read_method(method),
                path: PathGlob::Any,
                query: Vec::new(),
            });
            allow.extend(preset);
        }
        let deny = endpoint.deny_rules.iter().flat_map(|(_, rules)| rules);
        Inspected {
            scope,
            enforce: endpoint.enforcement.is_some_and(|(_, e)| e == Enforcement::Enforce),
            encoded_slash: endpoint.allow_encoded_slash,
            allow,
            deny: deny.filter_map(|rule| self.rule(name, rule)).collect(),
        }
    }

    /// `None` for a rule that can never match; `check` has said so.
    fn rule(&mut self, name: &str, rule: &document::Rule) -> Option<Rule> {
        let path = rule.path.as_ref()?;
        let path = self.good(path.at, name, PathGlob::of_path(&path.text));
        let mut query = Vec::new();
        for (key, matcher) in &rule.query {
            let glob = |glob: &Located| self.good(glob.at, name, ValueGlob::new(&glob.text));
            query.push((key.clone(), matcher.0.iter().filter_map(glob).collect()));
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

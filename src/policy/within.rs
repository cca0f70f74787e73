//! A policy within the bounds of another: what passes is what both let pass.
//!
//! A fence that runs cannot give up files. Where a new policy wants it to, what the policy adds for
//! the network was meant for a fence with less, and is held back until the agent starts anew; what
//! it takes away holds at once. So such a policy is asked together with the last one that held
//! whole.
#![forbid(unsafe_code)]

use std::sync::Arc;

use super::decision::{Connect, Denial, Grant, Inspect, TlsMode, Verdict};
use super::engine::{NameMatch, Policy};
use super::payload::{Inspection, RpcInspection};

const HELD: &str = "held back until this pod is started anew: the policy that it runs by does not \
                    allow it";

impl Policy {
    /// This policy, and of what it allows only what `bounds` allows too.
    #[must_use]
    pub fn within(mut self, bounds: Arc<Policy>) -> Self {
        self.bounds = Some(bounds);
        self
    }
}

pub(super) fn connect(own: Connect, bounds: Connect) -> Connect {
    let (mut own, other) = match (own, bounds) {
        (Connect::Deny(denial), _) => return Connect::Deny(denial),
        (_, Connect::Deny(denial)) => return Connect::Deny(held(denial)),
        (Connect::Allow(own), Connect::Allow(other)) => (own, other),
    };
    // What is not inspected takes any path.
    let takes = |grant: &Grant| grant.inspect == Inspect::None || grant.allow_encoded_slash;
    own.allow_encoded_slash = takes(&own) && takes(&other);
    if other.inspect == Inspect::Rest {
        own.inspect = Inspect::Rest;
    }
    if other.tls == TlsMode::Auto || own.inspect == Inspect::Rest {
        own.tls = TlsMode::Auto;
    }
    own.unread |= other.unread;
    own.also = Some(Box::new(other));
    Connect::Allow(own)
}

/// `bounds` is asked where the policy itself says yes.
pub(super) fn verdict(own: Verdict, bounds: impl FnOnce() -> Verdict) -> Verdict {
    if matches!(own, Verdict::Deny(_)) {
        return own;
    }
    match (own, bounds()) {
        (_, Verdict::Deny(denial)) => Verdict::Deny(held(denial)),
        (Verdict::Allow { .. }, audit @ Verdict::Audit { .. }) => audit,
        (own, _) => own,
    }
}

fn held(mut denial: Denial) -> Denial {
    denial.reason = format!("{HELD} ({})", denial.reason);
    denial
}

pub(super) fn names(own: NameMatch, bounds: NameMatch) -> NameMatch {
    match (own, bounds) {
        (NameMatch::None, _) | (_, NameMatch::None) => NameMatch::None,
        (NameMatch::Exact, NameMatch::Exact) => NameMatch::Exact,
        _ => NameMatch::Wildcard,
    }
}

/// What must be read for either.
pub(super) fn inspection(
    own: Option<Inspection>,
    bounds: Option<Inspection>,
) -> Option<Inspection> {
    let (own, other) = match (own, bounds) {
        (Some(own), Some(other)) => (own, other),
        (own, other) => return own.or(other),
    };
    let rpc = match (own.rpc, other.rpc) {
        (Some(own), Some(other)) => {
            let mut params = own.params;
            params.extend(other.params);
            params.sort_unstable();
            params.dedup();
            Some(RpcInspection { mcp: own.mcp || other.mcp, params })
        }
        (own, other) => own.or(other),
    };
    Some(Inspection {
        max_bytes: own.max_bytes.min(other.max_bytes),
        graphql: own.graphql || other.graphql,
        rpc,
    })
}

impl Grant {
    /// The conditions that hold together: this grant's, and those of the policy that bounds it.
    pub fn all(&self) -> impl Iterator<Item = &Grant> {
        std::iter::successors(Some(self), |grant| grant.also.as_deref())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::{Caller, Host, Request, Source, load};

    const OLD: &str = r#"
network_policies:
  old:
    endpoints:
      - { host: kept.test, port: 443, protocol: rest, enforcement: enforce, access: read-only }
      - { host: gone.test, port: 443 }
      - { host: skip.test, port: 443, tls: skip }
      - { host: audit.test, port: 443, protocol: rest, enforcement: audit, access: read-only }
      - { host: "*.wild.test", port: 443 }
      - { host: listed.test, port: 443, allowed_ips: ["10.1.0.0/16"] }
      - { host: rpc.test, port: 443, path: /rpc, protocol: json-rpc, enforcement: enforce, rules: [{ allow: { method: a, params: { x: y } } }] }
    binaries: [{ path: /bin/a }]
"#;
    const NEW: &str = r#"
network_policies:
  new:
    endpoints:
      - { host: kept.test, port: 443 }
      - { host: added.test, port: 444 }
      - { host: skip.test, port: 443 }
      - { host: audit.test, port: 443 }
      - { host: one.wild.test, port: 443 }
      - { host: listed.test, port: 443 }
      - { host: rpc.test, port: 443, path: /rpc, protocol: json-rpc, enforcement: enforce, rules: [{ allow: { method: "*", params: { z: y } } }] }
    binaries: [{ path: /bin/a }, { path: /bin/b }]
"#;

    fn policy(yaml: &str) -> Policy {
        load(&Source { name: "policy.yaml", bytes: yaml.as_bytes() }, None).expect(yaml).policy
    }

    fn bounded() -> Policy {
        policy(NEW).within(Arc::new(policy(OLD)))
    }

    fn caller(exe: &str) -> Caller {
        Caller { exe: exe.to_owned(), ..Caller::default() }
    }

    fn host(name: &str) -> Host {
        Host::parse(name).expect(name)
    }

    fn grant(name: &str) -> Option<Grant> {
        match bounded().connect(&caller("/bin/a"), &host(name), 443) {
            Connect::Allow(grant) => Some(grant),
            Connect::Deny(_) => None,
        }
    }

    #[test]
    fn only_what_both_allow_is_allowed() {
        let policy = bounded();
        assert!(grant("kept.test").is_some());
        assert!(grant("gone.test").is_none(), "what is taken away is gone at once");
        assert!(grant("added.test").is_none());
        let Connect::Deny(denial) = policy.connect(&caller("/bin/a"), &host("added.test"), 444)
        else {
            panic!("what is added waits")
        };
        assert!(denial.reason.starts_with("held back until"), "{}", denial.reason);
        let other = policy.connect(&caller("/bin/b"), &host("kept.test"), 443);
        assert!(matches!(other, Connect::Deny(_)), "a binary that is added waits");
        assert!(policy.names_port(443) && !policy.names_port(444));
        for (name, expected) in [
            ("kept.test", NameMatch::Exact),
            ("added.test", NameMatch::None),
            ("gone.test", NameMatch::None),
            ("one.wild.test", NameMatch::Wildcard),
            ("two.wild.test", NameMatch::None),
        ] {
            assert_eq!(policy.names_host(&host(name)), expected, "{name}");
        }
    }

    /// Where nothing is inspected an encoded slash passes, so that is no condition.
    #[test]
    fn an_encoded_slash_is_as_both_say() {
        let inspected = |slash: bool| {
            let slash = if slash { "allow_encoded_slash: true, " } else { "" };
            policy(&format!(
                "network_policies: {{ p: {{ endpoints: [{{ host: h.test, port: 443, protocol: rest, \
                 {slash}access: full }}], binaries: [{{ path: /bin/a }}] }} }}"
            ))
        };
        let plain = || {
            policy(
                "network_policies: { p: { endpoints: [{ host: h.test, port: 443 }], \
                 binaries: [{ path: /bin/a }] } }",
            )
        };
        for (own, bounds, expected) in [
            (inspected(true), plain(), true),
            (plain(), inspected(true), true),
            (inspected(true), inspected(true), true),
            (inspected(false), plain(), false),
            (plain(), inspected(false), false),
            (inspected(true), inspected(false), false),
        ] {
            let both = own.within(Arc::new(bounds));
            let Connect::Allow(grant) = both.connect(&caller("/bin/a"), &host("h.test"), 443)
            else {
                panic!("both allow it")
            };
            assert_eq!((grant.inspect, grant.allow_encoded_slash), (Inspect::Rest, expected));
        }
    }

    #[test]
    fn conditions_of_both_hold() {
        let kept = grant("kept.test").expect("allowed");
        assert_eq!((kept.inspect, kept.tls), (Inspect::Rest, TlsMode::Auto));
        assert_eq!(grant("skip.test").expect("allowed").tls, TlsMode::Auto);
        let listed = grant("listed.test").expect("allowed");
        let policy = bounded();
        let dial = |ip: &str| {
            policy.destination(&listed, &host("listed.test"), 443, ip.parse().expect("ip")).is_ok()
        };
        assert!(dial("10.1.2.3") && !dial("10.2.0.1") && !dial("1.1.1.1"));
        let ask = |method: &str, name: &str| {
            let asked = Request { method, path: "/", query: &[], payload: None, overrides: &[] };
            policy.request(&caller("/bin/a"), &host(name), 443, &asked)
        };
        assert!(matches!(ask("GET", "kept.test"), Verdict::Allow { .. }));
        assert!(matches!(ask("DELETE", "kept.test"), Verdict::Deny(_)));
        assert!(matches!(ask("DELETE", "audit.test"), Verdict::Audit { .. }));
        assert!(matches!(ask("GET", "gone.test"), Verdict::Deny(_)));
        let inspection = policy.inspection(&caller("/bin/a"), &host("rpc.test"), 443, "/rpc");
        let rpc = inspection.expect("is read").rpc.expect("is json-rpc");
        assert_eq!(rpc.params, ["x", "z"]);
    }
}

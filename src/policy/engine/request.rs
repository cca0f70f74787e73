//! One request, or what a client does on a `WebSocket`, judged by all endpoints that match.
#![forbid(unsafe_code)]

use super::{
    DENY_RULE, ENCODED_SLASH, Inspected, Method, NEAR, NO_COVER, NO_LINE, NO_NEAR, NO_RULE,
    NO_WEBSOCKET, ONLY_WEBSOCKET, Policy, Rule, Smallest, UNREADABLE, rule_line,
};
use crate::policy::decision::{Caller, Denial, Request, Verdict};
use crate::policy::document::Protocol;
use crate::policy::host::Host;
use crate::policy::payload::short;
use crate::policy::{overrides, suggestion, within};

const NO_METHODS: &str = "# a header field or `_method` in the query asks for another method: send \
                          the method that is meant";

/// What a denial of another method says besides.
fn instead(method: &str) -> String {
    format!("with the method {} that a header field or `_method` asks for", short(method))
}

fn strictness(verdict: &Verdict) -> u8 {
    match verdict {
        Verdict::Allow { .. } => 0,
        Verdict::Audit { .. } => 1,
        Verdict::Deny(_) => 2,
    }
}

impl Policy {
    /// Judges one HTTP request on a connection that [`Policy::connect`] allowed. Where
    /// [`Policy::inspection`] asks for its content, one without [`Request::payload`] is refused.
    #[must_use]
    pub fn request(
        &self,
        caller: &Caller,
        host: &Host,
        port: u16,
        request: &Request<'_>,
    ) -> Verdict {
        let ask = |request: &Request<'_>| match &self.judge {
            Some(judge) => judge.request(self, caller, host, port, request),
            None => self.request_natively(caller, host, port, request),
        };
        let mut verdict = ask(request);
        let Some(methods) = overrides::all(request.method, request.overrides, request.query) else {
            return Verdict::Deny(Denial {
                policy: "-".into(),
                reason: "it asks for too many other methods".into(),
                rule: rule_line(request),
                suggestion: NO_METHODS.into(),
            });
        };
        // A server may take any of them for the one that is meant.
        for method in &methods {
            let other = match ask(&Request { method, ..*request }) {
                Verdict::Deny(denial) => Verdict::Deny(Denial {
                    reason: format!("{} {}", denial.reason, instead(method)),
                    ..denial
                }),
                other => other,
            };
            if strictness(&other) > strictness(&verdict) {
                verdict = other;
            }
        }
        match &self.bounds {
            Some(bounds) => {
                within::verdict(verdict, || bounds.request(caller, host, port, request))
            }
            None => verdict,
        }
    }

    /// As [`Policy::request`], by the policy's own rules alone.
    pub(in crate::policy) fn request_natively(
        &self,
        caller: &Caller,
        host: &Host,
        port: u16,
        request: &Request<'_>,
    ) -> Verdict {
        self.natively(caller, host, port, request, Protocol::Rest)
    }

    /// Judges what a client does on a `WebSocket`: its handshake, with method `GET`, and each of
    /// its messages, with [`WEBSOCKET_TEXT`](super::WEBSOCKET_TEXT) or
    /// [`WEBSOCKET_BINARY`](super::WEBSOCKET_BINARY) and the handshake's path and query.
    ///
    /// Endpoints with `protocol: websocket` allow it, and rules of `protocol: rest` for every
    /// method. Deny rules of both count. Where [`Policy::messages`] asks for it, a message without
    /// [`Request::payload`] is refused. Where an endpoint reads the content of requests there is
    /// no `WebSocket`, but for one that is read as `GraphQL` beside `protocol: graphql`. A text that
    /// decides has to allow it besides: it is asked about a request with this method, and knows
    /// nothing of protocols.
    #[must_use]
    pub fn websocket(
        &self,
        caller: &Caller,
        host: &Host,
        port: u16,
        request: &Request<'_>,
    ) -> Verdict {
        let own = self.natively(caller, host, port, request, Protocol::WebSocket);
        let own = match (&self.judge, &own) {
            (None, _) | (_, Verdict::Deny(_)) => own,
            (Some(judge), _) => match judge.request(self, caller, host, port, request) {
                Verdict::Allow { .. } => own,
                other => other,
            },
        };
        match &self.bounds {
            Some(bounds) => within::verdict(own, || bounds.websocket(caller, host, port, request)),
            None => own,
        }
    }

    /// Whether what is said on a `WebSocket` with this path must be read as `GraphQL` before
    /// [`Policy::websocket`] is asked about a message, and the longest message that is.
    #[must_use]
    pub fn messages(&self, caller: &Caller, host: &Host, port: u16, path: &str) -> Option<usize> {
        let inspected = self.matching(caller, host, port).filter_map(|e| e.inspected.as_ref());
        let read = inspected.filter_map(|inspected| inspected.reads_messages(path));
        let bounds = self.bounds.as_ref();
        let bounds = bounds.and_then(|bounds| bounds.messages(caller, host, port, path));
        read.map(|messages| messages.max).chain(bounds).min()
    }

    /// The policy whose endpoint reads what many servers take this path for, where none reads it.
    pub(in crate::policy) fn near(
        &self,
        caller: &Caller,
        host: &Host,
        port: u16,
        path: &str,
    ) -> Option<&str> {
        let mut near = Smallest::default();
        for endpoint in self.matching(caller, host, port) {
            let Some(Inspected { scope, content: Some(content), .. }) = &endpoint.inspected else {
                continue;
            };
            if scope.allows(path) {
                return None;
            }
            if content.is_near(path) {
                near.see(endpoint.policy);
            }
        }
        near.0.map(|index| self.policies[index].key.as_str())
    }

    /// Which policy has a deny rule that this request falls under, in any spelling: one in audit, and
    /// one that enforces.
    pub(in crate::policy) fn denied(
        &self,
        caller: &Caller,
        host: &Host,
        port: u16,
        request: &Request<'_>,
    ) -> [Option<&str>; 2] {
        let mut denied = [Smallest::default(); 2];
        for endpoint in self.matching(caller, host, port) {
            let Some(rules) = &endpoint.inspected else { continue };
            if rules.unreadable(request).is_none() && rules.denies(request) {
                denied[usize::from(rules.enforce)].see(endpoint.policy);
            }
        }
        denied.map(|policy| policy.0.map(|index| self.policies[index].key.as_str()))
    }

    fn natively(
        &self,
        caller: &Caller,
        host: &Host,
        port: u16,
        request: &Request<'_>,
        asked: Protocol,
    ) -> Verdict {
        let mut said = Said { asked: Some(asked), ..Said::default() };
        if asked == Protocol::WebSocket {
            said.messages = self
                .matching(caller, host, port)
                .filter_map(|endpoint| endpoint.inspected.as_ref())
                .any(|rules| rules.messages.is_some() && rules.scope.allows(request.path));
        }
        for endpoint in self.matching(caller, host, port) {
            match &endpoint.inspected {
                None => said.uninspected.see(endpoint.policy),
                Some(rules) => said.hear(endpoint.policy, rules, request),
            }
        }
        let key = |index: usize| self.policies[index].key.clone();
        let deny = |index: usize, reason: &str, suggestion: String| {
            Verdict::Deny(Denial {
                policy: key(index),
                reason: reason.into(),
                rule: rule_line(request),
                suggestion,
            })
        };
        let suggest = || match asked {
            Protocol::WebSocket => suggestion::websocket(&caller.exe, host, port, request),
            _ => suggestion::request(&caller.exe, host, port, request),
        };
        // In audit too: nobody knows what would pass.
        if let Some((index, why)) = said.unreadable {
            return deny(index, &why, UNREADABLE.into());
        }
        if let Some(index) = said.denied[1].0 {
            return deny(index, DENY_RULE, NO_LINE.into());
        }
        let Some(any) = said.inspected.0 else {
            return match said.uninspected.0 {
                Some(index) => Verdict::Allow { policy: key(index) },
                None => Verdict::Deny(self.unmatched(caller, host, port, Some(request))),
            };
        };
        // Where content is read, endpoints that do not read it have nothing to say.
        let [plain, reading] = said.kinds;
        if let (Some(index), false) = (said.near.0, reading.covers()) {
            return deny(index, NEAR, NO_NEAR.into());
        }
        let Kind { allowed, covered } = if reading.covers() { reading } else { plain };
        if let Some(index) = allowed.0 {
            return match said.denied[0].0 {
                Some(denied) => Verdict::Audit { policy: key(denied), reason: DENY_RULE.into() },
                None => Verdict::Allow { policy: key(index) },
            };
        }
        if said.slash_refused {
            return deny(any, ENCODED_SLASH, suggest());
        }
        let reason = said.missing.as_deref().unwrap_or(NO_RULE);
        match (covered[1].0, covered[0].0) {
            (Some(index), _) => deny(index, reason, suggest()),
            (None, Some(index)) => Verdict::Audit { policy: key(index), reason: reason.into() },
            (None, None) => {
                let reason = match (said.other, asked) {
                    (false, _) => NO_COVER,
                    (true, Protocol::WebSocket) => NO_WEBSOCKET,
                    (true, _) => ONLY_WEBSOCKET,
                };
                deny(any, reason, suggest())
            }
        }
    }
}

/// What the endpoints that match say about a request, all together.
#[derive(Default)]
struct Said {
    /// A request, or what is done on a WebSocket.
    asked: Option<Protocol>,
    /// What is said on it is read as `GraphQL`.
    messages: bool,
    uninspected: Smallest,
    inspected: Smallest,
    /// Of those that do not read content, and of those that do.
    kinds: [Kind; 2],
    slash_refused: bool,
    /// An endpoint of the other protocol covers the path.
    other: bool,
    unreadable: Option<(usize, String)>,
    /// Why an endpoint that read the content does not allow it.
    missing: Option<String>,
    near: Smallest,
    /// By `enforce`.
    denied: [Smallest; 2],
}

/// What endpoints of one kind say.
#[derive(Default, Clone, Copy)]
struct Kind {
    allowed: Smallest,
    /// By `enforce`: those that speak for the path.
    covered: [Smallest; 2],
}

impl Kind {
    fn covers(&self) -> bool {
        self.covered.iter().any(|covered| covered.0.is_some())
    }
}

impl Said {
    /// Adds what one inspected endpoint says.
    fn hear(&mut self, policy: usize, rules: &Inspected, request: &Request<'_>) {
        self.inspected.see(policy);
        let whole = self.asked == Some(Protocol::WebSocket);
        let enforce = usize::from(rules.enforce);
        if whole && self.messages && rules.protocol == Protocol::Graphql {
            // The same operations on another way: its denials hold there as well.
            if rules.denies(request) {
                self.denied[enforce].see(policy);
            }
            return;
        }
        // A WebSocket begins as a GET: what is said on it comes after that.
        let message = whole && !request.method.eq_ignore_ascii_case("GET");
        let read = rules.reads_messages(request.path).filter(|_| message);
        let unreadable = match read {
            Some(messages) => messages.unreadable_message(request.payload),
            None if whole => rules.unreadable(&Request { payload: None, ..*request }),
            None => rules.unreadable(request),
        };
        if let Some(why) = unreadable {
            self.unreadable.get_or_insert((policy, why));
        } else if rules.denies(request)
            || read.is_some_and(|read| {
                read.denies(request.payload) && rules.scope.denies(request.path)
            })
        {
            self.denied[enforce].see(policy);
        }
        if !rules.scope.allows(request.path) {
            if rules.content.as_ref().is_some_and(|content| content.is_near(request.path)) {
                self.near.see(policy);
            }
            return;
        }
        let kind = &mut self.kinds[usize::from(rules.content.is_some() || read.is_some())];
        let speaks = rules.content.is_some() || Some(rules.protocol) == self.asked;
        if speaks {
            kind.covered[enforce].see(policy);
        } else {
            self.other = true;
        }
        if request.path.contains("%2F") && !rules.encoded_slash {
            self.slash_refused |= speaks;
            return;
        }
        // Rules that name methods of HTTP do not mean a WebSocket.
        let means = |rule: &Rule| speaks || (whole && matches!(rule.method, Method::Any));
        let by_method = || rules.allow.iter().any(|rule| means(rule) && rule.allows(request));
        let said = match (&rules.content, read) {
            (Some(content), _) => content.allows(request.payload),
            (None, Some(messages)) if !by_method() => messages.allows_message(request.payload),
            (None, Some(_)) => Ok(()),
            (None, None) => {
                if by_method() {
                    kind.allowed.see(policy);
                }
                return;
            }
        };
        match said {
            Ok(()) => kind.allowed.see(policy),
            Err(why) => drop(self.missing.get_or_insert(why)),
        }
    }
}

//! One request, or what a client does on a `WebSocket`, judged by all endpoints that match.
#![forbid(unsafe_code)]

use super::{
    DENY_RULE, ENCODED_SLASH, Inspected, Method, NEAR, NO_COVER, NO_LINE, NO_NEAR, NO_RULE,
    NO_WEBSOCKET, ONLY_WEBSOCKET, Policy, Rule, Smallest, UNREADABLE, rule_line,
};
use crate::policy::decision::{Caller, Denial, Request, Verdict};
use crate::policy::document::Protocol;
use crate::policy::host::Host;
use crate::policy::suggestion;

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
        match &self.judge {
            Some(judge) => judge.request(self, caller, host, port, request),
            None => self.request_natively(caller, host, port, request),
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
    /// method. Deny rules of both count. Where an endpoint reads the content of requests there is
    /// no `WebSocket`. A text that decides has to allow it besides: it is asked about a request
    /// with this method, and knows nothing of protocols.
    #[must_use]
    pub fn websocket(
        &self,
        caller: &Caller,
        host: &Host,
        port: u16,
        request: &Request<'_>,
    ) -> Verdict {
        // Nobody reads the content of messages: an endpoint that asks for it refuses them.
        let unread = Request { payload: None, ..*request };
        let own = self.natively(caller, host, port, &unread, Protocol::WebSocket);
        match (&self.judge, &own) {
            (None, _) | (_, Verdict::Deny(_)) => own,
            (Some(judge), _) => match judge.request(self, caller, host, port, &unread) {
                Verdict::Allow { .. } => own,
                other => other,
            },
        }
    }

    fn natively(
        &self,
        caller: &Caller,
        host: &Host,
        port: u16,
        request: &Request<'_>,
        asked: Protocol,
    ) -> Verdict {
        let mut said = Said::default();
        for endpoint in self.matching(caller, host, port) {
            match &endpoint.inspected {
                None => said.uninspected.see(endpoint.policy),
                Some(rules) => said.hear(endpoint.policy, rules, request, asked),
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
    fn hear(&mut self, policy: usize, rules: &Inspected, request: &Request<'_>, asked: Protocol) {
        self.inspected.see(policy);
        let enforce = usize::from(rules.enforce);
        if let Some(why) = rules.unreadable(request) {
            self.unreadable.get_or_insert((policy, why));
        } else if rules.denies(request) {
            self.denied[enforce].see(policy);
        }
        if !rules.scope.allows(request.path) {
            if rules.content.as_ref().is_some_and(|content| content.is_near(request.path)) {
                self.near.see(policy);
            }
            return;
        }
        let kind = &mut self.kinds[usize::from(rules.content.is_some())];
        let speaks = rules.content.is_some() || rules.protocol == asked;
        if speaks {
            kind.covered[enforce].see(policy);
        } else {
            self.other = true;
        }
        if request.path.contains("%2F") && !rules.encoded_slash {
            self.slash_refused |= speaks;
            return;
        }
        // A WebSocket begins as a GET: rules that name methods of HTTP do not mean it.
        let whole = asked == Protocol::WebSocket;
        let means = |rule: &Rule| speaks || (whole && matches!(rule.method, Method::Any));
        let allowed = match &rules.content {
            None => rules.allow.iter().any(|rule| means(rule) && rule.allows(request)),
            Some(content) => match content.allows(request.payload) {
                Ok(()) => true,
                Err(why) => {
                    self.missing.get_or_insert(why);
                    false
                }
            },
        };
        if allowed {
            kind.allowed.see(policy);
        }
    }
}

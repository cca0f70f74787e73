//! What a client is told when something is refused: HTTP responses with a JSON body, in the shape
//! that `OpenShell`'s clients know, with the policy lines that would allow it.

use std::fmt::Write as _;

use bytes::Bytes;
use serde_json::{Map, Value, json};

use crate::policy::{Denial, Host, Payload};

/// A response that ends the connection.
#[derive(Debug)]
pub(crate) struct Refusal {
    pub(crate) status: u16,
    /// The policy that refused, for `X-OpenShell-Policy`.
    policy: Option<String>,
    body: Value,
}

impl Refusal {
    /// Any refusal: `error` is the code a program reads, `detail` what a person reads.
    pub(crate) fn new(status: u16, error: &str, detail: &str) -> Self {
        Self { status, policy: None, body: json!({ "error": error, "detail": detail }) }
    }

    /// Adds a reason.
    pub(crate) fn because(mut self, reason: &str) -> Self {
        self.body["reason"] = reason.into();
        self
    }

    /// A connection that no policy allows. `what` is the method: `CONNECT`, or that of a plain
    /// request.
    pub(crate) fn connection(what: &str, host: &Host, port: u16, denial: &Denial) -> Self {
        let detail = format!("{what} {host}:{port} not permitted by policy");
        let mut refusal = Self::new(403, "policy_denied", &detail).because(&denial.reason);
        if !denial.suggestion.is_empty() {
            refusal.body["suggestion"] = denial.suggestion.as_str().into();
        }
        refusal
    }

    /// A request that no rule allows.
    pub(crate) fn request(request: &DeniedRequest<'_>, denial: &Denial) -> Self {
        let &DeniedRequest { method, path, host, port, binary, payload } = request;
        let protocol = payload.map_or("rest", Payload::protocol);
        let place = json!({
            "method": method, "path": path, "host": host.as_str(), "port": port, "binary": binary,
        });
        let mut body = json!({
            "error": "policy_denied",
            "policy": denial.policy,
            "rule": format!("{method} {path}"),
            "detail": denial.reason,
            "layer": "l7",
            "protocol": protocol,
        });
        let mut missing = Map::new();
        let kind = format!("{}_allow", protocol.replace('-', "_"));
        missing.insert("type".to_owned(), kind.into());
        missing.insert("layer".to_owned(), "l7".into());
        if let (Some(body), Value::Object(place)) = (body.as_object_mut(), place) {
            body.extend(place.clone());
            missing.extend(place);
            if let Some(said) = payload.map(Payload::summary).filter(|said| !said.is_empty()) {
                missing.insert("operation".to_owned(), said.into());
            }
            body.insert("rule_missing".to_owned(), missing.into());
            body.insert("next_steps".to_owned(), json!([]));
            if !denial.suggestion.is_empty() {
                body.insert("suggestion".to_owned(), denial.suggestion.as_str().into());
            }
        }
        Self { status: 403, policy: Some(denial.policy.clone()), body }
    }

    /// The whole response.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let body = self.body.to_string();
        let mut out = format!("HTTP/1.1 {} {}\r\n", self.status, self.phrase());
        for (name, value) in self.fields(&body) {
            // Writing to a String cannot fail.
            let _ = write!(out, "{name}: {value}\r\n");
        }
        out.push_str("Connection: close\r\n\r\n");
        out.push_str(&body);
        out.into_bytes()
    }

    /// The whole response, for one stream of HTTP/2.
    pub(crate) fn to_http2(&self) -> (http::Response<()>, Bytes) {
        let body = self.body.to_string();
        let mut response = http::Response::new(());
        *response.status_mut() =
            http::StatusCode::from_u16(self.status).unwrap_or(http::StatusCode::FORBIDDEN);
        for (name, value) in self.fields(&body) {
            // HTTP/2 has names in lower case, which `http` makes of them.
            if let (Ok(name), Ok(value)) =
                (http::HeaderName::try_from(name), http::HeaderValue::try_from(value))
            {
                response.headers_mut().insert(name, value);
            }
        }
        (response, body.into())
    }

    /// The end of the status line: many programs show nothing else of an answer to CONNECT. It says
    /// why, so far as one line may.
    fn phrase(&self) -> String {
        let said = |key: &str| self.body[key].as_str().filter(|text| !text.is_empty());
        let policy = matches!(said("error"), Some("policy_denied" | "ssrf_denied"));
        let mut phrase = standard(self.status).to_owned();
        if policy {
            phrase.push_str(" by policy");
        }
        let Some(why) = said("reason").or(said("detail")) else {
            return phrase;
        };
        phrase.push_str(": ");
        // One line of plain characters, whatever was read on the way here.
        let plain = |c: char| if matches!(c, ' '..='~') { c } else { '?' };
        phrase.extend(why.chars().take(PHRASE_MAX).map(plain));
        if why.chars().nth(PHRASE_MAX).is_some() {
            phrase.push_str("...");
        }
        phrase
    }

    fn fields(&self, body: &str) -> Vec<(&'static str, String)> {
        let mut fields = vec![("Content-Type", "application/json".to_owned())];
        if let Some(policy) = &self.policy {
            // A map key of the policy file: what a header cannot hold is left out.
            let value = policy.chars().filter(|c| matches!(c, ' '..='~')).collect();
            fields.push(("X-OpenShell-Policy", value));
        }
        fields.push(("Content-Length", body.len().to_string()));
        fields
    }
}

/// What was asked for, as the client is told about it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DeniedRequest<'a> {
    pub(crate) method: &'a str,
    pub(crate) path: &'a str,
    pub(crate) host: &'a Host,
    pub(crate) port: u16,
    pub(crate) binary: &'a str,
    pub(crate) payload: Option<&'a Payload>,
}

/// How much of a reason the status line holds.
const PHRASE_MAX: usize = 120;

/// The status's own phrase.
fn standard(status: u16) -> &'static str {
    match status {
        400 => "Bad Request",
        403 => "Forbidden",
        408 => "Request Timeout",
        413 => "Content Too Large",
        421 => "Misdirected Request",
        431 => "Request Header Fields Too Large",
        501 => "Not Implemented",
        502 => "Bad Gateway",
        503 => "Service Unavailable",
        504 => "Gateway Timeout",
        _ => "Error",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn denial() -> Denial {
        Denial {
            policy: "github".to_owned(),
            reason: "no rule allows it".to_owned(),
            rule: "DELETE /repos".to_owned(),
            suggestion: String::new(),
        }
    }

    fn host() -> Host {
        Host::parse("api.example.com").expect("host")
    }

    #[test]
    fn connection_body_starts_as_clients_expect() {
        let refusal = Refusal::connection("CONNECT", &host(), 443, &denial());
        let text = String::from_utf8(refusal.to_bytes()).expect("utf-8");
        let (head, body) = text.split_once("\r\n\r\n").expect("two parts");
        let start = "HTTP/1.1 403 Forbidden by policy: no rule allows it\r\n\
                     Content-Type: application/json\r\n";
        assert!(head.starts_with(start), "{head}");
        assert!(head.contains(&format!("Content-Length: {}\r\n", body.len())));
        assert!(head.ends_with("Connection: close"));
        assert_eq!(
            body,
            "{\"error\":\"policy_denied\",\
             \"detail\":\"CONNECT api.example.com:443 not permitted by policy\",\
             \"reason\":\"no rule allows it\"}"
        );
    }

    #[test]
    fn request_body_names_the_missing_rule() {
        let host = host();
        let request = DeniedRequest {
            method: "DELETE",
            path: "/repos",
            host: &host,
            port: 443,
            binary: "/usr/bin/curl",
            payload: None,
        };
        let text =
            String::from_utf8(Refusal::request(&request, &denial()).to_bytes()).expect("utf-8");
        assert!(text.contains("\r\nX-OpenShell-Policy: github\r\n"), "{text}");
        let body = text.split_once("\r\n\r\n").expect("two parts").1;
        assert_eq!(
            body,
            "{\"error\":\"policy_denied\",\"policy\":\"github\",\"rule\":\"DELETE /repos\",\
             \"detail\":\"no rule allows it\",\"layer\":\"l7\",\"protocol\":\"rest\",\
             \"method\":\"DELETE\",\"path\":\"/repos\",\"host\":\"api.example.com\",\"port\":443,\
             \"binary\":\"/usr/bin/curl\",\"rule_missing\":{\"type\":\"rest_allow\",\
             \"layer\":\"l7\",\"method\":\"DELETE\",\"path\":\"/repos\",\
             \"host\":\"api.example.com\",\"port\":443,\"binary\":\"/usr/bin/curl\"},\
             \"next_steps\":[]}"
        );
    }

    #[test]
    fn the_status_line_says_why_and_stays_one_line() {
        let line = |refusal: Refusal| {
            let text = String::from_utf8(refusal.to_bytes()).expect("ASCII");
            text.split("\r\n").next().unwrap_or_default().to_owned()
        };
        let refusal = |reason: &str| Refusal::new(403, "ssrf_denied", "detail").because(reason);
        assert_eq!(line(refusal("private")), "HTTP/1.1 403 Forbidden by policy: private");
        // What another party wrote cannot end the line, nor colour a terminal.
        assert_eq!(
            line(refusal("a\r\nSet-Cookie: b\u{1b}[31m\u{e9}\0")),
            "HTTP/1.1 403 Forbidden by policy: a??Set-Cookie: b?[31m??"
        );
        let long = line(refusal(&"\u{e9}".repeat(500)));
        assert_eq!(long.len(), "HTTP/1.1 403 Forbidden by policy: ".len() + PHRASE_MAX + 3);
        let other = Refusal::new(408, "head_timeout", "the head took too long");
        assert_eq!(line(other), "HTTP/1.1 408 Request Timeout: the head took too long");
        let bare = Refusal { status: 418, policy: None, body: json!({}) };
        assert_eq!(line(bare), "HTTP/1.1 418 Error");
    }

    #[test]
    fn policy_header_cannot_be_split() {
        let mut denial = denial();
        denial.policy = "a\r\nX: b\u{e9}".to_owned();
        let host = host();
        let request = DeniedRequest {
            method: "GET",
            path: "/",
            host: &host,
            port: 1,
            binary: "/b",
            payload: None,
        };
        let text =
            String::from_utf8(Refusal::request(&request, &denial).to_bytes()).expect("utf-8");
        assert!(text.contains("\r\nX-OpenShell-Policy: aX: b\r\n"), "{text}");
    }
}

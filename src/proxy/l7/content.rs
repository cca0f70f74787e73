//! Reading what a request says in its content, where the policy asks for it. Pure: headers and
//! bytes go in, a [`Payload`] comes out, and whoever calls forwards exactly these bytes.
//!
//! A server may be less strict than the protocol, so everything that two readers could take
//! differently is refused: other methods, encodings and content types, keys that appear twice or
//! in another case, members that the protocol does not have, calls in the query string.

use super::{graphql, jsonrpc};
use crate::policy::{
    CanonicalTarget, Exchange, Graphql, Inspection, Message, Payload, Rpc, RpcInspection,
};

/// What is known of a request besides its content.
#[derive(Debug, Clone, Copy)]
pub struct Facts<'a> {
    /// As sent.
    pub method: &'a str,
    /// The query's pairs, decoded, in order.
    pub query: &'a [(String, String)],
    content_type: Option<&'a [u8]>,
    /// `Accept` names event streams.
    event_stream: bool,
    /// `Mcp-Session-Id` is there.
    session: bool,
    /// `Mcp-Method` and `Mcp-Name`: what a server may route by, beside the body.
    mcp_method: Option<&'a [u8]>,
    mcp_name: Option<&'a [u8]>,
    /// Why no content with these fields can be judged.
    wrong: Option<&'static str>,
}

impl<'a> Facts<'a> {
    /// `fields` are the request's header fields, names and values as sent.
    pub fn new(
        method: &'a str,
        target: &'a CanonicalTarget,
        fields: impl Iterator<Item = (&'a [u8], &'a [u8])>,
    ) -> Self {
        // To some servers it parts two pairs.
        let semicolon = target.query.as_deref().is_some_and(|query| query.contains(';'));
        let mut facts = Self {
            method,
            query: &target.pairs,
            content_type: None,
            event_stream: false,
            session: false,
            mcp_method: None,
            mcp_name: None,
            wrong: semicolon.then_some("a semicolon in the query string"),
        };
        for (name, value) in fields {
            let is = |wanted: &str| name.eq_ignore_ascii_case(wanted.as_bytes());
            if is("content-type") {
                if facts.content_type.replace(value).is_some() {
                    facts.wrong = Some("more than one Content-Type");
                }
            } else if is("content-encoding") {
                if !value.trim_ascii().eq_ignore_ascii_case(b"identity") {
                    facts.wrong = Some("an encoded body (Content-Encoding)");
                }
            } else if is("accept") {
                facts.event_stream |= value.split(|b| *b == b',').any(|one| {
                    let media = one.split(|b| *b == b';').next().unwrap_or_default();
                    media.trim_ascii().eq_ignore_ascii_case(b"text/event-stream")
                });
            } else if is("mcp-session-id") {
                facts.session = true;
            } else if is("mcp-method") {
                if facts.mcp_method.replace(value).is_some() {
                    facts.wrong = Some("more than one Mcp-Method");
                }
            } else if is("mcp-name") {
                if facts.mcp_name.replace(value).is_some() {
                    facts.wrong = Some("more than one Mcp-Name");
                }
            } else if is("x-http-method-override") || is("x-http-method") || is("x-method-override")
            {
                facts.wrong = Some("a header that changes the method");
            }
        }
        facts
    }

    /// The media type without parameters, in lower case, if its charset is UTF-8.
    pub(super) fn media_type(&self) -> Result<String, &'static str> {
        let value = self.content_type.ok_or("no Content-Type")?;
        let value = std::str::from_utf8(value).map_err(|_| "a Content-Type that is not text")?;
        let mut parts = value.split(';');
        let media = parts.next().unwrap_or_default().trim().to_ascii_lowercase();
        for parameter in parts {
            let (name, value) = parameter.split_once('=').unwrap_or((parameter, ""));
            let value = value.trim().trim_matches('"');
            let utf8 = value.eq_ignore_ascii_case("utf-8") || value.eq_ignore_ascii_case("utf8");
            if name.trim().eq_ignore_ascii_case("charset") && !utf8 {
                return Err("a charset other than UTF-8");
            }
        }
        Ok(media)
    }

    /// The refusal of a request whose head settles it: its content need not be waited for.
    #[must_use]
    pub fn settled(&self, inspection: &Inspection) -> Option<Payload> {
        let graphql = || if inspection.graphql { graphql::check(self) } else { Ok(()) };
        let rpc = || inspection.rpc.as_ref().map_or(Ok(()), |asked| check_rpc(self, asked));
        let wrong = self.wrong.map_or(Ok(()), Err).and_then(|()| graphql()).and_then(|()| rpc());
        wrong.err().map(|why| refused(inspection, why))
    }
}

/// A payload that says nothing but why it cannot be judged.
fn refused(inspection: &Inspection, why: &str) -> Payload {
    let error = Some(why.to_owned());
    Payload {
        graphql: inspection
            .graphql
            .then(|| Graphql { operations: Vec::new(), error: error.clone() }),
        rpc: inspection.rpc.as_ref().map(|asked| Rpc {
            mcp: asked.mcp,
            exchange: Exchange::Messages(Vec::new()),
            error: error.clone(),
        }),
    }
}

/// Reads what `inspection` asks for. `body` is the whole content, framing removed.
#[must_use]
pub fn read(inspection: &Inspection, facts: &Facts<'_>, body: &[u8]) -> Payload {
    if let Some(settled) = facts.settled(inspection) {
        return settled;
    }
    if !body.is_empty() && facts.method != "POST" {
        return refused(inspection, "a body with another method than POST");
    }
    let graphql = inspection.graphql.then(|| match graphql::read(facts, body) {
        Ok(operations) => Graphql { operations, error: None },
        Err(error) => Graphql { operations: Vec::new(), error: Some(error) },
    });
    let rpc = inspection.rpc.as_ref().map(|asked| {
        let mcp = asked.mcp;
        match read_rpc(facts, asked, body) {
            Ok(exchange) => Rpc { mcp, exchange, error: None },
            Err(error) => Rpc { mcp, exchange: Exchange::Messages(Vec::new()), error: Some(error) },
        }
    });
    Payload { graphql, rpc }
}

fn read_rpc(facts: &Facts<'_>, asked: &RpcInspection, body: &[u8]) -> Result<Exchange, String> {
    match facts.method {
        "GET" => Ok(Exchange::Stream),
        "DELETE" => Ok(Exchange::EndOfSession),
        _ => {
            let read = jsonrpc::read(body, asked)?;
            if asked.mcp {
                agree(facts, &read)?;
            }
            Ok(Exchange::Messages(read.into_iter().map(|one| one.message).collect()))
        }
    }
}

/// What can be said of a JSON-RPC request before its body is read.
fn check_rpc(facts: &Facts<'_>, asked: &RpcInspection) -> Result<(), &'static str> {
    let names = ["jsonrpc", "method", "params"];
    if facts.query.iter().any(|(key, _)| names.contains(&bare(key).as_str())) {
        return Err("a call in the query string");
    }
    match facts.method {
        "POST" => match facts.media_type()?.as_str() {
            "application/json" | "application/json-rpc" | "application/jsonrequest" => Ok(()),
            _ => Err("a content type other than application/json"),
        },
        "GET" | "DELETE" if !asked.mcp => Err("JSON-RPC is sent with POST"),
        "GET" if facts.event_stream => Ok(()),
        "GET" => Err("a GET that does not accept text/event-stream"),
        "DELETE" if facts.session => Ok(()),
        "DELETE" => Err("a DELETE without Mcp-Session-Id"),
        _ => Err("a method that the protocol does not have"),
    }
}

/// Headers that repeat what the body says must say the same.
fn agree(facts: &Facts<'_>, read: &[jsonrpc::Read]) -> Result<(), &'static str> {
    let [one] = read else {
        let repeated = facts.mcp_method.is_some() || facts.mcp_name.is_some();
        return if repeated { Err("Mcp-Method or Mcp-Name with a batch") } else { Ok(()) };
    };
    let Message::Call(call) = &one.message else {
        return Ok(());
    };
    if facts.mcp_method.is_some_and(|method| method != call.method.as_bytes()) {
        return Err("Mcp-Method is not the method of the body");
    }
    let named = one.name.as_deref().unwrap_or_default();
    if facts.mcp_name.is_some_and(|name| name != named.as_bytes()) {
        return Err("Mcp-Name is not the name in the body");
    }
    Ok(())
}

/// The name in a query string as the least exact reader has it: without case, and without what stands
/// around it. PHP drops blanks before it and all from a NUL on, Rack 2 and qs take `[query]` for it.
pub(super) fn bare(key: &str) -> String {
    let name = |c: char| c.is_alphanumeric() || c == '_';
    let start = key.trim_start_matches(|c| !name(c));
    fold(start.split(|c| !name(c)).next().unwrap_or_default())
}

/// A key as readers without regard to case see it.
pub(super) fn fold(key: &str) -> String {
    key.to_uppercase().to_lowercase()
}

#[cfg(test)]
mod fuzz;
#[cfg(test)]
mod tests;

//! The host of an endpoint: a name, an address, or a wildcard in the first label.
#![forbid(unsafe_code)]

use globset::GlobMatcher;

use super::glob::{Bad, compile, is_literal};
use super::host::{Host, HostError};

/// A host of an endpoint.
#[derive(Debug, Clone)]
pub(super) enum HostPattern {
    Exact(Host),
    Wild(Wild),
}

/// A wildcard in the first label.
#[derive(Debug, Clone)]
pub(super) struct Wild {
    label: Label,
    /// Starts with the dot.
    suffix: String,
}

#[derive(Debug, Clone)]
enum Label {
    /// `**`: one label or more.
    Deep,
    /// `*`.
    One,
    /// `a*b`.
    Affixes(String, String),
    Glob(Box<GlobMatcher>),
}

impl HostPattern {
    /// Reads the host of an endpoint: a pattern only if it holds a `*`, as upstream.
    pub fn parse(text: &str) -> Result<Self, Bad> {
        if !text.contains('*') {
            return Host::parse(text).map(Self::Exact).map_err(|error| bad_host(text, error));
        }
        let bad = |what: &str, fix| Err(Bad { what: format!("host {text:?}: {what}"), fix });
        let lower = text.to_ascii_lowercase();
        let lower = lower.strip_suffix('.').unwrap_or(&lower);
        let Some((first, rest)) = lower.split_once('.') else {
            return bad(
                "the wildcard matches all hosts",
                "use specific patterns like '*.example.com'",
            );
        };
        if rest.contains('*') {
            return bad(
                "a wildcard may only be in the first label",
                "list the hosts, or use '**.'",
            );
        }
        if first.contains("**") && first != "**" {
            return bad("`**` must be the whole first label", "use `*` inside a label");
        }
        if !first.contains('*') {
            return bad("a wildcard may only be in the first label", "list the hosts");
        }
        if !rest.contains('.') {
            return bad(
                "the wildcard covers a whole top-level domain",
                "name at least two labels after it: '*.example.com'",
            );
        }
        let suffix = Host::parse(rest).map_err(|error| match error {
            // No address is meant here.
            HostError::BadIpv6 => bad_host(text, HostError::Character),
            other => bad_host(text, other),
        })?;
        if suffix.is_ip() {
            return bad("a wildcard cannot stand before an address", "use allowed_ips");
        }
        let label = if first == "**" {
            Label::Deep
        } else if first == "*" {
            Label::One
        } else if let Some((before, after)) = first.split_once('*')
            && is_literal(before)
            && is_literal(after)
        {
            // What no label holds would match nothing, silently.
            if !before.bytes().chain(after.bytes()).all(in_label) {
                return bad("a character is not allowed in a host", "write the A-label form");
            }
            Label::Affixes(before.to_owned(), after.to_owned())
        } else {
            Label::Glob(Box::new(compile(first, true)?))
        };
        Ok(Self::Wild(Wild { label, suffix: format!(".{}", suffix.as_str()) }))
    }
}

fn in_label(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_')
}

fn bad_host(text: &str, error: HostError) -> Bad {
    let fix = if text.contains("://") {
        "write the host alone, without scheme and path"
    } else if text.contains('/') {
        "write the host alone; addresses and ranges belong in allowed_ips, paths in `path`"
    } else if text.contains(':') && error == HostError::BadIpv6 {
        "write the host alone; the port belongs in `port`"
    } else if text.contains(['[', '{', '?']) {
        "list the hosts; of wildcards only `*` in the first label is for hosts"
    } else {
        "write a DNS name, or an address in its usual form"
    };
    Bad { what: format!("host {text:?}: {error}"), fix }
}

impl Wild {
    pub fn matches(&self, host: &Host) -> bool {
        if host.is_ip() {
            return false;
        }
        let Some(front) = host.as_str().strip_suffix(self.suffix.as_str()) else {
            return false;
        };
        if front.is_empty() {
            return false;
        }
        match &self.label {
            Label::Deep => true,
            _ if front.contains('.') => false,
            Label::One => true,
            Label::Affixes(before, after) => {
                front.len() >= before.len() + after.len()
                    && front.starts_with(before.as_str())
                    && front.ends_with(after.as_str())
            }
            Label::Glob(glob) => glob.is_match(front),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts() {
        let matches = |p: &str, h: &str| match HostPattern::parse(p).expect(p) {
            HostPattern::Exact(exact) => exact == Host::parse(h).expect(h),
            HostPattern::Wild(wild) => wild.matches(&Host::parse(h).expect(h)),
        };
        assert!(matches("Example.COM.", "example.com"));
        assert!(matches("*.Example.com", "API.example.com"));
        assert!(!matches("*.example.com", "example.com"));
        assert!(!matches("*.example.com", "a.b.example.com"));
        assert!(!matches("*.example.com", "xexample.com"));
        assert!(matches("**.example.com", "a.b.example.com"));
        assert!(matches("**.example.com", "a.example.com"));
        assert!(!matches("**.example.com", "example.com"));
        assert!(matches("*-ai.example.com", "eu-ai.example.com"));
        assert!(!matches("*-ai.example.com", "x.eu-ai.example.com"));
        assert!(matches("{a,b}*.example.com", "b1.example.com"));
        assert!(!matches("a*a.example.com", "a.example.com"));
    }

    #[test]
    fn hosts_that_are_refused() {
        for host in [
            "*",
            "**",
            "*.com",
            "**.com",
            "a.*.com",
            "a.b*.example.com",
            "a**.example.com",
            "*.exa[mple.com",
            "[a*.example.com",
            "{a*.example.com",
            "exa[mple.com",
            "a?.example.com",
            "*.1.2.3",
            "*.0.0.1",
            "https://example.com",
            "example.com:443",
            "10.0.0.0/8",
            "",
            "*ü.example.com",
            "* .example.com",
            "*..example.com",
            "example..com",
            "user@example.com",
        ] {
            HostPattern::parse(host).expect_err(host);
        }
    }
}

//! Globs: paths, binaries, query values and hosts.
//!
//! The syntax is globset's, as upstream's engine reads it: `*` and `?` stop at the delimiter, `**`
//! crosses it only as a whole component, `{a,b}` and `[!x]` work, `\` escapes. What is a plain
//! string, a prefix or everything never reaches a regular expression.
#![forbid(unsafe_code)]

use globset::{GlobBuilder, GlobMatcher};

use super::host::{Host, HostError};
use super::path;

/// Why a pattern cannot be used: what is wrong, and what to write instead.
#[derive(Debug)]
pub(super) struct Bad {
    pub what: String,
    pub fix: &'static str,
}

/// Longer patterns than anyone writes by hand.
const MAX_PATTERN: usize = 1024;

fn compile(pattern: &str, separator_is_literal: bool) -> Result<GlobMatcher, Bad> {
    if pattern.len() > MAX_PATTERN {
        return Err(Bad {
            what: format!("a pattern is longer than {MAX_PATTERN} bytes"),
            fix: "write several shorter ones",
        });
    }
    let glob = GlobBuilder::new(pattern)
        .literal_separator(separator_is_literal)
        .backslash_escape(true)
        .build()
        .map_err(|error| Bad {
            what: format!("{pattern:?} is not a pattern: {}", error.kind()),
            fix: "close every [ and {, and put \\ before a character that is meant literally",
        })?;
    Ok(glob.compile_matcher())
}

fn is_literal(pattern: &str) -> bool {
    !pattern.contains(['*', '?', '[', '{', '}', '\\'])
}

/// A path pattern of a rule, or a binary's: `*` stops at `/`.
#[derive(Debug, Clone)]
pub(super) enum PathGlob {
    Any,
    Literal(String),
    /// `<this>**`: ends with `/`.
    Under(String),
    Glob(Box<GlobMatcher>),
}

impl PathGlob {
    /// A rule's path: brought to the spelling in which paths are judged.
    pub fn of_path(pattern: &str) -> Result<Self, Bad> {
        Self::new(&canonical_pattern(pattern))
    }

    /// A binary: a pattern only if it holds a `*`, as upstream.
    pub fn of_binary(pattern: &str) -> Result<Self, Bad> {
        if pattern.contains('*') {
            Self::new(pattern)
        } else {
            Ok(Self::Literal(pattern.to_owned()))
        }
    }

    fn new(pattern: &str) -> Result<Self, Bad> {
        if pattern == "**" {
            return Ok(Self::Any);
        }
        if is_literal(pattern) {
            return Ok(Self::Literal(pattern.to_owned()));
        }
        if let Some(prefix) = pattern.strip_suffix("**")
            && prefix.ends_with('/')
            && is_literal(prefix)
        {
            return Ok(Self::Under(prefix.to_owned()));
        }
        compile(pattern, true).map(|glob| Self::Glob(Box::new(glob)))
    }

    pub fn matches(&self, path: &str) -> bool {
        match self {
            Self::Any => true,
            Self::Literal(literal) => literal == path,
            Self::Under(prefix) => path.starts_with(prefix.as_str()),
            Self::Glob(glob) => glob.is_match(path),
        }
    }
}

/// The paths for which an endpoint speaks.
///
/// Upstream has two readings of `*` here (its selection lets it cross `/`, its rules do not): what
/// an endpoint allows needs the narrow one, what it denies the wide one.
#[derive(Debug, Clone)]
pub(super) enum Scope {
    Any,
    Exact(String),
    /// `<this>/**`: the path itself too, as upstream.
    Under(String),
    Glob {
        narrow: Box<GlobMatcher>,
        wide: Box<GlobMatcher>,
    },
}

impl Scope {
    pub fn new(pattern: &str) -> Result<Self, Bad> {
        let pattern = canonical_pattern(pattern);
        if pattern == "**" || pattern == "/**" {
            return Ok(Self::Any);
        }
        if is_literal(&pattern) {
            return Ok(Self::Exact(pattern));
        }
        if let Some(prefix) = pattern.strip_suffix("/**")
            && is_literal(prefix)
        {
            return Ok(Self::Under(prefix.to_owned()));
        }
        Ok(Self::Glob {
            narrow: Box::new(compile(&pattern, true)?),
            wide: Box::new(compile(&pattern, false)?),
        })
    }

    /// Whether the endpoint's allow rules speak for this path.
    pub fn allows(&self, path: &str) -> bool {
        match self {
            Self::Glob { narrow, .. } => narrow.is_match(path),
            _ => self.plain(path),
        }
    }

    /// Whether the endpoint's deny rules speak for this path.
    pub fn denies(&self, path: &str) -> bool {
        match self {
            Self::Glob { narrow, wide } => wide.is_match(path) || narrow.is_match(path),
            _ => self.plain(path),
        }
    }

    fn plain(&self, path: &str) -> bool {
        match self {
            Self::Any => true,
            Self::Exact(exact) => exact == path,
            Self::Under(prefix) => path
                .strip_prefix(prefix.as_str())
                .is_some_and(|rest| rest.is_empty() || rest.starts_with('/')),
            Self::Glob { .. } => false,
        }
    }
}

/// A query value's pattern. The delimiter is `.`, as upstream: `v1*` does not match `v1.2`, and `*`
/// does match `a/b`.
#[derive(Debug, Clone)]
pub(super) enum ValueGlob {
    Any,
    Literal(String),
    /// Written for values in which `.` and `/` changed places.
    Glob(Box<GlobMatcher>),
}

impl ValueGlob {
    pub fn new(pattern: &str) -> Result<Self, Bad> {
        if pattern == "**" {
            return Ok(Self::Any);
        }
        if is_literal(pattern) {
            return Ok(Self::Literal(pattern.to_owned()));
        }
        compile(&swap(pattern), true).map(|glob| Self::Glob(Box::new(glob)))
    }

    pub fn matches(&self, value: &str) -> bool {
        match self {
            Self::Any => true,
            Self::Literal(literal) => literal == value,
            Self::Glob(glob) => glob.is_match(swap(value)),
        }
    }
}

/// globset knows one delimiter only.
fn swap(text: &str) -> String {
    let swapped = text.chars().map(|c| match c {
        '.' => '/',
        '/' => '.',
        other => other,
    });
    swapped.collect()
}

/// A pattern in the spelling of canonical paths: what [`path::canonical_path`] would encode is
/// encoded, what it would decode is decoded; glob characters stay.
fn canonical_pattern(pattern: &str) -> String {
    let mut out = String::with_capacity(pattern.len());
    let mut rest = pattern;
    let mut in_class = false;
    while let Some(c) = rest.chars().next() {
        let (head, tail) = rest.split_at(c.len_utf8());
        rest = tail;
        match c {
            '\\' => {
                out.push(c);
                if let Some(escaped) = rest.chars().next() {
                    out.push(escaped);
                    rest = &rest[escaped.len_utf8()..];
                }
            }
            '[' => {
                in_class = true;
                out.push(c);
            }
            ']' => {
                in_class = false;
                out.push(c);
            }
            _ if in_class => out.push(c),
            '%' => match path::hex_pair(rest.as_bytes()) {
                Some(byte) => {
                    rest = &rest[2..];
                    if byte == b'*' {
                        out.push('\\');
                    }
                    path::push_encoded(&mut out, byte);
                }
                None => out.push_str("%25"),
            },
            '*' | '?' | '{' | '}' | ',' | '!' | ';' | '/' => out.push(c),
            _ => {
                for byte in head.bytes() {
                    path::push_encoded(&mut out, byte);
                }
            }
        }
    }
    out
}

/// Why no canonical path can match this pattern, if none can.
pub(super) fn never_matches(pattern: &str) -> Option<&'static str> {
    let dots = |p: &str| p.split('/').any(|segment| matches!(segment, "." | ".."));
    if !pattern.starts_with(['/', '*', '?', '[', '{', '\\']) {
        Some("does not start with `/`")
    } else if pattern.contains("//") {
        Some("has `//`, which is collapsed before judging")
    } else if dots(pattern) {
        Some("has `.` or `..`, which are resolved before judging")
    } else if pattern.contains(';') {
        Some("has `;`, after which a segment is cut before judging")
    } else if pattern.contains('#') {
        Some("has `#`, which no request target holds")
    } else {
        None
    }
}

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
            return Host::parse(text)
                .map(Self::Exact)
                .map_err(|error| bad_host(text, error));
        }
        let bad = |what: &str, fix| {
            Err(Bad {
                what: format!("host {text:?}: {what}"),
                fix,
            })
        };
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
            return bad(
                "`**` must be the whole first label",
                "use `*` inside a label",
            );
        }
        if !first.contains('*') {
            return bad(
                "a wildcard may only be in the first label",
                "list the hosts",
            );
        }
        if !rest.contains('.') {
            return bad(
                "the wildcard covers a whole top-level domain",
                "name at least two labels after it: '*.example.com'",
            );
        }
        let suffix = Host::parse(rest).map_err(|error| bad_host(text, error))?;
        if suffix.is_ip() {
            return bad(
                "a wildcard cannot stand before an address",
                "use allowed_ips",
            );
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
                return bad(
                    "a character is not allowed in a host",
                    "write the A-label form",
                );
            }
            Label::Affixes(before.to_owned(), after.to_owned())
        } else {
            Label::Glob(Box::new(compile(first, true)?))
        };
        Ok(Self::Wild(Wild {
            label,
            suffix: format!(".{}", suffix.as_str()),
        }))
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
    Bad {
        what: format!("host {text:?}: {error}"),
        fix,
    }
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

    fn path(pattern: &str, path: &str) -> bool {
        PathGlob::of_path(pattern).expect(pattern).matches(path)
    }

    #[test]
    fn paths() {
        assert!(path("**", "/a/b"));
        assert!(path("/**", "/"));
        assert!(path("/v1/*", "/v1/x"));
        assert!(!path("/v1/*", "/v1/x/y"));
        assert!(path("/v1/**", "/v1/x/y"));
        assert!(!path("/v1/**", "/v1"));
        assert!(!path("/v1/**", "/v1x"));
        assert!(path("/a/**/z", "/a/b/c/z"));
        assert!(path("/a/**/z", "/a/z"));
        assert!(path("/{a,b}/[!x]", "/b/y"));
        assert!(!path("/{a,b}/[!x]", "/b/x"));
        assert!(!path("/a", "/A"));
        assert!(path("/a\\*", "/a*"));
        assert!(!path("/a\\*", "/ab"));
    }

    #[test]
    fn patterns_are_spelt_like_paths() {
        assert!(path("/a%2fb", "/a%2Fb"));
        assert!(path("/%41", "/A"));
        assert!(path("/a b", "/a%20b"));
        assert!(path("/ä*", "/%C3%A4x"));
        assert!(path("/100%", "/100%25"));
        assert!(path("/a%2a", "/a*"));
        assert!(!path("/a%2a", "/ab"));
    }

    #[test]
    fn scopes_allow_narrowly_and_deny_widely() {
        let scope = Scope::new("/repos/*").expect("pattern");
        assert!(scope.allows("/repos/a") && scope.denies("/repos/a"));
        assert!(!scope.allows("/repos/a/b") && scope.denies("/repos/a/b"));
        let scope = Scope::new("/v1/**").expect("pattern");
        assert!(scope.allows("/v1") && scope.allows("/v1/x") && !scope.allows("/v1x"));
        let scope = Scope::new("/graphql").expect("pattern");
        assert!(scope.allows("/graphql") && !scope.denies("/graphql/"));
    }

    #[test]
    fn values_have_dots_as_delimiter() {
        let value = |p: &str, v: &str| ValueGlob::new(p).expect(p).matches(v);
        assert!(value("v1*", "v12"));
        assert!(!value("v1*", "v1.2"));
        assert!(value("v1.*", "v1.2"));
        assert!(value("*", "a/b"));
        assert!(!value("*", "a.b"));
        assert!(value("**", "a.b/c"));
        assert!(value("a/*", "a/b"));
        assert!(value("", "") && !value("", "x"));
    }

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

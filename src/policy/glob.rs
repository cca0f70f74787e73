//! Globs: paths, binaries and query values.
//!
//! The syntax is globset's, as upstream's engine reads it: `*` and `?` stop at the delimiter, `**`
//! crosses it only as a whole component, `{a,b}` and `[!x]` work, `\` escapes. What is a plain
//! string, a prefix or everything never reaches a regular expression.
#![forbid(unsafe_code)]

use globset::{GlobBuilder, GlobMatcher};

use super::path;

/// Why a pattern cannot be used: what is wrong, and what to write instead.
#[derive(Debug)]
pub(super) struct Bad {
    pub what: String,
    pub fix: &'static str,
}

/// Longer patterns than anyone writes by hand.
const MAX_PATTERN: usize = 1024;

pub(super) fn compile(pattern: &str, separator_is_literal: bool) -> Result<GlobMatcher, Bad> {
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

pub(super) fn is_literal(pattern: &str) -> bool {
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

    /// The same for paths in lower case, in which a slash or a backslash that is encoded is a slash,
    /// and one at the end says nothing.
    pub fn folded(pattern: &str) -> Result<Self, Bad> {
        Self::new(&fold(pattern))
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
        Self::of(canonical_pattern(pattern))
    }

    /// See [`PathGlob::folded`].
    pub fn folded(pattern: &str) -> Result<Self, Bad> {
        Self::of(fold(pattern))
    }

    fn of(pattern: String) -> Result<Self, Bad> {
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

/// A pattern for paths in lower case.
fn fold(pattern: &str) -> String {
    let mut folded = canonical_pattern(pattern).to_lowercase();
    for slash in ["%2f", "%5c"] {
        folded = folded.replace(slash, "/");
    }
    if folded.len() > 1 && !folded.ends_with("\\/") {
        folded.truncate(folded.trim_end_matches('/').len());
    }
    folded
}

/// A pattern in the spelling of canonical paths: what [`path::canonical_path`] would encode is
/// encoded, what it would decode is decoded; glob characters stay.
pub(super) fn canonical_pattern(pattern: &str) -> String {
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
}

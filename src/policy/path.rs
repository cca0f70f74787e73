//! The one spelling of a request target that is judged and forwarded.
//!
//! Percent-encodings are decoded once; what is a plain path character stays plain and everything
//! else is encoded in upper case. Empty segments, `.`, `..` and `;parameters` are resolved away. What
//! servers read differently (a backslash, a dot segment behind `%2F`) is refused. The result is its
//! own canonical form.
#![forbid(unsafe_code)]

/// A request target that was taken apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CanonicalTarget {
    /// `host[:port]` of an absolute-form target, as sent, never empty. The caller compares it with
    /// the host that was judged. `None` in origin form.
    pub authority: Option<String>,
    /// Canonical printable ASCII that starts with `/`: what is judged is what is forwarded.
    pub path: String,
    /// What stood after `?`, verbatim: this is forwarded.
    pub query: Option<String>,
    /// The query's pairs, decoded, in order: these are judged.
    pub pairs: Vec<(String, String)>,
}

impl CanonicalTarget {
    /// Path and query, as they are forwarded.
    #[must_use]
    pub fn origin_form(&self) -> String {
        match &self.query {
            Some(query) => format!("{}?{query}", self.path),
            None => self.path.clone(),
        }
    }
}

/// Why a request target was refused. Holds nothing of what was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PathError {
    /// Neither `/…` nor `http://…` nor `https://…`.
    #[error("request target is neither a path nor an http URL")]
    Form,
    /// Longer than [`MAX_PATH`].
    #[error("request path is longer than 4096 bytes")]
    TooLong,
    /// Plain or encoded.
    #[error("request target holds a control character")]
    Control,
    /// A space, a fragment, or bytes outside ASCII.
    #[error("request target holds a character that must be percent-encoded")]
    Character,
    /// `%` without two hexadecimal digits.
    #[error("request target has a malformed percent-encoding")]
    Encoding,
    /// `%2F` where no endpoint allows it.
    #[error("request path has an encoded slash (%2F), which the policy does not allow")]
    EncodedSlash,
    /// `..` above the root.
    #[error("request path leads above the root")]
    AboveRoot,
    /// `..\`, `..%5C`, `%2F..`, `..%3B`: a traversal to some servers, a name to others.
    #[error("request path has a dot segment beside an encoded slash, a backslash or a semicolon")]
    HiddenDots,
    /// Parsing the query gives more pairs than [`MAX_PAIRS`].
    #[error("request query has more than 1024 pairs")]
    TooManyPairs,
}

/// The longest path in bytes, as upstream.
pub const MAX_PATH: usize = 4096;
/// The most pairs of a query.
pub const MAX_PAIRS: usize = 1024;

/// Brings a request target in origin form or absolute form to its canonical form.
///
/// `allow_encoded_slash` keeps `%2F` as part of a segment (see [`super::Grant`]).
///
/// # Errors
/// See [`PathError`]: refuse the request.
pub fn canonical_path(
    target: &str,
    allow_encoded_slash: bool,
) -> Result<CanonicalTarget, PathError> {
    for byte in target.bytes() {
        if byte.is_ascii_control() {
            return Err(PathError::Control);
        }
        if !byte.is_ascii_graphic() || byte == b'#' {
            return Err(PathError::Character);
        }
    }
    let (authority, target) = split_authority(target)?;
    let (path, query) = match target.split_once('?') {
        Some((path, query)) => (path, Some(query)),
        None => (target, None),
    };
    if path.len() > MAX_PATH {
        return Err(PathError::TooLong);
    }
    let path = resolve(path, allow_encoded_slash)?;
    if path.len() > MAX_PATH {
        return Err(PathError::TooLong);
    }
    Ok(CanonicalTarget {
        authority,
        path,
        query: query.map(str::to_owned),
        pairs: query.map_or_else(|| Ok(Vec::new()), pairs)?,
    })
}

fn split_authority(target: &str) -> Result<(Option<String>, &str), PathError> {
    if target.starts_with('/') {
        return Ok((None, target));
    }
    let (scheme, rest) = target.split_once("://").ok_or(PathError::Form)?;
    if !scheme.eq_ignore_ascii_case("http") && !scheme.eq_ignore_ascii_case("https") {
        return Err(PathError::Form);
    }
    let end = rest.find(['/', '?']).unwrap_or(rest.len());
    let (authority, rest) = rest.split_at(end);
    // A backslash ends the host to some readers; user information hides it from people.
    if authority.is_empty() || authority.contains(['\\', '@', '%']) {
        return Err(PathError::Form);
    }
    Ok((Some(authority.to_owned()), rest))
}

/// The path's segments, decoded, resolved and encoded again. An empty path is the root.
fn resolve(path: &str, allow_encoded_slash: bool) -> Result<String, PathError> {
    let mut out = String::with_capacity(path.len());
    // Whether the path so far names a directory: `/a/`, `/a/.` and `/a/b/..` do.
    let mut directory = true;
    let mut decoded = Vec::new();
    let mut segments = path.split('/');
    segments.next();
    for segment in segments {
        let segment = segment.split(';').next().unwrap_or_default();
        let slashes = decode(segment, &mut decoded)?;
        if slashes && !allow_encoded_slash {
            return Err(PathError::EncodedSlash);
        }
        let hidden = decoded.iter().any(|b| matches!(b, b'/' | b'\\' | b';'));
        let mut parts = decoded.split(|b| matches!(b, b'/' | b'\\'));
        if hidden && parts.any(is_dots) {
            return Err(PathError::HiddenDots);
        }
        match decoded.as_slice() {
            b"" | b"." => directory = true,
            b".." => {
                let parent = out.rfind('/').ok_or(PathError::AboveRoot)?;
                out.truncate(parent);
                directory = true;
            }
            bytes => {
                out.push('/');
                for byte in bytes {
                    push_encoded(&mut out, *byte);
                }
                directory = false;
            }
        }
    }
    if directory {
        out.push('/');
    }
    Ok(out)
}

/// `.` or `..`, also with parameters after an encoded semicolon.
fn is_dots(part: &[u8]) -> bool {
    matches!(part.split(|b| *b == b';').next(), Some(b"." | b".."))
}

/// Decodes a segment; says whether an encoded slash was in it.
fn decode(segment: &str, out: &mut Vec<u8>) -> Result<bool, PathError> {
    out.clear();
    let mut slashes = false;
    let mut bytes = segment.as_bytes();
    while let [first, rest @ ..] = bytes {
        bytes = rest;
        let mut byte = *first;
        if byte == b'%' {
            byte = hex_pair(rest).ok_or(PathError::Encoding)?;
            bytes = &rest[2..];
            slashes |= byte == b'/';
        }
        if byte.is_ascii_control() {
            return Err(PathError::Control);
        }
        out.push(byte);
    }
    Ok(slashes)
}

/// The byte that two hexadecimal digits at the start stand for.
pub(super) fn hex_pair(bytes: &[u8]) -> Option<u8> {
    let digit = |b: u8| char::from(b).to_digit(16).and_then(|d| u8::try_from(d).ok());
    match bytes {
        [high, low, ..] => Some(digit(*high)? * 16 + digit(*low)?),
        _ => None,
    }
}

/// Appends one byte of a segment: plain where a path may hold it plainly, `%XX` else. `;` is encoded
/// because a plain one starts parameters.
pub(super) fn push_encoded(out: &mut String, byte: u8) {
    const HEX: &[u8; 16] = b"0123456789ABCDEF";
    let plain = byte.is_ascii_alphanumeric() || b"-._~!$&'()*+,=:@".contains(&byte);
    if plain {
        out.push(char::from(byte));
    } else {
        out.push('%');
        out.push(char::from(HEX[usize::from(byte >> 4)]));
        out.push(char::from(HEX[usize::from(byte & 15)]));
    }
}

/// The pairs of a query: split at `&`, then at the first `=`; `+` is a space.
fn pairs(query: &str) -> Result<Vec<(String, String)>, PathError> {
    let mut pairs = Vec::new();
    for part in query.split('&').filter(|part| !part.is_empty()) {
        if pairs.len() == MAX_PAIRS {
            return Err(PathError::TooManyPairs);
        }
        let (key, value) = part.split_once('=').unwrap_or((part, ""));
        pairs.push((decode_query(key)?, decode_query(value)?));
    }
    Ok(pairs)
}

fn decode_query(text: &str) -> Result<String, PathError> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.as_bytes();
    while let [first, rest @ ..] = bytes {
        bytes = rest;
        match first {
            b'+' => out.push(b' '),
            b'%' => {
                out.push(hex_pair(rest).ok_or(PathError::Encoding)?);
                bytes = &rest[2..];
            }
            other => out.push(*other),
        }
    }
    Ok(match String::from_utf8(out) {
        Ok(text) => text,
        Err(error) => String::from_utf8_lossy(error.as_bytes()).into_owned(),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn path(target: &str) -> String {
        canonical_path(target, false).expect(target).path
    }

    fn error(target: &str) -> PathError {
        canonical_path(target, false).expect_err(target)
    }

    #[test]
    fn canonical_forms() {
        for (target, canonical) in [
            ("/", "/"),
            ("/a/b", "/a/b"),
            ("/a/b/", "/a/b/"),
            ("//a///b", "/a/b"),
            ("/a/./b/../c", "/a/c"),
            ("/a/..", "/"),
            ("/a/b/..", "/a/"),
            ("/a/.", "/a/"),
            ("/%61%2d%7E", "/a-~"),
            ("/a%20b%c3%a4", "/a%20b%C3%A4"),
            ("/y/%2e%2e/x/%2E", "/x/"),
            ("/a;x=1/b;y", "/a/b"),
            ("/a%3bx", "/a%3Bx"),
            ("/a%253b", "/a%253b"),
            ("/a:b@c!$&'()*+,=", "/a:b@c!$&'()*+,="),
            ("/{a}", "/%7Ba%7D"),
            ("/a%5Cb", "/a%5Cb"),
            ("/a\\b", "/a%5Cb"),
        ] {
            assert_eq!(path(target), canonical, "{target}");
        }
    }

    #[test]
    fn refusals() {
        for (target, wanted) in [
            ("", PathError::Form),
            ("*", PathError::Form),
            ("a/b", PathError::Form),
            ("ftp://h/", PathError::Form),
            ("http:///x", PathError::Form),
            ("http://u@h/x", PathError::Form),
            ("http://h\\@evil/x", PathError::Form),
            ("/a b", PathError::Character),
            ("/a#b", PathError::Character),
            ("/ä", PathError::Character),
            ("/a\tb", PathError::Control),
            ("/a%00", PathError::Control),
            ("/a%0ab", PathError::Control),
            ("/a%7f", PathError::Control),
            ("/a%", PathError::Encoding),
            ("/a%2", PathError::Encoding),
            ("/a%zz", PathError::Encoding),
            ("/a%+1", PathError::Encoding),
            ("/a%2fb", PathError::EncodedSlash),
            ("/..", PathError::AboveRoot),
            ("/a/../../b", PathError::AboveRoot),
            ("/a/..;x/..;/b", PathError::AboveRoot),
            ("/a/..\\b", PathError::HiddenDots),
            ("/a/..%5cb", PathError::HiddenDots),
            ("/a/x%5c..", PathError::HiddenDots),
            ("/a/..%3bx/b", PathError::HiddenDots),
            ("/%2e%2e/x/%2E", PathError::AboveRoot),
            ("/a?x=%g", PathError::Encoding),
        ] {
            assert_eq!(error(target), wanted, "{target}");
        }
        assert_eq!(error(&format!("/{}", "a".repeat(MAX_PATH))), PathError::TooLong);
        assert_eq!(error(&format!("/{}", "\"".repeat(2000))), PathError::TooLong);
        assert_eq!(error(&format!("/?{}", "a&".repeat(2000))), PathError::TooManyPairs);
    }

    #[test]
    fn encoded_slashes_on_request() {
        let path = |target: &str| canonical_path(target, true).map(|t| t.path);
        assert_eq!(path("/a%2fb").as_deref(), Ok("/a%2Fb"));
        assert_eq!(path("/a%2f..%2fb"), Err(PathError::HiddenDots));
        assert_eq!(path("/a%2f..%3bx/b"), Err(PathError::HiddenDots));
        assert_eq!(path("/%2e%2e%2fb"), Err(PathError::HiddenDots));
    }

    #[test]
    fn queries() {
        let target = canonical_path("/a?x=1+2&y=%41%3d&&z&x=%ff", false).expect("target");
        assert_eq!(target.query.as_deref(), Some("x=1+2&y=%41%3d&&z&x=%ff"));
        let wanted = [("x", "1 2"), ("y", "A="), ("z", ""), ("x", "\u{fffd}")];
        let wanted: Vec<_> = wanted.map(|(k, v)| (k.to_owned(), v.to_owned())).into();
        assert_eq!(target.pairs, wanted);
        assert_eq!(target.origin_form(), "/a?x=1+2&y=%41%3d&&z&x=%ff");
        assert_eq!(canonical_path("/a?", false).expect("target").query.as_deref(), Some(""));
    }

    #[test]
    fn absolute_form() {
        let target = canonical_path("HTTP://Example.com:80/a/../b?c", false).expect("target");
        assert_eq!(target.authority.as_deref(), Some("Example.com:80"));
        assert_eq!(target.origin_form(), "/b?c");
        let target = canonical_path("http://example.com", false).expect("target");
        assert_eq!(target.origin_form(), "/");
        assert_eq!(canonical_path("http://h?q", false).expect("target").origin_form(), "/?q");
    }

    proptest! {
        #[test]
        fn canonical_form_is_a_fixed_point(
            target in "/([a-c.;%/\\\\]|%2[eEfF5]|%5[cC]|%3[bB]|\\.\\./|//){0,24}",
            slash in any::<bool>(),
        ) {
            if let Ok(once) = canonical_path(&target, slash) {
                let twice = canonical_path(&once.path, slash).expect("canonical form is accepted");
                prop_assert_eq!(&once.path, &twice.path);
                prop_assert!(once.path.starts_with('/'));
                prop_assert!(!once.path.contains("//"));
                prop_assert!(!once.path.split('/').any(|s| matches!(s, "." | "..")));
                prop_assert!(!once.path.contains([';', '\\', '?', '#']));
                prop_assert!(slash || !once.path.contains("%2F"));
                prop_assert!(once.path.bytes().all(|b| b.is_ascii_graphic()));
            }
        }

        #[test]
        fn never_panics(target in "\\PC*|[ -~]*", slash in any::<bool>()) {
            let _ = canonical_path(&target, slash);
        }
    }
}

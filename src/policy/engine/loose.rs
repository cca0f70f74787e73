//! What a denial looks for beside what is written: the ways in which servers read a path, or a name
//! in a query, less exactly than they were sent.
//!
//! Only denials are read so. An allow rule that matched more than it says would allow more; a
//! denial that matches more than it says refuses what nobody meant to let pass.
#![forbid(unsafe_code)]

use super::Request;
use crate::policy::glob::{PathGlob, Scope, ValueGlob};

/// The spellings of one path that some server takes for the same, in lower case.
pub(super) struct Paths(Vec<String>);

impl Paths {
    /// `path` is canonical.
    pub fn of(path: &str) -> Self {
        // IIS and some frameworks part paths at a backslash; with `allow_encoded_slash` there may be
        // an encoded slash too.
        let mut whole = path.to_lowercase().replace("%2f", "/").replace("%5c", "/");
        while whole.contains("//") {
            whole = whole.replace("//", "/");
        }
        // Windows drops dots and blanks at the end of a name.
        let bare = |text: &str| {
            let mut text = text;
            while let Some(rest) =
                text.strip_suffix('/').or(text.strip_suffix('.')).or(text.strip_suffix("%20"))
            {
                text = rest;
            }
            text.to_owned()
        };
        let trimmed = bare(&whole);
        let mut all = vec![whole];
        // `/graphql.json`: the suffix chooses a format, not another resource.
        if let Some((front, suffix)) = trimmed.rsplit_once('.')
            && !front.is_empty()
            && !front.ends_with('/')
            && (1..=5).contains(&suffix.len())
            && suffix.bytes().all(|byte| byte.is_ascii_alphanumeric())
        {
            all.push(bare(front));
        }
        if !all.contains(&trimmed) {
            all.push(trimmed);
        }
        Self(all)
    }

    pub fn matched_by(&self, folded: &PathGlob) -> bool {
        self.0.iter().any(|path| folded.matches(path))
    }

    pub fn within(&self, folded: &Scope) -> bool {
        self.0.iter().any(|path| folded.denies(path))
    }
}

/// Whether a query has a value for `key`, as any server would find it, that one of `globs` matches.
pub(super) fn query_has(request: &Request<'_>, key: &str, globs: &[ValueGlob]) -> bool {
    let hit =
        |sent: &str, value: &str| names(sent, key) && globs.iter().any(|glob| glob.matches(value));
    request.query.iter().any(|(sent, value)| {
        hit(sent, value)
            || ((sent.contains(';') || value.contains(';'))
                // Some servers part pairs at a semicolon as well.
                && format!("{sent}={value}").split(';').any(|part| {
                    let (sent, value) = part.split_once('=').unwrap_or((part, ""));
                    hit(sent, value)
                }))
    })
}

/// Whether a server could take the name that was sent for `key`: names without case, PHP's and
/// Rack's arrays (`key[]`, `key[1]`, `[key]`), PHP's blanks, dots and NUL.
fn names(sent: &str, key: &str) -> bool {
    if sent == key {
        return true;
    }
    let (sent, key) = (fold(sent), fold(key));
    sent == key
        || sent.strip_prefix(&key).is_some_and(|rest| rest.starts_with('['))
        || (!key.contains(['[', ']']) && root(&sent) == root(&key))
}

/// As readers without regard to case see it.
fn fold(text: &str) -> String {
    text.to_uppercase().to_lowercase()
}

/// The name without what makes it an array or an object.
fn root(name: &str) -> String {
    let start = name.trim_start_matches(|c: char| c.is_whitespace() || c == '[' || c == '\0');
    let name = start.split(['[', ']', '\0']).next().unwrap_or_default();
    name.trim_end().replace(['.', ' '], "_")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spellings_of_a_path() {
        for (path, spellings) in [
            ("/", &["/", ""][..]),
            ("/Admin", &["/admin"]),
            ("/admin/", &["/admin/", "/admin"]),
            ("/a%5CB", &["/a/b"]),
            ("/a%2F%5CB", &["/a/b"]),
            ("/graphql.json", &["/graphql.json", "/graphql"]),
            ("/a/b.tar.gz", &["/a/b.tar.gz", "/a/b.tar"]),
            ("/a/.json", &["/a/.json"]),
            ("/admin.", &["/admin.", "/admin"]),
            ("/admin%20/", &["/admin%20/", "/admin"]),
            ("/v1.2/x", &["/v1.2/x"]),
        ] {
            let mut found = Paths::of(path).0;
            found.sort_unstable();
            let mut wanted: Vec<_> = spellings.iter().map(|text| (*text).to_owned()).collect();
            wanted.sort_unstable();
            assert_eq!(found, wanted, "{path}");
        }
    }

    #[test]
    fn names_that_servers_take_for_one() {
        for sent in [
            "force",
            "FORCE",
            "force[]",
            "force[1]",
            "[force]",
            " force",
            "Force[a][b]",
            "force\0x",
        ] {
            assert!(names(sent, "force"), "{sent:?}");
        }
        for other in ["forced", "enforce", "x[force]", "f.orce", "", "force-x"] {
            assert!(!names(other, "force"), "{other:?}");
        }
        assert!(names("a_b", "a.b") && names("filter[kind][]", "filter[kind]"));
        assert!(!names("filter[other]", "filter[kind]") && !names("filter", "filter[kind]"));
        assert!(names("api-key", "API-Key"));
    }
}

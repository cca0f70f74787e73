//! The digest that pins a policy's text: the webhook writes it into the pod, the supervisor
//! recomputes it from the mounted files.

use std::fmt::Write as _;

use sha2::{Digest as _, Sha256};

/// SHA-256 over a `ConfigMap`'s data, `sha256:<lower-case hex>`.
///
/// For each key in byte order: the key, NUL, the value's length in bytes as decimal digits, NUL,
/// the value. The length makes the form unambiguous whatever the values hold.
#[must_use]
pub fn digest<'a>(entries: impl IntoIterator<Item = (&'a str, &'a [u8])>) -> String {
    let mut entries: Vec<_> = entries.into_iter().collect();
    entries.sort_unstable();
    let mut hash = Sha256::new();
    for (key, value) in entries {
        hash.update(key);
        hash.update([0]);
        hash.update(value.len().to_string());
        hash.update([0]);
        hash.update(value);
    }
    hash.finalize().iter().fold(String::from("sha256:"), |mut out, byte| {
        let _ = write!(out, "{byte:02x}");
        out
    })
}

#[cfg(test)]
mod tests {
    use super::digest;

    #[test]
    fn is_the_hash_of_the_documented_form() {
        // printf 'a\0003\000xyzb\0000\000' | sha256sum
        let expected = "sha256:34413f4141b6476a1cd139e205ac8f84b90c0d67d088efeee6e7256bb39476d8";
        assert_eq!(digest([("b", &b""[..]), ("a", b"xyz")]), expected);
    }

    #[test]
    fn no_entries_is_the_hash_of_nothing() {
        assert_eq!(
            digest([]),
            "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
        );
    }

    #[test]
    fn boundaries_count() {
        assert_ne!(digest([("a", &b"bc"[..])]), digest([("ab", &b"c"[..])]));
        assert_ne!(digest([("a", &b"1\0b"[..])]), digest([("a", &b"1"[..]), ("b", b"")]));
    }
}

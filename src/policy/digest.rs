//! Digests: the one that pins a policy's text (the webhook writes it into the pod, the supervisor
//! recomputes it from the mounted files), and how those of executables are written.

use std::fmt::Write as _;

use sha2::Digest as _;

/// A SHA-256.
pub type Sha256 = [u8; 32];

/// Reads 64 hexadecimal digits, of either case.
#[must_use]
pub fn from_hex(digits: &str) -> Option<Sha256> {
    let digits = digits.as_bytes();
    let digit = |digit: u8| u8::try_from(char::from(digit).to_digit(16)?).ok();
    let mut out = [0; 32];
    if digits.len() != 2 * out.len() {
        return None;
    }
    for (byte, pair) in out.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(out)
}

/// Writes 64 hexadecimal digits, lower case.
#[must_use]
pub fn to_hex(digest: &Sha256) -> String {
    digest.iter().fold(String::with_capacity(64), |mut out, byte| {
        let _ = write!(out, "{byte:02x}");
        out
    })
}

/// SHA-256 over a `ConfigMap`'s data, `sha256:<lower-case hex>`.
///
/// For each key in byte order: the key, NUL, the value's length in bytes as decimal digits, NUL,
/// the value. The length makes the form unambiguous whatever the values hold.
#[must_use]
pub fn digest<'a>(entries: impl IntoIterator<Item = (&'a str, &'a [u8])>) -> String {
    let mut entries: Vec<_> = entries.into_iter().collect();
    entries.sort_unstable();
    let mut hash = sha2::Sha256::new();
    for (key, value) in entries {
        hash.update(key);
        hash.update([0]);
        hash.update(value.len().to_string());
        hash.update([0]);
        hash.update(value);
    }
    format!("sha256:{}", to_hex(&hash.finalize().into()))
}

#[cfg(test)]
mod tests {
    use super::{digest, from_hex, to_hex};

    #[test]
    fn hexadecimal_digits_come_back() {
        let digits = "00ff34413f4141b6476a1cd139e205ac8f84b90c0d67d088efeee6e7256bb394";
        assert_eq!(to_hex(&from_hex(digits).unwrap()), digits);
        assert_eq!(from_hex(&digits.to_uppercase()), from_hex(digits));
        let bad = [&digits[1..], "", &digits.replace('f', "g"), &digits.replace("00", "+0")];
        assert!(bad.iter().all(|bad| from_hex(bad).is_none()));
        assert!(from_hex(&"é".repeat(32)).is_none());
    }

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

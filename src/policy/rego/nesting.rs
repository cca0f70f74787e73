//! How much work a text's brackets are to a parser that reads them more than once.
//!
//! regorus reads what may be a comprehension as one, and where it is none reads it again from the
//! bracket on: two times for each `[` or `{`, so 22 of them in each other take a minute, and nothing
//! looks at the clock meanwhile.
#![forbid(unsafe_code)]

/// The most readings of one bracket, summed over all of them: below a second of work. The policy of
/// the examples has 224; 128 KiB of the same would have 2,600.
const MAX_READINGS: u64 = 1 << 15;

/// The line, from 1, on which a text's brackets come to more than is read; `None` is a text that may
/// be parsed. Brackets of strings and comments do not count.
pub(super) fn too_deep(text: &str) -> Option<u64> {
    let (mut depth, mut readings, mut line) = (0_u32, 0_u64, 1_u64);
    let mut bytes = text.bytes();
    let mut within = None;
    while let Some(byte) = bytes.next() {
        line += u64::from(byte == b'\n');
        match (within, byte) {
            (Some(b'"'), b'\\') => line += u64::from(bytes.next() == Some(b'\n')),
            (Some(b'#'), b'\n') => within = None,
            (Some(quote), byte) if quote == byte && quote != b'#' => within = None,
            (None, b'"' | b'`' | b'#') => within = Some(byte),
            (None, b'[' | b'{') => {
                depth += 1;
                readings = readings.saturating_add(1_u64.checked_shl(depth).unwrap_or(u64::MAX));
                if readings > MAX_READINGS {
                    return Some(line);
                }
            }
            (None, b']' | b'}') => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_people_write_is_read() {
        let text = include_str!("../../../examples/policy.rego");
        assert_eq!(too_deep(text), None);
        assert_eq!(too_deep(&text.repeat(11)), None);
        assert_eq!(too_deep(&format!("x := {}1{}", "[".repeat(14), "]".repeat(14))), None);
    }

    #[test]
    fn what_takes_minutes_is_not() {
        for bracket in ["[", "{", "{\"a\": ", "[x |\n", "[{"] {
            assert!(too_deep(&format!("\nx := {}1", bracket.repeat(22))).is_some(), "{bracket}");
        }
        assert_eq!(too_deep(&format!("\n\nx := {}", "[".repeat(200_000))), Some(3));
        // Not so deep, but many of them.
        let many = format!("x := {}1{}\n", "[".repeat(12), "]".repeat(12)).repeat(20);
        assert_eq!(too_deep(&many), Some(5));
    }

    #[test]
    fn brackets_of_strings_and_comments_do_not_count() {
        let deep = "[".repeat(30);
        for quiet in [format!("\"{deep}\""), format!("\"\\\"{deep}\""), format!("`\\{deep}`")] {
            assert_eq!(too_deep(&format!("x := {quiet} # {deep}\ny := 1")), None, "{quiet}");
        }
        // Nor do they close others.
        for closing in ["\"]\", ", "`]`, ", "# ]\n", "\"\\\"]\", "] {
            assert!(too_deep(&format!("[{closing}").repeat(22)).is_some(), "{closing}");
        }
    }
}

//! Text from outside, made fit for a log that people read in a terminal.
#![forbid(unsafe_code)]

use std::fmt::Write as _;

/// Escapes what a terminal or a log reader could take for more than text, and cuts where the result
/// would grow past `limit` characters (then with `…`).
///
/// Kept: printable ASCII but the backslash (so that the escape is unambiguous), and letters and
/// digits of scripts that run from left to right. Everything else becomes `\u{..}`: control
/// characters (line ends and ANSI sequences among them), what is invisible, and what changes the
/// direction of the text around it.
#[must_use]
pub fn escape(text: &str, limit: usize) -> String {
    escape_also(text, limit, |_| false)
}

/// As [`escape`]; `also` names further characters to escape.
pub(super) fn escape_also(text: &str, limit: usize, also: impl Fn(char) -> bool) -> String {
    let mut out = String::with_capacity(text.len().min(limit));
    let mut used = 0;
    for character in text.chars() {
        let plain = !also(character) && is_plain(character);
        let width = if plain { 1 } else { character.escape_unicode().len() };
        if used + width > limit {
            out.push('…');
            break;
        }
        used += width;
        if plain {
            out.push(character);
        } else {
            let _ = write!(out, "{}", character.escape_unicode());
        }
    }
    out
}

fn is_plain(character: char) -> bool {
    if character.is_ascii() {
        matches!(character, ' '..='~') && character != '\\'
    } else {
        character.is_alphanumeric() && !runs_from_right(character)
    }
}

/// The blocks that Unicode sets aside for scripts written from right to left.
fn runs_from_right(character: char) -> bool {
    matches!(u32::from(character),
        0x0590..=0x08ff | 0xfb1d..=0xfdff | 0xfe70..=0xfeff | 0x1_0800..=0x1_0fff | 0x1_e800..=0x1_efff)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_a_terminal_would_obey_is_spelled_out() {
        assert_eq!(escape("a\n\u{1b}[31mb", 99), "a\\u{a}\\u{1b}[31mb");
        assert_eq!(escape("x\u{202e}y\u{200b}", 99), "x\\u{202e}y\\u{200b}");
        assert_eq!(escape("a\\u{a}", 99), "a\\u{5c}u{a}");
        assert_eq!(escape("\u{5d0}\u{2028}\u{feff}", 99), "\\u{5d0}\\u{2028}\\u{feff}");
        assert_eq!(escape("größe", 99), "größe");
    }

    #[test]
    fn the_cut_is_between_characters() {
        assert_eq!(escape("ééé", 2), "éé…");
        assert_eq!(escape("éé", 2), "éé");
        assert_eq!(escape("a\nb", 4), "a…");
    }

    proptest! {
        #[test]
        fn never_longer_and_never_more_than_text(text in any::<String>(), limit in 0usize..300) {
            let escaped = escape(&text, limit);
            prop_assert!(escaped.chars().count() <= limit + 1);
            prop_assert!(!escaped.contains(|c: char| c.is_control()));
        }
    }
}

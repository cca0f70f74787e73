//! `policy.rego` beside `policy.yaml`: recognised by its digest, or refused.
//!
//! The rules of the recognised texts are what the native engine does. Any other text may say
//! something else, and a rule that is not obeyed is worse than one that is refused.
#![forbid(unsafe_code)]

use sha2::{Digest, Sha256};

use super::problem::{Problem, Source};

/// SHA-256 in hexadecimal of the exact bytes, and what they are.
const RECOGNISED: &[(&str, &str)] = &[(
    "c482cef539722bde9f485deec3e2a6a4ab5035a6e0cbc4ec623a62181c15b2dd",
    "examples/policy.rego of Ringfence",
)];

/// Whether the text is one that the native engine stands for; says which.
pub(super) fn recognise(source: &Source<'_>) -> Result<&'static str, Problem> {
    let digest = hex(&Sha256::digest(source.bytes));
    RECOGNISED.iter().find(|(known, _)| *known == digest).map(|(_, what)| *what).ok_or_else(|| {
        Problem {
            file: source.name.to_owned(),
            line: None,
            column: None,
            what: format!("not a policy.rego that this version recognises (sha256 {digest})"),
            fix: Some(
                "remove it, or use examples/policy.rego: the native engine decides by policy.yaml \
                 alone"
                    .into(),
            ),
        }
    })
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut out, byte| {
        let _ = write!(out, "{byte:02x}");
        out
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const OURS: &[u8] = include_bytes!("../../examples/policy.rego");

    #[test]
    fn ours_is_recognised() {
        recognise(&Source { name: "policy.rego", bytes: OURS }).expect("ours");
    }

    #[test]
    fn one_byte_more_is_another_text() {
        let bytes = [OURS, b"\n"].concat();
        for bytes in [&bytes[..], b"", b"package openshell.sandbox\n"] {
            let problem = recognise(&Source { name: "x.rego", bytes }).expect_err("unknown");
            assert!(problem.to_string().starts_with("x.rego: "), "{problem}");
            assert!(problem.fix.is_some());
        }
    }
}

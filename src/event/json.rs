//! An event as OCSF's JSON, on one line of printable ASCII.
#![forbid(unsafe_code)]

use std::io::{self, Write};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Serialize, Serializer};
use serde_json::ser::Formatter;

use super::shorthand::{ACTIVITY, ADVICE, FIELD, REASON, SUBJECT};
use super::{Action, Class, Event, Severity};

/// The version of OCSF whose numbers these are.
const OCSF: &str = "1.7.0";
/// OCSF's "other": what happened is in `activity_name`.
const OTHER: u8 = 99;

#[derive(Serialize)]
struct Record<'a> {
    /// Milliseconds since 1970.
    time: u64,
    class_uid: u16,
    class_name: &'static str,
    category_uid: u16,
    activity_id: u8,
    activity_name: &'a str,
    type_uid: u32,
    severity_id: u8,
    severity: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    action_id: Option<u8>,
    #[serde(skip_serializing_if = "Option::is_none")]
    action: Option<&'static str>,
    message: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    status_detail: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    remediation: Option<Remediation<'a>>,
    unmapped: Fields<'a>,
    metadata: Metadata,
}

#[derive(Serialize)]
struct Remediation<'a> {
    desc: &'a str,
}

#[derive(Serialize)]
struct Metadata {
    version: &'static str,
    product: Product,
}

#[derive(Serialize)]
struct Product {
    name: &'static str,
    version: &'static str,
}

/// What OCSF has no name for.
struct Fields<'a>(&'a [(&'static str, String)]);

impl Serialize for Fields<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(name, value)| (name, cut(value, FIELD))))
    }
}

impl Event {
    /// The event as one line without its end. Texts are as long as in the shorthand.
    pub(super) fn json(&self, now: SystemTime) -> String {
        let (class_uid, class_name) = self.class.ocsf();
        let (severity_id, severity) = self.severity.ocsf();
        let (action_id, action) = match self.action {
            Some(Action::Allowed) => (Some(1), Some("Allowed")),
            Some(Action::Denied) => (Some(2), Some("Denied")),
            None => (None, None),
        };
        let since = now.duration_since(UNIX_EPOCH).unwrap_or_default();
        let record = Record {
            time: u64::try_from(since.as_millis()).unwrap_or(u64::MAX),
            class_uid,
            class_name,
            category_uid: class_uid / 1000,
            activity_id: OTHER,
            activity_name: cut(&self.activity, ACTIVITY),
            type_uid: u32::from(class_uid) * 100 + u32::from(OTHER),
            severity_id,
            severity,
            action_id,
            action,
            message: cut(&self.subject, SUBJECT),
            status_detail: self.reason.as_deref().map(|reason| cut(reason, REASON)),
            remediation: self.advice.as_deref().map(|text| Remediation { desc: cut(text, ADVICE) }),
            unmapped: Fields(&self.fields),
            metadata: Metadata {
                version: OCSF,
                product: Product { name: "Ringfence", version: env!("CARGO_PKG_VERSION") },
            },
        };
        let mut line = Vec::with_capacity(512);
        let mut serializer = serde_json::Serializer::with_formatter(&mut line, Ascii);
        // Writing to memory does not fail, and no key is anything but a string.
        let _ = record.serialize(&mut serializer);
        String::from_utf8(line).unwrap_or_default()
    }
}

/// The first `limit` characters.
fn cut(text: &str, limit: usize) -> &str {
    text.char_indices().nth(limit).map_or(text, |(end, _)| &text[..end])
}

/// Compact JSON whose strings have nothing but printable ASCII: everything else is `\uXXXX`, so a
/// terminal shows it and obeys none of it, and a program that parses it gets the text back.
struct Ascii;

impl Formatter for Ascii {
    fn write_string_fragment<W: ?Sized + Write>(
        &mut self,
        writer: &mut W,
        fragment: &str,
    ) -> io::Result<()> {
        let plain = |character: &char| matches!(character, ' '..='~');
        let mut rest = fragment;
        loop {
            // Each plain character is one byte.
            let (text, after) = rest.split_at(rest.chars().take_while(plain).count());
            writer.write_all(text.as_bytes())?;
            let Some(strange) = after.chars().next() else {
                return Ok(());
            };
            for unit in strange.encode_utf16(&mut [0; 2]) {
                write!(writer, "\\u{unit:04x}")?;
            }
            rest = &after[strange.len_utf8()..];
        }
    }
}

impl Class {
    fn ocsf(self) -> (u16, &'static str) {
        match self {
            Self::Net => (4001, "Network Activity"),
            Self::Http => (4002, "HTTP Activity"),
            Self::Proc => (1007, "Process Activity"),
            Self::Finding => (2004, "Detection Finding"),
            Self::Config => (5019, "Device Config State Change"),
            Self::Lifecycle => (6002, "Application Lifecycle"),
        }
    }
}

impl Severity {
    fn ocsf(self) -> (u8, &'static str) {
        match self {
            Self::Info => (1, "Informational"),
            Self::Low => (2, "Low"),
            Self::Medium => (3, "Medium"),
            Self::High => (4, "High"),
            Self::Critical => (5, "Critical"),
            Self::Fatal => (6, "Fatal"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    fn read(event: &Event) -> Value {
        serde_json::from_str(&event.json(UNIX_EPOCH + Duration::from_millis(1_007))).unwrap()
    }

    #[test]
    fn a_denial_has_ocsfs_fields() {
        let event = Event::new(Class::Net, "OPEN", Severity::Medium)
            .denied()
            .subject("/usr/bin/curl(7) -> h:443")
            .field("policy", "-")
            .field("engine", "l4")
            .reason("no policy")
            .advice("a: 1\nb: 2");
        assert_eq!(
            read(&event),
            json!({
                "time": 1007,
                "class_uid": 4001,
                "class_name": "Network Activity",
                "category_uid": 4,
                "activity_id": 99,
                "activity_name": "OPEN",
                "type_uid": 400_199,
                "severity_id": 3,
                "severity": "Medium",
                "action_id": 2,
                "action": "Denied",
                "message": "/usr/bin/curl(7) -> h:443",
                "status_detail": "no policy",
                "remediation": {"desc": "a: 1\nb: 2"},
                "unmapped": {"policy": "-", "engine": "l4"},
                "metadata": {
                    "version": "1.7.0",
                    "product": {"name": "Ringfence", "version": env!("CARGO_PKG_VERSION")},
                },
            })
        );
        let plain = read(&Event::new(Class::Lifecycle, "START", Severity::Info));
        assert!(plain.get("action").is_none() && plain.get("status_detail").is_none(), "{plain}");
    }

    proptest! {
        #[test]
        fn hostile_text_is_printable_ascii_and_comes_back(
            subject in any::<String>(),
            value in any::<String>(),
            reason in any::<String>(),
        ) {
            let event = Event::new(Class::Http, subject.clone(), Severity::Low)
                .subject(subject.as_str())
                .field("f", &value)
                .reason(reason.as_str())
                .advice(value.as_str());
            let line = event.json(SystemTime::now());
            prop_assert!(line.bytes().all(|byte| matches!(byte, b' '..=b'~')), "{}", line);
            let read: Value = serde_json::from_str(&line).unwrap();
            prop_assert_eq!(read["message"].as_str(), Some(cut(&subject, SUBJECT)));
            prop_assert_eq!(read["unmapped"]["f"].as_str(), Some(cut(&value, FIELD)));
            prop_assert_eq!(read["status_detail"].as_str(), Some(cut(&reason, REASON)));
        }
    }

    #[test]
    fn what_a_terminal_would_obey_is_spelled_out() {
        let event = Event::new(Class::Net, "OPEN", Severity::Low)
            .subject("a\u{1b}[2J\n\u{7f}\u{9b}\u{202e}\u{1f600}\"\\");
        let line = event.json(UNIX_EPOCH);
        let expected = r#""message":"a\u001b[2J\n\u007f\u009b\u202e\ud83d\ude00\"\\""#;
        assert!(line.contains(expected), "{line}");
    }

    #[test]
    fn texts_are_cut() {
        let event = Event::new(Class::Net, "é".repeat(99), Severity::Info)
            .subject("\u{1f600}".repeat(9_999))
            .field("f", "\u{7f}".repeat(9_999))
            .reason("\n".repeat(9_999))
            .advice("\u{202e}".repeat(9_999));
        let read = read(&event);
        let length = |value: &Value| value.as_str().unwrap().chars().count();
        assert_eq!(length(&read["activity_name"]), ACTIVITY);
        assert_eq!(length(&read["message"]), SUBJECT);
        assert_eq!(length(&read["unmapped"]["f"]), FIELD);
        assert_eq!(length(&read["status_detail"]), REASON);
        assert_eq!(length(&read["remediation"]["desc"]), ADVICE);
    }
}

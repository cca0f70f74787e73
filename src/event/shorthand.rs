//! The line that people read.
#![forbid(unsafe_code)]

use std::fmt::Write as _;
use std::time::{SystemTime, UNIX_EPOCH};

use super::escape::{escape, escape_also};
use super::{Action, Class, Event, Severity};

/// Longest texts, in characters after escaping.
pub(super) const ACTIVITY: usize = 32;
pub(super) const SUBJECT: usize = 1_000;
pub(super) const FIELD: usize = 300;
pub(super) const REASON: usize = 200;
pub(super) const ADVICE: usize = 1_500;
/// The longest line in bytes, but for the mark that it was cut.
const LINE: usize = 4_096;

impl Event {
    /// The event on one line of at most about 4 KiB, at the time of now.
    #[must_use]
    pub fn shorthand(&self) -> String {
        self.line(SystemTime::now())
    }

    pub(super) fn line(&self, now: SystemTime) -> String {
        let mut line = format!("{} OCSF {}:", timestamp(now), self.class.word());
        line += &escape(&self.activity, ACTIVITY);
        line += match self.severity {
            Severity::Info => " [INFO]",
            Severity::Low => " [LOW]",
            Severity::Medium => " [MED]",
            Severity::High => " [HIGH]",
            Severity::Critical => " [CRIT]",
            Severity::Fatal => " [FATAL]",
        };
        match self.action {
            Some(Action::Allowed) => line += " ALLOWED",
            Some(Action::Denied) => line += " DENIED",
            None => {}
        }
        if !self.subject.is_empty() {
            line.push(' ');
            // A bracket after a blank would look like a field of ours.
            line += &escape(&self.subject, SUBJECT).replace(" [", " \\u{5b}");
        }
        if !self.fields.is_empty() {
            let fields = self.fields.iter().map(|(name, value)| {
                let escaped = escape_also(value, FIELD, |c| bracket(c) || c == '"');
                // A blank would end the field.
                let quote = if escaped.contains(' ') { "\"" } else { "" };
                format!("{name}:{quote}{escaped}{quote}")
            });
            let _ = write!(line, " [{}]", fields.collect::<Vec<_>>().join(" "));
        }
        if let Some(reason) = &self.reason {
            let _ = write!(line, " [reason:{}]", escape_also(reason, REASON, bracket));
        }
        if let Some(advice) = &self.advice {
            // On lines of their own a reader could mistake the agent's words for an event.
            let lines: Vec<_> = advice.lines().map(|line| escape(line, ADVICE)).collect();
            let advice: String = lines.join(" ⏎ ").chars().take(ADVICE).collect();
            let _ = write!(line, " [to allow: {advice}]");
        }
        if line.len() > LINE {
            line.truncate((0..=LINE).rev().find(|at| line.is_char_boundary(*at)).unwrap_or(0));
            line.push('…');
        }
        line
    }
}

fn bracket(character: char) -> bool {
    matches!(character, '[' | ']')
}

impl Class {
    fn word(self) -> &'static str {
        match self {
            Self::Net => "NET",
            Self::Http => "HTTP",
            Self::Proc => "PROC",
            Self::Finding => "FINDING",
            Self::Config => "CONFIG",
            Self::Lifecycle => "LIFECYCLE",
        }
    }
}

/// RFC 3339 in UTC with milliseconds.
fn timestamp(now: SystemTime) -> String {
    let since = now.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (seconds, millis) = (since.as_secs(), since.subsec_millis());
    let (year, month, day) = date(seconds / 86_400);
    let clock = seconds % 86_400;
    let (hour, minute, second) = (clock / 3_600, clock / 60 % 60, clock % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{millis:03}Z")
}

/// Year, month and day of a day counted from 1970-01-01 in the Gregorian calendar.
fn date(mut day: u64) -> (u64, u64, u64) {
    let leap = |year: u64| {
        year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
    };
    let mut year = 1970;
    while day >= 365 + u64::from(leap(year)) {
        day -= 365 + u64::from(leap(year));
        year += 1;
    }
    let february = 28 + u64::from(leap(year));
    let mut month = 1;
    for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if day < length {
            break;
        }
        day -= length;
        month += 1;
    }
    (year, month, day + 1)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn at(seconds: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_millis(seconds * 1000 + 7)
    }

    #[test]
    fn a_denial_reads_as_openshells() {
        let event = Event::new(Class::Http, "GET", Severity::Medium)
            .denied()
            .subject("GET http://h/p")
            .field("policy", "p")
            .field("engine", "l7")
            .reason("no rule");
        assert_eq!(
            event.line(at(1_778_086_922)),
            "2026-05-06T17:02:02.007Z OCSF HTTP:GET [MED] DENIED GET http://h/p \
             [policy:p engine:l7] [reason:no rule]"
        );
    }

    #[test]
    fn hostile_text_stays_on_its_line() {
        let event = Event::new(Class::Net, "OPEN", Severity::Medium)
            .denied()
            .subject("a\nb\r\u{1b}[2J")
            .field("host", "\u{7}")
            .reason("é".repeat(900))
            .advice("x: 1\ny: \u{202e}2\r");
        let line = event.shorthand();
        assert!(!line.contains(char::is_control), "{line}");
        assert!(line.len() <= LINE + '…'.len_utf8());
    }

    #[test]
    fn no_text_passes_for_a_field() {
        let event = Event::new(Class::Net, "OPEN", Severity::Medium)
            .denied()
            .subject("/bin/x -> [::1]:443 [policy:trusted]")
            .field("host", "h] [policy:trusted")
            .reason("x] [policy:trusted");
        let line = event.line(at(0));
        assert!(!line.contains("[policy:"), "{line}");
        assert!(line.contains("[host:\"h\\u{5d} \\u{5b}policy:trusted\"]"), "{line}");
        assert!(line.contains("-> \\u{5b}::1]:443"), "{line}");
    }

    #[test]
    fn lines_are_bounded() {
        let mut event = Event::new(Class::Net, "\u{1}".repeat(99), Severity::Fatal)
            .subject("😀".repeat(9_999))
            .reason("ß".repeat(9_999))
            .advice("é\n".repeat(9_999));
        for name in ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l"] {
            event = event.field(name, "ü".repeat(9_999));
        }
        let line = event.shorthand();
        assert!(line.len() <= LINE + '…'.len_utf8(), "{}", line.len());
        assert!(line.ends_with('…'));
    }

    #[test]
    fn days_are_the_calendars() {
        for (day, expected) in [
            (0, (1970, 1, 1)),
            (11_016, (2000, 2, 29)),
            (11_017, (2000, 3, 1)),
            (20_781, (2026, 11, 24)),
            (47_540, (2100, 2, 28)),
            (47_541, (2100, 3, 1)),
        ] {
            assert_eq!(date(day), expected, "{day}");
        }
    }
}

//! What happened: one event type in OCSF's classes, its two forms, and where it goes.
//!
//! The shorthand is `OpenShell`'s (format reference, section 8):
//! `2026-05-06T17:02:02.000Z OCSF HTTP:GET [MED] DENIED GET http://h/p [policy:p] [reason:…]`.
//! Everything that came from outside is escaped: a log line is one line, whatever the agent sent.
#![forbid(unsafe_code)]

mod escape;
mod json;
mod shorthand;
mod sink;

use std::borrow::Cow;
use std::fmt;

pub use escape::escape;
pub use sink::{Level, Tap, UnknownLevel, emit, inform, informs, set_level, tap};

/// OCSF's classes, as far as a fence has them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// Network activity (4001).
    Net,
    /// HTTP activity (4002).
    Http,
    /// Process activity (1007).
    Proc,
    /// Detection finding (2004).
    Finding,
    /// Device configuration state change (5019).
    Config,
    /// Application lifecycle (6002).
    Lifecycle,
}

/// OCSF's severities.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// What goes as it should.
    Info,
    /// Worth a look some day.
    Low,
    /// Refused, or less than was asked for.
    Medium,
    /// A protection is missing, or somebody tries.
    High,
    /// A protection failed.
    Critical,
    /// Nothing works any more.
    Fatal,
}

/// What was decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// It went through.
    Allowed,
    /// It did not.
    Denied,
}

/// One event.
#[derive(Debug, Clone)]
pub struct Event {
    class: Class,
    activity: Cow<'static, str>,
    severity: Severity,
    action: Option<Action>,
    subject: String,
    fields: Vec<(&'static str, String)>,
    reason: Option<String>,
    advice: Option<String>,
}

impl Event {
    /// An event of a class; `activity` is OCSF's word for it (`OPEN`, `GET`, `CREATED`).
    pub fn new(class: Class, activity: impl Into<Cow<'static, str>>, severity: Severity) -> Self {
        Self {
            class,
            activity: activity.into(),
            severity,
            action: None,
            subject: String::new(),
            fields: Vec::new(),
            reason: None,
            advice: None,
        }
    }

    /// It went through.
    #[must_use]
    pub fn allowed(mut self) -> Self {
        self.action = Some(Action::Allowed);
        self
    }

    /// It was refused. A denial is always written, whatever the level.
    #[must_use]
    pub fn denied(mut self) -> Self {
        self.action = Some(Action::Denied);
        self
    }

    /// What it is about; may hold what the agent sent.
    #[must_use]
    pub fn subject(mut self, subject: impl Into<String>) -> Self {
        self.subject = subject.into();
        self
    }

    /// A `[name:value]` of the line; the value may hold what the agent sent.
    #[must_use]
    pub fn field(mut self, name: &'static str, value: impl fmt::Display) -> Self {
        self.fields.push((name, value.to_string()));
        self
    }

    /// Why; cut to 200 characters in the shorthand.
    #[must_use]
    pub fn reason(mut self, reason: impl Into<String>) -> Self {
        self.reason = Some(reason.into());
        self
    }

    /// The policy lines that would allow what was refused.
    #[must_use]
    pub fn advice(mut self, lines: impl Into<String>) -> Self {
        self.advice = Some(lines.into());
        self
    }

    /// The event as OCSF's JSON, one line without its end.
    #[must_use]
    pub fn to_json(&self, now: std::time::SystemTime) -> String {
        self.json(now)
    }

    /// Whether it is written at `level`: denials and what is at least [`Severity::Medium`] always.
    #[must_use]
    pub fn passes(&self, level: Level) -> bool {
        self.action == Some(Action::Denied)
            || self.severity >= Severity::Medium
            || level >= if self.severity == Severity::Low { Level::Warn } else { Level::Info }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn denials_cannot_be_hidden() {
        let denial = Event::new(Class::Net, "OPEN", Severity::Info).denied();
        assert!(denial.passes(Level::Error));
        let quiet = Event::new(Class::Net, "OPEN", Severity::Info).allowed();
        assert!(!quiet.passes(Level::Warn) && quiet.passes(Level::Info));
        let finding = Event::new(Class::Finding, "BLOCKED", Severity::High);
        assert!(finding.passes(Level::Error));
    }
}

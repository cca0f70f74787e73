//! When the fence cannot be built, or breaks: one line that says which step and why, where people
//! look: on stderr (`kubectl logs`) and in the termination message (`kubectl describe pod`).

use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;

use crate::event::{self, Class, Event, Severity};

/// The exit code that stands for "no fence, so no agent".
pub const NO_FENCE: u8 = 125;
/// Where Kubernetes reads the termination message by default.
const TERMINATION_LOG: &str = "/dev/termination-log";
/// Kubernetes keeps no more.
const LIMIT: usize = 4_096;

/// Tells of a failure of the supervisor.
pub fn tell(error: &anyhow::Error) {
    let text = one_line(&format!("{error:#}"));
    event::emit(
        &Event::new(Class::Finding, "BLOCKED", Severity::High)
            .denied()
            .subject("the agent does not run")
            .reason(text.clone()),
    );
    eprintln!("ringfence-supervisor: {text}");
    termination_message(&text);
}

/// Tells of a failure of the proxy. The termination message is the supervisor's to write, and
/// stays its own.
pub fn tell_of_proxy(error: &anyhow::Error) {
    eprintln!("ringfence-supervisor proxy: {}", one_line(&format!("{error:#}")));
}

fn termination_message(text: &str) {
    // An existing file only: outside a pod there is none, and none is wanted.
    let log = OpenOptions::new()
        .write(true)
        .truncate(true)
        .custom_flags(rustix::fs::OFlags::NOFOLLOW.bits().cast_signed())
        .open(TERMINATION_LOG);
    if let Ok(mut log) = log {
        drop(log.write_all(format!("ringfence: {text}\n").as_bytes()));
    }
}

/// Control characters escaped, and no longer than a termination message may be.
fn one_line(text: &str) -> String {
    let mut line = String::new();
    for character in text.chars() {
        if line.len() + 16 > LIMIT {
            break;
        }
        match character {
            '\n' => line.push_str("; "),
            character if character.is_control() => line.extend(character.escape_default()),
            character => line.push(character),
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_one_bounded_line() {
        let line = one_line(&format!("a\nb\u{1b}[31m{}", "é".repeat(LIMIT)));
        assert!(line.starts_with("a; b\\u{1b}[31m"));
        assert!(line.len() <= LIMIT && !line.contains('\n'));
    }
}

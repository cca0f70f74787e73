//! The steps of a fenced child, numbered for the report to its parent.

use std::fmt;

/// One step between fork and exec, in the order in which they are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum ChildStep {
    /// Descriptors 0, 1 and 2.
    Descriptors = 1,
    /// A session of its own.
    Session,
    /// The controlling terminal.
    Terminal,
    /// The working directory.
    Workdir,
    /// Resource limits.
    Limits,
    /// A session keyring of its own.
    Keyring,
    /// Emptying the bounding set.
    Bounding,
    /// Clearing the ambient set.
    Ambient,
    /// Locking the securebits.
    Securebits,
    /// Supplementary groups.
    Groups,
    /// The group.
    Gid,
    /// The user.
    Uid,
    /// Giving up every capability.
    Capabilities,
    /// Reading back user, groups and the five capability sets.
    ReadBack,
    /// Trying to become root again, which must fail.
    Regain,
    /// Dying with the parent.
    ParentDeath,
    /// `no_new_privs`.
    NoNewPrivs,
    /// Closing every other descriptor.
    CloseRange,
    /// Installing the connect listener.
    Listener,
    /// Sending the listener to the parent.
    SendListener,
    /// Installing the system call filters.
    Filter,
    /// Telling the parent that all is done.
    Report,
    /// Waiting for the parent's word.
    Wait,
    /// execve.
    Exec,
}

impl ChildStep {
    const ALL: [Self; 24] = [
        Self::Descriptors,
        Self::Session,
        Self::Terminal,
        Self::Workdir,
        Self::Limits,
        Self::Keyring,
        Self::Bounding,
        Self::Ambient,
        Self::Securebits,
        Self::Groups,
        Self::Gid,
        Self::Uid,
        Self::Capabilities,
        Self::ReadBack,
        Self::Regain,
        Self::ParentDeath,
        Self::NoNewPrivs,
        Self::CloseRange,
        Self::Listener,
        Self::SendListener,
        Self::Filter,
        Self::Report,
        Self::Wait,
        Self::Exec,
    ];

    /// The number sent to the parent.
    #[must_use]
    pub fn number(self) -> u8 {
        self as u8
    }

    /// The capability without which the step is refused with EPERM.
    #[must_use]
    pub fn needs(self) -> Option<&'static str> {
        match self {
            Self::Limits => Some("SYS_RESOURCE"),
            Self::Bounding | Self::Securebits => Some("SETPCAP"),
            Self::Groups | Self::Gid => Some("SETGID"),
            Self::Uid => Some("SETUID"),
            _ => None,
        }
    }

    /// The step with this number.
    #[must_use]
    pub fn from_number(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|step| step.number() == number)
    }
}

impl fmt::Display for ChildStep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Descriptors => "standard descriptors",
            Self::Session => "new session",
            Self::Terminal => "controlling terminal",
            Self::Workdir => "working directory",
            Self::Limits => "resource limits",
            Self::Keyring => "session keyring",
            Self::Bounding => "capability bounding set",
            Self::Ambient => "ambient capabilities",
            Self::Securebits => "securebits",
            Self::Groups => "supplementary groups",
            Self::Gid => "group id",
            Self::Uid => "user id",
            Self::Capabilities => "capability sets",
            Self::ReadBack => "credentials read back",
            Self::Regain => "regaining root must fail",
            Self::ParentDeath => "parent death signal",
            Self::NoNewPrivs => "no_new_privs",
            Self::CloseRange => "closing descriptors",
            Self::Listener => "connect listener",
            Self::SendListener => "sending the listener",
            Self::Filter => "system call filter",
            Self::Report => "reporting ready",
            Self::Wait => "waiting for release",
            Self::Exec => "exec",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_distinct_and_come_back() {
        for (index, step) in ChildStep::ALL.into_iter().enumerate() {
            assert_eq!(usize::from(step.number()), index + 1);
            assert_eq!(ChildStep::from_number(step.number()), Some(step));
            assert!(!step.to_string().is_empty());
        }
        assert_eq!(ChildStep::from_number(0), None);
        assert_eq!(ChildStep::from_number(25), None);
    }
}

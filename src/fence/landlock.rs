//! The Landlock domain: which files may be used, and which processes and sockets are outside.
//!
//! Every file right that the running kernel knows is handled, so what no rule grants is refused.
//! Signals and abstract unix sockets are scoped to the domain. TCP is not handled: [`level`] says
//! why, and what each ABI brings.
//!
//! Paths are opened as root, before the drop; symlinks are followed then and never again. The
//! domain belongs to the thread that takes it on and to what it forks.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use landlock::{
    AccessFs, BitFlags, CompatLevel, Compatible, PathBeneath, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetError, RulesetStatus,
};
use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags, openat2};
use rustix::io::Errno;

mod level;
mod links;

use level::{FULL_ABI, Handled, demand, grade, handled, missing, rights};
pub use level::{HARD_REQUIREMENT_ABI, UNIX_SOCKETS_ABI, abi, errata};

/// What a rule grants on a path and all below it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Read files, list directories, execute.
    ReadOnly,
    /// Every right of the running kernel; on anything but a directory those that fit a file.
    ReadWrite,
}

/// One path of the policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PathRule {
    /// The path, absolute.
    pub path: PathBuf,
    /// What is granted.
    pub access: Access,
}

/// How much of the file rules the kernel enforces.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Enforced {
    /// Files, and both scopes: all that the fence builds on (ABI 6, Linux 6.12).
    Full,
    /// File rules hold, with gaps; the text names them.
    Partial(String),
    /// No file rule is enforced; the text says why.
    None(String),
}

/// What was enforced, for the attestation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// ABI of the running kernel, 0 without Landlock.
    pub abi: i32,
    /// Path rules in the domain.
    pub applied: usize,
    /// Paths left out, and why.
    pub skipped: Vec<(PathBuf, String)>,
    /// How much holds.
    pub enforced: Enforced,
    /// Signals and abstract unix sockets are scoped to the domain.
    pub scopes: bool,
    /// Rights that this program knows and the kernel does not, by name. Beyond [`Enforced::Full`]
    /// this is pathname unix sockets, which only their files' permissions guard before Linux 7.1.
    pub missing: Vec<&'static str>,
    /// File rights that are handled, in number.
    pub rights: u32,
    /// Faults of the kernel's Landlock that touch this domain, see [`errata`].
    pub errata: Vec<&'static str>,
}

/// Why a domain could not be made.
#[derive(Debug, thiserror::Error)]
pub enum LandlockError {
    /// A path cannot be opened and every rule is required.
    #[error("landlock path {}: {error}", path.display())]
    Path {
        /// The path.
        path: PathBuf,
        /// What open said, or which link on the way is not trusted.
        error: io::Error,
    },
    /// Hard requirement, and the kernel has too little.
    #[error(
        "landlock: the kernel has ABI {have}, hard_requirement needs {HARD_REQUIREMENT_ABI} \
         (Linux 6.2: before it, files that may only be read can be truncated)"
    )]
    Kernel {
        /// The kernel's ABI, 0 without Landlock.
        have: i32,
    },
    /// Hard requirement without a single path.
    #[error("landlock: hard_requirement with no path: nothing could be executed")]
    NoRules,
    /// The kernel refused the domain.
    #[error("landlock: {0}")]
    Ruleset(#[from] RulesetError),
    /// The kernel took less than it announced.
    #[error("landlock: the kernel enforces the domain {0:?}")]
    NotEnforced(RulesetStatus),
}

/// Opened rules, ready to be enforced by a process forked later.
#[derive(Debug)]
pub struct Prepared {
    hard: bool,
    configured: usize,
    rules: Vec<(OwnedFd, BitFlags<AccessFs>)>,
    skipped: Vec<(PathBuf, String)>,
}

/// Opens the rules' paths with the caller's rights.
///
/// `hard` (`hard_requirement`): a path that cannot be opened, a kernel below
/// [`HARD_REQUIREMENT_ABI`] and an empty list are errors. Otherwise paths that cannot be opened
/// are left out and listed.
pub fn prepare(rules: &[PathRule], hard: bool) -> Result<Prepared, LandlockError> {
    let have = abi();
    demand(have, hard)?;
    if hard && rules.is_empty() {
        return Err(LandlockError::NoRules);
    }
    let mut prepared =
        Prepared { hard, configured: rules.len(), rules: Vec::new(), skipped: Vec::new() };
    for rule in rules {
        match open(&rule.path) {
            Ok((fd, is_directory)) => {
                prepared.rules.push((fd, rights(rule.access, is_directory, have)));
            }
            Err(error) if hard => {
                return Err(LandlockError::Path { path: rule.path.clone(), error });
            }
            Err(error) => prepared.skipped.push((rule.path.clone(), error.to_string())),
        }
    }
    Ok(prepared)
}

/// Opens a rule's path. Links are followed only where root alone can have made them: an agent of
/// an earlier or another fence may write below some of the paths, and would otherwise choose
/// what the next fence opens to it.
fn open(path: &Path) -> io::Result<(OwnedFd, bool)> {
    let path = links::follow(path)?;
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let fd = openat2(CWD, &path, flags, Mode::empty(), ResolveFlags::NO_SYMLINKS)?;
    let mode = rustix::fs::fstat(&fd)?.st_mode;
    Ok((fd, FileType::from_raw_mode(mode) == FileType::Directory))
}

impl Prepared {
    /// Paths left out, and why.
    #[must_use]
    pub fn skipped(&self) -> &[(PathBuf, String)] {
        &self.skipped
    }

    /// Takes on the domain, for this thread and all that it forks, and sets `no_new_privs`.
    /// Nothing can be mounted afterwards. Allocates: not for the time between fork and exec of a
    /// process with threads.
    pub fn enforce(self) -> Result<Report, LandlockError> {
        let abi = abi();
        demand(abi, self.hard)?;
        let applied = self.rules.len();
        let enforced = if abi == 0 {
            super::credentials::no_new_privs().map_err(no_new_privs_failed)?;
            Enforced::None("the kernel has no Landlock, or it is switched off".to_owned())
        } else if applied == 0 {
            // The domain would refuse the agent's own program. Left are the scopes.
            restrict(Vec::new(), false, abi)?;
            Enforced::None(if self.configured == 0 {
                "the policy names no path".to_owned()
            } else {
                "no path of the policy can be opened".to_owned()
            })
        } else {
            restrict(self.rules, true, abi)?;
            grade(abi)
        };
        let files = applied > 0;
        Ok(report(abi, applied, files, self.skipped, enforced))
    }
}

/// Takes on the proxy's domain: the named files may be read, nothing else may be opened, changed,
/// executed or signalled. A file that is missing is an error. Sets `no_new_privs`.
pub fn proxy_domain<P: AsRef<Path>>(read: &[P]) -> Result<Report, LandlockError> {
    let abi = abi();
    let mut rules = Vec::new();
    for path in read {
        let path = path.as_ref();
        let (fd, is_directory) =
            open(path).map_err(|error| LandlockError::Path { path: path.into(), error })?;
        let rights = rights(Access::ReadOnly, is_directory, abi) & !AccessFs::Execute;
        rules.push((fd, rights));
    }
    let applied = rules.len();
    let enforced = if abi == 0 {
        super::credentials::no_new_privs().map_err(no_new_privs_failed)?;
        Enforced::None("the kernel has no Landlock, or it is switched off".to_owned())
    } else {
        restrict(rules, true, abi)?;
        grade(abi)
    };
    Ok(report(abi, applied, true, Vec::new(), enforced))
}

fn report(
    abi: i32,
    applied: usize,
    files: bool,
    skipped: Vec<(PathBuf, String)>,
    enforced: Enforced,
) -> Report {
    Report {
        abi,
        applied,
        skipped,
        enforced,
        scopes: abi >= FULL_ABI,
        missing: missing(abi),
        rights: if files { handled(abi).files.bits().count_ones() } else { 0 },
        errata: errata(abi),
    }
}

fn no_new_privs_failed(error: Errno) -> LandlockError {
    LandlockError::Path { path: "/proc/self".into(), error: error.into() }
}

/// The running ABI decides what is asked for, so the kernel must take all of it.
fn restrict(
    rules: Vec<(OwnedFd, BitFlags<AccessFs>)>,
    files: bool,
    abi: i32,
) -> Result<(), LandlockError> {
    let Handled { files: rights, scopes } = handled(abi);
    if !files && scopes.is_empty() {
        return super::credentials::no_new_privs().map_err(no_new_privs_failed);
    }
    let mut ruleset = Ruleset::default().set_compatibility(CompatLevel::HardRequirement);
    if files {
        ruleset = ruleset.handle_access(rights)?;
    }
    if !scopes.is_empty() {
        ruleset = ruleset.scope(scopes)?;
    }
    let mut created = ruleset.create()?;
    for (fd, rights) in rules {
        created = created.add_rule(PathBeneath::new(fd, rights))?;
    }
    match created.restrict_self()?.ruleset {
        RulesetStatus::FullyEnforced => Ok(()),
        less => Err(LandlockError::NotEnforced(less)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(path: &str, access: Access) -> PathRule {
        PathRule { path: path.into(), access }
    }

    #[test]
    fn missing_paths_are_listed_or_refused() {
        let rules = [rule("/proc", Access::ReadOnly), rule("/no/such/path", Access::ReadWrite)];
        let prepared = prepare(&rules, false).unwrap();
        assert_eq!(prepared.rules.len(), 1);
        assert_eq!(prepared.skipped().len(), 1);
        assert_eq!(prepared.skipped()[0].0, PathBuf::from("/no/such/path"));
        if abi() >= HARD_REQUIREMENT_ABI {
            let error = prepare(&rules, true).unwrap_err();
            assert!(error.to_string().starts_with("landlock path /no/such/path: "));
            assert!(matches!(prepare(&[], true), Err(LandlockError::NoRules)));
        } else {
            assert!(matches!(prepare(&rules, true), Err(LandlockError::Kernel { .. })));
        }
    }

    #[test]
    fn symlinks_are_followed_when_opened() {
        let directory = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/dev/null", directory.path().join("link")).unwrap();
        let (_, is_directory) = open(&directory.path().join("link")).unwrap();
        assert!(!is_directory);
        assert!(open(directory.path()).unwrap().1);
    }
}

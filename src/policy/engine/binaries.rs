//! Who a network policy is for: executables by path.
#![forbid(unsafe_code)]

use std::collections::HashSet;

use crate::policy::decision::Caller;
use crate::policy::digest::{Sha256, to_hex};
use crate::policy::document::Tainted;
use crate::policy::glob::PathGlob;
use crate::policy::suggestion::printable;

/// A network policy's name and who it is for.
#[derive(Debug, Clone)]
pub(super) struct Named {
    pub key: String,
    /// Everyone: `path: "/**"`.
    pub anyone: bool,
    /// What the caller's own executable may be.
    own: Binaries,
    /// What one of its ancestors may be instead: the entries with `ancestors: true`, also in `own`.
    ancestors: Binaries,
    /// Entries that ask more of the caller than its path; not in `own`.
    guarded: Vec<Guarded>,
    /// Entries with `tainted`: whether the caller is must be looked at.
    watched: Binaries,
}

/// What an entry asks beside the path.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Asks {
    pub ancestors: bool,
    pub sha256: Option<Sha256>,
    pub tainted: Option<Tainted>,
}

#[derive(Debug, Clone)]
struct Guarded {
    glob: PathGlob,
    sha256: Option<Sha256>,
    refuse_tainted: bool,
}

#[derive(Debug, Clone, Default)]
struct Binaries {
    exact: HashSet<String>,
    globs: Vec<PathGlob>,
}

impl Named {
    /// A policy that is for nobody yet.
    pub fn new(key: &str) -> Self {
        Self {
            key: key.into(),
            anyone: false,
            own: Binaries::default(),
            ancestors: Binaries::default(),
            guarded: Vec::new(),
            watched: Binaries::default(),
        }
    }

    /// Adds an entry; with `ancestors`, for all that runs below it too.
    pub fn add(&mut self, glob: PathGlob, asks: Asks) {
        if asks.tainted.is_some() {
            self.watched.add(glob.clone());
        }
        let refuse_tainted = asks.tainted == Some(Tainted::Refuse);
        if asks.sha256.is_some() || refuse_tainted {
            self.guarded.push(Guarded { glob, sha256: asks.sha256, refuse_tainted });
            return;
        }
        match glob {
            PathGlob::Any => self.anyone = true,
            PathGlob::Under(prefix) if prefix == "/" => self.anyone = true,
            glob => {
                if asks.ancestors {
                    self.ancestors.add(glob.clone());
                }
                self.own.add(glob);
            }
        }
    }

    /// Adds what symlinks point to.
    pub fn resolve(&mut self, resolve: impl Fn(&str) -> Option<String>) {
        self.own.resolve(&resolve);
        self.ancestors.resolve(&resolve);
        self.watched.resolve(&resolve);
        let resolved = |guarded: &Guarded| match &guarded.glob {
            PathGlob::Literal(path) => {
                let path = resolve(path).filter(|path| path.starts_with('/'))?;
                Some(Guarded { glob: PathGlob::Literal(path), ..guarded.clone() })
            }
            _ => None,
        };
        let targets: Vec<_> = self.guarded.iter().filter_map(resolved).collect();
        self.guarded.extend(targets);
    }

    /// An ancestor proves nothing by default: a program forks, and the parent then executes the
    /// binary that is listed.
    pub fn admits(&self, caller: &Caller) -> bool {
        self.anyone
            || self.own.have(&caller.exe)
            || caller.ancestors.iter().any(|path| self.ancestors.have(path))
            || self.guarded.iter().any(|guarded| guarded.judge(caller) == Judged::Content)
    }

    /// Why entries for the caller's path refuse it: none of them is content with it.
    pub fn refuses(&self, caller: &Caller) -> Option<String> {
        self.guarded.iter().find_map(|guarded| match guarded.judge(caller) {
            Judged::Refused(why) => Some(why),
            Judged::Content | Judged::Another => None,
        })
    }

    /// Whether an entry for this executable names a digest.
    pub fn pins(&self, exe: &str) -> bool {
        self.guarded.iter().any(|guarded| guarded.sha256.is_some() && guarded.glob.matches(exe))
    }

    /// Whether an entry for this executable asks that it runs no other code.
    pub fn watches(&self, exe: &str) -> bool {
        self.watched.have(exe)
    }

    /// Whether any entry does.
    pub fn watches_any(&self) -> bool {
        !self.watched.exact.is_empty() || !self.watched.globs.is_empty()
    }

    /// Whether an executable would be admitted if it were the caller.
    pub fn lists(&self, path: &str) -> bool {
        self.anyone
            || self.own.have(path)
            || self.guarded.iter().any(|guarded| guarded.glob.matches(path))
    }
}

/// What an entry that asks more than a path says of a caller.
#[derive(Debug, PartialEq, Eq)]
enum Judged {
    /// The entry is for another path.
    Another,
    Content,
    Refused(String),
}

impl Guarded {
    fn judge(&self, caller: &Caller) -> Judged {
        if !self.glob.matches(&caller.exe) {
            return Judged::Another;
        }
        if let Some(pinned) = &self.sha256
            && caller.sha256.as_ref() != Some(pinned)
        {
            return Judged::Refused(match &caller.sha256 {
                Some(own) => format!(
                    "the policy pins this binary to another SHA-256; its own is {}",
                    to_hex(own)
                ),
                None => "the policy pins this binary to a SHA-256, and its own is not known".into(),
            });
        }
        match &caller.tainted {
            Some(why) if self.refuse_tainted => Judged::Refused(format!(
                "the policy refuses this binary while it runs other code: {}",
                printable(why)
            )),
            _ => Judged::Content,
        }
    }
}

impl Binaries {
    fn add(&mut self, glob: PathGlob) {
        match glob {
            PathGlob::Literal(path) => {
                self.exact.insert(path);
            }
            glob => self.globs.push(glob),
        }
    }

    fn have(&self, path: &str) -> bool {
        self.exact.contains(path) || self.globs.iter().any(|glob| glob.matches(path))
    }

    fn resolve(&mut self, resolve: impl Fn(&str) -> Option<String>) {
        let targets: Vec<_> = self.exact.iter().filter_map(|path| resolve(path)).collect();
        self.exact.extend(targets.into_iter().filter(|path| path.starts_with('/')));
    }
}

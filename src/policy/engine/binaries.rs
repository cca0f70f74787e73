//! Who a network policy is for: executables by path.
#![forbid(unsafe_code)]

use std::collections::HashSet;

use crate::policy::decision::Caller;
use crate::policy::glob::PathGlob;

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
        }
    }

    /// Adds an entry; with `ancestors`, for all that runs below it too.
    pub fn add(&mut self, glob: PathGlob, ancestors: bool) {
        match glob {
            PathGlob::Any => self.anyone = true,
            PathGlob::Under(prefix) if prefix == "/" => self.anyone = true,
            glob => {
                if ancestors {
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
    }

    /// An ancestor proves nothing by default: a program forks, and the parent then executes the
    /// binary that is listed.
    pub fn admits(&self, caller: &Caller) -> bool {
        self.anyone
            || self.own.have(&caller.exe)
            || caller.ancestors.iter().any(|path| self.ancestors.have(path))
    }

    /// Whether an executable would be admitted if it were the caller.
    pub fn lists(&self, path: &str) -> bool {
        self.anyone || self.own.have(path)
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

//! Where the binaries that a policy names lead to: the kernel reports an executable by its real path.
//!
//! At start all links are followed: nothing of the agent's has run yet. Later the agent may have
//! made some, and a policy that names one of them would let in what it points to. From then on only
//! such links are followed as nobody but root could have made: each directory on the way is root's,
//! and nobody else may write to it. What a path led to at start stays.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

/// Write permission of the group and of others.
const OTHERS_WRITE: u32 = 0o022;

/// The most links on the way to one binary, as for the kernel.
const MOST: usize = 40;

/// What was found at start.
#[derive(Debug, Default)]
pub struct Links {
    first: BTreeMap<String, Option<String>>,
}

impl Links {
    /// Before the agent runs: follows all links. `ask` is given what resolves a path.
    pub fn first<T>(ask: impl FnOnce(&dyn Fn(&str) -> Option<String>) -> T) -> (T, Self) {
        let found = RefCell::new(BTreeMap::new());
        let asked = ask(&|path| {
            let to = fs::canonicalize(path).ok().and_then(text);
            found.borrow_mut().insert(path.to_owned(), to.clone());
            to
        });
        (asked, Self { first: found.into_inner() })
    }

    /// What was found at start, but for paths that lead nowhere.
    #[must_use]
    pub fn found(&self) -> BTreeMap<String, String> {
        let some = |(path, to): (&String, &Option<String>)| Some((path.clone(), to.clone()?));
        self.first.iter().filter_map(some).collect()
    }

    /// While the agent runs. Returns what was found, too.
    pub fn later<T>(
        &self,
        ask: impl FnOnce(&dyn Fn(&str) -> Option<String>) -> T,
    ) -> (T, BTreeMap<String, String>) {
        let found = RefCell::new(BTreeMap::new());
        let asked = ask(&|path| {
            let to = match self.first.get(path) {
                Some(first) => first.clone(),
                None => settled(Path::new(path)).and_then(text),
            }?;
            found.borrow_mut().insert(path.to_owned(), to.clone());
            Some(to)
        });
        (asked, found.into_inner())
    }
}

fn text(path: PathBuf) -> Option<String> {
    path.into_os_string().into_string().ok()
}

/// The real path, where only root could have made any part of the way to it.
fn settled(path: &Path) -> Option<PathBuf> {
    let mut left = parts(path);
    let mut real = PathBuf::from("/");
    let mut links = 0;
    while let Some(part) = left.pop() {
        let dir = fs::metadata(&real).ok()?;
        if !dir.is_dir() || dir.uid() != 0 || dir.mode() & OTHERS_WRITE != 0 {
            return None;
        }
        if part == ".." {
            real.pop();
            continue;
        }
        let next = real.join(&part);
        if !fs::symlink_metadata(&next).ok()?.is_symlink() {
            real = next;
            continue;
        }
        links += 1;
        if links > MOST {
            return None;
        }
        let to = fs::read_link(&next).ok()?;
        if to.is_absolute() {
            real = PathBuf::from("/");
        }
        left.extend(parts(&to));
    }
    Some(real)
}

/// The last one first.
fn parts(path: &Path) -> Vec<OsString> {
    let parts = path.components().filter_map(|part| match part {
        Component::Normal(part) => Some(part.to_owned()),
        Component::ParentDir => Some("..".into()),
        _ => None,
    });
    let mut parts: Vec<_> = parts.collect();
    parts.reverse();
    parts
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, chown, symlink};

    #[test]
    fn links_that_the_agent_could_have_made_lead_nowhere() {
        if !rustix::process::geteuid().is_root() {
            println!("SKIPPED: needs root");
            return;
        }
        // /tmp is everybody's: a directory of root's own beside it.
        let dir = tempfile::tempdir_in("/root").unwrap();
        let path = |name: &str| dir.path().join(name);
        fs::write(path("tool"), "").unwrap();
        fs::create_dir(path("agents")).unwrap();
        symlink("tool", path("link")).unwrap();
        symlink(path("link"), path("chain")).unwrap();
        symlink(path("tool"), path("agents/link")).unwrap();
        symlink("agents/../link", path("through")).unwrap();
        symlink("loop", path("loop")).unwrap();
        let tool = fs::canonicalize(path("tool")).unwrap();
        for name in ["tool", "link", "chain", "agents/link", "through"] {
            assert_eq!(settled(&path(name)).as_deref(), Some(&*tool), "{name}");
        }
        assert_eq!(settled(&path("loop")), None);
        assert_eq!(settled(&path("none")), None);
        // Known since the start, when nobody else had been there.
        let first = path("agents/link").display().to_string();
        let (_, links) = Links::first(|resolve| resolve(&first));
        for spoil in [&|| chown(path("agents"), Some(1000), None).unwrap() as (), &|| {
            chown(path("agents"), Some(0), None).unwrap();
            fs::set_permissions(path("agents"), fs::Permissions::from_mode(0o1777)).unwrap();
        }] as [&dyn Fn(); 2]
        {
            spoil();
            assert_eq!(settled(&path("agents/link")), None);
            assert_eq!(settled(&path("through")), None);
            assert_eq!(settled(&path("link")).as_deref(), Some(&*tool));
        }
        let (again, found) = links.later(|resolve| resolve(&first));
        assert_eq!(again.as_deref(), tool.to_str());
        assert_eq!(found.get(&first), again.as_ref());
        let second = path("through").display().to_string();
        assert_eq!(links.later(|resolve| resolve(&second)).0, None);
    }

    #[test]
    fn the_machines_own_links_are_followed() {
        let expected = fs::canonicalize("/bin/sh").unwrap();
        assert_eq!(settled(Path::new("/bin/sh")), Some(expected));
    }
}

//! Symbolic links on the way of a rule's path.

use std::fs::Metadata;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

/// As the kernel's own limit (`path_resolution(7)`).
const MAX_LINKS: usize = 40;
const STICKY: u32 = 0o1000;
const OTHERS_WRITE: u32 = 0o022;

/// The path without links. Each link on the way must be root's, in a directory where nobody else
/// can put another in its place.
pub(super) fn follow(path: &Path) -> io::Result<PathBuf> {
    let mut path = path.to_owned();
    'again: for _ in 0..=MAX_LINKS {
        let mut at = PathBuf::new();
        let mut components = path.components();
        while let Some(component) = components.next() {
            if component == Component::ParentDir {
                at.pop();
                continue;
            }
            let parent = at.clone();
            at.push(component);
            let meta = at.symlink_metadata()?;
            if !meta.is_symlink() {
                continue;
            }
            trusted(&at, &meta, &parent.metadata()?)?;
            path = parent.join(at.read_link()?).join(components.as_path());
            continue 'again;
        }
        return Ok(at);
    }
    Err(io::Error::from_raw_os_error(rustix::io::Errno::LOOP.raw_os_error()))
}

fn trusted(link: &Path, meta: &Metadata, parent: &Metadata) -> io::Result<()> {
    let kept =
        parent.uid() == 0 && (parent.mode() & OTHERS_WRITE == 0 || parent.mode() & STICKY != 0);
    if meta.uid() == 0 && kept {
        return Ok(());
    }
    Err(io::Error::new(
        io::ErrorKind::PermissionDenied,
        format!("{} is a symbolic link that others than root can make", link.display()),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{lchown, symlink};

    #[test]
    fn links_of_the_image_are_followed() {
        // Debian's /bin and /lib are links into /usr; elsewhere they are directories.
        for path in ["/bin/sh", "/lib", "/proc/self", "/usr/../etc"] {
            assert_eq!(follow(Path::new(path)).unwrap(), Path::new(path).canonicalize().unwrap());
        }
        assert_eq!(follow(Path::new("/no/such")).unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn a_link_that_another_could_have_made_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let link = dir.path().join("link");
        symlink("/etc", &link).unwrap();
        if lchown(&link, Some(1000), Some(1000)).is_err() {
            println!("SKIPPED: needs root");
            return;
        }
        let error = follow(&link.join("passwd")).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
        assert!(error.to_string().contains("symbolic link"), "{error}");
    }

    #[test]
    fn links_in_a_circle_end() {
        let dir = tempfile::tempdir().unwrap();
        symlink("b", dir.path().join("a")).unwrap();
        symlink("a", dir.path().join("b")).unwrap();
        assert!(follow(&dir.path().join("a")).is_err());
    }
}

//! `install DIR` and `copy-self DEST`: this program copies itself, for clusters without image
//! volumes.

use std::fs;
use std::io;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// The file's name in DIR.
pub const NAME: &str = "ringfence-supervisor";

/// Copies the running executable to `DIR/ringfence-supervisor`, mode 0755, and returns its path.
///
/// Written beside and renamed over, so that a restart of the init container never leaves half a
/// program where a container is about to start it.
pub fn install(dir: &Path) -> Result<PathBuf> {
    copy(dir.join(NAME)).with_context(|| {
        format!("cannot install to {}: is it a directory that this user may write?", dir.display())
    })
}

/// Copies the running executable to `dest`, mode 0755, as OpenShell's verb of this name does:
/// missing directories are made, and a directory that exists gets the program under the name that
/// it runs by. Returns the copy's path.
pub fn copy_self(dest: &Path) -> Result<PathBuf> {
    let target = if dest.is_dir() {
        let exe = std::env::current_exe().context("cannot see our own path")?;
        dest.join(exe.file_name().unwrap_or(NAME.as_ref()))
    } else {
        if let Some(parent) = dest.parent() {
            fs::create_dir_all(parent)
                .with_context(|| format!("cannot make {}", parent.display()))?;
        }
        dest.to_owned()
    };
    copy(target).with_context(|| format!("cannot copy to {}", dest.display()))
}

fn copy(target: PathBuf) -> io::Result<PathBuf> {
    let mut name = std::ffi::OsString::from(".");
    name.push(target.file_name().ok_or(io::ErrorKind::InvalidInput)?);
    name.push(format!(".{}", std::process::id()));
    let temporary = target.with_file_name(name);
    let write = || -> io::Result<()> {
        let mut from = fs::File::open("/proc/self/exe")?;
        let mut to = fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o755)
            .custom_flags(rustix::fs::OFlags::NOFOLLOW.bits().cast_signed())
            .open(&temporary)?;
        io::copy(&mut from, &mut to)?;
        // The umask may have taken bits away from others; the agent's container runs it as root
        // without DAC rights in some settings.
        to.set_permissions(fs::Permissions::from_mode(0o755))?;
        to.sync_all()?;
        fs::rename(&temporary, &target)
    };
    write().inspect_err(|_| drop(fs::remove_file(&temporary)))?;
    Ok(target)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_copy_is_the_program_and_executable() {
        let dir = tempfile::tempdir().unwrap();
        let path = install(dir.path()).unwrap();
        assert_eq!(fs::read(&path).unwrap(), fs::read("/proc/self/exe").unwrap());
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o755);
        install(dir.path()).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn copy_self_makes_directories_and_takes_one_that_exists() {
        let dir = tempfile::tempdir().unwrap();
        let path = copy_self(&dir.path().join("a/b/openshell-sandbox")).unwrap();
        assert!(path.ends_with("a/b/openshell-sandbox"));
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o755);
        let exe = std::env::current_exe().unwrap();
        let path = copy_self(dir.path()).unwrap();
        assert_eq!(path.file_name(), exe.file_name());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
        let error = copy_self(&path.join("below/a/file")).unwrap_err();
        assert!(format!("{error:#}").contains("cannot make"), "{error:#}");
    }

    #[test]
    fn a_missing_directory_is_named() {
        let error = install(Path::new("/does/not/exist")).unwrap_err();
        assert!(format!("{error:#}").contains("/does/not/exist"));
    }
}

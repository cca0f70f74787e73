//! `install DIR`: this program copies itself, for clusters without image volumes.

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
    let target = dir.join(NAME);
    let temporary = dir.join(format!(".{NAME}.{}", std::process::id()));
    let copy = || -> io::Result<()> {
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
    copy().inspect_err(|_| drop(fs::remove_file(&temporary))).with_context(|| {
        format!("cannot install to {}: is it a directory that this user may write?", dir.display())
    })?;
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
    fn a_missing_directory_is_named() {
        let error = install(Path::new("/does/not/exist")).unwrap_err();
        assert!(format!("{error:#}").contains("/does/not/exist"));
    }
}

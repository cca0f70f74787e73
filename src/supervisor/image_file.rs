//! Reading files of the image, which may be anything: a pipe that nobody writes to, a device that
//! never ends, a link to either.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::{FileType, Mode, OFlags};

/// The most that is read of one, in bytes. Trust stores have 200 KiB.
const LIMIT: u64 = 16 << 20;

/// Opens a regular file. Anything else is an error, at once.
pub fn open(path: impl AsRef<Path>) -> io::Result<File> {
    // Looked at before it is opened for reading: to open a device can be to use it.
    let found = rustix::fs::open(path.as_ref(), OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    let mode = rustix::fs::fstat(&found)?.st_mode;
    if FileType::from_raw_mode(mode) != FileType::RegularFile {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    // What was looked at, whatever is at the path now. A file of /proc that blocks does not.
    let found = format!("/proc/self/fd/{}", found.as_raw_fd());
    File::options().read(true).custom_flags(OFlags::NONBLOCK.bits().cast_signed()).open(found)
}

/// Reads a regular file of at most 16 MiB; a longer one is an error.
pub fn read(path: impl AsRef<Path>) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    open(path)?.take(LIMIT + 1).read_to_end(&mut bytes)?;
    bounded(bytes.len() as u64)?;
    Ok(bytes)
}

/// An error for what is longer than is read of a file of the image.
pub fn bounded(length: u64) -> io::Result<()> {
    if length > LIMIT {
        let what = format!("longer than {} MiB", LIMIT >> 20);
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, what));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn what_never_ends_or_never_begins_is_no_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        rustix::fs::mkfifoat(rustix::fs::CWD, path("pipe"), 0o644.into()).unwrap();
        symlink("/dev/zero", path("endless")).unwrap();
        symlink(path("pipe"), path("link")).unwrap();
        for name in ["pipe", "endless", "link", "."] {
            assert!(read(path(name)).is_err(), "{name}");
        }
        File::create(path("sparse")).unwrap().set_len(1 << 40).unwrap();
        assert_eq!(read(path("sparse")).unwrap_err().kind(), io::ErrorKind::FileTooLarge);
        std::fs::write(path("text"), "text").unwrap();
        assert_eq!(read(path("text")).unwrap(), b"text");
        assert_eq!(read(path("none")).unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}

//! The image's trust store: what upstreams are verified against, and what the agent's programs find
//! beside the sandbox CA. It is only opened here; what is in it the proxy reads.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::unix::fs::MetadataExt;

use super::image_file;

/// Where images keep their trust store; the first that exists counts (openssl's and Go's lists).
const PLACES: [&str; 5] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/cert.pem",
    "/etc/ssl/ca-bundle.pem",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
];

/// The image's trust store; `None` where there is none. The proxy reads it at the start, and again
/// when the first upstream is verified: a file that others than root could change meanwhile is
/// copied.
pub fn open() -> io::Result<Option<File>> {
    PLACES.iter().find_map(|path| image_file::open(path).ok()).map(settled).transpose()
}

fn settled(mut file: File) -> io::Result<File> {
    const OTHERS_WRITE: u32 = 0o022;
    let meta = file.metadata()?;
    image_file::bounded(meta.len())?;
    if meta.uid() == 0 && meta.mode() & OTHERS_WRITE == 0 {
        return Ok(file);
    }
    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    let mut copy = File::from(rustix::fs::memfd_create("ringfence-trust-store", flags)?);
    image_file::bounded(io::copy(&mut (&mut file).take(meta.len()), &mut copy)?)?;
    copy.rewind()?;
    Ok(copy)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_store_that_others_could_change_is_copied_at_once() {
        use std::io::{Read, Write};
        use std::os::unix::fs::PermissionsExt;
        let mut original = tempfile::NamedTempFile::new().unwrap();
        original.write_all(b"then").unwrap();
        let everybodys = std::fs::Permissions::from_mode(0o666);
        std::fs::set_permissions(original.path(), everybodys).unwrap();
        let mut file = settled(File::open(original.path()).unwrap()).unwrap();
        std::fs::write(original.path(), b"later").unwrap();
        let mut text = String::new();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "then");
    }
}

//! The files by which the agent's programs trust the fence, below the run directory's `tls/`. The
//! certificates come from the proxy; here are the settings of programs that have no variable for a
//! bundle.

use std::ffi::OsStr;
use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::Result;

use super::run_dir::RunDir;

/// Where they are.
#[derive(Debug)]
pub struct AgentFiles {
    /// The sandbox CA alone, PEM.
    pub ca: PathBuf,
    /// The sandbox CA with what upstreams are verified against, PEM.
    pub bundle: PathBuf,
    /// The same for Java.
    pub java: PathBuf,
    /// For wget, which reads no variable for a bundle where it is built with `GnuTLS`.
    pub wgetrc: PathBuf,
    /// For apt, whose methods read none either.
    pub apt: PathBuf,
}

impl AgentFiles {
    /// Names them; `dir` is a [`RunDir::tls`].
    #[must_use]
    pub fn new(dir: &Path) -> Self {
        Self {
            ca: dir.join("ca.pem"),
            bundle: dir.join("ca-bundle.pem"),
            java: dir.join("java.jks"),
            wgetrc: dir.join("wgetrc"),
            apt: dir.join("apt.conf"),
        }
    }

    /// Makes the files that the proxy writes certificates into.
    pub fn make(&self, dir: &RunDir) -> Result<[File; 2]> {
        Ok([dir.make(&self.bundle, 0o644)?, dir.make(&self.java, 0o644)?])
    }

    /// Writes the settings. `apt` is the container's own `APT_CONFIG`, which ours takes along.
    pub fn write_settings(&self, dir: &RunDir, apt: Option<&OsStr>) -> Result<()> {
        let bundle = self.bundle.display();
        dir.write(&self.wgetrc, 0o644, format!("ca_certificate = {bundle}\n").as_bytes())?;
        let own = apt.map(apt_include).unwrap_or_default();
        dir.write(
            &self.apt,
            0o644,
            format!("{own}Acquire::https::CaInfo \"{bundle}\";\n").as_bytes(),
        )
    }
}

/// The line by which apt reads another file, as the agent. A file that is not there would be an
/// error, where `APT_CONFIG` may name what it likes.
fn apt_include(path: &OsStr) -> String {
    let plain = |c: u8| c.is_ascii_alphanumeric() || b"/._-+".contains(&c);
    match path.to_str() {
        Some(path) if path.bytes().all(plain) && Path::new(path).is_file() => {
            format!("#include \"{path}\";\n")
        }
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn apt_takes_along_what_the_image_has_and_nothing_else() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let own = file.path();
        assert_eq!(apt_include(own.as_os_str()), format!("#include \"{}\";\n", own.display()));
        for other in ["/no/such", "", "/tmp", "/etc/passwd\";Foo \"bar", "/etc/pass wd"] {
            assert_eq!(apt_include(OsStr::new(other)), "", "{other}");
        }
    }
}

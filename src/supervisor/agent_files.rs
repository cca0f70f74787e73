//! The files by which the agent's programs trust the fence, below the run directory's `tls/`. The
//! certificates come from the proxy; here are the settings of programs that have no variable for a
//! bundle, and whether Java's are needed at once.

use std::ffi::OsStr;
use std::fs::{self, File};
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

/// Whether the image has a Java that may run soon: the ways in which images of it tell.
#[must_use]
pub fn has_java(command: &[String], home: Option<&OsStr>, path: Option<&OsStr>) -> bool {
    let is_java = |word: &String| Path::new(word).file_name() == Some(OsStr::new("java"));
    home.is_some_and(|home| !home.is_empty())
        || command.first().is_some_and(is_java)
        || fs::exists("/usr/lib/jvm").unwrap_or(true)
        || path.is_some_and(|path| {
            std::env::split_paths(path).any(|dir| fs::exists(dir.join("java")).unwrap_or(true))
        })
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

    #[test]
    fn a_java_is_known_by_its_home_its_path_or_the_command() {
        let dir = tempfile::tempdir().unwrap();
        let path = std::env::join_paths([Path::new("/no/such"), dir.path()]).unwrap();
        let nowhere = fs::exists("/usr/lib/jvm").unwrap();
        assert_eq!(has_java(&["sh".into()], None, Some(&path)), nowhere);
        assert!(has_java(&["sh".into()], Some(OsStr::new("/opt/java")), Some(&path)));
        assert!(has_java(&["/jre/bin/java".into()], None, None));
        File::create(dir.path().join("java")).unwrap();
        assert!(has_java(&["sh".into()], None, Some(&path)));
    }
}

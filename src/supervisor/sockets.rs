//! Unix sockets in volumes: a way out of the fence that a network namespace does not close.
//!
//! A socket with a path is reached through the file system. One in a volume (a runtime's, another
//! container's) leads out of the fence, and before Landlock ABI 9 no file rule stops connect(2) to
//! it; only its own mode does. So they are looked for, below the policy's paths, at start: listed
//! in the attestation, or a reason not to start (`process.unix_sockets: refuse`). One that is made
//! later is not seen.
//!
//! What is looked at may be an earlier agent's: no link is followed, no mount crossed, nothing but
//! names and kinds is read, and both depth and number are bounded.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags, openat2, statat};
use serde::Serialize;

use crate::fence::landlock::{self, PathRule};
use crate::policy::UnixSockets;

/// How far a look goes.
#[derive(Debug, Clone, Copy)]
struct Bounds {
    /// Levels of directories below where it starts.
    depth: usize,
    /// Entries of all directories below one start together. Not of all volumes: who fills one must
    /// not hide what lies in the next.
    entries: usize,
}

impl Bounds {
    /// For a list: where sockets usually lie; at most some 2 ms a volume.
    const LIST: Self = Self { depth: 3, entries: 2_048 };
    /// For a refusal, which must have seen everything.
    const REFUSE: Self = Self { depth: 32, entries: 262_144 };
}

/// The most sockets of one volume that are named.
const MAX_FOUND: usize = 16;

/// What was found.
#[derive(Debug, Default, PartialEq, Eq, Serialize)]
pub struct Sockets {
    /// Sockets in volumes that the agent reaches, at most 16 of each.
    pub found: Vec<PathBuf>,
    /// Why some volumes were not seen whole; `None`: they were.
    pub unseen: Option<String>,
}

/// File systems of the kernel's own, where nobody binds a socket.
const KERNELS: [&str; 14] = [
    "autofs",
    "binfmt_misc",
    "bpf",
    "cgroup",
    "cgroup2",
    "configfs",
    "debugfs",
    "devpts",
    "mqueue",
    "proc",
    "pstore",
    "securityfs",
    "sysfs",
    "tracefs",
];

/// What the policy wants of sockets in volumes, done: `None` where the kernel itself refuses to
/// connect to them.
///
/// # Errors
/// `process.unix_sockets` is `refuse`, and there is one, or not all volumes could be seen.
pub fn check(rules: &[PathRule], wanted: UnixSockets) -> Result<Option<Sockets>> {
    if landlock::abi() >= landlock::UNIX_SOCKETS_ABI {
        return Ok(None);
    }
    let bounds = match wanted {
        UnixSockets::Report => Bounds::LIST,
        UnixSockets::Refuse => Bounds::REFUSE,
    };
    let sockets = look(rules, bounds).context("cannot look for unix sockets in volumes")?;
    if wanted == UnixSockets::Refuse {
        const WHY: &str = "process.unix_sockets: refuse: before Linux 7.1 the kernel cannot keep \
                           the agent from a unix socket in a volume";
        if let Some(socket) = sockets.found.first() {
            bail!("{WHY}, and there is {}", socket.display());
        }
        if let Some(unseen) = &sockets.unseen {
            bail!("{WHY}, and it could not be seen that there is none: {unseen}");
        }
    }
    Ok(Some(sockets))
}

/// Looks through the volumes (mounts beside the root) that the rules reach.
fn look(rules: &[PathRule], bounds: Bounds) -> io::Result<Sockets> {
    let mounts = points(&fs::read("/proc/self/mountinfo")?, true);
    // Mount points are real paths; a rule may go through links of the image (/var/run).
    let real = |rule: &PathRule| fs::canonicalize(&rule.path).ok();
    let paths: Vec<_> = rules.iter().filter_map(real).collect();
    let mut sockets = Sockets::default();
    sockets.look_through(&starts(&mounts, &paths), bounds);
    Ok(sockets)
}

/// Mount points, without the root; where `volumes`, without the kernel's own file systems.
pub(super) fn points(mountinfo: &[u8], volumes: bool) -> Vec<PathBuf> {
    let mount = |line: &[u8]| {
        let mut fields = line.split(|byte| *byte == b' ');
        let point = unescape(fields.nth(4)?);
        // Optional fields end with a dash, then comes the type.
        let kind = fields.skip_while(|field| *field != b"-").nth(1)?;
        let kernels = volumes && KERNELS.iter().any(|name| name.as_bytes() == kind);
        (!kernels && point != Path::new("/")).then_some(point)
    };
    mountinfo.split(|byte| *byte == b'\n').filter_map(mount).collect()
}

/// proc(5): space, tab, newline and backslash are written in octal.
fn unescape(field: &[u8]) -> PathBuf {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    let octal = |digits: &[u8]| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok();
    while let [first, tail @ ..] = rest {
        let written = tail.get(..3).filter(|_| *first == b'\\').and_then(octal);
        out.push(written.unwrap_or(*first));
        rest = if written.is_some() { &tail[3..] } else { tail };
    }
    PathBuf::from(OsStr::from_bytes(&out))
}

/// Where to begin: a volume that lies whole below a rule, or the part of it that rules name.
fn starts(mounts: &[PathBuf], paths: &[PathBuf]) -> Vec<PathBuf> {
    let mut starts = Vec::new();
    for mount in mounts {
        if paths.iter().any(|path| mount.starts_with(path)) {
            starts.push(mount.clone());
        } else {
            starts.extend(paths.iter().filter(|path| path.starts_with(mount)).cloned());
        }
    }
    starts.sort();
    starts.dedup();
    starts
}

impl Sockets {
    fn look_through(&mut self, starts: &[PathBuf], bounds: Bounds) {
        for start in starts {
            let mut one = Self::default();
            one.look_at(start, bounds.depth, &mut { bounds.entries });
            self.take(one);
        }
    }

    /// Adds what was found in one volume.
    fn take(&mut self, one: Self) {
        self.found.extend(one.found);
        let both = self.unseen.take().into_iter().chain(one.unseen).collect::<Vec<_>>();
        self.unseen = (!both.is_empty()).then(|| both.join("; "));
    }

    fn look_at(&mut self, start: &Path, depth: usize, left: &mut usize) {
        let kind = match fs::symlink_metadata(start) {
            Ok(meta) => meta.file_type(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return,
            Err(error) => return self.miss(start, &error),
        };
        if kind.is_socket() {
            self.add(start.to_owned());
        } else if kind.is_dir() {
            match open(CWD, start.as_os_str()) {
                Ok(dir) => self.walk(&dir, start, depth, left),
                Err(error) => self.miss(start, &error),
            }
        }
    }

    fn walk(&mut self, dir: &OwnedFd, at: &Path, depth: usize, left: &mut usize) {
        let entries = match Dir::read_from(dir) {
            Ok(entries) => entries,
            Err(error) => return self.miss(at, &error),
        };
        for entry in entries {
            let Ok(entry) = entry else {
                return self.miss(at, &"it cannot be read to its end");
            };
            let name = OsStr::from_bytes(entry.file_name().to_bytes());
            if name == "." || name == ".." {
                continue;
            }
            let Some(fewer) = left.checked_sub(1) else {
                return self.miss(at, &"there are too many files");
            };
            *left = fewer;
            let kind = match entry.file_type() {
                // Some file systems do not say.
                FileType::Unknown => statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)
                    .map_or(FileType::Unknown, |stat| FileType::from_raw_mode(stat.st_mode)),
                kind => kind,
            };
            let path = at.join(name);
            match kind {
                FileType::Socket => self.add(path),
                FileType::Directory if depth == 0 => self.miss(&path, &"it lies too deep"),
                FileType::Directory => match open(dir, name) {
                    Ok(below) => self.walk(&below, &path, depth - 1, left),
                    // Another mount, which is looked at by itself; or gone.
                    Err(rustix::io::Errno::XDEV | rustix::io::Errno::NOENT) => {}
                    Err(error) => self.miss(&path, &error),
                },
                _ => {}
            }
        }
    }

    fn add(&mut self, path: PathBuf) {
        if self.found.len() < MAX_FOUND {
            self.found.push(path);
        } else {
            self.miss(&path, &format_args!("there are more than {MAX_FOUND} sockets"));
        }
    }

    fn miss(&mut self, path: &Path, why: &dyn std::fmt::Display) {
        self.unseen.get_or_insert_with(|| format!("{}: {why}", path.display()));
    }
}

fn open(dir: impl AsFd, name: &OsStr) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut resolve = ResolveFlags::NO_SYMLINKS;
    // From the root the way to a volume leads over mounts; inside it none is crossed.
    if !Path::new(name).is_absolute() {
        resolve |= ResolveFlags::NO_XDEV;
    }
    openat2(dir, name, flags, Mode::empty(), resolve)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fence::landlock::Access;
    use std::os::unix::net::UnixListener;

    fn rule(path: &str) -> PathRule {
        PathRule { path: path.into(), access: Access::ReadOnly }
    }

    #[test]
    fn mountinfo_as_the_kernel_writes_it() {
        let text = b"22 1 8:1 / / rw shared:1 - ext4 /dev/sda1 rw\n\
            23 22 0:5 / /proc rw - proc proc rw\n\
            24 22 0:6 / /work\\040space rw,nosuid shared:2 master:1 - tmpfs tmpfs rw\n\
            25 22 8:1 /var/run/docker.sock /run/docker.sock ro - ext4 /dev/sda1 rw\n\
            26 22 0:7 / /sys/fs/cgroup ro - cgroup2 cgroup rw\n\
            broken line\n";
        let volumes = [Path::new("/work space"), Path::new("/run/docker.sock")];
        assert_eq!(points(text, true), volumes);
        assert_eq!(points(text, false).len(), 4);
        assert_eq!(unescape(b"/a\\134b\\"), Path::new("/a\\b\\"));
    }

    #[test]
    fn only_what_rules_reach_is_looked_at() {
        let mounts = ["/work", "/data", "/run/docker.sock", "/other"].map(PathBuf::from);
        let rules = ["/work", "/data/in", "/data/out", "/run", "/etc"].map(PathBuf::from);
        let want = ["/data/in", "/data/out", "/run/docker.sock", "/work"].map(PathBuf::from);
        assert_eq!(starts(&mounts, &rules), want);
    }

    fn walk(start: &Path, bounds: Bounds) -> Sockets {
        let (mut sockets, mut left) = (Sockets::default(), bounds.entries);
        sockets.look_at(start, bounds.depth, &mut left);
        sockets.found.sort();
        sockets
    }

    #[test]
    fn sockets_are_found_and_links_are_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let outside = tempfile::tempdir().unwrap();
        let _outside = UnixListener::bind(outside.path().join("outside")).unwrap();
        fs::create_dir_all(dir.path().join("a/b")).unwrap();
        fs::write(dir.path().join("a/file"), "").unwrap();
        let (one, two) = (dir.path().join("one"), dir.path().join("a/b/two"));
        let _sockets = [&one, &two].map(|path| UnixListener::bind(path).unwrap());
        std::os::unix::fs::symlink(outside.path(), dir.path().join("a/link")).unwrap();
        std::os::unix::fs::symlink(&one, dir.path().join("a/link-to-one")).unwrap();
        let all = Bounds { depth: 2, entries: 100 };
        let found = walk(dir.path(), all);
        assert_eq!(found, Sockets { found: vec![two.clone(), one.clone()], unseen: None });
        // A mount may be the socket itself.
        assert_eq!(walk(&one, all).found, [one.as_path()]);
        assert_eq!(walk(&dir.path().join("a/link"), all), Sockets::default());
        assert_eq!(walk(Path::new("/no/such/volume"), all), Sockets::default());
    }

    #[test]
    fn bounds_are_kept_and_told() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("a/b")).unwrap();
        let _socket = UnixListener::bind(dir.path().join("a/b/deep")).unwrap();
        let shallow = walk(dir.path(), Bounds { depth: 1, entries: 100 });
        assert!(shallow.found.is_empty());
        assert!(shallow.unseen.unwrap().contains("too deep"));
        for name in 0..10 {
            fs::write(dir.path().join(name.to_string()), "").unwrap();
        }
        let few = walk(dir.path(), Bounds { depth: 9, entries: 3 });
        assert!(few.unseen.unwrap().contains("too many"));
    }

    #[test]
    fn a_full_volume_does_not_hide_what_lies_in_the_next() {
        let [full, next] = [(); 2].map(|()| tempfile::tempdir().unwrap());
        let bounds = Bounds { depth: 2, entries: 100 };
        for name in 0..=bounds.entries {
            fs::write(full.path().join(name.to_string()), "").unwrap();
        }
        let many = tempfile::tempdir().unwrap();
        let _many: Vec<_> = (0..=MAX_FOUND)
            .map(|name| UnixListener::bind(many.path().join(name.to_string())).unwrap())
            .collect();
        let socket = next.path().join("socket");
        let _socket = UnixListener::bind(&socket).unwrap();
        let mut sockets = Sockets::default();
        let starts = [&full, &many, &next].map(|dir| dir.path().to_owned());
        sockets.look_through(&starts, bounds);
        assert_eq!(sockets.found.last(), Some(&socket));
        assert_eq!(sockets.found.len(), MAX_FOUND + 1);
        let unseen = sockets.unseen.unwrap();
        for (dir, why) in [(&full, "too many files"), (&many, "more than 16 sockets")] {
            let named = unseen.split("; ").find(|part| part.contains(why)).expect(why);
            assert!(named.starts_with(dir.path().to_str().unwrap()), "{named}");
        }
    }

    #[test]
    fn this_machines_mounts_can_be_read() {
        let sockets = look(&[rule("/proc"), rule("/no/such")], Bounds::LIST).unwrap();
        assert_eq!(sockets, Sockets::default());
    }
}

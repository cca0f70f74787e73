//! What the kernel says about a process, read from outside.
//!
//! Credentials, Landlock, `no_new_privs` and filters belong to a thread, so a process with several
//! is verified thread by thread ([`threads`]). Its own word counts for nothing.

use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;

use rustix::process::Pid;

use super::credentials::Identity;

/// The parts of `/proc/PID/status` that the fence rests on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// Thread group id: the process.
    pub tgid: i32,
    /// Parent process, 0 outside this PID namespace.
    pub ppid: i32,
    /// Real, effective, saved and file system user id.
    pub uid: [u32; 4],
    /// The same for the group.
    pub gid: [u32; 4],
    /// Supplementary groups, ascending.
    pub groups: Vec<u32>,
    /// Inheritable, permitted, effective, bounding, ambient set.
    pub capabilities: [u64; 5],
    /// `no_new_privs`.
    pub no_new_privs: bool,
    /// 0 none, 1 strict, 2 filter.
    pub seccomp: u32,
    /// Installed filters; `None` before Linux 5.10, which does not say.
    pub seccomp_filters: Option<u32>,
}

/// The names of [`Status::capabilities`], in its order.
pub const CAPABILITY_SETS: [&str; 5] = ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"];

/// A field that is not as required.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field} is {have}, must be {want}")]
pub struct Mismatch {
    /// The field's name in `/proc/PID/status`.
    pub field: &'static str,
    /// What the fence requires.
    pub want: String,
    /// What the kernel reports.
    pub have: String,
}

/// Reads a file of /proc, most often at once: it says its length is 0, and reading it in small
/// pieces takes many calls. A process with 65,536 groups has the longest.
fn read_whole(path: &str) -> io::Result<String> {
    const LONGEST: u64 = 1 << 20;
    let mut bytes = Vec::with_capacity(8192);
    fs::File::open(path)?.take(LONGEST).read_to_end(&mut bytes)?;
    String::from_utf8(bytes).map_err(io::Error::other)
}

impl Status {
    /// Reads a process, or one of its threads.
    pub fn read(pid: Pid, tid: Option<Pid>) -> io::Result<Self> {
        let pid = pid.as_raw_nonzero();
        let path = match tid {
            None => format!("/proc/{pid}/status"),
            Some(tid) => format!("/proc/{pid}/task/{}/status", tid.as_raw_nonzero()),
        };
        let text = read_whole(&path)?;
        Self::parse(&text).ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidData, format!("{path}: a field is missing"))
        })
    }

    fn parse(text: &str) -> Option<Self> {
        let field = |name: &str| {
            text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim)
        };
        let four = |name: &str| {
            let mut ids = field(name)?.split_ascii_whitespace().map(str::parse);
            let mut next = || ids.next()?.ok();
            Some([next()?, next()?, next()?, next()?])
        };
        let mut capabilities = [0; 5];
        for (set, name) in capabilities.iter_mut().zip(CAPABILITY_SETS) {
            *set = u64::from_str_radix(field(name)?, 16).ok()?;
        }
        let mut groups = field("Groups")?
            .split_ascii_whitespace()
            .map(|group| group.parse().ok())
            .collect::<Option<Vec<u32>>>()?;
        groups.sort_unstable();
        Some(Self {
            tgid: field("Tgid")?.parse().ok()?,
            ppid: field("PPid")?.parse().ok()?,
            uid: four("Uid")?,
            gid: four("Gid")?,
            groups,
            capabilities,
            no_new_privs: field("NoNewPrivs")? == "1",
            seccomp: field("Seccomp")?.parse().ok()?,
            seccomp_filters: match field("Seccomp_filters") {
                None => None,
                Some(number) => Some(number.parse().ok()?),
            },
        })
    }

    /// Whether this is a fenced process: the identity and no other, five empty capability sets,
    /// `no_new_privs`, filter mode with at least so many filters.
    pub fn verify_fenced(&self, identity: &Identity, filters: u32) -> Result<(), Mismatch> {
        self.verify(identity, filters, true)
    }

    /// As [`Status::verify_fenced`], where the bounding set could not be emptied for want of
    /// `CAP_SETPCAP`: the other four sets must be.
    pub fn verify_fenced_but_bounding(
        &self,
        identity: &Identity,
        filters: u32,
    ) -> Result<(), Mismatch> {
        self.verify(identity, filters, false)
    }

    fn verify(&self, identity: &Identity, filters: u32, bounding: bool) -> Result<(), Mismatch> {
        for (name, set) in CAPABILITY_SETS.into_iter().zip(self.capabilities) {
            if name != "CapBnd" || bounding {
                require(name, set == 0, || ("0".to_owned(), format!("{set:x}")))?;
            }
        }
        for (name, have, want) in [("Uid", self.uid, identity.uid), ("Gid", self.gid, identity.gid)]
        {
            require(name, have == [want; 4], || (want.to_string(), format!("{have:?}")))?;
        }
        let mut groups = identity.groups.clone();
        groups.sort_unstable();
        require("Groups", self.groups == groups, || {
            (format!("{groups:?}"), format!("{:?}", self.groups))
        })?;
        require("NoNewPrivs", self.no_new_privs, || ("1".to_owned(), "0".to_owned()))?;
        require("Seccomp", self.seccomp == 2, || ("2".to_owned(), self.seccomp.to_string()))?;
        let have = self.seccomp_filters;
        require("Seccomp_filters", have.is_none_or(|have| have >= filters), || {
            (format!("at least {filters}"), have.unwrap_or(0).to_string())
        })
    }
}

fn require(
    field: &'static str,
    holds: bool,
    values: impl FnOnce() -> (String, String),
) -> Result<(), Mismatch> {
    if holds {
        return Ok(());
    }
    let (want, have) = values();
    Err(Mismatch { field, want, have })
}

/// The threads of a process at this moment, the first thread among them.
pub fn threads(pid: Pid) -> io::Result<Vec<Pid>> {
    let mut threads = Vec::new();
    for entry in fs::read_dir(format!("/proc/{}/task", pid.as_raw_nonzero()))? {
        let tid = entry?.file_name().to_str().and_then(|name| name.parse().ok());
        threads.extend(tid.and_then(Pid::from_raw));
    }
    Ok(threads)
}

/// Start time in clock ticks since boot. With the pid it names a process for good: pids come back.
pub fn start_time(pid: Pid) -> io::Result<u64> {
    let text = fs::read(format!("/proc/{}/stat", pid.as_raw_nonzero()))?;
    parse_start_time(&text).ok_or_else(|| {
        io::Error::new(io::ErrorKind::InvalidData, "/proc/PID/stat has no start time")
    })
}

/// The 22nd field. The second is the program's name in parentheses, which the process chooses and
/// which may hold spaces, parentheses and newlines: count from the last parenthesis.
fn parse_start_time(stat: &[u8]) -> Option<u64> {
    let end_of_name = stat.iter().rposition(|byte| *byte == b')')?;
    let rest = std::str::from_utf8(stat.get(end_of_name + 1..)?).ok()?;
    rest.split_ascii_whitespace().nth(22 - 3)?.parse().ok()
}

/// Device and inode of the network namespace. Needs ptrace access to the process.
pub fn net_namespace(pid: Pid) -> io::Result<(u64, u64)> {
    let data = fs::metadata(format!("/proc/{}/ns/net", pid.as_raw_nonzero()))?;
    Ok((data.dev(), data.ino()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const FENCED: &str = "Name:\tsh\nUmask:\t0022\nState:\tS (sleeping)\nTgid:\t42\nNgid:\t0\n\
        Pid:\t43\nPPid:\t7\nTracerPid:\t0\nUid:\t1000\t1000\t1000\t1000\n\
        Gid:\t1001\t1001\t1001\t1001\nFDSize:\t64\nGroups:\t2000 10 \nNStgid:\t42\n\
        CapInh:\t0000000000000000\nCapPrm:\t0000000000000000\nCapEff:\t0000000000000000\n\
        CapBnd:\t0000000000000000\nCapAmb:\t0000000000000000\nNoNewPrivs:\t1\nSeccomp:\t2\n\
        Seccomp_filters:\t2\n";

    fn identity() -> Identity {
        Identity { uid: 1000, gid: 1001, groups: vec![2000, 10] }
    }

    #[test]
    fn reads_what_the_kernel_writes() {
        let status = Status::parse(FENCED).unwrap();
        assert_eq!((status.tgid, status.ppid), (42, 7));
        assert_eq!(status.groups, [10, 2000]);
        assert_eq!(status.verify_fenced(&identity(), 2), Ok(()));
        let own = Status::read(rustix::process::getpid(), None).unwrap();
        assert_eq!(own.tgid, rustix::process::getpid().as_raw_nonzero().get());
        assert!(Status::parse("Name:\tsh\n").is_none());
    }

    #[test]
    fn each_field_is_verified() {
        for (field, from, to) in [
            ("CapInh", "CapInh:\t0000000000000000", "CapInh:\t0000000000000001"),
            ("CapPrm", "CapPrm:\t0000000000000000", "CapPrm:\t0000000000000002"),
            ("CapEff", "CapEff:\t0000000000000000", "CapEff:\t0000010000000000"),
            ("CapBnd", "CapBnd:\t0000000000000000", "CapBnd:\t0000000000000080"),
            ("CapAmb", "CapAmb:\t0000000000000000", "CapAmb:\t0000000000000008"),
            ("Uid", "Uid:\t1000\t1000\t1000", "Uid:\t1000\t1000\t0"),
            ("Gid", "Gid:\t1001\t1001", "Gid:\t1001\t0"),
            ("Groups", "2000 10", "0 10 2000"),
            ("NoNewPrivs", "NoNewPrivs:\t1", "NoNewPrivs:\t0"),
            ("Seccomp", "Seccomp:\t2", "Seccomp:\t0"),
            ("Seccomp_filters", "Seccomp_filters:\t2", "Seccomp_filters:\t1"),
        ] {
            let status = Status::parse(&FENCED.replace(from, to)).unwrap();
            assert_eq!(status.verify_fenced(&identity(), 2).unwrap_err().field, field);
        }
        let bounding = Status::parse(&FENCED.replace("CapBnd:\t0", "CapBnd:\t8")).unwrap();
        assert_eq!(bounding.verify_fenced_but_bounding(&identity(), 2), Ok(()));
    }

    #[test]
    fn old_kernels_do_not_count_filters() {
        let text = FENCED.replace("Seccomp_filters:\t2\n", "");
        let status = Status::parse(&text).unwrap();
        assert_eq!(status.seccomp_filters, None);
        assert_eq!(status.verify_fenced(&identity(), 2), Ok(()));
    }

    #[test]
    fn a_name_cannot_move_the_start_time() {
        let stat = b"1 (a) 1 2) (x) S 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 7777 23 24";
        assert_eq!(parse_start_time(stat), Some(7777));
        assert_eq!(parse_start_time(b"1 (a"), None);
        assert!(start_time(rustix::process::getpid()).unwrap() > 0);
    }

    #[test]
    fn own_threads_and_namespace() {
        let own = rustix::process::getpid();
        assert!(threads(own).unwrap().contains(&own));
        assert!(net_namespace(own).unwrap().1 > 0);
    }
}

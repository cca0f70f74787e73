//! Files: what the policy does not open, devices, the supervisor's own.

use std::fs;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use super::Attempt::{Do, Open};
use super::Layer::{Credentials, Hygiene, Kernel, Landlock};
use super::Need::Landlock as Abi;
use super::{Context, EACCES, EPERM, Expect, HOLDS, Row, Seen, raw};

/// Before Landlock is asked, a read-only file system may refuse.
const NO_WRITE: &[Expect] = &[Expect::Errno(libc::EACCES), Expect::Errno(libc::EROFS)];
const fn read(id: &'static str, what: &'static str, path: &'static str) -> Row {
    Row::new(id, Landlock, EACCES, what, Open(path, libc::O_RDONLY))
}

const fn list(id: &'static str, what: &'static str, path: &'static str) -> Row {
    Row::new(id, Landlock, EACCES, what, Open(path, libc::O_RDONLY | libc::O_DIRECTORY))
}

/// An unnamed file, which leaves nothing behind.
const fn new_file(id: &'static str, what: &'static str, path: &'static str) -> Row {
    Row::new(id, Landlock, NO_WRITE, what, Open(path, libc::O_WRONLY | libc::O_TMPFILE))
}

/// Opened for writing, and nothing written.
const fn write(id: &'static str, what: &'static str, path: &'static str) -> Row {
    Row::new(id, Landlock, NO_WRITE, what, Open(path, libc::O_WRONLY))
}

const BOTH: &[super::Layer] = &[Credentials];

pub(super) const ROWS: &[Row] = &[
    list("list-root", "listing /", "/"),
    list("list-dev", "listing /dev", "/dev"),
    list("list-sys", "listing /sys", "/sys"),
    list("list-run", "listing /run", "/run"),
    list("list-var", "listing /var", "/var"),
    list("list-home", "listing /home", "/home"),
    list("list-root-home", "listing root's home", "/root").also(BOTH),
    read("read-dev-zero", "a device that is not declared", "/dev/zero"),
    read("read-dev-full", "another", "/dev/full"),
    read("read-dev-random", "another", "/dev/random"),
    read("read-ptmx", "a new terminal", "/dev/ptmx"),
    read("read-sys", "a file of /sys", "/sys/kernel/mm/transparent_hugepage/enabled"),
    read("read-cgroup", "the control group", "/sys/fs/cgroup/cgroup.controllers"),
    read("read-kmsg", "the kernel's log", "/dev/kmsg"),
    read("read-mem", "the machine's memory", "/dev/mem").also(BOTH),
    read("read-fuse", "a file system of its own (/dev/fuse)", "/dev/fuse"),
    read("read-tun", "a network device of its own (/dev/net/tun)", "/dev/net/tun"),
    read("read-kvm", "a virtual machine (/dev/kvm)", "/dev/kvm"),
    Row::new(
        "read-service-account-token",
        Landlock,
        EACCES,
        "the pod's token",
        Open("/var/run/secrets/kubernetes.io/serviceaccount/token", libc::O_RDONLY),
    ),
    Row::new(
        "read-shadow",
        Credentials,
        EACCES,
        "the image's password hashes",
        Open("/etc/shadow", libc::O_RDONLY),
    ),
    Row::new(
        "read-kcore",
        Credentials,
        EACCES,
        "the kernel's memory",
        Open("/proc/kcore", libc::O_RDONLY),
    ),
    new_file("write-usr", "a file in /usr", "/usr").also(BOTH),
    new_file("write-etc", "a file in /etc", "/etc").also(BOTH),
    new_file("write-root", "a file in /", "/").also(BOTH),
    new_file("write-shm", "a file in /dev/shm, which everybody may write", "/dev/shm"),
    new_file("write-var-tmp", "a file in /var/tmp, which everybody may write", "/var/tmp"),
    write("write-passwd", "the users", "/etc/passwd").also(BOTH),
    write("write-hosts", "names of hosts", "/etc/hosts").also(BOTH),
    write("write-resolv-conf", "name servers", "/etc/resolv.conf").also(BOTH),
    write("write-preload", "the loader's own configuration", "/etc/ld.so.cache").also(BOTH),
    write("write-shell", "the shell", "/bin/sh").also(BOTH),
    write("write-sysrq", "the kernel's emergency keys", "/proc/sysrq-trigger").also(BOTH),
    write(
        "write-core-pattern",
        "what runs when a program crashes",
        "/proc/sys/kernel/core_pattern",
    )
    .also(BOTH)
    .mistake(17),
    write("write-modprobe", "what loads modules", "/proc/sys/kernel/modprobe").also(BOTH),
    write("write-ip-forward", "forwarding of packets", "/proc/sys/net/ipv4/ip_forward").also(BOTH),
    write(
        "write-port-start",
        "which ports are privileged",
        "/proc/sys/net/ipv4/ip_unprivileged_port_start",
    )
    .also(BOTH),
    write(
        "write-own-oom-score",
        "its own place in the queue when memory ends",
        "/proc/self/oom_score_adj",
    ),
    write("write-own-uid-map", "its own map of users", "/proc/self/uid_map"),
    write("write-cgroup", "leaving the control group", "/sys/fs/cgroup/cgroup.procs")
        .also(BOTH)
        .mistake(17),
    Row::new(
        "device-ioctl",
        Landlock,
        EACCES,
        "an ioctl on a device that may only be read",
        Do(device_ioctl),
    )
    .need(Abi(5)),
    Row::new(
        "mknod-disk",
        Credentials,
        EPERM,
        "a block device file",
        Do(|c| mknod(c, libc::S_IFBLK, 8)),
    ),
    Row::new(
        "mknod-mem",
        Credentials,
        EPERM,
        "a character device file",
        Do(|c| mknod(c, libc::S_IFCHR, 1)),
    ),
    Row::new("chroot", Credentials, EPERM, "chroot(2)", Do(chroot)),
    Row::new("chown-to-root", Credentials, EPERM, "giving its own file to root", Do(chown)),
    Row::new(
        "link-system-file",
        Landlock,
        &[Expect::Errno(libc::EACCES), Expect::Errno(libc::EXDEV), Expect::Errno(libc::EPERM)],
        "a hard link to /etc/passwd in its own directory",
        Do(|c| link(c, "/etc/passwd")),
    )
    .also(&[Credentials, Kernel]),
    Row::new(
        "supervisor-read",
        Landlock,
        EACCES,
        "reading the supervisor's program",
        Do(|c| supervisor(c, libc::O_RDONLY)),
    )
    .mistake(10),
    Row::new(
        "supervisor-write",
        Landlock,
        NO_WRITE,
        "writing it",
        Do(|c| supervisor(c, libc::O_WRONLY)),
    )
    .also(BOTH)
    .mistake(10),
    Row::new("supervisor-execute", Landlock, EACCES, "executing it", Do(execute_supervisor))
        .mistake(10),
    Row::new(
        "run-dir-list",
        Landlock,
        EACCES,
        "listing the supervisor's run directory",
        Do(|c| run_dir(c, "")),
    ),
    Row::new(
        "run-dir-root-list",
        Landlock,
        EACCES,
        "listing its part for root",
        Do(|c| run_dir(c, "root")),
    )
    .also(BOTH),
    Row::new(
        "run-dir-attestation",
        Landlock,
        EACCES,
        "reading the attestation",
        Do(|c| run_dir(c, "root/attestation.json")),
    )
    .also(BOTH),
    Row::new("run-dir-write-ca", Landlock, NO_WRITE, "replacing the sandbox's CA", Do(write_ca))
        .also(BOTH),
    Row::new(
        "enter-socket",
        Credentials,
        EACCES,
        "asking the supervisor to start a process",
        Do(enter_socket),
    )
    .mistake(16),
    Row::new("ca-key", Hygiene, HOLDS, "no private key beside the sandbox's CA", Do(ca_key))
        .mistake(28),
];

pub(super) fn skipped(why: &str) -> Seen {
    Seen::Skipped(why.to_owned())
}

/// Whether the policy opens the path, for writing where that is asked.
pub(super) fn opened(context: &Context, path: &Path, for_writing: bool) -> bool {
    context
        .facts
        .opened
        .iter()
        .any(|(open, writable)| (*writable || !for_writing) && path.starts_with(open))
}

pub(super) fn open(layer: super::Layer, path: &str, flags: i32, context: &Context) -> Seen {
    let for_writing = flags & libc::O_ACCMODE != libc::O_RDONLY;
    if layer == Landlock && opened(context, Path::new(path), for_writing) {
        return skipped("the policy opens it");
    }
    open_any(Path::new(path), flags)
}

fn open_any(path: &Path, flags: i32) -> Seen {
    let for_writing = flags & libc::O_ACCMODE != libc::O_RDONLY;
    let opened = fs::OpenOptions::new()
        .read(!for_writing)
        .write(for_writing)
        .custom_flags(flags & !libc::O_ACCMODE | libc::O_NOCTTY | libc::O_NONBLOCK)
        .open(path);
    if opened.as_ref().is_ok_and(is_null) && path != Path::new("/dev/null") {
        return skipped("the container runtime has put /dev/null there");
    }
    match raw::seen_io(opened) {
        Seen::Errno(libc::ENOENT | libc::ENOTDIR) => skipped("there is no such file here"),
        seen => seen,
    }
}

/// Whether this is /dev/null, with which runtimes mask parts of /proc.
fn is_null(file: &fs::File) -> bool {
    use std::os::unix::fs::MetadataExt;
    file.metadata().is_ok_and(|data| data.rdev() == rustix::fs::makedev(1, 3))
}

/// A place that the policy lets the agent write, with a name in it that nobody has.
fn scratch(context: &Context) -> Option<PathBuf> {
    let name = format!("ringfence-escape-{}", std::process::id());
    let writable = context.facts.opened.iter().filter(|(_, writable)| *writable);
    writable.map(|(path, _)| Path::new(path)).find(|path| path.is_dir()).map(|dir| dir.join(&name))
}

/// Tries something with such a place, and removes what is left.
pub(super) fn in_scratch(context: &Context, attempt: impl FnOnce(&Path) -> Seen) -> Seen {
    let Some(path) = scratch(context) else {
        return skipped("the policy lets the agent write nowhere");
    };
    let seen = attempt(&path);
    let _ = fs::remove_file(&path);
    seen
}

fn device_ioctl(context: &Context) -> Seen {
    /// `RNDGETENTCNT`; with a null address, so that it fails in any case.
    const COUNT: u64 = 0x8004_5200;
    use std::os::fd::AsRawFd;
    if opened(context, Path::new("/dev/urandom"), true) {
        return skipped("the policy opens it");
    }
    match fs::File::open("/dev/urandom") {
        Ok(file) => {
            let fd = u64::from(file.as_raw_fd().unsigned_abs());
            raw::seen(raw::call(libc::SYS_ioctl, [fd, COUNT, 0, 0, 0, 0]))
        }
        Err(error) => skipped(&format!("/dev/urandom cannot be read: {error}")),
    }
}

pub(super) fn mknod_at(path: &Path, kind: u32, major: u32) -> rustix::io::Result<()> {
    let file_type = rustix::fs::FileType::from_raw_mode(kind);
    let device = rustix::fs::makedev(major, 1);
    rustix::fs::mknodat(rustix::fs::CWD, path, file_type, rustix::fs::Mode::RUSR, device)
}

fn mknod(context: &Context, kind: u32, major: u32) -> Seen {
    in_scratch(context, |path| raw::seen(mknod_at(path, kind, major)))
}

fn chroot(_: &Context) -> Seen {
    raw::seen(raw::call(libc::SYS_chroot, [c"/".as_ptr() as u64, 0, 0, 0, 0, 0]))
}

fn chown(context: &Context) -> Seen {
    in_scratch(context, |path| {
        if let Err(error) = fs::File::create_new(path) {
            return Seen::Broken(format!("cannot make {}: {error}", path.display()));
        }
        raw::seen_io(std::os::unix::fs::chown(path, Some(0), Some(0)))
    })
}

fn link(context: &Context, to: &str) -> Seen {
    in_scratch(context, |path| raw::seen_io(fs::hard_link(to, path)))
}

fn supervisor(context: &Context, flags: i32) -> Seen {
    let Some(path) = context.facts.supervisor.as_ref().map(Path::new) else {
        return skipped("not known where it lies");
    };
    if opened(context, path, flags != libc::O_RDONLY) {
        return skipped("the policy opens its directory");
    }
    match open_any(path, flags) {
        // It runs: the kernel protects it from writing as well.
        Seen::Errno(libc::ETXTBSY) => Seen::Broken("only that it runs protects it".to_owned()),
        seen => seen,
    }
}

fn execute_supervisor(context: &Context) -> Seen {
    let Some(path) = &context.facts.supervisor else {
        return skipped("not known where it lies");
    };
    if opened(context, Path::new(path), false) {
        return skipped("the policy opens its directory");
    }
    let mut command = std::process::Command::new(path);
    raw::seen_io(command.arg("--version").stdout(std::process::Stdio::null()).status())
}

fn run_dir(context: &Context, below: &str) -> Seen {
    let Some(dir) = context.facts.run_dir.as_ref().map(Path::new) else {
        return skipped("not known where it lies");
    };
    let path = dir.join(below);
    if opened(context, &path, false) { skipped("the policy opens it") } else { open_any(&path, 0) }
}

fn write_ca(context: &Context) -> Seen {
    match &context.facts.run_dir {
        Some(dir) => open_any(&Path::new(dir).join("tls/ca.pem"), libc::O_WRONLY),
        None => skipped("not known where it lies"),
    }
}

fn enter_socket(context: &Context) -> Seen {
    let Some(dir) = context.facts.run_dir.as_ref().map(Path::new) else {
        return skipped("not known where it lies");
    };
    let Ok(address) = rustix::net::SocketAddrUnix::new(dir.join("root/enter.sock")) else {
        return skipped("its path is too long for a socket's address");
    };
    let (family, kind) = (rustix::net::AddressFamily::UNIX, rustix::net::SocketType::SEQPACKET);
    let connect = rustix::net::socket(family, kind, None)
        .and_then(|socket| rustix::net::connect(&socket, &address));
    raw::seen(connect)
}

fn ca_key(context: &Context) -> Seen {
    let Some(dir) = &context.facts.run_dir else {
        return skipped("not known where it lies");
    };
    let entries = match fs::read_dir(Path::new(dir).join("tls")) {
        Ok(entries) => entries,
        Err(error) => return Seen::Broken(format!("the agent cannot see the CA: {error}")),
    };
    for entry in entries.flatten() {
        let text = fs::read(entry.path()).unwrap_or_default();
        let open_to_all = entry.metadata().is_ok_and(|data| data.permissions().mode() & 0o022 != 0);
        if text.windows(11).any(|part| part == b"PRIVATE KEY") || open_to_all {
            return Seen::Broken(format!("{}", entry.path().display()));
        }
    }
    Seen::Holds
}

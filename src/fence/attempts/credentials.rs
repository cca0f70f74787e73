//! Users, groups and capabilities: what is gone, and that it does not come back.

use std::fs;
use std::io::Write;
use std::process::{Command, Stdio};

use super::Attempt::{Call, Do};
use super::Layer::{Credentials, Kernel, Landlock, Seccomp};
use super::{Context, EPERM, Expect, HOLDS, Row, Seen, raw};
use crate::fence::status::CAPABILITY_SETS;

const fn call(id: &'static str, what: &'static str, nr: libc::c_long, args: [u64; 6]) -> Row {
    Row::new(id, Credentials, EPERM, what, Call(nr, args))
}

const fn look(id: &'static str, what: &'static str, look: fn(&Context) -> Seen) -> Row {
    Row::new(id, Credentials, HOLDS, what, Do(look))
}

const NONE: u64 = u32::MAX as u64;
const PR_SET_SECUREBITS: u64 = 28;
const PR_SET_KEEPCAPS: u64 = 8;
const PR_CAPBSET_DROP: u64 = 24;
const PR_SET_NO_NEW_PRIVS: u64 = 38;
const PR_SET_MM: u64 = 35;

pub(super) const ROWS: &[Row] = &[
    look("user", "real, effective and saved user are the agent's", user),
    look("group", "real, effective and saved group are the agent's", group),
    look("groups", "no other groups than the agent's", groups).mistake(12),
    look("capabilities-inheritable", "the inheritable set is empty", |_| empty(0)).mistake(13),
    look("capabilities-permitted", "the permitted set is empty", |_| empty(1)),
    look("capabilities-effective", "the effective set is empty", |_| empty(2)),
    look("capabilities-bounding", "the bounding set is empty", |_| empty(3)),
    look("capabilities-ambient", "the ambient set is empty", |_| empty(4)),
    look("securebits", "root means nothing, and that is locked", securebits),
    look("no-new-privs", "no_new_privs is set", |_| field("NoNewPrivs", "1"))
        .also(&[Seccomp, Landlock]),
    call("setuid-root", "setuid(0)", libc::SYS_setuid, [0; 6]).mistake(14),
    call("setreuid-root", "setreuid(0, 0)", libc::SYS_setreuid, [0; 6]),
    call("setresuid-root", "setresuid(0, 0, 0)", libc::SYS_setresuid, [0; 6]),
    call(
        "setresuid-root-dirty",
        "setresuid with bits above the number",
        libc::SYS_setresuid,
        [raw::DIRT, raw::DIRT, raw::DIRT, 0, 0, 0],
    )
    .mistake(14),
    call("setuid-saved", "root as saved user only", libc::SYS_setresuid, [NONE, NONE, 0, 0, 0, 0]),
    call("setuid-proxy", "the proxy's user", libc::SYS_setuid, [65530, 0, 0, 0, 0, 0]),
    call("setgid-root", "setgid(0)", libc::SYS_setgid, [0; 6]),
    call("setresgid-root", "setresgid(0, 0, 0)", libc::SYS_setresgid, [0; 6]),
    call("setgroups-none", "setgroups(0)", libc::SYS_setgroups, [0; 6]).mistake(12),
    Row::new("setgroups-root", Credentials, EPERM, "setgroups with group 0", Do(|_| root_group()))
        .mistake(12),
    Row::new("setfsuid-root", Credentials, HOLDS, "setfsuid(0) changes nothing", Do(fsuid)),
    Row::new(
        "capset-all",
        Credentials,
        EPERM,
        "capset of each capability",
        Do(|_| each_capability()),
    ),
    Row::new(
        "capset-net-admin",
        Credentials,
        EPERM,
        "capset of NET_ADMIN",
        Do(|_| capset(1 << 12)),
    ),
    Row::new(
        "ambient-raise",
        Credentials,
        EPERM,
        "raising an ambient capability",
        Do(ambient_raise),
    )
    .mistake(13),
    call(
        "bounding-drop",
        "dropping from the bounding set",
        libc::SYS_prctl,
        [PR_CAPBSET_DROP, 0, 0, 0, 0, 0],
    ),
    call(
        "securebits-clear",
        "clearing the securebits",
        libc::SYS_prctl,
        [PR_SET_SECUREBITS, 0, 0, 0, 0, 0],
    ),
    call("keep-capabilities", "PR_SET_KEEPCAPS", libc::SYS_prctl, [PR_SET_KEEPCAPS, 1, 0, 0, 0, 0]),
    Row::new(
        "no-new-privs-clear",
        Kernel,
        &[Expect::Errno(libc::EINVAL)],
        "clearing no_new_privs",
        Call(libc::SYS_prctl, [PR_SET_NO_NEW_PRIVS, 0, 0, 0, 0, 0]),
    ),
    call(
        "memory-map-forge",
        "forging what /proc says (PR_SET_MM)",
        libc::SYS_prctl,
        [PR_SET_MM, 1, 0, 0, 0, 0],
    ),
    look("setuid-program", "a set-user-ID program gives nothing", setuid_program).mistake(13),
    Row::new(
        "priority-raise",
        Credentials,
        &[Expect::Errno(libc::EACCES), Expect::Errno(libc::EPERM)],
        "more of the processor than others (setpriority)",
        Call(libc::SYS_setpriority, [0, 0, (-5_i64).cast_unsigned(), 0, 0, 0]),
    ),
    Row::new("realtime", Credentials, EPERM, "real-time scheduling", Do(realtime)),
    call(
        "io-realtime",
        "real-time input and output",
        libc::SYS_ioprio_set,
        [1, 0, 1 << 13, 0, 0, 0],
    ),
    Row::new(
        "core-limit-raise",
        Credentials,
        EPERM,
        "allowing core dumps again",
        Do(raise_core_limit),
    ),
    call("lock-hostname", "sethostname(2)", libc::SYS_sethostname, [0, raw::NO_FD, 0, 0, 0, 0])
        .also(&[Seccomp]),
];

fn status() -> String {
    fs::read_to_string("/proc/self/status").unwrap_or_default()
}

fn value(text: &str, name: &str) -> Option<String> {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    Some(line.trim().to_owned())
}

/// Whether a field of `/proc/self/status` says this.
pub(super) fn field(name: &str, wanted: &str) -> Seen {
    match value(&status(), name) {
        Some(have) if have == wanted => Seen::Holds,
        have => Seen::Broken(format!("{name} is {}", have.unwrap_or_default())),
    }
}

fn empty(set: usize) -> Seen {
    CAPABILITY_SETS.get(set).map_or(Seen::Holds, |name| field(name, "0000000000000000"))
}

fn four_times(name: &str, wanted: u32) -> Seen {
    if wanted == 0 {
        return Seen::Broken("the agent was to be root".to_owned());
    }
    let id = wanted.to_string();
    field(name, &[id.as_str(); 4].join("\t"))
}

fn user(context: &Context) -> Seen {
    four_times("Uid", context.facts.identity.0)
}

fn group(context: &Context) -> Seen {
    let id = context.facts.identity.1.to_string();
    field("Gid", &[id.as_str(); 4].join("\t"))
}

fn groups(context: &Context) -> Seen {
    let text = value(&status(), "Groups").unwrap_or_default();
    let mut have: Vec<u32> =
        text.split_ascii_whitespace().filter_map(|group| group.parse().ok()).collect();
    let mut wanted = context.facts.identity.2.clone();
    have.sort_unstable();
    wanted.sort_unstable();
    if have == wanted {
        Seen::Holds
    } else {
        Seen::Broken(format!("groups {have:?}, not {wanted:?}"))
    }
}

/// `NOROOT`, `NO_SETUID_FIXUP` and `NO_CAP_AMBIENT_RAISE`, each with its lock, and the lock of
/// `KEEP_CAPS`.
const LOCKED: i64 = 0xEF;

fn securebits(_: &Context) -> Seen {
    match raw::prctl(libc::PR_GET_SECUREBITS, [0; 4]) {
        Ok(LOCKED) => Seen::Holds,
        Ok(bits) => Seen::Broken(format!("securebits are {bits:#x}, not {LOCKED:#x}")),
        Err(errno) => Seen::Errno(errno.raw_os_error()),
    }
}

fn root_group() -> Seen {
    let group = 0_u32;
    raw::seen(raw::call(libc::SYS_setgroups, [1, raw::address(&group), 0, 0, 0, 0]))
}

/// The call says who it was before, so it is asked twice.
fn fsuid(context: &Context) -> Seen {
    let ask = || raw::call(libc::SYS_setfsuid, [0; 6]);
    match (ask(), ask()) {
        (Ok(_), Ok(now)) if now == i64::from(context.facts.identity.0) && now != 0 => Seen::Holds,
        (_, now) => Seen::Broken(format!("file system user {now:?}")),
    }
}

/// The third version of the call, for this thread: two words of each set.
fn capset(bits: u64) -> Seen {
    let header = [0x2008_0522_u32, 0];
    let low = u32::try_from(bits & 0xFFFF_FFFF).unwrap_or(u32::MAX);
    // Bits that the kernel does not know are ignored by it.
    let high = u32::try_from(bits >> 32).unwrap_or(u32::MAX);
    let sets = [low, low, low, high, high, high];
    raw::seen(raw::call(libc::SYS_capset, [raw::address(&header), raw::address(&sets), 0, 0, 0, 0]))
}

/// One after the other: of all at once the kernel refuses those that even root has not.
fn each_capability() -> Seen {
    let refused = Seen::Errno(libc::EPERM);
    let mut each = (0..=last_capability()).map(|bit| capset(1_u64 << bit));
    each.find(|seen| *seen != refused).unwrap_or(refused)
}

fn last_capability() -> u32 {
    let text = fs::read_to_string("/proc/sys/kernel/cap_last_cap").unwrap_or_default();
    text.trim().parse().unwrap_or(63)
}

fn ambient_raise(_: &Context) -> Seen {
    const NET_BIND_SERVICE: u64 = 10;
    // What is to become ambient must be inheritable. Where this fails, so does the next.
    let _ = capset(1 << NET_BIND_SERVICE);
    let raise = u64::from(libc::PR_CAP_AMBIENT_RAISE.unsigned_abs());
    raw::seen(raw::prctl(libc::PR_CAP_AMBIENT, [raise, NET_BIND_SERVICE, 0, 0]))
}

/// Programs that wait for a word on stdin, so that there is time to look at them.
const SETUID_PROGRAMS: [&str; 8] = [
    "/usr/bin/su",
    "/bin/su",
    "/usr/bin/passwd",
    "/usr/bin/newgrp",
    "/usr/bin/chsh",
    "/usr/bin/mount",
    "/bin/mount",
    "/usr/bin/sudo",
];

/// Starts one and looks whose it is. A dead one that nobody has waited for still says so.
fn setuid_program(context: &Context) -> Seen {
    use std::os::unix::fs::MetadataExt;
    let is_setuid = |path: &&&str| {
        fs::metadata(path).is_ok_and(|data| data.uid() == 0 && data.mode() & 0o4000 != 0)
    };
    let Some(program) = SETUID_PROGRAMS.iter().find(is_setuid) else {
        return Seen::Skipped("no set-user-ID program in this image".to_owned());
    };
    let mut command = Command::new(program);
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => return Seen::Skipped(format!("{program} does not start: {error}")),
    };
    let text = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap_or_default();
    let uids = value(&text, "Uid").unwrap_or_default();
    if let Some(mut stdin) = child.stdin.take() {
        let _ = stdin.write_all(b"\n");
    }
    let _ = child.kill();
    let _ = child.wait();
    let own = context.facts.identity.0.to_string();
    if uids.split_ascii_whitespace().all(|uid| uid == own) && !uids.is_empty() {
        Seen::Holds
    } else {
        Seen::Broken(format!("{program} runs as {uids}"))
    }
}

fn realtime(_: &Context) -> Seen {
    const FIFO: u64 = 1;
    let priority = 1_i32;
    raw::seen(raw::call(libc::SYS_sched_setscheduler, [0, FIFO, raw::address(&priority), 0, 0, 0]))
}

fn raise_core_limit(_: &Context) -> Seen {
    let limit = [1_u64, 1];
    raw::seen(raw::call(
        libc::SYS_prlimit64,
        [0, u64::from(libc::RLIMIT_CORE), raw::address(&limit), 0, 0, 0],
    ))
}

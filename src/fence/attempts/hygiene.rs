//! What a process brings along into the fence: descriptors, session, limits, environment.

use std::fs;

use super::Attempt::Do;
use super::Layer::{Hygiene, Landlock, Seccomp};
use super::credentials::field;
use super::{Context, Expect, HOLDS, Row, Seen, raw};

/// What this process was started with, seen before it did anything.
#[derive(Debug)]
pub(super) struct Start {
    descriptors: Vec<i32>,
    umask: u32,
    session_leader: bool,
    blocked_signals: String,
    ignored_signals: String,
    death_signal: i64,
    pub(super) parent: i32,
}

const fn look(id: &'static str, what: &'static str, look: fn(&Context) -> Seen) -> Row {
    Row::new(id, Hygiene, HOLDS, what, Do(look))
}

/// Without a terminal of its own, or without the right to open one.
const NO_TERMINAL: &[Expect] =
    &[Expect::Errno(libc::EACCES), Expect::Errno(libc::ENXIO), Expect::Errno(libc::ENOENT)];

pub(super) const ROWS: &[Row] = &[
    look("descriptors", "no descriptor is open but 0, 1 and 2", descriptors).mistake(9),
    look("directory-descriptors", "none of the three is a directory", no_directories).mistake(9),
    look("working-directory", "the working directory lies under the root", working_directory)
        .mistake(9),
    look("session", "a session of its own", session).mistake(1),
    look("no-controlling-terminal", "no terminal that is somebody else's", terminal_number)
        .mistake(1),
    Row::new("open-tty", Hygiene, NO_TERMINAL, "opening the controlling terminal", Do(open_tty))
        .also(&[Landlock])
        .mistake(1),
    look("core-limit", "no core dumps, for good", core_limit),
    look("umask", "new files are not writable by others", umask),
    look("blocked-signals", "no signal is blocked", blocked),
    look("ignored-signals", "no signal is ignored", ignored),
    look("death-signal", "it dies with the process that forked it", death_signal).mistake(18),
    look("environment-secrets", "no token or key of the supervisor's in the environment", secrets)
        .mistake(28),
    look("environment-proxy", "NO_PROXY names loopback and nothing else", no_proxy).mistake(26),
    Row::new("filter-mode", Seccomp, HOLDS, "a filter is installed", Do(|_| field("Seccomp", "2"))),
    Row::new("thread-inherits", Seccomp, HOLDS, "and a new thread has it", Do(thread)),
];

impl Start {
    pub(super) fn look() -> Self {
        // Before anything is opened.
        let descriptors = (0..4096).filter(|fd| raw::is_open(*fd)).collect();
        let umask = rustix::process::umask(rustix::fs::Mode::empty());
        rustix::process::umask(umask);
        let mut death_signal = 0_i32;
        let asked =
            raw::prctl(libc::PR_GET_PDEATHSIG, [raw::address_mut(&mut death_signal), 0, 0, 0]);
        let own = rustix::process::getpid();
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let mask = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.unwrap_or("unknown").trim().to_owned()
        };
        Self {
            descriptors,
            umask: umask.as_raw_mode(),
            session_leader: rustix::process::getsid(None) == Ok(own),
            blocked_signals: mask("SigBlk:"),
            ignored_signals: mask("SigIgn:"),
            death_signal: if asked.is_ok() { death_signal.into() } else { -1 },
            parent: rustix::process::getppid().map_or(0, |pid| pid.as_raw_nonzero().get()),
        }
    }
}

fn holds(holds: bool, otherwise: impl FnOnce() -> String) -> Seen {
    if holds { Seen::Holds } else { Seen::Broken(otherwise()) }
}

fn descriptors(context: &Context) -> Seen {
    let open = &context.start.descriptors;
    holds(open.iter().all(|fd| *fd <= 2), || format!("open: {open:?}"))
}

fn no_directories(context: &Context) -> Seen {
    let directory = context
        .start
        .descriptors
        .iter()
        .find(|fd| fs::metadata(format!("/proc/self/fd/{fd}")).is_ok_and(|data| data.is_dir()));
    holds(directory.is_none(), || format!("descriptor {directory:?} is a directory"))
}

fn working_directory(_: &Context) -> Seen {
    let mut path = [0_u8; 4096];
    match raw::call(libc::SYS_getcwd, [raw::address_mut(&mut path), 4096, 0, 0, 0, 0]) {
        Ok(_) => holds(path[0] == b'/', || "it lies outside".to_owned()),
        Err(errno) => Seen::Errno(errno.raw_os_error()),
    }
}

fn session(context: &Context) -> Seen {
    holds(context.start.session_leader, || "the session is another process's".to_owned())
}

/// The seventh field of `/proc/self/stat`; the second may hold spaces, so count after it.
fn terminal_number(_: &Context) -> Seen {
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let number = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_ascii_whitespace().nth(4));
    holds(number == Some("0"), || format!("terminal {number:?}"))
}

fn open_tty(_: &Context) -> Seen {
    raw::seen_io(fs::File::open("/dev/tty"))
}

fn core_limit(_: &Context) -> Seen {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Core);
    holds(limit.current == Some(0) && limit.maximum == Some(0), || format!("{limit:?}"))
}

fn umask(context: &Context) -> Seen {
    let umask = context.start.umask;
    holds(umask & 0o022 == 0o022, || format!("umask {umask:03o}"))
}

fn blocked(context: &Context) -> Seen {
    let mask = &context.start.blocked_signals;
    holds(mask == "0000000000000000", || format!("blocked: {mask}"))
}

/// SIGPIPE (13) aside, which Rust's own runtime ignores at its start.
fn ignored(context: &Context) -> Seen {
    let mask = &context.start.ignored_signals;
    let others = u64::from_str_radix(mask, 16).map(|mask| mask & !(1 << 12));
    holds(others == Ok(0), || format!("ignored: {mask}"))
}

fn death_signal(context: &Context) -> Seen {
    let signal = context.start.death_signal;
    holds(signal == i64::from(libc::SIGKILL), || format!("signal {signal}"))
}

/// Names that are the supervisor's alone.
const SECRETS: [&str; 4] = [
    "OPENSHELL_SANDBOX_TOKEN",
    "OPENSHELL_SANDBOX_TOKEN_FILE",
    "OPENSHELL_K8S_SA_TOKEN_FILE",
    "OPENSHELL_TLS_KEY",
];

fn secrets(_: &Context) -> Seen {
    let found = std::env::vars_os().find(|(name, value)| {
        let is_key = value.to_string_lossy().contains("PRIVATE KEY");
        is_key || SECRETS.iter().any(|secret| name == secret)
    });
    // The value is what must not be shown.
    match found {
        Some((name, _)) => Seen::Broken(format!("{} is set", name.display())),
        None => Seen::Holds,
    }
}

fn no_proxy(_: &Context) -> Seen {
    const LOOPBACK: [&str; 4] = ["127.0.0.1", "localhost", "::1", ""];
    for name in ["NO_PROXY", "no_proxy"] {
        let Ok(value) = std::env::var(name) else {
            return Seen::Broken(format!("{name} is not set"));
        };
        if value.split(',').any(|host| !LOOPBACK.contains(&host.trim())) {
            return Seen::Broken(format!("{name}={value}"));
        }
    }
    Seen::Holds
}

fn thread(_: &Context) -> Seen {
    // Its own status, not the process's.
    let text = std::thread::spawn(|| fs::read_to_string("/proc/thread-self/status"));
    let text = text.join().ok().and_then(Result::ok).unwrap_or_default();
    holds(text.lines().any(|line| line == "Seccomp:\t2"), || "the thread has no filter".to_owned())
}

//! What the agent can do to the processes that hold the fence, and to a neighbour of its own user.
//!
//! Nothing is changed where it succeeds: signal 0, a process's own value set again, a file opened
//! and left alone.

use std::fs;
use std::path::PathBuf;

use super::Attempt::Process;
use super::Layer::{Credentials, Landlock, Seccomp};
use super::Need::Landlock as Abi;
use super::{Context, EACCES, EPERM, Expect, Row, Seen, raw};

/// Whom it is done to.
#[derive(Clone, Copy, Debug)]
pub(super) enum Target {
    /// PID 1: the supervisor in a pod, the keeper where the agent has a PID namespace.
    Init,
    /// The process that forked this one.
    Keeper,
    /// Where it can be seen.
    Proxy,
    /// A process of the agent's user outside of the fence.
    Neighbour,
}

/// What is done.
#[derive(Clone, Copy, Debug)]
pub(super) enum Deed {
    Signal,
    SignalThread,
    Queue,
    Trace,
    Environment,
    Memory,
    Root,
    WorkingDirectory,
    Descriptors,
    Executable,
    Maps,
    Limits,
    Affinity,
    Scheduler,
    Priority,
    IoPriority,
    OomScore,
    Pages,
    RobustList,
    Group,
}

/// The proxy's user.
const PROXY: &str = "65530";
const ESRCH: &[Expect] = &[Expect::Errno(libc::ESRCH)];

const fn row(
    id: &'static str,
    what: &'static str,
    expect: &'static [Expect],
    target: Target,
    deed: Deed,
) -> Row {
    Row::new(id, Credentials, expect, what, Process(target, deed))
}

const LANDLOCK: &[super::Layer] = &[Landlock];

pub(super) const ROWS: &[Row] = &[
    row("init-signal", "a signal to PID 1", EPERM, Target::Init, Deed::Signal).also(LANDLOCK),
    row("init-signal-thread", "a signal to its thread", EPERM, Target::Init, Deed::SignalThread)
        .also(LANDLOCK),
    row("init-queue", "a queued signal to it", EPERM, Target::Init, Deed::Queue).also(LANDLOCK),
    row("init-environment", "its environment", EACCES, Target::Init, Deed::Environment)
        .also(LANDLOCK),
    row("init-memory", "its memory", EACCES, Target::Init, Deed::Memory).also(LANDLOCK),
    row("init-root", "its root directory", EACCES, Target::Init, Deed::Root).also(LANDLOCK),
    row(
        "init-working-directory",
        "its working directory",
        EACCES,
        Target::Init,
        Deed::WorkingDirectory,
    )
    .also(LANDLOCK)
    .mistake(9),
    row("init-descriptors", "its descriptors", EACCES, Target::Init, Deed::Descriptors)
        .also(LANDLOCK)
        .mistake(9),
    row("init-executable", "its executable", EACCES, Target::Init, Deed::Executable)
        .also(LANDLOCK)
        .mistake(10),
    row("init-maps", "its memory map", EACCES, Target::Init, Deed::Maps).also(LANDLOCK),
    row("init-limits", "its limits (prlimit)", EPERM, Target::Init, Deed::Limits),
    row("init-affinity", "its processors", EPERM, Target::Init, Deed::Affinity),
    row("init-scheduler", "its scheduling", EPERM, Target::Init, Deed::Scheduler),
    row("init-priority", "its priority", EPERM, Target::Init, Deed::Priority),
    row(
        "init-io-priority",
        "its priority of input and output",
        EPERM,
        Target::Init,
        Deed::IoPriority,
    ),
    row("init-oom-score", "that it is the first to die", EACCES, Target::Init, Deed::OomScore)
        .also(LANDLOCK),
    row("init-pages", "where its memory lies", EPERM, Target::Init, Deed::Pages).also(LANDLOCK),
    row("init-robust-list", "its list of locks", EPERM, Target::Init, Deed::RobustList)
        .also(LANDLOCK),
    row("init-process-group", "moving it to another group", ESRCH, Target::Init, Deed::Group)
        .also(&[super::Layer::Kernel]),
    Row::new("init-trace", Seccomp, EPERM, "tracing it", Process(Target::Init, Deed::Trace))
        .also(&[Credentials, Landlock]),
    row("keeper-signal", "a signal to the keeper", EPERM, Target::Keeper, Deed::Signal),
    row("keeper-memory", "its memory", EACCES, Target::Keeper, Deed::Memory),
    row("keeper-environment", "its environment", EACCES, Target::Keeper, Deed::Environment),
    row("keeper-descriptors", "its descriptors", EACCES, Target::Keeper, Deed::Descriptors),
    row("keeper-limits", "its limits", EPERM, Target::Keeper, Deed::Limits),
    row("proxy-signal", "a signal to the proxy", EPERM, Target::Proxy, Deed::Signal).also(LANDLOCK),
    row("proxy-memory", "its memory, where the CA's key is", EACCES, Target::Proxy, Deed::Memory)
        .also(LANDLOCK)
        .mistake(28),
    row("proxy-environment", "its environment", EACCES, Target::Proxy, Deed::Environment)
        .also(LANDLOCK),
    row("proxy-descriptors", "its sockets", EACCES, Target::Proxy, Deed::Descriptors)
        .also(LANDLOCK),
    row("proxy-root", "its root directory", EACCES, Target::Proxy, Deed::Root).also(LANDLOCK),
    row("proxy-limits", "its limits", EPERM, Target::Proxy, Deed::Limits),
    row("proxy-affinity", "its processors", EPERM, Target::Proxy, Deed::Affinity),
    row("proxy-priority", "its priority", EPERM, Target::Proxy, Deed::Priority),
    row("proxy-oom-score", "that it is the first to die", EACCES, Target::Proxy, Deed::OomScore)
        .also(LANDLOCK),
    Row::new(
        "neighbour-signal",
        Landlock,
        EPERM,
        "a signal to a process of the same user",
        Process(Target::Neighbour, Deed::Signal),
    )
    .need(Abi(6)),
    Row::new(
        "neighbour-memory",
        Landlock,
        EACCES,
        "its memory",
        Process(Target::Neighbour, Deed::Memory),
    ),
    Row::new(
        "neighbour-environment",
        Landlock,
        EACCES,
        "its environment",
        Process(Target::Neighbour, Deed::Environment),
    ),
    Row::new(
        "neighbour-root",
        Landlock,
        EACCES,
        "its root directory",
        Process(Target::Neighbour, Deed::Root),
    ),
    Row::new(
        "neighbour-descriptors",
        Landlock,
        EACCES,
        "its descriptors",
        Process(Target::Neighbour, Deed::Descriptors),
    ),
    Row::new(
        "neighbour-executable",
        Landlock,
        EACCES,
        "its executable",
        Process(Target::Neighbour, Deed::Executable),
    ),
    Row::new(
        "neighbour-trace",
        Seccomp,
        EPERM,
        "tracing it",
        Process(Target::Neighbour, Deed::Trace),
    )
    .also(&[Landlock]),
];

fn find(target: Target, context: &Context) -> Result<i32, String> {
    match target {
        Target::Init => Ok(1),
        Target::Keeper => match context.start.parent {
            1 => Err("PID 1 is the keeper here".to_owned()),
            0 => Err("the keeper is not seen here".to_owned()),
            pid => Ok(pid),
        },
        Target::Proxy => {
            proxy().ok_or_else(|| "the proxy is not seen in this PID namespace".to_owned())
        }
        Target::Neighbour => context
            .facts
            .neighbour
            .ok_or_else(|| "no neighbour of the same user is seen here".to_owned()),
    }
}

fn proxy() -> Option<i32> {
    fs::read_dir("/proc").ok()?.flatten().find_map(|entry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        let status = fs::read_to_string(entry.path().join("status")).ok()?;
        let uids = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
        (uids.split_ascii_whitespace().next() == Some(PROXY)).then_some(pid)
    })
}

pub(super) fn attempt(target: Target, deed: Deed, context: &Context) -> Seen {
    let pid = match find(target, context) {
        Ok(pid) => pid,
        Err(why) => return Seen::Skipped(why),
    };
    let proc = |name: &str| PathBuf::from(format!("/proc/{pid}/{name}"));
    let read = |name: &str| raw::seen_io(fs::File::open(proc(name)));
    let number = u64::from(pid.unsigned_abs());
    let call = |nr, args| raw::seen(raw::call(nr, args));
    match deed {
        Deed::Signal => call(libc::SYS_kill, [number, 0, 0, 0, 0, 0]),
        Deed::SignalThread => call(libc::SYS_tgkill, [number, number, 0, 0, 0, 0]),
        Deed::Queue => queue(pid),
        Deed::Trace => call(libc::SYS_ptrace, [0x4206, number, 0, 0, 0, 0]),
        Deed::Environment => read("environ"),
        Deed::Memory => read("mem"),
        Deed::Root => raw::seen_io(fs::metadata(proc("root/"))),
        Deed::WorkingDirectory => raw::seen_io(fs::metadata(proc("cwd/"))),
        // Their numbers may be listed by the same user; where they lead, only by who may trace.
        Deed::Descriptors => raw::seen_io(fs::read_link(proc("fd/0"))),
        Deed::Executable => raw::seen_io(fs::read_link(proc("exe"))),
        Deed::Maps => read("maps"),
        Deed::Limits => {
            let mut old = [0_u64; 2];
            let core = u64::from(libc::RLIMIT_CORE);
            call(libc::SYS_prlimit64, [number, core, 0, raw::address_mut(&mut old), 0, 0])
        }
        Deed::Affinity => affinity(number),
        Deed::Scheduler => {
            let priority = 0_i32;
            call(libc::SYS_sched_setscheduler, [number, 0, raw::address(&priority), 0, 0, 0])
        }
        Deed::Priority => {
            // The call gives 20 minus the value, so that none is negative.
            let now = raw::call(libc::SYS_getpriority, [0, number, 0, 0, 0, 0]).unwrap_or(20);
            call(libc::SYS_setpriority, [0, number, (20 - now).cast_unsigned(), 0, 0, 0])
        }
        Deed::IoPriority => call(libc::SYS_ioprio_set, [1, number, 0, 0, 0, 0]),
        Deed::OomScore => {
            raw::seen_io(fs::OpenOptions::new().write(true).open(proc("oom_score_adj")))
        }
        Deed::Pages => call(libc::SYS_move_pages, [number, 0, 0, 0, 0, 0]),
        Deed::RobustList => {
            let (mut head, mut length) = (0_u64, 0_u64);
            let args =
                [number, raw::address_mut(&mut head), raw::address_mut(&mut length), 0, 0, 0];
            call(libc::SYS_get_robust_list, args)
        }
        Deed::Group => call(libc::SYS_setpgid, [number, 0, 0, 0, 0, 0]),
    }
}

/// The processors that it has already.
fn affinity(pid: u64) -> Seen {
    let mut mask = [0_u64; 16];
    let have =
        raw::call(libc::SYS_sched_getaffinity, [pid, 128, raw::address_mut(&mut mask), 0, 0, 0]);
    match have {
        Ok(_) => raw::seen(raw::call(
            libc::SYS_sched_setaffinity,
            [pid, 128, raw::address(&mask), 0, 0, 0],
        )),
        Err(errno) => Seen::Errno(errno.raw_os_error()),
    }
}

/// Signal 0 with a value, from the queue's side.
fn queue(pid: i32) -> Seen {
    // si_signo, si_errno, si_code (SI_QUEUE), and the rest of the 128 bytes.
    let mut info = [0_i32; 32];
    info[2] = -1;
    let pid = u64::from(pid.unsigned_abs());
    raw::seen(raw::call(libc::SYS_rt_sigqueueinfo, [pid, 0, raw::address(&info), 0, 0, 0]))
}

//! The proxy's filter. It parses what hostile programs send, so it has an allow list: sockets,
//! timers, memory and threads, and reading files that Landlock leaves it.

use std::collections::BTreeMap;

use super::assembler::{Clause, Rule, Table, Test, Verdict, Word};
use super::calls::{CLONE_NEW_FLAGS, LAST_KNOWN};

const ALWAYS: &[libc::c_long] = &[
    // Descriptors.
    libc::SYS_close,
    libc::SYS_close_range,
    libc::SYS_dup,
    libc::SYS_dup3,
    libc::SYS_fcntl,
    libc::SYS_lseek,
    libc::SYS_pipe2,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_sendfile,
    libc::SYS_splice,
    libc::SYS_write,
    libc::SYS_writev,
    // Reading files.
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_fadvise64,
    libc::SYS_fstat,
    libc::SYS_getcwd,
    libc::SYS_getdents64,
    libc::SYS_newfstatat,
    libc::SYS_openat,
    libc::SYS_readlinkat,
    libc::SYS_statx,
    // Sockets; `socket` and `socketpair` are below.
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_bind,
    libc::SYS_connect,
    libc::SYS_getpeername,
    libc::SYS_getsockname,
    libc::SYS_getsockopt,
    libc::SYS_listen,
    libc::SYS_recvfrom,
    libc::SYS_recvmmsg,
    libc::SYS_recvmsg,
    libc::SYS_sendmmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
    // Waiting and time.
    libc::SYS_clock_getres,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_eventfd2,
    libc::SYS_gettimeofday,
    libc::SYS_nanosleep,
    libc::SYS_ppoll,
    libc::SYS_pselect6,
    libc::SYS_restart_syscall,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_gettime,
    libc::SYS_timerfd_settime,
    // Memory; `mmap` and `mprotect` are below.
    libc::SYS_brk,
    libc::SYS_madvise,
    libc::SYS_mincore,
    libc::SYS_mlock,
    libc::SYS_mlock2,
    libc::SYS_mremap,
    libc::SYS_munlock,
    libc::SYS_munmap,
    // Threads; `clone` is below.
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_get_robust_list,
    libc::SYS_getcpu,
    libc::SYS_gettid,
    libc::SYS_membarrier,
    libc::SYS_rseq,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_set_robust_list,
    libc::SYS_set_tid_address,
    libc::SYS_tgkill,
    // Signals.
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    // About itself.
    libc::SYS_getegid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getpid,
    libc::SYS_getppid,
    libc::SYS_getrandom,
    libc::SYS_getresgid,
    libc::SYS_getresuid,
    libc::SYS_getrusage,
    libc::SYS_getuid,
    libc::SYS_sysinfo,
    libc::SYS_uname,
];

/// The same by their older names, which `x86_64` still has.
#[cfg(target_arch = "x86_64")]
const OLDER_NAMES: &[libc::c_long] = &[
    libc::SYS_access,
    libc::SYS_dup2,
    libc::SYS_epoll_wait,
    libc::SYS_lstat,
    libc::SYS_open,
    libc::SYS_pipe,
    libc::SYS_poll,
    libc::SYS_readlink,
    libc::SYS_select,
    libc::SYS_stat,
    libc::SYS_time,
];
#[cfg(not(target_arch = "x86_64"))]
const OLDER_NAMES: &[libc::c_long] = &[];

const ALL: u32 = u32::MAX;

const fn low(argument: u8, mask: u32, one_of: &'static [u32]) -> Test {
    Test { word: Word::Low(argument), mask, one_of }
}

/// Streams and datagrams of the internet families, without other protocols (see the agent's).
const SOCKET: &[Clause] = &[Clause {
    tests: &[low(0, ALL, &[2, 10]), low(1, !0o2_004_000, &[1, 2]), low(2, ALL, &[0, 6, 17])],
    verdict: Verdict::Allow,
}];
/// The runtime wakes itself through a pair of unix sockets.
const SOCKETPAIR: &[Clause] = &[Clause { tests: &[low(0, ALL, &[1])], verdict: Verdict::Allow }];
/// No memory becomes executable any more.
const NOT_EXECUTABLE: &[Clause] = &[Clause { tests: &[low(2, 4, &[0])], verdict: Verdict::Allow }];
/// Threads, not processes, not namespaces.
const THREADS: &[Clause] = &[Clause {
    tests: &[low(0, CLONE_NEW_FLAGS | CLONE_THREAD, &[CLONE_THREAD])],
    verdict: Verdict::Allow,
}];
const CLONE_THREAD: u32 = 0x0001_0000;
/// FIONBIO, FIOCLEX, FIONCLEX, FIONREAD, and TCGETS, which `isatty` asks.
const IOCTLS: &[Clause] = &[Clause {
    tests: &[low(1, ALL, &[0x5421, 0x5451, 0x5450, 0x541B, 0x5401])],
    verdict: Verdict::Allow,
}];
/// Naming threads and memory.
const PRCTLS: &[Clause] =
    &[Clause { tests: &[low(0, ALL, &[15, 16, 0x5356_4D41])], verdict: Verdict::Allow }];
/// Reading its own limits (the stack's size): no process named, no new value given.
const READ_LIMITS: &[Clause] = &[Clause {
    tests: &[
        low(0, ALL, &[0]),
        low(2, ALL, &[0]),
        Test { word: Word::High(2), mask: ALL, one_of: &[0] },
    ],
    verdict: Verdict::Allow,
}];

pub(super) fn table() -> Table {
    let eperm = Verdict::Errno(libc::EPERM);
    let mut table = Table {
        foreign: eperm,
        default: eperm,
        last_known: LAST_KNOWN,
        unknown: Verdict::Errno(libc::ENOSYS),
        rules: BTreeMap::new(),
    };
    table.set(ALWAYS, Rule::Always(Verdict::Allow));
    table.set(OLDER_NAMES, Rule::Always(Verdict::Allow));
    table.set(&[libc::SYS_clone3], Rule::Always(Verdict::Errno(libc::ENOSYS)));
    table.set(&[libc::SYS_clone], Rule::ByArgument(THREADS, eperm));
    table.set(&[libc::SYS_ioctl], Rule::ByArgument(IOCTLS, eperm));
    table.set(&[libc::SYS_mmap, libc::SYS_mprotect], Rule::ByArgument(NOT_EXECUTABLE, eperm));
    table.set(&[libc::SYS_prctl], Rule::ByArgument(PRCTLS, eperm));
    table.set(&[libc::SYS_prlimit64], Rule::ByArgument(READ_LIMITS, eperm));
    table.set(&[libc::SYS_socket], Rule::ByArgument(SOCKET, eperm));
    table.set(&[libc::SYS_socketpair], Rule::ByArgument(SOCKETPAIR, eperm));
    table
}

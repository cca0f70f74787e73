//! System calls that the filter refuses. What it does not know it answers with ENOSYS, so that
//! programs take another way; what it knows to be bad, with EPERM.
//!
//! The arguments are such that the kernel itself would answer with another errno, or that success
//! changes nothing.

use super::Attempt::{Call, Clone, Do};
use super::Layer::{Credentials, Kernel, Seccomp};
use super::Need::X86_64;
use super::raw::{DIRT, NO_FD, by_32_bit_gate};
use super::{ENOSYS, EPERM, Row};

const fn call(id: &'static str, what: &'static str, nr: libc::c_long, args: [u64; 6]) -> Row {
    Row::new(id, Seccomp, EPERM, what, Call(nr, args))
}

/// A call for which the kernel wants a capability that the agent has not.
const fn privileged(id: &'static str, what: &'static str, nr: libc::c_long, args: [u64; 6]) -> Row {
    call(id, what, nr, args).also(&[Credentials])
}

const fn unshare(id: &'static str, what: &'static str, flag: u64) -> Row {
    privileged(id, what, libc::SYS_unshare, [flag, 0, 0, 0, 0, 0])
}

const fn clone(id: &'static str, what: &'static str, flag: u64) -> Row {
    Row::new(id, Seccomp, EPERM, what, Clone(flag)).also(&[Credentials])
}

const fn x32(id: &'static str, what: &'static str, nr: libc::c_long, args: [u64; 6]) -> Row {
    call(id, what, 0x4000_0000 + nr, args).mistake(3).need(X86_64)
}

macro_rules! gate {
    ($id:literal, $what:literal, $nr:literal, $first:literal) => {
        Row::new($id, Seccomp, EPERM, $what, Do(|_| by_32_bit_gate($nr, $first, 0)))
            .mistake(4)
            .need(X86_64)
    };
}

const NEWNS: u64 = 0x0002_0000;
const NEWCGROUP: u64 = 0x0200_0000;
const NEWUTS: u64 = 0x0400_0000;
const NEWIPC: u64 = 0x0800_0000;
const NEWUSER: u64 = 0x1000_0000;
const NEWPID: u64 = 0x2000_0000;
const NEWNET: u64 = 0x4000_0000;
const NEWTIME: u64 = 0x80;
/// `open_tree_attr`, Linux 6.15; the libc crate has no name for it yet.
const OPEN_TREE_ATTR: libc::c_long = 467;
const EMPTY_PATH: u64 = 0x1000;
const PR_SET_SECCOMP: u64 = 22;

pub(super) const ROWS: &[Row] = &[
    // Other processes.
    call("ptrace", "ptrace(2)", libc::SYS_ptrace, [1, 0, 0, 0, 0, 0]),
    call("process-vm-readv", "reading another's memory", libc::SYS_process_vm_readv, [0; 6]),
    call("process-vm-writev", "writing another's memory", libc::SYS_process_vm_writev, [0; 6]),
    call("pidfd-open", "a handle on a process", libc::SYS_pidfd_open, [0; 6]),
    call("pidfd-getfd", "another's descriptor", libc::SYS_pidfd_getfd, [NO_FD, 0, 0, 0, 0, 0]),
    call(
        "pidfd-send-signal",
        "a signal by handle",
        libc::SYS_pidfd_send_signal,
        [NO_FD, 0, 0, 0, 0, 0],
    ),
    call("kcmp", "comparing kernel objects", libc::SYS_kcmp, [0; 6]),
    call(
        "process-madvise",
        "another's memory advice",
        libc::SYS_process_madvise,
        [NO_FD, 0, 0, 0, 0, 0],
    ),
    // io_uring: sockets and connections without their calls.
    call("io-uring-setup", "io_uring_setup", libc::SYS_io_uring_setup, [0; 6]).mistake(6),
    call("io-uring-enter", "io_uring_enter", libc::SYS_io_uring_enter, [NO_FD, 0, 0, 0, 0, 0])
        .mistake(6),
    call(
        "io-uring-register",
        "io_uring_register",
        libc::SYS_io_uring_register,
        [NO_FD, 0, 0, 0, 0, 0],
    )
    .mistake(6),
    // The kernel's own interfaces.
    privileged("bpf", "bpf(2)", libc::SYS_bpf, [9999, 0, 0, 0, 0, 0]),
    call("perf-event-open", "perf_event_open", libc::SYS_perf_event_open, [0; 6]),
    call("userfaultfd", "page faults by descriptor", libc::SYS_userfaultfd, [1, 0, 0, 0, 0, 0]),
    privileged("fanotify-init", "fanotify_init", libc::SYS_fanotify_init, [0; 6]),
    call(
        "name-to-handle",
        "name_to_handle_at",
        libc::SYS_name_to_handle_at,
        [NO_FD, 0, 0, 0, 0, 0],
    ),
    privileged(
        "open-by-handle",
        "open_by_handle_at",
        libc::SYS_open_by_handle_at,
        [NO_FD, 0, 0, 0, 0, 0],
    ),
    call(
        "keyctl",
        "the session keyring",
        libc::SYS_keyctl,
        [0, (-3_i64).cast_unsigned(), 1, 0, 0, 0],
    ),
    call("add-key", "add_key", libc::SYS_add_key, [0; 6]),
    call("request-key", "request_key", libc::SYS_request_key, [0; 6]),
    privileged("init-module", "loading a module", libc::SYS_init_module, [0; 6]),
    privileged(
        "finit-module",
        "the same by descriptor",
        libc::SYS_finit_module,
        [NO_FD, 0, 0, 0, 0, 0],
    ),
    privileged("delete-module", "removing one", libc::SYS_delete_module, [0; 6]),
    privileged("kexec-load", "another kernel", libc::SYS_kexec_load, [0, 9999, 0, 0, 0, 0]),
    privileged(
        "kexec-file-load",
        "the same by descriptor",
        libc::SYS_kexec_file_load,
        [NO_FD, NO_FD, 0, 0, 0xFFFF, 0],
    ),
    privileged("reboot", "reboot(2)", libc::SYS_reboot, [0; 6]),
    privileged("swapon", "swapon(2)", libc::SYS_swapon, [0; 6]),
    privileged("swapoff", "swapoff(2)", libc::SYS_swapoff, [0; 6]),
    privileged("acct", "process accounting", libc::SYS_acct, [1, 0, 0, 0, 0, 0]),
    call("quotactl", "quotactl(2)", libc::SYS_quotactl, [0xFFFF_FFFF, 0, 0, 0, 0, 0]),
    call("quotactl-fd", "the same by descriptor", libc::SYS_quotactl_fd, [NO_FD, 0, 0, 0, 0, 0]),
    privileged("syslog", "the kernel\'s log", libc::SYS_syslog, [2, 0, 0, 0, 0, 0]),
    call("settimeofday", "the clock", libc::SYS_settimeofday, [1, 0, 0, 0, 0, 0]),
    call("clock-settime", "the clock", libc::SYS_clock_settime, [0; 6]),
    call("clock-adjtime", "the clock's speed", libc::SYS_clock_adjtime, [0; 6]),
    call("adjtimex", "the clock's speed", libc::SYS_adjtimex, [0; 6]),
    privileged(
        "setdomainname",
        "setdomainname(2)",
        libc::SYS_setdomainname,
        [0, NO_FD, 0, 0, 0, 0],
    ),
    call("lookup-dcookie", "lookup_dcookie", libc::SYS_lookup_dcookie, [0; 6]),
    #[cfg(target_arch = "x86_64")]
    call("iopl", "the machine's ports (iopl)", libc::SYS_iopl, [0; 6]).need(X86_64),
    #[cfg(target_arch = "x86_64")]
    privileged("ioperm", "the machine's ports (ioperm)", libc::SYS_ioperm, [0, 1, 1, 0, 0, 0])
        .need(X86_64),
    // Mounts, by the old and the new interface.
    call("mount", "mount(2)", libc::SYS_mount, [0; 6]),
    call("umount", "umount2(2)", libc::SYS_umount2, [0; 6]),
    privileged("pivot-root", "pivot_root(2)", libc::SYS_pivot_root, [0; 6]),
    privileged("fsopen", "fsopen(2)", libc::SYS_fsopen, [0; 6]).mistake(7),
    call("fsconfig", "fsconfig(2)", libc::SYS_fsconfig, [NO_FD, 0, 0, 0, 0, 0]).mistake(7),
    privileged("fsmount", "fsmount(2)", libc::SYS_fsmount, [NO_FD, 0, 0, 0, 0, 0]).mistake(7),
    privileged("fspick", "fspick(2)", libc::SYS_fspick, [NO_FD, 0, 0, 0, 0, 0]).mistake(7),
    call("open-tree", "open_tree(2)", libc::SYS_open_tree, [NO_FD, 0, 0, 0, 0, 0]).mistake(7),
    privileged("move-mount", "move_mount(2)", libc::SYS_move_mount, [NO_FD, 0, NO_FD, 0, 0, 0])
        .mistake(7),
    call("mount-setattr", "mount_setattr(2)", libc::SYS_mount_setattr, [NO_FD, 0, 0, 0, 0, 0])
        .mistake(7),
    call("open-tree-attr", "open_tree_attr(2)", OPEN_TREE_ATTR, [NO_FD, 0, 0, 0, 0, 0]).mistake(7),
    // Namespaces.
    call("setns", "setns(2)", libc::SYS_setns, [NO_FD, 0, 0, 0, 0, 0]),
    call("unshare-user", "a user namespace", libc::SYS_unshare, [NEWUSER, 0, 0, 0, 0, 0])
        .mistake(17),
    unshare("unshare-mount", "a mount namespace", NEWNS),
    unshare("unshare-net", "a network namespace", NEWNET),
    unshare("unshare-pid", "a PID namespace", NEWPID),
    unshare("unshare-ipc", "an IPC namespace", NEWIPC),
    unshare("unshare-uts", "a UTS namespace", NEWUTS),
    unshare("unshare-cgroup", "a cgroup namespace", NEWCGROUP).mistake(17),
    unshare("unshare-time", "a time namespace", NEWTIME),
    call("unshare-user-mount", "both at once", libc::SYS_unshare, [NEWUSER | NEWNS, 0, 0, 0, 0, 0])
        .mistake(17),
    call(
        "unshare-dirty",
        "a namespace, bits set above",
        libc::SYS_unshare,
        [NEWNET | DIRT, 0, 0, 0, 0, 0],
    )
    .mistake(2),
    Row::new("clone-user", Seccomp, EPERM, "clone(2) with a user namespace", Clone(NEWUSER))
        .mistake(17),
    clone("clone-mount", "clone(2) with a mount namespace", NEWNS),
    clone("clone-net", "clone(2) with a network namespace", NEWNET),
    clone("clone-pid", "clone(2) with a PID namespace", NEWPID),
    clone("clone-ipc", "clone(2) with an IPC namespace", NEWIPC),
    clone("clone-uts", "clone(2) with a UTS namespace", NEWUTS),
    clone("clone-cgroup", "clone(2) with a cgroup namespace", NEWCGROUP),
    Row::new(
        "clone3",
        Seccomp,
        ENOSYS,
        "clone3(2), whose flags no filter can see",
        Call(libc::SYS_clone3, [0; 6]),
    )
    .mistake(8),
    // What no path rule covers.
    call("memfd-create", "an anonymous file", libc::SYS_memfd_create, [0; 6]),
    call("memfd-secret", "a secret one", libc::SYS_memfd_secret, [u64::MAX, 0, 0, 0, 0, 0]),
    call(
        "execveat-descriptor",
        "executing a descriptor",
        libc::SYS_execveat,
        [NO_FD, 0, 0, 0, EMPTY_PATH, 0],
    ),
    call(
        "execveat-dirty",
        "the same, bits set above the flags",
        libc::SYS_execveat,
        [NO_FD, 0, 0, 0, EMPTY_PATH | DIRT, 0],
    )
    .mistake(2),
    // The terminal.
    call("tiocsti", "typing into the terminal", libc::SYS_ioctl, [0, 0x5412, 0, 0, 0, 0])
        .mistake(1),
    call(
        "tiocsti-dirty",
        "the same, bits set above the command",
        libc::SYS_ioctl,
        [0, 0x5412 | DIRT, 0, 0, 0, 0],
    )
    .mistake(2),
    call("tioclinux", "pasting into a console", libc::SYS_ioctl, [0, 0x541C, 0, 0, 0, 0])
        .mistake(1),
    call(
        "tioclinux-dirty",
        "the same, bits set above",
        libc::SYS_ioctl,
        [0, 0x541C | DIRT, 0, 0, 0, 0],
    )
    .mistake(2),
    call("tiocsetd", "a line discipline", libc::SYS_ioctl, [0, 0x5423, 0, 0, 0, 0]).mistake(1),
    call(
        "tiocsetd-dirty",
        "the same, bits set above",
        libc::SYS_ioctl,
        [0, 0x5423 | DIRT, 0, 0, 0, 0],
    )
    .mistake(2),
    // Filters of its own.
    call("seccomp-filter", "a filter of its own", libc::SYS_seccomp, [1, 0, 0, 0, 0, 0])
        .mistake(19),
    call(
        "seccomp-filter-dirty",
        "the same, bits set above",
        libc::SYS_seccomp,
        [1 | DIRT, 0, 0, 0, 0, 0],
    )
    .mistake(2),
    call(
        "seccomp-listener",
        "a filter that answers for others",
        libc::SYS_seccomp,
        [1, 8, 0, 0, 0, 0],
    )
    .mistake(19),
    call("prctl-seccomp", "a filter by prctl(2)", libc::SYS_prctl, [PR_SET_SECCOMP, 2, 0, 0, 0, 0]),
    call(
        "prctl-seccomp-dirty",
        "the same, bits set above",
        libc::SYS_prctl,
        [PR_SET_SECCOMP | DIRT, 2, 0, 0, 0, 0],
    )
    .mistake(2),
    call(
        "personality-no-randomize",
        "addresses that can be guessed",
        libc::SYS_personality,
        [0x0004_0000, 0, 0, 0, 0, 0],
    ),
    call(
        "personality-read-implies-exec",
        "memory that is executable",
        libc::SYS_personality,
        [0x0040_0000, 0, 0, 0, 0, 0],
    ),
    // Numbers of other tables.
    Row::new(
        "newer-than-the-table",
        Seccomp,
        ENOSYS,
        "a call that is newer than the table",
        Call(470, [0; 6]),
    )
    .also(&[Kernel])
    .mistake(8),
    Row::new(
        "far-beyond-the-table",
        Seccomp,
        ENOSYS,
        "a number that no kernel has",
        Call(100_000, [0; 6]),
    )
    .also(&[Kernel])
    .mistake(8),
    x32("x32-getpid", "getpid(2) of the x32 ABI", 39, [0; 6]),
    x32("x32-socket", "socket(2) of the x32 ABI", 41, [2, 3, 1, 0, 0, 0]),
    x32("x32-ptrace", "ptrace(2) of the x32 ABI", 521, [1, 0, 0, 0, 0, 0]),
    x32("x32-execve", "execve(2) of the x32 ABI", 520, [0; 6]),
    gate!("gate-getpid", "getpid(2) by the 32-bit gate", 20, 0),
    gate!("gate-socketcall", "socketcall(2) by the 32-bit gate", 102, 1),
    gate!("gate-socket", "socket(2) by the 32-bit gate", 359, 16),
    gate!("gate-unshare", "a user namespace by the 32-bit gate", 310, 0x1000_0000),
    gate!("gate-ptrace", "ptrace(2) by the 32-bit gate", 26, 1),
];

//! Groups of system calls that more than one filter refuses.

use super::assembler::{Rule, Verdict};

/// The highest call number that somebody has judged: `file_setattr` of Linux 6.17. Both
/// architectures number new calls alike.
pub(super) const LAST_KNOWN: u32 = 469;

/// `open_tree_attr`, Linux 6.15; the libc crate has no name for it yet.
const OPEN_TREE_ATTR: libc::c_long = 467;

/// `CLONE_NEW*` without `CLONE_NEWTIME`: namespaces of mounts, control groups, host names, IPC, users,
/// processes and networks.
pub(super) const CLONE_NEW_FLAGS: u32 = 0x7E02_0000;

pub(super) const fn eperm() -> Rule {
    Rule::Always(Verdict::Errno(libc::EPERM))
}

/// Reading, writing or holding another process.
pub(super) const OTHER_PROCESSES: &[libc::c_long] = &[
    libc::SYS_kcmp,
    libc::SYS_pidfd_getfd,
    libc::SYS_pidfd_open,
    libc::SYS_pidfd_send_signal,
    libc::SYS_process_madvise,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_ptrace,
];

/// Mounts by the old and the new interface.
pub(super) const MOUNTS: &[libc::c_long] = &[
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fsopen,
    libc::SYS_fspick,
    libc::SYS_mount,
    libc::SYS_mount_setattr,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    OPEN_TREE_ATTR,
    libc::SYS_pivot_root,
    libc::SYS_umount2,
];

/// Interfaces of the kernel that nothing in a pod needs, most of which want a capability anyway:
/// the second lock on the same door. `io_uring` is among them because it makes sockets and
/// connections that no filter sees.
pub(super) const KERNEL_INTERFACES: &[libc::c_long] = &[
    libc::SYS_acct,
    libc::SYS_adjtimex,
    libc::SYS_bpf,
    libc::SYS_clock_adjtime,
    libc::SYS_clock_settime,
    libc::SYS_delete_module,
    libc::SYS_fanotify_init,
    libc::SYS_finit_module,
    libc::SYS_init_module,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_io_uring_setup,
    libc::SYS_kexec_file_load,
    libc::SYS_kexec_load,
    libc::SYS_lookup_dcookie,
    libc::SYS_name_to_handle_at,
    libc::SYS_open_by_handle_at,
    libc::SYS_perf_event_open,
    libc::SYS_quotactl,
    libc::SYS_quotactl_fd,
    libc::SYS_reboot,
    libc::SYS_setdomainname,
    libc::SYS_sethostname,
    libc::SYS_settimeofday,
    libc::SYS_swapoff,
    libc::SYS_swapon,
    libc::SYS_syslog,
    libc::SYS_userfaultfd,
    libc::SYS_vhangup,
];

/// Ports of the machine, where the architecture has them.
#[cfg(target_arch = "x86_64")]
pub(super) const PLATFORM: &[libc::c_long] = &[libc::SYS_ioperm, libc::SYS_iopl];
#[cfg(not(target_arch = "x86_64"))]
pub(super) const PLATFORM: &[libc::c_long] = &[];

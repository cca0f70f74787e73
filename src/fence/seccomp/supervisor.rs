//! What the supervisor itself gives up. It is uid 0 with capabilities, so that a fault in it must
//! not reach parts of the kernel it has no use for. Installed on all its threads before the agent
//! is released; the proxy and the keeper were started before.

use std::collections::BTreeMap;

use super::assembler::{Table, Verdict};
use super::calls::{KERNEL_INTERFACES, LAST_KNOWN, MOUNTS, PLATFORM, eperm};

/// Memory of other processes: the supervisor reads /proc and takes descriptors by pidfd instead.
const MEMORY_OF_OTHERS: &[libc::c_long] = &[
    libc::SYS_kcmp,
    libc::SYS_process_madvise,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_ptrace,
];

pub(super) fn table() -> Table {
    let mut table = Table {
        foreign: Verdict::Errno(libc::EPERM),
        default: Verdict::Allow,
        last_known: LAST_KNOWN,
        unknown: Verdict::Errno(libc::ENOSYS),
        rules: BTreeMap::new(),
    };
    for group in [MEMORY_OF_OTHERS, KERNEL_INTERFACES, PLATFORM] {
        table.set(group, eperm());
    }
    table.set(&[libc::SYS_add_key, libc::SYS_request_key], eperm());
    table.set(MOUNTS, eperm());
    table
}

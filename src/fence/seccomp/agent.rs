//! The agent's filter: everything is allowed but what is named here.

use std::collections::BTreeMap;

use super::AgentOptions;
use super::assembler::{Clause, Rule, Table, Test, Verdict, Word};
use super::calls::{
    CLONE_NEW_FLAGS, KERNEL_INTERFACES, LAST_KNOWN, MOUNTS, OTHER_PROCESSES, PLATFORM, eperm,
};
use crate::policy::Memfd;

/// Files without a path, which no file rule covers.
const ANONYMOUS_FILES: &[libc::c_long] = &[libc::SYS_memfd_create, libc::SYS_memfd_secret];

const MFD_NOEXEC_SEAL: u32 = 0x8;
const MFD_EXEC: u32 = 0x10;
/// A file that can be neither executed nor made executable later. The flag must be there: what a
/// file is without it depends on a sysctl. Its pages can still be mapped executable, as any memory.
const NOT_EXECUTABLE: &[Clause] = &[Clause {
    tests: &[low(1, MFD_NOEXEC_SEAL | MFD_EXEC, &[MFD_NOEXEC_SEAL])],
    verdict: Verdict::Allow,
}];

/// Session keyrings are shared by everything the same login started.
const KEYRINGS: &[libc::c_long] = &[libc::SYS_add_key, libc::SYS_keyctl, libc::SYS_request_key];

/// `personality` values that change nothing for security, as container runtimes allow them: Linux,
/// 32-bit `uname`, 2.6 version string, both, and the query.
const PERSONALITIES: &[u32] = &[0, 0x0008, 0x0002_0000, 0x0002_0008, u32::MAX];

/// `SOCK_NONBLOCK` and `SOCK_CLOEXEC` ride on the socket type.
const TYPE_WITHOUT_FLAGS: u32 = !0o2_004_000;

const ALL: u32 = u32::MAX;
const AF_UNIX: u32 = 1;
const AF_INET: u32 = 2;
const AF_INET6: u32 = 10;
const AF_NETLINK: u32 = 16;
const STREAM: u32 = 1;
const DGRAM: u32 = 2;
const RAW: u32 = 3;
const SEQPACKET: u32 = 5;
const TCP: u32 = 6;
const UDP: u32 = 17;

const fn low(argument: u8, mask: u32, one_of: &'static [u32]) -> Test {
    Test { word: Word::Low(argument), mask, one_of }
}

/// An allow list: families are added to kernels faster than to deny lists. MPTCP, SCTP, UDP-Lite
/// and ping are protocols of the internet families, so those name their protocols too. Netlink
/// is for routes only, which `getaddrinfo` and `getifaddrs` read; a netlink datagram socket is
/// also called raw.
const SOCKETS: &[Clause] = &[
    Clause {
        tests: &[low(0, ALL, &[AF_UNIX]), low(1, TYPE_WITHOUT_FLAGS, &[STREAM, DGRAM, SEQPACKET])],
        verdict: Verdict::Allow,
    },
    Clause {
        tests: &[
            low(0, ALL, &[AF_INET, AF_INET6]),
            low(1, TYPE_WITHOUT_FLAGS, &[STREAM]),
            low(2, ALL, &[0, TCP]),
        ],
        verdict: Verdict::Allow,
    },
    Clause {
        tests: &[
            low(0, ALL, &[AF_INET, AF_INET6]),
            low(1, TYPE_WITHOUT_FLAGS, &[DGRAM]),
            low(2, ALL, &[0, UDP]),
        ],
        verdict: Verdict::Allow,
    },
    Clause {
        tests: &[
            low(0, ALL, &[AF_NETLINK]),
            low(1, TYPE_WITHOUT_FLAGS, &[DGRAM, RAW]),
            low(2, ALL, &[0]),
        ],
        verdict: Verdict::Allow,
    },
];

/// A connection that opens by sending does not pass connect(2), where callers are recorded.
/// EOPNOTSUPP is what a kernel without TCP Fast Open says; clients then connect the usual way.
const fn without_fast_open(tests: &'static [Test]) -> [Clause; 1] {
    [Clause { tests, verdict: Verdict::Allow }]
}
const MSG_FASTOPEN: u32 = 0x2000_0000;
const FLAGS_THIRD: [Clause; 1] = without_fast_open(&[low(2, MSG_FASTOPEN, &[0])]);
const FLAGS_FOURTH: [Clause; 1] = without_fast_open(&[low(3, MSG_FASTOPEN, &[0])]);

/// `TCP_FASTOPEN_CONNECT` for the same reason, `TCP_ULP` because it turns a TCP socket into another
/// kind (TLS, SMC, MPTCP).
const SOCKET_OPTIONS: &[Clause] = &[Clause {
    tests: &[low(1, ALL, &[TCP]), low(2, ALL, &[30, 31])],
    verdict: Verdict::Errno(libc::ENOPROTOOPT),
}];

/// Typing into a terminal (TIOCSTI), pasting into a console (TIOCLINUX), changing a line
/// discipline (TIOCSETD). The kernel reads the command from the low half.
const TERMINAL_COMMANDS: &[Clause] = &[Clause {
    tests: &[low(1, ALL, &[0x5412, 0x541C, 0x5423])],
    verdict: Verdict::Errno(libc::EPERM),
}];

/// Any new namespace. The low byte of clone's flags is a signal, so `CLONE_NEWTIME` cannot be one.
const CLONE: &[Clause] =
    &[Clause { tests: &[low(0, CLONE_NEW_FLAGS, &[0])], verdict: Verdict::Allow }];

/// What unshare may separate without a new namespace: memory, file system information,
/// descriptors, signal handlers, the thread, semaphore adjustments. An allow list, both halves.
const UNSHARE: &[Clause] = &[Clause {
    tests: &[low(0, !0x0005_0F00, &[0]), Test { word: Word::High(0), mask: ALL, one_of: &[0] }],
    verdict: Verdict::Allow,
}];

/// `AT_EMPTY_PATH` runs a descriptor that may have no path at all.
const EXECVEAT: &[Clause] = &[Clause { tests: &[low(4, 0x1000, &[0])], verdict: Verdict::Allow }];

/// A filter of the agent's own could hide what it does from ours, or answer for the supervisor.
const SECCOMP: &[Clause] =
    &[Clause { tests: &[low(0, ALL, &[1])], verdict: Verdict::Errno(libc::EPERM) }];
const PRCTL: &[Clause] =
    &[Clause { tests: &[low(0, ALL, &[22])], verdict: Verdict::Errno(libc::EPERM) }];

const PERSONALITY: &[Clause] =
    &[Clause { tests: &[low(0, ALL, PERSONALITIES)], verdict: Verdict::Allow }];

pub(super) fn table(options: AgentOptions) -> Table {
    let refuse = eperm();
    let eperm = Verdict::Errno(libc::EPERM);
    let mut table = Table {
        foreign: eperm,
        default: Verdict::Allow,
        last_known: LAST_KNOWN,
        unknown: Verdict::Errno(libc::ENOSYS),
        rules: BTreeMap::new(),
    };
    for group in [OTHER_PROCESSES, KERNEL_INTERFACES, MOUNTS, KEYRINGS, PLATFORM] {
        table.set(group, refuse);
    }
    table.set(&[libc::SYS_setns], refuse);
    match options.memfd {
        Memfd::Deny => table.set(ANONYMOUS_FILES, refuse),
        Memfd::Noexec => {
            table.set(&[libc::SYS_memfd_create], Rule::ByArgument(NOT_EXECUTABLE, eperm));
            table.set(&[libc::SYS_memfd_secret], refuse);
        }
        Memfd::Allow => {}
    }
    // Its flags are in memory, where a filter cannot read them. The C library then uses clone.
    table.set(&[libc::SYS_clone3], Rule::Always(Verdict::Errno(libc::ENOSYS)));
    table.set(&[libc::SYS_clone], Rule::ByArgument(CLONE, eperm));
    table.set(&[libc::SYS_unshare], Rule::ByArgument(UNSHARE, eperm));
    table.set(&[libc::SYS_execveat], Rule::ByArgument(EXECVEAT, eperm));
    table.set(&[libc::SYS_ioctl], Rule::ByArgument(TERMINAL_COMMANDS, Verdict::Allow));
    table.set(&[libc::SYS_seccomp], Rule::ByArgument(SECCOMP, Verdict::Allow));
    table.set(&[libc::SYS_prctl], Rule::ByArgument(PRCTL, Verdict::Allow));
    table.set(&[libc::SYS_personality], Rule::ByArgument(PERSONALITY, eperm));
    table.set(&[libc::SYS_socket, libc::SYS_socketpair], Rule::ByArgument(SOCKETS, eperm));
    let unsupported = Verdict::Errno(libc::EOPNOTSUPP);
    table.set(&[libc::SYS_sendmsg], Rule::ByArgument(&FLAGS_THIRD, unsupported));
    table
        .set(&[libc::SYS_sendto, libc::SYS_sendmmsg], Rule::ByArgument(&FLAGS_FOURTH, unsupported));
    table.set(&[libc::SYS_setsockopt], Rule::ByArgument(SOCKET_OPTIONS, Verdict::Allow));
    table
}

//! The filters, run over every call number, three architectures and chosen arguments.

use std::collections::BTreeSet;

use super::assembler::{NATIVE_ARCH, X32_BIT};
use super::interpreter::{Call, run};
use super::*;

pub(super) const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
const NOTIFY: u32 = libc::SECCOMP_RET_USER_NOTIF;
/// i386 and the 64-bit ARM's or Intel's, whichever is not ours.
const FOREIGN: [u32; 2] =
    [0x4000_0003, if NATIVE_ARCH == 0xC000_003E { 0xC000_00B7 } else { 0xC000_003E }];
/// What a careless comparison of 64 bits would trip over.
pub(super) const GARBAGE: u64 = 0xDEAD_BEEF_0000_0000;

pub(super) fn refused(errno: i32) -> u32 {
    libc::SECCOMP_RET_ERRNO | errno.unsigned_abs()
}

fn call(program: &Program, nr: libc::c_long, args: [u64; 6]) -> u32 {
    let nr = u32::try_from(nr).unwrap();
    run(&program.code, &Call { nr, arch: NATIVE_ARCH, args }).0
}

fn programs() -> [Program; 6] {
    [
        agent(AgentOptions::default()),
        agent(AgentOptions { memfd: Memfd::Noexec }),
        agent(AgentOptions { memfd: Memfd::Allow }),
        connect_listener(),
        proxy(),
        supervisor(),
    ]
}

/// Numbers at the edges of what a register holds.
const EXTREMES: [u32; 12] = [
    1024,
    0xFFFF,
    0x1_0000,
    0x3FFF_FFFE,
    X32_BIT - 1,
    X32_BIT,
    X32_BIT + 1,
    0x7FFF_FFFF,
    0x8000_0000,
    0xBFFF_FFFF,
    0xFFFF_FFFE,
    u32::MAX,
];

#[test]
fn other_architectures_and_x32_are_refused() {
    // Those that exist, those that differ from ours in one bit, and none.
    let foreign: Vec<u32> = FOREIGN
        .into_iter()
        .chain([0, u32::MAX, 0x4000_0028, 0xC000_0015, 0x8000_0016, 0xC000_00F3])
        .chain((0..32).map(|bit| NATIVE_ARCH ^ (1 << bit)))
        .collect();
    for program in programs() {
        let listener = program == connect_listener();
        let expected = if listener { ALLOW } else { refused(libc::EPERM) };
        for nr in (0..1024).chain(EXTREMES) {
            for args in [[0; 6], [u64::MAX; 6]] {
                for arch in &foreign {
                    let (answer, _) = run(&program.code, &Call { nr, arch: *arch, args });
                    assert_eq!(answer, expected, "{program:?} call {nr} of {arch:#x}");
                }
                let x32 = Call { nr: nr | X32_BIT, arch: NATIVE_ARCH, args };
                assert_eq!(run(&program.code, &x32).0, expected, "{program:?} x32 call {nr}");
            }
        }
        // x32's own calls without their bit, and the edges: numbers of no call.
        for nr in (512..548).chain(EXTREMES) {
            let (answer, _) = run(&program.code, &Call { nr, arch: NATIVE_ARCH, args: [0; 6] });
            assert_eq!(answer == ALLOW, listener, "{program:?} call {nr:#x}");
        }
    }
}

#[test]
fn programs_are_short_and_every_answer_is_near() {
    for program in programs() {
        assert!(program.len() <= 512, "{program:?}");
        let longest = (0..1024)
            .map(|nr| run(&program.code, &Call { nr, arch: NATIVE_ARCH, args: [0; 6] }).1)
            .max();
        println!("{program:?}: at most {longest:?} run for one call");
        assert!(longest <= Some(48), "{program:?}: {longest:?} instructions for one call");
    }
}

#[test]
fn sockets() {
    let program = agent(AgentOptions::default());
    let flags = u64::from(0o2_004_000_u32);
    let allowed: BTreeSet<(u64, u64, u64)> = [
        (1, 1, 0),
        (1, 2, 0),
        (1, 5, 0),
        (2, 1, 0),
        (2, 1, 6),
        (2, 2, 0),
        (2, 2, 17),
        (10, 1, 0),
        (10, 1, 6),
        (10, 2, 0),
        (10, 2, 17),
        (16, 2, 0),
        (16, 3, 0),
    ]
    .into();
    for family in 0..64 {
        for kind in 0..16 {
            // TCP, UDP, ICMP, SCTP, UDP-Lite, raw, SMC, MPTCP among them.
            for protocol in [0, 1, 6, 17, 33, 58, 132, 136, 255, 256, 262] {
                let expected = allowed.contains(&(family, kind, protocol))
                    || (family == 1 && [1, 2, 5].contains(&kind));
                let expected = if expected { ALLOW } else { refused(libc::EPERM) };
                for (a, b, c) in [
                    (family, kind, protocol),
                    (family, kind | flags, protocol),
                    (family | GARBAGE, kind | GARBAGE, protocol | GARBAGE),
                ] {
                    for nr in [libc::SYS_socket, libc::SYS_socketpair] {
                        let answer = call(&program, nr, [a, b, c, 0, 0, 0]);
                        assert_eq!(answer, expected, "{nr} {a:#x} {b:#x} {c:#x}");
                    }
                }
            }
        }
    }
    let unknown_flag = call(&program, libc::SYS_socket, [2, 1 | 0x10, 0, 0, 0, 0]);
    assert_eq!(unknown_flag, refused(libc::EPERM));
}

/// (call, argument's index, value, answer), each tried with zero and with garbage above.
#[test]
fn arguments_by_their_low_half() {
    let program = agent(AgentOptions::default());
    let eperm = refused(libc::EPERM);
    let fast_open = refused(libc::EOPNOTSUPP);
    let mut rows = vec![
        (libc::SYS_ioctl, 1, 0x5412, eperm),
        (libc::SYS_ioctl, 1, 0x541C, eperm),
        (libc::SYS_ioctl, 1, 0x5423, eperm),
        (libc::SYS_ioctl, 1, 0x5401, ALLOW),
        (libc::SYS_execveat, 4, 0x1000, eperm),
        (libc::SYS_execveat, 4, 0x1100, eperm),
        (libc::SYS_execveat, 4, 0x0100, ALLOW),
        (libc::SYS_seccomp, 0, 1, eperm),
        (libc::SYS_seccomp, 0, 2, ALLOW),
        (libc::SYS_prctl, 0, 22, eperm),
        (libc::SYS_prctl, 0, 38, ALLOW),
        (libc::SYS_sendto, 3, 0x2000_0000, fast_open),
        (libc::SYS_sendto, 3, 0x2000_4000, fast_open),
        (libc::SYS_sendto, 3, 0x4000, ALLOW),
        (libc::SYS_sendmsg, 2, 0x2000_0000, fast_open),
        (libc::SYS_sendmsg, 2, 0x40, ALLOW),
        (libc::SYS_sendmmsg, 3, 0x2000_0000, fast_open),
        (libc::SYS_sendmmsg, 3, 0x40, ALLOW),
        (libc::SYS_personality, 0, 0xFFFF_FFFF, ALLOW),
        (libc::SYS_personality, 0, 0x0002_0000, ALLOW),
        (libc::SYS_personality, 0, 0x0040_0000, eperm),
        (libc::SYS_personality, 0, 0x0004_0000, eperm),
        (libc::SYS_clone, 0, 0x0120_0011, ALLOW),
        (libc::SYS_clone, 0, 0x003D_0F00, ALLOW),
    ];
    for shift in [17, 25, 26, 27, 28, 29, 30] {
        rows.push((libc::SYS_clone, 0, 1 << shift | 0x11, eperm));
    }
    for (nr, index, value, expected) in rows {
        for high in [0, GARBAGE] {
            let mut args = [0; 6];
            args[index] = value | high;
            assert_eq!(call(&program, nr, args), expected, "{nr} {value:#x} {high:#x}");
        }
    }
}

#[test]
fn unshare_is_an_allow_list_of_both_halves() {
    let program = agent(AgentOptions::default());
    let try_flags = |flags: u64| call(&program, libc::SYS_unshare, [flags, 0, 0, 0, 0, 0]);
    for shift in 0..64 {
        let harmless = [8, 9, 10, 11, 16, 18].contains(&shift);
        let expected = if harmless { ALLOW } else { refused(libc::EPERM) };
        assert_eq!(try_flags(1 << shift), expected, "bit {shift}");
        // A harmless flag beside it changes nothing.
        assert_eq!(try_flags(1 << shift | 0x200), expected, "bit {shift} and CLONE_FS");
    }
}

#[test]
fn socket_options() {
    let program = agent(AgentOptions::default());
    for level in [0_u64, 1, 6, 17, 41] {
        for option in [1_u64, 23, 30, 31] {
            let refuse = level == 6 && option >= 30;
            let expected = if refuse { refused(libc::ENOPROTOOPT) } else { ALLOW };
            for high in [0, GARBAGE] {
                let args = [3, level | high, option | high, 0, 0, 0];
                assert_eq!(call(&program, libc::SYS_setsockopt, args), expected);
            }
        }
    }
}

#[test]
fn memfd_is_a_choice() {
    let eperm = refused(libc::EPERM);
    // (flags, answer under deny, noexec, allow); the name's address and what lies above are noise.
    for (flags, noexec) in [
        (0x0, eperm),
        (0x1, eperm),
        (0x2, eperm),
        (0x8, ALLOW),
        (0x9, ALLOW),
        (0xB, ALLOW),
        (0x4 | 0x8, ALLOW),
        (0x10, eperm),
        (0x18, eperm),
        (0x1 | 0x2 | 0x8 | 0x10, eperm),
    ] {
        for high in [0, GARBAGE, 0x8_0000_0000] {
            let args = [0x7FFF_0008, flags | high, 8, 8, 8, 8];
            for (memfd, expected) in
                [(Memfd::Deny, eperm), (Memfd::Noexec, noexec), (Memfd::Allow, ALLOW)]
            {
                let program = agent(AgentOptions { memfd });
                let answer = call(&program, libc::SYS_memfd_create, args);
                assert_eq!(answer, expected, "{memfd:?} {flags:#x} {high:#x}");
            }
        }
    }
    for (memfd, secret) in [(Memfd::Deny, eperm), (Memfd::Noexec, eperm), (Memfd::Allow, ALLOW)] {
        let program = agent(AgentOptions { memfd });
        assert_eq!(call(&program, libc::SYS_memfd_secret, [8; 6]), secret, "{memfd:?}");
        // Nothing else changes with it.
        for nr in 0..1024 {
            if nr != libc::SYS_memfd_create && nr != libc::SYS_memfd_secret {
                let default = call(&agent(AgentOptions::default()), nr, [0; 6]);
                assert_eq!(call(&program, nr, [0; 6]), default, "{memfd:?} call {nr}");
            }
        }
    }
}

#[test]
fn the_listener_reports_connect_and_nothing_else() {
    let program = connect_listener();
    for nr in 0..1024 {
        let expected = if nr == libc::SYS_connect { NOTIFY } else { ALLOW };
        assert_eq!(call(&program, nr, [GARBAGE; 6]), expected, "call {nr}");
    }
}

#[test]
fn the_proxy_makes_no_process_and_no_code() {
    let program = proxy();
    let eperm = refused(libc::EPERM);
    for nr in [
        libc::SYS_execve,
        libc::SYS_execveat,
        libc::SYS_kill,
        libc::SYS_ptrace,
        libc::SYS_setns,
        libc::SYS_unshare,
        libc::SYS_mount,
        libc::SYS_unlinkat,
        libc::SYS_memfd_create,
        libc::SYS_io_uring_setup,
        libc::SYS_seccomp,
        libc::SYS_setresuid,
    ] {
        assert_eq!(call(&program, nr, [0; 6]), eperm, "call {nr}");
    }
    let thread = 0x003D_0F00;
    assert_eq!(call(&program, libc::SYS_clone, [thread, 0, 0, 0, 0, 0]), ALLOW);
    assert_eq!(call(&program, libc::SYS_clone, [0x11, 0, 0, 0, 0, 0]), eperm);
    assert_eq!(call(&program, libc::SYS_clone, [thread | 1 << 28, 0, 0, 0, 0, 0]), eperm);
    assert_eq!(call(&program, libc::SYS_clone3, [0; 6]), refused(libc::ENOSYS));
    assert_eq!(call(&program, libc::SYS_mmap, [0, 0, 3, 0, 0, 0]), ALLOW);
    assert_eq!(call(&program, libc::SYS_mmap, [0, 0, 5, 0, 0, 0]), eperm);
    assert_eq!(call(&program, libc::SYS_mprotect, [0, 0, 7 | GARBAGE, 0, 0, 0]), eperm);
    assert_eq!(call(&program, libc::SYS_socket, [2, 1, 0, 0, 0, 0]), ALLOW);
    assert_eq!(call(&program, libc::SYS_socket, [1, 1, 0, 0, 0, 0]), eperm);
    assert_eq!(call(&program, libc::SYS_socketpair, [1, 1, 0, 0, 0, 0]), ALLOW);
    assert_eq!(call(&program, libc::SYS_prlimit64, [0, 3, 0, 1, 0, 0]), ALLOW);
    assert_eq!(call(&program, libc::SYS_prlimit64, [0, 3, 1 << 40, 1, 0, 0]), eperm);
    assert_eq!(call(&program, libc::SYS_read, [0; 6]), ALLOW);
}

#[test]
fn the_supervisor_no_longer_mounts() {
    let eperm = refused(libc::EPERM);
    for nr in calls::MOUNTS {
        assert_eq!(call(&supervisor(), *nr, [0; 6]), eperm);
    }
    for program in [supervisor()] {
        for nr in [libc::SYS_bpf, libc::SYS_kexec_load, libc::SYS_ptrace, libc::SYS_init_module] {
            assert_eq!(call(&program, nr, [0; 6]), eperm);
        }
        // What it builds the fence and its children with.
        for nr in [
            libc::SYS_unshare,
            libc::SYS_setns,
            libc::SYS_clone3,
            libc::SYS_seccomp,
            libc::SYS_keyctl,
            libc::SYS_memfd_create,
            libc::SYS_pidfd_getfd,
            libc::SYS_execveat,
        ] {
            assert_eq!(call(&program, nr, [u64::MAX; 6]), ALLOW, "call {nr}");
        }
    }
}

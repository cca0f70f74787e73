//! System calls as an attacker makes them: by number, with any arguments.

use rustix::io::Errno;
use rustix::process::{Pid, WaitOptions, waitpid};

use super::Seen;
use crate::fence::spawn::{check, exit_now};

/// Bits above an `int` argument. The kernel ignores them; a filter that compares all 64 bits is
/// passed by with them.
pub(super) const DIRT: u64 = 0xDEAD_BEEF_0000_0000;

/// A descriptor that is none, as a 64-bit argument.
pub(super) const NO_FD: u64 = u64::MAX;

/// One system call.
pub(super) fn call(nr: libc::c_long, args: [u64; 6]) -> rustix::io::Result<i64> {
    // SAFETY: pointers among the arguments are null, or addresses of values that the caller keeps
    // until the call returns. The process is a child that was forked for this one attempt and
    // holds nothing that a call could take away.
    check(unsafe { libc::syscall(nr, args[0], args[1], args[2], args[3], args[4], args[5]) })
}

/// What the result of a call says. It is given where it is made.
#[allow(clippy::needless_pass_by_value)]
pub(super) fn seen<T>(result: rustix::io::Result<T>) -> Seen {
    match result {
        Ok(_) => Seen::Worked,
        Err(errno) => Seen::Errno(errno.raw_os_error()),
    }
}

/// The same for the standard library's results.
pub(super) fn seen_io<T>(result: std::io::Result<T>) -> Seen {
    match result {
        Ok(_) => Seen::Worked,
        Err(error) => match error.raw_os_error() {
            Some(errno) => Seen::Errno(errno),
            None => Seen::Broken(error.to_string()),
        },
    }
}

/// The address of a value, for a call's argument.
pub(super) fn address<T: ?Sized>(value: &T) -> u64 {
    std::ptr::from_ref(value).cast::<u8>() as usize as u64
}

/// The same of a value that the kernel writes.
pub(super) fn address_mut<T: ?Sized>(value: &mut T) -> u64 {
    std::ptr::from_mut(value).cast::<u8>() as usize as u64
}

/// clone(2) without the C library; what it makes ends at once.
pub(super) fn clone(flags: u64) -> Seen {
    let child_ended = libc::SIGCHLD.unsigned_abs();
    match call(libc::SYS_clone, [flags | u64::from(child_ended), 0, 0, 0, 0, 0]) {
        Ok(0) => exit_now(0),
        Ok(pid) => {
            let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
            let _ = waitpid(pid, WaitOptions::empty());
            Seen::Worked
        }
        Err(errno) => Seen::Errno(errno.raw_os_error()),
    }
}

/// A call by the 32-bit gate, which every 64-bit process may use where the kernel has it. Its
/// numbers are other ones.
#[cfg(target_arch = "x86_64")]
pub(super) fn by_32_bit_gate(nr: u32, first: u32, second: u32) -> Seen {
    use crate::fence::spawn::{Forked, fork};

    /// What the child ends with when the call succeeded.
    const WORKED: i32 = 255;
    match fork() {
        Err(errno) => Seen::Broken(format!("cannot fork: {errno}")),
        Ok(Forked::Child) => {
            let result: u32;
            // SAFETY: the gate takes numbers in registers, and clobbers only the result and what
            // it says. rbx belongs to the compiler, so it is put back. The attempts give numbers
            // and null, so that the kernel writes no memory of ours.
            unsafe {
                std::arch::asm!(
                    "xchg {first:r}, rbx",
                    "int 0x80",
                    "xchg {first:r}, rbx",
                    first = inout(reg) u64::from(first) => _,
                    inlateout("eax") nr => result,
                    in("ecx") second,
                    in("edx") 0,
                    in("esi") 0,
                    in("edi") 0,
                    out("r8") _,
                    out("r9") _,
                    out("r10") _,
                    out("r11") _,
                );
            }
            let result = result.cast_signed();
            exit_now(if (-254..0).contains(&result) { -result } else { WORKED })
        }
        Ok(Forked::Parent(pid)) => match waitpid(Some(pid), WaitOptions::empty()) {
            Ok(Some((_, status))) => match (status.exit_status(), status.terminating_signal()) {
                (Some(WORKED), _) => Seen::Worked,
                (Some(errno), _) => Seen::Errno(errno),
                // A general protection fault: the gate is not there.
                (_, Some(libc::SIGSEGV)) => {
                    Seen::Skipped("this kernel has no 32-bit system calls".to_owned())
                }
                (_, signal) => Seen::Broken(format!("ended by signal {signal:?}")),
            },
            other => Seen::Broken(format!("waitpid: {other:?}")),
        },
    }
}

#[cfg(not(target_arch = "x86_64"))]
pub(super) fn by_32_bit_gate(_: u32, _: u32, _: u32) -> Seen {
    Seen::Skipped("only x86-64 has this".to_owned())
}

/// setsockopt(2) with an `int`.
pub(super) fn set_option(fd: impl std::os::fd::AsFd, level: i32, name: i32, value: i32) -> Seen {
    use std::os::fd::AsRawFd;
    let number = |number: i32| u64::from(number.unsigned_abs());
    let fd = number(fd.as_fd().as_raw_fd());
    let args = [fd, number(level), number(name), address(&value), 4, 0];
    seen(call(libc::SYS_setsockopt, args))
}

/// Whether a descriptor is open.
pub(super) fn is_open(fd: i32) -> bool {
    // SAFETY: the call takes numbers.
    check(unsafe { libc::fcntl(fd, libc::F_GETFD) }.into()) != Err(Errno::BADF)
}

/// prctl(2).
pub(super) fn prctl(option: i32, args: [u64; 4]) -> rustix::io::Result<i64> {
    let [a, b, c, d] = args;
    call(libc::SYS_prctl, [u64::from(option.unsigned_abs()), a, b, c, d, 0])
}

//! Giving up identity and capabilities, and reading back that they are gone.
//!
//! Everything here changes the calling **thread** by raw system calls. The C library's `setuid`
//! family signals all threads and takes locks; between fork and exec there is one thread, and the
//! supervisor's [`as_uid`] wants one thread only. Nothing here allocates, looks a name up or takes
//! a lock.

use rustix::io::Errno;
use rustix::process::{DumpableBehavior, Pid, Signal};
use rustix::thread::{CapabilitiesSecureBits, CapabilitySet, CapabilitySets, Gid, Uid};

use super::spawn::{ChildStep, check};

/// Who a process becomes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// User id, not 0.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// All supplementary groups; empty means none.
    pub groups: Vec<u32>,
}

/// A step of the drop that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{step}: {errno}")]
pub struct StepError {
    /// Which one.
    pub step: ChildStep,
    /// What the kernel said. EPERM at a read-back means that the kernel reports other credentials
    /// than were set.
    pub errno: Errno,
}

/// What is done where `CAP_SETPCAP` is missing, which emptying the bounding set and locking the
/// securebits need.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bounding {
    /// It is an error.
    Required,
    /// Both are left as they are, and [`Dropped`] says so. With `no_new_privs` and four empty sets
    /// the bounding set gives nothing back.
    IfPermitted,
}

impl Bounding {
    /// What a process with the caller's capabilities can do: with `CAP_SETPCAP` a refusal is an
    /// error, without it the loss is let pass and told.
    #[must_use]
    pub fn of_this_process() -> Self {
        if has(Capability::SETPCAP) { Self::Required } else { Self::IfPermitted }
    }
}

/// A capability, for [`has`].
pub use rustix::thread::CapabilitySet as Capability;

/// Whether this thread has a capability in effect.
#[must_use]
pub fn has(capability: Capability) -> bool {
    rustix::thread::capabilities(None).is_ok_and(|sets| sets.effective.contains(capability))
}

/// A session keyring of this process's own: the one it has may be shared with everything that the
/// runtime started. Most runtimes' filters refuse this; then the agent uses no keyring at all, as
/// its own filter refuses the calls. Async-signal-safe.
pub fn own_session_keyring() -> rustix::io::Result<()> {
    const JOIN_SESSION_KEYRING: libc::c_ulong = 1;
    // SAFETY: a null name asks for an anonymous keyring.
    let result = unsafe {
        libc::syscall(libc::SYS_keyctl, JOIN_SESSION_KEYRING, std::ptr::null::<libc::c_char>())
    };
    check(result).map(drop)
}

/// What [`drop_to`] could do beyond what it must.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dropped {
    /// The bounding set is empty.
    pub bounding: bool,
    /// The securebits are locked.
    pub securebits: bool,
}

/// Capabilities have numbers below this: the sets are 64 bits wide.
const CAPABILITIES: libc::c_ulong = 64;

/// Groups compared one by one at the read-back; of more, the number is compared.
const GROUPS_READ_BACK: usize = 256;

/// Becomes `identity` without any capability, for good.
///
/// The order matters: the bounding set and the securebits need `CAP_SETPCAP`, groups and user need
/// `CAP_SETGID` and `CAP_SETUID`, and with the locked `NO_SETUID_FIXUP` a change of user no longer
/// clears the sets, so that is done last and by hand. Then five sets, ids and groups are read
/// back, and becoming root again is tried: it must fail.
///
/// Changing the user clears the parent death signal and the dumpable flag; set the former later.
pub fn drop_to(identity: &Identity, bounding: Bounding) -> Result<Dropped, StepError> {
    if identity.uid == 0 || identity.uid == u32::MAX || identity.gid == u32::MAX {
        return Err(StepError { step: ChildStep::Uid, errno: Errno::INVAL });
    }
    let dropped = Dropped {
        bounding: optional(empty_bounding_set(), bounding, ChildStep::Bounding)?,
        securebits: {
            at(ChildStep::Ambient, rustix::thread::clear_ambient_capability_set())?;
            optional(lock_securebits(), bounding, ChildStep::Securebits)?
        },
    };
    at(ChildStep::Groups, set_groups(&identity.groups))?;
    let gid = Gid::from_raw(identity.gid);
    at(ChildStep::Gid, rustix::thread::set_thread_res_gid(gid, gid, gid))?;
    let uid = Uid::from_raw(identity.uid);
    at(ChildStep::Uid, rustix::thread::set_thread_res_uid(uid, uid, uid))?;
    at(ChildStep::Capabilities, rustix::thread::set_capabilities(None, NO_CAPABILITY))?;
    at(ChildStep::ReadBack, read_back(identity, dropped))?;
    at(ChildStep::Regain, cannot_regain(identity))?;
    Ok(dropped)
}

const NO_CAPABILITY: CapabilitySets = CapabilitySets {
    effective: CapabilitySet::empty(),
    permitted: CapabilitySet::empty(),
    inheritable: CapabilitySet::empty(),
};

fn at<T>(step: ChildStep, result: rustix::io::Result<T>) -> Result<T, StepError> {
    result.map_err(|errno| StepError { step, errno })
}

fn optional(
    result: rustix::io::Result<()>,
    bounding: Bounding,
    step: ChildStep,
) -> Result<bool, StepError> {
    match result {
        Ok(()) => Ok(true),
        Err(Errno::PERM) if bounding == Bounding::IfPermitted => Ok(false),
        Err(errno) => Err(StepError { step, errno }),
    }
}

/// Up to the last capability that this kernel knows, which may be more than this program does.
fn empty_bounding_set() -> rustix::io::Result<()> {
    for capability in 0..CAPABILITIES {
        match prctl(libc::PR_CAPBSET_READ, capability, 0) {
            Ok(0) => {}
            Ok(_) => {
                prctl(libc::PR_CAPBSET_DROP, capability, 0)?;
            }
            // The kernel has no such capability, nor a higher one.
            Err(Errno::INVAL) if capability > 0 => break,
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

/// Root's uid gives nothing, changing the uid changes nothing, nothing becomes ambient; for good.
const SECUREBITS: CapabilitiesSecureBits = CapabilitiesSecureBits::NO_ROOT
    .union(CapabilitiesSecureBits::NO_ROOT_LOCKED)
    .union(CapabilitiesSecureBits::NO_SETUID_FIXUP)
    .union(CapabilitiesSecureBits::NO_SETUID_FIXUP_LOCKED)
    .union(CapabilitiesSecureBits::KEEP_CAPS_LOCKED)
    .union(CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE)
    .union(CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE_LOCKED);

fn lock_securebits() -> rustix::io::Result<()> {
    rustix::thread::set_capabilities_secure_bits(SECUREBITS)
}

/// Always called, also for none: otherwise root's groups stay.
fn set_groups(groups: &[u32]) -> rustix::io::Result<()> {
    // SAFETY: the pointer and the length describe `groups`, which the kernel only reads.
    let result = unsafe { libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()) };
    check(result).map(drop)
}

fn read_back(identity: &Identity, dropped: Dropped) -> rustix::io::Result<()> {
    let differs = Err(Errno::PERM);
    if rustix::thread::capabilities(None)? != NO_CAPABILITY {
        return differs;
    }
    for capability in 0..CAPABILITIES {
        let bounding = match prctl(libc::PR_CAPBSET_READ, capability, 0) {
            Ok(value) => value,
            Err(Errno::INVAL) => break,
            Err(errno) => return Err(errno),
        };
        let is_set = libc::c_ulong::from(libc::PR_CAP_AMBIENT_IS_SET.unsigned_abs());
        let ambient = prctl(libc::PR_CAP_AMBIENT, is_set, capability)?;
        if ambient != 0 || (dropped.bounding && bounding != 0) {
            return differs;
        }
    }
    // /proc does not show these, so only here can they be read.
    if dropped.securebits && rustix::thread::capabilities_secure_bits()? != SECUREBITS {
        return differs;
    }
    let (mut real, mut effective, mut saved) = (0, 0, 0);
    // SAFETY: three valid places for three ids; the call is a plain system call.
    check(unsafe { libc::getresuid(&raw mut real, &raw mut effective, &raw mut saved) }.into())?;
    if [real, effective, saved] != [identity.uid; 3] {
        return differs;
    }
    // SAFETY: as above.
    check(unsafe { libc::getresgid(&raw mut real, &raw mut effective, &raw mut saved) }.into())?;
    if [real, effective, saved] != [identity.gid; 3] || !groups_are(&identity.groups)? {
        return differs;
    }
    Ok(())
}

fn groups_are(groups: &[u32]) -> rustix::io::Result<bool> {
    // SAFETY: size 0 asks for the number only and writes nothing.
    let number = check(unsafe { libc::getgroups(0, std::ptr::null_mut()) }.into())?;
    if usize::try_from(number) != Ok(groups.len()) {
        return Ok(false);
    }
    let mut have = [0; GROUPS_READ_BACK];
    if groups.len() > have.len() {
        return Ok(true);
    }
    // SAFETY: the buffer has room for the number given with it.
    let number = check(unsafe { libc::getgroups(256, have.as_mut_ptr()) }.into())?;
    let have = have.get(..usize::try_from(number).unwrap_or(0)).unwrap_or(&[]);
    Ok(groups.iter().all(|group| have.contains(group)))
}

/// Each of these would succeed for a process that kept something.
fn cannot_regain(identity: &Identity) -> rustix::io::Result<()> {
    let regained = Err(Errno::NOTRECOVERABLE);
    if rustix::thread::set_thread_res_uid(None, Uid::ROOT, None) != Err(Errno::PERM) {
        return regained;
    }
    if identity.gid != 0
        && rustix::thread::set_thread_res_gid(None, Gid::ROOT, None) != Err(Errno::PERM)
    {
        return regained;
    }
    if set_groups(&[]) != Err(Errno::PERM) {
        return regained;
    }
    Ok(())
}

fn prctl(option: i32, first: libc::c_ulong, second: libc::c_ulong) -> rustix::io::Result<i64> {
    let none: libc::c_ulong = 0;
    // SAFETY: the options used in this file take numbers, no pointers.
    check(unsafe { libc::prctl(option, first, second, none, none) }.into())
}

/// Runs `f` with the effective uid `uid` on this thread only, then is root again. This is how the
/// supervisor signals the agent without `CAP_KILL`: the kernel compares the sender's effective uid
/// with the receiver's. Real and saved uid stay 0, so the agent may not signal this thread.
///
/// `f` should do nothing else: its files are the agent's too. The process is undumpable from then
/// on, as the kernel does at each change of user. Aborts when root does not come back: the process
/// would go on half privileged.
pub fn as_uid<T>(uid: u32, f: impl FnOnce() -> T) -> rustix::io::Result<T> {
    if uid == u32::MAX {
        return Err(Errno::INVAL);
    }
    // The kernel clears the signal at each change of user, here twice.
    let death_signal = rustix::process::parent_process_death_signal()?;
    let parent = rustix::process::getppid();
    let back = BackToRoot { death_signal, parent };
    if let Err(errno) = rustix::thread::set_thread_res_uid(None, Uid::from_raw(uid), None) {
        std::mem::forget(back);
        return Err(errno);
    }
    let result = f();
    drop(back);
    Ok(result)
}

/// Root again, also when `f` panics.
struct BackToRoot {
    death_signal: Option<Signal>,
    parent: Option<Pid>,
}

impl Drop for BackToRoot {
    fn drop(&mut self) {
        if rustix::thread::set_thread_res_uid(None, Uid::ROOT, None).is_err() {
            std::process::abort();
        }
        if self.death_signal.is_some() {
            let set = rustix::process::set_parent_process_death_signal(self.death_signal);
            // The parent may have died meanwhile, when there was no signal to send.
            if set.is_err() || rustix::process::getppid() != self.parent {
                std::process::abort();
            }
        }
    }
}

/// SIGKILL for this process when the thread that forked it ends. ESRCH when the parent is not
/// `expected` any more (`None`: it is outside this PID namespace). A later change of user clears
/// it. Async-signal-safe.
pub fn parent_death_signal_kill(expected: Option<Pid>) -> rustix::io::Result<()> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    if rustix::process::getppid() == expected { Ok(()) } else { Err(Errno::SRCH) }
}

/// No exec of this thread's gives it anything any more. Async-signal-safe.
pub fn no_new_privs() -> rustix::io::Result<()> {
    rustix::thread::set_no_new_privs(true)
}

/// No core dump, no ptrace by the same user, /proc files owned by root; until the next exec.
pub fn undumpable() -> rustix::io::Result<()> {
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_is_not_an_identity_to_drop_to() {
        for (uid, gid) in [(0, 1000), (u32::MAX, 1000), (1000, u32::MAX)] {
            let identity = Identity { uid, gid, groups: Vec::new() };
            let error = drop_to(&identity, Bounding::Required).unwrap_err();
            assert_eq!((error.step, error.errno), (ChildStep::Uid, Errno::INVAL));
        }
        assert_eq!(as_uid(u32::MAX, || ()), Err(Errno::INVAL));
    }

    #[test]
    fn errors_name_the_step() {
        let error = StepError { step: ChildStep::Bounding, errno: Errno::PERM };
        assert!(error.to_string().starts_with("capability bounding set: "));
    }
}

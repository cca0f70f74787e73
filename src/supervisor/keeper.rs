//! The keeper: the process from which everything in the fence is forked.
//!
//! It is forked while the supervisor has one thread, makes the fence's network namespace its own,
//! takes on the Landlock domain, and from then on only forks: the agent, and what `enter` asks
//! for. So every fenced process comes from one prepared template, in one domain, and a signal
//! scope never stands between them. It stays uid 0 (it has to give up the user's identity anew
//! for each child) but hears nobody except the supervisor.
//!
//! It has one thread for all its life: that is what makes its forks sound.

mod message;

use std::collections::HashMap;
use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;

use anyhow::Context;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, WaitOptions, WaitStatus};

pub use message::{Confinement, FromKeeper, Prepared, ToKeeper};

use super::{packet, resolv_conf};
use crate::fence::credentials::{self, Bounding, Capability, Identity};
use crate::fence::landlock::{self, Access, PathRule};
use crate::fence::netlink::Route;
use crate::fence::seccomp::{self, AgentOptions};
use crate::fence::sockdiag::SockDiag;
use crate::fence::spawn::{self, ExecImage, Forked, Template};
use crate::fence::{netns, rlimits, sysctl};
use crate::policy::{Memfd, ProcessLimits};

/// Forks the keeper; the calling process must have one thread.
///
/// With `own_pids` it is the init of a PID namespace of its own: where the supervisor is not
/// PID 1 that is what ends everything in the fence when the supervisor ends.
pub fn start(own_pids: bool) -> io::Result<(Pid, OwnedFd)> {
    let (ours, theirs) = packet::pair()?;
    let parent = rustix::process::getpid();
    let our_pids = std::fs::File::open("/proc/self/ns/pid")?;
    if own_pids {
        #[allow(deprecated, reason = "the replacement is unsafe for flags that are not used here")]
        rustix::thread::unshare(rustix::thread::UnshareFlags::NEWPID)?;
    }
    match spawn::fork()? {
        Forked::Parent(pid) => {
            if own_pids {
                // Threads cannot be made while children would go to another PID namespace.
                let kind = Some(rustix::thread::LinkNameSpaceType::ProcessID);
                rustix::thread::move_into_link_name_space(our_pids.as_fd(), kind)?;
            }
            Ok((pid, ours))
        }
        Forked::Child => {
            drop(ours);
            let expected = (!own_pids).then_some(parent);
            let end = Keeper::new(theirs, expected, own_pids).and_then(Keeper::serve);
            spawn::exit_now(i32::from(end.is_err()))
        }
    }
}

/// Tells the keeper what all children share; everything it forks after this is confined.
pub fn prepare(keeper: impl AsFd, prepare: &ToKeeper) -> anyhow::Result<()> {
    packet::send(keeper, prepare, &[]).context("the keeper does not listen")
}

/// How many that have ended are reaped before other things are looked at.
pub const REAPED_AT_ONCE: usize = 256;
const NOW: rustix::event::Timespec = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };

struct Keeper {
    supervisor: OwnedFd,
    signals: SignalFd,
    /// See [`Prepared::own_proc`].
    own_proc: Option<Result<(), String>>,
    template: Option<Shared>,
    children: HashMap<u64, Child>,
}

/// What all children have in common.
struct Shared {
    filter: seccomp::Program,
    listener: Option<seccomp::Program>,
    bounding: Bounding,
    limits: ProcessLimits,
}

struct Child {
    pid: Pid,
    uid: u32,
}

impl Keeper {
    fn new(supervisor: OwnedFd, parent: Option<Pid>, own_pids: bool) -> io::Result<Self> {
        credentials::parent_death_signal_kill(parent)?;
        credentials::undumpable()?;
        let mask = SigSet::from(Signal::SIGCHLD);
        mask.thread_block()?;
        let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        let mut keeper =
            Self { supervisor, signals, own_proc: None, template: None, children: HashMap::new() };
        if let Err(what) = keeper.make_namespaces(own_pids) {
            keeper.tell(&FromKeeper::Failed { what })?;
        }
        Ok(keeper)
    }

    fn make_namespaces(&mut self, own_pids: bool) -> Result<(), String> {
        let namespace = netns::unshare().map_err(|error| error.to_string())?;
        let route = Route::open().map_err(|error| error.to_string())?;
        let diag = SockDiag::open().map_err(|error| error.to_string())?;
        packet::send(
            &self.supervisor,
            &FromKeeper::Namespace,
            &[namespace.as_fd(), route.as_fd(), diag.as_fd()],
        )
        .map_err(|error| format!("cannot hand over the fence's namespace: {error}"))?;
        // The supervisor builds on the network meanwhile. A landlocked process cannot mount, so
        // this comes before the domain.
        self.own_proc = own_pids.then(|| mount_proc().map_err(|error| error.to_string()));
        Ok(())
    }

    /// Serves until the supervisor's end closes; then everything in the fence is to end, and does,
    /// since each child's parent-death signal is set on this process.
    fn serve(mut self) -> io::Result<()> {
        let mut more = false;
        loop {
            let mut ready = [
                PollFd::new(&self.supervisor, PollFlags::IN),
                PollFd::new(&self.signals, PollFlags::IN),
            ];
            match poll(&mut ready, more.then_some(&NOW)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            let (message, signal) =
                (!ready[0].revents().is_empty(), !ready[1].revents().is_empty());
            if signal {
                while self.signals.read_signal()?.is_some() {}
            }
            if signal || more {
                more = self.reap()?;
            }
            if message {
                let Some(packet) = packet::receive(&self.supervisor)? else {
                    return Ok(());
                };
                self.handle(packet)?;
            }
        }
    }

    fn handle(&mut self, packet: packet::Packet) -> io::Result<()> {
        let answer = match packet.json()? {
            ToKeeper::Prepare { rules, hard, listener, sysctls, resolv_conf, memfd, limits } => {
                // Before the domain, which holds no way to them.
                let sysctls = sysctl::apply(&sysctls);
                let own_proc = self.own_proc.take();
                let own_mounts = matches!(own_proc, Some(Ok(())));
                let resolv_conf = resolv_conf.map_or(Ok(()), |file| {
                    resolv_conf::mount(&file, own_mounts).map_err(|error| error.to_string())
                });
                self.prepare(rules, hard, listener, memfd, limits).map(|confinement| {
                    FromKeeper::Prepared(Prepared { confinement, own_proc, sysctls, resolv_conf })
                })
            }
            ToKeeper::Spawn { id, argc, workdir, uid, gid, groups, tty } => {
                let identity = Identity { uid, gid, groups };
                return match self.spawn(id, argc, workdir, identity, tty, packet) {
                    Ok(()) => Ok(()),
                    Err(what) => self.tell(&FromKeeper::Failed { what }),
                };
            }
            ToKeeper::Signal { id, signal } => {
                self.signal(id, signal);
                return Ok(());
            }
        };
        self.tell(&answer.unwrap_or_else(|what| FromKeeper::Failed { what }))
    }

    fn prepare(
        &mut self,
        rules: Vec<(PathBuf, bool)>,
        hard: bool,
        listener: bool,
        memfd: Memfd,
        limits: ProcessLimits,
    ) -> Result<Confinement, String> {
        if let Some(what) = rlimits::too_high(limits)
            && !credentials::has(Capability::SYS_RESOURCE)
        {
            return Err(format!(
                "{what}: give a lower one, or add SYS_RESOURCE to the container's \
                                securityContext.capabilities"
            ));
        }
        // Each child joins one of its own; that the kernel lets it is tried here, once.
        let keyring = credentials::own_session_keyring().err().map(|errno| errno.to_string());
        let bounding = Bounding::of_this_process();
        let access = |write| {
            if write { Access::ReadWrite } else { Access::ReadOnly }
        };
        let rules: Vec<_> = rules
            .into_iter()
            .map(|(path, write)| PathRule { path, access: access(write) })
            .collect();
        let report = landlock::prepare(&rules, hard)
            .and_then(landlock::Prepared::enforce)
            .map_err(|error| format!("landlock: {error}"))?;
        let (missing, unconfined) = match report.enforced {
            landlock::Enforced::Full => (None, false),
            landlock::Enforced::Partial(what) => (Some(what), false),
            landlock::Enforced::None(why) => (Some(why), true),
        };
        self.template = Some(Shared {
            filter: seccomp::agent(AgentOptions { memfd }),
            listener: listener.then(seccomp::connect_listener),
            bounding,
            limits,
        });
        Ok(Confinement {
            abi: report.abi,
            applied: report.applied,
            skipped: report.skipped,
            missing,
            unconfined,
            scopes: report.scopes,
            rights: report.rights,
            errata: report.errata.into_iter().map(str::to_owned).collect(),
            bounding: bounding == Bounding::Required,
            keyring,
            memfd,
            limits,
        })
    }

    fn spawn(
        &mut self,
        id: u64,
        argc: usize,
        workdir: PathBuf,
        identity: Identity,
        tty: bool,
        packet: packet::Packet,
    ) -> Result<(), String> {
        let shared = self.template.as_ref().ok_or("asked to fork before it was told how")?;
        let [stdin, stdout, stderr, control, words] =
            packet.exactly().map_err(|error| error.to_string())?;
        let (path, argv, environment) = read_words(words, argc)?;
        let uid = identity.uid;
        let template = Template {
            filters: vec![shared.filter.clone()],
            listener: shared.listener.clone(),
            identity,
            limits: shared.limits,
            bounding: shared.bounding,
            exec: ExecImage::new(path, argv, environment),
            workdir: c_path(workdir)?,
            umask: 0o022,
            tty,
        };
        let stdio = [stdin.as_raw_fd(), stdout.as_raw_fd(), stderr.as_raw_fd()];
        let this = rustix::process::getpid();
        match spawn::fork().map_err(|error| format!("cannot fork: {error}"))? {
            Forked::Child => template.run_child(stdio, control.as_raw_fd(), Some(this)),
            Forked::Parent(pid) => {
                self.children.insert(id, Child { pid, uid });
                // A child that is already dead still has its pidfd: it is reaped only by us.
                let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty())
                    .map_err(|error| format!("cannot open a pidfd: {error}"))?;
                packet::send(&self.supervisor, &FromKeeper::Spawned { id }, &[pidfd.as_fd()])
                    .map_err(|error| format!("cannot tell of a child: {error}"))
            }
        }
    }

    /// Signals as the child's own user: `CAP_KILL` is not granted. The pid is the child's for
    /// certain, since only this process reaps it.
    fn signal(&self, id: u64, signal: i32) {
        let Some(child) = self.children.get(&id) else {
            return;
        };
        // Before the child has changed its user the signal of another uid is refused; root's own
        // is not.
        let as_user = credentials::as_uid(child.uid, || spawn::kill(child.pid, signal));
        if !matches!(as_user, Ok(Ok(()))) {
            // It may have ended.
            let _ = spawn::kill(child.pid, signal);
        }
    }

    /// Reaps what has ended: our children, and, as init of a PID namespace, orphans. Returns
    /// whether there may be more: who forks fast must not keep us from hearing the supervisor.
    fn reap(&mut self) -> io::Result<bool> {
        for _ in 0..REAPED_AT_ONCE {
            let (pid, status) = match rustix::process::wait(WaitOptions::NOHANG) {
                Ok(Some(ended)) => ended,
                Ok(None) | Err(rustix::io::Errno::CHILD) => return Ok(false),
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            };
            let Some(code) = exit_code(status) else {
                continue;
            };
            let id = self.children.iter().find(|(_, child)| child.pid == pid).map(|(id, _)| *id);
            if let Some(id) = id {
                self.children.remove(&id);
                self.tell(&FromKeeper::Exited { id, code })?;
            }
        }
        Ok(true)
    }

    fn tell(&self, message: &FromKeeper) -> io::Result<()> {
        packet::send(&self.supervisor, message, &[])
    }
}

/// The code that a shell would report; `None` for a process that only stopped.
#[must_use]
pub fn exit_code(status: WaitStatus) -> Option<i32> {
    status.exit_status().or_else(|| Some(128 + status.terminating_signal()?))
}

/// Splits what lies in the memfd into the path, the arguments and the environment.
pub(super) fn read_words(
    words: OwnedFd,
    argc: usize,
) -> Result<(CString, Vec<CString>, Vec<CString>), String> {
    let mut bytes = Vec::new();
    let mut file = File::from(words);
    io::Seek::rewind(&mut file)
        .and_then(|()| file.read_to_end(&mut bytes))
        .map_err(|error| format!("cannot read the words of a command: {error}"))?;
    let mut words = bytes
        .split_inclusive(|byte| *byte == 0)
        .map(|word| CString::from_vec_with_nul(word.to_vec()).map_err(|error| error.to_string()));
    let path = words.next().ok_or("no words of a command")??;
    let argv = words.by_ref().take(argc).collect::<Result<Vec<_>, _>>()?;
    let environment = words.collect::<Result<Vec<_>, _>>()?;
    if argv.len() != argc || argv.is_empty() {
        return Err(format!("{} arguments came where {argc} were due", argv.len()));
    }
    Ok((path, argv, environment))
}

fn c_path(path: PathBuf) -> Result<CString, String> {
    use std::os::unix::ffi::OsStringExt;
    CString::new(path.into_os_string().into_vec()).map_err(|error| error.to_string())
}

/// Gives the fence a /proc that shows its own PID namespace, in a mount namespace of the keeper.
fn mount_proc() -> io::Result<()> {
    use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
    #[allow(deprecated, reason = "the replacement is unsafe for flags that are not used here")]
    rustix::thread::unshare(rustix::thread::UnshareFlags::NEWNS)?;
    mount_change("/", MountPropagationFlags::REC | MountPropagationFlags::PRIVATE)?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("proc", "/proc", "proc", flags, None)?;
    Ok(())
}

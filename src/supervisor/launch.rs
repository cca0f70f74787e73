//! Starting a process in the fence: the keeper forks it, it gives up everything, and it runs only
//! after this process has seen from outside that nothing is left (DESIGN section 2, step 7).

use std::collections::{BTreeMap, VecDeque};
use std::ffi::{CString, OsString};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use rustix::io::Errno;
use rustix::process::{Pid, Signal};

use super::caller::Callers;
use super::filesystem::NotFound;
use super::keeper::{FromKeeper, Prepared, ToKeeper};
use super::packet;
use super::signals::{START, timespec};
use crate::event::{self, Class, Event, Severity};
use crate::fence::credentials::Identity;
use crate::fence::notify::Listener;
use crate::fence::spawn::{self, ChildMessage, ChildStep};
use crate::fence::status::{self, Status};

/// The keeper as the supervisor's main thread sees it.
#[derive(Debug)]
pub struct Keeper {
    socket: OwnedFd,
    /// Device and inode of the fence's network namespace.
    namespace: (u64, u64),
    callers: Arc<Callers>,
    /// Ends of children that were told of while something else was awaited.
    ended: VecDeque<(u64, i32)>,
    next: u64,
    filters: u32,
    /// Children's bounding sets are emptied.
    bounding: bool,
}

/// A command to run in the fence.
#[derive(Debug, Clone)]
pub struct Command {
    /// The executable, found already.
    pub path: CString,
    /// Its arguments, its own name first.
    pub argv: Vec<String>,
    /// Its environment.
    pub env: BTreeMap<OsString, OsString>,
    /// Its working directory.
    pub workdir: PathBuf,
    /// Who it becomes.
    pub identity: Identity,
    /// Stdin is a terminal that becomes its controlling one.
    pub tty: bool,
}

/// A process that runs in the fence.
#[derive(Debug, Clone, Copy)]
pub struct Launched {
    /// Its name towards the keeper.
    pub id: u64,
    /// Its pid in this PID namespace.
    pub pid: Pid,
}

/// A process between its fork and its exec.
#[derive(Debug)]
pub struct Starting {
    /// It, as it will be called.
    pub launched: Launched,
    /// When to give it up.
    pub until: Instant,
    /// What it executes.
    pub path: CString,
    control: OwnedFd,
    identity: Identity,
}

/// How far a child came with one message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Heard {
    /// A step of its way.
    Step,
    /// It waits to be released, and was seen to have given up everything.
    Verified,
    /// It has executed.
    Executed,
}

impl AsFd for Starting {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.control.as_fd()
    }
}

/// Why a command does not run.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The fence held, but the command could not be executed.
    #[error("cannot execute {}: {}{}", command.escape_debug(), errno_text(*errno), likely(*errno))]
    Exec {
        /// The executable's path.
        command: String,
        /// execve's answer.
        errno: Errno,
    },
    /// There is no such program.
    #[error(transparent)]
    NotFound(#[from] NotFound),
    /// A part of the fence could not be applied or was not seen from outside.
    #[error("{0:#}")]
    Fence(anyhow::Error),
}

impl LaunchError {
    /// The exit code that stands for it: 127 not found, 126 not executable, 125 the fence.
    #[must_use]
    pub fn exit_code(&self) -> i32 {
        match self {
            Self::NotFound(NotFound { executable: false, .. })
            | Self::Exec { errno: Errno::NOENT, .. } => 127,
            Self::NotFound(_) | Self::Exec { .. } => 126,
            Self::Fence(_) => 125,
        }
    }
}

fn errno_text(errno: Errno) -> io::Error {
    io::Error::from(errno)
}

/// The kernel counts a uid's processes when it changes, and refuses at exec.
fn likely(errno: Errno) -> &'static str {
    if errno == Errno::AGAIN {
        ": process.limits.processes is used up: the kernel counts all of the uid's on the node"
    } else {
        ""
    }
}

/// A step of the child that failed, with the cause where one is likely.
fn refused(step: ChildStep, errno: Errno) -> anyhow::Error {
    match step.needs() {
        Some(capability) if errno == Errno::PERM => anyhow!(
            "{step}: {}: CAP_{capability} is missing: add {capability} to the container's \
             securityContext.capabilities",
            errno_text(errno)
        ),
        _ => anyhow!("{step}: {}", errno_text(errno)),
    }
}

impl Keeper {
    /// `callers` gets the connect listener of each child; `listener` says whether there is one.
    #[must_use]
    pub fn new(
        socket: OwnedFd,
        namespace: (u64, u64),
        callers: Arc<Callers>,
        listener: bool,
    ) -> Self {
        let filters = 1 + u32::from(listener);
        Self {
            socket,
            namespace,
            callers,
            ended: VecDeque::new(),
            next: 1,
            filters,
            bounding: true,
        }
    }

    /// Waits for the answer to [`ToKeeper::Prepare`].
    pub fn prepared(&mut self) -> Result<Prepared> {
        match receive(&self.socket)? {
            (FromKeeper::Prepared(prepared), _) => {
                self.bounding = prepared.confinement.bounding;
                Ok(prepared)
            }
            (other, _) => bail!("the keeper answered {other:?}"),
        }
    }

    /// Has a command's process forked. It strips itself meanwhile, and executes only after
    /// [`Self::verified`] and [`Self::finish`], or [`Self::advance`], have seen and released it.
    pub fn begin(
        &mut self,
        command: Command,
        stdio: [BorrowedFd<'_>; 3],
    ) -> Result<Starting, LaunchError> {
        let (control, theirs) = packet::pair().map_err(|error| LaunchError::Fence(error.into()))?;
        let launched = self.fork(&command, stdio, theirs).map_err(LaunchError::Fence)?;
        let until = Instant::now() + PATIENCE;
        Ok(Starting { launched, control, until, path: command.path, identity: command.identity })
    }

    /// Waits until a child that was begun has given up everything, and has seen so from outside. It
    /// waits for its release then.
    pub fn verified(&mut self, starting: &Starting) -> Result<(), LaunchError> {
        match self.hear_until(starting, |heard| heard != Heard::Step, "is not confined yet")? {
            Heard::Verified => Ok(()),
            // Only its end closes the socket before its release.
            _ => Err(LaunchError::Fence(anyhow!("the child ended before it was released"))),
        }
    }

    /// Releases a child that was verified and waits until it has executed.
    pub fn finish(&mut self, starting: &Starting) -> Result<Launched, LaunchError> {
        self.release(starting)?;
        let executed = |heard| heard == Heard::Executed;
        self.hear_until(starting, executed, "is not executed yet")?;
        Ok(starting.launched)
    }

    /// Hears a child until there is what was waited for. After an error it is killed.
    fn hear_until(
        &mut self,
        starting: &Starting,
        done: impl Fn(Heard) -> bool,
        not_yet: &str,
    ) -> Result<Heard, LaunchError> {
        // What it waited for us does not count. Nothing else runs in the fence yet that could stop
        // it, and its program may have to be fetched first, as lazily pulled images are.
        let until = Instant::now() + START;
        loop {
            if let Err(error) = wait_for(&starting.control, until) {
                self.give_up(starting);
                let what = format!("{} {not_yet}", starting.path.to_string_lossy());
                return Err(LaunchError::Fence(anyhow!(error).context(what)));
            }
            let heard = self.hear(starting).inspect_err(|_| self.give_up(starting))?;
            if done(heard) {
                return Ok(heard);
            }
        }
    }

    /// Hears one message of a child that starts, which is there ([`Starting::as_fd`] is readable),
    /// verifies and releases the child on the way; `true`: it has executed. After an error it is
    /// killed.
    pub fn advance(&mut self, starting: &Starting) -> Result<bool, LaunchError> {
        let heard = self.hear(starting).inspect_err(|_| self.give_up(starting))?;
        if heard == Heard::Verified {
            self.release(starting)?;
        }
        Ok(heard == Heard::Executed)
    }

    fn release(&self, starting: &Starting) -> Result<(), LaunchError> {
        spawn::release(&starting.control)
            .context("cannot release the child")
            .inspect_err(|_| self.give_up(starting))
            .map_err(LaunchError::Fence)
    }

    /// Kills a child that starts: it may wait for a word that will not come, or stand stopped.
    pub fn give_up(&self, starting: &Starting) {
        let _ = self.signal(starting.launched.id, Signal::KILL.as_raw());
    }

    fn hear(&self, starting: &Starting) -> Result<Heard, LaunchError> {
        let Starting { launched, control, .. } = starting;
        let message =
            spawn::receive(control).context("cannot hear the child").map_err(LaunchError::Fence)?;
        match message {
            ChildMessage::Listener(listener) => self.callers.serve(Listener::new(listener)),
            ChildMessage::Warning(step, errno) => event::inform(|| {
                Event::new(Class::Config, "DEGRADED", Severity::Info)
                    .subject(format!("{step}: {}", errno_text(errno)))
                    .field("pid", launched.pid.as_raw_nonzero())
            }),
            ChildMessage::Failed(ChildStep::Exec, errno) => {
                let command = starting.path.to_string_lossy().into_owned();
                return Err(LaunchError::Exec { command, errno });
            }
            ChildMessage::Failed(step, errno) => {
                return Err(LaunchError::Fence(refused(step, errno)));
            }
            ChildMessage::Ready => {
                self.verify(launched.pid, &starting.identity).map_err(LaunchError::Fence)?;
                return Ok(Heard::Verified);
            }
            // The socket is close-on-exec: its end is the exec's success.
            ChildMessage::Closed => return Ok(Heard::Executed),
        }
        Ok(Heard::Step)
    }

    fn fork(
        &mut self,
        command: &Command,
        [stdin, stdout, stderr]: [BorrowedFd<'_>; 3],
        control: OwnedFd,
    ) -> Result<Launched> {
        let id = self.next;
        self.next += 1;
        let words = words(command).context("cannot write the command's words")?;
        let Identity { uid, gid, ref groups } = command.identity;
        let spawn = ToKeeper::Spawn {
            id,
            argc: command.argv.len(),
            workdir: command.workdir.clone(),
            uid,
            gid,
            groups: groups.clone(),
            tty: command.tty,
        };
        let descriptors = [stdin, stdout, stderr, control.as_fd(), words.as_fd()];
        packet::send(&self.socket, &spawn, &descriptors).context("the keeper does not listen")?;
        // Ours must be closed, or the child's end is never seen.
        drop(control);
        loop {
            match receive(&self.socket)? {
                (FromKeeper::Spawned { .. }, mut descriptors) if descriptors.len() == 1 => {
                    let pid = pid_of(&descriptors.remove(0))?;
                    return Ok(Launched { id, pid });
                }
                (FromKeeper::Exited { id, code }, _) => self.ended.push_back((id, code)),
                (FromKeeper::Failed { what }, _) => bail!("{what}"),
                (other, _) => bail!("the keeper answered {other:?}"),
            }
        }
    }

    /// What the kernel says of the child, read from outside while it waits.
    fn verify(&self, pid: Pid, identity: &Identity) -> Result<()> {
        let status = Status::read(pid, None).context("cannot read the child's status")?;
        let verified = if self.bounding {
            status.verify_fenced(identity, self.filters)
        } else {
            status.verify_fenced_but_bounding(identity, self.filters)
        };
        verified.context("the child is not fenced")?;
        let namespace =
            status::net_namespace(pid).context("cannot read the child's network namespace")?;
        if namespace != self.namespace {
            bail!("the child is in another network namespace than the fence's");
        }
        Ok(())
    }

    /// Sends a signal to a child.
    pub fn signal(&self, id: u64, signal: i32) -> io::Result<()> {
        packet::send(&self.socket, &ToKeeper::Signal { id, signal }, &[])
    }

    /// Children that have ended, with their exit codes; `None` when the keeper itself has.
    ///
    /// Call when [`Self::as_fd`] is readable, and once after each launch.
    pub fn ended(&mut self) -> Result<Option<Vec<(u64, i32)>>> {
        let mut ended: Vec<_> = self.ended.drain(..).collect();
        while readable(self.socket.as_fd())? {
            let Some(packet) = packet::receive(&self.socket)? else {
                return Ok(None);
            };
            match packet.json()? {
                FromKeeper::Exited { id, code } => ended.push((id, code)),
                other => bail!("the keeper said {other:?}"),
            }
        }
        Ok(Some(ended))
    }
}

impl AsFd for Keeper {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// The next message of the keeper; its end is an error.
pub fn receive(socket: impl AsFd) -> Result<(FromKeeper, Vec<OwnedFd>)> {
    let packet = packet::receive(socket)?.context("the keeper has ended")?;
    match packet.json()? {
        FromKeeper::Failed { what } => bail!("{what}"),
        message => Ok((message, packet.descriptors)),
    }
}

/// How long a child may take from its fork to its exec. What runs in the fence already has the
/// child's user by then and could stop it with a signal; the supervisor must not stand with it.
const PATIENCE: Duration = Duration::from_secs(5);

fn wait_for(fd: &OwnedFd, until: Instant) -> io::Result<()> {
    use rustix::event::{PollFd, PollFlags, poll};
    loop {
        let left = until.saturating_duration_since(Instant::now());
        match poll(&mut [PollFd::new(fd, PollFlags::IN)], Some(&timespec(left))) {
            Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn readable(fd: BorrowedFd<'_>) -> io::Result<bool> {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    Ok(poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)], Some(&now))? > 0)
}

/// The pid behind a pidfd in this process's own numbers (`Pid:` of its fdinfo, proc(5)): the
/// keeper may count in a PID namespace of its own.
fn pid_of(pidfd: &OwnedFd) -> Result<Pid> {
    let path = format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd());
    let info = std::fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    info.lines()
        .find_map(|line| line.strip_prefix("Pid:")?.trim().parse().ok())
        // -1 stands for one that was reaped; as a pid it would be everybody's.
        .filter(|pid: &i32| *pid > 0)
        .and_then(Pid::from_raw)
        .context("the child has no pid here: it has ended")
}

/// Puts path, arguments and environment into a memfd, each ended by NUL.
fn words(command: &Command) -> io::Result<OwnedFd> {
    let memfd = rustix::fs::memfd_create("ringfence-words", rustix::fs::MemfdFlags::CLOEXEC)?;
    let mut bytes = Vec::new();
    let mut push = |word: Vec<u8>| -> io::Result<()> {
        bytes.extend_from_slice(CString::new(word)?.as_bytes_with_nul());
        Ok(())
    };
    push(command.path.to_bytes().to_vec())?;
    for word in &command.argv {
        push(word.clone().into_bytes())?;
    }
    for (name, value) in &command.env {
        let mut pair = name.clone().into_vec();
        pair.push(b'=');
        pair.extend(value.clone().into_vec());
        push(pair)?;
    }
    File::from(memfd.try_clone()?).write_all(&bytes)?;
    Ok(memfd)
}

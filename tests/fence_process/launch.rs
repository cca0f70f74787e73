//! Plays supervisor and keeper for one agent.

use std::ffi::CString;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use ringfence::fence::credentials::{Bounding, Identity};
use ringfence::fence::landlock::{self, PathRule};
use ringfence::fence::notify::{self, Listener, Target};
use ringfence::fence::rlimits::Limits;
use ringfence::fence::seccomp::{self, AgentOptions};
use ringfence::fence::spawn::{self, ChildMessage, ChildStep, ExecImage, Forked, Template};
use ringfence::fence::status::{self, Mismatch, Status};
use ringfence::policy::Memfd;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};
use rustix::thread::{CapabilitySet, capabilities, set_capabilities};

use super::{Outcomes, Scratch};

/// The agent's user and group.
pub const AGENT: u32 = 54_321;

/// What becomes of an agent that is ready.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    Release,
    NoRelease,
    KillKeeper,
}

pub struct Launch<'a> {
    pub probe: &'a [&'a str],
    pub program: Option<PathBuf>,
    pub rules: Option<Vec<PathRule>>,
    pub workdir: &'a str,
    pub listen: bool,
    pub setpcap: bool,
    pub bounding: Bounding,
    pub limits: Limits,
    pub memfd: Memfd,
    pub ending: Ending,
    pub tty: bool,
}

impl Default for Launch<'_> {
    fn default() -> Self {
        Self {
            probe: &[],
            program: None,
            rules: None,
            workdir: "/",
            listen: false,
            setpcap: true,
            bounding: Bounding::Required,
            limits: Limits { open_files: Some(256), processes: None },
            memfd: Memfd::Deny,
            ending: Ending::Release,
            tty: false,
        }
    }
}

/// What the listener said about one connect(2).
#[derive(Debug)]
pub struct Report {
    pub process: i32,
    pub target: Result<Target, Errno>,
}

#[derive(Debug, Default)]
pub struct Outcome {
    pub agent: i32,
    pub verified: Option<Result<(), Mismatch>>,
    pub threads: usize,
    pub warnings: Vec<(ChildStep, Errno)>,
    pub failure: Option<(ChildStep, Errno)>,
    pub reports: Vec<Report>,
    pub landlock: Option<String>,
    pub output: String,
    pub code: Option<i32>,
    pub agent_gone: bool,
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// Ends a child's life: its exit code, or the signal that killed it.
pub fn wait_for(pid: Pid) -> Result<i32, i32> {
    loop {
        match waitpid(Some(pid), WaitOptions::empty()) {
            Err(Errno::INTR) => {}
            Ok(Some((_, status))) => {
                return status.exit_status().ok_or(status.terminating_signal().unwrap_or(0));
            }
            _ => return Err(-1),
        }
    }
}

/// Runs a test's part in a process of its own.
pub fn in_child(body: impl FnOnce() -> Outcomes) -> Outcomes {
    match spawn::fork().map_err(text)? {
        Forked::Child => {
            let code = match body() {
                Ok(()) => 0,
                Err(why) => {
                    let _ = writeln!(std::io::stderr(), "    in the child: {why}");
                    1
                }
            };
            spawn::exit_now(code)
        }
        Forked::Parent(pid) => match wait_for(pid) {
            Ok(0) => Ok(()),
            other => Err(format!("the child ended with {other:?}")),
        },
    }
}

/// A process of this user that sleeps until it is killed.
pub fn sleeper(uid: u32) -> Result<Pid, String> {
    match spawn::fork().map_err(text)? {
        Forked::Parent(pid) => Ok(pid),
        Forked::Child => {
            let uid = rustix::process::Uid::from_raw(uid);
            let done = rustix::thread::set_thread_res_uid(uid, uid, uid);
            let _ = rustix::process::set_parent_process_death_signal(Some(Signal::KILL));
            while done.is_ok() {
                std::thread::sleep(std::time::Duration::from_secs(60));
            }
            spawn::exit_now(1)
        }
    }
}

/// Takes capabilities out of this process's sets.
pub fn give_up(which: CapabilitySet) -> Outcomes {
    let mut sets = capabilities(None).map_err(text)?;
    sets.effective.remove(which);
    sets.permitted.remove(which);
    sets.inheritable.remove(which);
    set_capabilities(None, sets).map_err(text)
}

/// A mount namespace that nobody else sees.
pub fn private_mounts() -> Outcomes {
    use rustix::mount::{MountPropagationFlags, mount_change};
    // SAFETY: the process has one thread, so none other loses its mount namespace.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS) }.map_err(text)?;
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).map_err(text)
}

fn c_string(bytes: &[u8]) -> CString {
    CString::new(bytes).expect("no zero byte")
}

fn template(scratch: &Scratch, launch: &Launch<'_>) -> Template {
    let program = launch.program.as_ref().unwrap_or(&scratch.program);
    let mut argv = vec![c"program".to_owned(), c"probe".to_owned()];
    argv.extend(launch.probe.iter().map(|word| c_string(word.as_bytes())));
    let path = c_string(program.as_os_str().as_bytes());
    Template {
        filters: vec![seccomp::agent(AgentOptions { memfd: launch.memfd })],
        listener: launch.listen.then(seccomp::connect_listener),
        identity: Identity { uid: AGENT, gid: AGENT, groups: vec![AGENT + 1] },
        bounding: launch.bounding,
        limits: launch.limits,
        exec: ExecImage::new(path, argv, vec![c"NAME=value".to_owned()]),
        workdir: c_string(launch.workdir.as_bytes()),
        umask: 0o27,
        tty: launch.tty,
    }
}

/// Starts one agent the way the supervisor does, and watches it to its end.
pub fn launch(scratch: &Scratch, launch: Launch<'_>) -> Result<Outcome, String> {
    let template = template(scratch, &launch);
    let pair =
        || socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None);
    let (control, agents) = pair().map_err(text)?;
    let (mut said, keeper_says) = std::io::pipe().map_err(text)?;
    let (mut output, agents_output) = std::io::pipe().map_err(text)?;
    let terminal = launch.tty.then(open_terminal).transpose()?;
    match spawn::fork().map_err(text)? {
        Forked::Child => {
            let stdin = terminal.as_ref().map_or(output.as_raw_fd(), |(_, end)| end.as_raw_fd());
            let stdio = [stdin, agents_output.as_raw_fd(), agents_output.as_raw_fd()];
            let code = keeper(&template, launch, stdio, [&control, &agents], keeper_says);
            spawn::exit_now(code)
        }
        Forked::Parent(keeper) => {
            drop((agents, keeper_says, agents_output));
            let mut outcome = Outcome::default();
            let result = supervise(&launch, keeper, control, &mut said, &mut outcome, |outcome| {
                output.read_to_string(&mut outcome.output).map(drop)
            });
            let ended = wait_for(keeper);
            outcome.code = ended.ok();
            result.map_err(|why| format!("{why}\n    {outcome:?}"))?;
            Ok(outcome)
        }
    }
}

fn open_terminal() -> Result<(OwnedFd, OwnedFd), String> {
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let controller = openpt(flags).map_err(text)?;
    grantpt(&controller).map_err(text)?;
    unlockpt(&controller).map_err(text)?;
    let name = ptsname(&controller, Vec::new()).map_err(text)?;
    let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY | rustix::fs::OFlags::CLOEXEC;
    let end = rustix::fs::open(name, flags, rustix::fs::Mode::empty()).map_err(text)?;
    Ok((controller, end))
}

/// The keeper: takes the domain, forks the agent, tells its pid, ends as the agent does.
fn keeper(
    template: &Template,
    launch: Launch<'_>,
    stdio: spawn::Stdio,
    [supervisors, agents]: [&OwnedFd; 2],
    mut says: impl Write,
) -> i32 {
    if !launch.setpcap && give_up(CapabilitySet::SETPCAP).is_err() {
        return 99;
    }
    let mut report = String::new();
    if let Some(rules) = launch.rules {
        let enforced = landlock::prepare(&rules, false).and_then(landlock::Prepared::enforce);
        match enforced {
            Ok(enforced) => report = format!("{enforced:?}"),
            Err(error) => {
                let _ = writeln!(std::io::stderr(), "    landlock: {error}");
                return 98;
            }
        }
    }
    let own = rustix::process::getpid();
    match spawn::fork() {
        Ok(Forked::Child) => template.run_child(stdio, agents.as_raw_fd(), Some(own)),
        Ok(Forked::Parent(agent)) => {
            let _ = writeln!(says, "{}\n{report}", agent.as_raw_nonzero());
            drop(says);
            // Only now: the child had copies of both ends, and must have closed the wrong one.
            for fd in [stdio[1], supervisors.as_raw_fd(), agents.as_raw_fd()] {
                // SAFETY: this process ends by _exit, so no owner closes them a second time.
                unsafe { libc::close(fd) };
            }
            wait_for(agent).unwrap_or_else(|signal| 128 + signal)
        }
        Err(errno) => {
            let _ = writeln!(std::io::stderr(), "    keeper cannot fork: {errno}");
            96
        }
    }
}

fn supervise(
    launch: &Launch<'_>,
    keeper: Pid,
    control: OwnedFd,
    said: &mut impl Read,
    outcome: &mut Outcome,
    read_output: impl FnOnce(&mut Outcome) -> std::io::Result<()>,
) -> Outcomes {
    let mut words = String::new();
    said.read_to_string(&mut words).map_err(text)?;
    let (pid, report) = words.split_once('\n').ok_or("the keeper said nothing")?;
    let agent = pid.parse().ok().and_then(Pid::from_raw).ok_or("no pid")?;
    outcome.agent = agent.as_raw_nonzero().get();
    outcome.landlock = Some(report.to_owned());
    let mut listener = None;
    loop {
        match spawn::receive(&control).map_err(text)? {
            ChildMessage::Listener(fd) => listener = Some(Listener::new(fd)),
            ChildMessage::Warning(step, errno) => outcome.warnings.push((step, errno)),
            ChildMessage::Failed(step, errno) => {
                outcome.failure = Some((step, errno));
                return Ok(());
            }
            ChildMessage::Closed => return Err("closed before ready".to_owned()),
            ChildMessage::Ready => break,
        }
    }
    let identity = Identity { uid: AGENT, gid: AGENT, groups: vec![AGENT + 1] };
    let filters = 1 + u32::from(launch.listen);
    for tid in status::threads(agent).map_err(text)? {
        let status = Status::read(agent, Some(tid)).map_err(text)?;
        if launch.bounding == Bounding::IfPermitted {
            status.verify_fenced_but_bounding(&identity, filters).map_err(text)?;
        }
        outcome.verified = Some(status.verify_fenced(&identity, filters));
        outcome.threads += 1;
    }
    let own = status::net_namespace(rustix::process::getpid()).map_err(text)?;
    super::equal("network namespace", status::net_namespace(agent).map_err(text)?, own)?;
    if launch.ending == Ending::KillKeeper {
        kill_process(keeper, Signal::KILL).map_err(text)?;
        outcome.agent_gone = matches!(spawn::receive(&control), Ok(ChildMessage::Closed));
        return Ok(());
    }
    if launch.ending == Ending::NoRelease {
        drop(control);
        return Ok(());
    }
    spawn::release(&control).map_err(text)?;
    if let Some(listener) = listener {
        watch(&listener, outcome)?;
    }
    read_output(outcome).map_err(text)?;
    match spawn::receive(&control).map_err(text)? {
        ChildMessage::Closed => {}
        ChildMessage::Failed(step, errno) => outcome.failure = Some((step, errno)),
        other => return Err(format!("after the release: {other:?}")),
    }
    Ok(())
}

/// Answers the listener until nobody is left who could call.
fn watch(listener: &Listener, outcome: &mut Outcome) -> Outcomes {
    loop {
        let mut polled = [PollFd::new(listener, PollFlags::IN)];
        poll(&mut polled, None).map_err(text)?;
        if !polled[0].revents().contains(PollFlags::IN) {
            return Ok(());
        }
        let call = listener.recv().map_err(text)?;
        let target = notify::target(call.tid, call.descriptor())
            .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO));
        let process = notify::thread_group(call.tid).map_err(text)?;
        if !listener.is_valid(call.id) {
            return Err("the call is gone".to_owned());
        }
        outcome.reports.push(Report { process: process.as_raw_nonzero().get(), target });
        listener.allow(call.id).map_err(text)?;
    }
}

//! `enter`: another command into the fence of the supervisor that runs in this container.
//!
//! `kubectl exec`, exec probes and lifecycle hooks start processes beside the supervisor, as root
//! and outside the fence. This client asks the supervisor to run the command inside instead: it
//! hands over its own stdin, stdout and stderr, relays signals and the window's size, and ends
//! with the command's exit code. With a terminal the command gets one of its own, so that what it
//! pushes into it never reaches the caller's. When it cannot run inside, it runs nowhere.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{Mode, OFlags};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use rustix::termios::{OptionalActions, Termios};
use serde::{Deserialize, Serialize};

use super::args::EnterArgs;
use super::{doctor, packet, run_dir};

/// From the client to the supervisor.
#[derive(Debug, Serialize, Deserialize)]
pub enum ToSupervisor {
    /// Sent first, with stdin, stdout and stderr.
    Run {
        /// The command and its arguments.
        argv: Vec<String>,
        /// Where it is to run; the supervisor's choice when absent.
        workdir: Option<PathBuf>,
        /// The descriptors are a terminal of its own.
        tty: bool,
        /// The client's TERM.
        term: Option<String>,
    },
    /// Pass a signal on.
    Signal {
        /// Its number.
        signal: i32,
    },
}

/// From the supervisor to the client.
#[derive(Debug, Serialize, Deserialize)]
pub enum ToClient {
    /// The command has ended.
    Exited {
        /// With this code.
        code: i32,
    },
    /// The command was not started.
    Refused {
        /// Why.
        reason: String,
        /// The code to end with: 125, 126 or 127.
        code: i32,
    },
}

/// Signals that a client passes on. Those of job control are its own: a client that is stopped
/// passes nothing on, and the command lives.
const RELAYED: [Signal; 8] = [
    Signal::SIGTERM,
    Signal::SIGINT,
    Signal::SIGHUP,
    Signal::SIGQUIT,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGALRM,
    Signal::SIGABRT,
];

/// Runs a command in the fence; returns its exit code.
///
/// `doctor` is no command for the fence, but what looks at it: it runs here, and has its attempts
/// made inside.
pub fn client(args: &EnterArgs) -> Result<i32> {
    if let Some(doctor) = doctor::asked_for(args) {
        return doctor::client(&doctor?);
    }
    let (socket, _) = connect(&args.run_dir, Duration::from_secs(args.wait))?;
    let mut mask = SigSet::empty();
    for signal in RELAYED.into_iter().chain([Signal::SIGWINCH]) {
        mask.add(signal);
    }
    mask.thread_block().context("cannot block signals")?;
    let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
        .context("cannot make a signalfd")?;

    let terminal = Terminal::take()?;
    let stdio = io::stdin();
    let (stdout, stderr) = (io::stdout(), io::stderr());
    let descriptors: [BorrowedFd<'_>; 3] = match &terminal {
        Some(terminal) => [terminal.inner.as_fd(); 3],
        None => [stdio.as_fd(), stdout.as_fd(), stderr.as_fd()],
    };
    let run = ToSupervisor::Run {
        argv: args.command.clone(),
        workdir: None,
        tty: terminal.is_some(),
        term: std::env::var("TERM").ok().filter(|_| terminal.is_some()),
    };
    packet::send(&socket, &run, &descriptors).context("the supervisor does not listen")?;
    match terminal {
        None => relay(&socket, &signals, None),
        Some(Terminal { inner, outer, saved }) => {
            // The command's side must be the command's alone, or its end is never seen.
            drop(inner);
            let code = relay(&socket, &signals, Some(&outer));
            saved.restore();
            code
        }
    }
}

/// Finds the living supervisor and connects, waiting for it as long as `patience` allows. Returns
/// its subdirectory beside the socket.
pub(super) fn connect(base: &Path, patience: Duration) -> Result<(OwnedFd, PathBuf)> {
    let until = Instant::now() + patience;
    let mut several = false;
    loop {
        let living = run_dir::living(base);
        // Seen twice: a supervisor that begins holds what it is about to remove for a moment.
        if std::mem::replace(&mut several, living.len() > 1) && several {
            let names: Vec<_> = living.iter().map(|dir| dir.display().to_string()).collect();
            bail!(
                "{} supervisors run in this container: name one by --run-dir (each begins with \
                 its supervisor's process number): {}",
                living.len(),
                names.join(" ")
            );
        }
        if let [dir] = &living[..] {
            let path = dir.join(run_dir::ENTER_SOCKET);
            let socket = rustix::net::socket_with(
                AddressFamily::UNIX,
                SocketType::SEQPACKET,
                SocketFlags::CLOEXEC,
                None,
            )?;
            match rustix::net::connect(&socket, &SocketAddrUnix::new(&path)?) {
                Ok(()) => return Ok((socket, dir.clone())),
                Err(rustix::io::Errno::ACCESS) => {
                    bail!("only root of this container may enter the fence")
                }
                Err(_) => {}
            }
        }
        if Instant::now() >= until {
            bail!(
                "no fence to enter under {} after {} s: the supervisor is not up, or did not get \
                 that far; see the container's log",
                base.display(),
                patience.as_secs()
            );
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Moves bytes between the two terminals, and signals, until the supervisor tells the end.
fn relay(socket: &OwnedFd, signals: &SignalFd, outer: Option<&OwnedFd>) -> Result<i32> {
    let (stdin, stdout) = (io::stdin(), io::stdout());
    let mut input_open = outer.is_some();
    let mut output_open = outer.is_some();
    loop {
        let mut ready =
            vec![PollFd::new(socket, PollFlags::IN), PollFd::new(signals, PollFlags::IN)];
        if let Some(outer) = outer.filter(|_| output_open) {
            ready.push(PollFd::new(outer, PollFlags::IN));
            if input_open {
                ready.push(PollFd::new(&stdin, PollFlags::IN));
            }
        }
        match poll(&mut ready, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error).context("cannot wait"),
        }
        let now: Vec<bool> = ready.iter().map(|fd| !fd.revents().is_empty()).collect();
        drop(ready);
        if now[1] {
            while let Some(info) = signals.read_signal().context("cannot read a signal")? {
                pass_on(info.ssi_signo.cast_signed(), socket, outer)?;
            }
        }
        if let Some(outer) = outer {
            if now.get(2) == Some(&true) {
                output_open = copy(outer.as_fd(), stdout.as_fd());
            }
            if now.get(3) == Some(&true) {
                input_open = copy(stdin.as_fd(), outer.as_fd());
            }
        }
        if now[0] {
            // What the command wrote last is still on its way through the terminal.
            if let Some(outer) = outer {
                while output_open && waiting(outer.as_fd()) {
                    output_open = copy(outer.as_fd(), stdout.as_fd());
                }
            }
            return end(socket);
        }
    }
}

fn pass_on(signal: i32, socket: &OwnedFd, outer: Option<&OwnedFd>) -> Result<()> {
    if signal == Signal::SIGWINCH as i32 {
        if let (Some(outer), Ok(size)) = (outer, rustix::termios::tcgetwinsize(io::stdin())) {
            // The kernel signals the command's group itself.
            let _ = rustix::termios::tcsetwinsize(outer, size);
        }
        return Ok(());
    }
    packet::send(socket, &ToSupervisor::Signal { signal }, &[])
        .context("the supervisor does not listen")
}

fn end(socket: &OwnedFd) -> Result<i32> {
    let Some(packet) = packet::receive(socket).context("cannot hear the supervisor")? else {
        bail!("the supervisor has ended, and what ran in its fence with it");
    };
    match packet.json().context("the supervisor's answer")? {
        ToClient::Exited { code } => Ok(code),
        ToClient::Refused { reason, code } => {
            eprintln!("ringfence-supervisor enter: {reason}");
            Ok(code)
        }
    }
}

/// Copies what is there; `false` at the end.
fn copy(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> bool {
    let mut buffer = [0; 16 * 1024];
    let Ok(count @ 1..) = rustix::io::read(from, &mut buffer) else {
        return false;
    };
    let mut rest = &buffer[..count];
    while !rest.is_empty() {
        match rustix::io::write(to, rest) {
            Ok(written) => rest = &rest[written..],
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return false,
        }
    }
    true
}

fn waiting(fd: BorrowedFd<'_>) -> bool {
    let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    let mut ready = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
    matches!(poll(&mut ready, Some(&now)), Ok(1)) && ready[0].revents().contains(PollFlags::IN)
}

/// A new terminal for the command, and the caller's own in raw mode.
struct Terminal {
    /// The command's side.
    inner: OwnedFd,
    /// Ours.
    outer: OwnedFd,
    saved: Saved,
}

struct Saved(Termios);

impl Terminal {
    /// `None` where stdin is no terminal.
    fn take() -> Result<Option<Self>> {
        let stdin = io::stdin();
        if !rustix::termios::isatty(&stdin) {
            return Ok(None);
        }
        let make = || -> rustix::io::Result<(OwnedFd, OwnedFd)> {
            let outer = rustix::pty::openpt(
                rustix::pty::OpenptFlags::RDWR
                    | rustix::pty::OpenptFlags::NOCTTY
                    | rustix::pty::OpenptFlags::CLOEXEC,
            )?;
            rustix::pty::grantpt(&outer)?;
            rustix::pty::unlockpt(&outer)?;
            let name = rustix::pty::ptsname(&outer, Vec::new())?;
            let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
            Ok((rustix::fs::open(name.as_c_str(), flags, Mode::empty())?, outer))
        };
        let (inner, outer) = make().context("cannot make a terminal for the command")?;
        let settings = rustix::termios::tcgetattr(&stdin).context("cannot read the terminal")?;
        if let Ok(size) = rustix::termios::tcgetwinsize(&stdin) {
            let _ = rustix::termios::tcsetwinsize(&outer, size);
        }
        let mut raw = settings.clone();
        raw.make_raw();
        rustix::termios::tcsetattr(&stdin, OptionalActions::Now, &raw)
            .context("cannot set the terminal")?;
        Ok(Some(Self { inner, outer, saved: Saved(settings) }))
    }
}

impl Saved {
    fn restore(&self) {
        let _ = rustix::termios::tcsetattr(io::stdin(), OptionalActions::Flush, &self.0);
    }
}

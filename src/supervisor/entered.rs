//! The supervisor's side of `enter`: who may ask, what is started for them, and its end.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::enter::{ToClient, ToSupervisor};
use super::filesystem;
use super::launch::{Command, Keeper, LaunchError, Starting};
use super::packet;
use super::run_dir::{ENTER_SOCKET, RunDir};
use crate::event::{self, Class, Event, Severity};
use crate::fence::credentials::Identity;

/// The most clients at a time; each is a root process of this container.
const MAX_CLIENTS: usize = 256;
const SIGKILL: i32 = 9;

/// What every entered process has in common with the agent.
#[derive(Debug, Clone)]
pub struct Setting {
    /// The agent's user.
    pub identity: Identity,
    /// The agent's environment.
    pub env: BTreeMap<OsString, OsString>,
    /// The agent's working directory.
    pub workdir: PathBuf,
}

/// The listening socket and its clients.
#[derive(Debug)]
pub struct Entered {
    listener: OwnedFd,
    setting: Setting,
    clients: Vec<Client>,
}

#[derive(Debug)]
struct Client {
    socket: OwnedFd,
    child: Child,
}

/// How far a client's process is.
#[derive(Debug)]
enum Child {
    /// The client has not said yet what to run.
    None,
    /// Forked, not executed yet; with its exit code when it has ended meanwhile. What is fenced can
    /// stop it here, so nobody waits for it.
    Starting(Box<Starting>, Option<i32>),
    /// It runs, under this name of the keeper's.
    Running(u64),
}

impl Child {
    fn id(&self) -> Option<u64> {
        match self {
            Self::None => None,
            Self::Starting(starting, _) => Some(starting.launched.id),
            Self::Running(id) => Some(*id),
        }
    }

    fn starting(&self) -> Option<&Starting> {
        if let Self::Starting(starting, _) = self { Some(starting) } else { None }
    }
}

impl Entered {
    /// Listens below the run directory, in the part that only root may enter.
    pub fn listen(dir: &RunDir, setting: Setting) -> Result<Self> {
        let path = dir.path().join(ENTER_SOCKET);
        let listen = || -> rustix::io::Result<OwnedFd> {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let socket =
                rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
            rustix::net::bind(&socket, &SocketAddrUnix::new(&path)?)?;
            rustix::net::listen(&socket, 64)?;
            Ok(socket)
        };
        let listener = listen().with_context(|| format!("cannot listen on {}", path.display()))?;
        Ok(Self { listener, setting, clients: Vec::new() })
    }

    /// What to wait for: the listener first, then each client, then each process that starts.
    pub fn poll_fds(&self) -> impl Iterator<Item = PollFd<'_>> {
        let starting = self.clients.iter().filter_map(|client| client.child.starting());
        std::iter::once(self.listener.as_fd())
            .chain(self.clients.iter().map(|client| client.socket.as_fd()))
            .chain(starting.map(AsFd::as_fd))
            .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN))
    }

    /// When to call [`Self::serve`] although nothing is reported.
    pub fn deadline(&self) -> Option<Instant> {
        self.clients.iter().filter_map(|client| Some(client.child.starting()?.until)).min()
    }

    /// Serves what [`Self::poll_fds`] reported, in the same order, and gives up what took too long.
    pub fn serve(&mut self, ready: &[bool], keeper: &mut Keeper) {
        let (listener, ready) = ready.split_first().unwrap_or((&false, &[]));
        let (heard, mut moved) = ready.split_at_checked(self.clients.len()).unwrap_or_default();
        let now = Instant::now();
        let mut gone = Vec::new();
        for index in 0..self.clients.len() {
            let mut stays = true;
            if let Some(starting) = self.clients[index].child.starting() {
                let (first, rest) = moved.split_first().unwrap_or((&false, &[]));
                moved = rest;
                if *first || now >= starting.until {
                    stays = self.advance(index, *first, keeper);
                }
            }
            if stays && heard.get(index) == Some(&true) {
                stays = self.hear(index, keeper);
            }
            if !stays {
                gone.push(index);
            }
        }
        for index in gone.into_iter().rev() {
            let client = self.clients.remove(index);
            if let Some(id) = client.child.id() {
                drop(keeper.signal(id, SIGKILL));
            }
        }
        if *listener {
            self.accept();
        }
    }

    /// Moves a process on that starts, or gives it up; `false` when its client was told the end.
    fn advance(&mut self, index: usize, ready: bool, keeper: &mut Keeper) -> bool {
        let client = &mut self.clients[index];
        let Child::Starting(starting, ended) = &client.child else { return true };
        let outcome = if ready {
            keeper.advance(starting)
        } else {
            Err(LaunchError::Fence(anyhow::anyhow!(
                "the command was not executed in time: it was stopped, or the node is too busy"
            )))
        };
        let id = starting.launched.id;
        match (outcome, *ended) {
            (Ok(false), _) => true,
            (Ok(true), None) => {
                event::inform(|| {
                    Event::new(Class::Proc, "LAUNCH", Severity::Info)
                        .subject(format!("entered: {}", starting.path.to_string_lossy()))
                        .field("pid", starting.launched.pid.as_raw_nonzero())
                });
                client.child = Child::Running(id);
                true
            }
            (Ok(true), Some(code)) => {
                drop(packet::send(&client.socket, &ToClient::Exited { code }, &[]));
                client.child = Child::None;
                false
            }
            (Err(error), _) => {
                client.refuse(&error);
                false
            }
        }
    }

    fn accept(&mut self) {
        while let Ok(socket) = rustix::net::accept_with(&self.listener, SocketFlags::CLOEXEC) {
            // The directory keeps others out; this is for the day when it does not.
            let root =
                rustix::net::sockopt::socket_peercred(&socket).is_ok_and(|peer| peer.uid.is_root());
            if root && self.clients.len() < MAX_CLIENTS {
                self.clients.push(Client { socket, child: Child::None });
            } else {
                let reason = if root {
                    format!("{MAX_CLIENTS} commands run in the fence already")
                } else {
                    "only root of this container may enter the fence".to_owned()
                };
                drop(packet::send(&socket, &ToClient::Refused { reason, code: 125 }, &[]));
            }
        }
    }

    /// One message of a client; `false` when it is gone or told its end.
    fn hear(&mut self, index: usize, keeper: &mut Keeper) -> bool {
        let client = &mut self.clients[index];
        let Ok(Some(packet)) = packet::receive(&client.socket) else {
            return false;
        };
        match (packet.json(), &client.child) {
            (Ok(ToSupervisor::Signal { signal }), child) => {
                child.id().is_some_and(|id| keeper.signal(id, signal).is_ok())
            }
            (Ok(ToSupervisor::Run { argv, workdir, tty, term }), Child::None) => {
                match self.setting.start(keeper, &argv, workdir, tty, term, packet) {
                    Ok(starting) => {
                        client.child = Child::Starting(Box::new(starting), None);
                        true
                    }
                    Err(error) => {
                        client.refuse(&error);
                        false
                    }
                }
            }
            _ => false,
        }
    }

    /// Tells the client whose process has ended; one that still starts is told of when it is known
    /// whether it did.
    pub fn ended(&mut self, id: u64, code: i32) {
        let of = |client: &Client| client.child.id() == Some(id);
        let Some(index) = self.clients.iter().position(of) else { return };
        if let Child::Starting(_, ended) = &mut self.clients[index].child {
            *ended = Some(code);
            return;
        }
        let client = self.clients.remove(index);
        drop(packet::send(&client.socket, &ToClient::Exited { code }, &[]));
    }
}

impl Client {
    fn refuse(&self, error: &LaunchError) {
        let refused = ToClient::Refused { reason: error.to_string(), code: error.exit_code() };
        drop(packet::send(&self.socket, &refused, &[]));
    }
}

impl Setting {
    fn start(
        &self,
        keeper: &mut Keeper,
        argv: &[String],
        workdir: Option<PathBuf>,
        tty: bool,
        term: Option<String>,
        packet: packet::Packet,
    ) -> Result<Starting, LaunchError> {
        let [stdin, stdout, stderr] =
            packet.exactly().map_err(|error| LaunchError::Fence(error.into()))?;
        let workdir = workdir.unwrap_or_else(|| self.workdir.clone());
        let mut env = self.env.clone();
        if let Some(term) = term {
            env.insert("TERM".into(), term.into());
        }
        let command = self.command(argv, env, workdir, tty)?;
        keeper.begin(command, [stdin.as_fd(), stdout.as_fd(), stderr.as_fd()])
    }

    /// A command as the agent would start it.
    pub fn command(
        &self,
        argv: &[String],
        env: BTreeMap<OsString, OsString>,
        workdir: PathBuf,
        tty: bool,
    ) -> Result<Command, LaunchError> {
        let program = argv.first().map_or("", String::as_str);
        let search = env.get(&OsString::from("PATH")).and_then(|path| path.to_str());
        let path = filesystem::find_program(program, search, &workdir)?;
        Ok(Command {
            path,
            argv: argv.to_vec(),
            env,
            workdir,
            identity: self.identity.clone(),
            tty,
        })
    }
}

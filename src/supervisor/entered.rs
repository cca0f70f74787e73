//! The supervisor's side of `enter`: who may ask, what is started for them, and its end.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::enter::{ToClient, ToSupervisor};
use super::filesystem;
use super::launch::{Command, Keeper, LaunchError};
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
    /// The keeper's name for its process; `None` until it has said what to run.
    child: Option<u64>,
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

    /// What to wait for: the listener first, then each client.
    pub fn poll_fds(&self) -> impl Iterator<Item = PollFd<'_>> {
        std::iter::once(self.listener.as_fd())
            .chain(self.clients.iter().map(|client| client.socket.as_fd()))
            .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN))
    }

    /// Serves what [`Self::poll_fds`] reported, in the same order.
    pub fn serve(&mut self, ready: &[bool], keeper: &mut Keeper) {
        let before = self.clients.len();
        let gone: Vec<usize> = (0..before)
            .filter(|index| ready.get(index + 1) == Some(&true))
            .filter(|index| !self.hear(*index, keeper))
            .collect();
        for index in gone.into_iter().rev() {
            let client = self.clients.remove(index);
            if let Some(id) = client.child {
                drop(keeper.signal(id, SIGKILL));
            }
        }
        if ready.first() == Some(&true) {
            self.accept();
        }
    }

    fn accept(&mut self) {
        while let Ok(socket) = rustix::net::accept_with(&self.listener, SocketFlags::CLOEXEC) {
            // The directory keeps others out; this is for the day when it does not.
            let root =
                rustix::net::sockopt::socket_peercred(&socket).is_ok_and(|peer| peer.uid.is_root());
            if root && self.clients.len() < MAX_CLIENTS {
                self.clients.push(Client { socket, child: None });
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
        match (packet.json(), client.child) {
            (Ok(ToSupervisor::Signal { signal }), Some(id)) => keeper.signal(id, signal).is_ok(),
            (Ok(ToSupervisor::Run { argv, workdir, tty, term }), None) => {
                let started = self.setting.start(keeper, &argv, workdir, tty, term, packet);
                let client = &mut self.clients[index];
                match started {
                    Ok(id) => {
                        client.child = Some(id);
                        true
                    }
                    Err((reason, code)) => {
                        drop(packet::send(
                            &client.socket,
                            &ToClient::Refused { reason, code },
                            &[],
                        ));
                        false
                    }
                }
            }
            _ => false,
        }
    }

    /// Tells the client whose process has ended.
    pub fn ended(&mut self, id: u64, code: i32) {
        if let Some(index) = self.clients.iter().position(|client| client.child == Some(id)) {
            let client = self.clients.remove(index);
            drop(packet::send(&client.socket, &ToClient::Exited { code }, &[]));
        }
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
    ) -> Result<u64, (String, i32)> {
        let [stdin, stdout, stderr] =
            packet.exactly().map_err(|error: io::Error| (error.to_string(), 125))?;
        let workdir = workdir.unwrap_or_else(|| self.workdir.clone());
        let mut env = self.env.clone();
        if let Some(term) = term {
            env.insert("TERM".into(), term.into());
        }
        let launched = self
            .command(argv, env, workdir, tty)
            .and_then(|command| {
                keeper.launch(command, [stdin.as_fd(), stdout.as_fd(), stderr.as_fd()])
            })
            .map_err(|error| (error.to_string(), error.exit_code()))?;
        event::emit(
            &Event::new(Class::Proc, "LAUNCH", Severity::Info)
                .subject(format!("entered: {}", argv.join(" ")))
                .field("pid", launched.pid.as_raw_nonzero()),
        );
        Ok(launched.id)
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

//! Who owns a connection, asked of a real kernel while programs try to pass for others.
//!
//! Needs root; runs in a network namespace of its own. It has a main of its own because what forks
//! must have one thread. Started with `play`, this same program is one of the fenced programs: the
//! copy `listed` is the one that a policy would name, the copy `other` is not.

mod play;

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, SocketAddrV4, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use ringfence::fence::notify::Listener;
use ringfence::fence::sockdiag::SockDiag;
use ringfence::fence::spawn::{self, ExecImage, Forked};
use ringfence::fence::{credentials, netns, seccomp};
use ringfence::proxy::control::CallerRecord;
use ringfence::supervisor::caller::Callers;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, Signal};

type Test = (&'static str, fn(&mut Rig) -> Result<(), String>);
const TESTS: &[Test] = &[
    ("a_program_owns_what_it_connects", plain),
    ("what_connects_owns_it_after_exec", after_exec),
    ("a_descriptor_in_flight_keeps_its_owner", in_flight),
    ("a_parked_descriptor_names_nobody_else", parked),
    ("who_connects_again_is_the_owner", again),
    ("a_storm_of_a_thousand_processes", storm),
    ("a_socket_without_a_connect_has_no_owner", no_connect),
];

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    if words.first().is_some_and(|word| word == "play") {
        return play::run(&words[1..]);
    }
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED: tests/callers needs root");
        return;
    }
    let wanted = words.iter().find(|word| !word.starts_with('-'));
    let mut failed = 0;
    for (name, test) in TESTS {
        if wanted.is_some_and(|wanted| !name.contains(wanted.as_str())) {
            continue;
        }
        // Each in a process of its own: a rig has threads, and what forks must not.
        let code = match spawn::fork().expect("fork") {
            Forked::Child => {
                let outcome = Rig::new().and_then(|mut rig| test(&mut rig));
                if let Err(why) = &outcome {
                    println!("    {why}");
                }
                let _ = std::io::stdout().flush();
                spawn::exit_now(i32::from(outcome.is_err()))
            }
            Forked::Parent(pid) => play::wait_for(pid),
        };
        println!("test {name} ... {}", if code == 0 { "ok" } else { "FAILED" });
        failed += i32::from(code != 0);
    }
    std::process::exit(i32::from(failed > 0));
}

struct Rig {
    scratch: tempfile::TempDir,
    server: TcpListener,
    diag: SockDiag,
    callers: Arc<Callers>,
    /// Takes one line a scenario, and executes it.
    stage: std::io::PipeWriter,
    director: Pid,
}

impl Drop for Rig {
    fn drop(&mut self) {
        let _ = rustix::process::kill_process(self.director, Signal::KILL);
    }
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

impl Rig {
    fn new() -> Result<Self, String> {
        drop(netns::unshare().map_err(text)?);
        let up = std::process::Command::new("ip").args(["link", "set", "lo", "up"]).status();
        if !up.is_ok_and(|status| status.success()) {
            return Err("ip link set lo up".to_owned());
        }
        let scratch = tempfile::tempdir().map_err(text)?;
        for name in ["listed", "other"] {
            fs::copy(std::env::current_exe().map_err(text)?, scratch.path().join(name))
                .map_err(text)?;
        }
        let server = TcpListener::bind("127.0.0.1:0").map_err(text)?;
        let port = server.local_addr().map_err(text)?.port();
        let (commands, stage) = std::io::pipe().map_err(text)?;
        let (mut said, says) = std::io::pipe().map_err(text)?;
        let director = match spawn::fork().map_err(text)? {
            Forked::Child => {
                drop(stage);
                let error = direct(&commands, says, scratch.path().to_str().unwrap_or(""), port);
                eprintln!("    the director: {error}");
                spawn::exit_now(1)
            }
            Forked::Parent(pid) => pid,
        };
        drop((commands, says));
        let mut number = String::new();
        said.read_to_string(&mut number).map_err(text)?;
        let fd = number.trim().parse().map_err(text)?;
        let pidfd = rustix::process::pidfd_open(director, PidfdFlags::empty()).map_err(text)?;
        let listener =
            rustix::process::pidfd_getfd(&pidfd, fd, PidfdGetfdFlags::empty()).map_err(text)?;
        let callers = Arc::new(Callers::new(rustix::process::getpid(), None));
        callers.serve(Listener::new(listener));
        let diag = SockDiag::open().map_err(text)?;
        Ok(Self { scratch, server, diag, callers, stage, director })
    }

    fn play(&mut self, scenario: &str) -> Result<(), String> {
        writeln!(self.stage, "{scenario}").map_err(text)
    }

    fn accept(&self) -> Result<(TcpStream, SocketAddr), String> {
        let (stream, peer) = self.server.accept().map_err(text)?;
        stream.set_read_timeout(Some(Duration::from_secs(20))).map_err(text)?;
        Ok((stream, peer))
    }

    /// What the program that holds the connection now says of itself: its name and pid.
    fn holder(stream: &mut TcpStream) -> Result<(String, u32), String> {
        let mut line = Vec::new();
        let mut byte = [0];
        while !line.ends_with(b"\n") {
            stream.read_exact(&mut byte).map_err(text)?;
            line.push(byte[0]);
        }
        let line = String::from_utf8_lossy(&line).trim().to_owned();
        let (name, pid) = line.split_once(' ').ok_or("no name and pid")?;
        Ok((name.to_owned(), pid.parse().map_err(text)?))
    }

    fn owner(
        &mut self,
        stream: &TcpStream,
        peer: SocketAddr,
    ) -> Result<Option<CallerRecord>, String> {
        let v4 = |address| match address {
            SocketAddr::V4(address) => Ok::<SocketAddrV4, String>(address),
            SocketAddr::V6(_) => Err("IPv6".to_owned()),
        };
        let (client, server) = (v4(peer)?, v4(stream.local_addr().map_err(text)?)?);
        let found = self.callers.find(&mut self.diag, client, server).map_err(text)?;
        Ok(found.map(|(record, _)| record))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    /// One connection: who holds it, and who is told to own it.
    fn expect(&mut self, scenario: &str, holder: &str, owner: &str) -> Result<(), String> {
        self.play(scenario)?;
        let (mut stream, peer) = self.accept()?;
        let (holds, _) = Self::holder(&mut stream)?;
        equal("holder", &holds, &holder.to_owned())?;
        let record = self.owner(&stream, peer)?.ok_or("nobody owns the connection")?;
        equal("owner", &record.exe, &self.path(owner).display().to_string())
    }
}

fn equal<T: PartialEq + std::fmt::Debug>(what: &str, have: &T, want: &T) -> Result<(), String> {
    if have == want { Ok(()) } else { Err(format!("{what}: have {have:?}, want {want:?}")) }
}

/// Under the listener's filter from here on: forks a program for each line.
fn direct(
    commands: &std::io::PipeReader,
    mut says: std::io::PipeWriter,
    scratch: &str,
    port: u16,
) -> String {
    let listener = credentials::no_new_privs()
        .and_then(|()| seccomp::install_listener(&seccomp::connect_listener()));
    let listener: OwnedFd = match listener {
        Ok(listener) => listener,
        Err(error) => return text(error),
    };
    if let Err(error) = writeln!(says, "{}", listener.as_raw_fd()) {
        return text(error);
    }
    drop(says);
    let mut line = Vec::new();
    let mut byte = [0];
    loop {
        match rustix::io::read(commands.as_fd(), &mut byte) {
            Ok(1) if byte != *b"\n" => line.push(byte[0]),
            Ok(1) => {
                let scenario = String::from_utf8_lossy(&line).into_owned();
                line.clear();
                let (program, scene) = scenario.split_once(' ').unwrap_or((&scenario, ""));
                let image = play::image(scratch, program, scene, port, None);
                match spawn::fork() {
                    Ok(Forked::Child) => {
                        let _ = image.exec();
                        spawn::exit_now(1)
                    }
                    Ok(Forked::Parent(_)) => {}
                    Err(error) => return text(error),
                }
            }
            _ => return "the test has ended".to_owned(),
        }
    }
}

fn plain(rig: &mut Rig) -> Result<(), String> {
    rig.expect("listed connect", "listed", "listed")?;
    rig.expect("other connect", "other", "other")
}

fn after_exec(rig: &mut Rig) -> Result<(), String> {
    rig.expect("listed connect-then-exec-other", "other", "listed")?;
    rig.expect("other connect-then-exec-listed", "listed", "other")
}

fn in_flight(rig: &mut Rig) -> Result<(), String> {
    rig.expect("listed connect-then-send-other", "other", "listed")
}

/// The trick that a scan of /proc falls for: the connection was made by `other`, and only `listed`
/// holds a descriptor of it when anybody looks.
fn parked(rig: &mut Rig) -> Result<(), String> {
    rig.expect("other connect-then-send-listed", "listed", "other")
}

/// A socket that `listed` connected, and that `other` got, dissolved and connected again, is
/// `other`'s; the first connection stays `listed`'s for as long as it lives.
fn again(rig: &mut Rig) -> Result<(), String> {
    rig.play("listed connect-then-send-other-again")?;
    let (first, _first_peer) = rig.accept()?;
    let (mut second, peer) = rig.accept()?;
    let (holds, _) = Rig::holder(&mut second)?;
    equal("holder", &holds, &"other".to_owned())?;
    let record = rig.owner(&second, peer)?.ok_or("nobody owns the second connection")?;
    equal("owner", &record.exe, &rig.path("other").display().to_string())?;
    drop(first);
    Ok(())
}

fn storm(rig: &mut Rig) -> Result<(), String> {
    const PROCESSES: usize = 1000;
    rig.play(&format!("listed storm-{PROCESSES}"))?;
    let mut held = Vec::new();
    let mut of_listed = 0;
    for _ in 0..PROCESSES {
        let (mut stream, peer) = rig.accept()?;
        let (holder, pid) = Rig::holder(&mut stream)?;
        let record = rig.owner(&stream, peer)?.ok_or("nobody owns a connection of the storm")?;
        equal("owner", &record.exe, &rig.path(&holder).display().to_string())?;
        equal("pid", &record.pid, &pid)?;
        of_listed += usize::from(holder == "listed");
        // They live until the end: the thousandth is found among all of them.
        held.push(stream);
    }
    if of_listed == 0 || of_listed == PROCESSES {
        return Err(format!("{of_listed} of the storm's programs are `listed`"));
    }
    Ok(())
}

/// The test's own connection was made outside the filter.
fn no_connect(rig: &mut Rig) -> Result<(), String> {
    let client = TcpStream::connect(rig.server.local_addr().map_err(text)?).map_err(text)?;
    let (stream, peer) = rig.accept()?;
    equal("owner", &rig.owner(&stream, peer)?, &None)?;
    drop(client);
    Ok(())
}

/// For the part of the test that gets a descriptor by its number.
#[must_use]
pub fn owned(fd: i32) -> OwnedFd {
    // SAFETY: the number was inherited for this purpose, and nothing else in this process owns it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// What [`play`] executes.
pub type Image = ExecImage;

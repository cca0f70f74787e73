//! The fenced programs: connect, hand on, execute, and say who holds the connection in the end.

use std::ffi::CString;
use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::TcpStream;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use ringfence::fence::spawn::{self, ExecImage, Forked};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use rustix::process::{Pid, WaitOptions, waitpid};

use super::{Image, owned};

/// The program `name`, playing `scene` towards the port; `fd` is a descriptor that it inherits.
pub fn image(scratch: &str, name: &str, scene: &str, port: u16, fd: Option<i32>) -> Image {
    let c = |word: String| CString::new(word).expect("no zero byte");
    let words = ["program", "play", scratch, name, scene].map(str::to_owned);
    let fd = fd.map(|fd| fd.to_string());
    let words = words.into_iter().chain([port.to_string()]).chain(fd);
    ExecImage::new(c(format!("{scratch}/{name}")), words.map(c).collect(), Vec::new())
}

pub fn wait_for(pid: Pid) -> i32 {
    loop {
        match waitpid(Some(pid), WaitOptions::empty()) {
            Err(rustix::io::Errno::INTR) => {}
            Ok(Some((_, status))) => return status.exit_status().unwrap_or(128),
            _ => return -1,
        }
    }
}

pub fn run(words: &[String]) {
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let [scratch, name, scene, port, rest @ ..] = words.as_slice() else {
        panic!("not enough words: {words:?}");
    };
    let stage = Stage { scratch, name, port: port.parse().expect("a port") };
    let inherited = rest.first().map(|fd| owned(fd.parse().expect("a descriptor")));
    match (*scene, inherited) {
        ("connect", None) => stage.hold(stage.connect()),
        ("hold", Some(fd)) => stage.hold(fd.into()),
        ("receive", Some(fd)) => stage.hold(receive(&fd).into()),
        ("receive-again", Some(fd)) => stage.again(&receive(&fd)),
        (scene, None) => {
            if let Some(next) = scene.strip_prefix("connect-then-exec-") {
                let connection = stage.connect();
                stage.exec(next, "hold", connection.as_fd().as_raw_fd());
            } else if let Some(to) = scene.strip_prefix("connect-then-send-") {
                stage.send(to);
            } else if let Some(number) = scene.strip_prefix("storm-") {
                stage.storm(number.parse().expect("a number"));
            } else {
                panic!("no such scene: {scene}");
            }
        }
        (scene, Some(_)) => panic!("no such scene: {scene}"),
    }
}

struct Stage<'a> {
    scratch: &'a str,
    name: &'a str,
    port: u16,
}

impl Stage<'_> {
    fn connect(&self) -> TcpStream {
        TcpStream::connect(("127.0.0.1", self.port)).expect("connect")
    }

    /// Says who holds the connection, and keeps it until the test lets go.
    fn hold(&self, mut connection: TcpStream) {
        writeln!(connection, "{} {}", self.name, std::process::id()).expect("say");
        let _ = connection.read(&mut [0]);
    }

    fn exec(&self, name: &str, scene: &str, fd: i32) -> ! {
        spawn::place(fd, fd).expect("keep over exec");
        let image = image(self.scratch, name, scene, self.port, Some(fd));
        panic!("exec: {}", image.exec());
    }

    /// Connects, and gives the connection to another program, keeping none.
    fn send(&self, to: &str) {
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        let (to, scene) = match to.strip_suffix("-again") {
            Some(to) => (to, "receive-again"),
            None => (to, "receive"),
        };
        if spawn::fork().expect("fork") == Forked::Child {
            drop(ours);
            self.exec(to, scene, theirs.as_raw_fd());
        }
        drop(theirs);
        let connection = self.connect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let descriptors = [connection.as_fd()];
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(&descriptors)));
        sendmsg(&ours, &[IoSlice::new(b"x")], &mut ancillary, SendFlags::empty()).expect("send");
    }

    /// Dissolves a connection that another program made, and connects the same socket anew.
    fn again(&self, socket: &OwnedFd) {
        rustix::net::connect_unspec(socket).expect("dissolve");
        let address = std::net::SocketAddrV4::new(std::net::Ipv4Addr::LOCALHOST, self.port);
        rustix::net::connect(socket, &address).expect("connect again");
        self.hold(socket.try_clone().expect("duplicate").into());
    }

    /// Forks as fast as it can; each third child becomes the other program first.
    fn storm(&self, number: usize) {
        for index in 0..number {
            if spawn::fork().expect("fork") != Forked::Child {
                continue;
            }
            if index % 3 == 0 {
                let image = image(self.scratch, "other", "connect", self.port, None);
                panic!("exec: {}", image.exec());
            }
            self.hold(self.connect());
            spawn::exit_now(0);
        }
        while waitpid(None, WaitOptions::empty()).is_ok() {}
    }
}

fn receive(socket: &OwnedFd) -> OwnedFd {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    recvmsg(socket, &mut [IoSliceMut::new(&mut byte)], &mut ancillary, RecvFlags::empty())
        .expect("receive");
    let descriptor = ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    descriptor.expect("a descriptor")
}

//! The packets of keeper, child, proxy and `enter` clients.

use std::ffi::OsStr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::process::Pid;

use super::{Random, fuzz};
use crate::fence::credentials::Identity;
use crate::fence::sockdiag::SockDiag;
use crate::fence::spawn;
use crate::proxy::control;
use crate::supervisor::args::Inbound;
use crate::supervisor::caller::Callers;
use crate::supervisor::entered::{Entered, Setting};
use crate::supervisor::keeper::{self, FromKeeper, ToKeeper};
use crate::supervisor::launch::{Command, Keeper};
use crate::supervisor::proxy_process::ProxyConfig;
use crate::supervisor::proxy_service::ProxyService;
use crate::supervisor::run_dir::{ENTER_SOCKET, RunDir};
use crate::supervisor::{enter, filesystem, packet};

/// Valid packets of all who send any.
const PACKETS: [&str; 24] = [
    r#"{"Run":{"argv":["sh","-c","id"],"workdir":"/tmp","tty":false,"term":null}}"#,
    r#"{"Run":{"argv":[],"workdir":null,"tty":true,"term":"xterm"}}"#,
    r#"{"Signal":{"signal":15}}"#,
    r#"{"Exited":{"code":7}}"#,
    r#"{"Refused":{"reason":"no","code":125}}"#,
    r#"{"Prepare":{"rules":[["/tmp",true]],"hard":false,"listener":true}}"#,
    r#"{"Spawn":{"id":1,"argc":2,"workdir":"/","uid":7,"gid":8,"groups":[9],"tty":false}}"#,
    r#"{"Signal":{"id":1,"signal":-1}}"#,
    r#"{"Namespace":{"own_proc":{"Err":"no"}}}"#,
    r#"{"Prepared":{"abi":6,"applied":3,"skipped":[["/x","no"]],"missing":null,"unconfined":false,"scopes":true}}"#,
    r#"{"Spawned":{"id":1}}"#,
    r#"{"Exited":{"id":1,"code":0}}"#,
    r#"{"Failed":{"what":"x"}}"#,
    r#"{"type":"ready","ca_pem":"x","bundle_pem":"y"}"#,
    r#"{"type":"identify","id":1,"client":"10.200.0.2:4","server":"10.200.0.1:3128"}"#,
    r#"{"type":"gateway-socket","id":18446744073709551615}"#,
    r#"{"type":"start"}"#,
    r#"{"type":"caller","id":1,"caller":{"pid":1,"exe":"/x","ancestors":["/y"]}}"#,
    r#"{"type":"failed","id":1,"reason":"x"}"#,
    r#"{"type":"inbound","ports":[80]}"#,
    r#"{"type":"stop","grace_ms":1}"#,
    r#"{"type":"policy","generation":2,"digest":"sha256:0","bounded":true,"kept":["x"]}"#,
    r#"{"type":"policy","generation":2,"refused":"x"}"#,
    r#"{"type":"policy-kept","reason":"x"}"#,
];
const JSON: [&str; 18] = [
    "{",
    "}",
    "[",
    "]",
    ":",
    ",",
    "\"",
    "null",
    "true",
    "-1",
    "1e400",
    "18446744073709551616",
    "\\ud800",
    "\\u0000",
    "\"type\":\"ready\",",
    "{\"Run\":{",
    "[[[[[[[[[[[[[[[[",
    "\u{feff}",
];

fn bent_packet(random: &mut Random) -> Vec<u8> {
    let valid = random.pick(&PACKETS);
    random.bend(valid.as_bytes(), &JSON)
}

#[test]
fn packets() {
    fuzz("packets", |random| {
        let packet = packet::Packet { bytes: bent_packet(random), descriptors: Vec::new() };
        drop(packet.json::<enter::ToSupervisor>());
        drop(packet.json::<enter::ToClient>());
        drop(packet.json::<ToKeeper>());
        drop(packet.json::<FromKeeper>());
        drop(packet.json::<control::ToProxy>());
        drop(packet.json::<control::ToSupervisor>());
        drop(packet.json::<ProxyConfig>());
        drop(packet.exactly::<3>());
    });
}

/// What is said to the main thread by a client of `enter`; the keeper has ended.
#[test]
fn enter_clients() {
    let base = tempfile::tempdir().unwrap();
    let dir = RunDir::create(base.path()).unwrap();
    let setting = Setting {
        identity: Identity { uid: 7, gid: 8, groups: vec![] },
        env: [("PATH".into(), "/usr/bin:/bin".into())].into(),
        workdir: PathBuf::from("/"),
    };
    let mut entered = Entered::listen(&dir, setting).unwrap();
    let (socket, gone) = packet::pair().unwrap();
    drop(gone);
    let mut keeper = Keeper::new(socket, (0, 0), Arc::new(Callers::new(Pid::INIT, None)), false);
    let path = dir.path().join(ENTER_SOCKET);
    fuzz("enter_clients", |random| {
        let client = connect(&path);
        serve(&mut entered, &mut keeper);
        for _ in 0..=random.below(3) {
            let bytes = bent_packet(random);
            let beside = vec![client.as_fd(); random.below(5)];
            if !bytes.is_empty() && packet::send_bytes(&client, &bytes, &beside).is_ok() {
                serve(&mut entered, &mut keeper);
            }
        }
        drop(client);
        serve(&mut entered, &mut keeper);
        assert_eq!(entered.poll_fds().count(), 1, "the client is forgotten");
    });
}

fn connect(path: &Path) -> OwnedFd {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
    let kind = SocketType::SEQPACKET;
    let socket =
        rustix::net::socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None).unwrap();
    rustix::net::connect(&socket, &SocketAddrUnix::new(path).unwrap()).unwrap();
    socket
}

fn serve(entered: &mut Entered, keeper: &mut Keeper) {
    let mut fds: Vec<_> = entered.poll_fds().collect();
    let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    rustix::event::poll(&mut fds, Some(&now)).unwrap();
    let ready: Vec<_> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
    drop(fds);
    entered.serve(&ready, keeper);
}

/// What the main thread hears of the keeper, and of a child that is to be.
#[test]
fn keeper_and_child() {
    let callers = Arc::new(Callers::new(Pid::INIT, None));
    let command = Command {
        path: c"/bin/true".into(),
        argv: vec!["true".into()],
        env: [].into(),
        workdir: "/".into(),
        identity: Identity { uid: 7, gid: 8, groups: vec![] },
        tty: false,
    };
    fuzz("keeper_and_child", |random| {
        let (socket, theirs) = packet::pair().unwrap();
        let mut keeper = Keeper::new(socket, (0, 0), Arc::clone(&callers), false);
        for _ in 0..random.below(4) {
            let bytes = bent_packet(random);
            if !bytes.is_empty() {
                let beside = vec![theirs.as_fd(); random.below(3)];
                packet::send_bytes(&theirs, &bytes, &beside).unwrap();
            }
        }
        // What it is told must fit the socket; what it says next is its end.
        rustix::net::shutdown(&theirs, rustix::net::Shutdown::Write).unwrap();
        match random.below(3) {
            0 => drop(keeper.prepared()),
            1 => drop(keeper.ended()),
            _ => drop(keeper.begin(command.clone(), [theirs.as_fd(); 3])),
        }

        let (here, there) = packet::pair().unwrap();
        let bytes = random.bend(b"W\x06\x01\0\0\0", &["R", "L", "E\u{18}", "\u{0}", "G"]);
        if !bytes.is_empty() {
            packet::send_bytes(&there, &bytes, &vec![there.as_fd(); random.below(2)]).unwrap();
        }
        drop(there);
        drop(spawn::receive(&here));
    });
}

/// The words of a command, as the keeper reads them.
#[test]
fn words_of_a_command() {
    fuzz("words_of_a_command", |random| {
        let bytes = random.bend(b"/bin/sh\0sh\0-c\0id\0A=b\0", &["\u{0}", "=", "sh"]);
        let memfd = rustix::fs::memfd_create("fuzz", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::io::write(&memfd, &bytes).unwrap();
        let argc = [0, 1, 3, usize::MAX][random.below(4)];
        drop(keeper::read_words(memfd, argc));
        drop(filesystem::find_program(
            OsStr::from_bytes(&bytes).to_str().unwrap_or("x"),
            Some(":/bin::"),
            Path::new("/"),
        ));
    });
}

/// What the proxy asks.
#[test]
fn questions_of_the_proxy() {
    let (control, theirs) = packet::pair().unwrap();
    let mut service = ProxyService {
        control,
        diag: SockDiag::open().unwrap(),
        callers: Arc::new(Callers::new(Pid::INIT, None)),
        answered: None,
        inbound: Inbound::None,
    };
    fuzz("questions_of_the_proxy", |random| {
        let packet = packet::Packet { bytes: bent_packet(random), descriptors: Vec::new() };
        let answered = service.answer(&packet).is_ok();
        let asked = matches!(
            packet.json(),
            Ok(control::ToSupervisor::Identify { .. }
                | control::ToSupervisor::GatewaySocket { .. })
        );
        if answered && asked {
            let answer = packet::receive(&theirs).unwrap().unwrap();
            assert!(answer.json::<control::ToProxy>().is_ok());
        }
    });
}

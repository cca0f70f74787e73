//! The supervisor's double: it answers what the proxy asks.

use std::fs::File;
use std::io::{IoSlice, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::net::TcpListener;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};

use ringfence::proxy::control::{
    CallerRecord, MAX_MESSAGE, NewPolicy, PolicyText, ToProxy, ToSupervisor,
};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg,
};

use super::namespace::new_namespace;

/// Where connections of another process come from, and its pid.
pub const OTHER: &str = "10.200.0.2";
const OTHER_PID: u32 = 1000;

/// Who the supervisor's double says made every connection.
#[derive(Clone)]
pub struct Who {
    pub exe: String,
    pub file: PathBuf,
}

/// A policy by its number, and why it is not in force; `None`: it is.
pub type Change = (u64, Option<String>);

/// The fence's namespace: a thread in it makes listeners, another answers the proxy from it.
pub fn fence(
    control: Arc<OwnedFd>,
    who: Arc<Mutex<Option<Who>>>,
    pid: Arc<AtomicU32>,
    changes: Sender<Change>,
) -> Sender<(u16, Sender<TcpListener>)> {
    let (sender, wishes) = channel::<(u16, Sender<TcpListener>)>();
    std::thread::spawn(move || {
        new_namespace(&["link set lo up", "addr add 10.200.0.2/32 dev lo"]);
        std::thread::spawn(move || answer(&control, &who, &pid, &changes));
        for (port, wisher) in wishes {
            let _ = wisher.send(TcpListener::bind(("10.200.0.2", port)).expect("listener"));
        }
    });
    sender
}

fn answer(control: &OwnedFd, who: &Mutex<Option<Who>>, pid: &AtomicU32, changes: &Sender<Change>) {
    while let Some((question, _)) = receive(control) {
        match question {
            ToSupervisor::Identify { id, client, .. } => match who.lock().expect("lock").clone() {
                None => send(control, &ToProxy::Caller { id, caller: None }, &[]),
                Some(Who { exe, file }) => {
                    let file = match File::open(file) {
                        Ok(file) => file,
                        Err(error) => {
                            let reason = error.to_string();
                            send(control, &ToProxy::Failed { id, reason }, &[]);
                            continue;
                        }
                    };
                    let pid = match client.ip().to_string().as_str() {
                        OTHER => OTHER_PID,
                        _ => pid.load(Ordering::Relaxed),
                    };
                    let caller = Some(CallerRecord { pid, exe, ..CallerRecord::default() });
                    send(control, &ToProxy::Caller { id, caller }, &[file.as_fd()]);
                }
            },
            ToSupervisor::GatewaySocket { id } => {
                let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
                let socket =
                    rustix::net::socket_with(AddressFamily::INET, SocketType::STREAM, flags, None)
                        .expect("socket");
                send(control, &ToProxy::GatewaySocket { id }, &[socket.as_fd()]);
            }
            ToSupervisor::Policy { generation, refused } => {
                let _ = changes.send((generation, refused));
            }
            ToSupervisor::Ready { .. } | ToSupervisor::Prepared => panic!("ready twice"),
        }
    }
}

/// A policy as the supervisor hands it over.
pub fn policy_file(yaml: &str, upstream_ca: Option<String>) -> File {
    let data = PolicyText { name: "policy.yaml".into(), text: yaml.into() };
    let links = std::collections::BTreeMap::new();
    let new = NewPolicy { data, rules: None, upstream_ca, links };
    let mut file = tempfile::tempfile().expect("file");
    file.write_all(&serde_json::to_vec(&new).expect("json")).expect("written");
    file
}

pub fn send(control: &OwnedFd, message: &ToProxy, fds: &[BorrowedFd<'_>]) {
    let bytes = serde_json::to_vec(message).expect("json");
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut beside = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        assert!(beside.push(SendAncillaryMessage::ScmRights(fds)));
    }
    // A proxy that has ended hears nothing.
    let _ = sendmsg(control, &[IoSlice::new(&bytes)], &mut beside, SendFlags::NOSIGNAL);
}

pub fn receive(control: &OwnedFd) -> Option<(ToSupervisor, Vec<OwnedFd>)> {
    let mut bytes = vec![0; MAX_MESSAGE];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut beside = RecvAncillaryBuffer::new(&mut space);
    let got =
        recvmsg(control, &mut [IoSliceMut::new(&mut bytes)], &mut beside, RecvFlags::CMSG_CLOEXEC)
            .ok()?;
    let mut fds = Vec::new();
    for message in beside.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    (got.bytes > 0).then(|| (serde_json::from_slice(&bytes[..got.bytes]).expect("json"), fds))
}

//! The proxy, with a double in the supervisor's place: it says that one program made every
//! connection.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::{TcpListener, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use ringfence::proxy::control::{
    CallerRecord, MAX_MESSAGE, NewPolicy, PolicyText, ToProxy, ToSupervisor,
};
use ringfence::proxy::{Config, Inbound, run};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};

use crate::{NAME, PROXY};

/// Each request is judged: method, path, and a rule that does not match first.
const POLICY: &str = r#"
version: 1
network_policies:
  other:
    endpoints:
      - { host: other.bench.test, port: 443, protocol: rest, enforcement: enforce, access: read-only }
    binaries: [{ path: /usr/bin/curl }]
  api:
    endpoints:
      - host: api.bench.test
        port: 443
        protocol: rest
        enforcement: enforce
        rules:
          - allow: { method: POST, path: "/post" }
          - allow: { method: GET, path: "/ok/**" }
    binaries: [{ path: /usr/bin/curl }, { path: /usr/bin/python3 }]
"#;

/// Serves until it is killed.
pub fn serve(directory: &Path) {
    let hosts = directory.join("hosts");
    std::fs::write(&hosts, format!("10.77.0.1 {NAME}\n")).expect("hosts");
    let config = Config {
        live_policy: false,
        pod_ips: vec!["10.88.0.1".parse().expect("address")],
        api_server: Vec::new(),
        extra_roots_pem: std::fs::read(directory.join("upstream-ca.pem")).expect("certificate"),
        image_roots: None,
        inbound: Inbound::None,
        transparent: true,
        admin_port: 0,
        upstream_proxy: None,
        resolv_conf: directory.join("no-resolv.conf"),
        hosts,
    };
    let (ours, theirs) =
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .expect("socketpair");
    let to = directory.to_owned();
    std::thread::spawn(move || supervise(&ours, &to));
    run(config, theirs).expect("proxy");
}

fn supervise(control: &OwnedFd, directory: &Path) {
    let Some(ToSupervisor::Ready { .. }) = receive(control) else { panic!("not ready") };
    let part = directory.join("bundle.part");
    let file = |path: &Path| {
        let options = File::options().read(true).write(true).create(true).truncate(true).to_owned();
        OwnedFd::from(options.open(path).expect("a file"))
    };
    let tcp = |address: &str| OwnedFd::from(TcpListener::bind(address).expect("listener"));
    let listeners = [
        tcp(PROXY),
        tcp("10.200.0.1:15001"),
        OwnedFd::from(UdpSocket::bind("10.200.0.1:15053").expect("socket")),
        tcp("10.200.0.1:15053"),
    ];
    let files = [file(&part), file(&directory.join("java.jks"))];
    let data = PolicyText { name: "policy.yaml".into(), text: POLICY.into() };
    let policy = NewPolicy { data, rules: None, upstream_ca: None, links: BTreeMap::new() };
    let policy_path = directory.join("policy.json");
    std::fs::write(&policy_path, serde_json::to_vec(&policy).expect("json")).expect("policy");
    let policy = File::open(policy_path).expect("policy").into();
    let begin = ToProxy::Begin { digest: String::new() };
    send(control, &begin, &[&policy, &files[0], &files[1]].map(AsFd::as_fd));
    assert_eq!(receive(control), Some(ToSupervisor::Prepared));
    send(control, &ToProxy::Start, &listeners.each_ref().map(AsFd::as_fd));
    std::fs::rename(part, directory.join("bundle.pem")).expect("bundle");
    let exe = File::open("/proc/self/exe").expect("this program");
    // A process has its share of connections only: each gets one of its own.
    let mut pid = 1000;
    while let Some(question) = receive(control) {
        let ToSupervisor::Identify { id, .. } = question else { continue };
        pid += 1;
        let caller = CallerRecord {
            pid,
            exe: "/usr/bin/curl".to_owned(),
            ancestors: vec!["/usr/bin/bash".to_owned()],
            ..CallerRecord::default()
        };
        send(control, &ToProxy::Caller { id, caller: Some(caller) }, &[exe.as_fd()]);
    }
}

fn send(control: &OwnedFd, message: &ToProxy, fds: &[BorrowedFd<'_>]) {
    let bytes = serde_json::to_vec(message).expect("json");
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(5))];
    let mut beside = SendAncillaryBuffer::new(&mut space);
    assert!(beside.push(SendAncillaryMessage::ScmRights(fds)));
    let _ = sendmsg(control, &[IoSlice::new(&bytes)], &mut beside, SendFlags::NOSIGNAL);
}

fn receive(control: &OwnedFd) -> Option<ToSupervisor> {
    let mut bytes = vec![0; MAX_MESSAGE];
    let mut none = RecvAncillaryBuffer::default();
    let got = recvmsg(control, &mut [IoSliceMut::new(&mut bytes)], &mut none, RecvFlags::empty());
    let got = got.ok().filter(|got| got.bytes > 0)?;
    Some(serde_json::from_slice(&bytes[..got.bytes]).expect("json"))
}

//! A pod that has IPv6 only: its address, its name servers, its upstreams. The fence has IPv4 alone,
//! and its programs reach what the policy allows all the same.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv6Addr, TcpListener, UdpSocket};

use hickory_proto::op::{Message, MessageType, Metadata};
use hickory_proto::rr::rdata::AAAA;
use hickory_proto::rr::{RData, Record, RecordType};
use rustix::thread::UnshareFlags;

use crate::rig::{Rig, run, text};

const UPSTREAM: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0x77, 0, 0, 0, 0, 1);

const POLICY: &str = r#"
version: 1
filesystem_policy:
  include_workdir: false
  read_write: [/tmp, /dev/null]
network_policies:
  six:
    endpoints:
      - { host: six.test, port: 80, protocol: rest, enforcement: enforce, access: read-only }
      - { host: "2001:db8:77::1", port: 80, protocol: rest, enforcement: enforce, access: read-only }
      - { host: own.test, ports: [80, 7000] }
    binaries:
      - { path: /usr/bin/curl }
      - { path: /usr/bin/python3* }
"#;

/// What the agent tries; a line for each outcome.
const SCRIPT: &str = r#"
grep -c '^nameserver 10.200.0.1$' /etc/resolv.conf
grep -c '^nameserver' /etc/resolv.conf
grep '^search' /etc/resolv.conf
curl -s http://six.test/by-proxy
curl -s 'http://[2001:db8:77::1]/by-address'
curl -s -o /dev/null -w '%{http_code}\n' http://own.test/
unset http_proxy HTTP_PROXY https_proxy HTTPS_PROXY all_proxy ALL_PROXY no_proxy NO_PROXY
curl -s http://six.test/caught
python3 - <<'END'
import errno, socket
print(socket.getaddrinfo("six.test", 80, proto=socket.IPPROTO_TCP)[0][4][0])
for kind, port in ((socket.SOCK_STREAM, 80), (socket.SOCK_DGRAM, 53)):
    with socket.socket(socket.AF_INET6, kind) as s:
        print(errno.errorcode[s.connect_ex(("2001:db8:77::1", port))])
with socket.socket(socket.AF_INET6) as s:
    s.bind(("::1", 0))
    s.listen()
    with socket.create_connection(s.getsockname()[:2]) as c:
        print(c.getpeername()[0])
END
"#;

pub fn pod_of_ipv6_only(rig: &Rig) {
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // SAFETY: only this thread's namespaces and its own view of the file system change.
            unsafe {
                let flags = UnshareFlags::NEWNET | UnshareFlags::NEWNS | UnshareFlags::FS;
                rustix::thread::unshare_unsafe(flags).unwrap();
            }
            fenced(rig);
        });
    });
}

fn fenced(rig: &Rig) {
    run("mount", &["--make-rprivate", "/"]);
    for words in [
        "link set lo up",
        "address add 2001:db8:77::1/128 dev lo nodad",
        "link add eth0 type veth peer name eth1",
        "address add fd00:88::5/64 dev eth0 nodad",
        "link set eth0 up",
        "link set eth1 up",
    ] {
        run("ip", &words.split(' ').collect::<Vec<_>>());
    }
    let conf = rig.path("resolv6.conf");
    fs::write(&conf, format!("nameserver {UPSTREAM}\nsearch ns.svc.test\noptions ndots:5\n"))
        .unwrap();
    run("mount", &["--bind", conf.to_str().unwrap(), "/etc/resolv.conf"]);
    fs::write(rig.path("six.yaml"), POLICY).unwrap();
    name_server();
    upstream();
    let output = rig
        .supervisor()
        .env("POD_IP", "fd00:88::7")
        .arg("--policy-data")
        .arg(rig.path("six.yaml"))
        .args(["--", "sh", "-c", SCRIPT])
        .output()
        .unwrap();
    let (said, log) = (text(&output.stdout), text(&output.stderr));
    let expected = [
        "1",
        "1",
        "search ns.svc.test",
        "saw GET /by-proxy HTTP/1.1",
        "saw GET /by-address HTTP/1.1",
        // An address of the pod that POD_IP does not name.
        "403",
        "saw GET /caught HTTP/1.1",
        "198.18.0.1",
        "ENETUNREACH",
        "ENETUNREACH",
        "::1",
    ];
    assert_eq!(said.lines().collect::<Vec<_>>(), expected, "{log}");
    assert!(log.contains("fd00:88::5: the pod's own address"), "{log}");
    assert!(!log.contains("DEGRADED"), "{log}");
    // Nobody else sees the fence's file.
    let outside = fs::read_to_string("/etc/resolv.conf").unwrap();
    assert!(outside.starts_with("nameserver 2001:db8:77::1"), "{outside}");
}

/// Knows `six.test` and the pod's own name, by IPv6 addresses only.
fn name_server() {
    let socket = UdpSocket::bind((UPSTREAM, 53)).unwrap();
    std::thread::spawn(move || {
        let mut query = [0; 1500];
        while let Ok((length, peer)) = socket.recv_from(&mut query) {
            let query = Message::from_vec(&query[..length]).unwrap();
            let question = query.queries[0].clone();
            let mut answer =
                Message::new(query.metadata.id, MessageType::Response, query.metadata.op_code);
            answer.metadata = Metadata::response_from_request(&query.metadata);
            let known = match question.name.to_ascii().as_str() {
                "six.test." => Some(UPSTREAM),
                "own.test." => Some("fd00:88::5".parse().unwrap()),
                _ => None,
            };
            if let (Some(ip), RecordType::AAAA) = (known, question.query_type) {
                let data = RData::AAAA(AAAA(ip));
                answer.add_answer(Record::from_rdata(question.name.clone(), 30, data));
            }
            answer.add_query(question);
            socket.send_to(&answer.to_vec().unwrap(), peer).unwrap();
        }
    });
}

fn upstream() {
    let listener = TcpListener::bind((UPSTREAM, 80)).unwrap();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
            let first = lines.next().and_then(Result::ok).unwrap_or_default();
            while lines.next().is_some_and(|line| line.is_ok_and(|line| !line.is_empty())) {}
            let body = format!("saw {first}\n");
            let length = body.len();
            let head = "HTTP/1.1 200 OK\r\nConnection: close\r\n";
            drop(write!(stream, "{head}Content-Length: {length}\r\n\r\n{body}"));
        }
    });
}

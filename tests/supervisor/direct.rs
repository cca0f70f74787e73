//! Programs that know nothing of the proxy: names from the fence's DNS, connections that the
//! gateway catches.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, UdpSocket};
use std::process::Output;
use std::sync::OnceLock;

use hickory_proto::op::{Message, MessageType, Metadata, ResponseCode};
use hickory_proto::rr::rdata::A;
use hickory_proto::rr::{RData, Record, RecordType};

use crate::rig::{Rig, run, text};

const POLICY: &str = r#"
version: 1
filesystem_policy:
  include_workdir: false
  read_write: [/tmp, /dev/null]
network_policies:
  fetched:
    endpoints:
      - { host: fetched.test, port: 443, protocol: rest, enforcement: enforce, access: read-only }
      - { host: fetched.test, port: 80, protocol: rest, enforcement: enforce, access: read-only }
      - host: "*.wild.test"
        port: 443
        protocol: rest
        enforcement: enforce
        access: read-only
        allowed_ips: ["10.77.0.0/16"]
      - { host: mail.test, port: 2525 }
    binaries:
      - { path: /usr/bin/curl }
      - { path: /usr/bin/perl }
      - { path: /usr/bin/python3* }
      - { path: /usr/bin/node }
"#;

/// What exists outside, each at the upstream's address; none of it is in the hosts file.
const NAMES: [&str; 4] = ["fetched.test", "one.wild.test", "mail.test", "elsewhere.test"];

/// The pod's name server, a server of plain HTTP, and one that speaks first; once.
fn outside(rig: &Rig) {
    static STARTED: OnceLock<()> = OnceLock::new();
    STARTED.get_or_init(|| {
        let conf = rig.path("resolv.conf");
        fs::write(&conf, "nameserver 10.77.0.1\nsearch ns.svc.test svc.test\noptions ndots:5\n")
            .unwrap();
        run("mount", &["--bind", conf.to_str().unwrap(), "/etc/resolv.conf"]);
        fs::write(rig.path("direct.yaml"), POLICY).unwrap();
        name_server();
        listen(80, |stream| {
            let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
            let first = lines.next().and_then(Result::ok).unwrap_or_default();
            while lines.next().is_some_and(|line| line.is_ok_and(|line| !line.is_empty())) {}
            let body = format!("saw {first}\n");
            let length = body.len();
            let head = "HTTP/1.1 200 OK\r\nConnection: close\r\n";
            drop(write!(stream, "{head}Content-Length: {length}\r\n\r\n{body}"));
        });
        listen(2525, |stream| {
            drop(stream.write_all(b"220 hello\r\n"));
            let mut line = String::new();
            drop(BufReader::new(stream.try_clone().unwrap()).read_line(&mut line));
            drop(write!(stream, "250 {line}"));
        });
    });
}

fn listen(port: u16, serve: impl Fn(&mut std::net::TcpStream) + Send + 'static) {
    let listener = TcpListener::bind(("10.77.0.1", port)).unwrap();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            serve(&mut stream);
        }
    });
}

fn name_server() {
    let socket = UdpSocket::bind("10.77.0.1:53").unwrap();
    std::thread::spawn(move || {
        let mut query = [0; 1500];
        while let Ok((length, peer)) = socket.recv_from(&mut query) {
            let query = Message::from_vec(&query[..length]).unwrap();
            let question = query.queries[0].clone();
            let name = question.name.to_ascii().to_ascii_lowercase();
            let mut answer =
                Message::new(query.metadata.id, MessageType::Response, query.metadata.op_code);
            answer.metadata = Metadata::response_from_request(&query.metadata);
            if !NAMES.contains(&name.trim_end_matches('.')) {
                answer.metadata.response_code = ResponseCode::NXDomain;
            } else if question.query_type == RecordType::A {
                let ip = RData::A(A("10.77.0.1".parse().unwrap()));
                answer.add_answer(Record::from_rdata(question.name.clone(), 30, ip));
            }
            answer.add_query(question);
            socket.send_to(&answer.to_vec().unwrap(), peer).unwrap();
        }
    });
}

/// Runs a script in a fence, with nothing in its environment that names the proxy.
fn direct(rig: &Rig, words: &[&str], script: &str) -> Output {
    outside(rig);
    let unset = "unset HTTP_PROXY HTTPS_PROXY ALL_PROXY NO_PROXY GRPC_PROXY NODE_USE_ENV_PROXY \
                 http_proxy https_proxy all_proxy no_proxy grpc_proxy";
    let script = format!("{unset}; {script}");
    rig.supervisor()
        .arg("--policy-data")
        .arg(rig.path("direct.yaml"))
        .args(words)
        .args(["--", "sh", "-c", &script])
        .output()
        .unwrap()
}

fn passes(rig: &Rig, script: &str, expected: &str) {
    let output = direct(rig, &[], script);
    assert_eq!(text(&output.stdout), expected, "{script}: {}", text(&output.stderr));
    assert!(output.status.success(), "{script}");
}

/// Fails, and the log has all of `words` in one denial.
fn refused(rig: &Rig, script: &str, words: &[&str]) {
    let output = direct(rig, &[], script);
    let log = text(&output.stderr);
    assert!(!output.status.success(), "{script} passed: {} {log}", text(&output.stdout));
    let told = |line: &str| line.contains("DENIED") && words.iter().all(|word| line.contains(word));
    assert!(log.lines().any(told), "{script}: {words:?}: {log}");
}

pub fn allowed(rig: &Rig) {
    let curl = "curl -sS --noproxy '*' --max-time 10";
    passes(rig, &format!("{curl} https://fetched.test/hello"), "saw GET /hello HTTP/1.1\n");
    passes(rig, &format!("{curl} http://fetched.test/plain"), "saw GET /plain HTTP/1.1\n");
    passes(rig, &format!("{curl} https://one.wild.test/wild"), "saw GET /wild HTTP/1.1\n");
    // The address is nobody's; the name in TLS is dialled.
    let elsewhere = "--resolve fetched.test:443:203.0.113.9 https://fetched.test/named";
    passes(rig, &format!("{curl} {elsewhere}"), "saw GET /named HTTP/1.1\n");
    // A socket and nothing else, to a server that speaks first.
    let perl = "perl -MIO::Socket::INET -e '$s = IO::Socket::INET->new(PeerAddr => \"mail.test\", \
                PeerPort => 2525) or die; print scalar <$s>; print $s \"hi\\n\"; print scalar <$s>'";
    passes(rig, perl, "220 hello\r\n250 hi\n");
}

pub fn other_programs(rig: &Rig) {
    for (program, script) in [
        (
            "/usr/bin/python3",
            "/usr/bin/python3 -c 'import urllib.request as r; \
             print(r.urlopen(\"https://fetched.test/py\").read().decode(), end=\"\")'",
        ),
        (
            "/usr/bin/node",
            "/usr/bin/node -e 'fetch(\"https://fetched.test/py\").then(r => r.text())\
             .then(t => process.stdout.write(t))'",
        ),
    ] {
        if std::path::Path::new(program).exists() {
            passes(rig, script, "saw GET /py HTTP/1.1\n");
        } else {
            println!("SKIPPED: needs {program}");
        }
    }
}

pub fn denied(rig: &Rig) {
    let curl = "curl -fsS --noproxy '*' --max-time 10";
    refused(rig, &format!("{curl} -X DELETE https://fetched.test/x"), &["DELETE", "no rule"]);
    refused(
        rig,
        &format!("{curl} https://elsewhere.test/"),
        &["DNS A elsewhere.test.", "no endpoint"],
    );
    refused(
        rig,
        &format!("{curl} --resolve elsewhere.test:443:10.77.0.1 https://elsewhere.test/"),
        &["elsewhere.test:443", "no policy allows"],
    );
    refused(rig, &format!("{curl} -k https://10.77.0.1/"), &["10.77.0.1:443", "connect by a name"]);
    refused(
        rig,
        &format!("{curl} http://fetched.test:8080/"),
        &["fetched.test:8080", "port that no endpoint"],
    );
    let connect_to = "--connect-to other.test:443:fetched.test:443 -k https://other.test/";
    refused(rig, &format!("{curl} {connect_to}"), &["fetched.test:443", "SNI"]);
    refused(
        rig,
        &format!("{curl} -H 'Host: other.test' https://fetched.test/"),
        &["fetched.test:443", "Host"],
    );
    let copy = "cp /usr/bin/curl /tmp/other-curl; trap 'rm -f /tmp/other-curl' EXIT; \
                /tmp/other-curl -sS --noproxy '*' --max-time 10 https://fetched.test/";
    refused(rig, copy, &["/tmp/other-curl", "fetched.test:443", "not for this binary"]);
}

/// The server that the container's resolv.conf names, over both transports, by hand.
pub fn dns(rig: &Rig) {
    let ask = |kind: &str| {
        format!(
            "perl -MIO::Socket::INET -e '$t = \"{kind}\"; \
             $s = IO::Socket::INET->new(PeerAddr => \"10.77.0.1\", PeerPort => 53, Proto => $t) or die; \
             $q = pack(\"n6\", 9, 256, 1, 0, 0, 0) . \"\\7fetched\\4test\\0\" . pack(\"n2\", 1, 1); \
             $q = pack(\"n\", length $q) . $q if $t eq \"tcp\"; \
             syswrite $s, $q; sysread $s, $a, 512; $a = substr $a, 2 if $t eq \"tcp\"; \
             print join(\".\", unpack(\"C4\", substr $a, -4)), \"\\n\"'"
        )
    };
    passes(rig, &ask("udp"), "198.18.0.1\n");
    passes(rig, &ask("tcp"), "198.18.0.1\n");
    passes(
        rig,
        "getent hosts localhost > /dev/null; getent ahostsv4 fetched.test | head -1 | cut -d' ' -f1",
        "198.18.0.1\n",
    );
}

pub fn switched_off(rig: &Rig) {
    let curl = "curl -sS --noproxy '*' --max-time 10";
    let off = ["--transparent", "off"];
    for url in
        ["https://fetched.test/", "--resolve fetched.test:443:10.77.0.1 https://fetched.test/"]
    {
        let output = direct(rig, &off, &format!("{curl} {url}"));
        assert!(!output.status.success(), "{}", text(&output.stdout));
        let log = text(&output.stderr);
        assert!(log.contains("DENIED") && log.contains("proxy at http://10.200.0.1:3128"), "{log}");
    }
    let output =
        direct(rig, &off, "curl -sS --proxy http://10.200.0.1:3128 https://fetched.test/by");
    assert_eq!(text(&output.stdout), "saw GET /by HTTP/1.1\n", "{}", text(&output.stderr));
}

//! The admin endpoint of a real fence.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use crate::rig::{Background, Rig, SUPERVISOR, eventually, text};

pub const PORT: &str = "15200";
const ADMIN: &str = "127.0.0.1:15200";

/// A response; empty while nothing listens.
pub fn get(path: &str) -> String {
    let Ok(mut tcp) = TcpStream::connect(ADMIN) else { return String::new() };
    tcp.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    write!(tcp, "GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
    let mut answer = String::new();
    tcp.read_to_string(&mut answer).unwrap();
    answer
}

fn start(rig: &Rig, script: &str) -> Background {
    let mut command = rig.with_policy();
    Background::start(command.args(["--admin-port", PORT, "--", "sh", "-c", script]))
}

pub fn ready_and_attested(rig: &Rig) {
    let agent = start(rig, "echo up; exec sleep 60");
    eventually("the admin endpoint is ready", || get("/readyz").starts_with("HTTP/1.1 200 "));
    let answer = get("/attestation");
    let body = answer.split_once("\r\n\r\n").expect("a response").1;
    let attested: Value = serde_json::from_str(body).expect("JSON");
    assert_eq!(attested["user"]["uid"], 1000, "{body}");
    let status =
        Command::new(SUPERVISOR).args(["status", "--run-dir"]).arg(&rig.run_dir).output().unwrap();
    let status: Value = serde_json::from_slice(&status.stdout).expect("JSON");
    assert_eq!(attested, status);
    assert!(get("/metrics").contains("\nringfence_ready 1\n"));
    // A filter or a missing right would show here.
    let mut tcp = TcpStream::connect(ADMIN).unwrap();
    tcp.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    write!(tcp, "GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
    let mut first = [0; 12];
    tcp.read_exact(&mut first).unwrap();
    assert_eq!(&first, b"HTTP/1.1 200");
    drop(agent);
    eventually("the end of the endpoint", || TcpStream::connect(ADMIN).is_err());
}

pub fn out_of_the_agents_reach(rig: &Rig) {
    let script = "curl -s -m 5 --noproxy '*' http://127.0.0.1:15200/healthz; echo own $?; \
         curl -s -m 5 --noproxy '*' http://10.77.0.1:15200/healthz; echo direct $?; \
         curl -s -m 5 --noproxy '' -x http://10.200.0.1:3128 -o /dev/null -w 'proxy %{http_code}\\n' http://127.0.0.1:15200/healthz; \
         exec sleep 60";
    let mut agent = start(rig, script);
    eventually("the admin endpoint is ready", || get("/readyz").starts_with("HTTP/1.1 200 "));
    let seen = [agent.line.clone(), agent.next(), agent.next()];
    // 7 and 56: refused, reset.
    assert_eq!(seen[0], "own 7");
    assert!(matches!(seen[1].as_str(), "direct 7" | "direct 56" | "direct 52"), "{seen:?}");
    assert_eq!(seen[2], "proxy 403");
}

pub fn off_or_taken(rig: &Rig) {
    let agent = rig.background("echo up; exec sleep 60");
    assert!(TcpStream::connect(ADMIN).is_err(), "off by default");
    drop(agent);
    let _taken = TcpListener::bind(ADMIN).unwrap();
    let mut command = rig.with_policy();
    let output =
        command.args(["--admin-port", PORT, "--", "sh", "-c", "sleep 1"]).output().unwrap();
    let log = text(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{log}");
    assert!(log.contains("the admin endpoint 127.0.0.1:15200 cannot be opened"), "{log}");
}

//! Ports of the fence's loopback that lead to sidecars: under the policy's `localhost` and nothing
//! else, by whom the connection is, and never back into the fence.

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Output;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crate::rig::{Background, POLICY, Rig, eventually, text};

/// What the policy says of them. No server listens on 8095 and 8096.
const SIDECARS: &str = r#"
  sidecars:
    endpoints:
      - host: localhost
        port: 8090
        protocol: rest
        enforcement: enforce
        rules: [{ allow: { method: GET, path: "/ok/**" } }]
      - { host: 127.0.0.1, ports: [8091, 8093] }
      - { port: 8092, allowed_ips: ["10.0.0.0/8"] }
      - { host: localhost, port: 8094, allowed_ips: ["10.0.0.0/8"] }
      - { host: localhost, ports: [8095, 15200] }
    binaries: [{ path: /usr/bin/curl }]
"#;

/// A sidecar on the pod's loopback, and how many connections it saw.
struct Sidecar {
    seen: Arc<AtomicUsize>,
}

impl Sidecar {
    /// Answers HTTP, or says hello first.
    fn listen(port: u16, greets: bool) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", port)).unwrap();
        let seen = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&seen);
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                counted.fetch_add(1, Ordering::SeqCst);
                if greets {
                    drop(stream.write_all(b"hello from the sidecar\n"));
                    continue;
                }
                std::thread::spawn(move || answer(&mut stream));
            }
        });
        Self { seen }
    }

    fn seen(&self) -> usize {
        self.seen.swap(0, Ordering::SeqCst)
    }
}

fn answer(stream: &mut TcpStream) {
    let (mut head, mut byte) = (Vec::new(), [0]);
    while !head.ends_with(b"\r\n\r\n") && stream.read_exact(&mut byte).is_ok() {
        head.push(byte[0]);
    }
    let line = text(&head).lines().next().unwrap_or_default().to_owned();
    let body = format!("sidecar saw {line}\n");
    let length = body.len();
    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n");
    drop(stream.write_all(format!("{head}{body}").as_bytes()));
}

struct Play<'a> {
    rig: &'a Rig,
    inspected: Sidecar,
    greeting: Sidecar,
    unnamed: Sidecar,
    unlisted: Sidecar,
    elsewhere: Sidecar,
}

impl<'a> Play<'a> {
    fn begin(rig: &'a Rig) -> Self {
        fs::write(rig.path("sidecars.yaml"), format!("{POLICY}{SIDECARS}")).unwrap();
        Self {
            rig,
            inspected: Sidecar::listen(8090, false),
            greeting: Sidecar::listen(8091, true),
            unnamed: Sidecar::listen(8092, false),
            unlisted: Sidecar::listen(8093, false),
            elsewhere: Sidecar::listen(8094, false),
        }
    }

    fn command(&self, flags: &[&str]) -> std::process::Command {
        let mut command = self.rig.supervisor();
        command.arg("--policy-data").arg(self.rig.path("sidecars.yaml")).args(flags);
        command
    }

    fn run(&self, flags: &[&str], script: &str) -> Output {
        self.command(flags).args(["--", "sh", "-c", script]).output().unwrap()
    }
}

const PORTS: [&str; 2] = ["--sidecar-ports", "8090-8092,8094-8095"];

pub fn all(rig: &Rig) {
    let play = Play::begin(rig);
    relayed(&play);
    attributed(&play);
    not_named(&play);
    never_back(&play);
    refused_at_start(&play);
    of_a_runner(&play);
}

/// What the policy allows passes, request by request; without the flag nothing listens.
fn relayed(play: &Play<'_>) {
    for more in [&[][..], &["--transparent", "off"]] {
        let flags = [&PORTS[..], more].concat();
        let output = play.run(&flags, "curl -sS -f -m 20 http://localhost:8090/ok/x");
        let seen = text(&output.stdout);
        assert_eq!(seen, "sidecar saw GET /ok/x HTTP/1.1\n", "{}", text(&output.stderr));
    }
    assert_eq!(play.inspected.seen(), 2);
    for (asked, log) in [
        ("http://localhost:8090/other", "DENIED GET http://localhost:8090/other"),
        ("-d x http://localhost:8090/ok/x", "DENIED POST http://localhost:8090/ok/x"),
    ] {
        let output = play.run(&PORTS, &format!("curl -sS -m 20 -w '%{{http_code}}' {asked}"));
        let (seen, said) = (text(&output.stdout), text(&output.stderr));
        assert!(seen.contains("policy_denied") && seen.ends_with("403"), "{asked}: {seen}{said}");
        assert!(said.contains("DENIED") && said.contains("localhost:8090"), "{log}: {said}");
    }
    // Judged before the sidecar hears of it; its connection was made for the first request.
    play.inspected.seen();
    // The other name is another entry, here none.
    let output = play.run(&PORTS, "curl -sS -m 20 http://127.0.0.1:8090/ok/x");
    let said = text(&output.stderr);
    assert!(!output.status.success(), "{}", text(&output.stdout));
    assert!(said.contains("DENIED") && said.contains("127.0.0.1:8090"), "{said}");
    // One that is neither.
    let output =
        play.run(&PORTS, "curl -sS -m 20 -H 'Host: upstream.test' http://localhost:8090/ok/x");
    assert!(!output.status.success(), "{}", text(&output.stdout));
    assert!(
        text(&output.stderr).contains("another host than localhost"),
        "{}",
        text(&output.stderr)
    );
    assert_eq!(play.inspected.seen(), 0);
    // By the proxy, for who does not read NO_PROXY.
    let by_proxy =
        "curl -sS -f -m 20 --noproxy '' -x http://10.200.0.1:3128 http://localhost:8090/ok/p";
    let output = play.run(&PORTS, by_proxy);
    assert!(text(&output.stdout).contains("saw GET /ok/p"), "{}", text(&output.stderr));
    // A server that speaks first, on an endpoint that is allowed whole.
    let output = play.run(&PORTS, "curl -sS -m 20 telnet://127.0.0.1:8091 </dev/null");
    let seen = text(&output.stdout);
    assert_eq!(seen, "hello from the sidecar\n", "{}", text(&output.stderr));
    assert_eq!(play.greeting.seen(), 1);
    // Allowed by the policy, not one of the ports.
    for flags in [&[][..], &PORTS] {
        let output = play.run(flags, "curl -sS -m 20 http://127.0.0.1:8093/");
        assert_eq!(output.status.code(), Some(7), "{}", text(&output.stderr));
        let by_proxy =
            "curl -sS -m 20 --noproxy '' -x http://10.200.0.1:3128 http://127.0.0.1:8093/";
        let output = play.run(flags, by_proxy);
        assert!(text(&output.stdout).contains("ssrf_denied"), "{}", text(&output.stdout));
        assert!(text(&output.stderr).contains("--sidecar-ports"), "{}", text(&output.stderr));
    }
    assert_eq!(play.unlisted.seen(), 0);
    // Who is not there is not there.
    let output = play.run(&PORTS, "curl -sS -m 20 http://localhost:8095/");
    assert!(![Some(0), Some(28)].contains(&output.status.code()), "{output:?}");
}

/// By the program that connected, not by who is its parent or holds the listener.
fn attributed(play: &Play<'_>) {
    play.inspected.seen();
    let other = "cp /usr/bin/curl /tmp/rf-other && /tmp/rf-other -sS -m 20 http://localhost:8090/ok/x; \
                 c=$?; rm -f /tmp/rf-other; exit $c";
    let output = play.run(&PORTS, other);
    let said = text(&output.stderr);
    assert!(!output.status.success(), "{}", text(&output.stdout));
    assert!(said.contains("DENIED") && said.contains("/tmp/rf-other"), "{said}");
    assert!(said.contains("localhost:8090"), "{said}");
    // Both at once, many times: each is taken for itself, whatever port it comes from.
    let both = "cp /usr/bin/curl /tmp/rf-other; for i in 1 2 3 4 5 6 7 8; do \
                curl -sS -f -m 20 http://localhost:8090/ok/yes & \
                /tmp/rf-other -s -m 20 http://localhost:8090/ok/no & done; wait; rm -f /tmp/rf-other";
    let output = play.run(&PORTS, both);
    let seen = text(&output.stdout);
    assert_eq!(seen.matches("saw GET /ok/yes").count(), 8, "{seen}{}", text(&output.stderr));
    assert!(!seen.contains("/ok/no"), "{seen}");
    assert_eq!(play.inspected.seen(), 8);
    // From another address of the loopback, and from the fence's own.
    for from in ["127.0.0.7", "10.200.0.2"] {
        let script = format!("curl -sS -f -m 20 --interface {from} http://localhost:8090/ok/x");
        let output = play.run(&PORTS, &script);
        assert!(text(&output.stdout).contains("saw GET"), "{from}: {}", text(&output.stderr));
    }
}

/// Only an endpoint that names the loopback opens it.
fn not_named(play: &Play<'_>) {
    for port in [8092, 8094] {
        let output = play.run(&PORTS, &format!("curl -sS -m 20 http://localhost:{port}/"));
        let said = text(&output.stderr);
        assert!(!output.status.success(), "{port}: {}", text(&output.stdout));
        assert!(said.contains("DENIED") && said.contains(&port.to_string()), "{port}: {said}");
    }
    assert_eq!((play.unnamed.seen(), play.elsewhere.seen()), (0, 0));
}

/// A port is the fence's: the agent cannot listen there, and what it listens on beside is not taken
/// for the sidecar, by the pod as little as by itself.
fn never_back(play: &Play<'_>) {
    const LISTEN: &str = "use IO::Socket::INET; sub l { IO::Socket::INET->new(Listen => 5, \
        LocalAddr => $_[0], LocalPort => $_[1], ReuseAddr => 1) or (print(\"$_[0]:$_[1] $!\\n\"), undef) } ";
    let bind = format!("perl -e '{LISTEN} l(\"127.0.0.1\", 8090); l(\"0.0.0.0\", 8090)'");
    let seen = text(&play.run(&PORTS, &bind).stdout);
    assert_eq!(seen.matches("Address already in use").count(), 2, "{seen}");
    // The sidecar of 8095 has not come up yet.
    let serve = format!(
        "exec perl -e '{LISTEN} $a = l(\"10.200.0.2\", 8095); $b = l(\"10.200.0.2\", 8096); $| = 1; \
         print \"up\\n\"; sleep 60'"
    );
    let mut command = play.command(&PORTS);
    let fence = Background::start(command.args(["--", "sh", "-c", &serve]));
    assert_eq!(fence.line, "up");
    let connect = |port: u16| {
        TcpStream::connect_timeout(&([127, 0, 0, 1], port).into(), Duration::from_secs(5))
    };
    eventually("that the other port is open in the pod", || connect(8096).is_ok());
    assert!(connect(8095).is_err(), "the agent listens where the pod expects a sidecar");
}

fn refused_at_start(play: &Play<'_>) {
    for (flags, words) in [
        (&["--sidecar-ports", "8090", "--admin-port", "8090"][..], ["--admin-port", "8090"]),
        (&["--sidecar-ports", "8090", "--inbound", "80,8090"], ["--inbound", "8090"]),
    ] {
        let output = play.run(flags, "echo ran");
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(125), "{said}");
        assert!(words.iter().all(|word| said.contains(word)) && output.stdout.is_empty(), "{said}");
    }
    for ports in ["80", "15200", "3128", "8090-8200"] {
        let output = play.run(&["--sidecar-ports", ports], "echo ran");
        assert!(!output.status.success() && output.stdout.is_empty(), "{ports}");
    }
    // The admin endpoint, which the policy names: it is no sidecar's.
    let by_proxy =
        "curl -sS -m 20 --noproxy '' -x http://10.200.0.1:3128 http://localhost:15200/healthz";
    let output = play.run(&[&PORTS[..], &["--admin-port", "15200"]].concat(), by_proxy);
    assert!(text(&output.stdout).contains("ssrf_denied"), "{}", text(&output.stdout));
    let direct = "curl -sS -m 20 http://localhost:15200/healthz";
    let output = play.run(&[&PORTS[..], &["--admin-port", "15200"]].concat(), direct);
    assert_eq!(output.status.code(), Some(7), "{}", text(&output.stdout));
}

/// Several at once in one container, each with its own loopback, as a runner starts them.
fn of_a_runner(play: &Play<'_>) {
    play.inspected.seen();
    let rig = play.rig;
    let start = |number: usize| {
        let mut command = std::process::Command::new(rig.path("openshell-sandbox"));
        command.env_clear().env("PATH", "/usr/bin:/bin").arg("--policy-rules");
        command.arg(rig.path("policy.rego")).arg("--policy-data").arg(rig.path("sidecars.yaml"));
        command.env("RINGFENCE_OPTIONS", r#"["--inbound","none","--sidecar-ports","8090"]"#);
        let script = format!("curl -sS -f -m 20 http://localhost:8090/ok/{number}; id -u");
        command.args(["--", "sh", "-c", &script]).stdin(std::process::Stdio::null());
        command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
        command.spawn().unwrap()
    };
    let agents: Vec<_> = (0..6).map(start).collect();
    for (number, agent) in agents.into_iter().enumerate() {
        let output = agent.wait_with_output().unwrap();
        let seen = text(&output.stdout);
        assert!(seen.contains(&format!("/ok/{number} ")), "{seen}{}", text(&output.stderr));
    }
    assert_eq!(play.inspected.seen(), 6);
}

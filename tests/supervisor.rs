//! The supervisor as a program, on this kernel: real namespaces, a real TLS server, real curl.
//!
//! Needs root. Runs itself again in a network and a mount namespace of its own, so that nothing of
//! the machine is touched: the upstream listens on 10.77.0.1 of the test's loopback, and
//! `/etc/hosts` is the test's.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

#[path = "supervisor/asked.rs"]
mod asked;

use ringfence::pki::{Authority, LeafKey, SubjectName};

const SUPERVISOR: &str = env!("CARGO_BIN_EXE_ringfence-supervisor");
const INSIDE: &str = "RINGFENCE_TEST_INSIDE";
const POLICY: &str = r"
version: 1
filesystem_policy:
  include_workdir: false
  read_write: [/tmp, /dev/null]
network_policies:
  upstream:
    endpoints:
      - host: upstream.test
        port: 443
        protocol: rest
        enforcement: enforce
        access: read-only
    binaries:
      - path: /usr/bin/curl
";

fn main() {
    if !rustix_is_root() {
        println!("SKIPPED: tests/supervisor needs root");
        println!("0 passed, 0 failed");
        return;
    }
    if std::env::var_os(INSIDE).is_none() {
        let this = std::env::current_exe().unwrap();
        let error = Command::new("unshare")
            .args(["--net", "--mount", "--propagation", "private", "--"])
            .arg(this)
            .args(std::env::args_os().skip(1))
            .env(INSIDE, "1")
            .exec();
        panic!("cannot run unshare(1): {error}");
    }
    let rig = Rig::new();
    let only = std::env::args().skip(1).find(|word| !word.starts_with('-'));
    let (mut passed, mut failed) = (0, 0);
    for (name, test) in TESTS {
        if only.as_ref().is_some_and(|only| !name.contains(only.as_str())) {
            continue;
        }
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| test(&rig)));
        println!("test {name} ... {}", if outcome.is_ok() { "ok" } else { "FAILED" });
        *if outcome.is_ok() { &mut passed } else { &mut failed } += 1;
    }
    println!("{passed} passed, {failed} failed");
    std::process::exit(i32::from(failed > 0));
}

fn rustix_is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|meta| std::os::unix::fs::MetadataExt::uid(&meta) == 0)
}

type Test = (&'static str, fn(&Rig));
const TESTS: &[Test] = &[
    ("the_agents_exit_code_is_ours", exit_codes),
    ("the_agent_is_nobody_special", identity),
    ("an_allowed_request_passes", allowed),
    ("what_is_not_allowed_is_refused_with_its_reason", refused),
    ("a_connection_round_the_proxy_is_refused_at_once", direct),
    ("the_agent_cannot_climb_out", escapes),
    ("a_signal_reaches_the_agent", signals),
    ("nothing_outlives_the_supervisor", supervisor_killed),
    ("nothing_outlives_the_proxy", proxy_killed),
    ("every_thread_of_the_proxy_is_locked", proxy_threads),
    ("enter_runs_inside", enter),
    ("enter_never_runs_outside", enter_without_fence),
    ("an_agent_that_stops_what_enters_stops_nobody_else", stopped_child),
    ("what_an_agent_linked_is_not_opened_to_the_next", planted_link),
    ("a_port_of_the_agent_is_reachable", inbound),
    ("broken_input_is_named", broken_input),
    ("memfd_and_limits_are_the_policys", asked::memfd_and_limits),
    ("a_limit_that_cannot_be_set_is_named", asked::limit_too_high),
    ("sockets_in_volumes_are_listed_or_refused", asked::sockets),
    ("without_setpcap_it_works_and_says_so", asked::without_setpcap),
    ("a_pinned_binary_is_another_when_its_content_is", asked::pinned),
    ("a_tainted_binary_is_refused", asked::tainted),
    ("the_authors_variables_stay_and_are_listed", asked::authors_variables),
    ("many_at_once_and_nothing_left", many),
];

/// What all tests share.
struct Rig {
    dir: tempfile::TempDir,
}

impl Rig {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        // Others must be able to look in: the agent and the proxy are other users.
        fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))
            .unwrap();
        run("ip", &["link", "set", "lo", "up"]);
        run("ip", &["address", "add", "10.77.0.1/32", "dev", "lo"]);
        let hosts = dir.path().join("hosts");
        fs::write(&hosts, "127.0.0.1 localhost\n10.77.0.1 upstream.test other.test\n").unwrap();
        run("mount", &["--bind", hosts.to_str().unwrap(), "/etc/hosts"]);
        let authority = Authority::ephemeral("Test CA", Duration::from_secs(86_400)).unwrap();
        fs::write(dir.path().join("ca.pem"), authority.certificate_pem()).unwrap();
        fs::write(dir.path().join("policy.yaml"), POLICY).unwrap();
        serve(&authority);
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The supervisor without a policy and without its `--`.
    fn supervisor(&self) -> Command {
        let mut command = Command::new(SUPERVISOR);
        command
            .env_clear()
            .env("PATH", "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin")
            .arg("--upstream-ca")
            .arg(self.path("ca.pem"))
            .args(["--run-as", "1000:1000", "--no-env", "--workdir", "/tmp"])
            .arg("--run-dir")
            .arg(self.path("run"))
            .stdin(Stdio::null());
        command
    }

    fn with_policy(&self) -> Command {
        let mut command = self.supervisor();
        command.arg("--policy-data").arg(self.path("policy.yaml"));
        command
    }

    fn fenced(&self, words: &[&str]) -> Output {
        self.with_policy().arg("--").args(words).output().unwrap()
    }

    fn shell(&self, script: &str) -> Output {
        self.fenced(&["sh", "-c", script])
    }

    /// Starts a fence in the background and waits until its agent has printed a line.
    fn background(&self, script: &str) -> Background {
        self.background_of(self.with_policy(), script)
    }

    fn background_with(&self, policy: &Path, script: &str) -> Background {
        let mut command = self.supervisor();
        command.arg("--policy-data").arg(policy);
        self.background_of(command, script)
    }

    #[allow(clippy::unused_self, reason = "the supervisor runs in the rig")]
    fn background_of(&self, mut command: Command, script: &str) -> Background {
        let mut child = command
            .args(["--", "sh", "-c", script])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let mut stdout = std::io::BufReader::new(child.stdout.take().unwrap());
        std::io::BufRead::read_line(&mut stdout, &mut line).unwrap();
        if line.is_empty() {
            let mut stderr = String::new();
            child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
            panic!("the fence did not come up: {stderr}");
        }
        Background { child, line: line.trim().to_owned() }
    }

    fn enter(&self, words: &[&str]) -> Output {
        Command::new(SUPERVISOR)
            .arg("enter")
            .arg("--run-dir")
            .arg(self.path("run"))
            .args(["--wait", "2", "--"])
            .args(words)
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }
}

struct Background {
    child: std::process::Child,
    line: String,
}

impl Drop for Background {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

impl Background {
    fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    fn wait(&mut self) -> Option<i32> {
        let until = Instant::now() + Duration::from_secs(30);
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            assert!(Instant::now() < until, "the supervisor does not end");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn signal(&self, signal: &str) {
        run("kill", &[signal, &self.pid().to_string()]);
    }
}

fn run(program: &str, words: &[&str]) {
    let status = Command::new(program).args(words).status().unwrap();
    assert!(status.success(), "{program} {words:?}: {status}");
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A TLS server that answers every request with its first line.
fn serve(authority: &Authority) {
    let names = ["upstream.test", "other.test"].map(|name| SubjectName::Dns(name.into()));
    let key = LeafKey::generate().unwrap();
    let leaf = authority.leaf(&names, Duration::from_secs(86_400), &key).unwrap();
    let config = rustls::ServerConfig::builder_with_provider(ringfence::pki::provider())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(leaf)));
    let config = Arc::new(config);
    for port in [443, 8443] {
        let config = Arc::clone(&config);
        let listener = TcpListener::bind(("10.77.0.1", port)).unwrap();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let config = Arc::clone(&config);
                std::thread::spawn(move || {
                    let mut connection = rustls::ServerConnection::new(config).unwrap();
                    let mut stream = stream;
                    let mut tls = rustls::Stream::new(&mut connection, &mut stream);
                    let mut head = Vec::new();
                    let mut byte = [0];
                    while !head.ends_with(b"\r\n\r\n") && tls.read_exact(&mut byte).is_ok() {
                        head.push(byte[0]);
                    }
                    let line = text(&head).lines().next().unwrap_or_default().to_owned();
                    let body = format!("saw {line}\n");
                    let length = body.len();
                    drop(write!(
                        tls,
                        "HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}"
                    ));
                    drop(tls.flush());
                    tls.conn.send_close_notify();
                    drop(tls.flush());
                });
            }
        });
    }
}

fn exit_codes(rig: &Rig) {
    for (words, code) in [
        (&["true"][..], 0),
        (&["false"], 1),
        (&["sh", "-c", "exit 7"], 7),
        (&["sh", "-c", "kill -TERM $$"], 143),
        (&["sh", "-c", "kill -KILL $$"], 137),
        (&["no-such-program"], 127),
        (&["/no/such/program"], 127),
        (&["/etc/passwd"], 126),
    ] {
        let output = rig.fenced(words);
        assert_eq!(output.status.code(), Some(code), "{words:?}: {}", text(&output.stderr));
    }
    let output = rig.with_policy().args(["--timeout", "1", "--", "sleep", "60"]).output().unwrap();
    assert_eq!(output.status.code(), Some(124));
}

fn identity(rig: &Rig) {
    let output = rig.shell("id; cat /proc/self/status; ls -l /proc/self/fd | wc -l; umask");
    let seen = text(&output.stdout);
    assert!(seen.starts_with("uid=1000"), "{seen}{}", text(&output.stderr));
    assert!(!seen.lines().next().unwrap().contains("(root)"), "{seen}");
    for line in
        ["CapEff:\t0000000000000000", "CapBnd:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2"]
    {
        assert!(seen.contains(line), "{line} is not in {seen}");
    }
}

fn curl(rig: &Rig, words: &str) -> Output {
    rig.shell(&format!("curl -sS --max-time 5 {words}"))
}

fn allowed(rig: &Rig) {
    let output = curl(rig, "https://upstream.test/hello");
    assert_eq!(text(&output.stdout), "saw GET /hello HTTP/1.1\n", "{}", text(&output.stderr));
    assert!(output.status.success());
}

fn refused(rig: &Rig) {
    for (words, reason) in [
        ("-X POST -d x https://upstream.test/hello", "POST"),
        ("-X DELETE https://upstream.test/hello", "DELETE"),
        ("https://other.test/", "other.test"),
        ("https://upstream.test:8443/", "8443"),
        ("http://upstream.test/", "upstream.test"),
        ("https://10.77.0.1/", "10.77.0.1"),
    ] {
        let output = curl(rig, &format!("-f {words}"));
        assert!(!output.status.success(), "{words} passed: {}", text(&output.stdout));
        let log = text(&output.stderr);
        assert!(log.contains("DENIED") && log.contains(reason), "{words}: {log}");
    }
    // A copy of the allowed program is another program.
    let output = rig.shell("cp /usr/bin/curl /tmp/other-curl && /tmp/other-curl -sS --max-time 5 https://upstream.test/; code=$?; rm -f /tmp/other-curl; exit $code");
    assert!(!output.status.success(), "{}", text(&output.stdout));
    assert!(text(&output.stderr).contains("/tmp/other-curl"), "{}", text(&output.stderr));
}

fn direct(rig: &Rig) {
    let started = Instant::now();
    let output = curl(rig, "--noproxy '*' https://10.77.0.1/");
    assert!(!output.status.success());
    assert!(text(&output.stderr).contains("10.77.0.1"), "{}", text(&output.stderr));
    let output = rig.shell("curl -sS --noproxy '*' --max-time 5 https://upstream.test/");
    assert!(!output.status.success());
    // Far under the clients' own patience: refused, not lost.
    assert!(started.elapsed() < Duration::from_secs(4), "{:?}", started.elapsed());
}

fn escapes(rig: &Rig) {
    for script in [
        "touch /usr/escaped",
        "touch /etc/escaped",
        "cat /etc/shadow",
        "ls /root",
        "ls /home",
        "unshare -U true",
        "unshare -n true",
        "mount -t tmpfs none /tmp",
        "cat /proc/1/environ",
        "kill -0 1 || false",
        "perl -e 'use POSIX; POSIX::setuid(0) and exit 0; exit 1'",
        "perl -e 'exit(syscall(101, 16, $$, 0, 0) == 0 ? 0 : 1)'",
        "perl -e 'use Socket; socket(my $s, AF_INET, SOCK_RAW, 1) and exit 0; exit 1'",
        "perl -e 'exit(syscall(319, my $n = \"x\", 0) >= 0 ? 0 : 1)'",
    ] {
        let output = rig.shell(script);
        assert!(!output.status.success(), "{script} worked: {}", text(&output.stdout));
        assert_ne!(output.status.code(), Some(125), "{script}: {}", text(&output.stderr));
    }
}

fn signals(rig: &Rig) {
    let mut fence = rig.background("trap 'exit 7' TERM; echo up; while :; do sleep 0.05; done");
    fence.signal("-TERM");
    assert_eq!(fence.wait(), Some(7));
}

/// Whether a process with this mark in its command line lives.
fn lives(mark: &str) -> bool {
    fs::read_dir("/proc").unwrap().flatten().any(|entry| {
        fs::read(entry.path().join("cmdline")).is_ok_and(|line| text(&line).contains(mark))
    })
}

fn dies(mark: &str) {
    let until = Instant::now() + Duration::from_secs(5);
    while lives(mark) {
        assert!(Instant::now() < until, "{mark} lives on");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn supervisor_killed(rig: &Rig) {
    let script = "(setsid sleep 7654321 &) ; echo up; sleep 7654322";
    let mut fence = rig.background(script);
    assert!(lives("7654321") && lives("7654322"));
    fence.signal("-KILL");
    fence.wait();
    for mark in ["7654321", "7654322"] {
        dies(mark);
    }
}

fn proxy_of(supervisor: i32) -> i32 {
    let children =
        fs::read_to_string(format!("/proc/{supervisor}/task/{supervisor}/children")).unwrap();
    children
        .split_whitespace()
        .find(|pid| {
            fs::read(format!("/proc/{pid}/cmdline"))
                .is_ok_and(|line| text(&line).ends_with("\0proxy\0"))
        })
        .expect("the supervisor has a proxy")
        .parse()
        .unwrap()
}

fn proxy_killed(rig: &Rig) {
    let mut fence = rig.background("(setsid sleep 7654323 &) ; echo up; sleep 7654324");
    run("kill", &["-KILL", &proxy_of(fence.pid()).to_string()]);
    assert_eq!(fence.wait(), Some(125));
    let mut log = String::new();
    fence.child.stderr.take().unwrap().read_to_string(&mut log).unwrap();
    assert!(log.contains("the proxy has ended"), "{log}");
    for mark in ["7654323", "7654324"] {
        dies(mark);
    }
}

fn proxy_threads(rig: &Rig) {
    let fence = rig.background("echo up; sleep 60");
    let proxy = proxy_of(fence.pid());
    let mut count = 0;
    for task in fs::read_dir(format!("/proc/{proxy}/task")).unwrap().flatten() {
        let status = fs::read_to_string(task.path().join("status")).unwrap();
        for set in ["Inh", "Prm", "Eff", "Bnd", "Amb"] {
            assert!(status.contains(&format!("Cap{set}:\t0000000000000000")), "{status}");
        }
        for line in ["NoNewPrivs:\t1", "Seccomp:\t2", "Uid:\t65530\t65530\t65530\t65530"] {
            assert!(status.contains(line), "{line} is not in {status}");
        }
        count += 1;
    }
    assert!(count > 0);
    assert_eq!(fs::read(format!("/proc/{proxy}/environ")).unwrap(), b"");
}

fn enter(rig: &Rig) {
    let fence = rig.background("echo up; readlink /proc/self/ns/net; sleep 60");
    let output = rig.enter(&["sh", "-c", "id -u; cat /proc/net/route | head -1; exit 3"]);
    assert_eq!(output.status.code(), Some(3), "{}", text(&output.stderr));
    assert!(text(&output.stdout).starts_with("1000\n"), "{}", text(&output.stdout));
    let output = rig.enter(&["curl", "-sS", "--max-time", "5", "https://upstream.test/entered"]);
    assert_eq!(text(&output.stdout), "saw GET /entered HTTP/1.1\n", "{}", text(&output.stderr));
    assert_eq!(rig.enter(&["no-such-program"]).status.code(), Some(127));
    assert_eq!(fence.line, "up");
    // The client's death is the command's.
    let mut client = Command::new(SUPERVISOR)
        .arg("enter")
        .arg("--run-dir")
        .arg(rig.path("run"))
        .args(["--", "sleep", "7654325"])
        .spawn()
        .unwrap();
    let until = Instant::now() + Duration::from_secs(5);
    while !lives("sleep\x007654325") {
        assert!(Instant::now() < until);
        std::thread::sleep(Duration::from_millis(10));
    }
    client.kill().unwrap();
    client.wait().unwrap();
    dies("sleep\x007654325");
}

fn enter_without_fence(rig: &Rig) {
    let mark = rig.path("outside");
    let output = rig.enter(&["touch", mark.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(125));
    assert!(text(&output.stderr).contains("no fence to enter"), "{}", text(&output.stderr));
    assert!(!mark.exists());
}

/// A child that enters has the agent's user before it executes, so the agent can stop it there.
fn stopped_child(rig: &Rig) {
    let mut fence =
        rig.background("exec perl -e '$| = 1; print \"up\\n\"; while (1) { kill \"STOP\", -1 }'");
    // Where it is stopped after its exec instead, its client waits as for any stopped program.
    let clients: Vec<_> = (0..3)
        .map(|_| {
            let mut client = Command::new(SUPERVISOR);
            client.arg("enter").arg("--run-dir").arg(rig.path("run"));
            client.args(["--", "true"]).stdin(Stdio::null()).spawn().unwrap()
        })
        .collect();
    std::thread::sleep(Duration::from_millis(300));
    fence.signal("-TERM");
    assert_eq!(fence.wait(), Some(143));
    for mut client in clients {
        client.wait().unwrap();
    }
}

fn planted_link(rig: &Rig) {
    let policy = POLICY.replace("/tmp, ", "/tmp, /tmp/ringfence-test-link, ");
    let path = rig.path("link.yaml");
    fs::write(&path, policy).unwrap();
    std::os::unix::fs::symlink("/root", "/tmp/ringfence-test-link").unwrap();
    std::os::unix::fs::lchown("/tmp/ringfence-test-link", Some(1000), Some(1000)).unwrap();
    let output = rig
        .supervisor()
        .arg("--policy-data")
        .arg(path)
        .args(["--", "ls", "/root"])
        .output()
        .unwrap();
    fs::remove_file("/tmp/ringfence-test-link").unwrap();
    let log = text(&output.stderr);
    assert!(!output.status.success(), "{}", text(&output.stdout));
    assert!(log.contains("symbolic link"), "{log}");
}

fn inbound(rig: &Rig) {
    let script = "echo up; exec perl -MIO::Socket::INET -e '$s = IO::Socket::INET->new(LocalPort => 8001, Listen => 5, ReuseAddr => 1) or die; while ($c = $s->accept) { print $c \"hello from the fence\\n\"; close $c }'";
    let _fence = rig.background(script);
    let until = Instant::now() + Duration::from_secs(5);
    loop {
        if let Ok(mut stream) = std::net::TcpStream::connect("10.77.0.1:8001") {
            let mut answer = String::new();
            stream.read_to_string(&mut answer).unwrap();
            if answer == "hello from the fence\n" {
                return;
            }
        }
        assert!(Instant::now() < until, "the agent's port is not reachable");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn broken_input(rig: &Rig) {
    let bad = rig.path("bad.yaml");
    fs::write(&bad, "network_policies: [what]\n").unwrap();
    let attempt = |words: &[&str]| {
        let output = Command::new(SUPERVISOR)
            .args(words)
            .arg("--run-dir")
            .arg(rig.path("run"))
            .args(["--", "touch", "/tmp/ran-unfenced"])
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(125), "{words:?}");
        assert!(!Path::new("/tmp/ran-unfenced").exists());
        text(&output.stderr)
    };
    let good = rig.path("policy.yaml");
    let good = good.to_str().unwrap();
    assert!(attempt(&["--policy-data", bad.to_str().unwrap()]).contains("bad.yaml:1"));
    assert!(attempt(&["--policy-data", "/no/such"]).contains("/no/such"));
    assert!(attempt(&[]).contains("--policy-data"));
    assert!(attempt(&["--policy-data", good, "--run-as", "ghost"]).contains("ghost"));
    let digest = attempt(&["--policy-data", good, "--policy-digest", "sha256:0"]);
    assert!(digest.contains("admitted with"), "{digest}");
}

fn many(rig: &Rig) {
    let fences: Vec<_> = (0..8)
        .map(|number| {
            let mut command = rig.with_policy();
            command.args(["--", "sh", "-c", &format!("exit {number}")]);
            command.stderr(Stdio::piped()).spawn().unwrap()
        })
        .collect();
    for (number, fence) in (0..).zip(fences) {
        let output = fence.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(number), "{}", text(&output.stderr));
    }
    assert_eq!(fs::read_dir(rig.path("run")).unwrap().count(), 0);
    let links = Command::new("ip").args(["-o", "link"]).output().unwrap();
    assert_eq!(text(&links.stdout).lines().count(), 1, "{}", text(&links.stdout));
}

//! What all tests share: a network and a mount namespace of their own, a TLS server, the
//! supervisor started in its several ways.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{ChildStdout, Command, Output, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ringfence::pki::{Authority, LeafKey, SubjectName};

pub const SUPERVISOR: &str = env!("CARGO_BIN_EXE_ringfence-supervisor");
pub const POLICY: &str = include_str!("policy.yaml");

/// What all tests share.
pub struct Rig {
    dir: tempfile::TempDir,
    /// Where the supervisors keep their files: nothing that a fence opens.
    pub run_dir: PathBuf,
}

impl Rig {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        // Others must be able to look in: the agent and the proxy are other users.
        fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))
            .unwrap();
        run("ip", &["link", "set", "lo", "up"]);
        run("ip", &["address", "add", "10.77.0.1/32", "dev", "lo"]);
        let hosts = dir.path().join("hosts");
        fs::write(&hosts, "127.0.0.1 localhost\n10.77.0.1 upstream.test other.test\n").unwrap();
        run("mount", &["--bind", hosts.to_str().unwrap(), "/etc/hosts"]);
        // Called as openshell-sandbox it has no flag for its run directory.
        run("mount", &["-t", "tmpfs", "-o", "mode=0755", "none", "/run"]);
        let authority = Authority::ephemeral("Test CA", Duration::from_secs(86_400)).unwrap();
        fs::write(dir.path().join("ca.pem"), authority.certificate_pem()).unwrap();
        fs::write(dir.path().join("policy.yaml"), POLICY).unwrap();
        let rules = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/policy.rego");
        fs::copy(rules, dir.path().join("policy.rego")).unwrap();
        std::os::unix::fs::symlink(SUPERVISOR, dir.path().join("openshell-sandbox")).unwrap();
        serve(&authority);
        Self { dir, run_dir: "/run/rig".into() }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The supervisor without a policy and without its `--`.
    pub fn supervisor(&self) -> Command {
        let mut command = Command::new(SUPERVISOR);
        command
            .env_clear()
            .env("PATH", "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin")
            .arg("--upstream-ca")
            .arg(self.path("ca.pem"))
            .args(["--run-as", "1000:1000", "--no-env", "--workdir", "/tmp"])
            .arg("--run-dir")
            .arg(&self.run_dir)
            .stdin(Stdio::null());
        command
    }

    pub fn with_policy(&self) -> Command {
        let mut command = self.supervisor();
        command.arg("--policy-data").arg(self.path("policy.yaml"));
        command
    }

    pub fn fenced(&self, words: &[&str]) -> Output {
        self.with_policy().arg("--").args(words).output().unwrap()
    }

    pub fn shell(&self, script: &str) -> Output {
        self.fenced(&["sh", "-c", script])
    }

    /// The same as PID 1 of a PID namespace, which is how a pod starts it.
    pub fn as_pid_1(&self) -> Command {
        let fenced = self.with_policy();
        let mut command = Command::new("unshare");
        command
            .env_clear()
            .envs(fenced.get_envs().filter_map(|(name, value)| Some((name, value?))));
        command.args(["--pid", "--fork", "--kill-child", "--mount-proc", "--"]);
        command.arg(SUPERVISOR).args(fenced.get_args()).stdin(Stdio::null());
        command
    }

    /// Starts a fence in the background and waits until its agent has printed a line.
    pub fn background(&self, script: &str) -> Background {
        Background::start(self.with_policy().args(["--", "sh", "-c", script]))
    }

    pub fn enter(&self, words: &[&str]) -> Output {
        self.entering(words).output().unwrap()
    }

    pub fn entering(&self, words: &[&str]) -> Command {
        let mut command = Command::new(SUPERVISOR);
        command.arg("enter").arg("--run-dir").arg(&self.run_dir).args(["--wait", "5", "--"]);
        command.args(words).stdin(Stdio::null());
        command
    }
}

pub struct Background {
    pub child: std::process::Child,
    pub stdout: BufReader<ChildStdout>,
    /// What the agent printed first.
    pub line: String,
}

impl Drop for Background {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

impl Background {
    pub fn start(command: &mut Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        stdout.read_line(&mut line).unwrap();
        if line.is_empty() {
            let mut stderr = String::new();
            child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
            panic!("the fence did not come up: {stderr}");
        }
        Self { child, stdout, line: line.trim().to_owned() }
    }

    /// The next line of the agent's.
    pub fn next(&mut self) -> String {
        let mut line = String::new();
        self.stdout.read_line(&mut line).unwrap();
        line.trim().to_owned()
    }

    pub fn stderr(&mut self) -> String {
        let mut log = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut log).unwrap();
        log
    }

    pub fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    pub fn wait(&mut self) -> Option<i32> {
        let until = Instant::now() + Duration::from_secs(30);
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            assert!(Instant::now() < until, "the supervisor does not end");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    pub fn signal(&self, signal: &str) {
        run("kill", &[signal, &self.pid().to_string()]);
    }
}

pub fn run(program: &str, words: &[&str]) {
    let status = Command::new(program).args(words).status().unwrap();
    assert!(status.success(), "{program} {words:?}: {status}");
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A TLS server that answers every request with its first line.
fn serve(authority: &Authority) {
    let names = ["upstream.test", "other.test", "fetched.test", "one.wild.test"];
    let names = names.map(|name| SubjectName::Dns(name.into()));
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

/// Whether a process with this mark in its command line lives.
pub fn lives(mark: &str) -> bool {
    fs::read_dir("/proc").unwrap().flatten().any(|entry| {
        fs::read(entry.path().join("cmdline")).is_ok_and(|line| text(&line).contains(mark))
    })
}

pub fn dies(mark: &str) {
    eventually(&format!("the end of {mark}"), || !lives(mark));
}

/// Waits until `done`, for as long as a busy machine may need.
pub fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(20);
    while !done() {
        assert!(Instant::now() < until, "still not: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Whether a process has ended; a zombie has.
pub fn ended(pid: i32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat"))
        .map_or(true, |stat| stat.rsplit_once(") ").is_none_or(|(_, rest)| rest.starts_with('Z')))
}

pub fn children_of(pid: i32) -> Vec<i32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    tasks
        .filter_map(|task| fs::read_to_string(task.path().join("children")).ok())
        .flat_map(|list| {
            list.split_whitespace().map(|pid| pid.parse().unwrap()).collect::<Vec<_>>()
        })
        .collect()
}

fn is_proxy(pid: i32) -> bool {
    fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| text(&line).ends_with("\0proxy\0"))
}

pub fn proxy_of(supervisor: i32) -> i32 {
    children_of(supervisor)
        .into_iter()
        .find(|pid| is_proxy(*pid))
        .expect("the supervisor has a proxy")
}

pub fn keeper_of(supervisor: i32) -> i32 {
    children_of(supervisor).into_iter().find(|pid| !is_proxy(*pid)).expect("it has a keeper")
}

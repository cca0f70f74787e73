//! What all rows share: a network and a mount namespace of their own that plays the pod, the
//! servers in it, and fences.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use ringfence::pki::{Authority, LeafKey, SubjectName};

const SUPERVISOR: &str = env!("CARGO_BIN_EXE_ringfence-supervisor");
const HERE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/clients");
/// The agent's user.
const AGENT: u32 = 1000;
/// Where the image has its programs.
const PATH: &str = "/mnt/clients/venv/bin:/mnt/clients/more:/mnt/rust/bin:/mnt/go/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin";
/// The upstream's addresses, all but gRPC and gRPC.
const ADDRESSES: [&str; 2] = ["10.77.0.1", "10.77.0.2"];
const NAMES: [&str; 13] = [
    "api.test",
    "apt.test",
    "crates.test",
    "elsewhere.test",
    "files.test",
    "forge.test",
    "git.test",
    "goproxy.test",
    "grpc.test",
    "judged.test",
    "npm.test",
    "pypi.test",
    "s3.test",
];

/// The pod and the world outside of it.
pub struct Rig {
    dir: tempfile::TempDir,
    servers: Vec<Child>,
    works: AtomicU32,
}

/// What came of a script in a fence.
pub struct Outcome {
    pub succeeded: bool,
    /// What the client printed.
    pub stdout: String,
    pub stderr: String,
    /// What the fence said.
    pub log: String,
}

impl Rig {
    /// `clients` is what `tests/clients/setup` made.
    pub fn new(clients: &Path) -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        run("ip", &["link", "set", "lo", "up"]);
        for address in ADDRESSES {
            run("ip", &["address", "add", &format!("{address}/32"), "dev", "lo"]);
        }
        // As in a pod: no name of the world is in the hosts file, which the agent can read.
        let over = |name: &str, text: &str| {
            let file = dir.path().join(name.replace('/', "-"));
            fs::write(&file, text).unwrap();
            run("mount", &["--bind", file.to_str().unwrap(), name]);
        };
        over("/etc/hosts", "127.0.0.1 localhost\n");
        over("/etc/resolv.conf", &format!("nameserver {}\n", ADDRESSES[0]));
        run("mount", &["-t", "tmpfs", "-o", "mode=0755", "none", "/run"]);
        // Programs that this machine has where only root may look.
        run("mount", &["-t", "tmpfs", "-o", "mode=0755", "none", "/mnt"]);
        fs::create_dir("/mnt/homes").unwrap();
        bind(clients, "clients");
        for (program, words, name) in
            [("rustc", ["--print", "sysroot"], "rust"), ("go", ["env", "GOROOT"], "go")]
        {
            if let Ok(output) = Command::new(program).args(words).output() {
                bind(Path::new(text(&output.stdout).trim()), name);
            }
        }
        certificates(dir.path());
        image_settings();
        let mut rig = Self { dir, servers: Vec::new(), works: AtomicU32::new(0) };
        rig.serve("/usr/bin/python3", "upstream.py", ADDRESSES[0]);
        rig.serve("/mnt/clients/venv/bin/python3", "grpc_server.py", ADDRESSES[1]);
        rig
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Starts a server and waits until it is up; where there is no such program nothing is served.
    fn serve(&mut self, python: &str, script: &str, address: &str) {
        let child = Command::new(python)
            .arg(Path::new(HERE).join(script))
            .arg(address)
            .args([self.path("leaf.pem"), self.path("leaf.key")])
            .arg(self.dir.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn();
        let Ok(mut child) = child else { return };
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "up\n", "{script} does not come up");
        self.servers.push(child);
    }

    /// Whether the agent would find this program.
    pub fn has(program: &str) -> bool {
        PATH.split(':').any(|dir| Path::new(dir).join(program).exists())
    }

    /// Runs a script in a fence of its own and in a directory of its own, which is also its home.
    /// `words` are further arguments of the supervisor.
    pub fn run(&self, script: &str, words: &[&str]) -> Outcome {
        self.run_in(&[], script, words)
    }

    /// The same where the image sets variables.
    pub fn run_in(&self, image: &[(&str, &str)], script: &str, words: &[&str]) -> Outcome {
        let number = self.works.fetch_add(1, Ordering::Relaxed);
        let home = PathBuf::from(format!("/mnt/homes/{number}"));
        fs::create_dir(&home).unwrap();
        chown(&home, Some(AGENT), Some(AGENT)).unwrap();
        // The agent's standard error is the fence's too; here they are told apart.
        let script = format!("exec 2>\"$HOME/stderr\"; set -e; {script}");
        let output = Command::new(SUPERVISOR)
            .env_clear()
            .envs([("PATH", PATH), ("HOME", home.to_str().unwrap()), ("NO_COLOR", "1")])
            .envs(image.iter().copied())
            .args(["--run-as", &format!("{AGENT}:{AGENT}"), "--no-env", "--run-dir", "/run/rig"])
            .args(["--log-level", "info"])
            .arg("--upstream-ca")
            .arg(self.path("ca.pem"))
            .arg("--policy-data")
            .arg(Path::new(HERE).join("policy.yaml"))
            .arg("--workdir")
            .arg(&home)
            .args(words)
            .args(["--", "sh", "-c", &script])
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let stderr = fs::read(home.join("stderr")).unwrap_or_default();
        Outcome {
            succeeded: output.status.success(),
            stdout: text(&output.stdout),
            stderr: text(&stderr),
            log: text(&output.stderr),
        }
    }

    /// What the servers were asked, `HOST METHOD PATH` a line.
    pub fn requests(&self) -> String {
        fs::read_to_string(self.path("requests.log")).unwrap_or_default()
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        for server in &mut self.servers {
            drop(server.kill());
            drop(server.wait());
        }
    }
}

/// The upstream's authority and its one certificate.
fn certificates(dir: &Path) {
    let day = Duration::from_secs(86_400);
    let authority = Authority::ephemeral("Test CA", day).unwrap();
    let key = LeafKey::generate().unwrap();
    let names = NAMES.map(|name| SubjectName::Dns(name.into()));
    let leaf = authority.leaf(&names, day, &key).unwrap();
    let chain: String = leaf.cert.iter().map(ringfence::pki::certificate_pem).collect();
    for (name, pem) in [
        ("ca.pem", authority.certificate_pem()),
        ("leaf.pem", &chain),
        ("leaf.key", &key.key_pem()),
    ] {
        fs::write(dir.join(name), pem).unwrap();
    }
}

/// What an image has that was made for another network than the fence's.
fn image_settings() {
    fs::create_dir("/mnt/image").unwrap();
    let other = Authority::ephemeral("Another CA", Duration::from_secs(86_400)).unwrap();
    for (name, text) in [
        ("other.pem", other.certificate_pem()),
        ("wgetrc", "user_agent = image\n"),
        ("apt.conf", "Acquire::Retries \"0\";\n"),
    ] {
        fs::write(Path::new("/mnt/image").join(name), text).unwrap();
    }
}

fn bind(from: &Path, name: &str) {
    if from.is_dir() {
        let to = format!("/mnt/{name}");
        fs::create_dir(&to).unwrap();
        run("mount", &["--bind", from.to_str().unwrap(), &to]);
    }
}

fn run(program: &str, words: &[&str]) {
    let status = Command::new(program).args(words).status().unwrap();
    assert!(status.success(), "{program} {words:?}: {status}");
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

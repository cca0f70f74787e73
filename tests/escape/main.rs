//! The escape table, run inside the fence of the real supervisor, and a test of the table itself:
//! with a layer switched off, each of its rows must be seen to fail.
//!
//! Needs root. Runs itself again in a network and a mount namespace of its own. Layers are
//! switched off only in fences that this test builds from the library's parts; the supervisor has
//! no switch for that.
//!
//! `cargo test --test escape -- --write-docs` writes `docs/escape.md` from the table.

mod fence;
mod open_world;
mod self_test;

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use ringfence::fence::attempts;
use ringfence::supervisor::doctor::start_neighbour;
use rustix::process::Signal;
use serde_json::Value;

const SUPERVISOR: &str = env!("CARGO_BIN_EXE_ringfence-supervisor");
const INSIDE: &str = "RINGFENCE_TEST_INSIDE";
const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/escape.md");
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
/// Without binaries there is no listener on connect(2), and one filter less.
const LEAST_POLICY: &str = r"
version: 1
filesystem_policy:
  include_workdir: false
  read_write: [/tmp, /dev/null]
";
/// The agent's user: one that nobody else on the machine has.
const AGENT: u32 = 54_321;

type Test = (&'static str, fn(&Rig) -> Result<(), String>);

/// The last ones change the test's network namespace.
const TESTS: &[Test] = &[
    ("every_row_is_as_expected", own_pids),
    ("every_row_is_as_expected_under_pid_1", as_init),
    ("every_row_is_as_expected_with_the_least_policy", least_policy),
    ("enter_knows_the_doctor", entered),
    ("the_attempts_are_not_made_by_root", not_by_root),
    ("a_doctor_that_is_ended_leaves_nothing_that_stays", ended),
    ("rows_hold_in_a_fence_of_parts", self_test::all_on),
    ("each_row_fails_without_its_layers", self_test::each_off),
    ("what_also_guards_a_row_does", self_test::each_alone),
];

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match words.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["fence", setup] => return fence::build(setup),
        ["probe", setup] => return fence::probe(setup),
        ["--write-docs"] => return fs::write(PAGE, attempts::document()).expect("written"),
        _ => {}
    }
    let current = fs::read_to_string(PAGE).is_ok_and(|page| page == attempts::document());
    assert!(current, "docs/escape.md is not the table: run with `-- --write-docs`");
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED: tests/escape needs root");
        return;
    }
    if std::env::var_os(INSIDE).is_none() {
        let error = Command::new("unshare")
            .args(["--net", "--mount", "--propagation", "private"])
            // PID 1 is then this test, and not the machine's.
            .args(["--pid", "--fork", "--mount-proc", "--kill-child", "--"])
            .arg(std::env::current_exe().expect("this program has a path"))
            .args(&words)
            .env(INSIDE, "1")
            .exec();
        panic!("cannot run unshare(1): {error}");
    }
    let rig = Rig::new();
    let only = words.iter().find(|word| !word.starts_with('-'));
    let mut failed = 0;
    for (name, test) in TESTS {
        if only.is_some_and(|only| !name.contains(only.as_str())) {
            continue;
        }
        match test(&rig) {
            Ok(()) => println!("test {name} ... ok"),
            Err(why) => {
                failed += 1;
                println!("test {name} ... FAILED\n{why}");
            }
        }
    }
    std::process::exit(i32::from(failed > 0));
}

/// What all tests share: a directory that no policy opens, and the supervisor in it.
struct Rig {
    /// The supervisor, where no rule of Landlock's reaches it.
    supervisor: PathBuf,
    /// A process of the agent's user. It was started with one of the proxy's user before there was
    /// a second thread; both end with this process.
    neighbour: Option<i32>,
}

/// A place that is in nobody's base; an empty file system for this test alone.
const PLACE: &str = "/mnt";

impl Rig {
    fn new() -> Self {
        run("mount", &["-t", "tmpfs", "-o", "mode=0755", "ringfence-test", PLACE]);
        run("ip", &["link", "set", "lo", "up"]);
        let place = Path::new(PLACE);
        for directory in ["bin", "run", "policy", "scratch"] {
            fs::create_dir(place.join(directory)).expect("a directory");
        }
        let everybody = std::os::unix::fs::PermissionsExt::from_mode(0o777);
        fs::set_permissions(place.join("scratch"), everybody).expect("a mode");
        let supervisor = place.join("bin/ringfence-supervisor");
        fs::copy(SUPERVISOR, &supervisor).expect("a copy");
        fs::copy(std::env::current_exe().expect("a path"), place.join("bin/probe"))
            .expect("a copy");
        open_devices();
        for (name, text) in [("policy.yaml", POLICY), ("least.yaml", LEAST_POLICY)] {
            fs::write(place.join("policy").join(name), text).expect("written");
        }
        let neighbour = |user| {
            let mut facts =
                attempts::Facts { identity: (user, user, vec![]), ..Default::default() };
            start_neighbour(&mut facts).expect("a neighbour");
            facts.neighbour
        };
        neighbour(self_test::PROXY).expect("a process of the proxy's user");
        Self { supervisor, neighbour: neighbour(AGENT) }
    }

    /// Starts a fence with a policy; `before` is what starts the supervisor.
    fn fence(&self, before: &[&str], policy: &str) -> Fence {
        let mut words: Vec<&str> = before.to_vec();
        words.push(self.supervisor.to_str().expect("plain"));
        let mut child = Command::new(words[0])
            .args(&words[1..])
            .env_clear()
            .env("PATH", "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin")
            // What must not reach the agent.
            .envs(["OPENSHELL_SANDBOX_TOKEN", "OPENSHELL_TLS_KEY"].map(|name| (name, "hush")))
            .env("NO_PROXY", "10.0.0.0/8")
            .arg("--policy-data")
            .arg(Path::new("/mnt/policy").join(policy))
            .args(["--run-dir", "/mnt/run"])
            .args(["--run-as", "54321:54321", "--groups", "54322", "--no-env"])
            .args(["--workdir", "/tmp", "--", "sh", "-c", "echo up; exec sleep 1000"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::from(fs::File::create("/mnt/log").expect("a log")))
            .spawn()
            .expect("the supervisor starts");
        let mut line = String::new();
        let stdout = child.stdout.take().expect("it is piped");
        BufReader::new(stdout).read_line(&mut line).expect("a line");
        let fence = Fence { child };
        assert_eq!(line, "up\n", "{}", log());
        fence
    }

    fn doctor(&self, before: &[&str], words: &[&str]) -> Output {
        let mut all: Vec<&str> = before.to_vec();
        all.push(self.supervisor.to_str().expect("plain"));
        all.extend(words);
        Command::new(all[0]).args(&all[1..]).stdin(Stdio::null()).output().expect("it starts")
    }
}

/// Devices that the machine lets everybody open, so that only Landlock guards them.
fn open_devices() {
    fs::create_dir("/mnt/dev").expect("a directory");
    for (name, minor) in [("fuse", "229"), ("kvm", "232"), ("net/tun", "200")] {
        let device = Path::new("/dev").join(name);
        if !device.exists() {
            continue;
        }
        let ours = format!("/mnt/dev/{minor}");
        run("mknod", &["-m", "666", &ours, "c", "10", minor]);
        run("mount", &["--bind", &ours, device.to_str().expect("plain")]);
    }
}

fn log() -> String {
    fs::read_to_string("/mnt/log").unwrap_or_default()
}

struct Fence {
    child: Child,
}

impl Drop for Fence {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

fn run(program: &str, words: &[&str]) {
    let status = Command::new(program).args(words).status().expect("it starts");
    assert!(status.success(), "{program} {words:?}: {status}");
}

/// What is wrong with the doctor's answer: a row that is not as expected, too many that were
/// skipped, a code that does not fit.
fn judge(output: &Output, may_skip: &[&str]) -> Result<(), String> {
    let stderr = String::from_utf8_lossy(&output.stderr);
    let report: Value = serde_json::from_slice(&output.stdout)
        .map_err(|error| format!("no report: {error}\n{stderr}\n{}", log()))?;
    let rows = report["rows"].as_array().ok_or("no rows")?;
    let mut wrong = Vec::new();
    for row in rows {
        let (id, seen) = (row["id"].as_str().unwrap_or(""), row["seen"].as_str().unwrap_or(""));
        match row["verdict"].as_str() {
            Some("as_expected") => {}
            Some("skipped") => {
                println!("SKIPPED: {id}: {seen}");
                // Whether a file or a kernel's part is there is the machine's business; what the
                // test itself has to bring is not.
                let machines = ["no such file", "needs Landlock", "no set-user-ID", "32-bit"];
                if !machines.iter().any(|why| seen.contains(why)) && !may_skip.contains(&id) {
                    wrong.push(format!("    {id}: {seen}"));
                }
            }
            _ => wrong.push(format!("    {id}: {seen}, must be {}", row["expected"])),
        }
    }
    println!("{}", report["summary"]);
    if rows.len() != attempts::table().count() || output.status.code() != Some(0) {
        wrong.push(format!("    {} rows, code {:?}", rows.len(), output.status.code()));
    }
    if wrong.is_empty() { Ok(()) } else { Err(wrong.join("\n")) }
}

const JSON: &[&str] = &["doctor", "--json", "--run-dir", "/mnt/run"];

/// Of rows about processes that cannot be seen from a PID namespace of the agent's own.
fn unseen() -> Vec<&'static str> {
    let hidden = ["keeper-", "proxy-", "neighbour-"];
    let ids = attempts::table().map(|row| row.id);
    ids.filter(|id| hidden.iter().any(|prefix| id.starts_with(prefix))).collect()
}

/// The supervisor is not PID 1: the agent has a PID namespace and a /proc of its own.
fn own_pids(rig: &Rig) -> Result<(), String> {
    let _fence = rig.fence(&[], "policy.yaml");
    judge(&rig.doctor(&[], JSON), &unseen())
}

fn least_policy(rig: &Rig) -> Result<(), String> {
    let _fence = rig.fence(&[], "least.yaml");
    judge(&rig.doctor(&[], JSON), &unseen())
}

/// As in a pod: the supervisor is PID 1, and the agent shares its PID namespace and /proc.
fn as_init(rig: &Rig) -> Result<(), String> {
    let before = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", "--"];
    let fence = rig.fence(&before, "policy.yaml");
    let unshare = fence.child.id();
    let children = fs::read_to_string(format!("/proc/{unshare}/task/{unshare}/children"));
    let init = children.map_err(|error| error.to_string())?.trim().to_owned();
    let before = ["nsenter", "--target", &init, "--pid", "--mount", "--"];
    judge(&rig.doctor(&before, JSON), &[])
}

/// As `kubectl exec POD -- SUPERVISOR doctor` arrives.
fn entered(rig: &Rig) -> Result<(), String> {
    let _fence = rig.fence(&[], "policy.yaml");
    let program = rig.supervisor.to_str().expect("plain");
    for name in [program, "ringfence-supervisor"] {
        let words = ["enter", "--run-dir", "/mnt/run", "--", name, "doctor", "--json"];
        judge(&rig.doctor(&[], &words), &unseen())?;
    }
    let output = rig.doctor(&[], &["enter", "--run-dir", "/mnt/run", "--", program, "doctor"]);
    let text = String::from_utf8_lossy(&output.stdout);
    for part in ["landlock     ABI", "\nok    ptrace ", " as expected, 0 not, "] {
        if !text.contains(part) {
            return Err(format!("'{part}' is not in:\n{text}"));
        }
    }
    // Another verb is a command like any other, and there is no such program inside.
    let output = rig.doctor(&[], &["enter", "--run-dir", "/mnt/run", "--", program, "status"]);
    if output.status.code() == Some(126) { Ok(()) } else { Err(format!("{output:?}")) }
}

/// Ended by a signal it takes its bait away; killed, it leaves it to the supervisor's end, and it
/// passes for no supervisor meanwhile.
fn ended(rig: &Rig) -> Result<(), String> {
    let baits = || -> Vec<PathBuf> {
        let below = |dir: PathBuf| fs::read_dir(dir).into_iter().flatten().flatten();
        let all = below("/mnt/run".into()).map(|entry| entry.path());
        let all = all.flat_map(|path| {
            below(path.clone()).map(|entry| entry.path()).chain([path]).collect::<Vec<_>>()
        });
        let name =
            |path: &PathBuf| path.file_name().map(|name| name.to_string_lossy().into_owned());
        all.filter(|path| name(path).is_some_and(|name| name.starts_with("doctor-"))).collect()
    };
    let end = |signal| -> Result<Option<i32>, String> {
        let mut doctor = Command::new(&rig.supervisor);
        let mut doctor = doctor.args(JSON).stdout(Stdio::null()).spawn().expect("it starts");
        while baits().is_empty() {
            if let Some(status) = doctor.try_wait().expect("it is a child") {
                return Err(format!("it ended before it laid any bait: {status}"));
            }
            std::thread::yield_now();
        }
        let pid = rustix::process::Pid::from_child(&doctor);
        rustix::process::kill_process(pid, signal).expect("it lives");
        Ok(doctor.wait().expect("it is a child").code())
    };
    let fence = rig.fence(&[], "policy.yaml");
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        let code = end(signal)?;
        if code != Some(125) || !baits().is_empty() {
            return Err(format!("{signal:?}: code {code:?}, {:?} is left", baits()));
        }
    }
    end(Signal::KILL)?;
    let left = baits();
    let [bait] = &left[..] else { return Err(format!("bait: {left:?}")) };
    let bait = fs::File::open(bait).map_err(|error| error.to_string())?;
    rustix::fs::flock(&bait, rustix::fs::FlockOperation::LockExclusive).expect("a lock");
    let output = rig.doctor(&[], &["enter", "--run-dir", "/mnt/run", "--", "true"]);
    if output.status.code() != Some(0) {
        return Err(format!("{output:?}"));
    }
    drop(fence);
    let _next = rig.fence(&[], "policy.yaml");
    if baits().is_empty() { Ok(()) } else { Err(format!("{:?} outlived it", baits())) }
}

fn not_by_root(rig: &Rig) -> Result<(), String> {
    let output = rig.doctor(&[], &["attempts", "{}"]);
    let refused = String::from_utf8_lossy(&output.stderr).contains("inside a fence");
    if output.status.code() == Some(125) && refused && output.stdout.is_empty() {
        Ok(())
    } else {
        Err(format!("{output:?}"))
    }
}

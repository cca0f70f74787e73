//! How long a fence takes: start of the supervisor to the exit of `/bin/true`, all layers on,
//! beside `bwrap --unshare-all`, run by run in turn; and how much memory our processes hold.
//!
//! Needs root and bwrap. Runs itself again in network and mount namespaces of its own. The
//! supervisor that is measured is the one that `RINGFENCE_SUPERVISOR` names, else this build's.
//! A benchmark reports; it asserts only that each program did its work.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};

const INSIDE: &str = "RINGFENCE_BENCH_INSIDE";
/// Every layer is on: paths, a judged endpoint, and binaries, for which connect(2) is reported.
const POLICY: &str = "
version: 1
filesystem_policy:
  include_workdir: true
  read_only: [/usr, /lib, /etc, /proc, /dev/urandom]
  read_write: [/tmp, /dev/null]
landlock: {compatibility: hard_requirement}
network_policies:
  upstream:
    endpoints:
      - {host: upstream.example.com, port: 443, protocol: rest, enforcement: enforce, access: read-only}
    binaries: [{path: /usr/bin/curl}, {path: /usr/bin/python3}]
";
const ROUNDS: usize = 100;
/// What a start at rest has to itself: what the one before left to do is done.
const GAP: Duration = Duration::from_millis(20);

fn main() {
    if std::env::var_os(INSIDE).is_none() {
        // `cargo bench` gives its own words too; none is needed.
        let this = std::env::current_exe().expect("this program has a path");
        let error = Command::new("unshare")
            .args(["--net", "--mount", "--propagation", "private", "--"])
            .arg(this)
            .env(INSIDE, "1")
            .exec();
        panic!("cannot run unshare(1): {error}");
    }
    let supervisor = std::env::var_os("RINGFENCE_SUPERVISOR")
        .map_or_else(|| PathBuf::from(env!("CARGO_BIN_EXE_ringfence-supervisor")), PathBuf::from);
    // Not below /tmp, which every fence opens.
    let directory = tempfile::tempdir_in("/run").expect("a temporary directory");
    // As in a pod, where it is an emptyDir in memory.
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "tmpfs"])
        .arg(directory.path())
        .status()
        .expect("mount(8)");
    assert!(mounted.success(), "cannot mount a tmpfs");
    fs::write(directory.path().join("policy.yaml"), POLICY).expect("the policy can be written");

    let bare = || Command::new("/bin/true");
    let bwrap = || {
        let mut command = Command::new("bwrap");
        command.args(["--ro-bind", "/", "/", "--unshare-all", "--die-with-parent", "/bin/true"]);
        command
    };
    let ours = || fenced(&supervisor, directory.path(), &["/bin/true"]);
    let kinds: [(&str, &dyn Fn() -> Command); 3] =
        [("bare", &bare), ("bwrap", &bwrap), ("ringfence", &ours)];

    println!("start to exit of /bin/true, {ROUNDS} runs each, in turn; milliseconds");
    for (name, gap) in [("back to back", Duration::ZERO), ("20 ms apart", GAP)] {
        println!("\n{name:>14}     median      p10      p90");
        let mut medians = [0.0; 3];
        for (index, mut times) in interleaved(&kinds, gap).into_iter().enumerate() {
            times.sort_unstable();
            let at = |percent: usize| times[times.len() * percent / 100].as_secs_f64() * 1e3;
            medians[index] = at(50);
            println!("{:>14}   {:8.2} {:8.2} {:8.2}", kinds[index].0, at(50), at(10), at(90));
        }
        println!("{:>14}   {:8.2} × bwrap", "", medians[2] / medians[1]);
    }
    memory(&supervisor, directory.path());
    ends(&supervisor, directory.path());
}

/// The supervisor as the webhook starts it.
fn fenced(supervisor: &Path, directory: &Path, words: &[&str]) -> Command {
    let mut command = Command::new(supervisor);
    command
        .env_clear()
        .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        .args(["--run-as", "1000:1000", "--no-env", "--workdir", "/tmp"])
        .arg("--policy-data")
        .arg(directory.join("policy.yaml"))
        .arg("--run-dir")
        .arg(directory.join("run"))
        .arg("--")
        .args(words)
        .stdin(Stdio::null());
    command
}

/// Each command once a round, so that what the machine does meanwhile falls on all alike.
fn interleaved(kinds: &[(&str, &dyn Fn() -> Command); 3], gap: Duration) -> [Vec<Duration>; 3] {
    let mut times = [const { Vec::new() }; 3];
    // The first rounds fill the caches.
    for round in 0..ROUNDS + 5 {
        for (index, (name, command)) in kinds.iter().enumerate() {
            std::thread::sleep(gap);
            let mut command = command();
            command.stdout(Stdio::null());
            let started = Instant::now();
            let status = command.status().unwrap_or_else(|error| panic!("{name}: {error}"));
            let took = started.elapsed();
            assert!(status.success(), "{name} ended with {status}");
            if round >= 5 {
                times[index].push(took);
            }
        }
    }
    times
}

/// Of a fence whose agent sleeps: what each of our processes holds now and held at most.
fn memory(supervisor: &Path, directory: &Path) {
    let mut child = fenced(supervisor, directory, &["sleep", "60"]).spawn().expect("a supervisor");
    let ours = processes(&mut child);
    println!("\nmemory of a fence at rest, KiB   proportional   resident   at most");
    let mut sums = [0; 3];
    for pid in ours {
        let read =
            |file: &str| fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
        let (status, rollup) = (read("status"), read("smaps_rollup"));
        let values = [field(&rollup, "Pss:"), field(&status, "VmRSS:"), field(&status, "VmHWM:")];
        let shown = read("cmdline").replace('\0', " ");
        let shown: String = shown.split(" --").next().unwrap_or_default().into();
        let name = Path::new(&shown).file_name().unwrap_or_default().to_string_lossy().into_owned();
        println!("{name:>32} {:>12} {:>10} {:>9}", values[0], values[1], values[2]);
        for (sum, value) in sums.iter_mut().zip(values) {
            *sum += value;
        }
    }
    println!("{:>32} {:>12} {:>10} {:>9}", "sum", sums[0], sums[1], sums[2]);
    child.kill().expect("the supervisor can be killed");
    child.wait().expect("the supervisor can be waited for");
}

/// From a `kill -9` of the supervisor to the end of the last of its proxy, its keeper, its agent and
/// a process that left the agent's session.
fn ends(supervisor: &Path, directory: &Path) {
    const KILLS: usize = 40;
    println!("\nkill -9 of the supervisor to the end of the rest, {KILLS} times; milliseconds");
    println!("{:>14}     median  longest", "");
    for (name, pid_1) in [("beside others", false), ("as PID 1", true)] {
        let mut times: Vec<_> = (0..KILLS).map(|_| end(supervisor, directory, pid_1)).collect();
        times.sort_unstable();
        let [median, longest] = [times[KILLS / 2], times[KILLS - 1]].map(|t| t.as_secs_f64() * 1e3);
        println!("{name:>14}   {median:8.2} {longest:8.2}");
    }
}

fn end(supervisor: &Path, directory: &Path, pid_1: bool) -> Duration {
    let fence = fenced(supervisor, directory, &["sh", "-c", "setsid sleep 600 & sleep 600"]);
    let mut command = if pid_1 { as_pid_1(&fence) } else { fence };
    let mut child = command.spawn().expect("a supervisor");
    let supervisor = until(|| {
        let started = if pid_1 { *children(child.id()).first()? } else { child.id() };
        (sleepers(started) == 2).then_some(started)
    });
    let open = |pid: u32| {
        let pid = rustix::process::Pid::from_raw(pid.cast_signed()).expect("a pid is not 0");
        rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).expect("pidfd_open")
    };
    let rest: Vec<_> = descendants(supervisor).into_iter().map(open).collect();
    let supervisor = open(supervisor);
    let killed = Instant::now();
    rustix::process::pidfd_send_signal(&supervisor, rustix::process::Signal::KILL).expect("kill");
    for process in rest {
        let mut ended = [PollFd::new(&process, PollFlags::IN)];
        rustix::event::poll(&mut ended, None).expect("poll");
    }
    let took = killed.elapsed();
    child.wait().expect("the supervisor can be waited for");
    took
}

fn as_pid_1(fence: &Command) -> Command {
    let mut command = Command::new("unshare");
    command.args(["--pid", "--fork", "--kill-child", "--mount-proc", "--"]);
    // unshare(1) complains about signals when what it started was killed.
    command
        .arg(fence.get_program())
        .args(fence.get_args())
        .stdin(Stdio::null())
        .stderr(Stdio::null());
    command
}

/// The supervisor and its children, once the agent runs; without the agent.
fn processes(supervisor: &mut Child) -> Vec<u32> {
    let supervisor = supervisor.id();
    until(|| (sleepers(supervisor) == 1).then_some(()));
    [vec![supervisor], children(supervisor)].concat()
}

/// How many sleep(1) there are below.
fn sleepers(pid: u32) -> usize {
    let sleeps = |pid: &u32| {
        fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name == "sleep\n")
    };
    descendants(pid).iter().filter(|pid| sleeps(pid)).count()
}

fn descendants(pid: u32) -> Vec<u32> {
    children(pid).into_iter().flat_map(|pid| [vec![pid], descendants(pid)].concat()).collect()
}

fn children(pid: u32) -> Vec<u32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    tasks
        .filter_map(|task| fs::read_to_string(task.path().join("children")).ok())
        .flat_map(|pids| pids.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
        .filter_map(|pid| pid.parse().ok())
        .collect()
}

fn until<T>(mut ready: impl FnMut() -> Option<T>) -> T {
    let until = Instant::now() + Duration::from_secs(10);
    loop {
        if let Some(it) = ready() {
            return it;
        }
        assert!(Instant::now() < until, "the agent does not come up");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn field(text: &str, name: &str) -> u64 {
    text.lines()
        .find_map(|line| line.strip_prefix(name)?.trim().strip_suffix("kB")?.trim().parse().ok())
        .unwrap_or_default()
}

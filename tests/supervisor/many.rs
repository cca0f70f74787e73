//! Many supervisors, at once and one after another, and what they leave.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::rig::{Rig, children_of, ended, eventually, text};

pub fn at_once(rig: &Rig) {
    let watch = Leftovers::watch(rig);
    let fences: Vec<_> = (0..20)
        .map(|number| {
            let mut command = rig.with_policy();
            command.args(["--", "sh", "-c", &format!("sleep 0.2; exit {number}")]);
            command.stderr(Stdio::piped()).spawn().unwrap()
        })
        .collect();
    for (number, fence) in (0..).zip(fences) {
        let output = fence.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(number), "{}", text(&output.stderr));
    }
    watch.none();
}

/// So many starts in a row, so many kills at a random moment of the start: half of them as PID 1.
pub fn soak(rig: &Rig) {
    let asked = std::env::var("RINGFENCE_SOAK").unwrap_or_else(|_| "15,30".to_owned());
    let (starts, kills) = asked.split_once(',').expect("RINGFENCE_SOAK is STARTS,KILLS");
    let (starts, kills): (u32, u32) = (starts.parse().unwrap(), kills.parse().unwrap());
    let watch = Leftovers::watch(rig);
    for _ in 0..starts {
        let output = rig.fenced(&["true"]);
        assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    }
    watch.none();

    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let seed = now.as_secs() ^ u64::from(now.subsec_nanos()) << 32 | 1;
    println!("soak: {starts} starts; {kills} kills with seed {seed}");
    let mut random = Random(seed);
    for (what, pid_1, kills) in [("beside others", false, kills / 2), ("as PID 1", true, kills / 2)]
    {
        // As long as a start takes on this machine, and a little more.
        let start = std::time::Instant::now();
        let mut command = if pid_1 { rig.as_pid_1() } else { rig.with_policy() };
        assert!(command.args(["--", "true"]).status().unwrap().success());
        let span = u64::try_from(start.elapsed().as_micros()).unwrap() * 5 / 4;
        let mut unfinished = 0;
        for _ in 0..kills {
            unfinished += u32::from(killed_while_it_starts(rig, pid_1, random.below(span)));
        }
        println!("soak: {what}, {unfinished} of {kills} died before they had both children");
        Leftovers::processes();
        // A supervisor that was killed cannot remove its directory; the next one does.
        assert_eq!(rig.fenced(&["true"]).status.code(), Some(0));
        watch.none();
    }
}

/// Whether the supervisor lacked one of its children when it was killed.
fn killed_while_it_starts(rig: &Rig, pid_1: bool, microseconds: u64) -> bool {
    let mut command = if pid_1 { rig.as_pid_1() } else { rig.with_policy() };
    command.args(["--", "sh", "-c", "(setsid sleep 7654340 &); sleep 7654340"]);
    let mut fence = command.stderr(Stdio::null()).spawn().unwrap();
    std::thread::sleep(Duration::from_micros(microseconds));
    let started = fence.id().cast_signed();
    // unshare(1) comes first; it may not have forked yet, and then it is what dies.
    let supervisor = if pid_1 { children_of(started).first().copied() } else { Some(started) };
    let unfinished = supervisor.is_none_or(|pid| children_of(pid).len() < 2);
    let pid = rustix::process::Pid::from_raw(supervisor.unwrap_or(started)).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    fence.wait().unwrap();
    unfinished
}

/// xorshift64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// More often early than late: that is where most of a fence is made.
    fn below(&mut self, span: u64) -> u64 {
        self.next() % span * (self.next() % 1_000) / 1_000
    }
}

/// What there was before, to compare with what there is after. All that a supervisor leaves
/// becomes this process's child: it is a subreaper (prctl(2)).
struct Leftovers<'a> {
    rig: &'a Rig,
    mounts: usize,
    files: BTreeSet<String>,
    namespaces: BTreeSet<u64>,
}

impl<'a> Leftovers<'a> {
    fn watch(rig: &'a Rig) -> Self {
        let this = rustix::process::getpid();
        rustix::process::set_child_subreaper(Some(this)).unwrap();
        Self { rig, mounts: mounts(), files: files(), namespaces: held() }
    }

    fn none(&self) {
        Self::processes();
        assert_eq!(mounts(), self.mounts, "mounts");
        assert_eq!(fs::read_dir(&self.rig.run_dir).unwrap().count(), 0, "run directory");
        let new: Vec<_> = files().difference(&self.files).cloned().collect();
        assert!(new.is_empty(), "files: {new:?}");
        // Of this process and its children; whatever else runs on the machine is none of ours.
        assert_eq!(held(), self.namespaces, "network namespaces");
        let links = Command::new("ip").args(["-o", "link"]).output().unwrap();
        assert_eq!(text(&links.stdout).lines().count(), 1, "{}", text(&links.stdout));
    }

    fn processes() {
        eventually("that all processes of the fences have ended", || {
            descendants().iter().all(|pid| ended(*pid))
        });
        // They are ours to reap; every child that the test knows has been waited for.
        while let Ok(Some(_)) = rustix::process::wait(rustix::process::WaitOptions::NOHANG) {}
    }
}

fn descendants() -> Vec<i32> {
    let mut all = children_of(std::process::id().cast_signed());
    let mut at = 0;
    while let Some(pid) = all.get(at) {
        all.extend(children_of(*pid));
        at += 1;
    }
    all
}

fn mounts() -> usize {
    fs::read_to_string("/proc/self/mountinfo").unwrap().lines().count()
}

/// Where a program might leave a file.
fn files() -> BTreeSet<String> {
    let ours = |name: &String| name.contains("ringfence") || name.contains("openshell");
    ["/tmp", "/run", "/dev/shm", "/var/run/netns", "/etc"]
        .iter()
        .flat_map(|dir| fs::read_dir(dir).into_iter().flatten().flatten())
        .map(|entry| entry.path().display().to_string())
        .filter(ours)
        .collect()
}

/// The network namespaces that this process and its descendants are in or hold open.
fn held() -> BTreeSet<u64> {
    let pids = descendants().into_iter().chain([std::process::id().cast_signed()]);
    pids.flat_map(|pid| {
        let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        let own = format!("/proc/{pid}/ns/net");
        descriptors
            .map(|entry| entry.path())
            .filter(|path| {
                fs::read_link(path).is_ok_and(|to| to.to_string_lossy().starts_with("net:"))
            })
            .chain([own.into()])
            .filter_map(|path| Some(fs::metadata(path).ok()?.ino()))
            .collect::<Vec<_>>()
    })
    .collect()
}

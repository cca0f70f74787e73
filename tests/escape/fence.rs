//! A fence built from the library's parts, any of which can be left out, and the prober in it.
//!
//! `fence SETUP` is the keeper's part: a process of its own, so that it has one thread. It becomes
//! `probe SETUP`, which makes the attempts and writes a line for each.

use std::collections::{BTreeSet, HashMap};
use std::ffi::CString;
use std::fs;
use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::{Command, Stdio};

use ringfence::fence::attempts::{self, Context, Facts, Layer, Row, Seen};
use ringfence::fence::credentials::{self, Bounding, Identity};
use ringfence::fence::landlock::{self, Access, PathRule};
use ringfence::fence::netns;
use ringfence::fence::rlimits::{self, Limits};
use ringfence::fence::seccomp::{self, AgentOptions};
use ringfence::fence::spawn::{self, ExecImage, Forked};
use serde::{Deserialize, Serialize};

/// What is built and tried.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Setup {
    off: BTreeSet<Layer>,
    rows: Vec<String>,
    facts: Facts,
}

/// Tries these rows in a fence without these layers.
pub fn try_without(
    off: &BTreeSet<Layer>,
    rows: &[&'static Row],
    facts: &Facts,
) -> Result<HashMap<String, Seen>, String> {
    let rows = rows.iter().map(|row| row.id.to_owned()).collect();
    let setup = Setup { off: off.clone(), rows, facts: facts.clone() };
    let setup = serde_json::to_string(&setup).map_err(|error| error.to_string())?;
    let this = std::env::current_exe().map_err(|error| error.to_string())?;
    let output = Command::new(this)
        .args(["fence", &setup])
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .map_err(|error| error.to_string())?;
    let text = String::from_utf8_lossy(&output.stdout);
    let lines = text.lines().map(serde_json::from_str::<(String, Seen)>);
    let seen = lines.collect::<Result<HashMap<_, _>, _>>().map_err(|e| format!("{e}: {text}"))?;
    if output.status.success() { Ok(seen) } else { Err(format!("{}: {text}", output.status)) }
}

/// Writes what came back of each row.
pub fn probe(setup: &str) {
    let setup: Setup = serde_json::from_str(setup).expect("this test wrote it");
    let context = Context::new(setup.facts);
    let mut stdout = std::io::stdout().lock();
    for row in attempts::table().filter(|row| setup.rows.iter().any(|id| id == row.id)) {
        let line = (row.id, attempts::run(row, &context));
        let line = serde_json::to_string(&line).expect("it has a form");
        writeln!(stdout, "{line}").expect("somebody listens");
    }
}

/// Builds the fence around this process's child.
pub fn build(setup: &str) {
    let words = setup;
    let setup: Setup = serde_json::from_str(setup).expect("this test wrote it");
    let on = |layer| !setup.off.contains(&layer);
    // The open world's proxy is one that lets everything pass.
    if on(Layer::Network) && on(Layer::Proxy) {
        netns::unshare().expect("a network namespace");
    }
    // Before Landlock, which would let nobody open these.
    let leak = (!on(Layer::Hygiene)).then(Leak::open);
    if on(Layer::Landlock) {
        let rules: Vec<PathRule> = setup
            .facts
            .opened
            .iter()
            .map(|(path, write)| PathRule {
                path: path.into(),
                access: if *write { Access::ReadWrite } else { Access::ReadOnly },
            })
            .collect();
        landlock::prepare(&rules, false).and_then(landlock::Prepared::enforce).expect("a domain");
    }
    let parent = rustix::process::getpid();
    let image = image(words, on(Layer::Hygiene));
    match spawn::fork().expect("forks") {
        Forked::Child => {
            match &leak {
                None => clean(),
                Some(leak) => leak.bring(),
            }
            if on(Layer::Credentials) {
                let (uid, gid, groups) = setup.facts.identity.clone();
                let identity = Identity { uid, gid, groups };
                credentials::drop_to(&identity, Bounding::Required).expect("dropped");
                credentials::no_new_privs().expect("no_new_privs");
            }
            if !on(Layer::Credentials) {
                inherit_everything();
            }
            if on(Layer::Hygiene) {
                credentials::parent_death_signal_kill(Some(parent)).expect("a death signal");
            }
            if on(Layer::Seccomp) {
                seccomp::install(&seccomp::agent(AgentOptions::default())).expect("a filter");
            }
            let errno = image.exec();
            eprintln!("exec of the prober: {errno}");
            spawn::exit_now(126);
        }
        Forked::Parent(pid) => loop {
            let options = rustix::process::WaitOptions::empty();
            match rustix::process::waitpid(Some(pid), options) {
                Err(rustix::io::Errno::INTR) | Ok(None) => {}
                Ok(Some((_, status))) => std::process::exit(status.exit_status().unwrap_or(125)),
                Err(errno) => panic!("waitpid: {errno}"),
            }
        },
    }
}

fn image(setup: &str, clean: bool) -> ExecImage {
    let c = |word: &str| CString::new(word).expect("no NUL");
    let environment: &[&str] = if clean {
        &["PATH=/usr/bin:/bin", "NO_PROXY=127.0.0.1,localhost,::1", "no_proxy=localhost"]
    } else {
        &["PATH=/usr/bin:/bin", "NO_PROXY=10.0.0.0/8", "OPENSHELL_SANDBOX_TOKEN=hush"]
    };
    ExecImage::new(
        c("/mnt/bin/probe"),
        vec![c("probe"), c("probe"), c(setup)],
        environment.iter().map(|word| c(word)).collect(),
    )
}

/// Root whose capabilities pass to whatever it executes.
fn inherit_everything() {
    use rustix::thread::{CapabilitySet, capabilities, set_capabilities};
    let mut sets = capabilities(None).expect("capabilities");
    sets.inheritable = sets.permitted;
    set_capabilities(None, sets).expect("inheritable");
    let one = CapabilitySet::NET_BIND_SERVICE;
    rustix::thread::configure_capability_in_ambient_set(one, true).expect("ambient");
}

/// The steps that come before the drop.
fn clean() {
    spawn::reset_signals();
    rustix::process::setsid().expect("a session");
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
    rlimits::apply(Limits::default()).expect("limits");
    spawn::close_on_exec_from(3).expect("descriptors");
}

/// What a process has that nobody cleaned: a terminal of which another is the master, a directory.
struct Leak {
    _master: OwnedFd,
    terminal: fs::File,
    root: fs::File,
}

impl Leak {
    fn open() -> Self {
        use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = openpt(flags).expect("a terminal");
        grantpt(&master).expect("granted");
        unlockpt(&master).expect("unlocked");
        let name = ptsname(&master, Vec::new()).expect("a name");
        let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY;
        let terminal = rustix::fs::open(name, flags, rustix::fs::Mode::empty());
        lose_the_directory();
        Self {
            _master: master,
            terminal: terminal.expect("the terminal").into(),
            root: fs::File::open("/").expect("a directory"),
        }
    }

    /// Makes this process one that is not its session's leader, with all that.
    fn bring(&self) {
        rustix::process::setsid().expect("a session");
        rustix::process::ioctl_tiocsctty(&self.terminal).expect("the terminal");
        match spawn::fork().expect("forks") {
            Forked::Child => {}
            Forked::Parent(pid) => {
                let options = rustix::process::WaitOptions::empty();
                let ended = rustix::process::waitpid(Some(pid), options);
                let code = ended.ok().flatten().and_then(|(_, status)| status.exit_status());
                spawn::exit_now(code.unwrap_or(125));
            }
        }
        rustix::process::umask(rustix::fs::Mode::empty());
        let mut mask = nix::sys::signal::SigSet::empty();
        mask.add(nix::sys::signal::Signal::SIGUSR1);
        mask.thread_block().expect("a mask");
        ignore_sigusr2();
        // A directory as standard input, and another descriptor that stays open.
        for target in [0, 7] {
            spawn::place(self.root.as_raw_fd(), target).expect("a place");
        }
    }
}

/// A working directory that lies under no root: on a file system that was taken away.
fn lose_the_directory() {
    use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
    fs::create_dir_all("/mnt/lost").expect("a directory");
    mount("none", "/mnt/lost", "tmpfs", MountFlags::empty(), None).expect("mounted");
    std::env::set_current_dir("/mnt/lost").expect("entered");
    unmount("/mnt/lost", UnmountFlags::DETACH).expect("taken away");
}

fn ignore_sigusr2() {
    use nix::sys::signal::{SigHandler, Signal, signal};
    // SAFETY: to ignore a signal runs no code of ours.
    unsafe { signal(Signal::SIGUSR2, SigHandler::SigIgn) }.expect("ignored");
}

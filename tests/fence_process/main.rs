//! The fence's processes on a real kernel: forks, fences, and looks from outside and inside.
//!
//! Has a main of its own because the usual harness has threads, and what forks must have one.
//! Needs root. Started with `probe`, this same program is the fenced agent.

mod agents;
mod launch;
mod own;
mod probe;

use std::fs;
use std::path::PathBuf;

use launch::Outcome;

/// A test's result: what went wrong.
type Outcomes = Result<(), String>;

/// One test: its name and what it does.
type Test = (&'static str, fn(&Scratch) -> Outcomes);

const TESTS: &[Test] = &[
    ("agent_is_fenced", agents::agent_is_fenced),
    ("limits_are_set", agents::limits_are_set),
    ("memfd_is_a_choice", agents::memfd_is_a_choice),
    ("landlock_holds_from_inside", agents::landlock_holds_from_inside),
    ("connect_is_reported_with_its_cookie", agents::connect_is_reported_with_its_cookie),
    ("exec_failures", agents::exec_failures),
    ("no_release_no_agent", agents::no_release_no_agent),
    ("a_failed_step_is_named", agents::a_failed_step_is_named),
    ("without_setpcap", agents::without_setpcap),
    ("dies_with_its_parent", agents::dies_with_its_parent),
    ("terminal", agents::terminal),
    ("signals_without_cap_kill", own::signals_without_cap_kill),
    ("proxy_is_confined", own::proxy_is_confined),
    ("supervisor_filters", own::supervisor_filters),
    ("best_effort_is_never_silent", own::best_effort_is_never_silent),
];

/// A directory that the agent may read, and a copy of this program in it.
pub struct Scratch {
    directory: tempfile::TempDir,
    program: PathBuf,
}

impl Scratch {
    fn new() -> std::io::Result<Self> {
        let directory = tempfile::tempdir()?;
        let program = directory.path().join("program");
        fs::copy(std::env::current_exe()?, &program)?;
        for path in [directory.path(), &program] {
            let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
            fs::set_permissions(path, mode)?;
        }
        Ok(Self { directory, program })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.first().is_some_and(|first| first == "probe") {
        return probe::run(&arguments[1..]);
    }
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED: needs root");
        return;
    }
    let wanted = arguments.iter().find(|argument| !argument.starts_with('-'));
    let scratch = Scratch::new().expect("a temporary directory");
    let (mut passed, mut failed) = (0, 0);
    for (name, test) in TESTS {
        if wanted.is_some_and(|wanted| !name.contains(wanted.as_str())) {
            continue;
        }
        match test(&scratch) {
            Ok(()) => {
                passed += 1;
                println!("test {name} ... ok");
            }
            Err(why) => {
                failed += 1;
                println!("test {name} ... FAILED\n    {why}");
            }
        }
    }
    println!("{passed} passed, {failed} failed");
    if failed > 0 {
        std::process::exit(1);
    }
}

fn ensure(holds: bool, what: impl Into<String>) -> Outcomes {
    if holds { Ok(()) } else { Err(what.into()) }
}

/// The values are given where they are made, most of them literally.
#[allow(clippy::needless_pass_by_value)]
fn equal<T: PartialEq + std::fmt::Debug>(what: &str, have: T, want: T) -> Outcomes {
    ensure(have == want, format!("{what}: have {have:?}, want {want:?}"))
}

/// Each line `name value` that the agent printed, against what is expected.
fn expect(outcome: &Outcome, rows: &[(&str, &str)]) -> Outcomes {
    let mut wrong = Vec::new();
    for (name, want) in rows {
        let have =
            outcome.output.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        if have != Some(*want) {
            wrong.push(format!("{name}: have {have:?}, want {want}"));
        }
    }
    ensure(wrong.is_empty(), format!("{}\n    {:?}", wrong.join("\n    "), outcome.failure))
}

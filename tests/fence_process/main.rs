//! The fence's processes on a real kernel: forks, fences, and looks from outside and inside.
//!
//! Has a main of its own because the usual harness has threads, and what forks must have one.
//! Needs root. Started with `probe`, this same program is the fenced agent.

mod launch;
mod probe;

use std::fs;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::PathBuf;

use launch::{AGENT, Launch, Outcome, in_child, launch, wait_for};
use ringfence::fence::credentials::{self, Bounding};
use ringfence::fence::landlock::{self, Access, Enforced, PathRule};
use ringfence::fence::spawn::{self, ChildStep, Forked};
use ringfence::fence::status::Status;
use ringfence::fence::{notify, seccomp};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process};

/// A test's result: what went wrong.
type Outcomes = Result<(), String>;

/// One test: its name and what it does.
type Test = (&'static str, fn(&Scratch) -> Outcomes);

const TESTS: &[Test] = &[
    ("agent_is_fenced", agent_is_fenced),
    ("landlock_holds_from_inside", landlock_holds_from_inside),
    ("connect_is_reported_with_its_cookie", connect_is_reported_with_its_cookie),
    ("exec_failures", exec_failures),
    ("no_release_no_agent", no_release_no_agent),
    ("a_failed_step_is_named", a_failed_step_is_named),
    ("without_setpcap", without_setpcap),
    ("dies_with_its_parent", dies_with_its_parent),
    ("terminal", terminal),
    ("signals_without_cap_kill", signals_without_cap_kill),
    ("proxy_is_confined", proxy_is_confined),
    ("supervisor_filters", supervisor_filters),
    ("best_effort_is_never_silent", best_effort_is_never_silent),
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

fn equal<T: PartialEq + std::fmt::Debug>(what: &str, have: T, want: T) -> Outcomes {
    ensure(have == want, format!("{what}: have {have:?}, want {want:?}"))
}

/// Each line `name value` that the agent printed, against what is expected.
fn expect(outcome: &Outcome, rows: &[(&str, &str)]) -> Outcomes {
    let mut wrong = Vec::new();
    for (name, want) in rows {
        let have = outcome.output.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        if have != Some(*want) {
            wrong.push(format!("{name}: have {have:?}, want {want}"));
        }
    }
    ensure(wrong.is_empty(), format!("{}\n    {:?}", wrong.join("\n    "), outcome.failure))
}

fn agent_is_fenced(scratch: &Scratch) -> Outcomes {
    let outcome = launch(scratch, Launch { probe: &["escapes"], ..Launch::default() })?;
    equal("verified from outside", outcome.verified.clone(), Some(Ok(())))?;
    equal("threads verified", outcome.threads, 1)?;
    equal("exit code", outcome.code, Some(0))?;
    expect(
        &outcome,
        &[
            ("setresuid", "EPERM"),
            ("setgroups", "EPERM"),
            ("unshare_user", "EPERM"),
            ("unshare_net", "EPERM"),
            ("unshare_files", "ok"),
            ("clone_user", "EPERM"),
            ("clone3", "ENOSYS"),
            ("newer_than_the_table", "ENOSYS"),
            ("setns", "EPERM"),
            ("ptrace", "EPERM"),
            ("process_vm_readv", "EPERM"),
            ("pidfd_open", "EPERM"),
            ("bpf", "EPERM"),
            ("io_uring_setup", "EPERM"),
            ("io_uring_enter", "EPERM"),
            ("mount", "EPERM"),
            ("keyctl", "EPERM"),
            ("memfd_create", "EPERM"),
            ("execveat_empty_path", "EPERM"),
            ("second_filter", "EPERM"),
            ("prctl_seccomp", "EPERM"),
            ("tiocsti", "EPERM"),
            ("tiocsti_high_bits", "EPERM"),
            ("x32_getpid", "EPERM"),
            ("socket_packet", "EPERM"),
            ("socket_alg", "EPERM"),
            ("socket_vsock", "EPERM"),
            ("socket_raw", "EPERM"),
            ("socket_mptcp", "EPERM"),
            ("socket_udplite", "EPERM"),
            ("socket_ping", "EPERM"),
            ("socket_netlink_audit", "EPERM"),
            ("socket_netlink_route", "ok"),
            ("socket_unix", "ok"),
            ("socket_tcp", "ok"),
            ("socket_udp6", "ok"),
            ("fast_open", "EOPNOTSUPP"),
            ("fast_open_connect", "ENOPROTOOPT"),
            ("ulp", "ENOPROTOOPT"),
            ("kill_supervisor", "EPERM"),
            ("core_limit", "0"),
            ("umask", "27"),
            ("session_leader", "yes"),
            ("descriptors", "0,1,2"),
            ("ignored_signals", "0"),
            ("blocked_signals", "0"),
            ("threads_work", "yes"),
            ("children_work", "yes"),
            ("directory", "/"),
            ("environment", "NAME=value"),
        ],
    )
}

fn landlock_holds_from_inside(scratch: &Scratch) -> Outcomes {
    let (shared, open, outside) =
        (scratch.path("shared"), scratch.path("open"), scratch.path("outside"));
    for directory in [&shared, &open, &outside] {
        fs::create_dir_all(directory).map_err(|error| error.to_string())?;
        fs::write(directory.join("file"), "text").map_err(|error| error.to_string())?;
        for path in [directory.clone(), directory.join("file")] {
            std::os::unix::fs::chown(path, Some(AGENT), Some(AGENT))
                .map_err(|error| error.to_string())?;
        }
    }
    let read_only = ["/usr", "/lib", "/lib64", "/bin", "/proc"].map(PathBuf::from);
    let mut rules: Vec<PathRule> = read_only
        .into_iter()
        .chain([scratch.program.clone(), shared.clone()])
        .map(|path| PathRule { path, access: Access::ReadOnly })
        .collect();
    for path in [open.clone(), "/dev/null".into(), "/no/such/path".into()] {
        rules.push(PathRule { path, access: Access::ReadWrite });
    }
    // A process of the same user outside the domain, which only the signal scope protects.
    let bystander = sleeper(AGENT)?;
    let name = SocketAddr::from_abstract_name(b"ringfence-fence-process-test")
        .map_err(|error| error.to_string())?;
    let _listener = UnixListener::bind_addr(&name).map_err(|error| error.to_string())?;
    let scratch_path = scratch.directory.path().display().to_string();
    let number = bystander.as_raw_nonzero().to_string();
    let outcome = launch(
        scratch,
        Launch { probe: &["files", &scratch_path, &number], rules: Some(rules), ..Launch::default() },
    );
    let _ = kill_process(bystander, Signal::KILL);
    wait_for(bystander);
    let outcome = outcome?;
    equal("verified from outside", outcome.verified.clone(), Some(Ok(())))?;
    let scopes = if landlock::abi() >= 6 { "EPERM" } else { "ok" };
    expect(
        &outcome,
        &[
            ("read_shared", "ok"),
            ("write_shared", "EACCES"),
            ("truncate_shared", "EACCES"),
            ("create_shared", "EACCES"),
            ("read_open", "ok"),
            ("write_open", "ok"),
            ("create_open", "ok"),
            ("move_out_of_open", "EACCES"),
            ("read_outside", "EACCES"),
            ("list_outside", "EACCES"),
            ("write_null", "ok"),
            ("signal_bystander", scopes),
            ("signal_child", "ok"),
            ("abstract_socket", scopes),
        ],
    )?;
    let report = outcome.landlock.ok_or("no report from the keeper")?;
    ensure(report.contains("/no/such/path"), format!("skipped path in {report}"))
}

fn connect_is_reported_with_its_cookie(scratch: &Scratch) -> Outcomes {
    let outcome =
        launch(scratch, Launch { probe: &["connect"], listen: true, ..Launch::default() })?;
    equal("verified from outside", outcome.verified.clone(), Some(Ok(())))?;
    let cookie = |name: &str| {
        outcome.output.lines().find_map(|line| line.strip_prefix(name)?.trim().parse::<u64>().ok())
    };
    let (main, thread) = (cookie("cookie"), cookie("thread_cookie"));
    ensure(main.is_some() && thread.is_some(), format!("output {:?}", outcome.output))?;
    let targets: Vec<_> = outcome.reports.iter().map(|report| report.target.clone()).collect();
    let stream = |cookie: Option<u64>| Ok(notify::Target::Inet {
        cookie: cookie.unwrap_or(0),
        stream: true,
    });
    equal(
        "targets",
        targets,
        vec![stream(main), Ok(notify::Target::Other), stream(thread), Err(Errno::BADF)],
    )?;
    ensure(
        outcome.reports.iter().all(|report| report.process == outcome.agent),
        format!("processes {:?}", outcome.reports),
    )?;
    // Loopback has nobody listening: the call went on and the kernel answered.
    expect(
        &outcome,
        &[("connect", "ECONNREFUSED"), ("connect_unix", "ENOENT"), ("connect_thread", "ECONNREFUSED")],
    )
}

fn exec_failures(scratch: &Scratch) -> Outcomes {
    let plain = scratch.path("plain");
    fs::write(&plain, "no program").map_err(|error| error.to_string())?;
    let script = scratch.path("no-format");
    fs::write(&script, "\x01\x02").map_err(|error| error.to_string())?;
    fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755))
        .map_err(|error| error.to_string())?;
    for (path, errno, code) in [
        (scratch.path("missing"), Errno::NOENT, 127),
        (plain, Errno::ACCESS, 126),
        (script, Errno::NOEXEC, 126),
    ] {
        let outcome = launch(scratch, Launch { program: Some(path), ..Launch::default() })?;
        equal("failure", outcome.failure, Some((ChildStep::Exec, errno)))?;
        equal("exit code", outcome.code, Some(code))?;
    }
    Ok(())
}

fn no_release_no_agent(scratch: &Scratch) -> Outcomes {
    let outcome = launch(
        scratch,
        Launch { probe: &["escapes"], release: false, ..Launch::default() },
    )?;
    equal("exit code", outcome.code, Some(125))?;
    equal("output", outcome.output.as_str(), "")
}

fn a_failed_step_is_named(scratch: &Scratch) -> Outcomes {
    let outcome = launch(scratch, Launch { workdir: "/no/such", ..Launch::default() })?;
    equal("failure", outcome.failure, Some((ChildStep::Workdir, Errno::NOENT)))?;
    equal("exit code", outcome.code, Some(125))
}

fn without_setpcap(scratch: &Scratch) -> Outcomes {
    let refused = launch(scratch, Launch { setpcap: false, ..Launch::default() })?;
    equal("failure", refused.failure, Some((ChildStep::Bounding, Errno::PERM)))?;
    equal("exit code", refused.code, Some(125))?;
    let outcome = launch(
        scratch,
        Launch {
            probe: &["escapes"],
            setpcap: false,
            bounding: Bounding::IfPermitted,
            ..Launch::default()
        },
    )?;
    equal(
        "warnings",
        outcome.warnings.clone(),
        vec![(ChildStep::Bounding, Errno::PERM), (ChildStep::Securebits, Errno::PERM)],
    )?;
    let field = outcome.verified.clone().and_then(Result::err).map(|mismatch| mismatch.field);
    equal("only the bounding set differs", field, Some("CapBnd"))?;
    expect(&outcome, &[("setresuid", "EPERM"), ("unshare_net", "EPERM")])
}

fn dies_with_its_parent(scratch: &Scratch) -> Outcomes {
    let outcome = launch(scratch, Launch { kill_keeper: true, ..Launch::default() })?;
    equal("verified from outside", outcome.verified.clone(), Some(Ok(())))?;
    ensure(outcome.agent_gone, "the agent outlived the process that forked it")
}

fn terminal(scratch: &Scratch) -> Outcomes {
    let outcome = launch(scratch, Launch { probe: &["terminal"], tty: true, ..Launch::default() })?;
    equal("exit code", outcome.code, Some(0))?;
    expect(&outcome, &[("controlling", "yes"), ("foreground", "yes"), ("tiocsti", "EPERM")])
}

/// A process of this user that sleeps until it is killed.
fn sleeper(uid: u32) -> Result<Pid, String> {
    match spawn::fork().map_err(|errno| errno.to_string())? {
        Forked::Parent(pid) => Ok(pid),
        Forked::Child => {
            let uid = rustix::process::Uid::from_raw(uid);
            let done = rustix::thread::set_thread_res_uid(uid, uid, uid);
            let _ = rustix::process::set_parent_process_death_signal(Some(Signal::KILL));
            while done.is_ok() {
                std::thread::sleep(std::time::Duration::from_secs(60));
            }
            spawn::exit_now(1)
        }
    }
}

fn signals_without_cap_kill(_: &Scratch) -> Outcomes {
    let victim = sleeper(AGENT)?;
    // Until it has become the agent's, this user may not be what keeps the signal away.
    while Status::read(victim, None).map_err(|error| error.to_string())?.uid != [AGENT; 4] {
        rustix::thread::sched_yield();
    }
    let result = in_child(|| {
        launch::give_up(rustix::thread::CapabilitySet::KILL)?;
        equal("as root", kill_process(victim, Signal::TERM), Err(Errno::PERM))?;
        let killed = credentials::as_uid(AGENT, || kill_process(victim, Signal::TERM));
        equal("as the agent", killed, Ok(Ok(())))?;
        let own = Status::read(rustix::process::getpid(), None).map_err(|error| error.to_string())?;
        equal("root again", own.uid, [0; 4])?;
        ensure(own.capabilities[2] != 0, "capabilities are back")
    });
    let _ = kill_process(victim, Signal::KILL);
    equal("signal of the victim", wait_for(victim), Err(libc::SIGTERM))?;
    result
}

fn proxy_is_confined(scratch: &Scratch) -> Outcomes {
    let allowed = scratch.path("roots.pem");
    fs::write(&allowed, "roots").map_err(|error| error.to_string())?;
    in_child(|| {
        let identity = credentials::Identity { uid: 65_530, gid: 65_530, groups: Vec::new() };
        credentials::drop_to(&identity, Bounding::Required).map_err(|error| error.to_string())?;
        let report = landlock::proxy_domain(&[&allowed]).map_err(|error| error.to_string())?;
        if report.abi >= 6 {
            equal("enforced", report.enforced, Enforced::Full)?;
        }
        seccomp::install(&seccomp::proxy()).map_err(|errno| errno.to_string())?;
        let errno = |error: &std::io::Error| error.raw_os_error().unwrap_or(0);

        equal("its file", fs::read_to_string(&allowed).ok().as_deref(), Some("roots"))?;
        let other = fs::read("/etc/passwd").map_err(|error| errno(&error));
        equal("another file", other, Err(libc::EACCES))?;
        let written = fs::write(&allowed, "x").map_err(|error| errno(&error));
        equal("writing", written, Err(libc::EACCES))?;
        let started = std::process::Command::new("/bin/true").spawn().map_err(|error| errno(&error));
        equal("a process", started.map(drop), Err(libc::EPERM))?;
        equal("fork", spawn::fork(), Err(Errno::PERM))?;

        // What it lives on: threads and connections.
        let server = std::net::TcpListener::bind("127.0.0.1:0").map_err(|error| error.to_string())?;
        let address = server.local_addr().map_err(|error| error.to_string())?;
        let echo = std::thread::spawn(move || -> std::io::Result<()> {
            let (mut stream, _) = server.accept()?;
            let mut text = [0; 4];
            stream.read_exact(&mut text)?;
            stream.write_all(&text)
        });
        let exchange = || -> std::io::Result<[u8; 4]> {
            let mut stream = std::net::TcpStream::connect(address)?;
            stream.set_nodelay(true)?;
            stream.write_all(b"ping")?;
            let mut text = [0; 4];
            stream.read_exact(&mut text)?;
            Ok(text)
        };
        let answer = exchange().map_err(|error| error.to_string())?;
        equal("echo", &answer, b"ping")?;
        echo.join().map_err(|_| "the thread panicked")?.map_err(|error| error.to_string())
    })
}

fn supervisor_filters(scratch: &Scratch) -> Outcomes {
    let mount_point = scratch.path("mnt");
    fs::create_dir_all(&mount_point).map_err(|error| error.to_string())?;
    let mount = || {
        let flags = rustix::mount::MountFlags::empty();
        rustix::mount::mount("none", &mount_point, "tmpfs", flags, None)
    };
    in_child(|| {
        launch::private_mounts()?;
        seccomp::install(&seccomp::supervisor()).map_err(|errno| errno.to_string())?;
        equal("bpf", probe::call(libc::SYS_bpf, [0; 6]), Err(Errno::PERM))?;
        equal("x32", probe::call(0x4000_0000 | 39, [0; 6]), Err(Errno::PERM))?;
        equal("mount before", mount(), Ok(()))?;
        seccomp::install(&seccomp::supervisor_sealed()).map_err(|errno| errno.to_string())?;
        equal("mount after", mount(), Err(Errno::PERM))?;
        let forked = in_child(|| Ok(()));
        equal("fork", forked, Ok(()))
    })
}

fn best_effort_is_never_silent(_: &Scratch) -> Outcomes {
    in_child(|| {
        let nothing = PathRule { path: "/no/such/path".into(), access: Access::ReadOnly };
        let prepared = landlock::prepare(&[nothing], false).map_err(|error| error.to_string())?;
        let report = prepared.enforce().map_err(|error| error.to_string())?;
        equal("applied", report.applied, 0)?;
        equal("skipped", report.skipped.len(), 1)?;
        ensure(matches!(report.enforced, Enforced::None(_)), format!("{:?}", report.enforced))?;
        let own = Status::read(rustix::process::getpid(), None).map_err(|error| error.to_string())?;
        ensure(own.no_new_privs, "no_new_privs")?;
        let null = fs::File::open("/dev/null").map_err(|error| error.to_string())?;
        ensure(null.as_raw_fd() >= 0, "files are open as before")
    })
}

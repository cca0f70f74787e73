//! One agent each: launched, looked at from outside, and asked what it can do.

use std::fs;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::PathBuf;

use ringfence::fence::credentials::Bounding;
use ringfence::fence::landlock::{self, Access, PathRule};
use ringfence::fence::notify;
use ringfence::fence::rlimits::Limits;
use ringfence::fence::spawn::ChildStep;
use ringfence::policy::Memfd;
use rustix::io::Errno;
use rustix::process::{PidfdFlags, Signal, getpid, kill_process, pidfd_open};

use super::launch::{AGENT, Ending, Launch, launch, sleeper, wait_for};
use super::{Outcomes, Scratch, ensure, equal, expect};

pub fn agent_is_fenced(scratch: &Scratch) -> Outcomes {
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
            ("open_files", "Some(256) Some(256)"),
            ("securebits", "ef"),
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

pub fn limits_are_set(scratch: &Scratch) -> Outcomes {
    let limits = Limits { open_files: Some(64), processes: Some(500) };
    let outcome = launch(scratch, Launch { probe: &["escapes"], limits, ..Launch::default() })?;
    equal("verified from outside", outcome.verified.clone(), Some(Ok(())))?;
    expect(
        &outcome,
        &[
            ("core_limit", "0"),
            ("open_files", "Some(64) Some(64)"),
            ("processes", "Some(500) Some(500)"),
            ("threads_work", "yes"),
        ],
    )?;
    // A process of the same uid elsewhere counts too: then the agent cannot even execute.
    let elsewhere = sleeper(AGENT)?;
    let limits = Limits { open_files: None, processes: Some(0) };
    let outcome = launch(scratch, Launch { probe: &["escapes"], limits, ..Launch::default() });
    let _ = kill_process(elsewhere, Signal::KILL);
    let _ = wait_for(elsewhere);
    equal("failure", outcome?.failure, Some((ChildStep::Exec, Errno::AGAIN)))
}

pub fn memfd_is_a_choice(scratch: &Scratch) -> Outcomes {
    let refused = [("memfd_plain", "EPERM"), ("memfd_exec", "EPERM"), ("memfd_both", "EPERM")];
    let launch_with =
        |memfd| launch(scratch, Launch { probe: &["memfd"], memfd, ..Launch::default() });
    let outcome = launch_with(Memfd::Deny)?;
    expect(&outcome, &refused)?;
    expect(&outcome, &[("memfd_noexec", "EPERM")])?;
    let outcome = launch_with(Memfd::Noexec)?;
    expect(&outcome, &refused)?;
    expect(
        &outcome,
        &[
            ("memfd_noexec", "ok"),
            ("fill_memfd", "ok"),
            ("chmod_memfd", "EPERM"),
            ("exec_memfd", "EACCES"),
        ],
    )?;
    let outcome = launch_with(Memfd::Allow)?;
    expect(&outcome, &[("memfd_plain", "ok"), ("memfd_noexec", "ok"), ("memfd_exec", "ok")])
}

pub fn landlock_holds_from_inside(scratch: &Scratch) -> Outcomes {
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
        Launch {
            probe: &["files", &scratch_path, &number],
            rules: Some(rules),
            ..Launch::default()
        },
    );
    let _ = kill_process(bystander, Signal::KILL);
    let _ = wait_for(bystander);
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

pub fn connect_is_reported_with_its_cookie(scratch: &Scratch) -> Outcomes {
    let outcome =
        launch(scratch, Launch { probe: &["connect"], listen: true, ..Launch::default() })?;
    equal("verified from outside", outcome.verified.clone(), Some(Ok(())))?;
    let cookie = |name: &str| {
        outcome.output.lines().find_map(|line| line.strip_prefix(name)?.trim().parse::<u64>().ok())
    };
    let stream = |cookie: Option<u64>| {
        Ok(notify::Target::Inet { cookie: cookie.unwrap_or(0), stream: true })
    };
    let targets: Vec<_> = outcome.reports.iter().map(|report| report.target).collect();
    let mut want =
        vec![stream(cookie("cookie")), Ok(notify::Target::Other), stream(cookie("thread_cookie"))];
    // Before Linux 6.9 the kernel shows the process's descriptors, not the thread's.
    let thread_has_pidfd = pidfd_open(getpid(), PidfdFlags::from_bits_retain(0x80)).is_ok();
    want.push(if thread_has_pidfd { stream(cookie("alone_cookie")) } else { Err(Errno::BADF) });
    want.push(Err(Errno::BADF));
    equal("targets", targets, want)?;
    ensure(
        outcome.reports.iter().all(|report| report.process == outcome.agent),
        format!("processes {:?}", outcome.reports),
    )?;
    // Loopback has nobody listening: the call went on and the kernel answered.
    expect(
        &outcome,
        &[
            ("connect", "ECONNREFUSED"),
            ("connect_unix", "ENOENT"),
            ("connect_thread", "ECONNREFUSED"),
            ("connect_alone", "ECONNREFUSED"),
        ],
    )
}

pub fn exec_failures(scratch: &Scratch) -> Outcomes {
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

pub fn no_release_no_agent(scratch: &Scratch) -> Outcomes {
    let outcome = launch(
        scratch,
        Launch { probe: &["escapes"], ending: Ending::NoRelease, ..Launch::default() },
    )?;
    equal("exit code", outcome.code, Some(125))?;
    equal("output", outcome.output.as_str(), "")
}

pub fn a_failed_step_is_named(scratch: &Scratch) -> Outcomes {
    let outcome = launch(scratch, Launch { workdir: "/no/such", ..Launch::default() })?;
    equal("failure", outcome.failure, Some((ChildStep::Workdir, Errno::NOENT)))?;
    equal("exit code", outcome.code, Some(125))
}

pub fn without_setpcap(scratch: &Scratch) -> Outcomes {
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
    expect(&outcome, &[("setresuid", "EPERM"), ("unshare_net", "EPERM"), ("securebits", "0")])
}

pub fn dies_with_its_parent(scratch: &Scratch) -> Outcomes {
    let outcome = launch(scratch, Launch { ending: Ending::KillKeeper, ..Launch::default() })?;
    equal("verified from outside", outcome.verified.clone(), Some(Ok(())))?;
    ensure(outcome.agent_gone, "the agent outlived the process that forked it")
}

pub fn terminal(scratch: &Scratch) -> Outcomes {
    let outcome = launch(scratch, Launch { probe: &["terminal"], tty: true, ..Launch::default() })?;
    equal("exit code", outcome.code, Some(0))?;
    expect(&outcome, &[("controlling", "yes"), ("foreground", "yes"), ("tiocsti", "EPERM")])
}

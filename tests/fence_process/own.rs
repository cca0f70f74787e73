//! What the supervisor and the proxy do to themselves.

use std::fs;
use std::io::{Read, Write};

use ringfence::fence::credentials::{self, Bounding};
use ringfence::fence::landlock::{self, Access, Enforced, PathRule};
use ringfence::fence::seccomp;
use ringfence::fence::status::Status;
use rustix::io::Errno;
use rustix::process::{Signal, kill_process};

use super::launch::{self, AGENT, in_child, sleeper, wait_for};
use super::{Outcomes, Scratch, ensure, equal, probe};

pub fn signals_without_cap_kill(_: &Scratch) -> Outcomes {
    let victim = sleeper(AGENT)?;
    // Until it has become the agent's, this user may not be what keeps the signal away.
    while Status::read(victim, None).map_err(|error| error.to_string())?.uid != [AGENT; 4] {
        rustix::thread::sched_yield();
    }
    let result = in_child(|| {
        launch::give_up(rustix::thread::CapabilitySet::KILL)?;
        let parent = rustix::process::getppid();
        credentials::parent_death_signal_kill(parent).map_err(|errno| errno.to_string())?;
        equal("as root", kill_process(victim, Signal::TERM), Err(Errno::PERM))?;
        let killed = credentials::as_uid(AGENT, || kill_process(victim, Signal::TERM));
        equal("as the agent", killed, Ok(Ok(())))?;
        let own =
            Status::read(rustix::process::getpid(), None).map_err(|error| error.to_string())?;
        equal("root again", own.uid, [0; 4])?;
        ensure(own.capabilities[2] != 0, "capabilities are back")?;
        let signal = rustix::process::parent_process_death_signal();
        equal("parent death signal", signal, Ok(Some(Signal::KILL)))
    });
    let _ = kill_process(victim, Signal::KILL);
    equal("signal of the victim", wait_for(victim), Err(libc::SIGTERM))?;
    result
}

pub fn proxy_is_confined(scratch: &Scratch) -> Outcomes {
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
        let started =
            std::process::Command::new("/bin/true").spawn().map_err(|error| errno(&error));
        equal("a process", started.map(drop), Err(libc::EPERM))?;
        let forked = probe::call(libc::SYS_clone, [17, 0, 0, 0, 0, 0]);
        equal("fork", forked, Err(Errno::PERM))?;

        // What it lives on: threads and connections.
        let server =
            std::net::TcpListener::bind("127.0.0.1:0").map_err(|error| error.to_string())?;
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

pub fn supervisor_filters(scratch: &Scratch) -> Outcomes {
    let mount_point = scratch.path("mnt");
    fs::create_dir_all(&mount_point).map_err(|error| error.to_string())?;
    let mount = || {
        let flags = rustix::mount::MountFlags::empty();
        rustix::mount::mount("none", &mount_point, "tmpfs", flags, None)
    };
    in_child(|| {
        launch::private_mounts()?;
        equal("mount before", mount(), Ok(()))?;
        seccomp::install(&seccomp::supervisor()).map_err(|errno| errno.to_string())?;
        equal("bpf", probe::call(libc::SYS_bpf, [0; 6]), Err(Errno::PERM))?;
        equal("x32", probe::call(0x4000_0027, [0; 6]), Err(Errno::PERM))?;
        equal("mount after", mount(), Err(Errno::PERM))?;
        let forked = in_child(|| Ok(()));
        equal("fork", forked, Ok(()))
    })
}

pub fn best_effort_is_never_silent(_: &Scratch) -> Outcomes {
    in_child(|| {
        let nothing = PathRule { path: "/no/such/path".into(), access: Access::ReadOnly };
        let prepared = landlock::prepare(&[nothing], false).map_err(|error| error.to_string())?;
        let report = prepared.enforce().map_err(|error| error.to_string())?;
        equal("applied", report.applied, 0)?;
        equal("skipped", report.skipped.len(), 1)?;
        ensure(matches!(report.enforced, Enforced::None(_)), format!("{:?}", report.enforced))?;
        let own =
            Status::read(rustix::process::getpid(), None).map_err(|error| error.to_string())?;
        ensure(own.no_new_privs, "no_new_privs")?;
        fs::File::open("/dev/null").map(drop).map_err(|error| error.to_string())
    })
}

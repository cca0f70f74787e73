//! The fenced agent: tries things and prints `name errno` for each.

use std::fs;
use std::os::fd::AsRawFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixStream};
use std::path::Path;

use rustix::io::Errno;

/// One raw system call.
pub fn call(nr: libc::c_long, args: [u64; 6]) -> Result<i64, Errno> {
    // SAFETY: the calls in this file get numbers, null, or addresses of values that outlive them.
    let result = unsafe { libc::syscall(nr, args[0], args[1], args[2], args[3], args[4], args[5]) };
    if result == -1 {
        let error = std::io::Error::last_os_error();
        return Err(Errno::from_io_error(&error).unwrap_or(Errno::INVAL));
    }
    Ok(result)
}

fn name(errno: Errno) -> &'static str {
    match errno {
        Errno::PERM => "EPERM",
        Errno::ACCESS => "EACCES",
        Errno::NOSYS => "ENOSYS",
        Errno::NOENT => "ENOENT",
        Errno::OPNOTSUPP => "EOPNOTSUPP",
        Errno::NOPROTOOPT => "ENOPROTOOPT",
        Errno::CONNREFUSED => "ECONNREFUSED",
        Errno::XDEV => "EXDEV",
        Errno::BADF => "EBADF",
        _ => "another error",
    }
}

/// The result is given where it is made.
#[allow(clippy::needless_pass_by_value)]
fn say<T>(what: &str, result: Result<T, Errno>) {
    match result {
        Ok(_) => println!("{what} ok"),
        Err(errno) => println!("{what} {}", name(errno)),
    }
}

fn errno<T>(result: std::io::Result<T>) -> Result<T, Errno> {
    result.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::INVAL))
}

pub fn run(arguments: &[String]) {
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["escapes"] => escapes(),
        ["files", directory, bystander] => files(Path::new(directory), bystander),
        ["connect"] => connect(),
        ["terminal"] => terminal(),
        ["memfd"] => memfd(),
        _ => {}
    }
}

const GARBAGE: u64 = 0xDEAD_BEEF_0000_0000;

fn escapes() {
    let own = u64::from(std::process::id());
    let path: *const libc::c_char = c"".as_ptr();
    for (what, nr, args) in [
        ("setresuid", libc::SYS_setresuid, [0; 6]),
        ("setgroups", libc::SYS_setgroups, [0; 6]),
        ("unshare_user", libc::SYS_unshare, [1 << 28, 0, 0, 0, 0, 0]),
        ("unshare_net", libc::SYS_unshare, [1 << 30, 0, 0, 0, 0, 0]),
        ("unshare_files", libc::SYS_unshare, [1 << 10, 0, 0, 0, 0, 0]),
        ("clone_user", libc::SYS_clone, [1 << 28 | 0x11, 0, 0, 0, 0, 0]),
        ("clone3", libc::SYS_clone3, [0; 6]),
        ("newer_than_the_table", 470, [0; 6]),
        ("setns", libc::SYS_setns, [0; 6]),
        ("ptrace", libc::SYS_ptrace, [0; 6]),
        ("process_vm_readv", libc::SYS_process_vm_readv, [own, 0, 0, 0, 0, 0]),
        ("pidfd_open", libc::SYS_pidfd_open, [own, 0, 0, 0, 0, 0]),
        ("bpf", libc::SYS_bpf, [0; 6]),
        ("io_uring_setup", libc::SYS_io_uring_setup, [1, 0, 0, 0, 0, 0]),
        ("io_uring_enter", libc::SYS_io_uring_enter, [0; 6]),
        ("mount", libc::SYS_mount, [0; 6]),
        ("keyctl", libc::SYS_keyctl, [0; 6]),
        ("memfd_create", libc::SYS_memfd_create, [path as u64, 0, 0, 0, 0, 0]),
        ("execveat_empty_path", libc::SYS_execveat, [0, path as u64, 0, 0, 0x1000, 0]),
        ("second_filter", libc::SYS_seccomp, [1, 0, 0, 0, 0, 0]),
        ("prctl_seccomp", libc::SYS_prctl, [0x16 | GARBAGE, 2, 0, 0, 0, 0]),
        ("tiocsti", libc::SYS_ioctl, [0, libc::TIOCSTI, path as u64, 0, 0, 0]),
        ("tiocsti_high_bits", libc::SYS_ioctl, [0, libc::TIOCSTI | GARBAGE, path as u64, 0, 0, 0]),
        ("x32_getpid", 0x4000_0027, [0; 6]),
        ("socket_packet", libc::SYS_socket, [17, 3, 0, 0, 0, 0]),
        ("socket_alg", libc::SYS_socket, [38, 5, 0, 0, 0, 0]),
        ("socket_vsock", libc::SYS_socket, [40, 1, 0, 0, 0, 0]),
        ("socket_raw", libc::SYS_socket, [2, 3, 1, 0, 0, 0]),
        ("socket_mptcp", libc::SYS_socket, [2, 1, 262, 0, 0, 0]),
        ("socket_udplite", libc::SYS_socket, [2, 2, 136, 0, 0, 0]),
        ("socket_ping", libc::SYS_socket, [2, 2, 1, 0, 0, 0]),
        ("socket_netlink_audit", libc::SYS_socket, [16, 3, 9, 0, 0, 0]),
        ("socket_netlink_route", libc::SYS_socket, [16, 3 | 0o2_000_000, 0, 0, 0, 0]),
        ("socket_unix", libc::SYS_socket, [1, 5, 0, 0, 0, 0]),
        ("socket_tcp", libc::SYS_socket, [2, 1 | 0o4000, 6, 0, 0, 0]),
        ("socket_udp6", libc::SYS_socket, [10, 2, 17, 0, 0, 0]),
        ("fast_open", libc::SYS_sendto, [0, 0, 0, 0x2000_0000, 0, 0]),
        ("fast_open_connect", libc::SYS_setsockopt, [0, 6, 30, 0, 0, 0]),
        ("ulp", libc::SYS_setsockopt, [0, 6 | GARBAGE, 31, 0, 0, 0]),
    ] {
        // Descriptors that were opened stay open; the list below is made before.
        if what == "socket_netlink_route" {
            about_itself();
        }
        say(what, call(nr, args));
    }
}

fn about_itself() {
    let parent = rustix::process::getppid().map_or(1, |pid| pid.as_raw_nonzero().get());
    // The keeper's parent: the supervisor, or whoever started it. Root's in any case.
    say(
        "kill_supervisor",
        rustix::process::test_kill_process(
            rustix::process::Pid::from_raw(parent).unwrap_or(rustix::process::Pid::INIT),
        ),
    );
    let core = rustix::process::getrlimit(rustix::process::Resource::Core);
    println!("core_limit {}", core.maximum.unwrap_or(1));
    for (what, resource) in [
        ("open_files", rustix::process::Resource::Nofile),
        ("processes", rustix::process::Resource::Nproc),
    ] {
        let limit = rustix::process::getrlimit(resource);
        println!("{what} {:?} {:?}", limit.current, limit.maximum);
    }
    let securebits = rustix::thread::capabilities_secure_bits();
    println!("securebits {:x}", securebits.map_or(0, |bits| bits.bits()));
    println!("umask {:o}", rustix::process::umask(rustix::fs::Mode::empty()).as_raw_mode());
    let leader = rustix::process::getsid(None) == Ok(rustix::process::getpid());
    println!("session_leader {}", if leader { "yes" } else { "no" });
    println!("directory {}", std::env::current_dir().unwrap_or_default().display());
    let environment: Vec<_> =
        std::env::vars().map(|(name, value)| format!("{name}={value}")).collect();
    println!("environment {}", environment.join(","));
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    for (what, field) in [("blocked_signals", "SigBlk:"), ("ignored_signals", "SigIgn:")] {
        let mask = status.lines().find_map(|line| line.strip_prefix(field)).unwrap_or("").trim();
        let mask = u64::from_str_radix(mask, 16).unwrap_or(u64::MAX);
        // Rust's runtime ignores SIGPIPE (13) at its start.
        println!("{what} {:x}", if field == "SigIgn:" { mask & !(1 << 12) } else { mask });
    }
    // The one that lists them is the last.
    let mut open: Vec<i32> = fs::read_dir("/proc/self/fd")
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| fs::read_link(entry.path()).is_ok_and(|to| !to.ends_with("fd")))
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect();
    open.sort_unstable();
    let open: Vec<String> = open.iter().map(ToString::to_string).collect();
    println!("descriptors {}", open.join(","));
    let thread = std::thread::spawn(|| 1).join().is_ok();
    println!("threads_work {}", if thread { "yes" } else { "no" });
    let child =
        std::process::Command::new("/bin/true").status().is_ok_and(|status| status.success());
    println!("children_work {}", if child { "yes" } else { "no" });
}

fn files(directory: &Path, bystander: &str) {
    let file = |name: &str| directory.join(name).join("file");
    let write = |name: &str| {
        let options = fs::OpenOptions::new().write(true).open(file(name));
        errno(options)
    };
    say("read_shared", errno(fs::read(file("shared"))));
    say("write_shared", write("shared"));
    let path = std::ffi::CString::new(file("shared").to_str().unwrap_or("")).unwrap_or_default();
    say("truncate_shared", call(libc::SYS_truncate, [path.as_ptr() as u64, 0, 0, 0, 0, 0]));
    say("create_shared", errno(fs::File::create(directory.join("shared/new"))));
    say("read_open", errno(fs::read(file("open"))));
    say("write_open", write("open"));
    say("create_open", errno(fs::File::create(directory.join("open/new"))));
    say("move_out_of_open", errno(fs::rename(file("open"), directory.join("outside/moved"))));
    say("read_outside", errno(fs::read(file("outside"))));
    say("list_outside", errno(fs::read_dir(directory.join("outside"))));
    say("write_null", errno(fs::write("/dev/null", "x")));
    let pid = bystander.parse().ok().and_then(rustix::process::Pid::from_raw);
    let pid = pid.unwrap_or(rustix::process::Pid::INIT);
    say("signal_bystander", rustix::process::test_kill_process(pid));
    let child = std::process::Command::new("/bin/sleep").arg("60").spawn();
    match child {
        Ok(mut child) => {
            say("signal_child", errno(child.kill()));
            let _ = child.wait();
        }
        Err(error) => println!("signal_child {error}"),
    }
    let address = SocketAddr::from_abstract_name(b"ringfence-fence-process-test");
    say("abstract_socket", errno(address.and_then(|address| UnixStream::connect_addr(&address))));
}

fn connect() {
    connect_loopback("cookie", "connect");
    say("connect_unix", errno(UnixStream::connect("/no/such/socket")));
    let _ = std::thread::spawn(|| connect_loopback("thread_cookie", "connect_thread")).join();
    // With descriptors of its own, which the process's first thread does not have.
    let alone = || {
        say("unshare_files", call(libc::SYS_unshare, [1 << 10, 0, 0, 0, 0, 0]));
        connect_loopback("alone_cookie", "connect_alone");
    };
    let _ = std::thread::spawn(alone).join();
    say("connect_nothing", call(libc::SYS_connect, [GARBAGE | 0x3E7, 0, 0, 0, 0, 0]));
}

fn connect_loopback(cookie_name: &str, connect_name: &str) {
    use rustix::net::{AddressFamily, SocketType, connect, socket, sockopt};
    let Ok(socket) = socket(AddressFamily::INET, SocketType::STREAM, None) else {
        return;
    };
    println!("{cookie_name} {}", sockopt::socket_cookie(&socket).unwrap_or(0));
    let address = std::net::SocketAddrV4::new(std::net::Ipv4Addr::LOCALHOST, 1);
    say(connect_name, connect(&socket, &address));
}

fn terminal() {
    let tty = fs::OpenOptions::new().read(true).write(true).open("/dev/tty");
    println!("controlling {}", if tty.is_ok() { "yes" } else { "no" });
    let own = rustix::process::getpgrp();
    let foreground = tty.as_ref().is_ok_and(|tty| rustix::termios::tcgetpgrp(tty) == Ok(own));
    println!("foreground {}", if foreground { "yes" } else { "no" });
    let fd = tty.map_or(0, |tty| u64::from(tty.as_raw_fd().unsigned_abs()));
    let byte = b'x';
    let address = std::ptr::from_ref(&byte) as u64;
    say("tiocsti", call(libc::SYS_ioctl, [fd, libc::TIOCSTI, address, 0, 0, 0]));
}

fn memfd() {
    let name: *const libc::c_char = c"probe".as_ptr();
    let mut sealed = None;
    for (what, flags) in
        [("memfd_plain", 0), ("memfd_noexec", 8), ("memfd_exec", 16), ("memfd_both", 24)]
    {
        let made = call(libc::SYS_memfd_create, [name as u64, flags | GARBAGE, 0, 0, 0, 0]);
        if let ("memfd_noexec", Ok(fd)) = (what, made) {
            sealed = Some(fd);
        }
        say(what, made);
    }
    // The seal holds: neither is it executed, nor can it be made executable.
    let Some(sealed) = sealed else { return };
    let path = format!("/proc/self/fd/{sealed}");
    say("fill_memfd", errno(fs::read("/bin/true").and_then(|text| fs::write(&path, text))));
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    say("chmod_memfd", errno(fs::set_permissions(&path, mode)));
    say("exec_memfd", errno(std::process::Command::new(&path).status()));
}

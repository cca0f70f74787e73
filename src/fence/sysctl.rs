//! The pod's settings of its network stack, taken over into the fence.
//!
//! A pod may set `net.*` in its securityContext, and runtimes open the low ports to every user
//! (`ip_unprivileged_port_start`). A new network namespace knows nothing of either: without this
//! an agent could not serve on port 80 that serves there in an unfenced pod.
//!
//! Containers see `/proc/sys` read-only. What is written to here is a proc file system of our own
//! that is mounted nowhere (fsopen(2), Linux 5.2): its `sys/net` is the calling thread's namespace's.

use std::fs;
use std::io::{self, Write};
use std::os::fd::OwnedFd;

use rustix::fs::{Mode, OFlags};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen};
use serde::{Deserialize, Serialize};

/// What Kubernetes lets a pod set and what bears on the agent, below `/proc/sys/net`. ICMP sockets
/// (`ping_group_range`) are closed to the agent whatever the pod says.
const NAMES: [&str; 11] = [
    "ipv4/ip_unprivileged_port_start",
    "ipv4/ip_local_port_range",
    "ipv4/ip_local_reserved_ports",
    "ipv4/tcp_syncookies",
    "ipv4/tcp_keepalive_time",
    "ipv4/tcp_keepalive_intvl",
    "ipv4/tcp_keepalive_probes",
    "ipv4/tcp_fin_timeout",
    "ipv4/tcp_rmem",
    "ipv4/tcp_wmem",
    "core/somaxconn",
];

/// The longest value that is taken over, in bytes; ranges of reserved ports can be many.
const MAX_VALUE: usize = 64 << 10;
/// As long as all are that name no list of ports, in bytes.
const USUAL_VALUE: usize = 512;
/// How much of a value an error shows, in characters.
const MAX_SHOWN: usize = 64;

/// One setting and its value, as the kernel writes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Setting {
    /// Below `/proc/sys/net`.
    pub name: String,
    /// Without the line's end; else why it could not be read.
    pub value: Result<String, String>,
}

/// Reads the settings of the calling thread's network namespace; what the kernel does not have is
/// left out.
#[must_use]
pub fn read() -> Vec<Setting> {
    let setting = |name: &&str| {
        let value = match current(name) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
            value => value.map_err(|error| error.to_string()),
        };
        Some(Setting { name: (*name).to_owned(), value })
    };
    NAMES.iter().filter_map(setting).collect()
}

/// Brings the calling thread's network namespace to `settings`, as far as they differ, and reads
/// back what was set. The error names each setting that it does not have, and why; the others it
/// has. Needs `CAP_NET_ADMIN`, and `CAP_SYS_ADMIN` where `/proc/sys` is read-only.
pub fn apply(settings: &[Setting]) -> Result<(), String> {
    let mut own = None;
    let mut failures = Vec::new();
    let mut left = Vec::new();
    for Setting { name, value } in settings {
        match value {
            Ok(value) => left.push((name.as_str(), value.as_str())),
            Err(why) => failures.push(format!("net/{name}: cannot read the pod's: {why}")),
        }
    }
    // Some values depend on each other: the range of local ports begins above the privileged ones,
    // and which of the two comes first depends on whether they move up or down. So what failed is
    // tried again, as long as anything changes.
    loop {
        let before = left.len();
        let mut again = Vec::new();
        left.retain(|(name, value)| {
            let outcome = bring(&mut own, name, value);
            outcome.map_err(|why| again.push(format!("net/{name}: {why}"))).is_err()
        });
        if left.is_empty() || left.len() == before {
            failures.append(&mut again);
            break;
        }
    }
    if failures.is_empty() { Ok(()) } else { Err(failures.join("; ")) }
}

/// Brings one setting to `value`.
fn bring(own: &mut Option<OwnedFd>, name: &str, value: &str) -> Result<(), String> {
    let failed = |what: &'static str| move |error: io::Error| format!("{what}: {error}");
    if current(name).map_err(failed("cannot read"))? == value {
        return Ok(());
    }
    let own = match own {
        Some(own) => own,
        None => own.insert(proc().map_err(failed("cannot open a proc"))?),
    };
    write(own, name, value).map_err(failed("cannot set"))?;
    let found = current(name).map_err(failed("cannot read back"))?;
    if found == value {
        return Ok(());
    }
    let shown = |text: &str| text.chars().take(MAX_SHOWN).collect::<String>();
    Err(format!("{:?} was set and {:?} is read back", shown(value), shown(&found)))
}

fn current(name: &str) -> io::Result<String> {
    let path = format!("/proc/sys/net/{name}");
    // The kernel gives a value in one read(2) from the beginning, as far as there is room, and
    // then its end: a rest cannot be asked for.
    for room in [USUAL_VALUE, MAX_VALUE] {
        let file = rustix::fs::open(&path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
        let mut bytes = vec![0; room];
        let length = rustix::io::read(&file, &mut bytes)?;
        if length < room {
            let text = std::str::from_utf8(&bytes[..length]).map_err(io::Error::other)?;
            return Ok(text.trim_end().to_owned());
        }
    }
    Err(io::Error::other(format!("it has more than {MAX_VALUE} bytes")))
}

/// A proc file system that is mounted nowhere.
fn proc() -> io::Result<OwnedFd> {
    let context = fsopen("proc", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(&context)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    Ok(fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?)
}

fn write(proc: &OwnedFd, name: &str, value: &str) -> io::Result<()> {
    let flags = OFlags::WRONLY | OFlags::CLOEXEC;
    let file = rustix::fs::openat(proc, format!("sys/net/{name}"), flags, Mode::empty())?;
    fs::File::from(file).write_all(value.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: &str = "ipv4/ip_unprivileged_port_start";
    const RANGE: &str = "ipv4/ip_local_port_range";
    const RESERVED: &str = "ipv4/ip_local_reserved_ports";
    const BACKLOG: &str = "core/somaxconn";

    fn setting(name: &str, value: &str) -> Setting {
        Setting { name: name.to_owned(), value: Ok(value.to_owned()) }
    }

    /// Runs in a thread that has a new network namespace.
    fn fresh(test: fn()) {
        if !rustix::process::geteuid().is_root() {
            println!("SKIPPED: needs root");
            return;
        }
        let inside = move || {
            crate::fence::netns::unshare().unwrap();
            test();
        };
        std::thread::spawn(inside).join().unwrap();
    }

    #[test]
    fn a_namespace_takes_on_what_another_has() {
        fresh(|| {
            let mut settings = read();
            assert_eq!(settings.len(), NAMES.len(), "{settings:?}");
            for (name, value) in [(START, "77"), (RANGE, "20000\t30000"), (BACKLOG, "1234")] {
                let at = settings.iter_mut().find(|setting| setting.name == name).unwrap();
                let value = Ok(value.to_owned());
                assert_ne!(at.value, value);
                at.value = value;
            }
            apply(&settings).unwrap();
            assert_eq!(read(), settings);
        });
    }

    #[test]
    fn settings_that_depend_on_each_other_are_set_in_either_order() {
        fresh(|| {
            // Up beyond the range of a new namespace, and down below its privileged ports.
            for (start, range) in [("33000", "33000\t34000"), ("80", "500\t600")] {
                let up = [setting(START, start), setting(RANGE, range)];
                apply(&up).unwrap();
                assert!(up.iter().all(|setting| read().contains(setting)), "{:?}", read());
            }
        });
    }

    #[test]
    fn what_is_refused_takes_nothing_else_along() {
        fresh(|| {
            let unread = Setting { name: RESERVED.into(), value: Err("it is long".into()) };
            let (bad, good) = (setting(RANGE, "many"), setting(BACKLOG, "1234"));
            let none = setting("core/no_such", "1");
            let error = apply(&[unread, bad, none, good.clone()]).unwrap_err();
            assert!(read().contains(&good), "{:?}", read());
            for part in [
                "ip_local_reserved_ports: cannot read the pod's: it is long",
                "ip_local_port_range: cannot set",
                "core/no_such: cannot read",
            ] {
                assert!(error.contains(part), "{part} is not in {error}");
            }
            assert!(!error.contains("somaxconn"), "{error}");
        });
    }

    #[test]
    fn a_long_list_of_ports_is_taken_over_and_a_longer_one_is_told() {
        fresh(|| {
            let every_second = |to: u32| {
                let ports: Vec<_> = (10_001..to).step_by(2).map(|port| port.to_string()).collect();
                ports.join(",")
            };
            // Above a page, which the kernel takes at a time.
            let long = setting(RESERVED, &every_second(14_000));
            assert!(long.value.as_ref().unwrap().len() > 8_192);
            apply(std::slice::from_ref(&long)).unwrap();
            assert!(read().contains(&long), "{:?}", read());
            let longer = every_second(40_000);
            assert!(longer.len() > MAX_VALUE);
            let error = apply(&[setting(RESERVED, &longer)]).unwrap_err();
            assert!(error.contains("more than 65536 bytes"), "{error}");
            let unread = read().into_iter().find(|setting| setting.name == RESERVED).unwrap();
            assert!(unread.value.unwrap_err().contains("65536"));
        });
    }
}

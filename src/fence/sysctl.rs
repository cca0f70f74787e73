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

/// One setting and its value, as the kernel writes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Setting {
    /// Below `/proc/sys/net`.
    pub name: String,
    /// Without the line's end.
    pub value: String,
}

/// Reads the settings of the calling thread's network namespace; what the kernel does not have is
/// left out.
#[must_use]
pub fn read() -> Vec<Setting> {
    NAMES
        .iter()
        .filter_map(|name| {
            let value = current(name).ok()?;
            Some(Setting { name: (*name).to_owned(), value })
        })
        .collect()
}

/// Brings the calling thread's network namespace to `settings`, as far as they differ, and reads
/// back what was set. The error names the setting. Needs `CAP_NET_ADMIN`, and `CAP_SYS_ADMIN`
/// where `/proc/sys` is read-only.
pub fn apply(settings: &[Setting]) -> Result<(), String> {
    let mut own = None;
    for Setting { name, value } in settings {
        let failed = |what: &str, error: io::Error| format!("net/{name}: {what}: {error}");
        if current(name).map_err(|error| failed("cannot read", error))? == *value {
            continue;
        }
        let own = match &own {
            Some(own) => own,
            None => own.insert(proc().map_err(|error| failed("cannot open a proc", error))?),
        };
        write(own, name, value).map_err(|error| failed("cannot set", error))?;
        let found = current(name).map_err(|error| failed("cannot read back", error))?;
        if found != *value {
            return Err(format!("net/{name}: {value:?} was set and {found:?} is read back"));
        }
    }
    Ok(())
}

fn current(name: &str) -> io::Result<String> {
    let path = format!("/proc/sys/net/{name}");
    let file = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    // The kernel gives a setting at once. A list of ports that is longer is not taken over.
    let mut bytes = [0; 512];
    let length = rustix::io::read(&file, &mut bytes)?;
    if length == bytes.len() {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    let text = std::str::from_utf8(&bytes[..length]).map_err(io::Error::other)?;
    Ok(text.trim_end().to_owned())
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

    #[test]
    fn a_namespace_takes_on_what_another_has() {
        if !rustix::process::geteuid().is_root() {
            println!("SKIPPED: needs root");
            return;
        }
        // A thread, because its network namespace is its own.
        let outcome = std::thread::spawn(|| {
            crate::fence::netns::unshare().unwrap();
            let mut settings = read();
            assert_eq!(settings.len(), NAMES.len(), "{settings:?}");
            for (name, value) in [
                ("ipv4/ip_unprivileged_port_start", "77"),
                ("ipv4/ip_local_port_range", "20000\t30000"),
                ("core/somaxconn", "1234"),
            ] {
                let setting = settings.iter_mut().find(|setting| setting.name == name).unwrap();
                assert_ne!(setting.value, value);
                setting.value = value.to_owned();
            }
            apply(&settings).unwrap();
            assert_eq!(read(), settings);
            let refused = Setting { name: "core/somaxconn".into(), value: "many".into() };
            apply(&[refused]).unwrap_err()
        });
        assert!(outcome.join().unwrap().contains("core/somaxconn: cannot set"));
    }
}

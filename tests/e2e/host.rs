//! A container's processes as the node sees them. The tests share the machine's process list with
//! the rig: only its network is a namespace of its own for them.

use std::fs;
use std::process::Command;
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use tokio::time::sleep;

use crate::place::status;

/// The uid of the proxy.
pub const PROXY: u32 = 65530;

/// One process.
#[derive(Debug, Clone)]
pub struct Process {
    /// Seen from the machine.
    pub pid: u32,
    /// Seen from its own innermost PID namespace.
    pub inner_pid: u32,
    pub uid: u32,
}

/// The id that containerd gave to the container `agent`.
pub fn container_id(pod: &Pod) -> String {
    let id = status(pod, "agent").and_then(|status| status.container_id.clone());
    let id = id.expect("the container was started");
    id.rsplit('/').next().unwrap_or_default().to_owned()
}

/// The processes of a container, told by their cgroup. Those that are dead and not yet reaped do
/// not count.
pub fn processes(container: &str) -> Vec<Process> {
    let pids = fs::read_dir("/proc").expect("/proc").flatten();
    pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid: &u32| {
            let cgroups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
            cgroups.contains(container)
        })
        .filter_map(process)
        .collect()
}

fn process(pid: u32) -> Option<Process> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    if field(&status, "State").is_some_and(|state| state.starts_with(['Z', 'X'])) {
        return None;
    }
    let number = |text: &str| text.split_whitespace().next()?.parse().ok();
    Some(Process {
        pid,
        inner_pid: field(&status, "NSpid")?.split_whitespace().next_back()?.parse().ok()?,
        uid: number(field(&status, "Uid")?)?,
    })
}

/// One line of a `/proc/…/status`.
pub fn field<'a>(status: &'a str, name: &str) -> Option<&'a str> {
    status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim)
}

/// `/proc/PID/task/*/status` of every thread.
pub fn threads(pid: u32) -> Vec<String> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("the process lives").flatten();
    tasks.filter_map(|task| fs::read_to_string(task.path().join("status")).ok()).collect()
}

/// The network namespace of a process, as the link under /proc names it.
pub fn network(pid: u32) -> String {
    fs::read_link(format!("/proc/{pid}/ns/net")).expect("a process").display().to_string()
}

/// SIGKILL.
pub fn kill(pid: u32) {
    let done = Command::new("kill").args(["-KILL", &pid.to_string()]).status().expect("kill");
    assert!(done.success(), "cannot kill {pid}");
}

/// Waits until no process of the container is left.
pub async fn all_gone(container: &str) {
    let mut left = Vec::new();
    for _ in 0..100 {
        left = processes(container);
        if left.is_empty() {
            return;
        }
        sleep(Duration::from_millis(100)).await;
    }
    panic!("left of container {container}: {left:?}");
}

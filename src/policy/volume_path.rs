//! Where a volume may be mounted that joins the files of a fence
//! (`ringfence.dev/volume-mounts: allowed`): its place is the pod's author's to choose, who under
//! `strict` is hostile.
#![forbid(unsafe_code)]

/// Places that stay what the policy makes of them: the system's, the fence's own, and where secrets
/// are mounted. None of what joins is one of them, lies in one or holds one.
const CLOSED: [&str; 15] = [
    "/bin",
    "/boot",
    "/dev",
    "/etc",
    "/lib",
    "/lib64",
    "/openshell-sandbox",
    "/proc",
    "/ringfence",
    "/run/ringfence",
    "/run/secrets",
    "/sbin",
    "/sys",
    "/usr",
    "/var/run",
];

/// The one place below them that programs need a volume at.
const OPEN: &str = "/dev/shm";

/// Why no volume at this path joins the files of a fence; `None` where one may.
///
/// Text alone is judged: links of the image are for who sees them.
#[must_use]
pub fn closed_to_volumes(path: &str) -> Option<String> {
    let plain = |part: &str| !matches!(part, "" | "." | "..");
    let rest = path.strip_prefix('/');
    if !rest.is_some_and(|rest| rest.split('/').all(plain)) || path.contains(char::is_control) {
        return Some("the path is not written plainly, from / on".to_owned());
    }
    if path == OPEN {
        return None;
    }
    let within = |inner: &str, outer: &str| {
        inner.strip_prefix(outer).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    };
    CLOSED.iter().find_map(|closed| {
        if within(path, closed) {
            Some(format!("{closed} stays what the policy makes of it"))
        } else if within(closed, path) {
            Some(format!("it holds {closed}"))
        } else {
            None
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_of_the_system_and_the_fence_are_closed() {
        for path in [
            "/",
            "",
            "data",
            "/data/",
            "//data",
            "/a/../etc",
            "/a/./b",
            "/a\n/b",
            "/proc",
            "/proc/self/root",
            "/sys/fs/cgroup",
            "/dev",
            "/dev/shm/x",
            "/etc",
            "/etc/openshell",
            "/usr/local/bin",
            "/lib",
            "/run",
            "/run/ringfence/x",
            "/var",
            "/var/run",
            "/var/run/secrets/kubernetes.io/serviceaccount",
            "/run/secrets/kubernetes.io",
            "/ringfence/d",
            "/openshell-sandbox",
        ] {
            assert!(closed_to_volumes(path).is_some(), "{path:?}");
        }
        for path in [
            "/data",
            "/workspace/a b",
            "/home/agent/.cache",
            "/dev/shm",
            "/run/app",
            "/var/lib/app",
            "/library",
            "/procedures",
            "/opt/agent",
            "/tmp",
        ] {
            assert_eq!(closed_to_volumes(path), None, "{path:?}");
        }
    }
}

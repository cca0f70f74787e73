//! What the kernel holds the agent and the proxy to, seen from inside and from the node.

use crate::host::{self, PROXY, field};
use crate::place::fenced;

#[tokio::test]
async fn the_agent_is_nobody_special() {
    fenced("agent", &[], async |place| {
        let pod = place.start_agent("agent").await;
        let done = place.enter(&pod, "id").await;
        assert_eq!(done.text, "uid=1000(agent) gid=1000(agent) groups=1000(agent)\n", "{done:?}");
        let python = |code: &str| format!("python3 -c 'import ctypes, os\n{code}'");
        // Calls the C library and ends with the error's name.
        let call = |call: &str| {
            python(&format!(
                "c = ctypes.CDLL(None, use_errno=True)\nr = c.{call}\n\
                 raise SystemExit(os.strerror(ctypes.get_errno()) if r == -1 else 0)"
            ))
        };
        let token = "/var/run/secrets/kubernetes.io/serviceaccount/token";
        let cases = [
            ("setuid(0)", python("os.setuid(0)"), "PermissionError"),
            ("write /usr", "echo x > /usr/bin/x".to_owned(), "Permission denied"),
            (
                "write where only Landlock forbids",
                "echo x > /var/tmp/x".to_owned(),
                "Permission denied",
            ),
            ("read the token", format!("cat {token}"), "Permission denied"),
            ("list secrets", "ls /var/run/secrets".to_owned(), "Permission denied"),
            ("read the supervisor's files", "ls /run/ringfence".to_owned(), "Permission denied"),
            ("read the supervisor's memory", "cat /proc/1/mem".to_owned(), "denied"),
            ("read the supervisor's environment", "cat /proc/1/environ".to_owned(), "denied"),
            ("ptrace", call("ptrace(0, 0, 0, 0)"), "Operation not permitted"),
            ("memfd_create", call("memfd_create(b\"x\", 0)"), "Operation not permitted"),
            ("a user namespace", "unshare -U true".to_owned(), "Operation not permitted"),
            ("a network namespace", "unshare -n true".to_owned(), "Operation not permitted"),
            (
                "mount",
                call("mount(b\"x\", b\"/tmp\", b\"tmpfs\", 0, 0)"),
                "Operation not permitted",
            ),
        ];
        let scripts: Vec<&str> = cases.iter().map(|(_, script, _)| script.as_str()).collect();
        let outcomes = place.enter_all(&pod, &scripts).await;
        for ((what, _, wanted), done) in cases.iter().zip(outcomes) {
            assert!(done.code != 0 && done.text.contains(wanted), "{what}: {done:?}");
        }
        // And what it is for still works.
        let script =
            "echo x > /tmp/x && echo x > /workspace/x && echo x > ~/x && ls /usr >/dev/null";
        let done = place.enter(&pod, script).await;
        assert_eq!(done.code, 0, "{done:?}");
    })
    .await;
}

#[tokio::test]
async fn no_process_but_the_supervisors_own_has_a_capability() {
    fenced("threads", &[], async |place| {
        let pod = place.start_agent("agent").await;
        let container = host::container_id(&pod);
        let processes = host::processes(&container);
        let proxies: Vec<_> = processes.iter().filter(|p| p.uid == PROXY).collect();
        let agents: Vec<_> = processes.iter().filter(|p| p.uid == 1000).collect();
        assert_eq!(proxies.len(), 1, "{processes:?}");
        assert_eq!(agents.len(), 1, "{processes:?}");
        // Each thread: credentials, no_new_privs and filters are the thread's own.
        for (who, process) in [("proxy", proxies[0]), ("agent", agents[0])] {
            let threads = host::threads(process.pid);
            assert!(!threads.is_empty());
            for status in &threads {
                for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
                    assert_eq!(field(status, set), Some("0000000000000000"), "{who}: {status}");
                }
                assert_eq!(field(status, "NoNewPrivs"), Some("1"), "{who}: {status}");
                assert_eq!(field(status, "Seccomp"), Some("2"), "{who}: {status}");
                let uids = field(status, "Uid").unwrap_or_default();
                assert!(uids.split_whitespace().all(|uid| uid == process.uid.to_string()), "{who}");
            }
            println!("{who}: {} threads", threads.len());
        }
        // The three networks of DESIGN section 2 that hold processes: the pod's and the fence's.
        let supervisor = processes.iter().find(|p| p.inner_pid == 1).expect("a supervisor");
        assert_eq!(supervisor.uid, 0);
        assert_eq!(host::network(proxies[0].pid), host::network(supervisor.pid));
        assert_ne!(host::network(agents[0].pid), host::network(supervisor.pid));
    })
    .await;
}

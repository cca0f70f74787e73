//! What a policy asks beyond the network: each key seen to do its work, and its loss to be told.

use std::fs;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Output};

use sha2::Digest as _;

use crate::rig::{Background, POLICY, Rig, SUPERVISOR, run, text};

/// The policy with more keys at its end.
fn policy(rig: &Rig, name: &str, more: &str) -> std::path::PathBuf {
    let path = rig.path(name);
    fs::write(&path, format!("{POLICY}{more}")).unwrap();
    path
}

fn fenced(rig: &Rig, policy: &Path, script: &str) -> Output {
    let mut command = rig.supervisor();
    command.arg("--policy-data").arg(policy).args(["--", "sh", "-c", script]).output().unwrap()
}

/// Prints what `memfd_create` answers to no flag and to `MFD_NOEXEC_SEAL`: `ok` or the errno.
const MEMFD: &str = "perl -e 'for (0, 8) { my $n = \"x\"; my $r = syscall(319, $n, $_); \
                     print $r >= 0 ? \"ok \" : ($! + 0) . \" \" }'; ulimit -n; ulimit -Hn; ulimit -c";

pub fn memfd_and_limits(rig: &Rig) {
    for (more, seen) in [
        ("", "1 1 "),
        ("process: { memfd: deny }\n", "1 1 "),
        ("process: { memfd: noexec }\n", "1 ok "),
        ("process: { memfd: allow }\n", "ok ok "),
    ] {
        let output = fenced(rig, &policy(rig, "memfd.yaml", more), MEMFD);
        assert!(text(&output.stdout).starts_with(seen), "{more}: {}", text(&output.stdout));
    }
    let limited =
        policy(rig, "limits.yaml", "process: { limits: { open_files: 100, processes: 4000 } }\n");
    let output = fenced(
        rig,
        &limited,
        &format!("{MEMFD}; ulimit -u 2>/dev/null || grep processes /proc/self/limits"),
    );
    let seen = text(&output.stdout);
    assert!(seen.starts_with("1 1 100\n100\n0\n"), "{seen}{}", text(&output.stderr));
    assert!(seen.contains("4000"), "{seen}");
}

pub fn limit_too_high(rig: &Rig) {
    let path = policy(rig, "high.yaml", "process: { limits: { open_files: 1048576 } }\n");
    let mut command = Command::new("setpriv");
    let supervisor = rig.supervisor();
    command.args(["--bounding-set", "-sys_resource", "--inh-caps", "-sys_resource"]);
    command.arg("sh").args(["-c", "ulimit -n 4096; exec \"$0\" \"$@\""]);
    command.arg(supervisor.get_program()).args(supervisor.get_args());
    let output = command.arg("--policy-data").arg(&path).args(["--", "true"]).output().unwrap();
    let log = text(&output.stderr);
    assert_eq!(output.status.code(), Some(125), "{log}");
    assert!(log.contains("hard limit 4096") && log.contains("SYS_RESOURCE"), "{log}");
}

pub fn sockets(rig: &Rig) {
    if ringfence::fence::landlock::abi() >= ringfence::fence::landlock::UNIX_SOCKETS_ABI {
        println!("SKIPPED: this kernel's Landlock guards unix sockets itself");
        return;
    }
    let volume = rig.path("volume");
    fs::create_dir_all(&volume).unwrap();
    run("mount", &["-t", "tmpfs", "none", volume.to_str().unwrap()]);
    fs::create_dir(volume.join("deep")).unwrap();
    let more = |key: &str| {
        let named = POLICY.replace("[/tmp, ", &format!("[/tmp, {}, ", volume.display()));
        let path = rig.path("sockets.yaml");
        fs::write(&path, format!("{named}{key}")).unwrap();
        path
    };
    // As it would be by the policy's default base: /tmp is one, and the test lies in it.
    let refuse = "process: { unix_sockets: refuse }\n";
    let output = fenced(rig, &more(refuse), "exit 5");
    assert_eq!(output.status.code(), Some(5), "{}", text(&output.stderr));

    let socket = volume.join("deep/runtime.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let output = fenced(rig, &more(refuse), "exit 5");
    let log = text(&output.stderr);
    assert_eq!(output.status.code(), Some(125), "{log}");
    assert!(log.contains("unix_sockets: refuse") && log.contains("runtime.sock"), "{log}");

    let output = fenced(rig, &more(""), "exit 5");
    let log = text(&output.stderr);
    assert_eq!(output.status.code(), Some(5), "{log}");
    assert!(log.contains("runtime.sock is a unix socket in a volume"), "{log}");
    let mut command = rig.supervisor();
    command.arg("--policy-data").arg(more("")).args(["--", "sh", "-c", "echo up; sleep 60"]);
    let _fence = Background::start(&mut command);
    assert!(status(rig).contains("deep/runtime.sock"), "{}", status(rig));
    drop(listener);
    run("umount", &[volume.to_str().unwrap()]);
}

fn status(rig: &Rig) -> String {
    let words = ["status", "--run-dir", rig.run_dir.to_str().unwrap()];
    text(&Command::new(SUPERVISOR).args(words).output().unwrap().stdout)
}

pub fn without_setpcap(rig: &Rig) {
    let supervisor = rig.with_policy();
    let start = |more: &[&str]| {
        let mut command = Command::new("setpriv");
        command.args(["--bounding-set", "-setpcap", "--inh-caps", "-setpcap"]);
        command.arg(supervisor.get_program()).args(supervisor.get_args()).args(more);
        command
    };
    let script = "grep -E '^(Cap|NoNew|Uid)' /proc/self/status; curl -sS https://upstream.test/";
    let output = start(&["--", "sh", "-c", script]).output().unwrap();
    let (seen, log) = (text(&output.stdout), text(&output.stderr));
    assert!(seen.contains("saw GET /"), "{seen}{log}");
    for line in ["CapEff:\t0000000000000000", "CapPrm:\t0000000000000000", "NoNewPrivs:\t1"] {
        assert!(seen.contains(line), "{line} is not in {seen}");
    }
    assert!(!seen.contains("CapBnd:\t0000000000000000"), "{seen}");
    assert!(log.contains("CAP_SETPCAP is not granted") && log.contains("add SETPCAP"), "{log}");
    // What cannot be done without names the capability.
    let mut command = Command::new("setpriv");
    command.args(["--bounding-set", "-setuid", "--inh-caps", "-setuid"]);
    command.arg(supervisor.get_program()).args(supervisor.get_args()).args(["--", "true"]);
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(125));
    assert!(text(&output.stderr).contains("user"), "{}", text(&output.stderr));
}

fn curl_policy(rig: &Rig, asks: &str) -> std::path::PathBuf {
    let path = rig.path("curl.yaml");
    let policy =
        POLICY.replace("- path: /usr/bin/curl", &format!("- {{ path: /usr/bin/curl, {asks} }}"));
    assert_ne!(policy, POLICY);
    fs::write(&path, policy).unwrap();
    path
}

const CURL: &str = "curl -sS -f --max-time 5 https://upstream.test/x";

pub fn pinned(rig: &Rig) {
    let digest: [u8; 32] = sha2::Sha256::digest(fs::read("/usr/bin/curl").unwrap()).into();
    let digest = ringfence::policy::digest::to_hex(&digest);
    let output =
        fenced(rig, &curl_policy(rig, &format!("sha256: {digest}")), &format!("{CURL}; {CURL}"));
    let seen = text(&output.stdout);
    assert_eq!(seen.matches("saw GET /x").count(), 2, "{seen}{}", text(&output.stderr));
    let other = format!("{}{}", if digest.starts_with('0') { '1' } else { '0' }, &digest[1..]);
    let output = fenced(rig, &curl_policy(rig, &format!("sha256: {other}")), CURL);
    let log = text(&output.stderr);
    assert!(!output.status.success(), "{}", text(&output.stdout));
    assert!(log.contains("DENIED") && log.contains("pins this binary"), "{log}");
    assert!(log.contains(&digest[..16]), "{log}");
}

pub fn tainted(rig: &Rig) {
    // Any library will do: loaded is loaded.
    let library = "for l in /usr/lib/*/libz.so.1 /lib/*/libz.so.1; do [ -e $l ] && cp $l /tmp/rf-taint.so; done";
    let preload = format!(
        "{library}; LD_PRELOAD=/tmp/rf-taint.so {CURL}; c=$?; rm -f /tmp/rf-taint.so; exit $c"
    );
    let refuse = curl_policy(rig, "tainted: refuse");
    let output = fenced(rig, &refuse, CURL);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let output = fenced(rig, &refuse, &preload);
    let log = text(&output.stderr);
    assert!(!output.status.success(), "{}", text(&output.stdout));
    assert!(log.contains("DENIED") && log.contains("LD_PRELOAD is set"), "{log}");
    // Without a variable: by a link of the loader's own path, as an author's library path has it.
    let output = {
        let mut command = rig.supervisor();
        command.env("LD_LIBRARY_PATH", "/tmp/rf-taint.d").arg("--policy-data").arg(&refuse);
        let script = format!(
            "mkdir -p /tmp/rf-taint.d; for l in /usr/lib/*/libz.so.1 /lib/*/libz.so.1; do [ -e $l ] && \
             cp $l /tmp/rf-taint.d/; done; {CURL}; c=$?; rm -rf /tmp/rf-taint.d; exit $c"
        );
        command.args(["--", "sh", "-c", &script]).output().unwrap()
    };
    let log = text(&output.stderr);
    assert!(!output.status.success(), "{}", text(&output.stdout));
    assert!(log.contains("DENIED") && log.contains("/tmp/rf-taint.d/libz.so.1"), "{log}");

    let report = curl_policy(rig, "tainted: report");
    let output = fenced(rig, &report, &preload);
    let log = text(&output.stderr);
    assert!(output.status.success(), "{log}");
    assert!(log.contains("tainted-binary") && log.contains("LD_PRELOAD is set"), "{log}");
}

pub fn authors_variables(rig: &Rig) {
    let mut command = rig.with_policy();
    command.env("NODE_OPTIONS", "--max-old-space-size=64").env("LD_LIBRARY_PATH", "/usr/lib");
    let output = command.args(["--", "env"]).output().unwrap();
    let seen = text(&output.stdout);
    assert!(seen.contains("NODE_OPTIONS=--max-old-space-size=64\n"), "{seen}");
    assert!(seen.contains("LD_LIBRARY_PATH=/usr/lib\n"), "{seen}");
    let mut command = rig.with_policy();
    command.env("NODE_OPTIONS", "--secret");
    command.args(["--", "sh", "-c", "echo up; sleep 60"]);
    let _fence = Background::start(&mut command);
    let attested = status(rig);
    assert!(attested.contains("\"NODE_OPTIONS\"") && !attested.contains("--secret"), "{attested}");
}

//! Called as `openshell-sandbox`: the reference deployment's wrappers and everything they use.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Output, Stdio};

use crate::rig::{Rig, SUPERVISOR, run, text};

fn openshell(rig: &Rig) -> Command {
    let mut command = Command::new(rig.path("openshell-sandbox"));
    command.env_clear().env("PATH", "/usr/local/bin:/usr/bin:/bin").stdin(Stdio::null());
    command
}

/// With both files, as file mode has it.
fn with_files(rig: &Rig) -> Command {
    let mut command = openshell(rig);
    command.arg("--policy-rules").arg(rig.path("policy.rego"));
    command.arg("--policy-data").arg(rig.path("policy.yaml"));
    command
}

fn code(output: &Output) -> i32 {
    output.status.code().unwrap()
}

pub fn command_line(rig: &Rig) {
    // With and without dashes, short flags, flags without effect.
    for words in [
        &["-w", "/tmp", "sh", "-c", "pwd; id -u"][..],
        &["-iw/tmp", "--", "sh", "-c", "pwd; id -u"],
    ] {
        let output = with_files(rig).args(words).output().unwrap();
        let seen = text(&output.stdout);
        assert!(seen.starts_with("/tmp\n") && !seen.contains("\n0\n"), "{}", text(&output.stderr));
    }
    // Everything from the environment.
    let output = openshell(rig)
        .env("OPENSHELL_POLICY_RULES", rig.path("policy.rego"))
        .env("OPENSHELL_POLICY_DATA", rig.path("policy.yaml"))
        .env("OPENSHELL_SANDBOX_COMMAND", "echo  from the environment")
        .env("OPENSHELL_POLICY_POLL_INTERVAL_SECS", "not a number")
        .output()
        .unwrap();
    assert_eq!(text(&output.stdout), "from the environment\n", "{}", text(&output.stderr));
    // No command at all: a shell, which ends where its input does.
    let mut shell = with_files(rig).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    std::io::Write::write_all(&mut shell.stdin.take().unwrap(), b"echo $BASH; exit 3").unwrap();
    let output = shell.wait_with_output().unwrap();
    assert_eq!((text(&output.stdout).trim(), code(&output)), ("/bin/bash", 3));
    // A gateway beside both files is outranked; alone it is refused.
    let gateway = ["--sandbox-id", "s", "--openshell-endpoint", "http://gateway"];
    let output = with_files(rig).args(gateway).arg("true").output().unwrap();
    assert_eq!(code(&output), 0, "{}", text(&output.stderr));
    let output = openshell(rig).args(gateway).args(["touch", "/tmp/ran"]).output().unwrap();
    assert_eq!(code(&output), 1);
    assert!(text(&output.stderr).contains("file mode only"), "{}", text(&output.stderr));
    let output = with_files(rig).args(["--ssh-socket-path", "/x", "true"]).output().unwrap();
    assert!(code(&output) == 1 && text(&output.stderr).contains("--ssh-socket-path"));
}

pub fn exit_codes(rig: &Rig) {
    let data = rig.path("policy.yaml");
    let data = data.to_str().unwrap();
    for (words, expected) in [
        (&["--policy-data", data, "sh", "-c", "exit 7"][..], 7),
        (&["--policy-data", data, "sh", "-c", "kill -TERM $$"], 143),
        (&["--policy-data", data, "-t", "1", "sleep", "60"], 124),
        (&["--policy-data", data, "no-such-program"], 127),
        // Nothing ran.
        (&["--policy-data", "/no/such.yaml", "true"], 1),
        (&["true"], 1),
        // No policy for this command either; the supervisor's own process ends with 125.
        (&["proxy"], 1),
        (&["--no-such-flag"], 2),
        (&["--help"], 0),
        (&["copy-self"], 1),
        (&["debug-rpc", "get-sandbox-config"], 1),
    ] {
        let output = openshell(rig).args(words).output().unwrap();
        assert_eq!(code(&output), expected, "{words:?}: {}", text(&output.stderr));
    }
}

pub fn environment(rig: &Rig) {
    let output = with_files(rig)
        .env("OPENSHELL_SANDBOX_TOKEN", "secret")
        .env("OPENSHELL_TLS_KEY", "/secret")
        .env("LD_PRELOAD", "/no/such/secret.so")
        .env("NO_PROXY", "*")
        .env("KEPT", "yes")
        .arg("env")
        .output()
        .unwrap();
    let seen = text(&output.stdout);
    assert!(!seen.contains("secret"), "{seen}");
    for line in [
        "KEPT=yes",
        "OPENSHELL_SANDBOX=1",
        "HTTPS_PROXY=http://10.200.0.1:3128",
        "NO_PROXY=127.0.0.1,localhost,::1",
        "NODE_USE_ENV_PROXY=1",
    ] {
        assert!(seen.lines().any(|seen| seen == line), "{line} is not in {seen}");
    }
    for name in ["NODE_EXTRA_CA_CERTS", "SSL_CERT_FILE"] {
        let line = seen.lines().find_map(|line| line.strip_prefix(&format!("{name}=")));
        assert!(line.is_some_and(|path| path.starts_with("/run/ringfence/")), "{name}: {seen}");
    }
    let output = with_files(rig)
        .args(["sh", "-c", "grep -c BEGIN $NODE_EXTRA_CA_CERTS; test -r $SSL_CERT_FILE"])
        .output()
        .unwrap();
    assert_eq!((text(&output.stdout).trim(), code(&output)), ("1", 0));
}

/// What is said on the way, in the order in which it must be true.
const WORDS: [&str; 10] = [
    "CONFIG:LOADING",
    "CONFIG:VALIDATED",
    "CONFIG:CREATING",
    "CONFIG:CREATED",
    "NET:LISTEN",
    "CONFIG:ENABLED",
    "CONFIG:PROBED",
    "CONFIG:BUILT",
    "PROC:LAUNCH",
    "CONFIG:CLEANED_UP",
];

pub fn log_lines(rig: &Rig) {
    let said = |command: &mut Command| {
        let output = command.output().unwrap();
        assert_eq!(code(&output), 0, "{}", text(&output.stderr));
        text(&output.stderr)
    };
    let logs = [
        said(with_files(rig).args(["--log-level", "info", "true"])),
        said(with_files(rig).env("RUST_LOG", "info").args(["--log-level", "warn", "true"])),
        said(with_files(rig).env("OPENSHELL_LOG_LEVEL", "info").arg("true")),
        said(rig.with_policy().args(["--log-level", "info", "--", "true"])),
    ];
    for log in logs {
        let at = |word: &str| {
            let lines: Vec<_> = log
                .lines()
                .enumerate()
                .filter(|(_, line)| line.contains(&format!(" OCSF {word} [INFO] ")))
                .collect();
            assert_eq!(lines.len(), 1, "{word} in {log}");
            lines[0].0
        };
        let places: Vec<_> = WORDS.iter().map(|word| at(word)).collect();
        assert_eq!(places.first(), places.iter().min(), "{log}");
        assert_eq!(places.last(), places.iter().max(), "{log}");
        // The agent starts when all the rest has been said.
        assert_eq!(places.iter().filter(|place| **place < at("PROC:LAUNCH")).count(), 8, "{log}");
    }
    for quiet in [said(with_files(rig).arg("true")), said(rig.with_policy().args(["--", "true"]))] {
        for word in WORDS {
            assert!(!quiet.contains(word), "{word} in {quiet}");
        }
    }
}

pub fn copy_self(rig: &Rig) {
    for (program, verb_of) in [(rig.path("openshell-sandbox"), "a"), (SUPERVISOR.into(), "b")] {
        let copy = rig.path(verb_of).join("deep/openshell-sandbox");
        let output = Command::new(program).arg("copy-self").arg(&copy).output().unwrap();
        assert_eq!(code(&output), 0, "{}", text(&output.stderr));
        assert_eq!(fs::metadata(&copy).unwrap().permissions().mode() & 0o7777, 0o755);
        let output = Command::new(&copy)
            .arg("--policy-data")
            .arg(rig.path("policy.yaml"))
            .args(["echo", "copied"])
            .output()
            .unwrap();
        assert_eq!(text(&output.stdout), "copied\n", "{}", text(&output.stderr));
    }
}

/// What the reference deployment's runner starts its agent by, but for the program's place: flags
/// with the variables as defaults, and the agent's words behind dashes.
const PLAIN: &str = r#"#!/bin/bash
set -euo pipefail
if [[ "${OPENSHELL_ENABLED:-}" == "true" ]]; then
  exec @PROGRAM@ \
    --policy-rules "${OPENSHELL_POLICY_RULES:-/etc/openshell/policy.rego}" \
    --policy-data "${OPENSHELL_POLICY_DATA:-/etc/openshell/policy.yaml}" \
    --log-level "${OPENSHELL_LOG_LEVEL:-warn}" \
    -- sh "$@"
fi
exec sh "$@"
"#;

/// The same after what that program needed before each session: namespaces that an earlier one
/// left are deleted, and reverse path filtering is switched off. The command comes without dashes.
const CLEANING: &str = r#"#!/bin/bash
if [ "$OPENSHELL_ENABLED" = "true" ]; then
  mkdir -p /var/run/netns 2>/dev/null || true
  for namespace in $(ip netns list 2>/dev/null | awk '/^sandbox-/ {print $1}'); do
    ip netns delete "$namespace" 2>/dev/null || true
  done
  for link in $(ip -o link show 2>/dev/null | awk -F': ' '/veth-h-/ {print $2}'); do
    ip link delete "${link%@*}" 2>/dev/null || true
  done
  echo 0 > /proc/sys/net/ipv4/conf/all/rp_filter 2>/dev/null || true
  echo 0 > /proc/sys/net/ipv4/conf/default/rp_filter 2>/dev/null || true
  exec @PROGRAM@ --policy-rules "$OPENSHELL_POLICY_RULES" --policy-data "$OPENSHELL_POLICY_DATA" sh "$@"
else
  exec sh "$@"
fi
"#;

pub fn wrappers(rig: &Rig) {
    // File mode has no flag for more authorities: upstreams are verified against the image's.
    let store = "/etc/ssl/certs/ca-certificates.crt";
    run("mount", &["--bind", rig.path("ca.pem").to_str().unwrap(), store]);
    for (name, script) in [("plain", PLAIN), ("cleaning", CLEANING)] {
        let path = rig.path(name);
        let program = rig.path("openshell-sandbox");
        fs::write(&path, script.replace("@PROGRAM@", program.to_str().unwrap())).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        let wrapper = |enabled: &str, words: &[&str]| {
            Command::new(&path)
                .env("OPENSHELL_ENABLED", enabled)
                .env("OPENSHELL_POLICY_RULES", rig.path("policy.rego"))
                .env("OPENSHELL_POLICY_DATA", rig.path("policy.yaml"))
                .args(words)
                .output()
                .unwrap()
        };
        // Session after session.
        for number in 0..3 {
            let script = format!("echo session {number}; exit {number}");
            let output = wrapper("true", &["-c", &script, "--verbose"]);
            assert_eq!(
                text(&output.stdout),
                format!("session {number}\n"),
                "{}",
                text(&output.stderr)
            );
            assert_eq!(code(&output), number);
        }
        let output = wrapper("true", &["-c", "id -u; curl -sS https://upstream.test/hello"]);
        let seen = text(&output.stdout);
        assert!(seen.contains("saw GET /hello"), "{seen}{}", text(&output.stderr));
        assert!(!seen.starts_with("0\n"), "{seen}");
        let output = wrapper("true", &["-c", "curl -sSf https://other.test/"]);
        assert!(text(&output.stderr).contains("DENIED"), "{}", text(&output.stderr));
        assert_ne!(code(&output), 0);
        // Switched off it is not there.
        let output = wrapper("false", &["-c", "id -u; echo ${HTTPS_PROXY:-none}"]);
        assert_eq!(text(&output.stdout), "0\nnone\n");
    }
    run("umount", &[store]);
    assert_eq!(fs::read_dir("/run/ringfence").unwrap().count(), 0);
}

pub fn process_limit(rig: &Rig) {
    if !std::path::Path::new("/sys/fs/cgroup").is_dir() {
        println!("SKIPPED: process_limit needs /sys/fs/cgroup");
        return;
    }
    run("mount", &["-t", "tmpfs", "none", "/sys/fs/cgroup"]);
    for (limit, flag, expected) in
        [("max\n", true, 125), ("max\n", false, 0), ("512\n", true, 0), ("", true, 125)]
    {
        fs::write("/sys/fs/cgroup/pids.max", limit).unwrap();
        let mut command = rig.with_policy();
        if flag {
            command.arg("--require-pid-limit");
        }
        let output = command.args(["--", "true"]).output().unwrap();
        assert_eq!(code(&output), expected, "{limit:?}: {}", text(&output.stderr));
        let mut command = with_files(rig);
        if flag {
            command.env("OPENSHELL_REQUIRE_RUNTIME_PID_LIMIT", "1");
        }
        let output = command.arg("true").output().unwrap();
        assert_eq!(code(&output), i32::from(expected != 0), "{}", text(&output.stderr));
    }
    run("umount", &["/sys/fs/cgroup"]);
}

/// What the injector says beside the command line, which is the runner's.
pub fn options(rig: &Rig) {
    let with = |value: &str, script: &str| {
        let mut command = with_files(rig);
        command.env("RINGFENCE_OPTIONS", value);
        command.args(["--", "sh", "-c", script]).output().unwrap()
    };
    let ca = rig.path("ca.pem");
    let value = format!(
        r#"["--upstream-ca","{}","--run-as","1234:1235","--groups","7","--inbound","none"]"#,
        ca.display()
    );
    let script = "id -u; id -g; id -G; env | grep -c RINGFENCE; curl -sS https://upstream.test/";
    let output = with(&value, script);
    let seen = text(&output.stdout);
    let lines: Vec<&str> = seen.lines().collect();
    assert_eq!(lines[..4], ["1234", "1235", "1235 7", "0"], "{seen}{}", text(&output.stderr));
    assert!(seen.contains("saw GET /"), "{seen}{}", text(&output.stderr));
    for bad in ["nonsense", r#"["--no-such-flag"]"#, r#"["--","sh","-c","echo other"]"#] {
        let output = with(bad, "echo ran");
        assert_eq!((code(&output), text(&output.stdout).as_str()), (1, ""), "{bad}");
        assert!(text(&output.stderr).contains("RINGFENCE_OPTIONS"), "{}", text(&output.stderr));
    }
}

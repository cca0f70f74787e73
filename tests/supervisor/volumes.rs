//! Volumes that join the files of the fence, and those that must not.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Output};

use crate::rig::{Background, POLICY, Rig, SUPERVISOR, run, text};

const DATA: &str = "/mnt/data";
const INNER: &str = "/mnt/data/inner";
const CONFIG: &str = "/mnt/config";
const PLAIN: &str = "/mnt/plain";
const LINK: &str = "/mnt/link";

fn begin() {
    run("mount", &["-t", "tmpfs", "-o", "mode=0755", "none", "/mnt"]);
    for path in [DATA, CONFIG] {
        fs::create_dir(path).unwrap();
        run("mount", &["-t", "tmpfs", "-o", "mode=0777", "none", path]);
    }
    fs::create_dir(INNER).unwrap();
    run("mount", &["-t", "tmpfs", "-o", "mode=0777", "none", INNER]);
    fs::create_dir(PLAIN).unwrap();
    std::os::unix::fs::symlink(CONFIG, LINK).unwrap();
    for dir in [DATA, INNER, CONFIG, PLAIN] {
        let file = Path::new(dir).join("f");
        fs::write(&file, dir).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o666)).unwrap();
    }
}

fn end() {
    for path in [INNER, DATA, CONFIG, "/mnt"] {
        run("umount", &[path]);
    }
}

fn fenced(rig: &Rig, policy: &Path, flags: &[&str], script: &str) -> Output {
    let mut command = rig.supervisor();
    command.arg("--policy-data").arg(policy).args(flags);
    command.args(["--", "sh", "-c", script]).output().unwrap()
}

const READ: &str =
    "for d in data data/inner config plain; do cat /mnt/$d/f 2>/dev/null; echo; done";
const WRITE: &str =
    "for d in data data/inner config plain; do echo x 2>/dev/null >/mnt/$d/new && echo $d; done";

pub fn all(rig: &Rig) {
    begin();
    let easy = rig.path("volumes.yaml");
    let hard = rig.path("volumes-hard.yaml");
    fs::write(&easy, POLICY).unwrap();
    fs::write(&hard, format!("{POLICY}landlock: {{ compatibility: hard_requirement }}\n")).unwrap();
    let both =
        ["--volume-read-write", DATA, "--volume-read-write", INNER, "--volume-read-only", CONFIG];
    let output = fenced(rig, &easy, &[], &format!("{READ}; {WRITE}"));
    assert_eq!(text(&output.stdout).trim(), "", "nothing is open by itself");
    for policy in [&easy, &hard] {
        let output = fenced(rig, policy, &both, READ);
        let seen = text(&output.stdout);
        assert_eq!(seen, format!("{DATA}\n{INNER}\n{CONFIG}\n\n"), "{}", text(&output.stderr));
        let output = fenced(rig, policy, &both, WRITE);
        assert_eq!(text(&output.stdout), "data\ndata/inner\n", "{}", text(&output.stderr));
    }
    // The other volume in it could be a token.
    let holds = ["--volume-read-write", DATA, "--volume-read-only", CONFIG];
    for (flags, word) in [
        (&holds[..], "/mnt/data/inner is mounted in it"),
        (&["--volume-read-only", LINK], "a link leads it to /mnt/config"),
        (&["--volume-read-write", PLAIN], "nothing is mounted there"),
        (&["--volume-read-write", "/proc"], "stays what the policy makes of it"),
        (&["--volume-read-write", "/"], "not written plainly"),
        (&["--volume-read-write", "/mnt/none"], "No such file"),
        (&["--volume-read-write", rig.run_dir.to_str().unwrap()], "run directory"),
    ] {
        let output = fenced(rig, &easy, flags, &format!("{READ}; {WRITE}"));
        let (seen, said) = (text(&output.stdout), text(&output.stderr));
        assert!(
            said.contains("does not join the files of the fence") && said.contains(word),
            "{said}"
        );
        let config = if flags.contains(&CONFIG) { CONFIG } else { "" };
        assert_eq!(seen.trim(), config, "{word}: {seen}");
        let output = fenced(rig, &hard, flags, "echo ran");
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(125), "{word}: {said}");
        assert!(said.contains(word) && said.contains("hard_requirement"), "{said}");
        assert!(output.stdout.is_empty());
    }
    stacked(rig, &easy);
    attested(rig, &easy, &holds);
    end();
}

/// What an author could have mounted there by another spelling lies on top.
fn stacked(rig: &Rig, policy: &Path) {
    run("mount", &["-t", "tmpfs", "-o", "mode=0777", "none", CONFIG]);
    fs::write(format!("{CONFIG}/f"), "a secret").unwrap();
    let output = fenced(rig, policy, &["--volume-read-only", CONFIG], READ);
    let said = text(&output.stderr);
    assert_eq!(text(&output.stdout).trim(), "", "{said}");
    assert!(said.contains("another mount lies over it"), "{said}");
    run("umount", &[CONFIG]);
}

fn attested(rig: &Rig, policy: &Path, flags: &[&str]) {
    let mut command = rig.supervisor();
    command.arg("--policy-data").arg(policy).args(flags).args(["--sidecar-ports", "9000-9001"]);
    let _fence = Background::start(command.args(["--", "sh", "-c", "echo up; sleep 60"]));
    let words = ["status", "--run-dir", rig.run_dir.to_str().unwrap()];
    let status = text(&Command::new(SUPERVISOR).args(words).output().unwrap().stdout);
    let status: serde_json::Value = serde_json::from_str(&status).unwrap();
    let volumes = &status["volumes"];
    assert_eq!(volumes["read_only"], serde_json::json!([CONFIG]), "{status}");
    assert_eq!(volumes["read_write"], serde_json::json!([]), "{status}");
    assert_eq!(volumes["left_out"][0][0], DATA, "{status}");
    assert_eq!(status["sidecar_ports"], serde_json::json!([9000, 9001]), "{status}");
    let joined = status["paths"]["read_only"].as_array().unwrap();
    assert!(joined.contains(&CONFIG.into()), "{status}");
}

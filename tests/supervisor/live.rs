//! A policy that is followed, as a kubelet changes it: a directory for each version, and one link that
//! is moved.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::admin::{PORT, get};
use crate::basics::curl_words;
use crate::rig::{Background, POLICY, Rig, SUPERVISOR, eventually, text};

/// A mounted `ConfigMap`.
struct Mounted {
    dir: PathBuf,
    version: usize,
}

impl Mounted {
    fn new(rig: &Rig, name: &str, policy: &str) -> Self {
        let dir = rig.path(name);
        fs::create_dir(&dir).unwrap();
        let mut mounted = Self { dir, version: 0 };
        let ca = fs::read_to_string(rig.path("ca.pem")).unwrap();
        mounted.publish(&[("policy.yaml", policy), ("upstream-ca.crt", &ca)]);
        mounted
    }

    /// The next version, in the kubelet's order.
    fn publish(&mut self, files: &[(&str, &str)]) {
        self.version += 1;
        let version = format!("..2026_11_27.{}", self.version);
        fs::create_dir(self.dir.join(&version)).unwrap();
        for (name, text) in files {
            fs::write(self.dir.join(&version).join(name), text).unwrap();
        }
        let before = fs::read_link(self.dir.join("..data"));
        symlink(&version, self.dir.join("..data_tmp")).unwrap();
        fs::rename(self.dir.join("..data_tmp"), self.dir.join("..data")).unwrap();
        for (name, _) in files {
            drop(symlink(format!("..data/{name}"), self.dir.join(name)));
        }
        if let Ok(before) = before {
            fs::remove_dir_all(self.dir.join(before)).unwrap();
        }
    }

    /// The next version of the policy, with the same authorities.
    fn change(&mut self, policy: &str) {
        let ca = fs::read_to_string(self.dir.join("upstream-ca.crt")).unwrap();
        self.publish(&[("policy.yaml", policy), ("upstream-ca.crt", &ca)]);
    }
}

/// A fence whose agent waits, and how it is seen from outside.
struct Fence<'a> {
    rig: &'a Rig,
    agent: Background,
}

impl<'a> Fence<'a> {
    fn start(rig: &'a Rig, policy: &Path, script: &str) -> Self {
        let mut command = Command::new(SUPERVISOR);
        command
            .env_clear()
            .env("PATH", "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin")
            .arg("--live-policy")
            .arg(policy)
            .args(["--run-as", "1000:1000", "--no-env", "--workdir", "/tmp", "--run-dir"])
            .arg(&rig.run_dir)
            .args(["--admin-port", PORT])
            .args(["--", "sh", "-c", &format!("{script}; echo up; exec sleep 600")]);
        Self { rig, agent: Background::start(&mut command) }
    }

    fn run(&self, words: &str) -> String {
        text(&self.rig.enter(&["sh", "-c", words]).stdout)
    }

    fn reaches(&self, url: &str) -> bool {
        self.run(&curl_words(url)).starts_with("saw ")
    }

    fn attested(&self) -> Value {
        let mut status = Command::new(SUPERVISOR);
        let output = status.args(["status", "--run-dir"]).arg(&self.rig.run_dir).output().unwrap();
        serde_json::from_slice(&output.stdout).expect("JSON")
    }

    fn generation(&self) -> u64 {
        self.attested()["live_policy"]["generation"].as_u64().unwrap()
    }

    /// Until this many policies have been in force.
    fn comes_to(&self, generation: u64) {
        eventually(&format!("policy {generation}"), || self.generation() == generation);
    }

    /// Ends the fence; what it has written.
    fn log(mut self) -> String {
        drop(self.agent.child.kill());
        drop(self.agent.child.wait());
        self.agent.stderr()
    }
}

/// Until this many changes have not been followed.
fn keeps(count: u32) {
    let line = format!("ringfence_policy_changes_total{{result=\"kept\"}} {count}\n");
    eventually(&line, || get("/metrics").contains(&line));
}

const ALLOWED: &str = "https://upstream.test/hello";
const OTHER: &str = "https://other.test/hello";

fn with_other() -> String {
    POLICY.replace("host: upstream.test", "host: other.test")
}

pub fn follows(rig: &Rig) {
    let mut mounted = Mounted::new(rig, "live-follows", POLICY);
    let fence = Fence::start(rig, &mounted.dir, "true");
    let first = fence.attested();
    assert_eq!(first["live_policy"]["generation"], 1);
    assert!(fence.reaches(ALLOWED) && !fence.reaches(OTHER));
    mounted.change(&with_other());
    fence.comes_to(2);
    assert!(!fence.reaches(ALLOWED) && fence.reaches(OTHER));
    let second = fence.attested();
    assert_ne!(first["policy_digest"], second["policy_digest"]);
    assert_eq!(second["live_policy"]["kept"], serde_json::json!([]));
    // A text of its own comes, and goes.
    let ca = fs::read_to_string(rig.path("ca.pem")).unwrap();
    let refuses_all = "package openshell.sandbox\nimport rego.v1\n\
        filesystem_policy := data.filesystem_policy\nlandlock_policy := data.landlock\n\
        process_policy := data.process\nnetwork_action := \"deny\"\nmatched_network_policy := \"x\"\n\
        deny_reason := \"nobody\"\n_matching_endpoint_configs := []\nallow_request := false\n\
        request_deny_reason := \"nobody\"\nexact_declared_endpoint_host := false\n";
    mounted.publish(&[
        ("policy.yaml", &with_other()),
        ("policy.rego", refuses_all),
        ("upstream-ca.crt", &ca),
    ]);
    fence.comes_to(3);
    assert!(!fence.reaches(OTHER));
    fs::remove_file(mounted.dir.join("policy.rego")).unwrap();
    mounted.change(&with_other());
    fence.comes_to(4);
    assert!(fence.reaches(OTHER));
    let log = fence.log();
    assert!(log.contains("CONFIG:POLICY [LOW]") && log.contains("generation:4"), "{log}");
}

pub fn keeps_the_last(rig: &Rig) {
    let mut mounted = Mounted::new(rig, "live-keeps", POLICY);
    let fence = Fence::start(rig, &mounted.dir, "true");
    mounted.change("network_policies: [");
    keeps(1);
    assert!(fence.reaches(ALLOWED) && fence.generation() == 1);
    fs::remove_file(mounted.dir.join("policy.yaml")).unwrap();
    fs::remove_file(mounted.dir.join("..data/policy.yaml").canonicalize().unwrap()).unwrap();
    keeps(2);
    assert!(fence.reaches(ALLOWED) && fence.generation() == 1);
    mounted.change(&"x".repeat((1 << 20) + 1));
    keeps(3);
    assert!(fence.reaches(ALLOWED) && fence.generation() == 1);
    mounted.change(&with_other());
    eventually("the next policy", || fence.generation() > 1);
    assert!(fence.reaches(OTHER));
    let log = fence.log();
    let told: Vec<_> = log.lines().filter(|line| line.contains("CONFIG:POLICY [HIGH]")).collect();
    assert_eq!(told.len(), 3, "{log}");
    for (line, why) in told.iter().zip(["policy.yaml:1", "there is no policy", "the limit"]) {
        assert!(line.contains("the last one stays in force") && line.contains(why), "{line}");
    }
}

pub fn what_is_fixed(rig: &Rig) {
    let mut mounted = Mounted::new(rig, "live-fixed", POLICY);
    let fence = Fence::start(rig, &mounted.dir, "true");
    // More files than the fence opens: what is said of the network holds.
    let wide = with_other().replace("[/tmp, /dev/null]", "[/tmp, /dev/null, /srv]");
    mounted.change(&wide);
    fence.comes_to(2);
    assert!(fence.reaches(OTHER) && !fence.reaches(ALLOWED));
    let live = fence.attested()["live_policy"].clone();
    assert_eq!(live["bounded"], false);
    assert!(live["kept"][0].as_str().unwrap().starts_with("filesystem_policy stays"), "{live}");
    // Fewer: what is taken away is gone, what is added waits.
    let narrow = |hosts: &str| {
        POLICY.replace("[/tmp, /dev/null]", "[/dev/null]").replace("host: upstream.test", hosts)
    };
    mounted.change(&narrow("host: upstream.test"));
    fence.comes_to(3);
    assert!(!fence.reaches(OTHER) && !fence.reaches(ALLOWED));
    assert_eq!(fence.attested()["live_policy"]["bounded"], true);
    assert_eq!(fence.run("echo x >/tmp/rf-live && cat /tmp/rf-live && rm /tmp/rf-live"), "x\n");
    mounted.change(&narrow("host: other.test"));
    fence.comes_to(4);
    assert!(fence.reaches(OTHER));
    let log = fence.log();
    assert!(log.contains("CONFIG:POLICY [MED]") && log.contains("CONFIG:POLICY [HIGH]"), "{log}");
    assert!(
        log.contains("filesystem_policy stays as it was at the start, which gives more"),
        "{log}"
    );
    assert!(log.contains("held back until this pod is started anew"), "{log}");
}

pub fn binaries_are_known(rig: &Rig) {
    // Nothing of it depends on who asks, and without a change nobody would be asked.
    let anyone = POLICY.replace("/usr/bin/curl", "/**");
    let mut mounted = Mounted::new(rig, "live-binaries", &anyone);
    // A link that the agent made, to what the policy does not name.
    let link = "/tmp/rf-live-link";
    drop(fs::remove_file(link));
    let fence = Fence::start(rig, &mounted.dir, &format!("ln -s /usr/bin/curl {link}"));
    assert!(fence.reaches(ALLOWED));
    mounted.change(&POLICY.replace("/usr/bin/curl", "/usr/bin/wget"));
    fence.comes_to(2);
    assert!(!fence.reaches(ALLOWED), "curl is not named");
    mounted.change(&POLICY.replace("/usr/bin/curl", link));
    fence.comes_to(3);
    assert!(!fence.reaches(ALLOWED), "the agent has a link of that name");
    mounted.change(POLICY);
    fence.comes_to(4);
    assert!(fence.reaches(ALLOWED));
    // Whoever connects from now on is looked at, whoever asked for it first.
    let tainted =
        POLICY.replace("path: /usr/bin/curl", "path: /usr/bin/curl\n        tainted: refuse");
    mounted.change(&tainted);
    fence.comes_to(5);
    assert!(fence.reaches(ALLOWED));
    let preloaded = fence.run(&format!("LD_PRELOAD=/tmp/none.so {}", curl_words(ALLOWED)));
    assert_eq!(preloaded, "");
    fs::remove_file(link).unwrap();
    let log = fence.log();
    assert!(log.contains("LD_PRELOAD is set"), "{log}");
}

//! What a fence lets through and what it does not, and what is said when there is none.

use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use crate::rig::{POLICY, Rig, SUPERVISOR, run, text};

pub fn exit_codes(rig: &Rig) {
    for (words, code) in [
        (&["true"][..], 0),
        (&["false"], 1),
        (&["sh", "-c", "exit 7"], 7),
        (&["sh", "-c", "kill -TERM $$"], 143),
        (&["sh", "-c", "kill -KILL $$"], 137),
        (&["no-such-program"], 127),
        (&["/no/such/program"], 127),
        (&["/etc/passwd"], 126),
    ] {
        let output = rig.fenced(words);
        assert_eq!(output.status.code(), Some(code), "{words:?}: {}", text(&output.stderr));
    }
    let output = rig.with_policy().args(["--timeout", "1", "--", "sleep", "60"]).output().unwrap();
    assert_eq!(output.status.code(), Some(124));
}

pub fn identity(rig: &Rig) {
    let output = rig.shell("id; cat /proc/self/status; ls -l /proc/self/fd | wc -l; umask");
    let seen = text(&output.stdout);
    assert!(seen.starts_with("uid=1000"), "{seen}{}", text(&output.stderr));
    assert!(!seen.lines().next().unwrap().contains("(root)"), "{seen}");
    for line in
        ["CapEff:\t0000000000000000", "CapBnd:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2"]
    {
        assert!(seen.contains(line), "{line} is not in {seen}");
    }
}

pub fn curl(rig: &Rig, words: &str) -> Output {
    rig.shell(&curl_words(words))
}

pub fn curl_words(words: &str) -> String {
    format!("curl -sS --max-time 5 {words}")
}

pub fn allowed(rig: &Rig) {
    let output = curl(rig, "https://upstream.test/hello");
    assert_eq!(text(&output.stdout), "saw GET /hello HTTP/1.1\n", "{}", text(&output.stderr));
    assert!(output.status.success());
}

/// Nobody is named, and it still has to be known that a connection is one of the fence's.
pub fn for_anyone(rig: &Rig) {
    let policy = rig.path("anyone.yaml");
    fs::write(&policy, POLICY.replace("/usr/bin/curl", "/**")).unwrap();
    let of = |words: &str| {
        let script = curl_words(words);
        let mut command = rig.supervisor();
        command.arg("--policy-data").arg(&policy).args(["--", "sh", "-c", &script]);
        command.output().unwrap()
    };
    let output = of("https://upstream.test/hello");
    assert_eq!(text(&output.stdout), "saw GET /hello HTTP/1.1\n", "{}", text(&output.stderr));
    let output = of("-f -X DELETE https://upstream.test/hello");
    assert!(!output.status.success() && text(&output.stderr).contains("DELETE"));
}

pub fn refused(rig: &Rig) {
    for (words, reason) in [
        ("-X POST -d x https://upstream.test/hello", "POST"),
        ("-X DELETE https://upstream.test/hello", "DELETE"),
        ("https://other.test/", "other.test"),
        ("https://upstream.test:8443/", "8443"),
        ("http://upstream.test/", "upstream.test"),
        ("https://10.77.0.1/", "10.77.0.1"),
    ] {
        let output = curl(rig, &format!("-f {words}"));
        assert!(!output.status.success(), "{words} passed: {}", text(&output.stdout));
        let log = text(&output.stderr);
        assert!(log.contains("DENIED") && log.contains(reason), "{words}: {log}");
    }
    // A copy of the allowed program is another program.
    let output = rig.shell("cp /usr/bin/curl /tmp/other-curl && /tmp/other-curl -sS --max-time 5 https://upstream.test/; code=$?; rm -f /tmp/other-curl; exit $code");
    assert!(!output.status.success(), "{}", text(&output.stdout));
    assert!(text(&output.stderr).contains("/tmp/other-curl"), "{}", text(&output.stderr));
}

pub fn direct(rig: &Rig) {
    let started = Instant::now();
    let output = curl(rig, "--noproxy '*' https://10.77.0.1/");
    assert!(!output.status.success());
    assert!(text(&output.stderr).contains("10.77.0.1"), "{}", text(&output.stderr));
    let output = rig.shell("curl -sS --noproxy '*' --max-time 5 https://other.test/");
    assert!(!output.status.success());
    assert!(text(&output.stderr).contains("other.test:443"), "{}", text(&output.stderr));
    // Far under the clients' own patience: refused, not lost.
    assert!(started.elapsed() < Duration::from_secs(4), "{:?}", started.elapsed());
}

pub fn escapes(rig: &Rig) {
    for script in [
        "touch /usr/escaped",
        "touch /etc/escaped",
        "cat /etc/shadow",
        "ls /root",
        "ls /home",
        "unshare -U true",
        "unshare -n true",
        "mount -t tmpfs none /tmp",
        "cat /proc/1/environ",
        "kill -0 1 || false",
        "perl -e 'use POSIX; POSIX::setuid(0) and exit 0; exit 1'",
        "perl -e 'exit(syscall(101, 16, $$, 0, 0) == 0 ? 0 : 1)'",
        "perl -e 'use Socket; socket(my $s, AF_INET, SOCK_RAW, 1) and exit 0; exit 1'",
        "perl -e 'exit(syscall(319, my $n = \"x\", 0) >= 0 ? 0 : 1)'",
    ] {
        let output = rig.shell(script);
        assert!(!output.status.success(), "{script} worked: {}", text(&output.stdout));
        assert_ne!(output.status.code(), Some(125), "{script}: {}", text(&output.stderr));
    }
}

pub fn planted_link(rig: &Rig) {
    let policy = POLICY.replace("/tmp, ", "/tmp, /tmp/ringfence-test-link, ");
    let path = rig.path("link.yaml");
    fs::write(&path, policy).unwrap();
    std::os::unix::fs::symlink("/root", "/tmp/ringfence-test-link").unwrap();
    std::os::unix::fs::lchown("/tmp/ringfence-test-link", Some(1000), Some(1000)).unwrap();
    let output = rig
        .supervisor()
        .arg("--policy-data")
        .arg(path)
        .args(["--", "ls", "/root"])
        .output()
        .unwrap();
    fs::remove_file("/tmp/ringfence-test-link").unwrap();
    let log = text(&output.stderr);
    assert!(!output.status.success(), "{}", text(&output.stdout));
    assert!(log.contains("symbolic link"), "{log}");
}

pub fn inbound(rig: &Rig) {
    let script = "echo up; exec perl -MIO::Socket::INET -e '$s = IO::Socket::INET->new(LocalPort => 8001, Listen => 5, ReuseAddr => 1) or die; while ($c = $s->accept) { print $c \"hello from the fence\\n\"; close $c }'";
    let _fence = rig.background(script);
    let until = Instant::now() + Duration::from_secs(5);
    loop {
        if let Ok(mut stream) = std::net::TcpStream::connect("10.77.0.1:8001") {
            let mut answer = String::new();
            stream.read_to_string(&mut answer).unwrap();
            if answer == "hello from the fence\n" {
                return;
            }
        }
        assert!(Instant::now() < until, "the agent's port is not reachable");
        std::thread::sleep(Duration::from_millis(20));
    }
}

pub fn broken_input(rig: &Rig) {
    let bad = rig.path("bad.yaml");
    fs::write(&bad, "network_policies: [what]\n").unwrap();
    let attempt = |words: &[&str]| {
        let output = Command::new(SUPERVISOR)
            .args(words)
            .arg("--run-dir")
            .arg(&rig.run_dir)
            .args(["--", "touch", "/tmp/ran-unfenced"])
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(125), "{words:?}");
        assert!(!Path::new("/tmp/ran-unfenced").exists());
        text(&output.stderr)
    };
    let good = rig.path("policy.yaml");
    let good = good.to_str().unwrap();
    assert!(attempt(&["--policy-data", bad.to_str().unwrap()]).contains("bad.yaml:1"));
    assert!(attempt(&["--policy-data", "/no/such"]).contains("/no/such"));
    assert!(attempt(&[]).contains("--policy-data"));
    assert!(attempt(&["--policy-data", good, "--run-as", "ghost"]).contains("ghost"));
    let digest = attempt(&["--policy-data", good, "--policy-digest", "sha256:0"]);
    assert!(digest.contains("admitted with"), "{digest}");
}

pub fn certificates(rig: &Rig) {
    let output = rig.shell(
        "tail -n $(wc -l <$NODE_EXTRA_CA_CERTS) $SSL_CERT_FILE | cmp - $NODE_EXTRA_CA_CERTS \
         && grep -c BEGIN $SSL_CERT_FILE; grep -c '#' $SSL_CERT_FILE; ls -l $SSL_CERT_FILE",
    );
    let seen = text(&output.stdout);
    let image = fs::read_to_string("/etc/ssl/certs/ca-certificates.crt").unwrap_or_default();
    // The image's, the operator's (`--upstream-ca`), the sandbox CA.
    let all = image.matches("-----BEGIN CERTIFICATE-----").count() + 2;
    assert!(seen.starts_with(&format!("{all}\n0\n-rw-r--r--")), "{seen}{}", text(&output.stderr));
    // Java's come a moment later: what they begin with, and that nothing is to come any more.
    let output = rig.shell(
        "store=$(dirname $SSL_CERT_FILE)/java.jks; \
         for i in $(seq 500); do \
             before=$(stat -c %s $store); sleep 0.02; \
             test $before -gt 0 && test $before = $(stat -c %s $store) && break; \
         done; \
         head -c 12 $store | od -An -v -tu4 --endian=big; ls -l $store",
    );
    let seen = text(&output.stdout);
    let (begin, rest) = seen.split_once('\n').unwrap_or_default();
    let numbers: Vec<_> = begin.split_whitespace().collect();
    assert_eq!(numbers[..2], [0xFEED_FEED_u32.to_string().as_str(), "2"], "{seen}");
    assert_eq!(numbers[2], all.to_string(), "{seen}");
    assert!(rest.starts_with("-rw-r--r--"), "{seen}");
}

pub fn image_files(rig: &Rig) {
    let pipe = rig.path("pipe");
    run("mkfifo", &[pipe.to_str().unwrap()]);
    for (hostile, over, code) in [
        (pipe.to_str().unwrap(), "/etc/ssl/certs/ca-certificates.crt", 0),
        ("/dev/zero", "/etc/ssl/certs/ca-certificates.crt", 0),
        (pipe.to_str().unwrap(), "/etc/passwd", 125),
        ("/dev/zero", "/etc/group", 125),
    ] {
        run("mount", &["--bind", hostile, over]);
        let output = rig.fenced(&["true"]);
        run("umount", &[over]);
        let log = text(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{over} is {hostile}: {log}");
        assert!(code == 0 || log.contains(over) && log.contains("not a regular file"), "{log}");
    }
}

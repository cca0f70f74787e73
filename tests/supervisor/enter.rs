//! `enter`.

use std::io::{Read, Write};
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::rig::{
    Background, Rig, SUPERVISOR, children_of, dies, eventually, keeper_of, lives, run, text,
};

pub fn enter(rig: &Rig) {
    let fence = rig.background("echo up; readlink /proc/self/ns/net; sleep 60");
    let output = rig.enter(&["sh", "-c", "id -u; cat /proc/net/route | head -1; exit 3"]);
    assert_eq!(output.status.code(), Some(3), "{}", text(&output.stderr));
    assert!(text(&output.stdout).starts_with("1000\n"), "{}", text(&output.stdout));
    let output = rig.enter(&["curl", "-sS", "--max-time", "5", "https://upstream.test/entered"]);
    assert_eq!(text(&output.stdout), "saw GET /entered HTTP/1.1\n", "{}", text(&output.stderr));
    assert_eq!(rig.enter(&["no-such-program"]).status.code(), Some(127));
    assert_eq!(fence.line, "up");
    // The client's death is the command's.
    let mut client = Command::new(SUPERVISOR)
        .arg("enter")
        .arg("--run-dir")
        .arg(&rig.run_dir)
        .args(["--", "sleep", "7654325"])
        .spawn()
        .unwrap();
    eventually("the command in the fence", || lives("sleep\x007654325"));
    client.kill().unwrap();
    client.wait().unwrap();
    dies("sleep\x007654325");
}

pub fn enter_without_fence(rig: &Rig) {
    let mark = rig.path("outside");
    let output = rig.enter(&["touch", mark.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(125));
    assert!(text(&output.stderr).contains("no fence to enter"), "{}", text(&output.stderr));
    assert!(!mark.exists());
}

/// A child that enters has the agent's user before it executes, so the agent can stop it there.
pub fn stopped_child(rig: &Rig) {
    let mut fence =
        rig.background("exec perl -e '$| = 1; print \"up\\n\"; while (1) { kill \"STOP\", -1 }'");
    // Where it is stopped after its exec instead, its client waits as for any stopped program.
    let clients: Vec<_> = (0..3)
        .map(|_| {
            let mut client = Command::new(SUPERVISOR);
            client.arg("enter").arg("--run-dir").arg(&rig.run_dir);
            client.args(["--", "true"]).stdin(Stdio::null()).spawn().unwrap()
        })
        .collect();
    std::thread::sleep(Duration::from_millis(300));
    fence.signal("-TERM");
    assert_eq!(fence.wait(), Some(143));
    for mut client in clients {
        client.wait().unwrap();
    }
}

/// Each client's child is stopped between its fork and its exec, most of the time. Nobody waits
/// for them one after the other.
pub fn served_meanwhile(rig: &Rig) {
    let mut fence =
        rig.background("exec perl -e '$| = 1; print \"up\\n\"; while (1) { kill \"STOP\", -1 }'");
    let clients: Vec<_> = (0..40).map(|_| rig.entering(&["true"]).spawn().unwrap()).collect();
    let keeper = keeper_of(fence.pid());
    eventually("many stand at once", || children_of(keeper).len() > 10);
    fence.signal("-TERM");
    assert_eq!(fence.wait(), Some(143));
    for mut client in clients {
        client.wait().unwrap();
    }
}

pub fn stdin_and_codes(rig: &Rig) {
    let _fence = rig.background("echo up; sleep 60");
    let mut client = rig
        .entering(&["sh", "-c", "wc -c; echo to-stderr >&2; exit 4"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    client.stdin.take().unwrap().write_all(&vec![b'x'; 1 << 20]).unwrap();
    let output = client.wait_with_output().unwrap();
    assert_eq!(text(&output.stdout).trim(), "1048576", "{}", text(&output.stderr));
    assert_eq!(text(&output.stderr), "to-stderr\n");
    assert_eq!(output.status.code(), Some(4));
    for (script, code) in
        [("exit 255", 255), ("kill -TERM $$", 143), ("kill -KILL $$", 137), ("kill -40 $$", 168)]
    {
        assert_eq!(rig.enter(&["bash", "-c", script]).status.code(), Some(code), "{script}");
    }
    let output = rig.enter(&["/etc/passwd"]);
    assert_eq!(output.status.code(), Some(126), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("/etc/passwd"), "{}", text(&output.stderr));
}

pub fn signals(rig: &Rig) {
    let _fence = rig.background("echo up; sleep 60");
    for (signal, code) in [("HUP", 21), ("INT", 22), ("QUIT", 23), ("USR1", 24), ("TERM", 25)] {
        let script = format!("trap 'exit {code}' {signal}; echo up; while :; do sleep 0.02; done");
        let mut client = Background::start(&mut rig.entering(&["sh", "-c", &script]));
        client.signal(&format!("-{signal}"));
        assert_eq!(client.wait(), Some(code), "{signal}");
    }
}

/// A terminal of the test's, as a person's would be.
struct Pty {
    outer: std::fs::File,
    inner: std::os::fd::OwnedFd,
}

impl Pty {
    fn new() -> Self {
        use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
        let outer = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        grantpt(&outer).unwrap();
        unlockpt(&outer).unwrap();
        let name = ptsname(&outer, Vec::new()).unwrap().into_string().unwrap();
        let inner = std::fs::File::options().read(true).write(true).open(name).unwrap();
        Self { outer: outer.into(), inner: inner.into() }
    }

    fn size(&self, rows: u16, columns: u16) {
        let size =
            rustix::termios::Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        rustix::termios::tcsetwinsize(&self.outer, size).unwrap();
    }

    fn run(&self, mut command: Command) -> std::process::Child {
        let end = || Stdio::from(self.inner.try_clone().unwrap());
        command.stdin(end()).stdout(end()).stderr(end()).env("TERM", "test-term").spawn().unwrap()
    }

    /// Reads until `words` came.
    fn until(&mut self, words: &str) -> String {
        let mut seen = Vec::new();
        let mut byte = [0];
        while !text(&seen).contains(words) {
            assert_eq!(self.outer.read(&mut byte).unwrap(), 1, "{}", text(&seen));
            seen.push(byte[0]);
        }
        text(&seen)
    }
}

pub fn terminal(rig: &Rig) {
    let _fence = rig.background("echo up; sleep 60");
    let mut pty = Pty::new();
    pty.size(33, 101);
    let script = "test -t 0 && test -t 1 && echo tty $TERM; stty size; \
                  trap 'stty size; changed=1' WINCH; echo ready; \
                  while test -z \"$changed\"; do sleep 0.02; done; \
                  echo go; read line; echo \"got $line\"; \
                  trap 'exit 6' INT; echo again; while :; do sleep 0.02; done";
    let mut client = pty.run(rig.entering(&["sh", "-c", script]));
    let seen = pty.until("ready");
    assert!(seen.contains("tty test-term") && seen.contains("33 101"), "{seen}");
    // What the caller's terminal would do with these characters, the command's does instead.
    let settings = rustix::termios::tcgetattr(&pty.inner).unwrap();
    assert!(!settings.local_modes.contains(rustix::termios::LocalModes::ICANON));
    pty.size(44, 88);
    run("kill", &["-WINCH", &client.id().to_string()]);
    let seen = pty.until("go");
    assert!(seen.contains("44 88"), "{seen}");
    pty.outer.write_all(b"hello\r").unwrap();
    let seen = pty.until("again");
    assert!(seen.contains("got hello"), "{seen}");
    pty.outer.write_all(b"\x03").unwrap();
    assert_eq!(client.wait().unwrap().code(), Some(6));
    let settings = rustix::termios::tcgetattr(&pty.inner).unwrap();
    assert!(settings.local_modes.contains(rustix::termios::LocalModes::ICANON), "not restored");
}

pub fn waits(rig: &Rig) {
    let client = rig.entering(&["echo", "inside"]).stdout(Stdio::piped()).spawn().unwrap();
    let _fence = rig.background("echo up; sleep 60");
    let output = client.wait_with_output().unwrap();
    assert_eq!(text(&output.stdout), "inside\n");
}

pub fn several(rig: &Rig) {
    let fences = [1, 2].map(|_| rig.background("readlink /proc/self/ns/net; sleep 60"));
    let output = rig.enter(&["true"]);
    assert_eq!(output.status.code(), Some(125));
    let said = text(&output.stderr);
    assert!(said.contains("2 supervisors"), "{said}");
    for fence in &fences {
        let begins = format!("{}/{}-", rig.run_dir.display(), fence.pid());
        let dir = said.split_whitespace().find(|word| word.starts_with(&begins)).expect(&said);
        let output = Command::new(SUPERVISOR)
            .args(["enter", "--run-dir", dir, "--", "readlink", "/proc/self/ns/net"])
            .output()
            .unwrap();
        assert_eq!(text(&output.stdout).trim(), fence.line, "{}", text(&output.stderr));
    }
}

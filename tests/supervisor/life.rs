//! Signals, ends, and who ends with whom.

use std::fs;

use crate::rig::{
    Background, Rig, children_of, dies, ended, eventually, keeper_of, lives, proxy_of, run, text,
};

/// Prints the number of each signal that it gets. Without a buffer: perl handles those that stand
/// for a fault at once, even while it empties one.
const LISTENER: &str = r#"
use Config;
my @names = split / /, $Config{sig_name};
my %number;
@number{@names} = split / /, $Config{sig_num};
for my $name (@names) {
    next if $name =~ /^(ZERO|KILL|STOP|CHLD|CLD|NUM32|NUM33)$/;
    $SIG{$name} = sub { syswrite STDOUT, "$number{$_[0]}\n" };
}
syswrite STDOUT, "up\n";
while (1) { select undef, undef, undef, 60 }
"#;

pub fn signals(rig: &Rig) {
    let mut fence = Background::start(rig.with_policy().args(["--", "perl", "-e", LISTENER]));
    // 9 and 19 cannot be caught, 17 is the supervisor's own, 32 and 33 are the C library's.
    for signal in (1..=64).filter(|signal| ![9, 17, 19, 32, 33].contains(signal)) {
        fence.signal(&format!("-{signal}"));
        assert_eq!(fence.next(), signal.to_string());
    }
    let mut fence = rig.background("trap 'exit 7' TERM; echo up; while :; do sleep 0.05; done");
    fence.signal("-TERM");
    assert_eq!(fence.wait(), Some(7));
}

pub fn codes(rig: &Rig) {
    for signal in [1, 2, 3, 6, 9, 11, 15, 34, 40, 64] {
        let output = rig.fenced(&["perl", "-e", &format!("kill {signal}, $$; sleep 60")]);
        assert_eq!(output.status.code(), Some(128 + signal), "{}", text(&output.stderr));
    }
    for code in [0, 1, 124, 125, 126, 127, 128, 200, 255] {
        let output = rig.shell(&format!("exit {code}"));
        assert_eq!(output.status.code(), Some(code), "{}", text(&output.stderr));
    }
}

pub fn bounded_stop(rig: &Rig) {
    for script in [
        "trap '' TERM; while :; do sleep 60; done",
        "kill -STOP $$",
        "setsid sleep 7654330 & kill -STOP $$",
    ] {
        let output =
            rig.with_policy().args(["-t", "1", "--", "sh", "-c", script]).output().unwrap();
        assert_eq!(output.status.code(), Some(124), "{script}: {}", text(&output.stderr));
    }
    dies("7654330");
    // What an agent leaves behind does not outlive it either.
    let output = rig.shell("(setsid sleep 7654331 &); exit 3");
    assert_eq!(output.status.code(), Some(3));
    dies("7654331");
}

/// Two thousand orphans, of which a hundred end at a time; then as many zombies as there are.
const ORPHANS: &str = r#"
$| = 1;
for (1 .. 20) {
    pipe my $wait, my $go;
    my $child = fork;
    if (!$child) {
        close $go;
        for (1 .. 100) { if (!fork) { sysread $wait, my $byte, 1; exit } }
        exit;
    }
    waitpid $child, 0;
    close $go;
}
my $left;
for (1 .. 1000) {
    $left = grep { open my $f, "<", $_ and join("", <$f>) =~ /^State:\s+Z/m } glob "/proc/[0-9]*/status";
    last if !$left;
    select undef, undef, undef, 0.01;
}
print "left $left\n";
exit 9;
"#;
/// Makes orphans until somebody stops it.
const STORM: &str =
    r#"$| = 1; print "up\n"; while (1) { if (!fork) { fork; exit } waitpid -1, 1 }"#;

pub fn orphans(rig: &Rig) {
    let output = rig.fenced(&["perl", "-e", ORPHANS]);
    assert_eq!(text(&output.stdout), "left 0\n", "{}", text(&output.stderr));
    assert_eq!(output.status.code(), Some(9));
    let mut fence = Background::start(rig.with_policy().args(["--", "perl", "-e", STORM]));
    fence.signal("-TERM");
    assert_eq!(fence.wait(), Some(143));
}

pub fn orphans_of_pid_1(rig: &Rig) {
    let output = rig.as_pid_1().args(["--", "perl", "-e", ORPHANS]).output().unwrap();
    assert_eq!(text(&output.stdout), "left 0\n", "{}", text(&output.stderr));
    assert_eq!(output.status.code(), Some(9));
    let mut fence = Background::start(rig.as_pid_1().args(["--", "perl", "-e", STORM]));
    let supervisor = children_of(fence.pid())[0];
    run("kill", &["-TERM", &supervisor.to_string()]);
    assert_eq!(fence.wait(), Some(143));
}

pub fn supervisor_killed(rig: &Rig) {
    let script = "(setsid sleep 7654321 &) ; echo up; sleep 7654322";
    let mut fence = rig.background(script);
    let of_it = children_of(fence.pid());
    assert_eq!(of_it.len(), 2, "a proxy and a keeper");
    assert!(lives("7654321") && lives("7654322"));
    fence.signal("-KILL");
    fence.wait();
    for mark in ["7654321", "7654322"] {
        dies(mark);
    }
    eventually("the end of proxy and keeper", || of_it.iter().all(|pid| ended(*pid)));

    let mut fence = Background::start(rig.as_pid_1().args(["--", "sh", "-c", script]));
    let supervisor = children_of(fence.pid())[0];
    let of_it = children_of(supervisor);
    run("kill", &["-KILL", &supervisor.to_string()]);
    fence.wait();
    dies("7654321");
    eventually("the end of proxy and keeper", || of_it.iter().all(|pid| ended(*pid)));
}

pub fn proxy_killed(rig: &Rig) {
    killed(rig, proxy_of, "the proxy has ended");
}

pub fn keeper_killed(rig: &Rig) {
    killed(rig, keeper_of, "the keeper has ended");
}

fn killed(rig: &Rig, whom: fn(i32) -> i32, said: &str) {
    let script = "(setsid sleep 7654323 &) ; echo up; sleep 7654324";
    for pid_1 in [false, true] {
        let mut command = if pid_1 { rig.as_pid_1() } else { rig.with_policy() };
        let mut fence = Background::start(command.args(["--", "sh", "-c", script]));
        let supervisor = if pid_1 { children_of(fence.pid())[0] } else { fence.pid() };
        let of_it = children_of(supervisor);
        run("kill", &["-KILL", &whom(supervisor).to_string()]);
        assert_eq!(fence.wait(), Some(125));
        let log = fence.stderr();
        assert!(log.contains(said), "{log}");
        for mark in ["7654323", "7654324"] {
            dies(mark);
        }
        eventually("the end of proxy and keeper", || of_it.iter().all(|pid| ended(*pid)));
    }
}

pub fn proxy_threads(rig: &Rig) {
    let fence = rig.background("echo up; sleep 60");
    let proxy = proxy_of(fence.pid());
    let mut count = 0;
    for task in fs::read_dir(format!("/proc/{proxy}/task")).unwrap().flatten() {
        let status = fs::read_to_string(task.path().join("status")).unwrap();
        for set in ["Inh", "Prm", "Eff", "Bnd", "Amb"] {
            assert!(status.contains(&format!("Cap{set}:\t0000000000000000")), "{status}");
        }
        for line in ["NoNewPrivs:\t1", "Seccomp:\t2", "Uid:\t65530\t65530\t65530\t65530"] {
            assert!(status.contains(line), "{line} is not in {status}");
        }
        count += 1;
    }
    assert!(count > 0);
    assert_eq!(fs::read(format!("/proc/{proxy}/environ")).unwrap(), b"");
}

//! What a proxy logs.

use std::process::Command;

/// Runs another test of this program by itself and returns what the proxy logged; none without
/// root.
pub fn log_of(test: &str) -> Option<String> {
    log_with(test, &[])
}

/// The same of a test that only runs by itself (`#[ignore]`).
pub fn log_of_alone(test: &str) -> Option<String> {
    log_with(test, &["--ignored"])
}

fn log_with(test: &str, more: &[&str]) -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED: needs root");
        return None;
    }
    let output = Command::new(std::env::current_exe().expect("path"))
        .args(["--exact", test, "--nocapture"])
        .args(more)
        .output()
        .expect("test program");
    let told = String::from_utf8_lossy(&output.stdout);
    let log = String::from_utf8_lossy(&output.stderr).into_owned();
    let tail: Vec<&str> = log.lines().rev().take(20).collect();
    let passed = output.status.success() && told.contains("1 passed");
    assert!(passed, "{test}: {told}\n{}", tail.into_iter().rev().collect::<Vec<_>>().join("\n"));
    Some(log)
}

//! The release, for the tests that change it, and the program that a person types.

use std::process::Stdio;

use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;

use crate::place::Done;
use crate::rig::RELEASE_NAMESPACE;

pub const RELEASE: &str = "ringfence";
pub const CHART: &str = "charts/ringfence";

/// Runs a program to its end.
async fn run(program: &str, words: &[&str], input: &str) -> Done {
    let mut child = Command::new(program)
        .args(words)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap_or_else(|error| panic!("{program}: {error}"));
    let mut stdin = child.stdin.take().expect("it is piped");
    // It may end without having read all.
    drop(stdin.write_all(input.as_bytes()).await);
    drop(stdin);
    let output = child.wait_with_output().await.expect("it ends");
    let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.push_str(&String::from_utf8_lossy(&output.stderr));
    Done { code: output.status.code().unwrap_or(-1), text }
}

/// `helm` in the release namespace.
pub async fn helm(words: &[&str], input: &str) -> Done {
    run("helm", &[&["-n", RELEASE_NAMESPACE], words].concat(), input).await
}

/// The same, which has to succeed.
pub async fn helm_done(words: &[&str], input: &str) -> String {
    let done = helm(words, input).await;
    assert_eq!(done.code, 0, "helm {words:?}: {}", done.text);
    done.text
}

/// `kubectl` in the release namespace.
pub async fn kubectl(words: &[&str], input: &str) -> Done {
    run("kubectl", &[&["-n", RELEASE_NAMESPACE], words].concat(), input).await
}

/// `ringfence`.
pub async fn ringfence(words: &[&str]) -> Done {
    run(env!("CARGO_BIN_EXE_ringfence"), words, "").await
}

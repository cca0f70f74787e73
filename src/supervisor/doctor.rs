//! `doctor`: tries the escape table inside the fence of a living pod, and says what came back.
//!
//! It runs beside the agent, as root of the container and outside of the fence; the attempts are
//! made inside, as the agent's user, by a process that the container's supervisor starts as it
//! starts any that enters. The supervisor's program cannot be read in there, so a copy of it is
//! handed in as that process's standard input, sealed: `/proc/self/fd/0` is executed. The copy is
//! a memfd, which has no path that a Landlock rule could be about.

mod bait;
mod hearing;
mod inside;
mod report;

use std::fs::File;
use std::io::{self, Seek};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Parser;
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::args::{Args, DoctorArgs, EnterArgs, Verb};
use super::enter::{self, ToClient, ToSupervisor};
use super::{packet, run_dir};
use crate::fence::attempts::{Facts, Seen, table};

pub use bait::{Bait, start_neighbour};
use hearing::{DEADLINE, Patience};
pub use inside::attempts;
use report::Report;

/// One line of what the attempts write.
#[derive(Debug, Serialize, Deserialize)]
pub struct Line {
    /// The row's id.
    pub id: String,
    /// What came back.
    pub seen: Seen,
}

/// Runs the table and prints the outcome. Exit code 0 when every row is as expected or was
/// skipped, 1 when one is not.
pub fn client(args: &DoctorArgs) -> Result<i32> {
    let (socket, dir) = enter::connect(&args.run_dir, Duration::from_secs(args.wait))?;
    let attestation = read_attestation(&dir)?;
    let mut facts = facts(&attestation, &dir)?;
    // From here on a signal does not end this process before it has taken the bait away.
    let patience = Patience::begin(DEADLINE)?;
    // In the supervisor's own directory: what is left by a doctor that was killed goes with it.
    let bait = Bait::lay(&dir, &mut facts)?;
    // A process of the agent's user outside of the fence is the agent's to take over where no
    // Landlock domain stands between the two.
    if attestation["pid_namespace"]["own"] == Value::Bool(false)
        && attestation["landlock"]["unconfined"] == Value::Bool(false)
    {
        start_neighbour(&mut facts)?;
    }
    let lines = ask(&socket, &facts, &patience)?;
    drop(bait);
    drop(patience);
    let report = Report::new(attestation, table(), &lines);
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{}", report.text());
    }
    Ok(i32::from(report.unexpected() > 0))
}

/// The arguments of `doctor`, when that is what a command in the fence was to be: the webhook puts
/// `enter --` before every command of `kubectl exec`, and inside there is no such program.
///
/// The run directory stays the one of `enter`: who writes the command does not choose it.
#[must_use]
pub fn asked_for(enter: &EnterArgs) -> Option<Result<DoctorArgs, clap::Error>> {
    let (program, rest) = enter.command.split_first()?;
    if rest.first().map(String::as_str) != Some("doctor") || !is_this_program(program) {
        return None;
    }
    Some(Args::try_parse_from(&enter.command).map(|args| match args.verb {
        Some(Verb::Doctor(doctor)) => {
            DoctorArgs { run_dir: enter.run_dir.clone(), wait: enter.wait, ..doctor }
        }
        // The first word was `doctor`.
        _ => DoctorArgs { run_dir: enter.run_dir.clone(), wait: enter.wait, json: false },
    }))
}

/// By its file, or by its bare name: it is not on the agent's PATH.
fn is_this_program(program: &str) -> bool {
    use std::os::unix::fs::MetadataExt;
    if !program.contains('/') {
        return program == "ringfence-supervisor";
    }
    let file = |path: &str| std::fs::metadata(path).map(|data| (data.dev(), data.ino()));
    matches!((file(program), file("/proc/self/exe")), (Ok(there), Ok(ours)) if there == ours)
}

fn read_attestation(dir: &Path) -> Result<Value> {
    let path = dir.join(run_dir::ATTESTATION);
    let text = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_slice(&text).with_context(|| format!("cannot understand {}", path.display()))
}

/// What of the attestation the attempts have to know.
fn facts(attestation: &Value, dir: &Path) -> Result<Facts> {
    #[derive(Deserialize)]
    struct User {
        uid: u32,
        gid: u32,
        groups: Vec<u32>,
    }
    #[derive(Deserialize)]
    struct Paths {
        read_only: Vec<String>,
        read_write: Vec<String>,
    }
    let part = |name: &str| attestation[name].clone();
    let user: User = serde_json::from_value(part("user")).context("attestation: user")?;
    let paths: Paths = serde_json::from_value(part("paths")).context("attestation: paths")?;
    let skipped: Vec<(String, String)> =
        serde_json::from_value(attestation["landlock"]["skipped"].clone())
            .context("attestation: landlock.skipped")?;
    let namespace = serde_json::from_value(attestation["network"]["namespace"].clone())
        .context("attestation: network.namespace")?;
    let read_only = paths.read_only.into_iter().map(|path| (path, false));
    let opened = paths.read_write.into_iter().map(|path| (path, true)).chain(read_only);
    Ok(Facts {
        identity: (user.uid, user.gid, user.groups),
        namespace: Some(namespace),
        opened: opened.filter(|(path, _)| !skipped.iter().any(|(left, _)| left == path)).collect(),
        run_dir: Some(text(dir)),
        supervisor: std::fs::read_link("/proc/self/exe").ok().as_deref().map(text),
        ..Facts::default()
    })
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// Has the attempts made, and reads what they say until they have ended. When it gives up, the end
/// of this process's connection is theirs.
fn ask(socket: &OwnedFd, facts: &Facts, patience: &Patience) -> Result<Vec<Line>> {
    let program = program().context("cannot make a copy of this program")?;
    let (read, write) = io::pipe().context("cannot make a pipe")?;
    let run = ToSupervisor::Run {
        argv: vec!["/proc/self/fd/0".into(), "attempts".into(), serde_json::to_string(facts)?],
        workdir: None,
        tty: false,
        term: None,
    };
    // Nothing of ours goes in: a terminal could be read and typed into from there.
    packet::send(socket, &run, &[program.as_fd(), write.as_fd(), write.as_fd()])
        .context("the supervisor does not listen")?;
    // Ours must be closed, or the end is never seen. A refusal closes the supervisor's too.
    drop((program, write));
    let mut lines = Vec::new();
    patience.lines(&read.into(), |line| match serde_json::from_slice(line) {
        Ok(line) => lines.push(line),
        Err(_) => eprintln!("doctor: {}", line.escape_ascii()),
    })?;
    patience.wait(socket)?;
    let Some(packet) = packet::receive(socket).context("cannot hear the supervisor")? else {
        bail!("the supervisor has ended: an attempt may have broken the fence");
    };
    match packet.json().context("the supervisor's answer")? {
        ToClient::Exited { code: 0 } => Ok(lines),
        ToClient::Exited { code } => bail!("the attempts ended with {code}; see above"),
        ToClient::Refused { reason, .. } => bail!("the attempts cannot be made: {reason}"),
    }
}

/// This program in a memfd that nobody can change any more, by a descriptor that only reads.
fn program() -> io::Result<OwnedFd> {
    let sealable = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    // Linux 6.3 wants to be told that it is to be executed; before, the flag is unknown.
    let made = match rustix::fs::memfd_create("ringfence-doctor", sealable | MemfdFlags::EXEC) {
        Err(Errno::INVAL) => rustix::fs::memfd_create("ringfence-doctor", sealable),
        other => other,
    };
    let mut copy = File::from(made?);
    io::copy(&mut File::open("/proc/self/exe")?, &mut copy)?;
    copy.rewind()?;
    // The agent's user executes it.
    rustix::fs::fchmod(&copy, rustix::fs::Mode::from_raw_mode(0o555))?;
    let seals = SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
    rustix::fs::fcntl_add_seals(&copy, seals)?;
    Ok(File::open(PathBuf::from(format!("/proc/self/fd/{}", copy.as_raw_fd())))?.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn enter(words: &[&str]) -> EnterArgs {
        EnterArgs {
            run_dir: "/the/run/dir".into(),
            wait: 7,
            command: words.iter().map(ToString::to_string).collect(),
        }
    }

    #[test]
    fn only_this_program_with_this_verb_is_the_doctor() {
        let own = std::env::current_exe().unwrap();
        let own = own.to_str().unwrap();
        for words in [&[own, "doctor"][..], &["ringfence-supervisor", "doctor"]] {
            let args = asked_for(&enter(words)).unwrap().unwrap();
            assert_eq!((args.run_dir, args.wait, args.json), ("/the/run/dir".into(), 7, false));
        }
        assert!(asked_for(&enter(&[own, "doctor", "--json"])).unwrap().unwrap().json);
        for words in [
            &["doctor"][..],
            &[own],
            &[own, "status"],
            &["/bin/sh", "doctor"],
            &["sh", "doctor"],
            &["/no/such/program", "doctor"],
            &[own, "--", "doctor"],
        ] {
            assert!(asked_for(&enter(words)).is_none(), "{words:?}");
        }
    }

    #[test]
    fn who_writes_the_command_does_not_choose_the_run_directory() {
        let words = ["ringfence-supervisor", "doctor", "--run-dir", "/tmp/mine"];
        let args = asked_for(&enter(&words)).unwrap().unwrap();
        assert_eq!(args.run_dir, Path::new("/the/run/dir"));
        assert!(
            asked_for(&enter(&["ringfence-supervisor", "doctor", "--no-such"])).unwrap().is_err()
        );
    }

    #[test]
    fn the_copy_is_whole_and_cannot_be_changed() {
        use std::io::Read;
        let copy = program().unwrap();
        let path = format!("/proc/self/fd/{}", copy.as_raw_fd());
        let mut bytes = Vec::new();
        File::open(&path).unwrap().read_to_end(&mut bytes).unwrap();
        assert!(bytes == std::fs::read("/proc/self/exe").unwrap());
        let writable = std::fs::OpenOptions::new().write(true).open(&path);
        let written = writable.and_then(|mut file| io::Write::write(&mut file, b"x"));
        assert!(written.is_err());
    }
}

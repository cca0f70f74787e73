//! `ringfence-supervisor`: the pod's side. See [`ringfence::supervisor`].
#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use ringfence::supervisor::args::{Args, Verb};
use ringfence::supervisor::{
    doctor, enter, failure, install, openshell, proxy_process, run, status,
};

fn main() -> ExitCode {
    let argv: Vec<OsString> = std::env::args_os().collect();
    match called(&argv) {
        Called::Proxy => {
            let outcome = proxy_process::main().inspect_err(failure::tell_of_proxy);
            return ExitCode::from(if outcome.is_ok() { 0 } else { failure::NO_FENCE });
        }
        Called::OpenShell => return ExitCode::from(openshell::main(argv)),
        Called::Supervisor => {}
    }
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error) => {
            // `--help` and `--version` are no failure; a wrong command line is one of the fence.
            let code = if error.use_stderr() { failure::NO_FENCE } else { 0 };
            drop(error.print());
            return ExitCode::from(code);
        }
    };
    let outcome = match args.verb {
        None => run::run(args.run).inspect_err(failure::tell),
        Some(Verb::Install { dir }) => {
            tell(install::install(&dir).map(|path| println!("installed {}", path.display())))
        }
        Some(Verb::CopySelf { dest }) => tell(install::copy_self(&dest).map(drop)),
        Some(Verb::Enter(args)) => tell(enter::client(&args)),
        Some(Verb::Doctor(args)) => tell(doctor::client(&args)),
        Some(Verb::Attempts { facts }) => tell(doctor::attempts(&facts)),
        Some(Verb::Status { run_dir }) => {
            tell(status::status(&run_dir).map(|text| println!("{text}")))
        }
    };
    ExitCode::from(outcome.map_or(failure::NO_FENCE, |code| {
        // Codes above 255 do not exist; 128 + signal fits.
        u8::try_from(code).unwrap_or(u8::MAX)
    }))
}

/// The only word of the proxy's command line. This program has no verb of that name, and its
/// commands come after `--`.
const PROXY: &str = "proxy";

/// What this program is to be.
#[derive(Debug, PartialEq, Eq)]
enum Called {
    /// Our own start of the proxy, at each start of a fence: no command line to be read.
    Proxy,
    OpenShell,
    Supervisor,
}

/// By its name first: `openshell-sandbox proxy` runs a command that has this name.
fn called(argv: &[OsString]) -> Called {
    match argv {
        [name, ..] if openshell::is_called(Some(name)) => Called::OpenShell,
        [_, verb] if verb == PROXY => Called::Proxy,
        _ => Called::Supervisor,
    }
}

/// Prints an error of a verb that runs beside the agent.
fn tell<T: Into<ExitValue>>(outcome: Result<T>) -> Result<i32> {
    outcome
        .map(|value| value.into().0)
        .inspect_err(|error| eprintln!("ringfence-supervisor: {error:#}"))
}

/// What a verb ends with: its own code, or 0.
struct ExitValue(i32);

impl From<i32> for ExitValue {
    fn from(code: i32) -> Self {
        Self(code)
    }
}

impl From<()> for ExitValue {
    fn from((): ()) -> Self {
        Self(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_of_the_proxys_name_is_a_command() {
        let called = |words: &[&str]| called(&words.iter().map(OsString::from).collect::<Vec<_>>());
        assert_eq!(called(&["/x/openshell-sandbox", "proxy"]), Called::OpenShell);
        assert_eq!(called(&["openshell-sandbox", PROXY]), Called::OpenShell);
        assert_eq!(called(&["ringfence-supervisor", PROXY]), Called::Proxy);
        for words in [&["ringfence-supervisor", "--", PROXY][..], &["x"], &[]] {
            assert_eq!(called(words), Called::Supervisor);
        }
    }
}

//! `ringfence-supervisor`: the pod's side. See [`ringfence::supervisor`].
#![forbid(unsafe_code)]

use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use ringfence::supervisor::args::{Args, Verb};
use ringfence::supervisor::{
    doctor, enter, failure, install, openshell, proxy_process, run, status,
};

fn main() -> ExitCode {
    // Our own start of the proxy, at each start of a fence: no command line to be read.
    if std::env::args_os().skip(1).eq(["proxy"]) {
        let outcome = proxy_process::main().inspect_err(failure::tell_of_proxy);
        return ExitCode::from(if outcome.is_ok() { 0 } else { failure::NO_FENCE });
    }
    if openshell::is_called(std::env::args_os().next().as_deref()) {
        return ExitCode::from(openshell::main(std::env::args_os().collect()));
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

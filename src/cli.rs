//! The verbs a person types.
#![forbid(unsafe_code)]

mod enable;
mod inject;
mod policy;
mod prepare_uninstall;
mod probe;
mod rotate_ca;
mod selftest;
mod webhook;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Fences AI agents in Kubernetes pods.
///
/// Label a namespace `ringfence.dev/inject=enabled`, and every pod created there comes up with its
/// command inside a fence: a network namespace of its own behind a proxy that judges each request
/// by the namespace's policy, under Landlock, a dropped user and a system call filter.
#[derive(Debug, Parser)]
#[command(name = "ringfence", version, propagate_version = true, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Serve the admission webhook (what the chart's Deployment runs).
    Webhook(Box<webhook::Args>),
    /// Print a manifest as the webhook would admit it, without a cluster.
    Inject(inject::Args),
    /// Work with policies.
    #[command(subcommand)]
    Policy(policy::Verb),
    /// Check a running installation: is a pod created in a labelled namespace fenced?
    Selftest(selftest::Args),
    /// Have the webhook replace its CA now, without an outage.
    RotateCa(rotate_ca::Args),
    /// Fence the new pods of a namespace.
    Enable(enable::Enable),
    /// Fence the new pods of a namespace no longer.
    Disable(enable::Disable),
    /// Refuse to uninstall while namespaces are labelled (what the chart's hook runs).
    PrepareUninstall(prepare_uninstall::Args),
    /// Print the version.
    Version,
}

/// Reads the command line and does what it says. Errors go to stderr; the exit code is 1 for a
/// failure and 2 for a command line that is not understood.
#[must_use]
pub fn run() -> ExitCode {
    let done = match Cli::parse().verb {
        Verb::Webhook(args) => webhook::run(*args),
        Verb::Inject(args) => inject::run(args),
        Verb::Policy(verb) => policy::run(verb),
        Verb::Selftest(args) => selftest::run(&args),
        Verb::RotateCa(args) => rotate_ca::run(&args),
        Verb::Enable(args) => enable::enable(&args),
        Verb::Disable(args) => enable::disable(&args),
        Verb::PrepareUninstall(args) => prepare_uninstall::run(&args),
        Verb::Version => {
            println!("ringfence {}", env!("CARGO_PKG_VERSION"));
            Ok(ExitCode::SUCCESS)
        }
    };
    done.unwrap_or_else(|error| {
        eprintln!("ringfence: {error:#}");
        ExitCode::FAILURE
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}

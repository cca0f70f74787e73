//! What the supervisor says of its own work at the level of information: OpenShell's words, each
//! when what it says is true. Nothing is put together where nobody would read it.

use std::path::Path;

use rustix::process::Pid;

use super::args::RunArgs;
use super::identity::User;
use super::keeper::Confinement;
use super::policy_files::PolicyFiles;
use crate::event::{self, Class, Event, Severity};
use crate::fence::gateway;
use crate::policy::{Policy, SidecarPorts};

fn config(activity: &'static str) -> Event {
    Event::new(Class::Config, activity, Severity::Info)
}

/// The policy's files are about to be read.
pub fn loading(args: &RunArgs) {
    event::inform(|| {
        let name = |path: &Option<std::path::PathBuf>| {
            path.as_deref().map_or_else(|| "none".to_owned(), |path| path.display().to_string())
        };
        config("LOADING")
            .subject("the policy from local files")
            .field("rules", name(&args.policy_rules))
            .field("data", name(&args.policy_data))
    });
}

/// The policy may be enforced.
pub fn validated(files: &PolicyFiles, policy: &Policy) {
    event::inform(|| {
        config("VALIDATED")
            .subject("the policy")
            .field("digest", files.digest())
            .field("engine", policy.engine())
            .field("binaries", if policy.names_binaries() { "named" } else { "any" })
    });
}

/// The namespaces are about to be made.
pub fn creating() {
    event::inform(|| config("CREATING").subject("the gateway's and the fence's network namespace"));
}

/// The namespaces stand and were read back.
pub fn created((device, inode): (u64, u64)) {
    event::inform(|| {
        config("CREATED")
            .subject("network namespace")
            .field("gateway", gateway::GATEWAY)
            .field("agent", gateway::AGENT)
            .field("ns", format!("{device}:{inode}"))
    });
}

/// The proxy has its listeners.
pub fn listening(sidecars: &SidecarPorts) {
    event::inform(|| {
        let event = Event::new(Class::Net, "LISTEN", Severity::Info)
            .subject(format!("{}:{}", gateway::GATEWAY, gateway::PROXY_PORT))
            .field("by", "proxy");
        if sidecars.is_empty() { event } else { event.field("sidecars", sidecars) }
    });
}

/// The proxy has made its CA, and the agent can find the certificate.
pub fn tls_enabled(ca: &Path) {
    event::inform(|| {
        config("ENABLED").subject("TLS termination: ephemeral CA made").field("ca", ca.display())
    });
}

/// Landlock is what it is, and the domain is on; so many of its rules are for volumes.
pub fn confined(confinement: &Confinement, hard: bool, volumes: usize) {
    event::inform(|| {
        let seen = if confinement.abi > 0 { "available" } else { "not available" };
        config("PROBED")
            .subject(format!("landlock is {seen}"))
            .field("abi", confinement.abi)
            .field("compatibility", if hard { "hard_requirement" } else { "best_effort" })
    });
    event::inform(|| {
        config("BUILT")
            .subject("landlock domain")
            .field("abi", confinement.abi)
            .field("rules", confinement.applied)
            .field("skipped", confinement.skipped.len())
            .field("volumes", volumes)
    });
}

/// The agent runs.
pub fn launched(command: &[String], pid: Pid, user: &User) {
    event::inform(|| {
        Event::new(Class::Proc, "LAUNCH", Severity::Info)
            .subject(command.join(" "))
            .field("pid", pid.as_raw_nonzero())
            .field("uid", user.identity.uid)
    });
}

/// The agent has ended, and all that was made for it is gone or goes with this process.
pub fn cleaned_up() {
    event::inform(|| config("CLEANED_UP").subject("network namespace and run directory"));
}

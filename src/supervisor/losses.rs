//! What a fence lacks for want of a capability or of a newer kernel, said once at start: each loss
//! by its name, and what to do about it.

use super::keeper::Confinement;
use super::sockets::Sockets;
use crate::event::{self, Class, Event, Severity};

/// Emits an event for each loss.
pub fn report(confinement: &Confinement, sockets: Option<&Sockets>) {
    for event in losses(confinement, sockets) {
        event::emit(&event);
    }
}

fn losses(confinement: &Confinement, sockets: Option<&Sockets>) -> Vec<Event> {
    let mut events = Vec::new();
    let mut lost = |severity, what: String| {
        events.push(Event::new(Class::Config, "DEGRADED", severity).subject(what));
    };
    if !confinement.bounding {
        lost(
            Severity::Medium,
            "CAP_SETPCAP is not granted: the agent's bounding set is not emptied and its \
             securebits are not locked; no_new_privs and its four other sets, which are empty, keep \
             it from gaining anything: add SETPCAP to the container's securityContext.capabilities"
                .to_owned(),
        );
    }
    if let Some(why) = &confinement.keyring {
        lost(
            Severity::Info,
            format!(
                "the agent has no session keyring of its own ({why}); its filter refuses all use of keyrings"
            ),
        );
    }
    for erratum in &confinement.errata {
        lost(Severity::Info, format!("landlock: fault of this kernel: {erratum}"));
    }
    if let Some(sockets) = sockets {
        for socket in &sockets.found {
            lost(
                Severity::Medium,
                format!(
                    "{} is a unix socket in a volume: this kernel cannot keep the agent from it, \
                     only its mode can",
                    socket.display()
                ),
            );
        }
        if let Some(unseen) = &sockets.unseen {
            lost(
                Severity::Info,
                format!("not all volumes were searched for unix sockets: {unseen}"),
            );
        }
    }
    events
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::Level;
    use crate::policy::{Memfd, ProcessLimits};

    #[test]
    fn each_loss_is_told_and_nothing_else() {
        let mut confinement = Confinement {
            abi: 7,
            applied: 3,
            skipped: Vec::new(),
            missing: None,
            unconfined: false,
            scopes: true,
            rights: 16,
            errata: Vec::new(),
            bounding: true,
            keyring: None,
            memfd: Memfd::Deny,
            limits: ProcessLimits::default(),
        };
        assert!(losses(&confinement, None).is_empty());
        assert!(losses(&confinement, Some(&Sockets::default())).is_empty());
        confinement.bounding = false;
        confinement.keyring = Some("EPERM".into());
        confinement.errata = vec!["3: x".into()];
        let sockets =
            Sockets { found: vec!["/a".into(), "/b".into()], unseen: Some("/c: too deep".into()) };
        let events = losses(&confinement, Some(&sockets));
        assert_eq!(events.len(), 6);
        // What weakens the fence is said at every level.
        assert_eq!(events.iter().filter(|event| event.passes(Level::Error)).count(), 3);
    }
}

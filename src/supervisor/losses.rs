//! What a fence lacks for want of a capability or of a newer kernel, said once at start: each loss
//! by its name, and what to do about it.

use super::identity::User;
use super::keeper::Confinement;
use super::sockets::Sockets;
use crate::event::{self, Class, Event, Severity};

/// What the losses are read from.
#[derive(Debug)]
pub struct Losses<'a> {
    /// The agent's user: what was not as asked.
    pub user: &'a User,
    /// The packet rules; else why they are missing.
    pub rules: &'a Result<(), String>,
    /// The pod's network settings; else why the fence does not have them.
    pub sysctls: &'a Result<(), String>,
    /// The fence's programs know a name server that they reach; else why not.
    pub resolv_conf: &'a Result<(), String>,
    /// What the keeper could have.
    pub confinement: &'a Confinement,
    /// Unix sockets in volumes, where they were looked for.
    pub sockets: Option<&'a Sockets>,
}

impl Losses<'_> {
    /// Emits an event for each loss.
    pub fn report(&self) {
        for event in self.events() {
            event::emit(&event);
        }
    }

    fn events(&self) -> Vec<Event> {
        let mut events = Vec::new();
        let mut lost = |severity, what: String| {
            events.push(Event::new(Class::Config, "DEGRADED", severity).subject(what));
        };
        for note in &self.user.notes {
            lost(Severity::Low, note.clone());
        }
        if let Err(why) = self.rules {
            lost(
                Severity::High,
                format!(
                    "packet rules are missing: nothing leaves the fence, but what is refused may hang: {why}"
                ),
            );
        }
        if let Err(why) = self.sysctls {
            lost(
                Severity::Low,
                format!(
                    "the fence does not have the pod's network settings (low ports among them): {why}"
                ),
            );
        }
        if let Err(why) = self.resolv_conf {
            lost(
                Severity::Low,
                format!(
                    "names resolve only through the proxy: the pod's name servers have IPv6 \
                     addresses, which the fence has not, and its own could not be named in \
                     /etc/resolv.conf: {why}"
                ),
            );
        }
        landlock(self.confinement, &mut lost);
        kernel(self.confinement, &mut lost);
        if let Some(sockets) = self.sockets {
            volumes(sockets, &mut lost);
        }
        events
    }
}

fn landlock(confinement: &Confinement, lost: &mut impl FnMut(Severity, String)) {
    if let Some(missing) = &confinement.missing {
        let severity = if confinement.unconfined { Severity::High } else { Severity::Low };
        lost(severity, format!("landlock: {missing}"));
    }
    for (path, why) in &confinement.skipped {
        lost(Severity::Low, format!("landlock: left out {}: {why}", path.display()));
    }
    for erratum in &confinement.errata {
        lost(Severity::Info, format!("landlock: fault of this kernel: {erratum}"));
    }
}

fn kernel(confinement: &Confinement, lost: &mut impl FnMut(Severity, String)) {
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
}

fn volumes(sockets: &Sockets, lost: &mut impl FnMut(Severity, String)) {
    for socket in &sockets.found {
        lost(
            Severity::Medium,
            format!(
                "{} is a unix socket in a volume: this kernel cannot keep the agent from it, only \
                 its mode can",
                socket.display()
            ),
        );
    }
    if let Some(unseen) = &sockets.unseen {
        lost(Severity::Medium, format!("not all volumes were searched for unix sockets: {unseen}"));
    }
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
        let identity = crate::fence::credentials::Identity { uid: 1, gid: 1, groups: vec![] };
        let mut user = User { identity, name: None, home: "/".into(), notes: vec![] };
        let fine = Ok(());
        let none = |confinement, user, sockets| {
            let (rules, sysctls, resolv_conf) = (&fine, &fine, &fine);
            Losses { user, rules, sysctls, resolv_conf, confinement, sockets }.events()
        };
        assert!(none(&confinement, &user, None).is_empty());
        assert!(none(&confinement, &user, Some(&Sockets::default())).is_empty());
        confinement.bounding = false;
        confinement.keyring = Some("EPERM".into());
        confinement.errata = vec!["3: x".into()];
        user.notes.push("another user".into());
        let sockets =
            Sockets { found: vec!["/a".into(), "/b".into()], unseen: Some("/c: too deep".into()) };
        let lost = Err("EPERM".to_owned());
        let losses = Losses {
            user: &user,
            rules: &lost,
            sysctls: &lost,
            resolv_conf: &lost,
            confinement: &confinement,
            sockets: Some(&sockets),
        };
        let events = losses.events();
        assert_eq!(events.len(), 10);
        // What weakens the fence is said at every level.
        assert_eq!(events.iter().filter(|event| event.passes(Level::Error)).count(), 5);
    }
}

//! Whether API servers can trust what is served: what `/readyz` says.

use tokio::sync::watch;

use crate::pki::ca_bundle::CaBundleError;

/// Ready, or why not.
pub(super) type Sender = watch::Sender<Result<(), String>>;

/// States it after one look at every configuration; true when all of them can. `hint` is added for a
/// person, where what is wrong does not mend itself.
pub(super) fn state(
    trust: &Sender,
    looks: impl IntoIterator<Item = Result<(), CaBundleError>>,
    hint: &str,
) -> bool {
    let (mut right, mut state) = (true, Ok(()));
    for look in looks {
        let Err(error) = look else { continue };
        right = false;
        // That it could not be read says nothing about what it holds: once ready, a replica stays so
        // while the API server is away.
        let unknown = matches!(error, CaBundleError::Read { .. });
        if !(unknown && trust.borrow().is_ok()) {
            state = Err(format!("{error}{}", if unknown { "" } else { hint }));
        }
    }
    trust.send_if_modified(|known| {
        let changed = *known != state;
        if changed {
            match &state {
                Ok(()) => tracing::info!("ready"),
                Err(why) => tracing::warn!(%why, "not ready"),
            }
            known.clone_from(&state);
        }
        changed
    });
    right
}

//! `docs/clients.md`.

use std::collections::BTreeMap;

use crate::Result;
use crate::rig::Rig;

/// What a test saw that the page shows.
#[derive(Default)]
pub struct Seen {
    /// The line by which the client tells its user.
    pub line: String,
}

pub fn check_rows() {}
pub fn write(_: &Rig, _: &BTreeMap<String, Result<Seen>>) {}

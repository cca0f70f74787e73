//! `docs/clients.md`: written from the table and from what was seen. What the table says must be on
//! the page at each run; versions and messages are those of the machine that wrote it.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;

use crate::rig::Rig;
use crate::table::{CLIENTS, Client, Finds};
use crate::{Kind, Not, Result, Test};

const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/clients.md");
const HEAD: &str = include_str!("page.md");
/// Cells of a row that come from the table; those behind were seen.
const FIXED: usize = 5;

/// What a test saw that the page shows.
#[derive(Default)]
pub struct Seen {
    /// The line by which the client tells its user.
    pub line: String,
}

/// Panics where the page has not what the table has.
pub fn check() {
    let page = fs::read_to_string(PAGE).unwrap_or_default();
    let current = fixed(&page) == fixed(&render(|_| [String::new(), String::new()]));
    assert!(current, "docs/clients.md is not the table: run with `-- --write-docs`");
}

/// Writes the page.
pub fn write(rig: &Rig, results: &BTreeMap<String, Result<Seen>>) {
    let page = render(|client| {
        let version = rig.run(client.version, &[]).stdout;
        let version = version.lines().next().unwrap_or_default().to_owned();
        let refused = Test { client, kind: Kind::Refused };
        let line = match &results[&refused.name()] {
            Ok(seen) => format!("`{}`", shortened(&seen.line)),
            Err(Not::Here(why)) => format!("SKIPPED: {why}"),
            Err(Not::Right(_)) => "FAILED".to_owned(),
        };
        [version, line]
    });
    fs::write(PAGE, page).expect("written");
}

fn render(seen: impl Fn(&Client) -> [String; 2]) -> String {
    let mut page = HEAD.to_owned();
    for client in CLIENTS {
        let finds = match client.finds {
            Finds::Proxy(name) => format!("`{name}`"),
            Finds::Nothing => "is caught".to_owned(),
        };
        let trusts = format!("`{}`", client.trusts);
        let cells = [client.name, &finds, &trusts, client.works.what, client.refused.what];
        let cells = cells.map(str::to_owned).into_iter().chain(seen(client));
        // A cell must not end one.
        let cells: Vec<_> =
            cells.map(|cell| cell.replace('|', "/").replace(char::is_control, "")).collect();
        writeln!(page, "| {} |", cells.join(" | ")).expect("to a string");
    }
    page
}

/// The page without what was seen.
fn fixed(page: &str) -> String {
    let line = |line: &str| match line.strip_prefix("| ") {
        Some(row) => row.split(" | ").take(FIXED).collect::<Vec<_>>().join(" | "),
        None => line.to_owned(),
    };
    page.lines().map(line).collect::<Vec<_>>().join("\n")
}

/// Long lines are about the policy, which the log has as well.
fn shortened(line: &str) -> String {
    const MOST: usize = 250;
    match line.char_indices().nth(MOST) {
        Some((end, _)) => format!("{} …", &line[..end]),
        None => line.to_owned(),
    }
}

//! The table in words: errno names, and the page `docs/escape.md`.

use std::collections::BTreeMap;
use std::fmt::{self, Write};

use super::{Expect, Layer, Need, Row, Seen, table};

/// The name of an errno that the table speaks of; other ones by number.
#[must_use]
pub fn errno_name(errno: i32) -> String {
    let name = match errno {
        libc::EPERM => "EPERM",
        libc::ENOENT => "ENOENT",
        libc::ESRCH => "ESRCH",
        libc::EINTR => "EINTR",
        libc::EIO => "EIO",
        libc::ENXIO => "ENXIO",
        libc::ENOEXEC => "ENOEXEC",
        libc::EBADF => "EBADF",
        libc::EAGAIN => "EAGAIN",
        libc::ENOMEM => "ENOMEM",
        libc::EACCES => "EACCES",
        libc::EFAULT => "EFAULT",
        libc::EBUSY => "EBUSY",
        libc::EEXIST => "EEXIST",
        libc::EXDEV => "EXDEV",
        libc::ENODEV => "ENODEV",
        libc::ENOTDIR => "ENOTDIR",
        libc::EISDIR => "EISDIR",
        libc::EINVAL => "EINVAL",
        libc::ENOTTY => "ENOTTY",
        libc::ETXTBSY => "ETXTBSY",
        libc::ENOSPC => "ENOSPC",
        libc::EROFS => "EROFS",
        libc::EPIPE => "EPIPE",
        libc::ENOSYS => "ENOSYS",
        libc::ENOTSOCK => "ENOTSOCK",
        libc::ENOPROTOOPT => "ENOPROTOOPT",
        libc::EPROTONOSUPPORT => "EPROTONOSUPPORT",
        libc::ESOCKTNOSUPPORT => "ESOCKTNOSUPPORT",
        libc::EOPNOTSUPP => "EOPNOTSUPP",
        libc::EAFNOSUPPORT => "EAFNOSUPPORT",
        libc::EADDRNOTAVAIL => "EADDRNOTAVAIL",
        libc::ENETUNREACH => "ENETUNREACH",
        libc::ECONNRESET => "ECONNRESET",
        libc::ECONNREFUSED => "ECONNREFUSED",
        libc::ETIMEDOUT => "ETIMEDOUT",
        libc::EHOSTUNREACH => "EHOSTUNREACH",
        other => return format!("errno {other}"),
    };
    name.to_owned()
}

/// Text as it may be shown on a terminal: what is not plain ASCII is escaped.
pub(crate) fn plain(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars() {
        if c == ' ' || c.is_ascii_graphic() { out.push(c) } else { out.extend(c.escape_default()) }
    }
    out
}

impl fmt::Display for Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Network => "network",
            Self::Proxy => "proxy",
            Self::Landlock => "landlock",
            Self::Credentials => "credentials",
            Self::Seccomp => "seccomp",
            Self::Hygiene => "hygiene",
            Self::Kernel => "kernel",
        })
    }
}

impl fmt::Display for Expect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Errno(errno) => f.write_str(&errno_name(*errno)),
            Self::Status(status) => write!(f, "status {status}"),
            Self::Rcode(3) => f.write_str("NXDOMAIN"),
            Self::Rcode(code) => write!(f, "DNS code {code}"),
            Self::Holds => f.write_str("holds"),
        }
    }
}

impl fmt::Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Errno(errno) => Expect::Errno(*errno).fmt(f),
            Self::Status(status) => Expect::Status(*status).fmt(f),
            Self::Rcode(code) => Expect::Rcode(*code).fmt(f),
            Self::Holds => Expect::Holds.fmt(f),
            Self::Worked => f.write_str("it worked"),
            // What an attempt met is not printed raw: some of it is another's to choose.
            Self::Broken(what) => f.write_str(&plain(what)),
            Self::Skipped(why) => write!(f, "skipped: {}", plain(why)),
        }
    }
}

impl fmt::Display for Need {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::X86_64 => f.write_str("x86-64"),
            Self::Landlock(abi) => write!(f, "Landlock ABI {abi}"),
        }
    }
}

impl Row {
    /// What must come back, in words.
    #[must_use]
    pub fn expected(&self) -> String {
        let words: Vec<String> = self.expect.iter().map(ToString::to_string).collect();
        words.join(" or ")
    }
}

/// The page that lists the rows.
#[must_use]
pub fn document() -> String {
    let mut page = String::from(
        "# The escape table\n\n\
         Written from the table in `src/fence/attempts` by `tests/escape`, which also checks that \
         it is\ncurrent: `cargo test --test escape -- --write-docs`.\n\n\
         Each row is a real attempt from inside the fence. *layer* is what guards it, *also* what \
         refuses it\nwhen that layer is switched off. The test sees each row fail with all of these \
         switched off, where\nthe machine has what the row is about; it names the rows that it could \
         not try. What has `kernel`\namong them is refused with no fence at all. *mistake* counts the \
         classic mistakes of other\nsandboxes that this project was built against.\n",
    );
    let mut layers: BTreeMap<Layer, Vec<&Row>> = BTreeMap::new();
    for row in table() {
        layers.entry(row.layer).or_default().push(row);
    }
    let total: usize = layers.values().map(Vec::len).sum();
    // Writing to a string cannot fail.
    let _ = writeln!(page, "\n{total} rows.");
    for (layer, rows) in layers {
        let _ = writeln!(
            page,
            "\n## {layer} ({})\n\n| row | what is tried | must come back | also | mistake | needs |\n\
             |---|---|---|---|---|---|",
            rows.len()
        );
        for row in rows {
            let also: Vec<String> = row.also.iter().map(ToString::to_string).collect();
            let _ = writeln!(
                page,
                "| {} | {} | {} | {} | {} | {} |",
                row.id,
                row.what.replace('|', "\\|"),
                row.expected(),
                also.join(", "),
                row.mistake.map(|number| number.to_string()).unwrap_or_default(),
                row.need.map(|need| need.to_string()).unwrap_or_default(),
            );
        }
    }
    page
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_for_what_came_back() {
        assert_eq!(Seen::Errno(libc::EPERM).to_string(), "EPERM");
        assert_eq!(Seen::Errno(9999).to_string(), "errno 9999");
        assert_eq!(Seen::Rcode(3).to_string(), "NXDOMAIN");
        assert_eq!(Seen::Broken("a\u{1b}[31m".into()).to_string(), "a\\u{1b}[31m");
    }

    #[test]
    fn every_row_is_on_the_page() {
        let page = document();
        for row in table() {
            assert!(page.contains(&format!("| {} |", row.id)), "{}", row.id);
        }
    }
}

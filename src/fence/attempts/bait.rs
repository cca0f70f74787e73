//! A bait: files that lie open to everybody, outside of what the policy opens. Whatever is refused
//! there, only Landlock can have refused.

use std::fs;
use std::path::Path;

use super::Attempt::Bait;
use super::Layer::Landlock;
use super::Need::Landlock as Abi;
use super::files::{in_scratch, mknod_at, opened, skipped};
use super::{Context, EACCES, Expect, Row, Seen, raw};

/// A file that everybody may read and write.
pub const FILE: &str = "file";
/// An empty one, there to be removed.
pub const REMOVED: &str = "to-remove";
/// A script that everybody may execute.
pub const PROGRAM: &str = "program";
/// A unix socket that listens.
pub const SOCKET: &str = "socket";

/// Something done to the bait.
#[derive(Clone, Copy, Debug)]
pub(super) enum Deed {
    Read,
    Write,
    Truncate,
    List,
    Create,
    MakeDirectory,
    MakeFifo,
    MakeSocket,
    MakeLink,
    Remove,
    Execute,
    MoveOut,
    MoveIn,
    LinkOut,
    LinkIn,
    ThroughLink,
    Connect,
}

/// The kernel says EXDEV itself between two mounts.
const NOT_ACROSS: &[Expect] = &[Expect::Errno(libc::EACCES), Expect::Errno(libc::EXDEV)];

const fn by_bait(id: &'static str, what: &'static str, deed: Deed) -> Row {
    Row::new(id, Landlock, EACCES, what, Bait(deed))
}

pub(super) const ROWS: &[Row] = &[
    by_bait("file-read", "reading what everybody may read", Deed::Read),
    by_bait("file-write", "writing what everybody may write", Deed::Write),
    by_bait("file-truncate", "emptying it (truncate(2))", Deed::Truncate).need(Abi(3)),
    by_bait("file-list", "listing what everybody may list", Deed::List),
    by_bait("file-create", "a file in an open directory", Deed::Create),
    by_bait("file-mkdir", "a directory there", Deed::MakeDirectory),
    by_bait("file-mkfifo", "a named pipe there", Deed::MakeFifo),
    by_bait("file-mksocket", "a unix socket there", Deed::MakeSocket),
    by_bait("file-symlink", "a symbolic link there", Deed::MakeLink),
    by_bait("file-remove", "removing a file there", Deed::Remove),
    by_bait("file-execute", "executing a program there", Deed::Execute),
    by_bait("file-through-link", "reading it through a link of the agent's own", Deed::ThroughLink)
        .mistake(11),
    Row::new(
        "file-move-out",
        Landlock,
        NOT_ACROSS,
        "moving it into the agent's directory",
        Bait(Deed::MoveOut),
    ),
    Row::new(
        "file-move-in",
        Landlock,
        NOT_ACROSS,
        "moving the agent's file there",
        Bait(Deed::MoveIn),
    ),
    Row::new(
        "file-link-out",
        Landlock,
        NOT_ACROSS,
        "a hard link to it in the agent's directory",
        Bait(Deed::LinkOut),
    ),
    Row::new(
        "file-link-in",
        Landlock,
        NOT_ACROSS,
        "a hard link to the agent's file there",
        Bait(Deed::LinkIn),
    ),
    Row::new(
        "unix-socket-by-path",
        Landlock,
        EACCES,
        "connecting to a unix socket that lies in a volume",
        Bait(Deed::Connect),
    )
    .need(Abi(9))
    .mistake(16),
];

pub(super) fn attempt(deed: Deed, context: &Context) -> Seen {
    let Some(directory) = context.facts.bait.as_ref().map(Path::new) else {
        return skipped("no bait was laid");
    };
    if opened(context, directory, false) {
        return skipped("the policy opens the run directory");
    }
    let file = directory.join(FILE);
    let new = directory.join(format!("new-{}", std::process::id()));
    let c_path = |path: &Path| {
        use std::os::unix::ffi::OsStrExt;
        std::ffi::CString::new(path.as_os_str().as_bytes()).unwrap_or_default()
    };
    let seen = match deed {
        Deed::Read => raw::seen_io(fs::read(&file)),
        Deed::Write => raw::seen_io(fs::OpenOptions::new().write(true).open(&file)),
        Deed::Truncate => {
            let path = c_path(&file);
            raw::seen(raw::call(libc::SYS_truncate, [path.as_ptr() as u64, 0, 0, 0, 0, 0]))
        }
        Deed::List => raw::seen_io(fs::read_dir(directory)),
        Deed::Create => raw::seen_io(fs::File::create_new(&new)),
        Deed::MakeDirectory => raw::seen_io(fs::create_dir(&new)),
        Deed::MakeFifo => raw::seen(mknod_at(&new, libc::S_IFIFO, 0)),
        Deed::MakeSocket => raw::seen_io(std::os::unix::net::UnixListener::bind(&new)),
        Deed::MakeLink => raw::seen_io(std::os::unix::fs::symlink("/", &new)),
        // A file of its own, so that the bait stays for the next rows.
        Deed::Remove => raw::seen_io(fs::remove_file(directory.join(REMOVED))),
        Deed::Execute => raw::seen_io(std::process::Command::new(directory.join(PROGRAM)).status()),
        Deed::MoveOut => in_scratch(context, |path| {
            let moved = fs::rename(&file, path);
            if moved.is_ok() {
                let _ = fs::rename(path, &file);
            }
            raw::seen_io(moved)
        }),
        Deed::MoveIn => in_scratch(context, |path| {
            let made = fs::File::create_new(path);
            raw::seen_io(made.and_then(|_| fs::rename(path, &new)))
        }),
        Deed::LinkOut => in_scratch(context, |path| raw::seen_io(fs::hard_link(&file, path))),
        Deed::LinkIn => in_scratch(context, |path| {
            let made = fs::File::create_new(path);
            raw::seen_io(made.and_then(|_| fs::hard_link(path, &new)))
        }),
        Deed::ThroughLink => in_scratch(context, |path| {
            let made = std::os::unix::fs::symlink(&file, path);
            raw::seen_io(made.and_then(|()| fs::read(path)))
        }),
        Deed::Connect => {
            raw::seen_io(std::os::unix::net::UnixStream::connect(directory.join(SOCKET)))
        }
    };
    let _ = fs::remove_file(&new);
    let _ = fs::remove_dir(&new);
    seen
}

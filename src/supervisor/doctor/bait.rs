//! What is put outside the fence for the attempts to reach for: so that a row fails when its layer
//! is not there, rather than because there is nothing.

use std::fs::{self, DirBuilder, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::net::TcpListener;
use std::os::fd::AsRawFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::fence::attempts::{Facts, bait};
use crate::fence::credentials::{self, Bounding, Identity};
use crate::fence::netns;
use crate::fence::spawn::{self, Forked};

/// Files, sockets; gone when dropped.
#[derive(Debug)]
pub struct Bait {
    directory: PathBuf,
    /// Listening, and never answered.
    _sockets: (UnixListener, UnixListener, TcpListener),
}

impl Bait {
    /// Lays it below `base`, which must be root's own, and adds it to the facts.
    pub fn lay(base: &Path, facts: &mut Facts) -> Result<Self> {
        let meta = fs::symlink_metadata(base)
            .with_context(|| format!("cannot look at {}", base.display()))?;
        ensure!(
            meta.is_dir() && meta.uid() == 0 && meta.mode() & 0o022 == 0,
            "{} is not a directory that only root may write",
            base.display()
        );
        let name = format!("doctor-{}", std::process::id());
        let directory = base.join(&name);
        let mut lay = || -> io::Result<Self> {
            DirBuilder::new().mode(0o700).create(&directory)?;
            let file = |name: &str, mode, text: &str| -> io::Result<()> {
                let path = directory.join(name);
                let mut file =
                    OpenOptions::new().write(true).create_new(true).mode(mode).open(&path)?;
                file.write_all(text.as_bytes())?;
                // Whatever the umask was.
                file.set_permissions(Permissions::from_mode(mode))
            };
            file(bait::FILE, 0o666, "bait\n")?;
            file(bait::REMOVED, 0o666, "")?;
            file(bait::PROGRAM, 0o755, "#!/bin/sh\nexit 0\n")?;
            let by_path = UnixListener::bind(directory.join(bait::SOCKET))?;
            let everybody = Permissions::from_mode(0o777);
            fs::set_permissions(directory.join(bait::SOCKET), everybody.clone())?;
            let abstract_name = SocketAddr::from_abstract_name(format!("ringfence-{name}"))?;
            let by_name = UnixListener::bind_addr(&abstract_name)?;
            let tcp = TcpListener::bind("127.0.0.1:0")?;
            facts.loopback_port = Some(tcp.local_addr()?.port());
            // Last: from here on others could put something in its place.
            fs::set_permissions(&directory, everybody)?;
            Ok(Self { directory: directory.clone(), _sockets: (by_path, by_name, tcp) })
        };
        let laid = lay().inspect_err(|_| drop(fs::remove_dir_all(&directory)));
        let laid = laid.with_context(|| format!("cannot lay bait in {}", directory.display()))?;
        facts.bait = Some(directory.to_string_lossy().into_owned());
        facts.abstract_name = Some(format!("ringfence-{name}"));
        Ok(laid)
    }
}

impl Drop for Bait {
    fn drop(&mut self) {
        drop(fs::remove_dir_all(&self.directory));
    }
}

/// Starts a process of the agent's user outside of the fence, and adds it to the facts. It ends
/// with this one. Where this process lacks the capabilities for that, there is none.
///
/// This process must have one thread.
pub fn start_neighbour(facts: &mut Facts) -> Result<()> {
    let (uid, gid, groups) = facts.identity.clone();
    let identity = Identity { uid, gid, groups };
    let (mut ready, told) = io::pipe().context("cannot make a pipe")?;
    let parent = rustix::process::getpid();
    match spawn::fork().context("cannot fork")? {
        Forked::Parent(pid) => {
            drop(told);
            let is_ready = ready.read_exact(&mut [0]).is_ok();
            facts.neighbour = is_ready.then(|| pid.as_raw_nonzero().get());
            Ok(())
        }
        Forked::Child => {
            let become_one = || -> Option<()> {
                // It is the agent's user from here on, and has nothing that the agent may not.
                spawn::place(told.as_raw_fd(), 0).ok()?;
                spawn::close_range(1, u32::MAX, 0).ok()?;
                // Were it taken over all the same, it would be of no use.
                netns::unshare().ok()?;
                credentials::no_new_privs().ok()?;
                credentials::drop_to(&identity, Bounding::IfPermitted).ok()?;
                credentials::parent_death_signal_kill(Some(parent)).ok()?;
                // As a program of that user is, once executed.
                let dumpable = rustix::process::DumpableBehavior::Dumpable;
                rustix::process::set_dumpable_behavior(dumpable).ok()?;
                rustix::io::write(rustix::stdio::stdin(), b"r").ok().map(drop)
            };
            if become_one().is_none() {
                spawn::exit_now(1);
            }
            loop {
                std::thread::sleep(std::time::Duration::from_secs(60));
            }
        }
    }
}

//! Makes the attempts, each in a forked child of its own and with a time limit: none can change
//! what the next one meets, and one that crashes or hangs is one row that failed.

use std::fs::File;
use std::io::{Read, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{
    Pid, Signal, WaitOptions, kill_process, kill_process_group, setpgid, waitpid,
};

use super::hygiene::Start;
use super::{Attempt, Facts, Row, Seen, bait, files, network, processes, proxy, raw};
use crate::fence::spawn::{Forked, exit_now, fork};

/// How long one attempt may take. The longest that is expected is a name that is not resolved.
const LIMIT: Duration = Duration::from_secs(15);

/// What an attempt may look at.
#[derive(Debug)]
pub struct Context {
    /// What the fence is meant to be.
    pub facts: Facts,
    /// What this process was started with.
    pub(super) start: Start,
}

impl Context {
    /// Looks at what this process was started with: before it opens anything.
    #[must_use]
    pub fn new(facts: Facts) -> Self {
        Self { start: Start::look(), facts }
    }
}

/// Makes one attempt. The calling process must have one thread.
#[must_use]
pub fn run(row: &Row, context: &Context) -> Seen {
    if let Some(why) = row.unmet() {
        return Seen::Skipped(why);
    }
    in_child(row, context).unwrap_or_else(|errno| Seen::Broken(format!("cannot be tried: {errno}")))
}

fn in_child(row: &Row, context: &Context) -> rustix::io::Result<Seen> {
    let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
    match fork()? {
        Forked::Child => {
            // A group of its own, so that what it leaves behind can be ended.
            let _ = setpgid(None, None);
            drop(read);
            let seen = catch_unwind(AssertUnwindSafe(|| attempt(row, context)))
                .unwrap_or_else(|_| Seen::Broken("the attempt panicked".to_owned()));
            let told = serde_json::to_vec(&seen)
                .is_ok_and(|json| File::from(write).write_all(&json).is_ok());
            exit_now(i32::from(!told))
        }
        Forked::Parent(pid) => {
            drop(write);
            let seen = hear(File::from(read));
            let _ = kill_process_group(pid, Signal::KILL);
            let _ = kill_process(pid, Signal::KILL);
            let ended = wait(pid)?;
            Ok(seen.unwrap_or_else(|why| Seen::Broken(format!("{why}; {ended}"))))
        }
    }
}

/// What the child says until its end of the pipe is closed.
fn hear(mut pipe: File) -> Result<Seen, String> {
    let until = Instant::now() + LIMIT;
    let mut json = Vec::new();
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let left = Timespec {
            tv_sec: left.as_secs().try_into().unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        };
        match poll(&mut [PollFd::new(&pipe, PollFlags::IN)], Some(&left)) {
            Ok(0) => return Err(format!("no answer after {} s", LIMIT.as_secs())),
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(errno) => return Err(errno.to_string()),
        }
        let mut bytes = [0; 4096];
        match pipe.read(&mut bytes) {
            Ok(0) => break,
            Ok(count) => json.extend_from_slice(&bytes[..count]),
            Err(error) => return Err(error.to_string()),
        }
    }
    if json.is_empty() {
        return Err("no answer".to_owned());
    }
    serde_json::from_slice(&json).map_err(|error| error.to_string())
}

fn wait(pid: Pid) -> rustix::io::Result<String> {
    loop {
        match waitpid(Some(pid), WaitOptions::empty()) {
            Err(Errno::INTR) | Ok(None) => {}
            Err(errno) => return Err(errno),
            Ok(Some((_, status))) => {
                return Ok(match (status.exit_status(), status.terminating_signal()) {
                    (Some(code), _) => format!("ended with {code}"),
                    (_, Some(signal)) => format!("ended by signal {signal}"),
                    _ => "stopped".to_owned(),
                });
            }
        }
    }
}

fn attempt(row: &Row, context: &Context) -> Seen {
    match row.attempt {
        Attempt::Call(nr, args) => raw::seen(raw::call(nr, args)),
        Attempt::Clone(flags) => raw::clone(flags),
        Attempt::Do(function) => function(context),
        Attempt::Tcp(ip, port) => network::tcp((ip, port).into()),
        Attempt::Tcp6(ip, port) => network::tcp((ip, port).into()),
        Attempt::Udp(ip, port) => network::udp((ip, port).into()),
        Attempt::Udp6(ip, port) => network::udp((ip, port).into()),
        Attempt::Ask(request) => proxy::ask(request.as_bytes()),
        Attempt::Open(path, flags) => files::open(row.layer, path, flags, context),
        Attempt::Bait(deed) => bait::attempt(deed, context),
        Attempt::Process(target, deed) => processes::attempt(target, deed, context),
    }
}

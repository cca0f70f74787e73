//! A test of the table: a row that passes with its layer switched off says nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use ringfence::fence::attempts::{self, Facts, Layer, Row, Seen, Verdict};
use ringfence::supervisor::doctor::Bait;
use rustix::thread::CapabilitySet;

use super::{AGENT, Rig, fence, open_world};

/// What these fences open: the base of every fence.
const OPENED: [(&str, bool); 14] = [
    // First, since the agent's own files are made in the first one: on the bait's file system.
    ("/mnt/scratch", true),
    ("/tmp", true),
    ("/dev/null", true),
    ("/usr", false),
    ("/lib", false),
    ("/lib64", false),
    ("/bin", false),
    ("/sbin", false),
    ("/etc", false),
    ("/var/log", false),
    ("/proc", false),
    ("/dev/urandom", false),
    ("/mnt/bin/probe", false),
    ("/mnt/run/self-test/tls", false),
];
const RUN_DIR: &str = "/mnt/run/self-test";
pub const PROXY: u32 = 65_530;

/// Bait and neighbours, for as long as a test runs.
struct World {
    facts: Facts,
    _bait: Bait,
    _enter: std::os::unix::net::UnixListener,
}

impl World {
    fn new(rig: &Rig, off: &BTreeSet<Layer>) -> Result<Self, String> {
        drop(fs::remove_dir_all(RUN_DIR));
        let dir = Path::new(RUN_DIR);
        let make = || -> std::io::Result<()> {
            for (name, mode) in [("", 0o755), ("root", 0o700), ("tls", 0o755)] {
                fs::create_dir(dir.join(name))?;
                fs::set_permissions(dir.join(name), fs::Permissions::from_mode(mode))?;
            }
            fs::write(dir.join("root/attestation.json"), "{}")?;
            if off.contains(&Layer::Hygiene) {
                fs::write(dir.join("tls/left"), "-----BEGIN PRIVATE KEY-----")?;
            }
            fs::write(dir.join("tls/ca.pem"), "-----BEGIN CERTIFICATE-----")
        };
        make().map_err(|error| error.to_string())?;
        let enter = seqpacket(&dir.join("root/enter.sock")).map_err(|error| error.to_string())?;
        let mut facts = Facts {
            identity: (AGENT, AGENT, vec![AGENT + 1]),
            opened: OPENED.map(|(path, write)| (path.to_owned(), write)).to_vec(),
            // The fence's: one that no process here is in.
            namespace: Some((0, 0)),
            run_dir: Some(RUN_DIR.to_owned()),
            supervisor: rig.supervisor.to_str().map(str::to_owned),
            neighbour: rig.neighbour,
            ..Facts::default()
        };
        let bait = Bait::lay(Path::new("/mnt/run"), &mut facts).map_err(|e| format!("{e:#}"))?;
        Ok(Self { facts, _bait: bait, _enter: enter })
    }
}

fn seqpacket(path: &Path) -> std::io::Result<std::os::unix::net::UnixListener> {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen};
    let (family, kind) = (AddressFamily::UNIX, SocketType::SEQPACKET);
    let socket = rustix::net::socket_with(family, kind, SocketFlags::CLOEXEC, None)?;
    bind(&socket, &SocketAddrUnix::new(path)?)?;
    listen(&socket, 64)?;
    Ok(socket.into())
}

/// Rows that only a root with this capability passes.
const SYS_RESOURCE: [&str; 3] = ["memory-map-forge", "core-limit-raise", "proxy-limits"];

/// Rows of which the second guard depends on the machine, and why.
const DEPENDS: [(&str, &str); 11] = [
    ("init-environment", "from Linux 6.13 CAP_PERFMON is enough to read it, Landlock or not"),
    ("proxy-environment", "the same"),
    ("init-maps", "the same"),
    ("bpf", "kernel.unprivileged_bpf_disabled"),
    ("open-by-handle", "from Linux 6.11 some handles need no capability"),
    ("init-module", "whether the kernel has modules"),
    ("finit-module", "the same"),
    ("delete-module", "the same"),
    ("kexec-load", "whether the kernel has kexec"),
    ("kexec-file-load", "the same"),
    ("ioperm", "whether the kernel has port permissions"),
];

/// Failures of the attempt itself, which say nothing of a guard.
fn is_no_proof(seen: &Seen) -> bool {
    let ways = ["no answer", "cannot be tried", "panicked", "nothing was heard"];
    matches!(seen, Seen::Broken(why) if ways.iter().any(|way| why.contains(way)))
}

/// The layers without which a row must fail.
fn guards(row: &Row) -> BTreeSet<Layer> {
    row.also.iter().copied().chain([row.layer]).filter(|layer| *layer != Layer::Kernel).collect()
}

fn depends(row: &Row) -> Option<&'static (&'static str, &'static str)> {
    DEPENDS.iter().find(|(id, _)| *id == row.id)
}

fn is_kernels(row: &Row) -> bool {
    row.layer == Layer::Kernel || row.also.contains(&Layer::Kernel)
}

/// Tries rows with the layers off that `off` names for each; rows with the same ones together.
fn try_all(
    rig: &Rig,
    off: impl Fn(&Row) -> Option<BTreeSet<Layer>>,
) -> Result<Vec<(&'static Row, Seen)>, String> {
    let mut groups: BTreeMap<BTreeSet<Layer>, Vec<&'static Row>> = BTreeMap::new();
    for row in attempts::table() {
        if let Some(off) = off(row) {
            groups.entry(off).or_default().push(row);
        }
    }
    let mut all = Vec::new();
    for (off, rows) in groups {
        // Anew for each: some attempts work, and take the bait away.
        let world = World::new(rig, &off)?;
        let seen = fence::try_without(&off, &rows, &world.facts)?;
        for row in rows {
            let seen = seen.get(row.id).cloned();
            all.push((row, seen.unwrap_or_else(|| Seen::Broken("nothing was heard".into()))));
        }
    }
    Ok(all)
}

fn outcome(wrong: &[String]) -> Result<(), String> {
    if wrong.is_empty() { Ok(()) } else { Err(wrong.join("\n")) }
}

/// With all layers on: otherwise a failure below could have another reason. What the network and
/// the proxy guard needs the real supervisor.
pub fn all_on(rig: &Rig) -> Result<(), String> {
    let elsewhere = [Layer::Network, Layer::Proxy];
    let on = |row: &Row| (!elsewhere.contains(&row.layer)).then(BTreeSet::new);
    let wrong: Vec<String> = try_all(rig, on)?
        .into_iter()
        .filter(|(row, seen)| row.judge(seen) == Verdict::Unexpected)
        .map(|(row, seen)| format!("    {}: {seen}, must be {}", row.id, row.expected()))
        .collect();
    outcome(&wrong)
}

/// With all that guards a row switched off it fails; what does not is the kernel's own refusal,
/// and says so.
pub fn each_off(rig: &Rig) -> Result<(), String> {
    open_world::make();
    let mut wrong = Vec::new();
    let mut failed: BTreeMap<Layer, usize> = BTreeMap::new();
    let has = rustix::thread::capabilities(None).map_err(|error| error.to_string())?.effective;
    for (row, seen) in try_all(rig, |row| Some(guards(row)))? {
        match row.judge(&seen) {
            Verdict::Unexpected if is_no_proof(&seen) => {
                wrong.push(format!("    {}: {seen}: that is no proof", row.id));
            }
            Verdict::Unexpected => *failed.entry(row.layer).or_default() += 1,
            Verdict::Skipped => println!("    {}: {seen}", row.id),
            Verdict::AsExpected if is_kernels(row) => {
                println!("    no layer of ours guards {}: the kernel refuses it ({seen})", row.id);
            }
            Verdict::AsExpected
                if SYS_RESOURCE.contains(&row.id) && !has.contains(CapabilitySet::SYS_RESOURCE) =>
            {
                println!("    SKIPPED: {}: this root has no CAP_SYS_RESOURCE itself", row.id);
            }
            Verdict::AsExpected => {
                wrong.push(format!("    {}: {seen} also without {:?}", row.id, guards(row)));
            }
        }
    }
    println!("    seen to fail: {failed:?}");
    outcome(&wrong)
}

/// With the row's own layer off alone: where another one guards it too it holds, and where none
/// does it was seen to fail above.
pub fn each_alone(rig: &Rig) -> Result<(), String> {
    open_world::make();
    let more = |row: &Row| (guards(row).len() > 1).then(|| BTreeSet::from([row.layer]));
    let mut wrong = Vec::new();
    for (row, seen) in try_all(rig, more)? {
        match row.judge(&seen) {
            Verdict::AsExpected | Verdict::Skipped => {}
            Verdict::Unexpected => match depends(row) {
                Some((_, why)) => println!("    only {} guards {} here: {why}", row.layer, row.id),
                None => wrong.push(format!(
                    "    {}: {seen} without {}: {:?} does not guard it",
                    row.id, row.layer, row.also
                )),
            },
        }
    }
    outcome(&wrong)
}

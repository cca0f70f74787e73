//! The clients that agents use, as they are, through a real fence to real servers: each does its
//! work, and each is refused where the policy says so.
//!
//! Needs root. Runs itself again in a network and a mount namespace of its own: the servers listen
//! on addresses of the test's loopback, and the agent finds the clients under /usr and /mnt.
//! `tests/clients/setup` makes what the machine has not (`RINGFENCE_CLIENTS` names another place of
//! it); a client that is missing is SKIPPED.
//!
//! A word on the command line runs the clients whose name contains it, `-- --try SCRIPT` runs
//! something of your own in such a fence. `-- --write-docs` writes `docs/clients.md`, whose fixed
//! part every run compares.

mod page;
mod rig;
mod table;

use std::collections::BTreeMap;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

use page::Seen;
use rig::{Outcome, Rig};
use table::{CLIENTS, Client, Finds};

const INSIDE: &str = "RINGFENCE_TEST_INSIDE";
/// How many clients run at a time: they wait more than they work.
const AT_ONCE: usize = 3;

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    if !words.iter().any(|word| word == "--write-docs") {
        page::check();
    }
    if !is_root() {
        println!("SKIPPED: tests/clients needs root");
        println!("0 passed, 0 failed");
        return;
    }
    if std::env::var_os(INSIDE).is_none() {
        let error = Command::new("unshare")
            .args(["--net", "--mount", "--propagation", "private", "--"])
            .arg(std::env::current_exe().unwrap())
            .args(&words)
            .env(INSIDE, "1")
            .exec();
        panic!("cannot run unshare(1): {error}");
    }
    let only = words.iter().find(|word| !word.starts_with('-'));
    let rig = Rig::new(&clients());
    if let ["--try", script] = words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        let Outcome { stdout, stderr, log, .. } = rig.run(script, &[]);
        return print!("{stdout}--- stderr\n{stderr}--- fence\n{log}");
    }
    let tests: Vec<Test<'_>> = CLIENTS
        .iter()
        .flat_map(|client| Test::KINDS.map(|kind| Test { client, kind }))
        .filter(|test| only.is_none_or(|only| test.name().contains(only.as_str())))
        .collect();
    let queue = Mutex::new(tests.iter());
    let results = Mutex::new(BTreeMap::new());
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                while let Some(test) = { queue.lock().unwrap().next() } {
                    let result = test.run(&rig);
                    results.lock().unwrap().insert(test.name(), result);
                }
            });
        }
    });
    let results = results.into_inner().unwrap();
    let (mut passed, mut failed) = (0, 0);
    for test in &tests {
        let name = test.name();
        match &results[&name] {
            Ok(_) => println!("test {name} ... ok"),
            Err(Not::Here(why)) => println!("test {name} ... SKIPPED: {why}"),
            Err(Not::Right(why)) => println!("test {name} ... FAILED\n{why}"),
        }
        match &results[&name] {
            Ok(_) => passed += 1,
            Err(Not::Here(_)) => {}
            Err(Not::Right(_)) => failed += 1,
        }
    }
    println!("{passed} passed, {failed} failed");
    if words.iter().any(|word| word == "--write-docs") {
        page::write(&rig, &results);
    }
    drop(rig);
    std::process::exit(i32::from(failed > 0));
}

/// What `tests/clients/setup` made.
fn clients() -> PathBuf {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    if let Some(dir) = set("RINGFENCE_CLIENTS") {
        return dir.into();
    }
    let home = || set("HOME").map(|home| Path::new(&home).join(".cache"));
    let base = || set("XDG_CACHE_HOME").map(PathBuf::from).or_else(home).unwrap_or_default();
    let cache = set("RINGFENCE_CACHE").map_or_else(|| base().join("ringfence"), PathBuf::from);
    cache.join("clients")
}

fn is_root() -> bool {
    std::fs::metadata("/proc/self")
        .is_ok_and(|meta| std::os::unix::fs::MetadataExt::uid(&meta) == 0)
}

/// One thing that is tried with one client.
struct Test<'a> {
    client: &'a Client,
    kind: Kind,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Works,
    Refused,
    /// The same work where the fence's authority is not trusted: what trusts it is the fence's
    /// doing, and the client looks.
    Untrusting,
    /// The same work in an image that names other bundles and proxies.
    Image,
}

enum Not {
    Here(String),
    Right(String),
}

type Result<T, E = Not> = std::result::Result<T, E>;

/// Each by which some client trusts the fence.
const TRUST: &str = "SSL_CERT_FILE REQUESTS_CA_BUNDLE CURL_CA_BUNDLE GIT_SSL_CAINFO PIP_CERT \
                     CARGO_HTTP_CAINFO AWS_CA_BUNDLE NPM_CONFIG_CAFILE NODE_EXTRA_CA_CERTS \
                     DENO_CERT GRPC_DEFAULT_SSL_ROOTS_FILE_PATH SYSTEM_WGETRC SYSTEM_WGET2RC \
                     JAVA_TOOL_OPTIONS";
/// For clients that would try again what cannot work.
const AT_ONCE_OR_NEVER: &str = "export PIP_RETRIES=1 CARGO_NET_RETRY=0 NPM_CONFIG_FETCH_RETRIES=0 \
                                UV_HTTP_RETRIES=0 APT_CONFIG=/mnt/image/apt.conf";

const OTHER: &str = "/mnt/image/other.pem";
const ELSEWHERE: &str = "http://10.77.0.9:3128";
/// What an image sets that was made for another network.
const IMAGE: &[(&str, &str)] = &[
    ("SSL_CERT_FILE", OTHER),
    ("SSL_CERT_DIR", "/mnt/image"),
    ("REQUESTS_CA_BUNDLE", OTHER),
    ("CURL_CA_BUNDLE", OTHER),
    ("GIT_SSL_CAINFO", OTHER),
    ("PIP_CERT", OTHER),
    ("CARGO_HTTP_CAINFO", OTHER),
    ("npm_config_cafile", OTHER),
    ("NPM_CONFIG_CAFILE", OTHER),
    ("NODE_EXTRA_CA_CERTS", OTHER),
    ("GRPC_DEFAULT_SSL_ROOTS_FILE_PATH", OTHER),
    ("WGETRC", "/mnt/image/wgetrc"),
    ("APT_CONFIG", "/mnt/image/apt.conf"),
    (
        "JAVA_TOOL_OPTIONS",
        "-Xmx99m -Djavax.net.ssl.trustStorePassword=x -Djavax.net.ssl.trustStore=/x",
    ),
    ("_JAVA_OPTIONS", "-Djavax.net.ssl.trustStore=/x -Djavax.net.ssl.trustStoreType=PKCS12"),
    ("HTTPS_PROXY", ELSEWHERE),
    ("https_proxy", ELSEWHERE),
    ("ALL_PROXY", ELSEWHERE),
    ("NO_PROXY", "*"),
    ("PIP_PROXY", ELSEWHERE),
    ("CARGO_HTTP_PROXY", ELSEWHERE),
    ("npm_config_https_proxy", ELSEWHERE),
    ("NPM_CONFIG_PROXY", ELSEWHERE),
];
/// Files in the agent's home to the same end.
const IMAGE_FILES: &str = "echo \"cafile=/mnt/image/other.pem\" >.npmrc; \
    mkdir -p .config/pip cargo; \
    printf '[global]\ncert = /mnt/image/other.pem\n' >.config/pip/pip.conf; \
    printf '[http]\nsslCAInfo = /mnt/image/other.pem\n' >.gitconfig; \
    printf '[http]\ncainfo = \"/mnt/image/other.pem\"\n' >cargo/config.toml";

impl Test<'_> {
    const KINDS: [Kind; 4] = [Kind::Works, Kind::Refused, Kind::Untrusting, Kind::Image];

    fn name(&self) -> String {
        let kind = match self.kind {
            Kind::Works => "works",
            Kind::Refused => "is refused",
            Kind::Untrusting => "looks whom it trusts",
            Kind::Image => "works in an image of another network",
        };
        format!("{} {kind}", self.client.name)
    }

    fn run(&self, rig: &Rig) -> Result<Seen> {
        let client = self.client;
        if !Rig::has(client.program) {
            return Err(Not::Here(format!("there is no {}", client.program)));
        }
        let words: &[&str] = match client.finds {
            Finds::Proxy(_) => &["--transparent", "off"],
            Finds::Nothing => &[],
        };
        let script = client.works.script;
        match self.kind {
            Kind::Works => works(client, &rig.run(script, words)),
            Kind::Image => {
                works(client, &rig.run_in(IMAGE, &format!("{IMAGE_FILES}; {script}"), words))
            }
            Kind::Refused => refused(client, rig, &rig.run(client.refused.script, &[])),
            Kind::Untrusting => {
                let script = format!("unset {TRUST}; {AT_ONCE_OR_NEVER}; {script}");
                untrusting(client, &rig.run(&script, &[]))
            }
        }
    }
}

fn works(client: &Client, outcome: &Outcome) -> Result<Seen> {
    told(outcome.succeeded, "it failed", outcome)?;
    let prints = client.works.prints;
    let last = outcome.stdout.trim_end().lines().last().unwrap_or_default();
    told(last == prints, &format!("it does not print {prints:?} at last"), outcome)?;
    Ok(Seen::default())
}

/// It has the trust of the image's own store only, and says what is wrong.
fn untrusting(client: &Client, outcome: &Outcome) -> Result<Seen> {
    let passed = outcome.succeeded && outcome.stdout.trim_end().ends_with(client.works.prints);
    told(!passed, "it works without any trust", outcome)?;
    let words = [&outcome.stderr, &outcome.stdout].map(|text| text.to_lowercase());
    let says = words.iter().any(|text| text.contains("certificate"));
    told(says, "it does not say that it is the certificate", outcome)?;
    Ok(Seen::default())
}

fn refused(client: &Client, rig: &Rig, outcome: &Outcome) -> Result<Seen> {
    let expected = &client.refused;
    told(!outcome.succeeded, "it succeeded", outcome)?;
    let mut lines = outcome.stderr.lines().chain(outcome.stdout.lines());
    let line = lines.rfind(|line| line.contains(expected.says));
    told(line.is_some(), &format!("it does not say {:?}", expected.says), outcome)?;
    let denied =
        |line: &str| line.contains("DENIED") && expected.log.iter().all(|word| line.contains(word));
    let what = format!("the log has no denial with {:?}", expected.log);
    told(outcome.log.lines().any(denied), &what, outcome)?;
    let requests = rig.requests();
    let came = requests.lines().find(|line| line.starts_with(expected.never));
    told(came.is_none(), &format!("the upstream saw {came:?}"), outcome)?;
    Ok(Seen { line: line.unwrap_or_default().trim().to_owned() })
}

/// `what` with all that was seen, unless `held`.
fn told(held: bool, what: &str, outcome: &Outcome) -> Result<()> {
    if held {
        return Ok(());
    }
    let Outcome { stdout, stderr, log, .. } = outcome;
    let text = format!("{what}\n--- stdout\n{stdout}\n--- stderr\n{stderr}\n--- fence\n{log}");
    Err(Not::Right(text))
}

//! Runs the policy corpus: `tests/corpus/policy/*.yaml`, each a policy and what it must answer.
//!
//! A file holds a list of groups. A group with `cases` loads its policy and asks it; a group with
//! `error` must not load, and says so; `warnings` names words that its warnings must hold. A case
//! with a `body` is read as the proxy reads it.
//!
//! Every case is run twice: by the native engine, and by regorus with the text of
//! `examples/policy.rego`. Where a policy speaks of protocols that a Rego text is not asked about, the
//! second run is left out and counted.

use std::collections::HashSet;
use std::fmt::Write as _;
use std::path::Path;

use ringfence::policy::{
    self, Caller, Connect, Host, Inspect, Loaded, PathError, Request, Source, TlsMode, Verdict,
};
use serde::Deserialize;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Group {
    name: String,
    policy: String,
    #[serde(default)]
    cases: Vec<Case>,
    /// Words of the error.
    error: Option<String>,
    /// The line of the error, or of the first warning asked for.
    line: Option<u64>,
    #[serde(default)]
    warnings: Vec<String>,
    /// The policy must load without any warning.
    #[serde(default)]
    quiet: bool,
    /// A text of one's own does not know what is tried here.
    #[serde(default)]
    native: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Case {
    name: String,
    #[serde(default = "curl")]
    caller: String,
    #[serde(default)]
    ancestors: Vec<String>,
    sha256: Option<String>,
    tainted: Option<String>,
    host: String,
    port: u16,
    /// `METHOD target`: the request is judged, not only the connection.
    request: Option<String>,
    /// The same for what happens on a WebSocket: its handshake is a GET.
    websocket: Option<String>,
    /// The content of the request, and its header fields; `Content-Type: application/json` goes
    /// with a body where none is given.
    #[serde(default)]
    body: String,
    #[serde(default)]
    headers: Vec<(String, String)>,
    /// The address is judged, not only the connection.
    ip: Option<std::net::IpAddr>,
    verdict: Wanted,
    /// Words of the reason.
    reason: Option<String>,
    /// Which policy is named.
    policy: Option<String>,
    /// Whether requests are judged, and whether TLS is left alone.
    inspect: Option<bool>,
    skip_tls: Option<bool>,
}

#[derive(Deserialize, Debug, PartialEq, Clone, Copy)]
#[serde(rename_all = "lowercase")]
enum Wanted {
    Allow,
    Audit,
    Deny,
    /// The host or the target is refused before any judging.
    Refuse,
}

fn curl() -> String {
    "/usr/bin/curl".into()
}

/// What came out: the verdict, the policy and the reason.
type Outcome = (Wanted, String, String);

fn judge(policy: &policy::Policy, case: &Case) -> Result<Outcome, String> {
    let refused = |reason: String| Ok((Wanted::Refuse, String::new(), reason));
    let host = match Host::parse(&case.host) {
        Ok(host) => host,
        Err(error) => return refused(error.to_string()),
    };
    let caller = Caller {
        exe: case.caller.clone(),
        ancestors: case.ancestors.clone(),
        sha256: case.sha256.as_deref().map(|hex| policy::digest::from_hex(hex).expect("digest")),
        tainted: case.tainted.clone(),
    };
    let grant = match policy.connect(&caller, &host, case.port) {
        Connect::Allow(grant) => grant,
        Connect::Deny(denial) => {
            fit_to_print(&denial)?;
            return Ok((Wanted::Deny, denial.policy, denial.reason));
        }
    };
    if case.inspect.is_some_and(|wanted| wanted != (grant.inspect == Inspect::Rest)) {
        return Err(format!("inspect is {:?}", grant.inspect));
    }
    if case.skip_tls.is_some_and(|wanted| wanted != (grant.tls == TlsMode::Skip)) {
        return Err(format!("tls is {:?}", grant.tls));
    }
    if let Some(ip) = case.ip
        && let Err(denied) = policy.destination(&grant, &host, case.port, ip)
    {
        return Ok((Wanted::Deny, grant.policy, denied.to_string()));
    }
    let Some(request) = case.request.as_ref().or(case.websocket.as_ref()) else {
        return Ok((Wanted::Allow, grant.policy, String::new()));
    };
    let (method, target) = request.split_once(' ').ok_or("request is not `METHOD target`")?;
    let target = match policy::canonical_path(target, grant.allow_encoded_slash) {
        Ok(target) => target,
        Err(error @ PathError::EncodedSlash) => {
            return Ok((Wanted::Deny, grant.policy, error.to_string()));
        }
        Err(error) => return refused(error.to_string()),
    };
    let payload = match case.websocket {
        Some(_) => policy
            .messages(&caller, &host, case.port, &target.path)
            .filter(|_| method != "GET")
            .map(|longest| said(case, method, longest)),
        None => policy
            .inspection(&caller, &host, case.port, &target.path)
            .map(|inspection| content(&inspection, case, method, &target)),
    };
    let payload = match payload {
        Some(Err(reason)) => return refused(reason),
        Some(Ok(payload)) => Some(payload),
        None => None,
    };
    let payload = payload.as_ref();
    let (path, query) = (target.path.as_str(), target.pairs.as_slice());
    let fields = case.headers.iter().map(|(name, value)| (name.as_bytes(), value.as_bytes()));
    let overrides = &policy::Instead::read(fields).methods;
    let request = Request { method, path, query, payload, overrides };
    let verdict = if case.websocket.is_some() {
        policy.websocket(&caller, &host, case.port, &request)
    } else {
        policy.request(&caller, &host, case.port, &request)
    };
    Ok(match verdict {
        Verdict::Allow { policy } => (Wanted::Allow, policy, String::new()),
        Verdict::Audit { policy, reason } => (Wanted::Audit, policy, reason),
        Verdict::Deny(denial) => {
            fit_to_print(&denial)?;
            (Wanted::Deny, denial.policy, denial.reason)
        }
    })
}

/// What the proxy would read of the content.
#[cfg(feature = "proxy")]
fn content(
    inspection: &policy::Inspection,
    case: &Case,
    method: &str,
    target: &policy::CanonicalTarget,
) -> Result<policy::Payload, String> {
    if case.body.len() > inspection.max_bytes {
        return Err(format!("the body is longer than {} bytes", inspection.max_bytes));
    }
    let json = [("Content-Type".to_owned(), "application/json".to_owned())];
    let given = case.headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("content-type"));
    let json = if case.body.is_empty() || given { &[] } else { &json[..] };
    let fields = case.headers.iter().chain(json);
    let fields = fields.map(|(name, value)| (name.as_bytes(), value.as_bytes()));
    let facts = ringfence::proxy::Facts::new(method, target, fields);
    Ok(ringfence::proxy::read_content(inspection, &facts, case.body.as_bytes()))
}

/// What the proxy would read of a message on a WebSocket.
#[cfg(feature = "proxy")]
#[allow(clippy::unnecessary_wraps, reason = "as the other one")]
fn said(case: &Case, method: &str, longest: usize) -> Result<policy::Payload, String> {
    Ok(ringfence::proxy::read_message(method, case.body.as_bytes(), longest))
}

#[cfg(not(feature = "proxy"))]
#[allow(clippy::unnecessary_wraps, reason = "as the other one")]
fn said(_: &Case, _: &str, _: usize) -> Result<policy::Payload, String> {
    Ok(policy::Payload::default())
}

/// Without the proxy nobody reads it, and what was not read is refused.
#[cfg(not(feature = "proxy"))]
fn content(
    _: &policy::Inspection,
    _: &Case,
    _: &str,
    _: &policy::CanonicalTarget,
) -> Result<policy::Payload, String> {
    Ok(policy::Payload::default())
}

fn fit_to_print(denial: &policy::Denial) -> Result<(), String> {
    let plain = |text: &str| text.chars().all(|c| (' '..='~').contains(&c) || c == '\n');
    let fit = [&denial.policy, &denial.reason, &denial.rule, &denial.suggestion]
        .iter()
        .all(|text| plain(text));
    if fit && denial.suggestion.len() <= 4096 && !denial.suggestion.is_empty() {
        Ok(())
    } else {
        Err(format!("denial is not fit to print: {denial:?}"))
    }
}

/// `words`: the reason's words are the native engine's; a text has its own for connections.
fn check_case(policy: &policy::Policy, case: &Case, words: bool) -> Result<(), String> {
    let (verdict, named, reason) = judge(policy, case)?;
    if verdict != case.verdict {
        return Err(format!("{verdict:?} instead of {:?} ({reason})", case.verdict));
    }
    if let Some(words) = case.reason.as_ref().filter(|_| words)
        && !reason.contains(words.as_str())
    {
        return Err(format!("reason is {reason:?}"));
    }
    match &case.policy {
        Some(wanted) if *wanted != named => Err(format!("policy is {named:?}")),
        _ => Ok(()),
    }
}

fn check_group(group: &Group) -> Vec<(String, String)> {
    let source = Source { name: "policy.yaml", bytes: group.policy.as_bytes() };
    let whole = |what: String| vec![(group.name.clone(), what)];
    let loaded = match (policy::load(&source, None), &group.error) {
        (Ok(loaded), None) => loaded,
        (Err(error), None) => return whole(format!("did not load:\n{error}")),
        (Ok(_), Some(words)) => return whole(format!("loaded; {words:?} was to be refused")),
        (Err(error), Some(words)) => {
            let found = error.0.iter().any(|problem| {
                problem.to_string().contains(words.as_str())
                    && (group.line.is_none() || group.line == problem.line)
            });
            return if found { Vec::new() } else { whole(format!("another error:\n{error}")) };
        }
    };
    let mut failures = warnings(group, &loaded);
    failures.extend(group.cases.iter().filter_map(|case| {
        let failure = check_case(&loaded.policy, case, true).err()?;
        Some((format!("{}: {}", group.name, case.name), failure))
    }));
    failures
}

/// The same group by regorus; `None` where the text is not asked about one of its protocols.
fn check_by_rego(group: &Group, rules: &str) -> Option<Vec<(String, String)>> {
    let source = Source { name: "policy.yaml", bytes: group.policy.as_bytes() };
    if group.native {
        return None;
    }
    let rules = Source { name: "policy.rego", bytes: rules.as_bytes() };
    let loaded = match policy::load(&source, Some(&rules)) {
        Ok(loaded) => loaded,
        Err(error) if error.to_string().contains("is not supported with a policy.rego") => {
            return None;
        }
        Err(error) => return Some(vec![(group.name.clone(), format!("by Rego:\n{error}"))]),
    };
    assert_eq!(loaded.policy.engine(), "rego");
    let failures = group.cases.iter().filter_map(|case| {
        let failure = check_case(&loaded.policy, case, false).err()?;
        Some((format!("{}: {}", group.name, case.name), format!("by Rego: {failure}")))
    });
    Some(failures.collect())
}

fn warnings(group: &Group, loaded: &Loaded) -> Vec<(String, String)> {
    let shown = || {
        let lines: Vec<_> = loaded.warnings.iter().map(ToString::to_string).collect();
        format!("\n{}", lines.join("\n"))
    };
    let mut failures = Vec::new();
    for words in &group.warnings {
        let found = loaded.warnings.iter().any(|problem| {
            problem.to_string().contains(words.as_str())
                && (group.line.is_none() || group.line == problem.line)
        });
        if !found {
            failures.push((group.name.clone(), format!("no warning {words:?} in:{}", shown())));
        }
    }
    if group.quiet && !loaded.warnings.is_empty() {
        failures.push((group.name.clone(), format!("warnings:{}", shown())));
    }
    failures
}

#[test]
fn corpus() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus/policy");
    let mut report = String::new();
    let mut names = HashSet::new();
    let (mut count, mut left_out) = (0, 0);
    let rules = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/policy.rego");
    let rules = std::fs::read_to_string(rules).expect("examples/policy.rego") + "# changed\n";
    let mut files: Vec<_> = std::fs::read_dir(&folder)
        .expect("corpus folder")
        .map(|entry| entry.expect("entry").path())
        .filter(|path| path.extension().is_some_and(|e| e == "yaml"))
        .collect();
    files.sort();
    for file in files {
        let shown = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let text = std::fs::read_to_string(&file).expect("corpus file");
        let groups: Vec<Group> =
            serde_saphyr::from_str(&text).unwrap_or_else(|error| panic!("{shown}: {error}"));
        for group in groups {
            let read = group.cases.iter().any(|case| !case.body.is_empty());
            if read && cfg!(not(feature = "proxy")) {
                println!("SKIPPED: {shown}: {:?}: needs the feature `proxy`", group.name);
                continue;
            }
            assert!(names.insert(group.name.clone()), "{shown}: {:?} twice", group.name);
            count += group.cases.len().max(1);
            let mut failures = check_group(&group);
            if group.error.is_none() {
                match check_by_rego(&group, &rules) {
                    Some(more) => failures.extend(more),
                    None => left_out += group.cases.len().max(1),
                }
            }
            for (name, failure) in failures {
                let _ = writeln!(report, "{shown}: {name}: {failure}");
            }
        }
    }
    assert!(report.is_empty(), "\n{report}");
    assert!(count >= 400, "only {count} cases");
    println!("{count} cases, {left_out} of them by the native engine alone");
}

#[test]
fn the_example_loads_without_a_warning() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples");
    let yaml = std::fs::read(folder.join("policy.yaml")).expect("examples/policy.yaml");
    let rego = std::fs::read(folder.join("policy.rego")).expect("examples/policy.rego");
    let yaml = Source { name: "examples/policy.yaml", bytes: &yaml };
    let rego = Source { name: "examples/policy.rego", bytes: &rego };
    let loaded = policy::load(&yaml, Some(&rego)).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(loaded.warnings, []);
    assert_eq!(loaded.policy.engine(), "native");
    let empty = Source { name: "policy.rego", bytes: b"package openshell.sandbox\n" };
    policy::load(&yaml, Some(&empty)).expect_err("a policy.rego without rules");
}

//! Throws broken input at whatever of the supervisor reads something: the command lines, policy
//! files, and the packets of keeper, child, proxy and `enter` clients. Nothing may panic.
//!
//! Inputs are what is valid, bent at random. `RINGFENCE_FUZZ_CASES` says how many a test tries,
//! `RINGFENCE_FUZZ_SEED` which; a failure names the seed and the case, and a case that is named
//! by `RINGFENCE_FUZZ_CASE` runs alone.

mod packets;

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::Path;

use clap::Parser;

use super::args::{Args, Inbound};
use super::identity::Database;
use super::{filesystem, openshell};
use crate::fuzz::Random;
use crate::policy::{self, Source};

fn fuzz(name: &'static str, case: impl FnMut(&mut Random)) {
    crate::fuzz::fuzz(name, 500, case);
}

/// Separated by bars.
const WORDS: &str = "--|-||-w|-t|-i|-iwt|--workdir|--timeout=|--timeout|18446744073709551616|-1|0|\
                     65536|--policy-data|--policy-rules=/dev/null|--no-env|--inbound|80,,|mirror|\
                     --groups|1,2,x|--run-as|0:0|--log-level|warn,a=b=c|--help|enter|install|\
                     copy-self|--health-port|/|\u{202e}\u{0}|--sandbox-id";

#[test]
fn command_lines() {
    let known: Vec<_> = WORDS.split('|').collect();
    fuzz("command_lines", |random| {
        let words: Vec<OsString> = (0..random.below(9))
            .map(|_| {
                let word = random.pick(&known);
                if random.below(4) == 0 {
                    OsString::from_vec(random.bend(word.as_bytes(), &known))
                } else {
                    word.into()
                }
            })
            .collect();
        let with = |name: &str| {
            let mut argv = vec![OsString::from(name)];
            argv.extend(words.iter().cloned());
            argv
        };
        let value = random.pick(&known).to_owned();
        let lookup = |name: &str| (!name.len().is_multiple_of(3)).then(|| value.clone());
        if let Ok(args) = Args::try_parse_from(with("ringfence-supervisor")) {
            drop(args.run.complete(lookup));
        }
        drop(openshell::parse(with("openshell-sandbox"), lookup));
        drop(value.parse::<Inbound>());
        let _ = openshell::is_called(words.first().map(OsString::as_os_str));
        drop(super::args::pod_ips(|_| Some(value.clone())));
    });
}

const POLICIES: [&str; 4] = [
    include_str!("../../examples/policy.yaml"),
    include_str!("../../tests/supervisor/policy.yaml"),
    "version: 1\nfilesystem_policy: {read_write: [/tmp]}\nlandlock: {compatibility: hard_requirement}\n\
     network_policies:\n  a:\n    endpoints:\n      - {host: '*.x.test', ports: [80, 443], protocol: \
     rest, rules: [{allow: {method: GET, path: '/v1/**', query: {a: 'b*'}}}], deny_rules: [{method: \
     '*', path: /secret}], allowed_ips: [10.0.0.0/8], tls: skip}\n      - {host: x.test, port: 443, protocol: \
     websocket, access: read-write, deny_rules: [{method: WEBSOCKET_TEXT, path: /a}]}\n    binaries: \
     [{path: '/usr/bin/*'}]\n",
    "network_policies:\n  a:\n    endpoints:\n      - {host: x.test, port: 443, path: /g, protocol: graphql, \
     persisted_queries: allow_registered, graphql_persisted_queries: {k: {operation_type: query, fields: \
     [a]}}, rules: [{allow: {operation_type: '*', operation_name: 'A*', fields: ['b*']}}]}\n      - {host: \
     x.test, port: 443, path: /m, protocol: mcp, mcp: {allow_all_known_mcp_methods: true, \
     max_body_bytes: 9}, deny_rules: [{method: tools/call, tool: {any: [x, 'y*']}, params: {'a.b': c}}]}\n",
];
/// Separated by bars.
const YAML: &str = "\n|  |- |: |{|}|[|]|[[[[[[[[[[[[[[[[[[[[[[|&a [*a, *a]|*a|!!binary x|? |>-\n|\
                    \"\\u0000\"|'|#|null|~|true|1e999|0x7fffffffffffffffff|-1|\
                    99999999999999999999|**|*.*.|{a,b}[!|\u{feff}|\u{202e}";

#[test]
fn policy_files() {
    let user = Database::parse("agent:x:7:8::/home/agent:/bin/sh\n", "agent:x:8:\n");
    let words: Vec<_> = YAML.split('|').collect();
    fuzz("policy_files", |random| {
        let valid = random.pick(&POLICIES);
        let text = random.bend(valid.as_bytes(), &words);
        let rules = random.bend(include_bytes!("../../examples/policy.rego"), &words);
        let source = Source { name: "policy.yaml", bytes: &text };
        let rego = Source { name: "policy.rego", bytes: &rules };
        let rego = (random.below(8) == 0).then_some(&rego);
        match policy::load(&source, rego) {
            Ok(mut loaded) => {
                loaded.policy.resolve_binaries(|path| Some(path.to_owned()));
                let files = loaded.policy.filesystem();
                drop(filesystem::rules(files, Some(Path::new("/w")), Path::new("/tls"), &[]));
                if let Some(name) = &loaded.policy.process().run_as_user {
                    drop(user.resolve(name, &[1]));
                }
                assert!(loaded.warnings.iter().all(|warning| !warning.to_string().is_empty()));
            }
            Err(error) => assert!(!error.to_string().is_empty()),
        }
    });
}

#[test]
fn user_databases() {
    let passwd = "root:x:0:0:root:/root:/bin/sh\nagent:x:1000:1000::/home/agent:/bin/sh\n";
    let group = "root:x:0:root\nagent:x:1000:\ndocker:x:998:agent,other\n";
    let words = [":", "\n", "agent", "root", "4294967296", "-1", "65530", ",", "\u{0}"];
    fuzz("user_databases", |random| {
        let mut text = |valid: &str| {
            String::from_utf8_lossy(&random.bend(valid.as_bytes(), &words)).into_owned()
        };
        let database = Database::parse(&text(passwd), &text(group));
        let spec = text("agent:docker");
        if let Ok(user) = database.resolve(&spec, &[3]) {
            assert!(user.identity.uid != 0 && user.identity.uid != 65_530, "{spec}");
        }
    });
}

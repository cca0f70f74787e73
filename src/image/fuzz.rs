//! Manifests and image configurations, bent: what is taken from them is what is there once. See
//! [`crate::fuzz`].

use serde_json::Value;

use super::document::{Plain, parse_config};
use crate::fuzz::{alone, fuzz};

const CONFIGS: [&str; 3] = [
    r#"{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":["sha256:a"]},"config":{"Entrypoint":["/bin/agent","-x"],"Cmd":["run"],"User":"1000:1000","WorkingDir":"/w","Env":["PATH=/bin","A=b"],"Volumes":{"/data":{},"/cache":{}}}}"#,
    r#"{"rootfs":{"type":"layers"},"config":{"Cmd":null,"Volumes":null}}"#,
    r#"{"rootfs":{},"history":[{"created_by":"x"}]}"#,
];
const MANIFESTS: [&str; 2] = [
    r#"{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"sha256:a","size":7,"platform":{"architecture":"amd64","os":"linux"}},{"digest":"sha256:b","platform":{"architecture":"arm64","os":"linux","variant":"v8"}}]}"#,
    r#"{"schemaVersion":2,"config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"sha256:c","size":9},"layers":[{"digest":"sha256:d","size":1}],"annotations":{"Digest":"x","digest":"y"}}"#,
];
const WORDS: [&str; 34] = [
    "{",
    "}",
    "[",
    "]",
    ",",
    ":",
    "\"",
    "\\",
    "\\u0000",
    "\\ud800",
    "\\u017f",
    "\u{17f}",
    "\u{212a}",
    "null",
    "true",
    "-0",
    "1e999",
    "\"Volumes\":{\"/x\":{}},",
    "\"VOLUMES\":{\"/x\":{}},",
    "\"volume\u{17f}\":{\"/x\":{}},",
    "\"Entrypoint\":[\"/evil\"],",
    "\"entrypoint\":[\"/evil\"],",
    "\"Cmd\":null,",
    "\"User\":\"root\",",
    "\"config\":{},",
    "\"Config\":{},",
    "\"rootfs\":{},",
    "\"digest\":\"sha256:e\",",
    "\"Digest\":\"sha256:e\",",
    "\"manifests\":[],",
    "\"os.version\":\"1\",",
    "\"platform\":{},",
    "\u{feff}",
    "[[[[[[[[[[[[[[[[",
];

#[test]
fn configurations() {
    let mut good = 0_u64;
    fuzz("configurations", 1_000, |random| {
        let bytes = random.bent(&CONFIGS, &WORDS);
        let Ok(config) = parse_config(&bytes) else { return };
        good += 1;
        let whole: Value = serde_json::from_slice(&bytes).expect("JSON");
        let words = |name: &str| -> Vec<String> {
            let words = whole["config"][name].as_array().cloned().unwrap_or_default();
            words.iter().map(|word| word.as_str().expect("a text").to_owned()).collect()
        };
        assert_eq!((config.entrypoint, config.cmd), (words("Entrypoint"), words("Cmd")));
        assert_eq!(config.env, words("Env"));
        assert_eq!(config.user, whole["config"]["User"].as_str().unwrap_or_default());
        let volumes = whole["config"]["Volumes"].as_object();
        assert_eq!(config.volumes.len(), volumes.map_or(0, serde_json::Map::len));
        // No other spelling of a member is there.
        for name in whole["config"].as_object().into_iter().flat_map(|config| config.keys()) {
            for known in ["Entrypoint", "Cmd", "Env", "User", "WorkingDir", "Volumes"] {
                assert!(name == known || !name.eq_ignore_ascii_case(known), "{name}");
            }
        }
    });
    assert!(alone() || good > 0, "nothing was accepted");
}

#[test]
fn manifests() {
    let mut good = 0_u64;
    fuzz("manifests", 1_000, |random| {
        let bytes = random.bent(&MANIFESTS, &WORDS);
        if serde_json::from_slice::<Plain>(&bytes).is_err() {
            return;
        }
        good += 1;
        // Nobody reads annotations: there may be numbers and texts in them that are none.
        let Ok(whole) = serde_json::from_slice::<Value>(&bytes) else { return };
        for name in whole.as_object().into_iter().flat_map(|members| members.keys()) {
            for known in ["manifests", "config", "layers", "mediaType"] {
                assert!(name == known || !name.eq_ignore_ascii_case(known), "{name}");
            }
        }
    });
    assert!(alone() || good > 0, "nothing was accepted");
}

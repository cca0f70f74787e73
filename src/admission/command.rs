//! The supervisor's argv, and the original command recovered from it.
//!
//! Everything goes into `command`; `args` is never touched. So the original is always there:
//!
//! | the container has | `command` becomes | `args` |
//! |---|---|---|
//! | command, with or without args | supervisor, flags, `--`, its command | stays |
//! | args only | supervisor, flags, `--`, the image's ENTRYPOINT | stays |
//! | neither | supervisor, flags, `--`, the image's ENTRYPOINT and CMD | stays absent |
//!
//! The kubelet expands `$(NAME)` in `command` and `args` and turns `$$` into `$`. The container's
//! own words were under that rule before and stay as they are; words that come from elsewhere
//! (the image, `workingDir`, a user's name) were not, so each of their `$` is doubled.

use serde_json::{Value, json};

use super::json::{list, text, word, words};
use super::{Class, ImageConfig, PolicyRef, Refusal, shape};

/// Name of the supervisor's binary.
pub const SUPERVISOR: &str = "ringfence-supervisor";
/// Everything of ours in a container but its run directory and its policy is below this.
pub(super) const ROOT: &str = "/ringfence";
/// One step of the padding between [`ROOT`] and `bin`.
pub(super) const PAD: &str = "d";
/// Where the supervisor keeps its files and its socket.
pub(super) const RUN_DIR: &str = "/run/ringfence";
/// Where the policy is mounted.
pub(super) const POLICY_DIR: &str = "/etc/openshell";

/// Flags of the supervisor that both shapes of fencing have, in order; none where all is as it is by
/// itself.
#[derive(Debug, Default)]
pub(super) struct Flags(Vec<(&'static str, String)>);

impl Flags {
    /// Adds one.
    pub(super) fn push(&mut self, name: &'static str, value: impl Into<String>) {
        self.0.push((name, value.into()));
    }

    /// Name and value of each, as the supervisor is to read them.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&'static str, &str)> {
        self.0.iter().map(|(name, value)| (*name, value.as_str()))
    }
}

/// What a container was before it was fenced.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Original {
    /// Its command; `None` where the image's ENTRYPOINT applies. `Some` and empty where an earlier
    /// injection found that the image has none and `args` is all there is.
    pub command: Option<Vec<String>>,
    /// `USER[:GROUP]` of an earlier injection.
    pub user: Option<String>,
    /// Working directory of an earlier injection.
    pub workdir: Option<String>,
    /// Whether there was an earlier injection.
    pub injected: bool,
    /// Whether that left the command as it was. No `user` means then that the container's own is
    /// root, or was the policy's to say.
    pub runner: bool,
}

impl Original {
    /// Looks through an earlier injection, one level deep: what the supervisor was to run is the
    /// original, also where that names a supervisor again (it would run inside the fence).
    ///
    /// # Errors
    /// A `command` or `args` that is not a list of strings.
    pub(super) fn of(container: &Value) -> Result<Self, Refusal> {
        let command = words(container, "command")?;
        let has_args = !words(container, "args")?.is_empty();
        let Some(mut found) = recover(&command) else {
            let command = Some(command).filter(|command| !command.is_empty());
            let earlier = shape::earlier(container);
            let injected = earlier.is_some();
            let user = earlier.and_then(|earlier| earlier.user);
            return Ok(Self { command, user, injected, runner: injected, workdir: None });
        };
        if !has_args && found.command.as_ref().is_some_and(Vec::is_empty) {
            found.command = None;
        }
        Ok(found)
    }
}

/// Whether a path is one that the injector gives to the supervisor's binary.
fn is_supervisor(path: &str) -> bool {
    let dir = path.strip_suffix(SUPERVISOR).and_then(|rest| rest.strip_suffix('/'));
    dir.is_some_and(is_bin_dir)
}

/// Whether a path is one that the injector gives to the binary's directory.
pub(super) fn is_bin_dir(path: &str) -> bool {
    let middle = path.strip_prefix(ROOT).and_then(|rest| rest.strip_suffix("/bin"));
    let mut steps = middle.into_iter().flat_map(|pad| pad.split('/'));
    steps.next() == Some("") && steps.all(|step| step == PAD)
}

/// Reads an argv of ours. `None` for anything else, also for one that is only nearly ours.
pub(super) fn recover(command: &[String]) -> Option<Original> {
    let (first, mut rest) = command.split_first()?;
    if !is_supervisor(first) {
        return None;
    }
    let mut found = Original { injected: true, ..Original::default() };
    loop {
        let (flag, after) = rest.split_first()?;
        match flag.as_str() {
            "--" => {
                found.command = Some(after.to_vec());
                return Some(found);
            }
            "--no-env" => rest = after,
            "--policy-data"
            | "--policy-rules"
            | "--upstream-ca"
            | "--policy-digest"
            | "--live-policy"
            | "--workdir"
            | "--run-as"
            | "--groups"
            | "--log-level"
            | "--inbound"
            | "--transparent"
            | "--volume-read-only"
            | "--volume-read-write"
            | "--sidecar-ports"
            | "--admin-port"
            | "--run-dir" => {
                let (value, after) = after.split_first()?;
                match flag.as_str() {
                    // We write no empty one: it would count once and be gone the next time.
                    "--workdir" => {
                        found.workdir = Some(single(value)).filter(|dir| !dir.is_empty());
                    }
                    "--run-as" => found.user = Some(single(value)),
                    _ => {}
                }
                rest = after;
            }
            // Of a version that knows more: it is dropped with its value.
            flag if flag.starts_with("--") => {
                rest = match after.split_first() {
                    Some((value, after)) if !value.starts_with("--") => after,
                    _ => after,
                };
            }
            _ => return None,
        }
    }
}

/// Makes a word safe from the kubelet's expansion.
pub(super) fn double(word: &str) -> String {
    word.replace('$', "$$")
}

/// Undoes [`double`].
pub(super) fn single(word: &str) -> String {
    word.replace("$$", "$")
}

/// The words behind `--`.
///
/// # Errors
/// There is nothing to run: neither the pod nor the image says what.
pub(super) fn child(
    container: &Value,
    original: &Original,
    image: Option<&ImageConfig>,
) -> Result<Vec<String>, Refusal> {
    if let Some(command) = &original.command {
        return Ok(command.clone());
    }
    let name = text(container, "name").unwrap_or_default();
    let what = text(container, "image").unwrap_or_default();
    let Some(image) = image else {
        return Err(Refusal::new(
            Class::Entrypoint,
            format!("container {name} has no command and image {what} was not read"),
        ));
    };
    let no_args = list(container, "args").is_empty();
    let cmd = if no_args { image.cmd.as_slice() } else { &[] };
    let child: Vec<String> = image.entrypoint.iter().chain(cmd).map(|w| double(w)).collect();
    if child.is_empty() && no_args {
        return Err(Refusal::with_fix(
            Class::Entrypoint,
            format!("container {name} has no command, and image {what} has no ENTRYPOINT or CMD"),
            "set command in the pod",
        ));
    }
    Ok(child)
}

/// The working directory for the flag: the container's, an earlier injection's, the image's.
pub(super) fn workdir(
    container: &Value,
    original: &Original,
    image: Option<&ImageConfig>,
) -> Option<String> {
    word(container, "workingDir")
        .map(str::to_owned)
        .or_else(|| original.workdir.clone())
        .or_else(|| image.map(|image| image.working_dir.clone()))
        .filter(|dir| !dir.is_empty())
}

/// What the argv is made of.
pub(super) struct Argv<'a> {
    /// Directory of the binary.
    pub bin_dir: &'a str,
    pub policy: &'a PolicyRef,
    pub workdir: Option<&'a str>,
    /// `USER[:GROUP]`
    pub run_as: &'a str,
    pub groups: &'a [String],
    pub log_level: &'a str,
    /// `mirror`, `none` or ports.
    pub inbound: &'a str,
    /// What both shapes have.
    pub flags: &'a Flags,
    /// Of the admin endpoint; 0 for none.
    pub admin_port: u16,
    /// From [`child`].
    pub child: &'a [String],
}

impl Argv<'_> {
    /// The container's new `command`.
    pub(super) fn build(&self) -> Value {
        let mut argv = vec![format!("{}/{SUPERVISOR}", self.bin_dir)];
        let mut flag = |name: &str, value: String| {
            argv.push(name.to_owned());
            argv.push(value);
        };
        if self.policy.follows.is_some() {
            // Which files there are may change, and the digest with them.
            flag("--live-policy", POLICY_DIR.to_owned());
        } else {
            flag("--policy-data", format!("{POLICY_DIR}/policy.yaml"));
            if self.policy.has("policy.rego") {
                flag("--policy-rules", format!("{POLICY_DIR}/policy.rego"));
            }
            if self.policy.has("upstream-ca.crt") {
                flag("--upstream-ca", format!("{POLICY_DIR}/upstream-ca.crt"));
            }
            flag("--policy-digest", double(&self.policy.digest));
        }
        if let Some(dir) = self.workdir {
            flag("--workdir", double(dir));
        }
        flag("--run-as", double(self.run_as));
        if !self.groups.is_empty() {
            flag("--groups", self.groups.join(","));
        }
        flag("--log-level", self.log_level.to_owned());
        flag("--inbound", self.inbound.to_owned());
        for (name, value) in self.flags.iter() {
            flag(name, double(value));
        }
        flag("--admin-port", self.admin_port.to_string());
        flag("--run-dir", RUN_DIR.to_owned());
        argv.push("--no-env".to_owned());
        argv.push("--".to_owned());
        argv.extend_from_slice(self.child);
        json!(argv)
    }
}

/// Path of the supervisor in a fenced container; `None` where the container is not fenced.
///
/// The path alone decides. A later version may have given the supervisor flags that this one does
/// not know (a roll-out, a rollback): the container is fenced all the same, and a command sent there
/// has to enter the fence.
#[must_use]
pub fn supervisor_path(container: &Value) -> Option<&str> {
    let first = list(container, "command").first()?.as_str()?;
    is_supervisor(first).then_some(first)
}

/// What `kubectl exec` and probes put before a command that is to run inside the fence of this
/// container; `None` where the container is not fenced.
#[must_use]
pub fn enter_prefix(container: &Value) -> Option<Vec<String>> {
    supervisor_path(container).map(enter)
}

/// The same for a path.
pub(super) fn enter(supervisor: &str) -> Vec<String> {
    [supervisor, "enter", "--run-dir", RUN_DIR, "--"].map(str::to_owned).to_vec()
}

/// A command behind [`enter`], or `None`.
pub(super) fn entered(command: &[String]) -> Option<&[String]> {
    let supervisor = command.first().filter(|path| is_supervisor(path))?;
    command.strip_prefix(enter(supervisor).as_slice())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BIN: &str = "/ringfence/d/d/bin";

    fn argv(child: &[&str], workdir: Option<&str>) -> Value {
        let child: Vec<String> = child.iter().map(|&word| word.to_owned()).collect();
        let mut flags = Flags::default();
        if workdir.is_some() {
            flags.push("--transparent", "off");
            flags.push("--volume-read-write", "/d$");
        }
        Argv {
            bin_dir: BIN,
            policy: &PolicyRef { digest: "sha256:00".into(), ..PolicyRef::default() },
            workdir,
            run_as: "1000:0",
            groups: &["5".into(), "6".into()],
            log_level: "warn",
            inbound: "mirror",
            flags: &flags,
            admin_port: 15200,
            child: &child,
        }
        .build()
    }

    #[test]
    fn the_argv_is_the_contract() {
        assert_eq!(
            argv(&["sh", "-c", "echo $$ $(A)"], Some("/w$x")),
            json!([
                "/ringfence/d/d/bin/ringfence-supervisor",
                "--policy-data",
                "/etc/openshell/policy.yaml",
                "--policy-digest",
                "sha256:00",
                "--workdir",
                "/w$$x",
                "--run-as",
                "1000:0",
                "--groups",
                "5,6",
                "--log-level",
                "warn",
                "--inbound",
                "mirror",
                "--transparent",
                "off",
                "--volume-read-write",
                "/d$$",
                "--admin-port",
                "15200",
                "--run-dir",
                "/run/ringfence",
                "--no-env",
                "--",
                "sh",
                "-c",
                "echo $$ $(A)"
            ])
        );
    }

    #[test]
    fn the_original_comes_back() {
        let fenced = json!({"command": argv(&["--", "sh", "$$"], Some("/w$x"))});
        assert_eq!(
            Original::of(&fenced).unwrap(),
            Original {
                command: Some(vec!["--".into(), "sh".into(), "$$".into()]),
                user: Some("1000:0".into()),
                workdir: Some("/w$x".into()),
                injected: true,
                runner: false,
            }
        );
        // Not one that a second pass would not find again.
        let empty = json!({"command": argv(&["sh"], Some(""))});
        assert_eq!(Original::of(&empty).unwrap().workdir, None);
    }

    #[test]
    fn nearly_ours_is_not_ours() {
        for command in [
            json!(["/ringfence/x/bin/ringfence-supervisor", "--no-env", "--", "sh"]),
            json!(["/ringfence//bin/ringfence-supervisor", "--", "sh"]),
            json!(["/ringfence/d/../bin/ringfence-supervisor", "--", "sh"]),
            json!(["/ringfencebin/ringfence-supervisor", "--", "sh"]),
            json!(["/ringfenced/bin/ringfence-supervisor", "--", "sh"]),
            json!(["/ringfence/d/bin/ringfence-supervisor", "install", "/x"]),
            json!(["/ringfence/d/bin/ringfence-supervisor", "--run-as"]),
            json!(["/ringfence/d/bin/ringfence-supervisor", "--no-env"]),
            json!(["sh", "-c", "--"]),
        ] {
            let found = Original::of(&json!({"command": command})).unwrap();
            assert!(!found.injected, "{command}");
            assert_eq!(json!(found.command), command);
        }
        assert!(is_supervisor("/ringfence/bin/ringfence-supervisor"));
    }

    #[test]
    fn image_words_are_doubled_and_own_words_are_not() {
        let image = ImageConfig {
            entrypoint: vec!["/e$".into()],
            cmd: vec!["$(HOME)".into(), "$$".into()],
            ..ImageConfig::default()
        };
        let run = |container: Value| {
            child(&container, &Original::of(&container).unwrap(), Some(&image)).unwrap()
        };
        assert_eq!(run(json!({})), ["/e$$", "$$(HOME)", "$$$$"]);
        assert_eq!(run(json!({"command": [], "args": null})), ["/e$$", "$$(HOME)", "$$$$"]);
        assert_eq!(run(json!({"args": ["$(X)"]})), ["/e$$"]);
        assert_eq!(run(json!({"command": ["$$"]})), ["$$"]);
    }

    #[test]
    fn nothing_to_run_is_refused() {
        let container = json!({"name": "a", "image": "i"});
        let original = Original::default();
        for image in [None, Some(&ImageConfig::default())] {
            let refusal = child(&container, &original, image).unwrap_err();
            assert_eq!(refusal.class, Class::Entrypoint);
            assert!(refusal.message.contains("set command"), "{refusal}");
        }
        let args = json!({"args": ["x"]});
        assert!(child(&args, &original, Some(&ImageConfig::default())).unwrap().is_empty());
        let fenced = json!({"command": argv(&[], None), "args": ["x"]});
        assert_eq!(Original::of(&fenced).unwrap().command, Some(vec![]));
    }

    #[test]
    fn enter_is_recognised() {
        let fenced = json!({"command": argv(&["sh"], None)});
        let mut command = enter_prefix(&fenced).unwrap();
        assert_eq!(command[1], "enter");
        command.push("ls".into());
        assert_eq!(entered(&command), Some(&["ls".to_owned()][..]));
        assert_eq!(enter_prefix(&json!({"command": ["sh"]})), None);
    }

    proptest! {
        #[test]
        fn any_words_come_back(
            child in prop::collection::vec("[-a$()=/ ]{0,5}", 1..5),
            workdir in prop::option::of("/[a$()]{1,4}"),
        ) {
            let words: Vec<&str> = child.iter().map(String::as_str).collect();
            let found = Original::of(&json!({"command": argv(&words, workdir.as_deref())})).unwrap();
            prop_assert_eq!(found.command, Some(child));
            prop_assert_eq!(found.workdir, workdir);
        }
    }
}

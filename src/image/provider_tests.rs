//! Plugins are programs of a few lines of shell, run for real.

use std::os::unix::fs::PermissionsExt as _;

use super::*;
use crate::image::credentials::matching;

/// A directory with one plugin, `cloud`, which notes each request beside itself.
struct Plugin(tempfile::TempDir);

impl Plugin {
    fn new(script: &str) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("cloud");
        let text =
            format!("#!/bin/sh\ncat >>\"${{0%/*}}/asked\"\necho >>\"${{0%/*}}/asked\"\n{script}\n");
        std::fs::write(&path, text).expect("written");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).expect("set");
        Self(dir)
    }

    fn answers(scope: &str, more: &str) -> Self {
        Self::new(&format!(
            r#"printf '{{"apiVersion":"{PROTOCOL}","kind":"CredentialProviderResponse","cacheKeyType":"{scope}",{more}"auth":{{"*.cloud.example":{{"username":"%s","password":"%s"}}}}}}' "$1" "$WHO""#
        ))
    }

    fn asked(&self) -> Vec<String> {
        let text = std::fs::read_to_string(self.0.path().join("asked")).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    fn providers(&self) -> Result<Providers, ProviderError> {
        Providers::read(&config(""), self.0.path())
    }
}

fn config(more: &str) -> String {
    format!(
        "apiVersion: {CONFIG}\nkind: CredentialProviderConfig\nproviders:\n- name: cloud\n  \
         matchImages: ['*.cloud.example', 'r.example/team']\n  defaultCacheDuration: 12h0m0s\n  \
         apiVersion: {PROTOCOL}\n  args: [user]\n  env: [{{name: WHO, value: secret}}]\n{more}"
    )
}

fn image(name: &str) -> Reference {
    name.parse().expect(name)
}

async fn ask(providers: &Providers, name: &str) -> Vec<Result<Credentials, Failed>> {
    let image = image(name);
    let mut all = Vec::new();
    for provider in providers.of(&image) {
        all.push(provider.credentials(&image).await);
    }
    all
}

#[tokio::test]
async fn a_plugin_is_asked_for_its_images_by_repository() {
    let plugin = Plugin::answers("Image", "");
    let providers = plugin.providers().expect("reads");
    let name = "a.cloud.example/team/app:1";
    for name in [name, "a.cloud.example/team/app:2", "other.example/app", "r.example/other"] {
        ask(&providers, name).await;
    }
    let request = format!(
        r#"{{"apiVersion":"{PROTOCOL}","kind":"CredentialProviderRequest","image":"a.cloud.example/team/app"}}"#
    );
    assert_eq!(plugin.asked(), [request]);
    let found = ask(&providers, name).await.remove(0).expect("credentials");
    let image = image(name);
    let [credential] = matching(&found, &image)[..] else { panic!("one fits: {found:?}") };
    assert_eq!(credential.source, "credential provider `cloud`");
    let (auth, _) = crate::image::credentials::auth_and_identity(Some(credential));
    assert_eq!(auth, RegistryAuth::Basic("user".into(), "secret".into()));
    assert!(!format!("{found:?} {providers:?}").contains("secret"), "{found:?}");
}

#[tokio::test]
async fn an_answer_is_kept_for_what_it_says() {
    let names = ["a.cloud.example/x", "a.cloud.example/y", "b.cloud.example/x"];
    for (scope, more, times) in [
        ("Image", "", 3),
        ("Registry", "", 2),
        ("Global", "", 1),
        // Not at all.
        ("Global", r#""cacheDuration":"0s","#, 6),
    ] {
        let plugin = Plugin::answers(scope, more);
        let providers = plugin.providers().expect("reads");
        for name in names.iter().chain(&names) {
            ask(&providers, name).await.remove(0).expect("credentials");
        }
        assert_eq!(plugin.asked().len(), times, "{scope} {more}");
    }
}

#[tokio::test]
async fn what_a_plugin_does_wrong_is_told_without_its_words() {
    let words = |script: &str| {
        let plugin = Plugin::new(script);
        async move {
            let providers = plugin.providers().expect("reads");
            ask(&providers, "a.cloud.example/x").await.remove(0).expect_err("it failed").0
        }
    };
    assert_eq!(words("echo hunter2 >&2; exit 3").await, "it failed");
    assert_eq!(words("echo hunter2").await, "its answer is not understood");
    assert_eq!(words("head -c 3000000 /dev/zero").await, "its answer is not understood");
    let old = r#"printf '{"apiVersion":"v1","cacheKeyType":"Image"}'"#;
    assert_eq!(words(old).await, "its answer is not understood");
    let gone = Plugin::answers("Image", "");
    let providers = gone.providers().expect("reads");
    std::fs::remove_file(gone.0.path().join("cloud")).expect("removed");
    let failed = ask(&providers, "a.cloud.example/x").await.remove(0).expect_err("it is gone");
    assert_eq!(failed.0, "it cannot be started");
}

/// None is what "no credentials for this image" looks like.
#[tokio::test]
async fn an_answer_without_credentials_is_one() {
    let plugin = Plugin::new(&format!(
        r#"printf '{{"apiVersion":"{PROTOCOL}","cacheKeyType":"Image","auth":null}}'"#
    ));
    let providers = plugin.providers().expect("reads");
    let found = ask(&providers, "a.cloud.example/x").await.remove(0).expect("an answer");
    assert!(found.is_empty());
}

#[test]
fn a_configuration_that_cannot_work_is_refused_with_the_reason() {
    let plugin = Plugin::answers("Image", "");
    let read = |text: &str| Providers::read(text, plugin.0.path()).expect_err(text).to_string();
    let good = config("");
    for (from, to, words) in [
        ("config.k8s.io/v1", "config.k8s.io/v9", "apiVersion is \"kubelet.config.k8s.io/v9\""),
        ("credentialprovider.kubelet.k8s.io/v1", "x/v1", "credential provider `cloud`"),
        ("name: cloud", "name: ../cloud", "no name of a file"),
        ("name: cloud", "name: other", "there is no program"),
        ("12h0m0s", "soon", "defaultCacheDuration"),
        ("12h0m0s", "-1h", "defaultCacheDuration"),
        ("['*.cloud.example', 'r.example/team']", "[]", "matchImages is empty"),
        ("matchImages", "matchimages", "matchimages"),
    ] {
        let text = read(&good.replace(from, to));
        assert!(text.contains(words), "{to}: {text}");
    }
    let text = read(&config("  tokenAttributes: {serviceAccountTokenAudience: x}\n"));
    assert!(text.contains("tokenAttributes"), "{text}");
}

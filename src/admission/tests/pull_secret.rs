//! The pull secret that the fence's own image needs.

use serde_json::{Value, json};

use super::super::{Class, Outcome, Settings, needs, restore, verify, verify_update};
use super::{apply, fenced, images, namespace, policy};

const FIELD: &str = "imagePullSecrets";

fn settings() -> Settings {
    Settings { pull_secret: Some("fence-pull".into()), ..Settings::default() }
}

fn pod(secrets: &Value) -> Value {
    let mut pod = json!({"metadata": {"name": "p"}, "spec": {
        "containers": [{"name": "a", "image": "i", "command": ["x"]}]}});
    if !secrets.is_null() {
        pod["spec"][FIELD] = secrets.clone();
    }
    pod
}

fn made(pod: &Value, settings: &Settings) -> Value {
    fenced(pod, &namespace(&[]), settings)
}

fn restored(live: &Value, manifest: &Value) -> Value {
    let Outcome::Inject(back) = restore(live, manifest, &namespace(&[])) else {
        panic!("restored")
    };
    apply(manifest, &back)
}

/// `null`, an empty list and none are one; the pod's own, or its service account's, stay in front.
#[test]
fn the_secret_is_added_to_what_the_pod_has_and_once() {
    let ours = json!({"name": "fence-pull"});
    for (own, all) in [
        (Value::Null, json!([ours])),
        (json!([]), json!([ours])),
        (json!([{"name": "of-account"}]), json!([{"name": "of-account"}, ours])),
        (json!([ours, {"name": "of-pod"}]), json!([ours, {"name": "of-pod"}])),
        (json!([{}, {"name": ""}]), json!([{}, {"name": ""}, ours])),
    ] {
        let pod = pod(&own);
        let done = made(&pod, &settings());
        assert_eq!(done["spec"][FIELD], all);
        // And the final pod is what the function makes of it.
        let (ns, images, policy) = (namespace(&[]), images(&pod), policy());
        verify(None, &done, &ns, &settings(), &images, &policy).expect("a fixed point");
        // It is tried for the images of both passes alike.
        let read = |pod| needs(pod, &ns, &settings(), &policy).expect("needs");
        assert_eq!(read(&pod).pull_secrets, read(&done).pull_secrets);
        assert_eq!(read(&pod).added_secret.as_deref(), Some("fence-pull"));
        assert_eq!(read(&pod).added_secret, read(&done).added_secret);
        assert_eq!(made(&pod, &Settings::default())["spec"].get(FIELD), pod["spec"].get(FIELD));
    }
    let unnamed = Settings { pull_secret: Some(String::new()), ..Settings::default() };
    assert_eq!(made(&pod(&Value::Null), &unnamed)["spec"].get(FIELD), None);
    let mut null = pod(&Value::Null);
    null["spec"][FIELD] = Value::Null;
    assert_eq!(made(&null, &settings())["spec"][FIELD], json!([ours]));
}

#[test]
fn without_it_the_final_pod_is_refused() {
    let pod = pod(&json!([{"name": "own"}]));
    let mut done = made(&pod, &settings());
    done["spec"][FIELD] = json!([{"name": "own"}]);
    let (ns, images, policy) = (namespace(&[]), images(&pod), policy());
    let refusal = verify(None, &done, &ns, &settings(), &images, &policy).expect_err("refused");
    assert_eq!(refusal.class, Class::Unfixed);
    assert!(refusal.message.contains(FIELD), "{refusal}");
    // A replica of before the value had it: in a roll-out that is no difference of anybody's.
    let before = made(&pod, &Settings::default());
    verify(None, &before, &ns, &settings(), &images, &policy).expect("another replica's");
}

#[test]
fn a_manifest_that_is_applied_again_gets_it_back() {
    let ns = namespace(&[]);
    for own in [Value::Null, json!([{"name": "own"}])] {
        let manifest = pod(&own);
        let live = made(&manifest, &settings());
        let again = restored(&live, &manifest);
        assert_eq!(again["spec"], live["spec"]);
        verify_update(&live, &again, &ns).expect("as it was");
        // What was made without the value gets nothing.
        let live = made(&manifest, &Settings::default());
        let again = restored(&live, &manifest);
        assert_eq!(again["spec"].get(FIELD), manifest["spec"].get(FIELD));
    }
    // Another one of the request's own stays, and is the API server's to refuse.
    let live = made(&pod(&Value::Null), &settings());
    let other = pod(&json!([{"name": "other"}]));
    let again = restored(&live, &other);
    assert!(again["spec"][FIELD].to_string().contains("other"));
}

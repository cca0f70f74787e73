use super::super::set_up;
use super::super::tests::{Cluster, DEPLOYMENT, TestPod, words};
use super::*;

/// The label is set, whatever is seen afterwards.
async fn enabled(pods: &[TestPod], more: &[&str]) -> (Cluster, Result<(), String>) {
    let cluster = Cluster::new(&[]);
    cluster.state().pods = pods.to_vec();
    // Enough for those that come to be fenced; the others are to fail.
    let within = if pods.iter().any(|pod| matches!(pod, TestPod::Fenced)) { "60" } else { "1" };
    let within = if more.iter().any(|word| word.starts_with("--within")) {
        Vec::new()
    } else {
        vec!["--within", within]
    };
    let words = words(&[&within, more].concat());
    let done = set_up(&cluster.connect(), &words).await;
    let patched = cluster.writes().into_iter().filter(|(how, _)| how == "PATCH").count();
    assert_eq!(patched, 1, "the label stays");
    (cluster, done.map_err(|error| format!("{error:#}")))
}

#[tokio::test]
async fn the_label_counts_when_test_pods_in_a_row_are_fenced() {
    use TestPod::{Bare, Fenced, Refused};
    let starting = Refused(403, "serviceaccount \"default\" not found");
    let (cluster, done) = enabled(&[starting, Bare, Fenced, Bare, Fenced], &[]).await;
    done.expect("enabled");
    let state = cluster.state();
    // One that came back bare in between begins the row anew.
    assert_eq!(state.asked, 4 + IN_A_ROW);
    // Each on a connection of its own, beside the first for all else.
    assert!(state.clients > state.asked, "{} of {}", state.clients, state.asked);
}

#[tokio::test]
async fn a_label_that_nobody_looks_at_is_an_error() {
    let (cluster, done) = enabled(&[TestPod::Bare], &[]).await;
    let error = done.expect_err("not confirmed");
    for words in ["came back without a fence", "has the label and keeps it", "ringfence disable ns"]
    {
        assert!(error.contains(words), "{error}");
    }
    assert!(cluster.state().asked > 1);
    // Fenced by one API server, and not by another.
    let cluster = Cluster::new(&[]);
    cluster.state().pods = [TestPod::Fenced, TestPod::Bare].repeat(20);
    let done = set_up(&cluster.connect(), &words(&["--within=2"])).await;
    assert!(done.expect_err("not confirmed").to_string().contains("has the label and keeps it"));
}

#[tokio::test]
async fn what_refuses_its_pods_is_said() {
    // By Ringfence itself: the last word, once it may have seen what was just mended.
    let policy = "admission webhook \"pods.ringfence.dev\" denied the request: ringfence: there is no ConfigMap openshell-policy in namespace ringfence; see the ConfigMap";
    let (cluster, done) = enabled(&[TestPod::Refused(422, policy)], &["--within=60"]).await;
    let error = done.expect_err("refused");
    assert!(error.contains("there is no ConfigMap openshell-policy"), "{error}");
    assert!((2..100).contains(&cluster.state().asked), "{}", cluster.state().asked);
    let mended = [TestPod::Refused(422, policy), TestPod::Fenced];
    enabled(&mended, &[]).await.1.expect("mended meanwhile");
    // By anybody else it may be another answer a moment later.
    let others = [
        "pods \"ringfence-selftest-\" is forbidden: violates PodSecurity \"baseline:latest\"",
        "ValidatingAdmissionPolicy 'ringfence-guard' denied request: no fence",
        "admission webhook \"verify.ringfence.dev\" denied the request: ringfence: not as injected",
    ];
    for text in others {
        let (cluster, done) = enabled(&[TestPod::Refused(403, text)], &[]).await;
        let error = done.expect_err("refused");
        assert!(error.contains(text), "{error}");
        assert!(cluster.state().asked > 1, "{text}");
    }
    let busy = "admission webhook \"pods.ringfence.dev\" denied the request: ringfence: the policy could not be read in time; try again";
    let (_, done) = enabled(&[TestPod::Refused(503, busy), TestPod::Fenced], &[]).await;
    done.expect("enabled");
}

#[tokio::test]
async fn a_pod_that_is_fenced_for_the_other_value_is_not_it() {
    use TestPod::{Fenced, FencedFor};
    let (cluster, done) = enabled(&[FencedFor("enabled"), Fenced], &["--strict"]).await;
    done.expect("enabled");
    assert_eq!(cluster.state().asked, 1 + IN_A_ROW);
    let (_, done) = enabled(&[FencedFor("strict")], &[]).await;
    assert!(done.expect_err("not yet").contains("the label's value strict"));
    let (_, done) = enabled(&[FencedFor("strict")], &["--strict"]).await;
    done.expect("strict");
}

#[tokio::test]
async fn what_cannot_be_checked_is_no_failure() {
    let (cluster, done) = enabled(&[TestPod::Bare], &["--within=0"]).await;
    done.expect("a warning");
    assert_eq!(cluster.state().asked, 0);
    let quota = "pods \"x\" is forbidden: failed quota: q: must specify limits.cpu for: agent";
    let (_, done) = enabled(&[TestPod::Refused(403, quota)], &[]).await;
    done.expect("a warning");

    let cluster = Cluster::new(&[]);
    cluster.state().no_pods = true;
    set_up(&cluster.connect(), &words(&[])).await.expect("a warning");
    assert_eq!(cluster.state().asked, 0);

    // Who may label namespaces need not be able to read the release.
    let cluster = Cluster::new(&[]);
    cluster.state().objects.remove(DEPLOYMENT);
    set_up(&cluster.connect(), &words(&[])).await.expect("a warning");
    assert_eq!(cluster.state().asked, 0);
    set_up(&cluster.connect(), &words(&["--image", "registry.example/a:1"])).await.expect("fenced");
    assert_eq!(cluster.state().asked, IN_A_ROW);
}

#[tokio::test]
async fn an_image_of_the_test_pod_that_is_not_read_says_nothing_of_others() {
    let unread = "admission webhook \"pods.ringfence.dev\" denied the request: ringfence: container agent: cannot read image `registry.example/ringfence:1` from registry `registry.example`; make it readable";
    let (cluster, done) = enabled(&[TestPod::Refused(422, unread)], &[]).await;
    done.expect("the webhook answered");
    assert_eq!(cluster.state().asked, 1);
    // One that the person named was to be read.
    let (_, done) =
        enabled(&[TestPod::Refused(422, unread)], &["--image=registry.example/a"]).await;
    assert!(done.expect_err("refused").contains("cannot read image"));
}

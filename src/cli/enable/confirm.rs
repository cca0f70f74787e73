//! Whether the label is looked at: an API server learns of it by a watch, and until then makes pods
//! as if it were not there.

use std::time::Duration;

use anyhow::bail;
use k8s_openapi::api::authorization::v1::SelfSubjectAccessReview;
use kube::api::PostParams;
use kube::{Api, Client};
use serde_json::json;
use tokio::time::{Instant, sleep, timeout_at};

use super::{Place, webhook};
use crate::cli::probe::{self, CONTAINER, Seen};

/// So many test pods in a row have to come back fenced, each over a connection of its own: behind one
/// address there may be several API servers, and one says nothing of the others.
const IN_A_ROW: usize = 3;
/// Between two questions.
const PAUSE: Duration = Duration::from_millis(300);

/// After so long a refusal by Ringfence is its last word: it learns by watches, too, of what was just
/// mended.
const SETTLED: Duration = Duration::from_secs(2);

/// How a refusal by the mutating webhook for new pods begins.
const OURS: &str = "\"pods.ringfence.dev\" denied the request: ringfence: ";
/// In what the API server's quotas say.
const QUOTA: [&str; 2] = ["exceeded quota: ", "failed quota: "];

/// How it is tried.
#[derive(Debug, clap::Args)]
pub(super) struct Test {
    /// The image of the test pod (a dry run: nothing is created), which the webhook has to be able to
    /// read. Default: that of the release's Deployment.
    #[arg(long, value_name = "REFERENCE")]
    image: Option<String>,
    /// Seconds to wait until the API server looks at the label; 0: it is not tried.
    #[arg(long, value_name = "SECONDS", default_value_t = 15,
        value_parser = clap::value_parser!(u64).range(0..=3600))]
    within: u64,
}

/// What test pods are to show.
pub(super) struct Wanted<'a> {
    pub(super) place: &'a Place,
    /// The label's value.
    pub(super) mode: &'static str,
    /// The service account of the test pod; `None`: the namespace's default.
    pub(super) account: Option<&'a str>,
}

/// Waits until pods that are made in the labelled namespace come back fenced, and says what was seen.
pub(super) async fn fenced(
    connect: &impl Fn() -> anyhow::Result<Client>,
    wanted: Wanted<'_>,
    test: &Test,
) -> anyhow::Result<()> {
    let namespace = &wanted.place.namespace;
    if test.within == 0 {
        not_checked(namespace, "--within 0");
        return Ok(());
    }
    let until = Instant::now() + Duration::from_secs(test.within);
    let Ok(asking) = timeout_at(until, Asking::prepare(&connect()?, wanted, test)).await else {
        bail!("{}", unconfirmed(namespace, "the API server does not answer"));
    };
    let asking = match asking {
        Ok(asking) => asking,
        Err(why) => {
            not_checked(namespace, &why);
            return Ok(());
        }
    };
    let mut in_a_row = 0;
    let mut settled: Option<Instant> = None;
    let mut last = Answer::Refused(
        "no test pod was answered in time (by a registry that is silent? --image names another image, --within gives more time)".to_owned(),
    );
    while let Ok(answered) = timeout_at(until, asking.once(&connect()?)).await {
        let (answer, is_settled) = answered?;
        last = answer;
        if matches!(last, Answer::Fenced) {
            in_a_row += 1;
            if in_a_row == IN_A_ROW {
                println!(
                    "namespace {namespace}: new pods are fenced ({IN_A_ROW} dry runs in a row came back so)"
                );
                return Ok(());
            }
            continue;
        }
        in_a_row = 0;
        let since = is_settled.then(|| settled.unwrap_or_else(Instant::now));
        settled = since;
        let is_last_word = since.is_some_and(|since| since.elapsed() >= SETTLED)
            || matches!(last, Answer::OfTheImage(_));
        if is_last_word || Instant::now() + PAUSE >= until {
            break;
        }
        sleep(PAUSE).await;
    }
    match last {
        Answer::Fenced => {
            bail!("{}", unconfirmed(namespace, "test pods take too long, see --within"))
        }
        Answer::Refused(why) => bail!("{}", unconfirmed(namespace, &why)),
        Answer::OfTheImage(why) => {
            println!(
                "namespace {namespace}: new pods are looked at by Ringfence; whether one comes up fenced could not be seen, because of the test pod's own image ({why}); --image names another"
            );
            Ok(())
        }
        Answer::Quota(why) => {
            not_checked(namespace, &format!("a quota refused the test pod: {why}"));
            Ok(())
        }
    }
}

fn unconfirmed(namespace: &str, why: &str) -> String {
    format!(
        "namespace {namespace} has the label and keeps it, but it was not confirmed that new pods are fenced: {why}; mend that, then run `ringfence enable` again as before, or take the label away by `ringfence disable {namespace}`"
    )
}

fn not_checked(namespace: &str, why: &str) {
    eprintln!(
        "warning: it could not be checked that new pods of namespace {namespace} are fenced: {why}; an API server takes a moment to look at the label, and makes pods without a fence until then"
    );
}

/// What one test pod shows.
enum Answer {
    Fenced,
    /// It was not fenced, or refused.
    Refused(String),
    /// Ringfence refuses it for the image that was chosen for it here.
    OfTheImage(String),
    /// Quotas come last of all, and refuse a pod that nobody looked at as well.
    Quota(String),
}

struct Asking<'a> {
    wanted: Wanted<'a>,
    image: String,
    /// It was named by the person.
    named: bool,
}

impl<'a> Asking<'a> {
    /// Or why it cannot be checked.
    async fn prepare(client: &Client, wanted: Wanted<'a>, test: &Test) -> Result<Self, String> {
        let place = wanted.place;
        let Place { namespace, release, release_namespace } = place;
        if !may_create(client, namespace).await {
            return Err("you may not create pods there".to_owned());
        }
        if let Some(image) = test.image.clone() {
            return Ok(Self { wanted, image, named: true });
        }
        let image = webhook(client, place).await.ok().flatten().and_then(|found| found.image);
        let image = image.ok_or_else(|| {
            format!(
                "the image of deployment {release_namespace}/{release} could not be read for a test pod: name one by --image"
            )
        })?;
        Ok(Self { wanted, image, named: false })
    }

    /// One test pod; and whether another one would fare no better.
    async fn once(&self, client: &Client) -> anyhow::Result<(Answer, bool)> {
        let Wanted { place: Place { namespace, release, .. }, mode: wanted, account } = self.wanted;
        let (code, text) = match probe::ask(client, namespace, &self.image, account).await? {
            // The webhook learns of the value by a watch of its own.
            Seen::Fenced { mode: Some(mode) } if (mode == "strict") != (wanted == "strict") => {
                let why = format!("a test pod came back fenced for the label's value {mode}");
                return Ok((Answer::Refused(why), false));
            }
            Seen::Fenced { .. } => return Ok((Answer::Fenced, false)),
            Seen::Bare => {
                let why = format!(
                    "a test pod came back without a fence; see that mutatingwebhookconfiguration {release} selects the namespace, and that the namespace's ringfence.dev/unfenced-containers does not exempt every container"
                );
                return Ok((Answer::Refused(why), false));
            }
            Seen::Refused { code, text } => (code, text),
        };
        // Of all who may refuse it the mutating webhook alone shows that the label is looked at.
        let ours = text.split_once(OURS).map(|(_, why)| why.to_owned());
        let is_settled = ours.is_some() && code != Some(503);
        let answer = match ours {
            Some(why) if !self.named && why.starts_with(&format!("container {CONTAINER}: ")) => {
                Answer::OfTheImage(why)
            }
            None if QUOTA.iter().any(|words| text.contains(words)) => Answer::Quota(text),
            _ => Answer::Refused(format!("a test pod was refused: {text}")),
        };
        Ok((answer, is_settled))
    }
}

/// By the review that the API server asks of itself. Who cannot even ask that is shown by the test pod.
async fn may_create(client: &Client, namespace: &str) -> bool {
    let attributes = json!({"namespace": namespace, "verb": "create", "resource": "pods"});
    let review = json!({
        "apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview", "metadata": {},
        "spec": {"resourceAttributes": attributes},
    });
    let Ok(review) = serde_json::from_value(review) else { return true };
    let api: Api<SelfSubjectAccessReview> = Api::all(client.clone());
    let answer = api.create(&PostParams::default(), &review).await;
    answer.ok().and_then(|review| review.status).is_none_or(|status| status.allowed)
}

#[cfg(test)]
mod tests;

//! Certificates from elsewhere: the release is moved to one and back, with Helm, as an administrator
//! would. So these tests change the release, and run alone: `E2E_THREADS=1 tests/e2e/run --ignored`.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, SystemTime};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use k8s_openapi::api::admissionregistration::v1::{
    MutatingWebhookConfiguration, ValidatingWebhookConfiguration,
};
use k8s_openapi::api::core::v1::{Pod, Secret};
use kube::api::{DeleteParams, Patch, PatchParams};
use kube::{Api, ResourceExt as _};
use ringfence::pki::{Authority, LeafKey, SubjectName, certificate_pem};
use serde_json::{Value, json};
use tokio::process::Command;
use tokio::time::{sleep, timeout};

use crate::place::{PATIENCE, Place, fenced, is_ready};
use crate::release::{RELEASE, Release, ask};
use crate::rig::RELEASE_NAMESPACE;

const SECRET: &str = "e2e-certificate";
const DAY: Duration = Duration::from_secs(86_400);

/// What these tests do with the release's certificate.
impl Release {
    fn secrets(&self) -> Api<Secret> {
        Api::namespaced(self.client.clone(), RELEASE_NAMESPACE)
    }

    /// Puts a certificate for `name` by `ca` into the Secret; returns when it expires, Unix time.
    async fn issue(&self, ca: &Authority, name: &str, days: u32) -> u64 {
        let key = LeafKey::generate().expect("a key");
        let leaf = ca.leaf(&[SubjectName::Dns(name.into())], DAY * days, &key).expect("a leaf");
        let secret = json!({ "apiVersion": "v1", "kind": "Secret", "type": "kubernetes.io/tls",
            "metadata": { "name": SECRET },
            "stringData": { "tls.crt": certificate_pem(&leaf.cert[0]), "tls.key": key.key_pem(),
                "ca.crt": ca.certificate_pem() } });
        let params = PatchParams::apply("e2e").force();
        self.secrets().patch(SECRET, &params, &Patch::Apply(&secret)).await.expect("written");
        (SystemTime::now() + DAY * days)
            .duration_since(SystemTime::UNIX_EPOCH)
            .expect("after 1970")
            .as_secs()
    }

    /// When what each replica serves expires, Unix time; 0 for one that is not ready.
    async fn ends(&self) -> Vec<u64> {
        let mut ends = Vec::new();
        for pod in self.pods().await {
            let text = ask(&pod, "/metrics").await;
            let line = text
                .lines()
                .find_map(|line| line.strip_prefix("ringfence_webhook_cert_not_after_seconds "));
            let end = line.filter(|_| is_ready(&pod)).and_then(|line| line.parse().ok());
            ends.push(end.unwrap_or_default());
        }
        ends
    }

    /// Waits until every replica serves the certificate that expires then, give or take a minute.
    async fn serves(&self, not_after: u64) {
        self.until("serves the new certificate", async || {
            let ends = self.ends().await;
            !ends.is_empty() && ends.iter().all(|end| end.abs_diff(not_after) <= 60)
        })
        .await;
    }

    /// The bundle of the first entry, PEM.
    async fn bundle(&self) -> String {
        let api: Api<MutatingWebhookConfiguration> = Api::all(self.client.clone());
        let found = api.get(RELEASE).await.expect("the configuration");
        let bundle = found.webhooks.unwrap_or_default().remove(0).client_config.ca_bundle;
        String::from_utf8(bundle.expect("a bundle").0).expect("PEM")
    }

    /// Back to what it was, without the certificate.
    async fn give_up(&self) {
        self.restore().await;
        drop(self.secrets().delete(SECRET, &DeleteParams::default()).await);
    }
}

fn authority() -> Authority {
    Authority::ephemeral("an authority of the company", DAY * 365).expect("an authority")
}

fn server_name() -> String {
    format!("{RELEASE}.{RELEASE_NAMESPACE}.svc")
}

fn given(bundle: &str) -> Value {
    json!({ "certificates": { "secret": SECRET, "caBundle": bundle } })
}

/// Creates pods, as a dry run, until it is told to end; the first that is refused is a panic.
struct Creators {
    done: Arc<AtomicBool>,
    admitted: Arc<AtomicU32>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

impl Creators {
    fn start(place: &Place) -> Self {
        let (done, admitted) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU32::new(0)));
        let tasks = (0..2).map(|number| {
            let (place, done, admitted) = (place.clone(), Arc::clone(&done), Arc::clone(&admitted));
            tokio::spawn(async move {
                while !done.load(Ordering::Relaxed) {
                    let pod = place.agent_pod(&format!("agent-{number}"), |_, _| {});
                    place.create_dry(&pod).await;
                    admitted.fetch_add(1, Ordering::Relaxed);
                    sleep(Duration::from_millis(50)).await;
                }
            })
        });
        Self { tasks: tasks.collect(), done, admitted }
    }

    /// Some more pods were admitted after this was asked.
    async fn go_on(&self) {
        let before = self.admitted.load(Ordering::Relaxed);
        let more = async {
            while self.admitted.load(Ordering::Relaxed) < before + 20 {
                assert!(self.tasks.iter().all(|task| !task.is_finished()), "a pod was refused");
                sleep(Duration::from_millis(50)).await;
            }
        };
        timeout(PATIENCE, more).await.expect("pods are admitted");
    }

    async fn end(self) {
        self.done.store(true, Ordering::Relaxed);
        for task in self.tasks {
            task.await.expect("no pod was refused");
        }
        println!("{} pods", self.admitted.load(Ordering::Relaxed));
    }
}

#[tokio::test]
#[ignore = "changes the release"]
async fn no_pod_is_refused_on_the_way_to_ones_own_certificate_and_to_the_next() {
    fenced("brought", &[], async |place| {
        let release = Release::of(&place).await;
        let (first, second) = (authority(), authority());
        let creators = Creators::start(&place);
        creators.go_on().await;

        let until = release.issue(&first, &server_name(), 30).await;
        // Replicas that still run are trusted by their own CA.
        let both = format!("{}{}", release.bundle().await, first.certificate_pem());
        release.upgrade(given(&both), true).await;
        release.serves(until).await;
        creators.go_on().await;
        release.upgrade(given(first.certificate_pem()), true).await;
        creators.go_on().await;
        assert_eq!(release.bundle().await, first.certificate_pem(), "nobody puts another back");

        // Renewed, in place.
        let names: Vec<String> =
            release.pods().await.iter().map(kube::ResourceExt::name_any).collect();
        let until = release.issue(&first, &server_name(), 40).await;
        release.serves(until).await;
        creators.go_on().await;

        // Another CA: its certificate comes first, and waits.
        let next = release.issue(&second, &server_name(), 50).await;
        creators.go_on().await;
        release.serves(until).await;
        let both = format!("{}{}", first.certificate_pem(), second.certificate_pem());
        release.upgrade(given(&both), true).await;
        release.serves(next).await;
        release.upgrade(given(second.certificate_pem()), true).await;
        creators.go_on().await;
        let now: Vec<String> =
            release.pods().await.iter().map(kube::ResourceExt::name_any).collect();
        assert_eq!(now, names, "nothing was restarted");
        creators.end().await;
        release.give_up().await;
    })
    .await;
}

#[tokio::test]
#[ignore = "changes the release"]
async fn a_certificate_that_does_not_fit_is_told_and_replaces_nothing() {
    fenced("unfit", &[], async |place| {
        let release = Release::of(&place).await;
        let (ca, other) = (authority(), authority());
        let until = release.issue(&ca, &server_name(), 30).await;
        release.upgrade(given(ca.certificate_pem()), true).await;
        release.serves(until).await;
        release.admits().await;

        // For somebody else: what runs goes on, and a replica that begins says why it cannot.
        release.issue(&ca, "other.example", 60).await;
        let api: Api<Pod> = Api::namespaced(release.client.clone(), RELEASE_NAMESPACE);
        let mut pods = release.pods().await;
        let gone = pods.pop().expect("a replica").name_any();
        api.delete(&gone, &DeleteParams::default()).await.expect("deleted");
        let says = async |words: [&str; 2]| {
            for pod in release.pods().await {
                let text = ask(&pod, "/readyz").await;
                if words.iter().all(|word| text.contains(word)) {
                    return true;
                }
            }
            false
        };
        let name = server_name();
        let words = ["is for other.example", name.as_str()];
        release.until("says for whom the certificate is", async || says(words).await).await;
        let pod = place.agent_pod("agent", |_, _| {});
        place.create_dry(&pod).await;
        release.secrets().delete(SECRET, &DeleteParams::default()).await.expect("deleted");
        let words = ["does not exist", SECRET];
        release.until("says that the Secret is gone", async || says(words).await).await;
        place.create_dry(&pod).await;

        // A bundle of somebody else's, in the place of the right one.
        let until = release.issue(&ca, &server_name(), 45).await;
        release.serves(until).await;
        release.upgrade(given(other.certificate_pem()), false).await;
        let words = ["none of its CAs issued", "certificates.caBundle"];
        let words_by_name = ["another key", "certificates.caBundle"];
        release
            .until("says that the bundle does not fit", async || {
                says(words).await || says(words_by_name).await
            })
            .await;
        let answer = place.refused(&pod).await;
        assert!(answer.contains("certificate"), "{answer}");
        release.give_up().await;
    })
    .await;
}

/// The part of cert-manager's cainjector: as its own field manager, into every entry of whatever is
/// annotated.
async fn inject(release: &Release) {
    let secret = release.secrets().get(SECRET).await.expect("the Secret");
    let ca = STANDARD.encode(&secret.data.expect("data")["ca.crt"].0);
    let params =
        PatchParams { field_manager: Some("cert-manager-cainjector".into()), ..Default::default() };
    macro_rules! into {
        ($kind:ty) => {{
            let api: Api<$kind> = Api::all(release.client.clone());
            let found = api.get(RELEASE).await.expect("the configuration");
            let from = &found.annotations()["cert-manager.io/inject-ca-from"];
            assert_eq!(*from, format!("{RELEASE_NAMESPACE}/e2e"));
            let entries = found.webhooks.unwrap_or_default().len();
            let patch: Vec<Value> = (0..entries)
                .map(|n| json!({ "op": "add", "path": format!("/webhooks/{n}/clientConfig/caBundle"), "value": ca }))
                .collect();
            let patch: json_patch::Patch = serde_json::from_value(json!(patch)).expect("a patch");
            api.patch(RELEASE, &params, &Patch::Json::<()>(patch)).await.expect("injected");
        }};
    }
    into!(MutatingWebhookConfiguration);
    into!(ValidatingWebhookConfiguration);
}

#[tokio::test]
#[ignore = "changes the release"]
async fn what_cainjector_writes_is_waited_for_and_left_alone() {
    fenced("injected", &[], async |place| {
        let release = Release::of(&place).await;
        let (first, second) = (authority(), authority());
        let until = release.issue(&first, &server_name(), 30).await;
        let values = json!({ "certificates": { "secret": SECRET, "injectCaFrom": "e2e" } });
        release.upgrade(values, false).await;
        release
            .until("is annotated", async || {
                let api: Api<ValidatingWebhookConfiguration> = Api::all(release.client.clone());
                let found = api.get(RELEASE).await.expect("the configuration");
                found.annotations().contains_key("cert-manager.io/inject-ca-from")
            })
            .await;
        inject(&release).await;
        release.serves(until).await;
        release.admits().await;
        assert_eq!(release.bundle().await, first.certificate_pem());

        // Another CA: the Secret, then its bundle alone, as cert-manager does it.
        let until = release.issue(&second, &server_name(), 40).await;
        inject(&release).await;
        release.serves(until).await;
        release.admits().await;
        // In this mode there is nobody who would put the former back.
        assert_eq!(release.bundle().await, second.certificate_pem());
        let api: Api<MutatingWebhookConfiguration> = Api::all(release.client.clone());
        let managers = api.get(RELEASE).await.expect("it").metadata.managed_fields;
        let managers: Vec<String> =
            managers.unwrap_or_default().into_iter().filter_map(|entry| entry.manager).collect();
        assert!(managers.contains(&"cert-manager-cainjector".to_owned()), "{managers:?}");
        release.give_up().await;
    })
    .await;
}

/// cert-manager itself, where `tests/cluster/build-cert-manager` has built it: its controller and its
/// cainjector run beside this test, with the manifests and values of `certs/cert-manager`.
#[tokio::test]
#[ignore = "changes the release"]
async fn cert_manager_issues_injects_and_renews() {
    let Some(programs) = std::env::var_os("E2E_CERT_MANAGER").map(std::path::PathBuf::from) else {
        println!("SKIPPED: no cert-manager; tests/cluster/build-cert-manager builds it");
        return;
    };
    fenced("certmanager", &[], async move |place| {
        let release = Release::of(&place).await;
        let crds = programs.join("crds").to_string_lossy().into_owned();
        let kubectl = async |words: &[&str], input: &str| {
            let done = place.kubectl(&[&["-n", RELEASE_NAMESPACE], words].concat(), input).await;
            assert_eq!(done.code, 0, "kubectl {words:?}: {done:?}");
        };
        kubectl(&["apply", "-f", &crds], "").await;
        let established = ["wait", "--for=condition=Established", "--timeout=60s", "-f", &*crds];
        kubectl(&established, "").await;
        let start = |name: &str, flags: &[&str]| {
            let log = std::env::temp_dir().join(format!("e2e-{name}.log"));
            let log = std::fs::File::create(&log).expect("a log");
            Command::new(programs.join(name))
                .args(["--leader-elect=false"])
                .args(flags)
                .stdout(log.try_clone().expect("a log"))
                .stderr(log)
                .kill_on_drop(true)
                .spawn()
                .unwrap_or_else(|error| panic!("{name}: {error}"))
        };
        let kubeconfig = std::env::var("KUBECONFIG").expect("the rig sets it");
        let kubeconfig = format!("--kubeconfig={kubeconfig}");
        let mut controller = start("controller", &[&kubeconfig]);
        let mut cainjector = start("cainjector", &[]);

        let manifests = std::fs::read_to_string("certs/cert-manager/certificate.yaml");
        let manifests = manifests
            .expect("the manifests")
            .replace("namespace: ringfence\n", &format!("namespace: {RELEASE_NAMESPACE}\n"))
            .replace("ringfence.ringfence.svc", &server_name());
        kubectl(&["apply", "-f", "-"], &manifests).await;
        let values = std::fs::read_to_string("certs/cert-manager/values.yaml").expect("values");
        // `--wait`: it is ready, so cainjector has written the bundle.
        release.upgrade(serde_saphyr::from_str(&values).expect("YAML"), true).await;
        release.admits().await;
        let ca = async || {
            let secret = release.secrets().get("ringfence-webhook-tls").await.expect("issued");
            String::from_utf8(secret.data.expect("data")["ca.crt"].0.clone()).expect("PEM")
        };
        assert_eq!(release.bundle().await, ca().await);

        let before = release.ends().await;
        let creators = Creators::start(&place);
        creators.go_on().await;
        let gone = DeleteParams::default();
        release.secrets().delete("ringfence-webhook-tls", &gone).await.expect("deleted");
        release
            .until("serves what cert-manager issued anew", async || {
                let now = release.ends().await;
                !now.is_empty() && now.iter().all(|end| *end != 0 && !before.contains(end))
            })
            .await;
        creators.go_on().await;
        creators.end().await;

        release.give_up().await;
        for program in [&mut controller, &mut cainjector] {
            assert!(program.try_wait().expect("a child").is_none(), "it runs to the end");
        }
        kubectl(&["delete", "-f", &crds, "--wait=false"], "").await;
    })
    .await;
}

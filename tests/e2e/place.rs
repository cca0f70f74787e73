//! A namespace of a test's own, and what tests do in it.

use std::fmt::Debug;
use std::future::Future;
use std::process::Stdio;
use std::time::Duration;

use k8s_openapi::api::core::v1::{ContainerStatus, Event, Namespace, Pod};
use kube::api::{DeleteParams, ListParams, LogParams, PostParams};
use kube::runtime::wait::await_condition;
use kube::{Api, Resource};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;
use tokio::task::LocalSet;
use tokio::time::{sleep, timeout};

use crate::rig::Rig;

/// How long anything may take that is expected to happen. Generous: two cores are shared by all
/// tests, and no test is about this number.
pub const PATIENCE: Duration = Duration::from_secs(90);

/// A namespace.
#[derive(Clone)]
pub struct Place {
    pub rig: Rig,
    pub name: String,
}

/// Runs `test` in a namespace with the label, and `annotations` beside it. On failure the events
/// and logs of the namespace are printed; it is deleted in any case.
pub async fn fenced<F, T>(name: &str, annotations: &[(&str, &str)], test: F)
where
    F: FnOnce(Place) -> T,
    T: Future<Output = ()> + 'static,
{
    labelled("enabled", name, annotations, test).await;
}

/// The same with the label's value `strict`.
pub async fn strict<F, T>(name: &str, annotations: &[(&str, &str)], test: F)
where
    F: FnOnce(Place) -> T,
    T: Future<Output = ()> + 'static,
{
    labelled("strict", name, annotations, test).await;
}

async fn labelled<F, T>(label: &str, name: &str, annotations: &[(&str, &str)], test: F)
where
    F: FnOnce(Place) -> T,
    T: Future<Output = ()> + 'static,
{
    let annotations: Value =
        annotations.iter().map(|(key, value)| (format!("ringfence.dev/{key}"), *value)).collect();
    let labels = json!({"ringfence.dev/inject": label});
    run(
        &json!({"metadata": {
            "generateName": format!("e2e-{name}-"), "labels": labels, "annotations": annotations,
        }}),
        test,
    )
    .await;
}

/// The same in a namespace without the label.
pub async fn unlabelled<F, T>(name: &str, test: F)
where
    F: FnOnce(Place) -> T,
    T: Future<Output = ()> + 'static,
{
    run(&json!({"metadata": {"generateName": format!("e2e-{name}-")}}), test).await;
}

async fn run<F, T>(namespace: &Value, test: F)
where
    F: FnOnce(Place) -> T,
    T: Future<Output = ()> + 'static,
{
    let rig = Rig::new().await;
    let namespaces: Api<Namespace> = Api::all(rig.client.clone());
    let made = namespaces
        .create(&PostParams::default(), &typed(namespace))
        .await
        .expect("the namespace can be made");
    let place = Place { name: made.metadata.name.expect("the API server named it"), rig };
    // Pods need it, and it comes a moment after the namespace.
    place
        .wait_for::<k8s_openapi::api::core::v1::ServiceAccount>("default", "its account", |found| {
            found.is_some()
        })
        .await;
    // A task of its own, so that its panic ends here; on this thread, so that a test may hold what
    // it likes.
    let task = LocalSet::new();
    let outcome = task.run_until(task.spawn_local(test(place.clone()))).await;
    if outcome.is_err() {
        place.show_trouble().await;
    }
    drop(namespaces.delete(&place.name, &DeleteParams::default()).await);
    if let Err(failed) = outcome {
        std::panic::resume_unwind(failed.into_panic());
    }
}

/// What a command in a container did.
#[derive(Debug)]
pub struct Done {
    /// Its exit code.
    pub code: i32,
    /// What it wrote to stdout and stderr.
    pub text: String,
}

impl Place {
    pub fn api<K>(&self) -> Api<K>
    where
        K: Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>,
    {
        Api::namespaced(self.rig.client.clone(), &self.name)
    }

    /// Creates any object.
    pub async fn create<K>(&self, object: &Value) -> Result<K, kube::Error>
    where
        K: Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>
            + DeserializeOwned
            + Serialize
            + Clone
            + Debug,
    {
        self.api::<K>().create(&PostParams::default(), &typed(object)).await
    }

    /// A pod as it would be admitted.
    pub async fn create_dry(&self, pod: &Value) -> Pod {
        let params = PostParams { dry_run: true, ..PostParams::default() };
        self.api().create(&params, &typed(pod)).await.expect("the pod would be admitted")
    }

    /// Creates a pod that the API server does not admit; returns what it says.
    pub async fn refused(&self, pod: &Value) -> String {
        match self.create::<Pod>(pod).await {
            Ok(_) => panic!("admitted: {pod}"),
            Err(kube::Error::Api(status)) => status.message.clone(),
            Err(error) => panic!("no answer about a pod: {error}"),
        }
    }

    /// The same where the webhook learns by a watch of what it refuses the pod for. Nothing is created.
    pub async fn refused_soon(&self, pod: &Value) -> String {
        let params = PostParams { dry_run: true, ..PostParams::default() };
        for _ in 0..100 {
            match self.api::<Pod>().create(&params, &typed(pod)).await {
                Ok(_) => sleep(Duration::from_millis(100)).await,
                Err(kube::Error::Api(status)) => return status.message.clone(),
                Err(error) => panic!("no answer about a pod: {error}"),
            }
        }
        panic!("still admitted: {pod}")
    }

    /// A pod with one container `agent` of the agent's image, changed by `change`.
    pub fn agent_pod(&self, name: &str, change: impl FnOnce(&mut Value, &mut Value)) -> Value {
        let mut container = json!({"name": "agent", "image": self.rig.agent_image});
        let mut pod = json!({
            "metadata": {"name": name, "labels": {"app": name}},
            "spec": {"restartPolicy": "Never"},
        });
        change(&mut container, &mut pod);
        let mut containers = vec![container];
        if let Some(more) = pod["spec"]["containers"].as_array() {
            containers.extend(more.iter().cloned());
        }
        pod["spec"]["containers"] = containers.into();
        pod
    }

    /// Creates the plain agent's pod and waits until its API answers.
    pub async fn start_agent(&self, name: &str) -> Pod {
        let pod = self.agent_pod(name, |container, _| {
            container["readinessProbe"] =
                json!({"httpGet": {"path": "/health", "port": 8001}, "periodSeconds": 1});
        });
        self.create::<Pod>(&pod).await.expect("the pod is admitted");
        self.ready(name).await
    }

    /// Waits for a pod to be ready.
    pub async fn ready(&self, name: &str) -> Pod {
        self.wait_for(name, "ready", |pod: Option<&Pod>| pod.is_some_and(is_ready)).await
    }

    /// Waits for a container to have ended; returns exit code and termination message.
    pub async fn ended(&self, name: &str) -> (i32, String) {
        let pod = self
            .wait_for(name, "ended", |pod: Option<&Pod>| {
                pod.and_then(|pod| status(pod, "agent")).and_then(termination).is_some()
            })
            .await;
        status(&pod, "agent").and_then(termination).expect("was waited for")
    }

    /// Waits for an object to be as `condition` wants it.
    pub async fn wait_for<K>(
        &self,
        name: &str,
        what: &str,
        condition: impl Fn(Option<&K>) -> bool,
    ) -> K
    where
        K: Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>
            + DeserializeOwned
            + Serialize
            + Clone
            + Debug
            + Send
            + 'static,
    {
        let waiting = await_condition(self.api::<K>(), name, condition);
        match timeout(PATIENCE, waiting).await {
            Ok(Ok(Some(object))) => object,
            Ok(Ok(None)) => panic!("{name} is gone"),
            Ok(Err(error)) => panic!("cannot watch {name}: {error}"),
            Err(_) => {
                let now = self.api::<K>().get_opt(name).await;
                let now = serde_json::to_value(now.ok().flatten()).unwrap_or_default();
                panic!("{name} is not {what} after {PATIENCE:?}; status: {}", now["status"])
            }
        }
    }

    /// The first pod with this label `app`, once there is one.
    pub async fn pod_of(&self, app: &str) -> Pod {
        let list = ListParams::default().labels(&format!("app={app}"));
        for _ in 0..PATIENCE.as_secs() * 2 {
            let found = self.api::<Pod>().list(&list).await.expect("pods can be listed");
            if let Some(pod) = found.items.into_iter().next() {
                return pod;
            }
            sleep(Duration::from_millis(500)).await;
        }
        panic!("no pod with app={app} after {PATIENCE:?}");
    }

    /// What a container has written.
    pub async fn logs(&self, pod: &str, container: &str) -> String {
        let params = LogParams { container: Some(container.into()), ..LogParams::default() };
        self.api::<Pod>().logs(pod, &params).await.unwrap_or_default()
    }

    /// The line of the agent's log that says a thing was denied and why; it has all the `words`.
    pub async fn denial(&self, pod: &str, words: &[&str]) -> String {
        let mut log = String::new();
        for _ in 0..20 {
            log = self.logs(pod, "agent").await;
            let found = log.lines().find(|line| {
                line.contains("DENIED")
                    && line.contains("[reason:")
                    && words.iter().all(|word| line.contains(word))
            });
            if let Some(line) = found {
                return line.to_owned();
            }
            sleep(Duration::from_millis(250)).await;
        }
        panic!("no denial with {words:?} in the log of {pod}:\n{log}");
    }

    /// Runs a command in a container, as `kubectl exec` does.
    pub async fn exec(&self, pod: &str, container: &str, command: &[&str]) -> Done {
        let words = [&["exec", pod, "-c", container, "--"], command].concat();
        self.kubectl(&words, "").await
    }

    /// `kubectl apply` of a manifest with one object, a pod.
    pub async fn apply(&self, pod: &Value) -> Done {
        let mut pod = pod.clone();
        pod["apiVersion"] = "v1".into();
        pod["kind"] = "Pod".into();
        self.kubectl(&["apply", "-f", "-"], &pod.to_string()).await
    }

    /// Any kubectl command in the namespace, with `input` on its stdin.
    pub async fn kubectl(&self, words: &[&str], input: &str) -> Done {
        let mut child = Command::new("kubectl")
            .args(["-n", &self.name])
            .args(words)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("kubectl is in PATH");
        let mut stdin = child.stdin.take().expect("it is piped");
        stdin.write_all(input.as_bytes()).await.expect("kubectl reads");
        drop(stdin);
        let output = timeout(PATIENCE, child.wait_with_output())
            .await
            .unwrap_or_else(|_| panic!("kubectl {words:?} does not end"))
            .expect("kubectl ends");
        let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
        text.push_str(&String::from_utf8_lossy(&output.stderr));
        Done { code: output.status.code().unwrap_or(-1), text }
    }

    /// Runs a shell script in container `agent`; the webhook makes a plain exec enter the fence.
    pub async fn enter(&self, pod: &Pod, script: &str) -> Done {
        let name = pod.metadata.name.as_deref().unwrap_or_default();
        self.exec(name, "agent", &["sh", "-c", script]).await
    }

    /// The same for many scripts, one after the other in one exec.
    pub async fn enter_all(&self, pod: &Pod, scripts: &[&str]) -> Vec<Done> {
        const EACH: &str = r#"for script; do sh -c "$script" 2>&1; printf '\n@%s@\n' $?; done"#;
        let name = pod.metadata.name.as_deref().unwrap_or_default();
        let words = [&["sh", "-c", EACH, "sh"], scripts].concat();
        let all = self.exec(name, "agent", &words).await;
        let mut done = Vec::new();
        let mut text = String::new();
        for line in all.text.lines() {
            let code = line.strip_prefix('@').and_then(|rest| rest.strip_suffix('@')?.parse().ok());
            match code {
                Some(code) => done.push(Done { code, text: std::mem::take(&mut text) }),
                None => text = text + line + "\n",
            }
        }
        assert_eq!(done.len(), scripts.len(), "{all:?}");
        done
    }

    /// An event whose message has all the `words`.
    pub async fn event(&self, words: &[&str]) -> Event {
        let api = self.api::<Event>();
        for _ in 0..PATIENCE.as_secs() * 2 {
            let found = api.list(&ListParams::default()).await.expect("events can be listed");
            let hit = found.items.into_iter().find(|event| {
                let message = event.message.as_deref().unwrap_or_default();
                words.iter().all(|word| message.contains(word))
            });
            if let Some(event) = hit {
                return event;
            }
            sleep(Duration::from_millis(500)).await;
        }
        panic!("no event with {words:?} after {PATIENCE:?}");
    }

    /// Prints what a person would look at.
    async fn show_trouble(&self) {
        eprintln!("--- namespace {}", self.name);
        if let Ok(events) = self.api::<Event>().list(&ListParams::default()).await {
            for event in events.items {
                eprintln!(
                    "event: {} {}: {}",
                    event.involved_object.name.unwrap_or_default(),
                    event.reason.unwrap_or_default(),
                    event.message.unwrap_or_default()
                );
            }
        }
        let Ok(pods) = self.api::<Pod>().list(&ListParams::default()).await else {
            return;
        };
        for pod in pods.items {
            let name = pod.metadata.name.clone().unwrap_or_default();
            let status = serde_json::to_value(&pod.status).unwrap_or_default();
            eprintln!("pod {name}: {}", status["containerStatuses"]);
            for container in pod.spec.map(|spec| spec.containers).unwrap_or_default() {
                let log = self.logs(&name, &container.name).await;
                let lines: Vec<_> = log.lines().rev().take(30).collect();
                for line in lines.into_iter().rev() {
                    eprintln!("{name}/{}: {line}", container.name);
                }
            }
        }
    }
}

fn typed<K: DeserializeOwned>(object: &Value) -> K {
    serde_json::from_value(object.clone()).unwrap_or_else(|error| panic!("{error}: {object}"))
}

pub fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.as_ref().and_then(|status| status.conditions.as_ref());
    conditions.is_some_and(|all| all.iter().any(|c| c.type_ == "Ready" && c.status == "True"))
}

/// The status of one container.
pub fn status<'a>(pod: &'a Pod, container: &str) -> Option<&'a ContainerStatus> {
    let all = pod.status.as_ref()?.container_statuses.as_ref()?;
    all.iter().find(|status| status.name == container)
}

fn termination(status: &ContainerStatus) -> Option<(i32, String)> {
    let ended = status.state.as_ref()?.terminated.as_ref()?;
    Some((ended.exit_code, ended.message.clone().unwrap_or_default()))
}

/// The path of the supervisor, where it is what the container runs.
pub fn supervisor(pod: &Pod, container: &str) -> Option<String> {
    let containers = &pod.spec.as_ref()?.containers;
    let container = containers.iter().find(|found| found.name == container)?;
    let program = container.command.as_ref()?.first()?;
    program.ends_with("/ringfence-supervisor").then(|| program.clone())
}

//! The cluster the tests run in, and what `tests/e2e/setup` has put there.

use std::collections::BTreeMap;
use std::env;

use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{DeleteParams, PostParams};
use kube::{Api, Client};
use serde_json::json;

/// Where the chart is installed and policies are kept.
pub const RELEASE_NAMESPACE: &str = "ringfence-system";
/// The policy of namespaces that name none: `examples/policy.yaml`.
const DEFAULT_POLICY: &str = "openshell-policy";

/// What a test needs to know of the cluster.
#[derive(Clone)]
pub struct Rig {
    pub client: Client,
    /// The example agent's image: curl, python3, git; user `agent`.
    pub agent_image: String,
    /// The same by its tag.
    pub tagged_image: String,
    /// An image with links to the fence's paths: `/x` to `/ringfence`, `/y` to where the supervisor is.
    pub link_image: String,
    /// An image whose `/ringfence` is a link to `/shared`.
    pub home_link_image: String,
    /// An image with a VOLUME where the supervisor is, and a script of the author's in it.
    pub volume_image: String,
    /// The same with VOLUMEs that are named by links.
    pub link_volume_image: String,
    /// The node's address, which is the test's own too.
    pub node_ip: String,
}

impl Rig {
    pub async fn new() -> Self {
        Self {
            client: Client::try_default().await.expect("no cluster: start with tests/e2e/run"),
            agent_image: variable("E2E_AGENT_IMAGE"),
            tagged_image: variable("E2E_TAGGED_IMAGE"),
            link_image: variable("E2E_LINK_IMAGE"),
            home_link_image: variable("E2E_HOME_LINK_IMAGE"),
            volume_image: variable("E2E_VOLUME_IMAGE"),
            link_volume_image: variable("E2E_LINK_VOLUME_IMAGE"),
            node_ip: variable("RINGFENCE_NODE_IP"),
        }
    }

    /// Puts a policy into the release namespace, beside the CA of the upstream.
    pub async fn put_policy(&self, name: &str, yaml: &str) {
        self.try_policy(name, yaml).await.expect("the policy can be made");
    }

    /// The same for a policy that may be refused.
    pub async fn try_policy(&self, name: &str, yaml: &str) -> Result<(), kube::Error> {
        self.try_policy_files(name, yaml, &[]).await
    }

    /// Puts a policy with more keys than its data.
    pub async fn put_policy_files(&self, name: &str, yaml: &str, more: &[(&str, &str)]) {
        self.try_policy_files(name, yaml, more).await.expect("the policy can be made");
    }

    async fn try_policy_files(
        &self,
        name: &str,
        yaml: &str,
        more: &[(&str, &str)],
    ) -> Result<(), kube::Error> {
        let api: Api<ConfigMap> = Api::namespaced(self.client.clone(), RELEASE_NAMESPACE);
        let mut data = api
            .get(DEFAULT_POLICY)
            .await
            .expect("tests/e2e/setup makes the default policy")
            .data
            .unwrap_or_default();
        data.insert("policy.yaml".into(), yaml.into());
        data.extend(more.iter().map(|(key, text)| ((*key).to_owned(), (*text).to_owned())));
        self.remove_policy(name).await;
        let made = json!({"metadata": {"name": name}, "data": data});
        let made = serde_json::from_value(made).expect("a ConfigMap");
        api.create(&PostParams::default(), &made).await.map(drop)
    }

    pub async fn remove_policy(&self, name: &str) {
        let api: Api<ConfigMap> = Api::namespaced(self.client.clone(), RELEASE_NAMESPACE);
        match api.delete(name, &DeleteParams::default()).await {
            Ok(_) => {}
            Err(kube::Error::Api(status)) if status.is_not_found() => {}
            Err(error) => panic!("cannot remove policy {name}: {error}"),
        }
    }

    /// The text of the default policy, for tests that change a line of it.
    pub async fn default_policy(&self) -> String {
        let api: Api<ConfigMap> = Api::namespaced(self.client.clone(), RELEASE_NAMESPACE);
        let data: BTreeMap<_, _> =
            api.get(DEFAULT_POLICY).await.expect("the default policy").data.unwrap_or_default();
        data["policy.yaml"].clone()
    }
}

pub fn variable(name: &str) -> String {
    env::var(name).unwrap_or_else(|_| panic!("{name} is not set: start with tests/e2e/run"))
}

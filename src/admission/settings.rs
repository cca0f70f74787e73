//! What the chart decides, for every pod alike.

use serde::{Deserialize, Serialize};

/// How the supervisor's binary reaches the container.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Delivery {
    /// An image volume: nothing runs, nothing is copied. Needs Kubernetes 1.36 on server and node.
    Image,
    /// An emptyDir that the init container `ringfence-install` fills.
    #[default]
    Init,
}

/// Which security context the fenced container gets.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Profile {
    /// `allowPrivilegeEscalation: false` and seccomp `RuntimeDefault` on the container.
    #[default]
    Hardened,
    /// As the reference deployment: `allowPrivilegeEscalation: true`, `Unconfined` at the pod.
    Reference,
}

/// The family of `status.podIP`, which decides how a URL with that address is written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum IpFamily {
    /// `http://$(POD_IP):8090`
    #[default]
    Ipv4,
    /// `http://[$(POD_IP)]:8090`
    Ipv6,
}

/// What the supervisor writes to stderr; denials are always written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    /// Errors only.
    Error,
    /// And what went wrong without being fatal.
    #[default]
    Warn,
    /// And what the fence does.
    Info,
    /// And why.
    Debug,
    /// Everything.
    Trace,
}

impl LogLevel {
    /// The word as `--log-level` takes it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warn => "warn",
            Self::Info => "info",
            Self::Debug => "debug",
            Self::Trace => "trace",
        }
    }
}

/// What is done about a pod that `PodSecurity` admission, or `OpenShift`'s, will refuse for what the fence
/// needs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PodSecurity {
    /// It is said, in a warning and an Event: the API server may exempt the pod.
    #[default]
    Warn,
    /// It is refused at once.
    Refuse,
}

/// The chart's values as far as they change what a pod looks like. Read from YAML or JSON in
/// camel case; a key that is not known is an error. Written as what shapes a pod: replicas that write
/// the same make the same of it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Settings {
    /// Reference of the image with `/ringfence-supervisor`, for the image volume or the init
    /// container.
    pub image: String,
    /// `Always`, `IfNotPresent` or `Never`. Written out because the API server fills in a default.
    pub image_pull_policy: String,
    /// Name of a pull secret for that image, which fenced pods name beside their own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pull_secret: Option<String>,
    /// How the binary arrives.
    #[serde(skip_serializing)]
    pub delivery: Delivery,
    /// The security context's shape.
    pub profile: Profile,
    /// Environment variables whose URLs of `localhost` are rewritten to the pod's address.
    pub localhost_url_env: Vec<String>,
    /// Family of the pods' addresses in this cluster.
    pub ip_family: IpFamily,
    /// `--log-level` of every supervisor and `OPENSHELL_LOG_LEVEL`.
    pub log_level: LogLevel,
    /// CPU of the init container as a Kubernetes quantity, request and limit. Under 100m the
    /// start takes seconds (`docs/admission.md`).
    pub install_cpu: String,
    /// Memory of the init container as a Kubernetes quantity, request and limit.
    pub install_memory: String,
    /// What is done where the namespace's Pod Security level, or an `OpenShift`, refuses the injected pod.
    #[serde(skip_serializing)]
    pub pod_security: PodSecurity,
    /// Where the policies are kept.
    #[serde(skip_serializing)]
    pub release_namespace: String,
    /// Name of the policy `ConfigMap` for namespaces that name none.
    #[serde(skip_serializing)]
    pub default_policy: String,
}

impl Settings {
    /// The pull secret that pods are given for the fence's image.
    pub(super) fn pull_secret(&self) -> Option<&str> {
        self.pull_secret.as_deref().filter(|name| !name.is_empty())
    }
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            image: concat!("ringfence:", env!("CARGO_PKG_VERSION")).into(),
            image_pull_policy: "IfNotPresent".into(),
            pull_secret: None,
            delivery: Delivery::default(),
            profile: Profile::default(),
            localhost_url_env: vec!["AMBIENT_MCP_URL".into(), "CREDENTIAL_MCP_URLS".into()],
            ip_family: IpFamily::default(),
            log_level: LogLevel::default(),
            install_cpu: "100m".into(),
            install_memory: "64Mi".into(),
            pod_security: PodSecurity::default(),
            release_namespace: "ringfence".into(),
            default_policy: "openshell-policy".into(),
        }
    }
}

//! The flags of `ringfence webhook`, and what each part of the server is told by them.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use clap::ValueEnum;
use serde::de::DeserializeOwned;

use crate::admission::server::ClientAuth;
use crate::admission::{Delivery, IpFamily, LogLevel, PodSecurity, Profile, Settings};
use crate::image::{Given, Images, ImagesConfig, Mirror, Providers};
use crate::pki::ca_bundle::{Configuration, ConfigurationKind};
use crate::pki::plan::Terms;
use crate::pki::rotation;

/// Serves admission reviews over TLS with a certificate of its own, and keeps the CA bundle of its
/// webhook configurations right; or with a certificate of somebody else's, see --certificate-secret.
///
/// The API server is found as kubectl finds it: `KUBECONFIG`, or the pod's service account.
/// `HTTPS_PROXY`, `NO_PROXY` and `SSL_CERT_FILE` apply to registries. `RINGFENCE_LOG` filters the
/// log (`info`, `ringfence=debug`, …).
#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Args {
    /// Where reviews are served, over TLS.
    #[arg(long, value_name = "ADDRESS", default_value = "[::]:8443")]
    pub(super) listen: SocketAddr,
    /// Where /healthz, /readyz and /metrics are served, in the clear.
    #[arg(long, value_name = "ADDRESS", default_value = "[::]:8080")]
    pub(super) health_listen: SocketAddr,

    /// The release namespace: policies and the CA's Secret are there.
    #[arg(long, value_name = "NAME")]
    pub(super) namespace: String,
    /// The Service in front of this webhook; the certificate is for SERVICE.NAMESPACE.svc.
    #[arg(long, value_name = "NAME", default_value = "ringfence")]
    pub(super) service: String,
    /// A mutating webhook configuration whose caBundle is kept right. Repeat for several; none: the
    /// caBundle is somebody else's business, and readiness does not look at it.
    #[arg(long = "webhook-configuration", value_name = "NAME")]
    pub(super) webhook_configurations: Vec<String>,
    /// The same for a validating webhook configuration.
    #[arg(long = "validating-configuration", value_name = "NAME")]
    pub(super) validating_configurations: Vec<String>,
    /// A Secret of the release namespace with the serving certificate (tls.crt, tls.key), made and
    /// renewed by somebody else, who keeps caBundle right as well: nothing of both is written then,
    /// the configurations are only looked at. None: a CA of its own.
    #[arg(long, value_name = "NAME", conflicts_with_all = ["ca_secret", "certificate_days", "ca_life", "ca_settle"])]
    pub(super) certificate_secret: Option<String>,
    /// The Secret that holds the CA; made when it does not exist.
    #[arg(long, value_name = "NAME", default_value = "ringfence-webhook-ca")]
    pub(super) ca_secret: String,
    /// Days a serving certificate is valid; it is renewed after two thirds of them.
    #[arg(long, value_name = "DAYS", default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=365))]
    pub(super) certificate_days: u32,
    /// Seconds a CA is valid; it is replaced after two thirds of them, and at least ten times
    /// --ca-settle. Of one that exists the shorter life counts, this or its own.
    #[arg(long, value_name = "SECONDS", default_value_t = rotation::CA_LIFE.as_secs(), value_parser = clap::value_parser!(u64).range(10..=3_153_600_000))]
    pub(super) ca_life: u64,
    /// Seconds a new CA is in every caBundle before it signs: so long may an API server take to
    /// learn of a change.
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub(super) ca_settle: u64,

    /// Answer nobody but clients with a certificate by a CA of this file, PEM: the API server, where it
    /// is configured to show one. None: whoever connects is answered.
    #[arg(long, value_name = "FILE")]
    pub(super) client_ca: Option<PathBuf>,
    /// A DNS name that such a certificate has to have. Repeat for several, of which one is enough; none:
    /// every certificate of that CA does.
    #[arg(long = "client-name", value_name = "NAME", requires = "client_ca")]
    pub(super) client_names: Vec<String>,

    /// The image with /ringfence-supervisor that pods get.
    #[arg(long, value_name = "REFERENCE")]
    pub(super) supervisor_image: String,
    /// `Always`, `IfNotPresent` or `Never`.
    #[arg(long, value_name = "POLICY", default_value = "IfNotPresent")]
    pub(super) supervisor_pull_policy: String,
    /// A pull secret for that image, in each labelled namespace under this name (`ringfence enable
    /// --image-pull-secret` copies it there): fenced pods name it beside their own.
    #[arg(long, value_name = "NAME")]
    pub(super) supervisor_pull_secret: Option<String>,
    /// How the supervisor reaches the pod: an image volume, or an init container that copies it.
    /// `auto` is image when the API server and all nodes run Kubernetes 1.36 or later.
    #[arg(long, value_enum, default_value_t = DeliveryChoice::Auto)]
    pub(super) delivery: DeliveryChoice,
    /// hardened or reference: the security context of fenced containers.
    #[arg(long, value_name = "PROFILE", default_value = "hardened", value_parser = word::<Profile>)]
    pub(super) profile: Profile,
    /// The policy `ConfigMap` (in the release namespace) for namespaces that name none.
    #[arg(long, value_name = "NAME", default_value = "openshell-policy")]
    pub(super) default_policy: String,
    /// Environment variables whose URLs of localhost are rewritten to the pod's address, separated
    /// by commas.
    #[arg(
        long,
        value_name = "NAMES",
        value_delimiter = ',',
        default_value = "AMBIENT_MCP_URL,CREDENTIAL_MCP_URLS"
    )]
    pub(super) localhost_url_env: Vec<String>,
    /// error, warn, info, debug or trace: what supervisors write. Denials are always written.
    #[arg(long, value_name = "LEVEL", default_value = "warn", value_parser = word::<LogLevel>)]
    pub(super) supervisor_log_level: LogLevel,
    /// CPU request and limit of the init container.
    #[arg(long, value_name = "QUANTITY", default_value = "100m")]
    pub(super) install_cpu: String,
    /// Memory request and limit of the init container.
    #[arg(long, value_name = "QUANTITY", default_value = "64Mi")]
    pub(super) install_memory: String,
    /// ipv4 or ipv6: the family of pod addresses. Default: that of the API server's Service.
    #[arg(long, value_name = "FAMILY", value_parser = word::<IpFamily>)]
    pub(super) ip_family: Option<IpFamily>,

    /// A registry (host[:port]) to be spoken to by plain HTTP. Repeat for several.
    #[arg(long = "insecure-registry", value_name = "HOST")]
    pub(super) insecure_registries: Vec<String>,
    /// Additional CAs for registries, PEM.
    #[arg(long, value_name = "FILE")]
    pub(super) registry_ca: Option<PathBuf>,
    /// Where images of a registry are looked for first, as in `docker.io=mirror.example/hub`. Repeat for
    /// several. Pull secrets for the mirror's name are used there, those for the registry are not.
    #[arg(long = "registry-mirror", value_name = "REGISTRY=HOST[/PATH]")]
    pub(super) registry_mirrors: Vec<Mirror>,
    /// What images are, for registries that the webhook does not reach: the file of
    /// `ringfence inject --image-config`. Of these images no registry is asked.
    #[arg(long, value_name = "FILE")]
    pub(super) image_config: Option<PathBuf>,
    /// The kubelet's file of the same flag: plugins that log in to the registries of clouds, asked where
    /// no pull secret does.
    #[arg(long, value_name = "FILE", requires = "image_credential_provider_bin_dir")]
    pub(super) image_credential_provider_config: Option<PathBuf>,
    /// The directory with these plugins.
    #[arg(long, value_name = "DIRECTORY", requires = "image_credential_provider_config")]
    pub(super) image_credential_provider_bin_dir: Option<PathBuf>,
    /// Architecture of images where the nodes' cannot be read, as kubernetes.io/arch has it.
    #[arg(long, value_name = "ARCH", default_value = "amd64")]
    pub(super) default_arch: String,

    /// warn or refuse: what is done about a pod that its namespace's Pod Security level will refuse
    /// for what the fence needs (or `OpenShift`, with --security-context-constraints). The API server
    /// may exempt it, which cannot be seen from here.
    #[arg(long, value_name = "WHAT", default_value = "warn", value_parser = word::<PodSecurity>)]
    pub(super) pod_security: PodSecurity,
    /// On an `OpenShift`: the `SecurityContextConstraints` that fenced pods need. Whether a pod's service
    /// account may use them is looked up; where it may not, that is said, or the pod refused, as
    /// --pod-security has it. None: nothing is looked up.
    #[arg(long, value_name = "NAME")]
    pub(super) security_context_constraints: Option<String>,
    /// Whether refusals and warnings are told by Events, on the pod's owner or its namespace.
    #[arg(long, value_name = "BOOL", default_value_t = true, action = clap::ArgAction::Set)]
    pub(super) events: bool,

    /// Reviews answered at once; more are told to come back.
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub(super) max_in_flight: u16,
    /// Seconds to go on accepting after SIGTERM, while the API server learns of it.
    #[arg(long, value_name = "SECONDS", default_value_t = 5)]
    pub(super) linger: u64,
    /// Whether unused policy copies are deleted.
    #[arg(long, value_name = "BOOL", default_value_t = true, action = clap::ArgAction::Set)]
    pub(super) collect: bool,
    /// How the log looks.
    #[arg(long, value_enum, default_value_t = LogFormat::Json)]
    pub(super) log_format: LogFormat,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum DeliveryChoice {
    Auto,
    Image,
    Init,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum LogFormat {
    Json,
    Text,
}

/// Reads a word of the settings as their file would.
fn word<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    serde_json::from_value(text.into()).map_err(|error| error.to_string())
}

impl Args {
    pub(super) fn settings(&self) -> Settings {
        // An IPv6 cluster's API server has an IPv6 Service.
        let is_ipv6 =
            || std::env::var("KUBERNETES_SERVICE_HOST").is_ok_and(|host| host.contains(':'));
        let family = self
            .ip_family
            .unwrap_or_else(|| if is_ipv6() { IpFamily::Ipv6 } else { IpFamily::Ipv4 });
        Settings {
            image: self.supervisor_image.clone(),
            image_pull_policy: self.supervisor_pull_policy.clone(),
            pull_secret: self.supervisor_pull_secret.clone(),
            delivery: match self.delivery {
                DeliveryChoice::Image => Delivery::Image,
                // `auto` until the cluster is known: what works everywhere.
                DeliveryChoice::Init | DeliveryChoice::Auto => Delivery::Init,
            },
            profile: self.profile,
            localhost_url_env: self
                .localhost_url_env
                .iter()
                .filter(|name| !name.is_empty())
                .cloned()
                .collect(),
            ip_family: family,
            log_level: self.supervisor_log_level,
            install_cpu: self.install_cpu.clone(),
            install_memory: self.install_memory.clone(),
            release_namespace: self.namespace.clone(),
            default_policy: self.default_policy.clone(),
            pod_security: self.pod_security,
        }
    }

    /// The name that API servers verify.
    pub(super) fn server_name(&self) -> String {
        format!("{}.{}.svc", self.service, self.namespace)
    }

    /// How long CAs and leaves last.
    pub(super) fn terms(&self) -> Terms {
        Terms {
            ca_life: Duration::from_secs(self.ca_life),
            leaf_life: Duration::from_secs(u64::from(self.certificate_days) * 86_400),
            settle: Duration::from_secs(self.ca_settle),
        }
    }

    /// The configurations whose caBundle has to verify what is served.
    pub(super) fn configurations(&self) -> Vec<Configuration> {
        let of = |kind, names: &[String]| {
            let of = |name: &String| Configuration { kind, name: name.clone() };
            names.iter().map(of).collect::<Vec<_>>()
        };
        let mut all = of(ConfigurationKind::Mutating, &self.webhook_configurations);
        all.extend(of(ConfigurationKind::Validating, &self.validating_configurations));
        all
    }

    /// Who may connect; None: anybody.
    pub(super) fn clients(&self) -> anyhow::Result<Option<Arc<ClientAuth>>> {
        let Some(path) = &self.client_ca else { return Ok(None) };
        let auth = from_file("client-ca", path, |text| {
            ClientAuth::new(text.as_bytes(), &self.client_names)
        });
        Ok(Some(Arc::new(auth?)))
    }

    pub(super) fn images(&self) -> anyhow::Result<Images> {
        let mut config = ImagesConfig {
            insecure: self.insecure_registries.clone(),
            mirrors: self.registry_mirrors.iter().cloned().collect(),
            ..ImagesConfig::default()
        };
        if let Some(path) = &self.registry_ca {
            config.extra_roots_pem = std::fs::read(path)
                .with_context(|| format!("cannot read --registry-ca {}", path.display()))?;
        }
        if let Some(path) = &self.image_config {
            config.given = from_file("image-config", path, Given::read)?;
        }
        if let Some((path, directory)) = self
            .image_credential_provider_config
            .as_ref()
            .zip(self.image_credential_provider_bin_dir.as_ref())
        {
            let read = |text: &str| Providers::read(text, directory);
            config.providers = from_file("image-credential-provider-config", path, read)?;
        }
        Ok(Images::new(config)?)
    }
}

/// What a file says that a flag names.
fn from_file<T, E: std::error::Error + Send + Sync + 'static>(
    flag: &str,
    path: &Path,
    read: impl FnOnce(&str) -> Result<T, E>,
) -> anyhow::Result<T> {
    let named = || format!("cannot read --{flag} {}", path.display());
    read(&std::fs::read_to_string(path).with_context(named)?).with_context(named)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    fn settings(line: &[&str]) -> Settings {
        let fixed = ["webhook", "--namespace", "ns", "--supervisor-image", "r/i:1"];
        let line = Line::try_parse_from(fixed.iter().chain(line)).unwrap_or_else(|e| panic!("{e}"));
        line.args.settings()
    }

    #[test]
    fn the_flags_have_the_same_defaults_as_the_settings() {
        let mut expected = Settings { image: "r/i:1".into(), ..Settings::default() };
        expected.release_namespace = "ns".into();
        assert_eq!(settings(&["--ip-family=ipv4"]), expected);
    }

    #[test]
    fn both_kinds_of_configurations_are_kept_right() {
        let line = [
            "webhook",
            "--namespace=ns",
            "--supervisor-image=r/i:1",
            "--webhook-configuration=m",
            "--validating-configuration=v",
        ];
        let line = Line::try_parse_from(line).unwrap_or_else(|e| panic!("{e}"));
        let names: Vec<String> =
            line.args.configurations().iter().map(ToString::to_string).collect();
        assert_eq!(
            names,
            ["MutatingWebhookConfiguration `m`", "ValidatingWebhookConfiguration `v`"]
        );
    }

    #[test]
    fn words_are_read_as_the_settings_file_reads_them() {
        let read = settings(&[
            "--profile=reference",
            "--delivery=image",
            "--localhost-url-env=A,B",
            "--supervisor-log-level=debug",
            "--ip-family=ipv6",
            "--pod-security=refuse",
            "--supervisor-pull-secret=fence-pull",
        ]);
        assert_eq!(read.pull_secret.as_deref(), Some("fence-pull"));
        assert_eq!(read.pod_security, PodSecurity::Refuse);
        assert_eq!(read.profile, Profile::Reference);
        assert_eq!(read.delivery, Delivery::Image);
        assert_eq!(read.localhost_url_env, ["A", "B"]);
        assert_eq!((read.log_level, read.ip_family), (LogLevel::Debug, IpFamily::Ipv6));
        assert!(word::<Profile>("lenient").is_err());
    }
}

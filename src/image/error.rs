//! Why an image's configuration could not be read, in words for the author of the pod.
//!
//! What a registry sent is never repeated: the name of the registry is the pod author's choice, and
//! an echo of its answer would let them read, through the webhook, whatever the webhook can reach.

use oci_client::errors::{OciDistributionError, OciErrorCode};

use super::cache::FetchDied;

/// One try: with which credentials, and what came of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attempt {
    /// ``secret `NAME` ``, ``credential provider `NAME` `` or `anonymously`; before it the mirror, where
    /// it was one.
    pub with: String,
    /// What happened.
    pub outcome: String,
}

/// Why there is no configuration. The text names image and registry; [`ImageError::fix`] the remedy.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// The reference does not parse.
    #[error("`{image}` is not an image reference: {reason}")]
    Reference {
        /// As the pod has it.
        image: String,
        /// What the parser said.
        reason: String,
    },
    /// The registry refused or did not answer.
    #[error(
        "cannot read image `{image}` from registry `{registry}`: {}",
        join(.attempts)
    )]
    Registry {
        /// As the pod has it.
        image: String,
        /// The host asked.
        registry: String,
        /// Every try, in order.
        attempts: Vec<Attempt>,
        /// Whether the same request may well succeed soon.
        retryable: bool,
    },
    /// The image has nothing for the nodes' architectures.
    #[error("image `{image}` has no linux/{wanted} variant (it has: {found})")]
    Platform {
        /// As the pod has it.
        image: String,
        /// The architecture asked for.
        wanted: String,
        /// What the index lists.
        found: String,
    },
    /// Variants differ in how they start.
    #[error(
        "image `{image}` differs in how it starts, or in its VOLUMEs, between {first} and {second}"
    )]
    Ambiguous {
        /// As the pod has it.
        image: String,
        /// One architecture.
        first: String,
        /// Another.
        second: String,
    },
    /// There is no trust store to verify a registry against.
    #[error("registries cannot be verified: {0}")]
    NoTrust(String),
    /// A look-up ended without an answer.
    #[error("the look-up of the image was interrupted")]
    Interrupted,
}

impl From<FetchDied> for ImageError {
    fn from(_: FetchDied) -> Self {
        Self::Interrupted
    }
}

impl ImageError {
    /// What the author of the pod, or of the chart's values, can do.
    #[must_use]
    pub fn fix(&self) -> &'static str {
        match self {
            Self::Reference { .. } => "correct the image's name",
            Self::Registry { .. } => {
                "make the image readable for the webhook: an imagePullSecret that it may read, a registry that it can reach, CAs that it knows; or exempt the container by ringfence.dev/unfenced-containers of the namespace"
            }
            Self::Platform { .. } | Self::Ambiguous { .. } => {
                "set nodeSelector `kubernetes.io/arch` in the pod"
            }
            Self::NoTrust(_) => "give ringfence a bundle of CA certificates",
            Self::Interrupted => "try again",
        }
    }

    /// Whether the same request may well succeed soon.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        matches!(self, Self::Registry { retryable: true, .. } | Self::Interrupted)
    }
}

fn join(attempts: &[Attempt]) -> String {
    let tries: Vec<String> =
        attempts.iter().map(|a| format!("{} ({})", a.outcome, a.with)).collect();
    tries.join("; ")
}

/// What a registry says that wants to be asked less.
pub(super) const LIMITED: &str = "the registry limits the rate of requests";

/// How a failed request reads, and what to do next.
pub(super) struct Verdict {
    pub(super) text: String,
    /// Other credentials may do better.
    pub(super) try_next: bool,
    pub(super) retryable: bool,
    /// The registry has had too much of whoever asked.
    pub(super) limited: bool,
}

pub(super) fn judge(error: &OciDistributionError) -> Verdict {
    let of =
        |text: String, try_next, retryable| Verdict { text, try_next, retryable, limited: false };
    let refused = |text: &str| of(text.to_owned(), true, false);
    let soon = |text: String| of(text, false, true);
    let broken = |text: String| of(text, false, false);
    let limited = || Verdict { limited: true, ..soon(LIMITED.to_owned()) };
    match error {
        OciDistributionError::UnauthorizedError { .. } => refused("not authorized"),
        OciDistributionError::AuthenticationFailure(_) => refused("the credentials were refused"),
        OciDistributionError::RegistryError { envelope, .. } => {
            match envelope.errors.first().map(|e| &e.code) {
                Some(OciErrorCode::Unauthorized | OciErrorCode::Denied) => refused("access denied"),
                Some(
                    OciErrorCode::ManifestUnknown
                    | OciErrorCode::NameUnknown
                    | OciErrorCode::NotFound,
                ) => refused("no such image, or no access to it"),
                Some(OciErrorCode::Toomanyrequests) => limited(),
                _ => broken("the registry answered with an error".to_owned()),
            }
        }
        OciDistributionError::ServerError { code: 401 | 403, .. } => refused("access denied"),
        OciDistributionError::ServerError { code: 404, .. } => {
            refused("no such image, or no access to it")
        }
        OciDistributionError::ServerError { code: 429, .. } => limited(),
        OciDistributionError::ServerError { code, .. } if *code >= 500 => {
            soon(format!("the registry answered with status {code}"))
        }
        OciDistributionError::ServerError { code, .. } => {
            broken(format!("the registry answered with status {code}"))
        }
        OciDistributionError::RequestError(e) if e.is_timeout() => {
            soon("the registry did not answer in time".to_owned())
        }
        OciDistributionError::RequestError(e) if e.is_connect() => {
            let mut cause: &dyn std::error::Error = e;
            while let Some(next) = cause.source() {
                cause = next;
            }
            soon(format!("cannot connect: {cause}"))
        }
        OciDistributionError::RequestError(_) => soon("the connection broke".to_owned()),
        OciDistributionError::DigestError(_) => {
            broken("the content does not have the digest it was asked for by".to_owned())
        }
        OciDistributionError::IoError(_) => {
            broken("the image's configuration is larger than 4 MiB".to_owned())
        }
        _ => broken("the registry did not answer with an image".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_registry_sent_is_not_repeated() {
        let secret = "metadata-service-token";
        for error in [
            OciDistributionError::AuthenticationFailure(secret.into()),
            OciDistributionError::ServerError {
                code: 404,
                url: "u".into(),
                message: secret.into(),
            },
            OciDistributionError::ServerError {
                code: 500,
                url: "u".into(),
                message: secret.into(),
            },
            OciDistributionError::ManifestParsingError(secret.into()),
            OciDistributionError::RegistryTokenDecodeError(secret.into()),
        ] {
            assert!(!judge(&error).text.contains(secret), "{error}");
        }
    }

    #[test]
    fn the_message_names_image_registry_tries_and_remedy() {
        let error = ImageError::Registry {
            image: "r.example/a:1".into(),
            registry: "r.example".into(),
            attempts: vec![
                Attempt { with: "secret `pull`".into(), outcome: "access denied".into() },
                Attempt { with: "anonymously".into(), outcome: "not authorized".into() },
            ],
            retryable: false,
        };
        let text = format!("{error}; {}", error.fix());
        for part in ["r.example/a:1", "secret `pull`", "access denied", "anonymously", "readable"] {
            assert!(text.contains(part), "{part} in {text}");
        }
    }
}

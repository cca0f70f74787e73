//! Every class of pod that gets another answer than "fenced", as one enum: what happens under
//! each label value, why, and what to do about it. `docs/admission.md` shows the same table.

use std::fmt::{self, Write as _};

use super::Mode;

/// What happens to a pod of a class.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Fenced, and nothing is said: the class matters under the other label value only.
    Fence,
    /// Fenced, with a warning that names the class.
    Warn,
    /// Admitted as it is, with a warning: there is nothing of it that could be fenced.
    Pass,
    /// Not admitted.
    Refuse,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Fence => "fenced",
            Self::Warn => "fenced, warning",
            Self::Pass => "as it is, warning",
            Self::Refuse => "refused",
        })
    }
}

macro_rules! classes {
    ($($(#[$doc:meta])* $name:ident $slug:literal $code:literal $enabled:ident $strict:ident
        $why:literal $fix:literal;)*) => {
        /// A class of pods with an answer of its own.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[non_exhaustive]
        pub enum Class {
            $($(#[$doc])* $name,)*
        }

        impl Class {
            /// Every class, in the order of the table.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// The word for metrics, audit annotations and Events.
            #[must_use]
            pub fn slug(self) -> &'static str {
                match self { $(Self::$name => $slug,)* }
            }

            /// HTTP status of a refusal: 403 for what the policy of the cluster forbids, 422 for
            /// what is written wrongly, 5xx for what may work a moment later.
            #[must_use]
            pub fn code(self) -> u16 {
                match self { $(Self::$name => $code,)* }
            }

            /// What happens under a label value. With no label there is no verdict: nothing is
            /// looked at.
            #[must_use]
            pub fn verdict(self, mode: Mode) -> Verdict {
                match (self, mode) {
                    $((Self::$name, Mode::Strict) => Verdict::$strict,
                      (Self::$name, Mode::Enabled | Mode::Off) => Verdict::$enabled,)*
                }
            }

            /// Why it is a class of its own.
            #[must_use]
            pub fn why(self) -> &'static str {
                match self { $(Self::$name => $why,)* }
            }

            /// What its author can do.
            #[must_use]
            pub fn fix(self) -> &'static str {
                match self { $(Self::$name => $fix,)* }
            }
        }
    };
}

classes! {
    /// `spec.hostNetwork: true`.
    HostNetwork "host-network" 403 Refuse Refuse
        "the container shares the node's network and its sockets"
        "remove hostNetwork, or run the pod in a namespace without the label";
    /// `spec.hostPID: true`.
    HostPid "host-pid" 403 Refuse Refuse
        "the agent would see, and could signal, every process of the node"
        "remove hostPID";
    /// `spec.hostIPC: true`.
    HostIpc "host-ipc" 403 Refuse Refuse
        "the agent would share memory with processes of the node"
        "remove hostIPC";
    /// The pod is for Windows nodes.
    Windows "windows" 403 Refuse Refuse
        "the fence is made of Linux namespaces"
        "run the pod in a namespace without the label";
    /// A container to be fenced is privileged.
    Privileged "privileged" 403 Refuse Refuse
        "a privileged container has every device of the node and no fence holds it"
        "remove securityContext.privileged";
    /// A container that stays unfenced is privileged.
    PrivilegedUnfenced "privileged-unfenced" 403 Warn Refuse
        "a privileged container beside the agent is a way to the node"
        "remove securityContext.privileged";
    /// `spec.shareProcessNamespace: true`.
    ShareProcessNamespace "share-process-namespace" 403 Warn Refuse
        "a container with uid 0 can signal the supervisor, which ends the agent"
        "remove shareProcessNamespace";
    /// Init containers run before the fence.
    InitContainer "init-container" 403 Warn Fence
        "init containers run as they are, outside the fence, unless the namespace is labelled strict"
        "move what is not trusted into a regular container";
    /// Init containers with `restartPolicy: Always`.
    NativeSidecar "native-sidecar" 403 Warn Fence
        "native sidecars run as they are, outside the fence, unless the namespace is labelled strict"
        "make the sidecar a regular container if it is not trusted";
    /// `ringfence.dev/mode: subprocess`.
    Subprocess "subprocess" 403 Warn Refuse
        "its command, exec probes and kubectl exec run outside the fence, as root with the fence's capabilities; only what it starts through /openshell-sandbox is fenced"
        "remove ringfence.dev/mode from the namespace if the container is the agent itself";
    /// A runner that would have been somebody else.
    RaisedUser "raised-user" 403 Warn Refuse
        "it runs as root, because only root builds fences; what it starts through /openshell-sandbox runs as that user"
        "exempt the container by ringfence.dev/unfenced-containers of the namespace if it starts no agents";
    /// A runner's policy has no `policy.rego`.
    NoRules "no-policy-rules" 403 Warn Refuse
        "a wrapper that names /etc/openshell/policy.rego by --policy-rules starts no agent"
        "add the key policy.rego to the policy's ConfigMap (examples/policy.rego), or leave the flag out";
    /// A volume that does not join, with `ringfence.dev/volume-mounts: allowed`.
    VolumeLeftOut "volume-left-out" 403 Warn Warn
        "it does not join the files of the fence: the agent reaches it only where the policy's own lists do"
        "mount it elsewhere, or name its path in filesystem_policy";
    /// A container wants a port that the namespace gives to a sidecar.
    SidecarPort "sidecar-port" 422 Refuse Refuse
        "the fence listens on the port, so that nothing of the container could"
        "give the container another port, or take this one out of ringfence.dev/sidecar-ports";
    /// Named by the namespace's `ringfence.dev/unfenced-containers`.
    Unfenced "unfenced-container" 403 Warn Warn
        "the namespace exempts the container"
        "change ringfence.dev/unfenced-containers of the namespace";
    /// An unfenced container whose user is root, the proxy's or not known.
    UnfencedUser "unfenced-user" 403 Fence Refuse
        "outside the fence uid 0 and the proxy's uid 65530 can reach into it; without runAsUser the image chooses, and a setuid program changes it"
        "set runAsUser in the container's securityContext to another number, and allowPrivilegeEscalation: false";
    /// An unfenced container that has, or may get, a capability over the network.
    UnfencedCapability "unfenced-capability" 403 Fence Refuse
        "with NET_ADMIN or NET_RAW a container outside the fence changes, forges or reads the traffic of the fence's proxy"
        "drop ALL or NET_RAW in the container's securityContext.capabilities, and add neither";
    /// An unfenced container with a command, variables or mounts of its author's.
    UnfencedOwn "unfenced-own" 403 Fence Refuse
        "with a command, a variable or a mount of theirs an author makes another program of an exempt image, outside the fence"
        "leave it to the image, or let the exemption name it: ringfence.dev/unfenced-containers of the namespace, name=image;own=command+env";
    /// A container is named by a tag, and what that means is not known.
    ImageTag "image-tag" 422 Fence Refuse
        "a tag may mean another image on the node than the one that was looked at"
        "name the image by digest";
    /// `spec.hostAliases`, `spec.hostnameOverride`, or something mounted at `/etc/hosts`.
    HostAliases "host-aliases" 403 Fence Refuse
        "the pod's author would decide which address a name of the policy has"
        "remove hostAliases, hostnameOverride and what is mounted at /etc/hosts";
    /// `spec.dnsConfig`, a `dnsPolicy` that needs it, or something mounted at `/etc/resolv.conf`.
    DnsConfig "dns-config" 403 Fence Refuse
        "the pod's author would decide who answers for the names of the policy"
        "remove dnsConfig, dnsPolicy None and what is mounted at /etc/resolv.conf";
    /// The pod, as it was submitted, is below the Pod Security Standard "baseline".
    Baseline "baseline" 403 Fence Refuse
        "what the Pod Security Standard baseline refuses is a way to the node, or around the fence"
        "see the field in the message";
    /// All regular containers are exempted.
    NothingToFence "nothing-to-fence" 403 Pass Refuse
        "the namespace exempts every container of the pod"
        "change ringfence.dev/unfenced-containers of the namespace";
    /// `kubectl debug` without `--copy-to`.
    EphemeralContainer "ephemeral-container" 403 Pass Refuse
        "an ephemeral container runs in the pod's network, outside the fence"
        "use kubectl exec, which enters the fence";
    /// The API object of a static pod.
    MirrorPod "mirror-pod" 403 Pass Refuse
        "the object only mirrors a static pod, which runs whatever the answer is"
        "move the static pod's manifest out of the labelled namespace";
    /// The container would run as root.
    RootUser "root-user" 403 Warn Warn
        "the agent never runs as root; it runs as uid 65534 instead"
        "set securityContext.runAsUser, or process.run_as_user in the policy";
    /// The container would run as the proxy's uid.
    OwnUser "own-user" 422 Refuse Refuse
        "uid 65530 is the fence's proxy"
        "choose another runAsUser";
    /// A URL variable that cannot be rewritten.
    LocalhostUrl "localhost-url" 422 Warn Warn
        "a variable listed in localhostUrlEnv has no literal value, so localhost in it is the fence's own"
        "give the variable a value";
    /// No command in the pod, and none found in the image.
    Entrypoint "entrypoint" 422 Refuse Refuse
        "the container has no command and its image names none"
        "set command in the pod";
    /// The image's configuration is not known.
    ImageUnread "image-unread" 422 Refuse Refuse
        "the image's ENTRYPOINT and USER, and its VOLUMEs in any case, decide how the container is fenced"
        "make the image readable for the webhook, or exempt the container by ringfence.dev/unfenced-containers of the namespace";
    /// An update gives a fenced container another image.
    ImageChange "image-change" 422 Refuse Refuse
        "the container was fenced for its image: another has another ENTRYPOINT, and its VOLUMEs could take the supervisor's place"
        "delete the pod; its controller makes a new one";
    /// A registry or the API server did not answer.
    Lookup "lookup-failed" 503 Refuse Refuse
        "what the answer depends on could not be looked up"
        "try again; a controller does so by itself";
    /// The policy is missing, unreadable, or not for this pod.
    Policy "policy" 422 Refuse Refuse
        "the pod's policy is missing, does not load, or is not for this pod"
        "see the ConfigMap in the release namespace and ringfence.dev/policy";
    /// A label or annotation of Ringfence that is not understood.
    Annotation "annotation" 422 Refuse Refuse
        "a label or annotation of Ringfence has a value that is not understood"
        "correct the value";
    /// A value of the contract which this version does not have.
    NotAvailable "not-available" 422 Refuse Refuse
        "this version does not have what the label, annotation or field asks for"
        "remove it, or use a later version";
    /// A mount, device or message path that would cover the supervisor or its files.
    Overlap "mount-overlap" 422 Refuse Refuse
        "a foreign mount over the fence's own files would put another program in the supervisor's place"
        "mount somewhere else than /ringfence, /run/ringfence and /etc/openshell";
    /// A volume or container name of Ringfence used by somebody else.
    ForeignUse "foreign-use" 422 Refuse Refuse
        "volumes named ringfence-*, openshell-policy and the container ringfence-install are the fence's"
        "choose another name, or recreate the pod from its own manifest";
    /// The namespace enforces a Pod Security level. Refused by setting, see [`super::PodSecurity`].
    PodSecurity "pod-security" 403 Warn Warn
        "PodSecurity admission comes next, and the fence needs what the level refuses"
        "label the namespace pod-security.kubernetes.io/enforce=privileged (ringfence.dev/inject=strict holds authors to baseline all the same), or have the API server's configuration exempt it";
    /// On an `OpenShift` the pod's service account may not use the constraints that a fenced pod needs.
    /// Refused by setting, as the one before.
    Constraints "security-context-constraints" 403 Warn Warn
        "OpenShift's admission looks at the pod again, and refuses what the fence needs unless other constraints allow it"
        "run `ringfence enable NAMESPACE --scc` with --strict or --trust-authors, or bind the chart's ClusterRole for these constraints in the namespace";
    /// `POD_IP` with another meaning.
    PodIp "pod-ip" 422 Refuse Refuse
        "the variable POD_IP has to be the pod's address"
        "rename the variable, or set it by fieldRef from status.podIP";
    /// Not the shape of a pod.
    Malformed "malformed" 422 Refuse Refuse
        "a field has another type than Kubernetes gives it"
        "correct the manifest";
    /// The final pod is not what the injection makes.
    Unfixed "not-as-injected" 403 Refuse Refuse
        "something changed what Ringfence had put into the pod"
        "find the webhook or person that changed it; see the path in the message";
    /// The final pod is what another replica makes, with another version, settings or policy.
    AnotherVersion "another-version" 503 Fence Refuse
        "in a roll-out one replica may fence a pod and another one look at it; under strict only the one that looks is believed"
        "try again; controllers and kubectl do so by themselves";
    /// A command for a fenced container that does not enter its fence.
    ExecOutside "exec-outside" 403 Refuse Refuse
        "the command would run in the bare container, outside the fence"
        "see that the mutating webhook exec.ringfence.dev is installed and that no other changes the command";
    /// Our patch does not do what it should.
    SelfCheck "self-check" 500 Refuse Refuse
        "the patch does not give the pod it was made for, which is a fault of Ringfence"
        "report it with the pod's manifest";
}

impl Class {
    /// Whether what is refused so may have been put there by Ringfence itself, in another version or
    /// with other settings.
    pub(super) fn may_be_ours(self) -> bool {
        matches!(self, Self::ForeignUse | Self::Overlap | Self::Baseline)
    }
}

/// A pod that is not admitted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    /// HTTP status for the answer's `status.code`.
    pub code: u16,
    /// Kubernetes' word for `status.reason`.
    pub reason: &'static str,
    /// Cause and fix, for the person who created the pod.
    pub message: String,
    /// Machine-readable cause.
    pub class: Class,
}

impl Refusal {
    /// A refusal that names the object and the cause; the class adds the fix.
    #[must_use]
    pub fn new(class: Class, what: impl fmt::Display) -> Self {
        Self::with_fix(class, what, class.fix())
    }

    /// A refusal with a fix of its own.
    #[must_use]
    pub fn with_fix(class: Class, what: impl fmt::Display, fix: &str) -> Self {
        let code = class.code();
        Self {
            code,
            reason: match code {
                403 => "Forbidden",
                422 => "Invalid",
                503 => "ServiceUnavailable",
                _ => "InternalError",
            },
            message: format!("ringfence: {what}; {fix}"),
            class,
        }
    }

    /// The cause alone.
    pub(super) fn what(&self) -> &str {
        let text = self.message.strip_prefix("ringfence: ").unwrap_or(&self.message);
        text.split_once("; ").map_or(text, |(what, _)| what)
    }

    /// After how many seconds the same request may fare better, where that is known. The API server
    /// tells its clients so, and those that are made with its own library (kubectl, controllers) ask
    /// again by themselves, up to ten times.
    #[must_use]
    pub fn retry_after(&self) -> Option<u32> {
        (self.class == Class::AnotherVersion).then_some(1)
    }
}

/// The table of `docs/admission.md`, one row a class.
#[must_use]
pub fn table() -> String {
    let mut out = String::from(
        "| class | `enabled` | `strict` | status | why | what to do |\n|---|---|---|---|---|---|\n",
    );
    for class in Class::ALL {
        let (enabled, strict) = (class.verdict(Mode::Enabled), class.verdict(Mode::Strict));
        let refuses = enabled == Verdict::Refuse || strict == Verdict::Refuse;
        let code = if refuses { class.code().to_string() } else { "–".into() };
        let (slug, why, fix) = (class.slug(), class.why(), class.fix());
        // Writing to a String cannot fail.
        let _ = writeln!(out, "| `{slug}` | {enabled} | {strict} | {code} | {why} | {fix} |");
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_shows_the_same_table() {
        let page = include_str!("../../docs/admission.md");
        assert!(
            page.contains(&table()),
            "docs/admission.md differs from the enum; the table is:\n{}",
            table()
        );
    }

    #[test]
    fn slugs_are_unique() {
        let mut slugs: Vec<_> = Class::ALL.iter().map(|class| class.slug()).collect();
        slugs.sort_unstable();
        slugs.dedup();
        assert_eq!(slugs.len(), Class::ALL.len());
    }

    #[test]
    fn strict_is_never_softer() {
        for class in Class::ALL {
            if class.verdict(Mode::Enabled) == Verdict::Refuse {
                assert_eq!(class.verdict(Mode::Strict), Verdict::Refuse, "{}", class.slug());
            }
        }
    }

    #[test]
    fn a_refusal_names_cause_and_fix() {
        let refusal = Refusal::new(Class::HostPid, "spec.hostPID is true");
        assert_eq!(refusal.to_string(), "ringfence: spec.hostPID is true; remove hostPID");
        assert_eq!((refusal.code, refusal.reason), (403, "Forbidden"));
    }
}

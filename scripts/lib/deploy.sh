# Which cluster, and what the demo and the cluster tests put into it alike. Sourced after common.sh
# and images.sh, from the top of the checkout.
# shellcheck shell=bash

RELEASE=ringfence
RELEASE_NAMESPACE=ringfence-system
UPSTREAM_NAMESPACE=ringfence-upstream
UPSTREAM_HOST=upstream.ringfence-upstream.svc.cluster.local
OTHER_HOST=other.ringfence-upstream.svc.cluster.local
POLICY=openshell-policy
# What the chart makes, and how all of it is labelled.
OBJECTS=configmap,deployment,networkpolicy,service,serviceaccount,poddisruptionbudget,role,rolebinding,clusterrole,clusterrolebinding
OBJECTS+=,mutatingwebhookconfiguration,validatingwebhookconfiguration
OBJECTS+=,validatingadmissionpolicy,validatingadmissionpolicybinding
LABELLED=app.kubernetes.io/name=ringfence,app.kubernetes.io/instance=$RELEASE
# The name that stands in the examples for the agent's image.
AGENT_PLACEHOLDER=registry.example/agent:latest

# From here on `kube`, `helm_` and `push` mean the rig.
use_rig() {
    eval "$(scripts/cluster env)"
    in_node=(env -u http_proxy -u https_proxy -u HTTP_PROXY -u HTTPS_PROXY -u all_proxy -u ALL_PROXY
        nsenter -t "$RINGFENCE_NODE_PID" -n --)
    kube() { "${in_node[@]}" kubectl "$@"; }
    helm_() { "${in_node[@]}" helm "$@"; }
    push() {
        scripts/cluster push "$1" "$2" 2>"$LOGS/push.log" || { cat "$LOGS/push.log" >&2; return 1; }
    }
    insecure_registries="{$RINGFENCE_REGISTRY}"
    # What is in the way there is ours.
    unlock_release() { helm_ uninstall $RELEASE --no-hooks -n $RELEASE_NAMESPACE --wait; }
    clear_unknown() { kube -n $RELEASE_NAMESPACE delete "$OBJECTS" -l "$LABELLED" --wait; }
}

# From here on `kube`, `helm_` and `push` mean a cluster of the caller's kubeconfig and a registry
# that it pulls from: use_context CONTEXT REGISTRY PLAIN-HTTP(yes|no).
use_context() {
    context=$1
    registry=${2%/}
    plain_http=$3
    command -v kubectl >/dev/null || die "kubectl is needed in PATH for --context"
    command -v helm >/dev/null || die "helm is needed in PATH for --context"
    kube() { kubectl --context "$context" "$@"; }
    helm_() { helm --kube-context "$context" "$@"; }
    unlock_release() {
        die "the release $RELEASE in $RELEASE_NAMESPACE is ${1:-locked}: another helm works on it, or one was ended" \
            "in the middle; see helm history, and go back with: helm rollback $RELEASE -n $RELEASE_NAMESPACE"
    }
    clear_unknown() {
        die "objects of $RELEASE are in $RELEASE_NAMESPACE and Helm does not know them, as after kubectl apply of" \
            "helm template: take them away with kubectl delete -f the same manifests, or go on without Helm"
    }
    push() {
        push_archive "$1" "$registry/$2" "$plain_http" 2>"$LOGS/push.log" || { cat "$LOGS/push.log" >&2; return 1; }
    }
    insecure_registries="{}"
    [ "$plain_http" = no ] || insecure_registries="{${registry%%/*}}"
    kube version >/dev/null 2>&1 || die "the cluster of context $context does not answer: kubectl --context $context version"
}

# step WHAT COMMAND…: runs it quietly; shows its output when it fails.
step() {
    local what=$1 log=$LOGS/step.log began=$SECONDS job
    shift
    say "$what"
    # As a job of its own, so that the first command of a function that fails ends it: bash does
    # not do that inside a condition.
    "$@" >"$log" 2>&1 &
    job=$!
    if ! wait "$job"; then
        tail -n 40 "$log" >&2
        die "failed after $((SECONDS - began)) s: $what"
    fi
}

# Sets RINGFENCE_IMAGE and AGENT_IMAGE.
push_images() {
    local archive
    archive=$(scripts/image)
    # The tag is the content's: a tag that moves would be what the node pulled before.
    RINGFENCE_IMAGE=$(push "$archive" "ringfence:$(archive_tag "$archive")")
    archive=$(examples/agent/build)
    AGENT_IMAGE=$(push "$archive" "agent:$(archive_tag "$archive")")
}

archive_tag() {
    tar -xOf "$1" index.json | grep -o 'sha256:[0-9a-f]\{12\}' | head -n 1 | cut -d: -f2
}

# An example's manifest with the agent's image put in.
with_image() { sed "s#$AGENT_PLACEHOLDER#$AGENT_IMAGE#" "$1"; }

# Creates or replaces an object that kubectl writes: apply_new create-arguments….
apply_new() { kube create "$@" --dry-run=client -o yaml | kube apply -f - ; }

namespace_of() {
    # Not `create`: it may be there, and may be labelled by its owner.
    kube get namespace "$1" >/dev/null 2>&1 || kube create namespace "$1"
}

# Pods need a namespace's default service account, which comes a moment after the namespace.
account_of() {
    for _ in $(seq 60); do
        if kube -n "$1" get serviceaccount default >/dev/null 2>&1; then return 0; fi
        sleep 0.5
    done
    echo "namespace $1 has no default service account after 30 s" >&2
    return 1
}

# A CA and a certificate for the upstream; what an earlier run made is kept, so that agents which
# trust that CA go on working.
upstream_certificate() {
    local dir
    dir=$(mktemp -d)
    if kube -n $UPSTREAM_NAMESPACE get secret upstream-tls -o 'jsonpath={.data.tls\.crt}' \
        2>/dev/null | base64 -d | openssl x509 -checkend 86400 -noout >/dev/null 2>&1; then
        rm -rf "$dir"
        return 0
    fi
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 30 \
        -subj '/CN=Example upstream CA' -addext 'basicConstraints=critical,CA:TRUE' \
        -addext 'keyUsage=critical,keyCertSign' -keyout "$dir/ca.key" -out "$dir/ca.crt"
    openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj "/CN=upstream" \
        -keyout "$dir/tls.key" -out "$dir/tls.csr"
    printf 'subjectAltName=DNS:%s,DNS:%s\nextendedKeyUsage=serverAuth\nbasicConstraints=CA:FALSE\n' \
        "$UPSTREAM_HOST" "$OTHER_HOST" >"$dir/ext"
    openssl x509 -req -in "$dir/tls.csr" -CA "$dir/ca.crt" -CAkey "$dir/ca.key" -days 30 \
        -set_serial "0x$(openssl rand -hex 16)" -extfile "$dir/ext" -out "$dir/tls.crt"
    apply_new secret generic upstream-tls -n $UPSTREAM_NAMESPACE --from-file="$dir/tls.crt" \
        --from-file="$dir/tls.key" --from-file="$dir/ca.crt"
    rm -rf "$dir"
}

install_upstream() {
    namespace_of $UPSTREAM_NAMESPACE
    upstream_certificate
    apply_new configmap upstream-server -n $UPSTREAM_NAMESPACE \
        --from-file=examples/upstream/server.py
    with_image examples/upstream/upstream.yaml | kube apply -f -
    kube -n $UPSTREAM_NAMESPACE rollout status deployment upstream --timeout=120s
}

# The policy of the examples and the upstream's CA, under a name of the caller's choice.
install_policy() {
    local name=${1:-$POLICY} file=${2:-examples/policy.yaml} ca
    ca=$(mktemp)
    kube -n $UPSTREAM_NAMESPACE get secret upstream-tls -o 'jsonpath={.data.ca\.crt}' |
        base64 -d >"$ca"
    apply_new configmap "$name" -n $RELEASE_NAMESPACE --from-file=policy.yaml="$file" \
        --from-file=upstream-ca.crt="$ca"
    rm -f "$ca"
}

# A helm that was ended in the middle leaves a release that no other will touch. Nothing where there
# is no release.
release_status() {
    local said
    if said=$(helm_ status $RELEASE -n $RELEASE_NAMESPACE 2>&1); then
        sed -n 's/^STATUS: //p' <<<"$said"
    elif [[ $said != *'release: not found'* ]]; then
        echo "helm status $RELEASE: $said" >&2
        return 1
    fi
}

# A test that installs from the manifests alone may have been ended in the middle.
installed_without_helm() {
    [ -n "$(kube -n $RELEASE_NAMESPACE get deployment -l "$LABELLED" -o name 2>/dev/null)" ]
}

install_ringfence() {
    local status
    status=$(release_status)
    case $status in
        pending-* | uninstalling) unlock_release "$status" ;;
        '') if installed_without_helm; then clear_unknown; fi ;;
    esac
    local image=(--set "image.repository=${RINGFENCE_IMAGE%:*}" --set "image.tag=${RINGFENCE_IMAGE##*:}")
    if [[ $RINGFENCE_IMAGE == *@* ]]; then
        image=(--set "image.repository=${RINGFENCE_IMAGE%@*}" --set "image.digest=${RINGFENCE_IMAGE#*@}")
    fi
    helm_ upgrade --install $RELEASE charts/ringfence -n $RELEASE_NAMESPACE --create-namespace \
        --wait --timeout 180s "${image[@]}" --set "registries.insecure=$insecure_registries" "$@" || {
        kube -n $RELEASE_NAMESPACE get pods,events
        kube -n $RELEASE_NAMESPACE logs -l app.kubernetes.io/name=ringfence --tail=20
        return 1
    }
}

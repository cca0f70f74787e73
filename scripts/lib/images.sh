# Image archives into registries. Sourced after common.sh, from the top of the checkout.
# shellcheck shell=bash

# Puts an OCI archive into any registry, by whatever tool is there with the caller's own log-in;
# prints the reference with its digest.
push_archive() {
    local archive=$1 ref=$2 digest layout tool=
    for tool in crane skopeo podman docker ''; do
        [ -z "$tool" ] || ! command -v "$tool" >/dev/null || break
    done
    digest=$(tar -xOf "$archive" index.json | grep -o '"digest":"sha256:[0-9a-f]*"' | head -n 1 |
        cut -d'"' -f4)
    case $tool in
        crane)
            layout=$(mktemp -d)
            tar -xf "$archive" -C "$layout"
            crane push "$layout" "$ref" >&2
            rm -rf "$layout"
            ;;
        skopeo) skopeo copy --quiet --preserve-digests "oci-archive:$archive" "docker://$ref" >&2 ;;
        podman)
            podman load --quiet --input "$archive" >&2
            podman tag "$(archive_name "$archive")" "$ref"
            podman push --quiet "$ref" >&2
            ;;
        docker)
            docker load --quiet --input "$archive" >&2
            docker tag "$(archive_name "$archive")" "$ref"
            docker push --quiet "$ref" >&2
            ;;
        *) die "to push $ref one of crane, skopeo, podman or docker is needed" ;;
    esac
    case $tool in
        # What an engine pushes is compressed anew and has another digest: the tag has to do.
        podman | docker) echo "$ref" ;;
        *) echo "${ref%:*}@$digest" ;;
    esac
}

archive_name() {
    tar -xOf "$1" manifest.json | grep -o '"RepoTags":\["[^"]*"' | cut -d'"' -f4
}

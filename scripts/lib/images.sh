# Image archives into registries. Sourced after common.sh, from the top of the checkout.
# shellcheck shell=bash

# push_archive ARCHIVE REF [PLAIN-HTTP(yes|no)]: puts an OCI archive into any registry, by whatever
# tool is there with the caller's own log-in; prints the reference with its digest.
push_archive() {
    local archive=$1 ref=$2 plain_http=${3:-no} digest layout tool
    local -a insecure=()
    for tool in crane skopeo podman docker ''; do
        [ -z "$tool" ] || ! command -v "$tool" >/dev/null || break
    done
    digest=$(tar -xOf "$archive" index.json | grep -o '"digest":"sha256:[0-9a-f]*"' | head -n 1 |
        cut -d'"' -f4)
    case $tool in
        crane)
            layout=$(mktemp -d)
            tar -xf "$archive" -C "$layout"
            [ "$plain_http" = no ] || insecure=(--insecure)
            crane push "${insecure[@]}" "$layout" "$ref" >&2 || die "cannot push $ref"
            rm -rf "$layout"
            ;;
        skopeo)
            [ "$plain_http" = no ] || insecure=(--dest-tls-verify=false)
            skopeo copy --quiet --preserve-digests "${insecure[@]}" \
                "oci-archive:$archive" "docker://$ref" >&2 || die "cannot push $ref"
            ;;
        podman)
            podman load --quiet --input "$archive" >&2
            podman tag "$(archive_name "$archive")" "$ref"
            [ "$plain_http" = no ] || insecure=(--tls-verify=false)
            podman push --quiet "${insecure[@]}" "$ref" >&2 || die "cannot push $ref"
            ;;
        docker)
            docker load --quiet --input "$archive" >&2
            docker tag "$(archive_name "$archive")" "$ref"
            docker push --quiet "$ref" >&2 || die "cannot push $ref"
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

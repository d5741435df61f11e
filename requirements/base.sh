#!/usr/bin/env bash
# Prints the name of the image that the Dockerfile builds on, with the digest that its tag has in Docker's registry today.
# To build on that from now on, write it into the Dockerfile, and commit it:
#   base=$(bash requirements/base.sh) && sed -i "s|^ARG BASE=.*|ARG BASE=$base|" Dockerfile
# usage: bash requirements/base.sh [NAME:TAG]     none: the Dockerfile's. It needs curl, and no account.
set -euo pipefail
cd "$(dirname "$0")/.."
image=${1:-$(sed -n 's/^ARG BASE=//p' Dockerfile)}
image=${image%@*}
name=${image%:*} tag=${image##*:}
repository=$name
[[ "$name" == */* ]] || repository=library/$name
registry=${REGISTRY:-https://registry-1.docker.io} login=${LOGIN:-https://auth.docker.io}
fetch() { curl --fail --silent --show-error --retry 3 "$@"; }
token=$(fetch "$login/token?service=registry.docker.io&scope=repository:$repository:pull" |
    sed -n 's/.*"token" *: *"\([^"]*\)".*/\1/p')
# An index has the images of all architectures.
digest=$(fetch --head --header "Authorization: Bearer $token" \
    --header "Accept: application/vnd.oci.image.index.v1+json" \
    --header "Accept: application/vnd.docker.distribution.manifest.list.v2+json" \
    "$registry/v2/$repository/manifests/$tag" | tr -d '\r' | sed -n 's/^docker-content-digest: //Ip')
[[ "$digest" =~ ^sha256:[0-9a-f]{64}$ ]] || {
    echo "The registry gave no digest of $image: see that there is such an image." >&2
    exit 1
}
echo "$name:$tag@$digest"

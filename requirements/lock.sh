#!/usr/bin/env bash
# Writes the lock files: for a set of extras every package with its version, the newest that setup.cfg allows, for Python 3.11 to
# 3.13. What must be the same when it is made again is installed from them (LOCKED=1 in launch/setup.sh, the Dockerfile).
# usage: bash requirements/lock.sh [EXTRAS ...]     none: all that are here. It needs uv: pip install uv
set -euo pipefail
cd "$(dirname "$0")/.."
sets=("$@")
[ $# -gt 0 ] || sets=(requirements/*.txt)
for set in "${sets[@]}"; do
    set=$(basename "$set" .txt)
    options=()
    [ "$set" = core ] || for extra in ${set//[,+]/ }; do options+=(--extra "$extra"); done
    uv pip compile --quiet --upgrade --universal --python-version 3.11 --no-annotate --no-header setup.cfg \
        "${options[@]}" --output-file "requirements/${set//,/+}.txt"
done

#!/usr/bin/env bash
# From a fresh machine to a trained, sampled and scored language model.
# usage: bash launch/quickstart.sh [WORKDIR [--config.key=value ...]]
set -euo pipefail
cd "$(dirname "$0")/.."
workdir=${1:-runs/quickstart}
shift || true
bash launch/setup.sh
# On CPU XLA spends a fifth of a step on page faults; huge pages take most of that away.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
.venv/bin/flowlm train --config=experiments/quickstart.py --workdir="$workdir" "$@"
echo
echo "Run directory: $workdir (config.json, checkpoints/, metrics.jsonl, curves.png, evaluation.json, samples.txt)"
echo "More text:     .venv/bin/flowlm sample --checkpoint=$workdir --steps=64"

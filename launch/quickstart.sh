#!/usr/bin/env bash
# From a fresh machine to a flow language model, its one-step flow map, and both before the judges.
# usage: bash launch/quickstart.sh [WORKDIR [--config.key=value ...]]
set -euo pipefail
cd "$(dirname "$0")/.."
workdir=${1:-runs/quickstart}
shift || true
bash launch/setup.sh
# On CPU XLA spends a fifth of a step on page faults; huge pages take most of that away.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
flowlm() { .venv/bin/flowlm "$@"; }
flowlm train --config=experiments/quickstart.py --workdir="$workdir/flow" "$@"
flowlm train --config=experiments/quickstart.py:flow_map --config.teacher="$workdir/flow" --workdir="$workdir/flow_map" "$@"
echo
flowlm compare --runs="$workdir/flow,$workdir/flow_map"
echo "Run directories: $workdir/flow and $workdir/flow_map (config.json, checkpoints/, metrics.jsonl, curves.png, evaluation.json, samples.txt)"
echo "More text:       .venv/bin/flowlm sample --checkpoint=$workdir/flow_map --steps=1"

#!/usr/bin/env bash
# All methods under one budget, to one table; taken up where it was when run again.
# usage: bash launch/study.sh [grammar|tuning|text|text_tuning|text_gpu [WORKDIR [RESULTS]]]
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/setup.sh
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
study=${1:-grammar}
# Small networks are faster one to a core; a card takes one run at a time.
parallel=1
[ "$study" = text_gpu ] || parallel=$(( $(nproc) < 4 ? $(nproc) : 4 ))
.venv/bin/flowlm study --study="experiments/head_to_head.py:$study" --workdir="${2:-runs/study/$study}" \
    --results="${3:-results/study/$study}" --parallel="$parallel"

#!/usr/bin/env bash
# From a fresh machine to a flow language model of short English sentences, its
# one-step flow map, and both before the judges.
# usage: bash launch/quickstart.sh [WORKDIR [--config.key=value ...]]
set -euo pipefail
case ${1:-} in
    -h | --help)
        sed -n '2,4s/^# //p' "$0"
        echo "WORKDIR is runs/quickstart by default; a run found there is taken up where it"
        echo "was. .venv/bin/flowlm train --help says how settings are given."
        exit ;;
    -*) echo "The first argument is a directory, not ${1}: bash launch/quickstart.sh WORKDIR ${1}" >&2; exit 2 ;;
esac
cd "$(dirname "$0")/.."
workdir=${1:-runs/quickstart}
shift || true
trap 'exit 130' INT TERM HUP # because a command that is stopped has saved and exits with 0
bash launch/setup.sh
# On CPU XLA spends a fifth of a step on page faults; huge pages take most of that away.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
flowlm() { .venv/bin/flowlm "$@"; }
flowlm train --config=experiments/quickstart.py --workdir="$workdir/flow" "$@"
flowlm train --config=experiments/quickstart.py:flow_map --config.teacher="$workdir/flow" --workdir="$workdir/flow_map" "$@"
echo
flowlm compare "$workdir/flow" "$workdir/flow_map" --samples=8
cat <<END

Files of a run, in $workdir/flow and $workdir/flow_map:
  samples.txt, evaluation.json, evaluation.png, curves.png, metrics.jsonl,
  config.json, checkpoints/
Next:
  .venv/bin/flowlm sample $workdir/flow_map --steps=1 --num=20
  .venv/bin/flowlm report $workdir --out=$workdir/report
  .venv/bin/flowlm train --config=experiments/grammar.py --workdir=runs/grammar
END

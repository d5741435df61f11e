#!/usr/bin/env bash
# Makes .venv beside the checkout's files and installs flowlm into it, once.   usage: bash launch/setup.sh [EXTRAS]
# PYTHON names the interpreter (3.11 to 3.13). LOCKED=1 installs the very versions of requirements/, not the newest allowed.
set -euo pipefail
cd "$(dirname "$0")/.."
extras=${1:-}
python=${PYTHON:-python3}
command -v "$python" > /dev/null || {
    echo "There is no Python at $python: set PYTHON=/path/to/python, version 3.11 to 3.13." >&2
    exit 1
}
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || {
    echo "flowlm needs Python 3.11 to 3.13; $python is $("$python" -V). Set PYTHON=/path/to/python." >&2
    exit 1
}
set=${extras:-core}
lock=${LOCKED:+requirements/${set//,/+}.txt}
[ -z "$lock" ] || [ -e "$lock" ] || {
    echo "There is no $lock: make it by \`bash requirements/lock.sh $set\`, or leave out LOCKED." >&2
    exit 1
}
# A line now and then of what pip does; it would write hundreds, or with --quiet none for minutes.
told() {
    awk 'function say(text) { print text; fflush() }
        /^Collecting/ { sub(/[^A-Za-z0-9_.-].*/, "", $2); if (++count % 10 == 0) say("  " count " packages fetched, " $2 " the last") }
        /^Installing collected packages/ { say("  unpacking") }'
}
stamp=.venv/.flowlm-installed-$set${lock:+-locked}
if [ ! -e "$stamp" ] || [ setup.cfg -nt "$stamp" ] || [ "${lock:-setup.cfg}" -nt "$stamp" ]; then
    [ -x .venv/bin/python ] || {
        echo "making .venv"
        "$python" -m venv .venv
    }
    echo "installing flowlm${extras:+ with $extras} and what it needs, about 2 minutes"
    export PYTHONUNBUFFERED=1
    pip=(.venv/bin/python -m pip install --disable-pip-version-check --progress-bar off)
    [ -z "$lock" ] || "${pip[@]}" --requirement "$lock" | told
    "${pip[@]}" ${lock:+--no-deps} --editable ".${extras:+[$extras]}" | told
    touch "$stamp"
    echo "flowlm is in .venv: source .venv/bin/activate, or call it .venv/bin/flowlm"
fi

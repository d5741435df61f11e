#!/usr/bin/env bash
# From a fresh machine to a passed test suite.   usage: bash tests/run.sh [PYTEST ARGUMENTS]
# EXTRAS are what is installed beside the core (dev).
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/setup.sh "${EXTRAS:-dev}"
.venv/bin/python -VV
.venv/bin/python -m pip --disable-pip-version-check freeze --exclude-editable | paste -sd " "
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/python -m pytest -q -n 2 --dist=worksteal --durations=10 "$@"

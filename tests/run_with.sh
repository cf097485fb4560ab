#!/bin/sh
# The tests with other versions of the libraries, in an environment of its own, kept and brought up to date by the next run.
# usage: tests/run_with.sh VENV TORCH REQUIREMENT...; TESTS says which tests (default: those that call the libraries)
set -eu
cd "$(dirname "$0")/.."
venv=$1
shift
TESTS=${TESTS:-tests/parity tests/model tests/checkpoint tests/elastic tests/store tests/jobs tests/generic tests/serve tests/report tests/cli}
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/python" -m pip install --disable-pip-version-check --upgrade "$@" --editable ".[report,serve,structured]" compressed-tensors hypothesis httpx2 openai pytest pytest-timeout pytest-xdist
"$venv/bin/python" -m pip list 2>/dev/null | grep -iE '^(torch|transformers|numpy|numba|fastapi|pydantic) '
exec "$venv/bin/python" -m pytest $TESTS -p no:cacheprovider -n 2 --dist worksteal

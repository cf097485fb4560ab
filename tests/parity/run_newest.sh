#!/bin/sh
# Family parity on the newest transformers, in an environment of its own: moe-prism pins an older range, which it shares with vLLM.
# usage: tests/parity/run_newest.sh [VENV]   (default .venv-newest; kept and brought up to date by the next run)
# environment: PYTHON (default python3), TRANSFORMERS (a requirement, default the newest release)
# Exits 0 without running anything if the packages cannot be installed, so that an offline CI skips it.
set -eu
cd "$(dirname "$0")/../.."
venv=${1:-.venv-newest}
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
if ! "$venv/bin/python" -m pip install -q --upgrade "torch==2.13.0" "${TRANSFORMERS:-transformers}" numpy scipy numba pytest pytest-timeout; then
    echo "skipped: the newest transformers could not be installed" >&2
    exit 0
fi
exec env PYTHONPATH=src "$venv/bin/python" -m pytest tests/parity -p no:cacheprovider -rs

#!/bin/sh
# The clients of others, in an environment of its own: what cannot be had is said, and its test is skipped.
# usage: tests/clients/install.sh FOLDER
set -eu
folder=$1
[ -x "$folder/bin/python" ] || "${PYTHON:-python3}" -m venv "$folder"
install() { "$folder/bin/python" -m pip install --quiet --disable-pip-version-check "$@" || echo "could not be had: $*"; }
install openai langchain-openai
install 'torch==2.13.0' guidellm  # any other torch may be one for CUDA, of several GB
install 'torch==2.13.0' 'lm_eval[api]' transformers accelerate  # accelerate: its model "hf" imports it
if command -v npm >/dev/null; then
    (cd "$folder" && npm install --silent --no-fund --no-audit openai) || echo "could not be had: openai of JavaScript"
else
    echo "could not be had: openai of JavaScript (no npm)"
fi

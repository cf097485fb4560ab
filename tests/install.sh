#!/bin/sh
# A wheel in empty environments: the core and each extra alone. Every module of the part imports, and the command works.
# usage: tests/install.sh WHEEL [EXTRA...]   (default: the core, then every extra that has no GPU)
set -eu
cd "$(dirname "$0")/.."
wheel=$(realpath "$1")
shift
[ $# -gt 0 ] || set -- "" report serve gguf
pins=$(realpath requirements/constraints.txt)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for extra in "$@"; do
    rm -rf "$work/venv"
    "${PYTHON:-python3}" -m venv "$work/venv"
    "$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check -c "$pins" "$wheel${extra:+[$extra]}"
    (cd "$work" && venv/bin/moe-prism --version && venv/bin/moe-prism generate nano --prompt "import os" --max-new-tokens 4)
    case $extra in
        report) (cd "$work" && venv/bin/moe-prism demo --out demo --force) ;;
        serve) (cd "$work" && venv/bin/python -c "import moe_prism.serve.server, moe_prism.serve.http.app") ;;
        gguf) (cd "$work" && venv/bin/python -c "import moe_prism.checkpoint.gguf_file, gguf, accelerate") ;;
    esac
    echo "ok: ${extra:-core}"
done

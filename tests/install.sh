#!/bin/sh
# A wheel in empty environments: the core and each extra alone. Every module of the part imports, and the command works.
# usage: tests/install.sh WHEEL [EXTRA...]   (default: the core, then every extra that has no GPU)
set -eu
cd "$(dirname "$0")/.."
wheel=$(realpath "$1")
shift
[ $# -gt 0 ] || set -- "" report text gguf accelerate eval serve structured otel
pins=$(realpath requirements/constraints.txt)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for extra in "$@"; do
    rm -rf "$work/venv"
    "${PYTHON:-python3}" -m venv "$work/venv"
    "$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check -c "$pins" "$wheel${extra:+[$extra]}"
    "$work/venv/bin/python" -m pip check
    (cd "$work" && venv/bin/moe-prism --version && venv/bin/moe-prism generate nano --prompt "import os" --max-tokens 4)
    (cd "$work" && EXTRA=$extra venv/bin/python - <<'END'
import importlib
import os
import pkgutil

import moe_prism

extra = os.environ["EXTRA"]
needs = {"serve": ("serve", "structured"), "report": ("report",), "kernels.triton_kernels": ("gpu",), "checkpoint.gguf_file": ("gguf",)}
libraries = {"text": ("pyarrow", "datasets"), "gguf": ("gguf", "accelerate"), "accelerate": ("accelerate",), "eval": ("lm_eval",), "structured": ("xgrammar",), "otel": ("opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http.trace_exporter")}
count = 0
for module in pkgutil.walk_packages(moe_prism.__path__, "moe_prism.", onerror=lambda name: None):
    name = module.name.removeprefix("moe_prism.")
    own = [extras for start, extras in needs.items() if name == start or name.startswith(start + ".")]
    if name.endswith("__main__") or name.startswith("serve.vllm") or any(extra not in extras for extras in own):
        continue
    importlib.import_module(module.name)
    count += 1
for library in libraries.get(extra, ()):
    importlib.import_module(library)
print(f"{count} modules import")
END
    )
    case $extra in
        report) (cd "$work" && venv/bin/moe-prism demo --out demo --force) ;;
    esac
    echo "ok: ${extra:-core}"
done

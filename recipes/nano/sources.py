"""Where the text of prism-nano comes from: the standard library and installed packages, Python alone."""

from __future__ import annotations

import sysconfig
from pathlib import Path

from corpus import Source

from moe_prism.data.bundled import is_program

# fmt: off
PACKAGES = [
    "torch", "transformers", "numpy", "scipy", "sympy", "networkx", "datasets", "lm_eval", "numba", "accelerate", "pip",
    "pandas", "sklearn", "matplotlib", "altair", "huggingface_hub", "tokenizers", "safetensors", "fsspec", "aiohttp", "pyarrow",
    "joblib", "nltk", "jsonschema", "mpmath", "narwhals", "click", "typer", "rich", "httpx2", "anyio", "requests", "urllib3",
    "fontTools", "PIL", "pydantic", "dateutil", "jinja2", "evaluate", "sacrebleu", "threadpoolctl", "torchgen",
]
# fmt: on
EVERYTHING = 1e6
MAX_BYTES = 300_000  # longer files are tables, not programs


def name_of(source: Source, relative: Path) -> str:
    return f"{source.project}/{relative.as_posix()}"


def sources(fetched: Path | None) -> list[Source]:
    stdlib, base = Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("purelib"))
    roots = [("stdlib", stdlib), *((p, base / p) for p in PACKAGES if (base / p).is_dir())]
    return [Source("python", name, "its own", root, (".py",), is_program, EVERYTHING, MAX_BYTES) for name, root in roots]

"""What lies beside the weights: it travels unless it can be executed, holds other weights, or speaks of the model as it was."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import CorruptError
from ..schema import decode, is_file_name
from ..schema.common import DEPTH
from ..schema.config import bounds_of
from .atomic import JOURNAL, OutputFolder
from .links import follows_links, leads_out
from .shards import INDEX, Source

CARD, SOURCE_CARD = "README.md", "README-source.md"
CONFIG = "config.json"
FORMAT_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
OWN = (
    "prism.json", "prism.safetensors", "experts.pack", "kept.json", "frontier.json", "frontier.png", "ladder.json", "report.html",
    "plan.json", JOURNAL,
)  # fmt: skip
OTHER_WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".ggml", ".onnx", ".npz", ".npy", ".tflite", ".ot",
    ".index.json", ".zip", ".tar", ".gz", ".tgz",
)  # fmt: skip
CODE = (
    ".py", ".pyc", ".pyd", ".ipynb", ".so", ".dll", ".dylib", ".exe", ".sh", ".bat", ".cmd", ".ps1", ".js", ".jar", ".whl", ".pkl",
    ".pickle", ".joblib",
)  # fmt: skip
STARTS = (b"#!", b"\x7fELF", b"MZ", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # scripts, programs, pickles
LICENCE = re.compile(r"^(license|license_name|license_link):[ \t]*(\S.*)$", re.MULTILINE)


def companions(folder: str | Path, source: Source | None = None) -> tuple[list[str], dict[str, str]]:
    """(files that travel, {file that does not: why}), names with `/` below the folder.

    source: whose shards are neither. What is written of a dequantized one has no format, and no file that names one.
    """
    from .dequantized import DequantizedSource  # which needs torch, as nothing else here does

    carried, left = [], {}
    weights = source.raw if isinstance(source, DequantizedSource) else source
    known = {INDEX, *(weights.shards() if weights else ())}
    for name in _files(Path(folder), ""):
        if name in known or name in OWN:
            continue
        reason = _why_not(Path(folder) / name)
        if source is not weights and name in FORMAT_FILES:
            reason = "says how the weights were quantized"
        if reason:
            left[name] = reason
        elif name != CARD or not (Path(folder) / SOURCE_CARD).exists():
            carried.append(name)
    return carried, left


def copy_companions(folder: str | Path, out: OutputFolder, source: Source | None = None) -> None:
    """Copy what travels byte for byte; only what names code is taken out, and a model card gets another name."""
    for name in companions(folder, source)[0]:
        data = source.config_bytes() if source and name == CONFIG else (Path(folder) / name).read_bytes()
        out.write_bytes(SOURCE_CARD if name == CARD else name, without_code(name, data))


def without_code(name: str, data: bytes) -> bytes:
    """JSON `data` without the keys that name code to run or a kernel to fetch; anything else, and JSON that has none, unchanged."""
    if not name.endswith(".json") or not any(word in data for word in (b"auto_map", b"_implementation", b"custom_generate")):
        return data
    try:
        value = decode(data, name, bounds=bounds_of(name))
    except CorruptError:
        return data  # no JSON that a library would read either
    kept = _without(value)
    return data if kept == value else json.dumps(kept, indent=2, ensure_ascii=False).encode() + b"\n"


def _without(value: Any) -> Any:
    if isinstance(value, list):
        return [_without(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {k: _without(v) for k, v in value.items() if not _names_code(k, v)}


def _names_code(key: str, value: Any) -> bool:
    """A hub kernel is named owner/name; a plain implementation is one of transformers' own."""
    return key in ("auto_map", "custom_generate") or ("_implementation" in key and "/" in json.dumps(value))


def licence(folder: str | Path) -> dict[str, str]:
    """The licence fields of a folder's model card: those of its front matter, as they are written there."""
    for name in (CARD, SOURCE_CARD):
        path = Path(folder) / name
        if path.is_file() and (follows_links() or not leads_out(path)):
            front = re.match(r"---\r?\n(.*?)\r?\n---", path.read_bytes().decode("utf-8", "replace"), re.DOTALL)
            found = dict(LICENCE.findall(front[1])) if front else {}
            if found:
                return {key: value.strip() for key, value in found.items()}
    return {}


def companion_facts(folder: str | Path, source: Source | None = None) -> dict[str, Any]:
    """For a manifest: the licence that a source's card states, and what lies beside its weights and does not travel, with the reason.

    source: as it is written, default as it is on disk.
    """
    if Path(folder).is_file():
        return {"licence": {}, "left_out": {}}
    return {"licence": licence(folder), "left_out": companions(folder, source or Source(folder))[1]}


def origin(folder: str | Path) -> str:
    """The name of a model on its hub where the path shows it (a hub cache), else the folder's name."""
    path = Path(folder).resolve()
    cached = re.fullmatch(r"models--([^/]+?)--([^/]+)", path.parents[1].name) if len(path.parents) > 1 else None
    return f"{cached[1]}/{cached[2]}" if cached and path.parent.name == "snapshots" else path.name


def _files(folder: Path, below: str) -> Iterator[str]:
    """Names of all files, in order. Hidden ones belong to tools (git, download caches), not to the model."""
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        name = below + entry.name
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False) and name.count("/") < DEPTH - 1:
            yield from _files(Path(entry.path), f"{name}/")
        else:
            yield name


def _why_not(path: Path) -> str:
    """Why a file does not travel, "" if it does."""
    name = path.name.lower()
    if not is_file_name(path.name):
        return "a name that not every system takes"
    if not path.is_file():
        return "no plain file"
    if leads_out(path) and not follows_links():
        return "a link that leads out of the folder"
    if name.endswith(CODE):
        return "code"
    if name.endswith(OTHER_WEIGHTS):
        return "other weights"
    with path.open("rb") as file:
        return "code" if file.read(4).startswith(STARTS) else ""

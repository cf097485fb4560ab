"""`prism.json`: what a folder holds, where it came from, and the sha256 of every file (safetensors has no checksum)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import CorruptError, UsageError
from ..schema import check, read_json
from ..schema.manifest import KINDS, NEXT
from ..schema.read import one_line
from .atomic import JOURNAL, OutputFolder, sha256_file
from .companions import origin
from .links import inside
from .recipe import recipe_facts
from .shards import Source
from .versions import versions

MANIFEST = "prism.json"
UPDATE = ".update"
"""Where a change of a finished folder is written; what lies there does not count yet."""
REMEASURED = ("frontier.json", "ladder.json", "report.html", "frontier.png", "eval.json")
"""Files that somebody may remove: they are measured again."""
SCHEMA = 1
WEIGHTS_FILE = "weights_file"
"""The fact that names the GGUF file of a folder that has no safetensors weights."""


PLAIN_KINDS = ("pruned", "quantized", "sliced", "merged", "resliced", "split", "trained")
"""Outputs with a manifest that are plain checkpoints otherwise."""


def source_facts(folder: str | Path) -> dict[str, Any]:
    """Name of a source (never its path) and sha256 of its config and weight files. Reads every byte once."""
    path = Path(folder)
    if path.is_file():
        return {"name": path.name, "files": {path.name: sha256_file(path)}}
    source = Source(path)
    names = ["config.json", *([source.index_file] if source.index_file else []), *source.shards()]
    return {"name": origin(path), "files": {name: sha256_file(path / name) for name in names if (path / name).is_file()}}


def write_manifest(out: OutputFolder, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Write prism.json, the last file before `out.finish()`.

    facts: JSON values such as source (see `source_facts`), options, seed, n_sub, layers. Adds schema, versions, and sha256 and
    bytes of each file in the folder. UsageError if facts uses a reserved key.
    """
    files = {
        name: {"sha256": out.hashes.get(name) or sha256_file(out.work / name), "bytes": (out.work / name).stat().st_size}
        for name in sorted(present(out.work))
    }
    content = _content({**recipe_facts(), **facts}, files)
    out.write_bytes(MANIFEST, encoded(content))
    return content


def parse_manifest(path: Path) -> dict[str, Any]:
    """A manifest, checked against its own sha256, whatever lies beside it. CorruptError if it was edited or is damaged."""
    value: Any = read_json(inside(path), NEXT)
    # an edit that kept it a manifest is named as such; else the form says what is wrong
    if isinstance(value, dict) and isinstance(value.get("sha256"), str) and value["sha256"] != _digest(value):
        raise CorruptError(f"{path} was edited or damaged: it does not match its own sha256", NEXT)
    if isinstance(value, dict) and type(value.get("schema")) is int and value["schema"] != SCHEMA:
        raise UsageError(
            f"{path} has schema {value['schema']}, this version reads {SCHEMA}", "use the moe-prism version that wrote it"
        )
    check_manifest(value, str(path))
    return value  # type: ignore[no-any-return]


def check_manifest(value: Any, where: str) -> None:
    """CorruptError for what is no manifest of a known kind."""
    kind = value.get("kind") if isinstance(value, dict) else None
    form = KINDS.get(kind) if isinstance(kind, str) else None
    if form is None:
        raise CorruptError(f"{where}: 'kind' must be one of {', '.join(KINDS)}, not {one_line(repr(kind))}", NEXT)
    check(form, value, where, NEXT)


def check_listed(folder: str | Path, manifest: Mapping[str, Any], names: Sequence[str]) -> None:
    """CorruptError for one of these files that is there and is not, byte for byte, the file that prism.json lists."""
    for name in names:
        path, entry = Path(folder) / name, manifest["files"].get(name)
        if entry is None and not path.exists():
            continue
        if entry is None:
            raise CorruptError(f"{path} is not in {MANIFEST}", NEXT)
        if not path.is_file() or path.stat().st_size != entry["bytes"] or sha256_file(inside(path)) != entry["sha256"]:
            raise CorruptError(f"{path} is missing or was changed (its sha256 is not that of {MANIFEST})", NEXT)


def check_layers(folder: str | Path, manifest: Mapping[str, Any], layers: Sequence[Any]) -> None:
    """CorruptError where prism.json speaks of other layers than the model has. layers: of `model.MoELayer`."""
    told = [(row["experts"], row["width"]) for row in manifest["layers"]]
    there = [(layer.num_experts, layer.width) for layer in layers]
    if told != there:
        pairs = enumerate(zip(told, there, strict=False))
        wrong = next((i for i, (a, b) in pairs if a != b), min(len(told), len(there)))
        count = f"there are {len(told)}, the model has {len(there)}"
        what = f"{told[wrong]} experts and neurons, the model has {there[wrong]}" if len(told) == len(there) else count
        raise CorruptError(f"{Path(folder) / MANIFEST}: 'layers[{wrong}]': {what}", NEXT)


def changed_content(folder: Path, work: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest of a folder with the files of `work` in it, and with facts replaced or added."""
    old = parse_manifest(folder / MANIFEST)
    kept = {k: v for k, v in old.items() if k not in ("schema", "versions", "files", "sha256")}
    new = {path.name: _entry(path) for path in sorted(work.iterdir()) if path.name != MANIFEST}
    caches = facts.get("caches", old.get("caches", ()))
    there = {n: e for n, e in old["files"].items() if (folder / n).exists() or n not in (*REMEASURED, *caches)}
    found = {name: _entry(folder / name) for name in sorted(present(folder) - set(there) - set(new))}
    return _content({**kept, **facts}, {**there, **found, **new})


def _entry(path: Path) -> dict[str, Any]:
    return {"sha256": sha256_file(path), "bytes": path.stat().st_size}


def _content(facts: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    reserved = {"schema", "versions", "files", "sha256"} & set(facts)
    if reserved:
        raise UsageError(f"facts may not set {sorted(reserved)}", "these keys are filled in here")
    listed = dict(sorted(files.items()))
    content: dict[str, Any] = json.loads(json.dumps({"schema": SCHEMA, "versions": versions(), **facts, "files": listed}))
    content["sha256"] = _digest(content)
    check_manifest(content, MANIFEST)  # nothing is written that could not be read back
    return content


def present(folder: Path) -> set[str]:
    """All files of the folder and of those in it."""
    found = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_symlink() or not file.is_dir()}
    return {name for name in found if not name.startswith(f"{UPDATE}/")} - {MANIFEST, JOURNAL}


def _digest(content: Mapping[str, Any]) -> str:
    body = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def encoded(content: Mapping[str, Any]) -> bytes:
    """As it is written."""
    return json.dumps(content, indent=1, sort_keys=True).encode() + b"\n"

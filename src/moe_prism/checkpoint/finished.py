"""A finished folder: what it says of itself, and whether that is true. A change that was interrupted is finished first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CorruptError, UsageError
from ..schema.manifest import NEXT
from .atomic import sha256_file
from .change import settle
from .header import read_header
from .manifest import MANIFEST, UPDATE, parse_manifest, present
from .shards import INDEX, SINGLE, Source


@dataclass(frozen=True)
class Check:
    """One line of `moe-prism verify`: what was looked at and what was found."""

    name: str
    detail: str


def elastic_manifest(folder: str | Path) -> dict[str, Any]:
    """`read_manifest` of an elastic model; UsageError for a folder that is none."""
    if not (Path(folder) / MANIFEST).is_file():
        raise UsageError(f"'{folder}' has no {MANIFEST}", "give a folder that `moe-prism refactor MODEL -o FOLDER` wrote")
    manifest = read_manifest(folder)
    if manifest.get("kind") != "elastic":
        raise UsageError(f"'{folder}' is not an elastic model", "give the folder written by `moe-prism refactor`")
    return manifest


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """prism.json, checked against its own sha256. UsageError if there is none, CorruptError if it was edited or is damaged."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise UsageError(f"'{folder}' has no {MANIFEST}", "give a folder that moe-prism wrote")
    if (Path(folder) / UPDATE / MANIFEST).is_file():
        settle(folder)
    return parse_manifest(path)


def verify(folder: str | Path) -> list[Check]:
    """Recompute everything a finished folder promises; one Check per kind.

    Raises CorruptError that names each missing, extra or changed file, a damaged safetensors header, an index that does not match
    its shards, or the tensor with a value that is not finite.
    """
    path, manifest = Path(folder), read_manifest(folder)
    files = check_files(path, manifest)
    weights = [name for name in sorted(files) if name.endswith(".safetensors")]
    for name in weights:
        read_header(path / name)
    if any((path / name).is_file() for name in (SINGLE, INDEX)):
        Source(path)
    count = sum(_check_values(path / name) for name in weights)
    total = sum(entry["bytes"] for entry in files.values())
    return [
        Check("manifest", f"{MANIFEST} matches its own sha256"),
        Check("files", f"{len(files)} files, {total} bytes: none missing, extra or changed"),
        Check("headers", f"{len(weights)} safetensors headers agree with their files"),
        Check("values", f"{count} tensors hold finite values only"),
    ]


def check_files(folder: str | Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The listed files. CorruptError where one of them is missing or changed, or another one is there."""
    files = _kept(Path(folder), manifest)
    _check_files(Path(folder), files)
    return files


def _kept(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The listed files without the caches that somebody removed."""
    caches = manifest.get("caches", ())
    return {name: entry for name, entry in manifest["files"].items() if name not in caches or (folder / name).exists()}


def _check_files(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    found = present(folder)
    problems = [f"{name} is missing" for name in sorted(set(files) - found)]
    problems += [f"{name} is not in {MANIFEST}" for name in sorted(found - set(files))]
    for name in sorted(found & set(files)):
        path, entry = folder / name, files[name]
        if not path.is_file() or path.is_symlink():
            problems.append(f"{name} is not a plain file")
        elif path.stat().st_size != entry["bytes"]:
            problems.append(f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}")
        elif sha256_file(path) != entry["sha256"]:
            problems.append(f"{name} was changed (sha256 differs)")
    if problems:
        raise CorruptError(f"'{folder}': {'; '.join(problems)}", NEXT)


def _check_values(path: Path) -> int:
    from .dtypes import TORCH  # all else is looked at without torch
    from .tensors import check_finite, read_tensor

    header = read_header(path)
    known = [info for info in header.tensors if info.dtype in TORCH]
    for info in known:
        check_finite(info.name, read_tensor(path, info), path.name)
    return len(known)

"""Open whatever a command was pointed at: a refactored folder, or a plain checkpoint as a model of whole experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint import check_listed, read_manifest
from ..checkpoint.companions import CONFIG, origin
from ..checkpoint.manifest import MANIFEST, PLAIN_KINDS
from ..elastic import Elastic, attach
from ..model import load_to_run, load_tokenizer, resolve
from ..model.load import check_writes
from ..point import NamedPoint, find_point
from ..point.named import FRONTIER
from .load import load
from .source import Weights


@dataclass(frozen=True)
class Opened:
    """A model with its elastic state. manifest: None for a plain checkpoint, whose experts are not cut (n_sub 1)."""

    model: Any
    tokenizer: Any
    manifest: Mapping[str, Any] | None
    name: str
    documents: tuple[str, ...] = ()
    """SHA-256 of the text that something was chosen by: no measurement may use it."""

    @property
    def elastic(self) -> Elastic:
        return self.model._moe_prism  # type: ignore[no-any-return]

    @property
    def n_sub(self) -> int:
        return self.elastic.layers[0].parts.n_sub


def own_point(asked: str, folder: str | Path) -> NamedPoint:
    """`find_point` in a folder whose frontier.json is the one that its prism.json lists, where it lists one."""
    if (Path(folder) / MANIFEST).is_file() and FRONTIER in (manifest := read_manifest(folder))["files"]:
        check_listed(folder, manifest, [FRONTIER])
    return find_point(asked, folder)


def known_documents(folder: str | Path) -> tuple[str, ...]:
    """`Opened.documents`, without a look at the weights."""
    path = Path(folder)
    if not (path / MANIFEST).is_file():
        return ()
    manifest = read_manifest(path)
    return tuple(manifest.get("documents", ()) if manifest.get("kind") in PLAIN_KINDS else manifest["calibration"]["documents"])


def sub_experts(folder: str | Path) -> int:
    """Per expert, without a look at the weights; 1 of a plain checkpoint."""
    manifest = read_manifest(folder) if (Path(folder) / MANIFEST).is_file() else {}
    return int(manifest.get("n_sub", 1)) if manifest.get("kind") not in PLAIN_KINDS else 1


def open_to_write(folder: str | Path) -> tuple[Any, Any]:
    """(model, tokenizer) to generate with: an elastic one as `load` has it, its experts as they are stored; else `open_model`'s."""
    path = Path(folder)
    if (path / MANIFEST).is_file() and read_manifest(path).get("kind") not in PLAIN_KINDS:
        return load(path)
    opened = open_model(path)
    return opened.model, opened.tokenizer


def open_model(folder: str | Path) -> Opened:
    """A folder written by `refactor` or `recover`, or any checkpoint `load_model` takes, with `attach(model, 1)`.

    Raises UsageError for a path that is neither, CorruptError for a damaged prism.json.
    """
    path = Path(folder)
    documents: tuple[str, ...] = ()
    if (path / MANIFEST).is_file():
        manifest = read_manifest(path)
        if manifest.get("kind") not in PLAIN_KINDS:
            model, tokenizer = load(path, wide=True)
            return Opened(model, tokenizer, manifest, path.name, tuple(manifest["calibration"]["documents"]))
        check_listed(path, manifest, [CONFIG])
        documents = tuple(manifest.get("documents", ()))
    where = resolve(folder)
    check_writes(where)
    stored = Weights(where).bytes_per_weight
    model = load_to_run(where)
    attach(model, 1).stored_bytes_per_weight = stored
    return Opened(model, load_tokenizer(where), None, origin(where), documents)

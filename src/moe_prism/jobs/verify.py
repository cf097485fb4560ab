"""Check a folder against its own manifest, then the model in it against its parts, for which alone libraries are imported."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .. import checkpoint
from ..checkpoint import Check
from ..checkpoint.manifest import WEIGHTS_FILE, check_layers
from ..result import Result


class Checks(list[Check], Result):
    """What was looked at, a `Check` each. folder: which one."""

    def __init__(self, folder: str | Path, found: Iterable[Check]) -> None:
        super().__init__(found)
        self.folder = str(folder)

    def to_json(self) -> dict[str, Any]:
        return {"folder": self.folder, "checks": self.to_records()}

    def to_records(self) -> list[dict[str, Any]]:
        return [asdict(check) for check in self]


def verify(folder: str | Path) -> Checks:
    """Recompute hashes, headers and finiteness, and compare the tensors with config.json, for an elastic model with prism.safetensors.

    Raises CorruptError naming what is wrong.

    >>> import moe_prism
    >>> [row["name"] for row in moe_prism.verify("elastic").to_records()][-2:]
    ['architecture', 'side tensors']
    """
    checks = list(checkpoint.verify(folder))
    manifest = checkpoint.read_manifest(folder)
    if (Path(folder) / "config.json").is_file() and WEIGHTS_FILE not in manifest:
        checks.append(_check_architecture(folder, manifest))
    if manifest.get("kind") == "elastic":
        checks.append(_check_side_tensors(folder, manifest))
    return Checks(folder, checks)


def _check_architecture(folder: str | Path, manifest: Mapping[str, Any]) -> Check:
    from ..checkpoint import LayerStream
    from ..checkpoint.mtp import check_mtp
    from ..compress.prune.remove import block_tensors
    from ..model import find_layers

    stream = LayerStream(folder)
    last = find_layers(stream.model)[-1]
    whole = manifest.get("pruning", {}).get("options", {}).get("mtp") == "keep"
    mtp = check_mtp(stream, block_tensors(stream, last), whole) if last.num_experts > 1 else ""
    unread = f", {len(stream.unused)} more that this model does not read" if stream.unused else ""
    told = f"; MTP layer {mtp} {'kept whole, as asked' if whole else 'has the same shapes'}" if mtp else ""
    read = len(stream.source.names()) - len(stream.unused)
    return Check("architecture", f"{read} tensors are those of config.json, in their shapes{unread}{told}")


def _check_side_tensors(folder: str | Path, manifest: Mapping[str, Any]) -> Check:
    """Against the model of config.json, whose weights stay on disk; of a GGUF file against prism.json."""
    from ..artefact.load import SIDE_FILE, check_complete, side_tensors
    from ..checkpoint import LayerStream
    from ..elastic.runtime import experts_per_token
    from ..elastic.side_tensors import LayerShape, check_shapes
    from ..model import find_layers

    rows, n_sub, gates = manifest["layers"], manifest["n_sub"], manifest["gates"]
    sides = side_tensors(folder, len(rows))
    check_complete(folder, sides)
    if WEIGHTS_FILE in manifest:
        shapes = [
            LayerShape(row["experts"], side["ridge"].shape[2] - n_sub * gates - 1, row["width"], n_sub, gates, None)
            for row, side in zip(rows, sides, strict=True)
        ]
    else:
        model = LayerStream(folder).model
        layers = find_layers(model)
        check_layers(folder, manifest, layers)
        k = experts_per_token(model, layers[0])
        shapes = [LayerShape(layer.num_experts, layer.hidden, layer.width, n_sub, gates, k) for layer in layers]
    for i, (side, shape) in enumerate(zip(sides, shapes, strict=True)):
        check_shapes(f"{Path(folder) / SIDE_FILE}: layer {i}", side, shape)
    return Check("side tensors", f"{len(rows)} layers fit the model")

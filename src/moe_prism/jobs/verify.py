"""Check a folder against its own manifest, and the model in it against its parts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import checkpoint
from ..checkpoint import Check, LayerStream
from ..checkpoint.manifest import WEIGHTS_FILE
from ..checkpoint.mtp import check_mtp
from ..compress.prune.remove import block_tensors
from ..model import find_layers


def verify(folder: str | Path) -> list[Check]:
    """Recompute hashes, headers and finiteness, and compare the tensors with config.json, for an elastic model with prism.safetensors.

    Raises CorruptError naming what is wrong.
    """
    checks = list(checkpoint.verify(folder))
    manifest = checkpoint.read_manifest(folder)
    if (Path(folder) / "config.json").is_file() and WEIGHTS_FILE not in manifest:
        checks.append(_check_architecture(folder, manifest))
    if manifest.get("kind") == "elastic":
        checks.append(_check_side_tensors(folder, manifest["layers"], manifest["n_sub"]))
    return checks


def _check_architecture(folder: str | Path, manifest: Mapping[str, Any]) -> Check:
    stream = LayerStream(folder)
    last = find_layers(stream.model)[-1]
    whole = manifest.get("pruning", {}).get("options", {}).get("mtp") == "keep"
    mtp = check_mtp(stream, block_tensors(stream, last), whole) if last.num_experts > 1 else ""
    unread = f", {len(stream.unused)} more that this model does not read" if stream.unused else ""
    told = f"; MTP layer {mtp} {'kept whole, as asked' if whole else 'has the same shapes'}" if mtp else ""
    read = len(stream.source.names()) - len(stream.unused)
    return Check("architecture", f"{read} tensors are those of config.json, in their shapes{unread}{told}")


def _check_side_tensors(folder: str | Path, layers: list[dict[str, int]], n_sub: int) -> Check:
    from ..artefact.load import side_tensors
    from ..elastic.side_tensors import CUTOFFS
    from ..errors import CorruptError

    for i, (tensors, layer) in enumerate(zip(side_tensors(folder, len(layers)), layers, strict=True)):
        ridge = tensors.get("ridge")
        if ridge is None or tuple(ridge.shape[:2]) != (layer["experts"], n_sub) or CUTOFFS not in tensors:
            raise CorruptError(f"prism.safetensors does not fit layer {i}", "run `moe-prism refactor` again")
        repair = tensors.get("repair")
        if repair is not None and (repair.ndim, repair.shape[1], repair.shape[3]) != (4, layer["experts"], layer["width"]):
            raise CorruptError(f"the repair in prism.safetensors does not fit layer {i}", "run `moe-prism recover` again")
    return Check("side tensors", f"{len(layers)} layers fit the model")

"""Findings about a model, read without loading its weights where that is possible."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..checkpoint import DequantizedSource, LayerStream, read_manifest
from ..checkpoint.manifest import MANIFEST
from ..errors import UsageError
from ..model import MoELayer, find_layers, load_model, resolve
from ..result import Findings

SUB_EXPERTS = (2, 4, 8, 16, 32)


def inspect_model(model: str | Path) -> Findings:
    """Layers, experts, shapes, bytes and the sub-expert counts that divide evenly, as JSON-ready values. n_sub is that of
    a folder that is elastic already, else None; quantized names the format of its weights, dtype what they stand for. CorruptError
    for a folder that is not whole.

    >>> import moe_prism
    >>> facts = moe_prism.inspect_model("nano")
    >>> facts["experts_per_token"], facts["sub_experts"], len(facts.to_records())
    (4, [2, 4, 8, 16, 32], 6)
    """
    where = resolve(model)
    if where.is_dir():
        stream = LayerStream(where)
        tree, dtype, unread = stream.model, stream.dtype, stream.unused
        quantized = stream.source if isinstance(stream.source, DequantizedSource) else None
        size = quantized.raw.bytes if quantized else stream.source.bytes
    else:
        tree, quantized = load_model(where), None
        dtype, size, unread = tree.dtype, where.stat().st_size, []
    layers = find_layers(tree)
    total = sum(p.numel() for p in tree.parameters())
    experts = sum(layer.num_experts * layer.parameters_per_expert() for layer in layers)
    found = {
        "model": str(model),
        "family": tree.config.model_type,
        "architecture": type(tree).__name__,
        "dtype": str(dtype).removeprefix("torch."),
        "quantized": quantized.form.name if quantized else None,
        "bytes_on_disk": size,
        "parameters": total,
        "expert_parameters": experts,
        "experts_per_token": _experts_per_token(tree, layers[0]),
        "layers": [_layer(layer) for layer in layers],
        "n_sub": _cut(where),
        "unread_tensors": unread,
        "sub_experts": [n for n in SUB_EXPERTS if all(layer.width % n == 0 for layer in layers)],
    }
    return Findings(found, "layers")


def _cut(where: Path) -> int | None:
    if not (where / MANIFEST).is_file():
        return None
    manifest = read_manifest(where)
    return int(manifest["n_sub"]) if manifest.get("kind") == "elastic" else None


def _layer(layer: MoELayer) -> dict[str, Any]:
    return {
        "name": layer.name,
        "kind": "dense" if layer.is_dense else "moe",
        "experts": layer.num_experts,
        "hidden": layer.hidden,
        "width": layer.width,
        "gated": layer.gate is not None,
        "biases": layer.down_bias is not None,
        "constants": len(layer.extra.vectors) if layer.extra and layer.extra.vectors is not None else 0,
    }


def _experts_per_token(tree: Any, layer: MoELayer) -> int | None:
    from ..elastic.runtime import experts_per_token

    try:
        return experts_per_token(tree, layer)
    except UsageError:
        return None

"""Open a model of which one decoder layer at a time is in memory: what is run is the same, layer by layer, read from disk every time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import LayerStream, check_listed, read_manifest
from ..checkpoint.companions import CONFIG, origin
from ..checkpoint.manifest import MANIFEST, PLAIN_KINDS, check_layers
from ..elastic import Elastic
from ..elastic.base import LayerParts
from ..elastic.execute.base import Executor
from ..elastic.execute.memory import InMemory
from ..errors import UsageError
from ..model import find_layers, load_tokenizer, resolve
from ..model.place import compute_type, stays_on_cpu
from ..point import OperatingPoint
from .load import check_complete, side_tensors, whole_manifest
from .open import Opened
from .source import Weights

LEAVE_OUT = "run it without --low-memory"


class StreamedElastic(Elastic):
    """The elastic state of a model whose layers come and go. Nothing that was prepared from a layer's weights outlives its forward."""

    def executor_of(self, parts: LayerParts) -> Executor:
        """By plain products: what compiled code prepares would keep the weights in memory."""
        executor = InMemory(parts)
        executor.way = "grouped"
        return executor

    def check(self, point: OperatingPoint) -> None:
        """UsageError for what changes or encodes weights before the model runs."""
        if point.weights is not None:
            raise UsageError("points that change the weights need all of them in memory", LEAVE_OUT)
        if point.slots.bits is not None:
            raise UsageError("points of several widths encode all weights in memory", LEAVE_OUT)


@contextmanager
def open_streamed(folder: str | Path) -> Iterator[Opened]:
    """`open_model` for the length of a block, with the decoder layers on disk but for the one that runs. No gradients.

    Raises UsageError for a model that is no folder of safetensors files, or where --device or --device-map say otherwise.
    """
    where = resolve(folder)
    if where.is_file():
        raise UsageError(f"--low-memory needs a folder of safetensors files, not '{where.name}'", "leave it out")
    stays_on_cpu("--low-memory", types=True)
    manifest: dict[str, Any] = read_manifest(where) if (where / MANIFEST).is_file() else {}
    is_elastic = bool(manifest) and manifest.get("kind") not in PLAIN_KINDS
    if is_elastic:
        whole_manifest(where)
    elif manifest:
        check_listed(where, manifest, [CONFIG])
    asked = compute_type()
    stream = LayerStream(where, torch.float32 if asked is None else asked if isinstance(asked, torch.dtype) else None)
    with torch.no_grad(), stream.streaming() as model:
        layers = find_layers(model)
        n_sub, gates = 1, 0
        tensors: list[dict[str, Any]] = [{} for _ in layers]
        if is_elastic:
            check_layers(where, manifest, layers)
            n_sub, gates, tensors = manifest["n_sub"], manifest["gates"], side_tensors(where, len(layers))
            check_complete(where, tensors)
        parts = [LayerParts(layer, n_sub, gates, dict(own)) for layer, own in zip(layers, tensors, strict=True)]
        elastic = StreamedElastic(model, parts)
        elastic.stored_bytes_per_weight = manifest["bytes_per_weight"] if is_elastic else Weights(where).bytes_per_weight
        model._moe_prism = elastic
        handles = [handle for name in stream.layer_names() for handle in _forget_around(model.get_submodule(name), elastic, name)]
        try:
            documents = manifest.get("calibration", manifest).get("documents", ())
            yield Opened(model, load_tokenizer(where), manifest if is_elastic else None, origin(where), tuple(documents))
        finally:
            for handle in handles:
                handle.remove()
            elastic.detach()


def _forget_around(module: Any, elastic: Elastic, name: str) -> tuple[Any, Any]:
    """Before a decoder layer runs its elastic layers forget what was made while it was empty, after that what they know of its weights."""
    inside = [layer for layer in elastic.layers if layer.parts.layer.name.startswith(f"{name}.")]

    def hook(*_: Any) -> None:
        for layer in inside:
            layer.forget_weights()

    return module.register_forward_pre_hook(hook), module.register_forward_hook(hook, always_call=True)

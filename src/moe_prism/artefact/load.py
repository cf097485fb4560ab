"""Load an elastic model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..checkpoint import elastic_manifest
from ..checkpoint.manifest import WEIGHTS_FILE
from ..elastic import attach
from ..elastic.side_tensors import of_today
from ..errors import CorruptError, UsageError
from ..model import find_layers, load_to_run, load_tokenizer
from ..store import StoreOptions, load_stored

SIDE_FILE = "prism.safetensors"
_NAME = re.compile(r"layers\.(?P<layer>[0-9]{1,6})\.(?P<name>.+)")


def load(folder: str | Path, dtype: torch.dtype | None = None, *, store: StoreOptions | None = None) -> tuple[Any, Any]:
    """(model, tokenizer) of a folder written by `refactor`: a transformers model that is elastic and runs at full budget.

    dtype None: float32 on a CPU, the checkpoint's own elsewhere. Change the price with `operating_point(model, budget=...)`.
    store: keep the experts on disk and this much of them in memory; the model then runs on the CPU in float32 (docs/explanation/store.md).
    Raises UsageError for a folder that is not a refactored model, CorruptError if prism.json was damaged.
    """
    manifest = elastic_manifest(folder)
    tensors = side_tensors(folder, len(manifest["layers"]))
    if store is not None and WEIGHTS_FILE in manifest:
        raise UsageError(
            f"'{folder}' holds a GGUF file, whose experts cannot be read one by one", "run it without --expert-memory"
        )
    if store is not None:
        return load_stored(Path(folder), manifest, tensors, store), load_tokenizer(folder)
    file = manifest.get(WEIGHTS_FILE)  # of an adopted GGUF
    model = load_to_run(Path(folder) / file if file else folder, dtype)
    layers = find_layers(model)
    if model.device.type == "cpu":
        for layer in layers:
            layer.arrange()
    attach(model, manifest["n_sub"], gates=manifest["gates"], tensors=tensors, layers=layers)
    model._moe_prism.stored_bytes_per_weight = manifest["bytes_per_weight"]
    return model, load_tokenizer(folder)


def side_tensors(folder: str | Path, layers: int) -> list[dict[str, torch.Tensor]]:
    """Side tensors per layer from prism.safetensors, whose names are `layers.<i>.<tensor>`, by today's names."""
    own: list[dict[str, torch.Tensor]] = [{} for _ in range(layers)]
    for key, tensor in read_tensors(Path(folder) / SIDE_FILE).items():
        found = _NAME.fullmatch(key)
        if found is None or int(found["layer"]) >= layers:
            raise CorruptError(f"{folder}/{SIDE_FILE}: '{key}' belongs to none of {layers} layers", "build the folder again")
        own[int(found["layer"])][found["name"]] = tensor
    return [of_today(tensors) for tensors in own]


def flat_side_tensors(layers: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The same by the names they have in the file."""
    return {f"layers.{i}.{name}": tensor for i, tensors in enumerate(layers) for name, tensor in tensors.items()}


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file. CorruptError if it is missing or damaged."""
    try:
        return load_file(str(path))  # type: ignore[no-any-return]
    except (OSError, SafetensorError) as error:
        raise CorruptError(f"{path} cannot be read: {error}", "restore the file, or build its folder again") from error

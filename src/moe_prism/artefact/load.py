"""Load an elastic model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..checkpoint import elastic_manifest
from ..elastic import attach
from ..errors import CorruptError
from ..model import find_layers, load_to_run, load_tokenizer
from ..store import StoreOptions, load_stored

SIDE_FILE = "prism.safetensors"


def load(folder: str | Path, dtype: torch.dtype | None = None, *, store: StoreOptions | None = None) -> tuple[Any, Any]:
    """(model, tokenizer) of a folder written by `refactor`: a transformers model that is elastic and runs at full budget.

    dtype None: float32 on a CPU, the checkpoint's own elsewhere. Change the price with `operating_point(model, budget=...)`.
    store: keep the experts on disk and this much of them in memory; the model then runs on the CPU in float32 (docs/explanation/store.md).
    Raises UsageError for a folder that is not a refactored model, CorruptError if prism.json was damaged.
    """
    manifest = elastic_manifest(folder)
    tensors = side_tensors(folder, len(manifest["layers"]))
    if store is not None:
        return load_stored(Path(folder), manifest, tensors, store), load_tokenizer(folder)
    model = load_to_run(folder, dtype)
    layers = find_layers(model)
    if model.device.type == "cpu":
        for layer in layers:
            layer.arrange()
    attach(model, manifest["n_sub"], gates=manifest["gates"], tensors=tensors, layers=layers)
    model._moe_prism.stored_bytes_per_weight = manifest["bytes_per_weight"]
    return model, load_tokenizer(folder)


def side_tensors(folder: str | Path, layers: int) -> list[dict[str, torch.Tensor]]:
    """Side tensors per layer from prism.safetensors, whose names are `layers.<i>.<tensor>`."""
    flat = read_tensors(Path(folder) / SIDE_FILE)
    prefix = "layers.{}."
    return [
        {k.removeprefix(prefix.format(i)): v for k, v in flat.items() if k.startswith(prefix.format(i))} for i in range(layers)
    ]


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file. CorruptError if it is missing or damaged."""
    try:
        return load_file(str(path))  # type: ignore[no-any-return]
    except (OSError, SafetensorError) as error:
        raise CorruptError(f"{path} cannot be read: {error}", "restore the file, or build its folder again") from error
